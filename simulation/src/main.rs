//! `thalweg-simulate`: plays seeds, or one seed with its history.

use std::process::ExitCode;

use clap::Parser;
use thalweg_simulation::{Mutation, Options, run};

/// Plays the protocol's state machines in a world of faults, one seed after another.
///
/// A seed that breaks an invariant is named with the command that replays it.
#[derive(Debug, Parser)]
struct Args {
    /// Seeds to play
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Play one seed and show the end of its history
    #[arg(long)]
    seed: Option<u64>,
    /// Re-introduce a bug, to see that it is found
    #[arg(long, value_parser = mutation)]
    mutation: Option<Mutation>,
}

fn mutation(text: &str) -> Result<Mutation, String> {
    let names = || Mutation::ALL.map(Mutation::name).join(", ");
    Mutation::ALL.into_iter().find(|known| known.name() == text).ok_or_else(|| format!("one of {}", names()))
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let mutation = args.mutation;
    if let Some(seed) = args.seed {
        let report = run(&Options { seed, mutation, trace: true })?;
        report.trace.iter().for_each(|line| eprintln!("{line}"));
        eprintln!(
            "{} steps, {} ms, {} faults: {:?}",
            report.steps, report.virtual_ms, report.faults, report.violation
        );
        return Ok(if report.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    }
    let (mut steps, mut faults) = (0, 0);
    for seed in args.first..args.first + args.seeds {
        let report = run(&Options { seed, mutation, trace: false })?;
        steps += report.steps;
        faults += report.faults;
        if let Some(violation) = report.violation {
            let with =
                mutation.map(|mutation| format!(" --mutation {}", mutation.name())).unwrap_or_default();
            eprintln!("seed {seed}: {violation}\nreplay: thalweg-simulate --seed {seed}{with}");
            return Ok(ExitCode::FAILURE);
        }
    }
    eprintln!("{} seeds, {steps} steps, {faults} faults: every invariant held", args.seeds);
    Ok(ExitCode::SUCCESS)
}

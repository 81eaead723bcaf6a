//! `thalweg-simulate`: plays seeds, or one seed with its history.

#![expect(clippy::print_stdout, reason = "its output is the history, for a reader or a pipe")]

use std::{
    io::IsTerminal as _,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use thalweg_simulation::{Mutation, Options, Report, minimise, run};

/// Plays the protocol's state machines in a world of faults, one seed after another.
///
/// A seed that breaks an invariant is named with the command that replays it, and its history is shown with
/// the faults that it does not need left out.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Seeds to play
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Play one seed and show its history
    #[arg(long, conflicts_with_all = ["seeds", "first"])]
    seed: Option<u64>,
    /// With --seed: leave these faults out
    #[arg(long, value_delimiter = ',', requires = "seed")]
    skip: Vec<u32>,
    /// With --seed: train for so many rounds
    #[arg(long, requires = "seed")]
    rounds: Option<u64>,
    /// With --seed: leave out the faults and rounds that its violation does not need
    #[arg(long, requires = "seed")]
    minimise: bool,
    /// Re-introduce a bug, to see that it is found
    #[arg(long)]
    mutation: Option<Mutation>,
    /// Threads; 0 = one a CPU
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Go on after a violation, and name all seeds that break something
    #[arg(long)]
    keep_going: bool,
    /// The last line as JSON
    #[arg(long)]
    json: bool,
}

fn replay(options: &Options) -> String {
    let mut command = format!("thalweg-simulate --seed {}", options.seed);
    if let Some(mutation) = options.mutation {
        command += &format!(" --mutation {}", mutation.name());
    }
    if !options.skip.is_empty() {
        let skip: Vec<_> = options.skip.iter().map(u32::to_string).collect();
        command += &format!(" --skip {}", skip.join(","));
    }
    if let Some(rounds) = options.rounds {
        command += &format!(" --rounds {rounds}");
    }
    command
}

fn show(options: &Options, report: &Report) {
    report.trace.iter().for_each(|line| println!("{line}"));
    println!("{} steps, {} ms", report.steps, report.virtual_ms);
    for (number, at, what) in &report.faults {
        println!("fault {number} at {at} ms: {what}");
    }
    match &report.violation {
        Some(violation) => println!("VIOLATION {violation}\nreplay: {}", replay(options)),
        None => println!("every invariant held"),
    }
}

fn one(args: &Args, seed: u64) -> anyhow::Result<ExitCode> {
    let options =
        Options { seed, mutation: args.mutation, trace: true, skip: args.skip.clone(), rounds: args.rounds };
    let (options, report) = match args.minimise.then(|| minimise(&options)).transpose()?.flatten() {
        Some(minimised) => minimised,
        None => {
            let report = run(&options)?;
            (options, report)
        }
    };
    show(&options, &report);
    Ok(if report.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What all seeds together did.
#[derive(Default)]
struct Totals {
    next: AtomicU64,
    played: AtomicU64,
    steps: AtomicU64,
    faults: AtomicU64,
}

fn play(
    args: &Args,
    totals: &Totals,
    bar: &ProgressBar,
    found: &std::sync::Mutex<Vec<(u64, String)>>,
) -> anyhow::Result<()> {
    loop {
        let stop =
            !args.keep_going && !found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_empty();
        let seed = totals.next.fetch_add(1, Ordering::Relaxed);
        if stop || seed >= args.first + args.seeds {
            return Ok(());
        }
        let report = run(&Options { seed, mutation: args.mutation, ..Options::default() })?;
        totals.played.fetch_add(1, Ordering::Relaxed);
        totals.steps.fetch_add(report.steps, Ordering::Relaxed);
        totals.faults.fetch_add(report.faults.len() as u64, Ordering::Relaxed);
        bar.inc(1);
        if let Some(violation) = report.violation {
            let options = Options { seed, mutation: args.mutation, ..Options::default() };
            bar.suspend(|| eprintln!("seed {seed}: {violation}\nreplay: {}", replay(&options)));
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            found.push((seed, violation.to_string()));
        }
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if let Some(seed) = args.seed {
        return one(&args, seed);
    }
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        threads => threads,
    };
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new(args.seeds) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {per_sec}, {eta} left")?);
    let totals = Totals { next: AtomicU64::new(args.first), ..Totals::default() };
    let found = std::sync::Mutex::new(Vec::new());
    let begun = std::time::Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| play(&args, &totals, &bar, &found))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(played) => played,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    bar.finish_and_clear();
    let mut found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    found.sort();
    let (played, steps, faults) = (
        totals.played.load(Ordering::Relaxed),
        totals.steps.load(Ordering::Relaxed),
        totals.faults.load(Ordering::Relaxed),
    );
    let seconds = begun.elapsed().as_secs_f64();
    eprintln!(
        "{played} seeds, {steps} steps, {faults} faults in {seconds:.0} s: {}",
        if found.is_empty() {
            "every invariant held".to_owned()
        } else {
            format!("{} violations", found.len())
        }
    );
    if let Some((seed, _)) = found.first()
        && !args.keep_going
    {
        let options = Options { seed: *seed, mutation: args.mutation, ..Options::default() };
        if let Some((options, report)) = minimise(&options)? {
            show(&options, &report);
        }
    }
    if args.json {
        let violations: Vec<_> =
            found.iter().map(|(seed, what)| serde_json::json!({ "seed": seed, "violation": what })).collect();
        println!(
            "{}",
            serde_json::json!({
                "seeds": played, "steps": steps, "faults": faults, "seconds": seconds, "violations": violations,
            })
        );
    }
    Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

//! `thalweg bench metrics`: what recording metrics costs, against the same deployment without.

use std::{
    fs,
    io::{IsTerminal as _, Write as _},
};

use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde_json::{Value, json};
use thalweg_protocol::Durability;

use super::{
    callgrind::Counts,
    crew::{Command, Crew},
    figures::{confidence, mean},
    gradient::Gradient,
    load::Function,
    stack::{Invokers, Options, Stack},
    worker::WorkerArgs,
};
use crate::demo::quantile;

/// Arguments of `thalweg bench metrics`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Pairs of measurements that are compared
    #[arg(long, default_value_t = 10, conflicts_with = "instructions", value_parser = clap::value_parser!(u32).range(2..))]
    pairs: u32,
    /// Rounds of one measurement
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Size of the gradient, MiB of f32; smaller ones have more to record for each byte
    #[arg(long, default_value_t = 64.0)]
    mib: f64,
    /// Worker processes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: u32,
    /// Instead of comparing CPU time, count instructions by valgrind's callgrind: those that functions of metrics execute,
    /// with all that they call. Some fifty times slower, and without the noise of a shared machine
    #[arg(long)]
    instructions: bool,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

const WARM_UP: u32 = 3;

/// A deployment, and workers that train with it.
struct Side {
    stack: Stack,
    crew: Crew,
    round: u32,
    /// CPU seconds of each measurement.
    cpu: Vec<f64>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    if args.instructions {
        return instructions(args);
    }
    let gradient = Gradient::of_mib(args.mib);
    let bar = progress(args, u64::from(args.pairs), "starting");
    let mut sides =
        [Side::start(args, gradient, true, Vec::new())?, Side::start(args, gradient, false, Vec::new())?];
    let measured = measure(args, &mut sides, &bar);
    if let Err(error) = measured {
        sides.iter().for_each(|side| side.stack.explain());
        return Err(error);
    }
    bar.finish_and_clear();
    let report = report(args, gradient, &sides);
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "CPU with metrics {:.3} s/GiB, without {:.3}: {:+.2} % (95 % confidence: ±{:.2})",
            report["cpu_seconds_per_gib"]["with"].as_f64().unwrap_or(f64::NAN),
            report["cpu_seconds_per_gib"]["without"].as_f64().unwrap_or(f64::NAN),
            report["cost_percent_mean"].as_f64().unwrap_or(f64::NAN),
            report["cost_percent_ci95"].as_f64().unwrap_or(f64::NAN),
        )?;
    }
    writeln!(out, "{report}")?;
    drop(out);
    for side in sides {
        side.crew.dismiss()?;
        side.stack.stop()?;
    }
    Ok(())
}

fn progress(args: &Args, length: u64, message: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(length).with_message(message);
    if !std::io::stderr().is_terminal() || args.json {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

fn measure(args: &Args, sides: &mut [Side; 2], bar: &ProgressBar) -> anyhow::Result<()> {
    for side in &mut *sides {
        side.rounds(WARM_UP)?;
    }
    for pair in 0..args.pairs {
        bar.set_message(format!("pair {}", pair + 1));
        // Alternating which side goes first.
        for side in [pair % 2, (pair + 1) % 2] {
            let side = &mut sides[side as usize];
            let cpu = side.rounds(args.rounds)?;
            side.cpu.push(cpu);
        }
        bar.inc(1);
    }
    Ok(())
}

impl Side {
    fn start(args: &Args, gradient: Gradient, metrics: bool, wrapper: Vec<String>) -> anyhow::Result<Self> {
        let options = Options {
            invokers: Invokers::fixed(1),
            broker_memory_bytes: (1 << 30_u64).max(2 * u64::from(args.workers) * gradient.bytes()),
            sync_always: false,
            settings: vec![format!("admin.metrics={metrics}")],
            logs: None,
        };
        let stack = Stack::start_under(wrapper, &options)?;
        let mut crew = Crew::new();
        for rank in 0..args.workers {
            let ranks = (rank, args.workers);
            let worker = WorkerArgs::new(stack.url(), ranks, gradient, Durability::Process, Function::Sum);
            crew.hire(&worker.command_line())?;
        }
        crew.hear()?;
        Ok(Self { stack, crew, round: 0, cpu: Vec::new() })
    }

    /// Rounds whose results are checked; the CPU seconds of the deployment that went into them. Workers record nothing.
    fn rounds(&mut self, rounds: u32) -> anyhow::Result<f64> {
        let before = self.stack.cpu();
        for _ in 0..rounds {
            self.round += 1;
            self.crew.all(Command::Prepare { round: self.round })?;
            self.crew.round(Command::Thalweg)?;
            self.crew.all(Command::Check { raw: false })?;
        }
        Ok(self.stack.cpu().since(before).total())
    }
}

/// Counts instructions: those of a long run, less those of one that only warms up.
fn instructions(args: &Args) -> anyhow::Result<()> {
    let gradient = Gradient::of_mib(args.mib);
    let bar = progress(args, u64::from(2 * WARM_UP + args.rounds), "counting instructions");
    let warm_up = counted(args, gradient, WARM_UP, &bar)?;
    let counts = counted(args, gradient, WARM_UP + args.rounds, &bar)?.since(warm_up);
    bar.finish_and_clear();
    let mib = f64::from(args.workers * args.rounds) * gradient.bytes() as f64 / f64::from(1 << 20);
    let cost = counts.part as f64 / (counts.all - counts.part) as f64;
    let report = json!({
        "rounds": args.rounds,
        "workers": args.workers,
        "mib": gradient.bytes() as f64 / f64::from(1 << 20),
        "instructions_per_mib": { "all": counts.all as f64 / mib, "metrics": counts.part as f64 / mib },
        "cost_percent": cost * 100.0,
    });
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "{:.0} instructions per MiB, of which {:.0} for metrics: {:.2} % more than without",
            counts.all as f64 / mib,
            counts.part as f64 / mib,
            cost * 100.0,
        )?;
    }
    writeln!(out, "{report}")?;
    Ok(())
}

/// Instructions of store, gateway, autoscaler and invoker, from their starts to their ends, with so many rounds.
fn counted(args: &Args, gradient: Gradient, rounds: u32, bar: &ProgressBar) -> anyhow::Result<Counts> {
    let directory = tempfile::tempdir().context("creating a temporary directory")?;
    let profiles = format!("--callgrind-out-file={}/%p", directory.path().display());
    let wrapper = ["valgrind", "--tool=callgrind", "--quiet", "--trace-children=yes", &profiles];
    let mut side = Side::start(args, gradient, true, wrapper.map(str::to_owned).to_vec())?;
    for _ in 0..rounds {
        if let Err(error) = side.rounds(1) {
            side.stack.explain();
            return Err(error);
        }
        bar.inc(1);
    }
    side.crew.dismiss()?;
    side.stack.stop()?;
    let (mut counts, mut processes) = (Counts::default(), 0);
    for file in fs::read_dir(directory.path())? {
        let profile = fs::read_to_string(file?.path())?;
        let one = Counts::read(&profile, records, is_of_metrics).context("callgrind has counted nothing")?;
        (counts, processes) = (counts.and(one), processes + 1);
    }
    // Whoever was killed has left no count.
    ensure!(processes == 4, "callgrind has counted {processes} processes instead of 4");
    Ok(counts)
}

/// Whether a function belongs to our modules called `metrics` or to the crates that they use; Tokio and sled have modules
/// of that name too.
fn records(function: &str) -> bool {
    let ours = |before: &str| {
        let path = before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').next();
        path.is_some_and(|path| {
            path.is_empty()
                || path
                    .strip_suffix("::")
                    .is_some_and(|name| name.starts_with("thalweg") && !name.contains(':'))
        })
    };
    function.contains("metrics_exporter_prometheus::")
        || function.contains("metrics_util::")
        || function.match_indices("metrics::").any(|(at, _)| ours(&function[..at]))
}

fn is_of_metrics(file: &str) -> bool {
    file.contains("/metrics-0") || file.contains("/metrics-util-") || file.contains("/metrics-exporter-")
}

/// By how much more there is with than without in each pair, percent.
fn costs(with: &[f64], without: &[f64]) -> Vec<f64> {
    with.iter().zip(without).map(|(with, without)| (with / without - 1.0) * 100.0).collect()
}

fn report(args: &Args, gradient: Gradient, [with, without]: &[Side; 2]) -> Value {
    let gib = f64::from(args.workers) * gradient.bytes() as f64 / f64::from(1 << 30) * f64::from(args.rounds);
    let costs = costs(&with.cpu, &without.cpu);
    json!({
        "pairs": args.pairs,
        "rounds": args.rounds,
        "workers": args.workers,
        "mib": gradient.bytes() as f64 / f64::from(1 << 20),
        "cpu_seconds_per_gib": {
            "with": quantile(&with.cpu, 0.5) / gib,
            "without": quantile(&without.cpu, 0.5) / gib,
        },
        "cost_percent_median": quantile(&costs, 0.5),
        "cost_percent_mean": mean(costs.iter().copied()),
        "cost_percent_ci95": confidence(&costs),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_records_is_told_by_its_name() {
        for name in [
            "thalweg_invoker::metrics::folded",
            "<metrics::label::Label as core::clone::Clone>::clone",
            "core::ptr::drop_in_place<metrics_util::registry::recency::Generational<T>>",
            "<metrics_exporter_prometheus::recorder::PrometheusRecorder as metrics::recorder::Recorder>::describe_gauge",
        ] {
            assert!(records(name), "{name}");
        }
        for name in [
            "tokio::runtime::metrics::batch::MetricsBatch::new",
            "<sled::metrics::Metrics as core::default::Default>::default",
            "thalweg::bench::metrics::run",
            "thalweg_invoker::run::Shell::step",
        ] {
            assert!(!records(name), "{name}");
        }
    }
}

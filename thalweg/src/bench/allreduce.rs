//! `thalweg bench allreduce`: worker processes against a whole deployment, next to the bare pattern.

use std::{
    io::{IsTerminal as _, Write as _},
    ops::{Add, Sub},
    path::PathBuf,
};

use clap::ValueEnum;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use thalweg_protocol::Durability;

use super::{
    crew::{Command, Crew},
    gradient::Gradient,
    load::Function,
    stack::{Cpu, Invokers, Options, Stack},
    worker::WorkerArgs,
};
use crate::{
    demo::{durability, quantile},
    models::Model,
};

/// Arguments of `thalweg bench allreduce`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Worker processes
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: u32,
    /// Size of the gradient, MiB of f32, in tensors of 4 MiB
    #[arg(long, default_value_t = 64.0)]
    mib: f64,
    /// The tensors of this model instead
    #[arg(long, conflicts_with = "mib")]
    model: Option<Model>,
    /// Rounds that count, after three that do not
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// What a result has survived when a worker sees it: `process` or `disk`
    #[arg(long, default_value = "process", value_parser = durability)]
    durability: Durability,
    /// What to compare with, in the same run, round about
    #[arg(long)]
    vs: Option<Peer>,
    /// What is done with the gradients
    #[arg(long, default_value = "sum")]
    function: Function,
    /// Invokers, fixed during the run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    invokers: u16,
    /// Keep the components' logs in this directory
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

/// What to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// A JetStream work queue, summed and sent to all, by nothing but a NATS client
    Raw,
}

const WARM_UP: u32 = 3;
/// Messages of the bare pattern that are tried, KiB.
const MESSAGE_KIB: [usize; 3] = [128, 256, 512];
/// Unconfirmed bytes of a worker that are tried, MiB.
const WINDOW_MIB: [usize; 3] = [2, 8, 32];
/// Rounds of each combination, the first of which does not count.
const SWEEP_ROUNDS: usize = 3;
/// The best of them run this often again.
const FINAL_ROUNDS: usize = 5;
const FINALISTS: usize = 3;

/// CPU time of everybody, seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    stack: Cpu,
    workers: f64,
    folder: f64,
}

impl Usage {
    fn zip(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            stack: self.stack.zip(other.stack, &f),
            workers: f(self.workers, other.workers),
            folder: f(self.folder, other.folder),
        }
    }
}

impl Add for Usage {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        self.zip(other, |one, other| one + other)
    }
}

impl Sub for Usage {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.zip(other, |one, other| one - other)
    }
}

/// The bare pattern, ready.
struct Raw {
    folder: Crew,
    message_bytes: usize,
    window_bytes: usize,
    seconds: Vec<f64>,
    usage: Usage,
}

struct Bench<'a> {
    args: &'a Args,
    stack: Stack,
    crew: Crew,
    gradient: Gradient,
    /// Number of the round that was run last, of either kind.
    round: u32,
    seconds: Vec<f64>,
    usage: Usage,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let gradient = match args.model {
        Some(model) => Gradient::Of { model, scale: 1.0 },
        None => Gradient::of_mib(args.mib),
    };
    // The bare pattern has no bound on what waits in its queue but the models themselves.
    let models = u64::from(args.workers) * gradient.bytes();
    let stack = Stack::start(&Options {
        invokers: Invokers::fixed(args.invokers.into()),
        broker_memory_bytes: (2 << 30_u64).max(2 * models),
        sync_always: args.durability == Durability::Disk,
        settings: Vec::new(),
        logs: args.logs.clone(),
    })?;
    let (round, seconds, usage) = (0, Vec::new(), Usage::default());
    let mut bench = Bench { args, stack, crew: Crew::new(), gradient, round, seconds, usage };
    let raw = match bench.measure() {
        Ok(raw) => raw,
        Err(error) => {
            bench.stack.explain();
            return Err(error);
        }
    };
    let report = bench.report(raw.as_ref());
    let mut out = std::io::stdout().lock();
    if !args.json {
        write!(out, "{}", bench.table(raw.as_ref()))?;
    }
    writeln!(out, "{report}")?;
    drop(out);
    bench.crew.dismiss()?;
    raw.map_or(Ok(()), |raw| raw.folder.dismiss())?;
    bench.stack.stop()
}

impl Bench<'_> {
    fn measure(&mut self) -> anyhow::Result<Option<Raw>> {
        let (args, url) = (self.args, self.stack.url());
        let bar = progress(args);
        bar.set_message("starting");
        for rank in 0..args.workers {
            let (ranks, gradient) = ((rank, args.workers), self.gradient);
            let worker = WorkerArgs::new(url.clone(), ranks, gradient, args.durability, args.function);
            self.crew.hire(&worker.command_line())?;
        }
        self.crew.hear()?;
        let mut raw = match args.vs {
            Some(Peer::Raw) => {
                bar.set_message("looking for the best message size and window of the bare pattern");
                Some(self.sweep(&url, &bar)?)
            }
            None => None,
        };
        bar.set_message("warming up");
        for _ in 0..WARM_UP {
            self.thalweg_round(None)?;
        }
        self.usage = Usage::default();
        bar.set_length(u64::from(args.rounds));
        bar.set_position(0);
        for round in 0..args.rounds {
            // Alternating which side goes first. Each counted round follows one of its own kind that does not
            // count, so that neither pays for what the other leaves behind in the broker's memory.
            for ours in [round % 2 == 0, round % 2 == 1] {
                if ours {
                    if raw.is_some() {
                        self.thalweg_round(raw.as_ref())?;
                    }
                    let (seconds, usage) = self.thalweg_round(raw.as_ref())?;
                    self.seconds.push(seconds);
                    self.usage = self.usage + usage;
                    bar.set_message(format!("{:.1} ms", seconds * 1e3));
                } else if let Some(raw) = &mut raw {
                    self.raw_round(&raw.folder, raw.message_bytes, raw.window_bytes)?;
                    let (seconds, usage) =
                        self.raw_round(&raw.folder, raw.message_bytes, raw.window_bytes)?;
                    raw.seconds.push(seconds);
                    raw.usage = raw.usage + usage;
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(raw)
    }

    fn prepare(&mut self) -> anyhow::Result<()> {
        self.round += 1;
        self.crew.all(Command::Prepare { round: self.round }).map(drop)
    }

    /// One round, checked: seconds, and the CPU time that went into it.
    fn thalweg_round(&mut self, raw: Option<&Raw>) -> anyhow::Result<(f64, Usage)> {
        self.timed(Command::Thalweg, false, raw.map(|raw| &raw.folder))
    }

    fn raw_round(
        &mut self,
        folder: &Crew,
        message_bytes: usize,
        window_bytes: usize,
    ) -> anyhow::Result<(f64, Usage)> {
        self.timed(Command::Raw { message_bytes, window_bytes }, true, Some(folder))
    }

    fn timed(&mut self, command: Command, raw: bool, folder: Option<&Crew>) -> anyhow::Result<(f64, Usage)> {
        self.prepare()?;
        let folder_seconds = || folder.map_or(0.0, Crew::cpu_seconds);
        let before =
            Usage { stack: self.stack.cpu(), workers: self.crew.cpu_seconds(), folder: folder_seconds() };
        let seconds = self.crew.round(command)?;
        let workers = self.crew.cpu_seconds();
        self.crew.all(Command::Check { raw })?;
        // After the check, so that what the others do behind the results counts.
        let after = Usage { stack: self.stack.cpu(), workers, folder: folder_seconds() };
        Ok((seconds, after - before))
    }

    /// Starts the bare pattern and finds its best message size and window.
    fn sweep(&mut self, url: &str, bar: &ProgressBar) -> anyhow::Result<Raw> {
        let mut folder = Crew::new();
        let workers = self.args.workers.to_string();
        folder.hire(&["bench-folder", "--url", url, "--workers", &workers].map(str::to_owned))?;
        folder.hear()?;
        self.crew.all(Command::ConnectRaw)?;
        let model = self.gradient.elements() * 4;
        let mut tried: Vec<(usize, usize, Vec<f64>)> = Vec::new();
        for message in MESSAGE_KIB.map(|kib| kib << 10) {
            for window in WINDOW_MIB.map(|mib| mib << 20) {
                // What holds a whole model cannot be told apart.
                let (message, window) = (message.min(model.next_multiple_of(4096)), window.min(model));
                if !tried.iter().any(|(m, w, _)| (*m, *w) == (message, window)) {
                    tried.push((message, window, Vec::new()));
                }
            }
        }
        let total = tried.len() * SWEEP_ROUNDS + FINALISTS.min(tried.len()) * FINAL_ROUNDS;
        bar.set_length(total as u64);
        let median = |seconds: &[f64]| quantile(seconds, 0.5);
        for (rounds, keep) in [(SWEEP_ROUNDS, FINALISTS), (FINAL_ROUNDS, 1)] {
            for (message, window, seconds) in &mut tried {
                for round in 0..rounds {
                    let (taken, _) = self.raw_round(&folder, *message, *window)?;
                    if round > 0 {
                        seconds.push(taken);
                    }
                    bar.inc(1);
                }
            }
            tried.sort_by(|one, other| median(&one.2).total_cmp(&median(&other.2)));
            for (message, window, seconds) in &tried {
                let (kib, mib) = (message >> 10, *window as f64 / f64::from(1 << 20));
                let line = format!(
                    "raw: messages of {kib:4} KiB, window of {mib:5.2} MiB: {:8.2} ms",
                    median(seconds) * 1e3
                );
                bar.suspend(|| eprintln!("{line}"));
            }
            tried.truncate(keep);
        }
        let (message_bytes, window_bytes, _) = tried.swap_remove(0);
        let (kib, mib) = (message_bytes >> 10, window_bytes as f64 / f64::from(1 << 20));
        bar.suspend(|| eprintln!("raw: taking messages of {kib} KiB and a window of {mib:.2} MiB"));
        Ok(Raw { folder, message_bytes, window_bytes, seconds: Vec::new(), usage: Usage::default() })
    }

    fn pushed_bytes(&self) -> f64 {
        f64::from(self.args.workers) * self.gradient.bytes() as f64
    }

    fn rate(&self, seconds: &[f64]) -> f64 {
        self.pushed_bytes() / 1e6 / quantile(seconds, 0.5)
    }

    /// Per GiB pushed in the counted rounds.
    fn per_gib(&self, seconds: f64) -> f64 {
        seconds * f64::from(1 << 30) / (self.pushed_bytes() * f64::from(self.args.rounds))
    }

    fn ratio(&self, raw: &Raw) -> f64 {
        let ratios: Vec<_> = raw.seconds.iter().zip(&self.seconds).map(|(raw, ours)| raw / ours).collect();
        quantile(&ratios, 0.5)
    }

    fn report(&self, raw: Option<&Raw>) -> Value {
        let Usage { stack, workers, .. } = self.usage;
        let milliseconds = |seconds: &[f64], q| quantile(seconds, q) * 1e3;
        let mut report = json!({
            "workers": self.args.workers,
            "model": self.args.model.map(Model::name),
            "mib": self.gradient.bytes() as f64 / f64::from(1 << 20),
            "rounds": self.args.rounds,
            "function": self.args.function.name(),
            "invokers": self.args.invokers,
            "durability": self.args.durability.to_string(),
            "round_ms_p50": milliseconds(&self.seconds, 0.5),
            "round_ms_p99": milliseconds(&self.seconds, 0.99),
            "pushed_mb_per_s": self.rate(&self.seconds),
            "cpu_seconds_per_gib": {
                "broker": self.per_gib(stack.broker),
                "invokers": self.per_gib(stack.invokers),
                "store": self.per_gib(stack.store),
                "gateway": self.per_gib(stack.gateway + stack.autoscaler),
                "workers": self.per_gib(workers),
                "total": self.per_gib(stack.total() + workers),
            },
            "peers": {},
            "ratio": {},
        });
        if let Some(raw) = raw {
            report["peers"]["raw"] = json!({
                "pushed_mb_per_s": self.rate(&raw.seconds),
                "round_ms_p50": milliseconds(&raw.seconds, 0.5),
                "round_ms_p99": milliseconds(&raw.seconds, 0.99),
                "message_kib": raw.message_bytes as f64 / 1024.0,
                "window_mib": raw.window_bytes as f64 / f64::from(1 << 20),
                "cpu_seconds_per_gib": {
                    "broker": self.per_gib(raw.usage.stack.broker),
                    "folder": self.per_gib(raw.usage.folder),
                    "workers": self.per_gib(raw.usage.workers),
                    "total": self.per_gib(raw.usage.stack.total() + raw.usage.folder + raw.usage.workers),
                },
            });
            report["ratio"]["raw"] = self.ratio(raw).into();
        }
        report
    }

    fn table(&self, raw: Option<&Raw>) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        let row = |name: &str, ours: String, theirs: Option<String>| {
            [Some(name.to_owned()), Some(ours), theirs].into_iter().flatten().collect::<Vec<_>>()
        };
        table.set_header(row("", "Thalweg".to_owned(), raw.map(|_| "raw".to_owned())));
        for (name, q) in [("round, median", 0.5), ("round, p99", 0.99)] {
            let show = |seconds: &[f64]| format!("{:.2} ms", quantile(seconds, q) * 1e3);
            table.add_row(row(name, show(&self.seconds), raw.map(|raw| show(&raw.seconds))));
        }
        let show = |seconds: &[f64]| format!("{:.0} MB/s", self.rate(seconds));
        table.add_row(row("pushed", show(&self.seconds), raw.map(|raw| show(&raw.seconds))));
        let part = |name: &str, of: &dyn Fn(&Usage) -> f64| {
            let show = |usage: &Usage| format!("{:.2} s", self.per_gib(of(usage)));
            row(name, show(&self.usage), raw.map(|raw| show(&raw.usage)))
        };
        table.add_row(part("CPU per GiB: broker", &|usage| usage.stack.broker));
        table.add_row(part("invokers, folder", &|usage| usage.stack.invokers + usage.folder));
        table.add_row(part("store", &|usage| usage.stack.store));
        table.add_row(part("gateway, autoscaler", &|usage| usage.stack.gateway + usage.stack.autoscaler));
        table.add_row(part("workers", &|usage| usage.workers));
        if let Some(raw) = raw {
            table.add_row(row("speed over raw", format!("{:.2}", self.ratio(raw)), Some(String::new())));
        }
        format!("{table}\n")
    }
}

fn progress(args: &Args) -> ProgressBar {
    let bar = ProgressBar::new(u64::from(args.rounds));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}") {
        bar.set_style(style);
    }
    bar
}

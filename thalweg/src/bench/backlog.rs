//! `thalweg bench backlog`: a model many times an invoker's memory, pushed by workers of which one is late.

use std::{
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde_json::json;
use thalweg_broker::{Connection, NatsConfig, Queues as _, StreamsConfig};
use thalweg_protocol::Durability;
use tokio_util::sync::CancellationToken;

use super::{
    crew::{Command, Crew, seconds},
    gradient::Gradient,
    load::Function,
    stack::{Invokers, Options, Stack},
    worker::WorkerArgs,
};
use crate::process;

/// Arguments of `thalweg bench backlog`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Pushing processes; the last one is late
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=256))]
    workers: u32,
    /// Size of the model, MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=16_384))]
    mib: u64,
    /// Memory of the one invoker, MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..))]
    budget_mib: u64,
    /// Keep the components' logs in this directory
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

/// Elements of one tensor: 8 MiB.
const TENSOR_ELEMENTS: u64 = 2 << 20;
/// Bytes that all workers together may have in flight; the broker holds twice that.
const WINDOW_BUDGET: u64 = 1 << 30;
/// Pushed beyond its window by each, so that the window is full.
const BEYOND: u64 = 32 << 20;
/// The queue has stopped growing when it has not grown for this long.
const SETTLED: Duration = Duration::from_secs(1);
/// Longest wait for that.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(50);

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let stack = Stack::start(&Options {
        invokers: Invokers::fixed(1),
        broker_memory_bytes: 2 * WINDOW_BUDGET,
        sync_always: false,
        settings: vec![
            format!("gateway.window_budget_bytes={WINDOW_BUDGET}"),
            format!("invoker.memory_bytes={}", args.budget_mib << 20),
        ],
        logs: args.logs.clone(),
    })?;
    let mut crew = Crew::new();
    let outcome = match measure(args, &stack, &mut crew) {
        Ok(outcome) => outcome,
        Err(error) => {
            stack.explain();
            return Err(error);
        }
    };
    let peak_mib = outcome.peak_rss_bytes as f64 / f64::from(1 << 20);
    let queued_mib = outcome.queued_bytes as f64 / f64::from(1 << 20);
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "{} workers pushed {} MiB each in {:.1} s, one of them after {queued_mib:.0} MiB had piled up; the \
             invoker took at most {peak_mib:.0} of {} MiB",
            args.workers, args.mib, outcome.seconds, args.budget_mib
        )?;
    }
    let report = json!({
        "workers": args.workers,
        "mib": args.mib,
        "invoker_peak_rss_mib": peak_mib,
        "budget_mib": args.budget_mib,
        "queued_mib": queued_mib,
        "seconds": outcome.seconds,
        // Every element of every result was compared; one that differs ends the benchmark.
        "ok": peak_mib <= args.budget_mib as f64,
    });
    writeln!(out, "{report}")?;
    drop(out);
    crew.dismiss()?;
    stack.stop()
}

struct Outcome {
    peak_rss_bytes: u64,
    /// In the queues when the late one began.
    queued_bytes: u64,
    seconds: f64,
}

fn measure(args: &Args, stack: &Stack, crew: &mut Crew) -> anyhow::Result<Outcome> {
    for rank in 0..args.workers {
        let (ranks, gradient) = (
            (rank, args.workers),
            Gradient::Even { elements: args.mib << 18, tensor_elements: TENSOR_ELEMENTS },
        );
        let worker = WorkerArgs::new(stack.url(), ranks, gradient, Durability::Process, Function::Sum);
        crew.hire(&worker.command_line())?;
    }
    crew.hear()?;
    let ahead = (WINDOW_BUDGET / u64::from(args.workers) + BEYOND) / (TENSOR_ELEMENTS * 4);
    let command = Command::Backlog { ahead: usize::try_from(ahead)?.max(1) };
    let late = crew.len() - 1;
    (0..late).try_for_each(|member| crew.tell(member, command))?;
    let queued_bytes = crate::cli::runtime()?.block_on(full_queue(&stack.url()))?;
    let invokers = stack.invokers();
    crew.tell(late, command)?;
    let replies = crew.hear()?;
    let still = stack.invokers();
    // Its peak would have gone with it.
    if still != invokers {
        bail!("the invoker died: process {invokers:?} became {still:?}");
    }
    let peak_rss_bytes = still.into_iter().map(process::peak_rss_bytes).max().unwrap_or(0);
    Ok(Outcome { peak_rss_bytes, queued_bytes, seconds: seconds(&replies)? })
}

/// Waits until the queues have stopped growing; returns their bytes.
async fn full_queue(url: &str) -> anyhow::Result<u64> {
    let config = NatsConfig { url: url.to_owned(), ..NatsConfig::default() };
    let connection = Connection::open("thalweg-bench", &config, &CancellationToken::new()).await?;
    let connection = connection.context("stopped while connecting")?;
    let partitions = StreamsConfig::default().partitions;
    let (begun, mut since, mut before) = (Instant::now(), Instant::now(), 0);
    loop {
        let depths = connection.jetstream.depths(partitions).await?;
        let bytes = depths.iter().map(|depth| depth.bytes).sum();
        if bytes != before {
            (since, before) = (Instant::now(), bytes);
        }
        if bytes > 0 && since.elapsed() >= SETTLED {
            return Ok(bytes);
        }
        if begun.elapsed() > PATIENCE {
            bail!("the queues did not settle within {PATIENCE:?}: {bytes} bytes");
        }
        tokio::time::sleep(LOOK).await;
    }
}

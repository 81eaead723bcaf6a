//! `thalweg bench service`: what joining, snapshots and idle jobs cost those who train.

use std::{
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::json;
use thalweg_sdk::{Client, FunctionSpec, Job, JobKey, SnapshotOptions, Worker};
use tokio::sync::watch;

use super::{
    load,
    stack::{Invokers, Options, Stack},
};
use crate::process;

/// Arguments of `thalweg bench service`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Size of the model that somebody joins, MiB
    #[arg(long, default_value_t = 100)]
    join_mib: u64,
    /// Size of the model of which snapshots are taken, MiB
    #[arg(long, default_value_t = 1024)]
    snapshot_mib: u64,
    /// Snapshots
    #[arg(long, default_value_t = 3)]
    snapshots: usize,
    /// MiB a second that a snapshot reads at most; 0 for as fast as it goes
    #[arg(long, default_value_t = SnapshotOptions::default().bytes_per_s >> 20)]
    rate: u64,
    /// Jobs that nobody trains
    #[arg(long, default_value_t = 1000)]
    idle_jobs: usize,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

/// Time over which idle jobs are watched.
const WATCH: Duration = Duration::from_secs(20);
/// Rounds on each side of a snapshot.
const ROUNDS: usize = 6;

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let stack = Stack::start(&Options {
        invokers: Invokers::fixed(1),
        broker_memory_bytes: 4 << 30,
        sync_always: false,
        settings: Vec::new(),
        logs: None,
    })?;
    let measured = crate::cli::runtime()?.block_on(measure(args, &stack));
    let report = match measured {
        Ok(report) => report,
        Err(error) => {
            stack.explain();
            return Err(error);
        }
    };
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "joining {} MiB: training {:.2} s after the round before its first\n\
             snapshots of {} MiB: rounds {:+.1} % while one is taken ({:.2} s each without)\n\
             {} idle jobs: {:.2} % of a core and {:.0} MiB more",
            args.join_mib,
            report["join"]["after_round_s"].as_f64().unwrap_or(f64::NAN),
            args.snapshot_mib,
            report["snapshot"]["slowdown"].as_f64().unwrap_or(f64::NAN) * 100.0,
            report["snapshot"]["round_s_without"].as_f64().unwrap_or(f64::NAN),
            args.idle_jobs,
            report["idle"]["cpu_percent"].as_f64().unwrap_or(f64::NAN),
            report["idle"]["rss_mib"].as_f64().unwrap_or(f64::NAN),
        )?;
    }
    writeln!(out, "{report}")?;
    drop(out);
    stack.stop()
}

async fn measure(args: &Args, stack: &Stack) -> anyhow::Result<serde_json::Value> {
    let client = Client::connect(&stack.url()).await?;
    let idle = idle(&client, stack, args.idle_jobs).await?;
    let join = join(&client, args.join_mib).await?;
    let snapshot = snapshot(&client, args).await?;
    Ok(json!({ "join": join, "snapshot": snapshot, "idle": idle }))
}

fn job(name: &str, mib: u64, workers: u32) -> anyhow::Result<Job> {
    Ok(Job::new(name)?.tensor("w", [mib << 18]).function_spec(FunctionSpec::named("sum")).workers(workers))
}

/// A training loop that goes on until told to stop, each round checked; tells when each one ended.
fn train(
    mut worker: Worker,
    elements: usize,
    stop: watch::Receiver<bool>,
) -> tokio::task::JoinHandle<anyhow::Result<Vec<(u64, Instant)>>> {
    tokio::spawn(async move {
        let mut ends = Vec::new();
        let mut values = vec![0.0; elements];
        while !*stop.borrow() {
            let number = worker.round();
            load::fill(&mut values, 0, u32::try_from(number)?, worker.rank());
            let round = worker.push_pull(&[("w", &values)]).await?;
            ends.push((round.round, Instant::now()));
            let workers = u32::try_from(round.contributors)?;
            load::check_sum(&round.tensors[0], 0, u32::try_from(round.round)?, workers)?;
        }
        worker.leave().await?;
        Ok(ends)
    })
}

/// How long after the end of the round before its first one a worker that joins begins to push.
async fn join(client: &Client, mib: u64) -> anyhow::Result<serde_json::Value> {
    let elements = usize::try_from(mib << 18)?;
    let mut lags = Vec::new();
    let mut calls = Vec::new();
    for attempt in 0..3 {
        let job = job(&format!("bench-join-{attempt}"), mib, 1)?;
        let first = client.join(job.clone(), 0).await?;
        let (stop, stopped) = watch::channel(false);
        let running = train(first, elements, stopped.clone());
        tokio::time::sleep(Duration::from_secs(2)).await;
        let called = Instant::now();
        let mut joiner = client.join(job, 1).await?;
        let parameters = joiner.parameters().await?;
        let ready = Instant::now();
        let first_round = joiner.round();
        load::check_sum(&parameters[0], 0, u32::try_from(first_round - 1)?, 1)?;
        let mut values = vec![0.0; elements];
        load::fill(&mut values, 0, u32::try_from(first_round)?, 1);
        let round = joiner.push_pull(&[("w", &values)]).await?;
        ensure!(round.round == first_round && round.contributors == 2, "{round:?} is not its first round");
        joiner.leave().await?;
        stop.send_replace(true);
        let ends = running.await??;
        let before = ends.iter().find(|(round, _)| *round == first_round - 1);
        let (_, before) = before.context("the round before its first one")?;
        lags.push(ready.saturating_duration_since(*before).as_secs_f64());
        calls.push((ready - called).as_secs_f64());
    }
    Ok(json!({ "mib": mib, "after_round_s": median(&mut lags), "whole_s": median(&mut calls) }))
}

/// How much longer rounds take while a snapshot is taken: rounds with and without one in turn.
async fn snapshot(client: &Client, args: &Args) -> anyhow::Result<serde_json::Value> {
    let elements = usize::try_from(args.snapshot_mib << 18)?;
    let worker = client.join(job("bench-snapshot", args.snapshot_mib, 1)?, 0).await?;
    let (stop, stopped) = watch::channel(false);
    let running = train(worker, elements, stopped);
    let key = JobKey { tenant: "default".parse()?, job: "bench-snapshot".parse()? };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("snapshot.safetensors");
    let options = SnapshotOptions { bytes_per_s: args.rate << 20, ..SnapshotOptions::default() };
    let mut taken = Vec::new();
    for _ in 0..args.snapshots {
        let quiet = client.progress(&key).await?.min + ROUNDS as u64;
        while client.progress(&key).await?.min < quiet {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let begun = Instant::now();
        let snapshot = client.snapshot(&key, &file, &options, |_, _| {}).await?;
        taken.push((begun, Instant::now()));
        check(&file, elements, u32::try_from(snapshot.version)?)?;
    }
    stop.send_replace(true);
    let ends = running.await??;
    client.delete(&key).await?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    // The first rounds warm up.
    for pair in ends.windows(2).skip(2) {
        let (begun, ended) = (pair[0].1, pair[1].1);
        let during = taken.iter().any(|(from, to)| begun >= *from && ended <= *to);
        let apart = taken.iter().all(|(from, to)| ended <= *from || begun >= *to);
        if during {
            with.push((ended - begun).as_secs_f64());
        } else if apart {
            without.push((ended - begun).as_secs_f64());
        }
    }
    ensure!(
        !with.is_empty() && !without.is_empty(),
        "no whole round fell into a snapshot: take a larger model"
    );
    let seconds =
        taken.iter().map(|(from, to)| (*to - *from).as_secs_f64()).sum::<f64>() / taken.len() as f64;
    let (rounds_with, rounds_without) = (with.len(), without.len());
    let (with, without) = (median(&mut with), median(&mut without));
    Ok(json!({
        "mib": args.snapshot_mib,
        "rate_mib_per_s": args.rate,
        "seconds": seconds,
        "round_s_with": with,
        "round_s_without": without,
        "rounds_with": rounds_with,
        "rounds_without": rounds_without,
        "slowdown": with / without - 1.0,
    }))
}

/// Compares a snapshot with what the round that it names came to.
fn check(file: &std::path::Path, elements: usize, round: u32) -> anyhow::Result<()> {
    let mut file = std::fs::File::open(file)?;
    let mut len = [0; 8];
    file.read_exact(&mut len)?;
    file.seek(SeekFrom::Start(8 + u64::from_le_bytes(len)))?;
    const BLOCK: usize = 1 << 18;
    let mut bytes = vec![0; 4 * BLOCK];
    for first in (0..elements).step_by(BLOCK) {
        let part = &mut bytes[..4 * BLOCK.min(elements - first)];
        file.read_exact(part)?;
        let values: Vec<_> = part.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        load::check_sum(&values, first, round, 1)?;
    }
    Ok(())
}

/// What jobs cost that nobody trains.
async fn idle(client: &Client, stack: &Stack, jobs: usize) -> anyhow::Result<serde_json::Value> {
    let (_, memory_before) = cost(stack).await;
    for number in 0..jobs {
        let job = Job::new(&format!("idle-{number}"))?.tensor("w", [1024]).workers(1);
        client.open(&job).await?;
    }
    // What creating them costs is not meant.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (cpu, memory) = cost(stack).await;
    tokio::time::sleep(WATCH).await;
    let (cpu_after, _) = cost(stack).await;
    for number in 0..jobs {
        let job = format!("idle-{number}").parse()?;
        client.delete(&JobKey { tenant: "default".parse()?, job }).await?;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (cpu_empty, _) = cost(stack).await;
    tokio::time::sleep(WATCH).await;
    let (cpu_empty_after, _) = cost(stack).await;
    let percent = |from: f64, to: f64| (to - from) / WATCH.as_secs_f64() * 100.0;
    let (busy, empty) = (percent(cpu, cpu_after), percent(cpu_empty, cpu_empty_after));
    Ok(json!({
        "jobs": jobs,
        "cpu_percent": busy - empty,
        "cpu_percent_with": busy,
        "cpu_percent_without": empty,
        "rss_mib": (memory as f64 - memory_before as f64) / f64::from(1 << 20),
    }))
}

/// CPU seconds and resident bytes of all parts.
async fn cost(stack: &Stack) -> (f64, u64) {
    let cpu = stack.cpu();
    let pids = stack.pids();
    let memory = pids.into_iter().map(process::rss_bytes).sum();
    (cpu.total(), memory)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

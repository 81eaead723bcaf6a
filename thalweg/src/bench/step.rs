//! `thalweg bench step`: a load that jumps, and a number of invokers that should follow.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use serde_json::{Value, json};
use thalweg_broker::{Connection, NatsConfig};
use thalweg_protocol::{InvokerBeat, InvokerState, Kind, frame, subjects};
use thalweg_sdk::Client;
use tokio_util::sync::CancellationToken;

use super::{
    journal,
    offered::Offered,
    stack::{Invokers, Options, Stack},
};

/// Arguments of `thalweg bench step`.
///
/// Many small jobs offer a load by the clock: nothing, 1x, 8x, 1x, nothing, and then four times 1x with noise of 20 %
/// for a minute. 1x is what 0.8 invokers should do: 0.8 times the service rate times the autoscaler's target
/// utilisation (0.7). The service rate is measured first, as what one invoker that always has work serves.
///
/// The target of a load is the number of invokers that it needs at the target utilisation, rounded up; the size is
/// right when it is the target or one more. decisions_to_target: from 1x to 8x, decisions of the autoscaler until it
/// wants a right size and stays with right sizes for the rest of the step; null if it does not. seconds_to_target: from
/// that step until so many invokers have said that they are ready. flaps_noisy_flat: under the noisy load, after it
/// has lasted for 20 s, decisions that go back on the one before. seconds_to_zero: from the end of the load until the
/// last invoker has ended. first_result_from_zero_ms: from the first push, when there was no invoker, to its result.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// CPUs of an invoker: few, so that several of them fit this machine
    #[arg(long, default_value_t = 0.1)]
    cpu_quota: f64,
    /// Most invokers
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(8..=32))]
    max_invokers: u16,
    /// Jobs that offer the load
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: u16,
    /// Size of a contribution, KiB of f32
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=512))]
    kib: u16,
    /// Length of each step, seconds
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u64).range(5..))]
    seconds: u64,
    /// Length of the noisy load, seconds, after the 20 that do not count
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..))]
    noisy_seconds: u64,
    /// Keep the components' logs in this directory
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

/// Of the autoscaler, by default.
const TARGET_UTILISATION: f64 = 0.7;
/// Invokers' worth of work in 1x.
const BASE: f64 = 0.8;
const STEP: f64 = 8.0;
const NOISY: f64 = 4.0;
const NOISE: f64 = 0.2;
const SETTLING: Duration = Duration::from_secs(20);
/// Time that a load is let run before a rate is measured, and over which it is.
const CALIBRATION: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(8));
/// Longest wait for the last invoker to end, and for a first result.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(10);
/// What the autoscaler logs when it changes the number of invokers.
pub(super) const DECIDED: &str = "decided on the number of invokers";

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = crate::cli::runtime()?;
    let start = |invokers, logs| {
        Stack::start(&Options {
            invokers,
            broker_memory_bytes: 2 << 30,
            sync_always: false,
            settings: vec![format!("invoker.cpu_quota={:?}", args.cpu_quota)],
            logs,
        })
    };
    let explained = |stack: &Stack, outcome: anyhow::Result<_>| {
        if outcome.is_err() {
            stack.explain();
        }
        outcome
    };
    let stack = start(Invokers::fixed(1), None)?;
    let service_rate = runtime.block_on(calibrate(args, &stack));
    if service_rate.is_err() {
        stack.explain();
    }
    let service_rate = service_rate?;
    stack.stop()?;
    let stack = start(Invokers::Scaled(0..=usize::from(args.max_invokers)), args.logs.clone())?;
    let report = explained(&stack, runtime.block_on(measure(args, &stack, service_rate)))?;
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "8x the load ({:.1} MB/s, invokers of {} CPUs serve {:.1}): {} decisions, {} s; from zero {:.0} ms; to zero \
             {:.1} s; {} flaps under noise",
            service_rate * TARGET_UTILISATION * BASE * STEP / 1e6,
            args.cpu_quota,
            service_rate / 1e6,
            report["decisions_to_target"],
            report["seconds_to_target"],
            report["first_result_from_zero_ms"].as_f64().unwrap_or(f64::NAN),
            report["seconds_to_zero"].as_f64().unwrap_or(f64::NAN),
            report["flaps_noisy_flat"],
        )?;
    }
    writeln!(out, "{report}")?;
    drop(out);
    stack.stop()
}

async fn offered(args: &Args, stack: &Stack) -> anyhow::Result<Offered> {
    let client = Client::connect(&stack.url()).await?;
    Offered::start(&client, usize::from(args.jobs), u64::from(args.kib) << 10).await
}

/// Bytes a second that one invoker serves while it always has work.
async fn calibrate(args: &Args, stack: &Stack) -> anyhow::Result<f64> {
    let mut offered = offered(args, stack).await?;
    // More than it can do at any quota.
    offered.offer(2e9 * args.cpu_quota, 0.0);
    tokio::time::sleep(CALIBRATION.0).await;
    let from = offered.served();
    tokio::time::sleep(CALIBRATION.1).await;
    let rate = offered.rate(from, offered.served());
    offered.check()?;
    ensure!(offered.waiting() > 0, "one invoker kept up with {:.0} MB/s", 2e3 * args.cpu_quota);
    Ok(rate)
}

/// A stretch of constant load.
struct Phase {
    /// Times the load of 1x.
    load: f64,
    began: (Instant, SystemTime),
    ended: (Instant, SystemTime),
    /// Bytes a second that were served.
    rate: f64,
    /// Pushes that waited at its end.
    waiting: u64,
}

fn now() -> (Instant, SystemTime) {
    (Instant::now(), SystemTime::now())
}

struct Run<'a> {
    stack: &'a Stack,
    offered: Offered,
    base_bytes_per_s: f64,
}

impl Run<'_> {
    async fn phase(&mut self, load: f64, noise: f64, length: Duration) -> anyhow::Result<Phase> {
        let (began, from) = (now(), self.offered.served());
        self.offered.offer(load * self.base_bytes_per_s, noise);
        tokio::time::sleep(length).await;
        self.offered.check()?;
        let rate = self.offered.rate(from, self.offered.served());
        Ok(Phase { load, began, ended: now(), rate, waiting: self.offered.waiting() })
    }

    /// Offers nothing until the last invoker has ended; seconds.
    async fn fall_to_zero(&mut self) -> anyhow::Result<f64> {
        let begun = Instant::now();
        self.offered.offer(0.0, 0.0);
        while !self.stack.invokers().is_empty() {
            ensure!(begun.elapsed() < PATIENCE, "there are still invokers after {PATIENCE:?} without load");
            tokio::time::sleep(LOOK).await;
        }
        self.offered.check()?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Offers 1x where there is no invoker; milliseconds until the first result.
    async fn first_result(&mut self) -> anyhow::Result<f64> {
        ensure!(self.stack.invokers().is_empty(), "there is an invoker before there is any load");
        let (begun, served) = (Instant::now(), self.offered.served().pushes);
        self.offered.offer(self.base_bytes_per_s, 0.0);
        while self.offered.served().pushes == served {
            ensure!(begun.elapsed() < PATIENCE, "no result within {PATIENCE:?}");
            self.offered.check()?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }
}

async fn measure(args: &Args, stack: &Stack, service_rate: f64) -> anyhow::Result<Value> {
    let config = NatsConfig { url: stack.url(), ..NatsConfig::default() };
    let connection = Connection::open("thalweg-bench", &config, &CancellationToken::new()).await?;
    let connection = connection.context("stopped while connecting")?;
    let beats = connection.client.subscribe(subjects::invoker_beats(None)).await?;
    let watch = tokio::spawn(watch(beats));
    let base_bytes_per_s = service_rate * TARGET_UTILISATION * BASE;
    let mut run = Run { stack, offered: offered(args, stack).await?, base_bytes_per_s };
    let length = Duration::from_secs(args.seconds);
    let first_result_ms = run.first_result().await?;
    let low = run.phase(1.0, 0.0, length).await?;
    let high = run.phase(STEP, 0.0, length).await?;
    let again = run.phase(1.0, 0.0, length).await?;
    let to_zero = run.fall_to_zero().await?;
    let settling = run.phase(NOISY, NOISE, SETTLING).await?;
    let noisy = run.phase(NOISY, NOISE, Duration::from_secs(args.noisy_seconds)).await?;
    connection.client.drain().await?;
    let ready = watch.await?;
    let decisions = decisions(stack)?;
    let need = |phase: &Phase| (phase.load * BASE).ceil() as usize;
    let (count, seconds) = to_target(&decisions, &ready, &high, need(&high));
    let during_noise: Vec<_> = decisions.iter().filter(|made| made.at >= settling.began.1).collect();
    let flaps = during_noise
        .windows(2)
        .filter(|pair| pair[1].at >= noisy.began.1 && pair[0].grows() != pair[1].grows())
        .count();
    let phases = [low, high, again, settling, noisy];
    Ok(json!({
        "decisions_to_target": count,
        "seconds_to_target": seconds,
        "flaps_noisy_flat": flaps,
        "seconds_to_zero": to_zero,
        "first_result_from_zero_ms": first_result_ms,
        "invoker_cpu_quota": args.cpu_quota,
        "service_mb_per_s": service_rate / 1e6,
        "target": need(&phases[1]),
        "phases": phases.iter().map(|phase| {
            let within = |made: &&Decision| made.at >= phase.began.1 && made.at < phase.ended.1;
            let wanted: Vec<_> = decisions.iter().filter(within).map(|made| made.target).collect();
            json!({
                "load": phase.load,
                "needs": need(phase),
                "offered_mb_per_s": phase.load * base_bytes_per_s / 1e6,
                "served_mb_per_s": phase.rate / 1e6,
                "waiting": phase.waiting,
                "decisions": wanted,
            })
        }).collect::<Vec<_>>(),
    }))
}

/// How many invokers had said that they are ready, from each change on.
async fn watch(mut beats: async_nats::Subscriber) -> Vec<(Instant, usize)> {
    let (mut states, mut counts) = (BTreeMap::new(), vec![(Instant::now(), 0)]);
    while let Some(message) = beats.next().await {
        let Ok((beat, _)) = frame::open::<InvokerBeat>(Kind::Beat, &message.payload) else { continue };
        states.insert(beat.invoker, beat.state == InvokerState::Ready);
        let count = states.values().filter(|ready| **ready).count();
        if counts.last().is_none_or(|(_, before)| *before != count) {
            counts.push((Instant::now(), count));
        }
    }
    counts
}

/// A change of the number of invokers that the autoscaler wants.
#[derive(Clone, Copy, Debug)]
struct Decision {
    at: SystemTime,
    previous: usize,
    target: usize,
}

impl Decision {
    fn grows(&self) -> bool {
        self.target > self.previous
    }
}

fn decisions(stack: &Stack) -> anyhow::Result<Vec<Decision>> {
    let lines = journal::read(&stack.log("autoscaler"), &[DECIDED])?;
    let decision = |line: &journal::Line| {
        let count = |name| line.number(name).map(|count| count as usize);
        let (previous, target) = (count("previous")?, count("wanted")?);
        Some(Decision { at: line.at, previous, target })
    };
    lines.iter().map(|line| decision(line).context("a decision without its numbers")).collect()
}

/// Decisions and seconds from the beginning of a phase until the size is right and stays so; `None` if it does not.
fn to_target(
    decisions: &[Decision],
    ready: &[(Instant, usize)],
    phase: &Phase,
    need: usize,
) -> (Option<usize>, Option<f64>) {
    let right = |size: usize| size == need || size == need + 1;
    let before = decisions.iter().rev().find(|made| made.at < phase.began.1);
    let within = |made: &&Decision| made.at >= phase.began.1 && made.at < phase.ended.1;
    let made: Vec<_> = decisions.iter().filter(within).collect();
    let wrong = made.iter().rposition(|made| !right(made.target));
    let count = match wrong {
        Some(last) if last + 1 == made.len() => return (None, None),
        Some(last) => last + 2,
        None if before.is_some_and(|made| right(made.target)) => 0,
        None if made.is_empty() => return (None, None),
        None => 1,
    };
    let decided = match count.checked_sub(1) {
        Some(index) => made[index].at.duration_since(phase.began.1).unwrap_or_default(),
        None => Duration::ZERO,
    };
    // Not those that were there before and on their way out.
    let since = phase.began.0 + decided;
    let at =
        |moment: Instant| ready.iter().rev().find(|(at, _)| *at <= moment).map_or(0, |(_, count)| *count);
    let reached = if right(at(since)) {
        Some(since)
    } else {
        ready.iter().find(|(at, count)| *at >= since && right(*count)).map(|(at, _)| *at)
    };
    let reached = reached.filter(|at| *at < phase.ended.0);
    (Some(count), reached.map(|at| (at - phase.began.0).as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(began: (Instant, SystemTime)) -> Phase {
        let length = Duration::from_secs(10);
        let ended = (began.0 + length, began.1 + length);
        Phase { load: 8.0, began, ended, rate: 0.0, waiting: 0 }
    }

    #[test]
    fn a_size_counts_from_the_decision_that_lasts() {
        let began = now();
        let phase = phase(began);
        let made = |milliseconds: u64, previous, target| Decision {
            at: began.1 + Duration::from_millis(milliseconds),
            previous,
            target,
        };
        let ready = |list: &[(u64, usize)]| -> Vec<_> {
            list.iter().map(|(at, count)| (began.0 + Duration::from_millis(*at), *count)).collect()
        };
        let counts = ready(&[(0, 1), (300, 4), (700, 7)]);
        let steps = [made(100, 1, 4), made(500, 4, 7)];
        assert_eq!(to_target(&steps, &counts, &phase, 7), (Some(2), Some(0.7)));
        assert_eq!(to_target(&steps, &counts, &phase, 6), (Some(2), Some(0.7)), "one more is right too");
        assert_eq!(to_target(&steps, &counts, &phase, 8), (None, None));
        // One that goes past it and comes back.
        let overshot = [made(100, 1, 7), made(500, 7, 10), made(900, 10, 7)];
        let counts = ready(&[(0, 1), (300, 7), (700, 10), (1500, 7)]);
        assert_eq!(to_target(&overshot, &counts, &phase, 7), (Some(3), Some(1.5)));
        assert_eq!(to_target(&[], &counts, &phase, 7), (None, None));
    }
}

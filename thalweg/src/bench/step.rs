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
use thalweg_autoscaler::{Config, demand, demand::Load};
use thalweg_broker::{Connection, NatsConfig, StreamsConfig};
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
/// Small jobs train: none, 1x, 8x, 1x, none, and then four times 1x for a minute, with think times that vary by 20 % for
/// all of them together. 1x is so many jobs that they would do the work of 0.56 invokers if none waited for another. What
/// one invoker serves that always has work is measured first; think times follow from it.
///
/// The target is the fewest invokers with which no job loses more than 10 % against being alone, by mean value analysis
/// (docs/autoscaling.md) and with what a round took of an invoker's quota in the second half of the step; the size is
/// right when it is within one of the target. decisions_to_target: from 1x to 8x, decisions of the autoscaler until it
/// wants a right size and stays with right sizes for the rest of the step; null if it does not. seconds_to_target: from
/// that step until so many invokers have said that they are ready.
/// flaps_noisy_flat: under the noisy load, after it has lasted for 20 s, decisions that go back on the one before.
/// seconds_to_zero: from the end of the load until the last invoker has ended. first_result_from_zero_ms: from the first
/// push, when there was no invoker, to its result. Of each step, slowdown is what the jobs did lose in its second half.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// CPUs of an invoker: few, so that several of them fit this machine
    #[arg(long, default_value_t = 0.1)]
    cpu_quota: f64,
    /// Most invokers
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u16).range(8..=32))]
    max_invokers: u16,
    /// Jobs of 1x
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=128))]
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

/// Invokers' worth of work in 1x.
const WORK: f64 = 0.56;
const STEP: u16 = 8;
const NOISY: u16 = 4;
const NOISE: f64 = 0.2;
const SETTLING: Duration = Duration::from_secs(20);
/// Time that a load is let run before what one invoker serves is measured, and over which it is.
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
    let work = runtime.block_on(calibrate(args, &stack));
    if work.is_err() {
        stack.explain();
    }
    let load = OneJob::new(args, work?);
    stack.stop()?;
    let stack = start(Invokers::Scaled(0..=usize::from(args.max_invokers)), args.logs.clone())?;
    let report = explained(&stack, runtime.block_on(measure(args, &stack, load)))?;
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "from {} to {} jobs (invokers of {} CPUs serve {:.1} MB/s): {} decisions, {} s; from zero {:.0} ms; to zero \
             {:.1} s; {} flaps under noise",
            args.jobs,
            args.jobs * STEP,
            args.cpu_quota,
            report["service_mb_per_s"].as_f64().unwrap_or(f64::NAN),
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
    Offered::start(&client, usize::from(args.jobs * STEP), u64::from(args.kib) << 10).await
}

/// Seconds that one invoker needs for a round while it always has work.
async fn calibrate(args: &Args, stack: &Stack) -> anyhow::Result<f64> {
    let mut offered = offered(args, stack).await?;
    offered.offer(usize::from(args.jobs * STEP), Duration::ZERO, 0.0);
    tokio::time::sleep(CALIBRATION.0).await;
    let from = offered.served();
    tokio::time::sleep(CALIBRATION.1).await;
    let rate = offered.served().rate_since(from);
    offered.check()?;
    ensure!(rate > 0.0, "one invoker served nothing");
    Ok(1.0 / rate)
}

/// What one of the jobs asks for.
#[derive(Clone, Copy, Debug)]
struct OneJob(Load);

impl OneJob {
    fn new(args: &Args, work: f64) -> Self {
        let alone = f64::from(args.jobs) * work / WORK;
        let reference = f64::from(Config::default().reference_invokers);
        // Its one shard is one invoker's at a time.
        Self(Load { work, think: alone - work, reference, parallel: 1.0 })
    }

    /// Invokers for the jobs of a phase, whose rounds took this much work.
    fn need(self, args: &Args, phase: &Phase) -> usize {
        let config = Config::default();
        let partitions = usize::from(StreamsConfig::default().partitions);
        let loads = vec![Load { work: phase.work, ..self.0 }; usize::from(phase.jobs)];
        let most = usize::from(args.max_invokers);
        demand::fewest(&loads, 0.0, config.slowdown_limit, 1.0, partitions, most)
    }
}

/// A stretch of constant load.
struct Phase {
    jobs: u16,
    began: (Instant, SystemTime),
    ended: (Instant, SystemTime),
    /// By how much longer than alone a round took in its second half.
    slowdown: f64,
    /// What a round took of one invoker's quota there, seconds: less than where an invoker never rests.
    work: f64,
}

fn now() -> (Instant, SystemTime) {
    (Instant::now(), SystemTime::now())
}

struct Run<'a> {
    stack: &'a Stack,
    offered: Offered,
    load: OneJob,
    quota: f64,
}

impl Run<'_> {
    fn offer(&self, jobs: u16, noise: f64) {
        self.offered.offer(usize::from(jobs), Duration::from_secs_f64(self.load.0.think), noise);
    }

    async fn phase(&mut self, jobs: u16, noise: f64, length: Duration) -> anyhow::Result<Phase> {
        let began = now();
        self.offer(jobs, noise);
        tokio::time::sleep(length / 2).await;
        let (half, used) = (self.offered.served(), self.stack.cpu().invokers);
        tokio::time::sleep(length / 2).await;
        self.offered.check()?;
        let (end, used) = (self.offered.served(), self.stack.cpu().invokers - used);
        let work = used / self.quota / (end.rounds - half.rounds).max(1) as f64;
        let period = f64::from(jobs) / end.rate_since(half);
        let slowdown = Load { work, ..self.load.0 }.slowdown(period);
        Ok(Phase { jobs, began, ended: now(), slowdown, work })
    }

    /// Offers nothing until the last invoker has ended; seconds.
    async fn fall_to_zero(&mut self) -> anyhow::Result<f64> {
        let begun = Instant::now();
        self.offer(0, 0.0);
        while !self.stack.invokers().is_empty() {
            ensure!(begun.elapsed() < PATIENCE, "there are still invokers after {PATIENCE:?} without load");
            tokio::time::sleep(LOOK).await;
        }
        self.offered.check()?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Offers 1x where there is no invoker; milliseconds until the first result.
    async fn first_result(&mut self, jobs: u16) -> anyhow::Result<f64> {
        ensure!(self.stack.invokers().is_empty(), "there is an invoker before there is any load");
        let (begun, served) = (Instant::now(), self.offered.served().rounds);
        self.offer(jobs, 0.0);
        while self.offered.served().rounds == served {
            ensure!(begun.elapsed() < PATIENCE, "no result within {PATIENCE:?}");
            self.offered.check()?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }
}

async fn measure(args: &Args, stack: &Stack, load: OneJob) -> anyhow::Result<Value> {
    let config = NatsConfig { url: stack.url(), ..NatsConfig::default() };
    let connection = Connection::open("thalweg-bench", &config, &CancellationToken::new()).await?;
    let connection = connection.context("stopped while connecting")?;
    let beats = connection.client.subscribe(subjects::invoker_beats(None)).await?;
    let watch = tokio::spawn(watch(beats));
    let mut run = Run { stack, offered: offered(args, stack).await?, load, quota: args.cpu_quota };
    let length = Duration::from_secs(args.seconds);
    let (once, eight) = (args.jobs, args.jobs * STEP);
    let first_result_ms = run.first_result(once).await?;
    let low = run.phase(once, 0.0, length).await?;
    let high = run.phase(eight, 0.0, length).await?;
    let again = run.phase(once, 0.0, length).await?;
    let to_zero = run.fall_to_zero().await?;
    let settling = run.phase(once * NOISY, NOISE, SETTLING).await?;
    let noisy = run.phase(once * NOISY, NOISE, Duration::from_secs(args.noisy_seconds)).await?;
    let phases = [low, high, again, settling, noisy];
    connection.client.drain().await?;
    let ready = watch.await?;
    let decisions = decisions(stack)?;
    let target = load.need(args, &phases[1]);
    let (count, seconds) = to_target(&decisions, &ready, &phases[1], target);
    let during_noise: Vec<_> = decisions.iter().filter(|made| made.at >= phases[3].began.1).collect();
    let flaps = during_noise
        .windows(2)
        .filter(|pair| pair[1].at >= phases[4].began.1 && pair[0].grows() != pair[1].grows())
        .count();
    Ok(json!({
        "decisions_to_target": count,
        "seconds_to_target": seconds,
        "flaps_noisy_flat": flaps,
        "seconds_to_zero": to_zero,
        "first_result_from_zero_ms": first_result_ms,
        "invoker_cpu_quota": args.cpu_quota,
        "service_mb_per_s": f64::from(args.kib) * 1.024e-3 / load.0.work,
        "work_ms": load.0.work * 1e3,
        "think_ms": load.0.think * 1e3,
        "target": target,
        "phases": phases.iter().map(|phase| {
            let within = |made: &&Decision| made.at >= phase.began.1 && made.at < phase.ended.1;
            let since = |made: &Decision| made.at.duration_since(phase.began.1).unwrap_or_default();
            let made = |made: &Decision| json!([since(made).as_secs_f64(), made.target]);
            json!({
                "jobs": phase.jobs,
                "needs": load.need(args, phase),
                "slowdown": phase.slowdown,
                "work_ms": phase.work * 1e3,
                "decisions": decisions.iter().filter(within).map(made).collect::<Vec<_>>(),
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
    let right = |size: usize| size.abs_diff(need) <= 1;
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
        Phase { jobs: 8, began, ended, slowdown: 0.0, work: 0.0 }
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
        for (need, what) in [(6, "one more is right"), (8, "one less is right")] {
            assert_eq!(to_target(&steps, &counts, &phase, need), (Some(2), Some(0.7)), "{what}");
        }
        assert_eq!(to_target(&steps, &counts, &phase, 9), (None, None));
        // One that goes past it and comes back.
        let overshot = [made(100, 1, 7), made(500, 7, 10), made(900, 10, 7)];
        let counts = ready(&[(0, 1), (300, 7), (700, 10), (1500, 7)]);
        assert_eq!(to_target(&overshot, &counts, &phase, 7), (Some(3), Some(1.5)));
        assert_eq!(to_target(&[], &counts, &phase, 7), (None, None));
    }
}

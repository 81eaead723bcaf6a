//! `thalweg bench migrate`: all partitions of a running job move to other invokers, again and again.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use thalweg_broker::{Connection, NatsConfig, Registry, StreamsConfig};
use thalweg_protocol::{Durability, PLACEMENT_KEY, PlacedPartition, Placement, STREAMS_KEY, Streams};
use tokio_util::sync::CancellationToken;

use super::{
    crew::{Command, Crew, Reply},
    figures::{confidence, mean},
    gradient::{Gradient, scale},
    journal,
    load::Function,
    stack::{Invokers, Options, Stack},
    worker::WorkerArgs,
};
use crate::{demo::quantile, models::Model};

/// Arguments of `thalweg bench migrate`.
///
/// A job trains the tensors of a real model on invokers that the benchmark itself places partitions on. Rounds come in
/// pairs: in one of the two, at some moment, every partition is placed on another invoker. The workers run at a lower
/// priority than everything else (nice 15), because they stand for other machines.
///
/// suspension_ms: of each move, the longest time that any partition had messages in its queue and no holder, from the
/// last moment at which the old one served it (or the first message came) to the first at which the new one does; mean
/// and maximum over the moves. without_holder_ms: the same whether or not there were messages. round_extra_ms: how much longer the round with the move
/// took than the other one of its pair, with its 95 % confidence interval. redelivered_bytes_fraction: what invokers
/// were given more than once, or read back from the queue, over what was pushed. lost, repeated: contributions that a
/// round's ledgers lack, or have twice; each element of each result is compared as well.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The model
    #[arg(long, default_value = "alexnet")]
    model: Model,
    /// Its size, as a part of the real one
    #[arg(long, default_value_t = 1.0, value_parser = scale)]
    scale: f64,
    /// Worker processes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Invokers
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..))]
    invokers: u16,
    /// Moves of all partitions
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..))]
    moves: u32,
    /// What is done with the gradients
    #[arg(long, default_value = "sum")]
    function: Function,
    /// Keep the components' logs in this directory
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

/// Rounds before the first pair.
const WARM_UP: u32 = 3;
/// Longest wait for streams, and for a move to be over.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);

/// What invokers log when they have taken a partition over, when that was in order, and when they give one up.
const HOLDS: &str = "holds partition";
const HANDED_OVER: &str = "handed over";
const GIVES_UP: &str = "gives partition up";
/// What they log of a message that has waited for that.
const FIRST: &str = "first message since the handover";
/// What they log at last.
pub(super) const ENDS: &str = "invoker ends";

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let gradient = Gradient::Of { model: args.model, scale: args.scale };
    let stack = Stack::start(&Options {
        invokers: Invokers::Own,
        broker_memory_bytes: (2 << 30_u64).max(2 * u64::from(args.workers) * gradient.bytes()),
        sync_always: false,
        settings: Vec::new(),
        logs: args.logs.clone(),
    })?;
    let runtime = crate::cli::runtime()?;
    let mut bench = Bench { args, gradient, stack, crew: Crew::new(), placed: None, round: 0 };
    let report = match runtime.block_on(bench.measure()) {
        Ok(report) => report,
        Err(error) => {
            bench.stack.explain();
            return Err(error);
        }
    };
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "{} moves of all partitions under {}: suspended for {:.1} ms on average ({:.1} ms at most), rounds {:+.0} ms (+- {:.0} ms), {:.2} % of what was pushed delivered again",
            args.moves,
            args.model.name(),
            report["suspension_ms_mean"].as_f64().unwrap_or(f64::NAN),
            report["suspension_ms_max"].as_f64().unwrap_or(f64::NAN),
            report["round_extra_ms_mean"].as_f64().unwrap_or(f64::NAN),
            report["round_extra_ms_ci95"].as_f64().unwrap_or(f64::NAN),
            report["redelivered_bytes_fraction"].as_f64().unwrap_or(f64::NAN) * 100.0,
        )?;
    }
    writeln!(out, "{report}")?;
    drop(out);
    Ok(())
}

/// Of one move, over all partitions.
#[derive(Clone, Copy, Debug, Default)]
struct Suspension {
    /// Longest time with messages and without a holder, and longest time without a holder, milliseconds.
    waited_ms: f64,
    unserved_ms: f64,
    /// Partitions that were not handed over in order.
    disorderly: usize,
}

struct Bench<'a> {
    args: &'a Args,
    gradient: Gradient,
    stack: Stack,
    crew: Crew,
    /// The placement and its revision.
    placed: Option<(Placement, u64)>,
    /// The round that was run last.
    round: u32,
}

impl Bench<'_> {
    async fn measure(&mut self) -> anyhow::Result<Value> {
        let config = NatsConfig { url: self.stack.url(), ..NatsConfig::default() };
        let connection = Connection::open("thalweg-bench", &config, &CancellationToken::new()).await?;
        let connection = connection.context("stopped while connecting")?;
        let registry = registry(&connection).await?;
        for number in 0..self.args.invokers {
            self.stack.start_invoker(&format!("i{number}"), None)?;
        }
        self.place(&registry).await?;
        self.hire()?;
        let mut periods = Vec::new();
        for _ in 0..WARM_UP {
            periods.push(self.run_round(None).await?);
        }
        let (mut extra, mut longest) = (Vec::new(), Vec::new());
        for number in 0..self.args.moves {
            // Anywhere in the round, evenly over the moves.
            let part = f64::from(number) / f64::from(self.args.moves);
            let after = Duration::from_secs_f64(quantile(&periods, 0.5) * part);
            let mut pair = [0.0; 2];
            for moving in [number % 2 == 0, number % 2 == 1] {
                let then = moving.then_some((&registry, after));
                pair[usize::from(moving)] = self.run_round(then).await?;
                if moving {
                    longest.push(self.suspension()?);
                }
            }
            periods.push(pair[0]);
            extra.push((pair[1] - pair[0]) * 1e3);
        }
        self.report(&extra, &longest)
    }

    fn hire(&mut self) -> anyhow::Result<()> {
        for rank in 0..self.args.workers {
            let (ranks, gradient) = ((rank, self.args.workers), self.gradient);
            let worker =
                WorkerArgs::new(self.stack.url(), ranks, gradient, Durability::Process, self.args.function);
            let worker = WorkerArgs { yielding: true, ..worker };
            self.crew.hire(&worker.command_line())?;
        }
        self.crew.hear().map(drop)
    }

    /// One round, checked, with a move in the middle of it if there is one; seconds.
    async fn run_round(&mut self, moving: Option<(&Registry, Duration)>) -> anyhow::Result<f64> {
        self.round += 1;
        self.crew.all(Command::Prepare { round: self.round })?;
        (0..self.crew.len()).try_for_each(|member| self.crew.tell(member, Command::Thalweg))?;
        if let Some((registry, after)) = moving {
            tokio::time::sleep(after).await;
            self.place(registry).await?;
        }
        let seconds = super::crew::seconds(&self.crew.hear()?)?;
        self.crew.all(Command::Check { raw: false })?;
        if moving.is_some() {
            self.settle().await?;
        }
        Ok(seconds)
    }

    /// Places every partition on the invoker after the one that it is on.
    async fn place(&mut self, registry: &Registry) -> anyhow::Result<()> {
        let (before, revision) = self.placed.take().unwrap_or_default();
        let partitions = StreamsConfig::default().partitions;
        let epoch = before.partitions.first().map_or(0, |placed| placed.epoch) + 1;
        let holder = |partition: u16| {
            let invoker = (u64::from(partition) + epoch) % u64::from(self.args.invokers);
            PlacedPartition { epoch, holder: Some(format!("i{invoker}")) }
        };
        let placement = Placement { partitions: (0..partitions).map(holder).collect(), first: 0 };
        let Ok(revision) = registry.put(PLACEMENT_KEY, &placement, revision).await? else {
            bail!("somebody else places partitions too");
        };
        self.placed = Some((placement, revision));
        Ok(())
    }

    fn epoch(&self) -> u64 {
        let placed = self.placed.as_ref().and_then(|(placement, _)| placement.partitions.first());
        placed.map_or(0, |placed| placed.epoch)
    }

    /// Waits until every partition is where it was placed last.
    async fn settle(&self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let held = self.lines(HOLDS, self.epoch())?.len();
            if held == usize::from(StreamsConfig::default().partitions) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{held} partitions were taken over within {PATIENCE:?}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What the invokers logged about a placement: the line of each partition.
    fn lines(&self, message: &str, epoch: u64) -> anyhow::Result<BTreeMap<u64, journal::Line>> {
        let mut lines = BTreeMap::new();
        for number in 0..self.args.invokers {
            for line in journal::read(&self.stack.log(&format!("i{number}")), &[message])? {
                if line.number("epoch") == Some(epoch as f64)
                    && let Some(partition) = line.number("partition")
                {
                    lines.insert(partition as u64, line);
                }
            }
        }
        Ok(lines)
    }

    /// What the last move did to the partition that it hit hardest.
    fn suspension(&self) -> anyhow::Result<Suspension> {
        let epoch = self.epoch();
        let (in_order, waited) = (self.lines(HANDED_OVER, epoch)?, self.lines(FIRST, epoch)?);
        let given_up = self.lines(GIVES_UP, epoch - 1)?;
        let mut longest = Suspension::default();
        for (partition, held) in self.lines(HOLDS, epoch)? {
            let number = |lines: &BTreeMap<u64, journal::Line>, name| lines.get(&partition)?.number(name);
            // From its own last service to the next holder's first, by the clock of the host that both are on. One
            // whose holder never gave it up was served until its consumer was taken from it.
            let since = given_up.get(&partition).map(|line| held.at.duration_since(line.at));
            let since = since.and_then(Result::ok).unwrap_or_default().as_secs_f64() * 1e3;
            let unserved_ms = since + number(&given_up, "unserved_ms").unwrap_or(0.0);
            let waited_ms = if in_order.contains_key(&partition) {
                number(&waited, "waited_ms").unwrap_or(0.0).min(unserved_ms)
            } else {
                longest.disorderly += 1;
                // Nobody knows whether messages were there.
                unserved_ms
            };
            longest.waited_ms = longest.waited_ms.max(waited_ms);
            longest.unserved_ms = longest.unserved_ms.max(unserved_ms);
        }
        Ok(longest)
    }

    fn report(&mut self, extra: &[f64], longest: &[Suspension]) -> anyhow::Result<Value> {
        let (mut pushed, mut lost, mut repeated) = (0, 0, 0);
        for reply in self.crew.all(Command::Account)? {
            if let Reply::Account { sent_bytes, lost: without, repeated: twice } = reply {
                pushed += sent_bytes;
                lost += without;
                repeated += twice;
            }
        }
        std::mem::replace(&mut self.crew, Crew::new()).dismiss()?;
        self.stack.end_invokers("i")?;
        let (mut delivered, mut read_again) = (0.0, 0.0);
        for number in 0..self.args.invokers {
            let lines = journal::read(&self.stack.log(&format!("i{number}")), &[ENDS])?;
            let line = lines.last().with_context(|| format!("invoker i{number} did not end in order"))?;
            delivered += line.number("delivered_bytes").context("no count of delivered bytes")?;
            read_again += line.number("read_again_bytes").context("no count of bytes read again")?;
        }
        let pushed = pushed as f64;
        let suspensions: Vec<_> = longest.iter().map(|each| each.waited_ms).collect();
        let unserved: Vec<_> = longest.iter().map(|each| each.unserved_ms).collect();
        Ok(json!({
            "model": self.args.model.name(),
            "bytes": self.gradient.bytes(),
            "workers": self.args.workers,
            "invokers": self.args.invokers,
            "moves": self.args.moves,
            "rounds": self.round,
            "suspension_ms_mean": mean(suspensions.iter().copied()),
            "suspension_ms_max": quantile(&suspensions, 1.0),
            "without_holder_ms_mean": mean(unserved.iter().copied()),
            "without_holder_ms_max": quantile(&unserved, 1.0),
            "not_handed_over": longest.iter().map(|each| each.disorderly).sum::<usize>(),
            "round_extra_ms_mean": mean(extra.iter().copied()),
            "round_extra_ms_ci95": confidence(extra),
            "redelivered_bytes_fraction": (delivered - pushed + read_again) / pushed,
            "lost": lost,
            "repeated": repeated,
        }))
    }
}

/// The registry, once the streams are there.
pub(super) async fn registry(connection: &Connection) -> anyhow::Result<Registry> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Ok(registry) = Registry::open(&connection.jetstream).await
            && let Ok((Some(_), _)) = registry.get::<Streams>(STREAMS_KEY).await
        {
            return Ok(registry);
        }
        ensure!(Instant::now() < until, "no streams within {PATIENCE:?}");
        tokio::time::sleep(LOOK).await;
    }
}

//! `thalweg bench contributors`: one round of thousands, far more than an invoker's memory holds.
//!
//! Rank 0 is a worker of the SDK. The others are only what such a worker is to the service: a claimed rank, heartbeats,
//! and a frame for each shard, at most one of them unconfirmed. Thousands of training loops do not fit one machine.

use std::{
    collections::BTreeSet,
    io::Write as _,
    ops::Range,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;
use thalweg_broker::{Connection, NatsConfig, request};
use thalweg_protocol::{
    ApiReply, ApiRequest, Claim, FrameBuilder, GradientHeader, Head, Incarnation, JobRecord, Kind, Rank,
    WorkerRef, frame, subjects,
};
use thalweg_sdk::{Client, FoldOrder, FunctionSpec, Job};
use thalweg_store::{ShardStore as _, StoreClient};
use tokio_util::sync::CancellationToken;

use super::{
    load::base,
    stack::{Cpu, Invokers, Options, Stack},
};
use crate::process;

/// Arguments of `thalweg bench contributors`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Members of the job, all of which contribute to its one round
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2..=16_384))]
    contributors: u32,
    /// Size of the model, MiB
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    mib: u64,
    /// Members that push at the same time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pushing: u16,
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

/// What all members together may have in flight; the broker holds four times that.
const WINDOW_BUDGET: u64 = 1 << 30;
/// Claims that wait for the gateway at the same time.
const CLAIMING: usize = 32;
const REQUEST: Duration = Duration::from_secs(30);
const KINDS: (Kind, Kind) = (Kind::ApiRequest, Kind::ApiReply);

struct Outcome {
    join_seconds: f64,
    seconds: f64,
    cpu: Cpu,
    peak_rss_bytes: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let stack = Stack::start(&Options {
        invokers: Invokers::fixed(1),
        broker_memory_bytes: 4 * WINDOW_BUDGET,
        sync_always: false,
        settings: vec![
            format!("gateway.window_budget_bytes={WINDOW_BUDGET}"),
            format!("invoker.memory_bytes={}", args.budget_mib << 20),
        ],
        logs: args.logs.clone(),
    })?;
    let outcome = match crate::cli::runtime()?.block_on(measure(args, &stack)) {
        Ok(outcome) => outcome,
        Err(error) => {
            stack.explain();
            return Err(error);
        }
    };
    let peak_mib = outcome.peak_rss_bytes as f64 / f64::from(1 << 20);
    let pushed_mib = args.mib as f64 * f64::from(args.contributors);
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "{} contributors, {pushed_mib:.0} MiB, were counted exactly once each in {:.1} s ({:.0} MiB/s), after \
             {:.1} s of joining; the invoker took at most {peak_mib:.0} of {} MiB",
            args.contributors,
            outcome.seconds,
            pushed_mib / outcome.seconds,
            outcome.join_seconds,
            args.budget_mib
        )?;
    }
    let report = json!({
        "contributors": args.contributors,
        "mib": args.mib,
        "seconds": outcome.seconds,
        "join_seconds": outcome.join_seconds,
        "cpu_seconds": {
            "broker": outcome.cpu.broker,
            "invoker": outcome.cpu.invokers,
            "store": outcome.cpu.store,
            "gateway": outcome.cpu.gateway + outcome.cpu.autoscaler,
        },
        "invoker_peak_rss_mib": peak_mib,
        "budget_mib": args.budget_mib,
        // Every element and the ledger were compared; what differs ends the benchmark.
        "ok": peak_mib <= args.budget_mib as f64,
    });
    writeln!(out, "{report}")?;
    drop(out);
    stack.stop()
}

/// Every member but rank 0.
struct Members {
    connection: Connection,
    record: JobRecord,
    workers: Vec<WorkerRef>,
    /// How many of them have joined.
    joined: AtomicUsize,
}

async fn measure(args: &Args, stack: &Stack) -> anyhow::Result<Outcome> {
    let elements = usize::try_from(args.mib << 18)?;
    let client = Client::connect(&stack.url()).await?;
    let config = NatsConfig { url: stack.url(), ..NatsConfig::default() };
    let connection = Connection::open("thalweg-bench", &config, &CancellationToken::new()).await?;
    let connection = connection.context("stopped while connecting")?;
    let job = Job::new("crowd")?
        .tensor("w", [elements as u64])
        .function_spec(FunctionSpec::named("sum"))
        .workers(args.contributors)
        .order(FoldOrder::Arrival);
    let record = client.open(&job).await?;
    let worker = |rank| WorkerRef {
        key: record.spec.key.clone(),
        job: record.incarnation,
        rank,
        incarnation: Incarnation::random(),
    };
    let workers = (1..args.contributors).map(worker).collect();
    let members = Members { connection, record, workers, joined: AtomicUsize::new(0) };
    let joining = Instant::now();
    let joined = async {
        members.join().await?;
        anyhow::Ok(client.join(job, 0).await?)
    };
    let mut worker = tokio::select! {
        joined = joined => joined?,
        beaten = members.keep_beating() => { beaten?; bail!("heartbeats have ended") }
    };
    let join_seconds = joining.elapsed().as_secs_f64();
    let (_, roster) = client.job(&members.record.spec.key).await?;
    let expected = expected(args.contributors, elements);
    let own: Vec<_> = gradient(0, 0..elements as u64).collect();
    let (cpu, begun) = (stack.cpu(), Instant::now());
    let round = async {
        let (round, ()) = tokio::try_join!(
            async { Ok(worker.push_pull(&[("w", &own)]).await?) },
            members.push(usize::from(args.pushing), roster.epoch)
        )?;
        anyhow::Ok(round)
    };
    let round = tokio::select! {
        round = round => round?,
        beaten = members.keep_beating() => { beaten?; bail!("heartbeats have ended") }
    };
    let seconds = begun.elapsed().as_secs_f64();
    let after = stack.cpu();
    ensure!(round.contributors == args.contributors as usize && round.counted, "{round:?}");
    for (shard, _, order) in worker.ledgers() {
        let ranks: BTreeSet<_> = order.iter().copied().collect();
        ensure!(
            order.len() == args.contributors as usize && ranks.into_iter().eq(0..args.contributors),
            "shard {shard} counts {} contributions, not each of {} once",
            order.len(),
            args.contributors
        );
    }
    let wrong = round.tensors[0].iter().zip(&expected).filter(|(is, should)| is != should).count();
    ensure!(wrong == 0, "{wrong} of {elements} sums are wrong");
    let peak_rss_bytes = stack.invokers().into_iter().map(process::peak_rss_bytes).max().unwrap_or(0);
    Ok(Outcome { join_seconds, seconds, cpu: after.since(cpu), peak_rss_bytes })
}

/// Elements of a rank's gradient: small integers, so that their sum is exact in any order.
fn gradient(rank: Rank, elements: Range<u64>) -> impl Iterator<Item = f32> {
    elements.map(move |element| base(element as u32, rank))
}

fn expected(contributors: u32, elements: usize) -> Vec<f32> {
    let mut sum = vec![0.0; elements];
    for rank in 0..contributors {
        sum.iter_mut().zip(gradient(rank, 0..elements as u64)).for_each(|(sum, value)| *sum += value);
    }
    sum
}

impl Members {
    /// Claims all ranks.
    async fn join(&self) -> anyhow::Result<()> {
        let claims = stream::iter(&self.workers).map(|worker| async move {
            let claim = Claim { worker: worker.clone(), id: worker.incarnation.to_string(), replaces: None };
            let query = ApiRequest::Join(claim);
            loop {
                let client = &self.connection.client;
                match request(client, subjects::API, KINDS, &query, &[], REQUEST).await?.0 {
                    ApiReply::Joined { .. } => {
                        self.joined.fetch_add(1, Ordering::Relaxed);
                        return anyhow::Ok(());
                    }
                    ApiReply::Error(error) if error.is_retryable() => tokio::task::yield_now().await,
                    other => bail!("rank {} was not let in: {other:?}", worker.rank),
                }
            }
        });
        // In order, so that heartbeats know of whom to send.
        claims.buffered(CLAIMING).try_collect().await
    }

    /// Shows that all members are alive, for ever.
    async fn keep_beating(&self) -> anyhow::Result<()> {
        let mut beats = tokio::time::interval(Duration::from_secs(1));
        loop {
            beats.tick().await;
            let joined = self.joined.load(Ordering::Relaxed);
            // As many claims at most have overtaken others.
            let certain = if joined == self.workers.len() { joined } else { joined.saturating_sub(CLAIMING) };
            for worker in &self.workers[..certain] {
                let beat = ApiRequest::Beat { worker: worker.clone(), window_bytes: 0, active: true };
                let frame = frame::seal(Kind::ApiRequest, &beat, &[]);
                self.connection.client.publish(subjects::WORKER_BEAT, frame).await?;
            }
        }
    }

    /// Pushes everybody's gradient, so many members at a time.
    async fn push(&self, pushing: usize, roster_epoch: u64) -> anyhow::Result<()> {
        let store = StoreClient::new(self.connection.client.clone(), self.record.store);
        let mut heads = Vec::new();
        for shard in 0..self.record.layout.shards() {
            heads.push(store.fetch_head(self.record.incarnation, shard).await?.head);
        }
        let heads = &heads;
        let pushes = stream::iter(&self.workers).map(|worker| async move {
            for (shard, head) in (0..).zip(heads) {
                let subject = subjects::gradient(self.record.partition(shard), &worker.key, worker.rank);
                let frame = self.frame(worker, shard, head, roster_epoch);
                loop {
                    let sent = self.connection.jetstream.publish(subject.clone(), frame.clone()).await?;
                    match sent.await {
                        Ok(_) => break,
                        // The queue is full: it is the invoker's turn.
                        Err(error) => tracing::debug!(%error, "trying again"),
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            anyhow::Ok(())
        });
        pushes.buffer_unordered(pushing).try_collect().await
    }

    fn frame(&self, worker: &WorkerRef, shard: u32, head: &Head, roster_epoch: u64) -> Bytes {
        let range = self.record.layout.range(shard);
        let elements = (range.end - range.start) as usize;
        let header = GradientHeader {
            job: worker.job,
            shard,
            round: head.version + 1,
            worker: worker.incarnation,
            rank: worker.rank,
            roster_epoch,
            base: head.state_id,
            weight: 1.0,
            void: false,
            elements: elements as u32,
        };
        let mut builder = FrameBuilder::new(Kind::Gradient, &header, elements * 4);
        let payload = builder.payload_mut().as_chunks_mut::<4>().0;
        for (bytes, value) in payload.iter_mut().zip(gradient(worker.rank, range)) {
            *bytes = value.to_le_bytes();
        }
        builder.finish()
    }
}

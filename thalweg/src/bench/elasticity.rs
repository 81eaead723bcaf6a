//! `thalweg bench elasticity`: jobs that share elastic invokers, against jobs with invokers of their own.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use thalweg_broker::{Connection, NatsConfig, StreamsConfig};
use thalweg_protocol::{Durability, Name, PlacedPartition, Placement, placement_key};
use tokio_util::sync::CancellationToken;

use super::{
    crew::{Command, Crew, Reply},
    figures::mean,
    gradient::{Gradient, scale},
    journal,
    load::Function,
    migrate, predict,
    stack::{Cpu, Invokers, Options, Stack},
    worker::WorkerArgs,
};
use crate::models::Model;

/// Arguments of `thalweg bench elasticity`.
///
/// Jobs train the tensors of a model; a pause stands for the GPU. Both are scaled by --scale; --stretch makes the pause
/// alone longer, for a machine on which communication is that much slower than where the pause was measured. Two sides
/// run in turn, in one run of the program, with the same bits as results:
///
/// static: a pool for each job, with invokers of its own from before its first round until its last one has ended, and
/// no autoscaler. elastic: all jobs in the shared pool, on as many invokers as the autoscaler wants, from zero, with its
/// default policy.
///
/// invoker_seconds: summed over invokers, from the request to start one until it has ended, times its CPU quota; the
/// time after the last round until the autoscaler has stopped them all counts. reduction: 1 - elastic / static.
/// cpu_seconds: user and system time of broker, store, gateway, autoscaler and invokers, from the first round to the end
/// of the last job, without the workers; parts: of each. slowdown: by how much a job's mean time from round to round is longer on the
/// elastic side; vs_alone: than that of a job that is alone on the static side. max: of the worst job. Rounds of the
/// warm-up do not count for the periods. predicted_elastic_invoker_seconds: what `thalweg simulate` says of the same
/// jobs and the default policy, from the period of the job that is alone and from what the static side's invokers
/// handled per CPU second; prediction_off: by what share that is more. All figures are means over the repetitions.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Jobs, of two workers each
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=16))]
    jobs: u16,
    /// The model
    #[arg(long, default_value = "vgg19")]
    model: Model,
    /// Part of the model's size and of its think time
    #[arg(long, default_value_t = 0.02, value_parser = scale)]
    scale: f64,
    /// Times its think time, after that
    #[arg(long, default_value_t = 1.0)]
    stretch: f64,
    /// Think times from iteration to iteration, as in this file: columns worker, gpu, time, batch_time_norm; their mean
    /// becomes the model's think time
    #[arg(long)]
    irregular: Option<PathBuf>,
    /// CPUs of an invoker
    #[arg(long, default_value_t = 0.2)]
    cpu_quota: f64,
    /// Invokers of each job on the static side; the elastic side may have as many as all jobs together
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=4))]
    invokers: u16,
    /// Rounds that count
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Rounds before those
    #[arg(long, default_value_t = 5)]
    warm_up: u32,
    /// Runs of each side
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// What is done with the gradients
    #[arg(long, default_value = "sgd")]
    function: Function,
    /// Keep the components' logs in directories below this one
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

const WORKERS: u32 = 2;
const POOL_PARTITIONS: u16 = 8;
/// Longest wait for the last elastic invoker to end.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Static,
    Elastic,
}

/// What one run of one side came to.
#[derive(Debug, Default)]
struct Outcome {
    /// Of each job, seconds.
    periods: Vec<f64>,
    /// Of the results of each job.
    digests: Vec<u64>,
    invoker_seconds: f64,
    /// From the first round to the end of the last.
    cpu: Cpu,
    invoker_cpu_seconds: f64,
    seconds: f64,
    decisions: usize,
    pushed_bytes: f64,
    /// What invokers were given or read again beyond that.
    redelivered_bytes: f64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.stretch > 0.0 && args.cpu_quota > 0.0, "--stretch and --cpu-quota must be above 0");
    let mut outcomes: [Vec<Outcome>; 2] = Default::default();
    let alone = side(args, Side::Static, 1, "alone")?;
    for repeat in 0..args.repeats {
        for (index, kind) in [Side::Static, Side::Elastic].into_iter().enumerate() {
            let name = format!("{}-{repeat}", if kind == Side::Static { "static" } else { "elastic" });
            let outcome = side(args, kind, args.jobs, &name)?;
            // All jobs train the same, so all have the same results, those of the one that was alone included.
            ensure!(
                outcome.digests.iter().all(|digest| *digest == alone.digests[0]),
                "{name}: results differ from those of the job that was alone"
            );
            if !args.json {
                eprintln!(
                    "{name}: {:.1} invoker seconds, {:.3} s a round",
                    outcome.invoker_seconds,
                    mean(outcome.periods.iter().copied())
                );
            }
            outcomes[index].push(outcome);
        }
    }
    let report = report(args, &outcomes, &alone)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{report}")?;
    Ok(())
}

fn report(args: &Args, [fixed, elastic]: &[Vec<Outcome>; 2], alone: &Outcome) -> anyhow::Result<Value> {
    let of = |side: &[Outcome], value: fn(&Outcome) -> f64| mean(side.iter().map(value));
    let period = |side: &[Outcome], job: usize| mean(side.iter().map(|outcome| outcome.periods[job]));
    let jobs = 0..usize::from(args.jobs);
    let slowdowns: Vec<_> = jobs.clone().map(|job| period(elastic, job) / period(fixed, job) - 1.0).collect();
    let vs_alone = jobs.map(|job| period(elastic, job) / alone.periods[0] - 1.0);
    let parts = |side: &[Outcome]| {
        let sum = side.iter().fold(Cpu::default(), |sum, outcome| sum.zip(outcome.cpu, |sum, cpu| sum + cpu));
        sum.zip(sum, |sum, _| sum / side.len() as f64)
    };
    let worst = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::NEG_INFINITY, f64::max);
    let seconds = [fixed, elastic].map(|side| of(side, |outcome| outcome.invoker_seconds));
    let redelivered = of(elastic, |outcome| outcome.redelivered_bytes);
    let whole = |outcome: &Outcome| outcome.invoker_seconds;
    let bytes = Gradient::Of { model: args.model, scale: args.scale }.bytes();
    let pushed = of(fixed, |outcome| outcome.pushed_bytes);
    let handled = pushed * (1.0 + 1.0 / f64::from(WORKERS));
    let predicted = predict::invoker_seconds(predict::Run {
        jobs: usize::from(args.jobs),
        rounds: f64::from(args.rounds + args.warm_up),
        workers: f64::from(WORKERS),
        bytes: bytes as f64,
        alone_s: alone.periods[0],
        reference: f64::from(args.invokers),
        service_bytes_per_s: handled / of(fixed, |outcome| outcome.invoker_cpu_seconds) * args.cpu_quota,
        max_invokers: usize::from(args.invokers * args.jobs),
        partitions: StreamsConfig::default().partitions,
    })? * args.cpu_quota;
    Ok(json!({
        "static_invoker_seconds": seconds[0],
        "elastic_invoker_seconds": seconds[1],
        "reduction": 1.0 - seconds[1] / seconds[0],
        "predicted_elastic_invoker_seconds": predicted,
        "prediction_off": predicted / seconds[1] - 1.0,
        "cpu_seconds_static": of(fixed, |outcome| outcome.cpu.total()),
        "cpu_seconds_elastic": of(elastic, |outcome| outcome.cpu.total()),
        "cpu_parts_static": parts(fixed),
        "cpu_parts_elastic": parts(elastic),
        "slowdown_max": worst(&mut slowdowns.iter().copied()),
        "slowdown_mean": mean(slowdowns.iter().copied()),
        "slowdown_vs_alone_max": worst(&mut vs_alone.into_iter()),
        "scale_events": of(elastic, |outcome| outcome.decisions as f64),
        "redelivered_bytes_fraction": redelivered / of(elastic, |outcome| outcome.pushed_bytes),
        "invoker_cpu_quota": args.cpu_quota,
        // How much of what was reserved on the static side was used.
        "static_utilisation": of(fixed, |outcome| outcome.invoker_cpu_seconds) / of(fixed, whole),
        "model": args.model.name(),
        "scale": args.scale,
        "stretch": args.stretch,
        "irregular": args.irregular.is_some(),
        "jobs": args.jobs,
        "rounds": args.rounds,
        "warm_up_rounds": args.warm_up,
        "repeats": args.repeats,
        "bytes": bytes,
        "think_ms": args.model.scaled(args.scale).think_time.as_secs_f64() * 1e3 * args.stretch,
        "period_s_static": of(fixed, |outcome| mean(outcome.periods.iter().copied())),
        "period_s_elastic": of(elastic, |outcome| mean(outcome.periods.iter().copied())),
        "period_s_alone": alone.periods[0],
        "seconds_static": of(fixed, |outcome| outcome.seconds),
        "seconds_elastic": of(elastic, |outcome| outcome.seconds),
    }))
}

/// The pool of a job on the static side.
fn pool_name(job: u16) -> String {
    format!("pool{job:02}")
}

/// One run of one side.
fn side(args: &Args, kind: Side, jobs: u16, name: &str) -> anyhow::Result<Outcome> {
    let mut settings = vec![format!("invoker.cpu_quota={:?}", args.cpu_quota)];
    let invokers = match kind {
        Side::Static => {
            let pools =
                (0..jobs).map(|job| format!("streams.pools.{}.partitions={POOL_PARTITIONS}", pool_name(job)));
            settings.extend(pools);
            // Nobody takes their partitions over at the end, so that waiting for it would only be added to their time.
            settings.push("invoker.drain_ms=0".to_owned());
            Invokers::Own
        }
        Side::Elastic => Invokers::Scaled(0..=usize::from(args.invokers * args.jobs)),
    };
    let stack = Stack::start(&Options {
        invokers,
        broker_memory_bytes: 4 << 30,
        sync_always: false,
        settings,
        logs: args.logs.as_ref().map(|logs| logs.join(name)),
    })?;
    let mut run = Run { args, kind, jobs, stack, started: BTreeMap::new() };
    let outcome = run.measure();
    if outcome.is_err() {
        run.stack.explain();
    }
    outcome.with_context(|| format!("run {name}"))
}

struct Run<'a> {
    args: &'a Args,
    kind: Side,
    jobs: u16,
    stack: Stack,
    /// When invokers of the static side were started, by job.
    started: BTreeMap<u16, Instant>,
}

impl Run<'_> {
    fn measure(&mut self) -> anyhow::Result<Outcome> {
        if self.kind == Side::Static {
            crate::cli::runtime()?.block_on(self.reserve())?;
        }
        let mut crews = (0..self.jobs).map(|job| self.hire(job)).collect::<anyhow::Result<Vec<_>>>()?;
        crews.iter_mut().try_for_each(|crew| crew.hear().map(drop))?;
        let (cpu, begun) = (self.stack.cpu(), Instant::now());
        let (rounds, warm_up) = (self.args.rounds, self.args.warm_up);
        for crew in &mut crews {
            (0..crew.len()).try_for_each(|member| crew.tell(member, Command::Train { rounds, warm_up }))?;
        }
        let mut outcome = Outcome::default();
        for (job, crew) in (0..).zip(&mut crews) {
            let trained = crew.hear()?;
            outcome.add(&trained)?;
            if let Some(since) = self.started.remove(&job) {
                self.stack.end_invokers(&pool_name(job))?;
                let reserved = since.elapsed().as_secs_f64() * f64::from(self.args.invokers);
                outcome.invoker_seconds += reserved * self.args.cpu_quota;
            }
        }
        outcome.seconds = begun.elapsed().as_secs_f64();
        let used = self.stack.cpu();
        outcome.cpu = used.since(cpu);
        outcome.invoker_cpu_seconds = used.invokers;
        for crew in &mut crews {
            outcome.account(&crew.all(Command::Account)?)?;
        }
        crews.into_iter().try_for_each(Crew::dismiss)?;
        match self.kind {
            Side::Static => {
                let ids = (0..self.jobs).flat_map(|job| {
                    (0..self.args.invokers).map(move |number| format!("{}-{number}", pool_name(job)))
                });
                outcome.redelivered(&ids.map(|id| self.stack.log(&id)).collect::<Vec<_>>())?;
            }
            Side::Elastic => {
                self.to_zero()?;
                let log = self.stack.log("autoscaler");
                outcome.invoker_seconds = lifetimes(&log)? * self.args.cpu_quota;
                outcome.decisions = journal::read(&log, &[super::step::DECIDED])?.len();
                outcome.redelivered(&[log])?;
            }
        }
        Ok(outcome)
    }

    /// Starts the invokers of every job and places its pool's partitions on them.
    async fn reserve(&mut self) -> anyhow::Result<()> {
        let config = NatsConfig { url: self.stack.url(), ..NatsConfig::default() };
        let connection = Connection::open("thalweg-bench", &config, &CancellationToken::new()).await?;
        let connection = connection.context("stopped while connecting")?;
        let registry = migrate::registry(&connection).await?;
        for job in 0..self.jobs {
            let pool = pool_name(job);
            self.started.insert(job, Instant::now());
            for number in 0..self.args.invokers {
                let setting = format!("invoker.pool={pool}");
                self.stack.start_invoker(&format!("{pool}-{number}"), Some(&setting))?;
            }
            let holder = |index: u16| PlacedPartition {
                epoch: 1,
                holder: Some(format!("{pool}-{}", index % self.args.invokers)),
            };
            // Pools come in the order of their names, after the shared one.
            let first = StreamsConfig::default().partitions + job * POOL_PARTITIONS;
            let partitions = (0..POOL_PARTITIONS).map(holder).collect();
            let placement = Placement { partitions, first };
            let key = placement_key(Some(&Name::new(pool.clone())?));
            ensure!(registry.put(&key, &placement, 0).await?.is_ok(), "{key} is there already");
        }
        Ok(())
    }

    fn hire(&self, job: u16) -> anyhow::Result<Crew> {
        let mut crew = Crew::new();
        for rank in 0..WORKERS {
            let worker = WorkerArgs {
                url: self.stack.url(),
                job: format!("job{job:02}"),
                pool: (self.kind == Side::Static).then(|| pool_name(job)),
                rank,
                workers: WORKERS,
                gradient: Gradient::Of { model: self.args.model, scale: self.args.scale },
                stretch: self.args.stretch,
                irregular: self.args.irregular.clone(),
                durability: Durability::Process,
                function: self.args.function,
                yielding: false,
            };
            crew.hire(&worker.command_line())?;
        }
        Ok(crew)
    }

    /// Waits until the autoscaler has stopped its last invoker.
    fn to_zero(&self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        while !self.stack.invokers().is_empty() {
            ensure!(Instant::now() < until, "there are still invokers {PATIENCE:?} after the last round");
            std::thread::sleep(LOOK);
        }
        // What it logs when it has seen that.
        let log = self.stack.log("autoscaler");
        loop {
            let (started, ended) =
                (journal::read(&log, &[STARTED])?.len(), journal::read(&log, &ENDED)?.len());
            if started == ended {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{started} invokers were started, {ended} have ended");
            std::thread::sleep(LOOK);
        }
    }
}

/// What the autoscaler logs about the processes of invokers.
const STARTED: &str = "started invoker";
const ENDED: [&str; 2] = ["invoker ended", "invoker ended by itself"];

/// Seconds of all invokers together.
fn lifetimes(log: &std::path::Path) -> anyhow::Result<f64> {
    let mut started: BTreeMap<String, SystemTime> = BTreeMap::new();
    let mut seconds = 0.0;
    for line in journal::read(log, &[STARTED, ENDED[0], ENDED[1]])? {
        let id = line.text("invoker").context("an invoker without an id")?.to_owned();
        if line.message == STARTED {
            started.insert(id, line.at);
        } else if let Some(since) = started.remove(&id) {
            seconds += line.at.duration_since(since).unwrap_or_default().as_secs_f64();
        }
    }
    ensure!(started.is_empty(), "{} invokers have not ended", started.len());
    Ok(seconds)
}

impl Outcome {
    /// Adds what the workers of one job tell of its training.
    fn add(&mut self, replies: &[Reply]) -> anyhow::Result<()> {
        let trained = replies.iter().map(|reply| match reply {
            Reply::Trained { period_s, digest } => Ok((*period_s, *digest)),
            _ => bail!("a worker told of something else"),
        });
        let trained = trained.collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(trained.iter().all(|(_, digest)| *digest == trained[0].1), "workers of one job differ");
        self.periods.push(mean(trained.iter().map(|(period, _)| *period)));
        self.digests.push(trained[0].1);
        Ok(())
    }

    fn account(&mut self, replies: &[Reply]) -> anyhow::Result<()> {
        for reply in replies {
            let Reply::Account { sent_bytes, lost, repeated } = reply else {
                bail!("a worker told of something else")
            };
            ensure!(
                (*lost, *repeated) == (0, 0),
                "{lost} contributions are lost, {repeated} are counted twice"
            );
            self.pushed_bytes += *sent_bytes as f64;
        }
        Ok(())
    }

    /// Reads from these logs what their invokers were given.
    fn redelivered(&mut self, logs: &[PathBuf]) -> anyhow::Result<()> {
        let mut given = 0.0;
        for log in logs {
            for line in journal::read(log, &[migrate::ENDS])? {
                given += line.number("delivered_bytes").context("no count of delivered bytes")?;
                given += line.number("read_again_bytes").context("no count of bytes read again")?;
            }
        }
        self.redelivered_bytes = given - self.pushed_bytes;
        Ok(())
    }
}

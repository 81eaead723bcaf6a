//! `thalweg demo`: a real model, trained by worker processes through the embedded service or another one, compared
//! with the same training in one process.

mod digits;
mod mlp;
mod report;
mod service;

pub(crate) use report::quantile;

use std::{
    collections::VecDeque,
    io::{BufRead as _, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use thalweg_protocol::{Durability, FunctionSpec};
use thalweg_sdk::{Client, Job, JobKey, JoinOptions, Name};

use crate::{admin, config::Config, up};
use digits::Digits;
use report::{Outcome, Sample};
use service::{Deployment, Service};

/// Seed of the split, the initial parameters and the batches.
const SEED: u64 = 1;
const BATCH: usize = 128;
const LEARNING_RATE: f32 = 0.2;
const MOMENTUM: f32 = 0.9;
/// Small shards, so that even this small model is spread over several partitions.
const SHARD_BYTES: u32 = 8 * 1024;

/// Arguments of `thalweg demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Worker processes; must divide the global batch of 128
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Rounds of training
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// What a result has survived when a worker sees it: `process` or `disk`
    #[arg(long, default_value = "process", value_parser = durability)]
    durability: Durability,
    /// Print one line of JSON at the end instead of a table
    #[arg(long)]
    json: bool,
    /// Keep the service's files here instead of in a temporary directory
    #[arg(long, conflicts_with = "nats_url")]
    data_dir: Option<PathBuf>,
    /// Train through the service that runs at this NATS server instead of one of the demo's own
    #[arg(long, value_name = "URL", value_parser = admin::parse_url)]
    nats_url: Option<String>,
    /// Name of the job, in the tenant `default`. A job that was broken off is trained on from where it stands; one demo
    /// at a time can train it
    #[arg(long, default_value = "digits", value_parser = job_name)]
    job: Name,
    /// Leave the job in the service at the end
    #[arg(long, requires = "nats_url")]
    keep_job: bool,
}

/// Arguments of a worker process.
#[derive(Debug, clap::Args)]
pub struct WorkerArgs {
    #[arg(long)]
    url: String,
    #[arg(long, value_parser = job_name)]
    job: Name,
    #[arg(long)]
    rank: u32,
    #[arg(long)]
    workers: u32,
    #[arg(long)]
    rounds: u64,
    #[arg(long, value_parser = durability)]
    durability: Durability,
    /// Where rank 0 writes the parameters it ends with
    #[arg(long)]
    parameters: PathBuf,
}

pub(crate) fn durability(text: &str) -> Result<Durability, String> {
    match text {
        "process" => Ok(Durability::Process),
        "disk" => Ok(Durability::Disk),
        _ => Err("expected `process` or `disk`".to_owned()),
    }
}

fn job_name(text: &str) -> Result<Name, String> {
    text.parse::<Name>().map_err(|error| error.to_string())
}

/// What a worker process tells, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line {
    Round { round: u64, ms: f64, loss: f32 },
    Done { sent: u64, received: u64 },
}

/// The demo.
///
/// # Errors
/// When a part cannot run, with what to do.
pub async fn run(args: Args) -> anyhow::Result<()> {
    if !BATCH.is_multiple_of(args.workers as usize) {
        bail!(
            "{} workers do not share a batch of {BATCH} evenly: use 1, 2, 4, 8, 16, 32 or 64",
            args.workers
        );
    }
    let temporary = tempfile::tempdir().context("creating a temporary directory")?;
    let directory = args.data_dir.as_deref().unwrap_or(temporary.path());
    std::fs::create_dir_all(directory)?;
    let begun = Instant::now();
    let service = match &args.nats_url {
        None => Service::own(up::Service::start(config(directory)).await?),
        Some(url) => {
            // What the library has to say while it waits for a part of the service.
            let log = Config::default().log;
            thalweg_telemetry::logs::init("warn,thalweg=info,thalweg_sdk=info,async_nats=error", log.format)?;
            let key = JobKey { tenant: "default".parse::<Name>()?, job: args.job.clone() };
            Service::Other(Box::new(Deployment::at(url, key, args.rounds).await?))
        }
    };
    let outcome = train(&args, &service, directory, begun).await;
    let stopped = service.end(args.keep_job || outcome.is_err()).await;
    let outcome = outcome?;
    stopped?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &outcome.json())?;
        writeln!(out)?;
    } else {
        write!(out, "{}", outcome.table())?;
    }
    Ok(())
}

fn config(directory: &Path) -> Config {
    let mut config = Config::default();
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    config.admin.listen = any;
    config.gateway.http_listen = any;
    config.store.data_dir = directory.join("store");
    config.embedded.data_dir = directory.join("nats");
    config.embedded.port = 0;
    config.autoscaler.policy.max_invokers = 2;
    // Short, so that one sees the pool shrink to nothing again.
    config.autoscaler.policy.idle_timeout_ms = 1500;
    config
}

async fn train(args: &Args, service: &Service, directory: &Path, begun: Instant) -> anyhow::Result<Outcome> {
    let parameters = directory.join("parameters.f32");
    let (lines, received) = mpsc::channel();
    let mut workers = Vec::new();
    for rank in 0..args.workers {
        workers.push(spawn(args, service.url(), rank, &parameters, lines.clone())?);
    }
    drop(lines);
    let bar = progress(args);
    let mut outcome = Outcome::new(args.workers, args.rounds, args.durability);
    let mut recent: VecDeque<Instant> = VecDeque::new();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tick.tick().await;
        let mut open = true;
        loop {
            match received.try_recv() {
                Ok(Line::Round { round, ms, loss }) => {
                    outcome.round_ms.push(ms);
                    recent.push_back(Instant::now());
                    bar.set_position(round);
                    bar.set_message(format!("loss {loss:.3}"));
                }
                Ok(Line::Done { sent, received }) => outcome.count(sent, received),
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => {
                    open = false;
                    break;
                }
            }
        }
        while recent.front().is_some_and(|at| at.elapsed() > Duration::from_secs(1)) {
            recent.pop_front();
        }
        let now = service.pool();
        outcome.sample(Sample { at: begun.elapsed(), invokers: now.invokers });
        let depth = now.depth.map_or(String::new(), |depth| format!("depth {depth} messages, "));
        let rate = recent.len() / args.workers as usize;
        bar.set_prefix(format!("{rate} rounds/s, {depth}{} invokers", now.invokers));
        if !open {
            break;
        }
    }
    for (rank, mut worker) in workers.into_iter().enumerate() {
        let status = worker.wait()?;
        if !status.success() {
            bail!("worker {rank} ended with {status}");
        }
    }
    outcome.seconds = begun.elapsed().as_secs_f64();
    bar.set_message("waiting for the pool to shrink to nothing");
    // That of another service may have more to do, or take its time.
    let until = Instant::now() + if service.is_own() { Duration::from_secs(15) } else { Duration::ZERO };
    while service.pool().invokers > 0 && Instant::now() < until {
        tick.tick().await;
        outcome.sample(Sample { at: begun.elapsed(), invokers: service.pool().invokers });
    }
    bar.finish_and_clear();
    outcome.invokers_final = service.pool().invokers;
    let trained = read_parameters(&parameters)?;
    tokio::task::spawn_blocking(move || {
        compare(&mut outcome, &trained)?;
        Ok(outcome)
    })
    .await?
}

fn progress(args: &Args) -> ProgressBar {
    let bar = ProgressBar::new(args.rounds);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    if let Ok(style) = ProgressStyle::with_template("{bar:30} round {pos}/{len}  {prefix}  {msg}") {
        bar.set_style(style);
    }
    bar
}

fn spawn(
    args: &Args,
    url: &str,
    rank: u32,
    parameters: &Path,
    lines: mpsc::Sender<Line>,
) -> anyhow::Result<Child> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["demo-worker", "--url", url, "--job", args.job.as_str()])
        .args(["--rank", &rank.to_string(), "--workers", &args.workers.to_string()])
        .args(["--rounds", &args.rounds.to_string(), "--durability", &args.durability.to_string()])
        .arg("--parameters")
        .arg(parameters)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting a worker process")?;
    let output = child.stdout.take().context("the worker has no output")?;
    std::thread::spawn(move || {
        for line in std::io::BufReader::new(output).lines().map_while(Result::ok) {
            if let Ok(line) = serde_json::from_str(&line)
                && lines.send(line).is_err()
            {
                return;
            }
        }
    });
    Ok(child)
}

fn job(args: &WorkerArgs) -> anyhow::Result<Job> {
    let sgd = FunctionSpec::named("sgd")
        .number("lr", f64::from(LEARNING_RATE))
        .number("momentum", f64::from(MOMENTUM));
    let mut job = Job::new(args.job.as_str())?
        .function_spec(sgd)
        .workers(args.workers)
        .durability(args.durability)
        .shard_bytes(SHARD_BYTES);
    for (name, shape) in mlp::TENSORS {
        job = job.tensor(name, shape.iter().map(|dim| *dim as u64).collect::<Vec<_>>());
    }
    Ok(job)
}

/// The named tensors of a flat parameter vector.
fn tensors(flat: &[f32]) -> Vec<(&'static str, &[f32])> {
    let mut rest = flat;
    mlp::TENSORS
        .iter()
        .map(|(name, shape)| {
            let (tensor, after) = rest.split_at(shape.iter().product());
            rest = after;
            (*name, tensor)
        })
        .collect()
}

/// A worker process: the training loop of a user.
///
/// # Errors
/// Those of the SDK.
pub async fn worker(args: WorkerArgs) -> anyhow::Result<()> {
    let data = Digits::load()?;
    let train = data.split(SEED).train;
    let mut parameters = mlp::init(SEED);
    let client = Client::connect(&args.url).await?;
    let initial =
        tensors(&parameters).into_iter().map(|(name, values)| (name.to_owned(), values.to_vec())).collect();
    // A worker that was broken off takes its rank back at once.
    let worker_id = format!("demo-{}", args.rank);
    let options = JoinOptions { worker_id, initial, ..JoinOptions::default() };
    let mut worker = client.join_with(job(&args)?, args.rank, options).await?;
    parameters = worker.parameters().await?.concat();
    let mut out = std::io::stdout().lock();
    // The first round is 1; it is another where a job is trained on.
    while worker.round() <= args.rounds {
        let share = BATCH / args.workers as usize;
        let batch =
            mlp::batch(&train, SEED, worker.round() - 1, args.workers as usize, args.rank as usize, share);
        let (loss, gradient) = mlp::gradient(&parameters, &batch, &data);
        let begun = Instant::now();
        let round = worker.push_pull(&tensors(&gradient)).await?;
        let ms = begun.elapsed().as_secs_f64() * 1e3;
        parameters = round.tensors.concat();
        serde_json::to_writer(&mut out, &Line::Round { round: round.round, ms, loss })?;
        writeln!(out)?;
    }
    if args.rank == 0 {
        let bytes: Vec<u8> = parameters.iter().flat_map(|value| value.to_le_bytes()).collect();
        std::fs::write(&args.parameters, bytes)?;
    }
    let (sent, received) = worker.traffic();
    worker.leave().await?;
    serde_json::to_writer(&mut out, &Line::Done { sent, received })?;
    writeln!(out)?;
    Ok(())
}

fn read_parameters(path: &Path) -> anyhow::Result<Vec<f32>> {
    let bytes = std::fs::read(path).context("rank 0 wrote no parameters")?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// The same training in this process, on the same batches.
fn compare(outcome: &mut Outcome, trained: &[f32]) -> anyhow::Result<()> {
    let data = Digits::load()?;
    let split = data.split(SEED);
    let mut parameters = mlp::init(SEED);
    let mut velocity = vec![0.0_f32; parameters.len()];
    for step in 0..outcome.rounds {
        let batch = mlp::batch(&split.train, SEED, step, 1, 0, BATCH);
        let (_, gradient) = mlp::gradient(&parameters, &batch, &data);
        for ((parameter, velocity), gradient) in parameters.iter_mut().zip(&mut velocity).zip(gradient) {
            *velocity = MOMENTUM * *velocity + gradient;
            *parameter -= LEARNING_RATE * *velocity;
        }
    }
    outcome.accuracy = mlp::accuracy(trained, &data, &split.test);
    outcome.single_process_accuracy = mlp::accuracy(&parameters, &data, &split.test);
    let largest = parameters.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let difference = parameters
        .iter()
        .zip(trained)
        .fold(0.0_f32, |largest, (one, other)| largest.max((one - other).abs()));
    outcome.max_param_diff = difference / largest;
    Ok(())
}

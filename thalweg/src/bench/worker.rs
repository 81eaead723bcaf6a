//! A worker process of the benchmarks: does what it is told, and checks every element of what it gets.

use std::{
    collections::VecDeque,
    io::{BufRead as _, Write as _},
    ops::Range,
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use thalweg_protocol::Durability;
use thalweg_sdk::{Client, Job, JoinOptions, Worker};
use tokio::sync::mpsc;

use super::{
    crew::{Command, Reply, Span, now_ns},
    gradient::Gradient,
    load::{self, Expectation, Function},
    raw::Pusher,
    train::{self, Loop},
};
use crate::models::Tensor;

/// Arguments of a worker process.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    #[arg(long)]
    pub(super) url: String,
    #[arg(long)]
    pub(super) job: String,
    #[arg(long)]
    pub(super) rank: u32,
    #[arg(long)]
    pub(super) workers: u32,
    #[arg(long)]
    pub(super) pool: Option<String>,
    #[arg(long)]
    pub(super) gradient: Gradient,
    /// Times the model's think time.
    #[arg(long)]
    pub(super) stretch: f64,
    #[arg(long)]
    pub(super) irregular: Option<PathBuf>,
    #[arg(long, value_parser = crate::demo::durability)]
    pub(super) durability: Durability,
    #[arg(long)]
    pub(super) function: Function,
    /// Below the priority of everything else.
    #[arg(long)]
    pub(super) yielding: bool,
}

/// One tensor of the gradient.
pub(super) struct Part {
    pub(super) name: String,
    shape: Vec<u64>,
    pub(super) bounds: Range<usize>,
}

impl WorkerArgs {
    /// Worker `rank` of a job called `bench` in the shared pool.
    pub(super) fn new(
        url: String,
        (rank, workers): (u32, u32),
        gradient: Gradient,
        durability: Durability,
        function: Function,
    ) -> Self {
        let (job, stretch) = ("bench".to_owned(), 1.0);
        let (pool, irregular, yielding) = (None, None, false);
        Self { url, job, rank, workers, pool, gradient, stretch, irregular, durability, function, yielding }
    }

    /// The command line of such a process.
    pub(super) fn command_line(&self) -> Vec<String> {
        let flags = [
            ("--url", self.url.clone()),
            ("--job", self.job.clone()),
            ("--rank", self.rank.to_string()),
            ("--workers", self.workers.to_string()),
            ("--gradient", self.gradient.to_string()),
            ("--stretch", format!("{:?}", self.stretch)),
            ("--durability", self.durability.to_string()),
            ("--function", self.function.name().to_owned()),
        ];
        let pool = self.pool.iter().map(|pool| ("--pool", pool.clone()));
        let irregular = self.irregular.iter().map(|path| ("--irregular", path.display().to_string()));
        let flags =
            flags.into_iter().chain(pool).chain(irregular).flat_map(|(flag, value)| [flag.to_owned(), value]);
        let yielding = self.yielding.then(|| "--yielding".to_owned());
        ["bench-worker".to_owned()].into_iter().chain(flags).chain(yielding).collect()
    }

    /// From iteration to iteration, over and over.
    fn think_times(&self) -> anyhow::Result<Vec<Duration>> {
        let mean = self.gradient.think_time().mul_f64(self.stretch);
        match &self.irregular {
            Some(path) => train::irregular(path, self.rank, mean),
            None => Ok(vec![mean]),
        }
    }

    fn parts(&self) -> Vec<Part> {
        let mut next = 0;
        let part = |Tensor { name, shape }: Tensor| {
            let start = next;
            next += shape.iter().product::<u64>() as usize;
            Part { name, shape, bounds: start..next }
        };
        self.gradient.tensors().into_iter().map(part).collect()
    }

    async fn join(&self, parts: &[Part]) -> anyhow::Result<Worker> {
        let mut job = Job::new(&self.job)?
            .function_spec(self.function.spec())
            .workers(self.workers)
            .durability(self.durability);
        if let Some(pool) = &self.pool {
            job = job.pool(pool)?;
        }
        let mut initial = Vec::new();
        for Part { name, shape, bounds } in parts {
            job = job.tensor(name.clone(), shape.clone());
            if self.function == Function::Sgd && self.rank == 0 {
                initial.push((name.clone(), vec![0.0; bounds.len()]));
            }
        }
        let client = Client::connect(&self.url).await?;
        let options = JoinOptions { initial, ..JoinOptions::default() };
        Ok(client.join_with(job, self.rank, options).await?)
    }
}

/// Commands, read by a thread of their own; closed when the input is.
pub(super) fn commands() -> mpsc::UnboundedReceiver<Command> {
    let (sender, commands) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if let Ok(command) = serde_json::from_str(&line)
                && sender.send(command).is_err()
            {
                return;
            }
        }
    });
    commands
}

pub(super) fn reply(reply: Reply) -> anyhow::Result<()> {
    let line = serde_json::to_string(&reply)? + "\n";
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    Ok(out.flush()?)
}

pub(super) async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    thalweg_telemetry::logs::init("warn", thalweg_telemetry::logs::LogFormat::Auto)?;
    let (parts, think_times) = (args.parts(), args.think_times()?);
    let elements = parts.last().map_or(0, |part| part.bounds.end);
    let mut commands = commands();
    let mut worker = args.join(&parts).await?;
    let mut pusher = None;
    let mut expectation = Expectation::new(args.function, args.workers, elements);
    let (mut gradient, mut result): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
    let (mut round, mut lost, mut repeated) = (0, 0, 0);
    reply(Reply::Ready)?;
    while let Some(command) = commands.recv().await {
        let answer = match command {
            Command::Prepare { round: next } => {
                round = next;
                gradient.resize(elements, 0.0);
                result.resize(elements, 0.0);
                load::fill(&mut gradient, 0, round, args.rank);
                result.fill(f32::NAN);
                Reply::Ready
            }
            Command::Thalweg => {
                let first_push_ns = now_ns();
                // The two halves of push_pull, into memory that is there already.
                for Part { name, bounds, .. } in &parts {
                    worker.push(name, &gradient[bounds.clone()]).await?;
                }
                for Part { name, bounds, .. } in &parts {
                    worker.pull(name, &mut result[bounds.clone()]).await?;
                }
                let last_result_ns = now_ns();
                let (without, twice) = miscounted(&worker, args.workers);
                (lost, repeated) = (lost + without, repeated + twice);
                Reply::Round(Span { first_push_ns, last_result_ns })
            }
            Command::Train { rounds, warm_up } => {
                gradient.resize(elements, 0.0);
                result.resize(elements, 0.0);
                let mut training = Loop {
                    worker: &mut worker,
                    workers: args.workers,
                    parts: &parts,
                    gradient: &mut gradient,
                    result: &mut result,
                    expectation: &mut expectation,
                    think_times: &think_times,
                    round: &mut round,
                    lost: &mut lost,
                    repeated: &mut repeated,
                };
                training.train(rounds, warm_up).await?
            }
            Command::Account => Reply::Account { sent_bytes: worker.traffic().0, lost, repeated },
            Command::ConnectRaw => {
                pusher = Some(Pusher::connect(&args.url, args.rank).await?);
                Reply::Ready
            }
            Command::Raw { message_bytes, window_bytes } => {
                let pusher = pusher.as_mut().context("not connected")?;
                let first_push_ns = now_ns();
                let sizes = (message_bytes, window_bytes);
                let last_result_ns = pusher.round(round, &gradient, &mut result, sizes).await?;
                Reply::Round(Span { first_push_ns, last_result_ns })
            }
            Command::Check { raw: true } => {
                load::check_sum(&result, 0, round, args.workers)?;
                Reply::Ready
            }
            Command::Check { raw: false } => {
                expectation.check(&result, round)?;
                Reply::Ready
            }
            Command::Backlog { ahead } => backlog(&args, &parts, &mut worker, ahead).await?,
            Command::Leave => break,
        };
        reply(answer)?;
    }
    worker.leave().await?;
    reply(Reply::Ready)
}

/// Contributions to the last round that its ledgers lack, and that they have more than once, over all shards.
pub(super) fn miscounted(worker: &Worker, workers: u32) -> (u64, u64) {
    let (mut lost, mut repeated) = (0, 0);
    for (_, _, mut ranks) in worker.ledgers() {
        let counted = ranks.len();
        ranks.sort_unstable();
        ranks.dedup();
        lost += u64::from(workers).saturating_sub(ranks.len() as u64);
        repeated += (counted - ranks.len()) as u64;
    }
    (lost, repeated)
}

/// One round, tensor by tensor: each is made, pushed and forgotten, and its result checked and forgotten.
async fn backlog(
    args: &WorkerArgs,
    parts: &[Part],
    worker: &mut Worker,
    ahead: usize,
) -> anyhow::Result<Reply> {
    let largest = parts.iter().map(|part| part.bounds.len()).max().unwrap_or(0);
    let mut values = vec![0.0; largest];
    let mut open = VecDeque::new();
    let first_push_ns = now_ns();
    for Part { name, bounds, .. } in parts {
        if open.len() == ahead {
            pull(args, worker, &mut open, &mut values).await?;
        }
        let gradient = &mut values[..bounds.len()];
        load::fill(gradient, bounds.start, 1, args.rank);
        worker.push(name, gradient).await?;
        open.push_back((name, bounds));
    }
    while !open.is_empty() {
        pull(args, worker, &mut open, &mut values).await?;
    }
    Ok(Reply::Round(Span { first_push_ns, last_result_ns: now_ns() }))
}

async fn pull(
    args: &WorkerArgs,
    worker: &mut Worker,
    open: &mut VecDeque<(&String, &Range<usize>)>,
    values: &mut [f32],
) -> anyhow::Result<()> {
    let Some((name, bounds)) = open.pop_front() else { return Ok(()) };
    let result = &mut values[..bounds.len()];
    worker.pull(name, result).await?;
    load::check_sum(result, bounds.start, 1, args.workers)
}

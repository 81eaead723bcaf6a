//! A worker process of the benchmarks: does what it is told, and checks every element of what it gets.

use std::{
    collections::VecDeque,
    io::{BufRead as _, Write as _},
};

use anyhow::Context as _;
use thalweg_protocol::Durability;
use thalweg_sdk::{Client, Job, JoinOptions, Worker};
use tokio::sync::mpsc;

use super::{
    crew::{Command, Reply, Span, now_ns},
    load::{self, Expectation, Function},
    raw::Pusher,
};

/// Arguments of a worker process.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    #[arg(long)]
    url: String,
    #[arg(long)]
    rank: u32,
    #[arg(long)]
    workers: u32,
    #[arg(long)]
    elements: usize,
    #[arg(long)]
    tensor_elements: usize,
    #[arg(long, value_parser = crate::demo::durability)]
    durability: Durability,
    #[arg(long)]
    function: Function,
}

impl WorkerArgs {
    /// The command line of worker `rank`.
    pub(super) fn command_line(
        url: &str,
        (rank, workers): (u32, u32),
        (elements, tensor_elements): (usize, usize),
        durability: Durability,
        function: Function,
    ) -> Vec<String> {
        let numbers = [
            ("--rank", u64::from(rank)),
            ("--workers", u64::from(workers)),
            ("--elements", elements as u64),
            ("--tensor-elements", tensor_elements as u64),
        ];
        let numbers = numbers.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value.to_string()]);
        let texts = [
            ("--url", url.to_owned()),
            ("--durability", durability.to_string()),
            ("--function", function.name().to_owned()),
        ];
        let texts = texts.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
        ["bench-worker".to_owned()].into_iter().chain(numbers).chain(texts).collect()
    }

    /// Bounds of every tensor.
    fn tensors(&self) -> Vec<(String, std::ops::Range<usize>)> {
        let starts = (0..self.elements).step_by(self.tensor_elements).enumerate();
        let bounds = |start: usize| start..self.elements.min(start + self.tensor_elements);
        starts.map(|(index, start)| (format!("t{index}"), bounds(start))).collect()
    }

    async fn join(&self) -> anyhow::Result<Worker> {
        let mut job = Job::new("bench")?
            .function_spec(self.function.spec())
            .workers(self.workers)
            .durability(self.durability);
        let mut initial = Vec::new();
        for (name, bounds) in self.tensors() {
            job = job.tensor(name.clone(), [bounds.len() as u64]);
            if self.function == Function::Sgd && self.rank == 0 {
                initial.push((name, vec![0.0; bounds.len()]));
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
    let tensors = args.tensors();
    let mut commands = commands();
    let mut worker = args.join().await?;
    let mut pusher = None;
    let mut expectation = Expectation::new(args.function, args.workers, args.elements);
    let (mut gradient, mut result): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
    let mut round = 0;
    reply(Reply::Ready)?;
    while let Some(command) = commands.recv().await {
        let answer = match command {
            Command::Prepare { round: next } => {
                round = next;
                gradient.resize(args.elements, 0.0);
                result.resize(args.elements, 0.0);
                load::fill(&mut gradient, 0, round, args.rank);
                result.fill(f32::NAN);
                Reply::Ready
            }
            Command::Thalweg => {
                let first_push_ns = now_ns();
                // The two halves of push_pull, into memory that is there already.
                for (name, bounds) in &tensors {
                    worker.push(name, &gradient[bounds.clone()]).await?;
                }
                for (name, bounds) in &tensors {
                    worker.pull(name, &mut result[bounds.clone()]).await?;
                }
                Reply::Round(Span { first_push_ns, last_result_ns: now_ns() })
            }
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
            Command::Backlog { ahead } => backlog(&args, &tensors, &mut worker, ahead).await?,
            Command::Leave => break,
        };
        reply(answer)?;
    }
    worker.leave().await?;
    reply(Reply::Ready)
}

/// One round, tensor by tensor: each is made, pushed and forgotten, and its result checked and forgotten.
async fn backlog(
    args: &WorkerArgs,
    tensors: &[(String, std::ops::Range<usize>)],
    worker: &mut Worker,
    ahead: usize,
) -> anyhow::Result<Reply> {
    let mut values = vec![0.0; args.tensor_elements];
    let mut open = VecDeque::new();
    let first_push_ns = now_ns();
    for (name, bounds) in tensors {
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
    open: &mut VecDeque<(&String, &std::ops::Range<usize>)>,
    values: &mut [f32],
) -> anyhow::Result<()> {
    let Some((name, bounds)) = open.pop_front() else { return Ok(()) };
    let result = &mut values[..bounds.len()];
    worker.pull(name, result).await?;
    load::check_sum(result, bounds.start, 1, args.workers)
}

//! A load that is offered by the clock, whatever becomes of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::ensure;
use thalweg_sdk::{Client, FunctionSpec, Job, Worker};
use tokio::{sync::mpsc, task::JoinSet};

use super::load;

/// Time between looks at the clock.
const TICK: Duration = Duration::from_millis(5);
/// How often the noise of a noisy load changes.
const NOISE: Duration = Duration::from_millis(250);

/// Many small jobs of one worker each. A push falls due whenever the clock says so and goes to the job whose turn it is;
/// it waits there while that job's push before it has no result. So what is offered does not depend on what is done,
/// as long as the jobs are not all waiting.
#[derive(Debug)]
pub(super) struct Offered {
    shared: Arc<Shared>,
    tasks: JoinSet<anyhow::Result<()>>,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes a second, as the bits of an f64.
    rate: AtomicU64,
    /// Part of the rate by which it varies, likewise.
    noise: AtomicU64,
    /// Pushes due, and pushes done.
    due: AtomicU64,
    done: AtomicU64,
}

/// What has been pushed and has its result.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    pub(super) at: Instant,
    pub(super) pushes: u64,
}

impl Offered {
    /// Joins `jobs` jobs with contributions of so many bytes each; nothing is offered yet. The first result after a
    /// time without any is told through `first`: how long its push took.
    pub(super) async fn start(client: &Client, jobs: usize, bytes: u64) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut tasks = JoinSet::new();
        let mut queues = Vec::with_capacity(jobs);
        for number in 0..jobs {
            let job = Job::new(&format!("load-{number}"))?;
            let job = job.tensor("w", [bytes / 4]).shard_bytes(u32::try_from(bytes)?);
            let worker = client.join(job.function_spec(FunctionSpec::named("sum")), 0).await?;
            let (queue, due) = mpsc::unbounded_channel();
            queues.push(queue);
            tasks.spawn(push(worker, (bytes / 4) as usize, due, shared.clone()));
        }
        tasks.spawn(pace(queues, bytes, shared.clone()));
        Ok(Self { shared, tasks, bytes })
    }

    /// From now on so many bytes a second, by a part of `noise` more or less at a time.
    pub(super) fn offer(&self, bytes_per_s: f64, noise: f64) {
        self.shared.noise.store(noise.to_bits(), Ordering::Relaxed);
        self.shared.rate.store(bytes_per_s.to_bits(), Ordering::Relaxed);
    }

    pub(super) fn served(&self) -> Served {
        Served { at: Instant::now(), pushes: self.shared.done.load(Ordering::Relaxed) }
    }

    /// Bytes a second that were served between two moments.
    pub(super) fn rate(&self, from: Served, to: Served) -> f64 {
        let seconds = (to.at - from.at).as_secs_f64();
        (to.pushes - from.pushes) as f64 * self.bytes as f64 / seconds
    }

    /// Pushes that are due and have no result.
    pub(super) fn waiting(&self) -> u64 {
        self.shared.due.load(Ordering::Relaxed).saturating_sub(self.shared.done.load(Ordering::Relaxed))
    }

    /// Fails when any of its tasks has.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        match self.tasks.try_join_next() {
            Some(ended) => ended?,
            None => Ok(()),
        }
    }
}

/// Hands out what falls due, job by job.
async fn pace(queues: Vec<mpsc::UnboundedSender<()>>, bytes: u64, shared: Arc<Shared>) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(TICK);
    let (begun, mut before) = (Instant::now(), Instant::now());
    let (mut credit, mut next) = (0.0, 0);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        let rate = f64::from_bits(shared.rate.load(Ordering::Relaxed));
        let noise = f64::from_bits(shared.noise.load(Ordering::Relaxed));
        // An odd number in -127..=127 for each stretch of time, the same in every run.
        let stretch = (begun.elapsed().as_millis() / NOISE.as_millis()) as u32;
        let factor = 1.0 + noise * f64::from(load::base(stretch, 1)) / 127.0;
        credit += rate * factor * (now - before).as_secs_f64() / bytes as f64;
        before = now;
        if rate == 0.0 {
            // The next load begins with a push.
            credit = 1.0;
            continue;
        }
        while credit >= 1.0 {
            credit -= 1.0;
            shared.due.fetch_add(1, Ordering::Relaxed);
            ensure!(queues[next].send(()).is_ok(), "a job has ended");
            next = (next + 1) % queues.len();
        }
    }
}

/// One job: a round for each push that is due, its result compared.
async fn push(
    mut worker: Worker,
    elements: usize,
    mut due: mpsc::UnboundedReceiver<()>,
    shared: Arc<Shared>,
) -> anyhow::Result<()> {
    let mut values = vec![0.0; elements];
    while due.recv().await.is_some() {
        let round = u32::try_from(worker.round())?;
        load::fill(&mut values, 0, round, 0);
        worker.push("w", &values).await?;
        worker.pull("w", &mut values).await?;
        load::check_sum(&values, 0, round, 1)?;
        shared.done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

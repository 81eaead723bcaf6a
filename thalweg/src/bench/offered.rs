//! A load of many small jobs, of which more or fewer train.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use thalweg_sdk::{Client, FunctionSpec, Job, Worker};
use tokio::{sync::watch, task::JoinSet};

use super::load;

/// How often the noise of a noisy load changes.
const NOISE: Duration = Duration::from_millis(250);
/// Part of its think time by which each of a job's differs, at most.
const VARIATION: f64 = 0.1;

/// Jobs of one worker and one shard each, which push, wait for the result, and think. So what they push depends on what is
/// done, as that of all synchronous jobs does.
#[derive(Debug)]
pub(super) struct Offered {
    wished: watch::Sender<Wish>,
    done: Arc<AtomicU64>,
    tasks: JoinSet<anyhow::Result<()>>,
}

/// What is offered.
#[derive(Clone, Copy, Debug)]
struct Wish {
    /// The first so many train.
    jobs: usize,
    think: Duration,
    /// Part of the think time by which that of all jobs differs at a time, at most.
    noise: f64,
}

/// Rounds that have their result.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    pub(super) at: Instant,
    pub(super) rounds: u64,
}

impl Offered {
    /// Joins `jobs` jobs with contributions of so many bytes each; none trains yet.
    pub(super) async fn start(client: &Client, jobs: usize, bytes: u64) -> anyhow::Result<Self> {
        let (wished, _) = watch::channel(Wish { jobs: 0, think: Duration::ZERO, noise: 0.0 });
        let (done, mut tasks) = (Arc::new(AtomicU64::new(0)), JoinSet::new());
        let begun = Instant::now();
        for number in 0..jobs {
            let job = Job::new(&format!("load-{number}"))?;
            let job = job.tensor("w", [bytes / 4]).shard_bytes(u32::try_from(bytes)?);
            let worker = client.join(job.function_spec(FunctionSpec::named("sum")), 0).await?;
            let elements = (bytes / 4) as usize;
            tasks.spawn(train(worker, elements, number, wished.subscribe(), done.clone(), begun));
        }
        Ok(Self { wished, done, tasks })
    }

    /// From now on the first `jobs` train. Those that begin do so at different moments of one think time, the first at
    /// once.
    pub(super) fn offer(&self, jobs: usize, think: Duration, noise: f64) {
        self.wished.send_replace(Wish { jobs, think, noise });
    }

    pub(super) fn served(&self) -> Served {
        Served { at: Instant::now(), rounds: self.done.load(Ordering::Relaxed) }
    }

    /// Fails when any of its tasks has.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        match self.tasks.try_join_next() {
            Some(ended) => ended?,
            None => Ok(()),
        }
    }
}

impl Served {
    /// Rounds a second since an earlier moment.
    pub(super) fn rate_since(self, earlier: Self) -> f64 {
        (self.rounds - earlier.rounds) as f64 / (self.at - earlier.at).as_secs_f64()
    }
}

/// One job: while it is among those that train, round after round, each result compared.
async fn train(
    mut worker: Worker,
    elements: usize,
    number: usize,
    mut wished: watch::Receiver<Wish>,
    done: Arc<AtomicU64>,
    begun: Instant,
) -> anyhow::Result<()> {
    let mut values = vec![0.0; elements];
    let seed = u32::try_from(number)?;
    while let Ok(wish) = wished.wait_for(|wish| number < wish.jobs).await.map(|wish| *wish) {
        let phase = if number == 0 { 0.0 } else { (1.0 + chance(seed, 0)) / 2.0 };
        tokio::time::sleep(wish.think.mul_f64(phase)).await;
        loop {
            let Wish { jobs, think, noise } = *wished.borrow();
            if number >= jobs {
                break;
            }
            let round = u32::try_from(worker.round())?;
            load::fill(&mut values, 0, round, 0);
            worker.push("w", &values).await?;
            worker.pull("w", &mut values).await?;
            load::check_sum(&values, 0, round, 1)?;
            done.fetch_add(1, Ordering::Relaxed);
            // The same noise for all jobs.
            let stretch = (begun.elapsed().as_millis() / NOISE.as_millis()) as u32;
            let factor = (1.0 + VARIATION * chance(seed, round)) * (1.0 + noise * chance(stretch, 1));
            tokio::time::sleep(think.mul_f64(factor)).await;
        }
    }
    Ok(())
}

/// Between -1 and 1, the same in every run.
fn chance(element: u32, round: u32) -> f64 {
    f64::from(load::base(element, round)) / 127.0
}

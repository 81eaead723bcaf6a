//! All-reduce of a gradient: every worker gives its own and gets the mean of all, in the same bits.
//!
//! Start a service and then as many workers as you say there are, each in a terminal of its own:
//!
//! ```text
//! thalweg up
//! RANK=0 WORLD_SIZE=2 cargo run --release -p thalweg-sdk --example allreduce
//! RANK=1 WORLD_SIZE=2 cargo run --release -p thalweg-sdk --example allreduce
//! ```
//!
//! Arguments win over the environment, and both may be left out: `allreduce [RANK [WORKERS [URL]]]`, else
//! `RANK` (0), `WORLD_SIZE` (1) and `THALWEG_URL` (`nats://127.0.0.1:4222`).
//!
//! Kill the service's nats-server while they run (more rounds give more time for it): a round takes longer and
//! nothing else changes. A worker that is killed and started again with the same rank takes it back, and counts
//! from the next round that nobody can have begun.

#![expect(clippy::print_stdout, reason = "an example shows what it gets")]

use std::{error::Error, time::Duration};

use thalweg_sdk::{Client, Job, JoinOptions};

const ROUNDS: u64 = 50;
/// Name, shape and number of elements of each tensor.
const TENSORS: [(&str, [u64; 2], usize); 2] =
    [("hidden.weight", [512, 256], 512 * 256), ("output.weight", [10, 512], 10 * 512)];

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let rank: u32 = setting(1, "RANK", "0").parse()?;
    let workers: u32 = setting(2, "WORLD_SIZE", "1").parse()?;
    let client = Client::connect(&setting(3, "THALWEG_URL", "nats://127.0.0.1:4222")).await?;

    // Every worker describes the job alike; the first to come creates it.
    let mut job = Job::new("allreduce-example")?.function("mean").workers(workers);
    for (name, shape, _) in TENSORS {
        job = job.tensor(name, shape);
    }
    // A stable id, so that a worker that is started again has its rank back at once.
    let options = JoinOptions { worker_id: format!("allreduce-{rank}"), ..JoinOptions::default() };
    let mut worker = client.join_with(job, rank, options).await?;
    println!("rank {rank} of {workers} is in, round {} is next", worker.round());

    // By the job's rounds, so that a worker that was started again ends with the others.
    while worker.round() <= ROUNDS {
        let gradients = TENSORS.map(|(_, _, len)| gradient(len, rank, worker.round()));
        let named = [(TENSORS[0].0, gradients[0].as_slice()), (TENSORS[1].0, gradients[1].as_slice())];
        let round = worker.push_pull(&named).await?;
        // `contributors` is the number of gradients that the mean is over: all members', as no quorum was set.
        if round.round % 10 == 0 {
            println!(
                "round {}: mean over {}, first element {}",
                round.round, round.contributors, round.tensors[0][0]
            );
        }
        if u32::try_from(round.contributors) == Ok(workers) && rank == 0 {
            check(&round.tensors, workers, round.round);
        }
    }
    leave(&client, worker).await
}

/// A stand-in for the backward pass.
fn gradient(len: usize, rank: u32, round: u64) -> Vec<f32> {
    (0..len).map(|index| ((index as u64 + round) % 97) as f32 / 97.0 * (rank + 1) as f32).collect()
}

/// The result is not just close to the mean: it is what adding in rank order gives, in f32.
fn check(tensors: &[Vec<f32>], workers: u32, round: u64) {
    for (tensor, (name, _, len)) in tensors.iter().zip(TENSORS) {
        let mut sum = gradient(len, 0, round);
        for rank in 1..workers {
            sum.iter_mut().zip(gradient(len, rank, round)).for_each(|(sum, value)| *sum += value);
        }
        sum.iter_mut().for_each(|sum| *sum /= workers as f32);
        assert_eq!(*tensor, sum, "the mean of {name} in round {round}");
    }
}

/// Gives the rank back; rank 0 deletes the job when the others have left, since a job outlives its workers.
async fn leave(client: &Client, worker: thalweg_sdk::Worker) -> Result<(), Box<dyn Error>> {
    let (rank, key) = (worker.rank(), worker.job().spec.key.clone());
    worker.leave().await?;
    if rank == 0 {
        while client.job(&key).await?.1.members.iter().any(|member| member.until_round.is_none()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        client.delete(&key).await?;
    }
    println!("done");
    Ok(())
}

/// An argument, else an environment variable, else the default.
fn setting(argument: usize, variable: &str, default: &str) -> String {
    let given = std::env::args().nth(argument).or_else(|| std::env::var(variable).ok());
    given.unwrap_or_else(|| default.to_owned())
}

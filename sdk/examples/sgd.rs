//! Training with the optimizer in the service: workers push gradients and get new parameters.
//!
//! The split form of `push_pull`: a tensor is pushed as soon as its gradient is there, so that it travels and
//! is aggregated while the backward pass goes on, and a result is pulled only when it is needed. The model is
//! a small network that learns `sin(3 a) * b` from samples that every worker draws for itself.
//!
//! ```text
//! thalweg up
//! RANK=0 WORLD_SIZE=2 cargo run --release -p thalweg-sdk --example sgd
//! RANK=1 WORLD_SIZE=2 cargo run --release -p thalweg-sdk --example sgd
//! ```
//!
//! Arguments win over the environment, and both may be left out: `sgd [RANK [WORKERS [URL]]]`, else `RANK`
//! (0), `WORLD_SIZE` (1) and `THALWEG_URL` (`nats://127.0.0.1:4222`). At the end all workers print the same
//! fingerprint of their parameters: they have the same bits.

#![expect(clippy::print_stdout, reason = "an example shows what it gets")]

use std::{error::Error, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use thalweg_sdk::{Client, FunctionSpec, Job, JoinOptions, Worker};

const ROUNDS: u64 = 1000;
const BATCH: usize = 64;
const HIDDEN: usize = 128;
/// Weights of the hidden units: two inputs and a bias each. Then those of the output, one a unit.
const TENSORS: [(&str, usize); 2] = [("hidden", 3 * HIDDEN), ("output", HIDDEN)];

// The work of a round happens on another thread than the backward pass, which is what lets them overlap.
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let rank: u32 = setting(1, "RANK", "0").parse()?;
    let workers: u32 = setting(2, "WORLD_SIZE", "1").parse()?;
    let client = Client::connect(&setting(3, "THALWEG_URL", "nats://127.0.0.1:4222")).await?;

    let sgd = FunctionSpec::named("sgd").number("lr", 0.04).number("momentum", 0.9).flag("nesterov", true);
    // A shard's message leaves when all of its elements are pushed. The default of 512 KiB would put this
    // small model into one shard, and with it all tensors into one message.
    let mut job = Job::new("sgd-example")?.function_spec(sgd).workers(workers).shard_bytes(1024);
    for (name, len) in TENSORS {
        job = job.tensor(name, [len as u64]);
    }
    // Rank 0 gives the parameters that training starts from.
    let initial = initial_parameters().map(|(name, values)| (name.to_owned(), values)).into();
    let options = JoinOptions { worker_id: format!("sgd-{rank}"), initial, ..JoinOptions::default() };
    let mut worker = client.join_with(job, rank, options).await?;
    // Everybody begins with what the service holds: the same, or later ones for whoever joins later.
    let mut parameters = worker.parameters().await?;

    // By the job's rounds, so that a worker that was started again ends with the others.
    while worker.round() <= ROUNDS {
        let batch = draw(rank, worker.round());
        let (activations, errors) = forward(&parameters, &batch);
        // The backward pass comes to the output first: it is on its way while the hidden layer's is computed.
        let output = backward_output(&activations, &errors);
        worker.push("output", &output).await?;
        let hidden = backward_hidden(&parameters, &batch, &activations, &errors);
        worker.push("hidden", &hidden).await?;
        // The next forward pass needs the hidden layer first.
        worker.pull("hidden", &mut parameters[0]).await?;
        worker.pull("output", &mut parameters[1]).await?;
        let round = worker.finish().await?;
        if round.round % 200 == 0 {
            let loss = errors.iter().map(|error| error * error).sum::<f32>() / BATCH as f32;
            println!("round {}: loss {loss:.4}, gradients of {}", round.round, round.contributors);
        }
    }
    println!("fingerprint of the parameters: {:08x}", fingerprint(&parameters));
    leave(&client, worker).await
}

fn initial_parameters() -> [(&'static str, Vec<f32>); 2] {
    let mut rng = StdRng::seed_from_u64(7);
    TENSORS.map(|(name, len)| {
        let scale = if name == "hidden" { 1.0 } else { 1.0 / (HIDDEN as f32).sqrt() };
        (name, (0..len).map(|_| rng.random_range(-scale..scale)).collect())
    })
}

/// Samples of one worker in one round: two inputs, a constant 1 for the bias, and what is to be learnt.
fn draw(rank: u32, round: u64) -> Vec<([f32; 3], f32)> {
    let mut rng = StdRng::seed_from_u64((u64::from(rank) << 32) + round);
    let sample = |_| {
        let (a, b): (f32, f32) = (rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0));
        ([a, b, 1.0], (3.0 * a).sin() * b)
    };
    (0..BATCH).map(sample).collect()
}

/// Activations of the hidden units by sample, and how far each output is off.
fn forward(parameters: &[Vec<f32>], batch: &[([f32; 3], f32)]) -> (Vec<Vec<f32>>, Vec<f32>) {
    let (hidden, output) = (&parameters[0], &parameters[1]);
    let unit = |weights: &[f32], input: &[f32; 3]| {
        weights.iter().zip(input).map(|(weight, input)| weight * input).sum::<f32>().tanh()
    };
    let activations: Vec<Vec<f32>> = batch
        .iter()
        .map(|(input, _)| hidden.chunks(3).map(|weights| unit(weights, input)).collect())
        .collect();
    let errors = (activations.iter().zip(batch))
        .map(|(units, (_, wanted))| units.iter().zip(output).map(|(u, w)| u * w).sum::<f32>() - wanted)
        .collect();
    (activations, errors)
}

fn backward_output(activations: &[Vec<f32>], errors: &[f32]) -> Vec<f32> {
    let mut gradient = vec![0.0; HIDDEN];
    for (units, error) in activations.iter().zip(errors) {
        gradient.iter_mut().zip(units).for_each(|(sum, unit)| *sum += error * unit / BATCH as f32);
    }
    gradient
}

fn backward_hidden(
    parameters: &[Vec<f32>],
    batch: &[([f32; 3], f32)],
    activations: &[Vec<f32>],
    errors: &[f32],
) -> Vec<f32> {
    let mut gradient = vec![0.0; 3 * HIDDEN];
    for ((units, error), (input, _)) in activations.iter().zip(errors).zip(batch) {
        let layers = units.iter().zip(&parameters[1]).zip(gradient.chunks_mut(3));
        for ((unit, weight), sums) in layers {
            let slope = error * weight * (1.0 - unit * unit) / BATCH as f32;
            sums.iter_mut().zip(input).for_each(|(sum, input)| *sum += slope * input);
        }
    }
    gradient
}

/// A hash over the bits of all parameters.
fn fingerprint(parameters: &[Vec<f32>]) -> u32 {
    let bits = parameters.iter().flatten().map(|value| value.to_bits());
    bits.fold(0x811c_9dc5, |hash, bits| (hash ^ bits).wrapping_mul(0x0100_0193))
}

/// Gives the rank back; rank 0 deletes the job when the others have left, since a job outlives its workers.
async fn leave(client: &Client, worker: Worker) -> Result<(), Box<dyn Error>> {
    let (rank, key) = (worker.rank(), worker.job().spec.key.clone());
    worker.leave().await?;
    if rank == 0 {
        while client.job(&key).await?.1.members.iter().any(|member| member.until_round.is_none()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        client.delete(&key).await?;
    }
    Ok(())
}

/// An argument, else an environment variable, else the default.
fn setting(argument: usize, variable: &str, default: &str) -> String {
    let given = std::env::args().nth(argument).or_else(|| std::env::var(variable).ok());
    given.unwrap_or_else(|| default.to_owned())
}

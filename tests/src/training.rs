//! A job whose every result can be recomputed bit for bit.

use std::collections::BTreeMap;

use thalweg_functions::{Contribution, ShardContext};
use thalweg_protocol::{FunctionSpec, Rank};
use thalweg_sdk::{Client, Error, Job, JoinOptions, Round, Worker, engine};

/// Tensors of the model; several per shard and several shards per tensor.
pub const TENSORS: [(&str, u64); 4] = [("a", 700), ("b", 1), ("c", 1500), ("d", 300)];
/// Elements of the model.
pub const ELEMENTS: usize = 2501;
/// Bytes of a shard: 256 elements, so the model has ten.
pub const SHARD_BYTES: u32 = 1024;
/// Shards of the model.
pub const SHARDS: usize = ELEMENTS.div_ceil(SHARD_BYTES as usize / 4);

/// The job, with `workers` founding members.
///
/// # Panics
/// When `name` is no name.
#[must_use]
pub fn job(name: &str, function: FunctionSpec, workers: u32) -> Job {
    let job = Job::new(name)
        .expect("a valid name")
        .function_spec(function)
        .workers(workers)
        .shard_bytes(SHARD_BYTES);
    TENSORS.iter().fold(job, |job, (tensor, elements)| job.tensor(*tensor, [*elements]))
}

/// A worker's gradient in a round: values whose sums round, so that the order of adding shows.
#[must_use]
pub fn gradient(rank: Rank, round: u64) -> Vec<f32> {
    let mix = |element: usize| {
        let word =
            (element as u64 ^ (round << 20) ^ (u64::from(rank) << 44)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let word = (word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        // In (-1, 1), with all 24 bits of the fraction in use, scaled so that exponents differ.
        let unit = ((word >> 40) as f32 / (1_u64 << 23) as f32) - 1.0;
        unit * [1.0, 1e-3, 37.0][(word % 3) as usize]
    };
    (0..ELEMENTS).map(mix).collect()
}

/// Initial parameters of jobs that keep some.
#[must_use]
pub fn initial() -> Vec<(String, Vec<f32>)> {
    split(&gradient(9999, 0)).into_iter().map(|(name, values)| (name.to_owned(), values.to_vec())).collect()
}

/// The named tensors of a flat vector.
#[must_use]
pub fn split(flat: &[f32]) -> Vec<(&'static str, &[f32])> {
    let mut rest = flat;
    let mut tensors = Vec::new();
    for (name, elements) in TENSORS {
        let (tensor, after) = rest.split_at(elements as usize);
        tensors.push((name, tensor));
        rest = after;
    }
    tensors
}

/// How test workers join: quick to ask after something was lost.
#[must_use]
pub fn options() -> JoinOptions {
    JoinOptions {
        initial: initial(),
        timing: engine::Timing {
            ask_after: std::time::Duration::from_millis(250),
            ..engine::Timing::default()
        },
        ..JoinOptions::default()
    }
}

/// Joins.
///
/// # Errors
/// Those of the SDK.
pub async fn join(client: &Client, job: &Job, rank: Rank) -> Result<Worker, Error> {
    client.join_with(job.clone(), rank, options()).await
}

/// Joins as ranks 0 to `workers - 1`, all at once: a founding member waits for the others.
///
/// # Panics
/// When one of them cannot join.
pub async fn join_all(client: &Client, job: &Job, workers: u32) -> Vec<Worker> {
    let joins = (0..workers).map(|rank| join(client, job, rank));
    futures::future::try_join_all(joins).await.expect("all joined")
}

/// One round of a worker; pushes tensors in an order that differs by worker and round.
///
/// # Errors
/// Those of the SDK.
pub async fn round(worker: &mut Worker) -> Result<(Round, Vec<f32>), Error> {
    let number = worker.round();
    let flat = gradient(worker.rank(), number);
    let mut tensors = split(&flat);
    let turn = (worker.rank() as usize + number as usize) % tensors.len();
    tensors.rotate_left(turn);
    let mut result = worker.push_pull(&tensors).await?;
    result.tensors.rotate_right(turn);
    let flat = result.tensors.concat();
    Ok((result, flat))
}

/// Which ranks each (round, shard) counted, in the order in which they were folded.
pub type Book = BTreeMap<(u64, usize), Vec<Rank>>;

/// A book in which all of `workers` were counted in all of `rounds`.
#[must_use]
pub fn full_book(workers: u32, rounds: u64) -> Book {
    let every = (1..=rounds).flat_map(|round| (0..SHARDS).map(move |shard| (round, shard)));
    every.map(|at| (at, (0..workers).collect())).collect()
}

/// Recomputes the parameters after `rounds` rounds from who was counted, shard by shard.
///
/// # Panics
/// When the book lacks a round, or the function is unknown.
#[must_use]
pub fn replay(function: &FunctionSpec, book: &Book, rounds: u64) -> Vec<f32> {
    replay_with(|_| function.clone(), book, rounds)
}

/// As [`replay`], with settings that differ by round.
///
/// # Panics
/// As [`replay`].
#[must_use]
pub fn replay_with(function: impl Fn(u64) -> FunctionSpec, book: &Book, rounds: u64) -> Vec<f32> {
    let resolve = |round| thalweg_functions::resolve(&function(round)).expect("a known function");
    let resolved = resolve(0);
    let per_shard = SHARD_BYTES as usize / 4;
    let start = match resolved.kind() {
        thalweg_functions::Kind::Reduction => vec![0.0; ELEMENTS],
        thalweg_functions::Kind::Optimizer => gradient(9999, 0),
    };
    let mut states: Vec<Vec<u8>> = start
        .chunks(per_shard)
        .map(|shard| {
            let mut bytes = to_bytes(shard);
            bytes.resize(bytes.len() * (1 + resolved.slots()), 0);
            bytes
        })
        .collect();
    for round in 1..=rounds {
        let resolved = resolve(round);
        for (shard, state) in states.iter_mut().enumerate() {
            let counted =
                book.get(&(round, shard)).unwrap_or_else(|| panic!("round {round} of shard {shard}"));
            let elements = (ELEMENTS - shard * per_shard).min(per_shard);
            let mut next = Vec::new();
            let mut fold = resolved.begin(ShardContext { elements, groups: &[], round });
            for rank in counted {
                let values = to_bytes(&gradient(*rank, round)[shard * per_shard..][..elements]);
                fold.accept(Contribution { rank: *rank, weight: 1.0, values: &values });
            }
            fold.finish(state, &mut next);
            *state = next;
        }
    }
    let parameters = states.iter().enumerate().flat_map(|(shard, state)| {
        let elements = (ELEMENTS - shard * per_shard).min(per_shard);
        state[..elements * 4]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect::<Vec<_>>()
    });
    parameters.collect()
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Asserts that two vectors are the same bit for bit.
///
/// # Panics
/// With the first difference.
pub fn assert_same_bits(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let differs = actual.iter().zip(expected).position(|(one, other)| one.to_bits() != other.to_bits());
    if let Some(index) = differs {
        panic!("{what}: element {index} is {} where {} is expected", actual[index], expected[index]);
    }
}

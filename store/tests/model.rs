//! Any sequence of calls, restarts in between, answered as by the model in memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::fmt::Debug;

use rand::RngExt as _;
use support::{Machine, flush, life};
use thalweg_protocol::{Commit, Durability, ErrorCode, Head, Incarnation, Init, StoreJob};
use thalweg_store::{LocalStore, MemoryStore, ShardStore as _, StoreError, conformance};

const SEEDS: u64 = 60;
const STEPS: usize = 150;

/// What is compared: texts may differ.
#[track_caller]
fn same<T: Debug + PartialEq>(
    step: &str,
    got: Result<T, StoreError>,
    wanted: Result<T, StoreError>,
) -> Option<T> {
    let code = |error: StoreError| error.code();
    let (got, wanted): (Result<T, ErrorCode>, Result<T, ErrorCode>) =
        (got.map_err(code), wanted.map_err(code));
    assert_eq!(got, wanted, "{step}");
    got.ok()
}

/// The call on the store, with flush cycles until it has ended: the machine runs none by itself.
async fn flushed<T>(store: &LocalStore, call: impl Future<Output = T>) -> T {
    tokio::pin!(call);
    loop {
        tokio::select! {
            biased;
            done = &mut call => return done,
            flushed = flush(store) => flushed.unwrap(),
        }
    }
}

/// A commit that is often right, and otherwise wrong in one way.
fn commit(machine: &mut Machine, job: &StoreJob, shard: u32, history: &[Head]) -> (Commit, bytes::Bytes) {
    let back = if machine.chance(80) { 0 } else { machine.rng.random_range(0..history.len()) };
    let expect = history[history.len() - 1 - back];
    let (mut commit, mut values) = conformance::round(job, shard, expect, machine.rng.random_range(0..4));
    commit.ledger.roster_epoch = machine.rng.random_range(1..5);
    match machine.rng.random_range(0..30) {
        0 => commit.ledger.round += 1,
        1 => commit.expect.fold_count += 1,
        2 => commit.expect.state_id.0[0] ^= 1,
        3 => values = values.slice(4..),
        4 => commit.shard += 3,
        5 => commit.job = Incarnation::random(),
        6 => commit.ledger.void.insert(job.max_members + 7),
        _ => {}
    }
    (commit, values)
}

fn run(seed: u64) {
    let mut machine = Machine::new(seed);
    let level = if seed.is_multiple_of(2) { Durability::Process } else { Durability::Disk };
    let jobs = [conformance::job(level, Init::Zeros), conformance::job(level, Init::Upload)];
    let uploads = [Incarnation::random(), Incarnation::random()];
    let model = MemoryStore::default();
    let mut histories = vec![vec![vec![Head::initial([0; 16], 0, 0)]; 3]; 2];
    let mut steps = 0;
    while steps < STEPS {
        life(async || {
            let store = machine.open().unwrap();
            for _ in 0..machine.rng.random_range(1..50) {
                steps += 1;
                let which = machine.rng.random_range(0..2_usize);
                let (job, shard) = (&jobs[which], machine.rng.random_range(0..3_u32));
                let (id, upload) = (job.incarnation, uploads[machine.rng.random_range(0..2_usize)]);
                let kind = machine.rng.random_range(0..100);
                let step = format!("seed {seed}, step {steps}, kind {kind}, job {which}, shard {shard}");
                match kind {
                    0..5 => {
                        let job = StoreJob { slots: 1 + u32::from(machine.chance(20)), ..job.clone() };
                        same(&step, store.create(job.clone()).await, model.create(job).await);
                    }
                    5..20 => {
                        let len = job.parameter_bytes(shard) - usize::from(machine.chance(5));
                        let values = conformance::bytes(len, machine.rng.random());
                        let got = store.upload(id, upload, shard, values.clone()).await;
                        same(&step, got, model.upload(id, upload, shard, values).await);
                    }
                    20..25 => {
                        same(&step, store.activate(id, upload).await, model.activate(id, upload).await);
                    }
                    25..35 => {
                        let count = machine.rng.random_range(0..5);
                        let got = flushed(&store, store.heads(id, shard, count)).await;
                        same(&step, got, model.heads(id, shard, count).await);
                    }
                    35..50 => {
                        let slots = machine.chance(50);
                        let got = flushed(&store, store.fetch(id, shard, slots)).await;
                        let state = same(&step, got, model.fetch(id, shard, slots).await);
                        let got = flushed(&store, store.fetch_head(id, shard)).await;
                        same(&step, got, model.fetch_head(id, shard).await);
                        let history = &mut histories[which][shard as usize];
                        history.extend(state.map(|state| state.head));
                    }
                    50..90 => {
                        let history = &histories[which][shard as usize];
                        let (commit, values) = commit(&mut machine, job, shard, history);
                        let got = flushed(&store, store.commit(commit.clone(), values.clone())).await;
                        let outcome = same(&step, got, model.commit(commit, values).await);
                        if let Some(thalweg_protocol::CommitOutcome::Committed(head)) = outcome {
                            histories[which][shard as usize].push(head);
                        }
                    }
                    90..94 => {
                        let (epoch, round) = (machine.rng.random_range(1..4), machine.rng.random_range(1..9));
                        same(&step, store.fence(id, epoch, round).await, model.fence(id, epoch, round).await);
                    }
                    94 => {
                        same(&step, store.delete(id).await, model.delete(id).await);
                    }
                    _ => flush(&store).await.unwrap(),
                }
                let order = |job: &StoreJob| job.incarnation;
                let (mut got, mut wanted) = (store.list().await.unwrap(), model.list().await.unwrap());
                got.sort_by_key(order);
                wanted.sort_by_key(order);
                assert_eq!(got, wanted, "{step}");
            }
            if machine.chance(30) {
                store.close().unwrap();
            }
        });
    }
}

#[test]
fn every_answer_is_that_of_the_model() {
    (0..SEEDS).for_each(run);
}

//! Open rounds through kills and power losses at any input or output (rule P12): what was answered is there
//! afterwards, whole and of the right round.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use rand::RngExt as _;
use support::{Machine, flush, life};
use thalweg_protocol::{Commit, CommitOutcome, Durability, Head, Init, Partial, StoreJob};
use thalweg_store::{
    LocalStore, ShardStore as _,
    conformance::{self, partial},
    disk::Disk as _,
};

const SEEDS: u64 = 300;
const SHARD: u32 = 1;

/// What was tried of one shard since its newest version that was seen.
#[derive(Default)]
struct Tried {
    /// Partial commits by their head, with their folds.
    partials: Vec<(Head, Partial, bytes::Bytes)>,
    /// Heads of versions.
    versions: Vec<Head>,
    /// The newest of either that was answered.
    answered: Option<Head>,
}

/// One seed; `Err` tells what was lost or mixed.
fn scenario(seed: u64, level: Durability, loses: bool) -> Result<u32, String> {
    let mut machine = Machine::new(seed);
    let job = conformance::job(level, Init::Zeros);
    life(async || machine.open().unwrap().create(job.clone()).await).map_err(|error| error.to_string())?;
    let mut tried = Tried::default();
    let mut found = 0;
    for _ in 0..8 {
        if machine.chance(70) {
            let left = machine.rng.random_range(0..30);
            machine.fuse.set(Some(left));
        }
        let result: Result<u32, String> = life(async || match machine.open() {
            Ok(store) => {
                let found = check(&store, &job, &mut tried).await?;
                work(&mut machine, &store, &job, &mut tried).await;
                Ok(found)
            }
            // It has died in the opening; nothing was served.
            Err(_) => Ok(0),
        });
        found += result?;
        // A job of level `process` is lost with the power; the kernel keeps what a kill leaves.
        if level == Durability::Disk && machine.chance(60) {
            machine.power_loss();
        } else {
            machine.fuse.set(None);
        }
        if loses {
            machine.disk.remove(&format!("{}.partial", job.incarnation)).unwrap();
        }
    }
    Ok(found)
}

/// Compares what is there with what was tried and answered; counts open rounds.
async fn check(store: &LocalStore, job: &StoreJob, tried: &mut Tried) -> Result<u32, String> {
    // Only flush cycles cover what was not synced before.
    flush(store).await.map_err(|error| error.to_string())?;
    let standing = store.fetch_head(job.incarnation, SHARD).await.map_err(|error| error.to_string())?;
    let head = standing.head;
    if let Some(answered) = tried.answered
        && (head.version, head.fold_count) < (answered.version, answered.fold_count)
    {
        return Err(format!("{head:?} is there, {answered:?} was answered"));
    }
    let fold = store.fetch_partial(job.incarnation, SHARD).await.map_err(|error| error.to_string())?;
    let known = tried.partials.iter().find(|(made, ..)| *made == head).cloned();
    if fold != known {
        return Err(format!("{head:?}: not the fold that was committed"));
    }
    let new = head.version == 0 || tried.versions.contains(&head.closed());
    if !new {
        return Err(format!("{head:?} was never committed"));
    }
    tried.answered = Some(head);
    Ok(u32::from(fold.is_some()))
}

async fn work(machine: &mut Machine, store: &LocalStore, job: &StoreJob, tried: &mut Tried) {
    let Ok(standing) = store.fetch_head(job.incarnation, SHARD).await else { return };
    let mut expect = standing.head;
    for _ in 0..machine.rng.random_range(0..12) {
        let outcome = if machine.chance(80) {
            let (commit, fold) = partial(job, SHARD, expect, expect.fold_count + 1);
            tried.partials.push((expect.folded_on(), commit.partial.clone(), fold.clone()));
            store.commit_partial(commit, fold).await
        } else {
            let (commit, state) = conformance::round(job, SHARD, expect.closed(), machine.rng.random());
            let commit = Commit { expect, ..commit };
            let checksum = thalweg_protocol::checksum(&[&state]);
            tried.versions.push(expect.next(&commit.ledger, commit.function, checksum));
            let commit = store.commit(commit, state);
            let mut commit = std::pin::pin!(commit);
            loop {
                tokio::select! {
                    outcome = &mut commit => break outcome,
                    flushed = flush(store) => if flushed.is_err() { return },
                }
            }
        };
        match outcome {
            Ok(CommitOutcome::Committed(head)) => (expect, tried.answered) = (head, Some(head)),
            Ok(other) => panic!("the only writer got {other:?}"),
            Err(_) => return,
        }
    }
}

#[test]
fn answered_partial_commits_survive() {
    for level in [Durability::Process, Durability::Disk] {
        let mut found = 0;
        for seed in 0..SEEDS {
            found +=
                scenario(seed, level, false).unwrap_or_else(|what| panic!("seed {seed}, {level}: {what}"));
        }
        assert!(found > 200, "{level}: only {found} open rounds were found again");
    }
}

#[test]
fn a_store_that_loses_them_is_found_out() {
    let lost = (0..SEEDS).filter(|seed| scenario(*seed, Durability::Process, true).is_err()).count();
    assert!(lost > 100, "{lost} of {SEEDS} seeds noticed");
}

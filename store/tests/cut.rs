//! Power loss and kills at level `process`: a lost job says so, and the durable pointers always name one
//! consistent version.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use rand::{RngExt as _, seq::SliceRandom as _};
use support::{History, Machine, flush, life};
use thalweg_protocol::{Commit, Durability, ErrorCode, Head, Incarnation, Init, StoreJob};
use thalweg_store::{
    Index as _, LocalStore, ShardStore as _, StoreError,
    conformance::{self, Subject},
    disk::Disk as _,
};

const SEEDS: u64 = 150;
/// Bytes of superblocks, of a header area and of a slot of `conformance::job`.
const SUPERBLOCKS: u64 = 16_384;
const HEADER: u64 = 4096;
const SLOT: u64 = 8192;

fn small() -> StoreJob {
    conformance::job(Durability::Process, Init::Zeros)
}

/// Checks that what survived a power loss has one whole version of all shards, no older than `least`.
fn cut(machine: &Machine, history: &History, least: usize) -> Result<(), String> {
    let pointers = machine.index.load().unwrap().durable;
    let file = machine.disk.open(&format!("{}.slab", history.job.incarnation)).unwrap();
    let mut version = None;
    for (shard, states) in history.shards.iter().enumerate() {
        let Some(pointer) = pointers.get(&(history.job.incarnation, shard as u32)) else {
            // Zeros need no copy.
            if least == 0 && pointers.is_empty() {
                continue;
            }
            return Err(format!("shard {shard} has no durable pointer"));
        };
        let state = &states.get(pointer.version as usize).ok_or("a version that never was")?;
        let mut values = vec![0; state.values.len()];
        let read = file.read_at(&mut values, SUPERBLOCKS + u64::from(pointer.slot) * SLOT + HEADER);
        if read.is_err() || values != state.values {
            return Err(format!(
                "shard {shard}: the slot of durable version {} holds something else",
                pointer.version
            ));
        }
        if *version.get_or_insert(pointer.version) != pointer.version || pointer.version < least as u64 {
            return Err(format!("durable versions are mixed or older than {least}: {pointers:?}"));
        }
    }
    Ok(())
}

/// Rounds over all shards in any order, none before the round before it is complete, with flush cycles
/// before, after and during commits. Returns the version that the last complete cycle must have covered.
async fn rounds(machine: &mut Machine, history: &mut History, store: &LocalStore) -> usize {
    let mut least = 0;
    for _ in 0..machine.rng.random_range(1..8) {
        let mut order: Vec<_> = (0..history.job.layout.shards()).collect();
        order.shuffle(&mut machine.rng);
        for shard in order {
            if machine.chance(20) {
                let complete = history.seen.iter().min().copied().unwrap();
                if flush(store).await.is_err() {
                    return least;
                }
                least = complete;
            }
            let background = machine.chance(15).then(|| {
                tokio::spawn({
                    let store = store.clone();
                    async move { flush(&store).await }
                })
            });
            let (commit, values) = history.next(shard);
            match store.commit(commit, values).await {
                Ok(outcome) => history.returned(shard, &outcome),
                Err(_) => return least,
            }
            if let Some(background) = background
                && background.await.unwrap().is_err()
            {
                return least;
            }
        }
    }
    least
}

fn scenario(seed: u64, index_syncs: bool) -> Result<(), String> {
    let mut machine = Machine::new(seed);
    let mut history = History::new(small());
    machine.ignore_index_syncs.store(!index_syncs, Ordering::SeqCst);
    let mut least = 0;
    for life_ in 0..4 {
        let left = machine.rng.random_range(0..60);
        let fused = machine.chance(60) && life_ > 0;
        machine.fuse.set(fused.then_some(left));
        let last: Result<usize, String> = life(async || {
            let Ok(store) = machine.open() else { return Ok(0) };
            if life_ == 0 {
                store.create(history.job.clone()).await.unwrap();
            }
            // A kill loses nothing.
            history.check(&(Arc::new(store.clone()) as Subject)).await?;
            Ok(rounds(&mut machine, &mut history, &store).await)
        });
        least = least.max(last?);
        machine.fuse.set(None);
        if machine.chance(50) {
            // A kill in the middle of a commit that never returned.
            torn_commit(&mut machine, &mut history);
        }
    }
    machine.power_loss();
    cut(&machine, &history, least)?;
    // Also at the second opening since the power failed. Without index syncs it may go unnoticed.
    for _ in 0..if index_syncs { 2 } else { 0 } {
        life(async || diverged(&machine.open().unwrap(), &history.job).await);
        cut(&machine, &history, least)?;
    }
    Ok(())
}

/// One more commit whose write is torn by a kill.
fn torn_commit(machine: &mut Machine, history: &mut History) {
    let shard = (0..3).min_by_key(|&shard| history.seen[shard as usize]).unwrap();
    let seen = history.seen.clone();
    life(async || {
        let store = machine.open().unwrap();
        let subject: Subject = Arc::new(store.clone());
        history.check(&subject).await.unwrap();
        let (commit, values) = history.next(shard);
        store.commit(commit, values).await.unwrap();
    });
    assert_eq!(
        history.seen[shard as usize],
        seen[shard as usize].max(history.shards[shard as usize].len() - 2)
    );
    machine.disk.tear_last_write(&format!("{}.slab", history.job.incarnation), &mut machine.rng);
}

async fn diverged(store: &LocalStore, job: &StoreJob) {
    fn check<T: std::fmt::Debug>(result: Result<T, StoreError>) {
        assert_eq!(result.unwrap_err().code(), ErrorCode::Diverged);
    }
    let (id, upload) = (job.incarnation, Incarnation::random());
    let (commit, values): (Commit, _) = conformance::round(job, 0, Head::initial([0; 16], 0, 0), 1);
    check(store.heads(id, 0, 3).await);
    check(store.fetch(id, 0, true).await);
    check(store.fetch_head(id, 0).await);
    check(store.commit(commit, values).await);
    check(store.fence(id, 1, 1).await);
    check(store.upload(id, upload, 0, conformance::bytes(256, 0)).await);
    check(store.activate(id, upload).await);
    check(store.create(job.clone()).await);
    assert_eq!(store.list().await.unwrap(), std::slice::from_ref(job), "it can still be listed, and deleted");
}

#[test]
fn the_durable_cut_is_one_version_and_loss_is_told() {
    for seed in 0..SEEDS {
        if let Err(wrong) = scenario(seed, true) {
            panic!("seed {seed}: {wrong}");
        }
    }
}

/// Unlike committed data, the cut needs the index's sync: slots are used again on its word.
#[test]
fn a_missing_sync_of_the_index_is_noticed() {
    let found = (0..SEEDS).filter(|&seed| scenario(seed, false).is_err()).count();
    assert!(found > SEEDS as usize / 10, "only {found} of {SEEDS} seeds notice it");
}

/// Cycles that collect a cut while commits move the next one on.
#[test]
fn cuts_stay_whole_under_concurrent_commits() {
    const SHARDS: u32 = 1024;
    const ROUNDS: u32 = 40;
    let machine = Machine::new(0);
    let layout = thalweg_protocol::Layout { elements: u64::from(SHARDS), shard_elements: 1 };
    let mut history = History::new(StoreJob { layout, slots: 0, ..small() });
    life(async || {
        let store = machine.open().unwrap();
        store.create(history.job.clone()).await.unwrap();
        let mut cycle = None;
        for round in 1..=ROUNDS {
            // Against the order in which a cycle walks, one that begins when the round is about to end.
            for shard in (0..SHARDS).rev() {
                if shard == round % 8 {
                    let (store, index) = (store.clone(), machine.index.clone());
                    cycle = Some(tokio::task::spawn_blocking(move || {
                        store.flush().unwrap();
                        let pointers = index.load().unwrap().durable;
                        let versions: BTreeSet<_> =
                            pointers.values().map(|pointer| pointer.version).collect();
                        let whole = pointers.is_empty() || pointers.len() == SHARDS as usize;
                        assert!(whole && versions.len() <= 1, "{} pointers at {versions:?}", pointers.len());
                    }));
                }
                let (commit, values) = history.next(shard);
                history.returned(shard, &store.commit(commit, values).await.unwrap());
                if shard == SHARDS / 2
                    && let Some(cycle) = cycle.take()
                {
                    cycle.await.unwrap();
                }
            }
        }
        flush(&store).await.unwrap();
        cut(&machine, &history, ROUNDS as usize).unwrap();
    });
}

#[test]
fn after_a_close_another_boot_loses_nothing() {
    for level in [Durability::Process, Durability::Disk] {
        let mut machine = Machine::new(7);
        let mut history = History::new(conformance::job(level, Init::Zeros));
        let uploading = conformance::job(level, Init::Upload);
        let upload = Incarnation::random();
        life(async || {
            let store = machine.open().unwrap();
            store.create(history.job.clone()).await.unwrap();
            store.create(uploading.clone()).await.unwrap();
            for shard in 0..3 {
                let len = uploading.parameter_bytes(shard);
                store.upload(uploading.incarnation, upload, shard, conformance::bytes(len, 1)).await.unwrap();
            }
            for shard in [0, 1, 0] {
                let (commit, values) = history.next(shard);
                let running = tokio::spawn({
                    let store = store.clone();
                    async move { store.commit(commit, values).await }
                });
                while !running.is_finished() {
                    if level == Durability::Disk {
                        flush(&store).await.unwrap();
                    }
                    tokio::task::yield_now().await;
                }
                history.returned(shard, &running.await.unwrap().unwrap());
            }
            store.fence(history.job.incarnation, 9, 1).await.unwrap();
            store.close().unwrap();
            let late = store.heads(history.job.incarnation, 0, 1).await.unwrap_err();
            assert_eq!(late.code(), ErrorCode::Unavailable, "what comes after the close is refused");
        });
        machine.power_loss();
        life(async || {
            let store: Subject = Arc::new(machine.open().unwrap());
            history.check(&store).await.unwrap();
            let (commit, values) = conformance::round(&history.job, 2, history.shards[2][0].head, 1);
            let outcome = store.commit(commit, values).await.unwrap();
            assert_eq!(
                outcome,
                thalweg_protocol::CommitOutcome::StaleRoster { needed: 9 },
                "fences are kept"
            );
            store.activate(uploading.incarnation, upload).await.expect("uploads are kept");
        });
    }
}

/// A disk that has failed once vouches for nothing any more.
#[test]
fn a_failed_cycle_is_never_followed_by_a_good_one() {
    let machine = Machine::new(1);
    let mut history = History::new(conformance::job(Durability::Disk, Init::Zeros));
    life(async || {
        let store = machine.open().unwrap();
        store.create(history.job.clone()).await.unwrap();
        let (commit, values) = history.next(0);
        let mut writes = machine.fuse.writes.subscribe();
        writes.borrow_and_update();
        let running = tokio::spawn({
            let store = store.clone();
            async move { store.commit(commit, values).await }
        });
        writes.changed().await.unwrap();
        machine.fuse.set(Some(0));
        // Until the commit is dirty, a cycle has nothing to sync and cannot fail.
        while flush(&store).await.is_ok() {}
        machine.fuse.set(None);
        assert!(flush(&store).await.is_err() && store.close().is_err() && store.has_failed());
        assert_eq!(running.await.unwrap().unwrap_err().code(), ErrorCode::Unavailable);
    });
}

/// Whoever dies while opening after a power loss leaves it to be found by the next one.
#[test]
fn a_power_loss_is_noticed_however_often_opening_is_cut_short() {
    for left in 0..40 {
        let mut machine = Machine::new(left);
        let history = History::new(small());
        life(async || {
            let store = machine.open().unwrap();
            store.create(history.job.clone()).await.unwrap();
        });
        machine.power_loss();
        machine.fuse.set(Some(left));
        let opened = life(async || machine.open().is_ok());
        machine.fuse.set(None);
        life(async || {
            let store = machine.open().unwrap();
            let error = store.heads(history.job.incarnation, 0, 1).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::Diverged, "after {left} operations (whole: {opened})");
        });
    }
}

/// A job that the store has said to be there is there after a power loss, whatever its creation went through.
#[test]
fn a_creation_cut_short_and_asked_for_again_survives() {
    for left in 0..8 {
        let mut machine = Machine::new(left);
        let history = History::new(small());
        life(async || {
            let store = machine.open().unwrap();
            machine.fuse.set(Some(left));
            let _ = store.create(history.job.clone()).await;
        });
        machine.fuse.set(None);
        life(async || {
            let store = machine.open().unwrap();
            store.create(history.job.clone()).await.unwrap();
        });
        machine.power_loss();
        life(async || {
            let store = machine.open().unwrap();
            let error = store.heads(history.job.incarnation, 0, 1).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::Diverged, "known, if not usable, after {left} operations");
        });
    }
}

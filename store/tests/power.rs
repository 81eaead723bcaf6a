//! Power loss at level `disk`, at any input or output: what was seen survives, and nothing is mixed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::sync::{Arc, atomic::Ordering};

use rand::RngExt as _;
use support::{History, Machine, flush, life};
use thalweg_protocol::{CommitOutcome, Durability, Incarnation, Init};
use thalweg_store::{
    Index as _, LocalStore, ShardStore as _,
    conformance::{self, Subject},
};
use tokio::task::JoinSet;

const SEEDS: u64 = 150;

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq)]
enum Mutation {
    None,
    NoSlabSync,
    NoIndexSync,
}

/// One seed: lives of the store, each with commits and flush cycles in any order, each ended by a power
/// loss that may come in the middle of a cycle or of the next opening.
fn scenario(seed: u64, mutation: Mutation) -> Result<(), String> {
    let mut machine = Machine::new(seed);
    let mut history = History::new(conformance::job(Durability::Disk, Init::Zeros));
    life(async || machine.open().unwrap().create(history.job.clone()).await)
        .map_err(|error| error.to_string())?;
    if mutation == Mutation::NoSlabSync {
        machine.disk.ignore_syncs();
    }
    machine.ignore_index_syncs.store(mutation == Mutation::NoIndexSync, Ordering::SeqCst);
    for _ in 0..6 {
        if machine.chance(70) {
            let left = machine.rng.random_range(0..50);
            machine.fuse.set(Some(left));
        } else if machine.chance(50) {
            let nth = machine.rng.random_range(1..5);
            machine.disk.fail_sync(nth);
        }
        // Half of the ends are kills: what the kernel holds stays.
        let power = machine.chance(60);
        let result: Result<(), String> = life(async || match machine.open() {
            Ok(store) => {
                let subject: Subject = Arc::new(store.clone());
                history.check(&subject).await?;
                commits(&mut machine, &mut history, &store).await;
                Ok(())
            }
            // The power went during the opening; nothing was served.
            Err(_) => Ok(()),
        });
        result?;
        machine.disk.fail_sync(0);
        if power {
            machine.power_loss();
        } else {
            machine.fuse.set(None);
        }
    }
    life(async || {
        let subject: Subject = Arc::new(machine.open().unwrap());
        history.check(&subject).await
    })
}

/// Commits of all shards, with up to two on their way for each, and flush cycles in between.
async fn commits(machine: &mut Machine, history: &mut History, store: &LocalStore) {
    let mut running = JoinSet::new();
    let mut under_way = [0; 3];
    let mut writes = machine.fuse.writes.subscribe();
    let mut written = *writes.borrow();
    for _ in 0..machine.rng.random_range(0..25) {
        if machine.fuse.blown() || store.has_failed() {
            return;
        }
        let shard = machine.rng.random_range(0..3_u32);
        if machine.chance(70) && under_way[shard as usize] < 2 {
            let (commit, values) = history.next(shard);
            let (store, fuse) = (store.clone(), machine.fuse.clone());
            running.spawn(async move {
                let outcome = store.commit(commit, values).await;
                (shard, outcome, fuse.blown() || store.has_failed())
            });
            written += 1;
            if machine.chance(80) {
                under_way[shard as usize] += 1;
                writes.wait_for(|writes| *writes >= written).await.unwrap();
            } else {
                // It races the next steps, and nobody builds on what may not even have been tried.
                under_way[shard as usize] = 2;
            }
        } else if machine.chance(50) {
            // The cycle races the commits that are written meanwhile.
            let store = store.clone();
            tokio::task::spawn_blocking(move || store.flush());
        } else {
            while !running.is_empty() {
                let (shard, outcome, blown) = tokio::select! {
                    Some(ended) = running.join_next() => ended.unwrap(),
                    flushed = flush(store) => if flushed.is_ok() { continue } else { return },
                };
                match outcome {
                    Ok(outcome) if !blown => history.returned(shard, &outcome),
                    Ok(CommitOutcome::Committed(head)) => {
                        history.returned(shard, &CommitOutcome::Committed(head));
                    }
                    other => assert!(blown, "{other:?}"),
                }
            }
            under_way = [0; 3];
        }
    }
}

#[test]
fn what_was_seen_survives_power_loss() {
    for seed in 0..SEEDS {
        if let Err(loss) = scenario(seed, Mutation::None) {
            panic!("seed {seed}: {loss}");
        }
    }
}

/// Rule P25: the kernel may call pages clean that no disk has, so what is newer than its durable pointer is
/// written again before anybody sees it.
#[test]
fn what_a_failed_sync_left_in_the_cache_is_written_again() {
    let mut machine = Machine::new(0);
    let mut history = History::new(conformance::job(Durability::Disk, Init::Zeros));
    life(async || {
        let store = machine.open().unwrap();
        store.create(history.job.clone()).await.unwrap();
        let (commit, values) = history.next(1);
        let running = tokio::spawn({
            let store = store.clone();
            async move { store.commit(commit, values).await }
        });
        machine.disk.fail_sync(1);
        while flush(&store).await.is_ok() {}
        running.await.unwrap().unwrap_err();
    });
    life(async || history.check(&(Arc::new(machine.open().unwrap()) as Subject)).await.unwrap());
    assert_eq!(history.seen, [0, 1, 0], "the page cache still has it");
    machine.power_loss();
    life(async || history.check(&(Arc::new(machine.open().unwrap()) as Subject)).await.unwrap());
}

/// The same for what is no commit.
#[test]
fn activations_and_fences_survive_once_they_have_returned() {
    for nth in 0..3 {
        let mut machine = Machine::new(u64::from(nth));
        let job = conformance::job(Durability::Disk, Init::Upload);
        let (id, upload) = (job.incarnation, Incarnation::random());
        let parameters = |shard| conformance::bytes(job.parameter_bytes(shard), u64::from(shard));
        life(async || {
            let store = machine.open().unwrap();
            store.create(job.clone()).await.unwrap();
            for shard in 0..3 {
                store.upload(id, upload, shard, parameters(shard)).await.unwrap();
            }
            machine.disk.fail_sync(nth);
            assert_eq!(store.activate(id, upload).await.is_err() && store.has_failed(), nth > 0);
        });
        life(async || machine.open().unwrap().activate(id, upload).await.unwrap());
        machine.power_loss();
        life(async || {
            let store = machine.open().unwrap();
            for shard in 0..3 {
                let got = store.fetch(id, shard, false).await.unwrap();
                assert_eq!(got.values, parameters(shard), "sync {nth} failed, shard {shard}");
            }
            machine.disk.fail_sync(nth.min(1));
            assert_eq!(store.fence(id, 3, 1).await.is_err() && store.has_failed(), nth > 0);
        });
        life(async || machine.open().unwrap().fence(id, 3, 1).await.unwrap());
        machine.power_loss();
        life(async || {
            let store = machine.open().unwrap();
            let head = store.heads(id, 0, 1).await.unwrap()[0];
            let (commit, values) = conformance::round(&job, 0, head, 1);
            let outcome = store.commit(commit, values).await.unwrap();
            assert_eq!(outcome, CommitOutcome::StaleRoster { needed: 3 }, "sync {nth} failed");
        });
    }
}

/// Commits while a cycle stands between its two syncs: none may take the slot that is just under flush.
#[test]
fn what_is_under_flush_is_not_overwritten() {
    for seed in 0..20 {
        let mut machine = Machine::new(seed);
        let mut history = History::new(conformance::job(Durability::Disk, Init::Zeros));
        life(async || {
            let store = machine.open().unwrap();
            store.create(history.job.clone()).await.unwrap();
            let mut writes = machine.fuse.writes.subscribe();
            let mut begin = async |history: &mut History| {
                writes.borrow_and_update();
                let (commit, values) = history.next(0);
                let store = store.clone();
                tokio::spawn(async move { store.commit(commit, values).await });
                writes.changed().await.unwrap();
            };
            begin(&mut history).await;
            machine.gate.close();
            let cycle = tokio::task::spawn_blocking({
                let (store, gate) = (store.clone(), machine.gate.clone());
                // One that comes before the commit is dirty has nothing to do and meets no gate.
                move || {
                    while !gate.is_open() {
                        store.flush().unwrap();
                    }
                }
            });
            machine.gate.reached();
            for _ in 0..4 {
                begin(&mut history).await;
            }
            machine.gate.open();
            cycle.await.unwrap();
            let pointer = machine.index.load().unwrap().durable[&(history.job.incarnation, 0)];
            assert_eq!(pointer.version, 1, "the cycle began before the other commits");
            history.seen[0] = 1;
        });
        machine.power_loss();
        life(async || history.check(&(Arc::new(machine.open().unwrap()) as Subject)).await)
            .unwrap_or_else(|loss| panic!("seed {seed}: {loss}"));
    }
}

#[test]
fn a_missing_fdatasync_of_the_slabs_is_noticed() {
    let found = (0..SEEDS).filter(|&seed| scenario(seed, Mutation::NoSlabSync).is_err()).count();
    assert!(found > SEEDS as usize / 10, "only {found} of {SEEDS} seeds notice it");
}

/// The index is a hint for `disk` jobs: opening finds the newest whole slots and rewrites those without a
/// durable pointer. Without its sync some are rewritten in vain, and nothing is lost.
#[test]
fn a_missing_sync_of_the_index_loses_no_disk_commit() {
    for seed in 0..SEEDS {
        if let Err(loss) = scenario(seed, Mutation::NoIndexSync) {
            panic!("seed {seed}: {loss}");
        }
    }
}

/// Rule P1: what is not durable yet is not readable either, by whatever call.
#[test]
fn nothing_is_seen_before_it_is_durable() {
    let machine = Machine::new(0);
    let mut history = History::new(conformance::job(Durability::Disk, Init::Zeros));
    let id = history.job.incarnation;
    life(async || {
        let store = machine.open().unwrap();
        store.create(history.job.clone()).await.unwrap();
        let rival = conformance::round(&history.job, 0, history.shards[0][0].head, 99);
        let (commit, values) = history.next(0);
        let mut writes = machine.fuse.writes.subscribe();
        writes.borrow_and_update();
        let mut running = JoinSet::new();
        let spawned = (store.clone(), commit.clone(), values.clone());
        running.spawn(async move { spawned.0.commit(spawned.1, spawned.2).await.map(drop) });
        writes.changed().await.unwrap();
        // The shard's lock orders these after the write.
        for call in 0..5 {
            let (store, rival, again) = (store.clone(), rival.clone(), (commit.clone(), values.clone()));
            running.spawn(async move {
                match call {
                    0 => store.heads(id, 0, 3).await.map(drop),
                    1 => store.fetch(id, 0, false).await.map(drop),
                    2 => store.fetch_head(id, 0).await.map(drop),
                    3 => store.commit(rival.0, rival.1).await.map(drop),
                    _ => store.commit(again.0, again.1).await.map(drop),
                }
            });
        }
        assert_eq!(store.heads(id, 1, 2).await.unwrap().len(), 2, "other shards are readable");
        machine.fuse.set(Some(0));
        while flush(&store).await.is_ok() {}
        while let Some(ended) = running.join_next().await {
            assert!(ended.unwrap().is_err(), "a commit was seen that no sync has covered");
        }
    });
}

/// After a power loss at level `process` a hold still finds a version that all shards have, at least the one that the
/// last flush cycle made durable, with the bytes that were committed.
#[test]
fn what_all_shards_still_have_can_be_read_after_a_loss() {
    use thalweg_store::conformance::{advance, job};
    for seed in 0..200 {
        let mut machine = Machine::new(seed);
        let job = job(Durability::Process, Init::Zeros);
        let mut histories = vec![Vec::new(); 3];
        let mut durable = 0;
        life(async || {
            let store = machine.open().unwrap();
            store.create(job.clone()).await.unwrap();
            let subject: Subject = Arc::new(store.clone());
            for round in 1..=machine.rng.random_range(0..12) {
                for shard in 0..3 {
                    let state = advance(&subject, &job, shard, round * 8 + u64::from(shard)).await;
                    histories[shard as usize].push(state.values);
                    if machine.chance(15) {
                        store.flush().unwrap();
                        durable = histories.iter().map(Vec::len).min().unwrap_or(0) as u64;
                    }
                }
            }
        });
        machine.power_loss();
        life(async || {
            let store = machine.open().unwrap();
            let error = store.fetch(job.incarnation, 0, false).await.unwrap_err();
            assert_eq!(error.code(), thalweg_protocol::ErrorCode::Diverged, "seed {seed}");
            let hold = Incarnation::random();
            let (version, complete) = store.hold(job.incarnation, hold).await.unwrap();
            assert!(complete && version >= durable, "seed {seed}: {version} where {durable} was durable");
            for (shard, history) in (0..).zip(&histories) {
                let state = store.fetch_held(job.incarnation, hold, shard, true).await.unwrap();
                assert_eq!(state.head.version, version, "seed {seed}");
                match version.checked_sub(1) {
                    Some(at) => assert_eq!(state.values, history[at as usize], "seed {seed}, shard {shard}"),
                    None => assert!(state.values.iter().all(|byte| *byte == 0), "seed {seed}"),
                }
            }
        });
    }
}

//! A real data directory with sled: opened again, damaged, restored, full.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use support::{History, flush, life};
use thalweg_protocol::{CommitOutcome, Durability, ErrorCode, Incarnation, Init, Layout, StoreJob};
use thalweg_store::{
    FlushMode, Index as _, LocalStore, OpenOptions, ShardStore as _, SledIndex,
    conformance::{self, Subject},
};

const LEVELS: [Durability; 2] = [Durability::Process, Durability::Disk];

fn open(path: &Path) -> LocalStore {
    LocalStore::open(OpenOptions::directory(path, Duration::from_millis(2)).unwrap()).unwrap()
}

fn manual(path: &Path) -> LocalStore {
    let options = OpenOptions::directory(path, Duration::from_millis(2)).unwrap();
    LocalStore::open(OpenOptions { flush: FlushMode::Manual, ..options }).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Opens the store, checks all histories, commits some rounds to each, and drops or closes it.
fn live(path: &Path, histories: &mut [History], close: bool) {
    life(async || {
        let store = open(path);
        let subject: Subject = Arc::new(store.clone());
        for history in histories {
            store.create(history.job.clone()).await.unwrap();
            history.check(&subject).await.unwrap();
            for shard in [0, 1, 2, 0, 0, 0, 2] {
                let (commit, values) = history.next(shard);
                history.returned(shard, &store.commit(commit, values).await.unwrap());
            }
        }
        if close {
            store.close().unwrap();
        }
    });
}

fn histories() -> Vec<History> {
    LEVELS.map(|level| History::new(conformance::job(level, Init::Zeros))).into()
}

#[test]
fn opening_again_keeps_everything() {
    let directory = tempfile::tempdir().unwrap();
    let mut histories = histories();
    let id = open(directory.path()).id();
    for turn in 0..6 {
        live(directory.path(), &mut histories, turn % 2 == 0);
        assert_eq!(open(directory.path()).id(), id, "the identity is that of the directory");
    }
}

#[test]
fn uploads_outlive_the_process() {
    let directory = tempfile::tempdir().unwrap();
    for level in LEVELS {
        let job = conformance::job(level, Init::Upload);
        let upload = Incarnation::random();
        // More openings than a shard has slots: none may use one up.
        for turn in 0..15_u64 {
            let shard = (turn % 3) as u32;
            life(async || {
                let store = open(directory.path());
                store.create(job.clone()).await.unwrap();
                let parameters = conformance::bytes(job.parameter_bytes(shard), turn);
                store.upload(job.incarnation, upload, shard, parameters).await.unwrap();
            });
        }
        life(async || {
            let store: Subject = Arc::new(open(directory.path()));
            store.activate(job.incarnation, upload).await.unwrap();
            for shard in 0..3 {
                let got = store.fetch(job.incarnation, shard, false).await.unwrap();
                assert_eq!(got.values, conformance::bytes(job.parameter_bytes(shard), 12 + u64::from(shard)));
                for round in 0..5 {
                    conformance::advance(&store, &job, shard, round).await;
                }
            }
        });
    }
}

#[test]
fn the_index_is_rebuilt_and_an_older_one_does_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let (path, index) = (directory.path(), directory.path().join("index"));
    let mut histories = histories();
    for close in [false, true] {
        live(path, &mut histories, close);
        fs::remove_dir_all(&index).unwrap();
        live(path, &mut histories, close);
        let older = tempfile::tempdir().unwrap();
        copy(&index, older.path());
        live(path, &mut histories, close);
        live(path, &mut histories, close);
        fs::remove_dir_all(&index).unwrap();
        copy(older.path(), &index);
        live(path, &mut histories, close);
        live(path, &mut histories, close);
    }
    // A job that is deleted does not come back with an index that still knows it.
    let older = tempfile::tempdir().unwrap();
    copy(&index, older.path());
    let gone = histories.remove(0).job;
    life(async || open(path).delete(gone.incarnation).await.unwrap());
    fs::remove_dir_all(&index).unwrap();
    copy(older.path(), &index);
    life(async || {
        let store = open(path);
        assert_eq!(store.list().await.unwrap(), [histories[0].job.clone()]);
        store.close().unwrap();
    });
    let contents = SledIndex::open(&index).unwrap().load().unwrap();
    assert!(
        contents
            .jobs
            .keys()
            .chain(contents.durable.keys().map(|(job, _)| job))
            .all(|job| *job != gone.incarnation)
    );
    live(path, &mut histories, false);
}

#[test]
fn one_directory_has_one_store() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let error = OpenOptions::directory(directory.path(), Duration::from_millis(2)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{error}");
    assert!(error.to_string().contains("in use by another process"), "{error}");
    assert!(error.to_string().contains(&directory.path().display().to_string()), "{error}");
    drop(store);
    open(directory.path());
}

#[test]
fn files_that_are_no_slabs_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let mut histories = histories();
    live(directory.path(), &mut histories, false);
    let garbage = [("empty.slab", vec![]), ("short.slab", vec![7; 100]), ("long.slab", vec![0xff; 100_000])];
    for (name, bytes) in &garbage {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    for _ in 0..2 {
        live(directory.path(), &mut histories, true);
    }
    let contents = SledIndex::open(&directory.path().join("index")).unwrap().load().unwrap();
    for (name, bytes) in &garbage {
        assert!(contents.quarantine.contains_key(*name), "{name} is on record");
        assert_eq!(fs::read(directory.path().join(name)).unwrap(), *bytes, "{name} is as it was");
    }
}

/// A file system that lost the end of a slab: one job says so, the others go on.
#[test]
fn a_slab_cut_short_fails_its_job_only() {
    let directory = tempfile::tempdir().unwrap();
    for level in LEVELS {
        let mut histories = [
            History::new(conformance::job(level, Init::Zeros)),
            History::new(conformance::job(level, Init::Zeros)),
        ];
        live(directory.path(), &mut histories, true);
        let [damaged, mut other] = histories;
        let id = damaged.job.incarnation;
        let slab =
            fs::OpenOptions::new().write(true).open(directory.path().join(format!("{id}.slab"))).unwrap();
        // Superblocks, two whole slots of shard 0, and half the state of the third.
        slab.set_len(16_384 + 2 * 8192 + 4096 + 200).unwrap();
        live(directory.path(), std::slice::from_mut(&mut other), false);
        for _ in 0..2 {
            life(async || {
                let store = open(directory.path());
                let error = store.heads(id, 0, 3).await.unwrap_err();
                assert_eq!(error.code(), ErrorCode::Diverged);
                assert!(error.to_string().contains("damaged or older than the store's index"), "{error}");
            });
        }
        life(async || open(directory.path()).delete(id).await.unwrap());
        assert!(!directory.path().join(format!("{id}.slab")).exists());
        live(directory.path(), std::slice::from_mut(&mut other), false);
    }
}

/// The factor between disk space and state: three slots a shard, a header each, and a tenth to spare.
#[test]
fn space_on_disk_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout { elements: 4 << 20, shard_elements: 128 << 10 };
    let job = StoreJob { layout, slots: 0, ..conformance::job(Durability::Process, Init::Zeros) };
    let mut history = History::new(job.clone());
    life(async || {
        let store = open(directory.path());
        store.create(job.clone()).await.unwrap();
        for _ in 0..8 {
            let running: FuturesUnordered<_> = (0..32)
                .map(|shard| {
                    let (commit, values) = history.next(shard);
                    // Only the newest is compared; 256 MiB of history would be held otherwise.
                    let states = &mut history.shards[shard as usize];
                    states.drain(..states.len() - 1);
                    store.commit(commit, values)
                })
                .collect();
            let outcomes: Vec<_> = running.collect().await;
            assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(CommitOutcome::Committed(_)))));
        }
        history.check(&(Arc::new(store) as Subject)).await.unwrap();
    });
    let meta = fs::metadata(directory.path().join(format!("{}.slab", job.incarnation))).unwrap();
    let (allocated, live) = (meta.blocks() * 512, 16_u64 << 20);
    assert!(allocated <= live * 33 / 10, "{:.2} times the live state", allocated as f64 / live as f64);
}

/// Commits that find no slot wait for a flush cycle.
#[test]
fn more_commits_than_slots_wait_for_the_cycle() {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout { elements: 16 * 64, shard_elements: 64 };
    let mut history = History::new(StoreJob { layout, ..conformance::job(Durability::Process, Init::Zeros) });
    life(async || {
        let store = manual(directory.path());
        store.create(history.job.clone()).await.unwrap();
        let mut round = async |shards: std::ops::Range<u32>| {
            for shard in shards {
                let (commit, values) = history.next(shard);
                history.returned(shard, &store.commit(commit, values).await.unwrap());
            }
        };
        round(0..16).await;
        flush(&store).await.unwrap();
        // Version 1 durable, 2 the next cut, 3 current: no slot of its own is left to a shard.
        round(0..16).await;
        round(0..15).await;
        let mut waiting: FuturesUnordered<_> = (0..15)
            .map(|shard| {
                let (commit, values) = history.next(shard);
                let commit = store.commit(commit, values);
                async move { (shard, commit.await.unwrap()) }
            })
            .collect();
        let mut ended = Vec::new();
        for _ in 0..4 {
            ended.push(waiting.next().await.unwrap());
        }
        // Four spares, so nobody else gets through, however long it takes.
        let fifth = tokio::time::timeout(Duration::from_millis(50), waiting.next()).await;
        assert!(fifth.is_err(), "a slot was taken that a cut needs");
        let flushing = tokio::spawn({
            let store = store.clone();
            async move { flush(&store).await }
        });
        while let Some(next) = waiting.next().await {
            ended.push(next);
        }
        flushing.await.unwrap().unwrap();
        drop(waiting);
        for (shard, outcome) in ended {
            history.returned(shard, &outcome);
        }
        history.check(&(Arc::new(store) as Subject)).await.unwrap();
    });
}

/// A disk on which only so much is free refuses what does not fit, before anything is written, and serves the rest.
#[tokio::test]
async fn a_full_disk_refuses_jobs_and_snapshots_and_nothing_else() {
    use thalweg_store::{MemoryIndex, disk::ForgetfulDisk};
    let disk = Arc::new(ForgetfulDisk::default());
    let options = OpenOptions {
        disk: disk.clone(),
        index: Arc::new(MemoryIndex::default()),
        flush: FlushMode::Manual,
        reserve_bytes: 1 << 20,
        boot: String::new(),
    };
    let store = LocalStore::open(options).unwrap();
    let subject: Subject = Arc::new(store.clone());
    let fits = conformance::job(Durability::Process, Init::Zeros);
    store.create(fits.clone()).await.unwrap();
    disk.limit((1 << 20) + 4096);
    let late = conformance::job(Durability::Process, Init::Zeros);
    let error = store.create(late.clone()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StorageFull);
    assert!(error.to_string().contains("delete jobs"), "{error}");
    let error = store.commit(
        conformance::round(&late, 0, thalweg_protocol::Head::initial([0; 16], 0, 0), 1).0,
        vec![].into(),
    );
    assert_eq!(error.await.unwrap_err().code(), ErrorCode::Gone, "nothing of it is there");
    let error = store.hold(fits.incarnation, Incarnation::random()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StorageFull);
    for shard in 0..3 {
        conformance::advance(&subject, &fits, shard, 1).await;
    }
    disk.limit(1 << 30);
    store.create(late).await.unwrap();
}

/// The real file system takes the room of a job when it is created: its commits cannot find the disk full.
#[tokio::test]
async fn a_job_has_its_room_from_the_beginning() {
    let directory = tempfile::tempdir().unwrap();
    let store =
        LocalStore::open(OpenOptions::directory(directory.path(), Duration::from_millis(50)).unwrap())
            .unwrap();
    let job = conformance::job(Durability::Process, Init::Zeros);
    store.create(job.clone()).await.unwrap();
    let file = directory.path().join(format!("{}.slab", job.incarnation));
    let metadata = std::fs::metadata(file).unwrap();
    // 13 slots of two pages, and two superblocks of two; the length is that of what was written.
    assert!(metadata.blocks() * 512 >= 13 * 8192 + 16_384, "{} blocks", metadata.blocks());
    assert!(metadata.len() <= 16_384, "{} bytes", metadata.len());
    store.close().unwrap();
}

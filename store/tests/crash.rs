//! SIGKILL: a child process commits to a real directory and prints what has returned; whatever it printed
//! is there afterwards.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use support::life;
use thalweg_protocol::{CommitOutcome, Durability, Incarnation, Init, Layout, ShardIndex, StoreJob, Version};
use thalweg_store::{
    LocalStore, MemoryStore, OpenOptions, ShardState, ShardStore as _,
    conformance::{self, Subject},
};

const SHARDS: ShardIndex = 3;
const KILLS: u32 = 25;
const DIRECTORY: &str = "THALWEG_CRASH_DIRECTORY";
const LEVEL: &str = "THALWEG_CRASH_LEVEL";

fn job(level: Durability) -> StoreJob {
    let layout = Layout { elements: u64::from(SHARDS) * 32_768, shard_elements: 32_768 };
    let job = conformance::job(level, Init::Zeros);
    StoreJob { incarnation: Incarnation([level as u8; 16]), layout, slots: 0, ..job }
}

fn open(path: &Path) -> LocalStore {
    LocalStore::open(OpenOptions::directory(path, Duration::from_millis(3)).unwrap()).unwrap()
}

/// Not a test: the body of the child process.
#[test]
fn child() {
    let Ok(path) = std::env::var(DIRECTORY) else { return };
    let level = if std::env::var(LEVEL).unwrap() == "disk" { Durability::Disk } else { Durability::Process };
    let job = job(level);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    runtime.block_on(async {
        let store: Subject = Arc::new(open(Path::new(&path)));
        store.create(job.clone()).await.unwrap();
        println!("\nopened 0 0");
        loop {
            // As workers have it: a round begins when all shards have the one before. A shard that ran ahead would wait
            // for a slot until the others come after it.
            let heads = store.heads(job.incarnation, 0, SHARDS).await.unwrap();
            let least = heads.iter().map(|head| head.version).min().unwrap();
            let behind = (0..SHARDS).zip(&heads).filter(|(_, head)| head.version == least);
            let tasks = behind.map(|(shard, _)| {
                let (store, job) = (store.clone(), job.clone());
                tokio::spawn(async move {
                    let state = conformance::advance(&store, &job, shard, u64::from(shard)).await;
                    let mut out = std::io::stdout().lock();
                    writeln!(out, "committed {shard} {}", state.head.version).unwrap();
                    out.flush().unwrap();
                })
            });
            futures::future::try_join_all(tasks.collect::<Vec<_>>()).await.unwrap();
        }
    });
}

/// Starts the child and kills it once it has printed `lines` lines; returns the newest versions it printed.
fn run_and_kill(path: &Path, level: Durability, lines: u32) -> HashMap<ShardIndex, Version> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(DIRECTORY, path)
        .env(LEVEL, level.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut printed = HashMap::new();
    let mut count = 0;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let [what @ ("opened" | "committed"), shard, version] = words[..] else { continue };
        if what == "committed" {
            printed.insert(shard.parse().unwrap(), version.parse().unwrap());
        }
        count += 1;
        if count == lines {
            // What is in the pipe already was printed before the kill, and is read to the end.
            child.kill().unwrap();
        }
    }
    assert!(count >= lines, "the child ended by itself after {count} lines");
    child.wait().unwrap();
    printed
}

fn kills(level: Durability, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let directory = tempfile::tempdir().unwrap();
    let job = job(level);
    // What each version must be: the child's commits depend on nothing else.
    let model: Subject = Arc::new(MemoryStore::default());
    let mut states: Vec<ShardState> = life(async || {
        model.create(job.clone()).await.unwrap();
        let mut states = Vec::new();
        for shard in 0..SHARDS {
            states.push(model.fetch(job.incarnation, shard, true).await.unwrap());
        }
        states
    });
    for kill in 0..KILLS {
        let lines = rng.random_range(1..100);
        let printed = run_and_kill(directory.path(), level, lines);
        let context = format!("seed {seed}, kill {kill} at {level} after {lines} lines");
        life(async || {
            let store = open(directory.path());
            let heads = store.heads(job.incarnation, 0, SHARDS).await.unwrap();
            let mut shards: Vec<_> = (0..SHARDS).collect();
            // Those that are behind first, so that none runs ahead.
            shards.sort_by_key(|shard| heads[*shard as usize].version);
            for shard in shards {
                let got = store.fetch(job.incarnation, shard, true).await.unwrap();
                let state = &mut states[shard as usize];
                let least = printed.get(&shard).copied().unwrap_or(state.head.version);
                assert!(
                    got.head.version >= least,
                    "{context}: shard {shard} at {} of {least}",
                    got.head.version
                );
                assert!(got.head.version <= least + 1, "{context}: one commit at a time is under way");
                while state.head.version < got.head.version {
                    *state = conformance::advance(&model, &job, shard, u64::from(shard)).await;
                }
                assert_eq!(got.head, state.head, "{context}: shard {shard}");
                assert!(got == *state, "{context}: shard {shard} has other bytes or another ledger");
                // The very commit again is known as such.
                let again = conformance::round(&job, shard, got.head, u64::from(shard));
                let outcome = store.commit(again.0.clone(), again.1.clone()).await.unwrap();
                assert!(matches!(outcome, CommitOutcome::Committed(_)), "{context}: {outcome:?}");
                *state = conformance::advance(&model, &job, shard, u64::from(shard)).await;
                let outcome = store.commit(again.0, again.1).await.unwrap();
                assert_eq!(outcome, CommitOutcome::AlreadyCommitted(state.head), "{context}");
            }
            if rng.random() {
                store.close().unwrap();
            }
        });
    }
}

/// One level after the other: a process that is just being forked would hold the other's lock on its
/// directory for a moment.
#[test]
fn kills_lose_nothing() {
    kills(Durability::Process, 11);
    kills(Durability::Disk, 12);
}

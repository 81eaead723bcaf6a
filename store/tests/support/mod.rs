//! A machine whose power fails at any input or output, and the history that a store must agree with.

#![allow(dead_code, reason = "each test uses a part")]

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use thalweg_protocol::{Commit, CommitOutcome, ShardIndex, StoreJob};
use thalweg_store::{
    Change, FlushMode, Index, IndexContents, LocalStore, MemoryIndex, MemoryStore, OpenOptions, ShardState,
    ShardStore as _,
    conformance::{self, Subject},
    disk::{Disk, DiskFile, ForgetfulDisk},
};
use tokio::sync::watch;

/// Fails every write, sync and index change once so many have been done: the power is going.
#[derive(Debug)]
pub(crate) struct Fuse {
    left: Mutex<Option<u64>>,
    blown: AtomicBool,
    /// Writes that were tried.
    pub(crate) writes: watch::Sender<u64>,
}

impl Fuse {
    fn burn(&self) -> io::Result<()> {
        match &mut *self.left.lock().unwrap() {
            Some(0) => {
                self.blown.store(true, Ordering::SeqCst);
                Err(io::Error::other("the power is gone"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Whether something has failed for lack of power.
    pub(crate) fn blown(&self) -> bool {
        self.blown.load(Ordering::SeqCst)
    }

    pub(crate) fn set(&self, left: Option<u64>) {
        *self.left.lock().unwrap() = left;
        self.blown.store(false, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct FusedDisk(Arc<ForgetfulDisk>, Arc<Fuse>);

#[derive(Debug)]
struct FusedFile(Arc<dyn DiskFile>, Arc<Fuse>);

impl Disk for FusedDisk {
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(FusedFile(self.0.open(name)?, self.1.clone())))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.1.burn()?;
        self.0.remove(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }
    fn sync_names(&self) -> io::Result<()> {
        self.1.burn()?;
        self.0.sync_names()
    }
    fn free(&self) -> io::Result<u64> {
        self.0.free()
    }
}

impl DiskFile for FusedFile {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(bytes, offset)
    }
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let result = self.1.burn().and_then(|()| self.0.write_at(parts, offset));
        self.1.writes.send_modify(|writes| *writes += 1);
        result
    }
    fn sync(&self) -> io::Result<()> {
        self.1.burn()?;
        self.0.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

/// Stops a flush cycle between the sync of the slabs and the change of the index.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default, PartialEq)]
enum GateState {
    #[default]
    Open,
    Closed,
    Reached,
}

impl Gate {
    fn set(&self, state: GateState) {
        *self.state.lock().unwrap() = state;
        self.changed.notify_all();
    }

    pub(crate) fn close(&self) {
        self.set(GateState::Closed);
    }

    pub(crate) fn open(&self) {
        self.set(GateState::Open);
    }

    pub(crate) fn is_open(&self) -> bool {
        *self.state.lock().unwrap() == GateState::Open
    }

    /// Waits until a cycle stands before the closed gate.
    pub(crate) fn reached(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| *state != GateState::Reached).unwrap());
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        if *state == GateState::Closed {
            *state = GateState::Reached;
            self.changed.notify_all();
        }
        drop(self.changed.wait_while(state, |state| *state == GateState::Reached).unwrap());
    }
}

#[derive(Debug)]
struct FusedIndex {
    gate: Arc<Gate>,
    index: Arc<MemoryIndex>,
    fuse: Arc<Fuse>,
    ignore_syncs: Arc<AtomicBool>,
}

impl Index for FusedIndex {
    fn load(&self) -> io::Result<IndexContents> {
        self.index.load()
    }
    fn apply(&self, changes: &[Change]) -> io::Result<()> {
        self.gate.pass();
        self.fuse.burn()?;
        self.index.apply(changes)
    }
    fn sync(&self) -> io::Result<()> {
        self.fuse.burn()?;
        if self.ignore_syncs.load(Ordering::SeqCst) { Ok(()) } else { self.index.sync() }
    }
}

/// One machine; its disk and index outlive the stores opened on it.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) disk: Arc<ForgetfulDisk>,
    pub(crate) index: Arc<MemoryIndex>,
    pub(crate) fuse: Arc<Fuse>,
    pub(crate) gate: Arc<Gate>,
    /// The mutation of an index that is never synced.
    pub(crate) ignore_index_syncs: Arc<AtomicBool>,
    pub(crate) rng: StdRng,
    boots: u64,
}

impl Machine {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            disk: Arc::default(),
            index: Arc::default(),
            fuse: Arc::new(Fuse {
                left: Mutex::new(None),
                blown: AtomicBool::new(false),
                writes: watch::Sender::new(0),
            }),
            gate: Arc::default(),
            ignore_index_syncs: Arc::default(),
            rng: StdRng::seed_from_u64(seed),
            boots: 0,
        }
    }

    /// Opens the store with the boot id of this boot; flush cycles run only when asked for.
    pub(crate) fn open(&self) -> io::Result<LocalStore> {
        let fuse = self.fuse.clone();
        LocalStore::open(OpenOptions {
            disk: Arc::new(FusedDisk(self.disk.clone(), fuse.clone())),
            index: Arc::new(FusedIndex {
                gate: self.gate.clone(),
                index: self.index.clone(),
                fuse,
                ignore_syncs: self.ignore_index_syncs.clone(),
            }),
            flush: FlushMode::Manual,
            reserve_bytes: 0,
            boot: format!("boot-{}", self.boots),
        })
    }

    /// Un-synced writes are kept, lost or torn, and the machine boots again. No store may be open.
    pub(crate) fn power_loss(&mut self) {
        self.disk.power_loss(&mut self.rng);
        self.index.power_loss();
        self.boots += 1;
        self.fuse.set(None);
    }

    pub(crate) fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }
}

/// Runs one life of a process. What it has not finished is cut off; its threads have ended afterwards.
pub(crate) fn life<T>(body: impl AsyncFnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(body())
}

/// A flush cycle, off the async thread.
pub(crate) async fn flush(store: &LocalStore) -> Result<(), thalweg_store::StoreError> {
    let store = store.clone();
    tokio::task::spawn_blocking(move || store.flush()).await.unwrap()
}

/// Everything that was ever written to a job, and what of it was seen.
#[derive(Debug)]
pub(crate) struct History {
    pub(crate) job: StoreJob,
    /// States of each shard by version.
    pub(crate) shards: Vec<Vec<ShardState>>,
    /// How many commits of each shard have returned, or been read.
    pub(crate) seen: Vec<usize>,
    seed: u64,
}

impl History {
    /// A job from zeros; the model tells its version 0.
    pub(crate) fn new(job: StoreJob) -> Self {
        let shards = life(async || {
            let model = MemoryStore::default();
            model.create(job.clone()).await.unwrap();
            let mut shards = Vec::new();
            for shard in 0..job.layout.shards() {
                shards.push(vec![model.fetch(job.incarnation, shard, true).await.unwrap()]);
            }
            shards
        });
        Self { seen: vec![0; shards.len()], shards, job, seed: 0 }
    }

    /// Writes down the next commit of a shard.
    pub(crate) fn next(&mut self, shard: ShardIndex) -> (Commit, bytes::Bytes) {
        self.seed += 1;
        let states = &mut self.shards[shard as usize];
        let expect = states.last().unwrap().head;
        let (commit, values) = conformance::round(&self.job, shard, expect, self.seed);
        let head = expect.next(&commit.ledger, commit.function, thalweg_protocol::checksum(&[&values]));
        states.push(ShardState { head, ledger: commit.ledger.clone(), values: values.clone() });
        (commit, values)
    }

    /// A commit has returned.
    pub(crate) fn returned(&mut self, shard: ShardIndex, outcome: &CommitOutcome) {
        let shard = shard as usize;
        let (CommitOutcome::Committed(head) | CommitOutcome::AlreadyCommitted(head)) = outcome else {
            panic!("the only writer of shard {shard} got {outcome:?}");
        };
        let version = self.shards[shard].iter().position(|state| state.head == *head).unwrap();
        self.seen[shard] = self.seen[shard].max(version);
    }

    /// Compares a store that has been opened again, and forgets what did not come through. What is read
    /// counts as seen. `Err` tells what was lost or mixed.
    pub(crate) async fn check(&mut self, store: &Subject) -> Result<(), String> {
        for shard in 0..self.job.layout.shards() {
            let got = store.fetch(self.job.incarnation, shard, true).await;
            let got = got.map_err(|error| format!("shard {shard}: {error}"))?;
            let states = &mut self.shards[shard as usize];
            let version = states.iter().position(|state| *state == got).ok_or_else(|| {
                format!(
                    "shard {shard}: a state that nobody committed, head {:?} ledger {:?}",
                    got.head, got.ledger
                )
            })?;
            let seen = self.seen[shard as usize];
            if version < seen {
                return Err(format!("shard {shard}: version {version}, but {seen} had been seen"));
            }
            states.truncate(version + 1);
            self.seen[shard as usize] = version;
        }
        let heads =
            store.heads(self.job.incarnation, 0, u32::MAX).await.map_err(|error| error.to_string())?;
        let wanted: Vec<_> = self.shards.iter().map(|states| states.last().unwrap().head).collect();
        if heads == wanted { Ok(()) } else { Err("heads and fetch disagree".to_owned()) }
    }
}

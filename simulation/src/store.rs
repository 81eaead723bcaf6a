//! The store: the real one on a disk that tears and forgets, or its model.

use std::sync::Arc;

use bytes::Bytes;
use rand::{RngExt as _, rngs::StdRng};
use thalweg_protocol::{Commit, CommitOutcome, Head, Incarnation, Ledger, ShardIndex, StoreJob};
use thalweg_store::{
    FlushMode, LocalStore, MemoryIndex, MemoryStore, OpenOptions, ShardState, ShardStore, StoreError,
    disk::{Disk as _, ForgetfulDisk},
};

/// Commits of one shard between two flush cycles: its slots are three, one of which is current.
const COMMITS_A_CYCLE: u32 = 2;

/// A store and what survives its process.
pub(crate) struct Host {
    runtime: tokio::runtime::Runtime,
    job: StoreJob,
    kept: Kept,
    /// Commits since the last flush cycle.
    unflushed: u32,
}

enum Kept {
    Model(MemoryStore),
    Real { disk: Arc<ForgetfulDisk>, index: Arc<MemoryIndex>, store: Option<LocalStore> },
}

fn open(disk: &Arc<ForgetfulDisk>, index: &Arc<MemoryIndex>) -> std::io::Result<LocalStore> {
    LocalStore::open(OpenOptions {
        disk: disk.clone(),
        index: index.clone(),
        flush: FlushMode::Manual,
        boot: "boot".to_owned(),
    })
}

impl Host {
    /// A store with one job.
    pub(crate) fn new(job: StoreJob, real: bool) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build()?;
        let kept = if real {
            let (disk, index) = (Arc::new(ForgetfulDisk::default()), Arc::new(MemoryIndex::default()));
            let store = Some(open(&disk, &index)?);
            Kept::Real { disk, index, store }
        } else {
            Kept::Model(MemoryStore::default())
        };
        let host = Self { runtime, job: job.clone(), kept, unflushed: 0 };
        host.ask(async |store| store.create(job).await)?;
        Ok(host)
    }

    fn store(&self) -> Option<&dyn ShardStore> {
        match &self.kept {
            Kept::Model(store) => Some(store),
            Kept::Real { store, .. } => store.as_ref().map(|store| store as &dyn ShardStore),
        }
    }

    fn ask<T>(
        &self,
        work: impl AsyncFnOnce(&dyn ShardStore) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match self.store() {
            Some(store) => self.runtime.block_on(work(store)),
            None => Err(StoreError::Unavailable("the store is down".to_owned())),
        }
    }

    pub(crate) fn heads(&self) -> Result<Vec<Head>, StoreError> {
        self.ask(async |store| store.heads(self.job.incarnation, 0, u32::MAX).await)
    }

    pub(crate) fn head(&self, shard: ShardIndex) -> Result<(Head, Ledger), StoreError> {
        self.ask(async |store| store.fetch_head(self.job.incarnation, shard).await)
    }

    pub(crate) fn fetch(&self, shard: ShardIndex, slots: bool) -> Result<ShardState, StoreError> {
        self.ask(async |store| store.fetch(self.job.incarnation, shard, slots).await)
    }

    pub(crate) fn commit(&mut self, commit: Commit, state: Bytes) -> Result<CommitOutcome, StoreError> {
        if self.unflushed >= COMMITS_A_CYCLE {
            self.flush();
        }
        self.unflushed += 1;
        self.ask(async |store| store.commit(commit, state).await)
    }

    /// A flush cycle.
    pub(crate) fn flush(&mut self) {
        if let Kept::Real { store: Some(store), .. } = &self.kept
            && let Err(error) = store.flush()
        {
            unreachable!("this disk does not fail: {error}");
        }
        self.unflushed = 0;
    }

    /// Kills the process, in the middle of `write` if there is one.
    pub(crate) fn kill(&mut self, write: Option<(Commit, Bytes)>, rng: &mut StdRng) {
        // The one that is torn is answered to nobody. One that writes nothing has nothing to tear.
        let torn = matches!(self.kept, Kept::Real { .. })
            && write.is_some_and(|(commit, state)| {
                matches!(self.commit(commit, state), Ok(CommitOutcome::Committed(_)))
            });
        if let Kept::Real { disk, store, .. } = &mut self.kept {
            if torn && let Ok(names) = disk.list() {
                for name in names.iter().filter(|name| name.ends_with(".slab")) {
                    disk.tear_last_write(name, rng);
                }
            }
            *store = None;
        }
        self.unflushed = 0;
    }

    /// Starts it again.
    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        if let Kept::Real { disk, index, store } = &mut self.kept {
            *store = Some(open(disk, index)?);
        }
        Ok(())
    }
}

/// A job of the store for the simulated job.
pub(crate) fn incarnation(rng: &mut StdRng) -> Incarnation {
    Incarnation(rng.random())
}

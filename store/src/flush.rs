//! The flush cycle: what makes commits survive power loss (rule P24).

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use thalweg_broker::stage;
use thalweg_protocol::{Incarnation, ShardIndex};
use tokio::sync::watch;

use crate::{
    StoreError,
    index::{Change, Durable, Index},
    metrics,
    slab::{Slab, broken},
};

/// When flush cycles run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushMode {
    /// In a thread of their own, at least this often while anything was written, at once when a commit
    /// waits for one.
    Every(Duration),
    /// Only when asked for, and everything on the caller's thread: for tests and the simulation.
    Manual,
}

/// What slabs and the flush cycle tell each other.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    /// Commits whose bytes are written, over all jobs: what a flush cycle covers.
    pub(crate) accepted: AtomicU64,
    /// Bytes of state that no finished cycle covers.
    pub(crate) unsynced: AtomicU64,
    /// A sync failed: nothing this store says can be trusted any more.
    pub(crate) failed: AtomicBool,
}

impl Signals {
    /// Notes the failure of a sync, after which the process must stop (rule P24).
    pub(crate) fn synced(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_err() {
            self.failed.store(true, Ordering::SeqCst);
        }
        result
    }
}

/// What a cycle makes durable in one slab.
type Pinned = (Arc<Slab>, Vec<(ShardIndex, Durable)>);

/// Slabs that are open.
pub(crate) type Slabs = Arc<Mutex<BTreeMap<Incarnation, Arc<Slab>>>>;

/// State shared between commits and the flush thread.
#[derive(Debug)]
pub(crate) struct Flusher {
    slabs: Slabs,
    index: Arc<dyn Index>,
    pub(crate) signals: Arc<Signals>,
    /// Highest ticket that a finished cycle covers.
    covered: watch::Sender<u64>,
    /// Asked to stop, and a demand for a cycle at once.
    wanted: Mutex<(bool, bool)>,
    wake: Condvar,
    /// One cycle at a time.
    cycle: Mutex<()>,
}

impl Flusher {
    pub(crate) fn new(slabs: Slabs, index: Arc<dyn Index>, signals: Arc<Signals>) -> Self {
        Self {
            slabs,
            index,
            signals,
            covered: watch::channel(0).0,
            wanted: Mutex::new((false, false)),
            wake: Condvar::new(),
            cycle: Mutex::new(()),
        }
    }

    /// Runs cycles until [`Self::stop`]; the body of the flush thread.
    pub(crate) fn run(&self, every: Duration) {
        loop {
            {
                let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
                let (mut wanted, _) = self
                    .wake
                    .wait_timeout_while(wanted, every, |(stop, demand)| !*stop && !*demand)
                    .unwrap_or_else(PoisonError::into_inner);
                if wanted.0 {
                    return;
                }
                wanted.1 = false;
            }
            if self.cycle(false).is_err() {
                return;
            }
        }
    }

    pub(crate) fn stop(&self) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).0 = true;
        self.wake.notify_all();
    }

    /// Asks for a cycle at once.
    pub(crate) fn demand(&self) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.wake.notify_all();
    }

    /// Tells when cycles end.
    pub(crate) fn covered(&self) -> watch::Receiver<u64> {
        self.covered.subscribe()
    }

    /// Runs `work` while no cycle runs.
    pub(crate) fn between<T>(&self, work: impl FnOnce() -> T) -> T {
        let _none = self.cycle.lock().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    /// One cycle: sync slabs, then write and sync the durable pointers, then tell.
    pub(crate) fn cycle(&self, all_current: bool) -> Result<(), StoreError> {
        let _one = self.cycle.lock().unwrap_or_else(PoisonError::into_inner);
        // What a failed cycle should have covered is not dirty any more, so another one would vouch for it.
        if self.signals.failed.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable("the store's disk failed before".to_owned()));
        }
        let outcome = self.cover(all_current);
        if outcome.is_err() {
            self.signals.failed.store(true, Ordering::SeqCst);
        }
        outcome
    }

    fn cover(&self, all_current: bool) -> Result<(), StoreError> {
        let begun = std::time::Instant::now();
        let ticket = self.signals.accepted.load(Ordering::SeqCst);
        let unsynced = self.signals.unsynced.load(Ordering::SeqCst);
        let slabs: Vec<_> =
            self.slabs.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let mut pinned = Vec::new();
        // The pointers of a job that has lost state stay what they were: they name what may be left of it.
        for slab in slabs.into_iter().filter(|slab| !slab.is_lost()) {
            if all_current {
                slab.sync_partials().map_err(|error| broken(&error))?;
            }
            if slab.dirty.swap(false, Ordering::SeqCst) || all_current {
                let shards = slab.pin(all_current)?;
                if all_current || !shards.is_empty() {
                    pinned.push((slab, shards));
                }
            }
        }
        if !pinned.is_empty() {
            self.sync(&pinned).map_err(|error| broken(&error))?;
            for (slab, shards) in &pinned {
                slab.flushed(shards);
            }
            metrics::flush_cycle(begun.elapsed());
        }
        self.signals.unsynced.fetch_sub(unsynced, Ordering::SeqCst);
        self.covered.send_replace(ticket);
        Ok(())
    }

    fn sync(&self, pinned: &[Pinned]) -> io::Result<()> {
        for (slab, _) in pinned {
            slab.file.sync()?;
        }
        stage::reached(stage::IN_FLUSH);
        let changes: Vec<_> = pinned
            .iter()
            .flat_map(|(slab, shards)| {
                shards.iter().map(|(shard, durable)| Change::Durable(slab.job.incarnation, *shard, *durable))
            })
            .collect();
        self.index.apply(&changes)?;
        self.index.sync()
    }
}

//! The store: the real one, on a disk that tears and forgets, whose power may fail at any operation.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use thalweg_protocol::{Commit, Head, Incarnation, PartialCommit, ShardIndex, StoreId};
use thalweg_store::{
    Change, FlushMode, Index, IndexContents, LocalStore, MemoryIndex, OpenOptions, ShardStore as _, Standing,
    StoreError, answer,
    disk::{Disk, DiskFile, ForgetfulDisk},
};

use crate::{calls::CallId, network::Actor};

/// Fails everything once so many operations have been done: the process is dying. The write that it dies in is
/// done in part.
#[derive(Debug)]
struct Fuse {
    left: Mutex<Option<u32>>,
    blown: AtomicBool,
    rng: Mutex<StdRng>,
}

impl Fuse {
    fn burn(&self) -> io::Result<()> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *left {
            Some(0) => {
                self.blown.store(true, Ordering::SeqCst);
                Err(io::Error::other("the process is dying"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn set(&self, left: Option<u32>) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = left;
        self.blown.store(false, Ordering::SeqCst);
    }

    fn cut(&self, len: usize) -> usize {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).random_range(0..=len) / 512 * 512
    }
}

#[derive(Debug)]
struct FusedDisk(Arc<ForgetfulDisk>, Arc<Fuse>);

#[derive(Debug)]
struct FusedFile(Arc<dyn DiskFile>, Arc<Fuse>);

#[derive(Debug)]
struct FusedIndex(Arc<MemoryIndex>, Arc<Fuse>);

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
}

impl DiskFile for FusedFile {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(bytes, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let before = self.1.blown.load(Ordering::SeqCst);
        let burnt = self.1.burn();
        if burnt.is_err() && !before {
            let bytes = parts.concat();
            self.0.write_at(&[&bytes[..self.1.cut(bytes.len())]], offset)?;
        }
        burnt.and_then(|()| self.0.write_at(parts, offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.1.burn()?;
        self.0.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

impl Index for FusedIndex {
    fn load(&self) -> io::Result<IndexContents> {
        self.0.load()
    }

    fn apply(&self, changes: &[Change]) -> io::Result<()> {
        self.1.burn()?;
        self.0.apply(changes)
    }

    fn sync(&self) -> io::Result<()> {
        self.1.burn()?;
        self.0.sync()
    }
}

/// A compare-and-swap that was asked for.
pub(crate) enum Tried {
    Commit(Commit, Bytes),
    Partial(PartialCommit),
}

/// An answer of the store.
pub(crate) struct Answered {
    pub(crate) to: Actor,
    pub(crate) id: CallId,
    /// What was asked, where that was a commit.
    pub(crate) tried: Option<Tried>,
    pub(crate) reply: Bytes,
}

struct Pending {
    to: Actor,
    id: CallId,
    tried: Option<Tried>,
    work: Pin<Box<dyn Future<Output = Bytes> + Send>>,
}

/// A store and what survives its process.
pub(crate) struct Host {
    /// Timers of the store's waits need one; it never runs.
    runtime: tokio::runtime::Runtime,
    disk: Arc<ForgetfulDisk>,
    index: Arc<MemoryIndex>,
    fuse: Arc<Fuse>,
    boot: u32,
    store: Option<LocalStore>,
    pending: Vec<Pending>,
}

impl Host {
    pub(crate) fn new(id: StoreId, seed: u64) -> anyhow::Result<Self> {
        let disk = Arc::new(ForgetfulDisk::default());
        // The identity that the store would otherwise draw.
        let identity = disk.open("identity")?;
        identity.write_at(&[id.to_string().as_bytes()], 0)?;
        identity.sync()?;
        disk.sync_names()?;
        let fuse = Fuse {
            left: Mutex::new(None),
            blown: AtomicBool::new(false),
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
        };
        Ok(Self {
            runtime: tokio::runtime::Builder::new_current_thread().enable_time().build()?,
            disk,
            index: Arc::default(),
            fuse: Arc::new(fuse),
            boot: 0,
            store: None,
            pending: Vec::new(),
        })
    }

    /// Syncs do nothing from now on.
    pub(crate) fn ignore_syncs(&self) {
        self.disk.ignore_syncs();
    }

    /// Starts the process; `false` when it dies in the attempt.
    pub(crate) fn start(&mut self) -> anyhow::Result<bool> {
        let opened = LocalStore::open(OpenOptions {
            disk: Arc::new(FusedDisk(self.disk.clone(), self.fuse.clone())),
            index: Arc::new(FusedIndex(self.index.clone(), self.fuse.clone())),
            flush: FlushMode::Manual,
            reserve_bytes: 0,
            boot: self.boot.to_string(),
        });
        match opened {
            Ok(store) => {
                self.store = Some(store);
                Ok(true)
            }
            Err(_) if self.is_dying() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The process will die after so many more operations.
    pub(crate) fn light_fuse(&self, left: u32) {
        self.fuse.set(Some(left));
    }

    /// Whether it is dying of that.
    pub(crate) fn is_dying(&self) -> bool {
        self.fuse.blown.load(Ordering::SeqCst)
    }

    /// The process is gone; what it wrote stays.
    pub(crate) fn kill(&mut self) {
        self.pending.clear();
        self.store = None;
        self.fuse.set(None);
    }

    /// The machine is off: what was not synced is lost, kept or torn.
    pub(crate) fn power_loss(&mut self, rng: &mut StdRng, noticed: bool) {
        self.kill();
        self.disk.power_loss(rng);
        self.index.power_loss();
        if noticed {
            self.boot += 1;
        }
    }

    /// Takes a request in.
    pub(crate) fn request(&mut self, to: Actor, id: CallId, tried: Option<Tried>, frame: Bytes) {
        let Some(store) = self.store.clone() else { return };
        let work = Box::pin(async move { answer(&store, &frame).await });
        self.pending.push(Pending { to, id, tried, work });
    }

    /// What can be answered now, in the order in which it was asked.
    pub(crate) fn poll(&mut self) -> Vec<Answered> {
        let _timers = self.runtime.enter();
        let mut context = Context::from_waker(Waker::noop());
        let mut answered = Vec::new();
        let mut waiting = Vec::new();
        for mut pending in std::mem::take(&mut self.pending) {
            match pending.work.as_mut().poll(&mut context) {
                Poll::Ready(reply) => {
                    let Pending { to, id, tried, .. } = pending;
                    answered.push(Answered { to, id, tried, reply });
                }
                Poll::Pending => waiting.push(pending),
            }
        }
        self.pending = waiting;
        answered
    }

    /// A flush cycle; it may die in it.
    pub(crate) fn flush(&self) -> anyhow::Result<()> {
        match self.store.as_ref().map(LocalStore::flush) {
            Some(Err(error)) if !self.is_dying() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Where the shards of a job stand.
    pub(crate) fn heads(&self, job: Incarnation) -> Result<Vec<Head>, StoreError> {
        let _timers = self.runtime.enter();
        let Some(store) = &self.store else { return Err(StoreError::Unavailable("down".to_owned())) };
        let mut heads = std::pin::pin!(store.heads(job, 0, u32::MAX));
        match heads.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(heads) => heads,
            Poll::Pending => Err(StoreError::Unavailable("not durable yet".to_owned())),
        }
    }

    /// Where a shard stands, with its open round.
    pub(crate) fn standing(&self, job: Incarnation, shard: ShardIndex) -> Option<Standing> {
        let _timers = self.runtime.enter();
        let mut standing = std::pin::pin!(self.store.as_ref()?.fetch_head(job, shard));
        match standing.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(standing) => standing.ok(),
            Poll::Pending => None,
        }
    }

    /// Files of jobs on the disk.
    pub(crate) fn slabs(&self) -> anyhow::Result<Vec<String>> {
        let of_job = |name: &String| name.ends_with(".slab") || name.ends_with(".partial");
        Ok(self.disk.list()?.into_iter().filter(of_job).collect())
    }

    /// Open rounds are lost with the process.
    pub(crate) fn forget_partials(&self) -> anyhow::Result<()> {
        for name in self.disk.list()?.into_iter().filter(|name| name.ends_with(".partial")) {
            self.disk.remove(&name)?;
        }
        Ok(())
    }
}

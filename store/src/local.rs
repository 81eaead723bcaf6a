//! The store on this machine's disk: a slab file per job and an index.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::Ordering},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use thalweg_broker::Spans;
use thalweg_protocol::{
    Commit, CommitOutcome, Durability, Epoch, ErrorCode, Head, Incarnation, OpenRound, PartialCommit, Round,
    ShardIndex, Stage, StoreId, StoreJob, Version, limits,
};

use crate::{
    FlushMode, OpenFold, ShardState, ShardStore, Standing, StoreError,
    disk::{Directory, Disk, DiskFile},
    flush::{Flusher, Signals, Slabs},
    index::{Change, Index, SledIndex},
    metrics, rules,
    slab::{Slab, Written, broken, partial_file},
};

const IDENTITY: &str = "identity";
const SLAB_SUFFIX: &str = ".slab";

/// How a store is opened.
#[derive(Debug)]
pub struct OpenOptions {
    /// The slabs' files.
    pub disk: Arc<dyn Disk>,
    /// The index.
    pub index: Arc<dyn Index>,
    /// When flush cycles run.
    pub flush: FlushMode,
    /// Bytes of the disk that are left free for everything else on it: a job that would need them is refused.
    pub reserve_bytes: u64,
    /// Boot id of the machine: another one than at the last opening, without a close in between, means
    /// that the power may have failed.
    pub boot: String,
}

impl OpenOptions {
    /// A data directory of the file system, with this machine's boot id.
    ///
    /// # Errors
    /// When the directory cannot be created, or another process has it open.
    pub fn directory(path: &Path, flush: Duration) -> io::Result<Self> {
        Ok(Self {
            disk: Arc::new(Directory::create(path)?),
            index: Arc::new(SledIndex::open(&path.join("index"))?),
            flush: FlushMode::Every(flush),
            reserve_bytes: 0,
            // Where there is no such file, every boot looks the same and a power loss goes unnoticed here;
            // workers still notice it by the state they build on.
            boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .unwrap_or_default()
                .trim()
                .to_owned(),
        })
    }
}

/// See the module. Cheap to clone; closes when told to, and without that stays recoverable.
#[derive(Clone, Debug)]
pub struct LocalStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: StoreId,
    disk: Arc<dyn Disk>,
    index: Arc<dyn Index>,
    slabs: Slabs,
    flusher: Arc<Flusher>,
    flush_thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    boot: String,
    /// Everything is done on the caller's thread.
    inline: bool,
    /// Bytes of the disk that are left free.
    reserve_bytes: u64,
    /// False once closed. Held for reading by every call, so that none slips past the last cycle.
    open: RwLock<bool>,
    /// What it did for the newest rounds.
    spans: Spans,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Without this the thread would run on, and keep the directory in use.
        self.stop();
    }
}

/// What the jobs of a store take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) jobs: usize,
    pub(crate) slab_bytes: u64,
    pub(crate) live_bytes: u64,
    pub(crate) lost_jobs: usize,
}

impl LocalStore {
    /// Opens a store and finishes one flush cycle before anything is served (rule P25). Blocks.
    ///
    /// # Errors
    /// Those of the file system, with a kind of `ResourceBusy` when another process has the directory.
    pub fn open(options: OpenOptions) -> io::Result<Self> {
        let OpenOptions { disk, index, flush, reserve_bytes, boot } = options;
        let id = identity(&*disk)?;
        let known = index.load()?;
        let power_lost = known.opened.as_ref().is_some_and(|(last, clean)| *last != boot && !clean);
        // A sync of names that failed in an earlier life may have left some that no disk has.
        disk.sync_names()?;
        let signals = Arc::new(Signals::default());
        let slabs: Slabs = Arc::new(Mutex::new(BTreeMap::new()));
        let mut changes = Vec::new();
        for name in disk.list()?.into_iter().filter(|name| name.ends_with(SLAB_SUFFIX)) {
            let slab = Slab::open(disk.open(&name)?, disk.clone(), signals.clone());
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{name}: {error}"));
            let Some(slab) = slab.map_err(named)? else {
                tracing::warn!(
                    name,
                    "a file that is no slab was left alone; remove it once you know what it is"
                );
                changes.push(Change::Quarantine(name, "no whole superblock".to_owned()));
                continue;
            };
            let incarnation = slab.job.incarnation;
            if power_lost && slab.job.durability == Durability::Process {
                slab.lose("the power failed under it at level process, so rounds may be lost")?;
            }
            if !slab.is_lost() {
                slab.reconcile(|shard| known.durable.get(&(incarnation, shard)).copied())?;
            }
            if !known.jobs.contains_key(&incarnation) {
                changes.push(Change::Job(Box::new(slab.job.clone())));
            }
            slabs.lock().unwrap_or_else(PoisonError::into_inner).insert(incarnation, Arc::new(slab));
        }
        let gone =
            |job: &&Incarnation| !slabs.lock().unwrap_or_else(PoisonError::into_inner).contains_key(*job);
        changes.extend(known.jobs.keys().filter(gone).map(|job| Change::Remove(*job)));
        // Last, since whoever dies before this has to find the power loss again.
        changes.push(Change::Opened { boot: boot.clone(), clean: false });
        index.apply(&changes)?;
        index.sync()?;
        let flusher = Arc::new(Flusher::new(slabs.clone(), index.clone(), signals));
        flusher.cycle(false).map_err(io::Error::other)?;
        let inline = flush == FlushMode::Manual;
        let flush_thread = match flush {
            FlushMode::Manual => None,
            FlushMode::Every(every) => {
                let flusher = flusher.clone();
                let thread = std::thread::Builder::new().name("store-flush".to_owned());
                Some(thread.spawn(move || flusher.run(every))?)
            }
        };
        let flush_thread = Mutex::new(flush_thread);
        let open = RwLock::new(true);
        let spans = Spans::new("store", id.to_string());
        let inner =
            Inner { id, disk, index, slabs, flusher, flush_thread, boot, inline, open, reserve_bytes, spans };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Identity of the data directory.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.inner.id
    }

    /// What it did for the newest rounds, for whoever traces them.
    pub(crate) fn spans(&self) -> &Spans {
        &self.inner.spans
    }

    /// Runs a flush cycle now. Blocks.
    ///
    /// # Errors
    /// When a sync fails; the process must then stop, since what was lost is unknown.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.inner.flusher.cycle(false)
    }

    /// Bytes that can still be written to the disk, and how many of them are to stay free.
    ///
    /// # Errors
    /// When the file system does not tell.
    pub fn room(&self) -> io::Result<(u64, u64)> {
        Ok((self.inner.disk.free()?, self.inner.reserve_bytes))
    }

    /// What the jobs take.
    pub(crate) fn usage(&self) -> Usage {
        let slabs: Vec<_> = self.inner.slabs().values().cloned().collect();
        Usage {
            jobs: slabs.len(),
            slab_bytes: slabs.iter().filter_map(|slab| slab.file.len().ok()).sum(),
            live_bytes: slabs.iter().map(|slab| slab.live_bytes()).sum(),
            lost_jobs: slabs.iter().filter(|slab| slab.is_lost()).count(),
        }
    }

    /// Bytes of state that no finished flush cycle covers.
    pub(crate) fn unsynced_bytes(&self) -> u64 {
        self.inner.flusher.signals.unsynced.load(Ordering::SeqCst)
    }

    /// Whether a sync has failed: the process must stop.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.inner.flusher.signals.failed.load(Ordering::SeqCst)
    }

    /// Makes everything survive power loss and remembers that nothing was lost. Blocks until the calls
    /// under way have ended; later ones are refused as unavailable.
    ///
    /// # Errors
    /// When a sync fails.
    pub fn close(&self) -> Result<(), StoreError> {
        *self.inner.open.write().unwrap_or_else(PoisonError::into_inner) = false;
        self.inner.stop();
        self.inner.flusher.cycle(true)?;
        let closed = Change::Opened { boot: self.inner.boot.clone(), clean: true };
        self.inner
            .index
            .apply(&[closed])
            .and_then(|()| self.inner.index.sync())
            .map_err(|error| broken(&error))
    }

    /// Runs blocking work off the async threads, but for tests.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        let inline = inner.inline;
        let work = move || {
            let open = inner.open.read().unwrap_or_else(PoisonError::into_inner);
            if *open { work(&inner) } else { Err(StoreError::Unavailable("the store is closed".to_owned())) }
        };
        let result = if inline {
            work()
        } else {
            let result = tokio::task::spawn_blocking(work).await;
            result.unwrap_or_else(|error| Err(StoreError::Unavailable(format!("store task: {error}"))))
        };
        if let Err(error) = &result {
            metrics::refused(error.code());
        }
        result
    }

    /// Waits until a flush cycle covers `ticket`.
    async fn covered(&self, ticket: u64) -> Result<(), StoreError> {
        let mut covered = self.inner.flusher.covered();
        loop {
            if *covered.borrow_and_update() >= ticket {
                return Ok(());
            }
            if self.has_failed() {
                return Err(StoreError::Unavailable("the store's disk failed".to_owned()));
            }
            self.inner.flusher.demand();
            // The sender lives as long as the store; a time-out notices a failed cycle, which sends nothing.
            let _ = tokio::time::timeout(Duration::from_secs(1), covered.changed()).await;
        }
    }
}

impl Inner {
    fn slabs(&self) -> MutexGuard<'_, BTreeMap<Incarnation, Arc<Slab>>> {
        self.slabs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slab(&self, job: Incarnation) -> Result<Arc<Slab>, StoreError> {
        let slab = self.any_slab(job)?;
        slab.check_lost()?;
        Ok(slab)
    }

    /// A job's slab, even if rounds of it were lost.
    fn any_slab(&self, job: Incarnation) -> Result<Arc<Slab>, StoreError> {
        self.slabs().get(&job).cloned().ok_or_else(|| rules::gone(job))
    }

    /// Ends the flush thread.
    fn stop(&self) {
        self.flusher.stop();
        let thread = self.flush_thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A flush thread that panicked has failed in a way the last cycle will find too.
            let _ = thread.join();
        }
    }

    fn create(&self, job: StoreJob) -> Result<(), StoreError> {
        // Held throughout, so that two creations of one job cannot both write its file. Rare and short.
        let mut slabs = self.slabs();
        if let Some(known) = slabs.get(&job.incarnation) {
            return if known.job == job {
                known.check_lost()
            } else {
                let text = "the incarnation exists with another description";
                Err(StoreError::refused(ErrorCode::SpecMismatch, text))
            };
        }
        let need = Slab::bytes_of(&job);
        self.check_room(&job, need)?;
        let name = slab_name(job.incarnation);
        let created: io::Result<Slab> = (|| {
            self.disk.remove(&name)?;
            let file = self.disk.open(&name)?;
            file.reserve(need)?;
            let slab = Slab::create(file, self.disk.clone(), job.clone(), self.flusher.signals.clone())?;
            self.flusher.signals.synced(slab.file.sync())?;
            self.flusher.signals.synced(self.disk.sync_names())?;
            self.index.apply(&[Change::Job(Box::new(job.clone()))])?;
            Ok(slab)
        })();
        let slab = match created {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                // Others may have taken the room since it was looked for.
                self.disk.remove(&name).map_err(|error| broken(&error))?;
                return Err(rules::storage_full(&job, need, self.disk.free().unwrap_or(0)));
            }
            created => created.map_err(|error| broken(&error))?,
        };
        slabs.insert(job.incarnation, Arc::new(slab));
        Ok(())
    }

    fn open_rounds(
        &self,
        after: Option<(Incarnation, ShardIndex)>,
        limit: u32,
    ) -> Result<Vec<OpenRound>, StoreError> {
        let slabs: Vec<_> = match after {
            Some((job, _)) => self.slabs().range(job..).map(|(_, slab)| slab.clone()).collect(),
            None => self.slabs().values().cloned().collect(),
        };
        let (limit, mut page) = (limit.min(limits::MAX_OPEN_ROUNDS) as usize, Vec::new());
        for slab in slabs.iter().filter(|slab| !slab.is_lost()) {
            let from =
                after.filter(|(job, _)| *job == slab.job.incarnation).map_or(0, |(_, shard)| shard + 1);
            slab.open_rounds(from, &mut page, limit)?;
        }
        Ok(page)
    }

    /// Refuses what would leave too little of the disk.
    fn check_room(&self, job: &StoreJob, need: u64) -> Result<(), StoreError> {
        let free = self.disk.free().map_err(|error| broken(&error))?;
        if free < need.saturating_add(self.reserve_bytes) {
            return Err(rules::storage_full(job, need.saturating_add(self.reserve_bytes), free));
        }
        Ok(())
    }

    fn delete(&self, job: Incarnation) -> Result<(), StoreError> {
        // A cycle under way would write pointers of the job after they have been removed.
        let removed: io::Result<()> = self.flusher.between(|| {
            self.slabs().remove(&job);
            // Also of a job that is not known: an earlier attempt may have failed half way. Its open rounds first, since
            // the slab is what a deletion that was cut short is found by.
            self.disk.remove(&partial_file(job))?;
            self.disk.remove(&slab_name(job))?;
            self.flusher.signals.synced(self.disk.sync_names())?;
            self.index.apply(&[Change::Remove(job)])?;
            Ok(())
        });
        removed.map_err(|error| broken(&error))
    }
}

fn slab_name(job: Incarnation) -> String {
    format!("{job}{SLAB_SUFFIX}")
}

/// Reads the directory's identity, or gives an empty directory one.
fn identity(disk: &dyn Disk) -> io::Result<StoreId> {
    let file: Arc<dyn DiskFile> = disk.open(IDENTITY)?;
    if file.is_empty()? {
        let id = StoreId::random();
        file.write_at(&[id.to_string().as_bytes()], 0)?;
        file.sync()?;
        disk.sync_names()?;
        return Ok(id);
    }
    let mut text = [0; 32];
    file.read_at(&mut text, 0)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    text.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{IDENTITY}: {error}")))
}

#[async_trait]
impl ShardStore for LocalStore {
    async fn create(&self, job: StoreJob) -> Result<(), StoreError> {
        self.blocking(|inner| inner.create(job)).await
    }

    async fn upload(
        &self,
        job: Incarnation,
        upload: Incarnation,
        shard: ShardIndex,
        parameters: Bytes,
    ) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.slab(job)?.upload(upload, shard, &parameters)).await
    }

    async fn activate(&self, job: Incarnation, upload: Incarnation) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.slab(job)?.activate(upload)).await
    }

    async fn heads(&self, job: Incarnation, first: ShardIndex, count: u32) -> Result<Vec<Head>, StoreError> {
        let (heads, ticket) = self.blocking(move |inner| inner.slab(job)?.heads(first, count)).await?;
        self.covered(ticket).await?;
        Ok(heads)
    }

    async fn fetch(
        &self,
        job: Incarnation,
        shard: ShardIndex,
        slots: bool,
    ) -> Result<ShardState, StoreError> {
        let (state, ticket) = self.blocking(move |inner| inner.slab(job)?.fetch(shard, slots)).await?;
        self.covered(ticket).await?;
        Ok(state)
    }

    async fn fetch_head(&self, job: Incarnation, shard: ShardIndex) -> Result<Standing, StoreError> {
        let (found, ticket) = self.blocking(move |inner| inner.slab(job)?.fetch_head(shard)).await?;
        self.covered(ticket).await?;
        Ok(found)
    }

    async fn commit(&self, commit: Commit, state: Bytes) -> Result<CommitOutcome, StoreError> {
        let (round, shard, begun) = ((commit.job, commit.ledger.round), commit.shard, Instant::now());
        loop {
            let (again, bytes) = (commit.clone(), state.clone());
            // Taken before the attempt, so that a cycle that ends meanwhile is not missed.
            let mut cycles = self.inner.flusher.covered();
            let written = self.blocking(move |inner| inner.slab(again.job)?.commit(again, &bytes)).await?;
            match written {
                Written::Done(outcome, ticket) => {
                    self.inner.spans.ended(round, Stage::Write, shard, None, begun);
                    let begun = Instant::now();
                    // The loser of a race sees the winner's state: that must be durable just as well.
                    self.covered(ticket).await?;
                    self.inner.spans.ended(round, Stage::Flush, shard, None, begun);
                    metrics::committed(&outcome, state.len());
                    return Ok(outcome);
                }
                Written::NoSlot => {
                    metrics::slot_wait();
                    if self.has_failed() {
                        return Err(StoreError::Unavailable("the store's disk failed".to_owned()));
                    }
                    self.inner.flusher.demand();
                    let _ = tokio::time::timeout(Duration::from_secs(1), cycles.changed()).await;
                }
            }
        }
    }

    async fn commit_partial(&self, commit: PartialCommit, fold: Bytes) -> Result<CommitOutcome, StoreError> {
        let work = move |inner: &Inner| inner.slab(commit.job)?.commit_partial(commit, &fold);
        let (outcome, ticket) = self.blocking(work).await?;
        self.covered(ticket).await?;
        metrics::committed_partial(&outcome);
        Ok(outcome)
    }

    async fn fetch_partial(
        &self,
        job: Incarnation,
        shard: ShardIndex,
    ) -> Result<Option<OpenFold>, StoreError> {
        let (open, ticket) = self.blocking(move |inner| inner.slab(job)?.fetch_partial(shard)).await?;
        self.covered(ticket).await?;
        Ok(open)
    }

    async fn open_rounds(
        &self,
        after: Option<(Incarnation, ShardIndex)>,
        limit: u32,
    ) -> Result<Vec<OpenRound>, StoreError> {
        self.blocking(move |inner| inner.open_rounds(after, limit)).await
    }

    async fn fence(&self, job: Incarnation, epoch: Epoch, from_round: Round) -> Result<Version, StoreError> {
        self.blocking(move |inner| inner.slab(job)?.fence(epoch, from_round)).await
    }

    async fn delete(&self, job: Incarnation) -> Result<(), StoreError> {
        self.blocking(move |inner| inner.delete(job)).await
    }

    async fn hold(&self, job: Incarnation, hold: Incarnation) -> Result<(Version, bool), StoreError> {
        self.blocking(move |inner| {
            let slab = inner.any_slab(job)?;
            // It may make the file grow by one slot a shard.
            inner.check_room(&slab.job, slab.hold_bytes())?;
            slab.hold(hold)
        })
        .await
    }

    async fn fetch_held(
        &self,
        job: Incarnation,
        hold: Incarnation,
        shard: ShardIndex,
        slots: bool,
    ) -> Result<ShardState, StoreError> {
        let work = move |inner: &Inner| inner.any_slab(job)?.fetch_held(hold, shard, slots);
        let (state, ticket) = self.blocking(work).await?;
        self.covered(ticket).await?;
        Ok(state)
    }

    async fn release(&self, job: Incarnation, hold: Incarnation) -> Result<(), StoreError> {
        self.blocking(move |inner| {
            if let Ok(slab) = inner.any_slab(job) {
                slab.release(hold);
            }
            Ok(())
        })
        .await
    }

    async fn list(&self) -> Result<Vec<StoreJob>, StoreError> {
        Ok(self.inner.slabs().values().map(|slab| slab.job.clone()).collect())
    }
}

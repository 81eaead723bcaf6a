//! One job's slab file: a superblock and a pool of slots, three a shard and a few shared (rule P22).
//!
//! A slot is never overwritten while it is *current*, *under flush*, *durable*, or the copy that the
//! next consistent cut of a `process` job needs. What is left is free; when nothing is, the commit
//! waits for the flush cycle.

mod cycle;
mod hold;
mod partial;
mod pool;
mod superblock;

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use thalweg_protocol::{
    Commit, CommitOutcome, Durability, ErrorCode, Head, Incarnation, Init, ShardIndex, StoreJob, Version,
};

use crate::{
    ShardState, Standing, StoreError,
    disk::{Disk, DiskFile},
    flush::Signals,
    metrics,
    mutation::{Bug, is_planted},
    rules::{self, Admission},
    slot::{self, SlotGeometry, SlotHeader},
};
use partial::Partials;
pub(crate) use partial::file_name as partial_file;
use pool::{Common, Shard, Slot};
use superblock::{SUPERBLOCKS, Superblock};

/// A job's slab, open.
#[derive(Debug)]
pub(crate) struct Slab {
    pub(crate) job: StoreJob,
    pub(crate) file: Arc<dyn DiskFile>,
    geometry: SlotGeometry,
    shards: Vec<Mutex<Shard>>,
    /// Taken after a shard's lock, never before.
    common: Mutex<Common>,
    /// Held while an upload or an activation works, before any shard's lock: an activation must find
    /// the very shards that it has checked.
    staging: Mutex<()>,
    /// Written since the last flush cycle looked.
    pub(crate) dirty: AtomicBool,
    /// Held for reading by every commit, before its shard's lock: a fence must not pass one that has
    /// looked at the fences but has not written yet.
    fencing: RwLock<()>,
    /// State was lost (rule P27); the superblock says how.
    lost: AtomicBool,
    /// Open rounds.
    partials: Partials,
    signals: Arc<Signals>,
}

/// How far a commit got.
#[derive(Debug)]
pub(crate) enum Written {
    /// Decided; durable once the flush cycle covers the ticket.
    Done(CommitOutcome, u64),
    /// No slot is free before the next flush cycle.
    NoSlot,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two related writes under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An input or output error: the store can no longer vouch for this file.
pub(crate) fn broken(error: &io::Error) -> StoreError {
    if error.kind() == io::ErrorKind::StorageFull {
        // Nothing is broken: the same again succeeds once there is room.
        tracing::warn!("the store's disk is full");
        return StoreError::Unavailable("the store's disk is full: make room, and it goes on".to_owned());
    }
    tracing::error!(%error, "slab input or output failed");
    StoreError::refused(ErrorCode::Internal, format!("the store's disk failed: {error}; see the store's log"))
}

impl Slab {
    fn parts(job: &StoreJob) -> (u32, u32) {
        let shards = job.layout.shards();
        (shards, (shards / 10).max(4))
    }

    /// Bytes of a job's file.
    pub(crate) fn bytes_of(job: &StoreJob) -> u64 {
        let (shards, spares) = Self::parts(job);
        SUPERBLOCKS + (3 * u64::from(shards) + u64::from(spares)) * SlotGeometry::of(job).slot
    }

    /// Bytes of one version of all its shards.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.job.layout.elements * 4 * (1 + u64::from(self.job.slots))
    }

    /// Bytes by which a hold may make the file grow.
    pub(crate) fn hold_bytes(&self) -> u64 {
        u64::from(self.job.layout.shards()) * self.geometry.slot
    }

    /// Creates a slab in an empty file. The caller syncs file and directory.
    pub(crate) fn create(
        file: Arc<dyn DiskFile>,
        disk: Arc<dyn Disk>,
        job: StoreJob,
        signals: Arc<Signals>,
    ) -> io::Result<Self> {
        let (shards, spares) = Self::parts(&job);
        let slab = Self {
            geometry: SlotGeometry::of(&job),
            shards: (0..shards)
                .map(|shard| {
                    let slots = (3 * shard..3 * shard + 3).map(Slot::empty).collect();
                    Mutex::new(Shard { slots, ..Shard::default() })
                })
                .collect(),
            common: Mutex::new(Common {
                superblock: Superblock::new(job.clone()),
                spares: (3 * shards..3 * shards + spares).collect(),
                versions: BTreeMap::from([(job.first_version, shards)]),
                pinning: None,
                holds: Vec::new(),
                slots: 3 * shards + spares,
            }),
            staging: Mutex::new(()),
            dirty: AtomicBool::new(false),
            fencing: RwLock::new(()),
            lost: AtomicBool::new(false),
            partials: Partials::new(disk, &job),
            signals,
            job,
            file,
        };
        lock(&slab.common).superblock.write(&*slab.file)?;
        Ok(slab)
    }

    /// Opens a slab; `None` when the file has no whole superblock (a creation cut short).
    pub(crate) fn open(
        file: Arc<dyn DiskFile>,
        disk: Arc<dyn Disk>,
        signals: Arc<Signals>,
    ) -> io::Result<Option<Self>> {
        let Some(superblock) = Superblock::read(&*file)? else { return Ok(None) };
        let job = superblock.job.clone();
        let geometry = SlotGeometry::of(&job);
        let (shard_count, spare_count) = Self::parts(&job);
        let mut shards: Vec<Shard> = (0..shard_count).map(|_| Shard::default()).collect();
        let mut spares = Vec::new();
        // Holds may have made the file longer than a new one.
        let in_file = (file.len()?.saturating_sub(SUPERBLOCKS)).div_ceil(geometry.slot);
        let slots = (3 * shard_count + spare_count).max(u32::try_from(in_file).unwrap_or(u32::MAX));
        for index in 0..slots {
            let offset = SUPERBLOCKS + u64::from(index) * geometry.slot;
            let header = slot::read_header::<SlotHeader>(&*file, geometry, offset)?
                .filter(|header| header.job == job.incarnation && header.shard < shard_count);
            let home = index / 3;
            match header {
                // A spare belongs to the shard that last wrote it, a home slot always to its own.
                Some(header) if index >= 3 * shard_count || header.shard == home => {
                    let shard = &mut shards[header.shard as usize];
                    shard.generation = shard.generation.max(header.generation);
                    shard.slots.push(Slot { index, header: Some(header), verified: false });
                }
                _ if index >= 3 * shard_count => spares.push(index),
                _ => shards[home as usize].slots.push(Slot::empty(index)),
            }
        }
        let active = superblock.active;
        let mut versions = BTreeMap::new();
        for shard in &mut shards {
            shard.current = shard.newest(&job, active);
            let first = job.first_version;
            *versions
                .entry(shard.current_header().map_or(first, |header| header.head.version))
                .or_insert(0) += 1;
        }
        let lost = AtomicBool::new(superblock.lost.is_some());
        let slab = Self {
            geometry,
            shards: shards.into_iter().map(Mutex::new).collect(),
            common: Mutex::new(Common {
                superblock,
                spares,
                versions,
                pinning: None,
                holds: Vec::new(),
                slots,
            }),
            staging: Mutex::new(()),
            dirty: AtomicBool::new(true),
            fencing: RwLock::new(()),
            lost,
            partials: Partials::new(disk, &job),
            signals,
            job,
            file,
        };
        slab.find_open_rounds()?;
        if slab.job.init == Init::Upload && active.is_none() {
            slab.find_staged()?;
        }
        Ok(Some(slab))
    }

    /// Changes the superblock on disk, then in memory. Nothing is synced.
    fn change_superblock(&self, common: &mut Common, change: impl FnOnce(&mut Superblock)) -> io::Result<()> {
        let mut superblock = common.superblock.clone();
        change(&mut superblock);
        superblock.write(&*self.file)?;
        common.superblock = superblock;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.signals.synced(self.file.sync())
    }

    /// Fails the job for good: state that others may have seen is not there any more (rule P27).
    pub(crate) fn lose(&self, how: &str) -> io::Result<()> {
        tracing::error!(job = %self.job.key, how, "a job has lost state");
        self.change_superblock(&mut lock(&self.common), |superblock| superblock.lost = Some(how.to_owned()))?;
        self.lost.store(true, Ordering::SeqCst);
        self.sync()
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Refuses a job that has lost state.
    pub(crate) fn check_lost(&self) -> Result<(), StoreError> {
        if !self.is_lost() {
            return Ok(());
        }
        let how = lock(&self.common).superblock.lost.clone().unwrap_or_default();
        let text = format!(
            "job {} cannot go on: {how}; delete it and start it again from a checkpoint, or use durability = disk",
            self.job.key
        );
        Err(StoreError::refused(ErrorCode::Diverged, text))
    }

    fn offset(&self, slot: u32) -> u64 {
        SUPERBLOCKS + u64::from(slot) * self.geometry.slot
    }

    fn shard(&self, shard: ShardIndex) -> Result<MutexGuard<'_, Shard>, StoreError> {
        rules::check_shape(&self.job, shard, 0, 0)?;
        Ok(lock(&self.shards[shard as usize]))
    }

    /// Finds the current slot, checking its bytes before their first use; torn ones are set aside.
    fn verify(&self, shard: &mut Shard) -> Result<(), StoreError> {
        while let Some(current) = shard.current {
            let first = self.job.first_version;
            let version = shard.current_header().map_or(first, |header| header.head.version);
            if self.check_slot(shard, current).map_err(|error| broken(&error))? {
                break;
            }
            let mut common = lock(&self.common);
            let active = common.superblock.active;
            shard.current = shard.newest(&self.job, active);
            common.moved(version, shard.current_header().map_or(first, |header| header.head.version));
        }
        Ok(())
    }

    /// Whether a slot is whole; one that is not is set aside.
    fn check_slot(&self, shard: &mut Shard, index: u32) -> io::Result<bool> {
        let Some(slot) = shard.slots.iter_mut().find(|slot| slot.index == index) else { return Ok(false) };
        let Some(header) = slot.header.as_ref().filter(|_| !slot.verified) else {
            return Ok(slot.header.is_some());
        };
        let whole = slot::read_state(&*self.file, self.geometry, self.offset(index), header)?.is_some()
            || is_planted(Bug::TrustTorn);
        slot.verified = true;
        if !whole {
            tracing::warn!(job = %self.job.key, shard = header.shard, generation = header.generation, "torn slot set aside");
            metrics::torn_slot();
            slot.header = None;
        }
        Ok(whole)
    }

    fn head_of(&self, shard: &Shard, index: ShardIndex) -> Result<Head, StoreError> {
        match shard.current_header() {
            Some(header) => Ok(header.head),
            None if self.job.init == Init::Zeros => Ok(rules::zero_head(&self.job, index)),
            None => Err(rules::not_ready(&self.job)),
        }
    }

    /// The newest commit of a shard as readers must wait for it (rule P1).
    fn ticket(&self, shard: &Shard) -> u64 {
        match self.job.durability {
            Durability::Process => 0,
            Durability::Disk => shard.ticket,
        }
    }

    /// Heads, and the ticket to wait for before anybody sees them.
    pub(crate) fn heads(&self, first: ShardIndex, count: u32) -> Result<(Vec<Head>, u64), StoreError> {
        let end = first.saturating_add(count).min(self.job.layout.shards());
        if self.job.init == Init::Upload && lock(&self.common).superblock.active.is_none() {
            return Err(rules::not_ready(&self.job));
        }
        let mut ticket = 0;
        let heads = (first..end).map(|index| {
            let mut shard = self.shard(index)?;
            self.verify(&mut shard)?;
            ticket = ticket.max(self.ticket(&shard));
            self.head_of(&shard, index)
        });
        let heads = heads.collect::<Result<_, _>>()?;
        Ok((heads, ticket))
    }

    /// As [`Self::fetch`], without the values and with the open round.
    pub(crate) fn fetch_head(&self, index: ShardIndex) -> Result<(Standing, u64), StoreError> {
        let mut shard = self.shard(index)?;
        self.verify(&mut shard)?;
        let (head, partial) = self.standing(&mut shard, index)?;
        let ledger = shard.current_header().map_or_else(rules::empty_ledger, |header| header.ledger.clone());
        Ok((Standing { head, ledger, partial }, self.ticket(&shard)))
    }

    /// One shard, and the ticket to wait for before anybody sees it.
    pub(crate) fn fetch(&self, index: ShardIndex, slots: bool) -> Result<(ShardState, u64), StoreError> {
        let mut shard = self.shard(index)?;
        self.verify(&mut shard)?;
        let head = self.head_of(&shard, index)?;
        let wanted = if slots { self.job.state_bytes(index) } else { self.job.parameter_bytes(index) };
        let Some(current) = shard.current else {
            let values = vec![0; wanted].into();
            return Ok((ShardState { head, ledger: rules::empty_ledger(), values }, 0));
        };
        Ok((self.read_slot(&shard, current, wanted)?, self.ticket(&shard)))
    }

    /// Copies the first `wanted` bytes of a slot that was checked. Under its shard's lock (rule P26): no later commit
    /// can reuse the slot meanwhile.
    fn read_slot(&self, shard: &Shard, slot: u32, wanted: usize) -> Result<ShardState, StoreError> {
        let Some(header) = shard.header_of(Some(slot)) else { return Err(rules::not_ready(&self.job)) };
        let mut values = vec![0; wanted];
        let offset = self.offset(slot) + self.geometry.header_area as u64;
        self.file.read_at(&mut values, offset).map_err(|error| broken(&error))?;
        Ok(ShardState { head: header.head, ledger: header.ledger.clone(), values: values.into() })
    }

    pub(crate) fn commit(&self, commit: Commit, state: &[u8]) -> Result<Written, StoreError> {
        rules::check_shape(&self.job, commit.shard, state.len(), self.job.state_bytes(commit.shard))?;
        rules::check_ledger(&self.job, &commit.ledger)?;
        let _unfenced = self.fencing.read().unwrap_or_else(PoisonError::into_inner);
        let mut shard = self.shard(commit.shard)?;
        self.verify(&mut shard)?;
        let (current, _) = self.standing(&mut shard, commit.shard)?;
        let fences = lock(&self.common).superblock.fences.clone();
        let (next, state_checksum) = match rules::admit(&current, &fences, &commit, state) {
            Admission::Done(outcome) => {
                if matches!(outcome, CommitOutcome::Conflict(_))
                    && let Some(stored) = shard.current_header().map(|header| header.state_checksum)
                    && rules::other_bits(&current, stored, &commit)
                {
                    metrics::other_bits(&self.job.key, &commit);
                }
                return Ok(Written::Done(outcome, self.ticket(&shard)));
            }
            Admission::Write { next, state_checksum } => (next, state_checksum),
        };
        let free = shard.free_slot(&mut lock(&self.common), &self.job);
        let Some(index) = free else { return Ok(Written::NoSlot) };
        let header = SlotHeader {
            job: self.job.incarnation,
            shard: commit.shard,
            generation: shard.generation + 1,
            origin: shard.current_header().and_then(|header| header.origin),
            head: next,
            ledger: commit.ledger,
            durability: self.job.durability,
            state_bytes: state.len() as u64,
            state_checksum,
        };
        self.write_slot(&mut shard, index, header, state)?;
        shard.current = Some(index);
        lock(&self.common).moved(current.version, next.version);
        self.dirty.store(true, Ordering::SeqCst);
        self.signals.unsynced.fetch_add(state.len() as u64, Ordering::SeqCst);
        shard.ticket = self.signals.accepted.fetch_add(1, Ordering::SeqCst) + 1;
        Ok(Written::Done(CommitOutcome::Committed(next), self.ticket(&shard)))
    }

    fn write_slot(
        &self,
        shard: &mut Shard,
        index: u32,
        header: SlotHeader,
        state: &[u8],
    ) -> Result<(), StoreError> {
        // Used up even if the write fails half way: the next one must be told apart from its remains.
        shard.generation = header.generation;
        let result = slot::write(&*self.file, self.geometry, self.offset(index), &header, state);
        if let Some(slot) = shard.slots.iter_mut().find(|slot| slot.index == index) {
            slot.header = result.is_ok().then_some(header);
            slot.verified = true;
        }
        result.map_err(|error| broken(&error))
    }

    pub(crate) fn upload(
        &self,
        upload: Incarnation,
        index: ShardIndex,
        uploaded: &[u8],
    ) -> Result<(), StoreError> {
        let (state, head, state_checksum) = rules::first_state(&self.job, upload, index, uploaded)?;
        let _staging = lock(&self.staging);
        let mut shard = self.shard(index)?;
        let active = lock(&self.common).superblock.active;
        match active {
            Some(active) if active == upload => return Ok(()),
            None if self.job.init == Init::Upload => {}
            _ => {
                let text = format!("job {} has initial parameters already", self.job.key);
                return Err(StoreError::refused(ErrorCode::SpecMismatch, text));
            }
        }
        let slot = match shard.staged {
            Some(slot) => slot,
            None => shard.free_slot(&mut lock(&self.common), &self.job).ok_or_else(|| {
                StoreError::Unavailable("no free slot for the upload before the next flush cycle".to_owned())
            })?,
        };
        let header = SlotHeader {
            job: self.job.incarnation,
            shard: index,
            generation: shard.generation + 1,
            origin: Some(upload),
            head,
            ledger: rules::empty_ledger(),
            durability: self.job.durability,
            state_bytes: state.len() as u64,
            state_checksum,
        };
        shard.staged = Some(slot);
        self.write_slot(&mut shard, slot, header, &state)
    }

    /// Makes an upload current. Syncs at once whatever the level: it happens once in a job's life.
    pub(crate) fn activate(&self, upload: Incarnation) -> Result<(), StoreError> {
        let _staging = lock(&self.staging);
        let active = lock(&self.common).superblock.active;
        match active {
            Some(active) if active == upload => return Ok(()),
            None if self.job.init == Init::Upload => {}
            _ => {
                let text = format!("job {} has initial parameters already", self.job.key);
                return Err(StoreError::refused(ErrorCode::SpecMismatch, text));
            }
        }
        for index in 0..self.job.layout.shards() {
            let shard = self.shard(index)?;
            if shard.staged_header().and_then(|header| header.origin) != Some(upload) {
                return Err(rules::not_ready(&self.job));
            }
        }
        let active: io::Result<()> = (|| {
            self.sync()?;
            self.change_superblock(&mut lock(&self.common), |superblock| superblock.active = Some(upload))?;
            self.sync()
        })();
        active.map_err(|error| broken(&error))?;
        for index in 0..self.job.layout.shards() {
            let mut shard = self.shard(index)?;
            shard.current = shard.staged.take();
        }
        self.dirty.store(true, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn fence(&self, epoch: u64, from_round: u64) -> Result<Version, StoreError> {
        let _no_commit = self.fencing.write().unwrap_or_else(PoisonError::into_inner);
        let mut common = lock(&self.common);
        let mut fences = common.superblock.fences.clone();
        fences.add(from_round, epoch, common.cut());
        if fences != common.superblock.fences {
            let mut fenced = self.change_superblock(&mut common, |superblock| superblock.fences = fences);
            if self.job.durability == Durability::Disk {
                fenced = fenced.and_then(|()| self.sync());
            }
            fenced.map_err(|error| broken(&error))?;
        }
        Ok(common.versions.last_key_value().map_or(0, |(version, _)| *version))
    }
}

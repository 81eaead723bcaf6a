//! Open rounds: what has been folded towards the next version of a shard (rule P12).
//!
//! They have a file of their own, made with the job's first partial commit: two slots a shard, written in turn, so
//! that the newest whole one survives the next write whatever happens to it. A slot is a header area and the
//! suspended fold, as in [`crate::slot`]; it counts while the shard stands at the version it builds on. Nothing has to
//! be removed when the round closes.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thalweg_protocol::{
    CommitOutcome, Durability, Head, Incarnation, OpenRound, Partial, PartialCommit, ShardIndex, StoreJob,
    checksum, limits,
};

use super::{Slab, broken, lock, pool::Shard};
use crate::{
    OpenFold, StoreError,
    disk::{Disk, DiskFile},
    metrics,
    rules::{self, PartialAdmission},
    slot::{self, PAGE, SlotGeometry},
};

/// Name of the file of a job's open rounds.
pub(crate) fn file_name(job: Incarnation) -> String {
    format!("{job}.partial")
}

/// The file, once it is there.
#[derive(Debug)]
pub(super) struct Partials {
    disk: Arc<dyn Disk>,
    name: String,
    file: OnceLock<Arc<dyn DiskFile>>,
    geometry: SlotGeometry,
}

/// What a slot of an open round says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartialHeader {
    job: Incarnation,
    shard: ShardIndex,
    /// Grows with every write of the shard; its lowest bit is the slot.
    generation: u64,
    /// Where the shard stands with it.
    head: Head,
    partial: Partial,
    bytes: u64,
    checksum: u64,
}

/// An open round in memory.
#[derive(Clone, Debug)]
pub(super) struct Open {
    header: PartialHeader,
    /// Its bytes were found whole.
    verified: bool,
}

impl Partials {
    pub(super) fn new(disk: Arc<dyn Disk>, job: &StoreJob) -> Self {
        let header_area = SlotGeometry::of(job).header_area;
        let fold = (job.parameter_bytes(0) + limits::PARTIAL_OVERHEAD_BYTES).next_multiple_of(PAGE);
        let geometry = SlotGeometry { header_area, slot: (header_area + fold) as u64 };
        Self { disk, name: file_name(job.incarnation), file: OnceLock::new(), geometry }
    }

    fn offset(&self, shard: ShardIndex, generation: u64) -> u64 {
        (2 * u64::from(shard) + generation % 2) * self.geometry.slot
    }

    /// The file, made if it is not there.
    fn make(&self) -> io::Result<&Arc<dyn DiskFile>> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        // Two at once open the same file.
        let file = self.disk.open(&self.name)?;
        self.disk.sync_names()?;
        Ok(self.file.get_or_init(|| file))
    }

    /// What is in the slots of a shard, not yet verified.
    fn read(&self, job: Incarnation, shard: ShardIndex) -> io::Result<Vec<Open>> {
        let Some(file) = self.file.get() else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for copy in 0..2 {
            let header =
                slot::read_header::<PartialHeader>(&**file, self.geometry, self.offset(shard, copy))?;
            let header = header
                .filter(|header| (header.job, header.shard, header.generation % 2) == (job, shard, copy));
            found.extend(header.map(|header| Open { header, verified: false }));
        }
        Ok(found)
    }

    fn fold_of(&self, header: &PartialHeader) -> io::Result<Option<Bytes>> {
        let Some(file) = self.file.get() else { return Ok(None) };
        let offset = self.offset(header.shard, header.generation);
        slot::read_body(&**file, self.geometry, offset, (header.bytes, header.checksum))
    }

    fn write(&self, header: &PartialHeader, fold: &[u8]) -> io::Result<()> {
        let offset = self.offset(header.shard, header.generation);
        slot::write(&**self.make()?, self.geometry, offset, header, fold)
    }

    /// Makes what was written survive power loss.
    fn sync(&self) -> io::Result<()> {
        self.file.get().map_or(Ok(()), |file| file.sync())
    }
}

impl Slab {
    /// Finds the open rounds that were there before.
    pub(super) fn find_open_rounds(&self) -> io::Result<()> {
        if !self.partials.disk.list()?.contains(&self.partials.name) {
            return Ok(());
        }
        self.partials.make()?;
        for (index, shard) in (0..).zip(&self.shards) {
            lock(shard).open = self.partials.read(self.job.incarnation, index)?;
        }
        Ok(())
    }

    /// Of a `disk` job, writes again and syncs what may be in the kernel's cache only (rule P25).
    pub(super) fn rewrite_open_rounds(&self) -> io::Result<()> {
        if self.partials.file.get().is_none() || self.job.durability != Durability::Disk {
            return Ok(());
        }
        for shard in &self.shards {
            for open in &lock(shard).open {
                if let Some(fold) = self.partials.fold_of(&open.header)? {
                    self.partials.write(&open.header, &fold)?;
                }
            }
        }
        self.sync_partials()
    }

    /// Makes all open rounds survive power loss.
    pub(crate) fn sync_partials(&self) -> io::Result<()> {
        self.signals.synced(self.partials.sync())
    }

    /// The open round of a shard that stands at `current`, if it has one that counts. Torn ones are set aside.
    fn open_round<'a>(
        &self,
        shard: &'a mut Shard,
        current: &Head,
    ) -> Result<Option<&'a PartialHeader>, StoreError> {
        while let Some(at) = newest(&shard.open) {
            let open = &mut shard.open[at];
            if !open.verified
                && self.partials.fold_of(&open.header).map_err(|error| broken(&error))?.is_none()
            {
                tracing::warn!(job = %self.job.key, shard = open.header.shard, "torn partial commit set aside");
                metrics::torn_slot();
                shard.open.swap_remove(at);
                continue;
            }
            open.verified = true;
            break;
        }
        let Some(at) = newest(&shard.open) else { return Ok(None) };
        let header = &shard.open[at].header;
        let needed = lock(&self.common).superblock.fences.needed(current.version + 1);
        Ok((header.head.closed() == *current && header.partial.since >= needed).then_some(header))
    }

    /// Where a shard stands, its open round included.
    pub(super) fn standing(
        &self,
        shard: &mut Shard,
        index: ShardIndex,
    ) -> Result<(Head, Option<Partial>), StoreError> {
        let current = self.head_of(shard, index)?;
        let open = self.open_round(shard, &current)?;
        Ok(open.map_or((current, None), |open| (open.head, Some(open.partial.clone()))))
    }

    /// The open round of a shard with its suspended fold, and the ticket to wait for before anybody sees it.
    pub(crate) fn fetch_partial(&self, index: ShardIndex) -> Result<(Option<OpenFold>, u64), StoreError> {
        let mut shard = self.shard(index)?;
        self.verify(&mut shard)?;
        let (current, ticket) = (self.head_of(&shard, index)?, self.ticket(&shard));
        let Some(header) = self.open_round(&mut shard, &current)? else { return Ok((None, ticket)) };
        let fold = self.partials.fold_of(header).map_err(|error| broken(&error))?;
        Ok((fold.map(|fold| (header.head, header.partial.clone(), fold)), ticket))
    }

    /// A partial commit. What was answered survives what the job's level promises at once: no flush cycle covers it.
    pub(crate) fn commit_partial(
        &self,
        commit: PartialCommit,
        fold: &[u8],
    ) -> Result<(CommitOutcome, u64), StoreError> {
        let most = self.job.parameter_bytes(commit.shard.min(self.job.layout.shards() - 1))
            + limits::PARTIAL_OVERHEAD_BYTES;
        rules::check_shape(&self.job, commit.shard, fold.len(), fold.len().min(most))?;
        rules::check_ledger(&self.job, &commit.partial.ledger)?;
        let _unfenced = self.fencing.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut shard = self.shard(commit.shard)?;
        self.verify(&mut shard)?;
        let (current, ticket) = (self.head_of(&shard, commit.shard)?, self.ticket(&shard));
        let fences = lock(&self.common).superblock.fences.clone();
        let checksum = checksum(&[fold]);
        let open = self.open_round(&mut shard, &current)?;
        let open = open.map(|open| (&open.head, &open.partial, open.checksum));
        match rules::admit_partial(&current, open, &fences, &commit, checksum) {
            PartialAdmission::Done(outcome) => return Ok((outcome, ticket)),
            PartialAdmission::Write => {}
        }
        let generation = newest(&shard.open).map_or(0, |at| shard.open[at].header.generation) + 1;
        let head = commit.expect.folded_on();
        let header = PartialHeader {
            job: self.job.incarnation,
            shard: commit.shard,
            generation,
            head,
            partial: commit.partial,
            bytes: fold.len() as u64,
            checksum,
        };
        // Whatever was in that slot is overwritten.
        shard.open.retain(|open| open.header.generation % 2 != generation % 2);
        let written: io::Result<()> = self.partials.write(&header, fold).and_then(|()| {
            if self.job.durability == Durability::Disk { self.sync_partials() } else { Ok(()) }
        });
        written.map_err(|error| broken(&error))?;
        shard.open.push(Open { header, verified: true });
        Ok((CommitOutcome::Committed(head), ticket))
    }

    /// Open rounds from a shard on, into a page.
    pub(crate) fn open_rounds(
        &self,
        from: ShardIndex,
        page: &mut Vec<OpenRound>,
        limit: usize,
    ) -> Result<(), StoreError> {
        if self.partials.file.get().is_none() {
            return Ok(());
        }
        for index in from..self.job.layout.shards() {
            if page.len() >= limit {
                break;
            }
            let mut shard = self.shard(index)?;
            if shard.open.is_empty() {
                continue;
            }
            self.verify(&mut shard)?;
            let current = self.head_of(&shard, index)?;
            if let Some(open) = self.open_round(&mut shard, &current)? {
                page.push(OpenRound {
                    job: self.job.incarnation,
                    key: self.job.key.clone(),
                    shard: index,
                    head: open.head,
                    first: open.partial.first,
                    counted: u32::try_from(open.partial.ledger.counted.len()).unwrap_or(u32::MAX),
                    roster_epoch: open.partial.ledger.roster_epoch,
                });
            }
        }
        Ok(())
    }
}

fn newest(open: &[Open]) -> Option<usize> {
    (0..open.len()).max_by_key(|&at| open[at].header.generation)
}

//! Which slots are whose, and which of them may be overwritten.

use std::collections::BTreeMap;

use thalweg_protocol::{Durability, Incarnation, Init, StoreJob, Version};

use super::{hold::Hold, partial::Open, superblock::Superblock};
use crate::{
    mutation::{Bug, is_planted},
    slot::SlotHeader,
};

/// What the shards of a job share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) superblock: Superblock,
    pub(super) spares: Vec<u32>,
    /// Number of shards at each version; the first key is the next cut.
    pub(super) versions: BTreeMap<Version, u32>,
    /// Versions that are being read.
    pub(super) holds: Vec<Hold>,
    /// Slots in the file.
    pub(super) slots: u32,
    /// The cut that a flush cycle is just collecting, while commits may already move the next one on.
    pub(super) pinning: Option<Version>,
}

impl Common {
    /// The least version of any shard.
    pub(super) fn cut(&self) -> Version {
        self.versions.first_key_value().map_or(0, |(version, _)| *version)
    }

    /// One slot more, while holds keep some from being written again: one a shard and hold at most.
    fn grow(&mut self) -> Option<u32> {
        let shards = self.superblock.job.layout.shards();
        let most = 3 * shards + self.first_spares() + shards * u32::try_from(self.holds.len()).ok()?;
        (self.slots < most).then(|| {
            self.slots += 1;
            self.slots - 1
        })
    }

    fn first_spares(&self) -> u32 {
        super::Slab::parts(&self.superblock.job).1
    }

    pub(super) fn moved(&mut self, from: Version, to: Version) {
        if let Some(count) = self.versions.get_mut(&from) {
            *count -= 1;
            if *count == 0 {
                self.versions.remove(&from);
            }
        }
        *self.versions.entry(to).or_insert(0) += 1;
    }
}

#[derive(Debug, Default)]
pub(super) struct Shard {
    pub(super) slots: Vec<Slot>,
    pub(super) current: Option<u32>,
    pub(super) flushing: Option<u32>,
    pub(super) durable: Option<u32>,
    pub(super) staged: Option<u32>,
    pub(super) generation: u64,
    /// Partial commits, of which the newest may count.
    pub(super) open: Vec<Open>,
    /// The newest commit's: durable once a flush cycle covers it.
    pub(super) ticket: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) index: u32,
    /// `None`: nothing whole in it.
    pub(super) header: Option<SlotHeader>,
    pub(super) verified: bool,
}

impl Slot {
    pub(super) fn empty(index: u32) -> Self {
        Self { index, header: None, verified: true }
    }

    /// Whether it holds `version` of the parameters in force.
    pub(super) fn holds(&self, version: Version, job: &StoreJob, active: Option<Incarnation>) -> bool {
        self.header
            .as_ref()
            .is_some_and(|header| header.head.version == version && counts(header, job, active))
    }
}

/// Whether a slot belongs to the parameters in force, not to an upload that has never been activated.
fn counts(header: &SlotHeader, job: &StoreJob, active: Option<Incarnation>) -> bool {
    job.init == Init::Zeros || (active.is_some() && header.origin == active)
}

impl Shard {
    pub(super) fn header_of(&self, index: Option<u32>) -> Option<&SlotHeader> {
        self.slots.iter().find(|slot| Some(slot.index) == index)?.header.as_ref()
    }

    pub(super) fn current_header(&self) -> Option<&SlotHeader> {
        self.header_of(self.current)
    }

    pub(super) fn staged_header(&self) -> Option<&SlotHeader> {
        self.header_of(self.staged)
    }

    fn newest_of(&self, wanted: impl Fn(&SlotHeader) -> bool) -> Option<u32> {
        let headers = self.slots.iter().filter_map(|slot| Some((slot.index, slot.header.as_ref()?)));
        let newest = headers.filter(|(_, header)| wanted(header)).max_by_key(|(_, header)| header.generation);
        newest.map(|(index, _)| index)
    }

    /// The newest slot of the parameters in force, by generation.
    pub(super) fn newest(&self, job: &StoreJob, active: Option<Incarnation>) -> Option<u32> {
        self.newest_of(|header| counts(header, job, active))
    }

    /// The newest slot that holds `version`.
    pub(super) fn newest_at(
        &self,
        version: Version,
        job: &StoreJob,
        active: Option<Incarnation>,
    ) -> Option<u32> {
        self.newest_of(|header| header.head.version == version && counts(header, job, active))
    }

    /// Versions in the slots.
    pub(super) fn versions<'a>(
        &'a self,
        job: &'a StoreJob,
        active: Option<Incarnation>,
    ) -> impl Iterator<Item = Version> + 'a {
        let headers = self.slots.iter().filter_map(|slot| slot.header.as_ref());
        headers.filter(move |header| counts(header, job, active)).map(|header| header.head.version)
    }

    /// The newest upload, where none has been activated.
    pub(super) fn newest_upload(&self) -> Option<u32> {
        self.newest_of(|header| header.origin.is_some())
    }

    /// A slot that nobody needs: one of the shard's own, else a shared one.
    pub(super) fn free_slot(&mut self, common: &mut Common, job: &StoreJob) -> Option<u32> {
        let cuts = match job.durability {
            Durability::Process => [Some(common.cut()), common.pinning],
            Durability::Disk => [None; 2],
        };
        let active = common.superblock.active;
        if is_planted(Bug::OverwriteDurable) && self.durable.is_some() {
            return self.durable;
        }
        let pinned = |slot: &Slot| {
            [self.current, self.flushing, self.durable, self.staged].contains(&Some(slot.index))
                // The copies that this cut and the next one need.
                || cuts.iter().flatten().any(|&cut| slot.holds(cut, job, active))
                || common.held().any(|version| slot.holds(version, job, active))
        };
        let free = self
            .slots
            .iter()
            .filter(|slot| !pinned(slot))
            .min_by_key(|slot| slot.header.as_ref().map_or(0, |header| header.generation))
            .map(|slot| slot.index);
        free.or_else(|| {
            let index = common.spares.pop().or_else(|| common.grow())?;
            self.slots.push(Slot::empty(index));
            Some(index)
        })
    }
}

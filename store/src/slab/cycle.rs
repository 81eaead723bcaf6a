//! The slab's side of a flush cycle, and of opening.

use std::io;

use thalweg_protocol::{Durability, ShardIndex};

use super::{Slab, lock, pool::Shard};
use crate::{StoreError, index::Durable, slot};

impl Slab {
    /// Pins what the flush cycle shall make durable: for `process` the least version of all shards, so
    /// that a consistent older version exists; for `disk`, and when the store closes, what is current.
    pub(crate) fn pin(&self, all_current: bool) -> Result<Vec<(ShardIndex, Durable)>, StoreError> {
        let (cut, active) = {
            let mut common = lock(&self.common);
            let cut = common.cut();
            common.pinning = Some(cut);
            (cut, common.superblock.active)
        };
        let mut pinned = Vec::new();
        let mut whole = true;
        for index in 0..self.job.layout.shards() {
            let mut shard = lock(&self.shards[index as usize]);
            self.verify(&mut shard)?;
            let slot = if all_current || self.job.durability == Durability::Disk {
                shard.slots.iter().find(|slot| Some(slot.index) == shard.current)
            } else {
                shard
                    .slots
                    .iter()
                    .filter(|slot| slot.holds(cut, &self.job, active))
                    .max_by_key(|slot| slot.header.as_ref().map(|header| header.generation))
            };
            let Some((slot, header)) = slot.and_then(|slot| Some((slot.index, slot.header.as_ref()?))) else {
                whole = false;
                continue;
            };
            if shard.durable != Some(slot) {
                pinned.push((
                    index,
                    Durable { slot, generation: header.generation, version: header.head.version },
                ));
                shard.flushing = Some(slot);
            }
        }
        if !whole && !all_current && self.job.durability == Durability::Process {
            // Part of a cut is none: the older one stays until all shards have a copy of a newer one.
            for (index, _) in pinned.drain(..) {
                lock(&self.shards[index as usize]).flushing = None;
            }
        }
        // From here on the slots are under flush.
        lock(&self.common).pinning = None;
        Ok(pinned)
    }

    /// Ends a flush cycle for what it pinned; slots that nobody needs any more go back to the pool.
    pub(crate) fn flushed(&self, pinned: &[(ShardIndex, Durable)]) {
        let home = 3 * self.job.layout.shards();
        for (index, durable) in pinned {
            let mut shard = lock(&self.shards[*index as usize]);
            shard.flushing = None;
            shard.durable = Some(durable.slot);
            let mut common = lock(&self.common);
            let (cut, active) = (common.cut(), common.superblock.active);
            let keep = [shard.current, shard.durable, shard.staged];
            let mut returned = Vec::new();
            shard.slots.retain(|slot| {
                let needed = slot.index < home
                    || keep.contains(&Some(slot.index))
                    || slot.holds(cut, &self.job, active)
                    || common.held().any(|version| slot.holds(version, &self.job, active));
                if !needed {
                    returned.push(slot.index);
                }
                needed
            });
            common.spares.append(&mut returned);
        }
    }

    /// After opening: remembers durable pointers that match what is in the slots; a shard that is older
    /// than its pointer has lost state. For `disk` jobs, rewrites every current slot that is newer, so
    /// that the first flush cycle covers it (rule P25).
    pub(crate) fn reconcile(&self, durable: impl Fn(ShardIndex) -> Option<Durable>) -> io::Result<()> {
        for index in 0..self.job.layout.shards() {
            let mut shard = lock(&self.shards[index as usize]);
            self.verify(&mut shard).map_err(io::Error::other)?;
            let generation = shard.current_header().map(|header| header.generation);
            if let Some(pointer) = durable(index) {
                if generation.is_none_or(|generation| generation < pointer.generation) {
                    drop(shard);
                    return self.lose(&format!(
                        "its slab file is damaged or older than the store's index: shard {index} has been at \
                         version {} and is not any more",
                        pointer.version
                    ));
                }
                let known = shard.slots.iter().any(|slot| {
                    slot.index == pointer.slot
                        && slot.header.as_ref().is_some_and(|header| header.generation == pointer.generation)
                });
                shard.durable = known.then_some(pointer.slot);
            }
            if self.job.durability != Durability::Disk || shard.durable == shard.current {
                continue;
            }
            if let Some(current) = shard.current {
                self.rewrite(&shard, current)?;
            }
        }
        self.rewrite_open_rounds()?;
        self.change_superblock(&mut lock(&self.common), |_| {})?;
        // No cycle covers the superblock, and what it says may be seen as soon as the store serves: at any level
        // that there is such a job, whose creation may have been cut short before it was synced.
        self.sync()
    }

    /// Finds the uploads that were stored before the file was opened again.
    pub(super) fn find_staged(&self) -> io::Result<()> {
        for shard in &self.shards {
            let mut shard = lock(shard);
            while let Some(index) = shard.newest_upload() {
                if self.check_slot(&mut shard, index)? {
                    self.rewrite(&shard, index)?;
                    shard.staged = Some(index);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Writes a slot again as it is: the kernel may hold it as clean without its bytes being on disk, for
    /// example after a sync that failed (rule P25).
    fn rewrite(&self, shard: &Shard, index: u32) -> io::Result<()> {
        let slot = shard.slots.iter().find(|slot| slot.index == index);
        let Some(header) = slot.and_then(|slot| slot.header.as_ref()) else { return Ok(()) };
        let offset = self.offset(index);
        match slot::read_state(&*self.file, self.geometry, offset, header)? {
            Some(state) => slot::write(&*self.file, self.geometry, offset, header, &state),
            None => Ok(()),
        }
    }
}

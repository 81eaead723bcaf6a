//! Holds: one version of all shards kept readable while rounds go on, for snapshots and for roll-backs.
//!
//! A hold costs nothing when it is taken: it pins the slots of its version, and where that leaves a shard without a
//! free slot the file grows by one. No commit copies anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use thalweg_protocol::{ErrorCode, Incarnation, Init, ShardIndex, Version, limits};

use super::{
    Slab, broken, lock,
    pool::{Common, Shard},
};
use crate::{ShardState, StoreError, rules};

/// A version that somebody is reading.
#[derive(Debug)]
pub(super) struct Hold {
    id: Incarnation,
    pub(super) version: Version,
    renewed: Instant,
}

impl Common {
    /// Versions that are being held.
    pub(super) fn held(&self) -> impl Iterator<Item = Version> + '_ {
        self.holds.iter().map(|hold| hold.version)
    }

    fn forget_old_holds(&mut self, now: Instant) {
        let term = Duration::from_secs(limits::HOLD_SECONDS);
        self.holds.retain(|hold| now.duration_since(hold.renewed) < term);
    }
}

impl Slab {
    /// Takes or renews a hold: the version it keeps, and whether all shards have it.
    pub(crate) fn hold(&self, id: Incarnation) -> Result<(Version, bool), StoreError> {
        if let Some(renewed) = self.renew(id)? {
            return Ok(renewed);
        }
        // Reads every slot there is, so only for a new one.
        let salvaged = if self.is_lost() { Some(self.newest_whole()?) } else { None };
        let mut common = lock(&self.common);
        if common.holds.len() >= limits::MAX_HOLDS {
            return Err(rules::too_many_holds(&self.job));
        }
        // Every shard stands there or will come by: none is further.
        let newest = common.versions.last_key_value().map_or(self.job.first_version, |(version, _)| *version);
        let version = salvaged.unwrap_or(newest);
        common.holds.push(Hold { id, version, renewed: Instant::now() });
        Ok((version, salvaged.is_some() || common.cut() >= version))
    }

    /// Renews a hold that is there.
    fn renew(&self, id: Incarnation) -> Result<Option<(Version, bool)>, StoreError> {
        let now = Instant::now();
        let mut common = lock(&self.common);
        if self.job.init == Init::Upload && common.superblock.active.is_none() {
            return Err(rules::not_ready(&self.job));
        }
        common.forget_old_holds(now);
        let Some(hold) = common.holds.iter_mut().find(|hold| hold.id == id) else { return Ok(None) };
        hold.renewed = now;
        let version = hold.version;
        Ok(Some((version, self.is_lost() || common.cut() >= version)))
    }

    pub(crate) fn release(&self, id: Incarnation) {
        lock(&self.common).holds.retain(|hold| hold.id != id);
    }

    /// One shard at the version of a hold, and the ticket to wait for before anybody sees it.
    pub(crate) fn fetch_held(
        &self,
        id: Incarnation,
        index: ShardIndex,
        slots: bool,
    ) -> Result<(ShardState, u64), StoreError> {
        let mut shard = self.shard(index)?;
        let (version, active) = {
            let mut common = lock(&self.common);
            let active = common.superblock.active;
            let hold = common.holds.iter_mut().find(|hold| hold.id == id);
            let Some(hold) = hold else { return Err(rules::unknown_hold(&self.job)) };
            hold.renewed = Instant::now();
            (hold.version, active)
        };
        let wanted = if slots { self.job.state_bytes(index) } else { self.job.parameter_bytes(index) };
        if let Some(slot) = self.whole_at(&mut shard, version, active)? {
            return Ok((self.read_slot(&shard, slot, wanted)?, self.ticket(&shard)));
        }
        let stands_at = shard.current_header().map_or(self.job.first_version, |header| header.head.version);
        if version == self.job.first_version && self.job.init == Init::Zeros {
            let head = rules::zero_head(&self.job, index);
            let values = vec![0; wanted].into();
            return Ok((ShardState { head, ledger: rules::empty_ledger(), values }, 0));
        }
        if stands_at < version {
            Err(rules::not_there_yet(index, version))
        } else {
            Err(rules::unknown_hold(&self.job))
        }
    }

    /// The newest whole slot of a version; torn ones are set aside.
    fn whole_at(
        &self,
        shard: &mut Shard,
        version: Version,
        active: Option<Incarnation>,
    ) -> Result<Option<u32>, StoreError> {
        while let Some(slot) = shard.newest_at(version, &self.job, active) {
            if self.check_slot(shard, slot).map_err(|error| broken(&error))? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// The newest version that every shard has whole, of a job that has lost rounds.
    fn newest_whole(&self) -> Result<Version, StoreError> {
        let active = lock(&self.common).superblock.active;
        let mut shards_with: BTreeMap<Version, u32> = BTreeMap::new();
        for index in 0..self.job.layout.shards() {
            let mut shard = self.shard(index)?;
            let versions: BTreeSet<_> = shard.versions(&self.job, active).collect();
            for version in versions {
                let whole = self.whole_at(&mut shard, version, active)?;
                *shards_with.entry(version).or_default() += u32::from(whole.is_some());
            }
            if self.job.init == Init::Zeros && shard.newest_at(0, &self.job, active).is_none() {
                *shards_with.entry(0).or_default() += 1;
            }
        }
        let shards = self.job.layout.shards();
        let newest = shards_with.iter().rev().find(|(_, with)| **with == shards).map(|(version, _)| *version);
        newest.ok_or_else(|| {
            let text = format!("job {}: no version is whole on all shards", self.job.key);
            StoreError::refused(ErrorCode::Diverged, text)
        })
    }
}

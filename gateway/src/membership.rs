//! Who is in a job: claims of ranks, leaving, and the rounds that nobody is left to complete (rules P4, P11).

use bytes::Bytes;
use thalweg_protocol::{
    Claim, Commit, CommitOutcome, ErrorCode, Incarnation, JobKey, JobRecord, JobState, Ledger, Roster, Round,
    Version, WireError, roster_key,
};

use crate::{
    jobs::{Jobs, MAX_CONFLICTS, busy, over, store_error, unavailable},
    roster,
};

impl Jobs {
    /// Claims a rank. Returns the roster that holds the claim; a job that has started is fenced, so that
    /// no round from the claimant's first one on can close without it (rule P4).
    pub(crate) async fn join(&self, claim: &Claim) -> Result<(JobRecord, Roster), WireError> {
        let key = &claim.worker.key;
        for _ in 0..MAX_CONFLICTS {
            let (record, revision_of_roster, roster) = self.read_for_change(key, claim.worker.job).await?;
            if let Some(error) = record.state.end(key) {
                return Err(error);
            }
            let versions = self.versions(&record).await;
            let versions = self.note_loss(&record, versions).await?;
            let claimed = roster::claim(&record, &roster, claim, versions)?;
            let roster = match claimed.roster {
                None => roster,
                Some(next) => {
                    if !self.put_roster(key, &next, revision_of_roster).await? {
                        continue;
                    }
                    next
                }
            };
            if let Some(version) = claimed.level {
                self.level(&record, &roster, version).await?;
            }
            if claimed.confirmed {
                return Ok((record, roster));
            }
            if let Some(roster) =
                self.fence(&record, roster, claim.worker.incarnation, claimed.from_round).await?
            {
                return Ok((record, roster));
            }
        }
        Err(busy("the roster"))
    }

    /// Fences a claimant's first round and confirms it; `None` when the roster changed meanwhile.
    async fn fence(
        &self,
        record: &JobRecord,
        mut roster: Roster,
        worker: Incarnation,
        mut from_round: Round,
    ) -> Result<Option<Roster>, WireError> {
        let key = &record.spec.key;
        let store = self.store(record);
        for _ in 0..MAX_CONFLICTS {
            let max = store.fence(record.incarnation, roster.epoch, from_round).await.map_err(store_error)?;
            let fenced = max < from_round;
            let versions = self.versions(record).await?;
            let next = if fenced {
                roster::confirm(&roster, worker)
            } else {
                // That round closed somewhere before the fence stood: count from a later one.
                roster::postpone(&roster, worker, versions)
            };
            let Some(next) = next else { return Ok(None) };
            let (known, revision) =
                self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
            if known.as_ref() != Some(&roster) || !self.put_roster(key, &next, revision).await? {
                return Ok(None);
            }
            if fenced {
                return Ok(Some(next));
            }
            if let Some(version) = roster::deserted(&next, versions) {
                self.level(record, &next, version).await?;
            }
            from_round = next.tenure(worker).map_or(from_round, |tenure| tenure.from_round);
            roster = next;
        }
        Err(busy("the job's rounds"))
    }

    /// Takes a worker off its roster; rounds that are open no longer wait for it. `Ok` when it was not
    /// on it.
    pub(crate) async fn remove(
        &self,
        key: &JobKey,
        job: Incarnation,
        worker: Incarnation,
    ) -> Result<(), WireError> {
        for _ in 0..MAX_CONFLICTS {
            let (record, revision, roster) = match self.read_for_change(key, job).await {
                Err(error) if matches!(error.code, ErrorCode::Gone | ErrorCode::UnknownJob) => return Ok(()),
                other => other?,
            };
            let versions = self.versions(&record).await?;
            let Some((next, level)) = roster::remove(&roster, worker, versions) else { return Ok(()) };
            if self.put_roster(key, &next, revision).await? {
                if let Some(version) = level {
                    self.level(&record, &next, version).await?;
                }
                return Ok(());
            }
        }
        Err(busy("the roster"))
    }

    /// Finishes the levelling of a job whose roster was changed by somebody who could not go on.
    pub(crate) async fn level_deserted(&self, key: &JobKey) -> Result<(), WireError> {
        let (record, roster) = self.get(key).await?;
        if !roster.started || record.state != JobState::Running {
            return Ok(());
        }
        let versions = self.versions(&record).await;
        let versions = self.note_loss(&record, versions).await?;
        match roster::deserted(&roster, versions) {
            Some(version) => self.level(&record, &roster, version).await,
            None => Ok(()),
        }
    }

    async fn read_for_change(
        &self,
        key: &JobKey,
        job: Incarnation,
    ) -> Result<(JobRecord, u64, Roster), WireError> {
        let (record, _) = self.get(key).await?;
        if record.incarnation != job {
            return Err(over(key));
        }
        let (roster, revision) = self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
        match roster.filter(|roster| roster.job == job) {
            Some(roster) => Ok((record, revision, roster)),
            None => Err(over(key)),
        }
    }

    pub(crate) async fn put_roster(
        &self,
        key: &JobKey,
        roster: &Roster,
        revision: u64,
    ) -> Result<bool, WireError> {
        Ok(self.registry.put(&roster_key(key), roster, revision).await.map_err(unavailable)?.is_ok())
    }

    /// Commits empty rounds on shards below `version`: nobody is left to complete them (rule P11).
    pub(crate) async fn level(
        &self,
        record: &JobRecord,
        roster: &Roster,
        version: Version,
    ) -> Result<(), WireError> {
        let store = self.store(record);
        for shard in 0..record.layout.shards() {
            loop {
                let state = store.fetch(record.incarnation, shard, true).await.map_err(store_error)?;
                if state.head.version >= version {
                    break;
                }
                // What has been folded of that round was contributed by workers that have all left.
                let standing = store.fetch_head(record.incarnation, shard).await.map_err(store_error)?;
                if standing.head.closed() != state.head {
                    continue;
                }
                let round = state.head.version + 1;
                let commit = Commit {
                    job: record.incarnation,
                    shard,
                    expect: standing.head,
                    ledger: Ledger {
                        round,
                        roster_epoch: roster.epoch,
                        below_quorum: true,
                        ..Ledger::default()
                    },
                    function: [0; 16],
                };
                let outcome = store.commit(commit, Bytes::clone(&state.values)).await.map_err(store_error)?;
                if let CommitOutcome::StaleRoster { needed } = outcome {
                    let text = format!("the roster changed (epoch {needed} is needed): join again");
                    return Err(WireError::new(ErrorCode::Unavailable, text));
                }
            }
        }
        Ok(())
    }
}

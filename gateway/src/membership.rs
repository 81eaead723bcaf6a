//! Who is in a job: claims of ranks, leaving, and the rounds that nobody is left to complete (rules P4, P11).

use std::sync::Arc;

use bytes::Bytes;
use thalweg_protocol::{
    Claim, Commit, CommitOutcome, ErrorCode, Incarnation, JobKey, JobRecord, JobState, Ledger, Roster, Round,
    Version, WireError, roster_key,
};

use crate::{
    doors::Admission,
    jobs::{Jobs, MAX_CONFLICTS, busy, over, store_error, unavailable},
    roster,
};

impl Jobs {
    /// Claims ranks of one life of a job. Answers each claim, in order, with the roster that holds it; a job that has
    /// started is fenced, so that no round from a claimant's first one on can close without it (rule P4).
    pub(crate) async fn join(&self, key: &JobKey, job: Incarnation, claims: &[Claim]) -> Vec<Admission> {
        match self.let_in(key, job, claims).await {
            Ok((record, roster, answers)) => {
                let (record, roster) = (Arc::new(record), Arc::new(roster));
                let admitted = |()| (record.clone(), roster.clone());
                answers.into_iter().map(|answer| answer.map(admitted)).collect()
            }
            Err(error) => claims.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    async fn let_in(
        &self,
        key: &JobKey,
        job: Incarnation,
        claims: &[Claim],
    ) -> Result<(JobRecord, Roster, Vec<Result<(), WireError>>), WireError> {
        for _ in 0..MAX_CONFLICTS {
            let (record, revision_of_roster, known) = self.read_for_change(key, job).await?;
            if let Some(error) = record.state.end(key) {
                return Err(error);
            }
            let versions = self.versions(&record).await;
            let versions = self.note_loss(&record, versions).await?;
            let (mut roster, mut changed) = (known, false);
            let (mut unconfirmed, mut level) = (Vec::new(), None);
            let mut answers = Vec::with_capacity(claims.len());
            for claim in claims {
                let claimed = roster::claim(&record, &roster, claim, versions);
                answers.push(claimed.map(|claimed| {
                    if let Some(next) = claimed.roster {
                        (roster, changed) = (next, true);
                    }
                    level = claimed.level;
                    if !claimed.confirmed {
                        unconfirmed.push((claim.worker.incarnation, claimed.from_round));
                    }
                }));
            }
            if changed && !self.put_roster(key, &roster, revision_of_roster).await? {
                continue;
            }
            if let Some(version) = level {
                self.level(&record, &roster, version).await?;
            }
            if unconfirmed.is_empty() {
                return Ok((record, roster, answers));
            }
            if let Some(roster) = self.fence(&record, roster, &unconfirmed).await? {
                return Ok((record, roster, answers));
            }
        }
        Err(busy("the roster"))
    }

    /// Fences the claimants' first rounds and confirms them; `None` when the roster changed meanwhile.
    async fn fence(
        &self,
        record: &JobRecord,
        mut roster: Roster,
        claimants: &[(Incarnation, Round)],
    ) -> Result<Option<Roster>, WireError> {
        let key = &record.spec.key;
        let store = self.store(record);
        let workers: Vec<_> = claimants.iter().map(|(worker, _)| *worker).collect();
        let Some(mut from_round) = claimants.iter().map(|(_, from_round)| *from_round).min() else {
            return Ok(Some(roster));
        };
        for _ in 0..MAX_CONFLICTS {
            let max = store.fence(record.incarnation, roster.epoch, from_round).await.map_err(store_error)?;
            let fenced = max < from_round;
            let versions = self.versions(record).await?;
            let next = if fenced {
                roster::confirm(&roster, &workers)
            } else {
                // That round closed somewhere before the fence stood: count from a later one.
                let mut late = workers.iter();
                late.try_fold(roster.clone(), |roster, worker| roster::postpone(&roster, *worker, versions))
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
            let first = workers.iter().filter_map(|worker| Some(next.tenure(*worker)?.from_round)).min();
            from_round = first.unwrap_or(from_round);
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

//! What becomes of a job that has lost rounds with the power (rule P27), where its policy says more than to fail.

use thalweg_protocol::{
    ErrorCode, Incarnation, JobKey, JobRecord, JobState, OnLoss, Origin, WireError, job_key,
};

use crate::jobs::{Jobs, busy, store_error, unavailable};

/// Whether the leading gateway has something to do for a job: begin a recovery, or go on with one.
pub(crate) fn is_due(record: &JobRecord) -> bool {
    let lost = matches!(&record.state, JobState::Failed(error) if error.code == ErrorCode::Diverged);
    let halfway = matches!(record.state, JobState::Creating | JobState::Initialising);
    let copies = record.life.origin.as_ref().is_some_and(|origin| origin.rolled_back);
    let anew = record.state == JobState::Creating && !record.life.replaces.is_empty();
    let restored = record.life.origin.is_some() && !copies;
    (lost && record.spec.policy.on_loss != OnLoss::Fail) || (halfway && copies) || (anew && !restored)
}

impl Jobs {
    /// Gives a job that has lost rounds a new life. Can be called again after an error; whoever comes second does
    /// the same.
    pub(crate) async fn recover(&self, key: &JobKey) -> Result<(), WireError> {
        let (record, revision) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
        let Some(record) = record.filter(is_due) else { return Ok(()) };
        let (record, revision) = if matches!(record.state, JobState::Failed(_)) {
            let next = self.next_life(&record).await?;
            match self.registry.put(&job_key(key), &next, revision).await.map_err(unavailable)? {
                Ok(revision) => (next, revision),
                Err(_) => return Err(busy("the job")),
            }
        } else {
            (record, revision)
        };
        if record.state == JobState::Creating && !self.finish_creation(record.clone(), revision).await? {
            return Err(busy("the job"));
        }
        let (Some(origin), Some(lost)) = (&record.life.origin, record.life.replaces.first()) else {
            return Ok(());
        };
        let copied = self.copy(&record, *lost, origin).await;
        let is_there = !matches!(copied, Ok(Copied::Before));
        let done = match copied {
            Ok(_) => self.activate(key, record.incarnation, origin.upload).await,
            Err(error) => Err(error),
        };
        match done {
            Err(error) if error.code == ErrorCode::Diverged && is_there => {
                // The power failed once more: what was copied of this life is lost, what it was copied from is not.
                let (now, revision) =
                    self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
                if let Some(mut now) = now.filter(|now| now.incarnation == record.incarnation && is_due(now))
                {
                    let held = self.store(&now).hold(*lost, *lost).await.map_err(store_error)?;
                    let upload = (self.incarnations)();
                    now.life.origin = Some(Origin { upload, version: held.0, rolled_back: true });
                    self.make_anew(&now, revision).await?;
                }
                Err(error)
            }
            // This life had all its bytes, and they were made durable with that: the next one begins from them.
            done => self.note_loss(&record, done).await,
        }
    }

    /// The record of the life after the one that has lost rounds.
    async fn next_life(&self, lost: &JobRecord) -> Result<JobRecord, WireError> {
        let mut next = self.describe(&lost.spec, lost.slots).await?;
        next.settings.clone_from(&lost.settings);
        next.life.replaces = lost.life.replaces.clone();
        next.life.replaces.insert(0, lost.incarnation);
        if lost.spec.policy.on_loss == OnLoss::RollBack {
            let version = self.newest_complete(lost).await?;
            tracing::warn!(job = %lost.spec.key, version, "rounds were lost: the job goes on after this one");
            next.life.origin = Some(Origin { upload: (self.incarnations)(), version, rolled_back: true });
        } else {
            let function = next.settings.pop();
            tracing::warn!(job = %lost.spec.key, "rounds were lost: the job waits for parameters of a worker");
            next.settings = function
                .map(|last| thalweg_protocol::SettingsRevision { from_round: 0, ..last })
                .into_iter()
                .collect();
        }
        Ok(next)
    }

    /// The newest version that all shards of a job have.
    async fn newest_complete(&self, lost: &JobRecord) -> Result<u64, WireError> {
        let store = self.store(lost);
        // Named alike by whoever tries, so that attempts do not pile up.
        let (version, complete) =
            store.hold(lost.incarnation, lost.incarnation).await.map_err(store_error)?;
        if complete {
            return Ok(version);
        }
        // The store itself misses nothing; a worker knew more. Nobody will complete this version any more.
        let roster = self.roster_of(lost).await?;
        let Some(roster) = roster else { return Err(busy("the roster")) };
        self.level(lost, &roster, version).await?;
        Ok(version)
    }

    /// Copies the version that a life begins with from the life before it.
    async fn copy(
        &self,
        record: &JobRecord,
        lost: Incarnation,
        origin: &Origin,
    ) -> Result<Copied, WireError> {
        let store = self.store(record);
        // The one that was taken to find the version.
        let hold = lost;
        let (version, _) = match store.hold(lost, hold).await {
            Err(error) if error.code() == ErrorCode::Gone => return Ok(Copied::Before),
            held => held.map_err(store_error)?,
        };
        if version != origin.version {
            let text =
                format!("job {}: version {version} is there, {} is needed", record.spec.key, origin.version);
            return Err(WireError::new(ErrorCode::Diverged, text));
        }
        for shard in 0..record.layout.shards() {
            let state = store.fetch_held(lost, hold, shard, true).await.map_err(store_error)?;
            let uploaded = store.upload(record.incarnation, origin.upload, shard, state.values).await;
            uploaded.map_err(store_error)?;
        }
        Ok(Copied::Now)
    }
}

/// What became of a copy.
enum Copied {
    /// It is complete.
    Now,
    /// It was completed before, and what it was made of is gone.
    Before,
}

#[cfg(test)]
mod tests {
    use thalweg_protocol::Life;

    use super::*;
    use crate::control::tests::record;

    #[test]
    fn a_recovery_is_begun_and_gone_on_with_and_nothing_else_is_touched() {
        let lost = || JobState::Failed(WireError::new(ErrorCode::Diverged, "the power failed"));
        let other = || JobState::Failed(WireError::new(ErrorCode::NonFinite, "NaN"));
        let origin = |rolled_back| Some(Origin { upload: Incarnation([7; 16]), version: 5, rolled_back });
        let replaces = || vec![Incarnation([6; 16])];
        let table = [
            (OnLoss::Fail, lost(), None, vec![], false, "it fails"),
            (OnLoss::RollBack, lost(), None, vec![], true, "begun"),
            (OnLoss::Reseed, lost(), None, vec![], true, "begun"),
            (OnLoss::RollBack, other(), None, vec![], false, "it failed for another reason"),
            (OnLoss::RollBack, JobState::Running, None, vec![], false, "nothing is lost"),
            (OnLoss::RollBack, JobState::Creating, None, vec![], false, "whoever opens it next goes on"),
            (OnLoss::RollBack, JobState::Creating, origin(true), replaces(), true, "cut short"),
            (OnLoss::RollBack, JobState::Initialising, origin(true), replaces(), true, "cut short"),
            (OnLoss::RollBack, JobState::Running, origin(true), vec![], false, "done"),
            (OnLoss::Reseed, JobState::Creating, None, replaces(), true, "cut short"),
            (
                OnLoss::Reseed,
                JobState::Initialising,
                None,
                replaces(),
                false,
                "a worker's parameters are awaited",
            ),
            (OnLoss::RollBack, JobState::Creating, origin(false), replaces(), false, "somebody restores it"),
            (
                OnLoss::RollBack,
                JobState::Initialising,
                origin(false),
                replaces(),
                false,
                "somebody restores it",
            ),
            (OnLoss::RollBack, JobState::Deleting, origin(true), replaces(), false, "it is being deleted"),
        ];
        for (on_loss, state, origin, replaces, due, why) in table {
            let mut job = record();
            job.spec.policy.on_loss = on_loss;
            job.state = state;
            job.life = Life { paused: None, origin, replaces, first_partition: 0 };
            assert_eq!(is_due(&job), due, "{why}: {:?}", job.state);
        }
    }
}

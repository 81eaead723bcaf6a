//! What people ask of a job: pause, resume, abort, delete, other settings, a new life from a snapshot.

use thalweg_broker::RegistryError;
use thalweg_protocol::{
    Durability, ErrorCode, FunctionSpec, Incarnation, Init, JobCommand, JobKey, JobRecord, JobSpec, JobState,
    JobSummary, Origin, Progress, Roster, SettingsChange, SettingsRevision, Version, WireError, job_key,
    limits, roster_key,
};

use crate::jobs::{Jobs, MAX_CONFLICTS, busy, store_error, unavailable};

fn unknown(key: &JobKey) -> WireError {
    WireError::new(ErrorCode::UnknownJob, format!("no job {key}: check tenant and name (thalweg job ls)"))
}

/// Applies a command; `false` when it changes nothing.
///
/// # Errors
/// When the job is over, or the text is too long.
pub(crate) fn apply(record: &mut JobRecord, command: &JobCommand) -> Result<bool, WireError> {
    if let JobCommand::Pause(text) | JobCommand::Abort(text) = command
        && text.len() > limits::MAX_REASON_BYTES
    {
        let text = format!("a reason of {} bytes; at most {}", text.len(), limits::MAX_REASON_BYTES);
        return Err(WireError::new(ErrorCode::Limit, text));
    }
    let over = record.state.end(&record.spec.key);
    match (command, over) {
        // An end is an end, whoever made it.
        (JobCommand::Abort(_), Some(_)) => Ok(false),
        (_, Some(error)) => Err(error),
        (JobCommand::Pause(reason), None) => {
            let before = record.life.paused.replace(reason.clone());
            Ok(before.as_ref() != Some(reason))
        }
        (JobCommand::Resume, None) => Ok(record.life.paused.take().is_some()),
        (JobCommand::Abort(reason), None) => {
            let reason = if reason.is_empty() { "no reason given" } else { reason };
            let text = format!(
                "job {} was aborted: {reason}; its parameters stay until it is deleted",
                record.spec.key
            );
            record.life.paused = None;
            record.state = JobState::Failed(WireError::new(ErrorCode::Aborted, text));
            Ok(true)
        }
    }
}

/// Adds the settings that `change` asks for, from `from_round` on, and forgets revisions that no round can ask for
/// any more: those before the one in force at version `min`, of those that the roster vouches for.
///
/// # Errors
/// `invalid_spec` when the function refuses them, or would need other optimizer slots; `limit`.
pub(crate) fn revise(
    record: &mut JobRecord,
    change: &SettingsChange,
    from_round: u64,
    (min, vouched): (Version, u32),
) -> Result<SettingsRevision, WireError> {
    let invalid = |text: String| WireError::new(ErrorCode::InvalidSpec, text);
    let Some(last) = record.settings.last() else {
        return Err(invalid("the job has no settings".to_owned()));
    };
    if from_round < last.from_round {
        let text = format!(
            "settings revision {} begins with round {} already: name that round, or a later one",
            last.revision, last.from_round
        );
        return Err(invalid(text));
    }
    let mut function = last.function.clone();
    function.settings.extend(change.settings.clone());
    for (index, settings) in &change.groups {
        let groups = function.groups.len();
        let Some(group) = function.groups.get_mut(*index as usize) else {
            return Err(invalid(format!("parameter group {index}: the job has {groups}, counted from 0")));
        };
        group.settings.extend(settings.clone());
    }
    let resolved = thalweg_functions::resolve(&function).map_err(|error| invalid(error.to_string()))?;
    if resolved.slots() != record.slots as usize {
        let text = format!(
            "with these settings {} keeps {} optimizer slots, the job has {}: create another job, from a snapshot of \
             this one",
            function.name,
            resolved.slots(),
            record.slots
        );
        return Err(invalid(text));
    }
    let revision = SettingsRevision { revision: last.revision + 1, from_round, function };
    let used = |known: &SettingsRevision| known.from_round <= min + 1 && known.revision <= vouched;
    let in_force = record.settings.partition_point(used);
    let over = in_force.saturating_sub(1);
    let kept = record.settings.len() - over;
    if kept >= limits::MAX_REVISIONS {
        let text =
            format!("{kept} settings revisions are kept for open rounds and later ones; at most that many");
        return Err(WireError::new(ErrorCode::Limit, text));
    }
    record.settings.drain(..over);
    record.settings.push(revision.clone());
    Ok(revision)
}

impl Jobs {
    /// A job's record, whatever its state.
    async fn record(&self, key: &JobKey) -> Result<(JobRecord, u64), WireError> {
        let (record, revision) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
        record.map(|record| (record, revision)).ok_or_else(|| unknown(key))
    }

    pub(crate) async fn is_deleting(&self, key: &JobKey) -> Result<bool, WireError> {
        let (record, _) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
        Ok(record.is_some_and(|record| record.state == JobState::Deleting))
    }

    /// Pauses, resumes or aborts a job.
    pub(crate) async fn control(&self, key: &JobKey, command: &JobCommand) -> Result<(), WireError> {
        for _ in 0..MAX_CONFLICTS {
            let (mut record, revision) = self.record(key).await?;
            if !apply(&mut record, command)? {
                return Ok(());
            }
            if self.registry.put(&job_key(key), &record, revision).await.map_err(unavailable)?.is_ok() {
                tracing::info!(job = %key, ?command, "job changed");
                return Ok(());
            }
        }
        Err(busy("the job"))
    }

    /// Where a job's shards stand.
    pub(crate) async fn progress(&self, key: &JobKey) -> Result<Progress, WireError> {
        let (record, _) = self.record(key).await?;
        let versions = self.versions(&record).await?;
        Ok(Progress { min: versions.min, max: versions.max })
    }

    /// One page of jobs in the order of their keys.
    pub(crate) async fn page(
        &self,
        tenant: Option<&str>,
        after: Option<&JobKey>,
        limit: u32,
    ) -> Result<(Vec<JobSummary>, Option<JobKey>), WireError> {
        if limit == 0 || limit > limits::MAX_PAGE {
            let text = format!("a page of {limit}; 1 to {}", limits::MAX_PAGE);
            return Err(WireError::new(ErrorCode::Limit, text));
        }
        let prefix = tenant.map_or_else(|| "job.".to_owned(), |tenant| format!("job.{tenant}."));
        let mut names = self.registry.keys(&prefix).await.map_err(unavailable)?;
        names.sort_unstable();
        let start = after.map_or(0, |after| {
            let after = job_key(after);
            names.partition_point(|name| *name <= after)
        });
        let mut jobs = Vec::new();
        let mut more = false;
        for name in &names[start..] {
            if jobs.len() == limit as usize {
                more = true;
                break;
            }
            let record = match self.registry.get::<JobRecord>(name).await {
                Ok((Some(record), _)) => record,
                // It was deleted meanwhile.
                Ok((None, _)) => continue,
                Err(error @ RegistryError::Unreadable { .. }) => {
                    error.log("a job is listed as unreadable");
                    jobs.extend(unreadable(name));
                    continue;
                }
                Err(error) => return Err(unavailable(error)),
            };
            let roster = match self.roster_of(&record).await {
                Err(error) if error.is_retryable() => return Err(error),
                other => other.unwrap_or_default(),
            };
            jobs.push(summary(&record, roster.as_ref()));
        }
        let next = if more { jobs.last().map(|job: &JobSummary| job.key.clone()) } else { None };
        Ok((jobs, next))
    }

    /// Changes settings from some round on: the one named, or the first that no shard can have begun. Returns the
    /// revision with its round, which is later than asked for when that one was closed meanwhile.
    pub(crate) async fn set_settings(
        &self,
        key: &JobKey,
        change: &SettingsChange,
    ) -> Result<SettingsRevision, WireError> {
        for _ in 0..MAX_CONFLICTS {
            let (mut record, revision) = self.record(key).await?;
            if let Some(error) = record.state.end(key) {
                return Err(error);
            }
            let (_, roster) = self.get(key).await?;
            let versions = self.versions(&record).await;
            let versions = self.note_loss(&record, versions).await?;
            let first = versions.max + if roster.started { 2 } else { 1 };
            if let Some(round) = change.from_round.filter(|round| *round < first) {
                let text = format!("round {round} may have begun: from_round has to be {first} or later");
                return Err(WireError::new(ErrorCode::InvalidSpec, text));
            }
            let last = record.settings.last().map_or(0, |last| last.from_round);
            let from_round = change.from_round.unwrap_or(first.max(last));
            let added = revise(&mut record, change, from_round, (versions.min, roster.revision))?;
            self.check_size(&record)?;
            if self.registry.put(&job_key(key), &record, revision).await.map_err(unavailable)?.is_err() {
                continue;
            }
            tracing::info!(job = %key, revision = added.revision, from_round, "settings change");
            return self.fence_settings(key, record.incarnation, added.revision).await;
        }
        Err(busy("the job"))
    }

    /// Puts the newest settings in force. Invokers use only settings that the roster vouches for; before it does so,
    /// the store is told to refuse the rounds from the first one with them on by any older roster (as for a joining
    /// worker, rule P4). So no such round is folded without them, and none before with them. Between the two steps
    /// those rounds wait; who dies there is followed by the leading gateway. Returns `revision` as it stands in the end.
    pub(crate) async fn fence_settings(
        &self,
        key: &JobKey,
        job: Incarnation,
        revision: u32,
    ) -> Result<SettingsRevision, WireError> {
        for _ in 0..MAX_CONFLICTS {
            let (roster, roster_at) =
                self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
            let (mut record, at) = self.record(key).await?;
            let roster = roster.filter(|roster| roster.job == job && record.incarnation == job);
            let Some(mut roster) = roster else { return Err(unknown(key)) };
            let Some(newest) = record.settings.last().cloned() else { return Err(unknown(key)) };
            let vouched = roster.revision;
            let waiting = |known: &&SettingsRevision| known.revision > vouched;
            let Some(first) = record.settings.iter().find(waiting).map(|first| first.from_round) else {
                let found = record.settings.iter().find(|known| known.revision == revision);
                return Ok(found.cloned().unwrap_or(newest));
            };
            roster.epoch += 1;
            let max = self.store(&record).fence(job, roster.epoch, first).await.map_err(store_error)?;
            if max < first {
                roster.revision = newest.revision;
                // A conflict may have passed the fence with another roster: all is looked at again.
                self.put_roster(key, &roster, roster_at).await?;
                continue;
            }
            // That round has closed somewhere, with the settings before, unless somebody has vouched for them since
            // the roster was read. They begin later.
            if !self.put_roster(key, &roster, roster_at).await? {
                continue;
            }
            for known in record.settings.iter_mut().filter(|known| known.revision > vouched) {
                known.from_round = known.from_round.max(max + 2);
            }
            let _ = self.registry.put(&job_key(key), &record, at).await.map_err(unavailable)?;
        }
        Err(busy("the job's rounds"))
    }

    /// Creates a life of a job that waits for the upload of `origin`, in place of the life that it replaces.
    pub(crate) async fn restore(
        &self,
        spec: &JobSpec,
        function: Option<FunctionSpec>,
        origin: &Origin,
        replaces: Option<Incarnation>,
    ) -> Result<(JobRecord, Roster), WireError> {
        spec.validate()?;
        let resolve = |function: &FunctionSpec| {
            thalweg_functions::resolve(function)
                .map_err(|error| WireError::new(ErrorCode::InvalidSpec, error.to_string()))
        };
        let begins_with = function.unwrap_or_else(|| spec.function.clone());
        let slots = u32::try_from(resolve(&begins_with)?.slots()).unwrap_or(u32::MAX);
        if resolve(&spec.function)?.slots() != slots as usize || begins_with.name != spec.function.name {
            let text = "the settings it begins with need other optimizer slots than those of its description";
            return Err(WireError::new(ErrorCode::InvalidSpec, text));
        }
        let upload = origin.upload;
        let key = &spec.key;
        for _ in 0..MAX_CONFLICTS {
            let (known, revision) =
                self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
            let ours = |record: &JobRecord| record.life.origin.as_ref().is_some_and(|o| o.upload == upload);
            let (record, revision) = match known {
                // Asked again.
                Some(known) if ours(&known) && known.state != JobState::Creating => {
                    return self.get(key).await;
                }
                Some(known) if ours(&known) => (known, revision),
                Some(known) if replaces != Some(known.incarnation) => {
                    let text = format!(
                        "job {key} exists (incarnation {}): delete it first, or replace it (thalweg job restore --replace)",
                        known.incarnation
                    );
                    return Err(WireError::new(ErrorCode::SpecMismatch, text));
                }
                known => {
                    let mut record = self.describe(spec, slots).await?;
                    let replaces = match known {
                        Some(known) if known.state == JobState::Creating => {
                            // An attempt that got nowhere: what it was to replace is still there.
                            self.store(&known).delete(known.incarnation).await.map_err(store_error)?;
                            known.life.replaces
                        }
                        Some(known) => {
                            // Not activated, it has not removed what it was to replace.
                            [vec![known.incarnation], known.life.replaces].concat()
                        }
                        None => Vec::new(),
                    };
                    record.life.origin = Some(origin.clone());
                    record.life.replaces = replaces;
                    record.settings[0].function = begins_with.clone();
                    match self.registry.put(&job_key(key), &record, revision).await.map_err(unavailable)? {
                        Ok(revision) => (record, revision),
                        Err(_) => continue,
                    }
                }
            };
            if self.finish_creation(record, revision).await? {
                return self.get(key).await;
            }
        }
        Err(busy("the job"))
    }

    /// Removes a job: first it says so, then its bytes go, its roster, and its record last, so that a removal cut
    /// short can be taken up again.
    pub(crate) async fn delete(&self, key: &JobKey) -> Result<(), WireError> {
        for _ in 0..MAX_CONFLICTS {
            let (mut record, mut revision) = self.record(key).await?;
            if record.state != JobState::Deleting {
                record.state = JobState::Deleting;
                match self.registry.put(&job_key(key), &record, revision).await.map_err(unavailable)? {
                    Ok(next) => revision = next,
                    Err(_) => continue,
                }
            }
            return self.finish_deletion(&record, revision).await;
        }
        Err(busy("the job"))
    }

    /// As [`Self::delete`], of a job that is being deleted.
    pub(crate) async fn finish_deletion(&self, record: &JobRecord, revision: u64) -> Result<(), WireError> {
        let key = &record.spec.key;
        // What was in a store that was given up is nobody's business any more.
        if self.given_up(record).await?.is_none() {
            let store = self.store(record);
            store.delete(record.incarnation).await.map_err(store_error)?;
            for replaced in &record.life.replaces {
                // A restore that was cut short may not have come to it.
                store.delete(*replaced).await.map_err(store_error)?;
            }
        }
        loop {
            let (roster, revision) =
                self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
            if roster.is_none() {
                break;
            }
            if self.registry.delete(&roster_key(key), revision).await.map_err(unavailable)?.is_ok() {
                break;
            }
        }
        self.queues.forget(key).await.map_err(|error| unavailable(error.into()))?;
        if self.registry.delete(&job_key(key), revision).await.map_err(unavailable)?.is_err() {
            // Somebody else has finished it, unless the name is in use again.
            let (known, _) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
            if known.is_some_and(|known| known.incarnation == record.incarnation) {
                return Err(busy("the job"));
            }
        }
        tracing::info!(job = %key, incarnation = %record.incarnation, "job deleted");
        Ok(())
    }
}

/// A job as lists show it.
pub(crate) fn summary(record: &JobRecord, roster: Option<&Roster>) -> JobSummary {
    let present = roster
        .map_or(0, |roster| roster.members.iter().filter(|member| member.until_round.is_none()).count());
    let running = matches!(record.state, JobState::Running | JobState::Initialising);
    JobSummary {
        key: record.spec.key.clone(),
        incarnation: record.incarnation,
        state: if running && record.life.paused.is_some() { "paused" } else { record.state.name() }
            .to_owned(),
        function: record.spec.function.name.clone(),
        workers: record.spec.workers,
        members: u32::try_from(present).unwrap_or(u32::MAX),
        elements: record.layout.elements,
        durability: record.spec.durability,
    }
}

/// A job that another release wrote: its name is all that is known. Whoever asks for it hears why.
fn unreadable(name: &str) -> Option<JobSummary> {
    let (tenant, job) = name.strip_prefix("job.")?.split_once('.')?;
    Some(JobSummary {
        key: JobKey { tenant: tenant.parse().ok()?, job: job.parse().ok()? },
        incarnation: Incarnation([0; 16]),
        state: "unreadable".to_owned(),
        function: "?".to_owned(),
        workers: 0,
        members: 0,
        elements: 0,
        durability: Durability::Process,
    })
}

/// The state in which a job begins once it has a slab and a roster.
pub(crate) fn first_state(record: &JobRecord) -> JobState {
    match record.store_job().init {
        Init::Zeros => JobState::Running,
        Init::Upload => JobState::Initialising,
    }
}

#[cfg(test)]
pub(crate) mod tests;

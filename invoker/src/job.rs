//! A job as an invoker sees it: its record and roster, with the function resolved.

use std::{collections::HashMap, ops::Range, sync::Arc};

use thalweg_broker::{Registry, RegistryError};
use thalweg_functions::{AggregationFunction, InvalidSettings};
use thalweg_protocol::{
    Incarnation, JobKey, JobRecord, JobState, Member, Roster, Round, SettingsRevision, ShardIndex, WireError,
    job_key, offsets, roster_key,
};

/// Immutable view of one job at one moment. Cheap to share, replaced when record or roster change.
#[derive(Debug)]
pub struct Job {
    /// The job.
    pub record: JobRecord,
    /// Who counts.
    pub roster: Roster,
    /// Of the settings that the roster vouches for, in the record's order.
    functions: Vec<Arc<dyn AggregationFunction>>,
    /// Elements of the flattened vector by parameter group, ascending.
    groups: Vec<(Range<u64>, usize)>,
    /// Where in the roster each worker's tenure is.
    tenures: HashMap<Incarnation, usize>,
}

/// Settings that may be used: a revision that the roster does not vouch for may begin later than it says now. The
/// first one is always in force.
fn vouched<'a>(record: &'a JobRecord, roster: &Roster) -> &'a [SettingsRevision] {
    let known = record.settings.iter().take_while(|revision| revision.revision <= roster.revision).count();
    &record.settings[..known.max(1).min(record.settings.len())]
}

impl Job {
    /// Resolves the functions of all settings revisions.
    ///
    /// # Errors
    /// When this release does not know the function; the gateway checks that at creation, so the job
    /// was made by a newer one.
    pub fn new(record: JobRecord, roster: Roster) -> Result<Self, InvalidSettings> {
        let functions = vouched(&record, &roster)
            .iter()
            .map(|revision| thalweg_functions::resolve(&revision.function).map(Arc::from))
            .collect::<Result<_, _>>()?;
        let by_name: HashMap<&str, usize> = (record.spec.function.groups.iter().enumerate())
            .flat_map(|(group, settings)| settings.tensors.iter().map(move |name| (name.as_str(), group)))
            .collect();
        let starts = offsets(&record.spec.tensors);
        let groups = (record.spec.tensors.iter().zip(starts.windows(2)))
            .filter_map(|(tensor, bounds)| Some((bounds[0]..bounds[1], *by_name.get(tensor.name.as_str())?)))
            .collect();
        let tenures =
            roster.members.iter().enumerate().map(|(at, member)| (member.incarnation, at)).collect();
        Ok(Self { record, roster, functions, groups, tenures })
    }

    /// The tenure of a worker's life.
    #[must_use]
    pub fn tenure(&self, worker: Incarnation) -> Option<&Member> {
        self.tenures.get(&worker).map(|&at| &self.roster.members[at])
    }

    /// The settings that fold `round`: the newest that begin before it, of those that the roster vouches for.
    #[must_use]
    pub fn settings(&self, round: Round) -> &SettingsRevision {
        &self.record.settings[self.revision_of(round)]
    }

    /// The function that folds `round`, with its settings.
    #[must_use]
    pub fn function(&self, round: Round) -> &Arc<dyn AggregationFunction> {
        &self.functions[self.revision_of(round)]
    }

    fn revision_of(&self, round: Round) -> usize {
        let usable = vouched(&self.record, &self.roster);
        usable.partition_point(|revision| revision.from_round <= round).saturating_sub(1)
    }

    /// Parameter groups inside one shard, relative to its first element.
    #[must_use]
    pub fn groups(&self, shard: ShardIndex) -> Vec<(Range<usize>, usize)> {
        let bounds = self.record.layout.range(shard);
        let first = self.groups.partition_point(|(range, _)| range.end <= bounds.start);
        self.groups[first..]
            .iter()
            .take_while(|(range, _)| range.start < bounds.end)
            .map(|(range, group)| {
                let start = range.start.max(bounds.start) - bounds.start;
                let end = range.end.min(bounds.end) - bounds.start;
                (start as usize..end as usize, *group)
            })
            .collect()
    }

    /// Reads a job's record and roster from the registry; `None` when there is no such job.
    ///
    /// # Errors
    /// What is in the way, for the log; to be tried again.
    pub async fn read(registry: &Registry, key: &JobKey) -> Result<Option<Arc<Self>>, String> {
        let said = |error: RegistryError| {
            error.log("a job's contributions wait");
            error.to_string()
        };
        // In this order: a roster vouches for settings that are in a record read after it (`Roster::revision`).
        let (roster, _) = registry.get::<Roster>(&roster_key(key)).await.map_err(said)?;
        let (record, _) = registry.get::<JobRecord>(&job_key(key)).await.map_err(said)?;
        let (Some(record), Some(roster)) = (record, roster) else { return Ok(None) };
        if roster.job != record.incarnation {
            // Between two lives; the next hint or retry sees them together.
            return Err("record and roster belong to different lives".to_owned());
        }
        Self::new(record, roster).map(|job| Some(Arc::new(job))).map_err(|error| error.to_string())
    }

    /// Records that a job has failed, and reads it; whoever is first says why.
    ///
    /// # Errors
    /// As [`Job::read`].
    pub async fn fail(
        registry: &Registry,
        key: &JobKey,
        incarnation: Incarnation,
        error: WireError,
    ) -> Result<Option<Arc<Self>>, String> {
        loop {
            let (record, revision) =
                registry.get::<JobRecord>(&job_key(key)).await.map_err(|error| error.to_string())?;
            match record {
                Some(mut record) if record.incarnation == incarnation && record.state.end(key).is_none() => {
                    record.state = JobState::Failed(error.clone());
                    let put = registry.put(&job_key(key), &record, revision).await;
                    if put.map_err(|error| error.to_string())?.is_ok() {
                        break;
                    }
                }
                _ => break,
            }
        }
        Self::read(registry, key).await
    }
}

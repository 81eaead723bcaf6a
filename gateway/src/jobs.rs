//! Jobs and rosters in the registry: every change is a compare-and-swap, every step can be repeated.

use std::sync::Arc;

use async_nats::Client;
use bytes::Bytes;
use thalweg_broker::{Registry, RegistryError};
use thalweg_protocol::{
    Claim, Commit, CommitOutcome, Durability, ErrorCode, Incarnation, JobKey, JobRecord, JobSpec, JobState,
    Layout, Ledger, Partition, Roster, Round, STORE_KEY, SettingsRevision, StoreJob, StoreRecord, Version,
    WireError, job_key, limits, roster_key,
};
use thalweg_store::{ShardStore, StoreClient, StoreError};

use crate::roster::{self, Versions};

/// Tries of one compare-and-swap before the sender is asked to try again.
const MAX_CONFLICTS: u32 = 64;

/// Access to registry and stores.
#[derive(Clone, Debug)]
pub(crate) struct Jobs {
    pub(crate) registry: Registry,
    pub(crate) client: Client,
    pub(crate) partitions: Partition,
    pub(crate) nats_syncs_always: bool,
}

fn unavailable(error: RegistryError) -> WireError {
    WireError::new(ErrorCode::Unavailable, error.to_string())
}

fn busy(what: &str) -> WireError {
    WireError::new(ErrorCode::Unavailable, format!("{what} changed too often at once: try again"))
}

fn store_error(error: StoreError) -> WireError {
    error.to_wire()
}

impl Jobs {
    fn store(&self, record: &JobRecord) -> Arc<dyn ShardStore> {
        Arc::new(StoreClient::new(self.client.clone(), record.store))
    }

    /// Reads a job and its roster, mending a roster that a creation cut short has left out.
    pub(crate) async fn get(&self, key: &JobKey) -> Result<(JobRecord, Roster), WireError> {
        let (record, _) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
        let Some(record) = record else {
            let text = format!("no job {key}: open it first, or check tenant and name");
            return Err(WireError::new(ErrorCode::UnknownJob, text));
        };
        for _ in 0..MAX_CONFLICTS {
            let (roster, revision) =
                self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
            match roster {
                Some(roster) if roster.job == record.incarnation => return Ok((record, roster)),
                _ => {
                    let roster =
                        Roster { job: record.incarnation, epoch: 1, started: false, members: Vec::new() };
                    let put =
                        self.registry.put(&roster_key(key), &roster, revision).await.map_err(unavailable)?;
                    if put.is_ok() {
                        return Ok((record, roster));
                    }
                }
            }
        }
        Err(busy("the roster"))
    }

    /// Creates a job, or returns the one that is there when it was created alike.
    pub(crate) async fn open(&self, spec: JobSpec) -> Result<(JobRecord, Roster), WireError> {
        spec.validate()?;
        let function = thalweg_functions::resolve(&spec.function)
            .map_err(|error| WireError::new(ErrorCode::InvalidSpec, error.to_string()))?;
        for _ in 0..MAX_CONFLICTS {
            let name = job_key(&spec.key);
            let (known, revision) = self.registry.get::<JobRecord>(&name).await.map_err(unavailable)?;
            if let Some(known) = known {
                if known.spec == spec {
                    return self.get(&spec.key).await;
                }
                let text = format!(
                    "job {} exists with another {}: use another name, or delete it first",
                    spec.key,
                    difference(&known.spec, &spec)
                );
                return Err(WireError::new(ErrorCode::SpecMismatch, text));
            }
            let slots = u32::try_from(function.slots()).unwrap_or(u32::MAX);
            let record = self.describe(&spec, slots).await?;
            // A job that must fit one message of the registry, or nobody could ever read it.
            let size = thalweg_protocol::frame::seal_record(&record).len();
            if size + limits::MESSAGE_OVERHEAD_BYTES > self.client.max_payload() {
                let text = format!(
                    "the job's description takes {size} bytes, the NATS server allows {}: raise its max_payload, or \
                     use fewer or shorter tensor names",
                    self.client.max_payload()
                );
                return Err(WireError::new(ErrorCode::Limit, text));
            }
            let store = self.store(&record);
            store.create(store_job(&record)).await.map_err(store_error)?;
            if self.registry.put(&name, &record, revision).await.map_err(unavailable)?.is_ok() {
                tracing::info!(job = %spec.key, incarnation = %record.incarnation, "job created");
                if spec.durability == Durability::Disk && !self.nats_syncs_always {
                    tracing::warn!(
                        job = %spec.key,
                        "the shards of this job survive power loss, its record in the registry may not: run the NATS \
                         server with `sync_interval: always` and set gateway.nats_syncs_always, or with `thalweg up` \
                         embedded.sync_always"
                    );
                }
                return self.get(&spec.key).await;
            }
            // Another gateway was quicker; what we prepared belongs to nobody.
            store.delete(record.incarnation).await.map_err(store_error)?;
        }
        Err(busy("the job"))
    }

    async fn describe(&self, spec: &JobSpec, slots: u32) -> Result<JobRecord, WireError> {
        let (store, _) = self.registry.get::<StoreRecord>(STORE_KEY).await.map_err(unavailable)?;
        let Some(store) = store else {
            let text = "no store has registered yet: start one (thalweg store, or thalweg up)";
            return Err(WireError::new(ErrorCode::Unavailable, text));
        };
        let elements: u64 = spec.tensors.iter().filter_map(|tensor| tensor.elements()).sum();
        // State and message overhead have to fit one message of this server.
        let room = self.client.max_payload().saturating_sub(limits::MESSAGE_OVERHEAD_BYTES);
        let most = (room / (4 * (1 + slots as usize))).max(1);
        let wanted = (spec.shard_bytes / 4) as usize;
        let shard_elements = u32::try_from(wanted.min(most)).unwrap_or(u32::MAX);
        if u64::div_ceil(elements, u64::from(shard_elements)) > limits::MAX_SHARDS {
            let text = format!(
                "more than {} shards: this NATS server allows shards of {shard_elements} elements; raise its max_payload",
                limits::MAX_SHARDS
            );
            return Err(WireError::new(ErrorCode::Limit, text));
        }
        Ok(JobRecord {
            spec: spec.clone(),
            incarnation: Incarnation::random(),
            layout: Layout { elements, shard_elements },
            slots,
            store: store.id,
            partitions: self.partitions,
            state: match spec.init {
                thalweg_protocol::Init::Zeros => JobState::Running,
                thalweg_protocol::Init::Upload => JobState::Initialising,
            },
            settings: vec![SettingsRevision { revision: 0, from_round: 0, function: spec.function.clone() }],
        })
    }

    /// Tells that an upload is complete.
    pub(crate) async fn activate(
        &self,
        key: &JobKey,
        job: Incarnation,
        upload: Incarnation,
    ) -> Result<(), WireError> {
        for _ in 0..MAX_CONFLICTS {
            let (record, revision) =
                self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
            let Some(mut record) = record.filter(|record| record.incarnation == job) else {
                return Err(over(key));
            };
            self.store(&record).activate(job, upload).await.map_err(store_error)?;
            if record.state != JobState::Initialising {
                return Ok(());
            }
            record.state = JobState::Running;
            if self.registry.put(&job_key(key), &record, revision).await.map_err(unavailable)?.is_ok() {
                return Ok(());
            }
        }
        Err(busy("the job"))
    }

    /// Removes a job: its bytes first, so that a removal cut short can be asked for again.
    pub(crate) async fn delete(&self, key: &JobKey) -> Result<(), WireError> {
        let (record, revision) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
        let Some(record) = record else {
            return Err(WireError::new(ErrorCode::UnknownJob, format!("no job {key}")));
        };
        self.store(&record).delete(record.incarnation).await.map_err(store_error)?;
        if self.registry.delete(&job_key(key), revision).await.map_err(unavailable)?.is_err() {
            return Err(busy("the job"));
        }
        let (roster, revision) = self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
        if roster.is_some_and(|roster| roster.job == record.incarnation) {
            // A conflict means that a new life of the job has its roster there already.
            let _ = self.registry.delete(&roster_key(key), revision).await.map_err(unavailable)?;
        }
        tracing::info!(job = %key, incarnation = %record.incarnation, "job deleted");
        Ok(())
    }

    /// Claims a rank. Returns the roster that holds the claim; a job that has started is fenced, so that
    /// no round from the claimant's first one on can close without it (rule P4).
    pub(crate) async fn join(&self, claim: &Claim) -> Result<(JobRecord, Roster), WireError> {
        let key = &claim.worker.key;
        for _ in 0..MAX_CONFLICTS {
            let (record, revision_of_roster, roster) = self.read_for_change(key, claim.worker.job).await?;
            if let JobState::Failed(error) = &record.state {
                return Err(WireError::new(ErrorCode::JobFailed, error.to_string()));
            }
            let versions = self.versions(&record, &roster).await?;
            let claimed = roster::claim(&record, &roster, claim, versions)?;
            let founding = !roster.started;
            let roster = match claimed.roster {
                None => roster,
                Some(next) => {
                    if !self.put_roster(key, &next, revision_of_roster).await? {
                        continue;
                    }
                    next
                }
            };
            // Founding members need no fence: nobody pushes before the roster that holds them all, and every
            // contribution names it.
            if founding {
                return Ok((record, roster));
            }
            if let Some(version) = claimed.level {
                self.level(&record, &roster, version).await?;
            }
            if let Some(roster) =
                self.fence(&record, roster, claim.worker.incarnation, claimed.from_round).await?
            {
                return Ok((record, roster));
            }
        }
        Err(busy("the roster"))
    }

    /// Fences a claimant's first round; `None` when the roster changed meanwhile.
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
            if max < from_round {
                return Ok(Some(roster));
            }
            // That round closed somewhere before the fence stood: count from a later one.
            let versions = self.versions(record, &roster).await?;
            let Some(next) = roster::postpone(&roster, worker, versions) else { return Ok(None) };
            let (known, revision) =
                self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
            if known.as_ref() != Some(&roster) || !self.put_roster(key, &next, revision).await? {
                return Ok(None);
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
            let versions = self.versions(&record, &roster).await?;
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
        let versions = self.versions(&record, &roster).await?;
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

    async fn put_roster(&self, key: &JobKey, roster: &Roster, revision: u64) -> Result<bool, WireError> {
        Ok(self.registry.put(&roster_key(key), roster, revision).await.map_err(unavailable)?.is_ok())
    }

    /// Versions of the job's shards; zero before it has started.
    async fn versions(&self, record: &JobRecord, roster: &Roster) -> Result<Versions, WireError> {
        if !roster.started || record.state == JobState::Initialising {
            return Ok(Versions { min: 0, max: 0 });
        }
        let heads = self.store(record).heads(record.incarnation, 0, record.layout.shards()).await;
        let heads = heads.map_err(store_error)?;
        let versions = || heads.iter().map(|head| head.version);
        Ok(Versions { min: versions().min().unwrap_or(0), max: versions().max().unwrap_or(0) })
    }

    /// Commits empty rounds on shards below `version`: nobody is left to complete them (rule P11).
    async fn level(&self, record: &JobRecord, roster: &Roster, version: Version) -> Result<(), WireError> {
        let store = self.store(record);
        for shard in 0..record.layout.shards() {
            loop {
                let state = store.fetch(record.incarnation, shard, true).await.map_err(store_error)?;
                if state.head.version >= version {
                    break;
                }
                let round = state.head.version + 1;
                let commit = Commit {
                    job: record.incarnation,
                    shard,
                    expect: state.head,
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

    /// All jobs.
    pub(crate) async fn list(&self) -> Result<Vec<JobRecord>, WireError> {
        let mut records = Vec::new();
        for key in self.registry.keys("job.").await.map_err(unavailable)? {
            records.extend(self.registry.get::<JobRecord>(&key).await.map_err(unavailable)?.0);
        }
        Ok(records)
    }
}

fn over(key: &JobKey) -> WireError {
    WireError::new(ErrorCode::Gone, format!("this life of job {key} is over: open the job again"))
}

fn store_job(record: &JobRecord) -> StoreJob {
    StoreJob {
        key: record.spec.key.clone(),
        incarnation: record.incarnation,
        layout: record.layout,
        slots: record.slots,
        durability: record.spec.durability,
        max_members: record.spec.max_members,
        init: record.spec.init,
    }
}

/// Names the first field in which two specifications differ.
fn difference(known: &JobSpec, wanted: &JobSpec) -> String {
    let tensors = known.tensors.iter().zip(&wanted.tensors).find(|(known, wanted)| known != wanted);
    if let Some((known, wanted)) = tensors {
        return format!(
            "tensor ({} {:?} is there, {} {:?} is asked for)",
            known.name, known.shape, wanted.name, wanted.shape
        );
    }
    let fields = [
        ("number of tensors", known.tensors.len() != wanted.tensors.len()),
        ("function or settings", known.function != wanted.function),
        ("number of workers", known.workers != wanted.workers),
        ("quorum or deadline", (known.quorum, known.deadline_ms) != (wanted.quorum, wanted.deadline_ms)),
        ("durability", known.durability != wanted.durability),
        ("policy for non-finite values", known.non_finite != wanted.non_finite),
        ("origin of parameters", known.init != wanted.init),
        ("shard size", known.shard_bytes != wanted.shard_bytes),
    ];
    fields.iter().find(|(_, differs)| *differs).map_or("max_members", |(name, _)| *name).to_owned()
}

//! Jobs in the registry, from their creation to their first parameters: every change is a compare-and-swap, every step can be repeated.

use std::{fmt, sync::Arc};

use thalweg_broker::{Pool, Queues, Registry, RegistryError, StreamsConfig};
use thalweg_protocol::{
    Durability, ErrorCode, FoldOrder, Incarnation, JobKey, JobRecord, JobSpec, JobState, Layout, Life,
    Roster, STORE_KEY, SettingsRevision, StoreId, StoreRecord, WireError, job_key, limits, roster_key,
};
use thalweg_store::{ShardStore, StoreError};

use crate::{control::first_state, roster::Versions};

/// Tries of one compare-and-swap before the sender is asked to try again.
pub(crate) const MAX_CONFLICTS: u32 = 64;

/// Finds a store by its identity.
pub type Stores = Arc<dyn Fn(StoreId) -> Arc<dyn ShardStore> + Send + Sync>;

/// Access to registry and stores.
#[derive(Clone)]
pub struct Jobs {
    /// The registry.
    pub registry: Registry,
    /// For the dead letters of jobs that are deleted.
    pub queues: Arc<dyn Queues>,
    /// The stores.
    pub stores: Stores,
    /// Bytes of the largest message that the broker takes.
    pub max_payload: usize,
    /// The pools that jobs may ask for, with their partitions.
    pub streams: StreamsConfig,
    /// As in [`crate::Config`].
    pub nats_syncs_always: bool,
    /// Makes incarnations, which must never repeat.
    pub incarnations: Arc<dyn Fn() -> Incarnation + Send + Sync>,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").field("registry", &self.registry).finish_non_exhaustive()
    }
}

/// What a registry that does not answer, or cannot be understood, means for whoever asked.
pub(crate) fn unavailable(error: RegistryError) -> WireError {
    error.to_wire()
}

pub(crate) fn busy(what: &str) -> WireError {
    WireError::new(ErrorCode::Unavailable, format!("{what} changed too often at once: try again"))
}

pub(crate) fn store_error(error: StoreError) -> WireError {
    error.to_wire()
}

impl Jobs {
    pub(crate) fn store(&self, record: &JobRecord) -> Arc<dyn ShardStore> {
        (self.stores)(record.store)
    }

    /// Where the store is that is in force, if it is not a job's own: then that one was given up, with the job's shards.
    pub(crate) async fn given_up(&self, record: &JobRecord) -> Result<Option<String>, WireError> {
        let (store, _) = self.registry.get::<StoreRecord>(STORE_KEY).await.map_err(unavailable)?;
        Ok(store.filter(|store| store.id != record.store).map(|store| store.location))
    }

    /// Reads a job and its roster.
    pub(crate) async fn get(&self, key: &JobKey) -> Result<(JobRecord, Roster), WireError> {
        let (record, _) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
        let Some(record) = record else {
            let text = format!("no job {key}: open it first, or check tenant and name");
            return Err(WireError::new(ErrorCode::UnknownJob, text));
        };
        match self.roster_of(&record).await? {
            Some(roster) if !matches!(record.state, JobState::Creating | JobState::Deleting) => {
                Ok((record, roster))
            }
            _ => {
                // Nothing is mended here: a roster written now could outlive a job that is being deleted.
                let text = format!(
                    "job {key} is being created or deleted: try again; if that was cut short, open or delete it again"
                );
                Err(WireError::new(ErrorCode::Unavailable, text))
            }
        }
    }

    /// A job's roster; a job that is half made or half deleted has none.
    pub(crate) async fn roster_of(&self, record: &JobRecord) -> Result<Option<Roster>, WireError> {
        let key = roster_key(&record.spec.key);
        let (roster, _) = self.registry.get::<Roster>(&key).await.map_err(unavailable)?;
        Ok(roster.filter(|roster| roster.job == record.incarnation))
    }

    /// Creates a job, or returns the one that is there when it was created alike.
    ///
    /// The record comes first, in state `creating`, so that nothing is in the store or the registry which no
    /// record names, however early a creation is cut short; the next one to open the job finishes it.
    pub(crate) async fn open(&self, spec: JobSpec) -> Result<(JobRecord, Roster), WireError> {
        self.create(spec).await.map(|(record, roster, _)| (record, roster))
    }

    /// As [`Self::open`]; also says whether it was this call that recorded the job.
    pub(crate) async fn create(&self, spec: JobSpec) -> Result<(JobRecord, Roster, bool), WireError> {
        let mut created = false;
        spec.validate()?;
        let function = thalweg_functions::resolve(&spec.function)
            .map_err(|error| WireError::new(ErrorCode::InvalidSpec, error.to_string()))?;
        for _ in 0..MAX_CONFLICTS {
            let name = job_key(&spec.key);
            let (known, revision) = self.registry.get::<JobRecord>(&name).await.map_err(unavailable)?;
            let (record, revision) = match known {
                Some(known) if known.state == JobState::Deleting => {
                    self.finish_deletion(&known, revision).await?;
                    continue;
                }
                Some(known) if known.spec != spec => {
                    let text = format!(
                        "job {} exists with another {}: use another name, or delete it first",
                        spec.key,
                        difference(&known.spec, &spec)
                    );
                    return Err(WireError::new(ErrorCode::SpecMismatch, text));
                }
                Some(known) if known.state != JobState::Creating => {
                    if let Some(location) = self.given_up(&known).await? {
                        let text = format!(
                            "the store with the shards of job {} was given up for another one ({location}): remove the \
                             job (thalweg job rm), then begin it anew or restore a snapshot",
                            spec.key
                        );
                        return Err(WireError::new(ErrorCode::StoreMismatch, text));
                    }
                    let (record, roster) = self.get(&spec.key).await?;
                    return Ok((record, roster, created));
                }
                Some(known) => (known, revision),
                None => {
                    let slots = u32::try_from(function.slots()).unwrap_or(u32::MAX);
                    let record = self.describe(&spec, slots).await?;
                    match self.registry.put(&name, &record, revision).await.map_err(unavailable)? {
                        Ok(revision) => {
                            created = true;
                            (record, revision)
                        }
                        Err(_) => continue,
                    }
                }
            };
            if self.finish_creation(record, revision).await? {
                let (record, roster) = self.get(&spec.key).await?;
                return Ok((record, roster, created));
            }
        }
        Err(busy("the job"))
    }

    /// Makes what a job needs besides its record; `false` when the record was changed meanwhile.
    pub(crate) async fn finish_creation(
        &self,
        mut record: JobRecord,
        revision: u64,
    ) -> Result<bool, WireError> {
        let key = record.spec.key.clone();
        let store = self.store(&record);
        if let Err(error) = store.create(record.store_job()).await {
            if error.code() == ErrorCode::Diverged {
                return self.make_anew(&record, revision).await;
            }
            if error.code() == ErrorCode::StorageFull && record.life.origin.is_none() {
                // Nothing of it is there, so that nothing has to remember it.
                let _ = self.registry.delete(&job_key(&key), revision).await;
            }
            return Err(store_error(error));
        }
        if record.life.origin.is_none() {
            for replaced in &record.life.replaces {
                store.delete(*replaced).await.map_err(store_error)?;
            }
        }
        record.state = first_state(&record);
        if self.found(&record, revision).await?
            && self.registry.put(&job_key(&key), &record, revision).await.map_err(unavailable)?.is_ok()
        {
            tracing::info!(job = %key, incarnation = %record.incarnation, "job created");
            if record.spec.durability == Durability::Disk && !self.nats_syncs_always {
                tracing::warn!(
                    job = %key,
                    "the shards of this job survive power loss, its record in the registry may not: run the NATS \
                     server with `sync_interval: always` and set gateway.nats_syncs_always, or with `thalweg up` \
                     embedded.sync_always"
                );
            }
            return Ok(true);
        }
        let (known, _) = self.registry.get::<JobRecord>(&job_key(&key)).await.map_err(unavailable)?;
        if known.is_none_or(|known| known.incarnation != record.incarnation) {
            // Deleted before it was there: what was made for it belongs to nobody.
            store.delete(record.incarnation).await.map_err(store_error)?;
        }
        Ok(false)
    }

    /// Gives a life its first roster; `false` when the record was changed meanwhile.
    ///
    /// Two gateways may be at two lives of a job. The roster is read before the record: whoever is at the older life
    /// then either sees that, or writes first, and is overwritten.
    async fn found(&self, record: &JobRecord, revision: u64) -> Result<bool, WireError> {
        let key = &record.spec.key;
        // What was in force before this life is in force from its beginning.
        let in_force = record.settings.last().map_or(0, |last| last.revision);
        // Who was in a job that has lost rounds comes back when it can, and perhaps not everybody.
        let recovered = !record.life.replaces.is_empty()
            && record.life.origin.as_ref().is_none_or(|origin| origin.rolled_back);
        let first = Roster { revision: in_force, started: recovered, ..Roster::new(record.incarnation) };
        for _ in 0..MAX_CONFLICTS {
            let (roster, at) = self.registry.get::<Roster>(&roster_key(key)).await.map_err(unavailable)?;
            if roster.is_some_and(|roster| roster.job == record.incarnation) {
                return Ok(true);
            }
            let (_, newest) = self.registry.get::<JobRecord>(&job_key(key)).await.map_err(unavailable)?;
            if newest != revision {
                return Ok(false);
            }
            if self.put_roster(key, &first, at).await? {
                return Ok(true);
            }
        }
        Err(busy("the roster"))
    }

    /// A life that was lost with the power before anybody could use it is made anew, as another one, so that whoever
    /// still holds the record of this one cannot touch what is used by then. `false`: the record has changed.
    pub(crate) async fn make_anew(&self, record: &JobRecord, revision: u64) -> Result<bool, WireError> {
        let mut next =
            JobRecord { incarnation: (self.incarnations)(), state: JobState::Creating, ..record.clone() };
        next.life.replaces.push(record.incarnation);
        tracing::warn!(job = %record.spec.key, "a job was lost with the power while it was made: making it anew");
        let put = self.registry.put(&job_key(&record.spec.key), &next, revision).await;
        put.map_err(unavailable)?.map_or(Ok(false), |_| Ok(false))
    }

    pub(crate) async fn describe(&self, spec: &JobSpec, slots: u32) -> Result<JobRecord, WireError> {
        let (store, _) = self.registry.get::<StoreRecord>(STORE_KEY).await.map_err(unavailable)?;
        let Some(store) = store else {
            let text = "no store has registered yet: start one (thalweg store, or thalweg up)";
            return Err(WireError::new(ErrorCode::Unavailable, text));
        };
        let pool = self.pool(spec)?;
        let elements: u64 = spec.tensors.iter().filter_map(|tensor| tensor.elements()).sum();
        // State and message overhead have to fit one message of this server.
        let order = match spec.policy.order {
            FoldOrder::Rank => 0,
            FoldOrder::Arrival => limits::ORDERED_RANK_BYTES * spec.max_members as usize,
        };
        let room = self.max_payload.saturating_sub(limits::MESSAGE_OVERHEAD_BYTES + order);
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
        let record = JobRecord {
            spec: spec.clone(),
            incarnation: (self.incarnations)(),
            layout: Layout { elements, shard_elements },
            slots,
            store: store.id,
            partitions: pool.partitions,
            state: JobState::Creating,
            settings: vec![SettingsRevision { revision: 0, from_round: 0, function: spec.function.clone() }],
            life: Life { first_partition: pool.first, ..Life::default() },
        };
        self.check_size(&record)?;
        Ok(record)
    }

    /// The pool that a job asks for.
    fn pool(&self, spec: &JobSpec) -> Result<Pool, WireError> {
        let wanted = spec.policy.pool.as_ref();
        self.streams.pool(wanted).ok_or_else(|| {
            let names: Vec<_> = self.streams.pools.keys().map(ToString::to_string).collect();
            let there = if names.is_empty() { "only the shared one".to_owned() } else { names.join(", ") };
            let wanted = wanted.map(ToString::to_string).unwrap_or_default();
            let text = format!(
                "no pool {wanted:?}; there is {there}: leave it out for the shared one, or add it to streams.pools"
            );
            WireError::new(ErrorCode::InvalidSpec, text)
        })
    }

    /// A job's record has to fit one message of the registry, or nobody could ever read it.
    pub(crate) fn check_size(&self, record: &JobRecord) -> Result<(), WireError> {
        let size = thalweg_protocol::frame::seal_record(record).len();
        if size + limits::MESSAGE_OVERHEAD_BYTES > self.max_payload {
            let text = format!(
                "the job's description takes {size} bytes, the NATS server allows {}: raise its max_payload, or \
                 use fewer or shorter tensor names",
                self.max_payload
            );
            return Err(WireError::new(ErrorCode::Limit, text));
        }
        Ok(())
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
            if record.life.origin.as_ref().is_some_and(|origin| origin.upload != upload) {
                let text = format!("job {key} goes on from a snapshot: its parameters come from there");
                return Err(WireError::new(ErrorCode::SpecMismatch, text));
            }
            self.store(&record).activate(job, upload).await.map_err(store_error)?;
            if record.state != JobState::Initialising {
                return Ok(());
            }
            // Only now: until this life has its own bytes, those of the one before are the only ones.
            for replaced in std::mem::take(&mut record.life.replaces) {
                self.store(&record).delete(replaced).await.map_err(store_error)?;
            }
            record.state = JobState::Running;
            if self.registry.put(&job_key(key), &record, revision).await.map_err(unavailable)?.is_ok() {
                return Ok(());
            }
        }
        Err(busy("the job"))
    }

    /// A store that has lost a job's state says so to whoever asks it; all others, who may only wait for each
    /// other, learn it from the job's record.
    pub(crate) async fn note_loss<T>(
        &self,
        record: &JobRecord,
        result: Result<T, WireError>,
    ) -> Result<T, WireError> {
        let Err(error) = &result else { return result };
        if error.code != ErrorCode::Diverged {
            return result;
        }
        for _ in 0..MAX_CONFLICTS {
            let name = job_key(&record.spec.key);
            let (known, revision) = self.registry.get::<JobRecord>(&name).await.map_err(unavailable)?;
            let Some(mut known) = known.filter(|known| known.incarnation == record.incarnation) else {
                break;
            };
            if matches!(known.state, JobState::Failed(_)) {
                break;
            }
            known.state = JobState::Failed(error.clone());
            if self.registry.put(&name, &known, revision).await.map_err(unavailable)?.is_ok() {
                tracing::error!(job = %record.spec.key, %error, "job fails");
                break;
            }
        }
        result
    }

    /// Versions of the job's shards. Also asked for before the job has started: the store may have lost it.
    pub(crate) async fn versions(&self, record: &JobRecord) -> Result<Versions, WireError> {
        if record.state == JobState::Initialising {
            return Ok(Versions { min: record.first_version(), max: record.first_version() });
        }
        let heads = self.store(record).heads(record.incarnation, 0, record.layout.shards()).await;
        let heads = heads.map_err(store_error)?;
        let versions = || heads.iter().map(|head| head.version);
        Ok(Versions { min: versions().min().unwrap_or(0), max: versions().max().unwrap_or(0) })
    }

    /// All jobs that can be read: one that another release wrote must not keep anybody from the others.
    pub(crate) async fn list(&self) -> Result<Vec<JobRecord>, WireError> {
        let mut records = Vec::new();
        for key in self.registry.keys("job.").await.map_err(unavailable)? {
            match self.registry.get::<JobRecord>(&key).await {
                Ok((record, _)) => records.extend(record),
                Err(error @ RegistryError::Unreadable { .. }) => error.log("a job is left alone"),
                Err(error) => return Err(unavailable(error)),
            }
        }
        Ok(records)
    }
}

pub(crate) fn over(key: &JobKey) -> WireError {
    WireError::new(ErrorCode::Gone, format!("this life of job {key} is over: open the job again"))
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
        ("policy", known.policy != wanted.policy),
    ];
    fields.iter().find(|(_, differs)| *differs).map_or("max_members", |(name, _)| *name).to_owned()
}

//! The store in memory: the model that the other backends are held to, and a stand-in for tests.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use thalweg_protocol::{
    Commit, CommitOutcome, Epoch, ErrorCode, Head, Incarnation, Init, Ledger, Round, ShardIndex, StoreJob,
    Version, checksum,
};

use crate::{
    ShardState, ShardStore, StoreError,
    rules::{self, Admission, Fences},
};

/// A store that forgets everything with its process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    jobs: Mutex<HashMap<Incarnation, Job>>,
}

#[derive(Debug)]
struct Job {
    spec: StoreJob,
    fences: Fences,
    active: Option<Incarnation>,
    uploads: HashMap<ShardIndex, (Incarnation, Bytes)>,
    shards: Vec<ShardState>,
}

impl Job {
    fn shards(&mut self) -> Result<&mut Vec<ShardState>, StoreError> {
        if self.shards.is_empty() { Err(rules::not_ready(&self.spec)) } else { Ok(&mut self.shards) }
    }

    fn with_slots(&self, shard: ShardIndex, parameters: &[u8]) -> Bytes {
        let mut state = parameters.to_vec();
        state.resize(self.spec.state_bytes(shard), 0);
        state.into()
    }
}

impl MemoryStore {
    fn jobs(&self) -> MutexGuard<'_, HashMap<Incarnation, Job>> {
        // No code path panics between two writes of one job, so a poisoned lock still guards whole jobs.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(
        &self,
        job: Incarnation,
        f: impl FnOnce(&mut Job) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        f(self.jobs().get_mut(&job).ok_or_else(|| rules::gone(job))?)
    }
}

#[async_trait]
impl ShardStore for MemoryStore {
    async fn create(&self, spec: StoreJob) -> Result<(), StoreError> {
        let mut jobs = self.jobs();
        if let Some(known) = jobs.get(&spec.incarnation) {
            return if known.spec == spec {
                Ok(())
            } else {
                Err(StoreError::refused(
                    ErrorCode::SpecMismatch,
                    "the incarnation exists with another description",
                ))
            };
        }
        let shards = match spec.init {
            Init::Upload => Vec::new(),
            Init::Zeros => (0..spec.layout.shards())
                .map(|shard| ShardState {
                    head: rules::zero_head(&spec, shard),
                    ledger: rules::empty_ledger(),
                    values: Bytes::from(vec![0; spec.state_bytes(shard)]),
                })
                .collect(),
        };
        let job = Job { spec, fences: Fences::default(), active: None, uploads: HashMap::new(), shards };
        jobs.insert(job.spec.incarnation, job);
        Ok(())
    }

    async fn upload(
        &self,
        job: Incarnation,
        upload: Incarnation,
        shard: ShardIndex,
        parameters: Bytes,
    ) -> Result<(), StoreError> {
        self.with(job, |job| {
            rules::check_shape(&job.spec, shard, parameters.len(), job.spec.parameter_bytes(shard))?;
            match job.active {
                Some(active) if active == upload => Ok(()),
                None if job.spec.init == Init::Upload => {
                    job.uploads.insert(shard, (upload, parameters));
                    Ok(())
                }
                _ => Err(StoreError::refused(
                    ErrorCode::SpecMismatch,
                    "the job has initial parameters already",
                )),
            }
        })
    }

    async fn activate(&self, job: Incarnation, upload: Incarnation) -> Result<(), StoreError> {
        self.with(job, |job| {
            if job.active == Some(upload) {
                return Ok(());
            }
            if job.active.is_some() || job.spec.init != Init::Upload {
                return Err(StoreError::refused(
                    ErrorCode::SpecMismatch,
                    "the job has initial parameters already",
                ));
            }
            let mut shards = Vec::new();
            for shard in 0..job.spec.layout.shards() {
                let Some((_, parameters)) = job.uploads.get(&shard).filter(|(id, _)| *id == upload) else {
                    return Err(rules::not_ready(&job.spec));
                };
                let values = job.with_slots(shard, parameters);
                let head = Head::initial(upload.0, shard, checksum(&[&values]));
                shards.push(ShardState { head, ledger: rules::empty_ledger(), values });
            }
            job.shards = shards;
            job.active = Some(upload);
            job.uploads.clear();
            Ok(())
        })
    }

    async fn heads(&self, job: Incarnation, first: ShardIndex, count: u32) -> Result<Vec<Head>, StoreError> {
        self.with(job, |job| {
            Ok(job
                .shards()?
                .iter()
                .skip(first as usize)
                .take(count as usize)
                .map(|shard| shard.head)
                .collect())
        })
    }

    async fn fetch(
        &self,
        job: Incarnation,
        shard: ShardIndex,
        slots: bool,
    ) -> Result<ShardState, StoreError> {
        self.with(job, |job| {
            rules::check_shape(&job.spec, shard, 0, 0)?;
            let len = if slots { job.spec.state_bytes(shard) } else { job.spec.parameter_bytes(shard) };
            let state = &job.shards()?[shard as usize];
            Ok(ShardState { values: state.values.slice(..len), ..state.clone() })
        })
    }

    async fn fetch_head(&self, job: Incarnation, shard: ShardIndex) -> Result<(Head, Ledger), StoreError> {
        self.fetch(job, shard, false).await.map(|state| (state.head, state.ledger))
    }

    async fn commit(&self, commit: Commit, state: Bytes) -> Result<CommitOutcome, StoreError> {
        self.with(commit.job, |job| {
            rules::check_shape(&job.spec, commit.shard, state.len(), job.spec.state_bytes(commit.shard))?;
            rules::check_ledger(&job.spec, &commit.ledger)?;
            let fences = job.fences.clone();
            let shard = &mut job.shards()?[commit.shard as usize];
            match rules::admit(&shard.head, &fences, &commit, &state) {
                Admission::Done(outcome) => Ok(outcome),
                Admission::Write { next, .. } => {
                    *shard = ShardState { head: next, ledger: commit.ledger, values: state };
                    Ok(CommitOutcome::Committed(next))
                }
            }
        })
    }

    async fn fence(&self, job: Incarnation, epoch: Epoch, from_round: Round) -> Result<Version, StoreError> {
        self.with(job, |job| {
            let versions = || job.shards.iter().map(|shard| shard.head.version);
            let (min, max) = (versions().min().unwrap_or(0), versions().max().unwrap_or(0));
            job.fences.add(from_round, epoch, min);
            Ok(max)
        })
    }

    async fn delete(&self, job: Incarnation) -> Result<(), StoreError> {
        self.jobs().remove(&job);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<StoreJob>, StoreError> {
        Ok(self.jobs().values().map(|job| job.spec.clone()).collect())
    }
}

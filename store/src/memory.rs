//! The store in memory: the model that the other backends are held to, and a stand-in for tests.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use thalweg_protocol::{
    Commit, CommitOutcome, Epoch, ErrorCode, Head, Incarnation, Init, OpenRound, PartialCommit, Round,
    ShardIndex, StoreJob, Version, checksum, limits,
};

use crate::{
    OpenFold, ShardState, ShardStore, Standing, StoreError,
    rules::{self, Admission, Fences, PartialAdmission},
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
    /// Open rounds; one counts while its shard stands where it builds on.
    open: HashMap<ShardIndex, OpenFold>,
    holds: HashMap<Incarnation, Held>,
}

/// One version of all shards, as far as they have come to it.
#[derive(Debug)]
struct Held {
    version: Version,
    shards: HashMap<ShardIndex, ShardState>,
}

impl Job {
    /// The open round of a shard, if it has one that counts.
    fn open(&mut self, shard: ShardIndex) -> Result<Option<OpenFold>, StoreError> {
        rules::check_shape(&self.spec, shard, 0, 0)?;
        let current = self.shards()?[shard as usize].head;
        let needed = self.fences.needed(current.version + 1);
        let counts = |(head, partial, _): &&OpenFold| head.closed() == current && partial.since >= needed;
        Ok(self.open.get(&shard).filter(counts).cloned())
    }

    fn shards(&mut self) -> Result<&mut Vec<ShardState>, StoreError> {
        if self.shards.is_empty() { Err(rules::not_ready(&self.spec)) } else { Ok(&mut self.shards) }
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
        let job = Job {
            spec,
            fences: Fences::default(),
            active: None,
            uploads: HashMap::new(),
            shards,
            open: HashMap::new(),
            holds: HashMap::new(),
        };
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
            rules::first_state(&job.spec, upload, shard, &parameters)?;
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
                let (state, head, _) = rules::first_state(&job.spec, upload, shard, parameters)?;
                shards.push(ShardState { head, ledger: rules::empty_ledger(), values: state.into() });
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

    async fn fetch_head(&self, job: Incarnation, shard: ShardIndex) -> Result<Standing, StoreError> {
        self.with(job, |job| {
            let open = job.open(shard)?;
            let state = &job.shards()?[shard as usize];
            let (head, partial) = open.map_or((state.head, None), |(head, partial, _)| (head, Some(partial)));
            Ok(Standing { head, ledger: state.ledger.clone(), partial })
        })
    }

    async fn commit(&self, commit: Commit, state: Bytes) -> Result<CommitOutcome, StoreError> {
        self.with(commit.job, |job| {
            rules::check_shape(&job.spec, commit.shard, state.len(), job.spec.state_bytes(commit.shard))?;
            rules::check_ledger(&job.spec, &commit.ledger)?;
            let fences = job.fences.clone();
            let open = job.open(commit.shard)?;
            let shard = &mut job.shards()?[commit.shard as usize];
            let current = open.map_or(shard.head, |(head, ..)| head);
            match rules::admit(&current, &fences, &commit, &state) {
                Admission::Done(outcome) => Ok(outcome),
                Admission::Write { next, .. } => {
                    *shard = ShardState { head: next, ledger: commit.ledger, values: state };
                    let held = shard.clone();
                    for hold in job.holds.values_mut().filter(|hold| hold.version == next.version) {
                        hold.shards.insert(commit.shard, held.clone());
                    }
                    Ok(CommitOutcome::Committed(next))
                }
            }
        })
    }

    async fn commit_partial(&self, commit: PartialCommit, fold: Bytes) -> Result<CommitOutcome, StoreError> {
        self.with(commit.job, |job| {
            let open = job.open(commit.shard)?;
            let most = job.spec.parameter_bytes(commit.shard) + limits::PARTIAL_OVERHEAD_BYTES;
            rules::check_shape(&job.spec, commit.shard, fold.len(), fold.len().min(most))?;
            rules::check_ledger(&job.spec, &commit.partial.ledger)?;
            let fences = job.fences.clone();
            let current = job.shards()?[commit.shard as usize].head;
            let known = open.as_ref().map(|(head, partial, fold)| (head, partial, checksum(&[fold])));
            match rules::admit_partial(&current, known, &fences, &commit, checksum(&[&fold])) {
                PartialAdmission::Done(outcome) => Ok(outcome),
                PartialAdmission::Write => {
                    let head = commit.expect.folded_on();
                    job.open.insert(commit.shard, (head, commit.partial, fold));
                    Ok(CommitOutcome::Committed(head))
                }
            }
        })
    }

    async fn fetch_partial(
        &self,
        job: Incarnation,
        shard: ShardIndex,
    ) -> Result<Option<OpenFold>, StoreError> {
        self.with(job, |job| job.open(shard))
    }

    async fn open_rounds(
        &self,
        after: Option<(Incarnation, ShardIndex)>,
        limit: u32,
    ) -> Result<Vec<OpenRound>, StoreError> {
        let mut jobs = self.jobs();
        let mut rounds = Vec::new();
        for job in jobs.values_mut() {
            for shard in job.open.keys().copied().collect::<Vec<_>>() {
                if let Some((head, partial, _)) = job.open(shard)? {
                    rounds.push(OpenRound {
                        job: job.spec.incarnation,
                        key: job.spec.key.clone(),
                        shard,
                        head,
                        first: partial.first,
                        counted: u32::try_from(partial.ledger.counted.len()).unwrap_or(u32::MAX),
                        roster_epoch: partial.ledger.roster_epoch,
                    });
                }
            }
        }
        rounds.retain(|round| after.is_none_or(|after| (round.job, round.shard) > after));
        rounds.sort_unstable_by_key(|round| (round.job, round.shard));
        rounds.truncate(limit.min(limits::MAX_OPEN_ROUNDS) as usize);
        Ok(rounds)
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

    async fn hold(&self, job: Incarnation, hold: Incarnation) -> Result<(Version, bool), StoreError> {
        self.with(job, |job| {
            let shards = job.shards()?.clone();
            let newest = shards.iter().map(|shard| shard.head.version).max().unwrap_or(0);
            if !job.holds.contains_key(&hold) && job.holds.len() >= limits::MAX_HOLDS {
                return Err(rules::too_many_holds(&job.spec));
            }
            let held = job.holds.entry(hold).or_insert_with(|| {
                let there =
                    (0..).zip(shards.iter().cloned()).filter(|(_, shard)| shard.head.version == newest);
                Held { version: newest, shards: there.collect() }
            });
            Ok((held.version, held.shards.len() == shards.len()))
        })
    }

    async fn fetch_held(
        &self,
        job: Incarnation,
        hold: Incarnation,
        shard: ShardIndex,
        slots: bool,
    ) -> Result<ShardState, StoreError> {
        self.with(job, |job| {
            rules::check_shape(&job.spec, shard, 0, 0)?;
            let len = if slots { job.spec.state_bytes(shard) } else { job.spec.parameter_bytes(shard) };
            let held = job.holds.get(&hold).ok_or_else(|| rules::unknown_hold(&job.spec))?;
            let state = held.shards.get(&shard).ok_or_else(|| rules::not_there_yet(shard, held.version))?;
            Ok(ShardState { values: state.values.slice(..len), ..state.clone() })
        })
    }

    async fn release(&self, job: Incarnation, hold: Incarnation) -> Result<(), StoreError> {
        if let Some(job) = self.jobs().get_mut(&job) {
            job.holds.remove(&hold);
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<StoreJob>, StoreError> {
        Ok(self.jobs().values().map(|job| job.spec.clone()).collect())
    }
}

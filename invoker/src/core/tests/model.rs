//! A world for one core: work queue, registry, store and workers, as plain data, and a check of every
//! action against the rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use futures::FutureExt as _;
use thalweg_functions::{Contribution, ShardContext};
use thalweg_protocol::{
    CommitOutcome, ErrorCode, GradientHeader, Head, Incarnation, JobKey, JobRecord, JobSpec, JobState, Kind,
    Layout, Ledger, Member, Rank, Reject, Roster, Round, SettingsRevision, ShardIndex, StateId, StoreId,
    checksum, frame, subjects,
};
use thalweg_store::{MemoryStore, ShardState, ShardStore};

use super::{
    super::{Action, Core, Delivery, Event, FoldError, Limits, Millis, Plan, ShardKey},
    setup::{limits, name, spec, values, worker},
};
use crate::Job;

/// Elements of one shard.
pub(super) const ELEMENTS: usize = 4;
/// Bytes of one contribution.
pub(super) const BYTES: usize = ELEMENTS * 4;
/// The partition of single-partition worlds.
pub(super) const PARTITION: u16 = 0;

/// What a core did, in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Note {
    Ack(u64),
    Dead(u64, ErrorCode),
    Reject(Rank, ErrorCode),
    LookUp,
    ReadHead(ShardIndex),
    Fold(ShardIndex, Round, Vec<Rank>),
    Commit(ShardIndex, Round),
    /// Some of a round was folded: so many contributions are in it now.
    Partial(ShardIndex, Round, usize),
    ClearSuspect,
    Publish(ShardIndex, u64),
    Republish(ShardIndex),
    Fail(ErrorCode),
}

impl Note {
    fn of(action: &Action) -> Self {
        match action {
            Action::Acknowledge(_, sequence) => Self::Ack(*sequence),
            Action::DeadLetter { sequence, error, .. } => Self::Dead(*sequence, error.code),
            Action::Reject(_, rank, reject) => Self::Reject(*rank, reject.error.code),
            Action::LookUp(_) => Self::LookUp,
            Action::ReadHead(key) => Self::ReadHead(key.1),
            Action::Fold(_, plan) => {
                Self::Fold(plan.shard, plan.round, plan.inputs.iter().map(|input| input.rank).collect())
            }
            Action::Commit(_, commit, _) => Self::Commit(commit.shard, commit.ledger.round),
            Action::CommitPartial(_, commit, _) => {
                let ledger = &commit.partial.ledger;
                Self::Partial(commit.shard, ledger.round, ledger.counted.len() + ledger.void.len())
            }
            Action::ClearSuspect(_) => Self::ClearSuspect,
            Action::Publish(_, header, _) => Self::Publish(header.shard, header.head.version),
            Action::Republish(_, key) => Self::Republish(key.1),
            Action::FailJob(_, _, error) => Self::Fail(error.code),
        }
    }
}

/// A contribution about to be sent.
#[derive(Clone, Debug)]
pub(super) struct Push {
    pub(super) key: JobKey,
    pub(super) subject_rank: Rank,
    pub(super) partition: u16,
    pub(super) header: GradientHeader,
    pub(super) values: Vec<f32>,
}

impl Push {
    pub(super) fn frame(&self) -> Bytes {
        let bytes: Vec<u8> = self.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let payload = if self.header.void { &[] } else { bytes.as_slice() };
        frame::seal(Kind::Gradient, &self.header, payload)
    }
}

pub(super) struct World {
    pub(super) core: Core,
    pub(super) now: Millis,
    pub(super) store: MemoryStore,
    pub(super) registry: BTreeMap<JobKey, Option<Arc<Job>>>,
    /// Un-acknowledged messages, by sequence.
    pub(super) queue: BTreeMap<u64, Delivery>,
    pub(super) next_sequence: u64,
    /// Actions that take time and were not performed yet.
    pub(super) pending: Vec<Action>,
    pub(super) notes: Vec<Note>,
    pub(super) rejects: Vec<(JobKey, Rank, Reject)>,
    /// Every commit that the store took.
    pub(super) history: BTreeMap<ShardKey, Vec<Ledger>>,
    /// Versions published, by shard.
    pub(super) published: BTreeMap<ShardKey, Vec<u64>>,
    pub(super) acknowledged: BTreeSet<u64>,
    /// The broker may deliver a message again before it is acknowledged; then so may that be.
    pub(super) redelivers: bool,
}

pub(super) fn now_or_never<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("the model's store never waits")
}

impl World {
    /// A core that holds [`PARTITION`], in a world without jobs.
    pub(super) fn new() -> Self {
        Self::with(limits())
    }

    pub(super) fn with(limits: Limits) -> Self {
        let mut world = Self {
            core: Core::new(limits),
            now: 1_000_000,
            store: MemoryStore::default(),
            registry: BTreeMap::new(),
            queue: BTreeMap::new(),
            next_sequence: 1,
            pending: Vec::new(),
            notes: Vec::new(),
            rejects: Vec::new(),
            history: BTreeMap::new(),
            published: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            redelivers: false,
        };
        world.hold();
        world
    }

    /// A world with one running job called `j`.
    pub(super) fn running(workers: u32, change: impl FnOnce(&mut JobSpec)) -> Self {
        let mut world = Self::new();
        let mut spec = spec("j", workers);
        change(&mut spec);
        world.open(spec, 1);
        world
    }

    pub(super) fn hold(&mut self) {
        self.tell(Event::Held { partition: PARTITION, careful_until: None, poison: None });
    }

    /// Creates a life of a job in registry and store; its founding members are there.
    pub(super) fn open(&mut self, spec: JobSpec, life: u8) {
        let incarnation = Incarnation([life; 16]);
        let layout = Layout { elements: ELEMENTS as u64 * 2, shard_elements: ELEMENTS as u32 };
        let slots = thalweg_functions::resolve(&spec.function).unwrap().slots() as u32;
        let members = (0..spec.workers).map(|rank| Member {
            rank,
            worker: format!("w{rank}"),
            incarnation: worker(rank),
            from_round: 1,
            until_round: None,
            confirmed: true,
        });
        let roster = Roster { started: true, members: members.collect(), ..Roster::new(incarnation) };
        let record = JobRecord {
            incarnation,
            layout,
            slots,
            store: StoreId([0; 16]),
            partitions: 1,
            state: JobState::Running,
            settings: vec![SettingsRevision { revision: 0, from_round: 0, function: spec.function.clone() }],
            life: thalweg_protocol::Life::default(),
            spec,
        };
        let job = record.store_job();
        now_or_never(self.store.create(job)).unwrap();
        self.registry.insert(record.spec.key.clone(), Some(Arc::new(Job::new(record, roster).unwrap())));
    }

    pub(super) fn job(&self, job: &str) -> Arc<Job> {
        self.registry[&name(job)].clone().expect("the job is there")
    }

    /// Writes a change of a job into the registry; the core is not told.
    pub(super) fn change(&mut self, job: &str, change: impl FnOnce(&mut JobRecord, &mut Roster)) {
        let known = self.job(job);
        let (mut record, mut roster) = (known.record.clone(), known.roster.clone());
        change(&mut record, &mut roster);
        roster.epoch += 1;
        self.registry.insert(name(job), Some(Arc::new(Job::new(record, roster).unwrap())));
    }

    /// Tells the core what the registry holds.
    pub(super) fn hint(&mut self, job: &str) {
        let view = self.registry.get(&name(job)).cloned().flatten();
        self.tell(Event::Job(name(job), view));
    }

    pub(super) fn state(&self, job: Incarnation, shard: ShardIndex) -> ShardState {
        now_or_never(self.store.fetch(job, shard, true)).unwrap()
    }

    pub(super) fn head(&self, job: &str, shard: ShardIndex) -> Head {
        self.state(self.job(job).record.incarnation, shard).head
    }

    /// What a well-behaved founding member sends now.
    pub(super) fn gradient(&self, rank: Rank, shard: ShardIndex, round: Round) -> Push {
        self.gradient_of("j", rank, shard, round)
    }

    pub(super) fn gradient_of(&self, job: &str, rank: Rank, shard: ShardIndex, round: Round) -> Push {
        let view = self.job(job);
        let head = self.head(job, shard);
        let header = GradientHeader {
            job: view.record.incarnation,
            shard,
            round,
            worker: worker(rank),
            rank,
            roster_epoch: view.roster.epoch,
            base: if head.version + 1 == round { head.state_id } else { StateId([9; 16]) },
            weight: 1.0,
            void: false,
            elements: ELEMENTS as u32,
        };
        let values = values(rank, shard, round);
        Push { key: name(job), subject_rank: rank, partition: PARTITION, header, values }
    }

    /// Puts a message into the work queue.
    pub(super) fn enqueue(&mut self, push: &Push) -> u64 {
        let subject = subjects::gradient(push.partition, &push.key, push.subject_rank);
        self.enqueue_bytes(subject, push.frame())
    }

    pub(super) fn enqueue_bytes(&mut self, subject: String, frame: Bytes) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let delivery = Delivery { partition: PARTITION, sequence, published: self.now, subject, frame };
        self.queue.insert(sequence, delivery);
        sequence
    }

    pub(super) fn deliver(&mut self, sequence: u64) {
        if let Some(delivery) = self.queue.get(&sequence).cloned() {
            self.tell(Event::Delivered(delivery));
        }
    }

    /// Queues and delivers a message, and performs all that follows from it.
    pub(super) fn give(&mut self, push: &Push) -> u64 {
        let sequence = self.enqueue(push);
        self.deliver(sequence);
        self.settle();
        sequence
    }

    /// A whole round of one shard by well-behaved members.
    pub(super) fn round(&mut self, ranks: &[Rank], shard: ShardIndex, round: Round) -> Vec<u64> {
        let pushes: Vec<_> = ranks.iter().map(|rank| self.gradient(*rank, shard, round)).collect();
        pushes.iter().map(|push| self.give(push)).collect()
    }

    pub(super) fn after(&mut self, delay: Millis) {
        self.now += delay;
        self.tell(Event::Tick);
        self.settle();
    }

    /// One event; what the shell does without waiting is done at once.
    pub(super) fn tell(&mut self, event: Event) {
        let committed = matches!(event, Event::Committed(_, Ok(_)));
        for action in self.core.handle(event, self.now) {
            self.notes.push(Note::of(&action));
            match action {
                Action::Acknowledge(partition, sequence) => {
                    let first = self.acknowledged.insert(sequence);
                    assert!(first || self.redelivers, "{sequence} is acknowledged twice");
                    if let Some(message) = self.queue.remove(&sequence) {
                        assert_eq!(message.partition, partition);
                    }
                }
                Action::DeadLetter { sequence, frame, .. } => {
                    let message = self.queue.remove(&sequence);
                    assert_eq!(message.map(|message| message.frame), Some(frame));
                }
                Action::Reject(key, rank, reject) => self.rejects.push((key, rank, reject)),
                Action::Publish(_, header, values) => {
                    assert!(committed, "published without a commit");
                    let state = self.state(header.job, header.shard);
                    assert_eq!((state.head, &state.ledger), (header.head, &header.ledger));
                    assert_eq!(values, state.values.slice(..BYTES));
                    self.publish((header.job, header.shard), header.head.version);
                }
                Action::ClearSuspect(_) => {}
                other => self.pending.push(other),
            }
        }
        self.check();
    }

    pub(super) fn publish(&mut self, shard: ShardKey, version: u64) {
        let versions = self.published.entry(shard).or_default();
        assert!(versions.last().is_none_or(|last| *last <= version), "versions go back");
        versions.push(version);
    }

    /// Performs everything there is to perform (timers excepted).
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.pending.is_empty() {
                return;
            }
            let action = self.pending.remove(0);
            if let Some(event) = self.perform(action) {
                self.tell(event);
            }
        }
        panic!("the core does not come to rest: {:?}", &self.notes[self.notes.len() - 20..]);
    }

    /// Does what takes time; returns the answer.
    pub(super) fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::LookUp(key) => {
                let view = self.registry.get(&key).cloned().flatten();
                Some(Event::Job(key, view))
            }
            Action::ReadHead(key) => {
                Some(Event::Head(key, now_or_never(self.store.fetch_head(key.0, key.1)).map(Box::new)))
            }
            Action::Fold(id, plan) => Some(Event::Folded(id, self.fold(&plan))),
            Action::Commit(id, commit, state) => {
                let (shard, ledger) = ((commit.job, commit.shard), commit.ledger.clone());
                let outcome = now_or_never(self.store.commit(commit, state));
                if let Ok(CommitOutcome::Committed(_)) = &outcome {
                    self.history.entry(shard).or_default().push(ledger);
                }
                Some(Event::Committed(id, outcome))
            }
            Action::CommitPartial(id, commit, state) => {
                Some(Event::Committed(id, now_or_never(self.store.commit_partial(commit, state))))
            }
            Action::Republish(_, key) => {
                let state = now_or_never(self.store.fetch(key.0, key.1, false)).ok()?;
                self.publish(key, state.head.version);
                None
            }
            Action::FailJob(key, incarnation, error) => {
                if let Some(Some(job)) = self.registry.get(&key)
                    && job.record.incarnation == incarnation
                {
                    let job = job.record.spec.key.job.to_string();
                    self.change(&job, |record, _| record.state = JobState::Failed(error));
                }
                let view = self.registry.get(&key).cloned().flatten();
                Some(Event::Job(key, view))
            }
            other => panic!("{other:?} is done at once"),
        }
    }

    pub(super) fn fold(&self, plan: &Plan) -> Result<Bytes, FoldError> {
        let unavailable = |error: thalweg_store::StoreError| FoldError::Unavailable(error.to_string());
        let job = plan.job.record.incarnation;
        let state = now_or_never(self.store.fetch(job, plan.shard, true)).map_err(unavailable)?;
        let function = plan.job.function(plan.round);
        let context = ShardContext { elements: ELEMENTS, groups: &[], round: plan.round };
        let open = now_or_never(self.store.fetch_partial(job, plan.shard)).map_err(unavailable)?;
        let mut fold = match open {
            Some((head, _, partial)) if head == plan.expect => function.resume(context, &partial).unwrap(),
            None if state.head == plan.expect => function.begin(context),
            // From the start, where another has folded already.
            Some((head, ..)) if head.closed() == plan.expect => function.begin(context),
            _ => return Err(FoldError::Moved),
        };
        for input in &plan.inputs {
            let values = match &input.values {
                Some(values) => values.clone(),
                None => {
                    let parked = self.queue.get(&input.sequence).map(|message| message.frame.clone());
                    let parked = parked.filter(|frame| checksum(&[frame]) == input.checksum);
                    let parked = parked.ok_or(FoldError::ParkedGone(input.rank))?;
                    frame::open::<GradientHeader>(Kind::Gradient, &parked).unwrap().1
                }
            };
            fold.accept(Contribution { rank: input.rank, weight: input.weight, values: &values });
        }
        let mut out = Vec::new();
        if plan.suspend {
            fold.suspend(&mut out);
        } else {
            fold.finish(&state.values, &mut out);
        }
        Ok(out.into())
    }

    /// What must hold after every event.
    fn check(&self) {
        let sum: usize = self.core.shards.values().map(super::super::shard::Shard::held_bytes).sum();
        assert_eq!(self.core.held_bytes(), sum, "held bytes are those of the entries");
        assert!(sum <= self.core.limits.held_bytes, "{sum} bytes held");
        let runs = self.core.invocations();
        assert!(runs <= self.core.limits.invocations);
        assert!(runs <= 1 || self.core.invocations.values().all(|run| !run.plan.careful), "not alone");
    }

    /// Nothing is left of anything.
    pub(super) fn assert_idle(&self) {
        assert!(self.queue.is_empty(), "un-acknowledged: {:?}", self.queue.keys());
        assert!(self.pending.is_empty());
        assert_eq!((self.core.held_bytes(), self.core.held_messages(), self.core.invocations()), (0, 0, 0));
    }

    pub(super) fn take_notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }
}

//! The sans-I/O heart of an invoker: group, close, fold, commit, publish, acknowledge, park, suspect.
//!
//! [`Core::handle`] takes one event and the time and returns what to do, in order. Everything it knows
//! can be lost at any instant: contributions stay un-acknowledged in their work queue until the commit
//! that contains them has returned (rules P1, P6).

mod admit;
mod partial;
mod round;
mod shard;
mod tally;
mod types;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use thalweg_protocol::{ErrorCode, Incarnation, JobKey, JobLoad, Partition, Reject, ShardIndex, WireError};

pub(crate) use types::may_pass;
pub use types::{Action, Delivery, Event, FoldError, Gathered, Input, InvocationId, Millis, Plan, ShardKey};

use crate::{Job, holdings::Rest, metrics};
use round::Invocation;
use shard::{Entry, Shard};
use tally::Tally;

/// Bounds of one core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Payload bytes kept in memory; beyond it contributions are parked in their stream.
    pub held_bytes: usize,
    /// Invocations under way at once.
    pub invocations: usize,
    /// Shards remembered while they have nothing to do.
    pub idle_shards: usize,
    /// Contributions to an open round that are folded without waiting for the others (rule P12).
    pub partial_entries: usize,
    /// Time that a contribution waits for others before it is folded, milliseconds.
    pub linger: Millis,
}

/// Wait before something that failed is tried again.
const RETRY_MS: Millis = 100;
/// Look-ups after which a roster epoch that the registry does not know is taken for nonsense.
const MAX_LOOK_UPS: u32 = 20;

/// See the module.
#[derive(Debug)]
pub struct Core {
    limits: Limits,
    partitions: HashMap<Partition, Holding>,
    jobs: BTreeMap<JobKey, Option<Arc<Job>>>,
    /// Messages that wait for a look-up, with the number of look-ups they have seen.
    unknown: HashMap<JobKey, Vec<(Delivery, u32)>>,
    looking_up: HashSet<JobKey>,
    /// Lives that have to fail, until the registry says that they have: they close no round meanwhile.
    failing: BTreeMap<Incarnation, (JobKey, WireError)>,
    /// Heads that are being read, with the clock when that was begun. Beside the shards, because an
    /// answer may outlive what it was asked for.
    reading: HashMap<ShardKey, u64>,
    shards: HashMap<ShardKey, Shard>,
    invocations: HashMap<InvocationId, Invocation>,
    /// Shards whose round is complete and waits for one of the invocations to end.
    ready: BTreeSet<ShardKey>,
    /// What to look at again, and when.
    timers: BTreeMap<(Millis, u64), Timer>,
    next_id: u64,
    held_bytes: usize,
    /// Counts events, to tell whether a head was read after a contribution came.
    clock: u64,
    now: Millis,
    tally: Tally,
    actions: Vec<Action>,
}

#[derive(Debug, Default)]
struct Holding {
    draining: bool,
    careful_until: Option<u64>,
    delivered_until: u64,
    poison: Option<u64>,
}

#[derive(Debug)]
enum Timer {
    Evaluate(ShardKey),
    ReadHead(ShardKey),
    LookUp(JobKey),
    FailJob(Incarnation),
    Refold(InvocationId),
    Recommit(InvocationId),
}

impl Core {
    /// A core that holds nothing.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            partitions: HashMap::new(),
            jobs: BTreeMap::new(),
            unknown: HashMap::new(),
            looking_up: HashSet::new(),
            failing: BTreeMap::new(),
            reading: HashMap::new(),
            shards: HashMap::new(),
            invocations: HashMap::new(),
            ready: BTreeSet::new(),
            timers: BTreeMap::new(),
            next_id: 0,
            held_bytes: 0,
            clock: 0,
            now: 0,
            tally: Tally::default(),
            actions: Vec::new(),
        }
    }

    /// Takes one event in; returns what to do, in order.
    pub fn handle(&mut self, event: Event, now: Millis) -> Vec<Action> {
        self.clock += 1;
        self.now = self.now.max(now);
        match event {
            Event::Held { partition, careful_until, poison } => {
                self.forget(partition);
                let holding = Holding { careful_until, poison, ..Holding::default() };
                self.partitions.insert(partition, holding);
            }
            Event::Drain(partition) => {
                if let Some(holding) = self.partitions.get_mut(&partition) {
                    holding.draining = true;
                }
            }
            Event::Lost(partition) => {
                self.forget(partition);
                self.partitions.remove(&partition);
            }
            Event::Delivered(delivery) => self.deliver(delivery, 0),
            Event::Job(key, job) => self.learn(&key, job),
            Event::LookUpFailed(key) => {
                self.looking_up.remove(&key);
                // The same answer tells that a failure was not recorded.
                let failing: Vec<_> =
                    self.failing.iter().filter(|(_, (name, _))| *name == key).map(|(job, _)| *job).collect();
                failing.into_iter().for_each(|job| self.later(RETRY_MS, Timer::FailJob(job)));
                if self.knows(&key) {
                    self.later(RETRY_MS, Timer::LookUp(key));
                }
            }
            Event::Head(key, result) => self.head_read(key, result),
            Event::Folded(id, result) => self.folded(id, result),
            Event::Committed(id, result) => self.committed(id, result),
            Event::Tick => {}
        }
        self.fire_timers();
        self.start_ready();
        std::mem::take(&mut self.actions)
    }

    /// When to send the next [`Event::Tick`], if nothing else happens.
    #[must_use]
    pub fn next_tick(&self) -> Option<Millis> {
        self.timers.keys().next().map(|(at, _)| *at)
    }

    /// What jobs have asked of this invoker since the last call, for its next heartbeat.
    pub fn take_loads(&mut self, now: Millis) -> Vec<JobLoad> {
        self.tally.take(now)
    }

    /// Messages held or parked.
    #[must_use]
    pub fn held_messages(&self) -> usize {
        self.shards.values().map(Shard::entries).sum::<usize>()
            + self.unknown.values().map(Vec::len).sum::<usize>()
    }

    /// Payload bytes in memory.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Bytes of messages that wait for a look-up of their job. They cannot be parked, since nothing is known
    /// of them yet, so whoever pulls has to pause while there are many.
    #[must_use]
    pub fn unknown_bytes(&self) -> usize {
        self.unknown.values().flatten().map(|(delivery, _)| delivery.frame.len()).sum()
    }

    /// Whether the budget for contributions is used up while rounds are being folded: then it is better to wait for
    /// those than to park what comes.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.held_bytes * 8 >= self.limits.held_bytes * 7 && !self.invocations.is_empty()
    }

    /// Invocations under way.
    #[must_use]
    pub fn invocations(&self) -> usize {
        self.invocations.len()
    }

    /// What a partition that is being given up still has to do here.
    #[must_use]
    pub fn rest(&self, partition: Partition) -> Rest {
        let waiting = |delivery: &Delivery| delivery.partition == partition;
        if self.invocations.values().any(|invocation| invocation.plan.partition == partition) {
            Rest::Invocations
        } else if self.shards.values().any(|shard| shard.partition == partition && shard.entries() > 0)
            || self.unknown.values().flatten().any(|(delivery, _)| waiting(delivery))
        {
            Rest::Contributions
        } else {
            Rest::Nothing
        }
    }

    /// Whether a partition's contributions are being tried alone (rule P18).
    #[must_use]
    pub fn is_careful_partition(&self, partition: Partition) -> bool {
        self.partitions.get(&partition).is_some_and(|holding| holding.careful_until.is_some())
    }

    /// Jobs that have contributions waiting here.
    pub fn active_jobs(&self) -> impl Iterator<Item = &JobKey> {
        let active: HashSet<Incarnation> =
            self.shards.iter().filter(|(_, shard)| shard.entries() > 0).map(|((job, _), _)| *job).collect();
        self.jobs
            .iter()
            .filter(move |(_, job)| job.as_ref().is_some_and(|job| active.contains(&job.record.incarnation)))
            .map(|(key, _)| key)
    }

    /// Whether a job is known here, so that a hint about it matters.
    #[must_use]
    pub fn knows(&self, key: &JobKey) -> bool {
        self.jobs.contains_key(key) || self.unknown.contains_key(key)
    }

    fn later(&mut self, delay: Millis, timer: Timer) {
        self.next_id += 1;
        self.timers.insert((self.now + delay, self.next_id), timer);
    }

    fn fire_timers(&mut self) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > self.now {
                return;
            }
            match entry.remove() {
                Timer::Evaluate(key) => self.evaluate(key),
                Timer::ReadHead(key) => {
                    if self.shards.contains_key(&key) {
                        self.actions.push(Action::ReadHead(key));
                    } else {
                        self.reading.remove(&key);
                    }
                }
                Timer::LookUp(key) => self.look_up(key),
                Timer::FailJob(job) => {
                    if let Some((key, error)) = self.failing.get(&job).cloned() {
                        self.actions.push(Action::FailJob(key, job, error));
                    }
                }
                Timer::Refold(id) => self.fold_again(id),
                Timer::Recommit(id) => self.commit_again(id),
            }
        }
    }

    /// Asks the registry about a job, once at a time.
    fn look_up(&mut self, key: JobKey) {
        if self.looking_up.insert(key.clone()) {
            self.actions.push(Action::LookUp(key));
        }
    }

    /// Everything gathered of a partition is dropped; the broker still has it.
    fn forget(&mut self, partition: Partition) {
        let mut freed = 0;
        self.shards.retain(|_, shard| {
            let keep = shard.partition != partition;
            if !keep {
                freed += shard.held_bytes();
            }
            keep
        });
        self.held_bytes -= freed;
        let shards = &self.shards;
        self.ready.retain(|key| shards.contains_key(key));
        // Their commits may still happen; whoever holds the partition next finds that out.
        self.invocations.retain(|_, invocation| invocation.plan.partition != partition);
        for waiting in self.unknown.values_mut() {
            waiting.retain(|(delivery, _)| delivery.partition != partition);
        }
        self.unknown.retain(|_, waiting| !waiting.is_empty());
    }

    /// Takes in what the registry says about a job.
    fn learn(&mut self, key: &JobKey, job: Option<Arc<Job>>) {
        self.looking_up.remove(key);
        self.failing.retain(|life, (name, _)| {
            let runs =
                |job: &Arc<Job>| job.record.incarnation == *life && job.record.state.end(key).is_none();
            name != key || job.as_ref().is_some_and(runs)
        });
        let before = self.jobs.insert(key.clone(), job.clone()).flatten();
        if let Some(before) = before {
            let same = job.as_ref().is_some_and(|job| job.record.incarnation == before.record.incarnation);
            if !same {
                self.drop_job(key, before.record.incarnation, &gone(key));
            }
        }
        if let Some(job) = &job {
            let incarnation = job.record.incarnation;
            if let Some(error) = job.record.state.end(key) {
                self.drop_job(key, incarnation, &error);
            }
            let mut shards: Vec<_> =
                self.shards.keys().filter(|(owner, _)| *owner == incarnation).copied().collect();
            shards.sort_unstable();
            shards.into_iter().for_each(|shard| self.evaluate(shard));
        }
        for (delivery, seen) in self.unknown.remove(key).unwrap_or_default() {
            self.deliver(delivery, seen + 1);
        }
        if job.is_none() && !self.unknown.contains_key(key) {
            // Nothing of it is here: forget it, or strangers' names would fill the memory.
            self.jobs.remove(key);
        }
    }

    /// The job's incarnation is over: its contributions are acknowledged and counted (rule P3).
    fn drop_job(&mut self, key: &JobKey, incarnation: Incarnation, error: &WireError) {
        let mut shards: Vec<_> =
            self.shards.keys().filter(|(owner, _)| *owner == incarnation).copied().collect();
        shards.sort_unstable();
        for shard_key in shards {
            let Some(mut shard) = self.shards.remove(&shard_key) else { continue };
            self.ready.remove(&shard_key);
            self.held_bytes -= shard.held_bytes();
            for delivery in std::mem::take(&mut shard.contested) {
                metrics::leftover("gone");
                self.actions.push(Action::Acknowledge(shard.partition, delivery.sequence));
            }
            for (sequence, _) in std::mem::take(&mut shard.nudges) {
                self.actions.push(Action::Acknowledge(shard.partition, sequence));
            }
            for (round, entry) in shard.take_all() {
                metrics::leftover("gone");
                self.reject(key, &entry, shard_key.1, round, error.clone());
                self.actions.push(Action::Acknowledge(shard.partition, entry.sequence));
            }
        }
        self.invocations.retain(|_, invocation| invocation.plan.job.record.incarnation != incarnation);
    }

    fn reject(&mut self, key: &JobKey, entry: &Entry, shard: ShardIndex, round: u64, error: WireError) {
        metrics::rejected(error.code);
        let reject = Reject { job: None, worker: Some(entry.worker), at: Some((shard, round)), error };
        self.actions.push(Action::Reject(key.clone(), entry.rank, reject));
    }

    fn fail_job(&mut self, job: &Job, error: WireError) {
        let (key, life) = (job.record.spec.key.clone(), job.record.incarnation);
        if self.failing.contains_key(&life) {
            // Whoever is first says why.
            return;
        }
        tracing::error!(job = %key, %error, "job fails");
        self.failing.insert(life, (key.clone(), error.clone()));
        self.actions.push(Action::FailJob(key, life, error));
    }

    /// The view of a shard's job, if it is still the current one.
    fn job_of(&self, key: ShardKey, name: &JobKey) -> Option<Arc<Job>> {
        self.jobs.get(name)?.as_ref().filter(|job| job.record.incarnation == key.0).cloned()
    }
}

fn gone(key: &JobKey) -> WireError {
    WireError::new(ErrorCode::Gone, format!("this life of job {key} is over: open the job again"))
}

#[cfg(test)]
mod tests;

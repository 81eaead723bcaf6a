//! An invoker: its core, and a shell that does what `thalweg-invoker`'s does around it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use rand::{RngExt as _, seq::SliceRandom as _};
use thalweg_functions::{Contribution, Kind as FunctionKind, ShardContext};
use thalweg_invoker::core::{Action, Core, Delivery, Event as CoreEvent, FoldError, Limits, Plan};
use thalweg_protocol::{
    Epoch, GradientHeader, InvokerBeat, InvokerState, Kind, Partition, Placement, ResultHeader, checksum,
    frame, subjects,
};

use crate::{
    Mutation,
    network::{Actor, Body, Millis, StreamState},
    world::{Event, Timer, World},
};

/// Time between its heartbeats.
pub(crate) const BEAT_MS: Millis = 200;
/// Time between its readings of the placement.
pub(crate) const REFRESH_MS: Millis = 500;
/// Silence of a pull request after which the partition is taken over again.
const SILENCE_MS: Millis = 5000;
/// Longest time to hand partitions over when told to stop.
const DRAIN_MS: Millis = 1000;
const BATCH: u64 = 4;
/// Virtual time begins here on every wall clock.
const EPOCH_MS: Millis = 1_000_000_000;

/// A partition in its hands, or on the way there.
pub(crate) enum Slot {
    Taking { epoch: Epoch, own: Option<String>, found: Option<(bool, StreamState)>, name: String },
    Held(Holding),
    Leaving(Holding, Millis),
}

pub(crate) struct Holding {
    epoch: Epoch,
    consumer: String,
    next_delivery: u64,
    credit: u64,
    heard: Millis,
    /// Delivered by this consumer: what can be acknowledged.
    replies: BTreeSet<u64>,
}

/// An invoker's process.
pub(crate) struct Host {
    pub(crate) core: Core,
    slots: BTreeMap<Partition, Slot>,
    drain_until: Option<Millis>,
    /// Its clock is this much ahead.
    skew: Millis,
    /// Dies after so many more actions.
    pub(crate) dies_after: Option<u32>,
    armed: Option<Millis>,
}

impl Host {
    pub(crate) fn new(limits: Limits, skew: Millis) -> Self {
        Self {
            core: Core::new(limits),
            slots: BTreeMap::new(),
            drain_until: None,
            skew,
            dies_after: None,
            armed: None,
        }
    }
}

impl World {
    fn id(number: u32) -> String {
        format!("i{number}")
    }

    /// Tells the core something and performs what follows.
    fn tell(&mut self, number: u32, event: CoreEvent) {
        let now = self.now;
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let clock = EPOCH_MS + now + host.skew;
        let actions = host.core.handle(event, clock);
        if let Some(at) = host.core.next_tick() {
            let at = at.saturating_sub(EPOCH_MS + host.skew).max(now + 1);
            if host.armed.is_none_or(|armed| armed <= now || at < armed) {
                host.armed = Some(at);
                self.timer(at - now, Actor::Invoker(number), Timer::Core);
            }
        }
        for action in actions {
            let Some(host) = self.invokers.get_mut(&number) else { return };
            match &mut host.dies_after {
                Some(0) => {
                    self.note(|| format!("i{number} dies before {action:?}").chars().take(120).collect());
                    return self.invoker_dies(number);
                }
                Some(left) => *left -= 1,
                None => {}
            }
            self.perform(number, action);
        }
    }

    fn perform(&mut self, number: u32, action: Action) {
        let me = Actor::Invoker(number);
        match action {
            Action::Acknowledge(partition, sequence) => self.acknowledge(number, partition, sequence),
            Action::LookUp(key) => self.send(me, Actor::Broker, Body::LookUp(key)),
            Action::ReadHead(key) => self.send(me, Actor::Store, Body::ReadHead(key)),
            Action::Fold(id, plan) => {
                let result = self.fold(&plan);
                let delay = self.rng.random_range(0..5);
                self.local(delay, me, Body::Folded(id, result));
            }
            Action::Commit(id, commit, state) => {
                if self.mutated(Mutation::AcknowledgeBeforeCommit) {
                    let frames = self.broker.pending_of(commit.shard, commit.ledger.round);
                    for (partition, sequence) in frames {
                        self.acknowledge(number, partition, sequence);
                    }
                }
                if self.mutated(Mutation::PublishBeforeCommit) {
                    let head = commit.expect.next(&commit.ledger, commit.function, checksum(&[&state]));
                    let (job, shard, ledger) = (commit.job, commit.shard, commit.ledger.clone());
                    let parameters = self.job.record.layout.len(shard) * 4;
                    let header = ResultHeader { job, shard, head, ledger };
                    let bytes = frame::seal(Kind::Result, &header, &state[..parameters]);
                    self.send(me, Actor::Broker, Body::PublishResult(bytes));
                }
                self.send(me, Actor::Store, Body::Commit(id, Box::new(commit), state));
            }
            Action::Publish(_, header, values) => {
                let bytes = frame::seal(Kind::Result, &header, &values);
                self.send(me, Actor::Broker, Body::PublishResult(bytes));
            }
            Action::Republish(_, key) => {
                let delay = self.rng.random_range(0..5);
                self.local(delay, me, Body::Republish(key));
            }
            Action::Reject(_, rank, reject) => self.send(me, Actor::Broker, Body::Reject(rank, reject)),
            Action::DeadLetter { error, .. } => self.checker.fail("I2", format!("a dead letter: {error}")),
            Action::FailJob(_, _, error) => self.checker.fail("L1", format!("the job fails: {error}")),
        }
    }

    fn acknowledge(&mut self, number: u32, partition: Partition, sequence: u64) {
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let Some(Slot::Held(held) | Slot::Leaving(held, _)) = host.slots.get_mut(&partition) else { return };
        if held.replies.remove(&sequence) {
            let consumer = held.consumer.clone();
            let body = Body::Acknowledge { partition, consumer, sequence };
            self.send(Actor::Invoker(number), Actor::Broker, body);
        }
    }

    fn fold(&mut self, plan: &Plan) -> Result<Bytes, FoldError> {
        let function = plan.job.function(plan.round).clone();
        let elements = plan.job.record.layout.len(plan.shard);
        let state = if function.kind() == FunctionKind::Optimizer || plan.inputs.is_empty() {
            let state = self.store.fetch(plan.shard, true);
            let state = state.map_err(|error| FoldError::Unavailable(error.to_string()))?;
            if state.head != plan.expect {
                return Err(FoldError::Moved);
            }
            state.values
        } else {
            Bytes::new()
        };
        let mut inputs = Vec::new();
        for input in &plan.inputs {
            let values = match &input.values {
                Some(values) => values.clone(),
                None if !self.broker_up => {
                    return Err(FoldError::Unavailable("the broker is down".to_owned()));
                }
                None => {
                    let message = self.broker.get(plan.partition, input.sequence);
                    let same = message.filter(|message| checksum(&[&message.frame]) == input.checksum);
                    let Some(message) = same else { return Err(FoldError::ParkedGone(input.rank)) };
                    let opened = frame::open::<GradientHeader>(Kind::Gradient, &message.frame);
                    opened.map_err(|_| FoldError::ParkedGone(input.rank))?.1
                }
            };
            inputs.push((input.rank, input.weight, values));
        }
        if self.mutated(Mutation::FoldInAnyOrder) {
            let mut values: Vec<_> = inputs.iter().map(|(_, _, values)| values.clone()).collect();
            values.shuffle(&mut self.rng);
            inputs.iter_mut().zip(values).for_each(|(input, values)| input.2 = values);
        }
        let mut fold = function.begin(ShardContext { elements, groups: &[] }, &state);
        for (rank, weight, values) in &inputs {
            fold.accept(Contribution { rank: *rank, weight: *weight, values });
        }
        let mut out = Vec::new();
        fold.finish(&mut out);
        Ok(out.into())
    }

    pub(crate) fn invoker_hears(&mut self, number: u32, body: Body) {
        let me = Actor::Invoker(number);
        match body {
            Body::Placement(placement) => self.follow(number, &placement),
            Body::Job(key, job) => self.tell(number, CoreEvent::Job(key, job)),
            Body::LookUpFailed(key) => self.tell(number, CoreEvent::LookUpFailed(key)),
            Body::HeadRead(key, result) => self.tell(number, CoreEvent::Head(key, result)),
            Body::Folded(id, result) => self.tell(number, CoreEvent::Folded(id, result)),
            Body::Committed(id, result) => self.tell(number, CoreEvent::Committed(id, result)),
            Body::Republish(key) => {
                if let Ok(state) = self.store.fetch(key.1, false) {
                    let header =
                        ResultHeader { job: key.0, shard: key.1, head: state.head, ledger: state.ledger };
                    let bytes = frame::seal(Kind::Result, &header, &state.values);
                    self.send(me, Actor::Broker, Body::PublishResult(bytes));
                }
            }
            Body::Listed { partition, epoch, consumers, stream } => {
                self.listed(number, partition, epoch, consumers, stream);
            }
            Body::Deleted { partition, epoch } => {
                if let Some(name) = self.taking(number, partition, epoch) {
                    self.send(me, Actor::Broker, Body::Create { partition, epoch, name });
                }
            }
            Body::Created { partition, epoch, name } => self.created(number, partition, epoch, name),
            Body::TakeoverFailed { partition, epoch } => {
                if self.taking(number, partition, epoch).is_some() {
                    // The next reading of the placement finds it missing and takes it again.
                    self.slots(number).remove(&partition);
                    self.send(me, Actor::Broker, Body::ReadPlacement);
                }
            }
            Body::ConsumerGone { partition, consumer } => {
                let ours = matches!(self.slots(number).get(&partition),
                    Some(Slot::Held(held)) if held.consumer == consumer);
                if ours {
                    self.retake(number, partition);
                }
            }
            Body::Deliver { partition, consumer, consumer_sequence, message } => {
                let now = self.now;
                let Some(Slot::Held(held) | Slot::Leaving(held, _)) = self.slots(number).get_mut(&partition)
                else {
                    return;
                };
                if held.consumer != consumer {
                    return;
                }
                held.credit = held.credit.saturating_sub(1);
                held.heard = now;
                let in_order = held.next_delivery == consumer_sequence;
                held.next_delivery = consumer_sequence + 1;
                held.replies.insert(message.sequence);
                if !in_order {
                    return self.retake(number, partition);
                }
                let delivery = Delivery {
                    partition,
                    sequence: message.sequence,
                    published: EPOCH_MS + message.published,
                    subject: message.subject.clone(),
                    frame: message.frame.clone(),
                };
                self.tell(number, CoreEvent::Delivered(delivery));
                self.pull(number, partition);
            }
            other => unreachable!("not for an invoker: {other:?}"),
        }
        self.finish_leaving(number);
    }

    fn slots(&mut self, number: u32) -> &mut BTreeMap<Partition, Slot> {
        match self.invokers.get_mut(&number) {
            Some(host) => &mut host.slots,
            None => &mut self.nobody,
        }
    }

    /// The consumer's name of a takeover under way.
    fn taking(&mut self, number: u32, partition: Partition, epoch: Epoch) -> Option<String> {
        match self.slots(number).get(&partition)? {
            Slot::Taking { epoch: wanted, name, .. } if *wanted == epoch => Some(name.clone()),
            _ => None,
        }
    }

    fn follow(&mut self, number: u32, placement: &Placement) {
        for (partition, placed) in (0..).zip(&placement.partitions) {
            let ours = placed.holder == Some(Self::id(number));
            let newer = |epoch: &Epoch| *epoch < placed.epoch;
            match self.slots(number).get(&partition) {
                None if ours => self.take(number, partition, placed.epoch, None),
                Some(Slot::Taking { epoch, .. }) if ours && newer(epoch) => {
                    self.take(number, partition, placed.epoch, None);
                }
                Some(Slot::Held(held)) if ours && newer(&held.epoch) => {
                    self.take(number, partition, placed.epoch, None);
                }
                Some(Slot::Held(held)) if !ours && newer(&held.epoch) => self.leave(number, partition),
                Some(Slot::Taking { epoch, .. }) if !ours && newer(epoch) => {
                    self.slots(number).remove(&partition);
                }
                _ => {}
            }
        }
    }

    fn take(&mut self, number: u32, partition: Partition, epoch: Epoch, own: Option<String>) {
        let name = subjects::consumer(epoch, self.rng.random());
        self.slots(number).insert(partition, Slot::Taking { epoch, own, found: None, name });
        self.send(Actor::Invoker(number), Actor::Broker, Body::List(partition, epoch));
    }

    fn listed(
        &mut self,
        number: u32,
        partition: Partition,
        epoch: Epoch,
        consumers: Vec<(String, usize)>,
        stream: StreamState,
    ) {
        let kept = self.mutated(Mutation::ConsumerKept);
        let Some(Slot::Taking { epoch: wanted, own, found, name }) = self.slots(number).get_mut(&partition)
        else {
            return;
        };
        if *wanted != epoch {
            return;
        }
        if consumers.iter().any(|(name, _)| subjects::consumer_epoch(name) > epoch) {
            self.slots(number).remove(&partition);
            return;
        }
        let unclean = consumers.iter().any(|(name, pending)| *pending > 0 && own.as_ref() != Some(name));
        *found = Some((unclean, stream));
        let me = Actor::Invoker(number);
        match consumers.into_iter().next() {
            Some((there, _)) if kept => {
                name.clone_from(&there);
                self.send(me, Actor::Broker, Body::Create { partition, epoch, name: there });
            }
            Some((there, _)) => self.send(me, Actor::Broker, Body::Delete { partition, epoch, name: there }),
            None => {
                let name = name.clone();
                self.send(me, Actor::Broker, Body::Create { partition, epoch, name });
            }
        }
    }

    fn created(&mut self, number: u32, partition: Partition, epoch: Epoch, name: String) {
        let now = self.now;
        let Some(Slot::Taking { epoch: wanted, found, name: ours, .. }) = self.slots(number).get(&partition)
        else {
            return;
        };
        let (true, Some((unclean, stream))) = (*wanted == epoch && *ours == name, *found) else { return };
        let replies = BTreeSet::new();
        let held = Holding { epoch, consumer: name, next_delivery: 1, credit: 0, heard: now, replies };
        self.slots(number).insert(partition, Slot::Held(held));
        let careful_until = (unclean && stream.messages > 0).then_some(stream.last_sequence);
        self.tell(number, CoreEvent::Held { partition, careful_until, poison: None });
        self.pull(number, partition);
    }

    fn pull(&mut self, number: u32, partition: Partition) {
        if let Some(Slot::Held(held)) = self.slots(number).get_mut(&partition)
            && held.credit <= BATCH / 2
        {
            held.credit += BATCH;
            let consumer = held.consumer.clone();
            let body = Body::Pull { partition, consumer, batch: BATCH };
            self.send(Actor::Invoker(number), Actor::Broker, body);
        }
    }

    fn retake(&mut self, number: u32, partition: Partition) {
        match self.slots(number).get(&partition) {
            Some(Slot::Held(held)) => {
                let (epoch, own) = (held.epoch, Some(held.consumer.clone()));
                self.tell(number, CoreEvent::Lost(partition));
                self.take(number, partition, epoch, own);
            }
            Some(Slot::Leaving(..)) => {
                self.slots(number).remove(&partition);
                self.tell(number, CoreEvent::Lost(partition));
            }
            _ => {}
        }
    }

    pub(crate) fn invoker_reconnected(&mut self, number: u32) {
        if !self.mutated(Mutation::NoRetakeAfterReconnect) {
            let partitions: Vec<_> = self.slots(number).keys().copied().collect();
            partitions.into_iter().for_each(|partition| self.retake(number, partition));
        }
        self.send(Actor::Invoker(number), Actor::Broker, Body::ReadPlacement);
    }

    fn leave(&mut self, number: u32, partition: Partition) {
        let until = self.now + DRAIN_MS / 2;
        if let Some(Slot::Held(held)) = self.slots(number).remove(&partition) {
            self.slots(number).insert(partition, Slot::Leaving(held, until));
            self.tell(number, CoreEvent::Drain(partition));
        }
    }

    fn finish_leaving(&mut self, number: u32) {
        let now = self.now;
        let Some(host) = self.invokers.get(&number) else { return };
        let over = host.drain_until.is_some_and(|until| now >= until);
        let done: Vec<_> = (host.slots.iter())
            .filter(|(partition, slot)| match slot {
                Slot::Leaving(_, until) => host.core.is_quiet(**partition) || now > *until,
                _ => over,
            })
            .map(|(partition, _)| *partition)
            .collect();
        for partition in done {
            let slot = self.slots(number).remove(&partition);
            self.tell(number, CoreEvent::Lost(partition));
            if let Some(Slot::Held(held) | Slot::Leaving(held, _)) = slot {
                let body = Body::Release { partition, name: held.consumer };
                self.send(Actor::Invoker(number), Actor::Broker, body);
            }
        }
        let ends = self
            .invokers
            .get(&number)
            .is_some_and(|host| host.drain_until.is_some() && host.slots.is_empty());
        if ends {
            self.invoker_beats(number);
            self.later(100, Event::End(number));
        }
    }

    /// It is told to stop.
    pub(crate) fn invoker_stops(&mut self, number: u32) {
        let until = self.now + DRAIN_MS;
        match self.invokers.get_mut(&number) {
            Some(host) => {
                host.drain_until.get_or_insert(until);
                self.invoker_beats(number);
                self.timer(DRAIN_MS, Actor::Invoker(number), Timer::Refresh);
            }
            // It was about to be started.
            None => self.stillborn.push(number),
        }
    }

    pub(crate) fn invoker_beats(&mut self, number: u32) {
        let Some(host) = self.invokers.get(&number) else { return };
        let held = host.slots.iter().filter_map(|(partition, slot)| match slot {
            Slot::Held(held) | Slot::Leaving(held, _) => Some((*partition, held.epoch)),
            Slot::Taking { .. } => None,
        });
        let beat = InvokerBeat {
            invoker: Self::id(number),
            state: if host.drain_until.is_some() { InvokerState::Draining } else { InvokerState::Ready },
            partitions: held.collect(),
            service_bytes_per_s: 0.0,
            busy: 0.5,
            held_messages: host.core.held_messages() as u64,
            held_bytes: host.core.held_bytes() as u64,
            cpu_quota: 1.0,
        };
        self.send(Actor::Invoker(number), Actor::Autoscaler, Body::Beat(beat));
    }

    pub(crate) fn invoker_refreshes(&mut self, number: u32) {
        let me = Actor::Invoker(number);
        self.send(me, Actor::Broker, Body::ReadPlacement);
        let (now, listening) = (self.now, self.broker_up && self.links.get(&me).is_some_and(|link| link.up));
        let mut silent = Vec::new();
        let consumers: Vec<_> = (0..self.job.record.partitions)
            .map(|partition| {
                self.broker.list(partition).and_then(|(consumers, _)| consumers.into_iter().next())
            })
            .collect();
        for (partition, slot) in self.slots(number).iter_mut() {
            let Slot::Held(held) = slot else { continue };
            let there =
                consumers[usize::from(*partition)].as_ref().is_some_and(|(name, _)| *name == held.consumer);
            if listening && there {
                // Heartbeats of the pull request.
                held.heard = now;
            } else if now > held.heard + SILENCE_MS {
                silent.push(*partition);
            }
        }
        silent.into_iter().for_each(|partition| self.retake(number, partition));
        self.finish_leaving(number);
    }

    pub(crate) fn invoker_ticks(&mut self, number: u32) {
        if let Some(host) = self.invokers.get_mut(&number) {
            host.armed = None;
        }
        self.tell(number, CoreEvent::Tick);
        self.finish_leaving(number);
    }

    /// Its process is gone.
    pub(crate) fn invoker_dies(&mut self, number: u32) {
        if self.invokers.remove(&number).is_some() {
            self.links.remove(&Actor::Invoker(number));
            self.autoscaler.ended.push(Self::id(number));
        }
    }
}

impl World {
    /// Which invoker pulls for a consumer.
    pub(crate) fn holder_of(&self, partition: Partition, consumer: &str) -> Option<u32> {
        let holds = |host: &Host| {
            matches!(host.slots.get(&partition),
                Some(Slot::Held(held) | Slot::Leaving(held, _)) if held.consumer == consumer)
        };
        self.invokers.iter().find(|(_, host)| holds(host)).map(|(number, _)| *number)
    }
}

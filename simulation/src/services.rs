//! What the broker and the store do with what they hear.

use bytes::Bytes;
use rand::RngExt as _;
use thalweg_protocol::{
    CommitOutcome, ErrorCode, Kind, Ledger, StoreReply, StoreRequest, Suspect, WireError, frame,
};
use thalweg_store::{Config, announce};

use crate::{
    Mutation,
    calls::{Answer, Ask, CallId},
    network::{Actor, Body, Delivered, Millis},
    store::Tried,
    world::{Done, Event, Timer, World},
};

/// Time between flush cycles.
const FLUSH_MS: Millis = 60;

impl World {
    pub(crate) fn broker_hears(&mut self, from: Actor, body: Body) {
        match body {
            Body::Ask(id, ask) => self.broker_is_asked(from, id, ask),
            Body::Pull { partition, consumer, batch } => {
                let epoch = self.epoch(from);
                if self.broker.pull(partition, &consumer, (from, epoch), batch) {
                    self.deliver(partition);
                } else {
                    self.send(Actor::Broker, from, Body::ConsumerGone { partition, consumer });
                }
            }
            Body::Acknowledge { partition, mut consumer, sequence } => {
                if self.mutated(Mutation::ConsumerNameReused)
                    && let Ok(queue) = self.broker.look(partition)
                    && let Some((name, _)) = queue.consumers.into_iter().next()
                {
                    consumer = name;
                }
                if let Some(message) = self.broker.acknowledge(partition, &consumer, sequence)
                    && let Some(header) = Self::contribution(&message.frame)
                {
                    let same = |other: &Bytes| {
                        Self::contribution(other).is_some_and(|other| {
                            (other.job, other.worker, other.shard, other.round)
                                == (header.job, header.worker, header.shard, header.round)
                        })
                    };
                    let copies =
                        self.broker.messages().filter(|(_, _, message)| same(&message.frame)).count();
                    if !self.is_poison(&message.frame) {
                        self.checker.acknowledged(&header, copies);
                    }
                }
            }
            Body::Result(key, bytes) => {
                for index in self.workers_of(&key, None) {
                    self.send(Actor::Broker, Actor::Worker(index), Body::Result(key.clone(), bytes.clone()));
                }
            }
            Body::Reject(key, rank, bytes) => {
                for index in self.workers_of(&key, Some(rank)) {
                    let body = Body::Reject(key.clone(), rank, bytes.clone());
                    self.send(Actor::Broker, Actor::Worker(index), body);
                }
            }
            Body::Beat(beat) => {
                let all: Vec<_> = self.autoscalers.keys().copied().collect();
                for number in all {
                    self.send(Actor::Broker, Actor::Autoscaler(number), Body::Beat(beat.clone()));
                }
            }
            other => unreachable!("not for the broker: {other:?}"),
        }
    }

    fn workers_of(&self, key: &thalweg_protocol::JobKey, rank: Option<u32>) -> Vec<u32> {
        let wanted = |host: &crate::worker::Host| {
            self.specs[host.job].key == *key && rank.is_none_or(|rank| rank == host.rank)
        };
        (0..)
            .zip(&self.workers)
            .filter(|(index, host)| wanted(host) && self.is_connected(Actor::Worker(*index)))
            .map(|(index, _)| index)
            .collect()
    }

    fn broker_is_asked(&mut self, from: Actor, id: CallId, ask: Ask) {
        let now = self.now;
        let refused = |error| Answer::Refused(error);
        let answer = match ask {
            Ask::Entry(key) => {
                let (value, revision) = self.broker.entry(&key);
                Answer::Entry(value, revision)
            }
            Ask::Update(key, value, expect) => {
                let written = self.broker.update(&key, Some(value.clone()), expect);
                if written.is_ok() {
                    self.written(from, &key, Some(&value));
                }
                Answer::Written(written)
            }
            Ask::Purge(key, expect) => {
                let written = self.broker.update(&key, None, expect);
                if written.is_ok() {
                    self.written(from, &key, None);
                }
                Answer::Purged(written.map(drop))
            }
            Ask::Keys => Answer::Keys(self.broker.keys()),
            Ask::Ensure => Answer::Created(self.broker.ensure(now)),
            Ask::Depths => self.broker.depths().map_or_else(refused, Answer::Depths),
            Ask::Look(partition) => self.broker.look(partition).map_or_else(refused, Answer::Queue),
            Ask::DeleteConsumer(_, _) if self.mutated(Mutation::ConsumerKept) => Answer::Done,
            Ask::DeleteConsumer(partition, name) => {
                for (puller, _) in self.broker.delete_consumer(partition, &name) {
                    let body = Body::ConsumerGone { partition, consumer: name.clone() };
                    self.send(Actor::Broker, puller, body);
                }
                Answer::Done
            }
            Ask::CreateConsumer(partition, name) => {
                let created = self.broker.create_consumer(partition, &name);
                created.map_or_else(refused, |()| Answer::Done)
            }
            Ask::Read(partition, sequence) => match self.broker.read(partition, sequence) {
                Ok(message) => Answer::Message(message.map(|message| message.frame)),
                Err(error) => refused(error),
            },
            Ask::Publish(..) if now < self.refuses_until && self.rng.random_bool(0.7) => {
                // 429 too many requests, or 10077 maximum bytes exceeded.
                refused(thalweg_broker::QueueError::Unavailable("429".to_owned()))
            }
            Ask::Publish(..)
                if matches!(from, Actor::Gateway(_)) && self.mutated(Mutation::NudgeForgotten) =>
            {
                Answer::Done
            }
            Ask::Publish(partition, subject, bytes) => {
                let stored = self.broker.publish(partition, subject, bytes, now);
                self.deliver(partition);
                stored.map_or_else(refused, |_| Answer::Done)
            }
            Ask::DeadLetter(bytes) => {
                self.broker.dead_letters.push(bytes);
                Answer::Done
            }
            Ask::Api(bytes) => {
                let gateways: Vec<_> = self
                    .gateways
                    .keys()
                    .copied()
                    .filter(|number| self.is_connected(Actor::Gateway(*number)))
                    .collect();
                if gateways.is_empty() {
                    Answer::Lost
                } else {
                    let number = gateways[self.rng.random_range(0..gateways.len())];
                    let body = Body::Request { from, id, frame: bytes, beat: false };
                    return self.send(Actor::Broker, Actor::Gateway(number), body);
                }
            }
            Ask::Beat(bytes) => {
                let all: Vec<_> = self.gateways.keys().copied().collect();
                for number in all {
                    let body = Body::Request { from, id, frame: bytes.clone(), beat: true };
                    self.send(Actor::Broker, Actor::Gateway(number), body);
                }
                return;
            }
            Ask::Handover(handover) => {
                let holds = |number: &u32| {
                    let holdings = &self.invokers[number].holdings;
                    holdings.holds(handover.partition, &handover.consumer)
                        && self.is_connected(Actor::Invoker(*number))
                };
                if let Some(holder) = self.invokers.keys().copied().find(holds) {
                    let body = Body::Handover { from, id, handover };
                    return self.send(Actor::Broker, Actor::Invoker(holder), body);
                }
                Answer::Nobody
            }
            Ask::Listen(handover) => {
                let me = (from, self.epoch(from));
                for (other, _) in self.broker.listen(handover.partition, &handover.consumer, me) {
                    let body = Body::Heard { from, id, handover: handover.clone() };
                    self.send(Actor::Broker, other, body);
                }
                return;
            }
            Ask::StopListening(partition, consumer) => {
                let me = (from, self.epoch(from));
                self.broker.stop_listening(partition, &consumer, me);
                Answer::Done
            }
            Ask::Store(_) | Ask::Sleep(_) => unreachable!("not for the broker"),
        };
        self.send(Actor::Broker, from, Body::Answer(id, answer));
    }

    /// A key was written: everybody who listens hears of it.
    fn written(&mut self, by: Actor, key: &str, value: Option<&Bytes>) {
        self.key_written(key, value);
        if !key.starts_with("lease.") {
            let gateways = self.gateways.keys().copied().map(Actor::Gateway);
            let invokers = self.invokers.keys().copied().map(Actor::Invoker);
            let gateways = gateways.filter(|_| key.starts_with("roster.") || key.starts_with("job."));
            for actor in gateways.chain(invokers).collect::<Vec<_>>() {
                self.send(Actor::Broker, actor, Body::Hint(key.to_owned()));
            }
        }
        // The record that says what is tried next; here it kills whoever tries it.
        if let Some(partition) = key.strip_prefix("suspect.").and_then(|number| number.parse().ok())
            && let Some(suspect) = value.and_then(|value| frame::open_record::<Suspect>(value).ok())
            && let Ok(Some(message)) = self.broker.read(partition, suspect.sequence)
            && self.is_poison(&message.frame)
        {
            self.note(|| format!("{by:?} dies of poison, attempt {}", suspect.attempt));
            self.doom(by);
        }
    }

    /// Sends what a partition's consumer has been asked for.
    pub(crate) fn deliver(&mut self, partition: thalweg_protocol::Partition) {
        for delivery in self.broker.deliveries(partition) {
            let message = Delivered {
                partition,
                consumer: delivery.consumer,
                consumer_sequence: delivery.consumer_sequence,
                sequence: delivery.sequence,
                published: delivery.message.published,
                subject: delivery.message.subject,
                frame: delivery.message.frame,
            };
            for (listener, _) in delivery.listeners {
                self.send(Actor::Broker, listener, Body::Deliver(Box::new(message.clone())));
            }
        }
    }

    pub(crate) fn store_starts(&mut self) -> anyhow::Result<()> {
        if self.mutated(Mutation::PartialForgotten) {
            self.store.forget_partials()?;
        }
        if !self.store.start()? {
            // It has died in the attempt.
            self.store.kill();
            let delay = self.rng.random_range(10..300);
            self.later(delay, Event::Start(Actor::Store));
            return Ok(());
        }
        self.born(Actor::Store);
        self.note(|| "the store has started".to_owned());
        for index in 0..self.specs.len() {
            let Some(record) = self.record_of(index) else { continue };
            let job = record.incarnation;
            match self.store.heads(job) {
                Ok(heads) => {
                    self.checker.reopened(job, &heads);
                    for shard in 0..record.layout.shards() {
                        if let Some(standing) = self.store.standing(job, shard) {
                            self.checker.reopened_partial(job, shard, &standing);
                        }
                    }
                    for (shard, head) in (0..).zip(&heads) {
                        self.restarted_at.insert((job, shard), head.version);
                    }
                }
                Err(error) => self.checker.refused_after_start(job, &error.to_wire()),
            }
        }
        let registry = self.remote(Actor::Store).registry();
        self.spawn(Actor::Store, async move {
            let announced =
                announce(&registry, thalweg_protocol::StoreId([7; 16]), 0, &Config::default()).await;
            Done::Announced(announced.is_ok())
        });
        self.timer(FLUSH_MS, Actor::Store, Timer::Flush);
        Ok(())
    }

    pub(crate) fn store_done(&mut self, done: Done) -> anyhow::Result<()> {
        if let Done::Announced(announced) = done {
            if announced {
                self.store_serves = true;
            } else {
                let registry = self.remote(Actor::Store).registry();
                let remote = self.remote(Actor::Store);
                self.spawn(Actor::Store, async move {
                    remote.sleep(50).await;
                    let id = thalweg_protocol::StoreId([7; 16]);
                    Done::Announced(announce(&registry, id, 0, &Config::default()).await.is_ok())
                });
            }
        }
        Ok(())
    }

    pub(crate) fn store_flushes(&mut self) -> anyhow::Result<()> {
        self.timer(FLUSH_MS, Actor::Store, Timer::Flush);
        self.store.flush()?;
        self.store_answers();
        Ok(())
    }

    pub(crate) fn store_hears(&mut self, from: Actor, body: Body) -> anyhow::Result<()> {
        let Body::Ask(id, Ask::Store(bytes)) = body else { return Ok(()) };
        if !self.store_serves {
            return Ok(());
        }
        let (request, mut payload) = match frame::open::<StoreRequest>(Kind::StoreRequest, &bytes) {
            Ok(opened) => opened,
            Err(error) => anyhow::bail!("an unreadable request: {error}"),
        };
        let mut changed = false;
        let request = match request {
            StoreRequest::Commit(mut commit) => {
                if self.mutated(Mutation::CommitOnAnyHead)
                    && let Ok(heads) = self.store.heads(commit.job)
                    && let Some(head) = heads.get(commit.shard as usize)
                {
                    (commit.expect, commit.ledger.round, changed) = (*head, head.version + 1, true);
                }
                if self.mutated(Mutation::RankForgotten) && commit.ledger.counted.len() > 1 {
                    commit.ledger.counted = commit.ledger.counted.iter().skip(1).collect();
                    changed = true;
                }
                let levels = commit.ledger.counted.is_empty() && commit.ledger.void.is_empty();
                if self.mutated(Mutation::DesertedNotLevelled) && levels {
                    let error = WireError::new(ErrorCode::Unavailable, "never");
                    let reply = frame::seal(Kind::StoreReply, &StoreReply::Error(error), &[]);
                    self.send(Actor::Store, from, Body::Answer(id, Answer::Frame(reply)));
                    return Ok(());
                }
                self.checker.attempted(&commit, &payload);
                StoreRequest::Commit(commit)
            }
            StoreRequest::CommitPartial(commit) => {
                self.checker.attempted_partial(&commit);
                StoreRequest::CommitPartial(commit)
            }
            StoreRequest::Fence { job, from_round, .. } if self.mutated(Mutation::FenceForgotten) => {
                changed = true;
                StoreRequest::Fence { job, epoch: 0, from_round }
            }
            StoreRequest::Upload { job, upload, shard } => {
                if self.mutated(Mutation::RollBackUneven)
                    && let Some(older) = self.checker.older_state(job, shard)
                {
                    (payload, changed) = (older, true);
                }
                StoreRequest::Upload { job, upload, shard }
            }
            other => other,
        };
        let bytes = if changed { frame::seal(Kind::StoreRequest, &request, &payload) } else { bytes };
        let tried = match request {
            StoreRequest::Commit(commit) => Some(Tried::Commit(commit, payload)),
            StoreRequest::CommitPartial(commit) => Some(Tried::Partial(commit)),
            StoreRequest::Fence { job, epoch, from_round } => {
                self.checker.fenced(job, epoch, from_round);
                None
            }
            StoreRequest::Delete { job } => {
                self.checker.deleting(job);
                None
            }
            StoreRequest::Upload { job, upload, shard } => {
                self.checker.uploaded(job, upload, shard, &payload);
                None
            }
            _ => None,
        };
        self.store.request(from, id, tried, bytes);
        self.store_answers();
        Ok(())
    }

    fn store_answers(&mut self) {
        for answered in self.store.poll() {
            if self.store.is_dying() {
                // It has not said so to anybody.
                break;
            }
            let Ok((reply, values)) = frame::open::<StoreReply>(Kind::StoreReply, &answered.reply) else {
                continue;
            };
            match (&answered.tried, &reply) {
                (Some(Tried::Commit(commit, state)), StoreReply::Commit(outcome)) => {
                    let at = (commit.job, commit.shard);
                    self.checker.committed(at, &commit.ledger, state, outcome);
                }
                (Some(Tried::Partial(commit)), StoreReply::Commit(outcome)) => {
                    self.checker.committed_partial(commit, outcome);
                }
                _ => {}
            }
            let bytes = self.reply_as_mutated(reply, values, answered.reply);
            if let Some(bytes) = bytes {
                self.send(Actor::Store, answered.to, Body::Answer(answered.id, Answer::Frame(bytes)));
            }
        }
        if self.store.is_dying() {
            self.note(|| "the store dies in the middle of something".to_owned());
            self.kill_store();
        }
    }

    /// Bugs in what the store answers.
    fn reply_as_mutated(&mut self, reply: StoreReply, values: Bytes, bytes: Bytes) -> Option<Bytes> {
        match reply {
            StoreReply::Commit(CommitOutcome::AlreadyCommitted(_))
                if self.mutated(Mutation::AlreadyCommittedForgotten) =>
            {
                let error = WireError::new(ErrorCode::Internal, "there already");
                Some(frame::seal(Kind::StoreReply, &StoreReply::Error(error), &[]))
            }
            StoreReply::State(head, ledger)
                if self.mutated(Mutation::LedgerOutsideCommit)
                    && head.version > 0
                    && self.restarted_at.values().any(|version| *version == head.version)
                    && ledger.round == head.version =>
            {
                let reply = StoreReply::State(head, Ledger::default());
                Some(frame::seal(Kind::StoreReply, &reply, &values))
            }
            StoreReply::Open(head, ledger, _)
                if self.mutated(Mutation::PartialLedgerForgotten) && values.is_empty() =>
            {
                Some(frame::seal(Kind::StoreReply, &StoreReply::State(head, ledger), &[]))
            }
            StoreReply::State(head, ledger)
                if self.mutated(Mutation::SlotReusedUnderReader) && !values.is_empty() =>
            {
                // What a reader without the lock could get: the old head, and bytes of the next version.
                let before = self.half_read.insert(head.version.is_multiple_of(2), values.clone());
                let other = before.filter(|other| other.len() == values.len() && *other != values);
                let Some(other) = other else { return Some(bytes) };
                let half = values.len() / 8 * 4;
                let mixed = [&values[..half], &other[half..]].concat();
                Some(frame::seal(Kind::StoreReply, &StoreReply::State(head, ledger), &mixed))
            }
            _ => Some(bytes),
        }
    }

    pub(crate) fn kill_store(&mut self) {
        self.store.kill();
        self.end(Actor::Store);
        let delay = self.rng.random_range(10..500);
        self.later(delay, Event::Start(Actor::Store));
    }
}

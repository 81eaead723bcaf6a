//! An invoker: core, holdings, takeover and fold are the real ones; the loop around them is modelled.

use rand::{RngExt as _, seq::SliceRandom as _};
use thalweg_invoker::{
    FoldContext, Job, Taker, clear_suspect,
    core::{Action, Core, Delivery, Event as CoreEvent, Limits, Plan},
    fold,
    holdings::{Delivered as Told, Holdings, Step},
    take_over,
};
use thalweg_protocol::{
    GradientHeader, HandedOver, Handover, Incarnation, InvokerBeat, InvokerState, JobKey, Kind, Ledger,
    NonFinite, PLACEMENT_KEY, Partition, Placement, ResultHeader, Round, ShardIndex, checksum, frame,
};
use thalweg_store::ShardStore as _;

use crate::{
    Mutation,
    calls::{Answer, Ask, CallId},
    network::{Actor, Body, Delivered, Millis},
    world::{Done, Event, Timer, World},
};

const BEAT_MS: Millis = 200;
const REFRESH_MS: Millis = 500;
const JOB_REFRESH_MS: Millis = 1000;
const DRAIN_MS: Millis = 1000;
const BATCH: u64 = 4;
/// Virtual time begins here on every wall clock.
pub(crate) const EPOCH_MS: Millis = 1_000_000_000;

/// An invoker's process.
pub(crate) struct Host {
    pub(crate) core: Core,
    pub(crate) holdings: Holdings,
    /// Who waits for a partition.
    asked: Vec<(Handover, Actor, CallId)>,
    /// What came for consumers that may be about to be handed over: a subscription that nobody reads yet.
    early: Vec<Delivered>,
    placement: Placement,
    draining: bool,
    ending: bool,
    /// What its clock shows at virtual time 0.
    epoch: Millis,
    armed: Option<Millis>,
    /// The autoscaler that started it.
    pub(crate) starter: u32,
}

impl World {
    pub(crate) fn invoker_starts(&mut self, number: u32, starter: u32) {
        let skew = self.rng.random_range(0..=2 * self.most_skew);
        let limits: Limits = self.limits;
        let host = Host {
            core: Core::new(limits),
            holdings: Holdings::new(format!("i{number}"), DRAIN_MS),
            asked: Vec::new(),
            early: Vec::new(),
            placement: Placement::default(),
            draining: false,
            ending: false,
            epoch: EPOCH_MS + skew - self.most_skew,
            armed: None,
            starter,
        };
        self.invokers.insert(number, host);
        self.note(|| format!("i{number} starts"));
        let me = Actor::Invoker(number);
        self.timer(0, me, Timer::Beat);
        self.timer(0, me, Timer::Refresh);
        self.timer(JOB_REFRESH_MS, me, Timer::Jobs);
    }

    /// Tells the core something and performs what follows.
    fn tell(&mut self, number: u32, event: CoreEvent) {
        let now = self.now;
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let (epoch, limit) = (host.epoch, self.limits.held_bytes);
        let actions = host.core.handle(event, epoch + now);
        let held = host.core.held_bytes();
        if let Some(at) = host.core.next_tick() {
            let at = at.saturating_sub(epoch).max(now + 1);
            if host.armed.is_none_or(|armed| armed <= now || at < armed) {
                host.armed = Some(at);
                self.timer(at - now, Actor::Invoker(number), Timer::Core);
            }
        }
        if held > limit {
            self.checker.fail("I6", None, format!("i{number} holds {held} bytes of {limit}"));
        }
        for action in actions {
            self.perform(number, action);
        }
    }

    fn step(&mut self, number: u32, steps: Vec<Step>) {
        let me = Actor::Invoker(number);
        for step in steps {
            match step {
                Step::Take { partition, epoch, own } => {
                    let nonce = self.rng.random();
                    let remote = self.remote(me);
                    self.spawn(me, async move {
                        let (id, at) = (format!("i{number}"), (partition, epoch));
                        let taker = Taker { invoker: &id, nonce };
                        let taken = take_over(&remote, &remote.registry(), &remote, taker, at, own).await;
                        Done::Took(partition, epoch, taken)
                    });
                }
                Step::Tell(event) => self.tell(number, event),
                Step::Pull(partition) => self.pull(number, partition),
                Step::Echo { partition, consumer, delivery } => {
                    // Sent after the acknowledgements on the same connection.
                    let remote = self.remote(me);
                    self.spawn(me, async move {
                        let _ = remote.ask(Ask::Keys).await;
                        Done::Echoed(partition, consumer, delivery)
                    });
                }
                Step::Answer { partition, answer } => self.tell_waiting(number, partition, answer),
                Step::Release { partition, consumer, .. } => {
                    let remote = self.remote(me);
                    self.tell_waiting(number, partition, HandedOver::Left(0));
                    self.spawn(me, async move {
                        let _ = remote.ask(Ask::DeleteConsumer(partition, consumer)).await;
                        Done::Nothing
                    });
                }
                Step::ReadPlacement => {
                    let delay = self.rng.random_range(75..150);
                    self.read_placement(number, delay);
                }
            }
        }
    }

    fn read_placement(&mut self, number: u32, delay: Millis) {
        let me = Actor::Invoker(number);
        let remote = self.remote(me);
        self.spawn(me, async move {
            if delay > 0 {
                remote.sleep(delay).await;
            }
            let placement = remote.registry().get::<Placement>(PLACEMENT_KEY).await.ok();
            Done::Placement(placement.map(|(placement, _)| placement.unwrap_or_default()))
        });
    }

    fn perform(&mut self, number: u32, action: Action) {
        let me = Actor::Invoker(number);
        let remote = self.remote(me);
        match action {
            Action::Acknowledge(partition, sequence) => self.acknowledge(number, partition, sequence),
            Action::LookUp(key) => self.look_up(number, key),
            Action::ReadHead(key) => self.spawn(me, async move {
                let result = remote.store().fetch_head(key.0, key.1).await;
                Done::Core(CoreEvent::Head(key, result.map(Box::new)))
            }),
            Action::Fold(id, plan) => self.fold(number, id, plan),
            Action::Commit(id, commit, state) => {
                if self.mutated(Mutation::AcknowledgeBeforeCommit) {
                    let at = (commit.job, commit.shard, commit.ledger.round);
                    for (partition, sequence) in self.queued_for(at, None) {
                        self.acknowledge(number, partition, sequence);
                    }
                }
                if self.mutated(Mutation::PublishBeforeCommit)
                    && let Some(record) = self.record_of_life(commit.job)
                {
                    let head = commit.expect.next(&commit.ledger, commit.function, checksum(&[&state]));
                    let (job, shard, ledger) = (commit.job, commit.shard, commit.ledger.clone());
                    let parameters = record.layout.len(shard) * 4;
                    let header = ResultHeader { job, shard, head, ledger };
                    let bytes = frame::seal(Kind::Result, &header, &state[..parameters]);
                    self.send(me, Actor::Broker, Body::Result(record.spec.key, bytes));
                }
                self.spawn(me, async move {
                    let result = remote.store().commit(commit, state).await;
                    Done::Core(CoreEvent::Committed(id, result))
                });
                if self.strands.is_some() {
                    // Once the commit is on its way.
                    self.timer(1, me, Timer::Cut);
                }
            }
            Action::CommitPartial(id, commit, fold) => {
                if self.mutated(Mutation::PartialAcknowledgedEarly) {
                    let at = (commit.job, commit.shard, commit.partial.ledger.round);
                    for (partition, sequence) in self.queued_for(at, Some(&commit.partial.ledger)) {
                        self.acknowledge(number, partition, sequence);
                    }
                }
                self.spawn(me, async move {
                    let result = remote.store().commit_partial(commit, fold).await;
                    Done::Core(CoreEvent::Committed(id, result))
                });
            }
            Action::Publish(key, header, values) => {
                let bytes = frame::seal(Kind::Result, &header, &values);
                self.send(me, Actor::Broker, Body::Result(key, bytes));
            }
            Action::ClearSuspect(partition) => self.spawn(me, async move {
                let _ = clear_suspect(&remote.registry(), partition).await;
                Done::Nothing
            }),
            Action::Republish(key, shard) => self.spawn(me, async move {
                let state = remote.store().fetch(shard.0, shard.1, false).await.ok();
                Done::Republish(key, shard, state)
            }),
            Action::Reject(key, rank, reject) => {
                let bytes = frame::seal(Kind::Reject, &reject, &[]);
                self.send(me, Actor::Broker, Body::Reject(key, rank, bytes));
            }
            Action::DeadLetter { partition, sequence, error, frame, .. } => {
                if !self.is_poison(&frame) {
                    self.checker.fail("I2", None, format!("a dead letter: {error}"));
                }
                self.spawn(me, async move {
                    let stored = remote.ask(Ask::DeadLetter(frame)).await;
                    let stored = matches!(stored, crate::calls::Answer::Done);
                    Done::DeadLetter(partition, sequence, stored)
                });
            }
            Action::FailJob(key, incarnation, error) => self.spawn(me, async move {
                match Job::fail(&remote.registry(), &key, incarnation, error).await {
                    Ok(job) => Done::Core(CoreEvent::Job(key, job)),
                    Err(_) => Done::Core(CoreEvent::LookUpFailed(key)),
                }
            }),
        }
    }

    /// Contributions in the queues to a round; only those in `ledger`, if one is given.
    fn queued_for(
        &self,
        round: (Incarnation, ShardIndex, Round),
        ledger: Option<&Ledger>,
    ) -> Vec<(Partition, u64)> {
        let wanted = |bytes| {
            Self::contribution(bytes).is_some_and(|header| {
                (header.job, header.shard, header.round) == round
                    && ledger.is_none_or(|ledger| ledger.contains(header.rank))
            })
        };
        let messages = self.broker.messages().filter(|(_, _, message)| wanted(&message.frame));
        messages.map(|(partition, sequence, _)| (partition, sequence)).collect()
    }

    fn look_up(&mut self, number: u32, key: JobKey) {
        let me = Actor::Invoker(number);
        let remote = self.remote(me);
        let forgets = self.mutated(Mutation::SettingsForgotten);
        self.spawn(me, async move {
            Done::Core(match Job::read(&remote.registry(), &key).await {
                Ok(Some(job)) if forgets => {
                    let mut record = job.record.clone();
                    record.settings.truncate(1);
                    CoreEvent::Job(key, Job::new(record, job.roster.clone()).ok().map(std::sync::Arc::new))
                }
                Ok(job) => CoreEvent::Job(key, job),
                Err(_) => CoreEvent::LookUpFailed(key),
            })
        });
    }

    fn fold(&mut self, number: u32, id: u64, mut plan: Plan) {
        let me = Actor::Invoker(number);
        let poisoned = |input: &thalweg_invoker::core::Input| {
            let member = plan.job.roster.of_round(plan.round).find(|member| member.rank == input.rank);
            member.is_some_and(|member| self.poison == Some((member.incarnation, plan.round, plan.shard)))
        };
        if plan.inputs.iter().any(poisoned) {
            if self.mutated(Mutation::SuspectNotRecorded) {
                plan.careful = false;
            }
            if !plan.careful {
                self.note(|| format!("i{number} dies of poison"));
                return self.doom(me);
            }
            // Otherwise it dies when the record that names the poison is written: see `World::answered`.
        }
        if self.mutated(Mutation::FoldInAnyOrder) {
            let mut values: Vec<_> = plan.inputs.iter().map(|input| input.values.clone()).collect();
            let all = values.iter().all(Option::is_some);
            if all {
                values.shuffle(&mut self.rng);
                plan.inputs.iter_mut().zip(values).for_each(|(input, values)| input.values = values);
            }
        }
        let Some(host) = self.invokers.get(&number) else { return };
        let held = host.holdings.get(plan.partition);
        let (stream_created, suspect) =
            held.map_or((0, None), |held| (held.stream_created, held.suspect.clone()));
        let remote = self.remote(me);
        let delay = self.rng.random_range(0..6);
        self.spawn(me, async move {
            if delay > 2 {
                remote.sleep(delay).await;
            }
            let (store, registry, invoker) = (remote.store(), remote.registry(), format!("i{number}"));
            let context = FoldContext {
                store: &store,
                queues: &remote,
                registry: &registry,
                invoker: &invoker,
                stream_created,
                suspect,
                read_again_bytes: &std::cell::Cell::new(0),
            };
            let result = fold(&context, &plan).await;
            Done::Core(CoreEvent::Folded(id, result))
        });
    }

    fn acknowledge(&mut self, number: u32, partition: Partition, sequence: u64) {
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let Some(consumer) = host.holdings.get(partition).map(|held| held.consumer.clone()) else { return };
        if host.holdings.reply(partition, sequence).is_some() {
            let body = Body::Acknowledge { partition, consumer, sequence };
            self.send(Actor::Invoker(number), Actor::Broker, body);
        }
    }

    pub(crate) fn invoker_hears(&mut self, number: u32, body: Body) {
        match body {
            Body::Deliver(message) => {
                let Some(host) = self.invokers.get_mut(&number) else { return };
                if host.holdings.holds(message.partition, &message.consumer) {
                    self.delivered(number, *message);
                } else {
                    host.early.push(*message);
                }
            }
            Body::ConsumerGone { partition, consumer } => {
                let Some(host) = self.invokers.get_mut(&number) else { return };
                let ours = host.holdings.pulled(partition).is_some_and(|held| held.consumer == consumer);
                if ours {
                    let steps = host.holdings.retake(partition, "the consumer is gone");
                    self.step(number, steps);
                }
            }
            Body::Handover { from, id, handover } => {
                let now = self.now;
                let Some(host) = self.invokers.get_mut(&number) else { return };
                let answer = host.holdings.asked(&handover, now);
                match answer {
                    Some(answer) => {
                        self.send(Actor::Invoker(number), from, Body::Answer(id, Answer::HandedOver(answer)));
                    }
                    None => host.asked.push((handover, from, id)),
                }
                self.wake_to_settle(number);
            }
            Body::Heard { from, id, handover } => {
                let Some(host) = self.invokers.get_mut(&number) else { return };
                let (answer, steps) = host.holdings.heard(&handover, host.core.rest(handover.partition));
                let me = Actor::Invoker(number);
                self.send(me, from, Body::Answer(id, Answer::HandedOver(answer)));
                if matches!(answer, HandedOver::Kept(_)) {
                    let (remote, Handover { partition, consumer, .. }) = (self.remote(me), handover);
                    self.spawn(me, async move {
                        let _ = remote.ask(Ask::StopListening(partition, consumer)).await;
                        Done::Nothing
                    });
                }
                self.step(number, steps);
            }
            Body::Hint(key) => {
                let mut tokens = key.split('.');
                match (tokens.next(), tokens.next(), tokens.next()) {
                    (Some("placement"), ..) => self.read_placement(number, 0),
                    (Some("job" | "roster"), Some(tenant), Some(job)) => {
                        if let (Ok(tenant), Ok(job)) = (tenant.parse(), job.parse()) {
                            let key = JobKey { tenant, job };
                            if self.invokers.get(&number).is_some_and(|host| host.core.knows(&key)) {
                                self.look_up(number, key);
                            }
                        }
                    }
                    _ => {}
                }
            }
            other => unreachable!("not for an invoker: {other:?}"),
        }
        self.settle(number);
    }

    fn delivered(&mut self, number: u32, message: Delivered) {
        let now = self.now;
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let Delivered { partition, consumer, consumer_sequence, sequence, published, subject, frame } =
            message;
        let reply = Some("reply".into());
        let told = host.holdings.delivered(partition, &consumer, (consumer_sequence, sequence), reply, now);
        match told {
            Told::Ours => {}
            Told::NotOurs => return,
            Told::Gap(steps) => return self.step(number, steps),
        }
        let Some(frame) = self.changed_on_the_way(number, partition, sequence, frame) else { return };
        let delivery = Delivery { partition, sequence, published: EPOCH_MS + published, subject, frame };
        self.tell(number, CoreEvent::Delivered(delivery));
        self.pull(number, partition);
    }

    /// Bugs in what an invoker makes of a message.
    fn changed_on_the_way(
        &mut self,
        number: u32,
        partition: Partition,
        sequence: u64,
        bytes: bytes::Bytes,
    ) -> Option<bytes::Bytes> {
        let ignored = self.mutated(Mutation::IncarnationIgnored);
        let without_void = self.mutated(Mutation::RejectWithoutVoid);
        if !ignored && !without_void {
            return Some(bytes);
        }
        let Ok((mut header, payload)) = frame::open::<GradientHeader>(Kind::Gradient, &bytes) else {
            return Some(bytes);
        };
        let Some(record) = self.record_of_life(header.job) else { return Some(bytes) };
        if ignored {
            let roster = self.checker.newest_roster(header.job);
            let member = roster
                .and_then(|roster| roster.of_round(header.round).find(|member| member.rank == header.rank));
            if let Some(member) = member {
                header.worker = member.incarnation;
                return Some(frame::seal(Kind::Gradient, &header, &payload));
            }
        }
        let non_finite =
            payload.as_chunks::<4>().0.iter().any(|bytes| !f32::from_le_bytes(*bytes).is_finite());
        if without_void && non_finite && record.spec.non_finite == NonFinite::Void {
            self.acknowledge(number, partition, sequence);
            self.pull(number, partition);
            return None;
        }
        Some(bytes)
    }

    fn pull(&mut self, number: u32, partition: Partition) {
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let Some(held) = host.holdings.pulled(partition) else { return };
        if let Some(batch) = held.credit(BATCH) {
            let consumer = held.consumer.clone();
            self.send(Actor::Invoker(number), Actor::Broker, Body::Pull { partition, consumer, batch });
        }
    }

    pub(crate) fn invoker_done(&mut self, number: u32, done: Done) {
        let now = self.now;
        match done {
            Done::Core(event) => self.tell(number, event),
            Done::Echoed(partition, consumer, delivery) => {
                let Some(host) = self.invokers.get_mut(&number) else { return };
                host.holdings.echoed(partition, &consumer, delivery);
            }
            Done::Took(partition, epoch, taken) => {
                let Some(host) = self.invokers.get_mut(&number) else { return };
                let steps = host.holdings.took(partition, epoch, taken, now);
                let early: Vec<_> = host.early.extract_if(.., |early| early.partition == partition).collect();
                self.step(number, steps);
                for message in early {
                    self.delivered(number, message);
                }
            }
            Done::Placement(Some(placement)) => {
                let Some(host) = self.invokers.get_mut(&number) else { return };
                let steps = host.holdings.follow(&placement, now);
                host.placement = placement;
                self.wake_to_settle(number);
                self.step(number, steps);
            }
            Done::Republish(key, shard, Some(state)) => {
                let header =
                    ResultHeader { job: shard.0, shard: shard.1, head: state.head, ledger: state.ledger };
                let bytes = frame::seal(Kind::Result, &header, &state.values);
                self.send(Actor::Invoker(number), Actor::Broker, Body::Result(key, bytes));
            }
            Done::DeadLetter(partition, sequence, true) => self.acknowledge(number, partition, sequence),
            _ => {}
        }
        self.settle(number);
    }

    pub(crate) fn invoker_reconnected(&mut self, number: u32) {
        if !self.mutated(Mutation::NeverRetaken) {
            let Some(host) = self.invokers.get_mut(&number) else { return };
            let steps = host.holdings.reconnected();
            self.step(number, steps);
        }
        self.read_placement(number, 0);
    }

    /// Gives up what is ready for it, and ends when told to and done.
    fn settle(&mut self, number: u32) {
        let now = self.now;
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let core = &host.core;
        let steps = host.holdings.settle(|partition| core.rest(partition), now);
        self.step(number, steps);
        self.answer_handovers(number);
        let Some(host) = self.invokers.get_mut(&number) else { return };
        if host.holdings.is_drained() && !host.ending {
            host.ending = true;
            self.invoker_beats(number);
            let life = self.life(Actor::Invoker(number));
            self.later(100, Event::End(Actor::Invoker(number), life));
        }
    }

    /// Answers those who wait for what is not held here, or no more.
    fn answer_handovers(&mut self, number: u32) {
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let holdings = &host.holdings;
        let idle = |(handover, ..): &mut (Handover, Actor, CallId)| {
            !holdings.holds(handover.partition, &handover.consumer)
        };
        for (_, to, id) in host.asked.extract_if(.., idle).collect::<Vec<_>>() {
            let answer = Answer::HandedOver(HandedOver::NotHeld);
            self.send(Actor::Invoker(number), to, Body::Answer(id, answer));
        }
    }

    /// Tells those that wait for a partition.
    fn tell_waiting(&mut self, number: u32, partition: Partition, answer: HandedOver) {
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let of_it = |(handover, ..): &mut (Handover, Actor, CallId)| handover.partition == partition;
        let mut waiting: Vec<_> = host.asked.extract_if(.., of_it).collect();
        waiting.sort_by_key(|(handover, ..)| handover.epoch);
        let newest = waiting.pop().map(|waiting| (waiting, answer));
        let older = waiting.into_iter().map(|waiting| (waiting, HandedOver::NotYet));
        for ((_, to, id), answer) in older.chain(newest) {
            self.send(Actor::Invoker(number), to, Body::Answer(id, Answer::HandedOver(answer)));
        }
    }

    fn wake_to_settle(&mut self, number: u32) {
        let now = self.now;
        let Some(host) = self.invokers.get(&number) else { return };
        if let Some(at) = host.holdings.settle_at() {
            self.timer(at.saturating_sub(now), Actor::Invoker(number), Timer::Core);
        }
    }

    /// It is told to stop.
    pub(crate) fn invoker_stops(&mut self, number: u32) {
        let now = self.now;
        let Some(host) = self.invokers.get_mut(&number) else { return };
        if !host.draining {
            host.draining = true;
            host.holdings.drain(now);
            self.timer(DRAIN_MS, Actor::Invoker(number), Timer::Core);
            self.invoker_beats(number);
            self.settle(number);
        }
    }

    fn invoker_beats(&mut self, number: u32) {
        let now = self.now;
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let beat = InvokerBeat {
            invoker: format!("i{number}"),
            state: if host.draining { InvokerState::Draining } else { InvokerState::Ready },
            partitions: host.holdings.held(),
            service_bytes_per_s: 0.0,
            busy: 0.5,
            held_messages: host.core.held_messages() as u64,
            held_bytes: host.core.held_bytes() as u64,
            cpu_quota: 1.0,
            jobs: host.core.take_loads(host.epoch + now),
        };
        self.send(Actor::Invoker(number), Actor::Broker, Body::Beat(beat));
    }

    pub(crate) fn invoker_ticks(&mut self, number: u32, timer: Timer) {
        let me = Actor::Invoker(number);
        let now = self.now;
        match timer {
            Timer::Beat => {
                self.timer(BEAT_MS, me, Timer::Beat);
                self.invoker_beats(number);
            }
            Timer::Refresh => {
                self.timer(REFRESH_MS, me, Timer::Refresh);
                self.read_placement(number, 0);
                self.show_pulls_alive(number);
                let silence = !self.mutated(Mutation::NeverRetaken);
                let Some(host) = self.invokers.get_mut(&number).filter(|_| silence) else { return };
                let steps = host.holdings.check_silence(now);
                self.step(number, steps);
            }
            Timer::Cut => self.strand(number),
            Timer::Jobs => {
                self.timer(JOB_REFRESH_MS, me, Timer::Jobs);
                let Some(host) = self.invokers.get(&number) else { return };
                let active: Vec<_> = host.core.active_jobs().cloned().collect();
                active.into_iter().for_each(|key| self.look_up(number, key));
            }
            _ => {
                if let Some(host) = self.invokers.get_mut(&number) {
                    host.armed = None;
                }
                self.tell(number, CoreEvent::Tick);
            }
        }
        self.settle(number);
    }

    /// Heartbeats of pull requests, without a message for each.
    fn show_pulls_alive(&mut self, number: u32) {
        let me = Actor::Invoker(number);
        let (now, epoch, listening) = (self.now, self.epoch(me), self.is_connected(me));
        let Some(host) = self.invokers.get_mut(&number) else { return };
        let partitions: Vec<_> = host.holdings.partitions().collect();
        for partition in partitions {
            let Some(held) = host.holdings.pulled(partition) else { continue };
            let consumer = held.consumer.clone();
            if listening && self.broker.is_pulled(partition, &consumer, (me, epoch)) {
                held.alive(now);
            }
        }
    }
}

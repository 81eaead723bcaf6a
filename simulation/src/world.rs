//! The world: virtual time, connections, faults, and what becomes of a message.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, atomic::AtomicU32},
    time::Instant,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use thalweg_invoker::{Job, core::Limits};
use thalweg_protocol::{
    Durability, FunctionSpec, Incarnation, Init, JobKey, JobRecord, JobSpec, JobState, Layout, Member, Mode,
    NonFinite, Partition, Roster, Round, SettingsRevision, StoreId, StoreJob, TensorSpec, subjects,
};
use thalweg_sdk::engine::{Engine, Timing};

use crate::{
    Mutation, Violation, autoscaler,
    broker::Broker,
    check::Checker,
    invoker,
    network::{Actor, Body, Loss, Millis},
    store, worker,
};

/// What to play.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Everything is drawn from it.
    pub seed: u64,
    /// A bug to re-introduce.
    pub mutation: Option<Mutation>,
    /// Keep the last lines of the history.
    pub trace: bool,
}

/// How a seed ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Events handled.
    pub steps: u64,
    /// Virtual time passed, milliseconds.
    pub virtual_ms: u64,
    /// Faults that struck.
    pub faults: u64,
    /// The first invariant that did not hold.
    pub violation: Option<Violation>,
    /// The end of the history, where it was asked for.
    pub trace: Vec<String>,
}

/// What happens at some time.
pub(crate) enum Event {
    Message {
        from: (Actor, u32),
        to: (Actor, u32),
        body: Body,
    },
    /// Within a process: dies with it, but not with its connection.
    Local(Actor, u32, Body),
    Timer(Actor, u32, Timer),
    Fault,
    Reconnect(Actor, u32),
    Start(Actor),
    End(u32),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Timer {
    Tick,
    Core,
    Beat,
    Refresh,
    Flush,
}

/// An actor's connection to the broker.
#[derive(Default)]
pub(crate) struct Link {
    pub(crate) up: bool,
    /// Grows whenever it breaks.
    epoch: u32,
    /// Of its process; grows whenever that starts.
    life: u32,
    /// What the client sends once it is connected again.
    outbox: Vec<(Actor, Body)>,
}

pub(crate) struct World {
    pub(crate) rng: StdRng,
    pub(crate) now: Millis,
    pub(crate) start: Instant,
    order: u64,
    queue: BTreeMap<(Millis, u64), Event>,
    /// When the last message between two will arrive: connections keep the order.
    last: BTreeMap<(Actor, Actor), Millis>,
    pub(crate) job: Arc<Job>,
    pub(crate) rounds: Round,
    mutation: Option<Mutation>,
    pub(crate) links: BTreeMap<Actor, Link>,
    lives: u32,
    pub(crate) broker: Broker,
    pub(crate) broker_up: bool,
    pub(crate) store: store::Host,
    store_up: bool,
    pub(crate) workers: Vec<worker::Host>,
    pub(crate) invokers: BTreeMap<u32, invoker::Host>,
    pub(crate) nobody: BTreeMap<Partition, invoker::Slot>,
    pub(crate) stillborn: Vec<u32>,
    pub(crate) autoscaler: autoscaler::Host,
    limits: Limits,
    most_skew: Millis,
    pub(crate) checker: Checker,
    faults_until: Millis,
    faults: u64,
    steps: u64,
    trace: Option<VecDeque<String>>,
}

/// Time-out of a request.
const TIMEOUT_MS: Millis = 300;
/// Virtual time after the last fault in which every round must end: a resend is due after 30 s.
const PATIENCE_MS: Millis = 90_000;
const TRACE_LINES: usize = 400;

/// Plays one seed.
///
/// # Errors
/// When the simulation itself cannot run.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let mut world = World::new(options)?;
    world.play()?;
    Ok(Report {
        seed: options.seed,
        steps: world.steps,
        virtual_ms: world.now,
        faults: world.faults,
        violation: world.checker.violation,
        trace: world.trace.into_iter().flatten().collect(),
    })
}

fn job(rng: &mut StdRng) -> anyhow::Result<Job> {
    let (workers, shards) = (rng.random_range(1..=4_u32), rng.random_range(1..=4_u64));
    let elements = 4;
    let function = match rng.random_range(0..3) {
        0 => FunctionSpec::named("sum"),
        1 => FunctionSpec::named("mean"),
        _ => FunctionSpec::named("sgd").number("lr", 0.05).number("momentum", 0.9),
    };
    let quorum = (workers > 1 && rng.random_bool(0.4)).then(|| rng.random_range(1..workers));
    let spec = JobSpec {
        key: JobKey { tenant: "t".parse()?, job: "j".parse()? },
        tensors: vec![TensorSpec::f32("a", vec![shards * u64::from(elements)])],
        function: function.clone(),
        mode: Mode::Sync,
        workers,
        quorum,
        deadline_ms: rng.random_range(20..500),
        durability: Durability::Process,
        non_finite: NonFinite::Propagate,
        init: Init::Zeros,
        shard_bytes: elements * 4,
        max_members: 16,
    };
    let incarnation = store::incarnation(rng);
    let members = (0..workers).map(|rank| Member {
        rank,
        worker: format!("w{rank}"),
        incarnation: Incarnation(rng.random()),
        from_round: 1,
        until_round: None,
    });
    let roster = Roster { job: incarnation, epoch: 1, started: true, members: members.collect() };
    let record = JobRecord {
        incarnation,
        layout: Layout { elements: shards * u64::from(elements), shard_elements: elements },
        slots: u32::try_from(thalweg_functions::resolve(&function)?.slots())?,
        store: StoreId([0; 16]),
        partitions: rng.random_range(1..=4),
        state: JobState::Running,
        settings: vec![SettingsRevision { revision: 0, from_round: 0, function }],
        spec,
    };
    Ok(Job::new(record, roster)?)
}

impl World {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let job = Arc::new(job(&mut rng)?);
        let record = &job.record;
        let store_job = StoreJob {
            key: record.spec.key.clone(),
            incarnation: record.incarnation,
            layout: record.layout,
            slots: record.slots,
            durability: record.spec.durability,
            max_members: record.spec.max_members,
            init: record.spec.init,
        };
        let store = store::Host::new(store_job, rng.random_bool(0.5))?;
        let heads = store.heads()?;
        let mut checker = Checker::default();
        for shard in 0..record.layout.shards() {
            let state = store.fetch(shard, true)?;
            checker.begin(shard, state.head, state.values);
        }
        let start = Instant::now();
        let model_bytes = record.layout.elements * 4 + u64::from(record.layout.shards()) * 256;
        let workers = job.roster.members.iter().map(|member| {
            let identity = (record.incarnation, member.incarnation, member.rank);
            let mut engine = Engine::new(Timing::default(), identity, heads.clone(), 1, model_bytes, start);
            let window = if rng.random_bool(0.5) { u64::MAX } else { rng.random_range(0..model_bytes) };
            engine.window(window, 1, start);
            worker::Host::new(member.incarnation, engine)
        });
        let workers: Vec<_> = workers.collect();
        let most = rng.random_range(1..=3);
        let held = rng.random_range(1..=6) * 16;
        let limits = Limits { held_bytes: held, invocations: rng.random_range(1..=4), idle_shards: 64 };
        let partitions = record.partitions;
        let most_skew = rng.random_range(0..200);
        let faults_until = rng.random_range(500..6000);
        let mut world = Self {
            now: 0,
            start,
            order: 0,
            queue: BTreeMap::new(),
            last: BTreeMap::new(),
            rounds: rng.random_range(3..=12),
            mutation: options.mutation,
            links: BTreeMap::new(),
            lives: 0,
            broker: Broker::new(partitions),
            broker_up: true,
            store,
            store_up: true,
            workers,
            invokers: BTreeMap::new(),
            nobody: BTreeMap::new(),
            stillborn: Vec::new(),
            autoscaler: autoscaler::Host::new(most, partitions, Arc::new(AtomicU32::new(0)), 0),
            limits,
            most_skew,
            checker,
            faults_until,
            faults: 0,
            steps: 0,
            trace: options.trace.then(VecDeque::new),
            job,
            rng,
        };
        let ranks: Vec<_> = (0..world.workers.len()).filter_map(|rank| u32::try_from(rank).ok()).collect();
        world.born(Actor::Store);
        world.born(Actor::Autoscaler);
        world.timer(1, Actor::Autoscaler, Timer::Tick);
        world.timer(50, Actor::Store, Timer::Flush);
        for rank in ranks {
            world.born(Actor::Worker(rank));
            let delay = world.rng.random_range(1..300);
            world.timer(delay, Actor::Worker(rank), Timer::Tick);
        }
        let first = world.rng.random_range(10..300);
        world.later(first, Event::Fault);
        Ok(world)
    }

    fn born(&mut self, actor: Actor) {
        self.lives += 1;
        let link = Link { up: self.broker_up, epoch: self.lives, life: self.lives, outbox: Vec::new() };
        self.links.insert(actor, link);
    }

    pub(crate) fn mutated(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push_back(format!("{:>7} {}", self.now, line()));
            if trace.len() > TRACE_LINES {
                trace.pop_front();
            }
        }
    }

    pub(crate) fn later(&mut self, delay: Millis, event: Event) {
        self.at(self.now + delay, event);
    }

    fn at(&mut self, at: Millis, event: Event) {
        self.order += 1;
        self.queue.insert((at, self.order), event);
    }

    fn life(&self, actor: Actor) -> u32 {
        self.links.get(&actor).map_or(0, |link| link.life)
    }

    fn epoch(&self, actor: Actor) -> u32 {
        self.links.get(&actor).map_or(0, |link| link.epoch)
    }

    pub(crate) fn timer(&mut self, delay: Millis, actor: Actor, timer: Timer) {
        let life = self.life(actor);
        self.later(delay, Event::Timer(actor, life, timer));
    }

    pub(crate) fn local(&mut self, delay: Millis, actor: Actor, body: Body) {
        let life = self.life(actor);
        self.later(delay, Event::Local(actor, life, body));
    }

    /// Sends a message. Where the sender is not connected, its client keeps it until it is.
    pub(crate) fn send(&mut self, from: Actor, to: Actor, body: Body) {
        if let Some(link) = self.links.get_mut(&from)
            && !link.up
        {
            link.outbox.push((to, body));
            return;
        }
        let delay = if self.rng.random_bool(0.05) {
            self.rng.random_range(0..150)
        } else {
            self.rng.random_range(0..8)
        };
        let last = self.last.entry((from, to)).or_default();
        let at = (self.now + delay).max(*last);
        *last = at;
        let message = Event::Message { from: (from, self.epoch(from)), to: (to, self.epoch(to)), body };
        self.at(at, message);
    }

    fn play(&mut self) -> anyhow::Result<()> {
        while self.checker.violation.is_none() {
            let Some(((at, _), event)) = self.queue.pop_first() else { break };
            self.now = at;
            self.steps += 1;
            self.happen(event)?;
            if self.now > self.faults_until {
                if self.workers.iter().all(|worker| worker.done) && self.is_quiet() {
                    return Ok(());
                }
                if self.now > self.faults_until + PATIENCE_MS {
                    let text = self.unfinished();
                    let invariant = if self.workers.iter().all(|worker| worker.done) { "L2" } else { "L1" };
                    self.checker.fail(invariant, text);
                }
            }
        }
        Ok(())
    }

    /// Nothing is left of anything, and nobody is there to do anything.
    fn is_quiet(&self) -> bool {
        self.invokers.is_empty()
            && self.broker.depths().is_some_and(|depths| depths.iter().all(|(messages, _)| *messages == 0))
    }

    fn unfinished(&self) -> String {
        let rounds: Vec<_> = self.workers.iter().map(|worker| (worker.engine.round(), worker.done)).collect();
        format!(
            "{} s after the last fault: workers at {rounds:?} of {}, shards at {:?}, queues {:?}, invokers {:?}",
            PATIENCE_MS / 1000,
            self.rounds,
            self.checker.newest,
            self.broker.depths(),
            self.invokers.keys()
        )
    }

    fn happen(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Message { from, to, body } => self.arrive(from, to, body),
            Event::Local(actor, life, body) => {
                if self.life(actor) == life && self.links.contains_key(&actor) {
                    self.hear(actor, actor, body);
                }
            }
            Event::Timer(actor, life, timer) => {
                if self.life(actor) == life && self.links.contains_key(&actor) {
                    self.tick(actor, timer);
                }
            }
            Event::Fault if self.now < self.faults_until => {
                self.faults += 1;
                self.strike();
                let next = self.rng.random_range(20..800);
                self.later(next, Event::Fault);
            }
            Event::Fault => {}
            Event::Reconnect(actor, epoch) => {
                let ready = self.broker_up && self.epoch(actor) == epoch;
                if ready && let Some(link) = self.links.get_mut(&actor).filter(|link| !link.up) {
                    link.up = true;
                    let outbox = std::mem::take(&mut link.outbox);
                    self.note(|| format!("{actor:?} is connected again"));
                    outbox.into_iter().for_each(|(to, body)| self.send(actor, to, body));
                    match actor {
                        Actor::Worker(rank) => self.worker_reconnected(rank),
                        Actor::Invoker(number) => self.invoker_reconnected(number),
                        Actor::Autoscaler => self.autoscaler_reconnected(),
                        Actor::Store | Actor::Broker => {}
                    }
                }
            }
            Event::Start(Actor::Store) => {
                if !self.store_up {
                    self.store.start()?;
                    self.store_up = true;
                    self.born(Actor::Store);
                    self.timer(50, Actor::Store, Timer::Flush);
                    let heads = self.store.heads()?;
                    self.checker.reopened(&heads);
                    self.note(|| "the store is back".to_owned());
                }
            }
            Event::Start(Actor::Broker) => {
                self.broker_up = true;
                self.note(|| "the broker is back".to_owned());
                let all: Vec<_> = self.links.keys().copied().collect();
                for actor in all {
                    let (delay, epoch) = (self.rng.random_range(1..300), self.epoch(actor));
                    self.later(delay, Event::Reconnect(actor, epoch));
                }
            }
            Event::Start(Actor::Invoker(number)) => {
                if !self.stillborn.contains(&number) {
                    let skew = self.rng.random_range(0..=self.most_skew);
                    self.invokers.insert(number, invoker::Host::new(self.limits, skew));
                    self.born(Actor::Invoker(number));
                    self.note(|| format!("i{number} starts"));
                    self.tick(Actor::Invoker(number), Timer::Beat);
                    self.tick(Actor::Invoker(number), Timer::Refresh);
                } else {
                    self.autoscaler.ended.push(format!("i{number}"));
                }
            }
            Event::Start(_) => {}
            Event::End(number) => {
                self.note(|| format!("i{number} ends"));
                self.invoker_dies(number);
            }
        }
        Ok(())
    }

    fn tick(&mut self, actor: Actor, timer: Timer) {
        match (actor, timer) {
            (Actor::Worker(rank), _) => {
                self.worker_ticks(rank);
                self.timer(worker::TICK_MS, actor, Timer::Tick);
            }
            (Actor::Autoscaler, _) => {
                self.autoscaler_ticks();
                self.timer(autoscaler::TICK_MS, actor, Timer::Tick);
            }
            (Actor::Store, _) => {
                self.store.flush();
                self.timer(50, actor, Timer::Flush);
            }
            (Actor::Invoker(number), Timer::Beat) => {
                self.invoker_beats(number);
                self.timer(invoker::BEAT_MS, actor, Timer::Beat);
            }
            (Actor::Invoker(number), Timer::Refresh) => {
                self.invoker_refreshes(number);
                self.timer(invoker::REFRESH_MS, actor, Timer::Refresh);
            }
            (Actor::Invoker(number), _) => self.invoker_ticks(number),
            (Actor::Broker, _) => {}
        }
    }

    /// A message arrives, or it does not.
    fn arrive(&mut self, from: (Actor, u32), to: (Actor, u32), body: Body) {
        let there = match to.0 {
            Actor::Broker => self.broker_up,
            other => {
                self.broker_up && self.links.get(&other).is_some_and(|link| link.up && link.epoch == to.1)
            }
        };
        // What was on its way when the sender's connection broke may have left it, or not.
        let sent = from.0 == Actor::Broker || self.epoch(from.0) == from.1 || self.rng.random_bool(0.5);
        if there && sent {
            self.note(|| format!("{:?} -> {:?}: {}", from.0, to.0, body.short()));
            return self.hear(from.0, to.0, body);
        }
        self.note(|| format!("{:?} -> {:?}: LOST {}", from.0, to.0, body.short()));
        match body.loss() {
            Loss::Nobody => {}
            Loss::Sender(body) => self.local(TIMEOUT_MS, from.0, body),
            Loss::Receiver(body) => self.local(TIMEOUT_MS, to.0, body),
        }
    }

    fn hear(&mut self, from: Actor, to: Actor, body: Body) {
        match to {
            Actor::Broker => self.broker_hears(from, body),
            Actor::Store => self.store_hears(from, body),
            Actor::Autoscaler => {
                if let Body::Beat(beat) = body {
                    self.autoscaler_hears(beat);
                }
            }
            Actor::Worker(rank) => self.worker_hears(rank, body),
            Actor::Invoker(number) => self.invoker_hears(number, body),
        }
    }

    fn store_hears(&mut self, from: Actor, body: Body) {
        if !self.store_up {
            return;
        }
        let reply = match body {
            Body::ReadHeads => self.store.heads().ok().map(Body::Heads),
            Body::Fetch(shard) => {
                self.store.fetch(shard, false).ok().map(|state| Body::Fetched(shard, state))
            }
            Body::ReadHead(key) => Some(Body::HeadRead(key, self.store.head(key.1))),
            Body::Commit(id, mut commit, state) => {
                if self.mutated(Mutation::CommitOnAnyHead)
                    && let Ok((head, _)) = self.store.head(commit.shard)
                {
                    commit.expect = head;
                    commit.ledger.round = head.version + 1;
                }
                if self.mutated(Mutation::RankForgotten) && commit.ledger.counted.len() > 1 {
                    commit.ledger.counted = commit.ledger.counted.iter().skip(1).collect();
                }
                let (shard, ledger) = (commit.shard, commit.ledger.clone());
                let result = self.store.commit(*commit, state.clone());
                if let Ok(outcome) = &result {
                    self.checker.committed(&self.job.clone(), shard, &ledger, &state, outcome);
                }
                Some(Body::Committed(id, result))
            }
            other => unreachable!("not for the store: {other:?}"),
        };
        if let Some(reply) = reply {
            self.send(Actor::Store, from, reply);
        }
    }

    fn broker_hears(&mut self, from: Actor, body: Body) {
        let now = self.now;
        let reply = match body {
            Body::Publish { shard, round, partition, rank, frame } => {
                let subject = subjects::gradient(partition, &self.job.record.spec.key, rank);
                let len = frame.len() as u64;
                let stored = self.broker.store(partition, now, subject, frame).is_some();
                self.deliver(partition);
                Some(if stored {
                    Body::Confirmed { shard, round, len }
                } else {
                    Body::Refused { shard, round, len }
                })
            }
            Body::ReadStreams(heads) => Some(Body::Streams(heads, self.broker.recorded.clone())),
            Body::ReadPlacement => Some(Body::Placement(self.broker.placement.clone())),
            Body::LookUp(key) => Some(Body::Job(key, Some(self.job.clone()))),
            Body::List(partition, epoch) => Some(match self.broker.list(partition) {
                Some((consumers, stream)) => Body::Listed { partition, epoch, consumers, stream },
                None => Body::TakeoverFailed { partition, epoch },
            }),
            Body::Delete { partition, epoch, name } => Some(match self.broker.delete(partition, &name) {
                Some(()) => Body::Deleted { partition, epoch },
                None => Body::TakeoverFailed { partition, epoch },
            }),
            Body::Create { partition, epoch, name } => Some(match self.broker.create(partition, &name) {
                Some(()) => Body::Created { partition, epoch, name },
                None => Body::TakeoverFailed { partition, epoch },
            }),
            Body::Release { partition, name } => {
                self.broker.delete(partition, &name);
                None
            }
            Body::Pull { partition, consumer, batch } => {
                let there = self.broker.pull(partition, &consumer, batch);
                self.deliver(partition);
                (!there).then_some(Body::ConsumerGone { partition, consumer })
            }
            Body::Acknowledge { partition, consumer, sequence } => {
                if let Some(message) = self.broker.acknowledge(partition, &consumer, sequence) {
                    let copies = self.broker.copies_of(&message.frame);
                    self.checker.acknowledged(&message.frame, copies > 0);
                }
                None
            }
            Body::PublishResult(bytes) => {
                for rank in 0..u32::try_from(self.workers.len()).unwrap_or(0) {
                    self.send(Actor::Broker, Actor::Worker(rank), Body::Result(bytes.clone()));
                }
                None
            }
            Body::Reject(rank, reject) => {
                self.send(Actor::Broker, Actor::Worker(rank), Body::Reject(rank, reject));
                None
            }
            other => unreachable!("not for the broker: {other:?}"),
        };
        if let Some(reply) = reply {
            self.send(Actor::Broker, from, reply);
        }
    }

    /// Sends what a partition's consumer has asked for to whoever made the consumer.
    fn deliver(&mut self, partition: Partition) {
        for (consumer, consumer_sequence, message) in self.broker.deliveries(partition) {
            // The pull request's inbox belongs to the invoker; others do not hear it.
            let holder = self.holder_of(partition, &consumer);
            if let Some(number) = holder {
                let body = Body::Deliver { partition, consumer, consumer_sequence, message };
                self.send(Actor::Broker, Actor::Invoker(number), body);
            }
        }
    }

    fn strike(&mut self) {
        let numbers: Vec<_> = self.invokers.keys().copied().collect();
        let some =
            |rng: &mut StdRng| (!numbers.is_empty()).then(|| numbers[rng.random_range(0..numbers.len())]);
        match self.rng.random_range(0..9) {
            0 | 1 => {
                if let Some(number) = some(&mut self.rng) {
                    self.note(|| format!("FAULT i{number} is killed"));
                    self.invoker_dies(number);
                }
            }
            2 | 3 => {
                let left = self.rng.random_range(0..12);
                if let Some(host) = some(&mut self.rng).and_then(|number| self.invokers.get_mut(&number)) {
                    host.dies_after = Some(left);
                }
            }
            4 => self.kill_store(),
            5 => self.kill_broker(),
            6 | 7 => {
                let all: Vec<_> = self.links.keys().copied().collect();
                let actor = all[self.rng.random_range(0..all.len())];
                self.note(|| format!("FAULT {actor:?} loses its connection"));
                self.disconnect(actor);
            }
            _ => {
                self.note(|| "FAULT everything is killed".to_owned());
                self.kill_store();
                self.kill_broker();
                numbers.into_iter().for_each(|number| self.invoker_dies(number));
            }
        }
    }

    fn kill_store(&mut self) {
        if !self.store_up {
            return;
        }
        self.note(|| "FAULT the store is killed".to_owned());
        // Perhaps in the middle of the next commit on its way.
        let next = self.queue.iter().find(|(_, event)| {
            matches!(event, Event::Message { to: (Actor::Store, _), body: Body::Commit(..), .. })
        });
        let write = match next {
            Some((_, Event::Message { body: Body::Commit(_, commit, state), .. }))
                if self.rng.random_bool(0.5) =>
            {
                Some((commit.as_ref().clone(), state.clone()))
            }
            _ => None,
        };
        self.store.kill(write, &mut self.rng);
        self.store_up = false;
        self.links.remove(&Actor::Store);
        let delay = self.rng.random_range(10..500);
        self.later(delay, Event::Start(Actor::Store));
    }

    fn kill_broker(&mut self) {
        if !self.broker_up {
            return;
        }
        self.note(|| "FAULT the broker is killed".to_owned());
        self.broker.restart();
        self.broker_up = false;
        for link in self.links.values_mut() {
            link.up = false;
            self.lives += 1;
            link.epoch = self.lives;
        }
        let delay = self.rng.random_range(10..1000);
        self.later(delay, Event::Start(Actor::Broker));
    }

    fn disconnect(&mut self, actor: Actor) {
        self.lives += 1;
        let epoch = self.lives;
        if let Some(link) = self.links.get_mut(&actor) {
            link.up = false;
            link.epoch = epoch;
            let delay = self.rng.random_range(10..2000);
            self.later(delay, Event::Reconnect(actor, epoch));
        }
    }
}

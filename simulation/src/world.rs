//! The world: virtual time, processes with their connections and tasks, and what becomes of a message.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use thalweg_broker::{LeaseKeeper, Revision};
use thalweg_invoker::{
    Takeover, TakeoverError,
    core::{Event as CoreEvent, Limits, ShardKey},
};
use thalweg_protocol::{
    ApiReply, Epoch, GradientHeader, Head, Incarnation, JobKey, JobSpec, Kind, Ledger, Partition, Placement,
    Roster, Round, SettingsRevision, ShardIndex, StoreId, WireError, frame,
};
use thalweg_store::ShardState;

use crate::{
    Mutation, Options, Report, autoscaler,
    broker::Broker,
    calls::CallId,
    check::Checker,
    gateway, invoker,
    network::{Actor, Body, Millis},
    process::{Process, TIMEOUT_MS},
    scenario::Scenario,
    store, worker,
};

/// What happens at some time.
pub(crate) enum Event {
    Message {
        from: (Actor, u32),
        to: (Actor, u32),
        /// Through the store's own door, past the broker.
        direct: bool,
        body: Body,
    },
    /// Within a process: dies with it, but not with its connection.
    Local(Actor, u32, Body),
    Timer(Actor, u32, Timer),
    Fault(u32),
    /// The broker is killed for so long: the second half of a fault.
    KillBroker(Millis),
    Reconnect(Actor, u32),
    Start(Actor),
    End(Actor, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    Tick,
    Core,
    Beat,
    Refresh,
    Jobs,
    Renew,
    Sweep,
    Flush,
    Wake,
    Stop,
    Cut,
}

/// End of a task.
pub(crate) enum Done {
    Nothing,
    // Of a worker.
    Joined(Box<Result<worker::Joined, WireError>>),
    Left,
    Published(ShardIndex, Round, u64, bool),
    Asked(Result<(Vec<Head>, Vec<i64>), WireError>),
    Fetched(ShardIndex, Result<(Head, Ledger, Bytes), WireError>),
    Looked(ShardIndex, Result<(Head, bool), WireError>),
    Beaten(Option<ApiReply>),
    // Of a gateway; of an autoscaler too.
    Replied(Actor, CallId, Option<Bytes>),
    Renewed(LeaseKeeper, bool),
    // Of an autoscaler.
    Observed(Option<Box<autoscaler::Observed>>),
    Placed(Option<(Placement, Revision)>),
    // Of an invoker.
    Core(CoreEvent),
    Took(Partition, Epoch, Result<Takeover, TakeoverError>),
    Echoed(Partition, String, u64),
    Placement(Option<Placement>),
    Republish(JobKey, ShardKey, Option<ShardState>),
    DeadLetter(Partition, u64, bool),
    // Of the store.
    Announced(bool),
    // Of the operator.
    Deleted,
    Settings(JobKey, Incarnation, SettingsRevision),
}

pub(crate) struct World {
    /// Jobs that were paused at some time.
    pub(crate) paused: BTreeSet<usize>,
    pub(crate) rng: StdRng,
    /// Faults are drawn from numbers of their own, so that one can be left out without changing the others.
    pub(crate) fault_rng: StdRng,
    seed: u64,
    pub(crate) now: Millis,
    pub(crate) start: Instant,
    pub(crate) clock: Arc<AtomicU64>,
    order: u64,
    queue: BTreeMap<(Millis, u64), Event>,
    /// When the last message between two will arrive.
    pub(crate) last: BTreeMap<(Actor, Actor, u8), Millis>,
    pub(crate) processes: BTreeMap<Actor, Process>,
    /// Processes with tasks to look at.
    pub(crate) awake: BTreeSet<Actor>,
    pub(crate) doomed: BTreeSet<Actor>,
    pub(crate) lives: u32,
    pub(crate) call_ids: Arc<AtomicU64>,
    mutation: Option<Mutation>,

    pub(crate) partitions: Partition,
    pub(crate) files: bool,
    pub(crate) direct: bool,
    pub(crate) lease_ms: Millis,
    pub(crate) window_budget: u64,
    pub(crate) window_divisor: u64,
    pub(crate) most_invokers: usize,
    pub(crate) limits: Limits,
    pub(crate) most_skew: Millis,
    pub(crate) specs: Vec<JobSpec>,
    pub(crate) rounds: Round,

    pub(crate) broker: Broker<(Actor, u32)>,
    pub(crate) broker_up: bool,
    pub(crate) broker_life: u32,
    pub(crate) refuses_until: Millis,
    /// The next invoker that commits is cut off for so long; the broker is killed after so long, for so long.
    pub(crate) strands: Option<(Millis, (Millis, Millis))>,
    pub(crate) store: store::Host,
    pub(crate) store_serves: bool,
    /// What was read last of an even and of an odd version, for [`Mutation::SlotReusedUnderReader`].
    pub(crate) half_read: BTreeMap<bool, Bytes>,
    /// Where shards stood when the store was started.
    pub(crate) restarted_at: BTreeMap<(Incarnation, ShardIndex), u64>,
    pub(crate) workers: Vec<worker::Host>,
    pub(crate) gateways: BTreeMap<u32, gateway::Host>,
    pub(crate) autoscalers: BTreeMap<u32, autoscaler::Host>,
    pub(crate) invokers: BTreeMap<u32, invoker::Host>,
    pub(crate) invoker_ids: Arc<AtomicU32>,
    /// Which autoscaler is starting an invoker.
    pub(crate) starters: BTreeMap<u32, u32>,
    pub(crate) incarnations: Arc<dyn Fn() -> Incarnation + Send + Sync>,
    pub(crate) poison: Option<(Incarnation, Round, ShardIndex)>,
    /// Windows that workers were told.
    pub(crate) windows: BTreeMap<Incarnation, u64>,
    pub(crate) checker: Checker,
    pub(crate) faults_until: Millis,
    pub(crate) faults: u32,
    skip: BTreeSet<u32>,
    pub(crate) struck: Vec<(u32, Millis, String)>,
    pub(crate) deleting: Option<bool>,
    steps: u64,
    trace: Option<Vec<String>>,
}

/// Lines of history that are kept.
const TRACE_LINES: usize = 20_000;

impl World {
    pub(crate) fn new(options: &Options) -> anyhow::Result<Self> {
        let mut rng = StdRng::seed_from_u64(options.seed);
        let Scenario {
            specs,
            rounds,
            partitions,
            files,
            direct,
            window_budget,
            window_divisor,
            most_invokers,
            limits,
            most_skew,
            faults_until,
            gateways,
            autoscalers,
        } = Scenario::draw(&mut rng)?;
        let rounds = options.rounds.unwrap_or(rounds);
        let ids = Mutex::new(StdRng::seed_from_u64(options.seed ^ 0x1d));
        let incarnations = move || Incarnation(ids.lock().unwrap_or_else(PoisonError::into_inner).random());
        let store = store::Host::new(StoreId([7; 16]), options.seed)?;
        if options.mutation == Some(Mutation::SyncSkipped) {
            store.ignore_syncs();
        }
        let mut world = Self {
            fault_rng: StdRng::seed_from_u64(options.seed ^ 0xfa17),
            seed: options.seed,
            now: 0,
            start: Instant::now(),
            clock: Arc::default(),
            order: 0,
            queue: BTreeMap::new(),
            last: BTreeMap::new(),
            processes: BTreeMap::new(),
            awake: BTreeSet::new(),
            doomed: BTreeSet::new(),
            lives: 0,
            call_ids: Arc::default(),
            mutation: options.mutation,
            partitions,
            files,
            direct,
            lease_ms: 2000,
            window_budget,
            window_divisor,
            most_invokers,
            limits,
            most_skew,
            rounds,
            broker: Broker::new(partitions, files),
            broker_up: true,
            broker_life: 0,
            refuses_until: 0,
            strands: None,
            store,
            store_serves: false,
            half_read: BTreeMap::new(),
            restarted_at: BTreeMap::new(),
            workers: Vec::new(),
            gateways: BTreeMap::new(),
            autoscalers: BTreeMap::new(),
            invokers: BTreeMap::new(),
            invoker_ids: Arc::default(),
            starters: BTreeMap::new(),
            incarnations: Arc::new(incarnations),
            poison: None,
            windows: BTreeMap::new(),
            checker: Checker::default(),
            faults_until,
            faults: 0,
            paused: BTreeSet::new(),
            skip: options.skip.iter().copied().collect(),
            struck: Vec::new(),
            deleting: None,
            steps: 0,
            trace: options.trace.then(Vec::new),
            specs,
            rng,
        };
        for (job, spec) in world.specs.iter().enumerate() {
            world.workers.extend((0..spec.workers).map(|rank| worker::Host {
                job,
                rank,
                life: Incarnation([0; 16]),
                state: worker::State::Away { returns: true },
                own_fault_until: 0,
            }));
        }
        // In any order.
        let workers = u32::try_from(world.workers.len()).unwrap_or(0);
        let all = [Actor::Store].into_iter();
        let all = all.chain((0..gateways).map(Actor::Gateway)).chain((0..autoscalers).map(Actor::Autoscaler));
        for actor in all.chain((0..workers).map(Actor::Worker)).collect::<Vec<_>>() {
            let delay = world.rng.random_range(0..400);
            world.later(delay, Event::Start(actor));
        }
        let first = world.fault_rng.random_range(10..500);
        world.later(first, Event::Fault(0));
        Ok(world)
    }

    /// Plays to the end.
    pub(crate) fn play(mut self) -> anyhow::Result<Report> {
        // What is planted in the store belongs to this thread, and to this run.
        crate::plant(self.mutation);
        let ended = self.play_on();
        crate::plant(None);
        ended?;
        Ok(Report {
            seed: self.seed,
            steps: self.steps,
            virtual_ms: self.now,
            faults: self.struck,
            rounds: self.rounds,
            violation: self.checker.violation,
            trace: self.trace.unwrap_or_default(),
        })
    }

    fn play_on(&mut self) -> anyhow::Result<()> {
        while self.checker.violation.is_none() {
            let Some(((at, order), event)) = self.queue.pop_first() else { break };
            self.now = at;
            self.clock.store(at, Ordering::Relaxed);
            if let Some(until) = self.frozen_until(&event) {
                // Until then it waits in the socket, in its old order.
                self.queue.insert((until, order), event);
                continue;
            }
            self.steps += 1;
            self.happen(event)?;
            self.follow_up()?;
            if self.now > self.faults_until && self.is_over()? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Runs tasks that may go on, and buries the doomed.
    pub(crate) fn follow_up(&mut self) -> anyhow::Result<()> {
        loop {
            if let Some(actor) = self.doomed.pop_first() {
                self.note(|| format!("{actor:?} dies"));
                self.dies(actor);
            } else if let Some(actor) = self.awake.pop_first() {
                self.run_tasks(actor)?;
            } else {
                return Ok(());
            }
        }
    }

    fn frozen_until(&self, event: &Event) -> Option<Millis> {
        let actor = match event {
            Event::Message { to: (actor, _), .. }
            | Event::Local(actor, ..)
            | Event::Timer(actor, ..)
            | Event::End(actor, _) => actor,
            _ => return None,
        };
        let until = self.processes.get(actor)?.frozen_until;
        (until > self.now).then_some(until)
    }

    pub(crate) fn mutated(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace
            && trace.len() < TRACE_LINES
        {
            trace.push(format!("{:>6} ms  {}", self.now, line()));
        }
    }

    pub(crate) fn later(&mut self, delay: Millis, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(crate) fn at(&mut self, at: Millis, event: Event) {
        self.order += 1;
        self.queue.insert((at, self.order), event);
    }

    pub(crate) fn timer(&mut self, delay: Millis, actor: Actor, timer: Timer) {
        let life = self.life(actor);
        self.later(delay, Event::Timer(actor, life, timer));
    }

    pub(crate) fn local(&mut self, delay: Millis, actor: Actor, body: Body) {
        let life = self.life(actor);
        self.later(delay, Event::Local(actor, life, body));
    }

    fn happen(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Message { from, to, direct, body } => self.arrive(from, to, direct, body)?,
            Event::Local(actor, life, body) => {
                if self.life(actor) == life {
                    self.hear(actor, actor, body)?;
                }
            }
            Event::Timer(actor, life, timer) => {
                if self.life(actor) == life {
                    self.tick(actor, timer)?;
                }
            }
            Event::Fault(number) => self.fault(number)?,
            Event::KillBroker(for_ms) => self.kill_broker(for_ms),
            Event::Reconnect(actor, epoch) => self.reconnects(actor, epoch),
            Event::Start(actor) => self.starts(actor)?,
            Event::End(actor, life) => {
                if self.life(actor) == life {
                    self.note(|| format!("{actor:?} ends"));
                    self.end(actor);
                }
            }
        }
        Ok(())
    }

    /// Draws the next fault, and lets this one strike unless it is left out.
    fn fault(&mut self, number: u32) -> anyhow::Result<()> {
        if self.now >= self.faults_until {
            return Ok(());
        }
        self.faults += 1;
        // Each has numbers of its own, so that leaving one out does not change the others.
        self.fault_rng = StdRng::seed_from_u64(self.seed.wrapping_mul(0x9e37_79b9) ^ u64::from(number));
        let next = self.fault_rng.random_range(20..900);
        self.later(next, Event::Fault(number + 1));
        if !self.skip.contains(&number) {
            let what = self.strike()?;
            if let Some(what) = what {
                self.note(|| format!("FAULT {number}: {what}"));
                self.struck.push((number, self.now, what));
            }
        }
        Ok(())
    }

    fn reconnects(&mut self, actor: Actor, epoch: u32) {
        if !self.broker_up || self.epoch(actor) != epoch {
            return;
        }
        let Some(process) = self.processes.get_mut(&actor).filter(|process| !process.up) else { return };
        let until = process.frozen_until.max(process.cut_until);
        if until > self.now {
            return self.at(until, Event::Reconnect(actor, epoch));
        }
        process.up = true;
        let outbox = std::mem::take(&mut process.outbox);
        self.note(|| format!("{actor:?} is connected again"));
        outbox.into_iter().for_each(|(to, body)| self.send(actor, to, body));
        match actor {
            Actor::Worker(index) => self.worker_reconnected(index),
            Actor::Gateway(number) => self.gateway_reconnected(number),
            Actor::Autoscaler(number) => self.autoscaler_reconnected(number),
            Actor::Invoker(number) => self.invoker_reconnected(number),
            Actor::Store | Actor::Broker | Actor::Operator => {}
        }
    }

    fn starts(&mut self, actor: Actor) -> anyhow::Result<()> {
        if self.processes.contains_key(&actor) {
            return Ok(());
        }
        match actor {
            Actor::Broker => {
                self.broker_up = true;
                self.note(|| "the broker is back".to_owned());
                let all: Vec<_> = self.processes.keys().copied().collect();
                for actor in all {
                    let (delay, epoch) = (self.rng.random_range(1..300), self.epoch(actor));
                    self.later(delay, Event::Reconnect(actor, epoch));
                }
            }
            Actor::Store => self.store_starts()?,
            Actor::Invoker(number) => {
                if let Some(starter) = self.starters.remove(&number) {
                    self.born(actor);
                    self.invoker_starts(number, starter);
                } else {
                    // Stopped before it was there.
                    for host in self.autoscalers.values_mut() {
                        host.ended.push(format!("i{number}"));
                    }
                }
            }
            Actor::Worker(index) => {
                self.born(actor);
                self.worker_starts(index);
            }
            Actor::Gateway(number) => {
                self.born(actor);
                self.gateway_starts(number);
            }
            Actor::Autoscaler(number) => {
                self.born(actor);
                self.autoscaler_starts(number);
            }
            Actor::Operator => {}
        }
        Ok(())
    }

    fn tick(&mut self, actor: Actor, timer: Timer) -> anyhow::Result<()> {
        match (actor, timer) {
            (Actor::Invoker(number), Timer::Stop) => self.invoker_stops(number),
            (Actor::Invoker(number), _) => self.invoker_ticks(number, timer),
            (Actor::Worker(index), _) => self.worker_ticks(index, timer),
            (Actor::Gateway(number), _) => self.gateway_ticks(number, timer),
            (Actor::Autoscaler(number), _) => self.autoscaler_ticks(number, timer),
            (Actor::Store, _) => self.store_flushes()?,
            (Actor::Broker | Actor::Operator, _) => {}
        }
        Ok(())
    }

    /// A signal to stop.
    pub(crate) fn signal_stop(&mut self, number: u32) {
        self.timer(0, Actor::Invoker(number), Timer::Stop);
    }

    /// A message arrives, or it does not.
    fn arrive(
        &mut self,
        from: (Actor, u32),
        to: (Actor, u32),
        direct: bool,
        body: Body,
    ) -> anyhow::Result<()> {
        let there = if direct {
            self.life(to.0) == to.1
        } else {
            let connected = to.0 == Actor::Broker || self.is_connected(to.0);
            self.broker_up && connected && self.epoch(to.0) == to.1
        };
        // What was on its way when the sender's connection broke may have left it, or not.
        let sent =
            from.0 == Actor::Broker || direct || self.epoch(from.0) == from.1 || self.rng.random_bool(0.5);
        let lost = !(there && sent);
        if !body.is_noise() {
            self.note(|| {
                let lost = if lost { " LOST" } else { "" };
                format!("{:?} -> {:?}:{lost} {}", from.0, to.0, body.short())
            });
        }
        if lost { Ok(()) } else { self.hear(from.0, to.0, body) }
    }

    fn hear(&mut self, from: Actor, to: Actor, body: Body) -> anyhow::Result<()> {
        if let Body::Answer(id, answer) = body {
            if let Some(process) = self.processes.get(&to)
                && process.remote.answer(id, answer)
            {
                self.awake.insert(to);
            }
            return Ok(());
        }
        match to {
            Actor::Broker => self.broker_hears(from, body),
            Actor::Store => self.store_hears(from, body)?,
            Actor::Autoscaler(number) => {
                if let Body::Beat(beat) = body {
                    self.autoscaler_hears(number, beat);
                }
            }
            Actor::Worker(index) => self.worker_hears(index, body),
            Actor::Invoker(number) => self.invoker_hears(number, body),
            Actor::Gateway(number) => self.gateway_hears(number, body),
            Actor::Operator => {}
        }
        Ok(())
    }

    /// The header of a contribution.
    pub(crate) fn contribution(bytes: &Bytes) -> Option<GradientHeader> {
        frame::open::<GradientHeader>(Kind::Gradient, bytes).ok().map(|(header, _)| header)
    }

    pub(crate) fn is_poison(&self, bytes: &Bytes) -> bool {
        Self::contribution(bytes)
            .is_some_and(|header| self.poison == Some((header.worker, header.round, header.shard)))
    }

    pub(crate) fn record_of_life(&self, job: Incarnation) -> Option<thalweg_protocol::JobRecord> {
        let mut records = (0..self.specs.len()).filter_map(|index| self.record_of(index));
        records.find(|record| record.incarnation == job)
    }

    /// A key of the registry was written.
    pub(crate) fn key_written(&mut self, key: &str, value: Option<&Bytes>) {
        let Some(value) = value else { return };
        if key.starts_with("job.")
            && let Ok(record) = frame::open_record(value)
        {
            self.checker.job_written(&record);
        }
        if key.starts_with("roster.")
            && let Ok(roster) = frame::open_record::<Roster>(value)
        {
            self.check_expiry(&roster);
            self.checker.roster_written(&roster);
        }
    }

    /// Nobody expires who could have been heard (rule P21).
    fn check_expiry(&mut self, roster: &Roster) {
        let Some(before) = self.checker.newest_roster(roster.job) else { return };
        let was_present =
            |worker: Incarnation| before.tenure(worker).is_some_and(|member| member.until_round.is_none());
        let present = |worker| roster.tenure(worker).is_some_and(|member| member.until_round.is_none());
        let mut wronged = None;
        for (index, host) in (0..).zip(&self.workers) {
            let trains = matches!(host.state, worker::State::Training(_) | worker::State::Joining);
            let healthy = trains
                && !self.is_frozen(Actor::Worker(index))
                && self.now > host.own_fault_until + self.lease_ms + TIMEOUT_MS;
            if healthy && was_present(host.life) && !present(host.life) {
                wronged = Some((index, host.rank));
            }
        }
        if let Some((index, rank)) = wronged {
            let text = format!("worker {index} (rank {rank}) is off the roster, though nothing ails it");
            self.checker.fail("P21", None, text);
        }
    }
}

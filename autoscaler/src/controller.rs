//! The loop's state machine: what happened and the time go in, actions come out.

use std::fmt;

use thalweg_broker::PartitionDepth;
use thalweg_protocol::{InvokerBeat, Name, Partition, Placement};

use crate::{
    Config, DecisionRecord, Demand, Elastic, History, Millis, Policy as _, Reason, Sample, Status, exchange,
    fleet::{Fleet, Invoker, Phase, placed_on},
    ledger::Ledger,
    loads::{Loads, Mix},
    metrics::{self, Rhythm},
    place,
};

/// While more invokers are starting, a placement that is not urgent waits this long for them, so that
/// partitions go out in one write instead of wandering from one newcomer to the next.
const SETTLE_MS: Millis = 50;
/// An invoker that ends by itself younger than this failed to start.
const EARLY_END_MS: Millis = 2000;
/// Pause before the next start after a failed one; doubles up to the longest.
const START_PAUSE_MS: Millis = 100;
const LONGEST_START_PAUSE_MS: Millis = 5000;

/// Share of an invoker's service rate up to which it counts as hardly loaded: then nothing is exchanged.
const HARDLY_LOADED: f64 = 0.2;

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// The target has changed: say so.
    Decided(DecisionRecord),
    /// Start an invoker with this id.
    Start(String),
    /// Write this placement; then tell [`Controller::placed`] what the registry holds.
    Place(Placement),
    /// Let this invoker finish and end.
    Stop(String),
}

/// Observes, decides, places and actuates, without doing any of the I/O itself.
///
/// Everything but acting also happens without the lease, so that a standby knows the fleet when its turn
/// comes. The one thing that a standby does is to stop invokers of its own that nobody uses.
pub struct Controller {
    config: Config,
    partitions: Partition,
    /// Whether invokers can be started and stopped here, or only placed on.
    starts: bool,
    ids: Box<dyn FnMut() -> String + Send>,
    fleet: Fleet,
    history: History,
    policy: Elastic,
    reason: Reason,
    leading: bool,
    placement: Placement,
    /// Since when the placement is not what it should be.
    unplaced_since: Option<Millis>,
    /// When partitions changed their holders last.
    placed_at: Millis,
    loads: Loads,
    mix: Mix,
    ledger: Ledger,
    wake_at: Option<Millis>,
    /// As invokers measured it last; none before any has.
    measured_bytes_per_s: Option<f64>,
    /// What counts until there has been a warm invoker.
    cold_bytes_per_s: Option<f64>,
    failed_starts: u32,
    start_after: Millis,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Controller");
        debug.field("fleet", &self.fleet).field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Controller {
    /// A controller that knows nobody. `starts` is whether its actuator can start invokers; `ids` makes
    /// their ids, which must never repeat.
    #[must_use]
    pub fn new(
        config: Config,
        partitions: Partition,
        starts: bool,
        ids: Box<dyn FnMut() -> String + Send>,
        now: Millis,
    ) -> Self {
        Self {
            history: History::new(partitions, 0, now),
            policy: Elastic::default(),
            measured_bytes_per_s: None,
            cold_bytes_per_s: None,
            config,
            partitions,
            starts,
            ids,
            fleet: Fleet::default(),
            reason: Reason::default(),
            leading: false,
            placement: Placement::default(),
            unplaced_since: None,
            placed_at: now,
            loads: Loads::default(),
            mix: Mix::default(),
            ledger: Ledger::default(),
            wake_at: None,
            failed_starts: 0,
            start_after: 0,
        }
    }

    /// Goes on by these settings. What was decided and observed stays, unless the new windows reach further
    /// back than what was kept: then nothing may be concluded about them before they have passed.
    pub fn set_policy(&mut self, config: Config, now: Millis) {
        if config.longest_window() > self.config.longest_window() {
            self.history.interrupt(now);
        }
        self.config = config;
    }

    fn service_bytes_per_s(&self) -> f64 {
        let measured = self.measured_bytes_per_s.or(self.cold_bytes_per_s);
        measured.unwrap_or(self.config.default_service_mb_per_s * 1e6)
    }

    /// Takes a beat in. Returns whether [`Self::step`] should follow at once.
    pub fn beat(&mut self, beat: InvokerBeat, now: Millis) -> bool {
        self.history.learn(&beat.jobs, now);
        self.mix.add(&beat.jobs);
        if self.leading {
            self.ledger.account(&beat);
        }
        self.fleet.beat(beat, now)
    }

    /// Takes the depths of all partitions in; `now` is when they were asked for, so that what came to pass
    /// while the answer was under way (beats that still wait to be taken in) is not judged by it.
    pub fn observed(&mut self, depths: &[PartitionDepth], now: Millis) {
        self.loads.observe(depths, now);
        self.mix.fade();
        let load = self.fleet.load(now);
        self.measured_bytes_per_s = load.service_bytes_per_s.or(self.measured_bytes_per_s);
        self.cold_bytes_per_s = load.cold_bytes_per_s.or(self.cold_bytes_per_s);
        let sample = Sample {
            at: now,
            messages: depths.iter().map(|depth| depth.messages).sum(),
            bytes: depths.iter().map(|depth| depth.bytes).sum(),
            arrived: depths.iter().map(|depth| depth.last_sequence).sum(),
            active_partitions: depths.iter().filter(|depth| depth.messages > 0).count(),
            waiting_for_round: load.waiting_for_round,
            busy: load.busy,
            service_bytes_per_s: self.service_bytes_per_s(),
            handled_per_byte: self.mix.handled_per_byte(),
            serving: self.fleet.in_phase(&[Phase::Serving]),
            start_delay_ms: self.fleet.start_delay_ms,
        };
        self.history.record(sample, &self.config);
    }

    /// The connection was lost, and may be back: what was not heard meanwhile means nothing.
    pub fn interrupted(&mut self, now: Millis) {
        self.loads.interrupt();
        self.history.interrupt(now);
    }

    /// These invokers have ended, as the actuator saw.
    pub fn reaped(&mut self, ids: &[String], now: Millis) {
        for id in ids {
            let Some(invoker) = self.fleet.end(id) else { continue };
            if invoker.counts() && now - invoker.known < EARLY_END_MS {
                self.start_failed(now);
            }
        }
    }

    /// These invokers, started by an earlier autoscaler, are the actuator's to stop from now on. Those that were
    /// never heard have the time of a start to beat.
    pub fn adopted(&mut self, ids: &[String], now: Millis) {
        for id in ids {
            tracing::info!(invoker = id, "adopted an invoker of an earlier autoscaler");
            let invoker = Invoker::new(true, Phase::Starting, now);
            let invoker = self.fleet.members.entry(id.clone()).or_insert(invoker);
            invoker.own = true;
            if invoker.phase == Phase::Spare {
                // It counts again; if it is one too many, it is retired like any other.
                invoker.enter(Phase::Serving, now);
            }
        }
    }

    /// The actuator could not start this invoker.
    pub fn not_started(&mut self, id: &str, now: Millis) {
        if self.fleet.end(id).is_some() {
            self.start_failed(now);
        }
    }

    fn start_failed(&mut self, now: Millis) {
        let pause = START_PAUSE_MS.saturating_mul(1 << self.failed_starts.min(10));
        self.failed_starts = self.failed_starts.saturating_add(1);
        self.start_after = now + pause.min(LONGEST_START_PAUSE_MS);
    }

    /// The lease is ours, and this is the placement in the registry. Its holders are taken for alive until
    /// their silence has been observed, and their number is the target to begin with.
    pub fn lead(&mut self, placement: Placement, now: Millis) {
        self.leading = true;
        self.placed(placement, now);
        let mut holders: Vec<_> =
            self.placement.partitions.iter().filter_map(|placed| placed.holder.as_deref()).collect();
        holders.sort_unstable();
        holders.dedup();
        for id in holders {
            if let Some(invoker) = self.fleet.members.get_mut(id)
                && invoker.phase == Phase::Spare
            {
                invoker.enter(Phase::Serving, now);
            }
        }
        self.history.set_target(self.fleet.count(Invoker::counts));
    }

    /// The lease is gone: nothing is done until [`Self::lead`].
    pub fn lapsed(&mut self) {
        self.leading = false;
    }

    /// Whether the lease is ours, as far as this controller was told.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.leading
    }

    /// This is the placement in the registry now.
    pub fn placed(&mut self, placement: Placement, now: Millis) {
        for id in placement.partitions.iter().filter_map(|placed| placed.holder.as_ref()) {
            if !self.fleet.members.contains_key(id) && !self.fleet.has_ended(id) {
                // Known to the registry only. Silence is counted from the start of continuous observation.
                let mut invoker = Invoker::new(false, Phase::Serving, now);
                invoker.heard = self.history.continuous_since();
                self.fleet.members.insert(id.clone(), invoker);
            }
        }
        if self.placement != placement {
            self.placed_at = now;
        }
        self.placement = placement;
    }

    /// The placement in the registry, as far as is known.
    #[must_use]
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// What to do now. Also when nothing has happened: time has passed.
    pub fn step(&mut self, now: Millis) -> Vec<Action> {
        let mut actions = Vec::new();
        self.wake_at = None;
        if !self.leading {
            self.stop_unused(now, &mut actions);
        } else {
            self.bury(now, &mut actions);
            self.decide(now, &mut actions);
            self.fit(now, &mut actions);
            self.place(now, &mut actions);
            self.stop_retired(now, &mut actions);
        }
        actions
    }

    /// When [`Self::step`] is due before the next observation.
    #[must_use]
    pub fn wake_at(&self) -> Option<Millis> {
        self.wake_at
    }

    /// Whether there is nothing to do and nobody to do it.
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.reason == Reason::Idle && self.fleet.members.is_empty()
    }

    /// Whether nothing waits, and nobody comes or goes.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let settled = |invoker: &Invoker| matches!(invoker.phase, Phase::Serving | Phase::Spare);
        self.history.last_known().0 == 0 && self.fleet.members.values().all(settled)
    }

    /// The placement without the invokers started here, which are about to be stopped; `None` when it does
    /// not change. Nothing is started or stopped afterwards.
    pub fn hand_over(&mut self, now: Millis) -> Option<Placement> {
        for invoker in self.fleet.members.values_mut() {
            match invoker.phase {
                _ if invoker.own => invoker.enter(Phase::Stopping, now),
                Phase::Spare => invoker.enter(Phase::Serving, now),
                _ => {}
            }
        }
        self.leading = false;
        let next = place(&self.placement, &self.fleet.candidates(), self.partitions);
        (next != self.placement).then_some(next)
    }

    /// The present state.
    #[must_use]
    pub fn status(&self) -> Status {
        let depth = self.history.last_known();
        Status {
            leading: self.leading,
            invokers: self.fleet.members.len(),
            ready: self.fleet.in_phase(&[Phase::Serving]),
            starting: self.fleet.in_phase(&[Phase::Starting]),
            draining: self.fleet.in_phase(&[Phase::Retiring, Phase::Stopping, Phase::Leaving]),
            spare: self.fleet.in_phase(&[Phase::Spare]),
            target: self.history.target(),
            depth_messages: depth.0,
            depth_bytes: depth.1,
            reason: self.reason,
        }
    }

    /// Shows what invokers are able to do, and, where this autoscaler leads, the jobs' rhythm: for dashboards.
    pub(crate) fn show(&mut self, pool: Option<&Name>, now: Millis) {
        let service = self.service_bytes_per_s();
        let busy = self.history.latest(now, &self.config).map_or(0.0, |sample| sample.busy);
        metrics::service(pool, service, busy);
        let (reference, parallel) = (f64::from(self.config.reference_invokers), f64::from(self.partitions));
        let rhythm = |demand: &Demand| {
            let round_s = demand.recent_period_ms / 1000.0;
            let slowdown = demand.load(service, reference, parallel).slowdown(round_s);
            Rhythm { round_s, aggregation_s: demand.delay_ms / 1000.0, slowdown }
        };
        let jobs = self.history.jobs().active(now).filter(|_| self.leading);
        self.ledger.show(jobs.map(|(job, demand)| (job, rhythm(demand))));
    }

    /// How long something that began at `since` has lasted under this autoscaler's own uninterrupted
    /// observation; `None` while it observes nothing. The time after the last observation does not count:
    /// it may be the beginning of an outage.
    fn observed_for(&self, since: Millis, now: Millis) -> Option<Millis> {
        let latest = self.history.latest(now, &self.config)?;
        Some(latest.at.saturating_sub(since.max(self.history.continuous_since())))
    }

    /// Gives up those that are silent or never came up.
    fn bury(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let mut silent = Vec::new();
        for (id, invoker) in &self.fleet.members {
            let limit = match invoker.phase {
                Phase::Starting => self.config.start_timeout_ms,
                // Its process is the actuator's business until it is reaped.
                Phase::Stopping => continue,
                _ => self.config.dead_after_ms,
            };
            if self.observed_for(invoker.heard, now).is_some_and(|silence| silence >= limit) {
                silent.push(id.clone());
            }
        }
        for id in silent {
            let Some(invoker) = self.fleet.members.get_mut(&id) else { continue };
            let phase = invoker.phase;
            tracing::warn!(invoker = id, own = invoker.own, ?phase, "invoker is silent; giving it up");
            if invoker.own {
                // It may only be frozen: whatever it still does, the epochs fence it.
                invoker.enter(Phase::Stopping, now);
                actions.push(Action::Stop(id));
                if phase == Phase::Starting {
                    self.start_failed(now);
                }
            } else {
                self.fleet.members.remove(&id);
            }
        }
    }

    fn decide(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let decision = self.policy.decide(&self.history, now, &self.config);
        let previous = self.history.target();
        self.reason = decision.reason;
        if decision.target == previous {
            return;
        }
        let status = self.status();
        self.history.set_target(decision.target);
        actions.push(Action::Decided(DecisionRecord {
            at_ms: now,
            previous,
            target: decision.target,
            reason: decision.reason,
            service_bytes_per_s: self.service_bytes_per_s(),
            busy: self.history.latest(now, &self.config).map_or(0.0, |sample| sample.busy),
            status,
        }));
    }

    /// Makes as many invokers serve as there should be.
    fn fit(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let settled =
            |invoker: &Invoker| invoker.phase == Phase::Serving && now - invoker.known >= EARLY_END_MS;
        if self.fleet.count(|invoker| invoker.own && settled(invoker)) > 0 {
            self.failed_starts = 0;
        }
        // Where nobody can be started, everybody who is there serves.
        let target = if self.starts { self.history.target() } else { usize::MAX };
        let mut present = self.fleet.count(Invoker::counts);
        // Those that are there anyway come before new ones.
        for wanted in [Phase::Retiring, Phase::Spare] {
            for invoker in self.fleet.members.values_mut().filter(|invoker| invoker.phase == wanted) {
                if present < target {
                    invoker.enter(Phase::Serving, now);
                    present += 1;
                }
            }
        }
        if self.starts && now >= self.start_after {
            for _ in present..target {
                let id = (self.ids)();
                self.fleet.members.insert(id.clone(), Invoker::new(true, Phase::Starting, now));
                actions.push(Action::Start(id));
            }
        }
        let surplus = present.saturating_sub(target);
        for id in self.fleet.retirement_order(&self.placement).into_iter().take(surplus) {
            let Some(invoker) = self.fleet.members.get_mut(&id) else { continue };
            match (invoker.own, invoker.phase) {
                (false, _) => invoker.enter(Phase::Spare, now),
                (true, Phase::Starting) => {
                    invoker.enter(Phase::Stopping, now);
                    actions.push(Action::Stop(id));
                }
                (true, _) => invoker.enter(Phase::Retiring, now),
            }
        }
    }

    fn place(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let next = place(&self.placement, &self.fleet.candidates(), self.partitions);
        if next == self.placement {
            self.unplaced_since = None;
            actions.extend(self.exchange(now).map(Action::Place));
            return;
        }
        let since = *self.unplaced_since.get_or_insert(now);
        let orphaned = |id: &String| {
            let invoker = self.fleet.members.get(id);
            invoker.is_none_or(|invoker| matches!(invoker.phase, Phase::Leaving | Phase::Stopping))
        };
        let urgent =
            self.placement.partitions.iter().filter_map(|placed| placed.holder.as_ref()).any(orphaned);
        if urgent || self.fleet.in_phase(&[Phase::Starting]) == 0 || now >= since + SETTLE_MS {
            actions.push(Action::Place(next));
        } else {
            self.wake_at = Some(since + SETTLE_MS);
        }
    }

    /// The placement with partitions exchanged by their loads, if it is time for that and worth it.
    fn exchange(&self, now: Millis) -> Option<Placement> {
        let pause = self.config.exchange_pause_ms;
        let steady = self.fleet.members.values().all(|invoker| invoker.phase == Phase::Serving);
        if pause == 0 || !steady || now < self.placed_at + pause {
            return None;
        }
        self.history.latest(now, &self.config)?;
        let least = HARDLY_LOADED * self.service_bytes_per_s();
        exchange(&self.placement, &self.fleet.candidates(), &self.loads.bytes_per_s()?, least)
    }

    /// Stops the invokers started here that the one who leads does not use. Nobody else may stop them, so they
    /// would run for ever.
    fn stop_unused(&mut self, now: Millis, actions: &mut Vec<Action>) {
        for (id, invoker) in &mut self.fleet.members {
            let unused = invoker.empty_since.is_some_and(|since| now >= since + self.config.idle_timeout_ms);
            if invoker.own && unused && invoker.phase != Phase::Stopping {
                invoker.enter(Phase::Stopping, now);
                actions.push(Action::Stop(id.clone()));
            }
        }
    }

    /// Stops the retired ones whose partitions are in other hands.
    fn stop_retired(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let mut done = Vec::new();
        for (id, invoker) in &self.fleet.members {
            if invoker.phase != Phase::Retiring || placed_on(&self.placement, id) > 0 {
                continue;
            }
            let empty = invoker.beat.as_ref().is_none_or(|beat| beat.partitions.is_empty());
            let drained = empty && invoker.heard > invoker.since;
            let late = self.observed_for(invoker.since, now);
            if drained || late.is_some_and(|late| late >= self.config.drain_timeout_ms) {
                done.push(id.clone());
            }
        }
        for id in done {
            if let Some(invoker) = self.fleet.members.get_mut(&id) {
                invoker.enter(Phase::Stopping, now);
                actions.push(Action::Stop(id));
            }
        }
    }
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;

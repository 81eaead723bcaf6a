//! Means between changes.

use std::collections::HashMap;

use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use thalweg_protocol::JobKey;

use super::{
    Constants, INSTANT, Score, TraceJob, handled_per_byte, key,
    pool::{Pool, Seen},
};
use crate::{
    Config, Demand, Millis, Policy,
    demand::{self, Load},
};

/// Rounds after which a job's rhythm is known.
const LEARNED_AFTER: f64 = 2.0;

/// Where a simulation stood at some moment.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// When, milliseconds.
    pub at: f64,
    /// Invokers that work.
    pub invokers: usize,
    /// Jobs under way: place in the trace, and rounds that are left.
    pub jobs: Vec<(usize, f64)>,
}

struct Active {
    index: usize,
    key: JobKey,
    load: Load,
    rounds: f64,
    rounds_left: f64,
    began: f64,
    period: f64,
}

/// Plays jobs (ascending by start) against a policy. With `from`, goes on from there; with `until` (milliseconds), no
/// further than that. `states` are the moments (ascending) whose state is wanted. `progress` is told how many jobs have
/// ended.
///
/// A policy that follows the chance of the moment is shown, at each of its looks, queues in which every job is
/// aggregating with the probability that it is, and has a uniform part of its round left.
pub fn fluid(
    jobs: &[TraceJob],
    policy: &mut dyn Policy,
    (config, constants, seed): (&Config, &Constants, u64),
    (from, until): (Option<&State>, f64),
    states: &[f64],
    progress: &mut dyn FnMut(usize),
) -> (Score, Vec<State>) {
    let start = from.map_or_else(|| jobs.first().map_or(0.0, |job| job.start_s * 1000.0), |state| state.at);
    let pool = Pool::new(policy, config, constants, from.map_or(0, |state| state.invokers), start);
    let mut fluid = Fluid {
        jobs,
        next: jobs.partition_point(|job| job.start_s * 1000.0 < start - INSTANT),
        active: Vec::new(),
        pool,
        now: start,
        arrived: 0.0,
        rng: SmallRng::seed_from_u64(seed),
        look_at: start,
        settled_at: f64::INFINITY,
        ended: 0,
        known: HashMap::new(),
    };
    if let Some(state) = from {
        state.jobs.iter().for_each(|(index, left)| fluid.enter(*index, Some(*left)));
    }
    let states = fluid.run(until, states, progress);
    (fluid.pool.score, states)
}

struct Fluid<'a> {
    jobs: &'a [TraceJob],
    /// The next to begin.
    next: usize,
    active: Vec<Active>,
    pool: Pool<'a>,
    now: f64,
    arrived: f64,
    rng: SmallRng,
    /// When the policy looks next.
    look_at: f64,
    /// From when on it would see the same for ever.
    settled_at: f64,
    ended: usize,
    /// Periods of those who are there, by the number of invokers: policies come back to the same numbers.
    known: HashMap<usize, Vec<f64>>,
}

impl Fluid<'_> {
    fn run(&mut self, until: f64, states: &[f64], progress: &mut dyn FnMut(usize)) -> Vec<State> {
        let mut kept = Vec::new();
        self.changed();
        loop {
            let wanted = states.get(kept.len()).copied().unwrap_or(f64::INFINITY);
            let arrival = self.jobs.get(self.next).map_or(f64::INFINITY, |job| job.start_s * 1000.0);
            if self.active.is_empty() && arrival.is_infinite() && self.pool.history.target() == 0 {
                break;
            }
            let end = |job: &Active| self.now + job.rounds_left * job.period * 1000.0;
            let end = self.active.iter().map(end).fold(f64::INFINITY, f64::min);
            let look = if self.now >= self.settled_at { f64::INFINITY } else { self.look_at };
            let next = arrival.min(end).min(look).min(self.pool.next_change()).min(wanted).min(until);
            // Nothing will ever happen again.
            if next.is_infinite() {
                break;
            }
            self.pass(next.max(self.now));
            if self.now >= until {
                break;
            }
            if self.now + INSTANT >= wanted {
                let jobs = self.active.iter().map(|job| (job.index, job.rounds_left)).collect();
                kept.push(State { at: self.now, invokers: self.pool.history.target(), jobs });
            }
            let mut changed = self.leave();
            while self.jobs.get(self.next).is_some_and(|job| job.start_s * 1000.0 <= self.now + INSTANT) {
                self.enter(self.next, None);
                self.next += 1;
                changed = true;
            }
            if changed {
                self.changed();
                progress(self.ended);
            }
            if self.now + INSTANT >= self.look_at && self.now < self.settled_at {
                self.look();
            }
        }
        for job in std::mem::take(&mut self.active) {
            self.judge(&job);
        }
        kept
    }

    fn enter(&mut self, index: usize, left: Option<f64>) {
        let job = &self.jobs[index];
        let load = job.load(self.pool.constants);
        let rounds = left.unwrap_or_else(|| job.rounds(&load));
        let (key, began, rounds_left, period) = (key(index), self.now, rounds, f64::INFINITY);
        self.active.push(Active { index, key, load, rounds, rounds_left, began, period });
    }

    /// Takes out those that are done. Returns whether there were any.
    fn leave(&mut self) -> bool {
        let before = self.active.len();
        let done = |job: &Active| job.rounds_left * job.period.min(1e9) * 1000.0 <= INSTANT;
        let (gone, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.active).into_iter().partition(done);
        self.active = stay;
        for job in &gone {
            self.judge(job);
            self.pool.history.jobs_mut().forget(&job.key);
        }
        self.ended += gone.len();
        self.active.len() != before
    }

    fn judge(&mut self, job: &Active) {
        let rounds = job.rounds - job.rounds_left;
        if rounds >= 0.5 {
            let period = (self.now - job.began) / 1000.0 / rounds;
            self.pool.score.slowdowns.push((job.index, job.load.slowdown(period)));
        }
    }

    fn pass(&mut self, to: f64) {
        let (seconds, constants) = ((to - self.now) / 1000.0, self.pool.constants);
        for job in &mut self.active {
            let rounds = (seconds / job.period).min(job.rounds_left);
            job.rounds_left -= rounds;
            self.arrived += constants.messages(rounds * self.jobs[job.index].round_bytes);
            if rounds > 0.0 {
                self.pool.score.rounds(job.period / job.load.alone(), rounds);
            }
        }
        self.now = to;
        if self.pool.pass(to) {
            self.periods();
            self.stir();
        }
    }

    /// Who is there has changed.
    fn changed(&mut self) {
        self.known.clear();
        self.periods();
        self.stir();
    }

    fn periods(&mut self) {
        let (ready, active) = (self.pool.ready(), &self.active);
        let partitions = usize::from(self.pool.constants.partitions);
        let periods = self.known.entry(ready).or_insert_with(|| {
            let loads: Vec<_> = active.iter().map(|job| job.load).collect();
            let invokers = demand::effective(ready, partitions);
            demand::periods(&loads, 0.0, invokers).unwrap_or_else(|| vec![f64::INFINITY; loads.len()])
        });
        self.active.iter_mut().zip(periods).for_each(|(job, period)| job.period = *period);
    }

    /// The policy has something new to see.
    fn stir(&mut self) {
        let every = self.pool.policy().look_every_ms(self.pool.config) as f64;
        if self.now >= self.settled_at || self.look_at < self.now {
            // On its own beat, which goes on while nobody listens.
            self.look_at = ((self.now / every).floor() + 1.0) * every;
        }
        let settles = self.pool.policy().settles_ms(self.pool.config);
        let chance = settles.is_none() && !self.active.is_empty();
        let memory = settles.unwrap_or(600_000) as f64;
        self.settled_at = if chance { f64::INFINITY } else { self.look_at + memory };
    }

    fn look(&mut self) {
        let at = self.now as Millis;
        let chance = self.pool.policy().settles_ms(self.pool.config).is_none();
        let (mut bytes, mut busy) = (0.0, 0.0);
        for job in &self.active {
            let TraceJob { round_bytes, result_bytes, .. } = self.jobs[job.index];
            let stalled = job.period.is_infinite();
            let aggregating = if stalled { 1.0 } else { 1.0 - job.load.think / job.period };
            bytes += match (stalled, chance) {
                (true, _) => round_bytes,
                (false, true) if self.rng.random::<f64>() >= aggregating => 0.0,
                (false, true) => round_bytes * self.rng.random::<f64>(),
                (false, false) => round_bytes * aggregating / 2.0,
            };
            busy += if stalled { 0.0 } else { job.load.work / job.period };
            let known = job.rounds - job.rounds_left >= LEARNED_AFTER;
            // Those that follow the moment do not look at jobs.
            if known && !stalled && !chance {
                let period_ms = job.period * 1000.0;
                let demand = Demand {
                    round_bytes,
                    result_bytes,
                    shards: 0.0,
                    period_ms,
                    recent_period_ms: period_ms,
                    jitter_ms: 0.0,
                    delay_ms: (job.period - job.load.think) * 1000.0,
                    moved_at: at,
                    heard_at: at,
                    reference: Some(job.load.reference),
                };
                self.pool.history.jobs_mut().set(job.key.clone(), demand);
            }
        }
        let handled_per_byte =
            handled_per_byte(self.active.iter().map(|job| (&self.jobs[job.index], job.period)));
        let seen = Seen { bytes, arrived: self.arrived, busy, handled_per_byte };
        let changed = self.pool.look(self.now, seen);
        self.look_at = self.now + self.pool.policy().look_every_ms(self.pool.config) as f64;
        if changed {
            self.periods();
            self.stir();
        }
    }
}

//! Every round by itself.

use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use thalweg_protocol::{JobKey, JobLoad};

use super::{
    Constants, INSTANT, Score, State, TraceJob, handled_per_byte, key,
    pool::{Pool, Seen},
};
use crate::{Config, Millis, Policy, demand, demand::Load};

/// Time between the heartbeats that the policy learns from, milliseconds.
const BEAT_MS: f64 = 500.0;

/// How long jobs think in each of their rounds.
#[derive(Clone, Debug, PartialEq)]
pub enum Thinking<'a> {
    /// Around each job's mean: a normal distribution of this coefficient of variation, cut off at zero.
    Around(f64),
    /// As recorded, seconds; every job begins elsewhere in it and goes round.
    Recorded(&'a [f64]),
}

/// What each job has gone through.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rounds {
    /// By place in the trace: (rounds ended, seconds they took, seconds they would have taken alone).
    pub jobs: Vec<(usize, u64, f64, f64)>,
}

/// Part of a round's work that so many invoker-milliseconds are.
fn part(load: &Load, done: f64) -> f64 {
    done / 1000.0 / load.work
}

enum Doing {
    Thinking {
        until: f64,
    },
    /// Invoker-milliseconds of work left.
    Aggregating {
        left: f64,
        since: f64,
    },
}

struct Active {
    index: usize,
    key: JobKey,
    load: Load,
    rounds_left: f64,
    doing: Doing,
    round: u64,
    round_began: f64,
    thought: f64,
    spent: (u64, f64, f64),
    /// Told since the last heartbeat: rounds, part of a round's work, delay.
    told: (u64, f64, f64),
}

/// Plays every round of the jobs from a state on until `until` (milliseconds), or until all have ended: the invokers are
/// shared evenly by whoever aggregates at a moment, up to the invokers that its shards can occupy.
pub fn events(
    jobs: &[TraceJob],
    policy: &mut dyn Policy,
    (config, constants, seed): (&Config, &Constants, u64),
    (from, until): (&State, f64),
    thinking: &Thinking<'_>,
) -> (Score, Rounds) {
    let pool = Pool::new(policy, config, constants, from.invokers, from.at);
    let mut events = Events {
        jobs,
        next: jobs.partition_point(|job| job.start_s * 1000.0 < from.at - INSTANT),
        active: Vec::new(),
        pool,
        now: from.at,
        arrived: 0.0,
        rng: SmallRng::seed_from_u64(seed),
        thinking,
        busy: 0.0,
        looked: from.at,
        rounds: Rounds::default(),
    };
    from.jobs.iter().for_each(|(index, left)| events.enter(*index, Some(*left)));
    events.run(until);
    (events.pool.score, events.rounds)
}

struct Events<'a> {
    jobs: &'a [TraceJob],
    next: usize,
    active: Vec<Active>,
    pool: Pool<'a>,
    now: f64,
    arrived: f64,
    rng: SmallRng,
    thinking: &'a Thinking<'a>,
    /// Invoker-milliseconds of work done since the policy last looked.
    busy: f64,
    looked: f64,
    rounds: Rounds,
}

impl Events<'_> {
    fn run(&mut self, until: f64) {
        let mut look_at = self.now;
        let mut beat_at = self.now + BEAT_MS;
        while self.now < until && !(self.active.is_empty() && self.next >= self.jobs.len()) {
            let arrival = self.jobs.get(self.next).map_or(f64::INFINITY, |job| job.start_s * 1000.0);
            let rates = self.rates();
            let end = |(job, rate): (&Active, &f64)| match job.doing {
                Doing::Thinking { until } => until,
                Doing::Aggregating { left, .. } if *rate > 0.0 => self.now + left / rate,
                Doing::Aggregating { .. } => f64::INFINITY,
            };
            let end = self.active.iter().zip(&rates).map(end).fold(f64::INFINITY, f64::min);
            let next = arrival.min(end).min(look_at).min(beat_at).min(self.pool.next_change()).min(until);
            self.pass(next.max(self.now), &rates);
            if self.now >= arrival {
                self.enter(self.next, None);
                self.next += 1;
            }
            self.turn();
            if self.now >= beat_at {
                beat_at += BEAT_MS;
                self.beat();
            }
            if self.now >= look_at {
                self.look();
                look_at = self.now + self.pool.policy().look_every_ms(self.pool.config) as f64;
            }
        }
        for job in std::mem::take(&mut self.active) {
            self.judge(&job);
        }
        self.rounds.jobs.sort_by_key(|(index, ..)| *index);
    }

    fn enter(&mut self, index: usize, left: Option<f64>) {
        let job = &self.jobs[index];
        let load = job.load(self.pool.constants);
        // Somewhere in its round, so that jobs which were under way do not begin together.
        let thought = if left.is_some() { load.think * self.rng.random::<f64>() } else { load.think };
        self.active.push(Active {
            index,
            key: key(index),
            load,
            rounds_left: left.unwrap_or_else(|| job.rounds(&load)).ceil(),
            doing: Doing::Thinking { until: self.now + thought * 1000.0 },
            // Far from zero, which stands for none.
            round: 1,
            round_began: if left.is_some() { f64::NAN } else { self.now },
            thought,
            spent: (0, 0.0, 0.0),
            told: (0, 0.0, 0.0),
        });
    }

    /// Invokers for everybody who aggregates: even shares, where nobody can use more than its shards occupy.
    fn rates(&self) -> Vec<f64> {
        let invokers = demand::effective(self.pool.ready(), usize::from(self.pool.constants.partitions));
        let mut rates = vec![0.0; self.active.len()];
        let mut waiting: Vec<_> = (0..self.active.len())
            .filter(|place| matches!(self.active[*place].doing, Doing::Aggregating { .. }))
            .collect();
        waiting.sort_by(|a, b| self.active[*a].load.parallel.total_cmp(&self.active[*b].load.parallel));
        let (mut left, mut sharers) = (invokers, waiting.len() as f64);
        for place in waiting {
            rates[place] = (left / sharers).min(self.active[place].load.parallel);
            left -= rates[place];
            sharers -= 1.0;
        }
        rates
    }

    fn pass(&mut self, to: f64, rates: &[f64]) {
        let time = to - self.now;
        for (job, rate) in self.active.iter_mut().zip(rates) {
            if let Doing::Aggregating { left, .. } = &mut job.doing {
                let done = (rate * time).min(*left);
                *left -= done;
                self.busy += done;
                job.told.1 += part(&job.load, done);
            }
        }
        self.now = to;
        self.pool.pass(to);
    }

    /// Those whose thinking or aggregating is over go on.
    fn turn(&mut self) {
        let (now, constants) = (self.now, self.pool.constants);
        let mut gone = Vec::new();
        for (place, job) in self.active.iter_mut().enumerate() {
            match job.doing {
                Doing::Thinking { until } if until <= now + INSTANT => {
                    self.arrived += constants.messages(self.jobs[job.index].round_bytes);
                    job.doing = Doing::Aggregating { left: job.load.work * 1000.0, since: now };
                }
                Doing::Aggregating { left, since } if left <= INSTANT => {
                    job.told.0 += 1;
                    job.told.2 += now - since;
                    job.round += 1;
                    job.rounds_left -= 1.0;
                    if !job.round_began.is_nan() {
                        let period = (now - job.round_began) / 1000.0;
                        let alone = job.load.alone() - job.load.think + job.thought;
                        self.pool.score.rounds(period / alone, 1.0);
                        job.spent.0 += 1;
                        job.spent.1 += period;
                        job.spent.2 += alone;
                    }
                    if job.rounds_left <= 0.0 {
                        gone.push(place);
                        continue;
                    }
                    job.round_began = now;
                    job.thought = match self.thinking {
                        Thinking::Around(variation) => {
                            job.load.think * (1.0 + variation * normal(&mut self.rng)).max(0.0)
                        }
                        Thinking::Recorded(times) => {
                            times[(job.index * 997 + job.round as usize) % times.len()]
                        }
                    };
                    job.doing = Doing::Thinking { until: now + job.thought * 1000.0 };
                }
                _ => {}
            }
        }
        for place in gone.into_iter().rev() {
            let job = self.active.swap_remove(place);
            self.judge(&job);
            self.pool.history.jobs_mut().forget(&job.key);
        }
    }

    fn judge(&mut self, job: &Active) {
        let (rounds, spent, alone) = job.spent;
        if rounds > 0 {
            self.pool.score.slowdowns.push((job.index, spent / alone - 1.0));
            self.rounds.jobs.push((job.index, rounds, spent, alone));
        }
    }

    fn beat(&mut self) {
        let (jobs, now) = (self.jobs, self.now);
        let loads: Vec<_> = (self.active.iter_mut())
            .filter(|job| job.told.1 > 0.0)
            .map(|job| {
                let (rounds, part, delay_ms) = std::mem::take(&mut job.told);
                let TraceJob { round_bytes, result_bytes, .. } = jobs[job.index];
                JobLoad {
                    round: job.round,
                    rounds,
                    bytes: (part * round_bytes) as u64,
                    delay_ms: delay_ms as u64,
                    result_bytes: (part * result_bytes) as u64,
                    age_ms: (now - job.round_began) as u64,
                    ..JobLoad::new(job.key.clone())
                }
            })
            .collect();
        let references = self.active.iter().map(|job| (&job.key, job.load.reference));
        let at = self.now as Millis;
        self.pool.history.learn(&loads, at);
        references.for_each(|(key, reference)| self.pool.history.jobs_mut().compare(key, reference));
    }

    fn look(&mut self) {
        let left = |job: &Active| match job.doing {
            Doing::Aggregating { left, .. } => part(&job.load, left) * self.jobs[job.index].round_bytes,
            Doing::Thinking { .. } => 0.0,
        };
        let bytes = self.active.iter().map(left).sum();
        let busy = std::mem::take(&mut self.busy) / (self.now - self.looked).max(1.0);
        self.looked = self.now;
        let alone = self.active.iter().map(|job| (&self.jobs[job.index], job.load.alone()));
        let seen = Seen { bytes, arrived: self.arrived, busy, handled_per_byte: handled_per_byte(alone) };
        self.pool.look(self.now, seen);
    }
}

/// Standard normal (Box and Muller, 1958).
fn normal(rng: &mut SmallRng) -> f64 {
    let (radius, angle) = (rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * (1.0 - radius).ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

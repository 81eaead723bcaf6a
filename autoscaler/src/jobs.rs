//! What each job asks of the invokers, learned from their heartbeats.

use std::collections::{BTreeMap, VecDeque};

use thalweg_protocol::{JobKey, JobLoad, Round};

use crate::{Millis, demand::Load};

/// Rounds' ends remembered of each job.
const MARKS: usize = 24;
/// The newest of them tell of the present: those of this time, which is long enough for the time between two beats not
/// to matter.
const RECENT_MS: Millis = 10_000;
/// A pause of this many periods begins a new life: what was before says nothing about the period.
const PAUSE_PERIODS: f64 = 4.0;
/// And at least this long.
const PAUSE_MS: f64 = 2000.0;
/// Jobs remembered; the ones that were heard of longest ago are forgotten first.
const REMEMBERED: usize = 4096;

/// What one job asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// Bytes of contributions in a round.
    pub round_bytes: f64,
    /// Bytes of its result.
    pub result_bytes: f64,
    /// Shards that it consists of; 0 = unknown, so many that every invoker has some.
    pub shards: f64,
    /// Mean time from one round's end to the next one's, milliseconds.
    pub period_ms: f64,
    /// The same over the last ten seconds or the last round, whichever is longer.
    pub recent_period_ms: f64,
    /// Mean absolute deviation of the period, milliseconds.
    pub jitter_ms: f64,
    /// Mean time from the last contribution of a round to its commit, milliseconds.
    pub delay_ms: f64,
    /// When its newest round ended.
    pub moved_at: Millis,
    /// When an invoker last told of it.
    pub heard_at: Millis,
    /// Invokers of its own that it is compared against; `None` for the configured number.
    pub reference: Option<f64>,
}

impl Demand {
    /// Time between the end of a round and the last contribution of the next: what aggregation does not take.
    #[must_use]
    pub fn think_ms(&self) -> f64 {
        (self.period_ms - self.delay_ms).max(0.0)
    }

    /// As the queueing network sees it, with invokers that handle so many bytes a second: contributions and results.
    /// `reference` is the number of invokers of its own that it is compared against where it names none, `parallel` how
    /// many can work on the round of one with enough shards.
    #[must_use]
    pub fn load(&self, service_bytes_per_s: f64, reference: f64, parallel: f64) -> Load {
        let work = (self.round_bytes + self.result_bytes) / service_bytes_per_s;
        let parallel = if self.shards > 0.0 { self.shards.max(1.0).min(parallel) } else { parallel };
        Load {
            work,
            think: self.think_ms() / 1000.0,
            reference: self.reference.unwrap_or(reference),
            parallel,
        }
    }

    /// Whether the job still trains, as far as its rhythm tells.
    #[must_use]
    pub fn is_active(&self, now: Millis) -> bool {
        let silence = now.saturating_sub(self.moved_at) as f64;
        silence <= 3.0 * self.period_ms + 5.0 * self.jitter_ms + PAUSE_MS
    }
}

/// The end of a round, with what had been counted by then.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Millis,
    round: Round,
    bytes: u64,
    result_bytes: u64,
    shards: u64,
    ended: u64,
    delay_ms: u64,
}

#[derive(Clone, Debug, Default)]
struct Track {
    marks: VecDeque<Mark>,
    bytes: u64,
    result_bytes: u64,
    shards: u64,
    ended: u64,
    delay_ms: u64,
    heard_at: Millis,
    reference: Option<f64>,
}

impl Track {
    fn learn(&mut self, load: &JobLoad, now: Millis) {
        self.bytes = self.bytes.saturating_add(load.bytes);
        self.result_bytes = self.result_bytes.saturating_add(load.result_bytes);
        self.shards = self.shards.saturating_add(load.shards);
        self.ended = self.ended.saturating_add(load.rounds);
        self.delay_ms = self.delay_ms.saturating_add(load.delay_ms);
        self.heard_at = now;
        let (round, newest) = (load.round, self.marks.back().copied());
        // When it ended, not when that was heard.
        let now = now.saturating_sub(load.age_ms).max(newest.map_or(0, |newest| newest.at));
        if round == 0 || newest.is_some_and(|newest| newest.round == round) {
            return;
        }
        let silence = newest.map_or(0.0, |newest| now.saturating_sub(newest.at) as f64);
        let paused = self
            .estimate()
            .is_some_and(|demand| silence > PAUSE_PERIODS * demand.period_ms && silence > PAUSE_MS);
        match newest {
            // An invoker that is a round behind the others.
            Some(newest) if round < newest.round && newest.round - round <= 2 => return,
            Some(newest) if round < newest.round || paused => self.marks.clear(),
            // Heard from another invoker at the same moment.
            Some(newest) if newest.at == now => {
                self.marks.pop_back();
            }
            _ => {}
        }
        if self.marks.len() == MARKS {
            self.marks.pop_front();
        }
        let Self { bytes, result_bytes, shards, ended, delay_ms, .. } = *self;
        self.marks.push_back(Mark { at: now, round, bytes, result_bytes, shards, ended, delay_ms });
    }

    /// Of two rounds' ends or more.
    fn estimate(&self) -> Option<Demand> {
        let (first, last) = (self.marks.front()?, self.marks.back()?);
        let period =
            |from: &Mark, to: &Mark| (to.at - from.at) as f64 / (to.round - from.round).max(1) as f64;
        let rounds = (last.round - first.round) as f64;
        if rounds < 1.0 || last.at <= first.at {
            return None;
        }
        let period_ms = period(first, last);
        let steps = self.marks.iter().zip(self.marks.iter().skip(1));
        let off: f64 = steps.map(|(from, to)| (period(from, to) - period_ms).abs()).sum();
        let recent =
            self.marks.iter().rev().skip(1).find(|mark| mark.at + RECENT_MS <= last.at).unwrap_or(first);
        let ended = (last.ended - first.ended).max(1) as f64;
        Some(Demand {
            round_bytes: (last.bytes - first.bytes) as f64 / rounds,
            result_bytes: (last.result_bytes - first.result_bytes) as f64 / rounds,
            shards: (last.shards - first.shards) as f64 / rounds,
            period_ms,
            recent_period_ms: period(recent, last),
            jitter_ms: off / (self.marks.len() - 1) as f64,
            delay_ms: ((last.delay_ms - first.delay_ms) as f64 / ended).min(period_ms),
            moved_at: last.at,
            heard_at: self.heard_at,
            reference: self.reference,
        })
    }
}

/// All jobs by name.
#[derive(Clone, Debug, Default)]
pub struct Jobs {
    learning: BTreeMap<JobKey, Track>,
    /// What is known of each that can be told yet; derived from `learning`, or given.
    known: BTreeMap<JobKey, Demand>,
}

impl Jobs {
    /// Takes in what an invoker tells.
    pub(crate) fn learn(&mut self, load: &JobLoad, now: Millis) {
        if self.learning.len() >= REMEMBERED && !self.learning.contains_key(&load.job) {
            let oldest = self.learning.iter().min_by_key(|(_, track)| track.heard_at);
            if let Some(oldest) = oldest.map(|(job, _)| job.clone()) {
                self.forget(&oldest);
            }
        }
        let track = self.learning.entry(load.job.clone()).or_default();
        track.learn(load, now);
        match track.estimate() {
            Some(demand) => self.known.insert(load.job.clone(), demand),
            None => self.known.remove(&load.job),
        };
    }

    /// Compares a job against so many invokers of its own, instead of the configured number.
    pub(crate) fn compare(&mut self, job: &JobKey, invokers: f64) {
        if let Some(track) = self.learning.get_mut(job) {
            track.reference = Some(invokers);
        }
        if let Some(demand) = self.known.get_mut(job) {
            demand.reference = Some(invokers);
        }
    }

    /// States what a job asks for.
    pub fn set(&mut self, job: JobKey, demand: Demand) {
        self.known.insert(job, demand);
    }

    /// Forgets a job.
    pub fn forget(&mut self, job: &JobKey) {
        self.learning.remove(job);
        self.known.remove(job);
    }

    /// Those that still train.
    pub fn active(&self, now: Millis) -> impl Iterator<Item = (&JobKey, &Demand)> {
        self.known.iter().filter(move |(_, demand)| demand.is_active(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> JobKey {
        JobKey { tenant: "default".parse().unwrap(), job: name.parse().unwrap() }
    }

    fn load(round: Round, bytes: u64, delay_ms: u64) -> JobLoad {
        JobLoad {
            round,
            rounds: 1,
            bytes,
            delay_ms,
            result_bytes: bytes / 2,
            shards: 4,
            ..JobLoad::new(key("a"))
        }
    }

    fn known(jobs: &Jobs, now: Millis) -> Option<Demand> {
        jobs.active(now).next().map(|(_, demand)| *demand)
    }

    #[test]
    fn period_bytes_and_delay_are_learned() {
        let mut jobs = Jobs::default();
        jobs.learn(&load(1, 800, 20), 1000);
        assert_eq!(known(&jobs, 1000), None);
        // Two invokers, half of the shards each; one is heard later, and a round behind.
        for round in 2..40_u64 {
            jobs.learn(&load(round, 400, 30), 1000 * round);
            jobs.learn(&load(round - 1, 400, 30), 1000 * round + 200);
        }
        let demand = known(&jobs, 40_000).unwrap();
        assert!((demand.period_ms - 1000.0).abs() < 1.0, "{demand:?}");
        assert!((demand.round_bytes - 800.0).abs() < 30.0, "{demand:?}");
        assert!((demand.result_bytes - 400.0).abs() < 15.0, "{demand:?}");
        assert!((demand.shards - 8.0).abs() < 0.3, "{demand:?}");
        assert!((demand.delay_ms - 30.0).abs() < 1.0, "{demand:?}");
        assert!(demand.jitter_ms < 1.0 && (demand.think_ms() - 970.0).abs() < 2.0);
        assert!(demand.is_active(43_900) && !demand.is_active(45_000));
    }

    #[test]
    fn a_rounds_end_is_told_apart_from_when_it_is_heard_of() {
        // A period of 300 ms, beats every 500 ms.
        let mut jobs = Jobs::default();
        for beat in [500, 1000] {
            let load = load(beat / 300, 100, 0);
            jobs.learn(&JobLoad { age_ms: beat % 300, ..load }, beat);
        }
        let demand = known(&jobs, 1000).unwrap();
        assert!((demand.period_ms - 300.0).abs() < 0.1, "{demand:?}");
        assert_eq!(demand.moved_at, 900);
    }

    #[test]
    fn fast_jobs_have_a_period_shorter_than_the_time_between_beats() {
        let mut jobs = Jobs::default();
        for beat in 1..10_u64 {
            jobs.learn(&load(beat * 500, 500 * 100, 0), beat * 500);
        }
        let demand = known(&jobs, 5000).unwrap();
        assert!((demand.period_ms - 1.0).abs() < 0.01 && (demand.round_bytes - 100.0).abs() < 1.0);
    }

    #[test]
    fn a_pause_or_a_new_life_begins_anew() {
        let mut jobs = Jobs::default();
        for round in 1..20 {
            jobs.learn(&load(round, 100, 0), 1000 * round);
        }
        jobs.learn(&load(20, 100, 0), 3_600_000);
        assert_eq!(known(&jobs, 3_600_000), None);
        for round in 21..25 {
            jobs.learn(&load(round, 100, 0), 3_600_000 + 500 * (round - 20));
        }
        assert!((known(&jobs, 3_602_000).unwrap().period_ms - 500.0).abs() < 1.0);
        jobs.learn(&load(1, 100, 0), 3_603_000);
        assert_eq!(known(&jobs, 3_603_000), None);
    }

    #[test]
    fn a_change_of_rhythm_shows_in_the_recent_period_first() {
        let mut jobs = Jobs::default();
        let mut now = 0;
        for round in 1..32 {
            now += if round < 25 { 1000 } else { 1500 };
            jobs.learn(&load(round, 100, 0), now);
        }
        let demand = known(&jobs, now).unwrap();
        assert!(demand.period_ms < 1250.0 && demand.recent_period_ms > 1450.0, "{demand:?}");
        assert!(demand.jitter_ms > 100.0);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut jobs = Jobs::default();
        for number in 0..(REMEMBERED as u64 + 10) {
            let load = JobLoad { round: 1, ..JobLoad::new(key(&format!("job-{number}"))) };
            jobs.learn(&load, number);
        }
        assert_eq!(jobs.learning.len(), REMEMBERED);
        assert!(!jobs.learning.contains_key(&key("job-0")));
    }
}

//! What was observed: the queues at moments, and what each job asks of the invokers.

use std::collections::VecDeque;

use thalweg_protocol::{JobLoad, Partition};

use crate::{Config, jobs::Jobs};

/// Milliseconds of a clock that never goes back.
pub type Millis = u64;

/// One observation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// When it was made.
    pub at: Millis,
    /// Unacknowledged messages in all queues; held and parked ones are among them.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Messages that ever came into the queues.
    pub arrived: u64,
    /// Partitions with messages: the backlog cannot be spread wider.
    pub active_partitions: usize,
    /// Messages held by invokers that are not busy: they wait for their round, not for a CPU.
    pub waiting_for_round: f64,
    /// Sum of the invokers' busy shares: how many invokers' worth of work is being done.
    pub busy: f64,
    /// Bytes an invoker handles per busy second: contributions and results.
    pub service_bytes_per_s: f64,
    /// Bytes handled for each byte of contributions: 1.5 where every job has two workers.
    pub handled_per_byte: f64,
    /// Invokers that serve.
    pub serving: usize,
    /// Time from the start of an invoker to its first heartbeat, milliseconds.
    pub start_delay_ms: f64,
}

impl Sample {
    /// Bytes that could be worked on at this moment: those that do not wait for their round.
    pub(crate) fn workable_bytes(&self) -> f64 {
        let share = self.waiting_for_round / self.messages.max(1) as f64;
        // What is not a number counts for nothing.
        let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) };
        self.bytes as f64 * (1.0 - share)
    }
}

/// What was observed so far, without gaps, and what was decided last.
#[derive(Clone, Debug)]
pub struct History {
    partitions: Partition,
    target: usize,
    samples: VecDeque<Sample>,
    depth: (u64, u64),
    /// Start of the time observed without a gap.
    continuous_since: Millis,
    /// Since when every observation found the queues empty.
    idle_since: Option<Millis>,
    /// Mean bytes of a message, as last seen in the queues; 0 before any was.
    message_bytes: f64,
    jobs: Jobs,
}

impl History {
    /// Nothing observed yet; `target` is what there is now.
    #[must_use]
    pub fn new(partitions: Partition, target: usize, now: Millis) -> Self {
        Self {
            partitions,
            target,
            samples: VecDeque::new(),
            depth: (0, 0),
            continuous_since: now,
            idle_since: None,
            message_bytes: 0.0,
            jobs: Jobs::default(),
        }
    }

    /// Adds an observation. One that comes after a gap starts the history anew: what went on in between
    /// is unknown, so nothing may be concluded about windows that reach across it.
    pub fn record(&mut self, sample: Sample, config: &Config) {
        let gap = self.samples.back().is_none_or(|last| sample.at > last.at + config.stale_after());
        if gap {
            self.interrupt(sample.at);
        }
        self.idle_since = if sample.messages == 0 { self.idle_since.or(Some(sample.at)) } else { None };
        self.depth = (sample.messages, sample.bytes);
        if sample.messages > 0 {
            self.message_bytes = sample.bytes as f64 / sample.messages as f64;
        }
        self.samples.push_back(sample);
        let window = config.longest_window();
        while self.samples.front().is_some_and(|first| first.at + window < sample.at) {
            self.samples.pop_front();
        }
    }

    /// Takes in what an invoker tells of its jobs.
    pub fn learn(&mut self, loads: &[JobLoad], now: Millis) {
        loads.iter().for_each(|load| self.jobs.learn(load, now));
    }

    /// Notes that observing was interrupted: the connection was lost, and may be back. What jobs ask for stays known.
    pub fn interrupt(&mut self, now: Millis) {
        self.samples.clear();
        self.continuous_since = now;
        self.idle_since = None;
    }

    /// The last decision.
    #[must_use]
    pub fn target(&self) -> usize {
        self.target
    }

    /// Notes a decision, or what was found at the start.
    pub fn set_target(&mut self, target: usize) {
        self.target = target;
    }

    /// Number of partitions: nothing can be spread wider.
    #[must_use]
    pub fn partitions(&self) -> Partition {
        self.partitions
    }

    /// What each job asks for.
    #[must_use]
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// The same to be filled by whoever knows without having to learn: the simulator.
    pub fn jobs_mut(&mut self) -> &mut Jobs {
        &mut self.jobs
    }

    /// Start of the time observed without a gap.
    #[must_use]
    pub fn continuous_since(&self) -> Millis {
        self.continuous_since
    }

    /// Since when every observation found the queues empty.
    #[must_use]
    pub fn idle_since(&self) -> Option<Millis> {
        self.idle_since
    }

    /// The last observation, if it still says something about `now`.
    #[must_use]
    pub fn latest(&self, now: Millis, config: &Config) -> Option<&Sample> {
        self.samples.back().filter(|last| now <= last.at + config.stale_after())
    }

    /// The last observation, however old: messages and bytes.
    pub(crate) fn last_known(&self) -> (u64, u64) {
        self.depth
    }

    /// The observations of the last `window` before the newest, newest first.
    pub fn last(&self, window: Millis) -> impl Iterator<Item = &Sample> {
        let end = self.samples.back().map_or(0, |last| last.at);
        self.samples.iter().rev().take_while(move |sample| sample.at + window >= end)
    }

    /// Bytes that came into the queues, and messages that left them, in up to `window` before the newest observation:
    /// (seconds, bytes, messages). `None` where that cannot be said: fewer than two observations, or streams made anew.
    #[must_use]
    pub fn flow(&self, window: Millis) -> Option<(f64, f64, f64)> {
        let newest = self.samples.back()?;
        let oldest = self.last(window).last().filter(|oldest| oldest.at < newest.at)?;
        let came = newest.arrived.checked_sub(oldest.arrived)?;
        let left = (oldest.messages + came).saturating_sub(newest.messages);
        Some(((newest.at - oldest.at) as f64 / 1000.0, came as f64 * self.message_bytes, left as f64))
    }
}

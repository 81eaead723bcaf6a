//! How many invokers there should be: a pure function of what was observed.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use thalweg_protocol::Partition;

use crate::Config;

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
    /// Partitions with messages: the backlog cannot be spread wider.
    pub active_partitions: usize,
    /// Messages held by invokers that are not busy: they wait for their round, not for a CPU.
    pub waiting_for_round: f64,
    /// Sum of the invokers' busy shares: how many invokers' worth of work is being done.
    pub busy: f64,
    /// Bytes an invoker folds per busy second.
    pub service_bytes_per_s: f64,
}

impl Sample {
    /// Invokers that drain the backlog of this moment within the catch-up target; at least 1 if there is any.
    fn need(&self, config: &Config) -> usize {
        if self.messages == 0 {
            return 0;
        }
        let messages = self.messages as f64;
        let workable = (1.0 - self.waiting_for_round / messages).clamp(0.0, 1.0);
        let per_invoker =
            self.service_bytes_per_s * config.target_utilisation * (config.catch_up_ms as f64 / 1000.0);
        // The conversion saturates, and what is not a number becomes 0 and then 1.
        let need = (self.bytes as f64 * workable / per_invoker).ceil() as usize;
        need.clamp(1, self.active_partitions.max(1))
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
        self.samples.push_back(sample);
        let window = config.longest_window();
        while self.samples.front().is_some_and(|first| first.at + window < sample.at) {
            self.samples.pop_front();
        }
    }

    /// Notes that observing was interrupted: the connection was lost, and may be back.
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

    /// Start of the time observed without a gap.
    #[must_use]
    pub fn continuous_since(&self) -> Millis {
        self.continuous_since
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

    fn last(&self, window: Millis) -> impl Iterator<Item = &Sample> {
        let end = self.samples.back().map_or(0, |last| last.at);
        self.samples.iter().rev().take_while(move |sample| sample.at + window >= end)
    }
}

/// Why a decision is what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Observations are missing or stale: everything stays.
    #[default]
    Unobserved,
    /// Work arrived where nobody was.
    FirstWork,
    /// The backlog needs more.
    Backlog,
    /// What is there is right.
    Steady,
    /// Fewer would have been enough throughout the shrink window.
    Shrink,
    /// Nothing to do throughout the idle timeout.
    Idle,
    /// The configured minimum or maximum, or the number of partitions.
    Bounds,
}

impl Reason {
    /// As in logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unobserved => "unobserved",
            Self::FirstWork => "first_work",
            Self::Backlog => "backlog",
            Self::Steady => "steady",
            Self::Shrink => "shrink",
            Self::Idle => "idle",
            Self::Bounds => "bounds",
        }
    }
}

/// How many invokers there should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// That many.
    pub target: usize,
    /// Why.
    pub reason: Reason,
}

/// Decides from what was observed. Deterministic.
///
/// * Missing or stale observations change nothing.
/// * Only a backlog makes the number grow: to what drains it within the catch-up target. A backlog where
///   nobody is gets an invoker at once.
/// * It shrinks when fewer would have been enough throughout the shrink window, both for the backlogs in it
///   and for the work done in it (so a fleet that keeps up is not dismantled for keeping up).
/// * It goes to `min_invokers` when the queues were empty throughout the idle timeout, and never to zero
///   otherwise.
#[must_use]
pub fn decide(history: &History, now: Millis, config: &Config) -> Decision {
    let (fewest, most) = config.bounds(history.partitions);
    let current = history.target;
    let Some(latest) = history.latest(now, config) else {
        return Decision { target: current, reason: Reason::Unobserved };
    };
    if history.idle_since.is_some_and(|since| latest.at - since >= config.idle_timeout_ms) {
        return Decision { target: fewest, reason: Reason::Idle };
    }
    let bounded = current.clamp(fewest, most);
    let lasting = history.last(config.grow_window_ms).map(|sample| sample.need(config)).min();
    let grown = lasting.unwrap_or(0).max(usize::from(latest.messages > 0)).clamp(fewest, most);
    if grown > bounded {
        let reason = if current == 0 { Reason::FirstWork } else { Reason::Backlog };
        return Decision { target: grown, reason };
    }
    if latest.at >= history.continuous_since + config.shrink_window_ms {
        let kept = enough(history, config).clamp(fewest.max(1).min(bounded), most);
        if kept < bounded {
            return Decision { target: kept, reason: Reason::Shrink };
        }
    }
    let reason = if bounded == current { Reason::Steady } else { Reason::Bounds };
    Decision { target: bounded, reason }
}

/// What would have been enough throughout the shrink window.
fn enough(history: &History, config: &Config) -> usize {
    let backlog = history.last(config.shrink_window_ms).map(|sample| sample.need(config)).max().unwrap_or(0);
    let (count, busy) = history
        .last(config.shrink_window_ms)
        .fold((0.0, 0.0), |(count, busy), sample| (count + 1.0, busy + sample.busy));
    let load = (busy / f64::max(count, 1.0) / config.target_utilisation).ceil() as usize;
    // Load keeps what is there, it does not ask for more: an invoker that waits for the store is busy too,
    // and another one would only wait with it.
    backlog.max(load)
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;

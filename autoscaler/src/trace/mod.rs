//! Playing jobs against policies: what a trace of months would have cost, without running it.
//!
//! [`fluid`] takes the mean of every job's rhythm between two changes of anything (arrivals, departures, decisions), by
//! the closed queueing network of [`crate::demand`]; [`events`] plays every single round with the invokers shared by
//! whoever aggregates, and feeds the policy through the same learning as live heartbeats do. Both are deterministic.

mod events;
mod fluid;
mod pool;
mod score;

pub use events::{Rounds, Thinking, events};
pub use fluid::{State, fluid};
pub use score::{Score, Timeline};

use thalweg_protocol::JobKey;

use crate::{demand::Load, loads::Mix};

/// Time or work that counts as none, milliseconds: after months a double tells no less than a millionth apart.
const INSTANT: f64 = 1e-3;

/// A job of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceJob {
    /// When it begins, seconds.
    pub start_s: f64,
    /// How long it trains on servers of its own, as many as it requested, seconds.
    pub duration_s: f64,
    /// Bytes of contributions in a round, of all workers together.
    pub round_bytes: f64,
    /// Bytes of a round's result.
    pub result_bytes: f64,
    /// Time between a round's result and the next contributions, seconds.
    pub think_s: f64,
    /// Servers that it requested.
    pub servers: f64,
}

impl TraceJob {
    /// As the queueing network sees it.
    #[must_use]
    pub fn load(&self, constants: &Constants) -> Load {
        Load {
            work: (self.round_bytes + self.result_bytes) / constants.service_bytes_per_s,
            think: self.think_s,
            reference: self.servers,
            parallel: f64::from(constants.partitions),
        }
    }

    /// Rounds that it trains for, at least one.
    fn rounds(&self, load: &Load) -> f64 {
        (self.duration_s / load.alone()).max(1.0)
    }

    /// Fewest servers of its own with which it loses no more than `limit` against those that it requested.
    #[must_use]
    pub fn fewest_servers(&self, limit: f64, constants: &Constants) -> f64 {
        let load = self.load(constants);
        let most = load.alone() * (1.0 + limit) - load.think;
        (load.work / most.max(f64::MIN_POSITIVE)).ceil().clamp(1.0, self.servers.max(1.0))
    }
}

/// Bytes handled for each byte of contributions, of jobs that are given with their periods, seconds.
fn handled_per_byte<'a>(jobs: impl Iterator<Item = (&'a TraceJob, f64)>) -> f64 {
    let mut mix = Mix::default();
    for (job, period) in jobs.filter(|(_, period)| *period > 0.0 && period.is_finite()) {
        mix.count(job.round_bytes / period, job.result_bytes / period);
    }
    mix.handled_per_byte()
}

/// What the policy calls the job at this place in the trace.
fn key(index: usize) -> JobKey {
    let job = format!("j{index}").parse().expect("a letter and digits");
    JobKey { tenant: "trace".parse().expect("letters"), job }
}

/// What was measured of the system that is simulated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Constants {
    /// Bytes that an invoker handles per busy second: contributions and results, which cost about the same.
    pub service_bytes_per_s: f64,
    /// From the request for an invoker to its first work, milliseconds.
    pub start_delay_ms: u64,
    /// From the order to stop to its end, milliseconds.
    pub stop_delay_ms: u64,
    /// Bytes of one message.
    pub message_bytes: f64,
    /// Partitions: no more invokers than that.
    pub partitions: u16,
}

impl Constants {
    /// Messages of those bytes.
    fn messages(&self, bytes: f64) -> f64 {
        bytes / self.message_bytes
    }
}

#[cfg(test)]
mod tests;

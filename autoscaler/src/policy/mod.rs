//! How many invokers there should be.

mod conventional;
mod elastic;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Config, History, Millis};

pub use conventional::{Fixed, Hpa, Keda, Knative};
pub use elastic::Elastic;
pub(crate) use elastic::FLOW_MS;

/// Decides how many invokers there should be, from what was observed and from its own earlier decisions: without
/// clock, randomness or I/O, so that the same code runs live, in tests and in the simulator.
pub trait Policy: fmt::Debug + Send {
    /// As on the command line and in reports.
    fn name(&self) -> &'static str;

    /// Decides. Called at every observation and when time has passed; `now` never goes back.
    fn decide(&mut self, history: &History, now: Millis, config: &Config) -> Decision;

    /// How often it wants to look, milliseconds, where observing is not what bounds it.
    fn look_every_ms(&self, config: &Config) -> Millis;

    /// Time after which it decides the same for ever while the load stays the same, milliseconds, so that the simulator
    /// need not ask again. `None` for one that follows the chance of the moment.
    fn settles_ms(&self, config: &Config) -> Option<Millis>;
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
    /// A burst is expected where nobody is.
    Prewarm,
    /// The backlog, or the load that comes in, needs more.
    Backlog,
    /// A job would lose more than its limit.
    Slowdown,
    /// More were needed, but the last ones that were added made no difference.
    Ineffective,
    /// What is there is right.
    Steady,
    /// Fewer would have been enough throughout the shrink window.
    Shrink,
    /// A job lost more than its limit after invokers were taken away: they are back.
    Reverted,
    /// Every job's next burst is far enough away.
    Gap,
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
            Self::Prewarm => "prewarm",
            Self::Backlog => "backlog",
            Self::Slowdown => "slowdown",
            Self::Ineffective => "ineffective",
            Self::Steady => "steady",
            Self::Shrink => "shrink",
            Self::Reverted => "reverted",
            Self::Gap => "gap",
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

//! What the autoscaler tells about itself.

use serde::{Deserialize, Serialize};

use crate::{Millis, Reason};

/// The present state, for people and dashboards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Whether this autoscaler holds the lease; the others only watch.
    pub leading: bool,
    /// Invokers that exist: starting, serving, draining and spare ones.
    pub invokers: usize,
    /// Invokers that serve or could serve at once.
    pub ready: usize,
    /// Invokers started that have not beaten yet.
    pub starting: usize,
    /// Invokers on their way out.
    pub draining: usize,
    /// Invokers started by somebody else that are not needed now.
    pub spare: usize,
    /// Wanted number of serving invokers.
    pub target: usize,
    /// Unacknowledged messages in all queues, as last observed.
    pub depth_messages: u64,
    /// Their bytes.
    pub depth_bytes: u64,
    /// Why the target is what it is.
    pub reason: Reason,
}

/// A decision that changed the target, with what it was based on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// When, milliseconds since the Unix epoch.
    pub at_ms: Millis,
    /// The wanted number before.
    pub previous: usize,
    /// The wanted number now.
    pub target: usize,
    /// Why.
    pub reason: Reason,
    /// Bytes an invoker folds per busy second: measured, or the configured default.
    pub service_bytes_per_s: f64,
    /// How many invokers' worth of work is being done.
    pub busy: f64,
    /// Depth and invokers by state, before anything was done about it.
    pub status: Status,
}

//! Elasticity: as many invokers as the waiting contributions need, and none when there are none.
//!
//! The loop is *observe, decide, place, actuate*. [`decide`] and [`place`] are pure functions, the
//! [`Controller`] around them is a state machine without I/O (what happened and the time go in, actions
//! come out), and [`run`] is the thin shell that reads NATS and moves an [`Actuator`].
//!
//! Fail static: what cannot be observed is left as it is. Silence of an invoker counts only while this
//! autoscaler's own observations succeed without a gap, so an outage of NATS, of JetStream or of the
//! autoscaler itself costs nobody its partitions or its life.
//!
//! Invokers that somebody else started (by hand, by an orchestrator, or by an earlier life of the
//! autoscaler) are adopted: they are used before a new one is started, they are retired after the own
//! ones (which frees something), and a surplus one keeps running without partitions, because only
//! whoever started it may stop it.

mod actuator;
mod config;
mod controller;
mod decide;
mod fleet;
mod in_process;
mod lease;
pub mod metrics;
mod place;
mod process;
mod run;
mod status;

pub use actuator::{Actuator, ActuatorError, ExternalActuator};
pub use config::{Config, PoolBounds};
pub use controller::{Action, Controller};
pub use decide::{Decision, History, Millis, Reason, Sample, decide};
pub use in_process::InProcessActuator;
pub use place::{Candidate, moves, place};
pub use process::ProcessActuator;
pub use run::{AutoscalerError, run};
pub use status::{DecisionRecord, Status};

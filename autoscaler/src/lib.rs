//! Elasticity: as many invokers as the waiting contributions need, and none when there are none.
//!
//! The loop is *observe, decide, place, actuate*. The [`Elastic`] policy and [`place`] know no I/O, the
//! [`Controller`] around them is a state machine (what happened and the time go in, actions come out), and [`run`] is
//! the thin shell that reads NATS and moves an [`Actuator`].
//!
//! Fail static: what cannot be observed is left as it is. Silence of an invoker counts only while this
//! autoscaler's own observations succeed without a gap, so an outage of NATS, of JetStream or of the
//! autoscaler itself costs nobody its partitions or its life.
//!
//! Invokers that somebody else started (by hand, by an orchestrator, or by an earlier life of the
//! autoscaler) are adopted: they are used before a new one is started, they are retired after the own
//! ones (which frees something), and a surplus one keeps running without partitions, because only
//! whoever started it may stop it: this autoscaler can where its actuator reaches what an earlier one has
//! started ([`Actuator::adopt`]).

mod actuator;
mod agent;
mod cgroup;
mod config;
mod controller;
pub mod demand;
mod docker;
mod fleet;
mod history;
mod in_process;
mod jobs;
mod kubernetes;
mod lease;
mod ledger;
mod loads;
pub mod metrics;
mod place;
mod policy;
mod process;
mod run;
mod status;
pub mod trace;

pub use actuator::{Actuator, ActuatorError, ExternalActuator, StartError};
pub use agent::{AgentActuator, AgentConfig, AgentError, serve_agent};
pub use config::{Config, PoolBounds};
pub use controller::{Action, Controller};
pub use docker::{DockerActuator, DockerConfig};
pub use history::{History, Millis, Sample};
pub use in_process::InProcessActuator;
pub use jobs::{Demand, Jobs};
#[cfg(feature = "kubernetes")]
pub use kubernetes::KubernetesActuator;
pub use kubernetes::KubernetesConfig;
pub use place::{Candidate, exchange, moves, place};
pub use policy::{Decision, Elastic, Fixed, Hpa, Keda, Knative, Policy, Reason};
pub use process::{Announce, ProcessActuator};
pub use run::{AutoscalerError, run};
pub use status::{DecisionRecord, Status};

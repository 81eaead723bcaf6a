//! What agents and the autoscaler tell each other. An agent starts and stops invokers on its host.

use serde::{Deserialize, Serialize};

use crate::{Incarnation, Name, WireError};

/// What an agent tells about itself, by core NATS on `thalweg.beat.agent.<life>`: at intervals, and whenever it
/// has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentBeat {
    /// Its name, for people; two agents may share one.
    pub agent: String,
    /// This life of it, which is also its address.
    pub life: Incarnation,
    /// Most invokers it runs at once; 0 while it is about to end.
    pub slots: u32,
    /// Starts and ends of invokers so far: a beat with fewer than an answer has is older than that.
    pub changes: u64,
    /// The invokers that run here and have not ended, whoever asked for them.
    pub invokers: Vec<Name>,
}

/// What an autoscaler asks of an agent, on `thalweg.agent.<life>`. Either may be repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentRequest {
    /// Start an invoker that beats under this id. Where it runs already nothing happens; where it has ended it is
    /// not started again (`gone`). Refused with `limit` when there is no room, with `unavailable` when the agent
    /// is about to end, and with `internal` when the host does not start it.
    Start {
        /// Its id.
        invoker: Name,
    },
    /// Tell an invoker to drain and end; it is killed when it has not ended in time. Unknown ids are ignored. No
    /// answer is needed: the beats tell when it has ended.
    Stop {
        /// Its id.
        invoker: Name,
    },
}

/// Answer to an [`AgentRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentReply {
    /// It was done, or had been.
    Done {
        /// As in [`AgentBeat::changes`], with what was asked for.
        changes: u64,
    },
    /// It was not done.
    Error(WireError),
}

//! Agents: invokers on other hosts. An agent starts and stops them where it runs; an autoscaler commands it over
//! NATS, which is all that the two share.
//!
//! Whoever is silent loses nothing: an agent that hears of no autoscaler keeps its invokers for as long as it
//! takes, and those of an autoscaler that has died are taken charge of by the next one that leads. Only an agent's
//! own end is the end of its invokers.

mod hosts;
mod remote;
mod serve;

use serde::{Deserialize, Serialize};

pub use remote::AgentActuator;
pub use serve::{AgentError, serve_agent};

/// Most invokers of one agent: their ids have to fit into one message.
const MOST_INVOKERS: u32 = 1024;

/// Settings of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// Its name in logs; empty = that of the host.
    pub name: String,
    /// Most invokers it runs at once, 1 to 1024. Default 4.
    pub max_invokers: u32,
    /// Time between heartbeats, milliseconds, at least 10. Default 500. Three in a row should fit into
    /// `dead_after_ms` of the autoscaler's policy.
    pub beat_ms: u64,
    /// Time that an invoker has to drain and end before it is killed, milliseconds. Default 10,000; it should
    /// exceed the invokers' own.
    pub drain_timeout_ms: u64,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self { name: String::new(), max_invokers: 4, beat_ms: 500, drain_timeout_ms: 10_000 }
    }
}

impl AgentConfig {
    /// Checks every value against its documented range.
    ///
    /// # Errors
    /// Names the setting and what it may be.
    pub fn validate(&self) -> Result<(), String> {
        let most = MOST_INVOKERS;
        if !(1..=most).contains(&self.max_invokers) {
            return Err(format!("max_invokers must be 1 to {most}"));
        }
        if self.beat_ms < 10 {
            return Err("beat_ms must be at least 10".to_owned());
        }
        Ok(())
    }
}

//! The invoker: a stateless function host that may be killed at any instant.
//!
//! [`core`] is the sans-I/O heart: messages, replies and time go in; acknowledgements, folds, commits
//! and publications come out. The rest is the tokio shell around it: taking partitions over, pulling
//! by credit, folding, and telling how busy it is. One current-thread task is one invoker.

mod beat;
pub mod core;
mod fold;
mod job;
pub mod metrics;
mod partition;
mod quota;
mod run;

pub use job::Job;
pub use run::{Config, run};

//! The invoker: a stateless function host that may be killed at any instant.
//!
//! [`core`] is the sans-I/O heart: messages, replies and time go in; acknowledgements, folds, commits
//! and publications come out. [`holdings`] decides likewise which partitions to take and to leave. The
//! rest is the tokio shell around them: taking partitions over, pulling by credit, folding, and telling
//! how busy it is. One current-thread task is one invoker; only changes of
//! hands have a thread beside it ([`Control`]).

mod beat;
mod control;
pub mod core;
mod fold;
pub mod holdings;
mod job;
pub mod metrics;
mod partition;
mod quota;
mod run;

pub use control::Control;
pub use fold::{FoldContext, fold};
pub use job::Job;
pub use partition::{Holding, Peers, Silence, Takeover, TakeoverError, Taker, clear_suspect, take_over};
pub use quota::CpuScope;
pub use run::{Config, run};

//! Deterministic simulation: the real state machines of SDK, invoker, store and autoscaler in a world that
//! loses connections, kills processes and forgets queues, all of it drawn from one seed.
//!
//! [`run`] plays one seed to its end and checks the invariants of ARCHITECTURE.md on the way. The same seed
//! gives the same history, so a failure is replayed by its number. `docs/simulation.md` tells what is
//! simulated and what is not.

mod autoscaler;
mod broker;
mod check;
mod invoker;
mod mutation;
mod network;
mod store;
mod worker;
mod world;

pub use check::Violation;
pub use mutation::Mutation;
pub use world::{Options, Report, run};

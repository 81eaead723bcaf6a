//! Deterministic simulation: the real state machines of SDK, gateway, invoker, store and autoscaler in a world
//! that loses connections, kills and freezes processes, cuts the power and forgets queues, all of it drawn
//! from one seed.
//!
//! [`run`] plays one seed to its end and checks the invariants of ARCHITECTURE.md on the way. The same seed
//! gives the same history, so a failure is replayed by its number, and [`minimise`] leaves out the faults it
//! does not need. `docs/simulation.md` tells what is simulated and what is not.

mod autoscaler;
pub mod broker;
mod calls;
mod check;
mod faults;
mod gateway;
mod invoker;
mod minimise;
mod mutation;
mod network;
mod operator;
mod outcome;
mod process;
mod scenario;
mod services;
mod store;
mod worker;
mod world;

use thalweg_protocol::Round;
use thalweg_store::mutation::{Bug, plant as plant_in_store};

pub use check::Violation;
pub use minimise::minimise;
pub use mutation::Mutation;

/// What to play.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Everything is drawn from it.
    pub seed: u64,
    /// A bug to re-introduce.
    pub mutation: Option<Mutation>,
    /// Keep the history.
    pub trace: bool,
    /// Faults to leave out, by number.
    pub skip: Vec<u32>,
    /// Rounds of training, instead of the number that the seed draws.
    pub rounds: Option<Round>,
}

/// How a seed ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Events handled.
    pub steps: u64,
    /// Virtual time passed, milliseconds.
    pub virtual_ms: u64,
    /// Faults that struck: number, time, what.
    pub faults: Vec<(u32, u64, String)>,
    /// Rounds of training.
    pub rounds: Round,
    /// The first invariant that did not hold.
    pub violation: Option<Violation>,
    /// The history, where it was asked for.
    pub trace: Vec<String>,
}

/// Plays one seed.
///
/// # Errors
/// When the simulation itself cannot run.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    world::World::new(options)?.play()
}

/// Puts a bug into the store of this thread, where the bug is one of the store's.
fn plant(mutation: Option<Mutation>) {
    plant_in_store(match mutation {
        Some(Mutation::DurableSlotOverwritten) => Some(Bug::OverwriteDurable),
        Some(Mutation::TornSlotTrusted) => Some(Bug::TrustTorn),
        _ => None,
    });
}

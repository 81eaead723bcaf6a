//! The gateway: jobs, rosters, ranks and leases, kept in the registry by compare-and-swap.
//!
//! It answers the SDK over NATS and people over HTTP. Any number of gateways may run: all of them
//! answer requests, and the one that holds the lease also expires workers and grants windows. The
//! decisions are pure functions ([`roster`], [`windows`], [`leases`]) with a thin shell around them.

mod control;
mod doors;
mod duties;
pub mod events;
mod http;
mod jobs;
pub mod leases;
mod membership;
pub mod metrics;
mod nudges;
mod recovery;
pub mod roster;
mod run;
mod service;
pub mod windows;

pub use jobs::{Jobs, Stores};
pub use nudges::WallClock;
pub use run::{Config, GatewayError, listen, run};
pub use service::{Clock, Gateway};

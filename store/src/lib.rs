//! Owner of shard state.
//!
//! A shard's state (parameters, optimizer slots) and the ledger of what it contains change together,
//! by compare-and-swap, and a commit returns only at the job's durability level (rules P1, P2).
//! [`ShardStore`] is the contract; [`MemoryStore`] its model, [`LocalStore`] the backend on slab files
//! with a sled index, [`StoreClient`] the same over NATS or, on
//! the store's host, over a socket. One conformance suite holds for all.
//!
//! This is the only crate that knows sled.

mod api;
mod client;
#[cfg(feature = "testing")]
pub mod conformance;
mod direct;
pub mod disk;
mod flush;
mod index;
mod local;
mod memory;
pub mod metrics;
pub mod mutation;
mod rules;
mod server;
mod slab;
mod slot;

pub use api::{OpenFold, ShardState, ShardStore, Standing, StoreError};
pub use client::{Route, StoreClient};
pub use flush::FlushMode;
pub use index::{Change, Durable, Index, IndexContents, MemoryIndex, SledIndex};
pub use local::{LocalStore, OpenOptions};
pub use memory::MemoryStore;
pub use server::{Config, announce, answer, run};

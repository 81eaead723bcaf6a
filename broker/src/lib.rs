//! The NATS side of Thalweg's protocol, shared by services and SDK.
//!
//! What is here needs a NATS connection and no knowledge of any component: connecting in any start
//! order, requests in frames, the partitions' streams, events and dead letters, the registry's
//! compare-and-swap, leases, and what components remember of rounds.
//! It knows no server crate, so the SDK may use it.

mod connect;
mod dead_letters;
mod events;
mod lease;
pub mod metrics;
mod registry;
mod request;
mod said;
mod spans;
pub mod stage;
mod streams;

pub use connect::{Connection, NatsConfig, Report, no_report};
pub use dead_letters::{
    DeadLetter, DeadLetterQuery, RequeueError, dead_letter, dead_letters, remove_dead_letter, requeue,
};
pub use events::{EventsQuery, StreamError, events};
pub use lease::{LeaseConfig, LeaseKeeper};
pub use registry::{Bucket, Conflict, Registry, RegistryError, Revision};
pub use request::{Backoff, RequestError, request};
pub use said::Said;
pub use spans::{Spans, traced};
pub use streams::{
    PartitionDepth, Pool, PoolConfig, Queue, QueueError, Queues, StreamStorage, StreamsConfig,
    consumer_epochs, delivered, ensure_streams, remove_consumer,
};

//! Thalweg for training loops.
//!
//! ```no_run
//! # async fn example(gradient: Vec<f32>) -> Result<(), thalweg_sdk::Error> {
//! use thalweg_sdk::{Client, Job};
//!
//! let client = Client::connect("nats://127.0.0.1:4222").await?;
//! let job = Job::new("digits")?.tensor("weight", [64, 10]).function("mean").workers(4);
//! let mut worker = client.join(job, 0).await?;
//! for _ in 0..100 {
//!     let round = worker.push_pull(&[("weight", &gradient)]).await?;
//!     println!("round {}: mean over {} workers: {:?}", round.round, round.contributors, round.tensors[0]);
//! }
//! worker.leave().await
//! # }
//! ```
//!
//! [`Worker::push`] and [`Worker::pull`] are the two halves of [`Worker::push_pull`]: push a tensor as
//! soon as its gradient is there, and communication overlaps the rest of the backward pass.
//!
//! A worker keeps what it pushed until it holds the result, so that the death of any component, the
//! broker included, costs time and nothing else. What a call promises when it is cancelled stands with
//! the call.

mod admin;
mod client;
mod driver;
mod element;
pub mod engine;
mod error;
mod job;
mod snapshot;
mod stream;
mod trace;
mod worker;

pub use client::{Client, JoinOptions};
pub use element::Element;
pub use error::Error;
pub use job::Job;
pub use snapshot::{RestoreOptions, Snapshot, SnapshotOptions, model_of};
pub use stream::{DeadLetter, EventsOptions};
pub use thalweg_broker::NatsConfig;
pub use thalweg_protocol::{
    Decay, Durability, ErrorCode, Event, EventKind, FoldOrder, FunctionSpec, JobCommand, JobKey, JobRecord,
    JobState, JobSummary, Name, NonFinite, OnLoss, ParameterGroup, Progress, Roster, Schedule, Setting,
    SettingsChange, SettingsRevision, WireError,
};
pub use worker::{Round, Worker};

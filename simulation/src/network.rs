//! What travels between actors, how connections are lost, and what then becomes of it.
//!
//! A connection is a TCP stream to the broker: it loses nothing while it lives. When it breaks, what was on
//! its way is lost or not, what its owner sends meanwhile waits in the client and goes out when the
//! connection is back, and requests without an answer time out.

use std::sync::Arc;

use bytes::Bytes;
use thalweg_invoker::{
    Job,
    core::{FoldError, InvocationId, ShardKey},
};
use thalweg_protocol::{
    Commit, CommitOutcome, Epoch, Head, InvokerBeat, JobKey, Ledger, Partition, Placement, Rank, Reject,
    Round, ShardIndex,
};
use thalweg_store::{ShardState, StoreError};

/// Milliseconds of virtual time.
pub(crate) type Millis = u64;

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Actor {
    Broker,
    Store,
    Autoscaler,
    Worker(u32),
    Invoker(u32),
}

/// What is told.
#[derive(Debug)]
pub(crate) enum Body {
    // Worker and broker.
    Publish { shard: ShardIndex, round: Round, partition: Partition, rank: Rank, frame: Bytes },
    Confirmed { shard: ShardIndex, round: Round, len: u64 },
    Refused { shard: ShardIndex, round: Round, len: u64 },
    Result(Bytes),
    Reject(Rank, Reject),
    ReadStreams(Vec<Head>),
    Streams(Vec<Head>, Vec<i64>),
    // Worker and store.
    ReadHeads,
    Heads(Vec<Head>),
    Fetch(ShardIndex),
    Fetched(ShardIndex, ShardState),
    // Invoker and broker.
    ReadPlacement,
    Placement(Placement),
    LookUp(JobKey),
    Job(JobKey, Option<Arc<Job>>),
    LookUpFailed(JobKey),
    List(Partition, Epoch),
    Listed { partition: Partition, epoch: Epoch, consumers: Vec<(String, usize)>, stream: StreamState },
    Delete { partition: Partition, epoch: Epoch, name: String },
    Deleted { partition: Partition, epoch: Epoch },
    Create { partition: Partition, epoch: Epoch, name: String },
    Created { partition: Partition, epoch: Epoch, name: String },
    TakeoverFailed { partition: Partition, epoch: Epoch },
    Release { partition: Partition, name: String },
    Pull { partition: Partition, consumer: String, batch: u64 },
    ConsumerGone { partition: Partition, consumer: String },
    Deliver { partition: Partition, consumer: String, consumer_sequence: u64, message: Arc<Queued> },
    Acknowledge { partition: Partition, consumer: String, sequence: u64 },
    PublishResult(Bytes),
    Beat(InvokerBeat),
    // Invoker and store.
    ReadHead(ShardKey),
    HeadRead(ShardKey, Result<(Head, Ledger), StoreError>),
    Commit(InvocationId, Box<Commit>, Bytes),
    Committed(InvocationId, Result<CommitOutcome, StoreError>),
    // Within an invoker.
    Folded(InvocationId, Result<Bytes, FoldError>),
    Republish(ShardKey),
}

/// A stream at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamState {
    pub(crate) messages: usize,
    pub(crate) last_sequence: u64,
}

/// A message in a work queue.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) sequence: u64,
    pub(crate) published: Millis,
    pub(crate) subject: String,
    pub(crate) frame: Bytes,
}

/// Who hears that a message was lost, and what.
pub(crate) enum Loss {
    Nobody,
    Sender(Body),
    Receiver(Body),
}

impl Body {
    /// What a time-out tells whoever waits for an answer.
    pub(crate) fn loss(&self) -> Loss {
        let unavailable = || StoreError::Unavailable("no answer in time".to_owned());
        match self {
            Self::Publish { shard, round, frame, .. } => {
                Loss::Sender(Self::Refused { shard: *shard, round: *round, len: frame.len() as u64 })
            }
            Self::Confirmed { shard, round, len } | Self::Refused { shard, round, len } => {
                Loss::Receiver(Self::Refused { shard: *shard, round: *round, len: *len })
            }
            Self::LookUp(key) => Loss::Sender(Self::LookUpFailed(key.clone())),
            Self::Job(key, _) | Self::LookUpFailed(key) => Loss::Receiver(Self::LookUpFailed(key.clone())),
            Self::List(partition, epoch)
            | Self::Delete { partition, epoch, .. }
            | Self::Create { partition, epoch, .. } => {
                Loss::Sender(Self::TakeoverFailed { partition: *partition, epoch: *epoch })
            }
            Self::Listed { partition, epoch, .. }
            | Self::Deleted { partition, epoch }
            | Self::TakeoverFailed { partition, epoch }
            | Self::Created { partition, epoch, .. } => {
                Loss::Receiver(Self::TakeoverFailed { partition: *partition, epoch: *epoch })
            }
            Self::ReadHead(key) => Loss::Sender(Self::HeadRead(*key, Err(unavailable()))),
            Self::HeadRead(key, _) => Loss::Receiver(Self::HeadRead(*key, Err(unavailable()))),
            Self::Commit(id, _, _) => Loss::Sender(Self::Committed(*id, Err(unavailable()))),
            Self::Committed(id, _) => Loss::Receiver(Self::Committed(*id, Err(unavailable()))),
            _ => Loss::Nobody,
        }
    }

    /// In short, for a trace.
    pub(crate) fn short(&self) -> String {
        let text = match self {
            Self::Publish { shard, round, rank, .. } => {
                format!("publish rank {rank} shard {shard} round {round}")
            }
            Self::Result(_) => "result".to_owned(),
            Self::PublishResult(_) => "publish result".to_owned(),
            Self::Deliver { partition, consumer_sequence, message, .. } => {
                format!("deliver p{partition} #{} ({consumer_sequence})", message.sequence)
            }
            Self::Commit(id, commit, _) => {
                format!("commit {id} shard {} round {}", commit.shard, commit.ledger.round)
            }
            Self::Folded(id, result) => format!("folded {id} ok={}", result.is_ok()),
            Self::Fetched(shard, state) => format!("fetched shard {shard} version {}", state.head.version),
            Self::Job(..) => "job".to_owned(),
            Self::Placement(placement) => format!(
                "placement {:?}",
                placement.partitions.iter().map(|placed| (placed.epoch, &placed.holder)).collect::<Vec<_>>()
            ),
            Self::Streams(..) => "streams".to_owned(),
            Self::ReadStreams(_) => "read streams".to_owned(),
            other => format!("{other:?}"),
        };
        text.chars().take(160).collect()
    }
}

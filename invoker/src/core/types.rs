//! What goes into the core and what comes out.

use std::sync::Arc;

use bytes::Bytes;
use thalweg_broker::Said;
use thalweg_protocol::{
    Commit, CommitOutcome, ErrorCode, Head, Incarnation, JobKey, PartialCommit, Partition, Rank, Reject,
    ResultHeader, Round, ShardIndex, WireError,
};
use thalweg_store::{Standing, StoreError};

use crate::Job;

/// One shard of one life of a job.
pub type ShardKey = (Incarnation, ShardIndex);
/// Numbers invocations of one core.
pub type InvocationId = u64;
/// Milliseconds since the Unix epoch, by the clock that the shell reads.
pub type Millis = u64;

/// A message of a partition's work queue.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Where it came from.
    pub partition: Partition,
    /// Its sequence in the partition's stream.
    pub sequence: u64,
    /// When the broker stored it.
    pub published: Millis,
    /// Its subject.
    pub subject: String,
    /// Its bytes.
    pub frame: Bytes,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The shell has taken a partition over: everything un-acknowledged will be delivered (again).
    Held {
        /// The partition.
        partition: Partition,
        /// After an unclean takeover: last sequence of the backlog, to be folded alone (rule P18).
        careful_until: Option<u64>,
        /// Sequence of a contribution that has killed too many invokers.
        poison: Option<u64>,
    },
    /// Start no more invocations of a partition that is about to move (rule P19).
    Drain(Partition),
    /// The partition is no longer ours.
    Lost(Partition),
    /// A message.
    Delivered(Delivery),
    /// The registry's answer to [`Action::LookUp`]; `None` when there is no such job.
    Job(JobKey, Option<Arc<Job>>),
    /// The registry did not answer.
    LookUpFailed(JobKey),
    /// The store's answer to [`Action::ReadHead`].
    Head(ShardKey, Result<Box<Standing>, StoreError>),
    /// End of [`Action::Fold`]: the next state, or the suspended fold.
    Folded(InvocationId, Result<Bytes, FoldError>),
    /// End of [`Action::Commit`] or [`Action::CommitPartial`].
    Committed(InvocationId, Result<CommitOutcome, StoreError>),
    /// Time has passed.
    Tick,
}

/// Why a fold gave nothing.
#[derive(Debug)]
pub enum FoldError {
    /// A parked contribution is no longer in the stream, or another one.
    ParkedGone(Rank),
    /// The shard is not where the plan expects it.
    Moved,
    /// The store, or the broker for parked contributions, could not be asked.
    Unavailable(String),
    /// The store refuses, and asking again changes nothing.
    Refused(StoreError),
    /// The function itself failed.
    Function(String),
}

/// What to do. The shell performs actions in the order in which they are given.
#[derive(Debug)]
pub enum Action {
    /// Remove a message from its work queue.
    Acknowledge(Partition, u64),
    /// Put a message aside with its reason, then remove it from its work queue.
    DeadLetter {
        /// Its partition.
        partition: Partition,
        /// Its sequence.
        sequence: u64,
        /// The subject that it was sent to.
        subject: String,
        /// Its job, if that could be read.
        key: Option<JobKey>,
        /// Why.
        error: WireError,
        /// Its bytes.
        frame: Bytes,
    },
    /// Tell a sender why its contribution was not taken.
    Reject(JobKey, Rank, Reject),
    /// Read a job's record and roster.
    LookUp(JobKey),
    /// Read where a shard stands.
    ReadHead(ShardKey),
    /// Fold a round, or some more of it.
    Fold(InvocationId, Plan),
    /// Commit a folded round.
    Commit(InvocationId, Commit, Bytes),
    /// Commit what an open round contains.
    CommitPartial(InvocationId, PartialCommit, Bytes),
    /// A partition whose contributions are tried alone has come further: forget its suspect (rule P18).
    ClearSuspect(Partition),
    /// Publish a committed round to the job's workers.
    Publish(JobKey, ResultHeader, Bytes),
    /// Read a shard from the store and publish it, for workers that missed it.
    Republish(JobKey, ShardKey),
    /// Record that a job has failed.
    FailJob(JobKey, Incarnation, WireError),
}

/// One round of one shard, or some more of it, ready to be folded. It goes on from the partial commits that
/// `expect.fold_count` tells of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The job, with its function.
    pub job: Arc<Job>,
    /// The shard.
    pub shard: ShardIndex,
    /// The round.
    pub round: Round,
    /// Where the shard must stand.
    pub expect: Head,
    /// The partition, for parked contributions.
    pub partition: Partition,
    /// Contributions in the order of folding; void ones are not among them.
    pub inputs: Vec<Input>,
    /// Suspend the fold at its end: the round is not over.
    pub suspend: bool,
    /// Write a suspect record before each contribution (rule P18).
    pub careful: bool,
    /// How the contributions came.
    pub gathered: Gathered,
}

/// How the contributions of a fold came together, by the broker's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gathered {
    /// When it stored the first one of the round.
    pub first: Millis,
    /// When it stored the last one of this fold.
    pub last: Millis,
    /// Whose that was.
    pub last_rank: Option<Rank>,
}

impl Plan {
    /// Bytes of the contributions.
    #[must_use]
    pub fn input_bytes(&self) -> u64 {
        self.inputs.len() as u64 * self.result_bytes()
    }

    /// Bytes of the shard's parameters.
    #[must_use]
    pub fn result_bytes(&self) -> u64 {
        self.job.record.layout.len(self.shard) as u64 * 4
    }
}

/// One contribution of a plan.
#[derive(Clone, Debug)]
pub struct Input {
    /// Whose.
    pub rank: Rank,
    /// Its weight.
    pub weight: f32,
    /// Its message's sequence.
    pub sequence: u64,
    /// Checksum of its frame, to recognise a parked one.
    pub checksum: u64,
    /// Its values; `None` when parked.
    pub values: Option<Bytes>,
}

/// Whether the store may do later what it does not do now. One of another release is no reason to fail a job: it
/// will be there in the right one, or this invoker will.
pub(crate) fn may_pass(error: &StoreError) -> bool {
    static SAID: Said = Said::new();
    let skew = error.code() == ErrorCode::WireVersion;
    if skew && SAID.is_new(&error.to_string()) {
        tracing::error!(%error, "the store is of another release: rounds wait");
    }
    skew || error.is_retryable()
}

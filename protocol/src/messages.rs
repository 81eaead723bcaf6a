//! Headers of the messages between workers, invokers, store and gateway.

use serde::{Deserialize, Serialize};

use crate::{
    Durability, Epoch, Head, Incarnation, Init, JobKey, JobRecord, JobSpec, Layout, Ledger, Rank, Roster,
    Round, ShardIndex, StateId, Version, WireError,
};

/// Header of a gradient batch: one worker's contribution for one shard in one round.
///
/// The payload is the shard's values (f32 little endian), or empty for a void.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GradientHeader {
    /// Life of the job.
    pub job: Incarnation,
    /// The shard.
    pub shard: ShardIndex,
    /// The round; the shard's version must be `round - 1` when it is folded.
    pub round: Round,
    /// Life of the worker.
    pub worker: Incarnation,
    /// Its rank, as in the subject.
    pub rank: Rank,
    /// Newest roster the worker knows of, so that an invoker never closes a round by an older one.
    pub roster_epoch: Epoch,
    /// State the worker builds on (rule P27).
    pub base: StateId,
    /// Weight for `weighted_mean`; finite, >= 0.
    pub weight: f32,
    /// Present, but adds nothing; the payload is empty.
    pub void: bool,
    /// Elements of the shard as the worker sees it.
    pub elements: u32,
}

/// Header of a round's result; the payload is the shard's parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultHeader {
    /// Life of the job.
    pub job: Incarnation,
    /// The shard.
    pub shard: ShardIndex,
    /// Where the shard stands now.
    pub head: Head,
    /// Who was counted, and by which roster.
    pub ledger: Ledger,
}

/// Why a contribution was not taken, to its sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// Life of the job named by the contribution, when it could be read.
    pub job: Option<Incarnation>,
    /// Life of the worker named by the contribution, when it could be read.
    pub worker: Option<Incarnation>,
    /// The shard and round, when they could be read.
    pub at: Option<(ShardIndex, Round)>,
    /// What is wrong and what to do.
    pub error: WireError,
}

/// What a store keeps of a job; also the superblock of its slab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreJob {
    /// Names, for people and for adoption of orphans.
    pub key: JobKey,
    /// Life of the job.
    pub incarnation: Incarnation,
    /// How the parameters are split.
    pub layout: Layout,
    /// Optimizer slots beside the parameters.
    pub slots: u32,
    /// What a commit survives.
    pub durability: Durability,
    /// Bounds the ledger.
    pub max_members: u32,
    /// Origin of version 0.
    pub init: Init,
}

impl StoreJob {
    /// Bytes of the state of `shard`: parameters and slots.
    #[must_use]
    pub fn state_bytes(&self, shard: ShardIndex) -> usize {
        self.layout.len(shard) * 4 * (1 + self.slots as usize)
    }

    /// Bytes of the parameters of `shard`.
    #[must_use]
    pub fn parameter_bytes(&self, shard: ShardIndex) -> usize {
        self.layout.len(shard) * 4
    }
}

/// A commit: compare-and-swap of one shard. The payload is the next state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Life of the job.
    pub job: Incarnation,
    /// The shard.
    pub shard: ShardIndex,
    /// Where the shard must stand.
    pub expect: Head,
    /// What the round contains; `ledger.round` must be `expect.version + 1`.
    pub ledger: Ledger,
    /// Digest of the function that made the state.
    pub function: [u8; 16],
}

/// How a commit ended. Only [`CommitOutcome::Committed`] and
/// [`CommitOutcome::AlreadyCommitted`] mean that its state is the shard's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommitOutcome {
    /// The state is in the store, at the job's durability level.
    Committed(Head),
    /// This very commit had succeeded before.
    AlreadyCommitted(Head),
    /// The shard stands elsewhere; that state is the truth.
    Conflict(Head),
    /// The round needs a newer roster than the one that closed it.
    StaleRoster {
        /// Oldest roster epoch that may close this round.
        needed: Epoch,
    },
}

/// Requests to a store. One message each; large ones carry their bytes as payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoreRequest {
    /// Registers a job and its slab. Idempotent for the same job.
    Create(StoreJob),
    /// Uploads one shard's initial parameters (payload) under an upload id.
    Upload {
        /// Life of the job.
        job: Incarnation,
        /// Groups the shards of one upload.
        upload: Incarnation,
        /// The shard.
        shard: ShardIndex,
    },
    /// Makes a complete upload version 0, by compare-and-swap.
    Activate {
        /// Life of the job.
        job: Incarnation,
        /// The upload.
        upload: Incarnation,
    },
    /// Where shards stand.
    Heads {
        /// Life of the job.
        job: Incarnation,
        /// First shard.
        first: ShardIndex,
        /// How many, at most [`MAX_HEADS`].
        count: u32,
    },
    /// Reads one shard; the reply's payload holds parameters, with slots if asked for.
    Fetch {
        /// Life of the job.
        job: Incarnation,
        /// The shard.
        shard: ShardIndex,
        /// Whether optimizer slots are wanted too.
        slots: bool,
    },
    /// Where one shard stands and what its newest round contains, without its values.
    FetchHead {
        /// Life of the job.
        job: Incarnation,
        /// The shard.
        shard: ShardIndex,
    },
    /// Compare-and-swap of one shard; the payload is the next state.
    Commit(Commit),
    /// From `from_round` on, commits need a roster of at least `epoch`.
    Fence {
        /// Life of the job.
        job: Incarnation,
        /// The roster.
        epoch: Epoch,
        /// First round that needs it.
        from_round: Round,
    },
    /// Forgets a job and unlinks its slab. Idempotent.
    Delete {
        /// Life of the job.
        job: Incarnation,
    },
    /// The jobs in the store.
    List,
}

/// Most heads in one request (40 bytes each).
pub const MAX_HEADS: u32 = 8192;

/// Answers of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoreReply {
    /// Done, nothing to tell.
    Done,
    /// Heads, from the first shard asked for.
    Heads(Vec<Head>),
    /// One shard; its values are the payload when they were asked for.
    State(Head, Ledger),
    /// End of a commit.
    Commit(CommitOutcome),
    /// Fence set; the highest version of any shard at that moment.
    Fenced(Version),
    /// The jobs in the store.
    Jobs(Vec<StoreJob>),
    /// Refused.
    Error(WireError),
}

/// Requests to the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ApiRequest {
    /// Creates a job, or returns it when it exists with the same specification.
    OpenJob(JobSpec),
    /// Reads a job and its roster.
    GetJob(JobKey),
    /// Lists jobs.
    ListJobs,
    /// Removes a job and everything of it.
    DeleteJob(JobKey),
    /// Tells that an upload is complete: version 0 is there.
    Activate {
        /// The job's names.
        key: JobKey,
        /// Life of the job.
        job: Incarnation,
        /// The upload.
        upload: Incarnation,
    },
    /// Claims a rank.
    Join(Claim),
    /// Gives a rank back; rounds that no shard has closed no longer wait for it.
    Leave(WorkerRef),
    /// The worker is alive; asks for bytes in flight.
    Beat {
        /// Who.
        worker: WorkerRef,
        /// Window the worker has been granted, bytes.
        window_bytes: u64,
        /// Whether it has anything in flight or to push.
        active: bool,
    },
}

/// Claim of a rank by a worker's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Who claims what.
    pub worker: WorkerRef,
    /// Stable id of the worker: the same id may take its own rank over at once.
    pub id: String,
    /// The former life that this one replaces, as the claimant has read it in the roster. A claim that comes
    /// late, of a life that is over itself, names an older one and replaces nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Incarnation>,
}

/// One life of a worker in one life of a job.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkerRef {
    /// The job's names.
    pub key: JobKey,
    /// Life of the job.
    pub job: Incarnation,
    /// The rank.
    pub rank: Rank,
    /// Life of the worker.
    pub incarnation: Incarnation,
}

/// Answers of the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ApiReply {
    /// Done, nothing to tell.
    Done,
    /// A job and its roster.
    Job(Box<JobRecord>, Roster),
    /// All jobs.
    Jobs(Vec<JobRecord>),
    /// The claim stands.
    Joined {
        /// Roster that holds it.
        roster: Roster,
        /// Bytes the worker may have in flight.
        window_bytes: u64,
        /// Silence after which it loses its rank, milliseconds.
        lease_ms: u64,
    },
    /// The beat was heard.
    Beat {
        /// Bytes the worker may have in flight from now on.
        window_bytes: u64,
        /// Newest roster.
        roster_epoch: Epoch,
    },
    /// Refused.
    Error(WireError),
}

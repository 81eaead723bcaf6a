//! Headers of the messages between workers, invokers, store and gateway.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    Durability, Epoch, FunctionSpec, Head, Incarnation, Init, JobKey, JobRecord, JobSpec, Layout, Ledger,
    Name, Partial, Partition, Rank, Roster, Round, Settings, SettingsRevision, ShardIndex, StateId, Version,
    WireError,
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

/// Header of a message that asks whoever holds a shard's partition to look at its open round again: the deadline has
/// passed, or the roster has changed, while its queue may be empty and no invoker there (rule P12).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nudge {
    /// Life of the job.
    pub job: Incarnation,
    /// The shard.
    pub shard: ShardIndex,
}

/// Header of what an invoker asks the one that holds a partition by an older placement: to finish with it and hand it
/// over (rule P19). Published among the deliveries of that consumer it says that whoever asks receives them too from then
/// on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The partition.
    pub partition: Partition,
    /// By which consumer it is held.
    pub consumer: String,
    /// Epoch of the placement by which it is taken over.
    pub epoch: Epoch,
}

/// Header of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HandedOver {
    /// It is not held by that consumer here, or no more.
    NotHeld,
    /// It is held here by a placement that is not older: by the one of this epoch.
    Newer(Epoch),
    /// Nothing of it is held: whoever asks may begin to listen.
    Ready,
    /// Something of it is held: ask again.
    NotYet,
    /// It is handed over with its consumer, of which every delivery from here on is the asker's.
    Kept(KeptConsumer),
    /// It is given up and its consumer is being removed. Nobody has served it for so long, microseconds before this
    /// answer was sent.
    Left(u64),
}

/// A consumer that is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptConsumer {
    /// Number of its next delivery, from 1.
    pub next_delivery: u64,
    /// How many messages the pull requests that are under way may still bring.
    pub credit: u64,
    /// How many messages the broker had left for it after the last delivery.
    pub pending: u64,
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
    /// Origin of the first version.
    pub init: Init,
    /// The version that the job starts from: 0, unless it goes on from a snapshot.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first_version: Version,
}

fn is_zero(version: &Version) -> bool {
    *version == 0
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

/// A partial commit: the open round of one shard contains somebody more, by compare-and-swap (rule P12). The payload is
/// the suspended fold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartialCommit {
    /// Life of the job.
    pub job: Incarnation,
    /// The shard.
    pub shard: ShardIndex,
    /// Where the shard must stand.
    pub expect: Head,
    /// What the open round then contains, all earlier partial commits included; `ledger.round` must be
    /// `expect.version + 1`.
    pub partial: Partial,
}

/// How a commit, partial or not, ended. Only [`CommitOutcome::Committed`] and
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
    /// Uploads one shard's first state under an upload id. The payload is its parameters, or parameters and
    /// optimizer slots; slots that are not there start at zero.
    Upload {
        /// Life of the job.
        job: Incarnation,
        /// Groups the shards of one upload.
        upload: Incarnation,
        /// The shard.
        shard: ShardIndex,
    },
    /// Makes a complete upload the first version, by compare-and-swap.
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
    /// Keeps one version of all shards readable: the newest of any shard, which the others reach with their
    /// next commits. Asking again with the same id renews it; one that is not renewed for
    /// [`crate::limits::HOLD_SECONDS`] is forgotten, and so are all when the store restarts.
    Hold {
        /// Life of the job.
        job: Incarnation,
        /// Names the hold.
        hold: Incarnation,
    },
    /// As [`StoreRequest::Fetch`], of the version that a hold keeps.
    FetchHeld {
        /// Life of the job.
        job: Incarnation,
        /// The hold.
        hold: Incarnation,
        /// The shard.
        shard: ShardIndex,
        /// Whether optimizer slots are wanted too.
        slots: bool,
    },
    /// Forgets a hold. Idempotent.
    Release {
        /// Life of the job.
        job: Incarnation,
        /// The hold.
        hold: Incarnation,
    },
    /// Compare-and-swap of what a shard's open round contains; the payload is the suspended fold.
    CommitPartial(PartialCommit),
    /// Reads what a shard's open round contains; the payload of the reply is the suspended fold.
    FetchPartial {
        /// Life of the job.
        job: Incarnation,
        /// The shard.
        shard: ShardIndex,
    },
    /// The rounds that have partial commits and are still open, in the order of job and shard.
    OpenRounds {
        /// Only those behind this one.
        after: Option<(Incarnation, ShardIndex)>,
        /// How many, at most [`crate::limits::MAX_OPEN_ROUNDS`].
        limit: u32,
    },
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
    /// A hold stands.
    Held {
        /// The version it keeps.
        version: Version,
        /// All shards have it.
        complete: bool,
    },
    /// One shard whose next round is open: where it stands, what its newest round contains and what the open one does
    /// so far; the suspended fold is the payload when it was asked for.
    Open(Head, Ledger, Box<Partial>),
    /// A page of open rounds.
    OpenRounds(Vec<OpenRound>),
}

/// A round that has partial commits and is still open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenRound {
    /// Life of the job.
    pub job: Incarnation,
    /// The job's names.
    pub key: JobKey,
    /// The shard.
    pub shard: ShardIndex,
    /// Where it stands.
    pub head: Head,
    /// When the broker stored the round's first contribution, milliseconds since the Unix epoch.
    pub first: u64,
    /// Contributions in it that count.
    pub counted: u32,
    /// Roster of its newest partial commit.
    pub roster_epoch: Epoch,
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
    /// Lists jobs in the order of their keys, a page at a time.
    Jobs {
        /// Only this tenant's.
        tenant: Option<Name>,
        /// Only those behind this one.
        after: Option<JobKey>,
        /// How many, at most [`crate::limits::MAX_PAGE`].
        limit: u32,
    },
    /// Where a job's shards stand.
    Progress(JobKey),
    /// Changes what a job may do.
    Control(JobKey, JobCommand),
    /// Changes settings of a job's function from some round on.
    SetSettings {
        /// The job.
        key: JobKey,
        /// What changes.
        change: SettingsChange,
    },
    /// Creates a new life of a job, to be filled by one upload.
    Restore {
        /// What it is created with.
        spec: Box<JobSpec>,
        /// The function with the settings that it begins with, where those differ from the specification's.
        function: Option<FunctionSpec>,
        /// The upload that will be activated.
        upload: Incarnation,
        /// The version that it becomes.
        version: Version,
        /// The life that it takes the place of; `None` where there is none.
        replaces: Option<Incarnation>,
    },
}

/// What may be done with a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobCommand {
    /// Close no more rounds; workers wait. The text says why, to them.
    Pause(String),
    /// Go on.
    Resume,
    /// End the job: every worker gets [`crate::ErrorCode::Aborted`] with this text. Its parameters stay until the
    /// job is deleted.
    Abort(String),
}

/// A change of settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SettingsChange {
    /// First round with the new settings; `None` for the next one that no shard can have begun. A round that may
    /// have begun is refused.
    pub from_round: Option<Round>,
    /// Settings of the function that change; the others stay.
    #[serde(default)]
    pub settings: Settings,
    /// Settings of parameter groups that change, by index.
    #[serde(default)]
    pub groups: BTreeMap<u32, Settings>,
}

/// A job in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSummary {
    /// Its names.
    pub key: JobKey,
    /// This life of it.
    pub incarnation: Incarnation,
    /// In one word, as [`crate::JobState::name`], or `paused`.
    pub state: String,
    /// Its function.
    pub function: String,
    /// Founding members.
    pub workers: u32,
    /// Members that have not left.
    pub members: u32,
    /// Elements of the model.
    pub elements: u64,
    /// What a commit survives.
    pub durability: Durability,
}

/// Where a job's shards stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Progress {
    /// Version of the slowest shard: the last round that is complete.
    pub min: Version,
    /// Version of the fastest shard.
    pub max: Version,
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
        /// Of the roster that holds it, the claimant's entry ([`Roster::concerning`]).
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
        /// Newest roster; 0 while founding members are missing.
        roster_epoch: Epoch,
        /// Why the job is paused, if it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        paused: Option<String>,
    },
    /// Refused.
    Error(WireError),
    /// A page of jobs.
    JobPage {
        /// In the order of their keys.
        jobs: Vec<JobSummary>,
        /// Where the next page goes on, if there is one.
        next: Option<JobKey>,
    },
    /// Where the job's shards stand.
    Progress(Progress),
    /// The settings that were added.
    Settings(SettingsRevision),
}

//! Control records: what the registry (a JetStream key-value bucket) holds.
//!
//! Every record is a frame of kind `Record` and is changed by compare-and-swap on its revision.

use serde::{Deserialize, Serialize};

use crate::{
    Epoch, ErrorCode, Incarnation, Init, JobKey, JobSpec, Layout, Name, Partition, Rank, Round,
    SettingsRevision, ShardIndex, StoreId, StoreJob, Version, WireError,
};

/// Life of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Its slab and roster are being made. A creation cut short is finished by whoever opens the job next.
    Creating,
    /// Waiting for initial parameters.
    Initialising,
    /// Rounds may close.
    Running,
    /// No round will close any more; every worker gets this error.
    Failed(WireError),
    /// Its bytes, its roster and at last its record are being removed. What is cut short is taken up again by
    /// the leading gateway.
    Deleting,
}

impl JobState {
    /// What whoever wants to go on with a job in this state is told, if that will never be possible.
    #[must_use]
    pub fn end(&self, key: &JobKey) -> Option<WireError> {
        match self {
            Self::Failed(error) if error.code == ErrorCode::Aborted => Some(error.clone()),
            Self::Failed(error) => Some(WireError::new(ErrorCode::JobFailed, error.to_string())),
            Self::Deleting => {
                let text = format!("this life of job {key} is over: open the job again");
                Some(WireError::new(ErrorCode::Gone, text))
            }
            Self::Creating | Self::Initialising | Self::Running => None,
        }
    }

    /// In one word.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Initialising => "initialising",
            Self::Running => "running",
            Self::Failed(error) if error.code == ErrorCode::Aborted => "aborted",
            Self::Failed(_) => "failed",
            Self::Deleting => "deleting",
        }
    }
}

/// Where the parameters of a life come from that does not begin at version 0, or not with rank 0's parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The only upload that may be activated.
    pub upload: Incarnation,
    /// The version that it becomes.
    pub version: Version,
    /// The gateway copies it from the life that this one takes the place of (rule P27); else whoever asked for this
    /// life uploads it.
    pub rolled_back: bool,
}

/// What sets a life of a job apart from one that was just created and runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// No round is closed while this is there; it says why.
    pub paused: Option<String>,
    /// Restored, seeded, or rolled back.
    pub origin: Option<Origin>,
    /// The lives that this one takes the place of: the last one that ran, and attempts at this one that were lost with
    /// the power. Their bytes go once this one has its own.
    pub replaces: Vec<Incarnation>,
    /// The first of its partitions: not the first of all when it has a pool of its own.
    #[serde(default, skip_serializing_if = "is_first")]
    pub first_partition: Partition,
}

fn is_first(partition: &Partition) -> bool {
    *partition == 0
}

impl Life {
    fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// A job as the registry knows it: `job.<tenant>.<job>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// What it was created with.
    pub spec: JobSpec,
    /// This life of the job.
    pub incarnation: Incarnation,
    /// How its parameters are split; the shard size is the wanted one, bounded by `max_payload`.
    pub layout: Layout,
    /// Optimizer slots of its function.
    pub slots: u32,
    /// The store that holds its shards.
    pub store: StoreId,
    /// Number of its pool's partitions when it was created.
    pub partitions: Partition,
    /// Where it stands.
    pub state: JobState,
    /// Settings by first round, ascending.
    pub settings: Vec<SettingsRevision>,
    /// Pause and origin.
    #[serde(default, skip_serializing_if = "Life::is_plain")]
    pub life: Life,
}

impl JobRecord {
    /// The version its first round builds on.
    #[must_use]
    pub fn first_version(&self) -> Version {
        self.life.origin.as_ref().map_or(0, |origin| origin.version)
    }

    /// The settings that fold `round`.
    #[must_use]
    pub fn settings_of(&self, round: Round) -> &SettingsRevision {
        let at = self.settings.partition_point(|revision| revision.from_round <= round);
        // The first revision starts at round 0, so `at` is at least 1.
        &self.settings[at.saturating_sub(1)]
    }

    /// The partition that serves `shard`.
    #[must_use]
    pub fn partition(&self, shard: ShardIndex) -> Partition {
        // Both fit the number of all partitions, which is bounded by limits::MAX_PARTITIONS; what does not is nonsense
        // that must not panic.
        let within = crate::partition_of(self.incarnation, shard, self.partitions.max(1));
        self.life.first_partition.saturating_add(within)
    }

    /// What a store keeps of it.
    #[must_use]
    pub fn store_job(&self) -> StoreJob {
        StoreJob {
            key: self.spec.key.clone(),
            incarnation: self.incarnation,
            layout: self.layout,
            slots: self.slots,
            durability: self.spec.durability,
            max_members: self.spec.max_members,
            init: if self.life.origin.is_some() { Init::Upload } else { self.spec.init },
            first_version: self.first_version(),
        }
    }

    /// Bytes of the state of the largest shard.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.layout.len(0) * 4 * (1 + self.slots as usize)
    }
}

/// One rank's tenure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Claimed rank.
    pub rank: Rank,
    /// Stable id of the worker.
    pub worker: String,
    /// This life of the worker.
    pub incarnation: Incarnation,
    /// First round that counts it.
    pub from_round: Round,
    /// First round that no longer counts it.
    pub until_round: Option<Round>,
    /// No round from `from_round` on can close without it: it may be told that it has joined, and its first
    /// round does not change any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub confirmed: bool,
}

impl Member {
    /// Whether `round` waits for this member.
    #[must_use]
    pub fn counts_in(&self, round: Round) -> bool {
        self.from_round <= round && self.until_round.is_none_or(|until| round < until)
    }
}

/// The ranks that count: `roster.<tenant>.<job>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    /// Which life of the job.
    pub job: Incarnation,
    /// Grows with every change.
    pub epoch: Epoch,
    /// All founding members have joined; rounds may close.
    pub started: bool,
    /// Present and recent members; at most one tenure of a rank counts in any round.
    pub members: Vec<Member>,
    /// Whoever has read this roster has read the job's settings up to this revision, if the job's record was read
    /// after it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub revision: u32,
}

fn is_zero<N: Default + PartialEq>(number: &N) -> bool {
    *number == N::default()
}

impl Roster {
    /// The roster of a life that nobody has joined yet.
    #[must_use]
    pub fn new(job: Incarnation) -> Self {
        Self { job, epoch: 1, started: false, members: Vec::new(), revision: 0 }
    }

    /// The members that `round` waits for, in no particular order.
    pub fn of_round(&self, round: Round) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.counts_in(round))
    }

    /// The life that holds `rank`, where it is one of the worker `id`.
    #[must_use]
    pub fn former_life(&self, rank: Rank, id: &str) -> Option<Incarnation> {
        let holds =
            |member: &&Member| member.rank == rank && member.worker == id && member.until_round.is_none();
        self.members.iter().find(holds).map(|member| member.incarnation)
    }

    /// As much of it as a worker's life needs to know of itself: of thousands of members, to each of thousands.
    #[must_use]
    pub fn concerning(&self, worker: Incarnation) -> Self {
        let members = self.tenure(worker).into_iter().cloned().collect();
        Self { members, ..*self }
    }

    /// The tenure of a worker's life.
    #[must_use]
    pub fn tenure(&self, worker: Incarnation) -> Option<&Member> {
        self.members.iter().find(|member| member.incarnation == worker)
    }
}

/// Which invoker serves which partition: `placement` for the shared pool, `placement.<pool>` for others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// By partition, from the pool's first one on.
    pub partitions: Vec<PlacedPartition>,
    /// The pool's first partition.
    #[serde(default, skip_serializing_if = "is_first")]
    pub first: Partition,
}

/// The holder of one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedPartition {
    /// Grows whenever the holder changes.
    pub epoch: Epoch,
    /// Invoker id; `None` while nobody serves it.
    pub holder: Option<String>,
}

/// When each partition's stream was created: `streams` (rule P16).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    /// Nanoseconds since the epoch by the broker's clock, by partition.
    pub created: Vec<i64>,
}

/// The store in force: `store` (rule P26).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRecord {
    /// Its data directory.
    pub id: StoreId,
    /// Where that was, for people who have to find it.
    pub location: String,
}

/// Right to be the only writer of some role: `lease.<role>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Who holds it.
    pub holder: Incarnation,
    /// Grows with every renewal; a lease that stands still for its whole term may be taken.
    pub renewals: u64,
}

/// A contribution about to be folded alone after an unclean takeover: `suspect.<partition>` (rule P18).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspect {
    /// Stream sequence of the message.
    pub sequence: u64,
    /// Creation of the stream that gave the sequence.
    pub stream_created: i64,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// The invoker that tries.
    pub invoker: String,
}

/// What an invoker tells about itself, by core NATS on `thalweg.beat.invoker.<id>`, or
/// `thalweg.beat.pool.<pool>.<id>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InvokerBeat {
    /// Its id.
    pub invoker: String,
    /// What it is doing.
    pub state: InvokerState,
    /// Partitions it holds, with their epochs.
    pub partitions: Vec<(Partition, Epoch)>,
    /// Bytes of contributions folded and of results committed, per second of busy time; 0 before the first. Both cost
    /// about the same, so this is the same for jobs of few and of many workers.
    pub service_bytes_per_s: f64,
    /// Share of the time since the last beat spent working, 0 to 1.
    pub busy: f64,
    /// Messages held or parked, waiting for their round.
    pub held_messages: u64,
    /// Bytes of payload in memory.
    pub held_bytes: u64,
    /// CPUs it may use.
    pub cpu_quota: f64,
    /// What jobs have asked of it since the last beat, at most [`MAX_BEAT_JOBS`](crate::limits::MAX_BEAT_JOBS).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub jobs: Vec<JobLoad>,
}

/// What one job has asked of one invoker in some time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobLoad {
    /// Which.
    pub job: JobKey,
    /// The highest round of which a shard has been committed; 0 for none.
    pub round: Round,
    /// Rounds whose first shard has been committed in this time.
    pub rounds: u64,
    /// Bytes of contributions in commits.
    pub bytes: u64,
    /// Sum over rounds of the longest time from a shard's last contribution (when the broker stored it) to its commit, as
    /// far as there have been commits in this time, milliseconds.
    pub delay_ms: u64,
    /// Bytes of results in commits, those of partial ones included.
    #[serde(default)]
    pub result_bytes: u64,
    /// Shards of which a round has been committed.
    #[serde(default)]
    pub shards: u64,
    /// Time since the first commit of `round`, milliseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub age_ms: u64,
}

impl JobLoad {
    /// A job that has asked for nothing yet.
    #[must_use]
    pub fn new(job: JobKey) -> Self {
        Self { job, round: 0, rounds: 0, bytes: 0, delay_ms: 0, result_bytes: 0, shards: 0, age_ms: 0 }
    }
}

/// What an invoker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InvokerState {
    /// Not yet able to take partitions.
    Starting,
    /// Ready for work.
    Ready,
    /// Leaving: gives its partitions up and stops.
    Draining,
}

/// Registry key of a job.
#[must_use]
pub fn job_key(key: &JobKey) -> String {
    format!("job.{}.{}", key.tenant, key.job)
}

/// Registry key of a job's roster.
#[must_use]
pub fn roster_key(key: &JobKey) -> String {
    format!("roster.{}.{}", key.tenant, key.job)
}

/// Registry key of the shared pool's placement; those of all pools begin with it.
pub const PLACEMENT_KEY: &str = "placement";

/// Registry key of a pool's placement.
#[must_use]
pub fn placement_key(pool: Option<&Name>) -> String {
    pool.map_or_else(|| PLACEMENT_KEY.to_owned(), |pool| format!("{PLACEMENT_KEY}.{pool}"))
}
/// Registry key of the streams' creation times.
pub const STREAMS_KEY: &str = "streams";
/// Registry key of the store in force.
pub const STORE_KEY: &str = "store";

/// Registry key of a role's lease.
#[must_use]
pub fn lease_key(role: &str) -> String {
    format!("lease.{role}")
}

/// Registry key of a partition's suspect.
#[must_use]
pub fn suspect_key(partition: Partition) -> String {
    format!("suspect.{partition}")
}

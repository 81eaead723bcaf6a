//! The contract of every store backend.

use async_trait::async_trait;
use bytes::Bytes;
use thalweg_protocol::{
    Commit, CommitOutcome, Epoch, ErrorCode, Head, Incarnation, Ledger, OpenRound, Partial, PartialCommit,
    Round, ShardIndex, StoreJob, Version, WireError,
};

/// One version of one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardState {
    /// Where the shard stands.
    pub head: Head,
    /// What its newest round contains.
    pub ledger: Ledger,
    /// Parameters, followed by optimizer slots when they were asked for; f32 little endian.
    pub values: Bytes,
}

/// Where one shard stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The version, and how much has been folded towards the next one.
    pub head: Head,
    /// What its newest round contains.
    pub ledger: Ledger,
    /// What the open round contains, where it has partial commits.
    pub partial: Option<Partial>,
}

/// An open round: where its shard stands, what is in it, and the suspended fold.
pub type OpenFold = (Head, Partial, Bytes);

/// Why a store did not do what was asked. A lost race is no error: see [`CommitOutcome`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The store refuses; asking again changes nothing unless the code says so.
    #[error(transparent)]
    Refused(#[from] WireError),
    /// The store cannot be asked now, or did not answer in time; whether it acted is unknown.
    #[error("store unavailable: {0}")]
    Unavailable(String),
}

impl StoreError {
    /// A refusal.
    #[must_use]
    pub fn refused(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Refused(WireError::new(code, message))
    }

    /// The code for senders and metrics.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused(error) => error.code,
            Self::Unavailable(_) => ErrorCode::Unavailable,
        }
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.code().is_retryable()
    }

    /// The error as it came over the wire.
    pub(crate) fn from_wire(error: WireError) -> Self {
        match error.code {
            ErrorCode::Unavailable => Self::Unavailable(error.message),
            _ => Self::Refused(error),
        }
    }

    /// The error as it crosses the wire.
    #[must_use]
    pub fn to_wire(&self) -> WireError {
        match self {
            Self::Refused(error) => error.clone(),
            Self::Unavailable(text) => WireError::new(ErrorCode::Unavailable, text.clone()),
        }
    }
}

/// Storage of shards. Every method may be called again after an error or a cancelled call: all are
/// idempotent, and none leaves a shard half changed.
#[async_trait]
pub trait ShardStore: std::fmt::Debug + Send + Sync + 'static {
    /// Registers a job.
    ///
    /// # Behavior
    /// - New incarnation: all shards exist at version 0 when the job starts from zeros; otherwise they
    ///   exist after [`Self::activate`].
    /// - Known incarnation with the same description: nothing happens.
    /// - Known incarnation with another description: refused with `spec_mismatch`.
    async fn create(&self, job: StoreJob) -> Result<(), StoreError>;

    /// Stores one shard's first state under `upload`: its parameters (`4 * elements` bytes; slots start at zero), or
    /// parameters and slots (`4 * (1 + slots) * elements` bytes).
    ///
    /// # Behavior
    /// - Another upload of the same shard that is not activated is replaced.
    /// - After activation of the same upload: nothing happens.
    /// - After activation of another upload: refused with `spec_mismatch`.
    /// - Wrong length: refused with `wrong_shape`.
    async fn upload(
        &self,
        job: Incarnation,
        upload: Incarnation,
        shard: ShardIndex,
        parameters: Bytes,
    ) -> Result<(), StoreError>;

    /// Makes a complete upload the job's first version.
    ///
    /// # Behavior
    /// - All shards uploaded: the job has its first version from now on, at the job's durability level.
    /// - The same upload again: nothing happens.
    /// - Some shard missing: refused with `not_ready`. Another upload active: `spec_mismatch`.
    async fn activate(&self, job: Incarnation, upload: Incarnation) -> Result<(), StoreError>;

    /// Where `count` shards from `first` on stand (fewer at the end of the job).
    ///
    /// Refused with `not_ready` before activation.
    async fn heads(&self, job: Incarnation, first: ShardIndex, count: u32) -> Result<Vec<Head>, StoreError>;

    /// Reads one shard, with its optimizer slots if wanted. Head, ledger and values belong together.
    async fn fetch(&self, job: Incarnation, shard: ShardIndex, slots: bool)
    -> Result<ShardState, StoreError>;

    /// Where one shard stands, what its newest round contains and what its open round does; without any values.
    /// The only call, with those of partial commits, whose head tells `fold_count`: for all others the open round does
    /// not exist.
    async fn fetch_head(&self, job: Incarnation, shard: ShardIndex) -> Result<Standing, StoreError>;

    /// Replaces a shard's state (`4 * (1 + slots) * elements` bytes) if it stands where expected.
    ///
    /// # Behavior
    /// - Expected head in place: [`CommitOutcome::Committed`], at the job's durability level.
    /// - The very commit is the current state: [`CommitOutcome::AlreadyCommitted`], likewise.
    /// - Anything else, another fold count too: [`CommitOutcome::Conflict`] with the head in place.
    /// - A fence asks for a newer roster: [`CommitOutcome::StaleRoster`].
    /// - Unknown job: refused with `gone`. A commit never creates a shard.
    async fn commit(&self, commit: Commit, state: Bytes) -> Result<CommitOutcome, StoreError>;

    /// Changes what the open round of a shard contains, if it stands where expected. The state stays what it is; a
    /// commit of the round has to expect the new fold count.
    ///
    /// # Behavior
    /// - Expected head in place: [`CommitOutcome::Committed`], at the job's durability level.
    /// - The very commit is in place: [`CommitOutcome::AlreadyCommitted`], likewise.
    /// - Anything else, and a fence: as [`Self::commit`].
    /// - More than `4 * elements` + [`thalweg_protocol::limits::PARTIAL_OVERHEAD_BYTES`]: refused with `wrong_shape`.
    async fn commit_partial(&self, commit: PartialCommit, fold: Bytes) -> Result<CommitOutcome, StoreError>;

    /// What the open round of a shard contains, with the suspended fold; `None` where nothing was folded yet.
    async fn fetch_partial(
        &self,
        job: Incarnation,
        shard: ShardIndex,
    ) -> Result<Option<OpenFold>, StoreError>;

    /// Open rounds with partial commits, in the order of job and shard: those behind `after`, at most `limit`
    /// (and [`thalweg_protocol::limits::MAX_OPEN_ROUNDS`]).
    async fn open_rounds(
        &self,
        after: Option<(Incarnation, ShardIndex)>,
        limit: u32,
    ) -> Result<Vec<OpenRound>, StoreError>;

    /// From `from_round` on, refuses commits closed by a roster older than `epoch`; returns the highest
    /// version of any shard at that moment: a round at or below it may have closed without the roster. An open round
    /// that somebody was folded into by an older roster begins anew.
    async fn fence(&self, job: Incarnation, epoch: Epoch, from_round: Round) -> Result<Version, StoreError>;

    /// Forgets a job and its bytes. A job that is not there: nothing happens.
    async fn delete(&self, job: Incarnation) -> Result<(), StoreError>;

    /// Keeps one version of all shards readable: the newest of any shard, which the others reach with their next
    /// commits; of a job that has lost rounds, the newest that all shards still have whole. Returns the version, and
    /// whether all shards have it.
    ///
    /// # Behavior
    /// - The same hold again: renewed, the same version.
    /// - Not renewed or read for [`thalweg_protocol::limits::HOLD_SECONDS`], or the store restarted: forgotten.
    /// - More than [`thalweg_protocol::limits::MAX_HOLDS`] at once: refused with `limit`.
    async fn hold(&self, job: Incarnation, hold: Incarnation) -> Result<(Version, bool), StoreError>;

    /// Reads one shard at the version of a hold, and renews it.
    ///
    /// Refused with `not_ready` while the shard has not come there, with `expired` when the hold was forgotten.
    async fn fetch_held(
        &self,
        job: Incarnation,
        hold: Incarnation,
        shard: ShardIndex,
        slots: bool,
    ) -> Result<ShardState, StoreError>;

    /// Forgets a hold. One that is not there: nothing happens.
    async fn release(&self, job: Incarnation, hold: Incarnation) -> Result<(), StoreError>;

    /// The jobs in the store.
    async fn list(&self) -> Result<Vec<StoreJob>, StoreError>;
}

//! What happens to jobs, for people and dashboards: JSON on `thalweg.event.<tenant>.<job>`, kept for a while in the
//! stream of events. Nothing in the protocol depends on them, and one may get lost with the gateway that saw it.

use serde::{Deserialize, Serialize};

use crate::{ErrorCode, Rank, Round, Version};

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Event {
    /// When the leading gateway saw it, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Whose job.
    pub tenant: String,
    /// Its name.
    pub job: String,
    /// Which life of it.
    pub incarnation: String,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A new life of a job.
    Created {
        /// Its aggregation function.
        function: String,
        /// Founding members.
        workers: u32,
        /// Elements of the model.
        elements: u64,
        /// The version it goes on from.
        version: Version,
    },
    /// Its first parameters are there.
    Ready,
    /// All founding members have joined.
    Started,
    /// A worker has joined.
    Joined {
        /// Its rank.
        rank: Rank,
        /// Its id.
        worker: String,
        /// First round that counts it.
        from_round: Round,
    },
    /// A worker has left, or its lease has ended.
    Left {
        /// Its rank.
        rank: Rank,
        /// Its id.
        worker: String,
    },
    /// No round is closed any more.
    Paused {
        /// Why.
        reason: String,
    },
    /// Rounds are closed again.
    Resumed,
    /// Settings change.
    Settings {
        /// Number of the settings.
        revision: u32,
        /// First round with them.
        from_round: Round,
    },
    /// The job has ended, by itself or because somebody said so.
    Failed {
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
    /// The job is gone.
    Deleted,
}

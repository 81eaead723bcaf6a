//! Errors that travel: a stable code for programs, a sentence for people.

use serde::{Deserialize, Serialize};

use crate::limits;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, retry $retry:literal;)*) => {
        /// Stable codes of wire errors. Programs match on these; texts may change.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
        }

        impl ErrorCode {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The code as text, for logs, metrics and JSON.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// Whether the same request may succeed later without a change by the sender.
            #[must_use]
            pub fn is_retryable(self) -> bool {
                match self { $(Self::$name => $retry),* }
            }
        }
    };
}

codes! {
    /// A job specification that cannot be run.
    InvalidSpec = "invalid_spec", retry false;
    /// A documented limit was hit.
    Limit = "limit", retry false;
    /// No such job.
    UnknownJob = "unknown_job", retry false;
    /// The job exists with another specification.
    SpecMismatch = "spec_mismatch", retry false;
    /// The message belongs to a job incarnation that is gone.
    Gone = "gone", retry false;
    /// The worker's rank belongs to another incarnation now.
    LeaseLost = "lease_lost", retry false;
    /// Another live worker holds the rank.
    RankTaken = "rank_taken", retry false;
    /// The payload's length does not match the shard.
    WrongShape = "wrong_shape", retry false;
    /// An element type that is not aggregated.
    WrongDtype = "wrong_dtype", retry false;
    /// The bytes changed on the way.
    BadChecksum = "bad_checksum", retry true;
    /// Not a message of this protocol.
    Malformed = "malformed", retry false;
    /// The two sides speak different wire versions.
    WireVersion = "wire_version", retry false;
    /// A NaN or an infinity, refused by the job's policy.
    NonFinite = "non_finite", retry false;
    /// A contribution for a round that cannot be open yet.
    RoundAhead = "round_ahead", retry false;
    /// Worker and store disagree about the past: state was lost (rule P27).
    Diverged = "diverged", retry false;
    /// A contribution kills every invoker that folds it.
    PoisonContribution = "poison_contribution", retry false;
    /// The job has failed; the message says why.
    JobFailed = "job_failed", retry false;
    /// Somebody has ended the job; the message says why.
    Aborted = "aborted", retry false;
    /// What was asked about is not kept any more.
    Expired = "expired", retry false;
    /// The store's disk has no room for another job.
    StorageFull = "storage_full", retry false;
    /// The store that should hold the job is not the one that answered, or is empty.
    StoreMismatch = "store_mismatch", retry false;
    /// Initial parameters are not there yet.
    NotReady = "not_ready", retry true;
    /// The component that must answer is not there, or not yet.
    Unavailable = "unavailable", retry true;
    /// The component that must answer failed in an unexpected way; its log says more.
    Internal = "internal", retry true;
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error as it crosses the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[error("{message} [{code}]")]
pub struct WireError {
    /// What programs look at.
    pub code: ErrorCode,
    /// What people read: what happened and what to do.
    pub message: String,
}

impl WireError {
    /// An error; `message` is cut at [`limits::MAX_ERROR_BYTES`].
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > limits::MAX_ERROR_BYTES {
            let cut = message.floor_char_boundary(limits::MAX_ERROR_BYTES - '…'.len_utf8());
            message.truncate(cut);
            message.push('…');
        }
        Self { code, message }
    }

    /// Whether the same request may succeed later without a change by the sender.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.code.is_retryable()
    }
}

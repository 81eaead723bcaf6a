//! Errors of the SDK; every text says what to do.

use std::time::Duration;

use thalweg_protocol::{ErrorCode, WireError};

/// Why a call did not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The NATS URL or credentials cannot be used.
    #[error("cannot connect to NATS: {0}")]
    Connect(String),
    /// Nobody answered in time.
    #[error("waited {after:?} for {what}, in vain: {hint}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
        /// What to look at.
        hint: String,
    },
    /// A component refused; [`Error::code`] tells which error it is.
    #[error(transparent)]
    Refused(#[from] WireError),
    /// The job has no tensor of this name.
    #[error("the job has no tensor {0:?}")]
    UnknownTensor(String),
    /// A slice of the wrong length.
    #[error("tensor {tensor:?} has {expected} elements, the slice {actual}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Elements it has.
        expected: usize,
        /// Elements given.
        actual: usize,
    },
    /// The tensor was pushed twice in a round.
    #[error("tensor {0:?} was pushed already in this round: pull the others first")]
    AlreadyPushed(String),
    /// The tensor's result was pulled already in this round.
    #[error("the result of tensor {0:?} was pulled already in this round")]
    AlreadyPulled(String),
    /// Waiting could never end, because another tensor has to be pushed before.
    #[error("waiting for tensor {waiting:?} would never end: push tensor {missing:?} first")]
    NeverEnds {
        /// What was waited for.
        waiting: String,
        /// What has to be pushed.
        missing: String,
    },
    /// A snapshot's file cannot be read or written.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// What the file system, or the file's contents, say.
        reason: String,
        /// The kind of it: `NotFound` for a file that is not there.
        kind: std::io::ErrorKind,
    },
    /// The worker has been shut down.
    #[error("this worker has left its job")]
    Left,
}

impl Error {
    /// The stable code, where a component refused.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(error) => Some(error.code),
            _ => None,
        }
    }
}

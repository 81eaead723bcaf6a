//! How commands fail: an exit code, a sentence for people, an object for programs.

use serde_json::{Value, json};
use thalweg_broker::RegistryError;
use thalweg_sdk::{Error, ErrorCode};

/// Errors of the command line's own making.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Complaint {
    /// What was asked for is not there.
    #[error("{0}")]
    NotFound(String),
    /// What was asked for is not done.
    #[error("{0}")]
    Refused(String),
    /// Arguments that do not go together.
    #[error("{0}")]
    Usage(String),
}

/// Exit code and stable name of an error that ends the program.
fn classify(error: &anyhow::Error) -> (u8, &'static str) {
    let of_code = |code: ErrorCode| match code {
        ErrorCode::UnknownJob => 3,
        // Somebody has answered, and waiting alone does not help.
        ErrorCode::NotReady => 4,
        code if code.is_retryable() => 5,
        _ => 4,
    };
    if let Some(complaint) = error.downcast_ref::<Complaint>() {
        return match complaint {
            Complaint::NotFound(_) => (3, "not_found"),
            Complaint::Refused(_) => (4, "refused"),
            Complaint::Usage(_) => (2, "usage"),
        };
    }
    if let Some(error) = error.downcast_ref::<RegistryError>() {
        let code = error.to_wire().code;
        return (of_code(code), code.as_str());
    }
    match error.downcast_ref::<Error>() {
        Some(Error::TimedOut { .. }) => return (5, "timed_out"),
        Some(Error::Connect(_)) => return (1, "connect"),
        Some(Error::Refused(error)) => return (of_code(error.code), error.code.as_str()),
        Some(Error::File { kind: std::io::ErrorKind::NotFound, .. }) => return (3, "not_found"),
        Some(Error::File { .. }) => return (1, "file"),
        _ => {}
    }
    match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
        Some(std::io::ErrorKind::NotFound) => (3, "not_found"),
        _ => (1, "failed"),
    }
}

/// Exit code of an error that ends the program.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    classify(error).0
}

/// The error for programs.
pub(crate) fn describe(error: &anyhow::Error) -> Value {
    let message = match error.downcast_ref::<Error>() {
        // Its code stands beside it.
        Some(Error::Refused(error)) => error.message.clone(),
        _ => format!("{error:#}"),
    };
    json!({ "error": { "code": classify(error).1, "message": message } })
}

//! Requests in frames, and retrying with jitter.

use std::time::Duration;

use async_nats::{Client, Request, RequestErrorKind};
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use thalweg_protocol::{ErrorCode, FrameError, Kind, WireError, frame};

/// Why a request has no reply.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Nobody listens on the subject (status 503).
    #[error("nobody answers on {0}")]
    NoResponders(String),
    /// The request is larger than this server allows.
    #[error("a request of {0} bytes: the NATS server allows {1} (max_payload)")]
    TooLarge(usize, usize),
    /// No reply in time.
    #[error("no reply on {0} in time")]
    TimedOut(String),
    /// The connection failed.
    #[error("request on {0}: {1}")]
    Connection(String, String),
    /// The reply is not a frame of this wire version.
    #[error("reply on {0}: {1}")]
    Frame(String, FrameError),
}

impl RequestError {
    /// As an error of whoever did not answer, or not in a way that can be understood.
    #[must_use]
    pub fn to_wire(&self) -> WireError {
        let code = match self {
            Self::Frame(_, error) => error.to_wire().code,
            Self::TooLarge(..) => ErrorCode::Limit,
            Self::NoResponders(_) | Self::TimedOut(_) | Self::Connection(..) => ErrorCode::Unavailable,
        };
        WireError::new(code, self.to_string())
    }
}

/// Sends one request and waits for its one reply.
///
/// Cancel safe in the sense that nothing is left behind; the other side may still act on it.
///
/// # Errors
/// [`RequestError`]; all but `Frame` and `TooLarge` may be tried again.
pub async fn request<Q: Serialize, A: DeserializeOwned>(
    client: &Client,
    subject: &str,
    kinds: (Kind, Kind),
    query: &Q,
    payload: &[u8],
    timeout: Duration,
) -> Result<(A, Bytes), RequestError> {
    let frame = frame::seal(kinds.0, query, payload);
    if frame.len() > client.max_payload() {
        return Err(RequestError::TooLarge(frame.len(), client.max_payload()));
    }
    let request = Request::new().payload(frame).timeout(Some(timeout));
    let reply =
        client.send_request(subject.to_owned(), request).await.map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => RequestError::NoResponders(subject.to_owned()),
            RequestErrorKind::TimedOut => RequestError::TimedOut(subject.to_owned()),
            _ => RequestError::Connection(subject.to_owned(), error.to_string()),
        })?;
    frame::open(kinds.1, &reply.payload).map_err(|error| RequestError::Frame(subject.to_owned(), error))
}

/// Exponential back-off with full jitter: `delay()` is uniform in `0..=min(cap, base * 2^n)`.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    /// Starts at `base` and never waits longer than `cap`.
    #[must_use]
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempt: 0 }
    }

    /// The next delay.
    pub fn delay(&mut self) -> Duration {
        let ceiling = self.base.saturating_mul(1 << self.attempt.min(16)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        ceiling.mul_f64(rand::random::<f64>())
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

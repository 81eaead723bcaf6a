//! Messages that nobody could process: reading them, putting them back, removing them.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    jetstream::{self, stream::RawMessageErrorKind},
};
use bytes::Bytes;
use futures::StreamExt as _;
use thalweg_protocol::{JobKey, subjects};

use crate::events::{StreamError, behind, find, read};

/// Longest wait for a letter that should be there.
const PATIENCE: Duration = Duration::from_secs(10);

/// A message that nobody could process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its number, to ask for it again.
    pub sequence: u64,
    /// When it was put aside, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Whose it is, where that could be read.
    pub job: Option<JobKey>,
    /// Stable code of the reason.
    pub code: String,
    /// The reason, for people.
    pub reason: String,
    /// Partition in whose queue it was.
    pub partition: String,
    /// Subject that it was sent to, where that is known.
    pub subject: Option<String>,
    /// Length of its frame.
    pub frame_bytes: u64,
    /// Its bytes; empty in a list without them.
    pub frame: Bytes,
}

/// Which dead letters.
#[derive(Clone, Debug, Default)]
pub struct DeadLetterQuery {
    /// Only those of one job.
    pub job: Option<JobKey>,
    /// Only those behind this one.
    pub after: Option<u64>,
    /// At most so many.
    pub limit: usize,
    /// With their frames, each up to the broker's `max_payload`.
    pub frames: bool,
}

/// Why a dead letter was not put back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequeueError {
    /// It was put aside by an older release.
    #[error("dead letter {0}: nobody noted which subject it was sent to, so it can only be removed")]
    NoSubject(u64),
    /// JetStream does not answer.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

fn letter(sequence: u64, at: i128, subject: &str, headers: &HeaderMap, frame: Bytes) -> DeadLetter {
    let text = |name: &str| headers.get(name).map(|value| value.as_str().to_owned());
    let job = subject.strip_prefix("thalweg.deadletter.").and_then(|rest| {
        let (tenant, job) = rest.split_once('.')?;
        Some(JobKey { tenant: tenant.parse().ok()?, job: job.parse().ok()? })
    });
    DeadLetter {
        sequence,
        at_ms: u64::try_from(at / 1_000_000).unwrap_or(0),
        job: job.filter(|job| job.tenant.as_str() != "_"),
        code: text("Thalweg-Code").unwrap_or_default(),
        reason: text("Thalweg-Reason").unwrap_or_default(),
        partition: text("Thalweg-Partition").unwrap_or_default(),
        subject: text("Thalweg-Subject"),
        // The broker's word, where it was asked for headers only.
        frame_bytes: text("Nats-Msg-Size").and_then(|size| size.parse().ok()).unwrap_or(frame.len() as u64),
        frame,
    }
}

/// Dead letters, oldest first; also whether there are more behind them.
///
/// # Errors
/// When JetStream does not answer.
pub async fn dead_letters(
    jetstream: &jetstream::Context,
    query: &DeadLetterQuery,
) -> Result<(Vec<DeadLetter>, bool), StreamError> {
    let filter = match &query.job {
        Some(key) => subjects::dead_letter(Some(key)),
        None => subjects::DEAD_LETTER_SUBJECTS.to_owned(),
    };
    let stream = subjects::DEAD_LETTER_STREAM;
    let (mut messages, waiting) = read(jetstream, stream, filter, behind(query.after), !query.frames).await?;
    let waiting = usize::try_from(waiting).unwrap_or(usize::MAX);
    let mut letters = Vec::new();
    while letters.len() < waiting.min(query.limit) {
        let Ok(Some(message)) = tokio::time::timeout(PATIENCE, messages.next()).await else { break };
        let message = message.map_err(StreamError::new)?;
        let info = message.info().map_err(StreamError::new)?;
        let (sequence, at) = (info.stream_sequence, info.published.unix_timestamp_nanos());
        let headers = message.headers.clone().unwrap_or_default();
        letters.push(letter(sequence, at, &message.subject, &headers, message.payload.clone()));
    }
    Ok((letters, waiting > query.limit))
}

/// One dead letter; `None` when there is none with this number.
///
/// # Errors
/// When JetStream does not answer.
pub async fn dead_letter(
    jetstream: &jetstream::Context,
    sequence: u64,
) -> Result<Option<DeadLetter>, StreamError> {
    if sequence == 0 {
        // Sequences count from 1; the broker takes 0 for a request without one.
        return Ok(None);
    }
    let stream = find(jetstream, subjects::DEAD_LETTER_STREAM).await?;
    match stream.get_raw_message(sequence).await {
        Ok(message) => {
            let at = message.time.unix_timestamp_nanos();
            Ok(Some(letter(sequence, at, &message.subject, &message.headers, message.payload)))
        }
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(StreamError::new(error)),
    }
}

/// Puts a dead letter back into its queue, as it came, and removes it from the dead letters. Whoever reads it judges
/// it anew. Cut short, it may be in both places; a contribution that comes twice counts once.
///
/// # Errors
/// [`RequeueError`].
pub async fn requeue(jetstream: &jetstream::Context, letter: &DeadLetter) -> Result<(), RequeueError> {
    let subject = letter.subject.clone().ok_or(RequeueError::NoSubject(letter.sequence))?;
    let published = jetstream.publish(subject, letter.frame.clone()).await.map_err(StreamError::new)?;
    published.await.map_err(StreamError::new)?;
    Ok(remove_dead_letter(jetstream, letter.sequence).await?)
}

/// Removes a dead letter for good.
///
/// # Errors
/// When there is none, or JetStream does not answer.
pub async fn remove_dead_letter(jetstream: &jetstream::Context, sequence: u64) -> Result<(), StreamError> {
    let stream = find(jetstream, subjects::DEAD_LETTER_STREAM).await?;
    stream.delete_message(sequence).await.map(drop).map_err(StreamError::new)
}

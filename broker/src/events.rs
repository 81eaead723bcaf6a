//! What JetStream keeps of what happened to jobs.

use async_nats::jetstream::{
    self,
    consumer::{self, DeliverPolicy, pull},
    context::GetStreamErrorKind,
    stream,
};
use futures::{Stream, StreamExt as _};
use thalweg_protocol::{Event, JobKey, subjects};

/// Which events.
#[derive(Clone, Debug, Default)]
pub struct EventsQuery {
    /// Only this job's.
    pub job: Option<JobKey>,
    /// Go on with what happens from now on, for ever; without it the stream ends with the newest event.
    pub follow: bool,
    /// Only so many of the past, the newest; all that are kept (a week, 64 MiB) if `None`.
    pub last: Option<usize>,
    /// Only those behind the one with this sequence; then `last` counts for nothing.
    pub after: Option<u64>,
}

/// A stream that cannot be read; ask again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("NATS: {0}")]
pub struct StreamError(String);

impl StreamError {
    pub(crate) fn new(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Opens a stream; one that is not there says who makes it.
pub(crate) async fn find(jetstream: &jetstream::Context, name: &str) -> Result<stream::Stream, StreamError> {
    jetstream.get_stream(name).await.map_err(|error| match error.kind() {
        GetStreamErrorKind::JetStream(error)
            if error.error_code() == jetstream::ErrorCode::STREAM_NOT_FOUND =>
        {
            StreamError::new(
                "no gateway has run on this NATS server yet: start one (thalweg up, or thalweg gateway)",
            )
        }
        _ => StreamError::new(error),
    })
}

/// Reads a stream through a consumer that goes with it; also tells how many messages there are now.
pub(crate) async fn read(
    jetstream: &jetstream::Context,
    stream: &str,
    filter: String,
    deliver_policy: DeliverPolicy,
    headers_only: bool,
) -> Result<(pull::Ordered, u64), StreamError> {
    let stream = find(jetstream, stream).await?;
    let config = pull::OrderedConfig {
        filter_subject: filter,
        deliver_policy,
        headers_only,
        ..pull::OrderedConfig::default()
    };
    let consumer: consumer::Consumer<pull::OrderedConfig> =
        stream.create_consumer(config).await.map_err(StreamError::new)?;
    let waiting = consumer.cached_info().num_pending;
    Ok((consumer.messages().await.map_err(StreamError::new)?, waiting))
}

/// Everything behind a message; sequences count from 1.
pub(crate) fn behind(sequence: Option<u64>) -> DeliverPolicy {
    match sequence {
        Some(after) if after > 0 => {
            DeliverPolicy::ByStartSequence { start_sequence: after.saturating_add(1) }
        }
        _ => DeliverPolicy::All,
    }
}

/// What happens to jobs, oldest first, each with its sequence in the stream.
///
/// # Errors
/// When JetStream does not answer, at once or later; go on after the last sequence that was seen.
pub async fn events(
    jetstream: &jetstream::Context,
    query: EventsQuery,
) -> Result<impl Stream<Item = Result<(u64, Event), StreamError>> + Send + Unpin + use<>, StreamError> {
    let filter = match &query.job {
        Some(key) => subjects::event(key.tenant.as_str(), key.job.as_str()),
        None => subjects::EVENT_SUBJECTS.to_owned(),
    };
    let (messages, waiting) =
        read(jetstream, subjects::EVENT_STREAM, filter, behind(query.after), false).await?;
    let waiting = usize::try_from(waiting).unwrap_or(usize::MAX);
    let last = query.last.filter(|_| query.after.is_none());
    let skip = last.map_or(0, |last| waiting.saturating_sub(last));
    let take = if query.follow { usize::MAX } else { waiting };
    let events = messages.take(take).skip(skip).filter_map(async |message| {
        let message = match message {
            Ok(message) => message,
            Err(error) => return Some(Err(StreamError::new(error))),
        };
        let sequence = match message.info() {
            Ok(info) => info.stream_sequence,
            Err(error) => return Some(Err(StreamError::new(error))),
        };
        // One that a newer release wrote in another form is left out.
        serde_json::from_slice::<Event>(&message.payload).ok().map(|event| Ok((sequence, event)))
    });
    Ok(events.boxed())
}

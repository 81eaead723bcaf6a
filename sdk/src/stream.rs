//! What JetStream keeps for people: events, and the messages that nobody could process.

use std::time::Duration;

use async_nats::{
    HeaderMap,
    jetstream::{
        ErrorCode as JetStreamError,
        consumer::{self, DeliverPolicy, pull},
        context::GetStreamErrorKind,
        stream::{self, RawMessageErrorKind},
    },
};
use futures::{Stream, StreamExt as _};
use thalweg_protocol::{ErrorCode, Event, JobKey, WireError, subjects};

use crate::{Client, Error};

/// Which events.
#[derive(Clone, Debug, Default)]
pub struct EventsOptions {
    /// Only this job's.
    pub job: Option<JobKey>,
    /// Go on with what happens from now on, for ever; without it the stream ends with the newest event.
    pub follow: bool,
    /// Only so many of the past, the newest; all that are kept (a week, 64 MiB) if `None`.
    pub last: Option<usize>,
}

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
    /// Its bytes.
    pub frame: bytes::Bytes,
}

fn nats(error: &impl std::fmt::Display) -> Error {
    WireError::new(ErrorCode::Unavailable, format!("JetStream: {error}")).into()
}

fn letter(sequence: u64, at: i128, subject: &str, headers: &HeaderMap, frame: bytes::Bytes) -> DeadLetter {
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
        frame,
    }
}

impl Client {
    async fn stream(&self, name: &str) -> Result<stream::Stream, Error> {
        self.jetstream().get_stream(name).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == JetStreamError::STREAM_NOT_FOUND =>
            {
                let text =
                    "no gateway has run on this NATS server yet: start one (thalweg up, or thalweg gateway)";
                WireError::new(ErrorCode::Unavailable, text).into()
            }
            _ => nats(&error),
        })
    }

    /// Reads a stream from its beginning, or from now on, through a consumer that goes with this call.
    async fn read(
        &self,
        stream: &str,
        filter: String,
        deliver_policy: DeliverPolicy,
    ) -> Result<(consumer::Consumer<pull::OrderedConfig>, u64), Error> {
        let stream = self.stream(stream).await?;
        let config =
            pull::OrderedConfig { filter_subject: filter, deliver_policy, ..pull::OrderedConfig::default() };
        let consumer = stream.create_consumer(config).await.map_err(|error| nats(&error))?;
        let waiting = consumer.cached_info().num_pending;
        Ok((consumer, waiting))
    }

    /// What happens to jobs, oldest first.
    ///
    /// # Errors
    /// When JetStream does not answer; events may be missed while a connection is down, so look at the jobs again
    /// after an error.
    pub async fn events(
        &self,
        options: EventsOptions,
    ) -> Result<impl Stream<Item = Result<Event, Error>> + Unpin + use<>, Error> {
        let filter = match &options.job {
            Some(key) => subjects::event(key.tenant.as_str(), key.job.as_str()),
            None => subjects::EVENT_SUBJECTS.to_owned(),
        };
        let (consumer, waiting) = self.read(subjects::EVENT_STREAM, filter, DeliverPolicy::All).await?;
        let skip = options.last.map_or(0, |last| usize::try_from(waiting).unwrap_or(0).saturating_sub(last));
        let take = if options.follow { usize::MAX } else { usize::try_from(waiting).unwrap_or(usize::MAX) };
        let messages = consumer.messages().await.map_err(|error| nats(&error))?;
        let events = messages.take(take).skip(skip).filter_map(async |message| match message {
            // One that a newer release wrote in another form is left out.
            Ok(message) => serde_json::from_slice::<Event>(&message.payload).ok().map(Ok),
            Err(error) => Some(Err(nats(&error))),
        });
        Ok(events.boxed())
    }

    /// Messages that nobody could process, oldest first, at most `limit`; of one job, if named.
    ///
    /// # Errors
    /// When JetStream does not answer.
    pub async fn dead_letters(&self, job: Option<&JobKey>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let filter = match job {
            Some(key) => subjects::dead_letter(Some(key)),
            None => subjects::DEAD_LETTER_SUBJECTS.to_owned(),
        };
        let (consumer, waiting) = self.read(subjects::DEAD_LETTER_STREAM, filter, DeliverPolicy::All).await?;
        let mut messages = consumer.messages().await.map_err(|error| nats(&error))?;
        let mut letters = Vec::new();
        while letters.len() < usize::try_from(waiting).unwrap_or(usize::MAX).min(limit) {
            let next = tokio::time::timeout(Duration::from_secs(10), messages.next()).await;
            let Ok(Some(message)) = next else { break };
            let message = message.map_err(|error| nats(&error))?;
            let info = message.info().map_err(|error| nats(&error))?;
            let (sequence, at) = (info.stream_sequence, info.published.unix_timestamp_nanos());
            let headers = message.headers.clone().unwrap_or_default();
            letters.push(letter(sequence, at, &message.subject, &headers, message.payload.clone()));
        }
        Ok(letters)
    }

    /// One dead letter; `None` when there is none with this number.
    ///
    /// # Errors
    /// When JetStream does not answer.
    pub async fn dead_letter(&self, sequence: u64) -> Result<Option<DeadLetter>, Error> {
        let stream = self.stream(subjects::DEAD_LETTER_STREAM).await?;
        match stream.get_raw_message(sequence).await {
            Ok(message) => Ok(Some(letter(
                sequence,
                message.time.unix_timestamp_nanos(),
                &message.subject,
                &message.headers,
                message.payload,
            ))),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(nats(&error)),
        }
    }

    /// Puts a dead letter back into its queue, as it came, and removes it from the dead letters. Whoever reads it
    /// judges it anew.
    ///
    /// # Errors
    /// When its subject is not known (it was put aside by an older release), or JetStream does not answer.
    pub async fn requeue(&self, letter: &DeadLetter) -> Result<(), Error> {
        let Some(subject) = letter.subject.clone() else {
            let text = format!(
                "dead letter {}: an older release put it aside, and did not note which subject it was sent to",
                letter.sequence
            );
            return Err(WireError::new(ErrorCode::Malformed, text).into());
        };
        let published = self.jetstream().publish(subject, letter.frame.clone()).await;
        published.map_err(|error| nats(&error))?.await.map_err(|error| nats(&error))?;
        self.remove_dead_letter(letter.sequence).await
    }

    /// Removes a dead letter for good.
    ///
    /// # Errors
    /// When there is none, or JetStream does not answer.
    pub async fn remove_dead_letter(&self, sequence: u64) -> Result<(), Error> {
        let stream = self.stream(subjects::DEAD_LETTER_STREAM).await?;
        stream.delete_message(sequence).await.map(drop).map_err(|error| nats(&error))
    }
}

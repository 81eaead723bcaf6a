//! What JetStream keeps for people: events, and the messages that nobody could process.

use futures::{Stream, StreamExt as _};
pub use thalweg_broker::DeadLetter;
use thalweg_broker::{DeadLetterQuery, EventsQuery, RequeueError, StreamError};
use thalweg_protocol::{ErrorCode, Event, JobKey, WireError};

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

fn nats(error: StreamError) -> Error {
    WireError::new(ErrorCode::Unavailable, error.to_string()).into()
}

impl Client {
    /// What happens to jobs, oldest first.
    ///
    /// # Errors
    /// When JetStream does not answer; events may be missed while a connection is down, so look at the jobs again
    /// after an error.
    pub async fn events(
        &self,
        options: EventsOptions,
    ) -> Result<impl Stream<Item = Result<Event, Error>> + Unpin + use<>, Error> {
        let EventsOptions { job, follow, last } = options;
        let query = EventsQuery { job, follow, last, after: None };
        let events = thalweg_broker::events(self.jetstream(), query).await.map_err(nats)?;
        Ok(events.map(|event| event.map(|(_, event)| event).map_err(nats)))
    }

    /// Messages that nobody could process, oldest first, at most `limit`; of one job, if named.
    ///
    /// # Errors
    /// When JetStream does not answer.
    pub async fn dead_letters(&self, job: Option<&JobKey>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let query = DeadLetterQuery { job: job.cloned(), after: None, limit, frames: true };
        let (letters, _) = thalweg_broker::dead_letters(self.jetstream(), &query).await.map_err(nats)?;
        Ok(letters)
    }

    /// One dead letter; `None` when there is none with this number.
    ///
    /// # Errors
    /// When JetStream does not answer.
    pub async fn dead_letter(&self, sequence: u64) -> Result<Option<DeadLetter>, Error> {
        thalweg_broker::dead_letter(self.jetstream(), sequence).await.map_err(nats)
    }

    /// Puts a dead letter back into its queue, as it came, and removes it from the dead letters. Whoever reads it
    /// judges it anew.
    ///
    /// # Errors
    /// When its subject is not known (it was put aside by an older release), or JetStream does not answer.
    pub async fn requeue(&self, letter: &DeadLetter) -> Result<(), Error> {
        let requeued = thalweg_broker::requeue(self.jetstream(), letter).await;
        requeued.map_err(|error| match error {
            RequeueError::NoSubject(_) => WireError::new(ErrorCode::Malformed, error.to_string()).into(),
            RequeueError::Stream(error) => nats(error),
        })
    }

    /// Removes a dead letter for good.
    ///
    /// # Errors
    /// When there is none, or JetStream does not answer.
    pub async fn remove_dead_letter(&self, sequence: u64) -> Result<(), Error> {
        thalweg_broker::remove_dead_letter(self.jetstream(), sequence).await.map_err(nats)
    }
}

//! Holding a partition: taking it over, pulling from it by credit, giving it up (rules P14, P15, P19).

use std::{collections::HashMap, time::Duration};

use async_nats::{
    Subject,
    jetstream::{
        self, ErrorCode as JetStreamError,
        consumer::{AckPolicy, pull},
        context::GetStreamErrorKind,
    },
};
use futures::TryStreamExt as _;
use thalweg_broker::{Registry, RegistryError};
use thalweg_protocol::{Epoch, Partition, Suspect, subjects, suspect_key};
use tokio::time::Instant;

use crate::metrics;

/// Contributions may wait as long as their round; redelivery comes from a takeover, not from this.
const ACK_WAIT: Duration = Duration::from_secs(600);
/// A pull request ends after this, and is made again.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
/// The server shows that a pull request is alive this often.
const PULL_HEARTBEAT: Duration = Duration::from_secs(2);
/// Silence on a pull request after which it is taken for lost.
const PULL_SILENCE: Duration = Duration::from_secs(5);
/// The attempt at which a contribution that keeps killing invokers is put aside.
const MAX_SUSPECT_ATTEMPTS: u32 = 3;

/// A partition in our hands.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) epoch: Epoch,
    pub(crate) consumer: String,
    pub(crate) stream_created: i64,
    pub(crate) suspect: Option<Suspect>,
    /// Acknowledgement subjects by sequence.
    pub(crate) replies: HashMap<u64, Subject>,
    /// Next sequence of the consumer; a gap means that deliveries were lost on the way.
    next_delivery: u64,
    credit: u64,
    heard: Instant,
}

/// End of a takeover.
#[derive(Debug)]
pub(crate) enum Takeover {
    Held {
        partition: Box<Holding>,
        careful_until: Option<u64>,
        poison: Option<u64>,
    },
    /// Somebody holds it by a newer placement.
    HigherEpoch(Epoch),
}

/// Why a takeover has to be tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeoverError {
    #[error("the stream is missing; gateway or autoscaler recreate it")]
    StreamMissing,
    #[error("another consumer was quicker")]
    Raced,
    #[error("{0}")]
    Broker(String),
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Takes a partition over: removes every consumer of this epoch or an older one, and creates one of our
/// own with a name that was never used, so that buffered acknowledgements of the past hit nothing.
pub(crate) async fn take_over(
    jetstream: &jetstream::Context,
    registry: &Registry,
    invoker: &str,
    partition: Partition,
    epoch: Epoch,
    own: Option<String>,
) -> Result<Takeover, TakeoverError> {
    let broker = |error: &dyn std::fmt::Display| TakeoverError::Broker(error.to_string());
    let stream = jetstream.get_stream(subjects::gradient_stream(partition)).await;
    let stream = stream.map_err(|error| match error.kind() {
        GetStreamErrorKind::JetStream(error) if error.error_code() == JetStreamError::STREAM_NOT_FOUND => {
            TakeoverError::StreamMissing
        }
        _ => broker(&error),
    })?;
    let info = stream.cached_info().clone();
    let consumers: Vec<_> = stream.consumers().try_collect().await.map_err(|error| broker(&error))?;
    let mut unclean = false;
    for consumer in consumers {
        let theirs = subjects::consumer_epoch(&consumer.name);
        if theirs > epoch {
            return Ok(Takeover::HigherEpoch(theirs));
        }
        // Our own consumer of before a reconnect left nothing behind that could have killed anybody.
        unclean |= consumer.num_ack_pending > 0 && own.as_deref() != Some(consumer.name.as_str());
        if let Err(error) = stream.delete_consumer(&consumer.name).await {
            tracing::debug!(%error, consumer = consumer.name, "consumer was gone already");
        }
    }
    let name = subjects::consumer(epoch, rand::random());
    let config = pull::Config {
        durable_name: Some(name.clone()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_ack_pending: -1,
        max_deliver: -1,
        ..pull::Config::default()
    };
    match stream.create_consumer(config).await {
        Ok(_) => {}
        Err(error)
            if error.to_string().contains("10099") || error.to_string().contains("multiple non-filtered") =>
        {
            return Err(TakeoverError::Raced);
        }
        Err(error) => return Err(broker(&error)),
    }
    let stream_created = i64::try_from(info.created.unix_timestamp_nanos()).unwrap_or(i64::MAX);
    let (suspect, poison) = read_suspect(registry, invoker, partition, stream_created).await?;
    let unclean = unclean || suspect.is_some();
    metrics::takeover(unclean);
    tracing::info!(
        partition,
        epoch,
        consumer = name,
        unclean,
        backlog = info.state.messages,
        "holds partition"
    );
    let held = Holding {
        epoch,
        consumer: name,
        stream_created,
        suspect,
        replies: HashMap::new(),
        next_delivery: 1,
        credit: 0,
        heard: Instant::now(),
    };
    let careful_until = (unclean && info.state.messages > 0).then_some(info.state.last_sequence);
    Ok(Takeover::Held { partition: Box::new(held), careful_until, poison })
}

/// The contribution that was being tried when the last holder died, if any; and whether it has been
/// tried too often.
async fn read_suspect(
    registry: &Registry,
    invoker: &str,
    partition: Partition,
    stream_created: i64,
) -> Result<(Option<Suspect>, Option<u64>), RegistryError> {
    let key = suspect_key(partition);
    let (suspect, revision) = registry.get::<Suspect>(&key).await?;
    let Some(suspect) = suspect else { return Ok((None, None)) };
    if suspect.invoker == invoker || suspect.stream_created != stream_created {
        // We are alive, or the message is gone with its stream. A conflict leaves it to the next one.
        let _ = registry.delete(&key, revision).await?;
        return Ok((None, None));
    }
    let poison = (suspect.attempt >= MAX_SUSPECT_ATTEMPTS).then_some(suspect.sequence);
    Ok((Some(suspect), poison))
}

/// Removes the suspect record after progress.
pub(crate) async fn clear_suspect(registry: &Registry, partition: Partition) -> Result<(), RegistryError> {
    let key = suspect_key(partition);
    let (suspect, revision) = registry.get::<Suspect>(&key).await?;
    if suspect.is_some() {
        // A conflict means that another invoker tries now.
        let _ = registry.delete(&key, revision).await?;
    }
    Ok(())
}

impl Holding {
    /// The next pull request, when credit has run low: subject and body.
    pub(crate) fn pull(&mut self, partition: Partition, batch: u64) -> Option<(String, String)> {
        if self.credit > batch / 2 {
            return None;
        }
        self.credit += batch;
        let stream = subjects::gradient_stream(partition);
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{}", self.consumer);
        let body = format!(
            r#"{{"batch":{batch},"expires":{},"idle_heartbeat":{}}}"#,
            PULL_EXPIRES.as_nanos(),
            PULL_HEARTBEAT.as_nanos()
        );
        Some((subject, body))
    }

    /// Notes a delivery; `false` when others before it were lost.
    pub(crate) fn delivered(&mut self, consumer_sequence: u64) -> bool {
        self.credit = self.credit.saturating_sub(1);
        self.heard = Instant::now();
        let in_order = consumer_sequence == self.next_delivery;
        self.next_delivery = consumer_sequence + 1;
        in_order
    }

    /// Notes a status message of a pull request; `false` when the consumer has to be made anew.
    pub(crate) fn status(&mut self, message: &async_nats::Message) -> bool {
        self.heard = Instant::now();
        let code = message.status.map_or(0, |status| status.as_u16());
        let header = |name: &str| {
            let headers = message.headers.as_ref()?;
            headers.get(name)?.as_str().parse::<u64>().ok()
        };
        match code {
            // Heartbeat.
            100 => true,
            // The request has ended: what it had not delivered is no longer coming.
            404 | 408 => {
                self.credit = self.credit.saturating_sub(header("Nats-Pending-Messages").unwrap_or(u64::MAX));
                true
            }
            409 => {
                let text = message.description.as_deref().unwrap_or_default().to_ascii_lowercase();
                if text.contains("consumer deleted")
                    || text.contains("leadership")
                    || text.contains("shutdown")
                {
                    return false;
                }
                self.credit = self.credit.saturating_sub(header("Nats-Pending-Messages").unwrap_or(u64::MAX));
                true
            }
            _ => false,
        }
    }

    /// Whether the pull request has died without a word.
    pub(crate) fn is_silent(&self) -> bool {
        self.heard.elapsed() > PULL_SILENCE
    }
}

//! Holding a partition: taking it over, pulling from it by credit (rules P14, P15, P18).

use std::collections::HashMap;

use async_nats::Subject;
use thalweg_broker::{QueueError, Queues, Registry, RegistryError};
use thalweg_protocol::{Epoch, Partition, Suspect, subjects, suspect_key};

use crate::{core::Millis, metrics};

/// A pull request ends after this, and is made again, nanoseconds.
const PULL_EXPIRES: u64 = 30_000_000_000;
/// The server shows that a pull request is alive this often, nanoseconds.
const PULL_HEARTBEAT: u64 = 2_000_000_000;
/// Silence on a pull request after which it is taken for lost.
const PULL_SILENCE_MS: Millis = 5000;
/// The attempt at which a contribution that keeps killing invokers is put aside.
const MAX_SUSPECT_ATTEMPTS: u32 = 3;

/// A partition in our hands.
#[derive(Debug)]
pub struct Holding {
    /// By which placement.
    pub epoch: Epoch,
    /// Our consumer.
    pub consumer: String,
    /// Creation of the stream.
    pub stream_created: i64,
    /// What was being tried when the last holder died.
    pub suspect: Option<Suspect>,
    /// Acknowledgement subjects by sequence.
    pub replies: HashMap<u64, Subject>,
    /// Next sequence of the consumer; a gap means that deliveries were lost on the way.
    next_delivery: u64,
    credit: u64,
    heard: Millis,
}

/// End of a takeover.
#[derive(Debug)]
pub enum Takeover {
    /// It is ours.
    Held {
        /// The partition.
        partition: Box<Holding>,
        /// As in [`crate::core::Event::Held`].
        careful_until: Option<u64>,
        /// As in [`crate::core::Event::Held`].
        poison: Option<u64>,
    },
    /// Somebody holds it by a newer placement.
    HigherEpoch(Epoch),
}

/// Why a takeover has to be tried again.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Takes a partition over: removes every consumer of this epoch or an older one, and creates one of our
/// own with a name that was never used (`nonce` makes it so), so that buffered acknowledgements of the
/// past hit nothing. `own` is our own consumer of before a reconnect.
///
/// # Errors
/// [`TakeoverError`]: to be tried again.
pub async fn take_over(
    queues: &dyn Queues,
    registry: &Registry,
    invoker: &str,
    (partition, epoch): (Partition, Epoch),
    own: Option<String>,
    nonce: u64,
) -> Result<Takeover, TakeoverError> {
    let queue = queues.look(partition).await?;
    let mut unclean = false;
    for (name, pending) in &queue.consumers {
        let theirs = subjects::consumer_epoch(name);
        if theirs > epoch {
            return Ok(Takeover::HigherEpoch(theirs));
        }
        // Our own consumer of before a reconnect left nothing behind that could have killed anybody.
        unclean |= *pending > 0 && own.as_ref() != Some(name);
        queues.delete_consumer(partition, name).await?;
    }
    let name = subjects::consumer(epoch, nonce);
    queues.create_consumer(partition, &name).await?;
    let stream_created = queue.created;
    let (suspect, poison) = read_suspect(registry, invoker, partition, stream_created).await?;
    let unclean = unclean || suspect.is_some();
    metrics::takeover(unclean);
    tracing::info!(partition, epoch, consumer = name, unclean, backlog = queue.messages, "holds partition");
    let held = Holding {
        epoch,
        consumer: name,
        stream_created,
        suspect,
        replies: HashMap::new(),
        next_delivery: 1,
        credit: 0,
        heard: 0,
    };
    let careful_until = (unclean && queue.messages > 0).then_some(queue.last_sequence);
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
///
/// # Errors
/// Those of the registry.
pub async fn clear_suspect(registry: &Registry, partition: Partition) -> Result<(), RegistryError> {
    let key = suspect_key(partition);
    let (suspect, revision) = registry.get::<Suspect>(&key).await?;
    if suspect.is_some() {
        // A conflict means that another invoker tries now.
        let _ = registry.delete(&key, revision).await?;
    }
    Ok(())
}

impl Holding {
    /// It begins now.
    pub(crate) fn begin(&mut self, now: Millis) {
        self.heard = now;
    }

    /// Number of messages to ask for, when credit has run low.
    pub fn credit(&mut self, batch: u64) -> Option<u64> {
        (self.credit <= batch / 2).then(|| {
            self.credit += batch;
            batch
        })
    }

    /// The next pull request, when credit has run low: subject and body.
    pub(crate) fn pull(&mut self, partition: Partition, batch: u64) -> Option<(String, String)> {
        let batch = self.credit(batch)?;
        let stream = subjects::gradient_stream(partition);
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{}", self.consumer);
        let body =
            format!(r#"{{"batch":{batch},"expires":{PULL_EXPIRES},"idle_heartbeat":{PULL_HEARTBEAT}}}"#);
        Some((subject, body))
    }

    /// Notes a delivery; `false` when others before it were lost.
    pub fn delivered(&mut self, consumer_sequence: u64, now: Millis) -> bool {
        self.credit = self.credit.saturating_sub(1);
        self.heard = now;
        let in_order = consumer_sequence == self.next_delivery;
        self.next_delivery = consumer_sequence + 1;
        in_order
    }

    /// Notes that the pull request is alive.
    pub fn alive(&mut self, now: Millis) {
        self.heard = now;
    }

    /// Notes a status message of a pull request; `false` when the consumer has to be made anew.
    pub(crate) fn status(&mut self, message: &async_nats::Message, now: Millis) -> bool {
        self.alive(now);
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
    pub(crate) fn is_silent(&self, now: Millis) -> bool {
        now > self.heard + PULL_SILENCE_MS
    }
}

//! Holding a partition: taking it over, pulling from it by credit (rules P14, P15, P18).

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use async_nats::Subject;
use async_trait::async_trait;
use thalweg_broker::{QueueError, Queues, Registry, RegistryError};
use thalweg_protocol::{
    Epoch, HandedOver, Handover, KeptConsumer, Partition, Suspect, subjects, suspect_key,
};

use crate::{core::Millis, metrics};

/// A pull request ends after this, and is made again, nanoseconds.
const PULL_EXPIRES: u64 = 30_000_000_000;
/// The server shows that a pull request is alive this often, nanoseconds.
const PULL_HEARTBEAT: u64 = 2_000_000_000;
/// Silence on a pull request after which it is taken for lost.
const PULL_SILENCE_MS: Millis = 5000;
/// How long a delivery may be on its way.
const ASTRAY_MS: Millis = 3000;
/// The attempt at which a contribution that keeps killing invokers is put aside.
const MAX_SUSPECT_ATTEMPTS: u32 = 3;
/// How often a former holder is asked. It says several times a second that it has not finished.
const MAX_QUESTIONS: usize = 32;

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
    /// How long nobody had served it when it was handed over in order, if it was, and when we began to.
    pub handed_over: Option<(Duration, SystemTime)>,
    /// The broker's count of deliveries some time ago, and when that was: by and by we must have as many.
    expected: Option<(u64, Millis)>,
    /// Next sequence of the consumer; a gap means that deliveries were lost on the way.
    next_delivery: u64,
    credit: u64,
    /// Messages that the broker had left for us after the last delivery.
    pending: u64,
    heard: Millis,
}

/// What became of asking a former holder for a partition.
#[derive(Clone, Copy, Debug)]
enum Former {
    /// It has handed the partition over with its consumer.
    Kept(KeptConsumer),
    /// It has finished with the partition, and its consumer is being removed. Nobody had served it for so long.
    Left(Duration),
    /// It holds the partition by a newer placement than ours.
    Newer(Epoch),
    /// It has ended.
    Gone,
    /// It has not answered in time.
    Silent,
}

/// Why there is no answer of a former holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// Nobody is there.
    Nobody,
    /// Not in time.
    Late,
}

/// Invokers, as one that takes a partition over reaches those that held it.
#[async_trait]
pub trait Peers: Send + Sync {
    /// Asks the holder of a partition by a consumer to hand it over; waits for a bounded time.
    async fn ask(&self, handover: &Handover) -> Result<HandedOver, Silence>;

    /// Begins to listen to the deliveries of that consumer and tells its holder so, among them: what is delivered behind
    /// that is heard by both.
    async fn listen(&self, handover: &Handover) -> Result<HandedOver, Silence>;

    /// No more listens.
    async fn stop_listening(&self, handover: &Handover);
}

/// Asks until there is an answer.
async fn former(peers: &dyn Peers, handover: &Handover) -> Former {
    for _ in 0..MAX_QUESTIONS {
        let mut answer = peers.ask(handover).await;
        let listens = answer == Ok(HandedOver::Ready);
        if listens {
            answer = peers.listen(handover).await;
        }
        if let Ok(HandedOver::Kept(kept)) = answer {
            return Former::Kept(kept);
        }
        if listens {
            peers.stop_listening(handover).await;
        }
        match answer {
            Ok(HandedOver::Left(micros)) => return Former::Left(Duration::from_micros(micros)),
            Ok(HandedOver::Newer(epoch)) => return Former::Newer(epoch),
            // Or somebody else holds it by now, who will answer.
            Ok(_) => {}
            Err(Silence::Nobody) => return Former::Gone,
            Err(Silence::Late) => break,
        }
    }
    let Handover { partition, consumer, .. } = handover;
    tracing::info!(partition, consumer, "a former holder does not hand over");
    Former::Silent
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

/// Whose takeover it is, and what tells its consumer from all others.
#[derive(Clone, Copy, Debug)]
pub struct Taker<'a> {
    /// Id of the invoker.
    pub invoker: &'a str,
    /// Makes the consumer's name one that was never used.
    pub nonce: u64,
}

/// Takes a partition over: waits for whoever holds it by an older placement to hand it over with its consumer. Where that
/// does not come, removes every consumer of this epoch or an older one and creates one of our own with a name that was
/// never used, so that buffered acknowledgements of the past hit nothing. `own` is our own consumer of before a reconnect.
///
/// # Errors
/// [`TakeoverError`]: to be tried again.
pub async fn take_over(
    queues: &dyn Queues,
    registry: &Registry,
    peers: &dyn Peers,
    taker: Taker<'_>,
    (partition, epoch): (Partition, Epoch),
    own: Option<String>,
) -> Result<Takeover, TakeoverError> {
    let mut queue = queues.look(partition).await?;
    let newest = queue.consumers.iter().map(|(name, _)| subjects::consumer_epoch(name)).max();
    if let Some(theirs) = newest.filter(|theirs| *theirs > epoch) {
        return Ok(Takeover::HigherEpoch(theirs));
    }
    // There is one at most.
    let theirs = queue.consumers.iter().map(|(name, _)| name).find(|theirs| own.as_ref() != Some(theirs));
    let ask = async {
        let Some(theirs) = theirs else { return Former::Gone };
        former(peers, &Handover { partition, consumer: theirs.clone(), epoch }).await
    };
    // Whoever hands over leaves no suspects, so there is nothing to wait for when it has.
    let (former, suspect) =
        futures::join!(ask, read_suspect(registry, taker.invoker, partition, queue.created));
    let heard = Instant::now();
    let mut held = Holding::new(epoch, subjects::consumer(epoch, taker.nonce), queue.created);
    let again = async |created| {
        read_suspect(registry, taker.invoker, partition, created).await.map_err(TakeoverError::from)
    };
    let (mut unclean, mut unserved, mut leaving) = (false, None, Vec::new());
    match former {
        Former::Newer(theirs) => return Ok(Takeover::HigherEpoch(theirs)),
        Former::Kept(kept) => {
            held.consumer = theirs.cloned().unwrap_or_default();
            held.keep(kept);
            unserved = Some(Duration::ZERO);
        }
        Former::Left(already) => {
            unserved = Some(already);
            leaving = std::mem::take(&mut queue.consumers);
        }
        // It may have been given more meanwhile.
        Former::Silent => queue = queues.look(partition).await?,
        Former::Gone => {}
    }
    let poison;
    if held.is_kept() {
        (held.suspect, poison) = match suspect {
            Ok(suspect) => suspect,
            Err(_) => again(held.stream_created).await?,
        };
    } else {
        for (name, pending) in &queue.consumers {
            let theirs = subjects::consumer_epoch(name);
            if theirs > epoch {
                return Ok(Takeover::HigherEpoch(theirs));
            }
            // Our own consumer of before a reconnect left nothing behind that could have killed anybody.
            unclean |= *pending > 0 && own.as_ref() != Some(name);
            queues.delete_consumer(partition, name).await?;
        }
        held.stream_created = queue.created;
        // At once, because nobody serves the partition meanwhile. Whoever died has written its suspects before.
        let create = create(queues, partition, &held.consumer, &leaving);
        ((held.suspect, poison), ()) = futures::try_join!(again(held.stream_created), create)?;
    }
    unclean |= held.suspect.is_some();
    // The way of what was heard is not in it.
    held.handed_over = unserved.map(|unserved| (unserved + heard.elapsed(), SystemTime::now()));
    metrics::takeover(unclean);
    let consumer = &held.consumer;
    tracing::info!(partition, epoch, consumer, unclean, backlog = queue.messages, "holds partition");
    let careful_until = (unclean && queue.messages > 0).then_some(queue.last_sequence);
    Ok(Takeover::Held { partition: Box::new(held), careful_until, poison })
}

/// Creates our consumer. `former` are those that their holder has asked the broker to remove, which may not have done it.
async fn create(
    queues: &dyn Queues,
    partition: Partition,
    name: &str,
    former: &[(String, u64)],
) -> Result<(), TakeoverError> {
    match queues.create_consumer(partition, name).await {
        Err(QueueError::Raced) if !former.is_empty() => {
            for (theirs, _) in former {
                queues.delete_consumer(partition, theirs).await?;
            }
            Ok(queues.create_consumer(partition, name).await?)
        }
        created => Ok(created?),
    }
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
    /// One whose consumer has delivered nothing yet.
    pub(crate) fn new(epoch: Epoch, consumer: String, stream_created: i64) -> Self {
        Self {
            epoch,
            consumer,
            stream_created,
            suspect: None,
            replies: HashMap::new(),
            handed_over: None,
            expected: None,
            next_delivery: 1,
            credit: 0,
            pending: 0,
            heard: 0,
        }
    }

    /// It begins now.
    pub(crate) fn begin(&mut self, now: Millis) {
        self.heard = now;
    }

    /// Goes on with a consumer that was handed over.
    fn keep(&mut self, kept: KeptConsumer) {
        (self.next_delivery, self.credit, self.pending) = (kept.next_delivery, kept.credit, kept.pending);
    }

    /// What whoever it is handed over to has to know.
    pub(crate) fn kept(&self) -> KeptConsumer {
        KeptConsumer { next_delivery: self.next_delivery, credit: self.credit, pending: self.pending }
    }

    /// Whether its consumer was another holder's.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        subjects::consumer_epoch(&self.consumer) < self.epoch
    }

    /// Notes that the broker has delivered so many messages.
    pub(crate) fn expect(&mut self, deliveries: u64, now: Millis) {
        self.expected = Some((deliveries, now));
    }

    /// Whether a delivery has gone astray.
    pub(crate) fn is_short(&self, now: Millis) -> bool {
        self.expected.is_some_and(|(expected, at)| now > at + ASTRAY_MS && self.deliveries() < expected)
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

    /// Deliveries so far.
    pub(crate) fn deliveries(&self) -> u64 {
        self.next_delivery - 1
    }

    /// Notes a delivery; `false` when others before it were lost.
    pub fn delivered(&mut self, consumer_sequence: u64, now: Millis) -> bool {
        self.credit = self.credit.saturating_sub(1);
        self.heard = now;
        let in_order = consumer_sequence == self.next_delivery;
        self.next_delivery = consumer_sequence + 1;
        in_order
    }

    /// How long before the takeover the first message since the handover was published. `None` for any other message.
    pub(crate) fn waited(&mut self, published: SystemTime) -> Option<Duration> {
        let (_, served) = self.handed_over.take()?;
        Some(served.duration_since(published).unwrap_or_default())
    }

    /// Notes how many messages the broker has left for us.
    pub fn left(&mut self, pending: u64) {
        self.pending = pending;
    }

    /// Whether no message is on its way to us, as far as can be told: it would be delivered again to the next holder.
    pub(crate) fn is_dry(&self) -> bool {
        self.credit == 0 || self.pending == 0
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

#[cfg(test)]
impl Holding {
    /// One that has just been taken over, without a broker.
    pub(crate) fn taken(epoch: Epoch, consumer: &str) -> Self {
        Self::new(epoch, consumer.to_owned(), 0)
    }
}

//! Handing partitions from one invoker to the next in order (rule P19).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use async_nats::{Client, Message, Subject};
use async_trait::async_trait;
use thalweg_broker::{Queues as _, RequestError, request};
use thalweg_protocol::{Epoch, HandedOver, Handover, Kind, Partition, frame, subjects};
use tokio::sync::oneshot;

use super::{Done, Shell};
use crate::{
    metrics,
    partition::{self, Former, Peers, Takeover, TakeoverError},
};

/// Longest wait for a former holder. It serves on for a tenth of that and then ends what is under way; one that needs
/// longer may be frozen, and loses the partition as if it were dead.
const PATIENCE: Duration = Duration::from_secs(1);

/// Other invokers, through NATS.
pub(super) struct Neighbours<'a>(pub(super) &'a Client);

#[async_trait]
impl Peers for Neighbours<'_> {
    async fn ask(&self, partition: Partition, consumer: &str, epoch: Epoch) -> Former {
        let Some(life) = subjects::consumer_life(consumer) else { return Former::Gone };
        let query = Handover { partition, consumer: consumer.to_owned(), epoch };
        let kinds = (Kind::Handover, Kind::HandedOver);
        let reply = request(self.0, &subjects::handover(life), kinds, &query, &[], PATIENCE).await;
        match reply {
            Ok((HandedOver { unserved_us: Some(unserved) }, _)) => {
                let unserved = Duration::from_micros(unserved);
                Former::HandedOver(partition::HandedOver { unserved, heard: Instant::now() })
            }
            Ok((HandedOver { unserved_us: None }, _)) | Err(RequestError::NoResponders(_)) => Former::Gone,
            Err(error) => {
                tracing::info!(partition, consumer, %error, "a former holder does not hand over");
                Former::Silent
            }
        }
    }
}

/// A consumer of ours that is being removed.
#[derive(Debug)]
struct Releasing {
    /// Since when its partition is not served.
    since: Instant,
    /// The broker has everything that was sent before.
    echoed: Option<oneshot::Sender<()>>,
}

/// Who waits for our partitions.
#[derive(Debug)]
pub(super) struct Handovers {
    life: u32,
    waiting: Vec<(Handover, Subject)>,
    /// Consumers that are being removed.
    releasing: HashMap<String, Releasing>,
}

impl Handovers {
    pub(super) fn new() -> Self {
        Self { life: rand::random(), waiting: Vec::new(), releasing: HashMap::new() }
    }

    /// Under which we are asked.
    pub(super) fn life(&self) -> u32 {
        self.life
    }

    /// This consumer will be gone soon; its partition has not been served for so long.
    fn releasing(&mut self, consumer: &str, unserved: Duration) -> oneshot::Receiver<()> {
        let (echoed, echo) = oneshot::channel();
        let now = Instant::now();
        let since = now.checked_sub(unserved).unwrap_or(now);
        self.releasing.insert(consumer.to_owned(), Releasing { since, echoed: Some(echoed) });
        echo
    }

    /// Whether consumers are still being removed.
    pub(super) fn are_under_way(&self) -> bool {
        !self.releasing.is_empty()
    }
}

impl Shell {
    /// Removes a consumer of ours, once every acknowledgement on its way has arrived.
    ///
    /// That takes an echo: a message to ourselves, sent behind the acknowledgements on the connection for contributions,
    /// and received on the other one. A flush would be answered behind all contributions that are on their way.
    pub(super) async fn release(&mut self, partition: Partition, consumer: String, unserved: Duration) {
        let echo = self.handovers.releasing(&consumer, unserved);
        let query = Handover { partition, consumer: consumer.clone(), epoch: 0 };
        let frame = frame::seal(Kind::Handover, &query, &[]);
        // One that is lost with the connection is not waited for.
        let _ = self.connection.client.publish(subjects::handover(self.handovers.life), frame).await;
        let jetstream = self.control.jetstream.clone();
        self.work.push(Box::pin(async move {
            let _ = tokio::time::timeout(PATIENCE, echo).await;
            let _ = jetstream.delete_consumer(partition, &consumer).await;
            Done::Released(consumer)
        }));
    }

    /// Somebody takes one of our partitions over; or it is an echo, which wants no answer.
    pub(super) fn asked_for(&mut self, message: Message) {
        match frame::open::<Handover>(Kind::Handover, &message.payload) {
            Ok((handover, _)) => {
                let Some(reply) = message.reply else {
                    let releasing = self.handovers.releasing.get_mut(&handover.consumer);
                    if let Some(echoed) = releasing.and_then(|releasing| releasing.echoed.take()) {
                        // Whoever waited too long has gone on.
                        let _ = echoed.send(());
                    }
                    return;
                };
                let elapsed = self.elapsed();
                self.holdings.asked(handover.partition, &handover.consumer, handover.epoch, elapsed);
                self.handovers.waiting.push((handover, reply));
            }
            // It waits as long as for anybody who does not answer.
            Err(error) => tracing::warn!(%error, "a request for a handover is not understood"),
        }
    }

    /// A consumer of ours is gone.
    pub(super) async fn released(&mut self, consumer: &str) {
        let since = self.handovers.releasing.remove(consumer).map(|releasing| releasing.since);
        let of_it = |(handover, _): &mut (Handover, Subject)| handover.consumer == consumer;
        for (_, reply) in self.handovers.waiting.extract_if(.., of_it).collect::<Vec<_>>() {
            let unserved = since.map(|since| u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX));
            self.hand_over(reply, unserved).await;
        }
    }

    /// Answers those who wait for what is not ours, or no more.
    pub(super) async fn answer_handovers(&mut self) {
        let (holdings, releasing) = (&self.holdings, &self.handovers.releasing);
        let idle = |(handover, _): &mut (Handover, Subject)| {
            let Handover { partition, consumer, .. } = handover;
            !holdings.holds(*partition, consumer) && !releasing.contains_key(consumer)
        };
        for (_, reply) in self.handovers.waiting.extract_if(.., idle).collect::<Vec<_>>() {
            self.hand_over(reply, None).await;
        }
    }

    async fn hand_over(&self, reply: Subject, unserved_us: Option<u64>) {
        let frame = frame::seal(Kind::HandedOver, &HandedOver { unserved_us }, &[]);
        // Whoever does not hear it waits no longer than for a dead one.
        let _ = self.control.client.publish(reply, frame).await;
    }
}

/// Tells how long a partition that was taken over in order had no holder.
pub(super) fn note(partition: Partition, epoch: Epoch, result: &Result<Takeover, TakeoverError>) {
    if let Ok(Takeover::Held { partition: held, .. }) = result
        && let Some((unserved, _)) = held.handed_over
    {
        metrics::handed_over(unserved);
        tracing::info!(partition, epoch, unserved_ms = unserved.as_secs_f64() * 1e3, "handed over");
    }
}

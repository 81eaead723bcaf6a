//! Handing partitions from one invoker to the next in order (rule P19).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use async_nats::{Client, Message, Subject};
use async_trait::async_trait;
use thalweg_broker::{RequestError, request};
use thalweg_protocol::{Epoch, HandedOver, Handover, Kind, Partition, frame, subjects};

use super::Shell;
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

/// Who waits for our partitions.
#[derive(Debug)]
pub(super) struct Handovers {
    life: u32,
    waiting: Vec<(Handover, Subject)>,
    /// Consumers that are being removed, with the time since when their partitions are not served.
    releasing: HashMap<String, Instant>,
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
    pub(super) fn releasing(&mut self, consumer: &str, unserved: Duration) {
        let now = Instant::now();
        self.releasing.insert(consumer.to_owned(), now.checked_sub(unserved).unwrap_or(now));
    }

    /// Whether consumers are still being removed.
    pub(super) fn are_under_way(&self) -> bool {
        !self.releasing.is_empty()
    }
}

impl Shell {
    /// Somebody takes one of our partitions over.
    pub(super) fn asked_for(&mut self, message: Message) {
        let Some(reply) = message.reply else { return };
        match frame::open::<Handover>(Kind::Handover, &message.payload) {
            Ok((handover, _)) => {
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
        let since = self.handovers.releasing.remove(consumer);
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
        let _ = self.connection.client.publish(reply, frame).await;
    }
}

/// Tells how long a partition that was taken over in order had no holder.
pub(super) fn note(partition: Partition, epoch: Epoch, result: &Result<Takeover, TakeoverError>) {
    if let Ok(Takeover::Held { partition: held, .. }) = result
        && let Some(handed_over) = held.handed_over
    {
        let unserved = handed_over.unserved + handed_over.heard.elapsed();
        metrics::handed_over(unserved);
        tracing::info!(partition, epoch, unserved_ms = unserved.as_secs_f64() * 1e3, "handed over");
    }
}

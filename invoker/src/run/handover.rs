//! Handing partitions from one invoker to the next in order (rule P19).

use std::time::{Duration, Instant};

use async_nats::{Client, Message, StatusCode, Subject};
use async_trait::async_trait;
use futures::StreamExt as _;
use thalweg_broker::{is_created, replace_consumer};
use thalweg_protocol::{Epoch, HandedOver, Handover, Kind, Partition, frame, subjects};

use super::Shell;
use crate::{
    metrics,
    partition::{self, Former, Peers, Takeover, TakeoverError},
};

/// Longest wait for a former holder. It serves on for half of that and then ends what is under way; one that needs
/// longer may be frozen, and loses the partition as if it were dead.
const PATIENCE: Duration = Duration::from_secs(1);

/// Other invokers, through NATS.
pub(super) struct Neighbours<'a>(pub(super) &'a Client);

#[async_trait]
impl Peers for Neighbours<'_> {
    async fn ask(&self, handover: Handover) -> Former {
        let Some(life) = subjects::consumer_life(&handover.consumer) else { return Former::Gone };
        match self.answers(life, &handover).await {
            Ok(former) => former,
            Err(error) => {
                let Handover { partition, consumer, .. } = handover;
                tracing::info!(partition, consumer, error, "a former holder does not hand over");
                Former::Silent
            }
        }
    }
}

impl Neighbours<'_> {
    /// What the former holder answers, and what the broker does to its request for our consumer.
    async fn answers(&self, life: u32, handover: &Handover) -> Result<Former, String> {
        let until = tokio::time::Instant::now() + PATIENCE;
        let inbox = self.0.new_inbox();
        let mut answers = self.0.subscribe(inbox.clone()).await.map_err(|error| error.to_string())?;
        let frame = frame::seal(Kind::Handover, handover, &[]);
        let asked = self.0.publish_with_reply(subjects::handover(life), inbox, frame).await;
        asked.map_err(|error| error.to_string())?;
        let mut next = async || tokio::time::timeout_at(until, answers.next()).await.ok().flatten();
        let answer = next().await.ok_or("no answer in time")?;
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            return Ok(Former::Gone);
        }
        let opened = frame::open::<HandedOver>(Kind::HandedOver, &answer.payload);
        let Some(unserved) = opened.map_err(|error| error.to_string())?.0.unserved_us else {
            return Ok(Former::Gone);
        };
        let (unserved, heard) = (Duration::from_micros(unserved), Instant::now());
        let created = next().await.is_some_and(|answer| is_created(&answer.payload));
        Ok(Former::HandedOver(partition::HandedOver { unserved, heard, created }))
    }
}

/// Who waits for our partitions.
#[derive(Debug)]
pub(super) struct Handovers {
    life: u32,
    waiting: Vec<(Handover, Subject)>,
}

impl Handovers {
    pub(super) fn new() -> Self {
        Self { life: rand::random(), waiting: Vec::new() }
    }

    /// Under which we are asked.
    pub(super) fn life(&self) -> u32 {
        self.life
    }
}

impl Shell {
    /// Sends ourselves a message behind the acknowledgements on the connection for contributions; it is received on the other
    /// one. A flush would be answered behind all contributions that are on their way.
    pub(super) async fn echo(&self, partition: Partition, consumer: String, delivery: u64) {
        self.echo_on(&self.connection.client, partition, consumer, delivery).await;
    }

    async fn echo_on(&self, client: &Client, partition: Partition, consumer: String, delivery: u64) {
        let query = Handover { partition, consumer, epoch: delivery, next: String::new() };
        let frame = frame::seal(Kind::Handover, &query, &[]);
        // One that is lost with the connection is not waited for.
        let _ = client.publish(subjects::handover(self.handovers.life), frame).await;
    }

    /// Replaces a consumer of ours, whose partition has not been served for so long, by that of whoever waits for it by the
    /// newest placement.
    pub(super) async fn release(&mut self, partition: Partition, consumer: String, unserved: Duration) {
        let unserved = u64::try_from(unserved.as_micros()).unwrap_or(u64::MAX);
        let of_it = |(handover, _): &mut (Handover, Subject)| handover.consumer == consumer;
        let waiting: Vec<_> = self.handovers.waiting.extract_if(.., of_it).collect();
        for (_, reply) in &waiting {
            self.hand_over(reply.clone(), Some(unserved)).await;
        }
        let newest = waiting.into_iter().max_by_key(|(handover, _)| handover.epoch);
        let next = newest.as_ref().filter(|(handover, _)| !handover.next.is_empty());
        let next = next.map(|(handover, reply)| (handover.next.as_str(), reply.clone()));
        let client = &self.control.connection.client;
        replace_consumer(client, partition, &consumer, next).await;
        self.echo_on(client, partition, consumer, u64::MAX).await;
    }

    /// Somebody takes one of our partitions over; or it is an echo, which wants no answer.
    pub(super) fn asked_for(&mut self, message: Message) {
        match frame::open::<Handover>(Kind::Handover, &message.payload) {
            Ok((handover, _)) => {
                let Handover { partition, consumer, epoch, .. } = &handover;
                let Some(reply) = message.reply else {
                    self.holdings.echoed(*partition, consumer, *epoch);
                    return self.holdings.released(consumer);
                };
                let elapsed = self.elapsed();
                self.holdings.asked(*partition, consumer, *epoch, elapsed);
                self.handovers.waiting.push((handover, reply));
            }
            // It waits as long as for anybody who does not answer.
            Err(error) => tracing::warn!(%error, "a request for a handover is not understood"),
        }
    }

    /// Answers those who wait for what is not ours, or no more.
    pub(super) async fn answer_handovers(&mut self) {
        let holdings = &self.holdings;
        let idle =
            |(handover, _): &mut (Handover, Subject)| !holdings.holds(handover.partition, &handover.consumer);
        for (_, reply) in self.handovers.waiting.extract_if(.., idle).collect::<Vec<_>>() {
            self.hand_over(reply, None).await;
        }
    }

    async fn hand_over(&self, reply: Subject, unserved_us: Option<u64>) {
        let frame = frame::seal(Kind::HandedOver, &HandedOver { unserved_us }, &[]);
        // Whoever does not hear it waits no longer than for a dead one.
        let _ = self.control.connection.client.publish(reply, frame).await;
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

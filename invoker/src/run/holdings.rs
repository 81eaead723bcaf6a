//! The partitions of an invoker: taking, pulling, giving up (rules P14, P15, P19).

use std::time::{Duration, Instant};

use bytes::Bytes;
use thalweg_protocol::{Epoch, PLACEMENT_KEY, Partition, Placement, subjects};

use super::{Done, Shell, Slot, now};
use crate::{
    core::Event,
    partition::{Takeover, TakeoverError, take_over},
};

/// Longest pause before a takeover that failed is tried again.
const RETAKE_PAUSE: Duration = Duration::from_millis(150);

impl Shell {
    /// Takes what is placed here and leaves what is not.
    pub(super) fn follow_placement(&mut self) {
        for (index, placed) in self.placement.partitions.clone().into_iter().enumerate() {
            let partition = Partition::try_from(index).unwrap_or(Partition::MAX);
            let ours = placed.holder.as_deref() == Some(self.id.as_str());
            match self.partitions.get(&partition) {
                None if ours => self.take(partition, placed.epoch, None),
                Some(Slot::Taking { epoch }) if ours && *epoch < placed.epoch => {
                    self.take(partition, placed.epoch, None);
                }
                Some(Slot::Held(held)) if ours && held.epoch < placed.epoch => {
                    self.take(partition, placed.epoch, None);
                }
                Some(Slot::Held(held)) if !ours && held.epoch < placed.epoch => self.leave(partition),
                Some(Slot::Taking { epoch }) if !ours && *epoch < placed.epoch => {
                    self.partitions.remove(&partition);
                }
                _ => {}
            }
        }
    }

    pub(super) fn take(&mut self, partition: Partition, epoch: Epoch, own: Option<String>) {
        self.partitions.insert(partition, Slot::Taking { epoch });
        let (jetstream, registry) = (self.connection.jetstream.clone(), self.registry.clone());
        let id = self.id.clone();
        self.work.push(Box::pin(async move {
            let result = take_over(&jetstream, &registry, &id, partition, epoch, own).await;
            Done::Took(partition, epoch, result)
        }));
    }

    pub(super) async fn took(
        &mut self,
        partition: Partition,
        epoch: Epoch,
        result: Result<Takeover, TakeoverError>,
    ) {
        if !matches!(self.partitions.get(&partition), Some(Slot::Taking { epoch: wanted }) if *wanted == epoch)
        {
            return;
        }
        match result {
            Ok(Takeover::Held { partition: held, careful_until, poison }) => {
                self.partitions.insert(partition, Slot::Held(held));
                let actions = self.core.handle(Event::Held { partition, careful_until, poison }, now());
                self.perform(actions).await;
                self.pull(partition).await;
            }
            Ok(Takeover::HigherEpoch(theirs)) => {
                tracing::info!(partition, epoch, theirs, "stepping down: a newer placement holds it");
                self.partitions.remove(&partition);
            }
            Err(error) => {
                tracing::info!(partition, %error, "taking over is tried again");
                // The next placement reading finds it missing and takes it again.
                self.partitions.remove(&partition);
                self.read_placement(RETAKE_PAUSE.mul_f64(rand::random_range(0.5..1.0)));
            }
        }
    }

    pub(super) fn retake(&mut self, partition: Partition, reason: &str) {
        let (epoch, own) = match self.partitions.get(&partition) {
            Some(Slot::Held(held)) => (held.epoch, Some(held.consumer.clone())),
            Some(Slot::Leaving(..)) => {
                self.lose(partition);
                return;
            }
            _ => return,
        };
        tracing::info!(partition, reason, "taking the partition over again");
        // What was gathered will be delivered again; what is being committed is found committed.
        self.tell(Event::Lost(partition));
        self.take(partition, epoch, own);
    }

    pub(super) fn retake_all(&mut self) {
        let held: Vec<_> = self.partitions.keys().copied().collect();
        held.into_iter().for_each(|partition| self.retake(partition, "the connection was lost"));
    }

    pub(super) fn check_silence(&mut self) {
        let silent: Vec<_> = (self.partitions.iter())
            .filter(|(_, slot)| matches!(slot, Slot::Held(held) if held.is_silent()))
            .map(|(partition, _)| *partition)
            .collect();
        silent.into_iter().for_each(|partition| self.retake(partition, "its pull request is silent"));
    }

    /// Goes on pulling where that was held back.
    pub(super) async fn pull_again(&mut self) {
        if self.starved && self.core.unknown_bytes() <= self.pull_bytes {
            self.starved = false;
            let held: Vec<_> = self.partitions.keys().copied().collect();
            for partition in held {
                self.pull(partition).await;
            }
        }
    }

    /// Starts to give a partition up: what is complete is finished first.
    fn leave(&mut self, partition: Partition) {
        if let Some(Slot::Held(held)) = self.partitions.remove(&partition) {
            let until = Instant::now() + Duration::from_millis(self.config.drain_ms / 2);
            self.partitions.insert(partition, Slot::Leaving(held, until));
            self.tell(Event::Drain(partition));
        }
    }

    pub(super) async fn finish_leaving(&mut self) {
        let done: Vec<_> = (self.partitions.iter())
            .filter(|(partition, slot)| {
                matches!(slot, Slot::Leaving(_, until)
                    if self.core.is_quiet(**partition) || Instant::now() > *until)
            })
            .map(|(partition, _)| *partition)
            .collect();
        for partition in done {
            self.release(partition).await;
        }
    }

    pub(super) async fn give_up_all(&mut self) {
        let all: Vec<_> = self.partitions.keys().copied().collect();
        for partition in all {
            self.release(partition).await;
        }
    }

    /// Removes our consumer, so that the next holder sees an orderly handover.
    async fn release(&mut self, partition: Partition) {
        let slot = self.partitions.remove(&partition);
        self.tell(Event::Lost(partition));
        let Some(Slot::Held(held) | Slot::Leaving(held, _)) = slot else { return };
        // Acknowledgements on their way must arrive before their consumer goes.
        let _ = self.connection.client.flush().await;
        let stream = subjects::gradient_stream(partition);
        if let Err(error) =
            self.connection.jetstream.delete_consumer_from_stream(&held.consumer, stream).await
        {
            tracing::debug!(%error, partition, "consumer was gone already");
        }
        tracing::info!(partition, epoch = held.epoch, "gave partition up");
    }

    fn lose(&mut self, partition: Partition) {
        self.partitions.remove(&partition);
        self.tell(Event::Lost(partition));
    }

    /// Asks for as many messages as there is room for. Not while too many wait for a look-up: they are in
    /// nobody's budget.
    pub(super) async fn pull(&mut self, partition: Partition) {
        if self.core.unknown_bytes() > self.pull_bytes {
            self.starved = true;
            return;
        }
        let count = self.partitions.len().max(1);
        let batch = (self.pull_bytes / count / self.average_bytes.max(1)).clamp(2, 128) as u64;
        let Some(Slot::Held(held)) = self.partitions.get_mut(&partition) else { return };
        if let Some((subject, body)) = held.pull(partition, batch) {
            let reply = format!("{}.{partition}", self.inbox);
            // A request that does not arrive is noticed by its silence.
            let _ = self.connection.client.publish_with_reply(subject, reply, Bytes::from(body)).await;
        }
    }

    /// Reads the placement, after a pause where taking over has just failed.
    pub(super) fn read_placement(&self, pause: Duration) {
        let registry = self.registry.clone();
        self.work.push(Box::pin(async move {
            tokio::time::sleep(pause).await;
            let placement = registry.get::<Placement>(PLACEMENT_KEY).await;
            Done::Placement(placement.map(|(placement, _)| placement.unwrap_or_default()))
        }));
    }
}

//! Moving partitions: performing the steps that [`crate::holdings`] decides on.

use std::{panic::resume_unwind, time::Duration};

use bytes::Bytes;
use thalweg_protocol::{Partition, Placement, placement_key, subjects};

use super::{Done, Shell, handover::Neighbours, now};
use crate::{
    holdings::{Rest, Step},
    partition::{Taker, take_over},
};

/// Longest pause before a takeover that failed is tried again.
const RETAKE_PAUSE: Duration = Duration::from_millis(150);

impl Shell {
    /// Performs steps in order.
    pub(super) async fn step(&mut self, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Take { partition, epoch, own } => {
                    let (connection, registry) = (self.control.connection.clone(), self.registry.clone());
                    let (id, data) = (self.id.clone(), self.connection.client.clone());
                    let taking = self.control.spawn(async move {
                        let taker = Taker { invoker: &id, nonce: rand::random() };
                        let (queues, peers) =
                            (&connection.jetstream, Neighbours::new(connection.client.clone(), data));
                        let at = (partition, epoch);
                        let result = take_over(queues, &registry, &peers, taker, at, own).await;
                        (result, peers.listening())
                    });
                    self.work.push(Box::pin(async move {
                        let taken = taking.await.unwrap_or_else(|error| resume_unwind(error.into_panic()));
                        Done::Took(partition, epoch, taken.0, taken.1)
                    }));
                }
                Step::Tell(event) => {
                    let actions = self.core.handle(event, now());
                    self.perform(actions).await;
                }
                Step::Pull(partition) => self.pull(partition).await,
                Step::Echo { partition, consumer, delivery } => {
                    self.echo(partition, consumer, delivery).await;
                }
                Step::Answer { partition, answer } => self.tell(partition, answer).await,
                Step::Release { partition, consumer, unserved } => {
                    self.release(partition, consumer, Duration::from_millis(unserved)).await;
                }
                Step::ReadPlacement => {
                    self.read_placement(RETAKE_PAUSE.mul_f64(rand::random_range(0.5..1.0)));
                }
            }
        }
    }

    /// Goes on pulling where that was held back.
    pub(super) async fn pull_again(&mut self) {
        // While rounds were under way nothing was asked for, and the others may have begun.
        let leaving: Vec<_> = self.holdings.leaving().collect();
        for partition in leaving {
            self.pull(partition).await;
        }
        if self.starved && !self.is_starved() {
            self.starved = false;
            let held: Vec<_> = self.holdings.partitions().collect();
            for partition in held {
                self.pull(partition).await;
            }
        }
    }

    /// Too many messages wait for a look-up, which are in nobody's budget; or for the folds that are under way.
    fn is_starved(&self) -> bool {
        self.core.unknown_bytes() > self.pull_bytes || self.core.is_full()
    }

    /// Asks for as many messages as there is room for.
    pub(super) async fn pull(&mut self, partition: Partition) {
        if self.is_starved() {
            self.starved = true;
            return;
        }
        let count = self.holdings.partitions().count().max(1);
        let batch = (self.pull_bytes / count / self.average_bytes.max(1)).clamp(2, 128) as u64;
        let batch = if !self.holdings.is_leaving(partition) {
            batch
        } else if self.core.rest(partition) == Rest::Contributions {
            // The other contributions of rounds that have begun, one by one.
            1
        } else {
            return;
        };
        let Some(held) = self.holdings.pulled(partition) else { return };
        if let Some((subject, body)) = held.pull(partition, batch) {
            let reply = subjects::deliveries(&held.consumer);
            // A request that does not arrive is noticed by its silence.
            let _ = self.connection.client.publish_with_reply(subject, reply, Bytes::from(body)).await;
        }
    }

    /// Reads the placement, after a pause where taking over has just failed.
    pub(super) fn read_placement(&self, pause: Duration) {
        let (registry, key) = (self.registry.clone(), placement_key(self.config.pool.as_ref()));
        self.work.push(Box::pin(async move {
            tokio::time::sleep(pause).await;
            let placement = registry.get::<Placement>(&key).await;
            Done::Placement(placement.map(|(placement, _)| placement.unwrap_or_default()))
        }));
    }
}

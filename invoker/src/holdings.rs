//! Which partitions are ours, decided without I/O: placements, ends of takeovers, deliveries and time go
//! in, steps come out (rules P14, P15, P19).

use std::collections::BTreeMap;

use async_nats::Subject;
use thalweg_protocol::{Epoch, Partition, Placement};

use crate::{
    core::{Event, Millis},
    partition::{Holding, Takeover, TakeoverError},
};

/// A partition on its way to or in our hands.
#[derive(Debug)]
enum Slot {
    Taking {
        epoch: Epoch,
    },
    Held(Box<Holding>),
    /// To be given up once its invocations have ended, or at the latest then.
    Leaving(Box<Holding>, Millis),
}

/// What to do, in order.
#[derive(Debug)]
pub enum Step {
    /// Take a partition over; answer with [`Holdings::took`].
    Take {
        /// Which.
        partition: Partition,
        /// By which placement.
        epoch: Epoch,
        /// Our own consumer of before a reconnect.
        own: Option<String>,
    },
    /// Tell the core.
    Tell(Event),
    /// Ask for messages.
    Pull(Partition),
    /// Remove this consumer of ours, once every acknowledgement on its way has arrived, so that the next
    /// holder sees an orderly handover.
    Release(Partition, String),
    /// Read the placement again, after a short pause: taking over has failed.
    ReadPlacement,
}

/// What a delivery is to us.
#[derive(Debug)]
pub enum Delivered {
    /// A message for the core.
    Ours,
    /// Meant for a consumer that is no longer ours: the message is delivered to the new one too.
    NotOurs,
    /// Others before it were lost on the way, so the partition is taken over again.
    Gap(Vec<Step>),
}

/// The partitions of one invoker. Everything in it can be lost.
#[derive(Debug)]
pub struct Holdings {
    id: String,
    drain_ms: Millis,
    slots: BTreeMap<Partition, Slot>,
    drain_until: Option<Millis>,
}

impl Holdings {
    /// Nothing yet. `drain_ms` is the longest time to hand partitions over when told to stop.
    #[must_use]
    pub fn new(id: String, drain_ms: Millis) -> Self {
        Self { id, drain_ms, slots: BTreeMap::new(), drain_until: None }
    }

    /// Takes what is placed here and leaves what is not.
    #[must_use]
    pub fn follow(&mut self, placement: &Placement, now: Millis) -> Vec<Step> {
        let mut steps = Vec::new();
        for (index, placed) in placement.partitions.iter().enumerate() {
            let partition = Partition::try_from(index).unwrap_or(Partition::MAX);
            let ours = placed.holder.as_ref() == Some(&self.id);
            match self.slots.get(&partition) {
                None if ours => self.take(partition, placed.epoch, None, &mut steps),
                Some(Slot::Taking { epoch }) if ours && *epoch < placed.epoch => {
                    self.take(partition, placed.epoch, None, &mut steps);
                }
                Some(Slot::Held(held)) if ours && held.epoch < placed.epoch => {
                    self.take(partition, placed.epoch, None, &mut steps);
                }
                Some(Slot::Held(held)) if !ours && held.epoch < placed.epoch => {
                    self.leave(partition, now, &mut steps);
                }
                Some(Slot::Taking { epoch }) if !ours && *epoch < placed.epoch => {
                    self.slots.remove(&partition);
                }
                _ => {}
            }
        }
        steps
    }

    fn take(&mut self, partition: Partition, epoch: Epoch, own: Option<String>, steps: &mut Vec<Step>) {
        self.slots.insert(partition, Slot::Taking { epoch });
        steps.push(Step::Take { partition, epoch, own });
    }

    /// Starts to give a partition up: what is complete is finished first.
    fn leave(&mut self, partition: Partition, now: Millis, steps: &mut Vec<Step>) {
        if let Some(Slot::Held(held)) = self.slots.remove(&partition) {
            self.slots.insert(partition, Slot::Leaving(held, now + self.drain_ms / 2));
            steps.push(Step::Tell(Event::Drain(partition)));
        }
    }

    /// A takeover has ended.
    #[must_use]
    pub fn took(
        &mut self,
        partition: Partition,
        epoch: Epoch,
        result: Result<Takeover, TakeoverError>,
        now: Millis,
    ) -> Vec<Step> {
        if !matches!(self.slots.get(&partition), Some(Slot::Taking { epoch: wanted }) if *wanted == epoch) {
            return Vec::new();
        }
        match result {
            Ok(Takeover::Held { partition: mut held, careful_until, poison }) => {
                held.begin(now);
                self.slots.insert(partition, Slot::Held(held));
                vec![Step::Tell(Event::Held { partition, careful_until, poison }), Step::Pull(partition)]
            }
            Ok(Takeover::HigherEpoch(theirs)) => {
                tracing::info!(partition, epoch, theirs, "stepping down: a newer placement holds it");
                self.slots.remove(&partition);
                Vec::new()
            }
            Err(error) => {
                tracing::info!(partition, %error, "taking over is tried again");
                // The next placement reading finds it missing and takes it again.
                self.slots.remove(&partition);
                vec![Step::ReadPlacement]
            }
        }
    }

    /// Takes a partition over again, because it may have lost deliveries or its consumer.
    #[must_use]
    pub fn retake(&mut self, partition: Partition, reason: &str) -> Vec<Step> {
        let (epoch, own) = match self.slots.get(&partition) {
            Some(Slot::Held(held)) => (held.epoch, Some(held.consumer.clone())),
            Some(Slot::Leaving(..)) => {
                self.slots.remove(&partition);
                return vec![Step::Tell(Event::Lost(partition))];
            }
            _ => return Vec::new(),
        };
        tracing::info!(partition, reason, "taking the partition over again");
        // What was gathered will be delivered again; what is being committed is found committed.
        let mut steps = vec![Step::Tell(Event::Lost(partition))];
        self.take(partition, epoch, own, &mut steps);
        steps
    }

    /// The connection was lost and is back.
    #[must_use]
    pub fn reconnected(&mut self) -> Vec<Step> {
        let held: Vec<_> = self.slots.keys().copied().collect();
        held.into_iter().flat_map(|partition| self.retake(partition, "the connection was lost")).collect()
    }

    /// Takes over again what has been silent for too long.
    #[must_use]
    pub fn check_silence(&mut self, now: Millis) -> Vec<Step> {
        let silent = |slot: &Slot| matches!(slot, Slot::Held(held) if held.is_silent(now));
        let silent: Vec<_> =
            self.slots.iter().filter(|(_, slot)| silent(slot)).map(|(partition, _)| *partition).collect();
        silent
            .into_iter()
            .flat_map(|partition| self.retake(partition, "its pull request is silent"))
            .collect()
    }

    /// A message of `consumer`, its `consumer_sequence`th; `reply` acknowledges it.
    #[must_use]
    pub fn delivered(
        &mut self,
        partition: Partition,
        consumer: &str,
        (consumer_sequence, sequence): (u64, u64),
        reply: Option<Subject>,
        now: Millis,
    ) -> Delivered {
        let Some(held) = self.get_mut(partition).filter(|held| held.consumer == consumer) else {
            return Delivered::NotOurs;
        };
        let in_order = held.delivered(consumer_sequence, now);
        if let Some(reply) = reply {
            held.replies.insert(sequence, reply);
        }
        if in_order {
            Delivered::Ours
        } else {
            Delivered::Gap(self.retake(partition, "deliveries were lost on the way"))
        }
    }

    /// It is told to stop.
    pub fn drain(&mut self, now: Millis) {
        self.drain_until.get_or_insert(now + self.drain_ms);
    }

    /// Until when partitions are handed over in order, when told to stop.
    #[must_use]
    pub fn drain_until(&self) -> Option<Millis> {
        self.drain_until
    }

    /// Whether it was told to stop and holds nothing any more.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.drain_until.is_some() && self.slots.is_empty()
    }

    /// Gives up what is ready for it; `is_quiet` tells whether a partition has no invocation under way.
    #[must_use]
    pub fn settle(&mut self, is_quiet: impl Fn(Partition) -> bool, now: Millis) -> Vec<Step> {
        let over = self.drain_until.is_some_and(|until| now >= until);
        if over && !self.slots.is_empty() {
            tracing::warn!("nobody took the partitions over in time; leaving them to the next invoker");
        }
        let done = |partition: Partition, slot: &Slot| match slot {
            Slot::Leaving(_, until) => over || is_quiet(partition) || now > *until,
            _ => over,
        };
        let done: Vec<_> = (self.slots.iter())
            .filter(|(partition, slot)| done(**partition, slot))
            .map(|(partition, _)| *partition)
            .collect();
        let mut steps = Vec::new();
        for partition in done {
            let slot = self.slots.remove(&partition);
            steps.push(Step::Tell(Event::Lost(partition)));
            if let Some(Slot::Held(held) | Slot::Leaving(held, _)) = slot {
                tracing::info!(partition, epoch = held.epoch, "gives partition up");
                steps.push(Step::Release(partition, held.consumer));
            }
        }
        steps
    }

    /// A partition in our hands, also while it is being given up.
    #[must_use]
    pub fn get(&self, partition: Partition) -> Option<&Holding> {
        match self.slots.get(&partition)? {
            Slot::Held(held) | Slot::Leaving(held, _) => Some(held),
            Slot::Taking { .. } => None,
        }
    }

    fn get_mut(&mut self, partition: Partition) -> Option<&mut Holding> {
        match self.slots.get_mut(&partition)? {
            Slot::Held(held) | Slot::Leaving(held, _) => Some(held),
            Slot::Taking { .. } => None,
        }
    }

    /// A partition that is pulled from: not one that is being given up.
    pub fn pulled(&mut self, partition: Partition) -> Option<&mut Holding> {
        match self.slots.get_mut(&partition)? {
            Slot::Held(held) => Some(held),
            _ => None,
        }
    }

    /// Where to acknowledge a message; once only.
    pub fn reply(&mut self, partition: Partition, sequence: u64) -> Option<Subject> {
        self.get_mut(partition)?.replies.remove(&sequence)
    }

    /// Partitions in any state.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> {
        self.slots.keys().copied()
    }

    /// Partitions in our hands, with their epochs, for heartbeats.
    #[must_use]
    pub fn held(&self) -> Vec<(Partition, Epoch)> {
        let epoch = |partition| Some((partition, self.get(partition)?.epoch));
        self.partitions().filter_map(epoch).collect()
    }
}

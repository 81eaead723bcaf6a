//! Which partitions are ours, decided without I/O: placements, ends of takeovers, deliveries and time go
//! in, steps come out (rules P14, P15, P19).

use std::collections::BTreeMap;

use async_nats::Subject;
use thalweg_protocol::{Epoch, HandedOver, Handover, Partition, Placement};

use crate::{
    core::{Event, Millis},
    partition::{Holding, Takeover, TakeoverError},
};

/// A partition on its way to or in our hands.
#[derive(Debug)]
enum Slot {
    Taking { epoch: Epoch },
    Held(Box<Holding>),
    Leaving(Box<Leaving>),
}

/// A partition that is about to be given up. It is served on until the next holder asks for it, nothing of it is held,
/// the broker has every acknowledgement and the next holder hears what is delivered; then it is handed over with its
/// consumer, so that nothing has to be delivered again. But not for long, since whoever takes it over may be dead, and
/// rounds may last: then no more rounds are begun, those under way end, and it is given up without its consumer.
#[derive(Debug)]
struct Leaving {
    held: Holding,
    /// The next holder is there, or there will be none.
    asked: bool,
    /// The next holder has asked.
    known: bool,
    /// Since when it waits for a word, if it does.
    waits: Option<Millis>,
    echo: Option<Echo>,
    served_until: Millis,
    /// Since when it is not served.
    unserved: Option<Millis>,
    /// Given up then at the latest.
    until: Millis,
}

/// What tells that the broker has every acknowledgement up to some delivery.
#[derive(Clone, Copy, Debug)]
struct Echo {
    delivery: u64,
    heard: bool,
}

/// How long a partition that is about to be given up is served while nobody asks for it.
const UNASKED_MS: Millis = 1000;
/// How long it is served on for the sake of what is held of it. Where workers push at different speeds that is until the
/// slowest of a round has pushed; what is given up before is delivered again, and nobody serves the partition while what is
/// under way ends. A partition of many small jobs may have no moment between the rounds of all of them, and is to move soon
/// all the same.
const SERVED_ON_MS: Millis = 500;
/// How long whoever asks is left without a word, so that it does not take us for dead.
const SILENT_MS: Millis = 300;

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
    /// Send ourselves a message behind all acknowledgements; when it comes back, call [`Holdings::echoed`].
    Echo {
        /// Of this partition.
        partition: Partition,
        /// By this consumer.
        consumer: String,
        /// After so many deliveries.
        delivery: u64,
    },
    /// Tell whoever waits for this partition.
    Answer {
        /// Which.
        partition: Partition,
        /// [`HandedOver::Ready`] or [`HandedOver::NotYet`].
        answer: HandedOver,
    },
    /// Remove this consumer of ours and tell whoever waits.
    Release {
        /// Of which partition.
        partition: Partition,
        /// Its name.
        consumer: String,
        /// How long the partition has not been served by now.
        unserved: Millis,
    },
    /// Read the placement again, after a short pause: taking over has failed.
    ReadPlacement,
}

/// What a partition still has to do here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing of it is held.
    Nothing,
    /// Contributions are held.
    Contributions,
    /// Rounds are being folded or committed.
    Invocations,
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
            let partition = placement.first.saturating_add(partition);
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
                    self.leave(partition, placed.holder.is_none(), now);
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

    /// Starts to give a partition up, or hears that whoever takes it is there: `asked`.
    fn leave(&mut self, partition: Partition, asked: bool, now: Millis) {
        let until = now + self.drain_ms / 2;
        let served_until = until.min(now + if asked { SERVED_ON_MS } else { UNASKED_MS });
        match self.slots.remove(&partition) {
            Some(Slot::Held(held)) => {
                let held = *held;
                let (known, waits, echo, unserved) = (false, None, None, None);
                let leaving = Leaving { held, asked, known, waits, echo, served_until, unserved, until };
                self.slots.insert(partition, Slot::Leaving(Box::new(leaving)));
            }
            Some(Slot::Leaving(mut leaving)) => {
                if asked && !leaving.asked {
                    leaving.asked = true;
                    leaving.served_until = leaving.until.min(served_until);
                }
                self.slots.insert(partition, Slot::Leaving(leaving));
            }
            Some(taking) => drop(self.slots.insert(partition, taking)),
            None => {}
        }
    }

    /// Another invoker takes a partition over, by a placement that may not have been read here yet. Returns what to tell
    /// it; `None` if a [`Step::Answer`] or [`Step::Release`] will follow.
    pub fn asked(&mut self, handover: &Handover, now: Millis) -> Option<HandedOver> {
        let Handover { partition, consumer, epoch } = handover;
        match self.slots.get(partition) {
            Some(Slot::Held(held)) if held.consumer == *consumer && held.epoch >= *epoch => {
                return Some(HandedOver::Newer(held.epoch));
            }
            Some(Slot::Held(held)) if held.consumer == *consumer => {}
            Some(Slot::Leaving(leaving)) if leaving.held.consumer == *consumer => {}
            _ => return Some(HandedOver::NotHeld),
        }
        self.leave(*partition, true, now);
        if let Some(Slot::Leaving(leaving)) = self.slots.get_mut(partition) {
            (leaving.known, leaving.waits) = (true, Some(now));
        }
        None
    }

    /// Whoever asked hears what is delivered to that consumer from here on. If nothing of the partition is held, which
    /// `rest` tells, it is handed over.
    #[must_use]
    pub fn heard(&mut self, handover: &Handover, rest: Rest) -> (HandedOver, Vec<Step>) {
        let Handover { partition, consumer, .. } = handover;
        let leaving = match self.slots.get(partition) {
            Some(Slot::Leaving(leaving)) if leaving.held.consumer == *consumer => leaving,
            Some(Slot::Held(held)) if held.consumer == *consumer => return (HandedOver::NotYet, Vec::new()),
            _ => return (HandedOver::NotHeld, Vec::new()),
        };
        let acknowledged =
            leaving.echo.is_some_and(|echo| echo.heard && echo.delivery == leaving.held.deliveries());
        if leaving.unserved.is_some() || !acknowledged || rest != Rest::Nothing {
            return (HandedOver::NotYet, Vec::new());
        }
        let (kept, epoch) = (leaving.held.kept(), leaving.held.epoch);
        tracing::info!(partition, epoch, unserved_ms = 0, "gives partition up");
        self.slots.remove(partition);
        (HandedOver::Kept(kept), vec![Step::Tell(Event::Lost(*partition))])
    }

    /// The broker has every acknowledgement of up to so many deliveries ([`Step::Echo`]).
    pub fn echoed(&mut self, partition: Partition, consumer: &str, delivery: u64) {
        if let Some(Slot::Leaving(leaving)) = self.slots.get_mut(&partition)
            && leaving.held.consumer == consumer
            && let Some(echo) = leaving.echo.as_mut().filter(|echo| echo.delivery == delivery)
        {
            echo.heard = true;
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
            Some(Slot::Leaving(_)) => {
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
        let why = |slot: &Slot| match slot {
            Slot::Held(held) if held.is_silent(now) => Some("its pull request is silent"),
            Slot::Held(held) if held.is_short(now) => Some("a delivery has gone astray"),
            _ => None,
        };
        let due: Vec<_> =
            self.slots.iter().filter_map(|(partition, slot)| Some((*partition, why(slot)?))).collect();
        due.into_iter().flat_map(|(partition, why)| self.retake(partition, why)).collect()
    }

    /// The broker has delivered so many messages to a consumer of ours.
    pub fn expect(&mut self, partition: Partition, consumer: &str, deliveries: u64, now: Millis) {
        if let Some(held) = self.get_mut(partition).filter(|held| held.consumer == consumer) {
            held.expect(deliveries, now);
        }
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
        if consumer_sequence <= held.deliveries() {
            // It was the former holder's.
            return Delivered::NotOurs;
        }
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

    /// Gives up what is ready for it, and tells those that wait; `rest` tells what a partition still has to do here.
    #[must_use]
    pub fn settle(&mut self, rest: impl Fn(Partition) -> Rest, now: Millis) -> Vec<Step> {
        let over = self.drain_until.is_some_and(|until| now >= until);
        if over && !self.slots.is_empty() {
            tracing::warn!("nobody took the partitions over in time; leaving them to the next invoker");
        }
        let mut steps = Vec::new();
        let mut done = Vec::new();
        for (partition, slot) in &mut self.slots {
            let Slot::Leaving(leaving) = slot else {
                done.extend(over.then_some(*partition));
                continue;
            };
            let rest = rest(*partition);
            if now >= leaving.served_until && leaving.unserved.is_none() {
                (leaving.unserved, leaving.echo) = (Some(now), None);
                steps.push(Step::Tell(Event::Drain(*partition)));
            }
            let served = leaving.unserved.is_none();
            let finished = if served {
                leaving.asked && rest == Rest::Nothing && leaving.held.is_dry()
            } else {
                rest != Rest::Invocations
            };
            // What is delivered to a partition that is not served is delivered again.
            let delivery = if served { leaving.held.deliveries() } else { u64::MAX };
            if finished && leaving.echo.is_none_or(|echo| echo.delivery != delivery) {
                leaving.echo = Some(Echo { delivery, heard: false });
                let consumer = leaving.held.consumer.clone();
                steps.push(Step::Echo { partition: *partition, consumer, delivery });
            }
            let echoed = leaving.echo.is_some_and(|echo| echo.heard && echo.delivery == delivery);
            let overdue = over || !served && now > leaving.until;
            let ready = finished && echoed;
            if overdue || ready && !(served && leaving.known) {
                done.push(*partition);
            } else if leaving.waits.is_some_and(|since| ready || now >= since + SILENT_MS) {
                leaving.waits = None;
                let answer = if ready { HandedOver::Ready } else { HandedOver::NotYet };
                steps.push(Step::Answer { partition: *partition, answer });
            }
        }
        for partition in done {
            let slot = self.slots.remove(&partition);
            steps.push(Step::Tell(Event::Lost(partition)));
            let (held, unserved) = match slot {
                Some(Slot::Held(held)) => (*held, now),
                Some(Slot::Leaving(leaving)) => (leaving.held, leaving.unserved.unwrap_or(now)),
                _ => continue,
            };
            let unserved = now.saturating_sub(unserved);
            tracing::info!(partition, epoch = held.epoch, unserved_ms = unserved, "gives partition up");
            steps.push(Step::Release { partition, consumer: held.consumer, unserved });
        }
        steps
    }

    /// When to call [`Holdings::settle`] although nothing else happens.
    #[must_use]
    pub fn settle_at(&self) -> Option<Millis> {
        let due = |slot: &Slot| {
            let Slot::Leaving(leaving) = slot else { return None };
            let end = if leaving.unserved.is_none() { leaving.served_until } else { leaving.until + 1 };
            Some(leaving.waits.map_or(end, |since| end.min(since + SILENT_MS)))
        };
        self.slots.values().filter_map(due).chain(self.drain_until).min()
    }

    /// Whether a partition is in our hands by this consumer, also while it is being given up.
    #[must_use]
    pub fn holds(&self, partition: Partition, consumer: &str) -> bool {
        self.get(partition).is_some_and(|held| held.consumer == consumer)
    }

    /// A partition in our hands, also while it is being given up.
    #[must_use]
    pub fn get(&self, partition: Partition) -> Option<&Holding> {
        match self.slots.get(&partition)? {
            Slot::Held(held) => Some(held),
            Slot::Leaving(leaving) => Some(&leaving.held),
            Slot::Taking { .. } => None,
        }
    }

    fn get_mut(&mut self, partition: Partition) -> Option<&mut Holding> {
        match self.slots.get_mut(&partition)? {
            Slot::Held(held) => Some(held),
            Slot::Leaving(leaving) => Some(&mut leaving.held),
            Slot::Taking { .. } => None,
        }
    }

    /// A partition that is pulled from: not one of which no more rounds are begun.
    pub fn pulled(&mut self, partition: Partition) -> Option<&mut Holding> {
        match self.slots.get_mut(&partition)? {
            Slot::Held(held) => Some(held),
            Slot::Leaving(leaving) if leaving.unserved.is_none() => Some(&mut leaving.held),
            _ => None,
        }
    }

    /// Partitions that are being given up, and served so far.
    pub fn leaving(&self) -> impl Iterator<Item = Partition> {
        let leaves = |slot: &Slot| matches!(slot, Slot::Leaving(leaving) if leaving.unserved.is_none());
        self.slots.iter().filter(move |(_, slot)| leaves(slot)).map(|(partition, _)| *partition)
    }

    /// Whether a partition is being given up: then no more is asked for than what is held waits for.
    #[must_use]
    pub fn is_leaving(&self, partition: Partition) -> bool {
        matches!(self.slots.get(&partition), Some(Slot::Leaving(_)))
    }

    /// Where to acknowledge a message; once only.
    pub fn reply(&mut self, partition: Partition, sequence: u64) -> Option<Subject> {
        self.get_mut(partition)?.replies.remove(&sequence)
    }

    /// Partitions in any state.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> {
        self.slots.keys().copied()
    }

    /// How many partitions are in our hands.
    #[must_use]
    pub fn count_held(&self) -> usize {
        self.slots.values().filter(|slot| !matches!(slot, Slot::Taking { .. })).count()
    }

    /// Partitions in our hands, with their epochs, for heartbeats.
    #[must_use]
    pub fn held(&self) -> Vec<(Partition, Epoch)> {
        let epoch = |partition| Some((partition, self.get(partition)?.epoch));
        self.partitions().filter_map(epoch).collect()
    }
}

#[cfg(test)]
#[path = "holdings_tests.rs"]
mod tests;

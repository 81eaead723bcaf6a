//! What goes wrong.

use rand::RngExt as _;
use thalweg_protocol::Durability;

use crate::{
    Mutation,
    network::{Actor, Millis},
    worker::State,
    world::{Event, World},
};

impl World {
    /// Lets something go wrong; tells what.
    pub(crate) fn strike(&mut self) -> anyhow::Result<Option<String>> {
        let actors = self.actors();
        let some = |world: &mut Self| actors[world.fault_rng.random_range(0..actors.len())];
        if actors.is_empty() {
            return Ok(None);
        }
        let what = match self.fault_rng.random_range(0..25) {
            0..3 => {
                let actor = some(self);
                self.dies(actor);
                format!("{actor:?} is killed")
            }
            3..7 => {
                // Between any two of its next messages.
                let (actor, left) = (some(self), self.fault_rng.random_range(0..15));
                self.dies_after(actor, left);
                format!("{actor:?} dies after {left} messages")
            }
            7 | 8 => {
                let left = self.fault_rng.random_range(0..12);
                self.store.light_fuse(left);
                format!("the store dies after {left} operations on its disk")
            }
            9 => self.power_loss(),
            10 | 11 => {
                let for_ms = self.fault_rng.random_range(10..1500);
                self.kill_broker(for_ms);
                format!("the broker is killed for {for_ms} ms")
            }
            12..15 => {
                let (actor, for_ms) = (some(self), self.fault_rng.random_range(10..2500));
                self.suffers(actor, for_ms);
                self.disconnect(actor, for_ms);
                format!("{actor:?} loses its connection for {for_ms} ms")
            }
            15..17 => {
                let (actor, for_ms) = (some(self), self.fault_rng.random_range(100..4000));
                self.suffers(actor, for_ms);
                let until = self.now + for_ms;
                self.freeze(actor, until);
                format!("{actor:?} is frozen for {for_ms} ms")
            }
            17 => {
                let for_ms = self.fault_rng.random_range(100..1500);
                self.refuses_until = self.now + for_ms;
                format!("the broker refuses publications for {for_ms} ms")
            }
            18 => match self.mixes_poison() {
                Some(what) => what,
                None => return Ok(None),
            },
            22 => self.operator_pauses(),
            23 | 24 => match self.operator_changes_settings() {
                Some(what) => what,
                None => return Ok(None),
            },
            19 => self.strands_invoker(),
            20 => self.redelivers(),
            _ => {
                let for_ms = self.fault_rng.random_range(10..1500);
                self.kill_broker(for_ms);
                actors.into_iter().for_each(|actor| self.dies(actor));
                "everything is killed".to_owned()
            }
        };
        Ok(Some(what))
    }

    /// What is done to a worker is its own trouble, not others'.
    fn suffers(&mut self, actor: Actor, for_ms: Millis) {
        if let Actor::Worker(index) = actor {
            let host = &mut self.workers[index as usize];
            host.own_fault_until = host.own_fault_until.max(self.now + for_ms);
        }
    }

    /// A process is killed, and started again by whoever looks after it.
    pub(crate) fn dies(&mut self, actor: Actor) {
        let delay = self.fault_rng.random_range(10..1500);
        match actor {
            Actor::Worker(index) => self.worker_dies(index),
            Actor::Store => self.kill_store(),
            Actor::Gateway(_) => {
                self.end(actor);
                self.later(delay, Event::Start(actor));
            }
            Actor::Autoscaler(number) => {
                self.end(actor);
                self.later(delay, Event::Start(actor));
                // Its invokers die with it, or stay behind for the next one to adopt.
                if self.fault_rng.random_bool(0.7) {
                    let its: Vec<_> = (self.invokers.iter())
                        .filter(|(_, host)| host.starter == number)
                        .map(|(number, _)| *number)
                        .collect();
                    its.into_iter().for_each(|number| self.end(Actor::Invoker(number)));
                    self.starters.retain(|_, starter| *starter != number);
                } else {
                    self.invokers
                        .values_mut()
                        .filter(|host| host.starter == number)
                        .for_each(|host| host.starter = u32::MAX);
                    let orphans = self.starters.values_mut().filter(|starter| **starter == number);
                    orphans.for_each(|starter| *starter = u32::MAX);
                }
            }
            Actor::Invoker(_) => self.end(actor),
            Actor::Broker | Actor::Operator => {}
        }
    }

    /// The store's machine is off.
    fn power_loss(&mut self) -> String {
        let noticed = !self.mutated(Mutation::PowerLossUnnoticed);
        for job in self.checker.jobs_of_level(Durability::Process) {
            self.checker.may_fail(job, "a power loss at level process");
        }
        self.store.power_loss(&mut self.fault_rng, noticed);
        if self.life(Actor::Store) > 0 {
            self.end(Actor::Store);
            let delay = self.rng.random_range(10..500);
            self.later(delay, Event::Start(Actor::Store));
        }
        "the power fails under the store".to_owned()
    }

    /// Acknowledgement waits run out.
    fn redelivers(&mut self) -> String {
        let mut again = 0;
        for partition in 0..self.partitions {
            // The oldest first in the end: each goes before what waits.
            for sequence in self.broker.unacknowledged(partition).into_iter().rev() {
                again += u32::from(self.broker.redeliver(partition, sequence));
            }
            self.deliver(partition);
        }
        format!("{again} messages are delivered again")
    }

    /// The next invoker that commits is cut off right after it, and meanwhile the broker forgets its queues and a
    /// worker stands still, so that others' contributions wait in the new ones.
    fn strands_invoker(&mut self) -> String {
        let for_ms = self.fault_rng.random_range(1300..1900);
        let broker = (self.fault_rng.random_range(20..300), self.fault_rng.random_range(10..100));
        self.strands = Some((for_ms, broker));
        format!(
            "the next invoker that commits is cut off for {for_ms} ms, and the broker is killed after {} ms",
            broker.0
        )
    }

    /// See [`Self::strands_invoker`].
    pub(crate) fn strand(&mut self, number: u32) {
        let Some((for_ms, (later, broker_ms))) = self.strands.take() else { return };
        self.note(|| format!("i{number} is cut off"));
        self.disconnect(Actor::Invoker(number), for_ms);
        self.later(later, Event::KillBroker(broker_ms));
        let training = |host: &crate::worker::Host| matches!(host.state, State::Training(_));
        let slow = (0..).zip(&self.workers).find(|(_, host)| training(host)).map(|(index, _)| index);
        if let Some(index) = slow {
            self.suffers(Actor::Worker(index), for_ms + 200);
            let until = self.now + for_ms + 200;
            self.freeze(Actor::Worker(index), until);
        }
    }

    /// A worker's next contribution will kill whoever folds it.
    fn mixes_poison(&mut self) -> Option<String> {
        if self.poison.is_some() {
            return None;
        }
        let training: Vec<_> = (self.workers.iter())
            .filter_map(|host| match &host.state {
                State::Training(training) => Some((host.life, host.rank, training)),
                _ => None,
            })
            .map(|(life, rank, training)| {
                let full = training.record.spec.quorum.is_none();
                (
                    life,
                    rank,
                    training.worker.job,
                    training.engine.round() + 1,
                    training.record.layout.shards(),
                    full,
                )
            })
            .collect();
        if training.is_empty() {
            return None;
        }
        let (life, rank, job, round, shards, full) = training[self.fault_rng.random_range(0..training.len())];
        let shard = self.fault_rng.random_range(0..shards);
        self.poison = Some((life, round, shard));
        if full {
            self.checker.may_fail(job, "a poisonous contribution");
        }
        Some(format!("the contribution of rank {rank} to round {round} of shard {shard} is poison"))
    }
}

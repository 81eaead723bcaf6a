//! An autoscaler: its controller and lease are the real ones, the loop around them and the actuator modelled.

use std::sync::{Arc, atomic::Ordering};

use rand::RngExt as _;
use thalweg_autoscaler::{Action, Config, Controller};
use thalweg_broker::{LeaseKeeper, PartitionDepth, Queues as _, Revision, consumer_epochs, ensure_streams};
use thalweg_protocol::{Incarnation, InvokerBeat, PLACEMENT_KEY, PlacedPartition, Placement};

use crate::{
    Mutation,
    gateway::LEASE,
    network::{Actor, Millis},
    world::{Done, Event, Timer, World},
};

/// Time between its observations.
const TICK_MS: Millis = 200;

/// An autoscaler's process.
pub(crate) struct Host {
    controller: Controller,
    /// `None` while the lease is being renewed.
    keeper: Option<LeaseKeeper>,
    /// Revision of the placement that the controller knows; `None`: it has to be read before it can be written.
    known: Option<Revision>,
    observing: bool,
    placing: bool,
    /// Invokers that have ended and were not reaped.
    pub(crate) ended: Vec<String>,
}

/// What an observation gives.
pub(crate) struct Observed {
    depths: Vec<PartitionDepth>,
    asked: Millis,
    placement: Placement,
    revision: Revision,
}

/// Number of an invoker from its id.
pub(crate) fn number(id: &str) -> u32 {
    id.trim_start_matches('i').parse().unwrap_or(u32::MAX)
}

impl World {
    pub(crate) fn autoscaler_starts(&mut self, number: u32) {
        let config = Config {
            max_invokers: self.most_invokers,
            tick_ms: TICK_MS,
            idle_timeout_ms: 1000,
            shrink_window_ms: 1000,
            dead_after_ms: 1000,
            start_timeout_ms: 2000,
            drain_timeout_ms: 2000,
            // Slow enough that a handful of messages asks for several invokers.
            default_service_mb_per_s: 0.002,
            ..Config::default()
        };
        let ids = self.invoker_ids.clone();
        let name = move || format!("i{}", ids.fetch_add(1, Ordering::Relaxed));
        let controller = Controller::new(config, self.partitions, true, Box::new(name), self.now);
        let keeper = LeaseKeeper::new("autoscaler", Incarnation(self.rng.random()), LEASE);
        let host = Host {
            controller,
            keeper: Some(keeper),
            known: None,
            observing: false,
            placing: false,
            ended: Vec::new(),
        };
        self.autoscalers.insert(number, host);
        let me = Actor::Autoscaler(number);
        self.timer(1, me, Timer::Renew);
        self.timer(2, me, Timer::Tick);
    }

    pub(crate) fn autoscaler_hears(&mut self, number: u32, beat: InvokerBeat) {
        let now = self.now;
        let Some(host) = self.autoscalers.get_mut(&number) else { return };
        if host.controller.beat(beat, now) {
            self.autoscaler_acts(number);
        }
    }

    pub(crate) fn autoscaler_ticks(&mut self, number: u32, timer: Timer) {
        let me = Actor::Autoscaler(number);
        let (now, instant) = (self.now, self.instant());
        match timer {
            Timer::Renew => {
                self.timer(LEASE.renew_ms, me, Timer::Renew);
                let registry = self.remote(me).registry();
                let Some(mut keeper) = self.autoscalers.get_mut(&number).and_then(|host| host.keeper.take())
                else {
                    return;
                };
                self.spawn(me, async move {
                    let _ = keeper.tick(&registry, instant).await;
                    Done::Renewed(keeper, false)
                });
            }
            Timer::Wake => self.autoscaler_acts(number),
            _ => {
                self.timer(TICK_MS, me, Timer::Tick);
                let Some(host) = self.autoscalers.get_mut(&number) else { return };
                let ended = std::mem::take(&mut host.ended);
                host.controller.reaped(&ended, now);
                if !std::mem::replace(&mut host.observing, true) {
                    self.autoscaler_observes(number);
                }
                self.autoscaler_acts(number);
            }
        }
    }

    fn autoscaler_observes(&mut self, number: u32) {
        let me = Actor::Autoscaler(number);
        let (remote, config, partitions) = (self.remote(me), self.streams_config(), self.partitions);
        let clock: Arc<_> = self.clock.clone();
        self.spawn(me, async move {
            let registry = remote.registry();
            let observed = async {
                ensure_streams(&remote, &registry, &config).await?;
                let asked = clock.load(Ordering::Relaxed);
                let depths = remote.depths(partitions).await?;
                let (placement, revision) = registry.get::<Placement>(PLACEMENT_KEY).await?;
                let placement = match placement {
                    Some(placement) => placement,
                    None => {
                        let epochs = consumer_epochs(&remote, 0..partitions).await?;
                        let unheld = epochs.into_iter().map(|epoch| PlacedPartition { epoch, holder: None });
                        Placement { partitions: unheld.collect(), first: 0 }
                    }
                };
                Ok::<_, thalweg_broker::RegistryError>(Observed { depths, asked, placement, revision })
            };
            Done::Observed(observed.await.ok().map(Box::new))
        });
    }

    pub(crate) fn autoscaler_done(&mut self, number: u32, done: Done) {
        let (now, instant) = (self.now, self.instant());
        let Some(host) = self.autoscalers.get_mut(&number) else { return };
        match done {
            Done::Renewed(keeper, _) => host.keeper = Some(keeper),
            Done::Observed(observed) => {
                host.observing = false;
                let Some(observed) = observed else { return };
                let Observed { depths, asked, placement, revision } = *observed;
                host.controller.observed(&depths, asked);
                let holds = host.keeper.as_ref().is_some_and(|keeper| keeper.holds(instant));
                if holds && !host.placing {
                    if host.controller.leads() {
                        host.controller.placed(placement, now);
                    } else {
                        host.controller.lead(placement, now);
                    }
                    host.known = Some(revision);
                }
                self.autoscaler_acts(number);
            }
            Done::Placed(written) => {
                host.placing = false;
                if let Some((placement, revision)) = written {
                    host.controller.placed(placement, now);
                    host.known = Some(revision);
                    self.autoscaler_acts(number);
                }
            }
            _ => {}
        }
    }

    pub(crate) fn autoscaler_reconnected(&mut self, number: u32) {
        let now = self.now;
        if let Some(host) = self.autoscalers.get_mut(&number) {
            host.controller.interrupted(now);
            host.known = None;
        }
    }

    /// Acts, if it is its turn and the placement is known.
    fn autoscaler_acts(&mut self, number: u32) {
        let (now, instant) = (self.now, self.instant());
        let keeps_epoch = self.mutated(Mutation::EpochNotRaised);
        let Some(host) = self.autoscalers.get_mut(&number) else { return };
        // While the lease is being renewed it is unknown whether it is ours: nothing is done.
        let Some(keeper) = &host.keeper else { return };
        if !keeper.holds(instant) {
            host.controller.lapsed();
            host.known = None;
        } else if host.placing || !host.controller.leads() || host.known.is_none() {
            return;
        }
        let actions = host.controller.step(now);
        let wake = host.controller.wake_at();
        let before = host.controller.placement().clone();
        for action in actions {
            match action {
                Action::Decided(record) => {
                    self.note(|| {
                        format!("a{number}: {} -> {} ({:?})", record.previous, record.target, record.reason)
                    });
                }
                Action::Start(id) => {
                    let delay = self.rng.random_range(5..100);
                    let id = self::number(&id);
                    self.starters.insert(id, number);
                    self.later(delay, Event::Start(Actor::Invoker(id)));
                }
                Action::Place(mut placement) => {
                    if keeps_epoch {
                        let epochs = placement.partitions.iter_mut().zip(&before.partitions);
                        epochs.for_each(|(placed, before)| placed.epoch = before.epoch.max(1));
                    }
                    self.autoscaler_places(number, placement);
                }
                Action::Stop(id) => {
                    let id = self::number(&id);
                    if self.invokers.contains_key(&id) {
                        self.signal_stop(id);
                    } else {
                        // It was about to be started.
                        self.starters.remove(&id);
                    }
                }
            }
        }
        if let Some(at) = wake {
            self.timer(at.saturating_sub(now).max(1), Actor::Autoscaler(number), Timer::Wake);
        }
    }

    fn autoscaler_places(&mut self, number: u32, placement: Placement) {
        let me = Actor::Autoscaler(number);
        let registry = self.remote(me).registry();
        let Some(host) = self.autoscalers.get_mut(&number) else { return };
        let Some(expect) = host.known.take() else { return };
        host.placing = true;
        self.spawn(me, async move {
            let written = registry.put(PLACEMENT_KEY, &placement, expect).await;
            let revision = written.ok().and_then(Result::ok);
            Done::Placed(revision.map(|revision| (placement, revision)))
        });
    }
}

//! The autoscaler: its controller, and an actuator that starts simulated invokers.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use rand::RngExt as _;
use thalweg_autoscaler::{Action, Config, Controller};
use thalweg_broker::PartitionDepth;
use thalweg_protocol::{InvokerBeat, Partition};

use crate::{
    network::{Actor, Body, Millis},
    world::{Event, World},
};

/// Time between its observations.
pub(crate) const TICK_MS: Millis = 200;

/// The autoscaler's process.
pub(crate) struct Host {
    controller: Controller,
    /// Invokers that have ended and were not reaped.
    pub(crate) ended: Vec<String>,
}

impl Host {
    pub(crate) fn new(most: usize, partitions: Partition, ids: Arc<AtomicU32>, now: Millis) -> Self {
        let config = Config {
            max_invokers: most,
            tick_ms: TICK_MS,
            idle_timeout_ms: 1000,
            shrink_window_ms: 1000,
            dead_after_ms: 1000,
            start_timeout_ms: 2000,
            drain_timeout_ms: 2000,
            // Slow enough that a handful of messages asks for several invokers.
            default_service_mb_per_s: 0.0001,
            ..Config::default()
        };
        let name = move || format!("i{}", ids.fetch_add(1, Ordering::Relaxed));
        Self { controller: Controller::new(config, partitions, true, Box::new(name), now), ended: Vec::new() }
    }
}

/// Number of an invoker from its id.
pub(crate) fn number(id: &str) -> u32 {
    id.trim_start_matches('i').parse().unwrap_or(u32::MAX)
}

impl World {
    pub(crate) fn autoscaler_hears(&mut self, beat: InvokerBeat) {
        let now = self.now;
        if self.autoscaler.controller.beat(beat, now) {
            self.autoscaler_steps();
        }
    }

    /// Observes, if it can, and acts.
    pub(crate) fn autoscaler_ticks(&mut self) {
        let now = self.now;
        let ended = std::mem::take(&mut self.autoscaler.ended);
        self.autoscaler.controller.reaped(&ended, now);
        if self.broker_up && self.links[&Actor::Autoscaler].up {
            self.broker.ensure_streams(now);
            if let Some(depths) = self.broker.depths() {
                let depth =
                    |(messages, bytes)| PartitionDepth { messages, bytes, ..PartitionDepth::default() };
                let depths: Vec<_> = depths.into_iter().map(depth).collect();
                self.autoscaler.controller.observed(&depths, now);
            }
        }
        self.autoscaler_steps();
    }

    pub(crate) fn autoscaler_reconnected(&mut self) {
        let now = self.now;
        self.autoscaler.controller.interrupted(now);
        self.autoscaler.controller.lapsed();
    }

    fn autoscaler_steps(&mut self) {
        if !self.broker_up || !self.links[&Actor::Autoscaler].up {
            return;
        }
        let now = self.now;
        let controller = &mut self.autoscaler.controller;
        if controller.leads() {
            controller.placed(self.broker.placement.clone(), now);
        } else {
            controller.lead(self.broker.placement.clone(), now);
        }
        for action in controller.step(now) {
            match action {
                Action::Decided(record) => {
                    self.note(|| {
                        format!("autoscaler: {} -> {} ({:?})", record.previous, record.target, record.reason)
                    });
                }
                Action::Start(id) => {
                    let delay = self.rng.random_range(5..100);
                    self.later(delay, Event::Start(Actor::Invoker(number(&id))));
                }
                Action::Place(placement) => {
                    self.broker.placement = placement.clone();
                    self.autoscaler.controller.placed(placement, now);
                    // A hint to everybody; who misses it reads by itself.
                    let invokers: Vec<_> = self.invokers.keys().copied().collect();
                    for number in invokers {
                        let placement = Body::Placement(self.broker.placement.clone());
                        self.send(Actor::Broker, Actor::Invoker(number), placement);
                    }
                }
                Action::Stop(id) => self.invoker_stops(number(&id)),
            }
        }
    }
}

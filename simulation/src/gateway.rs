//! A gateway: the real one, with the loop around it modelled.

use std::sync::Arc;

use bytes::Bytes;
use rand::RngExt as _;
use thalweg_broker::{LeaseConfig, LeaseKeeper, StreamStorage, StreamsConfig, ensure_streams};
use thalweg_gateway::{Gateway, Jobs};
use thalweg_protocol::{ApiReply, Incarnation, JobKey, JobRecord, Kind, frame, job_key, limits};

use crate::{
    Mutation,
    calls::{Answer, CallId},
    invoker::EPOCH_MS,
    network::{Actor, Body, Millis},
    world::{Done, Timer, World},
};

/// Lease among gateways and among autoscalers.
pub(crate) const LEASE: LeaseConfig = LeaseConfig { renew_ms: 150, term_ms: 1000 };
/// A gateway's process.
pub(crate) struct Host {
    pub(crate) gateway: Arc<Gateway>,
    /// `None` while the lease is being renewed.
    keeper: Option<LeaseKeeper>,
    pub(crate) leads: bool,
    /// It has led at some time, for [`Mutation::LeaseExpiredThroughOutage`].
    led: bool,
}

impl World {
    pub(crate) fn streams_config(&self) -> StreamsConfig {
        let storage = if self.files { StreamStorage::File } else { StreamStorage::Memory };
        StreamsConfig { partitions: self.partitions, storage, ..StreamsConfig::default() }
    }

    pub(crate) fn gateway_starts(&mut self, number: u32) {
        let me = Actor::Gateway(number);
        let remote = self.remote(me);
        let (stores, incarnations) = (remote.clone(), self.incarnations.clone());
        let jobs = Jobs {
            registry: remote.registry(),
            queues: Arc::new(remote),
            stores: Arc::new(move |_| Arc::new(stores.store())),
            max_payload: limits::MESSAGE_OVERHEAD_BYTES * 4,
            streams: self.streams_config(),
            nats_syncs_always: true,
            incarnations,
        };
        let (start, clock) = (self.start, self.clock.clone());
        let clock = Arc::new(move || {
            start + std::time::Duration::from_millis(clock.load(std::sync::atomic::Ordering::Relaxed))
        });
        let lease = std::time::Duration::from_millis(self.lease_ms);
        let (skew, virtual_time) = (self.rng.random_range(0..=2 * self.most_skew), self.clock.clone());
        let epoch = EPOCH_MS + skew - self.most_skew;
        let wall_clock = Arc::new(move || epoch + virtual_time.load(std::sync::atomic::Ordering::Relaxed));
        let gateway = Gateway::new(jobs, clock, lease, self.window_budget).on_wall_clock(wall_clock);
        let gateway = Arc::new(gateway);
        let keeper = LeaseKeeper::new("gateway", Incarnation(self.rng.random()), LEASE);
        self.gateways.insert(number, Host { gateway, keeper: Some(keeper), leads: false, led: false });
        self.gateway_mends_streams(number);
        self.timer(1, me, Timer::Renew);
        self.timer(self.sweep_ms(), me, Timer::Sweep);
    }

    /// As [`Gateway::sweep_interval`].
    fn sweep_ms(&self) -> Millis {
        self.lease_ms / 8
    }

    /// As it does on every connect.
    fn gateway_mends_streams(&mut self, number: u32) {
        let me = Actor::Gateway(number);
        let (remote, config) = (self.remote(me), self.streams_config());
        self.spawn(me, async move {
            while ensure_streams(&remote, &remote.registry(), &config).await.is_err() {
                remote.sleep(50).await;
            }
            Done::Nothing
        });
    }

    pub(crate) fn gateway_reconnected(&mut self, number: u32) {
        if !self.mutated(Mutation::LeaseExpiredThroughOutage)
            && let Some(host) = self.gateways.get(&number)
        {
            host.gateway.interrupted();
        }
        self.gateway_mends_streams(number);
    }

    pub(crate) fn gateway_ticks(&mut self, number: u32, timer: Timer) {
        let me = Actor::Gateway(number);
        let now = self.instant();
        let Some(host) = self.gateways.get_mut(&number) else { return };
        let (gateway, led) = (host.gateway.clone(), host.led);
        match timer {
            Timer::Renew => {
                self.timer(LEASE.renew_ms, me, Timer::Renew);
                let Some(mut keeper) = self.gateways.get_mut(&number).and_then(|host| host.keeper.take())
                else {
                    return;
                };
                let (registry, clock) = (self.remote(me).registry(), self.clock.clone());
                let start = self.start;
                let clings = self.mutated(Mutation::LeaseExpiredThroughOutage) && led;
                self.spawn(me, async move {
                    // The loop does nothing else meanwhile; a failure leaves the lease to lapse.
                    let _ = keeper.tick(&registry, now).await;
                    let until = keeper.held_until();
                    let until = if clings { Some(now + std::time::Duration::from_secs(3600)) } else { until };
                    gateway.lead(until).await;
                    let now = clock.load(std::sync::atomic::Ordering::Relaxed);
                    let holds = keeper.holds(start + std::time::Duration::from_millis(now));
                    Done::Renewed(keeper, holds)
                });
            }
            _ => {
                self.timer(self.sweep_ms(), me, Timer::Sweep);
                let (remote, partitions) = (self.remote(me), self.partitions);
                self.spawn(me, async move {
                    gateway.sweep(&remote, partitions).await;
                    Done::Nothing
                });
            }
        }
    }

    pub(crate) fn gateway_hears(&mut self, number: u32, body: Body) {
        let me = Actor::Gateway(number);
        let Some(host) = self.gateways.get(&number) else { return };
        let gateway = host.gateway.clone();
        match body {
            Body::Request { from, id, frame, beat } => self.spawn(me, async move {
                let reply =
                    if beat { gateway.beat(&frame).await } else { Some(gateway.answer(&frame).await) };
                Done::Replied(from, id, reply)
            }),
            Body::Hint(key) => self.spawn(me, async move {
                gateway.refresh(&thalweg_protocol::subjects::registry_hint(&key)).await;
                Done::Nothing
            }),
            other => unreachable!("not for a gateway: {other:?}"),
        }
    }

    pub(crate) fn gateway_done(&mut self, number: u32, done: Done) {
        match done {
            Done::Replied(to, id, Some(reply)) => {
                let reply = self.grant(reply);
                self.send(Actor::Gateway(number), to, Body::Answer(id, Answer::Frame(reply)));
            }
            Done::Renewed(keeper, leads) => {
                if let Some(host) = self.gateways.get_mut(&number) {
                    host.keeper = Some(keeper);
                    if leads != host.leads {
                        host.leads = leads;
                        host.led |= leads;
                        self.note(|| format!("g{number} leads: {leads}"));
                    }
                }
            }
            _ => {}
        }
    }

    fn grant(&self, reply: Bytes) -> Bytes {
        if !self.mutated(Mutation::WindowNotReserved) {
            return reply;
        }
        match frame::open::<ApiReply>(Kind::ApiReply, &reply) {
            Ok((ApiReply::Beat { roster_epoch, paused, .. }, _)) => {
                let window_bytes = self.window_budget;
                frame::seal(Kind::ApiReply, &ApiReply::Beat { window_bytes, roster_epoch, paused }, &[])
            }
            _ => reply,
        }
    }

    /// The record of a job as the registry has it.
    pub(crate) fn record_of(&self, job: usize) -> Option<JobRecord> {
        self.record(&self.specs[job].key)
    }

    pub(crate) fn record(&self, key: &JobKey) -> Option<JobRecord> {
        let (value, _) = self.broker.entry(&job_key(key));
        frame::open_record(&value?).ok()
    }

    pub(crate) fn call_lost(id: CallId) -> Body {
        Body::Answer(id, Answer::Lost)
    }
}

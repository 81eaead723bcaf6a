//! A worker: the SDK's engine and a training loop that pushes and waits.

use std::time::{Duration, Instant};

use rand::{RngExt as _, seq::SliceRandom as _};
use thalweg_protocol::{
    FrameBuilder, GradientHeader, Incarnation, Kind, Rank, ResultHeader, ShardIndex, frame,
};
use thalweg_sdk::engine::{Action, Engine};

use crate::{
    Mutation,
    check::values,
    network::{Actor, Body, Millis},
    world::World,
};

/// How often time passes for it.
pub(crate) const TICK_MS: Millis = 50;

/// A worker's process.
pub(crate) struct Host {
    pub(crate) life: Incarnation,
    pub(crate) engine: Engine,
    /// It has begun its present round.
    begun: bool,
    pub(crate) done: bool,
}

impl Host {
    pub(crate) fn new(life: Incarnation, engine: Engine) -> Self {
        Self { life, engine, begun: false, done: false }
    }
}

impl World {
    pub(crate) fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    pub(crate) fn worker_hears(&mut self, rank: Rank, body: Body) {
        let now = self.instant();
        let jitter = self.rng.random();
        let engine = &mut self.workers[rank as usize].engine;
        let actions = match body {
            Body::Confirmed { shard, round, len } => engine.confirmed(shard, round, len, now),
            Body::Refused { shard, round, len } => engine.refused(shard, round, len, jitter, now),
            Body::Result(bytes) => match frame::open::<ResultHeader>(Kind::Result, &bytes) {
                Ok((header, parameters)) => {
                    let before = engine.head(header.shard);
                    let actions =
                        engine.result(header.shard, header.head, header.ledger, parameters.clone(), now);
                    if engine.head(header.shard) != before {
                        self.given(rank, header.shard, &parameters);
                    }
                    actions
                }
                Err(error) => return self.checker.fail("I4", format!("an unreadable result: {error}")),
            },
            Body::Fetched(shard, state) => {
                let before = engine.head(shard);
                let actions = engine.result(shard, state.head, state.ledger, state.values.clone(), now);
                if engine.head(shard) != before {
                    self.given(rank, shard, &state.values);
                }
                actions
            }
            Body::Reject(_, reject) => engine.reject(reject, now),
            Body::Heads(heads) => {
                return self.send(Actor::Worker(rank), Actor::Broker, Body::ReadStreams(heads));
            }
            Body::Streams(heads, created) => {
                let shards = 0..self.job.record.layout.shards();
                let of = |shard| created.get(usize::from(self.job.record.partition(shard))).copied();
                let streams = shards.map(|shard| of(shard).unwrap_or_default()).collect();
                self.workers[rank as usize].engine.heads(&heads, streams, now)
            }
            other => unreachable!("not for a worker: {other:?}"),
        };
        self.worker_acts(rank, actions);
    }

    pub(crate) fn worker_ticks(&mut self, rank: Rank) {
        let now = self.instant();
        let actions = self.workers[rank as usize].engine.tick(now);
        self.worker_acts(rank, actions);
    }

    pub(crate) fn worker_reconnected(&mut self, rank: Rank) {
        let now = self.instant();
        let actions = self.workers[rank as usize].engine.reconnected(now);
        self.worker_acts(rank, actions);
    }

    fn given(&mut self, rank: Rank, shard: ShardIndex, parameters: &[u8]) {
        let Some(head) = self.workers[rank as usize].engine.head(shard) else { return };
        let may_skip = self.job.record.spec.quorum.is_some();
        self.checker.given(rank, shard, head, parameters, may_skip);
    }

    /// Performs what the engine asks for, then goes on training.
    fn worker_acts(&mut self, rank: Rank, actions: Vec<Action>) {
        for action in actions {
            let (to, body) = match action {
                Action::Publish(shard, round, frame) => {
                    let partition = self.job.record.partition(shard);
                    (Actor::Broker, Body::Publish { shard, round, partition, rank, frame })
                }
                Action::Ask if self.mutated(Mutation::NeverAsk) => continue,
                Action::Fetch(_) if self.mutated(Mutation::NeverFetch) => continue,
                Action::Ask => (Actor::Store, Body::ReadHeads),
                Action::Fetch(shard) => (Actor::Store, Body::Fetch(shard)),
            };
            self.send(Actor::Worker(rank), to, body);
        }
        self.train(rank);
    }

    /// The training loop: the next round once this one is complete.
    pub(crate) fn train(&mut self, rank: Rank) {
        let rounds = self.rounds;
        let host = &mut self.workers[rank as usize];
        if let Some(error) = host.engine.failure() {
            let text = format!("rank {rank} failed: {error}");
            return self.checker.fail("L1", text);
        }
        if host.done || (host.begun && !host.engine.is_complete()) {
            return;
        }
        if host.begun {
            if host.engine.target() >= rounds {
                host.done = true;
                return;
            }
            host.engine.advance();
        }
        host.begun = true;
        let mut shards: Vec<_> = (0..self.job.record.layout.shards()).collect();
        if self.workers[rank as usize].engine.any_order() {
            shards.shuffle(&mut self.rng);
        }
        for shard in shards {
            let host = &self.workers[rank as usize];
            let (Some(head), round) = (host.engine.head(shard), host.engine.round()) else { continue };
            if head.version >= round {
                continue;
            }
            let elements = self.job.record.layout.len(shard);
            let header = GradientHeader {
                job: self.job.record.incarnation,
                shard,
                round,
                worker: host.life,
                rank,
                roster_epoch: host.engine.roster_epoch(),
                base: head.state_id,
                weight: 1.0,
                void: false,
                elements: u32::try_from(elements).unwrap_or(u32::MAX),
            };
            let mut frame = FrameBuilder::new(Kind::Gradient, &header, elements * 4);
            frame.payload_mut().copy_from_slice(&values(rank, shard, round, elements));
            let now = self.instant();
            let actions = self.workers[rank as usize].engine.push(shard, frame.finish(), now);
            // Not through `worker_acts`: this is the training loop already.
            for action in actions {
                if let Action::Publish(shard, round, frame) = action {
                    let partition = self.job.record.partition(shard);
                    let body = Body::Publish { shard, round, partition, rank, frame };
                    self.send(Actor::Worker(rank), Actor::Broker, body);
                }
            }
        }
    }
}

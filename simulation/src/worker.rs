//! A worker: the SDK's engine, the way of joining, and a training loop that pushes and waits.
//!
//! `join` follows `thalweg_sdk::Client::join_with` step by step; the engine is the real one.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{RngExt as _, seq::SliceRandom as _};
use thalweg_protocol::{
    ApiReply, ApiRequest, Claim, Epoch, ErrorCode, FrameBuilder, GradientHeader, Head, Incarnation,
    JobRecord, JobSpec, JobState, Kind, NonFinite, OnLoss, Rank, Reject, ResultHeader, Round, STREAMS_KEY,
    ShardIndex, Streams, WireError, WorkerRef, frame, limits, subjects,
};
use thalweg_sdk::engine::{Action, Engine, Timing, first_round, held_up, void_after};
use thalweg_store::{ShardStore as _, Standing};

use crate::{
    Mutation,
    calls::{Answer, Ask, Remote},
    check::{is_end_of_job, values},
    network::{Actor, Body, Millis},
    world::{Done, Timer, World},
};

/// How often time passes for it.
pub(crate) const TICK_MS: Millis = 40;
/// Its waits, shortened: a resend is due after five seconds instead of thirty.
const TIMING: Timing = Timing {
    ask_after: Duration::from_millis(400),
    resend_after: Duration::from_secs(5),
    retry_cap: Duration::from_millis(500),
};
/// Between two tries of anything while joining.
const RETRY_MS: Millis = 60;

/// A worker's place: one rank of one job, held by one process after another.
pub(crate) struct Host {
    pub(crate) job: usize,
    pub(crate) rank: Rank,
    pub(crate) life: Incarnation,
    pub(crate) state: State,
    /// Until then it suffers from something that happened to itself.
    pub(crate) own_fault_until: Millis,
}

pub(crate) enum State {
    /// Not there; comes back, or not.
    Away {
        returns: bool,
    },
    Joining,
    Training(Box<Training>),
    Leaving,
    Done,
}

pub(crate) struct Training {
    pub(crate) record: Arc<JobRecord>,
    pub(crate) worker: WorkerRef,
    pub(crate) engine: Engine,
    pub(crate) window_bytes: u64,
    /// It has begun its present round.
    begun: bool,
    was_active: bool,
}

/// What joining gives.
pub(crate) struct Joined {
    record: JobRecord,
    worker: WorkerRef,
    roster_epoch: Epoch,
    window_bytes: u64,
    heads: Vec<Head>,
    round: Round,
    streams: Vec<i64>,
}

/// Asks a gateway until it answers, or says something that waiting cannot cure.
pub(crate) async fn ask_gateway(
    remote: &Remote,
    worker: Option<(&WorkerRef, u64)>,
    request: &ApiRequest,
) -> Result<ApiReply, WireError> {
    loop {
        if let Some((worker, window_bytes)) = worker {
            let beat = ApiRequest::Beat { worker: worker.clone(), window_bytes, active: false };
            drop(remote.ask(Ask::Beat(frame::seal(Kind::ApiRequest, &beat, &[]))));
        }
        let frame = frame::seal(Kind::ApiRequest, request, &[]);
        if let Answer::Frame(reply) = remote.ask(Ask::Api(frame)).await {
            match frame::open::<ApiReply>(Kind::ApiReply, &reply) {
                Ok((ApiReply::Error(error), _)) if !error.is_retryable() => return Err(error),
                Ok((ApiReply::Error(_), _)) => {}
                Ok((reply, _)) => return Ok(reply),
                Err(error) => return Err(error.to_wire()),
            }
        }
        remote.sleep(RETRY_MS).await;
    }
}

fn unexpected(reply: &ApiReply) -> WireError {
    WireError::new(ErrorCode::Malformed, format!("unexpected reply {reply:?}"))
}

async fn beat(remote: &Remote, worker: &WorkerRef, window_bytes: u64, active: bool) -> Option<ApiReply> {
    let beat = ApiRequest::Beat { worker: worker.clone(), window_bytes, active };
    match remote.ask(Ask::Beat(frame::seal(Kind::ApiRequest, &beat, &[]))).await {
        Answer::Frame(reply) => Some(frame::open::<ApiReply>(Kind::ApiReply, &reply).ok()?.0),
        _ => None,
    }
}

/// The epoch of a roster that holds all founding members, or 0.
async fn keep_alive(remote: &Remote, worker: &WorkerRef, window_bytes: u64) -> Result<Epoch, WireError> {
    match beat(remote, worker, window_bytes, false).await {
        Some(ApiReply::Error(error)) if !error.is_retryable() => Err(error),
        Some(ApiReply::Beat { roster_epoch, .. }) => Ok(roster_epoch),
        _ => Ok(0),
    }
}

async fn read_streams(remote: &Remote, record: &JobRecord) -> Option<Vec<i64>> {
    let (streams, _) = remote.registry().get::<Streams>(STREAMS_KEY).await.ok()?;
    let created = streams?.created;
    let of = |shard| created.get(usize::from(record.partition(shard))).copied().unwrap_or_default();
    Some((0..record.layout.shards()).map(of).collect())
}

async fn join(remote: Remote, spec: JobSpec, rank: Rank, life: Incarnation) -> Result<Joined, WireError> {
    let (mut record, mut known) = match ask_gateway(&remote, None, &ApiRequest::OpenJob(spec)).await? {
        ApiReply::Job(record, roster) => (*record, roster),
        other => return Err(unexpected(&other)),
    };
    let key = record.spec.key.clone();
    while record.state == JobState::Initialising {
        remote.sleep(RETRY_MS).await;
        match ask_gateway(&remote, None, &ApiRequest::GetJob(key.clone())).await? {
            ApiReply::Job(newer, roster) => (record, known) = (*newer, roster),
            other => return Err(unexpected(&other)),
        }
    }
    let worker = WorkerRef { key: key.clone(), job: record.incarnation, rank, incarnation: life };
    let id = format!("w{rank}");
    let (roster, window_bytes) = loop {
        let replaces = known.former_life(rank, &id);
        let claim = ApiRequest::Join(Claim { worker: worker.clone(), id: id.clone(), replaces });
        match ask_gateway(&remote, Some((&worker, 0)), &claim).await {
            Ok(ApiReply::Joined { roster, window_bytes, .. }) => break (roster, window_bytes),
            Ok(other) => return Err(unexpected(&other)),
            Err(error) if error.code == ErrorCode::RankTaken => {
                remote.sleep(RETRY_MS).await;
                match ask_gateway(&remote, Some((&worker, 0)), &ApiRequest::GetJob(key.clone())).await? {
                    ApiReply::Job(_, roster) => known = roster,
                    other => return Err(unexpected(&other)),
                }
            }
            Err(error) => return Err(error),
        }
    };
    let mut roster_epoch = if roster.started { roster.epoch } else { 0 };
    for waited in 1_u32.. {
        if roster_epoch > 0 {
            break;
        }
        remote.sleep(RETRY_MS).await;
        roster_epoch = keep_alive(&remote, &worker, window_bytes).await?;
        // Now and then, as the SDK: the heartbeats tell by themselves.
        if roster_epoch > 0 || !waited.is_multiple_of(4) {
            continue;
        }
        match ask_gateway(&remote, Some((&worker, window_bytes)), &ApiRequest::GetJob(key.clone())).await? {
            ApiReply::Job(newer, _) if newer.incarnation != record.incarnation => {
                return Err(WireError::new(ErrorCode::Gone, "this life of the job is over"));
            }
            ApiReply::Job(newer, newest) => {
                if let Some(error) = newer.state.end(&key) {
                    return Err(error);
                }
                if newest.started {
                    roster_epoch = newest.epoch;
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
    let from_round = roster.tenure(life).map_or(1, |member| member.from_round);
    let (heads, round) = loop {
        match remote.store().heads(record.incarnation, 0, record.layout.shards()).await {
            Ok(heads) => {
                if let Some(round) = first_round(&heads, from_round) {
                    break (heads, round);
                }
                for (shard, head) in held_up(&heads, from_round) {
                    let frame = void_after((record.incarnation, life, rank), roster_epoch, shard, head);
                    let partition = record.partition(shard);
                    let subject = subjects::gradient(partition, &key, rank);
                    drop(remote.ask(Ask::Publish(partition, subject, frame)));
                }
            }
            Err(error) if error.is_retryable() => {}
            Err(error) => return Err(error.to_wire()),
        }
        remote.sleep(RETRY_MS).await;
        keep_alive(&remote, &worker, window_bytes).await?;
    };
    let streams = read_streams(&remote, &record).await.unwrap_or_default();
    Ok(Joined { record, worker, roster_epoch, window_bytes, heads, round, streams })
}

impl World {
    pub(crate) fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    /// Its process has started.
    pub(crate) fn worker_starts(&mut self, index: u32) {
        let life = Incarnation(self.rng.random());
        let host = &mut self.workers[index as usize];
        host.life = life;
        host.state = State::Joining;
        let (spec, rank) = (self.specs[host.job].clone(), host.rank);
        let me = Actor::Worker(index);
        let remote = self.remote(me);
        self.spawn(me, async move { Done::Joined(Box::new(join(remote, spec, rank, life).await)) });
        self.timer(TICK_MS, me, Timer::Tick);
        self.timer(self.lease_ms / 8, me, Timer::Beat);
    }

    fn training(&mut self, index: u32) -> Option<&mut Training> {
        match &mut self.workers[index as usize].state {
            State::Training(training) => Some(training),
            _ => None,
        }
    }

    pub(crate) fn worker_done(&mut self, index: u32, done: Done) {
        let (now, jitter) = (self.instant(), self.rng.random());
        let actions = match done {
            Done::Joined(joined) => return self.worker_joined(index, *joined),
            Done::Left => {
                self.workers[index as usize].state = State::Done;
                return self.end(Actor::Worker(index));
            }
            Done::Published(shard, round, len, stored) => {
                let Some(training) = self.training(index) else { return };
                if stored {
                    training.engine.confirmed(shard, round, len, now)
                } else {
                    training.engine.refused(shard, round, len, jitter, now)
                }
            }
            Done::Asked(Ok((heads, streams))) => {
                let Some(training) = self.training(index) else { return };
                training.engine.heads(&heads, streams, now)
            }
            Done::Looked(shard, Ok((head, contained))) => {
                let Some(training) = self.training(index) else { return };
                training.engine.looked(shard, head, contained, now)
            }
            Done::Fetched(shard, Ok((head, ledger, values))) => {
                return self.worker_is_given(index, shard, head, ledger, values);
            }
            Done::Asked(Err(error)) | Done::Fetched(_, Err(error)) | Done::Looked(_, Err(error))
                if !error.is_retryable() =>
            {
                let Some(training) = self.training(index) else { return };
                training.engine.fail(error);
                Vec::new()
            }
            Done::Beaten(Some(ApiReply::Beat { window_bytes, roster_epoch, .. })) => {
                self.windows.insert(self.workers[index as usize].life, window_bytes);
                self.note(|| format!("worker {index} has a window of {window_bytes} bytes"));
                self.check_windows();
                let divisor = self.window_divisor;
                let Some(training) = self.training(index) else { return };
                training.window_bytes = window_bytes;
                training.engine.window(window_bytes / divisor, roster_epoch, now)
            }
            Done::Beaten(Some(ApiReply::Error(error))) if !error.is_retryable() => {
                let Some(training) = self.training(index) else { return };
                training.engine.fail(error);
                Vec::new()
            }
            _ => return,
        };
        self.worker_acts(index, actions);
    }

    fn worker_joined(&mut self, index: u32, joined: Result<Joined, WireError>) {
        let host = &self.workers[index as usize];
        let life = host.life;
        let joined = match joined {
            Ok(joined) => joined,
            Err(error) => return self.training_ends(index, &error),
        };
        let Joined { record, worker, roster_epoch, window_bytes, heads, round, streams } = joined;
        let model_bytes = record.layout.elements * 4 + u64::from(record.layout.shards()) * 256;
        let identity = (record.incarnation, life, worker.rank);
        let now = self.instant();
        let mut timing = TIMING;
        if self.mutated(Mutation::RecreationUnnoticed) {
            timing.resend_after = Duration::from_secs(3600);
        }
        let mut engine = Engine::new(timing, identity, heads.clone(), round, model_bytes, now)
            .full_roster(record.spec.quorum.is_none());
        engine.window(window_bytes / self.window_divisor, roster_epoch, now);
        engine.heads(&heads, streams, now);
        self.checker.joined(life, &heads);
        self.windows.insert(life, window_bytes);
        self.note(|| format!("worker {index} (rank {}) begins at round {round}", worker.rank));
        let training = Training {
            record: Arc::new(record),
            worker,
            engine,
            window_bytes,
            begun: false,
            was_active: false,
        };
        self.workers[index as usize].state = State::Training(Box::new(training));
        self.train(index);
    }

    pub(crate) fn worker_hears(&mut self, index: u32, body: Body) {
        let now = self.instant();
        match body {
            Body::Result(_, bytes) => {
                let Some(training) = self.training(index) else { return };
                let (header, values) = match frame::open::<ResultHeader>(Kind::Result, &bytes) {
                    Ok(opened) => opened,
                    Err(error) => {
                        return self.checker.fail("I4", None, format!("an unreadable result: {error}"));
                    }
                };
                if header.job == training.worker.job {
                    self.worker_is_given(index, header.shard, header.head, header.ledger, values);
                }
            }
            Body::Reject(_, _, bytes) => {
                let Some(training) = self.training(index) else { return };
                if let Ok((reject, _)) = frame::open::<Reject>(Kind::Reject, &bytes) {
                    let actions = training.engine.reject(reject, now);
                    self.worker_acts(index, actions);
                }
            }
            other => unreachable!("not for a worker: {other:?}"),
        }
    }

    fn worker_is_given(
        &mut self,
        index: u32,
        shard: ShardIndex,
        head: Head,
        ledger: thalweg_protocol::Ledger,
        values: Bytes,
    ) {
        let now = self.instant();
        let Some(training) = self.training(index) else { return };
        let before = training.engine.head(shard);
        let actions = training.engine.result(shard, head, ledger.clone(), values.clone(), now);
        if training.engine.head(shard) != before {
            let who = (training.worker.job, training.worker.incarnation, training.worker.rank);
            self.checker.given(who, shard, head, &ledger, &values);
        }
        self.worker_acts(index, actions);
    }

    pub(crate) fn worker_ticks(&mut self, index: u32, timer: Timer) {
        let me = Actor::Worker(index);
        let now = self.instant();
        match timer {
            Timer::Beat => {
                self.timer(self.lease_ms / 8, me, Timer::Beat);
                self.worker_beats(index);
            }
            _ => {
                self.timer(TICK_MS, me, Timer::Tick);
                let Some(training) = self.training(index) else { return };
                let actions = training.engine.tick(now);
                self.worker_acts(index, actions);
            }
        }
    }

    /// What workers may have in flight together stays within the budget; least windows are headroom.
    fn check_windows(&mut self) {
        let mut headroom = 0;
        let mut total = 0;
        for host in &self.workers {
            let (State::Training(training), Some(window)) = (&host.state, self.windows.get(&host.life))
            else {
                continue;
            };
            // The life of its job may be over; it will be told.
            if self.record_of(host.job).is_none_or(|record| record.incarnation != training.worker.job) {
                continue;
            }
            // One that was expired while it was frozen may not know it yet.
            let roster = self.checker.newest_roster(training.worker.job);
            let tenure = roster.and_then(|roster| roster.tenure(host.life));
            if tenure.is_some_and(|member| member.until_round.is_none()) {
                headroom += (training.record.layout.len(0) * 4 + limits::MESSAGE_OVERHEAD_BYTES) as u64;
                total += window;
            }
        }
        if total > self.window_budget + headroom {
            let text = format!("windows of {total} bytes, the budget is {} + {headroom}", self.window_budget);
            self.checker.fail("I6", None, text);
        }
    }

    fn worker_beats(&mut self, index: u32) {
        let me = Actor::Worker(index);
        let remote = self.remote(me);
        let Some(training) = self.training(index) else { return };
        let (worker, window, active) =
            (training.worker.clone(), training.window_bytes, training.engine.is_active());
        self.spawn(me, async move { Done::Beaten(beat(&remote, &worker, window, active).await) });
    }

    pub(crate) fn worker_reconnected(&mut self, index: u32) {
        let now = self.instant();
        let Some(training) = self.training(index) else { return };
        let actions = training.engine.reconnected(now);
        self.worker_acts(index, actions);
    }

    /// Performs what the engine asks for, then goes on training.
    fn worker_acts(&mut self, index: u32, actions: Vec<Action>) {
        for action in actions {
            self.worker_acts_once(index, action);
        }
        self.train(index);
    }

    fn worker_acts_once(&mut self, index: u32, action: Action) {
        let me = Actor::Worker(index);
        let unnoticed = self.mutated(Mutation::RecreationUnnoticed);
        let (never_ask, never_fetch) = (self.mutated(Mutation::NeverAsk), self.mutated(Mutation::NeverFetch));
        let remote = self.remote(me);
        let Some(training) = self.training(index) else { return };
        let (record, worker) = (training.record.clone(), training.worker.clone());
        match action {
            Action::Publish(shard, round, frame) => {
                let partition = record.partition(shard);
                let subject = subjects::gradient(partition, &worker.key, worker.rank);
                let len = frame.len() as u64;
                self.spawn(me, async move {
                    let answer = remote.ask(Ask::Publish(partition, subject, frame)).await;
                    Done::Published(shard, round, len, matches!(answer, Answer::Done))
                });
            }
            Action::Ask if never_ask => {}
            Action::Fetch(_) if never_fetch => {}
            Action::Ask => self.spawn(me, async move {
                let heads = remote.store().heads(record.incarnation, 0, record.layout.shards()).await;
                let streams = read_streams(&remote, &record).await;
                let streams = if unnoticed { streams.map(|all| vec![1; all.len()]) } else { streams };
                let heads = heads.map_err(|error| error.to_wire());
                let unavailable = || WireError::new(ErrorCode::Unavailable, "the registry does not answer");
                Done::Asked(heads.and_then(|heads| Ok((heads, streams.ok_or_else(unavailable)?))))
            }),
            Action::Look(shard) => self.spawn(me, async move {
                let standing = remote.store().fetch_head(record.incarnation, shard).await;
                let contained = |standing: &Standing| {
                    standing.partial.as_ref().is_some_and(|partial| partial.ledger.contains(worker.rank))
                };
                let standing = standing.map(|standing| (standing.head, contained(&standing)));
                Done::Looked(shard, standing.map_err(|error| error.to_wire()))
            }),
            Action::Fetch(shard) => self.spawn(me, async move {
                let state = remote.store().fetch(record.incarnation, shard, false).await;
                let state = state.map(|state| (state.head, state.ledger, state.values));
                Done::Fetched(shard, state.map_err(|error| error.to_wire()))
            }),
        }
    }

    /// The training loop: the next round once this one is complete.
    fn train(&mut self, index: u32) {
        let rounds = self.rounds;
        let Some(training) = self.training(index) else { return };
        if let Some(error) = training.engine.failure() {
            let error = error.clone();
            return self.training_ends(index, &error);
        }
        if !training.begun && training.engine.round() > rounds {
            return self.worker_leaves(index);
        }
        if training.begun {
            if !training.engine.is_complete() {
                return;
            }
            if training.engine.target() >= rounds {
                return self.worker_leaves(index);
            }
            training.engine.advance();
        }
        training.begun = true;
        self.push_round(index);
        let Some(training) = self.training(index) else { return };
        let (active, was_active) = (training.engine.is_active(), training.was_active);
        training.was_active = active;
        if active && !was_active {
            // As the driver does after idleness.
            self.worker_beats(index);
        }
    }

    fn push_round(&mut self, index: u32) {
        let (skips, odd) = (self.rng.random_bool(0.04), self.rng.random_bool(0.04));
        let now = self.instant();
        let Some(training) = self.training(index) else { return };
        let record = training.record.clone();
        // A client of somebody else's that does not look at its values before it sends them.
        let faulty = odd && record.spec.non_finite == NonFinite::Void;
        let any_order = training.engine.any_order();
        let mut shards: Vec<_> = (0..record.layout.shards()).collect();
        if any_order {
            shards.shuffle(&mut self.rng);
        }
        for shard in shards {
            let Some(training) = self.training(index) else { return };
            let (Some(head), round) = (training.engine.head(shard), training.engine.round()) else {
                continue;
            };
            if head.version >= round {
                continue;
            }
            let elements = record.layout.len(shard);
            let header = GradientHeader {
                job: record.incarnation,
                shard,
                round,
                worker: training.worker.incarnation,
                rank: training.worker.rank,
                roster_epoch: training.engine.roster_epoch(),
                base: head.state_id,
                weight: 1.0,
                void: skips,
                elements: u32::try_from(elements).unwrap_or(u32::MAX),
            };
            let len = if skips { 0 } else { elements * 4 };
            let mut frame = FrameBuilder::new(Kind::Gradient, &header, len);
            if !skips {
                let mut payload = values(training.worker.incarnation, shard, round, elements);
                if faulty {
                    payload[..4].copy_from_slice(&f32::NAN.to_le_bytes());
                }
                frame.payload_mut().copy_from_slice(&payload);
            }
            let actions = training.engine.push(shard, frame.finish(), now);
            // Not through `worker_acts`: this is the training loop already.
            actions.into_iter().for_each(|action| self.worker_acts_once(index, action));
        }
    }

    /// It has trained enough.
    pub(crate) fn worker_leaves(&mut self, index: u32) {
        let me = Actor::Worker(index);
        let remote = self.remote(me);
        let Some(training) = self.training(index) else { return };
        let leave = ApiRequest::Leave(training.worker.clone());
        self.workers[index as usize].state = State::Leaving;
        self.note(|| format!("worker {index} leaves"));
        self.spawn(me, async move {
            // Whatever is said: its lease ends at the latest.
            let _ = ask_gateway(&remote, None, &leave).await;
            Done::Left
        });
    }

    /// Its training loop has ended with an error: it joins again, or its job is over.
    fn training_ends(&mut self, index: u32, error: &WireError) {
        self.note(|| format!("worker {index} fails: {error}"));
        let (job, rank, round) = {
            let host = &self.workers[index as usize];
            let (job, round) = match &host.state {
                State::Training(training) => (Some(training.worker.job), training.engine.round()),
                _ => (self.record_of(host.job).map(|record| record.incarnation), 0),
            };
            (job, host.rank, round)
        };
        let life = self.workers[index as usize].life;
        self.end(Actor::Worker(index));
        if is_end_of_job(error) {
            if let Some(job) = job {
                self.checker.training_failed(job, rank, error);
            }
            if self.has_another_life(self.workers[index as usize].job) {
                self.workers[index as usize].state = State::Away { returns: true };
                let delay = self.rng.random_range(10..300);
                return self.later(delay, crate::world::Event::Start(Actor::Worker(index)));
            }
            self.workers[index as usize].state = State::Done;
            return;
        }
        if error.code != ErrorCode::LeaseLost {
            let text = format!("rank {rank} fails: {error}");
            return self.checker.fail("L1", None, text);
        }
        if let Some(job) = job {
            self.checker.lost_its_lease((job, life, rank), round, error);
        }
        // A user's loop that starts again.
        self.workers[index as usize].state = State::Away { returns: true };
        let delay = self.rng.random_range(10..300);
        self.later(delay, crate::world::Event::Start(Actor::Worker(index)));
    }

    /// Whether a job that has ended goes on, or will, for those who join again.
    fn has_another_life(&self, job: usize) -> bool {
        if self.deleting.is_some() || self.specs[job].policy.on_loss == OnLoss::Fail {
            return false;
        }
        self.record_of(job).is_some_and(|record| match &record.state {
            JobState::Failed(error) => error.code == ErrorCode::Diverged,
            _ => true,
        })
    }

    /// Its process is gone.
    pub(crate) fn worker_dies(&mut self, index: u32) {
        let host = &self.workers[index as usize];
        if matches!(host.state, State::Done | State::Away { .. }) {
            return;
        }
        let started = self
            .record_of(host.job)
            .and_then(|record| self.checker.newest_roster(record.incarnation))
            .is_some_and(|roster| roster.started);
        // Before the start the others wait for it, so it has to come back.
        let returns = !started || self.fault_rng.random_bool(0.8);
        self.end(Actor::Worker(index));
        self.workers[index as usize].state = State::Away { returns };
        if returns {
            let delay = self.fault_rng.random_range(20..3000);
            self.later(delay, crate::world::Event::Start(Actor::Worker(index)));
        }
    }
}

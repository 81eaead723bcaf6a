//! The shell around the engine: one task a worker that moves frames, results and heartbeats.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::jetstream::context::PublishErrorKind;
use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use thalweg_broker::{Connection, Registry, RequestError, Said, request, traced};
use thalweg_protocol::{
    ApiReply, ApiRequest, ErrorCode, FrameError, Head, JobRecord, Kind, Ledger, MAX_HEADS, Reject,
    ResultHeader, Round, STREAMS_KEY, ShardIndex, Stage, StoreReply, StoreRequest, Streams, WireError,
    WorkerRef, frame, subjects,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{Action, Engine},
    trace::Trace,
};

/// Longest wait for a reply of store or gateway.
const REQUEST: Duration = Duration::from_secs(3);
/// How often time passes for the engine.
const TICK: Duration = Duration::from_millis(20);
/// A rest after which pushing is told: there may be nobody to aggregate. Shorter than any time after which invokers are
/// taken away, by default.
const REST: Duration = Duration::from_secs(5);

/// What handle and task share.
#[derive(Debug)]
pub(crate) struct Shared {
    engine: Mutex<Engine>,
    /// There is a result, or there will be none.
    pub(crate) changed: Notify,
    /// Something was sent: there may be room for more.
    pub(crate) sent: Notify,
    /// Actions for the task, put there by the handle.
    inbox: Mutex<Vec<Action>>,
    wake: Notify,
    /// Why the job is paused, if it is.
    pub(crate) paused: Mutex<Option<String>>,
    /// Bytes of payload and overhead given to the broker and taken from it, for reports.
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The engine's methods leave it consistent before anything in them can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(engine: Engine) -> Self {
        Self {
            engine: Mutex::new(engine),
            changed: Notify::new(),
            sent: Notify::new(),
            inbox: Mutex::default(),
            wake: Notify::new(),
            paused: Mutex::default(),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
        }
    }

    /// The engine; never held across an await.
    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        lock(&self.engine)
    }

    /// Hands actions to the task.
    pub(crate) fn act(&self, actions: Vec<Action>) {
        if !actions.is_empty() {
            lock(&self.inbox).extend(actions);
            self.wake.notify_one();
        }
    }
}

/// Everything the task needs.
pub(crate) struct Driver {
    pub(crate) shared: Arc<Shared>,
    pub(crate) connection: Connection,
    pub(crate) registry: Registry,
    pub(crate) record: Arc<JobRecord>,
    pub(crate) worker: WorkerRef,
    pub(crate) lease: Duration,
    pub(crate) window_bytes: watch::Sender<u64>,
    pub(crate) stop: CancellationToken,
    pub(crate) trace: Trace,
}

/// End of something the task waited for.
enum Done {
    Published(ShardIndex, Round, u64, Result<(), PublishErrorKind>),
    Asked(Result<(Vec<Head>, Vec<i64>), WireError>),
    Fetched(ShardIndex, Result<(Head, Ledger, Bytes), WireError>),
    /// Where a shard stands, and whether its open round contains this worker's contribution.
    Looked(ShardIndex, Result<(Head, bool), WireError>),
    Beat(Option<Result<Beat, WireError>>),
}

/// What the gateway says to a heartbeat.
struct Beat {
    window_bytes: u64,
    roster_epoch: u64,
    paused: Option<String>,
}

type Work = FuturesUnordered<BoxFuture<'static, Done>>;

impl Driver {
    /// Runs until stopped or until nothing can ever come back.
    pub(crate) async fn run(
        mut self,
        mut results: async_nats::Subscriber,
        mut rejects: async_nats::Subscriber,
        mut questions: async_nats::Subscriber,
    ) {
        let mut work: Work = FuturesUnordered::new();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut beats =
            tokio::time::interval((self.lease / 8).clamp(Duration::from_millis(50), Duration::from_secs(1)));
        let mut connects = self.connection.connects();
        connects.mark_unchanged();
        let mut was_active = false;
        let mut rests_since: Option<Instant> = None;
        let mut told = 0;
        loop {
            let actions = tokio::select! {
                message = results.next() => match message {
                    Some(message) => self.result(&message),
                    None => break,
                },
                Some(done) = work.next() => self.done(done),
                () = self.shared.wake.notified() => Vec::new(),
                message = rejects.next() => match message {
                    Some(message) => self.reject(&message),
                    None => break,
                },
                Some(question) = questions.next() => {
                    self.trace.answer(&self.connection.client, &question).await;
                    Vec::new()
                }
                _ = ticks.tick() => self.shared.engine().tick(Instant::now()),
                _ = beats.tick() => {
                    work.push(self.beat());
                    Vec::new()
                }
                changed = connects.changed() => {
                    if changed.is_err() { break }
                    self.shared.engine().reconnected(Instant::now())
                }
                () = self.stop.cancelled() => return,
            };
            let mut actions = actions;
            actions.append(&mut lock(&self.shared.inbox));
            self.perform(actions, &mut work).await;
            let (active, news) = {
                let engine = self.shared.engine();
                (engine.is_active(), engine.news())
            };
            if active && !was_active {
                if self.idle_window() {
                    // Back from idleness: ask for bytes in flight at once.
                    work.push(self.beat());
                }
                if rests_since.is_none_or(|since| since.elapsed() >= REST) {
                    // Behind the contributions. One that is lost costs a moment.
                    let _ = self.connection.client.publish(subjects::WAKE, Bytes::new()).await;
                }
            } else if was_active && !active {
                rests_since = Some(Instant::now());
            }
            was_active = active;
            // Each call may wake a thread, so not for every confirmation.
            if news != told {
                told = news;
                self.shared.changed.notify_waiters();
            }
            self.shared.sent.notify_waiters();
        }
        let text = "the connection to NATS was closed";
        self.shared.engine().fail(WireError::new(ErrorCode::Unavailable, text));
        self.shared.changed.notify_waiters();
        self.shared.sent.notify_waiters();
    }

    /// Whether the window is that of an idle worker.
    fn idle_window(&self) -> bool {
        let least = (self.record.layout.len(0) * 4) as u64;
        *self.window_bytes.borrow() < 2 * least
    }

    async fn perform(&mut self, actions: Vec<Action>, work: &mut Work) {
        for action in actions {
            match action {
                Action::Publish(shard, round, frame) => {
                    let len = frame.len() as u64;
                    self.shared.sent_bytes.fetch_add(len, Ordering::Relaxed);
                    let partition = self.record.partition(shard);
                    let subject = subjects::gradient(partition, &self.worker.key, self.worker.rank);
                    let job = self.worker.job;
                    let headers = traced((job, round), Stage::Push, shard, self.worker.rank);
                    self.trace.sent((job, round), shard);
                    // Handing over waits only for the connection's own queue.
                    match self.connection.jetstream.publish_with_headers(subject, headers, frame).await {
                        Ok(acknowledgement) => work.push(Box::pin(async move {
                            let result = acknowledgement.await;
                            Done::Published(shard, round, len, result.map(drop).map_err(|error| error.kind()))
                        })),
                        Err(error) => {
                            let kind = error.kind();
                            work.push(Box::pin(async move { Done::Published(shard, round, len, Err(kind)) }));
                        }
                    }
                }
                Action::Ask => work.push(self.ask()),
                Action::Fetch(shard) => work.push(self.fetch(shard)),
                Action::Look(shard) => work.push(self.look(shard)),
            }
        }
    }

    fn result(&mut self, message: &async_nats::Message) -> Vec<Action> {
        self.shared.received_bytes.fetch_add(message.payload.len() as u64, Ordering::Relaxed);
        match frame::open::<ResultHeader>(Kind::Result, &message.payload) {
            Ok((header, values)) if header.job == self.worker.job => self.take(header, values),
            Ok(_) => Vec::new(),
            Err(error) => {
                static SAID: Said = Said::new();
                // The next question to the store brings it whole.
                if SAID.is_new(&error.to_string()) {
                    tracing::warn!(%error, "an unreadable result was ignored");
                }
                Vec::new()
            }
        }
    }

    fn take(&mut self, header: ResultHeader, values: Bytes) -> Vec<Action> {
        if values.len() != self.record.layout.len(header.shard) * 4 {
            tracing::warn!(
                shard = header.shard,
                bytes = values.len(),
                "a result of the wrong size was ignored"
            );
            return Vec::new();
        }
        let mut engine = self.shared.engine();
        let actions = engine.result(header.shard, header.head, header.ledger, values, Instant::now());
        let complete = engine.is_complete();
        drop(engine);
        self.trace.received(header.shard, complete);
        actions
    }

    fn reject(&self, message: &async_nats::Message) -> Vec<Action> {
        match frame::open::<Reject>(Kind::Reject, &message.payload) {
            Ok((reject, _)) => {
                tracing::debug!(error = %reject.error, "a contribution was not taken");
                self.shared.engine().reject(reject, Instant::now())
            }
            Err(error @ FrameError::WireVersion { .. }) => {
                // Whoever serves the partition cannot read what this worker sends, however often.
                self.shared.engine().fail(named("an invoker refuses contributions", &error));
                Vec::new()
            }
            Err(error) => {
                tracing::warn!(%error, "an unreadable reject was ignored");
                Vec::new()
            }
        }
    }

    fn done(&mut self, done: Done) -> Vec<Action> {
        let now = Instant::now();
        let mut engine = self.shared.engine();
        match done {
            Done::Published(shard, round, len, Ok(())) => {
                self.trace.stored(round, shard);
                engine.confirmed(shard, round, len, now)
            }
            Done::Published(_, _, len, Err(PublishErrorKind::MaxPayloadExceeded)) => {
                let text = format!(
                    "a message of {len} bytes is larger than the NATS server allows: its max_payload was lowered \
                     after the job was created; raise it again"
                );
                engine.fail(WireError::new(ErrorCode::Limit, text));
                Vec::new()
            }
            Done::Published(shard, round, len, Err(kind)) => {
                tracing::debug!(shard, round, %kind, "the broker did not take a message; trying again");
                engine.refused(shard, round, len, rand::random(), now)
            }
            Done::Asked(Ok((heads, streams))) => engine.heads(&heads, streams, now),
            // The job is gone, or has lost state: nobody else may be left to say so.
            Done::Asked(Err(error)) | Done::Fetched(_, Err(error)) | Done::Looked(_, Err(error))
                if !error.is_retryable() =>
            {
                engine.fail(error);
                Vec::new()
            }
            Done::Asked(Err(_)) | Done::Fetched(_, Err(_)) | Done::Looked(_, Err(_)) | Done::Beat(None) => {
                Vec::new()
            }
            Done::Looked(shard, Ok((head, contained))) => engine.looked(shard, head, contained, now),
            Done::Fetched(shard, Ok((head, ledger, values))) => {
                if values.len() == self.record.layout.len(shard) * 4 {
                    let actions = engine.result(shard, head, ledger, values, now);
                    let complete = engine.is_complete();
                    self.trace.received(shard, complete);
                    actions
                } else {
                    Vec::new()
                }
            }
            Done::Beat(Some(Ok(Beat { window_bytes, roster_epoch, paused }))) => {
                self.window_bytes.send_replace(window_bytes);
                self.tell_pause(paused);
                engine.window(window_bytes, roster_epoch, now)
            }
            Done::Beat(Some(Err(error))) => {
                engine.fail(error);
                Vec::new()
            }
        }
    }

    /// A pause is a reason to wait that a training loop should be able to see.
    fn tell_pause(&self, paused: Option<String>) {
        let mut known = lock(&self.shared.paused);
        if *known == paused {
            return;
        }
        let (job, rank) = (&self.worker.key, self.worker.rank);
        match &paused {
            Some(reason) => tracing::warn!(%job, rank, reason, "job is paused: rounds wait"),
            None => tracing::info!(%job, rank, "job goes on"),
        }
        *known = paused;
    }

    fn beat(&self) -> BoxFuture<'static, Done> {
        let active = self.shared.engine().is_active();
        let beat = ApiRequest::Beat {
            worker: self.worker.clone(),
            window_bytes: *self.window_bytes.borrow(),
            active,
        };
        let client = self.connection.client.clone();
        Box::pin(async move {
            let kinds = (Kind::ApiRequest, Kind::ApiReply);
            let reply = request(&client, subjects::WORKER_BEAT, kinds, &beat, &[], REQUEST).await;
            Done::Beat(match reply {
                Ok((ApiReply::Beat { window_bytes, roster_epoch, paused }, _)) => {
                    Some(Ok(Beat { window_bytes, roster_epoch, paused }))
                }
                Ok((ApiReply::Error(error), _)) if !error.is_retryable() => Some(Err(error)),
                // The gateway that leads is of another release: this worker's lease ends for want of heartbeats.
                Err(RequestError::Frame(_, error @ FrameError::WireVersion { .. })) => {
                    Some(Err(named("the gateway", &error)))
                }
                // No gateway for now: training goes on with the window we have.
                _ => None,
            })
        })
    }

    fn ask(&self) -> BoxFuture<'static, Done> {
        let (client, registry) = (self.connection.client.clone(), self.registry.clone());
        let record = self.record.clone();
        Box::pin(async move {
            let heads = read_heads(&client, &record).await;
            let streams = read_streams(&registry, &record).await;
            Done::Asked(heads.and_then(|heads| Ok((heads, streams?))))
        })
    }

    fn fetch(&self, shard: ShardIndex) -> BoxFuture<'static, Done> {
        let (client, record) = (self.connection.client.clone(), self.record.clone());
        Box::pin(async move { Done::Fetched(shard, fetch(&client, &record, shard).await) })
    }

    fn look(&self, shard: ShardIndex) -> BoxFuture<'static, Done> {
        let (client, record, rank) = (self.connection.client.clone(), self.record.clone(), self.worker.rank);
        Box::pin(async move {
            let query = StoreRequest::FetchHead { job: record.incarnation, shard };
            Done::Looked(
                shard,
                match ask_store(&client, &record, query, &[]).await {
                    Ok((StoreReply::State(head, _), _)) => Ok((head, false)),
                    Ok((StoreReply::Open(head, _, partial), _)) => Ok((head, partial.ledger.contains(rank))),
                    Ok(_) => Err(WireError::new(ErrorCode::Malformed, "the store gave no head")),
                    Err(error) => Err(error),
                },
            )
        })
    }
}

/// An unreadable message, and whose it is.
fn named(whose: &str, error: &FrameError) -> WireError {
    WireError::new(error.to_wire().code, format!("{whose}: {error}"))
}

/// When the stream of each shard was created.
pub(crate) async fn read_streams(registry: &Registry, record: &JobRecord) -> Result<Vec<i64>, WireError> {
    let (streams, _) = registry.get::<Streams>(STREAMS_KEY).await.map_err(|error| error.to_wire())?;
    let missing = || WireError::new(ErrorCode::Unavailable, "the registry knows no streams yet");
    let streams = streams.ok_or_else(missing)?;
    let created =
        |shard| streams.created.get(usize::from(record.partition(shard))).copied().unwrap_or_default();
    Ok((0..record.layout.shards()).map(created).collect())
}

/// Asks the job's store.
pub(crate) async fn ask_store(
    client: &async_nats::Client,
    record: &JobRecord,
    query: StoreRequest,
    payload: &[u8],
) -> Result<(StoreReply, Bytes), WireError> {
    let kinds = (Kind::StoreRequest, Kind::StoreReply);
    match request(client, &subjects::store(record.store), kinds, &query, payload, REQUEST).await {
        Ok((StoreReply::Error(error), _)) => Err(error),
        Ok(reply) => Ok(reply),
        Err(error) => Err(WireError::new(error.to_wire().code, format!("store: {error}"))),
    }
}

/// Where all shards stand.
pub(crate) async fn read_heads(
    client: &async_nats::Client,
    record: &JobRecord,
) -> Result<Vec<Head>, WireError> {
    let mut heads = Vec::new();
    while (heads.len() as u64) < u64::from(record.layout.shards()) {
        let first = u32::try_from(heads.len()).unwrap_or(u32::MAX);
        let query = StoreRequest::Heads { job: record.incarnation, first, count: MAX_HEADS };
        match ask_store(client, record, query, &[]).await? {
            (StoreReply::Heads(more), _) if !more.is_empty() => heads.extend(more),
            _ => return Err(WireError::new(ErrorCode::Malformed, "the store gave no heads")),
        }
    }
    Ok(heads)
}

/// Reads one shard's parameters.
pub(crate) async fn fetch(
    client: &async_nats::Client,
    record: &JobRecord,
    shard: ShardIndex,
) -> Result<(Head, Ledger, Bytes), WireError> {
    let query = StoreRequest::Fetch { job: record.incarnation, shard, slots: false };
    match ask_store(client, record, query, &[]).await? {
        (StoreReply::State(head, ledger), values) => Ok((head, ledger, values)),
        _ => Err(WireError::new(ErrorCode::Malformed, "the store gave no shard")),
    }
}

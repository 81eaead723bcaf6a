//! The shell around the core: one task that moves events in and actions out.

mod handover;
mod perform;
mod steps;

use std::{
    cell::Cell,
    collections::HashSet,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use async_nats::{Subscriber, jetstream};
use futures::{StreamExt as _, future::LocalBoxFuture, stream::FuturesUnordered};
use serde::{Deserialize, Serialize};
use thalweg_broker::{Backoff, Connection, Registry, RegistryError, Report, Spans};
use thalweg_protocol::{
    Epoch, InvokerState, JobKey, Kind, Name, Partition, Placement, frame, limits, subjects,
};
use thalweg_store::ShardStore;
use tokio_stream::StreamMap;
use tokio_util::sync::CancellationToken;

use crate::{
    Control,
    beat::Busyness,
    core::{Core, Delivery, Event, Limits, Millis},
    holdings::{Delivered, Holdings},
    metrics,
    partition::{Takeover, TakeoverError},
    quota::{CpuScope, Quota},
};
use handover::Handovers;

/// Settings of one invoker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Its id; empty = a random one. Two invokers with one id fight over their partitions.
    pub id: String,
    /// The pool whose partitions it serves; without one, the shared pool.
    pub pool: Option<Name>,
    /// CPUs it may use, up to 1. Default 1.
    pub cpu_quota: f64,
    /// Memory for everything, bytes. Default 256 MiB. Contributions take at most three eighths of it;
    /// the rest is for messages on their way in, folds and results.
    pub memory_bytes: usize,
    /// Rounds of shards folded and committed at once. Default 8.
    pub invocations: usize,
    /// Time between heartbeats, milliseconds. Default 500.
    pub beat_ms: u64,
    /// Longest time to hand partitions over when it is told to stop, milliseconds. Default 5000.
    pub drain_ms: u64,
    /// Time that a contribution waits for the others of its round before it is folded without them, milliseconds.
    /// Its message then leaves the queue, and an invoker whose queues are empty can be spared. Each such partial
    /// commit writes as much as the shard has parameters. Default 10000.
    pub linger_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: String::new(),
            pool: None,
            cpu_quota: 1.0,
            memory_bytes: 256 << 20,
            invocations: 8,
            beat_ms: 500,
            drain_ms: 5000,
            linger_ms: 10_000,
        }
    }
}

/// Contributions to one shard that are worth a partial commit.
const PARTIAL_ENTRIES: usize = 64;
/// Share of the budget that may be under way in pull requests.
const PULL_SHARE: usize = 8;
/// Time beyond the drain for the last words with NATS.
const FAREWELL: Duration = Duration::from_secs(1);
/// Placement is read again this often, in case a hint was lost.
const REFRESH: Duration = Duration::from_secs(1);
/// Records of jobs with waiting contributions are read again this often, for the same reason.
const JOB_REFRESH: Duration = Duration::from_secs(2);

/// Serves partitions until `shutdown`, then drains; ends a second after `config.drain_ms` at the latest.
///
/// `scope` says whose CPU time `config.cpu_quota` is about. With a quota below 1 the invoker pauses when it has used
/// more; it goes on beating meanwhile.
///
/// Contributions and results go through `connection`. Takeovers and handovers go through `control`, where no answer has
/// to wait behind the contributions that are on their way already.
///
/// Runs on a current-thread runtime: its future is not `Send`. May be dropped (or killed) at any
/// moment without harm to any round.
///
/// # Errors
/// When the connection is closed for good.
pub async fn run(
    config: Config,
    connection: Connection,
    control: Control,
    store: Arc<dyn ShardStore>,
    scope: CpuScope,
    report: Report,
    shutdown: CancellationToken,
) -> Result<(), async_nats::Error> {
    let id = if config.id.is_empty() {
        format!("i{:012x}", rand::random::<u64>() >> 16)
    } else {
        config.id.clone()
    };
    report(Some("waiting for the registry"));
    let Some(registry) = open_registry(&control.connection, &shutdown).await else { return Ok(()) };
    let limits = Limits {
        held_bytes: config.memory_bytes / 8 * 3,
        invocations: config.invocations.max(1),
        idle_shards: 16 * 1024,
        partial_entries: PARTIAL_ENTRIES,
        linger: config.linger_ms,
    };
    let mut shell = Shell {
        core: Core::new(limits),
        pull_bytes: config.memory_bytes / PULL_SHARE,
        starved: false,
        delivered_bytes: 0,
        read_again_bytes: Rc::default(),
        average_bytes: limits::DEFAULT_SHARD_BYTES as usize,
        holdings: Holdings::new(id.clone(), config.drain_ms),
        handovers: Handovers::new(),
        deliveries: StreamMap::new(),
        questions: StreamMap::new(),
        not_yet: HashSet::new(),
        spans: Rc::new(Spans::new("invoker", id.clone())),
        started: Instant::now(),
        work: FuturesUnordered::new(),
        busyness: Busyness::new(config.cpu_quota, scope),
        quota: Quota::new(config.cpu_quota, scope),
        state: InvokerState::Ready,
        placement: Placement::default(),
        id,
        connection,
        control,
        registry,
        store,
        config,
    };
    report(None);
    let drain = Duration::from_millis(shell.config.drain_ms) + FAREWELL;
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(drain).await;
    };
    tokio::select! {
        ended = shell.serve(&shutdown) => ended,
        // Where NATS is gone its words wait for it, and there may be nobody to kill an invoker.
        () = overdue => {
            tracing::warn!("could not hand everything over in time; ending all the same");
            Ok(())
        }
    }
}

async fn open_registry(connection: &Connection, shutdown: &CancellationToken) -> Option<Registry> {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    loop {
        match Registry::open(&connection.jetstream).await {
            Ok(registry) => return Some(registry),
            Err(error) => tracing::info!(%error, "invoker waits for the registry"),
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.delay()) => {}
            () = shutdown.cancelled() => return None,
        }
    }
}

/// End of something the shell waited for.
enum Done {
    Event(Event),
    /// A fold has ended, of so many bytes of contributions and of their result.
    Folded(Event, u64),
    /// With what is listened to already, if the partition was handed over with its consumer.
    Took(Partition, Epoch, Result<Takeover, TakeoverError>, Option<Subscriber>),
    /// The broker has delivered so many messages to a consumer.
    Delivered(Partition, String, u64),
    Placement(Result<Placement, RegistryError>),
    Nothing,
}

type ConsumerKey = (Partition, String);

struct Shell {
    config: Config,
    id: String,
    connection: Connection,
    control: Control,
    registry: Registry,
    store: Arc<dyn ShardStore>,
    core: Core,
    holdings: Holdings,
    handovers: Handovers,
    /// What is delivered to our consumers, and who asks for their partitions.
    deliveries: StreamMap<ConsumerKey, Subscriber>,
    questions: StreamMap<ConsumerKey, Subscriber>,
    /// Consumers that were handed over, whose status messages are the former holder's so far.
    not_yet: HashSet<ConsumerKey>,
    /// What it did for the newest rounds.
    spans: Rc<Spans>,
    /// Time for the holdings: it must not jump with the system's clock.
    started: Instant,
    work: FuturesUnordered<LocalBoxFuture<'static, Done>>,
    busyness: Busyness,
    quota: Quota,
    state: InvokerState,
    placement: Placement,
    pull_bytes: usize,
    /// Bytes of messages delivered, and of those read back from their stream for a fold.
    delivered_bytes: u64,
    read_again_bytes: Rc<Cell<u64>>,
    /// A pull was held back while too much waited for look-ups.
    starved: bool,
    /// Moving average of message sizes, to turn bytes of credit into messages.
    average_bytes: usize,
}

fn now() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Shell {
    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<(), async_nats::Error> {
        let control = self.control.connection.client.clone();
        let mut echoes = control.subscribe(subjects::echo(self.handovers.life())).await?;
        let mut traces = control.subscribe(subjects::ALL_TRACES).await?;
        let mut hints = control.subscribe(subjects::registry_hint(">")).await?;
        let mut connects = self.connection.connects();
        connects.mark_unchanged();
        let mut beats = tokio::time::interval(Duration::from_millis(self.config.beat_ms.max(10)));
        let mut refresh = tokio::time::interval(REFRESH);
        let mut job_refresh = tokio::time::interval(JOB_REFRESH);
        loop {
            let debt = self.quota.debt();
            if !debt.is_zero() {
                // Whoever pauses is not dead, and may be told to stop.
                tokio::select! {
                    biased;
                    _ = beats.tick() => self.beat().await,
                    () = shutdown.cancelled(), if self.holdings.drain_until().is_none() => self.drain().await,
                    () = tokio::time::sleep(debt) => {}
                }
                continue;
            }
            let now_ms = self.elapsed();
            let settle_in = self.holdings.settle_at();
            let settle_in = settle_in.map(|at| Duration::from_millis(at.saturating_sub(now_ms)));
            let tick = self.core.next_tick().map(|at| Duration::from_millis(at.saturating_sub(now())));
            tokio::select! {
                // Ends of invocations first: they free memory and unblock workers.
                biased;
                Some(done) = self.work.next() => self.done(done).await,
                // Then what is rare, or a backlog would hold it up.
                message = echoes.next() => match message {
                    Some(message) => self.echoed(&message),
                    None => return Err("the connection to NATS was closed".into()),
                },
                Some((_, message)) = self.questions.next() => self.asked_for(message).await,
                Some(hint) = hints.next() => self.hint(hint.subject.as_str()),
                Some(question) = traces.next() => self.spans.answer(&control, &question).await,
                Some((consumer, message)) = self.deliveries.next() => self.message(consumer, message).await,
                changed = connects.changed() => {
                    if changed.is_err() {
                        return Err("the connection to NATS was closed".into());
                    }
                    tracing::info!("connection is back: taking all partitions over again");
                    let steps = self.holdings.reconnected();
                    self.step(steps).await;
                    self.read_placement(Duration::ZERO);
                }
                () = tokio::time::sleep(tick.unwrap_or(Duration::from_secs(3600))) => {
                    let actions = self.core.handle(Event::Tick, now());
                    self.perform(actions).await;
                }
                _ = beats.tick() => self.beat().await,
                _ = refresh.tick() => {
                    self.read_placement(Duration::ZERO);
                    let steps = self.holdings.check_silence(self.elapsed());
                    self.step(steps).await;
                }
                _ = job_refresh.tick() => {
                    let active: Vec<_> = self.core.active_jobs().cloned().collect();
                    active.into_iter().for_each(|key| self.look_up(key));
                }
                () = shutdown.cancelled(), if self.holdings.drain_until().is_none() => self.drain().await,
                () = tokio::time::sleep(settle_in.unwrap_or_default()), if settle_in.is_some() => {}
            }
            let steps = self.holdings.settle(|partition| self.core.rest(partition), self.elapsed());
            self.step(steps).await;
            self.answer_handovers().await;
            self.pull_again().await;
            if self.holdings.is_drained() {
                // One last beat, with no partitions: whoever placed them here can stop waiting.
                self.beat().await;
                tokio::join!(
                    self.connection.taken_in(FAREWELL / 2),
                    self.control.connection.taken_in(FAREWELL / 2)
                );
                let read_again_bytes = self.read_again_bytes.get();
                tracing::info!(delivered_bytes = self.delivered_bytes, read_again_bytes, "invoker ends");
                return Ok(());
            }
        }
    }

    fn elapsed(&self) -> Millis {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A message to one of our consumers: a contribution, the status of a pull request, or a word of the next holder.
    async fn message(&mut self, key: ConsumerKey, message: async_nats::Message) {
        let partition = key.0;
        if message.status.is_some() {
            let elapsed = self.elapsed();
            let held = self.holdings.pulled(partition).filter(|held| held.consumer == key.1);
            let Some(held) = held.filter(|_| !self.not_yet.contains(&key)) else { return };
            if held.status(&message, elapsed) {
                self.pull(partition).await;
            } else {
                let steps = self.holdings.retake(partition, "the consumer is gone");
                self.step(steps).await;
            }
            return;
        }
        if !message.reply.as_ref().is_some_and(|reply| reply.starts_with("$JS.ACK.")) {
            self.not_yet.remove(&key);
            return self.heard(message).await;
        }
        let context = self.connection.jetstream.clone();
        // Also what comes too late for a consumer that is no longer ours: it is delivered again.
        self.delivered_bytes += message.payload.len() as u64;
        let message = jetstream::Message { message, context };
        let Ok(info) = message.info() else {
            tracing::warn!(subject = %message.subject, "a message without JetStream's metadata was ignored");
            return;
        };
        let (sequence, consumer_sequence) = (info.stream_sequence, info.consumer_sequence);
        let pending = info.pending;
        let published = u64::try_from(info.published.unix_timestamp_nanos()).unwrap_or(0);
        let (sequences, elapsed) = ((consumer_sequence, sequence), self.elapsed());
        let reply = message.reply.clone();
        match self.holdings.delivered(partition, info.consumer, sequences, reply, elapsed) {
            Delivered::Ours => {
                if let Some(held) = self.holdings.pulled(partition) {
                    held.left(pending);
                    let waited = held.waited(UNIX_EPOCH + Duration::from_nanos(published));
                    if let Some(waited) = waited.filter(|waited| !waited.is_zero()) {
                        let (epoch, waited_ms) = (held.epoch, waited.as_secs_f64() * 1e3);
                        tracing::info!(partition, epoch, waited_ms, "first message since the handover");
                    }
                }
            }
            Delivered::NotOurs => return,
            Delivered::Gap(steps) => return self.step(steps).await,
        }
        let async_nats::Message { subject, payload: frame, .. } = message.message;
        self.average_bytes = (7 * self.average_bytes + frame.len()) / 8;
        let published = published / 1_000_000;
        let delivery = Delivery { partition, sequence, published, subject: subject.to_string(), frame };
        let actions = self.core.handle(Event::Delivered(delivery), now());
        self.perform(actions).await;
        self.pull(partition).await;
    }

    async fn done(&mut self, done: Done) {
        match done {
            Done::Folded(event, bytes) => {
                self.busyness.folded(bytes);
                let actions = self.core.handle(event, now());
                self.perform(actions).await;
            }
            Done::Event(event) => {
                let actions = self.core.handle(event, now());
                self.perform(actions).await;
            }
            Done::Took(partition, epoch, result, listening) => {
                handover::note(partition, epoch, &result);
                if let Ok(Takeover::Held { partition: held, .. }) = &result {
                    let consumer = held.consumer.clone();
                    if held.is_kept() {
                        self.not_yet.insert((partition, consumer.clone()));
                        self.look_after(partition, consumer.clone());
                    }
                    if self.listen(partition, &consumer, listening).await.is_err() {
                        // The connection is closed for good.
                        return;
                    }
                }
                let steps = self.holdings.took(partition, epoch, result, self.elapsed());
                self.step(steps).await;
            }
            Done::Placement(Ok(placement)) => {
                let steps = self.holdings.follow(&placement, self.elapsed());
                self.placement = placement;
                self.step(steps).await;
            }
            Done::Delivered(partition, consumer, deliveries) => {
                self.holdings.expect(partition, &consumer, deliveries, self.elapsed());
            }
            Done::Placement(Err(error)) => error.log("placement not read"),
            Done::Nothing => {}
        }
    }

    /// Begins to leave.
    async fn drain(&mut self) {
        tracing::info!("draining");
        self.state = InvokerState::Draining;
        self.beat().await;
        self.holdings.drain(self.elapsed());
    }

    /// Somebody wrote to the registry.
    fn hint(&mut self, subject: &str) {
        let key = subject.strip_prefix(subjects::registry_hint("").as_str()).unwrap_or_default();
        let mut tokens = key.split('.');
        match (tokens.next(), tokens.next(), tokens.next()) {
            (Some("placement"), pool, None) if pool == self.config.pool.as_ref().map(Name::as_str) => {
                self.read_placement(Duration::ZERO);
            }
            (Some("job" | "roster"), Some(tenant), Some(job)) => {
                if let (Ok(tenant), Ok(job)) = (Name::new(tenant), Name::new(job)) {
                    let key = JobKey { tenant, job };
                    if self.core.knows(&key) {
                        self.look_up(key);
                    }
                }
            }
            _ => {}
        }
    }

    async fn beat(&mut self) {
        let held = self.holdings.held();
        let load = (self.core.held_messages(), self.core.held_bytes());
        metrics::held(load.1);
        let jobs = self.core.take_loads(now());
        let beat = self.busyness.beat(&self.id, self.state, held, load, jobs);
        let frame = frame::seal(Kind::Beat, &beat, &[]);
        let _ = self
            .connection
            .client
            .publish(subjects::invoker_beat(self.config.pool.as_ref(), &self.id), frame)
            .await;
    }
}

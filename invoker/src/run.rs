//! The shell around the core: one task that moves events in and actions out.

mod holdings;
mod perform;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use async_nats::jetstream;
use futures::{StreamExt as _, future::LocalBoxFuture, stream::FuturesUnordered};
use serde::{Deserialize, Serialize};
use thalweg_broker::{Backoff, Connection, Registry, RegistryError, Report};
use thalweg_protocol::{
    Epoch, InvokerState, JobKey, Kind, Name, Partition, Placement, frame, limits, subjects,
};
use thalweg_store::ShardStore;
use tokio_util::sync::CancellationToken;

use crate::{
    beat::Busyness,
    core::{Action, Core, Delivery, Event, Limits, Millis},
    metrics,
    partition::{Holding, Takeover, TakeoverError},
    quota::Quota,
};

/// Settings of one invoker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Its id; empty = a random one. Two invokers with one id fight over their partitions.
    pub id: String,
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
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: String::new(),
            cpu_quota: 1.0,
            memory_bytes: 256 << 20,
            invocations: 8,
            beat_ms: 500,
            drain_ms: 5000,
        }
    }
}

/// Share of the budget that may be under way in pull requests.
const PULL_SHARE: usize = 8;
/// Placement is read again this often, in case a hint was lost.
const REFRESH: Duration = Duration::from_secs(1);
/// Records of jobs with waiting contributions are read again this often, for the same reason.
const JOB_REFRESH: Duration = Duration::from_secs(2);

/// Serves partitions until `shutdown`, then drains.
///
/// Runs on a current-thread runtime: its future is not `Send`. May be dropped (or killed) at any
/// moment without harm to any round.
///
/// # Errors
/// When the connection is closed for good.
pub async fn run(
    config: Config,
    connection: Connection,
    store: Arc<dyn ShardStore>,
    report: Report,
    shutdown: CancellationToken,
) -> Result<(), async_nats::Error> {
    let id = if config.id.is_empty() {
        format!("i{:012x}", rand::random::<u64>() >> 16)
    } else {
        config.id.clone()
    };
    report(Some("waiting for the registry"));
    let Some(registry) = open_registry(&connection, &shutdown).await else { return Ok(()) };
    let limits = Limits {
        held_bytes: config.memory_bytes / 8 * 3,
        invocations: config.invocations.max(1),
        idle_shards: 16 * 1024,
    };
    let inbox = connection.client.new_inbox();
    let mut shell = Shell {
        core: Core::new(limits),
        pull_bytes: config.memory_bytes / PULL_SHARE,
        starved: false,
        average_bytes: limits::DEFAULT_SHARD_BYTES as usize,
        partitions: HashMap::new(),
        work: FuturesUnordered::new(),
        busyness: Busyness::new(),
        quota: Quota::new(config.cpu_quota),
        state: InvokerState::Ready,
        placement: Placement::default(),
        pending: Vec::new(),
        id,
        inbox,
        connection,
        registry,
        store,
        config,
    };
    report(None);
    shell.serve(&shutdown).await
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

/// A partition on its way to or in our hands.
enum Slot {
    Taking {
        epoch: Epoch,
    },
    Held(Box<Holding>),
    /// To be given up once its invocations have ended, or at the latest then.
    Leaving(Box<Holding>, Instant),
}

/// End of something the shell waited for.
enum Done {
    Event(Event),
    Took(Partition, Epoch, Result<Takeover, TakeoverError>),
    Placement(Result<Placement, RegistryError>),
    Nothing,
}

struct Shell {
    config: Config,
    id: String,
    connection: Connection,
    registry: Registry,
    store: Arc<dyn ShardStore>,
    core: Core,
    inbox: String,
    partitions: HashMap<Partition, Slot>,
    work: FuturesUnordered<LocalBoxFuture<'static, Done>>,
    busyness: Busyness,
    quota: Quota,
    state: InvokerState,
    placement: Placement,
    pull_bytes: usize,
    /// A pull was held back while too much waited for look-ups.
    starved: bool,
    /// Moving average of message sizes, to turn bytes of credit into messages.
    average_bytes: usize,
    /// Actions that came up where nothing can be awaited.
    pending: Vec<Action>,
}

fn now() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Shell {
    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<(), async_nats::Error> {
        let client = self.connection.client.clone();
        let mut deliveries = client.subscribe(format!("{}.*", self.inbox)).await?;
        let mut hints = client.subscribe(subjects::registry_hint(">")).await?;
        let mut connects = self.connection.connects();
        connects.mark_unchanged();
        let mut beats = tokio::time::interval(Duration::from_millis(self.config.beat_ms.max(10)));
        let mut refresh = tokio::time::interval(REFRESH);
        let mut job_refresh = tokio::time::interval(JOB_REFRESH);
        let mut drain_until: Option<tokio::time::Instant> = None;
        loop {
            self.busyness.set(self.core.invocations() > 0);
            let debt = self.quota.debt();
            if !debt.is_zero() {
                tokio::time::sleep(debt).await;
            }
            let tick = self.core.next_tick().map(|at| Duration::from_millis(at.saturating_sub(now())));
            tokio::select! {
                // Ends of invocations first: they free memory and unblock workers.
                biased;
                Some(done) = self.work.next() => self.done(done).await,
                message = deliveries.next() => match message {
                    Some(message) => self.message(message).await,
                    None => return Err("the connection to NATS was closed".into()),
                },
                Some(hint) = hints.next() => self.hint(hint.subject.as_str()),
                changed = connects.changed() => {
                    if changed.is_err() {
                        return Err("the connection to NATS was closed".into());
                    }
                    tracing::info!("connection is back: taking all partitions over again");
                    self.retake_all();
                    self.read_placement(Duration::ZERO);
                }
                () = tokio::time::sleep(tick.unwrap_or(Duration::from_secs(3600))) => {
                    let actions = self.core.handle(Event::Tick, now());
                    self.perform(actions).await;
                }
                _ = beats.tick() => self.beat().await,
                _ = refresh.tick() => {
                    self.read_placement(Duration::ZERO);
                    self.check_silence();
                }
                _ = job_refresh.tick() => {
                    let active: Vec<_> = self.core.active_jobs().cloned().collect();
                    active.into_iter().for_each(|key| self.look_up(key));
                }
                () = shutdown.cancelled(), if drain_until.is_none() => {
                    tracing::info!("draining");
                    self.state = InvokerState::Draining;
                    self.beat().await;
                    drain_until =
                        Some(tokio::time::Instant::now() + Duration::from_millis(self.config.drain_ms));
                }
                () = tokio::time::sleep_until(drain_until.unwrap_or_else(tokio::time::Instant::now)),
                    if drain_until.is_some() => {
                    tracing::warn!("nobody took the partitions over in time; leaving them to the next invoker");
                    self.give_up_all().await;
                }
            }
            self.finish_leaving().await;
            let pending = std::mem::take(&mut self.pending);
            self.perform(pending).await;
            self.pull_again().await;
            if drain_until.is_some() && self.partitions.is_empty() {
                // One last beat, with no partitions: whoever placed them here can stop waiting.
                self.beat().await;
                let _ = client.flush().await;
                return Ok(());
            }
        }
    }

    /// Tells the core something; what follows from it is performed before the loop goes on.
    fn tell(&mut self, event: Event) {
        let actions = self.core.handle(event, now());
        self.pending.extend(actions);
    }

    /// A message of the inbox: a contribution, or the status of a pull request.
    async fn message(&mut self, message: async_nats::Message) {
        if message.status.is_some() {
            let partition = message.subject.rsplit('.').next().and_then(|token| token.parse().ok());
            let Some(partition) = partition else { return };
            let alive = match self.partitions.get_mut(&partition) {
                Some(Slot::Held(held)) => held.status(&message),
                _ => return,
            };
            if alive {
                self.pull(partition).await;
            } else {
                self.retake(partition, "the consumer is gone");
            }
            return;
        }
        let context = self.connection.jetstream.clone();
        let message = jetstream::Message { message, context };
        let Ok(info) = message.info() else {
            tracing::warn!(subject = %message.subject, "a message without JetStream's metadata was ignored");
            return;
        };
        let (sequence, consumer_sequence) = (info.stream_sequence, info.consumer_sequence);
        let published = u64::try_from(info.published.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
        let partition = info.stream.rsplit('_').next().and_then(|token| token.parse::<Partition>().ok());
        let Some(partition) = partition else { return };
        let Some(Slot::Held(held) | Slot::Leaving(held, _)) = self.partitions.get_mut(&partition) else {
            return;
        };
        if info.consumer != held.consumer {
            // Meant for a consumer that is no longer ours: the message is delivered to the new one too.
            return;
        }
        let in_order = held.delivered(consumer_sequence);
        if let Some(reply) = message.reply.clone() {
            held.replies.insert(sequence, reply);
        }
        if !in_order {
            return self.retake(partition, "deliveries were lost on the way");
        }
        let async_nats::Message { subject, payload: frame, .. } = message.message;
        self.average_bytes = (7 * self.average_bytes + frame.len()) / 8;
        let delivery = Delivery { partition, sequence, published, subject: subject.to_string(), frame };
        let actions = self.core.handle(Event::Delivered(delivery), now());
        self.perform(actions).await;
        self.pull(partition).await;
    }

    async fn done(&mut self, done: Done) {
        match done {
            Done::Event(event) => {
                let actions = self.core.handle(event, now());
                self.perform(actions).await;
            }
            Done::Took(partition, epoch, result) => self.took(partition, epoch, result).await,
            Done::Placement(Ok(placement)) => {
                self.placement = placement;
                self.follow_placement();
            }
            Done::Placement(Err(error)) => tracing::debug!(%error, "placement not read"),
            Done::Nothing => {}
        }
    }

    /// Somebody wrote to the registry.
    fn hint(&mut self, subject: &str) {
        let key = subject.strip_prefix(subjects::registry_hint("").as_str()).unwrap_or_default();
        let mut tokens = key.split('.');
        match (tokens.next(), tokens.next(), tokens.next()) {
            (Some("placement"), None, _) => self.read_placement(Duration::ZERO),
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
        let held: Vec<_> = (self.partitions.iter())
            .filter_map(|(partition, slot)| match slot {
                Slot::Held(held) | Slot::Leaving(held, _) => Some((*partition, held.epoch)),
                Slot::Taking { .. } => None,
            })
            .collect();
        let load = (self.core.held_messages(), self.core.held_bytes());
        metrics::held(load.1);
        let beat = self.busyness.beat(&self.id, self.state, held, load, self.config.cpu_quota);
        let frame = frame::seal(Kind::Beat, &beat, &[]);
        let _ = self.connection.client.publish(subjects::invoker_beat(&self.id), frame).await;
    }
}

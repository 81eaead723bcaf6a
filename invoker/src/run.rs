//! The shell around the core: one task that moves events in and actions out.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use async_nats::jetstream;
use bytes::Bytes;
use futures::{StreamExt as _, future::LocalBoxFuture, stream::FuturesUnordered};
use serde::{Deserialize, Serialize};
use thalweg_broker::{Backoff, Connection, Registry, RegistryError, Report, stage};
use thalweg_protocol::{
    Epoch, InvokerState, JobKey, JobRecord, JobState, Kind, Name, PLACEMENT_KEY, Partition, Placement,
    ResultHeader, Roster, WireError, frame, job_key, limits, roster_key, subjects,
};
use thalweg_store::ShardStore;
use tokio_util::sync::CancellationToken;

use crate::{
    Job,
    beat::Busyness,
    core::{Action, Core, Delivery, Event, FoldError, InvocationId, Limits, Millis, Plan, ShardKey},
    fold::{FoldContext, fold},
    metrics,
    partition::{Holding, Takeover, clear_suspect, take_over},
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
    Took(Partition, Epoch, Result<Takeover, crate::partition::TakeoverError>),
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
                    self.read_placement();
                }
                () = tokio::time::sleep(tick.unwrap_or(Duration::from_secs(3600))) => {
                    let actions = self.core.handle(Event::Tick, now());
                    self.perform(actions).await;
                }
                _ = beats.tick() => self.beat().await,
                _ = refresh.tick() => {
                    self.read_placement();
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

    /// Takes what is placed here and leaves what is not.
    fn follow_placement(&mut self) {
        for (index, placed) in self.placement.partitions.clone().into_iter().enumerate() {
            let partition = Partition::try_from(index).unwrap_or(Partition::MAX);
            let ours = placed.holder.as_deref() == Some(self.id.as_str());
            match self.partitions.get(&partition) {
                None if ours => self.take(partition, placed.epoch, None),
                Some(Slot::Taking { epoch }) if ours && *epoch < placed.epoch => {
                    self.take(partition, placed.epoch, None);
                }
                Some(Slot::Held(held)) if ours && held.epoch < placed.epoch => {
                    self.take(partition, placed.epoch, None);
                }
                Some(Slot::Held(held)) if !ours && held.epoch < placed.epoch => self.leave(partition),
                Some(Slot::Taking { epoch }) if !ours && *epoch < placed.epoch => {
                    self.partitions.remove(&partition);
                }
                _ => {}
            }
        }
    }

    fn take(&mut self, partition: Partition, epoch: Epoch, own: Option<String>) {
        self.partitions.insert(partition, Slot::Taking { epoch });
        let (jetstream, registry) = (self.connection.jetstream.clone(), self.registry.clone());
        let id = self.id.clone();
        self.work.push(Box::pin(async move {
            let result = take_over(&jetstream, &registry, &id, partition, epoch, own).await;
            Done::Took(partition, epoch, result)
        }));
    }

    async fn took(
        &mut self,
        partition: Partition,
        epoch: Epoch,
        result: Result<Takeover, crate::partition::TakeoverError>,
    ) {
        if !matches!(self.partitions.get(&partition), Some(Slot::Taking { epoch: wanted }) if *wanted == epoch)
        {
            return;
        }
        match result {
            Ok(Takeover::Held { partition: held, careful_until, poison }) => {
                self.partitions.insert(partition, Slot::Held(held));
                let actions = self.core.handle(Event::Held { partition, careful_until, poison }, now());
                self.perform(actions).await;
                self.pull(partition).await;
            }
            Ok(Takeover::HigherEpoch(theirs)) => {
                tracing::info!(partition, epoch, theirs, "stepping down: a newer placement holds it");
                self.partitions.remove(&partition);
            }
            Err(error) => {
                tracing::info!(partition, %error, "taking over is tried again");
                self.work.push(Box::pin(async move {
                    tokio::time::sleep(Duration::from_millis(50 + rand::random::<u64>() % 50)).await;
                    Done::Nothing
                }));
                // The next placement reading finds it missing and takes it again.
                self.partitions.remove(&partition);
                self.read_placement_soon();
            }
        }
    }

    fn retake(&mut self, partition: Partition, reason: &str) {
        let (epoch, own) = match self.partitions.get(&partition) {
            Some(Slot::Held(held)) => (held.epoch, Some(held.consumer.clone())),
            Some(Slot::Leaving(..)) => {
                self.lose(partition);
                return;
            }
            _ => return,
        };
        tracing::info!(partition, reason, "taking the partition over again");
        // What was gathered will be delivered again; what is being committed is found committed.
        self.tell(Event::Lost(partition));
        self.take(partition, epoch, own);
    }

    fn retake_all(&mut self) {
        let held: Vec<_> = self.partitions.keys().copied().collect();
        held.into_iter().for_each(|partition| self.retake(partition, "the connection was lost"));
    }

    fn check_silence(&mut self) {
        let silent: Vec<_> = (self.partitions.iter())
            .filter(|(_, slot)| matches!(slot, Slot::Held(held) if held.is_silent()))
            .map(|(partition, _)| *partition)
            .collect();
        silent.into_iter().for_each(|partition| self.retake(partition, "its pull request is silent"));
    }

    /// Starts to give a partition up: what is complete is finished first.
    fn leave(&mut self, partition: Partition) {
        if let Some(Slot::Held(held)) = self.partitions.remove(&partition) {
            let until = Instant::now() + Duration::from_millis(self.config.drain_ms / 2);
            self.partitions.insert(partition, Slot::Leaving(held, until));
            self.tell(Event::Drain(partition));
        }
    }

    async fn finish_leaving(&mut self) {
        let done: Vec<_> = (self.partitions.iter())
            .filter(|(partition, slot)| {
                matches!(slot, Slot::Leaving(_, until)
                    if self.core.is_quiet(**partition) || Instant::now() > *until)
            })
            .map(|(partition, _)| *partition)
            .collect();
        for partition in done {
            self.release(partition).await;
        }
    }

    async fn give_up_all(&mut self) {
        let all: Vec<_> = self.partitions.keys().copied().collect();
        for partition in all {
            self.release(partition).await;
        }
    }

    /// Removes our consumer, so that the next holder sees an orderly handover.
    async fn release(&mut self, partition: Partition) {
        let slot = self.partitions.remove(&partition);
        self.tell(Event::Lost(partition));
        let Some(Slot::Held(held) | Slot::Leaving(held, _)) = slot else { return };
        // Acknowledgements on their way must arrive before their consumer goes.
        let _ = self.connection.client.flush().await;
        let stream = subjects::gradient_stream(partition);
        if let Err(error) =
            self.connection.jetstream.delete_consumer_from_stream(&held.consumer, stream).await
        {
            tracing::debug!(%error, partition, "consumer was gone already");
        }
        tracing::info!(partition, epoch = held.epoch, "gave partition up");
    }

    fn lose(&mut self, partition: Partition) {
        self.partitions.remove(&partition);
        self.tell(Event::Lost(partition));
    }

    async fn pull(&mut self, partition: Partition) {
        let count = self.partitions.len().max(1);
        let batch = (self.pull_bytes / count / self.average_bytes.max(1)).clamp(2, 128) as u64;
        let Some(Slot::Held(held)) = self.partitions.get_mut(&partition) else { return };
        if let Some((subject, body)) = held.pull(partition, batch) {
            let reply = format!("{}.{partition}", self.inbox);
            // A request that does not arrive is noticed by its silence.
            let _ = self.connection.client.publish_with_reply(subject, reply, Bytes::from(body)).await;
        }
    }

    fn read_placement(&self) {
        let registry = self.registry.clone();
        self.work.push(Box::pin(async move {
            let placement = registry.get::<Placement>(PLACEMENT_KEY).await;
            Done::Placement(placement.map(|(placement, _)| placement.unwrap_or_default()))
        }));
    }

    fn read_placement_soon(&self) {
        let registry = self.registry.clone();
        self.work.push(Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let placement = registry.get::<Placement>(PLACEMENT_KEY).await;
            Done::Placement(placement.map(|(placement, _)| placement.unwrap_or_default()))
        }));
    }

    /// Somebody wrote to the registry.
    fn hint(&mut self, subject: &str) {
        let key = subject.strip_prefix(subjects::registry_hint("").as_str()).unwrap_or_default();
        let mut tokens = key.split('.');
        match (tokens.next(), tokens.next(), tokens.next()) {
            (Some("placement"), None, _) => self.read_placement(),
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

    fn look_up(&self, key: JobKey) {
        let registry = self.registry.clone();
        self.work.push(Box::pin(async move {
            match read_job(&registry, &key).await {
                Ok(job) => Done::Event(Event::Job(key, job)),
                Err(error) => {
                    tracing::debug!(%key, error, "job not read");
                    Done::Event(Event::LookUpFailed(key))
                }
            }
        }));
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

    /// Performs actions in order.
    async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Acknowledge(partition, sequence) => {
                    stage::reached(stage::BEFORE_ACK);
                    self.acknowledge(partition, sequence, "+ACK").await;
                }
                Action::DeadLetter { partition, sequence, key, error, frame } => {
                    self.dead_letter(partition, sequence, key.as_ref(), &error, frame).await;
                }
                Action::Reject(key, rank, reject) => {
                    let frame = frame::seal(Kind::Reject, &reject, &[]);
                    let _ = self.connection.client.publish(subjects::reject(&key, rank), frame).await;
                }
                Action::LookUp(key) => self.look_up(key),
                Action::ReadHead(key) => self.read_head(key),
                Action::Fold(id, plan) => self.fold(id, plan),
                Action::Commit(id, commit, state) => {
                    let (store, begun) = (self.store.clone(), Instant::now());
                    stage::reached(stage::BEFORE_COMMIT);
                    self.work.push(Box::pin(async move {
                        let result = store.commit(commit, state).await;
                        metrics::committed(begun.elapsed());
                        Done::Event(Event::Committed(id, result))
                    }));
                }
                Action::Publish(key, header, values) => {
                    stage::reached(stage::BEFORE_PUBLISH);
                    self.publish(&key, &header, &values).await;
                }
                Action::Republish(key, shard) => self.republish(key, shard),
                Action::FailJob(key, incarnation, error) => {
                    let registry = self.registry.clone();
                    self.work.push(Box::pin(async move {
                        match fail_job(&registry, &key, incarnation, error).await {
                            Ok(job) => Done::Event(Event::Job(key, job)),
                            Err(_) => Done::Event(Event::LookUpFailed(key)),
                        }
                    }));
                }
            }
        }
    }

    async fn acknowledge(&mut self, partition: Partition, sequence: u64, kind: &'static str) {
        let Some(Slot::Held(held) | Slot::Leaving(held, _)) = self.partitions.get_mut(&partition) else {
            return;
        };
        if let Some(reply) = held.replies.remove(&sequence) {
            let _ = self.connection.client.publish(reply, Bytes::from_static(kind.as_bytes())).await;
        }
    }

    /// Puts a message aside before it is removed from its queue; when that fails it stays there.
    async fn dead_letter(
        &mut self,
        partition: Partition,
        sequence: u64,
        key: Option<&JobKey>,
        error: &WireError,
        frame: Bytes,
    ) {
        tracing::warn!(partition, sequence, %error, "dead letter");
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Thalweg-Code", error.code.as_str());
        headers.insert("Thalweg-Reason", error.message.replace(['\r', '\n'], " ").as_str());
        headers.insert("Thalweg-Partition", partition.to_string().as_str());
        headers.insert("Thalweg-Sequence", sequence.to_string().as_str());
        let stored =
            self.connection.jetstream.publish_with_headers(subjects::dead_letter(key), headers, frame).await;
        let stored = match stored {
            Ok(acknowledgement) => acknowledgement.await.is_ok(),
            Err(_) => false,
        };
        if stored {
            self.acknowledge(partition, sequence, "+TERM").await;
        } else {
            tracing::warn!(partition, sequence, "dead letter was not stored; the message stays in its queue");
        }
    }

    async fn publish(&mut self, key: &JobKey, header: &ResultHeader, values: &[u8]) {
        self.busyness.folded((values.len() * header.ledger.counted.len()) as u64);
        let frame = frame::seal(Kind::Result, header, values);
        // A result that does not arrive is asked for by its workers.
        let _ = self.connection.client.publish(subjects::result(key), frame).await;
        if let Some(partition) = self.careful_partition(header) {
            let registry = self.registry.clone();
            self.work.push(Box::pin(async move {
                if let Err(error) = clear_suspect(&registry, partition).await {
                    tracing::debug!(%error, "suspect not cleared");
                }
                Done::Nothing
            }));
        }
    }

    /// The partition of a shard that was folded carefully: its suspect record has to go.
    fn careful_partition(&self, header: &ResultHeader) -> Option<Partition> {
        let partitions =
            Partition::try_from(self.placement.partitions.len()).ok().filter(|count| *count > 0)?;
        let partition = thalweg_protocol::partition_of(header.job, header.shard, partitions);
        self.core.is_careful_partition(partition).then_some(partition)
    }

    fn read_head(&self, key: ShardKey) {
        let store = self.store.clone();
        self.work.push(Box::pin(async move {
            let result = store.fetch_head(key.0, key.1).await;
            Done::Event(Event::Head(key, result))
        }));
    }

    fn republish(&self, key: JobKey, shard: ShardKey) {
        let (store, client) = (self.store.clone(), self.connection.client.clone());
        self.work.push(Box::pin(async move {
            if let Ok(state) = store.fetch(shard.0, shard.1, false).await {
                let (head, ledger) = (state.head, state.ledger);
                let header = ResultHeader { job: shard.0, shard: shard.1, head, ledger };
                let frame = frame::seal(Kind::Result, &header, &state.values);
                let _ = client.publish(subjects::result(&key), frame).await;
            }
            Done::Nothing
        }));
    }

    fn fold(&self, id: InvocationId, plan: Plan) {
        let (store, connection) = (self.store.clone(), self.connection.clone());
        let (registry, invoker) = (self.registry.clone(), self.id.clone());
        let (stream_created, suspect) = match self.partitions.get(&plan.partition) {
            Some(Slot::Held(held) | Slot::Leaving(held, _)) => (held.stream_created, held.suspect.clone()),
            _ => (0, None),
        };
        self.work.push(Box::pin(async move {
            let begun = Instant::now();
            let context = FoldContext {
                store: &*store,
                jetstream: &connection.jetstream,
                registry: &registry,
                invoker: &invoker,
                stream_created,
                suspect,
            };
            let result: Result<Bytes, FoldError> = fold(&context, &plan).await;
            metrics::folded(begun.elapsed());
            Done::Event(Event::Folded(id, result))
        }));
    }
}

/// Reads a job's record and roster; `None` when there is no such job.
async fn read_job(registry: &Registry, key: &JobKey) -> Result<Option<Arc<Job>>, String> {
    let (record, _) = registry.get::<JobRecord>(&job_key(key)).await.map_err(|error| error.to_string())?;
    let (roster, _) = registry.get::<Roster>(&roster_key(key)).await.map_err(|error| error.to_string())?;
    let (Some(record), Some(roster)) = (record, roster) else { return Ok(None) };
    if roster.job != record.incarnation {
        // Between two lives; the next hint or retry sees them together.
        return Err("record and roster belong to different lives".to_owned());
    }
    Job::new(record, roster).map(|job| Some(Arc::new(job))).map_err(|error| error.to_string())
}

/// Records that a job has failed; whoever is first says why.
async fn fail_job(
    registry: &Registry,
    key: &JobKey,
    incarnation: thalweg_protocol::Incarnation,
    error: WireError,
) -> Result<Option<Arc<Job>>, String> {
    loop {
        let (record, revision) =
            registry.get::<JobRecord>(&job_key(key)).await.map_err(|error| error.to_string())?;
        match record {
            Some(mut record)
                if record.incarnation == incarnation && !matches!(record.state, JobState::Failed(_)) =>
            {
                record.state = JobState::Failed(error.clone());
                let put = registry.put(&job_key(key), &record, revision).await;
                if put.map_err(|error| error.to_string())?.is_ok() {
                    break;
                }
            }
            _ => break,
        }
    }
    read_job(registry, key).await
}

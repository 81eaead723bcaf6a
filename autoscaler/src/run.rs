//! The shell around the controller: reads NATS, moves the actuator.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt as _;
use thalweg_broker::{
    Backoff, Connection, Pool, Queues as _, Registry, RegistryError, Report, Revision, Said, StreamsConfig,
    consumer_epochs, ensure_streams,
};
use thalweg_protocol::{InvokerBeat, Kind, PlacedPartition, Placement, frame, placement_key, subjects};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    Action, Actuator, Config, Controller, DecisionRecord, Millis, Status, lease::Leadership, metrics, moves,
};

/// Shortest time between observations while nothing waits and nobody comes or goes. Each costs a broker with 40 streams
/// 4 ms of CPU time.
const QUIET: Duration = Duration::from_millis(400);
/// Time between observations after a worker has said that it pushes, and for how long: its contributions may need a
/// moment to their queue.
const WAKING: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Time between observations of an autoscaler that only waits for its turn.
const STANDBY: Duration = Duration::from_millis(500);
/// The placement is read again this often, in case somebody else wrote it or the registry was lost.
const REREAD: Duration = Duration::from_secs(5);
/// Times the placement is written at most before the next observation, when others write it too.
const PLACE_ATTEMPTS: usize = 4;
/// Longest time for one word with the registry on the way out.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why an autoscaler ended.
#[derive(Debug, thiserror::Error)]
pub enum AutoscalerError {
    /// A setting is out of its range.
    #[error("autoscaler configuration: {0}")]
    Config(String),
    /// The connection was closed for good.
    #[error("the connection to NATS was closed: {0}")]
    Closed(String),
}

/// Scales and places the invokers of one pool until `shutdown`; then hands the partitions of its invokers over and stops them (if
/// so configured) and gives the lease up.
///
/// Of several autoscalers the one with the lease acts, the others watch. `status` shows what this one
/// knows, after every observation that changes it.
///
/// The policy may change meanwhile. Its lease and its ways of draining stay as they were in the beginning
/// ([`Config::keeping_fixed`]); a policy that does not pass [`Config::validate`] is not followed.
///
/// # Errors
/// [`AutoscalerError`]; failures of NATS are waited out.
pub async fn run(
    mut policy: watch::Receiver<Config>,
    (streams, pool): (StreamsConfig, Pool),
    connection: Connection,
    actuator: Box<dyn Actuator>,
    report: Report,
    status: watch::Sender<Status>,
    shutdown: CancellationToken,
) -> Result<(), AutoscalerError> {
    let config = policy.borrow_and_update().clone();
    config.validate().map_err(AutoscalerError::Config)?;
    report(Some("waiting for the registry"));
    let Some(registry) = open_registry(&connection, &shutdown).await else { return Ok(()) };
    report(Some("waiting for the streams"));
    let stop_lease = CancellationToken::new();
    let (leadership, keep) =
        Leadership::keep(pool.name.as_ref(), config.lease, registry.clone(), stop_lease.clone());
    let lease_task = tokio::spawn(keep);
    let clock = Clock::start();
    let ids = Box::new(|| format!("auto-{:08x}", rand::random::<u32>()));
    let controller = Controller::new(config.clone(), pool.partitions, actuator.starts(), ids, clock.now());
    let mut shell = Shell {
        config,
        policy,
        streams,
        pool,
        connection,
        registry,
        actuator,
        controller,
        clock,
        leadership,
        report,
        status,
        streams_ensured: false,
        placement: None,
        observes: None,
        woken: None,
        placing_fails: false,
    };
    let result = shell.serve(&shutdown).await;
    if shell.config.drain_on_shutdown {
        shell.leave().await;
    }
    stop_lease.cancel();
    if tokio::time::timeout(FAREWELL, lease_task).await.is_err() {
        tracing::debug!("lease not released in time; it lapses by itself");
    }
    result
}

async fn open_registry(connection: &Connection, shutdown: &CancellationToken) -> Option<Registry> {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    let mut said = false;
    loop {
        match Registry::open(&connection.jetstream).await {
            Ok(registry) => return Some(registry),
            Err(error) if !said => {
                tracing::info!(%error, "autoscaler waits for the registry: JetStream must be enabled");
                said = true;
            }
            Err(error) => tracing::debug!(%error, "autoscaler waits for the registry"),
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.delay()) => {}
            () = shutdown.cancelled() => return None,
        }
    }
}

/// Milliseconds since the Unix epoch that never go back, whatever is done to the system's clock.
#[derive(Debug)]
struct Clock {
    origin: Millis,
    started: Instant,
}

impl Clock {
    fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { origin: millis(since), started: Instant::now() }
    }

    fn now(&self) -> Millis {
        self.origin + millis(self.started.elapsed())
    }

    fn instant(&self, at: Millis) -> Instant {
        // One more, because both clocks are read rounded down.
        self.started + Duration::from_millis(at.saturating_sub(self.origin) + 1)
    }
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What the registry said last about the placement.
#[derive(Debug)]
struct Known {
    revision: Revision,
    read: Instant,
}

struct Shell {
    config: Config,
    policy: watch::Receiver<Config>,
    streams: StreamsConfig,
    pool: Pool,
    connection: Connection,
    registry: Registry,
    actuator: Box<dyn Actuator>,
    controller: Controller,
    clock: Clock,
    leadership: Leadership,
    report: Report,
    status: watch::Sender<Status>,
    streams_ensured: bool,
    /// `None`: it has to be read before it can be written.
    placement: Option<Known>,
    /// Failures are logged when they begin and when they end.
    observes: Option<bool>,
    /// When a worker said that it pushes, last.
    woken: Option<Instant>,
    placing_fails: bool,
}

impl Shell {
    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<(), AutoscalerError> {
        let closed = |reason: &str| AutoscalerError::Closed(reason.to_owned());
        let mut connects = self.connection.connects();
        connects.mark_unchanged();
        let beats = self.connection.client.subscribe(subjects::invoker_beats(self.pool.name.as_ref())).await;
        let mut beats = beats.map_err(|error| AutoscalerError::Closed(error.to_string()))?;
        let wakes = self.connection.client.subscribe(subjects::WAKE).await;
        let mut wakes = wakes.map_err(|error| AutoscalerError::Closed(error.to_string()))?;
        let mut next_cycle = Instant::now();
        loop {
            let wake = self.controller.wake_at().map_or(next_cycle, |at| self.clock.instant(at));
            tokio::select! {
                // Beats before cycles: whoever has been heard must not be taken for silent.
                biased;
                () = shutdown.cancelled() => return Ok(()),
                changed = connects.changed() => {
                    changed.map_err(|_| closed("its client is gone"))?;
                    self.reconnected();
                    next_cycle = Instant::now();
                }
                Ok(()) = self.policy.changed() => {
                    self.follow_policy();
                    next_cycle = Instant::now();
                }
                message = beats.next() => {
                    let message = message.ok_or_else(|| closed("no more beats"))?;
                    if self.beat(&message.subject, &message.payload) && !self.or_shutdown(shutdown, false).await {
                        return Ok(());
                    }
                }
                Some(_) = wakes.next() => {
                    if self.controller.leads() && self.controller.is_asleep() {
                        let now = Instant::now();
                        self.woken = Some(now);
                        next_cycle = next_cycle.min(now + WAKING.0);
                    }
                }
                news = self.leadership.changed() => {
                    if !news {
                        return Err(closed("the lease is no longer kept"));
                    }
                    if self.leadership.holds() != self.controller.leads() {
                        next_cycle = Instant::now();
                    }
                }
                () = tokio::time::sleep_until(wake.min(next_cycle)) => {
                    let cycle = Instant::now() >= next_cycle;
                    if !self.or_shutdown(shutdown, cycle).await {
                        return Ok(());
                    }
                    if cycle {
                        next_cycle = Instant::now() + self.interval();
                    }
                }
            }
        }
    }

    /// Observes (or not) and acts; `false` when it was abandoned because of the shutdown. What was left
    /// unfinished is found out by reading the registry again.
    async fn or_shutdown(&mut self, shutdown: &CancellationToken, observe: bool) -> bool {
        let work = async {
            if observe {
                self.observe().await;
            }
            self.act().await;
        };
        tokio::select! {
            biased;
            () = work => true,
            () = shutdown.cancelled() => false,
        }
    }

    fn interval(&self) -> Duration {
        let tick = Duration::from_millis(self.config.tick_ms);
        if !self.controller.leads() {
            tick.max(STANDBY)
        } else if !self.controller.is_quiet() {
            tick
        } else if self.controller.is_asleep() && self.woken.is_some_and(|at| at.elapsed() < WAKING.1) {
            WAKING.0
        } else {
            tick.max(QUIET)
        }
    }

    fn follow_policy(&mut self) {
        let config = self.policy.borrow_and_update().clone().keeping_fixed(&self.config);
        match config.validate() {
            Ok(()) => {
                tracing::info!("following the new policy");
                self.controller.set_policy(config.clone(), self.clock.now());
                self.config = config;
            }
            Err(error) => tracing::error!(error, "the new policy is out of range; keeping the old one"),
        }
    }

    fn reconnected(&mut self) {
        tracing::info!("connection is back: observing anew");
        self.controller.interrupted(self.clock.now());
        self.streams_ensured = false;
        self.placement = None;
    }

    fn beat(&mut self, subject: &str, payload: &Bytes) -> bool {
        static SAID: Said = Said::new();
        match frame::open::<InvokerBeat>(Kind::Beat, payload) {
            Ok((beat, _)) => self.controller.beat(beat, self.clock.now()),
            Err(error) => {
                let invoker = subject.rsplit('.').next().unwrap_or_default();
                if SAID.is_new(&format!("{invoker}: {error}")) {
                    tracing::warn!(invoker, %error, "an invoker whose heartbeats are not understood gets no work");
                }
                false
            }
        }
    }

    /// Reaps, observes, and finds out whether it is our turn.
    async fn observe(&mut self) {
        let ended = self.actuator.reap().await;
        self.controller.reaped(&ended, self.clock.now());
        let depths = async {
            if !self.streams_ensured {
                self.registry = Registry::open(&self.connection.jetstream).await?;
                ensure_streams(&self.connection.jetstream, &self.registry, &self.streams).await?;
                self.streams_ensured = true;
            }
            let asked = self.clock.now();
            let mut depths = self.connection.jetstream.depths(self.pool.first + self.pool.partitions).await?;
            depths.drain(..usize::from(self.pool.first));
            Ok::<_, RegistryError>((depths, asked))
        };
        match depths.await {
            Ok((depths, asked)) => {
                self.controller.observed(&depths, asked);
                metrics::depths(&self.pool, &depths);
                self.controller.show(self.pool.name.as_ref(), self.clock.now());
                match self.observes.replace(true) {
                    Some(true) => {}
                    before => {
                        tracing::info!(again = before.is_some(), "observing the queues");
                        (self.report)(None);
                    }
                }
            }
            Err(error) => {
                metrics::observation_failed();
                // A missing stream is made again; that costs little where none is missing.
                self.streams_ensured = false;
                if self.observes.replace(false) != Some(false) {
                    tracing::warn!(%error, "cannot observe the queues; everything stays as it is until then");
                    (self.report)(Some("the queues cannot be observed"));
                }
            }
        }
    }

    /// Acts, if it is our turn, and shows the state.
    async fn act(&mut self) {
        if !self.leadership.holds() {
            if self.controller.leads() {
                tracing::warn!("lost the lease; watching until it is ours again");
            }
            self.controller.lapsed();
            self.placement = None;
            for action in self.controller.step(self.clock.now()) {
                // A standby only stops invokers of its own.
                if let Action::Stop(id) = action {
                    self.actuator.stop(&id).await;
                }
            }
        } else if let Err(error) = self.step().await {
            self.placement = None;
            if !std::mem::replace(&mut self.placing_fails, true) {
                tracing::warn!(%error, "cannot place partitions; everything stays as it is until then");
            }
        } else if std::mem::take(&mut self.placing_fails) {
            tracing::info!("placing again");
        }
        let status = self.controller.status();
        if status.leading {
            self.scale(status.target).await;
        }
        metrics::status(self.pool.name.as_ref(), &status);
        self.status.send_if_modified(|shown| {
            let changed = *shown != status;
            *shown = status;
            changed
        });
    }

    async fn scale(&mut self, invokers: usize) {
        match self.actuator.scale(invokers).await {
            Ok(()) => {}
            // Those that last are said again with every attempt, as those of a start are.
            Err(error) => tracing::warn!(invokers, %error, "not scaled; trying again"),
        }
    }

    async fn step(&mut self) -> Result<(), RegistryError> {
        for _ in 0..PLACE_ATTEMPTS {
            let current = self.placement.as_ref().is_some_and(|known| known.read.elapsed() < REREAD);
            if !current || !self.controller.leads() {
                self.read_placement().await?;
            }
            let adopted = self.actuator.adopt().await;
            self.controller.adopted(&adopted, self.clock.now());
            // Every action is performed, whatever becomes of the others: the controller counts on it.
            let mut placed = Ok(true);
            for action in self.controller.step(self.clock.now()) {
                match action {
                    Action::Decided(record) => say(&record),
                    Action::Start(id) => self.start(&id).await,
                    Action::Place(placement) => placed = self.write_placement(placement).await,
                    Action::Stop(id) => self.actuator.stop(&id).await,
                }
            }
            if placed? {
                return Ok(());
            }
        }
        Ok(())
    }

    fn placement_key(&self) -> String {
        placement_key(self.pool.name.as_ref())
    }

    async fn read_placement(&mut self) -> Result<(), RegistryError> {
        let (placement, revision) = self.registry.get::<Placement>(&self.placement_key()).await?;
        let placement = match placement {
            Some(placement) => placement,
            // A first start, or a registry that was lost: consumers that are left name the epochs in use.
            None => {
                let Pool { first, partitions, .. } = self.pool;
                let range = first..first + partitions;
                let epochs = consumer_epochs(&self.connection.jetstream, range).await?;
                let unheld = epochs.into_iter().map(|epoch| PlacedPartition { epoch, holder: None });
                Placement { partitions: unheld.collect(), first }
            }
        };
        let now = self.clock.now();
        self.placement = Some(Known { revision, read: Instant::now() });
        if self.controller.leads() {
            self.controller.placed(placement, now);
        } else {
            self.controller.lead(placement, now);
            tracing::info!(invokers = self.controller.status().invokers, "autoscaler leads");
        }
        Ok(())
    }

    /// `false` on a conflict: somebody else wrote, so it has to be read and decided again.
    async fn write_placement(&mut self, placement: Placement) -> Result<bool, RegistryError> {
        // Taken: after an error it is unknown whether the write has happened.
        let Some(known) = self.placement.take() else { return Ok(false) };
        let Ok(revision) = self.registry.put(&self.placement_key(), &placement, known.revision).await? else {
            return Ok(false);
        };
        self.placement = Some(Known { revision, ..known });
        let moved = moves(self.controller.placement(), &placement);
        metrics::moved(moved);
        tracing::debug!(moved, revision, "placed");
        self.controller.placed(placement, self.clock.now());
        Ok(true)
    }

    async fn start(&mut self, id: &str) {
        let started = self.actuator.start(id).await;
        metrics::started(started.is_ok());
        if let Err(error) = started {
            tracing::warn!(%error, "trying again later");
            self.controller.not_started(id, self.clock.now());
        }
    }

    /// Takes the partitions from our invokers, so that they need not wait for somebody to do it, and stops
    /// them.
    async fn leave(&mut self) {
        if self.leadership.holds() {
            match tokio::time::timeout(FAREWELL, self.hand_over()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "partitions not handed over"),
                Err(_) => tracing::warn!("partitions not handed over in time"),
            }
        }
        self.actuator.stop_all().await;
    }

    async fn hand_over(&mut self) -> Result<(), RegistryError> {
        for _ in 0..PLACE_ATTEMPTS {
            self.read_placement().await?;
            let Some(placement) = self.controller.hand_over(self.clock.now()) else { break };
            if self.write_placement(placement).await? {
                break;
            }
        }
        Ok(())
    }
}

fn say(record: &DecisionRecord) {
    metrics::decided(record.reason);
    tracing::info!(
        reason = record.reason.as_str(),
        previous = record.previous,
        // Not `target`: that is what a log's line says of the module it comes from.
        wanted = record.target,
        depth_messages = record.status.depth_messages,
        depth_bytes = record.status.depth_bytes,
        starting = record.status.starting,
        ready = record.status.ready,
        draining = record.status.draining,
        spare = record.status.spare,
        service_mb_per_s = record.service_bytes_per_s / 1e6,
        busy = record.busy,
        "decided on the number of invokers"
    );
}

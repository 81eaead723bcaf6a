//! The gateway as a service.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::service::ServiceExt as _;
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use thalweg_broker::{
    Backoff, Connection, LeaseConfig, LeaseKeeper, Registry, Report, StreamsConfig, ensure_streams,
};
use thalweg_protocol::{Event, Incarnation, subjects};
use thalweg_store::StoreClient;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{events::Sink, http, jobs::Jobs, metrics, service::Gateway};

/// Settings of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address of the HTTP interface; port 0 takes a free one. Default 127.0.0.1:8080.
    pub http_listen: SocketAddr,
    /// Silence after which a worker loses its rank, milliseconds. Default 10000.
    pub worker_lease_ms: u64,
    /// Bytes that all workers together may have in flight. The NATS server must be able to keep this
    /// and some headroom. Default 1 GiB.
    pub window_budget_bytes: u64,
    /// The operator's word that the NATS server runs with `sync_interval: always`, which a client cannot
    /// see; without it jobs of level `disk` are created with a warning. Default false.
    pub nats_syncs_always: bool,
    /// Terms of the lease among several gateways.
    pub lease: LeaseConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http_listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            worker_lease_ms: 10_000,
            window_budget_bytes: 1 << 30,
            nats_syncs_always: false,
            lease: LeaseConfig::default(),
        }
    }
}

/// What stops a gateway.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The HTTP address cannot be used.
    #[error("HTTP on {0}: {1}; choose another gateway.http_listen")]
    Listen(SocketAddr, std::io::Error),
    /// NATS refuses.
    #[error("NATS: {0}")]
    Nats(String),
}

/// Requests worked on at once.
const MAX_REQUESTS: usize = 256;
/// Time between looks at JetStream's account.
const BROKER_LOOK: Duration = Duration::from_secs(5);
/// Events on their way to NATS.
const MAX_EVENTS: usize = 4096;

/// How long HTTP requests under way are waited for at the end. Streams end at once, but for those of clients that do
/// not read them.
const HTTP_DRAIN: Duration = Duration::from_secs(2);

/// Takes the address of the HTTP interface. Whoever connects waits until the gateway runs.
///
/// # Errors
/// [`GatewayError::Listen`].
pub async fn listen(address: SocketAddr) -> Result<TcpListener, GatewayError> {
    TcpListener::bind(address).await.map_err(|error| GatewayError::Listen(address, error))
}

/// Serves until `shutdown`, then finishes the requests under way.
///
/// `listener` is that of [`listen`] for `config.http_listen`.
/// `window_budget` is what counts of `config.window_budget_bytes`, and may change meanwhile.
///
/// # Errors
/// [`GatewayError`]: only what waiting cannot cure.
pub async fn run(
    config: Config,
    listener: TcpListener,
    mut window_budget: watch::Receiver<u64>,
    streams: StreamsConfig,
    connection: Connection,
    report: Report,
    shutdown: CancellationToken,
) -> Result<(), GatewayError> {
    report(Some("waiting for the registry"));
    let mut connects = connection.connects();
    connects.mark_unchanged();
    let Some(registry) = prepare(&connection, &streams, &report, &shutdown).await else { return Ok(()) };
    let client = connection.client.clone();
    let jobs = Jobs {
        registry: registry.clone(),
        queues: Arc::new(connection.jetstream.clone()),
        max_payload: client.max_payload(),
        stores: Arc::new(move |id| Arc::new(StoreClient::new(client.clone(), id))),
        streams: streams.clone(),
        nats_syncs_always: config.nats_syncs_always,
        incarnations: Arc::new(Incarnation::random),
    };
    let lease = Duration::from_millis(config.worker_lease_ms.max(100));
    let budget = *window_budget.borrow_and_update();
    let gateway = Gateway::new(jobs, Arc::new(Instant::now), lease, budget);
    let gateway = Arc::new(gateway.telling(tell(connection.client.clone())));
    let nats = |error: &dyn std::fmt::Display| GatewayError::Nats(error.to_string());
    let service = connection
        .client
        .service_builder()
        .description("Thalweg gateway: jobs, rosters, windows")
        .queue_group(subjects::GATEWAY_GROUP)
        .start("thalweg-gateway", env!("CARGO_PKG_VERSION"))
        .await
        .map_err(|error| nats(&error))?;
    let mut requests = service.endpoint(subjects::API).await.map_err(|error| nats(&error))?;
    let mut beats = connection.client.subscribe(subjects::WORKER_BEAT).await.map_err(|error| nats(&error))?;
    let hints = async |keys: &str| connection.client.subscribe(subjects::registry_hint(keys)).await;
    let rosters = hints("roster.>").await.map_err(|error| nats(&error))?;
    let jobs = hints("job.>").await.map_err(|error| nats(&error))?;
    let mut hints = futures::stream::select(rosters, jobs);
    let address = listener.local_addr().map_err(|error| GatewayError::Listen(config.http_listen, error))?;
    let watched = tokio::spawn(watch_broker(connection.jetstream.clone()));
    let (jetstream, stop) = (connection.jetstream.clone(), shutdown.clone());
    let mut web = tokio::spawn(http::serve(listener, gateway.clone(), jetstream, stop));
    tracing::info!(%address, "gateway serves");
    report(None);
    let mut keeper = LeaseKeeper::new("gateway", Incarnation::random(), config.lease);
    let mut renew = tokio::time::interval(keeper.interval());
    let mut sweep = tokio::time::interval(gateway.sweep_interval());
    let permits = Arc::new(tokio::sync::Semaphore::new(MAX_REQUESTS));
    loop {
        tokio::select! {
            request = requests.next() => {
                let Some(request) = request else { break };
                let gateway = gateway.clone();
                let Ok(permit) = permits.clone().acquire_owned().await else { break };
                tokio::spawn(async move {
                    let reply = gateway.answer(&request.message.payload).await;
                    let _ = request.respond(Ok(reply)).await;
                    drop(permit);
                });
            }
            beat = beats.next() => {
                let Some(beat) = beat else { break };
                let (gateway, client) = (gateway.clone(), connection.client.clone());
                tokio::spawn(async move {
                    let reply = gateway.beat(&beat.payload).await;
                    if let (Some(reply), Some(to)) = (reply, beat.reply) {
                        let _ = client.publish(to, reply).await;
                    }
                });
            }
            hint = hints.next() => {
                let Some(hint) = hint else { break };
                let gateway = gateway.clone();
                tokio::spawn(async move { gateway.refresh(hint.subject.as_str()).await });
            }
            changed = connects.changed() => {
                if changed.is_err() { break }
                tracing::info!("connection is back: looking after the streams");
                gateway.interrupted();
                let (connection, registry, streams) = (connection.clone(), registry.clone(), streams.clone());
                let shutdown = shutdown.clone();
                tokio::spawn(async move { mend_streams(&connection, &registry, &streams, &shutdown).await });
            }
            Ok(()) = window_budget.changed() => {
                let bytes = *window_budget.borrow_and_update();
                tracing::info!(bytes, "sharing another window budget");
                gateway.set_window_budget(bytes);
            }
            _ = renew.tick() => {
                if let Err(error) = keeper.tick(&registry, Instant::now()).await {
                    error.log("lease not renewed");
                }
                metrics::leads(keeper.held_until().is_some_and(|until| until > Instant::now()));
                gateway.lead(keeper.held_until()).await;
            }
            _ = sweep.tick() => {
                let (gateway, queues) = (gateway.clone(), connection.jetstream.clone());
                let partitions = streams.total();
                tokio::spawn(async move { gateway.sweep(&queues, partitions).await });
            }
            () = shutdown.cancelled() => break,
        }
    }
    report(Some("draining"));
    watched.abort();
    let _ = service.stop().await;
    let _ = permits.acquire_many(u32::try_from(MAX_REQUESTS).unwrap_or(u32::MAX)).await;
    let _ = keeper.release(&registry).await;
    let _ = connection.client.flush().await;
    if tokio::time::timeout(HTTP_DRAIN, &mut web).await.is_err() {
        tracing::warn!("HTTP requests are cut off");
        web.abort();
    }
    Ok(())
}

/// Tells how JetStream does, for dashboards, until it is aborted.
async fn watch_broker(jetstream: async_nats::jetstream::Context) {
    let mut look = tokio::time::interval(BROKER_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let asked = Instant::now();
        match jetstream.query_account().await {
            Ok(account) => metrics::broker(account.memory, account.storage, asked.elapsed()),
            Err(_) => metrics::broker_failed(),
        }
        if let Ok(stream) = jetstream.get_stream(subjects::DEAD_LETTER_STREAM).await {
            metrics::dead_letters(stream.cached_info().state.messages);
        }
    }
}

/// Publishes events. One that NATS does not take at once is lost: nothing depends on it.
fn tell(client: async_nats::Client) -> Sink {
    let (events, mut queue) = tokio::sync::mpsc::channel::<Event>(MAX_EVENTS);
    tokio::spawn(async move {
        while let Some(event) = queue.recv().await {
            let payload = serde_json::to_vec(&event).unwrap_or_default();
            let _ = client.publish(subjects::event(&event.tenant, &event.job), payload.into()).await;
        }
    });
    Arc::new(move |record, kind| {
        let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let event = Event {
            at_ms: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            tenant: record.spec.key.tenant.to_string(),
            job: record.spec.key.job.to_string(),
            incarnation: record.incarnation.to_string(),
            kind,
        };
        if let Err(error) = events.try_send(event) {
            tracing::debug!(%error, "event lost");
        }
    })
}

/// Opens the registry and creates the streams, waiting as long as it takes.
async fn prepare(
    connection: &Connection,
    streams: &StreamsConfig,
    report: &Report,
    shutdown: &CancellationToken,
) -> Option<Registry> {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    loop {
        let opened = async {
            let registry = Registry::open(&connection.jetstream).await?;
            ensure_streams(&connection.jetstream, &registry, streams).await?;
            Ok::<_, thalweg_broker::RegistryError>(registry)
        };
        match opened.await {
            Ok(registry) => return Some(registry),
            Err(error) => {
                tracing::info!(%error, "gateway waits for JetStream");
                report(Some(&error.to_string()));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.delay()) => {}
            () = shutdown.cancelled() => return None,
        }
    }
}

/// Recreates what a restarted broker has forgotten (rule P16).
async fn mend_streams(
    connection: &Connection,
    registry: &Registry,
    streams: &StreamsConfig,
    shutdown: &CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
    loop {
        match ensure_streams(&connection.jetstream, registry, streams).await {
            Ok(_) => return,
            Err(error) => tracing::info!(%error, "streams are not there yet"),
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.delay()) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

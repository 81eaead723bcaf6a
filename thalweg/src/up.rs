//! Everything in one process, with the broker as a child.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::FutureExt as _;
use thalweg_autoscaler::{Actuator, Status};
use thalweg_broker::{Connection, NatsConfig};
use thalweg_telemetry::{config::Loader, systemd};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    actuators,
    config::{self, Config},
    host::{Host, end_with_stdin},
    nats,
    pools::{self, Scaling},
    reload::{Live, Reload},
    services,
};

/// How often the broker is looked after.
const WATCH_BROKER: Duration = Duration::from_millis(200);

/// `thalweg up`: runs until a signal, and with `with_stdin` also no longer than standard input lasts.
///
/// # Errors
/// What waiting cannot cure.
pub async fn main(config: Config, loader: Loader, with_stdin: bool) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    thalweg_telemetry::shutdown::signals(shutdown.clone())?;
    if with_stdin {
        end_with_stdin(shutdown.clone());
    }
    let live = Live::new(&config);
    // All but [nats]: its address is that of the embedded one.
    let sections = &["streams", "gateway", "store", "invoker", "autoscaler", "embedded", "admin", "log"];
    Reload::new(loader, sections, &config, live.clone()).at_hangups()?;
    let embedded = Service::start_with(config, live).await?;
    let systemd = systemd::notify(embedded.host.health.clone(), shutdown.clone());
    tracing::info!(url = embedded.url(), "thalweg is up; stop it with Ctrl-C");
    let ended = tokio::select! {
        () = shutdown.cancelled() => None,
        why = embedded.ended() => Some(why),
    };
    shutdown.cancel();
    if let Some(systemd) = systemd {
        systemd.await?;
    }
    embedded.stop().await?;
    ended.map_or(Ok(()), Err)
}

/// A whole deployment in this process.
pub struct Service {
    host: Host,
    broker: Arc<std::sync::Mutex<Option<nats::Server>>>,
    url: String,
    http: SocketAddr,
    status: watch::Receiver<Status>,
    autoscaler: (CancellationToken, JoinHandle<anyhow::Result<()>>),
    rest: CancellationToken,
    gateway: JoinHandle<anyhow::Result<()>>,
    store: JoinHandle<anyhow::Result<()>>,
    failed: watch::Receiver<Option<String>>,
}

impl Service {
    /// Starts everything and waits until it is ready.
    ///
    /// # Errors
    /// What waiting cannot cure: no nats-server, a data directory in use, a port that is taken.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let live = Live::new(&config);
        Self::start_with(config, live).await
    }

    async fn start_with(mut config: Config, live: Live) -> anyhow::Result<Self> {
        let rest = CancellationToken::new();
        let components = ["gateway", "store", "autoscaler"];
        let host = Host::open_without_signals(&config, &components, live, rest.clone()).await?;
        let local = services::open_store(&config.store).await?;
        let embedded = config.embedded.clone();
        config.gateway.nats_syncs_always |= embedded.sync_always;
        let options = nats::Options {
            binary: nats::find(embedded.nats_server.as_deref())?,
            port: embedded.port,
            data_dir: embedded.data_dir,
            max_memory_bytes: embedded.max_memory_bytes,
            sync_always: embedded.sync_always,
        };
        let server = tokio::task::spawn_blocking(move || nats::Server::start(options)).await??;
        let url = server.url();
        config.nats.url = url.clone();
        let broker = Arc::new(std::sync::Mutex::new(Some(server)));
        let (failure, failed) = watch::channel(None);
        tokio::spawn(look_after(broker.clone(), rest.clone(), failure.clone()));
        let connection = open("thalweg-up", &config.nats, &rest).await?;
        let store = {
            let (config, local) = (config.store.clone(), local.clone());
            let (report, token) = (host.report("store"), rest.clone());
            let connection = connection.clone();
            supervise("store", failure.clone(), async move {
                Ok(thalweg_store::run(config, connection, local, report, token).await?)
            })
        };
        let listener = thalweg_gateway::listen(config.gateway.http_listen).await?;
        let http = listener.local_addr()?;
        let gateway = {
            let (streams, report, token) = (config.streams.clone(), host.report("gateway"), rest.clone());
            let (config, connection) = (config.gateway.clone(), connection.clone());
            let budget = host.live.window_budget();
            supervise("gateway", failure.clone(), async move {
                Ok(thalweg_gateway::run(config, listener, budget, streams, connection, report, token).await?)
            })
        };
        let (status_sender, status) = watch::channel(Status::default());
        let autoscaler_token = CancellationToken::new();
        let autoscaler = {
            let scaling = Scaling {
                policy: host.live.policy(),
                connection: connection.clone(),
                report: host.report("autoscaler"),
                status: status_sender,
                shutdown: autoscaler_token.clone(),
            };
            let (config, store, others) = (config.clone(), local, host.others.clone());
            let actuator = move |config: Config| {
                let (connection, store, others) = (connection.clone(), store.clone(), others.clone());
                async move {
                    Ok(match config.autoscaler.actuator {
                        config::Actuator::Auto => {
                            let actuator: Box<dyn Actuator> =
                                Box::new(actuators::in_process(&config, Arc::new(store)));
                            actuator
                        }
                        _ => actuators::open(&config, &connection, others).await?,
                    })
                }
                .boxed()
            };
            supervise("autoscaler", failure, async move { pools::scale(&config, scaling, actuator).await })
        };
        let service = Self {
            host,
            broker,
            url,
            http,
            status,
            autoscaler: (autoscaler_token, autoscaler),
            rest,
            gateway,
            store,
            failed,
        };
        tokio::select! {
            () = service.host.health.wait_ready() => Ok(service),
            why = service.ended() => Err(why),
        }
    }

    /// URL of its NATS server.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Address of its HTTP interface.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// What the autoscaler sees and does.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Process id of the broker, while it lives.
    #[must_use]
    pub fn broker_pid(&self) -> Option<u32> {
        let broker = self.broker.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        broker.as_ref().map(nats::Server::pid)
    }

    /// Waits until some part has ended by itself.
    async fn ended(&self) -> anyhow::Error {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(reason) => anyhow::anyhow!(reason.clone().unwrap_or_default()),
            Err(_) => anyhow::anyhow!("all parts have ended"),
        }
    }

    /// Stops everything in order: invokers hand over, then gateway and store, then the broker.
    ///
    /// # Errors
    /// The first that any part ended with.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.autoscaler.0.cancel();
        let autoscaler = self.autoscaler.1.await?;
        self.rest.cancel();
        let (gateway, store) = (self.gateway.await?, self.store.await?);
        let server = self.broker.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(server) = server {
            tokio::task::spawn_blocking(move || server.stop()).await??;
        }
        self.host.close().await;
        autoscaler.and(gateway).and(store)
    }
}

async fn open(name: &str, config: &NatsConfig, token: &CancellationToken) -> anyhow::Result<Connection> {
    Connection::open(name, config, token).await?.context("stopped while connecting")
}

/// Runs a part; tells when it fails.
fn supervise(
    name: &'static str,
    failure: watch::Sender<Option<String>>,
    part: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) -> JoinHandle<anyhow::Result<()>> {
    tokio::spawn(async move {
        let result = part.await;
        if let Err(error) = &result {
            tracing::error!(part = name, error = format!("{error:#}"), "a part of the service failed");
            failure.send_replace(Some(format!("{name}: {error:#}")));
        }
        result
    })
}

/// Starts the broker again when it dies.
async fn look_after(
    broker: Arc<std::sync::Mutex<Option<nats::Server>>>,
    stop: CancellationToken,
    failure: watch::Sender<Option<String>>,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(WATCH_BROKER) => {}
            () = stop.cancelled() => return,
        }
        let broker = broker.clone();
        let revived = tokio::task::spawn_blocking(move || {
            let mut broker = broker.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            broker.as_mut().map_or(Ok(false), nats::Server::revive)
        });
        match revived.await {
            Ok(Ok(true)) => tracing::warn!("nats-server had died and was started again"),
            Ok(Err(error)) => {
                failure.send_replace(Some(format!("nats-server: {error:#}")));
                return;
            }
            _ => {}
        }
    }
}

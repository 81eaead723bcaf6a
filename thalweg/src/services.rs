//! One service a process.

use std::{io::Write as _, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::FutureExt as _;
use thalweg_broker::{Connection, Registry, Report};
use thalweg_invoker::{Control, CpuScope};
use thalweg_protocol::{STORE_KEY, StoreRecord};
use thalweg_store::{LocalStore, OpenOptions, ShardStore, StoreClient};
use thalweg_telemetry::config::Loader;
use tokio_util::sync::CancellationToken;

use crate::{
    actuators,
    config::Config,
    host::{Host, end_with_stdin},
    pools::{self, Scaling},
};

/// Connects; `None` when told to stop before NATS was there.
async fn connect(config: &Config, name: &str, host: &Host) -> anyhow::Result<Option<Connection>> {
    Connection::open(name, &config.nats, &host.shutdown).await.context("connecting to NATS")
}

/// `thalweg gateway`.
///
/// # Errors
/// What waiting cannot cure.
pub async fn gateway(config: Config, loader: Loader) -> anyhow::Result<()> {
    let sections = &["nats", "streams", "gateway", "admin", "log"];
    let host = Host::open(&config, loader, &["gateway"], sections).await?;
    if let Some(connection) = connect(&config, "thalweg-gateway", &host).await? {
        let (report, budget) = (host.report("gateway"), host.live.window_budget());
        let shutdown = host.shutdown.clone();
        let listener = thalweg_gateway::listen(config.gateway.http_listen).await?;
        let (gateway, streams) = (config.gateway, config.streams);
        thalweg_gateway::run(gateway, listener, budget, streams, connection, report, shutdown).await?;
    }
    host.close().await;
    Ok(())
}

/// Opens the data directory off the async threads.
pub(crate) async fn open_store(config: &thalweg_store::Config) -> anyhow::Result<LocalStore> {
    let (path, flush, reserve_bytes) =
        (config.data_dir.clone(), config.flush_interval(), config.reserve_bytes);
    let shown = path.clone();
    tokio::task::spawn_blocking(move || {
        LocalStore::open(OpenOptions { reserve_bytes, ..OpenOptions::directory(&path, flush)? })
    })
    .await?
    .with_context(|| format!("opening the store in {}", shown.display()))
}

/// `thalweg store`.
///
/// # Errors
/// What waiting cannot cure.
pub async fn store(config: Config, loader: Loader) -> anyhow::Result<()> {
    let host = Host::open(&config, loader, &["store"], &["nats", "store", "admin", "log"]).await?;
    let local = open_store(&config.store).await?;
    if let Some(connection) = connect(&config, "thalweg-store", &host).await? {
        let report = host.report("store");
        thalweg_store::run(config.store, connection, local, report, host.shutdown.clone()).await?;
    }
    host.close().await;
    Ok(())
}

/// `thalweg invoker`. With `with_stdin` it runs no longer than standard input lasts; with `announce` it prints the address
/// of its admin port.
///
/// # Errors
/// What waiting cannot cure.
pub async fn invoker(
    config: Config,
    loader: Loader,
    (with_stdin, announce): (bool, bool),
) -> anyhow::Result<()> {
    let host = Host::open(&config, loader, &["invoker"], &["nats", "invoker", "admin", "log"]).await?;
    if announce {
        // To whoever has started it; if that one is gone already, nobody misses it.
        let mut out = std::io::stdout();
        let _ = writeln!(out, "{}", host.address).and_then(|()| out.flush());
    }
    if with_stdin {
        end_with_stdin(host.shutdown.clone());
    }
    if let Some(connection) = connect(&config, "thalweg-invoker", &host).await? {
        let report = host.report("invoker");
        if let Some(store) = find_store(&connection, &report, &host.shutdown).await {
            let control = Control::open("thalweg-invoker-control", &config.nats, &host.shutdown).await;
            let Some(control) = control.context("connecting to NATS")? else {
                host.close().await;
                return Ok(());
            };
            let (scope, shutdown) = (CpuScope::Process, host.shutdown.clone());
            thalweg_invoker::run(config.invoker, connection, control, store, scope, report, shutdown)
                .await
                .map_err(anyhow::Error::from_boxed)?;
        }
    }
    host.close().await;
    Ok(())
}

/// The registered store, waiting until there is one.
async fn find_store(
    connection: &Connection,
    report: &Report,
    shutdown: &CancellationToken,
) -> Option<Arc<dyn ShardStore>> {
    report(Some("waiting for a store to register"));
    let mut reported = false;
    loop {
        let found = match Registry::open(&connection.jetstream).await {
            Ok(registry) => registry.get::<StoreRecord>(STORE_KEY).await.map(|(record, _)| record),
            Err(error) => Err(error),
        };
        match found {
            Ok(Some(record)) => {
                let data_dir = Path::new(&record.location);
                return Some(Arc::new(StoreClient::near(connection.client.clone(), record.id, data_dir)));
            }
            Ok(None) if !reported => {
                tracing::info!("waiting for a store: start `thalweg store`");
                reported = true;
            }
            Ok(None) => {}
            Err(error) => {
                error.log("waiting for a store");
                report(Some(&error.to_string()));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
            () = shutdown.cancelled() => return None,
        }
    }
}

/// `thalweg autoscaler`.
///
/// # Errors
/// What waiting cannot cure.
pub async fn autoscaler(config: Config, loader: Loader) -> anyhow::Result<()> {
    // Those of the invokers are handed to each that is started.
    let sections = &["nats", "streams", "autoscaler", "invoker", "admin", "log"];
    let host = Host::open(&config, loader, &["autoscaler"], sections).await?;
    if let Some(connection) = connect(&config, "thalweg-autoscaler", &host).await? {
        let scaling = Scaling {
            policy: host.live.policy(),
            connection: connection.clone(),
            report: host.report("autoscaler"),
            status: tokio::sync::watch::Sender::new(thalweg_autoscaler::Status::default()),
            shutdown: host.shutdown.clone(),
        };
        let actuator = |config: Config| {
            let (connection, others) = (connection.clone(), host.others.clone());
            async move { actuators::open(&config, &connection, others).await }.boxed()
        };
        pools::scale(&config, scaling, actuator).await?;
    }
    host.close().await;
    Ok(())
}

/// `thalweg agent`.
///
/// # Errors
/// What waiting cannot cure.
pub async fn agent(config: Config, loader: Loader) -> anyhow::Result<()> {
    // Those of the invokers are handed to each that is started.
    let sections = &["nats", "agent", "invoker", "admin", "log"];
    let host = Host::open(&config, loader, &["agent"], sections).await?;
    if let Some(connection) = connect(&config, "thalweg-agent", &host).await? {
        let program = std::env::current_exe().context("finding this program")?;
        let actuator = Box::new(actuators::tied_process(&program, &config, host.others.clone()));
        let name = match config.agent.name.as_str() {
            "" => rustix::system::uname().nodename().to_string_lossy().into_owned(),
            name => name.to_owned(),
        };
        let (report, shutdown) = (host.report("agent"), host.shutdown.clone());
        thalweg_autoscaler::serve_agent(config.agent, name, connection, actuator, report, shutdown).await?;
    }
    host.close().await;
    Ok(())
}

//! What every service process has: signals, health, metrics, the admin port.

use std::sync::Arc;

use anyhow::Context as _;
use thalweg_broker::Report;
use thalweg_telemetry::{admin, health::Health, metrics, shutdown};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::Config;

/// The scaffolding of one process.
pub(crate) struct Host {
    pub(crate) health: Health,
    /// Cancelled by the first signal.
    pub(crate) shutdown: CancellationToken,
    /// Cancelled when everything else has ended, so that health can be watched while draining.
    ended: CancellationToken,
    admin: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Host {
    /// Opens the admin port and listens for signals. `components` are those that have to be ready.
    pub(crate) async fn open(config: &Config, components: &[&str]) -> anyhow::Result<Self> {
        let shutdown = CancellationToken::new();
        shutdown::signals(shutdown.clone())?;
        Self::open_without_signals(config, components, shutdown).await
    }

    pub(crate) async fn open_without_signals(
        config: &Config,
        components: &[&str],
        shutdown: CancellationToken,
    ) -> anyhow::Result<Self> {
        let handle = metrics::install()?;
        thalweg_store::metrics::describe();
        thalweg_invoker::metrics::describe();
        thalweg_gateway::metrics::describe();
        thalweg_autoscaler::metrics::describe();
        let health = Health::new();
        for component in components {
            health.register(component, "starting");
        }
        let listener = TcpListener::bind(config.admin.listen)
            .await
            .with_context(|| format!("admin port {}: choose another admin.listen", config.admin.listen))?;
        tracing::info!(address = %listener.local_addr()?, "health and metrics");
        let ended = CancellationToken::new();
        let admin = tokio::spawn(admin::serve(listener, health.clone(), handle, ended.clone()));
        Ok(Self { health, shutdown, ended, admin })
    }

    /// A report that shows in the health of `component`.
    pub(crate) fn report(&self, component: &'static str) -> Report {
        let health = self.health.clone();
        Arc::new(move |waiting| match waiting {
            None => health.set_ready(component),
            Some(reason) => health.set_waiting(component, reason),
        })
    }

    /// Closes the admin port.
    pub(crate) async fn close(self) {
        self.ended.cancel();
        let _ = self.admin.await;
    }
}

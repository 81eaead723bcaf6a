//! What every service process has: signals, reloading, health, metrics, the admin port, word to systemd.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use thalweg_broker::Report;
use thalweg_telemetry::{
    admin, config::Loader, health::Health, logs, metrics, others::Others, shutdown, systemd,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    reload::{Live, Reload},
};

/// The scaffolding of one process.
pub(crate) struct Host {
    pub(crate) health: Health,
    /// Cancelled by the first signal.
    pub(crate) shutdown: CancellationToken,
    /// What may change while the process runs.
    pub(crate) live: Live,
    /// Invokers that are children of this process: their metrics are shown with its own.
    pub(crate) others: Others,
    /// Of the admin port.
    pub(crate) address: SocketAddr,
    /// Cancelled when everything else has ended, so that health can be watched while draining.
    ended: CancellationToken,
    admin: tokio::task::JoinHandle<std::io::Result<()>>,
    systemd: Option<tokio::task::JoinHandle<()>>,
}

impl Host {
    /// Opens the admin port, listens for signals and tells systemd. `components` are those that have to be
    /// ready; `sections` are those of the configuration that they read, beside what every process reads.
    pub(crate) async fn open(
        config: &Config,
        loader: Loader,
        components: &[&str],
        sections: &'static [&'static str],
    ) -> anyhow::Result<Self> {
        let shutdown = CancellationToken::new();
        shutdown::signals(shutdown.clone())?;
        // In place before anything is waited for: without a handler SIGHUP ends the process.
        let live = Live::new(config);
        Reload::new(loader, sections, config, live.clone()).at_hangups()?;
        let mut host = Self::open_without_signals(config, components, live, shutdown).await?;
        host.systemd = systemd::notify(host.health.clone(), host.shutdown.clone());
        Ok(host)
    }

    pub(crate) async fn open_without_signals(
        config: &Config,
        components: &[&str],
        live: Live,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Self> {
        allow_many_files();
        let handle = if config.admin.metrics { metrics::install()? } else { metrics::nothing()? };
        crate::metrics::describe();
        thalweg_broker::metrics::describe();
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
        let address = listener.local_addr()?;
        tracing::info!(%address, "health and metrics");
        let (ended, others) = (CancellationToken::new(), Others::new("invoker"));
        let metrics = (handle, others.clone());
        let serving = admin::serve(listener, health.clone(), metrics, logs::installed(), ended.clone());
        let admin = tokio::spawn(serving);
        Ok(Self { health, shutdown, live, others, address, ended, admin, systemd: None })
    }

    /// A report that shows in the health of `component`.
    pub(crate) fn report(&self, component: &'static str) -> Report {
        let health = self.health.clone();
        Arc::new(move |waiting| match waiting {
            None => health.set_ready(component),
            Some(reason) => health.set_waiting(component, reason),
        })
    }

    /// Closes the admin port. By now systemd has been told of the end, whatever brought it about.
    pub(crate) async fn close(self) {
        self.shutdown.cancel();
        if let Some(systemd) = self.systemd {
            let _ = systemd.await;
        }
        self.ended.cancel();
        let _ = self.admin.await;
    }
}

/// A store has one file open for every job, and what a shell allows at first (1,024 as a rule) is soon too few; up to
/// the hard limit nobody minds.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some() && limit.current != limit.maximum {
        let most = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, most) {
            tracing::debug!(%error, "the limit of open files stays as it is");
        }
    }
}

/// Cancels `shutdown` when standard input ends: with the program at its other end, however that ends.
pub(crate) fn end_with_stdin(shutdown: CancellationToken) {
    // A thread of its own, which nothing waits for: a read of standard input cannot be cancelled.
    std::thread::spawn(move || {
        // An input that cannot be read has ended.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        shutdown.cancel();
    });
}

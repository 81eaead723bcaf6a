//! Holding the role beside the loop, so that a slow observation does not cost the lease.

use std::{future::Future, time::Instant};

use thalweg_broker::{LeaseConfig, LeaseKeeper, Registry};
use thalweg_protocol::{Incarnation, Name};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Role of the shared pool's autoscaler; those of others have the pool's name behind it.
const ROLE: &str = "autoscaler";

/// The lease as the loop sees it.
#[derive(Debug)]
pub(crate) struct Leadership {
    held_until: watch::Receiver<Option<Instant>>,
}

impl Leadership {
    /// The lease, and the task that keeps it; the task ends and gives the lease up when `stop` fires.
    pub(crate) fn keep(
        pool: Option<&Name>,
        config: LeaseConfig,
        registry: Registry,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, held_until) = watch::channel(None);
        let role = pool.map_or_else(|| ROLE.to_owned(), |pool| format!("{ROLE}.{pool}"));
        let keeper = LeaseKeeper::new(&role, Incarnation::random(), config);
        (Self { held_until }, keep(keeper, registry, sender, stop))
    }

    /// Whether the role is ours now.
    pub(crate) fn holds(&self) -> bool {
        self.held_until.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Waits for news; `false` when there will be none, because its task has ended.
    pub(crate) async fn changed(&mut self) -> bool {
        self.held_until.changed().await.is_ok()
    }
}

async fn keep(
    mut keeper: LeaseKeeper,
    registry: Registry,
    held_until: watch::Sender<Option<Instant>>,
    stop: CancellationToken,
) {
    loop {
        match keeper.tick(&registry, Instant::now()).await {
            Ok(()) => drop(held_until.send_replace(keeper.held_until())),
            // What is held lapses by itself if this lasts.
            Err(error) => error.log("lease not renewed"),
        }
        tokio::select! {
            () = tokio::time::sleep(keeper.interval()) => {}
            () = stop.cancelled() => break,
        }
    }
    if let Err(error) = keeper.release(&registry).await {
        tracing::debug!(%error, "lease not released; it lapses by itself");
    }
}

//! The autoscalers of all pools: each has invokers of its own, and a lease, a history and an actuator.

use anyhow::{Context as _, ensure};
use futures::future::BoxFuture;
use thalweg_autoscaler::{Actuator, Config as Policy, PoolBounds, Status};
use thalweg_broker::{Connection, Pool, Report, no_report};
use thalweg_protocol::Name;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Config};

/// What the autoscalers of a process share.
pub(crate) struct Scaling {
    /// The common policy, which may change meanwhile.
    pub(crate) policy: watch::Receiver<Policy>,
    pub(crate) connection: Connection,
    /// Of the shared pool.
    pub(crate) report: Report,
    /// Of the shared pool.
    pub(crate) status: watch::Sender<Status>,
    pub(crate) shutdown: CancellationToken,
}

/// Scales every pool until told to stop, each with an actuator made for its invokers' settings.
///
/// # Errors
/// The first error of any of them, after the others have been stopped in order.
pub(crate) async fn scale(
    config: &Config,
    scaling: Scaling,
    actuator: impl Fn(Config) -> BoxFuture<'static, anyhow::Result<Box<dyn Actuator>>>,
) -> anyhow::Result<()> {
    let stop = scaling.shutdown.child_token();
    let mut tasks = JoinSet::new();
    for pool in config.streams.all_pools() {
        let Pool { name, .. } = &pool;
        let mut of_pool = config.clone();
        of_pool.invoker.pool.clone_from(name);
        if let Some(name) = name {
            own_invokers(&mut of_pool, name)?;
        }
        let bounds = name.as_ref().and_then(|name| config.autoscaler.pools.get(name)).copied();
        let shared = name.is_none();
        let policy = bounded(scaling.policy.clone(), bounds, stop.clone());
        let report = if shared { scaling.report.clone() } else { no_report() };
        let status = if shared { scaling.status.clone() } else { watch::Sender::new(Status::default()) };
        let (actuator, streams) = (actuator(of_pool).await?, config.streams.clone());
        let (connection, token) = (scaling.connection.clone(), stop.clone());
        tasks.spawn(async move {
            let of = (streams, pool);
            let scaled = thalweg_autoscaler::run(policy, of, connection, actuator, report, status, token);
            Ok::<_, anyhow::Error>(scaled.await?)
        });
    }
    let mut outcome = Ok(());
    while let Some(ended) = tasks.join_next().await {
        // One that ends by itself takes the others along: the process is to be started again.
        stop.cancel();
        let ended = ended.map_err(anyhow::Error::from).and_then(|ended| ended);
        outcome = outcome.and(ended);
    }
    outcome
}

/// Keeps the invokers of a pool apart from those of the others, where their means would mix them up.
fn own_invokers(config: &mut Config, pool: &Name) -> anyhow::Result<()> {
    ensure!(
        config.autoscaler.actuator != config::Actuator::Agent,
        "pool {pool}: agents serve the shared pool only; run `thalweg autoscaler` with another actuator, or with \
         `external` and `thalweg invoker --set invoker.pool={pool}` on the hosts"
    );
    let (docker, kubernetes) = (&mut config.autoscaler.docker, &mut config.autoscaler.kubernetes);
    docker.deployment =
        format!("{}-{pool}", docker.deployment).parse().with_context(|| format!("pool {pool}"))?;
    kubernetes.deployment = format!("{}-{pool}", kubernetes.deployment);
    Ok(())
}

/// The common policy within the bounds of a pool.
fn bounded(
    mut common: watch::Receiver<Policy>,
    bounds: Option<PoolBounds>,
    stop: CancellationToken,
) -> watch::Receiver<Policy> {
    let Some(bounds) = bounds else { return common };
    let (sender, policy) = watch::channel(common.borrow_and_update().within(bounds));
    tokio::spawn(async move {
        while let Some(Ok(())) = stop.run_until_cancelled(common.changed()).await {
            let changed = common.borrow_and_update().within(bounds);
            sender.send_replace(changed);
        }
        // An autoscaler on its way out still asks.
        sender.closed().await;
    });
    policy
}

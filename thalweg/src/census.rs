//! Who runs, as far as it can be heard: leases that are renewed, heartbeats, a store that answers.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use async_nats::Subscriber;
use futures::{StreamExt as _, stream::select_all};
use thalweg_broker::{Connection, Registry, RegistryError};
use thalweg_protocol::{InvokerBeat, Kind, Lease, StoreRecord, frame, lease_key, subjects};
use thalweg_store::{ShardStore as _, StoreClient};

/// How long heartbeats are listened to; they come every second at most. A lease that is held is renewed several times
/// meanwhile.
pub(crate) const LISTEN: Duration = Duration::from_millis(1500);

/// Who was heard.
#[derive(Debug, Default)]
pub(crate) struct Census {
    /// Whether one leads.
    pub(crate) gateway: bool,
    /// Whether one leads, in the shared pool.
    pub(crate) autoscaler: bool,
    /// The newest heartbeat of every invoker.
    pub(crate) invokers: BTreeMap<String, InvokerBeat>,
    /// Invokers whose heartbeats are not understood, and why.
    pub(crate) strangers: BTreeMap<String, String>,
    /// Host agents.
    pub(crate) agents: BTreeSet<String>,
}

impl Census {
    /// Listens for [`LISTEN`]. Makes nothing.
    ///
    /// # Errors
    /// Those of the registry, also when the connection is closed.
    pub(crate) async fn take(connection: &Connection, registry: &Registry) -> Result<Self, RegistryError> {
        let leads = async |role: &str| registry.get::<Lease>(&lease_key(role)).await.map(|(lease, _)| lease);
        let before = (leads("gateway").await?, leads("autoscaler").await?);
        let mut census = Self::default();
        census.listen(connection).await?;
        let after = (leads("gateway").await?, leads("autoscaler").await?);
        census.gateway = after.0.is_some() && before.0 != after.0;
        census.autoscaler = after.1.is_some() && before.1 != after.1;
        Ok(census)
    }

    async fn listen(&mut self, connection: &Connection) -> Result<(), RegistryError> {
        let [shared, pooled] = subjects::ALL_INVOKER_BEATS;
        let mut heard: Vec<Subscriber> = Vec::new();
        for subject in [shared, pooled, subjects::AGENT_BEATS] {
            let subscribed = connection.client.subscribe(subject).await;
            heard.push(subscribed.map_err(|error| RegistryError::Unavailable(error.to_string()))?);
        }
        let (mut beats, until) = (select_all(heard), Instant::now() + LISTEN);
        while let Ok(Some(message)) =
            tokio::time::timeout(until.saturating_duration_since(Instant::now()), beats.next()).await
        {
            let sender = message.subject.rsplit('.').next().unwrap_or_default().to_owned();
            if message.subject.starts_with(subjects::AGENT_BEATS.trim_end_matches('*')) {
                self.agents.insert(sender);
                continue;
            }
            match frame::open::<InvokerBeat>(Kind::Beat, &message.payload) {
                Ok((beat, _)) => drop(self.invokers.insert(beat.invoker.clone(), beat)),
                Err(error) => drop(self.strangers.insert(sender, error.to_string())),
            }
        }
        Ok(())
    }
}

/// How many jobs a store holds, if it answers in time.
pub(crate) async fn jobs_in(
    store: &StoreRecord,
    connection: &Connection,
    timeout: Duration,
) -> Option<usize> {
    let client = StoreClient::new(connection.client.clone(), store.id);
    tokio::time::timeout(timeout, client.list()).await.ok()?.ok().map(|jobs| jobs.len())
}

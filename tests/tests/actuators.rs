//! Every actuator keeps what the trait promises, with real invokers.

use std::{path::Path, sync::Arc};

use thalweg::{actuators, config::Config};
use thalweg_autoscaler::Actuator as _;
use thalweg_broker::Registry;
use thalweg_protocol::{STORE_KEY, StoreRecord};
use thalweg_store::StoreClient;
use thalweg_tests::{
    PATIENCE,
    actuators::{Traits, conforms, processes_of, refuses},
    cluster::{Cluster, binary},
    connect, eventually,
};

/// Settings of somebody whose invokers work in `cluster`.
fn config(cluster: &Cluster) -> Config {
    let mut config = Config::default();
    config.nats.url = cluster.url().to_owned();
    config.autoscaler.policy.drain_timeout_ms = 2 * PATIENCE.as_millis() as u64;
    config.invoker.beat_ms = 100;
    config
}

async fn store(cluster: &Cluster) -> Arc<StoreClient> {
    let connection = connect(cluster.url()).await;
    let mut found = None;
    eventually("a store to register", async || {
        let Ok(registry) = Registry::open(&connection.jetstream).await else { return false };
        found = registry.get::<StoreRecord>(STORE_KEY).await.ok().and_then(|(record, _)| record);
        found.is_some()
    })
    .await;
    Arc::new(StoreClient::new(connection.client.clone(), found.expect("it is there").id))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads() {
    let cluster = Cluster::start(&[]);
    let store = store(&cluster).await;
    let mut actuator = actuators::in_process(&config(&cluster), store.clone());
    conforms(&mut actuator, &cluster, Traits { processes: false }).await;

    let mut nowhere = config(&cluster);
    nowhere.nats.url = "nats://:not a port".to_owned();
    assert_eq!(refuses(&mut actuators::in_process(&nowhere, store)).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes() {
    let cluster = Cluster::start(&[]);
    let mut actuator = actuators::process(&binary(), &config(&cluster));
    conforms(&mut actuator, &cluster, Traits { processes: true }).await;

    let missing = refuses(&mut actuators::process(Path::new("/nonexistent"), &config(&cluster))).await;
    assert!(missing.is_some_and(|error| error.contains("the system does not start it")));
    let mut nowhere = config(&cluster);
    nowhere.nats.url = "nats://:not a port".to_owned();
    assert_eq!(refuses(&mut actuators::process(&binary(), &nowhere)).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents() {
    let cluster = Cluster::start(&["agent.beat_ms=100"]);
    let connection = connect(cluster.url()).await;
    let mut actuator = actuators::agents(&config(&cluster), &connection).await.expect("opened");
    let nobody = refuses(&mut actuator).await.expect("there is no agent yet");
    assert!(nobody.contains("none of 0 agents has room"), "{nobody}");

    for name in ["left", "right"] {
        cluster.agent(name, 1);
    }
    eventually("both agents to be found", async || {
        assert!(actuator.reap().await.is_empty());
        actuator.agents() == 2
    })
    .await;
    conforms(&mut actuator, &cluster, Traits { processes: true }).await;

    // What an actuator leaves behind is in charge of the next one.
    let id = "left-behind";
    actuator.start(id).await.expect("started");
    let mut next = actuators::agents(&config(&cluster), &connection).await.expect("opened");
    eventually("the next one to adopt it", async || next.adopt().await == [id]).await;
    assert!(next.adopt().await.is_empty(), "each is named once");
    drop(actuator);
    next.stop_all().await;
    assert!(processes_of(id).is_empty());
}

//! Every actuator keeps what the trait promises, with real invokers.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use thalweg::{actuators, config::Config};
use thalweg_autoscaler::{Actuator as _, DockerConfig};
use thalweg_broker::Registry;
use thalweg_protocol::{STORE_KEY, StoreRecord};
use thalweg_store::StoreClient;
use thalweg_telemetry::others::Others;
use thalweg_tests::{
    PATIENCE,
    actuators::{Traits, conforms, kill, processes_of, refuses},
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
    let mut actuator = actuators::process(&binary(), &config(&cluster), Others::new("invoker"));
    conforms(&mut actuator, &cluster, Traits { processes: true }).await;

    let missing = refuses(&mut actuators::process(
        Path::new("/nonexistent"),
        &config(&cluster),
        Others::new("invoker"),
    ))
    .await;
    assert!(missing.is_some_and(|error| error.contains("the system does not start it")));
    let mut nowhere = config(&cluster);
    nowhere.nats.url = "nats://:not a port".to_owned();
    assert_eq!(refuses(&mut actuators::process(&binary(), &nowhere, Others::new("invoker"))).await, None);
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

/// An image with the binary under test and the libraries that it names; removed when dropped.
struct Image(String);

impl Image {
    /// `None`, with a word about it, where no Docker Engine runs.
    fn build() -> Option<Self> {
        let engine = Command::new("docker").args(["version", "--format", "{{.Server.Version}}"]).output();
        let Some(engine) = engine.ok().filter(|output| output.status.success()) else {
            eprintln!(
                "SKIPPED: containers were not tested, because no Docker Engine answers `docker version`"
            );
            return None;
        };
        eprintln!("Docker Engine {}", String::from_utf8_lossy(&engine.stdout).trim());
        let name = format!("thalweg-test-{:08x}", rand::random::<u32>());
        let program = binary();
        let libraries = Command::new("ldd").arg(&program).output().expect("ldd runs").stdout;
        let libraries = String::from_utf8(libraries).expect("text");
        let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
        // Libraries where the loader looks for them, links followed; the binary at the top.
        let mut archive = Command::new("tar");
        archive.args(["--create", "--dereference", "--absolute-names", "--file", "-"]);
        archive.arg(format!("--transform=s,^{},/thalweg,", program.display())).arg(&program).args(libraries);
        let mut archive = archive.stdout(Stdio::piped()).spawn().expect("tar runs");
        let mut import = Command::new("docker");
        import.args(["import", "--change", r#"ENTRYPOINT ["/thalweg"]"#, "-", &name]);
        import.stdin(archive.stdout.take().expect("an archive")).stdout(Stdio::null());
        assert!(import.status().is_ok_and(|status| status.success()), "the image was imported");
        assert!(archive.wait().is_ok_and(|status| status.success()), "the image was packed");
        Some(Self(name))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let listed = containers("label=thalweg.deployment", &self.0);
        let _ = Command::new("docker").args(["rm", "--force"]).args(listed).output();
        let _ = Command::new("docker").args(["rmi", "--force", &self.0]).output();
    }
}

/// Ids of the containers of an image with a label.
fn containers(label: &str, image: &str) -> Vec<String> {
    let ancestor = format!("ancestor={image}");
    let args = ["ps", "--all", "--quiet", "--filter", label, "--filter", &ancestor];
    let listed = Command::new("docker").args(args).output().expect("docker runs").stdout;
    String::from_utf8_lossy(&listed).split_whitespace().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn docker() {
    let Some(image) = Image::build() else { return };
    let cluster = Cluster::start(&[]);
    let mut config = config(&cluster);
    config.autoscaler.docker = DockerConfig {
        deployment: image.0.parse().expect("a name"),
        image: image.0.clone(),
        network: "host".to_owned(),
        memory_bytes: 1 << 30,
        ..DockerConfig::default()
    };
    let mut actuator = actuators::docker(&config).await.expect("the engine answers");
    conforms(&mut actuator, &cluster, Traits { processes: true }).await;
    assert!(containers("label=thalweg.invoker", &image.0).is_empty(), "all containers were removed");

    // An earlier life leaves one that runs and one that does not.
    for id in ["runs", "ended"] {
        actuator.start(id).await.expect("started");
    }
    drop(actuator);
    // The engine calls a container started a moment before its process has become the invoker.
    eventually("its process to run", async || !processes_of("ended").is_empty()).await;
    kill(&processes_of("ended"));
    let mut next = actuators::docker(&config).await.expect("the engine answers");
    let mut adopted = Vec::new();
    eventually("what has ended to be removed", async || {
        // The engine may not have seen its end before it was adopted.
        assert!(next.reap().await.iter().all(|id| id == "ended"));
        adopted.extend(next.adopt().await);
        containers("label=thalweg.invoker=ended", &image.0).is_empty()
    })
    .await;
    assert!(adopted.contains(&"runs".to_owned()), "{adopted:?}");
    next.stop_all().await;
    assert!(processes_of("runs").is_empty());
    assert!(containers("label=thalweg.invoker", &image.0).is_empty());

    let mut wrong = config.clone();
    wrong.autoscaler.docker.image = "thalweg-no-such-image".to_owned();
    let error = refuses(&mut actuators::docker(&wrong).await.expect("the engine answers")).await;
    assert!(error.is_some_and(|error| error.contains(r#"has no image "thalweg-no-such-image""#)));
    let mut wrong = config.clone();
    wrong.autoscaler.docker.network = "thalweg-no-such-network".to_owned();
    let error = refuses(&mut actuators::docker(&wrong).await.expect("the engine answers")).await;
    assert!(error.is_some_and(|error| error.contains("thalweg-no-such-network")));
    let mut wrong = config.clone();
    wrong.nats.url = "nats://:not a port".to_owned();
    assert_eq!(refuses(&mut actuators::docker(&wrong).await.expect("the engine answers")).await, None);
    let mut wrong = config;
    wrong.autoscaler.docker.socket = "/nonexistent".into();
    let error = actuators::docker(&wrong).await.expect_err("there is no engine");
    assert!(error.to_string().contains("/nonexistent"), "{error}");
}

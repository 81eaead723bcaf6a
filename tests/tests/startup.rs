//! How the pieces find each other: in any start order, over NATS and over the store's direct door.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use thalweg::nats;
use thalweg_protocol::{FunctionSpec, STORE_KEY, StoreRecord};
use thalweg_sdk::Client;
use thalweg_store::{ShardStore, StoreClient, conformance};
use thalweg_tests::{cluster, connect, embedded::Embedded, eventually, training};

/// Ends its process when the test does.
struct Component(Child);

impl Drop for Component {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(directory: &Path, args: &[&str], url: &str) -> Component {
    let log = std::fs::File::create(directory.join(format!("{}.log", args[0]))).expect("a log");
    let mut command = Command::new(cluster::binary());
    command
        .args(args)
        .args(["--nats-url", url, "--admin", "127.0.0.1:0", "--set", "gateway.http_listen=127.0.0.1:0"])
        .args(["--set", "autoscaler.actuator=external"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    Component(command.spawn().expect("the binary runs"))
}

fn server(directory: &Path, port: u16) -> nats::Server {
    let options = nats::Options {
        binary: thalweg_tests::nats_server(),
        port,
        data_dir: directory.join("nats"),
        max_memory_bytes: 1 << 28,
        sync_always: false,
    };
    nats::Server::start(options).expect("nats-server starts")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn components_may_start_in_any_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let port = port.expect("a free port").port();
    let url = format!("nats://127.0.0.1:{port}");
    let says = |component: &str, text: &str| {
        let log = std::fs::read_to_string(directory.path().join(format!("{component}.log")));
        log.unwrap_or_default().contains(text)
    };
    // Everybody depends on somebody who comes later: the invoker on all of them, all of them on the broker.
    let invoker = start(directory.path(), &["invoker"], &url);
    eventually("the invoker to say what it waits for", async || says("invoker", "waiting for NATS")).await;
    let _autoscaler = start(directory.path(), &["autoscaler"], &url);
    let data = directory.path().join("store").display().to_string();
    let gateway = start(directory.path(), &["gateway"], &url);
    eventually("the gateway to say what it waits for", async || says("gateway", "waiting for NATS")).await;
    let _server = server(directory.path(), port);
    eventually("the invoker to wait for a store", async || says("invoker", "waiting for a store")).await;
    let client = Client::connect(&url).await.expect("connected");
    // A worker that is early waits as well.
    let job = training::job("early", FunctionSpec::named("mean"), 1);
    let early = tokio::spawn({
        let client = client.clone();
        async move {
            let mut worker = training::join(&client, &job, 0).await.expect("joined in the end");
            training::round(&mut worker).await.expect("a round");
            worker.leave().await.expect("left");
        }
    });
    let _store = start(directory.path(), &["store", "--data-dir", &data], &url);
    early.await.expect("the round of the one who was early");
    assert!(says("invoker", "uses the store's direct door"), "they are on one host");
    drop((invoker, gateway));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_keeps_its_contract_over_nats_and_through_its_direct_door() {
    let service = Embedded::start(|_| {}).await;
    let connection = connect(service.service().url()).await;
    let registry = thalweg_broker::Registry::open(&connection.jetstream).await.expect("the registry");
    let (record, _) = registry.get::<StoreRecord>(STORE_KEY).await.expect("the registry answers");
    let record = record.expect("a store");
    let over_nats = StoreClient::new(connection.client.clone(), record.id);
    conformance::suite(&(Arc::new(over_nats) as Arc<dyn ShardStore>)).await;
    // On another broker nobody answers for this store, so whatever is answered came through the door.
    let elsewhere = tempfile::tempdir().expect("a directory");
    let other = server(elsewhere.path(), 0);
    let stranger = connect(&other.url()).await.client;
    let near = StoreClient::near(stranger.clone(), record.id, Path::new(&record.location));
    conformance::suite(&(Arc::new(near) as Arc<dyn ShardStore>)).await;
    let wrong = StoreClient::near(stranger, thalweg_protocol::StoreId::random(), Path::new(&record.location));
    wrong.list().await.expect_err("another store's door is not entered");
    let far = StoreClient::near(connection.client, record.id, elsewhere.path());
    far.list().await.expect("where there is no door, NATS does");
    service.stop().await;
}

#[test]
fn up_says_that_it_has_a_broker_of_its_own() {
    let output = Command::new(cluster::binary()).args(["up", "--nats-url", "nats://127.0.0.1:1"]).output();
    let output = output.expect("the binary runs");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("--nats-url") && text.contains("embedded.port"), "{text}");
}

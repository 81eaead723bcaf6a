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

/// How a component ends that may not go on: its last word.
async fn ends(directory: &Path, args: &[&str], url: &str) -> String {
    let mut component = start(directory, args, url);
    eventually(&format!("{args:?} to end"), async || matches!(component.0.try_wait(), Ok(Some(_)))).await;
    let status = component.0.wait().expect("it has ended");
    assert!(!status.success(), "{args:?}");
    let log = std::fs::read_to_string(directory.join(format!("{}.log", args[0]))).expect("a log");
    log.lines().last().unwrap_or_default().to_owned()
}

/// What a job that is opened says, once the gateway answers for it.
async fn opened(client: &Client) -> Result<(), thalweg_sdk::Error> {
    let job = training::job("kept", FunctionSpec::named("mean"), 1);
    client.open(&job).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_without_its_data_is_no_reason_to_begin_anew() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = directory.path().join("store").display().to_string();
    let args = ["store", "--data-dir", &data];
    let mut broker = server(directory.path(), 0);
    let url = broker.url();
    let port = url.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
    let gateway = start(directory.path(), &["gateway"], &url);
    let store = start(directory.path(), &args, &url);
    let client = Client::connect(&url).await.expect("connected");
    opened(&client).await.expect("created");
    drop((store, gateway, client));
    broker.kill().expect("killed");

    let elsewhere = tempfile::tempdir().expect("a directory");
    let empty = server(elsewhere.path(), port);
    let said = ends(directory.path(), &args, &url).await;
    assert!(said.contains("holds 1 jobs") && said.contains("--replace"), "{said}");
    // What is missing comes back, and all goes on.
    drop(empty);
    let _broker = server(directory.path(), port);
    let _gateway = start(directory.path(), &["gateway"], &url);
    let _store = start(directory.path(), &args, &url);
    let client = Client::connect(&url).await.expect("connected");
    opened(&client).await.expect("it is there");
    assert_eq!(client.jobs(None).await.expect("a list").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_a_store_that_was_given_up_say_so_and_can_be_removed() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = directory.path().join("store").display().to_string();
    let broker = server(directory.path(), 0);
    let _gateway = start(directory.path(), &["gateway"], &broker.url());
    let store = start(directory.path(), &["store", "--data-dir", &data], &broker.url());
    let client = Client::connect(&broker.url()).await.expect("connected");
    opened(&client).await.expect("created");
    drop(store);

    let other = directory.path().join("other").display().to_string();
    let said = ends(directory.path(), &["store", "--data-dir", &other], &broker.url()).await;
    assert!(said.contains("--replace"), "{said}");
    let _store = start(directory.path(), &["store", "--data-dir", &other, "--replace"], &broker.url());
    let mut said = String::new();
    eventually("the job to say that its store is gone", async || {
        said = opened(&client).await.err().map(|error| error.to_string()).unwrap_or_default();
        !said.is_empty()
    })
    .await;
    assert!(said.contains("given up") && said.contains("thalweg job rm"), "{said}");
    let key = thalweg_sdk::JobKey {
        tenant: "default".parse().expect("a name"),
        job: "kept".parse().expect("a name"),
    };
    client.delete(&key).await.expect("removed");
    opened(&client).await.expect("begun anew");
}

#[test]
fn up_says_that_it_has_a_broker_of_its_own() {
    let output = Command::new(cluster::binary()).args(["up", "--nats-url", "nats://127.0.0.1:1"]).output();
    let output = output.expect("the binary runs");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("--nats-url") && text.contains("embedded.port"), "{text}");
}

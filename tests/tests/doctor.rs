//! `thalweg doctor` on set-ups that are broken in every way that it knows.

use std::{
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use thalweg_protocol::{Durability, FunctionSpec, subjects};
use thalweg_sdk::Client;
use thalweg_tests::{cluster::Cluster, command::Thalweg, connect, eventually, training};

/// A NATS server with a configuration of the test's; ended with it.
struct Nats {
    child: Child,
    url: String,
    _directory: tempfile::TempDir,
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Nats {
    async fn start(config: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let address = socket.expect("a free port");
        let config = config.replace("STORE", &directory.path().display().to_string());
        let file = directory.path().join("nats.conf");
        fs::write(&file, format!("listen: {address}\n{config}")).expect("a configuration");
        let mut command = Command::new(thalweg_tests::nats_server());
        command.arg("--config").arg(file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("nats-server runs");
        eventually("the server to listen", async || tokio::net::TcpStream::connect(address).await.is_ok())
            .await;
        Self { child, url: format!("nats://{address}"), _directory: directory }
    }
}

/// What it finds, and whether it is content. The place for the data is one that is fine.
fn examine(url: &str, args: &[&str]) -> (Vec<Value>, bool) {
    let directory = tempfile::tempdir().expect("a directory");
    let data = format!("store.data_dir={}", directory.path().display());
    let fixed = ["doctor", "--json", "--timeout", "2s", "--set", &data];
    let mut command = Thalweg::at(url).command(&[&fixed, args].concat());
    let output = command.output().expect("the binary runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let findings = report["findings"].as_array().expect("findings").clone();
    let of = |level: &str| findings.iter().filter(|finding| finding["level"] == level).count() as u64;
    assert_eq!(
        (report["errors"].as_u64(), report["warnings"].as_u64()),
        (Some(of("error")), Some(of("warning")))
    );
    // Whoever is told of trouble is told what to do.
    for finding in &findings {
        assert_eq!(finding["level"] == "ok", finding["remedy"].is_null(), "{finding}");
    }
    assert_eq!(output.status.code(), Some(i32::from(of("error") > 0)), "{report:#}");
    (findings, output.status.success())
}

/// Asserts that there is a finding of this level and check that says all of this.
fn finds(findings: &[Value], level: &str, check: &str, words: &[&str]) {
    let says = |finding: &&Value| {
        let text = finding.to_string();
        finding["level"] == level && finding["check"] == check && words.iter().all(|word| text.contains(word))
    };
    assert!(findings.iter().any(|finding| says(&finding)), "{level} {check} {words:?}: {findings:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_or_not_readable() {
    let (findings, _) = examine("nats://127.0.0.1:1", &[]);
    finds(&findings, "error", "nats", &["127.0.0.1:1", "refused", "thalweg up"]);
    let (findings, _) = examine("nats://127.0.0.1:1", &["--set", "streams.partitions=0"]);
    finds(&findings, "error", "configuration", &["streams.partitions = 0"]);
    let (findings, _) = examine("nats://127.0.0.1:1", &["--set", "nats.credentials=/nonexistent.creds"]);
    finds(&findings, "error", "credentials", &["/nonexistent.creds"]);
    finds(&findings, "error", "nats", &["/nonexistent.creds"]);
    let (findings, _) = examine("nats://127.0.0.1:1", &["--set", "store.data_dir=/proc/1/thalweg"]);
    finds(&findings, "error", "disk", &["cannot be written to"]);
    let (findings, _) = examine("nats://127.0.0.1:1", &["--set", "invoker.beat_ms=5000"]);
    finds(&findings, "warning", "settings", &["dead_after_ms"]);

    // People are told the same, and the exit code is that of a failure.
    let output =
        Thalweg::at("nats://127.0.0.1:1").command(&["doctor", "--timeout", "500ms"]).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("ERROR") && text.contains("-> start nats-server"), "{text}");
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_will_not_do() {
    let server = Nats::start("").await;
    let (findings, _) = examine(&server.url, &[]);
    finds(&findings, "error", "jetstream", &["store_dir"]);

    let jetstream = "jetstream { store_dir: \"STORE\" }";
    let server = Nats::start(&format!("max_payload: 32KB\n{jetstream}")).await;
    let (findings, _) = examine(&server.url, &[]);
    finds(&findings, "error", "payload", &["32 KiB", "max_payload"]);
    finds(&findings, "warning", "registry", &["thalweg up"]);

    let user = |permissions: &str| {
        format!(
            "{jetstream}\nauthorization {{ users = [{{ user: a, password: b, permissions: {permissions} }}] }}"
        )
    };
    let server = Nats::start(&user("{ publish: \"$JS.API.>\", subscribe: \"_INBOX.>\" }")).await;
    let (findings, _) = examine(&server.url, &[]);
    finds(&findings, "error", "nats", &["authorization violation", "nats.credentials"]);
    let (findings, _) = examine(&server.url.replace("//", "//a:b@"), &[]);
    finds(&findings, "error", "permissions", &["thalweg.>", "_INBOX.>"]);
    assert!(!findings.iter().any(|finding| finding.to_string().contains("a:b@")), "{findings:#?}");

    let limits = "{ max_memory: 64MB, max_file: 1GB, max_streams: 10 }";
    let server = Nats::start(&format!(
        "{jetstream}\naccounts {{ A {{ users = [{{ user: a, password: b }}], jetstream: {limits} }} }}\nno_auth_user: a"
    ))
    .await;
    let (findings, _) = examine(&server.url, &[]);
    finds(&findings, "error", "memory", &["window_budget_bytes"]);
    finds(&findings, "error", "streams", &["may have 10 streams"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deployments_well_and_ill() {
    let cluster = Cluster::start(&[]);
    let client = Client::connect(cluster.url()).await.expect("connected");
    let job = training::job("well", FunctionSpec::named("mean"), 1);
    client.open(&job).await.expect("created");
    let well = ["--set", "autoscaler.actuator=external"];
    let mut findings = Vec::new();
    eventually("everything to be well", async || {
        let content;
        (findings, content) = examine(cluster.url(), &well);
        content
    })
    .await;
    for check in
        ["settings", "limits", "nats", "payload", "permissions", "memory", "clock", "streams", "gateway"]
    {
        finds(&findings, "ok", check, &[]);
    }
    for check in ["autoscaler", "store", "jobs", "invokers"] {
        finds(&findings, "ok", check, &[]);
    }

    // Everything at once that does not need anybody to be gone.
    let job = training::job("strict", FunctionSpec::named("mean"), 1).durability(Durability::Disk);
    client.open(&job).await.expect("created");
    let _ = Thalweg::at(cluster.url()).text(&["job", "pause", "well", "--reason", "test"]);
    let connection = connect(cluster.url()).await;
    let letter = subjects::dead_letter(None);
    connection.jetstream.publish(letter, "x".into()).await.expect("sent").await.expect("stored");
    let beat = subjects::ALL_INVOKER_BEATS[0].replace('*', "stranger");
    let beats = tokio::spawn({
        let client = connection.client.clone();
        async move {
            while client.publish(beat.clone(), "not a beat".into()).await.is_ok() {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    });
    let args = ["--set", "streams.partitions=8", "--set", "autoscaler.actuator=agent"];
    let (findings, _) = examine(cluster.url(), &args);
    beats.abort();
    finds(&findings, "warning", "jobs", &["paused", "default/well", "resume"]);
    finds(&findings, "warning", "durability", &["sync_interval"]);
    finds(&findings, "warning", "deadletters", &["thalweg deadletter ls"]);
    finds(&findings, "warning", "streams", &["32 partitions", "says 8"]);
    finds(&findings, "error", "agents", &["thalweg agent"]);
    finds(&findings, "error", "invokers", &["stranger"]);

    for role in ["gateway", "autoscaler", "store"] {
        cluster.stop(role);
    }
    let (findings, _) = examine(cluster.url(), &well);
    for role in ["gateway", "autoscaler", "store"] {
        finds(&findings, "error", role, &[&format!("start `thalweg {role}`")]);
    }
}

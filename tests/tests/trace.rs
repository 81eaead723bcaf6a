//! `thalweg trace`, against real processes.

use std::{collections::BTreeMap, process::Stdio};

use futures::StreamExt as _;
use serde_json::Value;
use thalweg_broker::Queues as _;
use thalweg_protocol::{FunctionSpec, JobKey, Kind, ResultHeader, TraceId, frame, subjects};
use thalweg_sdk::{Client, Worker};
use thalweg_tests::{cluster::Cluster, command::Thalweg, connect, eventually, training};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpListener,
};

fn key(job: &str) -> JobKey {
    JobKey { tenant: "default".parse().expect("a name"), job: job.parse().expect("a name") }
}

/// A cluster with an invoker and a job of two workers.
async fn two_workers(job: &str) -> (Cluster, Vec<Worker>) {
    let cluster = Cluster::start(&[]);
    cluster.invoker("i1", "");
    let client = Client::connect(cluster.url()).await.expect("a client");
    let job = training::job(job, FunctionSpec::named("sgd").number("lr", 0.1), 2);
    let workers = training::join_all(&client, &job, 2).await;
    (cluster, workers)
}

async fn all_round(workers: &mut [Worker]) {
    let rounds = futures::future::try_join_all(workers.iter_mut().map(training::round)).await;
    rounds.expect("a round of all");
}

/// How many spans of each stage there are.
fn stages(trace: &Value) -> BTreeMap<&str, usize> {
    let mut stages = BTreeMap::new();
    for span in trace["spans"].as_array().expect("spans") {
        *stages.entry(span["stage"].as_str().expect("a stage")).or_default() += 1;
    }
    stages
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_component_tells_its_part_of_a_round_and_the_straggler_is_named() {
    let (cluster, mut workers) = two_workers("traced").await;
    let thalweg = Thalweg::at(cluster.url());
    thalweg.fails(&["trace", "traced"], 3, "not_found", &["no round of default/traced is complete yet"]);
    all_round(&mut workers).await;
    // Rank 0 is late: it begins when all of rank 1's contributions are in the queues.
    let connection = connect(cluster.url()).await;
    let (first, second) = workers.split_at_mut(1);
    let early = training::round(&mut second[0]);
    let late = async {
        eventually("rank 1 to have pushed", async || {
            let depths = connection.jetstream.depths(32).await.expect("depths");
            depths.iter().map(|depth| depth.messages).sum::<u64>() == training::SHARDS as u64
        })
        .await;
        training::round(&mut first[0]).await
    };
    let (early, late) = tokio::join!(early, late);
    assert_eq!((early.expect("a round").0.round, late.expect("a round").0.round), (2, 2));
    // The last spans are of what happened after the results: the answers to them.
    let shards = training::SHARDS;
    let expected = BTreeMap::from([
        ("round", 2),
        ("push", 2 * shards),
        ("wait", 2 * shards),
        ("gather", shards),
        ("queue", shards),
        ("fold", shards),
        ("commit", shards),
        ("write", shards),
        ("flush", shards),
        ("publish", shards),
    ]);
    let mut trace = Value::Null;
    eventually("all to tell", async || {
        trace = thalweg.json(&["trace", "traced", "2"]);
        // A result may overtake the broker's word that a contribution is stored: that is no wait then.
        let mut told = stages(&trace);
        let waits = told.insert("wait", 2 * shards).unwrap_or(0);
        told == expected && waits > 0
    })
    .await;
    assert_eq!(trace["components"], serde_json::json!({"invoker": 1, "store": 1, "worker": 2}));
    let incarnation = Client::connect(cluster.url()).await.expect("a client");
    let incarnation = incarnation.job(&key("traced")).await.expect("the job").0.incarnation;
    assert_eq!(trace["trace_id"], TraceId::new(incarnation, 2).to_string());
    let spans = trace["spans"].as_array().expect("spans");
    for gather in spans.iter().filter(|span| span["stage"] == "gather") {
        assert_eq!(gather["rank"], 0, "rank 0 came last: {gather}");
    }
    // The steps are the way of one shard, to its end.
    let path = trace["path"].as_array().expect("a path");
    let sum: f64 = path.iter().map(|step| step["seconds"].as_f64().expect("a time")).sum();
    let whole = trace["seconds"].as_f64().expect("a time");
    assert!(sum > 0.0 && sum <= whole + 1e-6, "{sum} of {whole}");
    assert_eq!((&path[0]["step"], &path[0]["rank"]), (&"before the push".into(), &0.into()));
    assert_eq!(trace["ranks"][0]["rank"], 0, "the latest first");
    // Without a number it is the newest that is complete, and people can read it.
    let text = thalweg.text(&["trace", "traced"]);
    for word in
        ["round 2 of default/traced", "1 invoker, 1 store, 2 workers", "before the push of rank 0", "publish"]
    {
        assert!(text.contains(word), "{word:?}: {text}");
    }
    let forgotten = ["nobody remembers round 77", "the newest complete round is 2"];
    thalweg.fails(&["trace", "traced", "77"], 3, "not_found", &forgotten);
    thalweg.fails(&["trace", "nowhere"], 3, "unknown_job", &["nowhere"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contributions_and_results_name_the_trace_and_their_span() {
    let (cluster, mut workers) = two_workers("headers").await;
    let connection = connect(cluster.url()).await;
    let results = subjects::result(&key("headers"));
    let mut results = connection.client.subscribe(results).await.expect("results");
    let mut pushes = connection.client.subscribe("thalweg.grad.>").await.expect("contributions");
    connection.client.flush().await.expect("subscribed");
    all_round(&mut workers).await;
    let parent = |message: &async_nats::Message| {
        let headers = message.headers.as_ref().expect("headers");
        headers.get("traceparent").expect("a traceparent").as_str().to_owned()
    };
    let mut seen = Vec::new();
    for _ in 0..training::SHARDS {
        let message = results.next().await.expect("a result");
        let (header, _) = frame::open::<ResultHeader>(Kind::Result, &message.payload).expect("a frame");
        let trace = TraceId::new(header.job, 1);
        let span = trace.span(thalweg_protocol::Stage::Publish, header.shard, 0);
        assert_eq!(parent(&message), format!("00-{trace}-{span}-01"));
        seen.push(trace.to_string());
    }
    for _ in 0..2 * training::SHARDS {
        let message = pushes.next().await.expect("a contribution");
        assert_eq!(parent(&message).split('-').nth(1), Some(seen[0].as_str()));
    }
}

/// Takes one request as a collector would; its path and its body.
async fn collect(listener: &TcpListener) -> (String, Value) {
    let (socket, _) = listener.accept().await.expect("a request");
    let mut socket = BufReader::new(socket);
    let mut first = String::new();
    socket.read_line(&mut first).await.expect("a request line");
    let mut length = 0;
    loop {
        let mut line = String::new();
        socket.read_line(&mut line).await.expect("a header");
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body).await.expect("a body");
    let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
    socket.get_mut().write_all(answer).await.expect("answered");
    let path = first.split(' ').nth(1).expect("a path").to_owned();
    (path, serde_json::from_slice(&body).expect("JSON"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rounds_are_followed_and_sent_to_a_collector() {
    let (cluster, mut workers) = two_workers("followed").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    let thalweg = Thalweg::at(cluster.url());
    all_round(&mut workers).await;
    let follower = thalweg.command(&["trace", "followed", "--follow", "--otlp", &address, "--json"]);
    let mut follower = tokio::process::Command::from(follower);
    let mut follower = follower.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("it runs");
    let mut lines = BufReader::new(follower.stdout.take().expect("its output")).lines();
    // It begins with what is complete when it has looked for the first time; nobody knows when that is.
    let train = async {
        loop {
            all_round(&mut workers).await;
        }
    };
    let (path, body) = tokio::select! {
        request = collect(&listener) => request,
        () = train => unreachable!(),
    };
    assert_eq!(path, "/v1/traces");
    let line = lines.next_line().await.expect("its output").expect("a line");
    let line: Value = serde_json::from_str(&line).expect("JSON");
    let resources = body["resourceSpans"].as_array().expect("resources");
    let names: Vec<_> = resources
        .iter()
        .map(|resource| &resource["resource"]["attributes"][1]["value"]["stringValue"])
        .collect();
    for component in ["thalweg-worker", "thalweg-invoker", "thalweg-store"] {
        assert!(names.iter().any(|name| *name == component), "{names:?}");
    }
    for resource in resources {
        for span in resource["scopeSpans"][0]["spans"].as_array().expect("spans") {
            assert_eq!(span["traceId"], line["trace_id"]);
        }
    }
    drop(listener);
    // Where no collector is, that is said, with its address.
    let args = ["trace", "followed", "--otlp", &address];
    thalweg.fails(&args, 1, "failed", &["no collector takes spans at", &address]);
    follower.kill().await.expect("ended");
}

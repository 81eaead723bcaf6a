//! What goes on for long: snapshots and events.

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::{Value, json};
use thalweg_protocol::{FunctionSpec, JobKey};
use thalweg_sdk::RestoreOptions;
use thalweg_tests::{
    PATIENCE, eventually,
    training::{self, full_book},
};

use super::{Http, read, spec, start};

fn key(job: &str) -> JobKey {
    JobKey { tenant: "default".parse().expect("a name"), job: job.parse().expect("a name") }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_a_file_from_which_a_job_goes_on_with_the_same_bits() {
    let (service, http) = start().await;
    let adam = FunctionSpec::named("adam").number("lr", 0.01);
    let join = async |name: &str| {
        let job = training::job(name, adam.clone(), 2);
        let joins = (0..2).map(|rank| training::join(&service.client, &job, rank));
        futures::future::try_join_all(joins).await.expect("all joined")
    };
    let mut workers = join("taken").await;
    for _ in 0..3 {
        let rounds = workers.iter_mut().map(training::round);
        futures::future::try_join_all(rounds).await.expect("a round of all");
    }
    let taken = http.get("/v1/jobs/default/taken/snapshot").await;
    assert_eq!(taken.status, 200);
    assert_eq!(taken.header("content-type"), "application/octet-stream");
    assert_eq!(taken.header("content-length"), taken.body.len().to_string());
    let name = "attachment; filename=\"default-taken-v3.safetensors\"";
    assert_eq!(taken.header("content-disposition"), name);
    let small = http.get("/v1/jobs/default/taken/snapshot?slots=false").await;
    let less = taken.body.len() - small.body.len();
    assert!(less >= 2 * 4 * training::ELEMENTS, "{less} bytes less without two slots");

    let folder = tempfile::tempdir().expect("a folder");
    for (name, bytes) in [("again", &taken.body), ("parameters", &small.body)] {
        let file = folder.path().join(name);
        std::fs::write(&file, bytes).expect("written");
        let options = RestoreOptions { key: Some(key(name)), ..RestoreOptions::default() };
        let record = service.client.restore(&file, options, |_, _| {}).await.expect("restored");
        assert_eq!(record.first_version(), 3);
        let mut workers = join(name).await;
        let parameters = workers[1].parameters().await.expect("parameters").concat();
        let expected = |rounds| training::replay(&adam, &full_book(2, rounds), rounds);
        training::assert_same_bits(&parameters, &expected(3), name);
        if name == "again" {
            // The slots too: the next round is that of a job that was never interrupted.
            let rounds = futures::future::try_join_all(workers.iter_mut().map(training::round)).await;
            let (round, flat) = rounds.expect("a round of all").swap_remove(0);
            assert_eq!(round.round, 4);
            training::assert_same_bits(&flat, &expected(4), "after the snapshot");
        }
    }
    service.stop().await;
}

/// Begins to read a snapshot and stops behind its beginning. The file is larger than what fits into sockets.
async fn stalled(http: &Http, path: &str) -> Response {
    let mut response = http.request(&Method::GET, path).send().await.expect("an answer");
    assert_eq!(response.status(), 200);
    response.chunk().await.expect("read").expect("the beginning");
    response
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_lets_go_of_its_snapshot() {
    let (service, http) = start().await;
    http.post("/v1/jobs", &spec("t", "large", 4 << 20)).await.ok(201);
    let path = "/v1/jobs/t/large/snapshot";
    let mut open = Vec::new();
    for _ in 0..thalweg_protocol::limits::MAX_HOLDS {
        open.push(stalled(&http, path).await);
    }
    http.get(path).await.problem(422, "limit");
    open.pop();
    let mut last = None;
    eventually("the hold to be released", async || {
        let response = http.request(&Method::GET, path).send().await.expect("an answer");
        let ready = response.status() == 200;
        last = ready.then_some(response);
        ready
    })
    .await;
    // One that is read to its end lets go too.
    open.pop();
    let whole = last.expect("an answer").bytes().await.expect("all of it");
    assert!(whole.len() > 2 * 4 * (4 << 20), "{} bytes", whole.len());
    assert!(whole[whole.len() - 8..].iter().all(|byte| *byte == 0));
    drop(open);
    let mut all = Vec::new();
    eventually("all holds to be released", async || {
        all.clear();
        for _ in 0..thalweg_protocol::limits::MAX_HOLDS {
            let response = http.request(&Method::GET, path).send().await.expect("an answer");
            if response.status() != 200 {
                return false;
            }
            all.push(response);
        }
        true
    })
    .await;
    // The end of the service is the end of what it sends.
    service.stop().await;
    let rest = tokio::time::timeout(PATIENCE, all.remove(0).bytes()).await.expect("no waiting");
    assert!(rest.is_err(), "a snapshot that breaks off must not look like a whole one");
}

/// An event as it was sent: id and data.
type Sent = (u64, Value);

fn parse(text: &str) -> Vec<Sent> {
    let field = |block: &str, name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.trim_start().to_owned())
    };
    let event = |block: &str| {
        let data = field(block, "data")?;
        let id = field(block, "id").expect("an id").parse().expect("a number");
        Some((id, serde_json::from_str(&data).expect("JSON")))
    };
    text.split("\n\n").filter_map(event).collect()
}

async fn events(http: &Http, path: &str, last_seen: Option<u64>) -> Vec<Sent> {
    let mut request = http.request(&Method::GET, path);
    if let Some(id) = last_seen {
        request = request.header("last-event-id", id);
    }
    let answer = read(request).await;
    assert_eq!((answer.status.as_u16(), answer.header("content-type")), (200, "text/event-stream"));
    parse(&String::from_utf8(answer.body).expect("text"))
}

/// Reads a followed stream until it has told of `wanted`.
async fn until(response: &mut Response, seen: &mut String, wanted: &str) {
    let read = async {
        while !parse(seen).iter().any(|(_, event)| event["event"] == wanted) {
            let chunk = response.chunk().await.expect("read").expect("no end");
            seen.push_str(&String::from_utf8_lossy(&chunk));
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap_or_else(|_| panic!("no {wanted:?} in {seen}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_told_followed_and_resumed() {
    let (service, http) = start().await;
    let path = "/v1/jobs/t/told/events";
    assert_eq!(events(&http, path, None).await, [], "nothing has happened");
    let follow = http.request(&Method::GET, &format!("{path}?follow=true"));
    let mut follow = follow.send().await.expect("an answer");
    let mut seen = String::new();
    http.post("/v1/jobs", &spec("t", "told", 8)).await.ok(201);
    until(&mut follow, &mut seen, "created").await;
    http.post("/v1/jobs/t/told/pause", &json!({ "reason": "night" })).await.ok(200);
    until(&mut follow, &mut seen, "paused").await;
    http.post("/v1/jobs", &spec("t", "other", 8)).await.ok(201);
    read(http.request(&Method::POST, "/v1/jobs/t/told/resume")).await.ok(200);
    until(&mut follow, &mut seen, "resumed").await;
    let followed = parse(&seen);

    let told = events(&http, path, None).await;
    assert_eq!(told, followed, "the same, followed or looked up");
    assert!(told.is_sorted_by(|a, b| a.0 < b.0), "{told:?}");
    for seen in 0..told.len() {
        // Also with the `last` of an address that a browser asks for again.
        for path in [path, &format!("{path}?last=1")] {
            let rest = events(&http, path, Some(told[seen].0)).await;
            assert_eq!(rest, told[seen + 1..], "behind event {}", told[seen].0);
        }
    }
    assert_eq!(events(&http, &format!("{path}?last=2"), None).await, told[told.len() - 2..]);
    eventually("both jobs in the events of all", async || {
        let all = events(&http, "/v1/events", None).await;
        let jobs: Vec<_> = all.iter().map(|(_, event)| &event["job"]).collect();
        jobs.contains(&&json!("told")) && jobs.contains(&&json!("other"))
    })
    .await;
    let wrong = http.request(&Method::GET, path).header("last-event-id", "x");
    read(wrong).await.problem(400, "malformed");

    // A stream that goes on for ever ends with the service.
    service.stop().await;
    let end = async { while follow.chunk().await.is_ok_and(|chunk| chunk.is_some()) {} };
    tokio::time::timeout(Duration::from_secs(5), end).await.expect("the stream has ended");
}

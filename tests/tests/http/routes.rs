//! Every route that answers at once, and every kind of problem.

use reqwest::Method;
use serde_json::{Value, json};
use thalweg_tests::{connect, embedded::Embedded, eventually};

use super::{Http, read, spec, start, with_json};

const REQUESTS: &str = "thalweg_gateway_http_requests_total";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_lives_its_life_over_http() {
    let (service, http) = start().await;
    assert_eq!(http.get("/healthz").await.body, b"ok");
    let route = r#"route="/v1/jobs",status="201""#;
    let before = Embedded::metric(REQUESTS, route);
    let created = http.post("/v1/jobs", &spec("t", "life", 640)).await;
    assert_eq!(created.header("location"), "/v1/jobs/t/life");
    let job = created.ok(201);
    assert_eq!((&job["state"], &job["slots"], &job["elements"]), (&json!("running"), &json!(1), &json!(640)));
    assert_eq!(Embedded::metric(REQUESTS, route), before + 1.0);
    assert_eq!(http.post("/v1/jobs", &spec("t", "life", 640)).await.ok(200), job, "the same again");
    http.post("/v1/jobs", &spec("t", "life", 641)).await.problem(409, "spec_mismatch");
    http.post("/v1/jobs", &spec("t", "empty", 0)).await.problem(422, "invalid_spec");

    assert_eq!(http.get("/v1/jobs/t/life").await.ok(200), job);
    assert_eq!(http.get("/v1/jobs/t/life/members").await.ok(200), job["roster"]);
    assert_eq!(http.get("/v1/jobs/t/life/progress").await.ok(200), json!({ "min": 0, "max": 0 }));

    let night = json!({ "reason": "night" });
    let paused = http.post("/v1/jobs/t/life/pause", &night).await.ok(200);
    assert_eq!((&paused["state"], &paused["paused"]), (&json!("paused"), &json!("night")));
    let resumed = read(http.request(&Method::POST, "/v1/jobs/t/life/resume")).await.ok(200);
    assert_eq!((&resumed["state"], &resumed["paused"]), (&json!("running"), &Value::Null));
    let long = json!({ "reason": "x".repeat(513) });
    http.post("/v1/jobs/t/life/pause", &long).await.problem(422, "limit");

    let changed = json!({ "settings": { "lr": 0.01 } });
    let changed = http.post("/v1/jobs/t/life/settings", &changed).await.ok(200);
    assert_eq!((&changed["revision"], &changed["from_round"]), (&json!(1), &json!(1)));
    assert_eq!(changed["function"]["settings"], json!({ "lr": 0.01, "momentum": 0.9 }));
    let known = http.get("/v1/jobs/t/life/settings").await.ok(200);
    assert_eq!(known["revisions"].as_array().and_then(|known| known.last()), Some(&changed));
    let refused = json!({ "settings": { "lr": -1 } });
    let refused = http.post("/v1/jobs/t/life/settings", &refused).await.problem(422, "invalid_spec");
    assert!(refused["detail"].to_string().contains("out of range"), "{refused}");

    let over = http.post("/v1/jobs/t/life/abort", &json!({ "reason": "wrong data" })).await.ok(200);
    assert_eq!((&over["state"], &over["error"]["code"]), (&json!("aborted"), &json!("aborted")));
    http.post("/v1/jobs/t/life/pause", &night).await.problem(409, "aborted");
    http.delete("/v1/jobs/t/life").await.ok(204);
    http.get("/v1/jobs/t/life").await.problem(404, "unknown_job");
    http.delete("/v1/jobs/t/life").await.problem(404, "unknown_job");
    service.stop().await;
}

/// Follows `next` through all pages, each of at most two entries; the number of pages and the entries.
async fn pages(http: &Http, path: &str, list: &str) -> (usize, Vec<Value>) {
    let (mut count, mut all, mut after) = (0, Vec::new(), String::new());
    loop {
        let page = http.get(&format!("{path}limit=2{after}")).await.ok(200);
        let entries = page[list].as_array().expect("a list").clone();
        assert!(entries.len() <= 2, "{page}");
        count += 1;
        all.extend(entries);
        match &page["next"] {
            Value::Null => return (count, all),
            Value::String(next) => after = format!("&after={next}"),
            next => after = format!("&after={next}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_come_in_pages() {
    let (service, http) = start().await;
    for (tenant, job) in [("b", "2"), ("b", "1"), ("a", "x"), ("b", "3"), ("c", "y")] {
        http.post("/v1/jobs", &spec(tenant, job, 8)).await.ok(201);
    }
    let names = |jobs: &[Value]| -> Vec<String> {
        let name = |job: &Value| format!("{}{}", job["tenant"], job["job"]).replace('"', "");
        jobs.iter().map(name).collect()
    };
    let (count, jobs) = pages(&http, "/v1/jobs?", "jobs").await;
    assert_eq!((count, names(&jobs)), (3, ["ax", "b1", "b2", "b3", "cy"].map(str::to_owned).into()));
    let (count, jobs) = pages(&http, "/v1/jobs?tenant=b&", "jobs").await;
    assert_eq!((count, names(&jobs)), (2, ["b1", "b2", "b3"].map(str::to_owned).into()));
    for wrong in ["limit=0", "limit=1001"] {
        http.get(&format!("/v1/jobs?{wrong}")).await.problem(422, "limit");
        http.get(&format!("/v1/deadletters?{wrong}")).await.problem(422, "limit");
    }
    for wrong in ["limit=x", "after=x", "tenant=X"] {
        http.get(&format!("/v1/jobs?{wrong}")).await.problem(400, "malformed");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_looked_at_put_back_and_removed() {
    let (service, http) = start().await;
    let nats = connect(service.service().url()).await;
    // What no SDK would send: an invoker puts it aside.
    let subject = "thalweg.grad.0.t.letters.0";
    nats.client.publish(subject, "rubbish".into()).await.expect("sent");
    let list = "/v1/deadletters?tenant=t&job=letters&";
    let letter = async || {
        let (_, letters) = pages(&http, list, "letters").await;
        letters.into_iter().next()
    };
    eventually("a dead letter", async || letter().await.is_some()).await;
    let first = letter().await.expect("a letter");
    assert_eq!((&first["subject"], &first["frame_bytes"]), (&json!(subject), &json!(7)));
    let path = format!("/v1/deadletters/{}", first["sequence"]);
    let mut full = http.get(&path).await.ok(200);
    assert_eq!(full["frame"], "cnViYmlzaA==");
    full.as_object_mut().expect("an object").remove("frame");
    assert_eq!(full, first, "the list shows the same but for the frame");
    // Put back, it is judged anew, and put aside again.
    read(http.request(&Method::POST, &format!("{path}/requeue"))).await.ok(204);
    http.get(&path).await.problem(404, "expired");
    eventually("it to come back", async || letter().await.is_some()).await;
    let again = letter().await.expect("a letter");
    assert_ne!(again["sequence"], first["sequence"]);
    let path = format!("/v1/deadletters/{}", again["sequence"]);
    http.delete(&path).await.ok(204);
    http.delete(&path).await.problem(404, "expired");
    assert_eq!(letter().await, None);

    // Those of an older release do not say where they came from.
    let mut sequences = Vec::new();
    for _ in 0..5 {
        let sent = nats.jetstream.publish("thalweg.deadletter.t.old", "x".into()).await.expect("sent");
        sequences.push(sent.await.expect("stored").sequence);
    }
    let (count, letters) = pages(&http, "/v1/deadletters?", "letters").await;
    let listed: Vec<_> = letters.iter().filter_map(|letter| letter["sequence"].as_u64()).collect();
    assert_eq!((count, listed), (3, sequences.clone()));
    let requeue = format!("/v1/deadletters/{}/requeue", sequences[0]);
    read(http.request(&Method::POST, &requeue)).await.problem(410, "expired");
    http.get("/v1/deadletters?tenant=t").await.problem(400, "malformed");
    http.get("/v1/deadletters/0").await.problem(404, "expired");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn functions_are_described_as_jobs_may_use_them() {
    let (service, http) = start().await;
    let functions = http.get("/v1/functions").await.ok(200);
    let functions = functions["functions"].as_array().expect("a list");
    for function in functions {
        let name = function["name"].as_str().expect("a name");
        let mut wanted = spec("f", name, 8);
        wanted["function"] = json!({ "name": name, "settings": {} });
        for setting in function["settings"].as_array().expect("settings") {
            // What has to be given, and everything else at its default.
            let value = if setting["default"].is_null() { json!(0.5) } else { setting["default"].clone() };
            wanted["function"]["settings"][setting["name"].as_str().expect("a name")] = value;
        }
        let job = http.post("/v1/jobs", &wanted).await.ok(201);
        assert_eq!(job["slots"], function["slots"], "{function}");
    }
    let sgd = functions.iter().find(|function| function["name"] == "sgd").expect("sgd");
    assert_eq!(
        (&sgd["slots"], &sgd["most_slots"], &sgd["kind"]),
        (&json!(0), &json!(1), &json!("optimizer"))
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_goes_wrong_is_a_problem() {
    let (service, http) = start().await;
    http.get("/v2/jobs").await.problem(404, "malformed");
    http.get("/v1/jobs/nobody/nothing").await.problem(404, "unknown_job");
    http.get("/v1/jobs/No/Such").await.problem(400, "malformed");
    let refused = read(http.request(&Method::PUT, "/v1/jobs")).await;
    assert_eq!(refused.header("allow"), "GET,HEAD,POST");
    refused.problem(405, "malformed");
    let post = |body: Vec<u8>| read(with_json(http.request(&Method::POST, "/v1/jobs"), body));
    post(b"{".to_vec()).await.problem(400, "malformed");
    let missing = post(b"{}".to_vec()).await.problem(422, "malformed");
    assert!(missing["detail"].to_string().contains("missing field"), "{missing}");
    post(vec![b' '; (8 << 20) + 1]).await.problem(413, "limit");
    read(http.request(&Method::POST, "/v1/jobs").body("{}")).await.problem(415, "malformed");
    let long = json!({ "reason": "night", "raeson": "day" });
    http.post("/v1/jobs/nobody/nothing/pause", &long).await.problem(422, "malformed");

    let with = |id: &'static str| read(http.request(&Method::GET, "/v2").header("x-request-id", id));
    assert_eq!(with("mine-1").await.problem(404, "malformed")["request_id"], "mine-1");
    let made = with("not mine").await.problem(404, "malformed");
    assert_eq!(made["request_id"].as_str().map(str::len), Some(32), "{made}");
    let fine = read(http.request(&Method::GET, "/healthz").header("x-request-id", "mine-2")).await;
    assert_eq!(fine.header("x-request-id"), "mine-2");
    service.stop().await;
}

//! The commands for people and their scripts: text, JSON, exit codes, and errors that say what to do.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use bytes::Bytes;
use serde_json::{Value, json};
use thalweg_protocol::{FunctionSpec, JobState, Kind, frame, job_key, subjects};
use thalweg_sdk::JobKey;
use thalweg_tests::{PATIENCE, command::Thalweg, connect, embedded::Embedded, eventually, training};

fn key(job: &str) -> JobKey {
    JobKey { tenant: "default".parse().expect("a name"), job: job.parse().expect("a name") }
}

fn sgd() -> FunctionSpec {
    FunctionSpec::named("sgd").number("lr", 0.1).number("momentum", 0.9)
}

fn interrupt(child: &Child) {
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(killed.success());
}

/// Waits without a bound of its own that could hang a test.
async fn ended(mut child: Child) -> std::process::ExitStatus {
    let mut status = None;
    eventually("the command to end", async || {
        status = child.try_wait().expect("a child");
        status.is_some()
    })
    .await;
    status.expect("a status")
}

fn partials(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_are_created_listed_shown_and_removed() {
    let service = Embedded::start(|_| {}).await;
    let thalweg = Thalweg::at(service.service().url());
    let folder = tempfile::tempdir().expect("a directory");
    let file = |name: &str| folder.path().join(name).display().to_string();

    // An empty service helps.
    assert!(thalweg.text(&["job", "ls"]).contains("thalweg job create"));
    assert_eq!(thalweg.json(&["job", "ls"]), json!({ "jobs": [] }));
    let status = thalweg.text(&["status"]);
    for line in
        ["gateway     runs", "autoscaler  runs", "store       ", "jobs        none", "thalweg job create"]
    {
        assert!(status.contains(line), "{line}: {status}");
    }

    let create = ["job", "create", "digits", "--tensor", "w:64x10", "--tensor", "b:10", "--workers", "2"];
    assert_eq!(thalweg.text(&create), "job default/digits is there: running\n");
    let made = thalweg.json(&create);
    assert_eq!(
        (&made["job"], &made["state"]),
        (&json!("default/digits"), &json!("running")),
        "alike: no error"
    );
    assert_eq!(made["spec"]["tensors"][0], json!({ "name": "w", "shape": [64, 10], "dtype": "f32" }));
    let other = ["job", "create", "digits", "--tensor", "w:64x10", "--tensor", "b:10", "--workers", "3"];
    thalweg.fails(&other, 4, "spec_mismatch", &["number of workers", "another name", "delete it"]);
    thalweg.fails(&["job", "create", "none"], 2, "usage", &["--tensor NAME:SHAPE", "--from"]);
    thalweg.fails(&["job", "create", "No!", "--tensor", "w:1"], 2, "usage", &["a-z"]);
    thalweg.fails(&["job", "create", "odd", "--tensor", "w"], 2, "usage", &["NAME:DIMxDIM"]);
    thalweg.fails(&["job", "create", "odd", "--tensor", "w:1", "--quorum", "1"], 2, "usage", &["--deadline"]);
    let median = ["job", "create", "odd", "--tensor", "w:1", "--function", "median"];
    thalweg.fails(&median, 4, "invalid_spec", &["median", "sgd"]);
    let nobody = ["job", "create", "odd", "--tensor", "w:1", "--workers", "0"];
    thalweg.fails(&nobody, 4, "invalid_spec", &["workers"]);

    // What is shown can be created from.
    let shown = thalweg.json(&["job", "show", "digits"]);
    assert_eq!(shown["progress"], json!({ "min": 0, "max": 0 }));
    assert_eq!((&shown["elements"], &shown["members"]), (&json!(650), &json!([])));
    std::fs::write(file("digits.json"), shown.to_string()).expect("written");
    let spec = file("digits.json");
    assert_eq!(thalweg.json(&["job", "create", "team/again", "--spec", &spec])["elements"], 650);
    let both = ["job", "create", "more", "--spec", &spec, "--workers", "2"];
    thalweg.fails(&both, 2, "usage", &["--spec"]);
    thalweg.fails(&["job", "create", "more", "--spec", "/no/such.json"], 3, "not_found", &["/no/such.json"]);
    std::fs::write(file("wrong.json"), "[]").expect("written");
    let wrong = file("wrong.json");
    thalweg.fails(&["job", "create", "more", "--spec", &wrong], 1, "failed", &["no job specification"]);
    let sheet = thalweg.text(&["job", "show", "digits"]);
    for line in
        ["state        running", "function     mean", "workers      0 of 2", "round        0", "2 tensors"]
    {
        assert!(sheet.contains(line), "{line}: {sheet}");
    }

    let list = thalweg.text(&["job", "ls"]);
    let lines: Vec<Vec<_>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["JOB", "STATE", "FUNCTION", "WORKERS", "MODEL", "DURABILITY"]);
    assert_eq!(lines[1], ["default/digits", "running", "mean", "0/2", "2.54", "KiB", "process"]);
    assert_eq!(lines.len(), 3, "{list}");
    let list = thalweg.json(&["job", "ls", "--tenant", "team"]);
    assert_eq!(list["jobs"][0]["key"], json!({ "tenant": "team", "job": "again" }));
    assert_eq!(thalweg.json(&["status"])["jobs"], json!({ "running": 2 }));

    assert_eq!(thalweg.text(&["job", "rm", "team/again"]), "job team/again is gone\n");
    assert_eq!(thalweg.json(&["job", "rm", "digits"]), json!({ "job": "default/digits", "removed": true }));
    let file = file("any.safetensors");
    for args in [
        &["job", "show", "digits"][..],
        &["job", "rm", "digits"],
        &["job", "pause", "digits"],
        &["job", "resume", "digits"],
        &["job", "abort", "digits"],
        &["job", "set", "digits", "lr=1"],
        &["job", "snapshot", "digits", &file],
    ] {
        let code = if ["show", "rm"].contains(&args[1]) { "not_found" } else { "unknown_job" };
        thalweg.fails(args, 3, code, &["no job default/digits", "check tenant and name"]);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_steered_while_workers_train() {
    let service = Embedded::start(|_| {}).await;
    let thalweg = Thalweg::at(service.service().url());
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("steered.safetensors");
    let file = path.to_str().expect("a path");
    let job = training::job("steered", sgd(), 1);
    let mut workers = training::join_all(&service.client, &job, 1).await;
    training::round(&mut workers[0]).await.expect("a round");

    assert_eq!(
        thalweg.text(&["job", "pause", "steered", "--reason", "lunch"]),
        "job default/steered is paused\n"
    );
    assert_eq!(thalweg.json(&["job", "pause", "steered", "--reason", "lunch"])["done"], true, "repeated");
    assert!(thalweg.text(&["job", "show", "steered"]).contains("paused       lunch"));
    assert_eq!(thalweg.json(&["job", "ls"])["jobs"][0]["state"], "paused");
    assert_eq!(thalweg.text(&["job", "resume", "steered"]), "job default/steered goes on\n");
    assert_eq!(thalweg.json(&["job", "resume", "steered"])["done"], true, "repeated");
    training::round(&mut workers[0]).await.expect("a round");

    let set = thalweg.text(&["job", "set", "steered", "lr=0.01"]);
    assert!(set.starts_with("job default/steered: settings revision 1 from round "), "{set}");
    assert_eq!(thalweg.json(&["job", "set", "steered", "lr=0.02", "--from-round", "100"])["from_round"], 100);
    let sheet = thalweg.text(&["job", "show", "steered"]);
    assert!(sheet.contains("sgd lr=0.02 momentum=0.9 (revision 2, from round 100 on)"), "{sheet}");
    assert!(sheet.contains("workers      1 of 1") && sheet.contains("RANK"), "{sheet}");
    thalweg.fails(&["job", "set", "steered"], 2, "usage", &["NAME=VALUE"]);
    thalweg.fails(&["job", "set", "steered", "lr=fast"], 2, "usage", &["a number, true or false"]);
    thalweg.fails(&["job", "set", "steered", "speed=1"], 4, "invalid_spec", &["speed"]);
    thalweg.fails(&["job", "set", "steered", "lr=-1"], 4, "invalid_spec", &["out of range"]);
    let late = ["job", "set", "steered", "lr=1", "--from-round", "1"];
    thalweg.fails(&late, 4, "invalid_spec", &["or later"]);

    let taken = thalweg.text(&["job", "snapshot", "steered", file]);
    assert!(taken.starts_with("default/steered after round 2: "), "{taken}");
    let taken = thalweg.json(&["job", "snapshot", "steered", file]);
    assert_eq!((&taken["version"], &taken["job"]), (&json!(2), &json!("default/steered")));
    assert_eq!(std::fs::metadata(&path).expect("the file").len(), taken["bytes"].as_u64().expect("a size"));
    let two: Vec<_> = (0..2)
        .map(|_| {
            thalweg
                .command(&["job", "snapshot", "steered", file])
                .stdout(Stdio::null())
                .spawn()
                .expect("it runs")
        })
        .collect();
    for child in two {
        assert!(ended(child).await.success(), "two into one file");
    }
    assert_eq!(partials(folder.path()), ["steered.safetensors"], "nothing half done is left");
    let away = ["job", "snapshot", "steered", "/no/such/folder/file"];
    thalweg.fails(&away, 3, "not_found", &["/no/such/folder/file"]);
    let onto = ["job", "snapshot", "steered", folder.path().to_str().expect("a path")];
    thalweg.fails(&onto, 1, "file", &["directory"]);

    thalweg.fails(&["job", "restore", file], 4, "spec_mismatch", &["exists", "--replace"]);
    thalweg.fails(&["job", "restore", "/no/such.safetensors"], 3, "not_found", &["/no/such.safetensors"]);
    let wrong = folder.path().join("wrong.safetensors");
    std::fs::write(&wrong, "nothing of that kind").expect("written");
    thalweg.fails(&["job", "restore", wrong.to_str().expect("a path")], 1, "file", &["no safetensors file"]);
    let restored = thalweg.text(&["job", "restore", file, "--as", "copy"]);
    assert_eq!(restored, "job default/copy goes on after round 2\n");
    assert_eq!(thalweg.json(&["job", "restore", file, "--as", "copy", "--replace"])["first_version"], 2);
    let from = ["job", "create", "seeded", "--from", file, "--function", "adam", "--set", "lr=0.001"];
    assert!(thalweg.text(&from).starts_with("job default/seeded begins with the parameters of "));

    thalweg.fails(&["job", "rm", "steered"], 4, "refused", &["1 worker in job", "--force"]);
    assert_eq!(
        thalweg.text(&["job", "abort", "steered", "--reason", "enough"]),
        "job default/steered is aborted\n"
    );
    let error = training::round(&mut workers[0]).await.expect_err("it is over");
    assert!(error.to_string().contains("enough"), "{error}");
    assert!(thalweg.text(&["job", "show", "steered"]).contains("enough"));
    thalweg.fails(&["job", "resume", "steered"], 4, "aborted", &["enough"]);
    assert_eq!(thalweg.text(&["job", "rm", "steered", "--force"]), "job default/steered is gone\n");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_half_made_is_shown_and_removed_without_waiting() {
    let service = Embedded::start(|_| {}).await;
    let thalweg = Thalweg::at(service.service().url());
    let registry = thalweg_broker::Registry::open(&connect(service.service().url()).await.jetstream).await;
    let registry = registry.expect("the registry");
    let _ = thalweg.text(&["job", "create", "half", "--tensor", "w:8"]);
    for state in [JobState::Creating, JobState::Deleting] {
        let name = job_key(&key("half"));
        let (record, revision) = registry.get::<thalweg_sdk::JobRecord>(&name).await.expect("the registry");
        let mut record = record.expect("a record");
        record.state = state.clone();
        registry.put(&name, &record, revision).await.expect("the registry").expect("nobody else writes");
        let begun = std::time::Instant::now();
        let sheet = thalweg.text(&["job", "show", "half"]);
        assert!(sheet.contains(state.name()) && sheet.contains("remove it again"), "{sheet}");
        assert_eq!(thalweg.json(&["job", "show", "half"])["state"], state.name());
        assert!(begun.elapsed() < PATIENCE / 3, "it waits");
    }
    assert_eq!(thalweg.text(&["job", "rm", "half"]), "job default/half is gone\n");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_snapshot_leaves_nothing() {
    let service = Embedded::start(|_| {}).await;
    let thalweg = Thalweg::at(service.service().url());
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("big.safetensors");
    let _ = thalweg.text(&["job", "create", "big", "--tensor", "w:16000000"]);
    let args = ["job", "snapshot", "big", file.to_str().expect("a path"), "--rate", "1", "--json"];
    let child = thalweg.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it runs");
    eventually("the file to be begun", async || !partials(folder.path()).is_empty()).await;
    assert!(partials(folder.path()).iter().all(|name| name.ends_with(".partial")), "none that looks whole");
    interrupt(&child);
    let output = child.wait_with_output().expect("an end");
    assert_eq!(output.status.code(), Some(1));
    let error: Value = serde_json::from_slice(&output.stderr).expect("JSON");
    assert!(error["error"]["message"].as_str().is_some_and(|text| text.contains("interrupted")), "{error}");
    assert!(partials(folder.path()).is_empty(), "{:?}", partials(folder.path()));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_listed_shown_put_back_and_removed() {
    let service = Embedded::start(|config| config.autoscaler.policy.min_invokers = 1).await;
    let thalweg = Thalweg::at(service.service().url());
    assert!(thalweg.text(&["deadletter", "ls"]).starts_with("no dead letters"));
    assert_eq!(thalweg.json(&["deadletter", "ls"]), json!({ "dead_letters": [], "more": false }));
    let job = training::job("victim", FunctionSpec::named("mean"), 1);
    let mut workers = training::join_all(&service.client, &job, 1).await;
    let record = workers[0].job().clone();
    let connection = connect(service.service().url()).await;
    let subject = subjects::gradient(record.partition(0), &record.spec.key, 0);
    let send = async |frame: Bytes| {
        let stored = connection.jetstream.publish(subject.clone(), frame).await.expect("published");
        stored.await.expect("stored");
    };
    send(Bytes::from_static(b"hello")).await;
    // A frame of the right kind around something that is no contribution.
    send(frame::seal(Kind::Gradient, &"poison", &[1, 2, 3])).await;
    let count = async || service.client.dead_letters(None, 100).await.expect("dead letters").len();
    eventually("two dead letters", async || count().await == 2).await;

    let list = thalweg.text(&["deadletter", "ls", "--job", "victim"]);
    let lines: Vec<Vec<_>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NUMBER", "WHEN", "JOB", "CODE", "SIZE"]);
    assert_eq!(
        (lines[1][0], &lines[1][2..]),
        ("1", &["default/victim", "malformed", "5", "B"][..]),
        "{list}"
    );
    assert_eq!((lines[2][0], lines.len()), ("2", 3), "{list}");
    assert!(thalweg.text(&["deadletter", "ls", "--limit", "1"]).contains("--limit"), "there are more");
    assert_eq!(thalweg.json(&["deadletter", "ls", "--job", "other"])["dead_letters"], json!([]));
    let sheet = thalweg.text(&["deadletter", "show", "2"]);
    for word in ["default/victim", "malformed", &subject, "not readable"] {
        assert!(sheet.contains(word), "{word}: {sheet}");
    }
    let shown = thalweg.json(&["deadletter", "show", "1"]);
    assert_eq!((&shown["subject"], &shown["bytes"]), (&json!(subject), &json!(5)));
    for command in ["show", "requeue", "rm"] {
        thalweg.fails(
            &["deadletter", command, "99"],
            3,
            "not_found",
            &["no dead letter 99", "deadletter ls"],
        );
    }
    // Put back, it is judged anew, and is a dead letter again under another number.
    assert_eq!(thalweg.text(&["deadletter", "requeue", "1"]), "dead letter 1 is in its queue again\n");
    eventually("the second judgement", async || {
        let letters = service.client.dead_letters(None, 100).await.expect("dead letters");
        letters.iter().map(|letter| letter.sequence).eq([2, 3])
    })
    .await;
    thalweg.fails(&["deadletter", "rm", "2", "1"], 3, "not_found", &["no dead letter 1"]);
    assert_eq!(count().await, 2, "all of them or none");
    assert_eq!(thalweg.text(&["deadletter", "rm", "2", "3"]), "dead letters 2, 3 are gone\n");
    thalweg.fails(&["deadletter", "rm"], 2, "usage", &["NUMBER"]);
    assert_eq!(count().await, 0);
    training::round(&mut workers[0]).await.expect("the job goes on");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_told_followed_and_left() {
    let service = Embedded::start(|_| {}).await;
    let thalweg = Thalweg::at(service.service().url());
    let follow = |args: &[&str]| {
        let mut child = thalweg.command(args).stdout(Stdio::piped()).spawn().expect("it runs");
        let lines = BufReader::new(child.stdout.take().expect("its output"));
        (child, lines)
    };
    let next = |lines: &mut BufReader<std::process::ChildStdout>| {
        let mut line = String::new();
        lines.read_line(&mut line).expect("a line");
        line
    };
    let (child, mut lines) = follow(&["events", "--follow", "--job", "told", "--json"]);
    let (reader, mut head) = follow(&["events", "--follow"]);
    let _ = thalweg.text(&["job", "create", "told", "--tensor", "w:8"]);
    let first: Value = serde_json::from_str(&next(&mut lines)).expect("JSON");
    assert_eq!((&first["event"], &first["job"]), (&json!("created"), &json!("told")));
    assert!(next(&mut head).contains("default/told  created: mean, 1 worker, 8 elements"));
    // Whoever reads has seen enough, as `head -1` has.
    drop(head);
    let _ = thalweg.text(&["job", "pause", "told", "--reason", "why"]);
    while !next(&mut lines).contains("\"why\"") {}
    assert_eq!(ended(reader).await.code(), Some(0), "a closed pipe is no error");
    interrupt(&child);
    assert_eq!(ended(child).await.code(), Some(0));
    let past = thalweg.text(&["events", "--job", "told", "-n", "1"]);
    assert!(past.lines().count() == 1 && past.contains("Z  default/told  paused: why"), "{past}");
    assert_eq!(thalweg.text(&["events", "--job", "other"]), "");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nobody_answers_everybody_is_told_what_to_start() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let thalweg = Thalweg::at(&format!("nats://{}", closed.expect("a free port")));
    let commands =
        [&["job", "ls"][..], &["job", "create", "a", "--tensor", "w:1"], &["events"], &["deadletter", "ls"]];
    for args in commands.iter().chain(&[&["status"][..]]) {
        let args = [args, &["--timeout", "200ms"][..]].concat();
        thalweg.fails(&args, 5, "timed_out", &["200ms", "refused", "thalweg up", "--nats-url"]);
    }
    thalweg.fails(&["job", "ls", "--nats-url", "http://x"], 2, "usage", &["nats://HOST:PORT"]);
    thalweg.fails(&["job", "ls", "--timeout", "0"], 2, "usage", &["10s"]);
    thalweg.fails(&["status", "--credentials", "/no/such"], 3, "not_found", &["/no/such", "--credentials"]);
    // NATS, and nothing of Thalweg's. Looking makes nothing.
    let directory = tempfile::tempdir().expect("a directory");
    let options = thalweg::nats::Options {
        binary: thalweg_tests::nats_server(),
        port: 0,
        data_dir: directory.path().to_owned(),
        max_memory_bytes: 1 << 28,
        sync_always: false,
    };
    let server = thalweg::nats::Server::start(options).expect("nats-server starts");
    let thalweg = Thalweg::at(&server.url());
    for args in &commands[..2] {
        let args = [args, &["--timeout", "200ms"][..]].concat();
        thalweg.fails(&args, 5, "timed_out", &["no gateway runs", "thalweg gateway"]);
    }
    for args in [&commands[2..], &[&["status"][..], &["deadletter", "rm", "1"]]].concat() {
        thalweg.fails(args, 5, "unavailable", &["thalweg up", "gateway"]);
    }
    let bucket = connect(&server.url()).await.jetstream.get_key_value(subjects::REGISTRY_BUCKET).await;
    assert!(bucket.is_err(), "a registry was made");
}

#[test]
fn completions_and_man_pages_cover_every_command() {
    let thalweg = Thalweg::at("nats://127.0.0.1:1");
    let folder = tempfile::tempdir().expect("a directory");
    for shell in ["bash", "zsh", "fish"] {
        let script = thalweg.text(&["completions", shell]);
        assert!(script.contains("deadletter") && script.contains("snapshot"), "{shell}");
        let file = folder.path().join(shell);
        std::fs::write(&file, script).expect("written");
        match Command::new(shell).arg("-n").arg(&file).output() {
            Ok(output) => assert!(output.status.success(), "{shell}: {output:?}"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{shell} is not installed"),
        }
    }
    thalweg.fails(&["completions", "tcsh"], 2, "usage", &["bash", "zsh", "fish"]);
    // A reader that has seen enough, as `head` has.
    let mut child =
        thalweg.command(&["completions", "bash"]).stdout(Stdio::piped()).spawn().expect("it runs");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("an end").code(), Some(0), "a closed pipe is no error");

    let pages = folder.path().join("man");
    let _ = thalweg.text(&["man", pages.to_str().expect("a path")]);
    let commands = [
        "",
        "-up",
        "-gateway",
        "-store",
        "-invoker",
        "-autoscaler",
        "-status",
        "-events",
        "-completions",
        "-man",
        "-job",
        "-job-create",
        "-job-ls",
        "-job-show",
        "-job-pause",
        "-job-resume",
        "-job-abort",
        "-job-rm",
        "-job-set",
        "-job-snapshot",
        "-job-restore",
        "-deadletter",
        "-deadletter-ls",
        "-deadletter-show",
        "-deadletter-requeue",
        "-deadletter-rm",
    ];
    for command in commands {
        let page = std::fs::read_to_string(pages.join(format!("thalweg{command}.1")));
        assert!(page.unwrap_or_else(|error| panic!("{command}: {error}")).contains(".SH NAME"), "{command}");
    }
    assert!(!pages.join("thalweg-demo-worker.1").exists(), "only what users run");
}

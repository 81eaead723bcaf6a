//! Components of different releases: whoever meets another wire version says so, names both, and loses nothing.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use serde::{Serialize, de::DeserializeOwned};
use thalweg_broker::{Registry, RequestError, request};
use thalweg_protocol::{
    ApiReply, ApiRequest, ErrorCode, FunctionSpec, GradientHeader, InvokerBeat, InvokerState, JobKey, Kind,
    Reject, StateId, StoreReply, StoreRequest, WIRE_VERSION, WireError, WorkerRef, frame, job_key,
    roster_key, subjects,
};
use thalweg_sdk::{Client, Error, JoinOptions};
use thalweg_tests::{
    PATIENCE,
    cluster::{self, Cluster},
    command::Thalweg,
    connect,
    embedded::Embedded,
    eventually,
    training::{self, full_book},
};

const OTHERS: [u8; 2] = [WIRE_VERSION - 1, WIRE_VERSION + 1];

/// The same bytes in another wire version. Its place in the prelude never changes.
fn of_version(version: u8, frame: &[u8]) -> Bytes {
    let mut bytes = frame.to_vec();
    assert_eq!((bytes[0], bytes[1]), (0x94, WIRE_VERSION), "the prelude");
    bytes[1] = version;
    bytes.into()
}

fn key(job: &str) -> JobKey {
    JobKey { tenant: "default".parse().expect("a name"), job: job.parse().expect("a name") }
}

fn mean() -> FunctionSpec {
    FunctionSpec::named("mean")
}

/// Asserts that both versions are named, and a remedy.
fn names_both(text: &str, other: u8) {
    assert!(text.contains(&format!("wire version {other}")), "{text}");
    assert!(text.contains(&format!("this component {WIRE_VERSION}")), "{text}");
    assert!(text.contains("the same release"), "{text}");
}

fn is_skew(error: &WireError, other: u8) {
    assert_eq!(error.code, ErrorCode::WireVersion, "{error}");
    names_both(&error.message, other);
}

fn sdk_says(error: &Error, other: u8) {
    assert_eq!(error.code(), Some(ErrorCode::WireVersion), "{error}");
    names_both(&error.to_string(), other);
}

/// Sends a request of another version and reads the answer, which is of this one.
async fn ask<Q: Serialize, A: DeserializeOwned>(
    client: &async_nats::Client,
    subject: &str,
    kinds: (Kind, Kind),
    query: &Q,
    version: u8,
) -> A {
    let frame = of_version(version, &frame::seal(kinds.0, query, &[]));
    let reply = client.request(subject.to_owned(), frame).await.expect("a reply");
    // What a release of that version makes of it: a prelude of the shape it knows, and a version to name.
    assert_eq!((reply.payload[0], reply.payload[1]), (0x94, WIRE_VERSION));
    frame::open(kinds.1, &reply.payload).expect("readable here").0
}

/// Writes a registry key anew in another version; returns what was there.
async fn rewrite(url: &str, key: &str, version: u8) -> Bytes {
    let bucket =
        connect(url).await.jetstream.get_key_value(subjects::REGISTRY_BUCKET).await.expect("a bucket");
    let value = bucket.get(key).await.expect("the registry").expect("a value");
    bucket.put(key, of_version(version, &value)).await.expect("written");
    value
}

async fn put_back(url: &str, key: &str, value: Bytes) {
    let bucket =
        connect(url).await.jetstream.get_key_value(subjects::REGISTRY_BUCKET).await.expect("a bucket");
    bucket.put(key, value).await.expect("written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_in_another_version_is_answered_and_told() {
    let service = Embedded::start(|config| config.autoscaler.policy.min_invokers = 1).await;
    let job = training::job("doors", mean(), 1);
    let mut worker = training::join(&service.client, &job, 0).await.expect("joined");
    training::round(&mut worker).await.expect("a round");
    let connection = connect(service.service().url()).await;
    let client = &connection.client;
    let record = worker.job().clone();
    let (_, roster) = service.client.job(&key("doors")).await.expect("the job");
    let life = roster.members[0].incarnation;
    let mut rejects = client.subscribe(subjects::reject(&key("doors"), 0)).await.expect("subscribed");
    client.flush().await.expect("flushed");
    for other in OTHERS {
        // The gateway.
        let kinds = (Kind::ApiRequest, Kind::ApiReply);
        let query = ApiRequest::GetJob(key("doors"));
        match ask(client, subjects::API, kinds, &query, other).await {
            ApiReply::Error(error) => is_skew(&error, other),
            reply => panic!("{reply:?}"),
        }
        // Its ear for heartbeats.
        let beat = ApiRequest::Beat {
            worker: WorkerRef { key: key("doors"), job: record.incarnation, rank: 0, incarnation: life },
            window_bytes: 1,
            active: false,
        };
        match ask(client, subjects::WORKER_BEAT, kinds, &beat, other).await {
            ApiReply::Error(error) => is_skew(&error, other),
            reply => panic!("{reply:?}"),
        }
        // The store.
        let kinds = (Kind::StoreRequest, Kind::StoreReply);
        let subject = subjects::store(record.store);
        match ask(client, &subject, kinds, &StoreRequest::Delete { job: record.incarnation }, other).await {
            StoreReply::Error(error) => is_skew(&error, other),
            reply => panic!("{reply:?}"),
        }
        // An invoker: told to the sender, and put aside whole.
        let header = GradientHeader {
            job: record.incarnation,
            shard: 0,
            round: 2,
            worker: life,
            rank: 0,
            roster_epoch: roster.epoch,
            base: StateId([0; 16]),
            weight: 1.0,
            void: false,
            elements: 256,
        };
        let contribution = of_version(other, &frame::seal(Kind::Gradient, &header, &[0; 1024]));
        let subject = subjects::gradient(record.partition(0), &key("doors"), 0);
        let stored = connection.jetstream.publish(subject.clone(), contribution.clone()).await.expect("sent");
        stored.await.expect("stored");
        let message =
            tokio::time::timeout(PATIENCE, rejects.next()).await.expect("in time").expect("a reject");
        is_skew(&frame::open::<Reject>(Kind::Reject, &message.payload).expect("readable").0.error, other);
        let mut letter = None;
        eventually("the dead letter", async || {
            let letters = service.client.dead_letters(Some(&key("doors")), 100).await.expect("dead letters");
            letter = letters.into_iter().find(|letter| letter.frame == contribution);
            letter.is_some()
        })
        .await;
        let letter = letter.expect("a dead letter");
        assert_eq!((letter.code.as_str(), letter.subject), ("wire_version", Some(subject)));
        names_both(&letter.reason, other);
    }
    // None of that has touched the job.
    let (_, flat) = training::round(&mut worker).await.expect("a round");
    training::assert_same_bits(&flat, &training::replay(&mean(), &full_book(1, 2), 2), "untouched");
    service.stop().await;
}

/// Answers every request on `subject` with `reply` in another version.
async fn impostor<A: Serialize>(url: &str, subject: String, kind: Kind, reply: &A, version: u8) {
    let client = connect(url).await.client;
    let mut requests = client.subscribe(subject).await.expect("subscribed");
    client.flush().await.expect("flushed");
    let frame = of_version(version, &frame::seal(kind, reply, &[]));
    tokio::spawn(async move {
        while let Some(message) = requests.next().await {
            if let Some(to) = message.reply {
                client.publish(to, frame.clone()).await.expect("published");
            }
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_sdk_that_is_answered_in_another_version_says_so_at_once() {
    for other in OTHERS {
        let directory = tempfile::tempdir().expect("a directory");
        let server = thalweg::nats::Server::start(thalweg::nats::Options {
            binary: thalweg_tests::nats_server(),
            port: 0,
            data_dir: directory.path().to_owned(),
            max_memory_bytes: 1 << 28,
            sync_always: false,
        })
        .expect("nats-server starts");
        let url = server.url();
        impostor(&url, subjects::API.to_owned(), Kind::ApiReply, &ApiReply::Done, other).await;
        let client = Client::connect(&url).await.expect("connected");
        let begun = std::time::Instant::now();
        sdk_says(&client.job(&key("any")).await.expect_err("another release"), other);
        let job = training::job("any", mean(), 1);
        let error = client.join_with(job, 0, JoinOptions::default()).await.expect_err("another release");
        sdk_says(&error, other);
        assert!(begun.elapsed() < Duration::from_secs(5), "no patience helps here");
        // The command line, in words and for programs.
        let run = |args: &[&str]| {
            let mut command = std::process::Command::new(cluster::binary());
            command.args(args).args(["--nats-url", &url]).output().expect("the binary runs")
        };
        let output = run(&["job", "ls"]);
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        names_both(&String::from_utf8_lossy(&output.stderr), other);
        let output = run(&["job", "ls", "--json"]);
        let error: serde_json::Value = serde_json::from_slice(&output.stderr).expect("JSON");
        assert_eq!(error["error"]["code"], "wire_version", "{error}");
        // A store: the client of the store says so too.
        let store = thalweg_protocol::StoreId::random();
        impostor(&url, subjects::store(store), Kind::StoreReply, &StoreReply::Done, other).await;
        let kinds = (Kind::StoreRequest, Kind::StoreReply);
        let nats = connect(&url).await.client;
        let query = StoreRequest::List;
        let asked =
            request::<_, StoreReply>(&nats, &subjects::store(store), kinds, &query, &[], PATIENCE).await;
        let error = asked.expect_err("another release");
        assert!(matches!(error, RequestError::Frame(..)), "{error}");
        is_skew(&error.to_wire(), other);
        use thalweg_store::ShardStore as _;
        let error = thalweg_store::StoreClient::new(nats, store).list().await.expect_err("another release");
        is_skew(&error.to_wire(), other);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_contributions_another_release_refuses_stops_and_says_so() {
    let service = Embedded::start(|_| {}).await;
    for (name, other) in ["newer", "older"].into_iter().zip(OTHERS) {
        let job = training::job(name, mean(), 2);
        let joins = [training::join(&service.client, &job, 0), training::join(&service.client, &job, 1)];
        let mut workers = futures::future::try_join_all(joins).await.expect("joined");
        // Rank 1 is silent; what rank 0 hears is what an invoker of that release would say.
        let reject =
            Reject { job: None, worker: None, at: None, error: WireError::new(ErrorCode::WireVersion, "no") };
        let frame = of_version(other, &frame::seal(Kind::Reject, &reject, &[]));
        let client = connect(service.service().url()).await.client;
        client.publish(subjects::reject(&key(name), 0), frame).await.expect("published");
        client.flush().await.expect("flushed");
        sdk_says(&training::round(&mut workers[0]).await.expect_err("another release"), other);
        // A result that cannot be read is fetched from the store instead.
        let frame = of_version(other, &frame::seal(Kind::Result, &0, &[]));
        client.publish(subjects::result(&key(name)), frame).await.expect("published");
        workers.swap_remove(0).leave().await.expect("left");
        training::round(&mut workers[0]).await.expect("the other goes on");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_of_another_version_is_named_and_keeps_nobody_from_the_others() {
    let service = Embedded::start(|_| {}).await;
    let url = service.service().url().to_owned();
    let client = service.client.clone().patient_for(PATIENCE);
    let bystander = training::job("bystander", mean(), 1);
    let mut good = training::join(&client, &bystander, 0).await.expect("joined");
    let job = training::job("foreign", mean(), 1);
    let mut worker = training::join(&client, &job, 0).await.expect("joined");
    training::round(&mut worker).await.expect("a round");
    worker.leave().await.expect("left");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(cluster::binary());
        command.args(args).args(["--nats-url", &url]).output().expect("the binary runs")
    };
    for (other, name) in OTHERS.into_iter().zip([job_key(&key("foreign")), roster_key(&key("foreign"))]) {
        let kept = rewrite(&url, &name, other).await;
        for error in [
            client.job(&key("foreign")).await.expect_err("another release"),
            client.open(&job).await.expect_err("another release"),
        ] {
            sdk_says(&error, other);
            assert!(error.to_string().contains(&name), "which key: {error}");
        }
        let output = run(&["job", "show", "foreign"]);
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        names_both(&String::from_utf8_lossy(&output.stderr), other);
        // Lists show what can be read, and that there is one that cannot.
        let jobs = client.jobs(None).await.expect("a list");
        let states: BTreeMap<_, _> =
            jobs.iter().map(|job| (job.key.job.as_str(), job.state.as_str())).collect();
        assert_eq!(states.get("bystander"), Some(&"running"));
        assert!(states.contains_key("foreign"), "{states:?}");
        training::round(&mut good).await.expect("others go on");
        put_back(&url, &name, kept).await;
        let (record, _) = client.job(&key("foreign")).await.expect("nothing was lost");
        assert_eq!(record.spec.key, key("foreign"));
    }
    let mut worker = training::join(&client, &job, 0).await.expect("joined again");
    let (_, flat) = training::round(&mut worker).await.expect("a round");
    training::assert_same_bits(&flat, &training::replay(&mean(), &full_book(1, 2), 2), "goes on");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn components_that_start_over_another_version_say_so_and_wait_or_stop() {
    let cluster = Cluster::start(&[]);
    let client = Client::connect(cluster.url()).await.expect("connected");
    let job = training::job("upgrade", mean(), 1);
    cluster.invoker("i0", "");
    let mut worker = training::join(&client, &job, 0).await.expect("joined");
    training::round(&mut worker).await.expect("a round");
    let log = |name: &str| {
        std::fs::read_to_string(cluster.directory().join(format!("{name}.log"))).unwrap_or_default()
    };
    let says = async |name: &str, what: &str, other: u8| {
        eventually(&format!("{name} to tell of {what}"), async || {
            log(name).lines().any(|line| {
                let both = format!("wire version {other}, this component {WIRE_VERSION}");
                line.contains(what) && line.contains(&both)
            })
        })
        .await;
    };
    let connection = connect(cluster.url()).await;
    for other in OTHERS {
        // A heartbeat.
        let beat = InvokerBeat {
            invoker: format!("strange{other}"),
            state: InvokerState::Ready,
            partitions: Vec::new(),
            busy: 0.0,
            service_bytes_per_s: 0.0,
            held_messages: 0,
            held_bytes: 0,
            cpu_quota: 1.0,
            jobs: Vec::new(),
        };
        let frame = of_version(other, &frame::seal(Kind::Beat, &beat, &[]));
        let beating = tokio::spawn({
            let (client, subject) = (connection.client.clone(), subjects::invoker_beat(None, &beat.invoker));
            async move {
                let mut ticks = tokio::time::interval(Duration::from_millis(50));
                loop {
                    ticks.tick().await;
                    client.publish(subject.clone(), frame.clone()).await.expect("published");
                }
            }
        });
        says("autoscaler", &beat.invoker, other).await;
        let status = Thalweg::at(cluster.url()).json(&["status"]);
        names_both(status["unreadable_invokers"][&beat.invoker].as_str().expect("it is named"), other);
        beating.abort();
        let told = log("autoscaler").lines().filter(|line| line.contains(&beat.invoker)).count();
        assert_eq!(told, 1, "once, however often it beats");
        // The store's own record: an invoker that starts waits, and says for what.
        let kept = rewrite(cluster.url(), thalweg_protocol::STORE_KEY, other).await;
        let late = format!("late{other}");
        cluster.invoker(&late, "");
        says(&late, "store", other).await;
        // A job's record: its contributions wait, they are not refused.
        let name = job_key(&key("upgrade"));
        let record = rewrite(cluster.url(), &name, other).await;
        cluster.kill(&late);
        put_back(cluster.url(), thalweg_protocol::STORE_KEY, kept).await;
        says("i0", &name, other).await;
        put_back(cluster.url(), &name, record).await;
        training::round(&mut worker).await.expect("nothing was lost");
    }
    let registry = Registry::open(&connection.jetstream).await.expect("the registry");
    // A gateway of another release takes over: it cannot hear the worker, who says so.
    cluster.kill("gateway");
    let beats = subjects::WORKER_BEAT.to_owned();
    impostor(cluster.url(), beats, Kind::ApiReply, &ApiReply::Done, OTHERS[1]).await;
    let mut said = None;
    eventually("the worker to stop", async || {
        said = training::round(&mut worker).await.err();
        said.is_some()
    })
    .await;
    sdk_says(&said.expect("an error"), OTHERS[1]);
    for other in OTHERS {
        let kept = rewrite(cluster.url(), thalweg_protocol::STORE_KEY, other).await;
        let id = thalweg_protocol::StoreId::random();
        let error = thalweg_store::announce(&registry, id, 0, &thalweg_store::Config::default()).await;
        is_skew(&error.expect_err("another release").to_wire(), other);
        put_back(cluster.url(), thalweg_protocol::STORE_KEY, kept).await;
    }
}

#[test]
fn a_data_directory_of_another_version_is_not_opened_and_not_touched() {
    use thalweg_store::{LocalStore, OpenOptions, ShardStore as _};
    let directory = tempfile::tempdir().expect("a directory");
    let open = || {
        let options = OpenOptions::directory(directory.path(), Duration::from_millis(50)).expect("options");
        LocalStore::open(options)
    };
    let store = open().expect("a fresh store");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let job =
        thalweg_store::conformance::job(thalweg_protocol::Durability::Process, thalweg_protocol::Init::Zeros);
    runtime.block_on(store.create(job.clone())).expect("created");
    store.close().expect("closed");
    drop(store);
    let slab = std::fs::read_dir(directory.path()).expect("a directory").flatten().map(|entry| entry.path());
    let slab =
        slab.into_iter().find(|path| path.extension().is_some_and(|end| end == "slab")).expect("a slab");
    let whole = std::fs::read(&slab).expect("the slab");
    for other in OTHERS {
        // Both copies of the superblock, where they are: a length, then a frame.
        let mut bytes = whole.clone();
        for copy in [0, 8192] {
            if bytes[copy + 4..].starts_with(&[0x94, WIRE_VERSION]) {
                bytes[copy + 5] = other;
            }
        }
        assert_ne!(bytes, whole);
        std::fs::write(&slab, &bytes).expect("written");
        let text = open().expect_err("another release").to_string();
        names_both(&text, other);
        assert!(text.contains(".slab"), "which file: {text}");
        assert_eq!(std::fs::read(&slab).expect("the slab"), bytes, "not touched");
    }
    std::fs::write(&slab, &whole).expect("written");
    let store = open().expect("as it was");
    assert_eq!(runtime.block_on(store.list()).expect("a list"), [job], "nothing was lost");
    store.close().expect("closed");
}

//! Bad input: a typed error where the sender sees it, a metric, no effect on anybody else, no panic.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use thalweg_broker::Connection;
use thalweg_protocol::{
    ErrorCode, FunctionSpec, GradientHeader, Incarnation, JobRecord, Kind, Reject, StateId, frame, subjects,
};
use thalweg_sdk::{Client, Error, Job, NonFinite, Worker};
use thalweg_tests::{PATIENCE, connect, embedded::Embedded, eventually, training};

/// Somebody who speaks NATS and none too well.
struct Stranger {
    connection: Connection,
    rejects: async_nats::Subscriber,
    record: JobRecord,
    worker: Incarnation,
    rank: u32,
}

impl Stranger {
    /// Speaks in the name of `worker`'s job and of its own life in rank `rank`.
    async fn new(service: &Embedded, worker: &Worker, rank: u32) -> Self {
        let connection = connect(service.service().url()).await;
        let record = worker.job().clone();
        let subject = subjects::reject(&record.spec.key, rank);
        let rejects = connection.client.subscribe(subject).await.expect("subscribed");
        let (_, roster) = service.client.job(&record.spec.key).await.expect("the job");
        let life = roster.members.iter().find(|member| member.rank == rank).expect("a member").incarnation;
        connection.client.flush().await.expect("flushed");
        Self { connection, rejects, record, worker: life, rank }
    }

    fn header(&self, round: u64) -> GradientHeader {
        GradientHeader {
            job: self.record.incarnation,
            shard: 0,
            round,
            worker: self.worker,
            rank: self.rank,
            roster_epoch: 0,
            base: StateId([0; 16]),
            weight: 1.0,
            void: false,
            elements: 256,
        }
    }

    async fn send(&self, frame: Bytes) {
        let subject = subjects::gradient(self.record.partition(0), &self.record.spec.key, self.rank);
        let stored = self.connection.jetstream.publish(subject, frame).await.expect("published");
        stored.await.expect("stored");
    }

    async fn rejected(&mut self) -> Reject {
        let message =
            tokio::time::timeout(PATIENCE, self.rejects.next()).await.expect("in time").expect("a reject");
        frame::open::<Reject>(Kind::Reject, &message.payload).expect("a readable reject").0
    }

    /// Sends and expects to hear `code`.
    async fn expect(&mut self, what: &str, frame: Bytes, code: ErrorCode) {
        let before = Embedded::metric("thalweg_invoker_rejects_total", code.as_str());
        self.send(frame).await;
        let reject = self.rejected().await;
        assert_eq!(reject.error.code, code, "{what}: {}", reject.error);
        assert!(!reject.error.message.is_empty());
        let after = Embedded::metric("thalweg_invoker_rejects_total", code.as_str());
        assert!(after > before, "{what}: a metric counts it");
    }
}

fn seal(header: &GradientHeader, payload: &[u8]) -> Bytes {
    frame::seal(Kind::Gradient, header, payload)
}

async fn dead_letters(service: &Embedded) -> u64 {
    let connection = connect(service.service().url()).await;
    let stream = connection.jetstream.get_stream(subjects::DEAD_LETTER_STREAM).await.expect("the stream");
    stream.cached_info().state.messages
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_no_sdk_would_send_are_refused_and_told_why() {
    let service = Embedded::start(|config| config.autoscaler.policy.min_invokers = 1).await;
    let job = training::job("victim", FunctionSpec::named("mean"), 2);
    let other = training::job("bystander", FunctionSpec::named("mean"), 1);
    let joins = [training::join(&service.client, &job, 0), training::join(&service.client, &job, 1)];
    let mut workers = futures::future::try_join_all(joins).await.expect("joined");
    let mut bystander = training::join(&service.client, &other, 0).await.expect("joined");
    let mut stranger = Stranger::new(&service, &workers[0], 1).await;
    let good = vec![0_u8; 1024];

    let lettered = dead_letters(&service).await;
    stranger.expect("not a frame", Bytes::from_static(b"hello"), ErrorCode::Malformed).await;
    let mut flipped = seal(&stranger.header(1), &good).to_vec();
    *flipped.last_mut().expect("bytes") ^= 1;
    stranger.expect("a flipped bit", flipped.into(), ErrorCode::BadChecksum).await;
    let mut future = seal(&stranger.header(1), &good).to_vec();
    future[1] = 99;
    stranger.expect("another wire version", future.into(), ErrorCode::WireVersion).await;
    eventually("three dead letters", async || dead_letters(&service).await >= lettered + 3).await;

    let header = GradientHeader { job: Incarnation::random(), ..stranger.header(1) };
    stranger.expect("an old life of the job", seal(&header, &good), ErrorCode::Gone).await;
    let header = GradientHeader { worker: Incarnation::random(), ..stranger.header(1) };
    stranger.expect("an old life of the worker", seal(&header, &good), ErrorCode::LeaseLost).await;
    let header = GradientHeader { shard: 77, ..stranger.header(1) };
    stranger.expect("a shard that is not there", seal(&header, &good), ErrorCode::WrongShape).await;
    stranger.expect("a round far ahead", seal(&stranger.header(50), &good), ErrorCode::RoundAhead).await;

    // The job goes on: none of that was a contribution.
    let rounds = workers.iter_mut().map(training::round);
    let done = futures::future::try_join_all(rounds).await.expect("a round of both");
    let expected = training::replay(&FunctionSpec::named("mean"), &training::full_book(2, 1), 1);
    for (round, parameters) in done {
        assert!(round.counted);
        training::assert_same_bits(&parameters, &expected, "the victim");
    }
    let expected = training::replay(&FunctionSpec::named("mean"), &training::full_book(1, 1), 1);
    let (_, parameters) = training::round(&mut bystander).await.expect("a round");
    training::assert_same_bits(&parameters, &expected, "the bystander");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_contribution_of_the_wrong_length_is_void_and_the_round_goes_on() {
    let service = Embedded::start(|_| {}).await;
    for (name, payload, elements) in
        [("short", 1020_usize, 256_u32), ("long", 1028, 256), ("declared", 1024, 255), ("empty", 0, 256)]
    {
        let job = training::job(name, FunctionSpec::named("mean"), 2);
        let joins = [training::join(&service.client, &job, 0), training::join(&service.client, &job, 1)];
        let mut workers = futures::future::try_join_all(joins).await.expect("joined");
        let mut stranger = Stranger::new(&service, &workers[0], 1).await;
        // Rank 1's first contribution to shard 0 has the wrong length; the SDK's own comes second and is a
        // duplicate: the first in stream order wins (P8).
        let heads = state_id(&service, &stranger.record).await;
        let header = GradientHeader { elements, base: heads, ..stranger.header(1) };
        stranger.expect(name, seal(&header, &vec![0; payload]), ErrorCode::WrongShape).await;
        let rounds = workers.iter_mut().map(training::round);
        let done = futures::future::try_join_all(rounds).await.expect("the round goes on");
        assert_eq!(done[0].0.contributors, 1, "shard 0 counts rank 0 alone");
        assert!(done[0].0.counted && !done[1].0.counted);
    }
    service.stop().await;
}

/// Where shard 0 of a fresh job stands.
async fn state_id(service: &Embedded, record: &JobRecord) -> StateId {
    use thalweg_store::ShardStore as _;
    let store = thalweg_store::StoreClient::new(connect(service.service().url()).await.client, record.store);
    store.heads(record.incarnation, 0, 1).await.expect("heads")[0].state_id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_pushed_twice_counts_once() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("twice", FunctionSpec::named("sum"), 2);
    let joins = [training::join(&service.client, &job, 0), training::join(&service.client, &job, 1)];
    let mut workers = futures::future::try_join_all(joins).await.expect("joined");
    let stranger = Stranger::new(&service, &workers[0], 1).await;
    let base = state_id(&service, &stranger.record).await;
    let before = Embedded::metric("thalweg_invoker_leftovers_total", "duplicate");
    // Twice the true contribution of rank 1 to shard 0, before the SDK sends it a third time.
    let bytes: Vec<u8> =
        training::gradient(1, 1)[..256].iter().flat_map(|value| value.to_le_bytes()).collect();
    let header = GradientHeader { base, ..stranger.header(1) };
    stranger.send(seal(&header, &bytes)).await;
    stranger.send(seal(&header, &bytes)).await;
    let rounds = workers.iter_mut().map(training::round);
    let expected = training::replay(&FunctionSpec::named("sum"), &training::full_book(2, 1), 1);
    for (_, parameters) in futures::future::try_join_all(rounds).await.expect("a round") {
        training::assert_same_bits(&parameters, &expected, "counted once");
    }
    eventually("two duplicates to be counted", async || {
        Embedded::metric("thalweg_invoker_leftovers_total", "duplicate") >= before + 2.0
    })
    .await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn non_finite_values_follow_the_policy() {
    let service = Embedded::start(|_| {}).await;
    let run = async |name: &str, function: FunctionSpec, policy: NonFinite| {
        let job = training::job(name, function, 2).non_finite(policy);
        let joins = [training::join(&service.client, &job, 0), training::join(&service.client, &job, 1)];
        let mut workers = futures::future::try_join_all(joins).await.expect("joined");
        let mut poisoned = training::gradient(1, 1);
        poisoned[1000] = f32::NAN;
        let (one, other) = workers.split_at_mut(1);
        let tensors = training::split(&poisoned);
        tokio::join!(training::round(&mut one[0]), other[0].push_pull(&tensors))
    };
    let (good, bad) = run("propagate", FunctionSpec::named("sum"), NonFinite::Propagate).await;
    let (good, bad) = (good.expect("a result"), bad.expect("a result"));
    assert!(good.1[1000].is_nan() && bad.counted, "everybody sees the NaN");
    assert_eq!(good.1.iter().filter(|value| value.is_nan()).count(), 1);

    let sgd = FunctionSpec::named("sgd").number("lr", 0.1);
    let (good, bad) = run("void", sgd.clone(), NonFinite::Void).await;
    let (good, bad) = (good.expect("a result"), bad.expect("a result"));
    assert!(good.0.counted && !bad.counted, "void on all shards");
    assert_eq!(good.0.contributors, 1);
    assert!(good.1.iter().all(|value| value.is_finite()));

    let (good, bad) = run("fail", sgd, NonFinite::Fail).await;
    for error in [good.expect_err("the job failed"), bad.expect_err("the job failed")] {
        assert_eq!(error.code(), Some(ErrorCode::JobFailed), "{error}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_jobs_and_wrong_calls_are_refused_before_anything_is_sent() {
    let service = Embedded::start(|_| {}).await;
    let client = &service.client;
    let key = thalweg_protocol::JobKey { tenant: "default".parse().unwrap(), job: "nobody".parse().unwrap() };
    assert_eq!(client.job(&key).await.expect_err("unknown").code(), Some(ErrorCode::UnknownJob));
    let code = async |job: Job| client.open(&job).await.err().and_then(|error| error.code());
    assert!(Job::new("Not A Name").is_err());
    assert_eq!(code(Job::new("empty").unwrap()).await, Some(ErrorCode::InvalidSpec), "no tensor");
    let job = Job::new("hollow").unwrap().tensor("x", [3, 0]);
    assert_eq!(code(job).await, Some(ErrorCode::InvalidSpec), "an empty tensor");
    let job = Job::new("odd").unwrap().tensor("x", [3]).function("median");
    assert_eq!(code(job).await, Some(ErrorCode::InvalidSpec), "a function nobody knows");
    let job = Job::new("slow").unwrap().tensor("x", [3]).function_spec(FunctionSpec::named("sgd"));
    assert_eq!(code(job).await, Some(ErrorCode::InvalidSpec), "sgd without lr");
    assert_eq!(code(Job::new("same").unwrap().tensor("x", [3])).await, None);
    assert_eq!(code(Job::new("same").unwrap().tensor("x", [4])).await, Some(ErrorCode::SpecMismatch));
    // A tensor list that fits no message of the registry.
    let mut job = Job::new("names").unwrap();
    for index in 0..40_000 {
        job = job.tensor(format!("{index:0>250}"), [1]);
    }
    assert_eq!(code(job).await, Some(ErrorCode::Limit), "a record larger than a message");

    let mut worker = client.join(Job::new("calls").unwrap().tensor("x", [3]), 0).await.expect("joined");
    let error = worker.push_pull(&[("x", &[1.0])]).await.expect_err("short");
    assert!(matches!(error, Error::Shape { expected: 3, actual: 1, .. }), "{error}");
    let error = worker.push_pull(&[("y", &[1.0])]).await.expect_err("unknown");
    assert!(matches!(error, Error::UnknownTensor(_)), "{error}");
    let error = worker.push_pull(&[]).await.expect_err("nothing");
    assert!(matches!(error, Error::NeverEnds { .. }), "{error}");
    let round = worker.push_pull(&[("x", &[1.0, 2.0, 3.0])]).await.expect("the round");
    assert_eq!((round.round, round.tensors), (1, vec![vec![1.0, 2.0, 3.0]]));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scalars_and_ten_thousand_tensors_are_models_too() {
    let service = Embedded::start(|_| {}).await;
    let job = Job::new("scalar").unwrap().tensor("x", []).function("sum");
    let mut worker = service.client.join(job, 0).await.expect("joined");
    assert_eq!(worker.push_pull(&[("x", &[2.5])]).await.expect("a round").tensors, [[2.5]]);
    let names: Vec<_> = (0..10_000).map(|index| format!("layer.{index}.weight")).collect();
    let job = names.iter().fold(Job::new("many").unwrap().function("sum"), |job, name| job.tensor(name, [2]));
    let mut worker = service.client.join(job, 0).await.expect("joined");
    let values: Vec<_> = (0..10_000).map(|index| [index as f32, -1.0]).collect();
    let tensors: Vec<_> = names.iter().map(String::as_str).zip(values.iter().map(|pair| &pair[..])).collect();
    let round = worker.push_pull(&tensors).await.expect("a round");
    assert!(round.tensors.iter().zip(&values).all(|(result, pair)| result == pair));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_in_the_place_of_another_refuses_and_says_what_to_do() {
    let service = Embedded::start(|_| {}).await;
    let connection = connect(service.service().url()).await;
    let registry = thalweg_broker::Registry::open(&connection.jetstream).await.expect("the registry");
    let config = thalweg_store::Config::default();
    let error = thalweg_store::announce(&registry, thalweg_protocol::StoreId::random(), 0, &config).await;
    let error = error.expect_err("another store is registered");
    assert_eq!(error.code(), ErrorCode::StoreMismatch);
    assert!(error.to_string().contains("--replace"), "{error}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_contribution_that_kills_its_invokers_is_put_aside() {
    // In processes: it has to kill for real. Full roster: the job cannot complete its round and fails.
    let cluster = thalweg_tests::cluster::Cluster::start(&[]);
    let deadly = "poison=return(self)";
    cluster.invoker("i0", deadly);
    let client = Client::connect(cluster.url()).await.expect("connected");
    let job = training::job("poison", FunctionSpec::named("weighted_mean"), 2);
    let bystander = training::job("healthy", FunctionSpec::named("mean"), 1);
    let joins = [training::join(&client, &job, 0), training::join(&client, &job, 1)];
    let mut workers = futures::future::try_join_all(joins).await.expect("joined");
    workers[1].set_weight(thalweg_broker::stage::POISON_WEIGHT);
    let mut rounds = Vec::new();
    for mut worker in workers {
        rounds.push(tokio::spawn(async move { training::round(&mut worker).await }));
    }
    let mut life = 0;
    let done = async {
        for round in rounds {
            let error = round.await.expect("a worker").expect_err("the job fails");
            assert_eq!(error.code(), Some(ErrorCode::JobFailed), "{error}");
            assert!(error.to_string().contains("poison_contribution"), "{error}");
        }
    };
    tokio::pin!(done);
    loop {
        tokio::select! {
            () = &mut done => break,
            () = tokio::time::sleep(Duration::from_millis(20)) => {
                if !cluster.is_alive(&format!("i{life}")) {
                    life += 1;
                    assert!(life < 40, "it kills for ever");
                    cluster.invoker(&format!("i{life}"), deadly);
                }
            }
        }
    }
    eprintln!("{life} invokers died of it");
    let mut worker = training::join(&client, &bystander, 0).await.expect("joined");
    training::round(&mut worker).await.expect("others are not affected");
}

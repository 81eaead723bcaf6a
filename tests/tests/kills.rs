//! Killing anything at any stage changes not one bit of the result.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use thalweg_broker::stage;
use thalweg_protocol::{Durability, FunctionSpec};
use thalweg_sdk::Client;
use thalweg_tests::{
    cluster::Cluster,
    eventually,
    training::{self, Book},
};

const WORKERS: u32 = 3;

/// Everything but the workers.
const ALL: &str = "nats+store+gateway+autoscaler+self";

/// Workers that train until told to stop; returns rounds done and the final parameters of each.
struct Trainers {
    stop_after: Arc<AtomicU64>,
    round: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<(u64, Vec<f32>, Book)>>,
}

impl Trainers {
    async fn start(cluster: &Cluster, name: &str, function: &FunctionSpec, durability: Durability) -> Self {
        let job = training::job(name, function.clone(), WORKERS).durability(durability);
        Self::start_job(cluster, job).await
    }

    async fn start_job(cluster: &Cluster, job: thalweg_sdk::Job) -> Self {
        let (stop_after, round) = (Arc::new(AtomicU64::new(u64::MAX)), Arc::new(AtomicU64::new(0)));
        let barrier = Arc::new(tokio::sync::Barrier::new(WORKERS as usize));
        let mut tasks = Vec::new();
        for rank in 0..WORKERS {
            let client = Client::connect(cluster.url()).await.expect("connected");
            let (job, stop_after, round) = (job.clone(), stop_after.clone(), round.clone());
            let barrier = barrier.clone();
            tasks.push(tokio::spawn(async move {
                let mut worker = training::join(&client, &job, rank).await.expect("joined");
                let mut book = Book::new();
                let mut parameters = Vec::new();
                loop {
                    // All workers must agree on the last round: one of them looks, between two barriers.
                    barrier.wait().await;
                    let stop = round.load(Ordering::SeqCst) >= stop_after.load(Ordering::SeqCst);
                    barrier.wait().await;
                    if stop {
                        break;
                    }
                    let before = worker.round();
                    let (done, flat) = training::round(&mut worker).await.expect("a round");
                    assert!(done.round >= before, "versions never go back (I3)");
                    for (shard, version, counted) in worker.ledgers() {
                        book.insert((version, shard as usize), counted);
                    }
                    parameters = flat;
                    round.fetch_max(done.round, Ordering::SeqCst);
                }
                let last = worker.round();
                // Kept until the end: leaving is another test's subject.
                (last, parameters, book)
            }));
        }
        Self { stop_after, round, tasks }
    }

    fn round(&self) -> u64 {
        self.round.load(Ordering::SeqCst)
    }

    async fn progress(&self, rounds: u64, what: &str) {
        let goal = self.round() + rounds;
        eventually(what, async || self.round() >= goal).await;
    }

    async fn finish(self) -> Vec<(u64, Vec<f32>, Book)> {
        self.stop_after.store(self.round() + 2, Ordering::SeqCst);
        let mut all = Vec::new();
        for task in self.tasks {
            all.push(task.await.expect("a trainer"));
        }
        all
    }
}

fn sgd() -> FunctionSpec {
    FunctionSpec::named("sgd").number("lr", 0.05).number("momentum", 0.9)
}

/// Runs through `plans` of (stage, targets), each by a new invoker (or store) with that fail point.
async fn kill_by_plan(cluster: &Cluster, trainers: &Trainers, plans: &[(&str, String)], seed: u64) {
    let mut killed = 0;
    for (number, (stage, targets)) in plans.iter().enumerate() {
        let hits = cluster.hits().len();
        let name = format!("i{number}");
        // A stage is passed ten times a round (once a shard): let some pass first.
        let skip = (seed.wrapping_mul(31) + number as u64 * 7) % 9;
        let failpoint = format!("{stage}={skip}*off->1*return({targets})");
        if *stage == stage::IN_FLUSH {
            cluster.restart_store(&failpoint);
            if !cluster.is_alive("flushing") {
                cluster.invoker("flushing", "");
            }
        } else {
            cluster.kill("flushing");
            cluster.invoker(&name, &failpoint);
        }
        eventually(&format!("{stage} to be reached (plan {number}: {targets})"), async || {
            cluster.hits().len() > hits
        })
        .await;
        killed += targets.split('+').count();
        let recovered = format!("recovery after {stage} killed {targets} (plan {number})");
        if *stage == stage::IN_FLUSH {
            trainers.progress(2, &recovered).await;
            continue;
        }
        // The invoker of this plan, if it survived, does two more rounds and is then killed at whatever
        // it is doing; else another takes over.
        let next = format!("n{number}");
        if targets.contains("self") {
            eventually("the invoker to die", async || !cluster.is_alive(&name)).await;
            cluster.invoker(&next, "");
        }
        trainers.progress(2, &recovered).await;
        cluster.kill(&name);
        cluster.kill(&next);
        killed += 1;
    }
    eprintln!("{killed} kills in {} plans", plans.len());
}

fn check(results: &[(u64, Vec<f32>, Book)], function: &FunctionSpec) {
    let (next, first, _) = &results[0];
    let rounds = next - 1;
    let expected = training::replay(function, &training::full_book(WORKERS, rounds), rounds);
    for (rank, (_, parameters, book)) in results.iter().enumerate() {
        training::assert_same_bits(parameters, first, "all workers hold the same bits (I4)");
        training::assert_same_bits(parameters, &expected, &format!("rank {rank} after {rounds} rounds (I5)"));
        for ((round, shard), counted) in book {
            assert_eq!(*counted, (0..WORKERS).collect::<Vec<_>>(), "round {round} of shard {shard} (I1)");
        }
    }
    eprintln!("{rounds} rounds, all bits as undisturbed");
}

fn count_hits(cluster: &Cluster) -> BTreeMap<String, usize> {
    let mut hits = BTreeMap::new();
    for hit in cluster.hits() {
        let stage = hit.split(' ').next().unwrap_or_default().to_owned();
        *hits.entry(stage).or_insert(0) += 1;
    }
    eprintln!("hits by stage: {hits:?}");
    hits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_at_every_stage_change_no_bit() {
    let cluster = Cluster::start(&[]);
    cluster.invoker("first", "");
    let trainers = Trainers::start(&cluster, "stages", &sgd(), Durability::Process).await;
    trainers.progress(3, "the first rounds").await;
    cluster.kill("first");
    let invoker_stages = [stage::BEFORE_FOLD, stage::BEFORE_COMMIT, stage::BEFORE_PUBLISH, stage::BEFORE_ACK];
    let mut plans = Vec::new();
    for targets in ["self", "store", "nats", "store+self", ALL] {
        for stage in invoker_stages {
            plans.push((stage, targets.to_owned()));
        }
    }
    for targets in ["self", "nats", "nats+self"] {
        plans.push((stage::IN_FLUSH, targets.to_owned()));
    }
    kill_by_plan(&cluster, &trainers, &plans, 1).await;
    cluster.invoker("last", "");
    let results = trainers.finish().await;
    check(&results, &sgd());
    let hits = count_hits(&cluster);
    for stage in stage::ALL {
        assert!(hits.get(stage).copied().unwrap_or(0) >= 3, "{stage} was hit {:?} times", hits.get(stage));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_at_level_disk_change_no_bit() {
    let cluster = Cluster::start(&[]);
    cluster.invoker("first", "");
    let mean = FunctionSpec::named("mean");
    let trainers = Trainers::start(&cluster, "disk", &mean, Durability::Disk).await;
    trainers.progress(2, "the first rounds").await;
    cluster.kill("first");
    let mut plans = Vec::new();
    for (stage, targets) in [
        (stage::BEFORE_COMMIT, "store"),
        (stage::BEFORE_PUBLISH, "self"),
        (stage::BEFORE_ACK, "nats"),
        (stage::BEFORE_COMMIT, ALL),
        (stage::IN_FLUSH, "self"),
        (stage::IN_FLUSH, "self"),
        (stage::IN_FLUSH, "nats+self"),
    ] {
        plans.push((stage, targets.to_owned()));
    }
    kill_by_plan(&cluster, &trainers, &plans, 2).await;
    cluster.invoker("last", "");
    let results = trainers.finish().await;
    check(&results, &mean);
    count_hits(&cluster);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_kills_with_quorums_match_their_ledgers() {
    let cluster = Cluster::start(&[]);
    cluster.invoker("i0", "");
    cluster.invoker("i1", "");
    let job = training::job("quorum", sgd(), WORKERS).quorum(2, Duration::from_millis(60));
    let trainers = Trainers::start_job(&cluster, job).await;
    trainers.progress(2, "the first rounds").await;
    for kill in 0..12_u64 {
        let target = ["i0", "store", "nats", "i1"][kill as usize % 4];
        cluster.kill(target);
        if target.starts_with('i') {
            cluster.invoker(target, "");
        } else if target == "store" {
            cluster.restart_store("");
        }
        trainers.progress(2, &format!("recovery after the kill of {target}")).await;
    }
    let results = trainers.finish().await;
    // The union of what the workers saw is the book: for one (round, shard) all saw the same.
    let mut book = Book::new();
    for (_, _, seen) in &results {
        for (at, counted) in seen {
            let known = book.entry(*at).or_insert_with(|| counted.clone());
            assert_eq!(known, counted, "two workers saw different ledgers of {at:?} (I4)");
            assert!(counted.len() >= 2, "{at:?} closed below its quorum");
        }
    }
    let last = results.iter().map(|(next, _, _)| next - 1).max().unwrap_or(0);
    let complete =
        (1..=last).all(|round| (0..training::SHARDS).all(|shard| book.contains_key(&(round, shard))));
    assert!(complete, "every round was seen by at least one worker");
    let expected = training::replay(&sgd(), &book, last);
    for (next, parameters, _) in &results {
        if *next - 1 == last {
            training::assert_same_bits(parameters, &expected, "a replay of the ledgers");
        }
    }
    eprintln!("{last} rounds match a replay of their ledgers");
}

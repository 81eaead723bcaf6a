//! Rounds that last longer than contributions linger: folded early, whatever is killed, and closed by nobody's push.

use std::time::Duration;

use thalweg_broker::stage;
use thalweg_protocol::FunctionSpec;
use thalweg_sdk::{Client, FoldOrder, Job, JobKey, Worker};
use thalweg_tests::{
    cluster::Cluster,
    embedded::Embedded,
    eventually,
    training::{self, Book},
};

const WORKERS: u32 = 4;
/// Quicker than the slowest worker by far.
const LINGER_MS: u64 = 20;

fn sgd() -> FunctionSpec {
    FunctionSpec::named("sgd").number("lr", 0.05).number("momentum", 0.9)
}

/// Each worker pushes so long after the one before.
const STAGGER: Duration = Duration::from_millis(80);

fn note(book: &mut Book, worker: &Worker) {
    for (shard, version, counted) in worker.ledgers() {
        let known = book.entry((version, shard as usize)).or_insert_with(|| counted.clone());
        assert_eq!(*known, counted, "two workers saw different ledgers of {version} (I4)");
    }
}

/// Trains, one worker after the other, until every one of `plans` has been hit; returns rounds, parameters and the
/// book.
async fn train_slowly(cluster: &Cluster, job: &Job, plans: &[&str]) -> (u64, Vec<f32>, Book) {
    cluster.invoker("i", "");
    let client = Client::connect(cluster.url()).await.expect("connected");
    let mut workers = training::join_all(&client, job, WORKERS).await;
    let mut book = Book::new();
    let mut parameters = Vec::new();
    for (number, targets) in plans.iter().enumerate() {
        let hits = cluster.hits().len();
        cluster.kill("i");
        let skip = number * 7 % 5;
        cluster.invoker("i", &format!("{}={skip}*off->1*return({targets})", stage::BEFORE_PARTIAL));
        loop {
            let rounds = workers.iter_mut().map(|worker| async move {
                tokio::time::sleep(STAGGER * worker.rank()).await;
                training::round(worker).await.expect("a round")
            });
            let done = futures::future::join_all(rounds).await;
            workers.iter().for_each(|worker| note(&mut book, worker));
            parameters = done.last().expect("four workers").1.clone();
            if cluster.hits().len() > hits {
                break;
            }
        }
    }
    let rounds = workers[0].round() - 1;
    (rounds, parameters, book)
}

/// Starts the invoker again whenever it has been killed, while `work` goes on.
async fn kept_alive<T>(cluster: &Cluster, work: impl Future<Output = T>) -> T {
    let again = async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if !cluster.is_alive("i") {
                cluster.kill("i");
                cluster.invoker("i", "");
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = again => unreachable!("it has no end"),
    }
}

async fn kills_change_no_bit(name: &str, order: FoldOrder) {
    let linger = format!("invoker.linger_ms={LINGER_MS}");
    let cluster = Cluster::start(&[&linger]);
    let job = training::job(name, sgd(), WORKERS).order(order);
    let plans = ["self", "store", "nats", "store+self", "nats+store+gateway+autoscaler+self", "self"];
    let (rounds, parameters, book) = kept_alive(&cluster, train_slowly(&cluster, &job, &plans)).await;
    let expected = training::replay(&sgd(), &book, rounds);
    training::assert_same_bits(&parameters, &expected, &format!("after {rounds} rounds"));
    for (at, counted) in &book {
        let mut ranks = counted.clone();
        ranks.sort_unstable();
        assert_eq!(ranks, (0..WORKERS).collect::<Vec<_>>(), "{at:?} (I1)");
    }
    let hits = cluster.hits().iter().filter(|hit| hit.starts_with(stage::BEFORE_PARTIAL)).count();
    assert!(hits >= plans.len(), "{hits} partial commits were hit");
    eprintln!("{rounds} rounds of {WORKERS}, {hits} of their partial commits killed: all bits as recorded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_in_rank_order_change_no_bit() {
    kills_change_no_bit("by-rank", FoldOrder::Rank).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_in_order_of_arrival_change_no_bit() {
    kills_change_no_bit("by-arrival", FoldOrder::Arrival).await;
}

fn partial_files(service: &Embedded) -> Vec<String> {
    let directory = service.directory().join("store");
    let entries = std::fs::read_dir(directory).expect("the store's directory").flatten();
    let names = entries.map(|entry| entry.file_name().display().to_string());
    names.filter(|name| name.ends_with(".partial")).collect()
}

/// Everything that came is in the store, so that the pool shrinks to nothing; then the deadline passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_fires_while_no_invoker_runs() {
    let service = Embedded::start(|config| {
        config.invoker.linger_ms = LINGER_MS;
        config.autoscaler.policy.idle_timeout_ms = 300;
    })
    .await;
    let deadline = Duration::from_secs(4);
    let job = training::job("patient", sgd(), 3).quorum(2, deadline);
    let mut workers = training::join_all(&service.client, &job, 3).await;
    let absent = workers.pop();
    let nudges = Embedded::metric("thalweg_gateway_nudges_total", "");
    let rounds = futures::future::join_all(workers.iter_mut().map(training::round));
    let status = service.service().status();
    let gone = async {
        eventually("all that came to be folded", async || {
            Embedded::metric("thalweg_gateway_open_rounds", "") >= training::SHARDS as f64
        })
        .await;
        assert!(!partial_files(&service).is_empty(), "open rounds are on the disk");
        eventually("the pool to be empty", async || status.borrow().invokers == 0).await;
    };
    let (rounds, ()) = tokio::join!(rounds, gone);
    let mut book = Book::new();
    workers.iter().for_each(|worker| note(&mut book, worker));
    assert!(book.values().all(|counted| counted == &[0, 1]), "{book:?}");
    let expected = training::replay(&sgd(), &book, 1);
    for round in rounds {
        training::assert_same_bits(&round.expect("a round").1, &expected, "closed by its deadline");
    }
    assert!(Embedded::metric("thalweg_gateway_nudges_total", "") > nudges, "somebody was asked to look");
    drop((absent, workers));
    let key = JobKey { tenant: "default".parse().expect("a name"), job: "patient".parse().expect("a name") };
    service.client.delete(&key).await.expect("deleted");
    assert_eq!(partial_files(&service), [""; 0], "nothing is left");
    service.stop().await;
}

/// Hundreds claim their ranks at the same moment; each counts once, and all see the same bits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_joins_at_once() {
    const CROWD: u32 = 300;
    let service = Embedded::start(|config| config.invoker.linger_ms = LINGER_MS).await;
    let job = training::job("crowd", sgd(), CROWD).order(FoldOrder::Arrival);
    let mut workers = training::join_all(&service.client, &job, CROWD).await;
    let rounds = futures::future::try_join_all(workers.iter_mut().map(training::round)).await;
    let mut book = Book::new();
    workers.iter().for_each(|worker| note(&mut book, worker));
    for (at, counted) in &book {
        let mut ranks = counted.clone();
        ranks.sort_unstable();
        assert_eq!(ranks, (0..CROWD).collect::<Vec<_>>(), "{at:?} (I1)");
    }
    let expected = training::replay(&sgd(), &book, 1);
    for (round, parameters) in rounds.expect("a round") {
        assert_eq!(round.contributors, CROWD as usize);
        training::assert_same_bits(&parameters, &expected, "a replay of the ledgers");
    }
    drop(workers);
    service.stop().await;
}

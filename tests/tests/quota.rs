//! An invoker keeps to its CPU quota, whatever waits.

use std::time::{Duration, Instant};

use futures::{FutureExt as _, StreamExt as _};
use thalweg_protocol::subjects;
use thalweg_sdk::{Client, Job};
use thalweg_tests::{PATIENCE, cluster::Cluster, connect};

const QUOTA: f64 = 0.2;
const WORKERS: u32 = 4;
const ELEMENTS: usize = 1 << 20;

/// CPU time of all threads of a process since it was started, those that have ended included.
fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<_> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    let ticks = |field: usize| fields[field].parse::<u64>().expect("a number");
    // User and system time. A tick is a hundredth of a second, as everywhere on Linux.
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

async fn train(client: Client, job: Job, rank: u32) {
    let mut worker = client.join(job, rank).await.expect("joined");
    let gradient: Vec<f32> = (0..ELEMENTS).map(|element| (element as f32 * 1e-3).sin()).collect();
    loop {
        worker.push_pull(&[("weight", &gradient)]).await.expect("a round");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_of_an_invoker_keeps_to_the_quota_while_it_beats() {
    let cluster = Cluster::start(&[&format!("invoker.cpu_quota={QUOTA}")]);
    let client = connect(cluster.url()).await.client;
    let mut beats = client.subscribe(subjects::invoker_beat(None, "slow")).await.expect("subscribed");
    client.flush().await.expect("flushed");
    let begun = Instant::now();
    cluster.invoker("slow", "");
    let job = Job::new("load").expect("a name").tensor("weight", [ELEMENTS as u64]).function("mean");
    let client = Client::connect(cluster.url()).await.expect("connected");
    let mut workers = tokio::task::JoinSet::new();
    for rank in 0..WORKERS {
        workers.spawn(train(client.clone(), job.clone().workers(WORKERS), rank));
    }

    let (pid, mut beat, mut longest) = (cluster.process("slow"), None, Duration::ZERO);
    loop {
        // The time before the look: what is used meanwhile only counts against the invoker.
        let elapsed = begun.elapsed();
        let used = cpu_time(pid);
        if elapsed >= Duration::from_secs(5) {
            let share = used.as_secs_f64() / elapsed.as_secs_f64();
            assert!(share <= QUOTA * 1.05, "{used:?} in {elapsed:?}");
        }
        while let Some(Some(_)) = beats.next().now_or_never() {
            longest = longest.max(beat.replace(Instant::now()).map_or(Duration::ZERO, |at| at.elapsed()));
        }
        let silence = beat.map_or(Duration::ZERO, |at: Instant| at.elapsed());
        // What the cluster's autoscaler takes for dead.
        assert!(silence < Duration::from_secs(1), "an invoker that pauses goes on beating");
        // Five seconds' worth of work.
        if used >= Duration::from_secs(1) && elapsed >= Duration::from_secs(5) {
            eprintln!("{used:?} of CPU in {elapsed:?}; at most {longest:?} between two beats");
            break;
        }
        assert!(elapsed < PATIENCE, "it was not kept busy: {used:?} in {elapsed:?}");
        if let Some(Some(ended)) = workers.join_next().now_or_never() {
            panic!("a worker has ended: {ended:?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    workers.abort_all();
}

//! What happens to jobs whose workers come, go, stall and fight, and to the pool under them.

use std::time::Duration;

use futures::StreamExt as _;
use thalweg_protocol::{ErrorCode, FunctionSpec, JobKey, subjects};
use thalweg_sdk::{Client, Error, JoinOptions};
use thalweg_tests::{
    embedded::Embedded,
    eventually,
    training::{self, Book},
};

fn sgd() -> FunctionSpec {
    FunctionSpec::named("sgd").number("lr", 0.05).number("momentum", 0.9)
}

fn key(job: &str) -> JobKey {
    JobKey { tenant: "default".parse().expect("a name"), job: job.parse().expect("a name") }
}

/// Runs `workers` workers for `rounds` rounds; returns the parameters of each.
async fn train(
    client: &Client,
    name: &str,
    function: FunctionSpec,
    workers: u32,
    rounds: u64,
) -> Vec<Vec<f32>> {
    let job = training::job(name, function, workers);
    let tasks: Vec<_> = (0..workers)
        .map(|rank| {
            let (client, job) = (client.clone(), job.clone());
            tokio::spawn(async move {
                let mut worker = training::join(&client, &job, rank).await.expect("joined");
                let mut parameters = Vec::new();
                for _ in 0..rounds {
                    let (round, flat) = training::round(&mut worker).await.expect("a round");
                    assert!(round.counted && !round.superseded);
                    assert_eq!(round.contributors, workers as usize);
                    parameters = flat;
                }
                worker.leave().await.expect("left");
                parameters
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.expect("a worker"));
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_invokers_gives_the_same_bits() {
    let rounds = 6;
    for invokers in [1, 2, 8] {
        let service = Embedded::start(|config| {
            config.autoscaler.policy.min_invokers = invokers;
            config.autoscaler.policy.max_invokers = invokers;
        })
        .await;
        let mut status = service.service().status();
        let ready = status.wait_for(|status| status.ready == invokers).await.map(|status| status.ready);
        assert_eq!(ready.expect("the autoscaler runs"), invokers);
        for function in [sgd(), FunctionSpec::named("mean"), FunctionSpec::named("sum")] {
            let name = format!("{}-{invokers}", function.name);
            let expected = training::replay(&function, &training::full_book(4, rounds), rounds);
            for parameters in train(&service.client, &name, function, 4, rounds).await {
                training::assert_same_bits(&parameters, &expected, &name);
            }
        }
        service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_grows_from_nothing_and_shrinks_to_nothing() {
    let service = Embedded::start(|config| config.autoscaler.policy.idle_timeout_ms = 300).await;
    let status = service.service().status();
    assert_eq!(status.borrow().invokers, 0);
    for name in ["first", "second"] {
        let begun = std::time::Instant::now();
        let expected = training::replay(&sgd(), &training::full_book(2, 3), 3);
        for parameters in train(&service.client, name, sgd(), 2, 3).await {
            training::assert_same_bits(&parameters, &expected, name);
        }
        eprintln!("{name}: three rounds from zero invokers in {:?}", begun.elapsed());
        eventually("the pool to be empty again", async || status.borrow().invokers == 0).await;
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_says_that_it_pushes_after_a_rest_and_not_with_every_round() {
    let service = Embedded::start(|_| {}).await;
    let listener = async_nats::connect(service.service().url()).await.expect("connected");
    let mut wakes = listener.subscribe(subjects::WAKE).await.expect("subscribed");
    listener.flush().await.expect("subscribed");
    train(&service.client, "woken", sgd(), 1, 3).await;
    // What was said in the first round lies before the contributions of the second.
    listener.publish(subjects::WAKE, "the end".into()).await.expect("sent");
    let mut heard = 0;
    while wakes.next().await.expect("a message").payload.is_empty() {
        heard += 1;
    }
    assert_eq!(heard, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_jobs_at_once_do_not_meet() {
    let service = Embedded::start(|_| {}).await;
    let (one, other) = tokio::join!(
        train(&service.client, "one", sgd(), 3, 8),
        train(&service.client, "other", FunctionSpec::named("mean"), 2, 8)
    );
    let expected = training::replay(&sgd(), &training::full_book(3, 8), 8);
    one.iter().for_each(|parameters| training::assert_same_bits(parameters, &expected, "one"));
    let expected = training::replay(&FunctionSpec::named("mean"), &training::full_book(2, 8), 8);
    other.iter().for_each(|parameters| training::assert_same_bits(parameters, &expected, "other"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_straggler_is_left_behind_by_a_quorum_and_catches_up() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("straggler", sgd(), 3).quorum(2, Duration::from_millis(100));
    let mut workers = training::join_all(&service.client, &job, 3).await;
    let mut straggler = workers.remove(2);
    let mut book = Book::new();
    for _ in 0..4 {
        let mut rounds = Vec::new();
        for worker in &mut workers {
            rounds.push(training::round(worker));
        }
        for (round, _) in
            futures::future::try_join_all(rounds).await.expect("rounds close without the straggler")
        {
            assert_eq!(round.contributors, 2);
            assert!(round.counted);
        }
        note(&mut book, &workers[0]);
    }
    // Round 1 of the straggler is long over: it gets the newest state and is told so.
    let (round, _) = training::round(&mut straggler).await.expect("the straggler catches up");
    assert!(round.superseded && !round.counted);
    assert_eq!(round.round, 4);
    // From here on it counts again.
    workers.push(straggler);
    let mut rounds = Vec::new();
    for worker in &mut workers {
        rounds.push(training::round(worker));
    }
    let done = futures::future::try_join_all(rounds).await.expect("a round of all three");
    note(&mut book, &workers[0]);
    let expected = training::replay(&sgd(), &book, 5);
    for (round, parameters) in done {
        assert_eq!(round.round, 5);
        training::assert_same_bits(&parameters, &expected, "a replay of the ledgers");
    }
    service.stop().await;
}

fn note(book: &mut Book, worker: &thalweg_sdk::Worker) {
    for (shard, version, counted) in worker.ledgers() {
        book.insert((version, shard as usize), counted);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_in_mid_push_is_removed_after_its_lease() {
    let service = Embedded::start(|config| config.gateway.worker_lease_ms = 800).await;
    let job = training::job("death", sgd(), 3);
    let mut workers = training::join_all(&service.client, &job, 3).await;
    let mut book = Book::new();
    all_rounds(&mut workers, 2, &mut book).await;
    // It pushes one tensor of four and is never heard of again.
    let mut dying = workers.remove(1);
    let flat = training::gradient(dying.rank(), dying.round());
    let (name, values) = training::split(&flat)[2];
    dying.push(name, values).await.expect("pushed");
    drop(dying);
    all_rounds(&mut workers, 3, &mut book).await;
    let (record, roster) = service.client.job(&key("death")).await.expect("the job");
    assert!(roster.members.iter().filter(|member| member.until_round.is_none()).count() == 2, "{roster:?}");
    let expected = training::replay(&sgd(), &book, 5);
    let parameters = workers[0].parameters().await.expect("parameters").concat();
    training::assert_same_bits(&parameters, &expected, "a replay of the ledgers");
    // Somebody new takes the rank, starts from the same state, and counts.
    let end = 60;
    let newcomer = {
        let (client, job) = (service.client.clone(), job.clone());
        tokio::spawn(async move {
            let worker = training::join(&client, &job, 1).await.expect("joined");
            assert_eq!(worker.job().incarnation, record.incarnation);
            run_until(worker, end).await
        })
    };
    let tasks =
        workers.into_iter().map(|worker| tokio::spawn(run_until(worker, end))).chain([newcomer]).collect();
    finish(tasks, book, end).await;
    service.stop().await;
}

/// Trains until the version `end` is there.
async fn run_until(mut worker: thalweg_sdk::Worker, end: u64) -> (Vec<f32>, Book) {
    let (mut book, mut parameters) = (Book::new(), Vec::new());
    while worker.round() <= end {
        parameters = training::round(&mut worker).await.expect("a round").1;
        note(&mut book, &worker);
    }
    (parameters, book)
}

/// Waits for workers that all end with version `end`, and replays what their ledgers say. Rounds that
/// nobody saw were empty ones.
async fn finish(tasks: Vec<tokio::task::JoinHandle<(Vec<f32>, Book)>>, mut book: Book, end: u64) {
    let mut all = Vec::new();
    for task in tasks {
        let (parameters, seen) = task.await.expect("a worker");
        for (at, counted) in seen {
            let known = book.entry(at).or_insert_with(|| counted.clone());
            assert_eq!(*known, counted, "two workers saw different ledgers of {at:?}");
        }
        all.push(parameters);
    }
    for at in (1..=end).flat_map(|round| (0..training::SHARDS).map(move |shard| (round, shard))) {
        book.entry(at).or_default();
    }
    let everybody: Vec<_> = (0..u32::try_from(all.len()).expect("few")).collect();
    assert_eq!(book[&(end, 0)], everybody, "in the end all count");
    let expected = training::replay(&sgd(), &book, end);
    for parameters in all {
        training::assert_same_bits(&parameters, &expected, "a replay of the ledgers");
    }
}

/// Runs rounds with all of `workers`, keeping the book. Stops early only by panicking.
async fn all_rounds(workers: &mut [thalweg_sdk::Worker], rounds: u64, book: &mut Book) {
    for _ in 0..rounds {
        let each = workers.iter_mut().map(training::round);
        futures::future::try_join_all(each).await.expect("a round of all");
        note(book, &workers[0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_starts_again_takes_its_rank_back_at_once() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("restart", sgd(), 2);
    let stable = |rank: u32| JoinOptions { worker_id: format!("host-{rank}"), ..training::options() };
    let joins = (0..2).map(|rank| service.client.join_with(job.clone(), rank, stable(rank)));
    let mut workers = futures::future::try_join_all(joins).await.expect("joined");
    let mut book = Book::new();
    all_rounds(&mut workers, 2, &mut book).await;
    let mut old = workers.remove(1);
    let begun = std::time::Instant::now();
    let end = 60;
    let again = {
        let (client, job) = (service.client.clone(), job.clone());
        tokio::spawn(async move {
            let worker = client.join_with(job, 1, stable(1)).await.expect("joined again");
            assert!(
                begun.elapsed() < Duration::from_secs(8),
                "it waited for the lease: {:?}",
                begun.elapsed()
            );
            run_until(worker, end).await
        })
    };
    let tasks =
        workers.into_iter().map(|worker| tokio::spawn(run_until(worker, end))).chain([again]).collect();
    finish(tasks, book, end).await;
    // The former life is told.
    let error = training::round(&mut old).await.expect_err("its rank is gone");
    assert_eq!(error.code(), Some(ErrorCode::LeaseLost), "{error}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_claimant_of_a_rank_is_told_who_holds_it() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("claimants", sgd(), 1);
    let mut holder = training::join(&service.client, &job, 0).await.expect("joined");
    let options = JoinOptions { rank_timeout: Duration::ZERO, ..training::options() };
    let error = service.client.join_with(job, 0, options).await.expect_err("taken");
    assert_eq!(error.code(), Some(ErrorCode::RankTaken), "{error}");
    training::round(&mut holder).await.expect("the holder goes on");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_deleted_and_created_again_under_load_starts_afresh() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("phoenix", sgd(), 2);
    let old = training::join_all(&service.client, &job, 2).await;
    let old_life = old[0].job().incarnation;
    let pushing: Vec<_> = old
        .into_iter()
        .map(|mut worker| {
            tokio::spawn(async move {
                loop {
                    if let Err(error) = training::round(&mut worker).await {
                        return error;
                    }
                }
            })
        })
        .collect();
    service.client.delete(&key("phoenix")).await.expect("deleted under load");
    let expected = training::replay(&sgd(), &training::full_book(2, 4), 4);
    for parameters in train(&service.client, "phoenix", sgd(), 2, 4).await {
        training::assert_same_bits(&parameters, &expected, "the new life");
    }
    for task in pushing {
        let error = task.await.expect("a worker of the old life");
        let told =
            matches!(error.code(), Some(ErrorCode::Gone | ErrorCode::LeaseLost | ErrorCode::UnknownJob));
        assert!(told, "{error}");
    }
    let (record, _) = service.client.job(&key("phoenix")).await.expect("the job");
    assert_ne!(record.incarnation, old_life);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tensors_in_split_form_arrive_in_any_order_and_a_wait_that_cannot_end_says_so() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("split", FunctionSpec::named("mean"), 1);
    let mut worker = training::join(&service.client, &job, 0).await.expect("joined");
    let flat = training::gradient(0, 1);
    let tensors = training::split(&flat);
    worker.push("d", tensors[3].1).await.expect("pushed");
    let mut values = vec![0.0; 300];
    // The last tensor shares its first shard with the one before.
    let error = worker.pull("d", &mut values).await.expect_err("cannot end");
    assert!(matches!(&error, Error::NeverEnds { missing, .. } if missing == "c"), "{error}");
    for index in [2, 1, 0] {
        worker.push(tensors[index].0, tensors[index].1).await.expect("pushed");
    }
    worker.pull("d", &mut values).await.expect("pulled");
    training::assert_same_bits(&values, tensors[3].1, "the mean of one is itself");
    let error = worker.pull("d", &mut values).await.expect_err("pulled twice");
    assert!(matches!(error, Error::AlreadyPulled(_)), "{error}");
    worker.finish().await.expect("complete");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_may_leave_and_come_back_later() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("pause", sgd(), 2);
    let mut book = Book::new();
    let mut workers = training::join_all(&service.client, &job, 2).await;
    all_rounds(&mut workers, 3, &mut book).await;
    // One has pushed all of round 4, the other a part, when both leave: some shards are ahead of others.
    for (index, tensors) in [(0, 4), (1, 1)] {
        let flat = training::gradient(index, 4);
        for (name, values) in training::split(&flat).into_iter().take(tensors) {
            workers[index as usize].push(name, values).await.expect("pushed");
        }
    }
    eventually("round 4 of the first shards", async || {
        workers[0].ledgers().iter().any(|(_, version, _)| *version == 4)
    })
    .await;
    note(&mut book, &workers[0]);
    for worker in workers {
        worker.leave().await.expect("left");
    }
    let end = 60;
    let tasks = (0..2).map(|rank| {
        let (client, job) = (service.client.clone(), job.clone());
        tokio::spawn(async move {
            let worker = training::join(&client, &job, rank).await.expect("joined");
            assert_eq!(worker.rank(), rank);
            run_until(worker, end).await
        })
    });
    finish(tasks.collect(), book, end).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn halves_are_pushed_and_pulled_and_a_round_half_pushed_is_not_void() {
    use half::{bf16, f16};
    let service = Embedded::start(|_| {}).await;
    let job =
        thalweg_sdk::Job::new("halves").expect("a name").tensor("a", [2]).tensor("b", [1]).function("sum");
    let mut worker = service.client.join(job, 0).await.expect("joined");
    worker.push("a", &[f16::from_f32(0.1), f16::MAX]).await.expect("pushed");
    // It says so at once, instead of waiting for an end that cannot come.
    let refused = tokio::time::timeout(Duration::from_secs(5), worker.skip()).await.expect("at once");
    assert!(matches!(refused, Err(Error::AlreadyPushed(tensor)) if tensor == "a"));
    worker.push("b", &[bf16::from_f32(1.0 / 3.0)]).await.expect("pushed");
    let (mut wide, mut narrow) = ([0.0_f32; 2], [f16::ZERO]);
    worker.pull("a", &mut wide).await.expect("pulled");
    worker.pull("b", &mut narrow).await.expect("pulled");
    assert_eq!(wide, [f16::from_f32(0.1).to_f32(), 65504.0], "a half is a float32 as it is");
    assert_eq!(narrow, [f16::from_f32(bf16::from_f32(1.0 / 3.0).to_f32())], "rounded once, on the way out");
    worker.leave().await.expect("left");
    service.stop().await;
}

//! Jobs that are paused, changed, snapshotted, restored and removed while workers train.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use thalweg_protocol::{ErrorCode, FunctionSpec, JobKey, JobState};
use thalweg_sdk::{
    EventKind, EventsOptions, JobCommand, OnLoss, RestoreOptions, Setting, SettingsChange, SnapshotOptions,
    Worker,
};
use thalweg_tests::{
    cluster::Cluster,
    embedded::Embedded,
    eventually,
    training::{self, full_book},
};

fn sgd(lr: f64) -> FunctionSpec {
    FunctionSpec::named("sgd").number("lr", lr).number("momentum", 0.9)
}

fn key(job: &str) -> JobKey {
    JobKey { tenant: "default".parse().expect("a name"), job: job.parse().expect("a name") }
}

/// One round of all workers; the parameters after it.
async fn all_round(workers: &mut [Worker]) -> (thalweg_sdk::Round, Vec<f32>) {
    let rounds = futures::future::try_join_all(workers.iter_mut().map(training::round)).await;
    rounds.expect("a round of all").swap_remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_job_waits_and_says_why_and_goes_on_with_the_same_bits() {
    let service = Embedded::start(|config| config.gateway.worker_lease_ms = 1000).await;
    let job = training::job("pausing", sgd(0.05), 2);
    let mut workers = training::join_all(&service.client, &job, 2).await;
    all_round(&mut workers).await;
    service.client.control(&key("pausing"), JobCommand::Pause("night".to_owned())).await.expect("paused");
    eventually("the workers to hear of it", async || {
        workers.iter().all(|worker| worker.paused().as_deref() == Some("night"))
    })
    .await;
    // Everything is pushed, and for longer than a lease nothing comes back.
    let mut rounds = Box::pin(all_round(&mut workers));
    let waited = tokio::time::timeout(Duration::from_millis(2500), &mut rounds).await;
    assert!(waited.is_err(), "a paused job closed a round");
    let progress = service.client.progress(&key("pausing")).await.expect("progress");
    assert_eq!((progress.min, progress.max), (1, 1));
    service.client.control(&key("pausing"), JobCommand::Resume).await.expect("resumed");
    let (round, flat) = rounds.await;
    assert_eq!(round.round, 2);
    training::assert_same_bits(&flat, &training::replay(&sgd(0.05), &full_book(2, 2), 2), "after a pause");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_job_frees_every_waiting_worker_with_the_reason() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("aborted", sgd(0.05), 3);
    let mut workers = training::join_all(&service.client, &job, 3).await;
    all_round(&mut workers).await;
    // Two of three wait for the third.
    let waiting: Vec<_> = workers
        .drain(..2)
        .map(|mut worker| tokio::spawn(async move { training::round(&mut worker).await.err() }))
        .collect();
    service
        .client
        .control(&key("aborted"), JobCommand::Abort("wrong data".to_owned()))
        .await
        .expect("aborted");
    for task in waiting {
        let error = task.await.expect("a worker").expect("the job is over");
        assert_eq!(error.code(), Some(ErrorCode::Aborted), "{error}");
        assert!(error.to_string().contains("wrong data"), "{error}");
    }
    let error = training::join(&service.client, &job, 0).await.expect_err("over");
    assert_eq!(error.code(), Some(ErrorCode::Aborted), "{error}");
    // Its parameters can still be had.
    let file = tempfile::NamedTempFile::new().expect("a file");
    let options = SnapshotOptions::default();
    let taken = service.client.snapshot(&key("aborted"), file.path(), &options, |_, _| {}).await;
    assert_eq!(taken.expect("a snapshot").version, 1);
    service.client.delete(&key("aborted")).await.expect("deleted");
    let error = service.client.job(&key("aborted")).await.expect_err("gone");
    assert_eq!(error.code(), Some(ErrorCode::UnknownJob), "{error}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_change_with_a_named_round_on_all_shards_and_no_earlier() {
    let service = Embedded::start(|config| config.autoscaler.policy.min_invokers = 3).await;
    let job = training::job("settings", sgd(0.05), 2);
    let mut workers = training::join_all(&service.client, &job, 2).await;
    let lr = |lr: f64, from_round| SettingsChange {
        from_round,
        settings: [("lr".to_owned(), Setting::Number(lr))].into(),
        ..SettingsChange::default()
    };
    let set = async |change| service.client.set_settings(&key("settings"), change).await;
    for _ in 0..2 {
        all_round(&mut workers).await;
    }
    let named = set(lr(0.5, Some(8))).await.expect("from round 8 on");
    assert_eq!((named.revision, named.from_round), (1, 8));
    let error = set(lr(0.5, Some(3))).await.expect_err("round 3 may have begun");
    assert_eq!(error.code(), Some(ErrorCode::InvalidSpec), "{error}");
    let error = set(lr(-1.0, None)).await.expect_err("no learning rate");
    assert!(error.to_string().contains("out of range"), "{error}");
    let mut revisions = vec![0, 0, 0];
    let mut parameters = Vec::new();
    let mut roster_changes = 0;
    for _ in 3..=9 {
        let (round, flat) = all_round(&mut workers).await;
        revisions.push(round.settings_revision);
        roster_changes += u32::from(round.roster_changed);
        parameters = flat;
    }
    assert_eq!(revisions, [0, 0, 0, 0, 0, 0, 0, 0, 1, 1], "by round");
    assert_eq!(roster_changes, 1, "the settings are fenced by a roster of their own");
    let next = set(lr(0.01, None)).await.expect("as soon as possible");
    assert_eq!((next.revision, next.from_round), (2, 11));
    for _ in 10..=12 {
        let (round, flat) = all_round(&mut workers).await;
        revisions.push(round.settings_revision);
        parameters = flat;
    }
    assert_eq!(revisions[10..], [1, 2, 2]);
    let function = |round| {
        sgd(if round < 8 {
            0.05
        } else if round < 11 {
            0.5
        } else {
            0.01
        })
    };
    let expected = training::replay_with(function, &full_book(2, 12), 12);
    training::assert_same_bits(&parameters, &expected, "with changed settings");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_taken_in_full_run_is_one_round_and_goes_on_with_the_same_bits() {
    let service = Embedded::start(|_| {}).await;
    let job = training::job("taken", sgd(0.05), 2);
    let workers = training::join_all(&service.client, &job, 2).await;
    let running: Vec<_> = workers
        .into_iter()
        .map(|mut worker| {
            tokio::spawn(async move {
                for _ in 0..150 {
                    training::round(&mut worker).await.expect("a round");
                }
                worker.leave().await.expect("left");
            })
        })
        .collect();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("taken.safetensors");
    eventually("some rounds", async || {
        service.client.progress(&key("taken")).await.is_ok_and(|progress| progress.min >= 20)
    })
    .await;
    let mut told = Vec::new();
    let options = SnapshotOptions::default();
    let name = key("taken");
    let snapshot = service.client.snapshot(&name, &file, &options, |done, all| told.push((done, all)));
    let taken = snapshot.await.expect("a snapshot");
    assert!(!running.iter().all(tokio::task::JoinHandle::is_finished), "it was taken after the fact");
    assert!(taken.version >= 20 && taken.version < 150, "{taken:?}");
    assert_eq!(told.last().map(|(done, all)| done == all), Some(true), "{told:?}");
    assert_eq!(std::fs::metadata(&file).expect("the file").len(), taken.bytes);
    for task in running {
        task.await.expect("a worker");
    }

    // Under another name it goes on where the snapshot was taken: momentum included.
    let options = RestoreOptions { key: Some(key("again")), ..RestoreOptions::default() };
    let record = service.client.restore(&file, options, |_, _| {}).await.expect("restored");
    assert_eq!(record.first_version(), taken.version);
    let job = training::job("again", sgd(0.05), 2);
    let mut workers = training::join_all(&service.client, &job, 2).await;
    let expected = training::replay(&sgd(0.05), &full_book(2, taken.version), taken.version);
    let parameters = workers[1].parameters().await.expect("parameters").concat();
    training::assert_same_bits(&parameters, &expected, "the snapshot");
    for more in 1..=3 {
        let (round, flat) = all_round(&mut workers).await;
        let rounds = taken.version + more;
        assert_eq!(round.round, rounds);
        let expected = training::replay(&sgd(0.05), &full_book(2, rounds), rounds);
        training::assert_same_bits(&flat, &expected, "after the snapshot");
    }

    // In place of the job whose workers are in it: they are told, and join again.
    let error =
        service.client.restore(&file, RestoreOptions::default(), |_, _| {}).await.expect_err("in use");
    assert_eq!(error.code(), Some(ErrorCode::SpecMismatch), "{error}");
    let replace = || RestoreOptions { key: Some(key("again")), replace: true, ..RestoreOptions::default() };
    service.client.restore(&file, replace(), |_, _| {}).await.expect("replaced");
    let error = training::round(&mut workers[0]).await.expect_err("that life is over");
    assert!(matches!(error.code(), Some(ErrorCode::Gone | ErrorCode::LeaseLost)), "{error}");
    let mut workers = training::join_all(&service.client, &job, 2).await;
    let (round, flat) = all_round(&mut workers).await;
    assert_eq!(round.round, taken.version + 1);
    let expected = training::replay(&sgd(0.05), &full_book(2, round.round), round.round);
    training::assert_same_bits(&flat, &expected, "replaced");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_starts_from_a_file_of_somebody_elses() {
    let service = Embedded::start(|_| {}).await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.safetensors");
    // bfloat16, in another order than the job's.
    let mut header = serde_json::json!({ "__metadata__": { "format": "pt" } });
    let mut data = Vec::new();
    for (name, elements) in training::TENSORS.iter().rev() {
        let start = data.len();
        data.extend((0..*elements).flat_map(|index| (0x3f80 + (index % 64) as u16).to_le_bytes()));
        header[*name] = serde_json::json!({
            "dtype": "BF16", "shape": [elements], "data_offsets": [start, data.len()]
        });
    }
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(&file, &bytes).expect("written");
    let job = training::job("seeded", sgd(0.05), 1);
    let options = RestoreOptions { job: Some(job.clone()), ..RestoreOptions::default() };
    let record = service.client.restore(&file, options, |_, _| {}).await.expect("seeded");
    assert_eq!((record.first_version(), &record.state), (0, &JobState::Running));
    let worker = training::join(&service.client, &job, 0).await.expect("joined");
    for ((name, elements), tensor) in
        training::TENSORS.iter().zip(worker.parameters().await.expect("parameters"))
    {
        let wide = |index: u64| f32::from_bits(u32::from(0x3f80 + (index % 64) as u16) << 16);
        let expected: Vec<_> = (0..*elements).map(wide).collect();
        training::assert_same_bits(&tensor, &expected, name);
    }

    let refused = async |bytes: &[u8], text: &str| {
        std::fs::write(&file, bytes).expect("written");
        let job = training::job("refused", sgd(0.05), 1);
        let options = RestoreOptions { job: Some(job), ..RestoreOptions::default() };
        let error = service.client.restore(&file, options, |_, _| {}).await.expect_err("refused").to_string();
        assert!(error.contains(text), "{error}");
    };
    refused(b"abc", "no safetensors file").await;
    refused(&bytes[..bytes.len() - 1], "cut off").await;
    refused(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat(), "no safetensors file").await;
    let renamed = String::from_utf8_lossy(&bytes[..8 + header.len()]).replace("\"d\"", "\"e\"").into_bytes();
    refused(&[&renamed, &data[..]].concat(), "no tensor \"d\"").await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_nobody_is_in_goes_after_its_time_to_live() {
    let service = Embedded::start(|config| config.gateway.worker_lease_ms = 1000).await;
    let job = training::job("abandoned", sgd(0.05), 1).time_to_live(Duration::from_millis(1500));
    let mut worker = training::join(&service.client, &job, 0).await.expect("joined");
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        training::round(&mut worker).await.expect("it lives as long as somebody is in it");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // It dies without a word: first its lease, then the job's time.
    drop(worker);
    eventually("the job to go", async || {
        matches!(service.client.job(&key("abandoned")).await, Err(error) if error.code() == Some(ErrorCode::UnknownJob))
    })
    .await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_is_told() {
    let service = Embedded::start(|_| {}).await;
    let mut follow = {
        let options = EventsOptions { job: Some(key("told")), follow: true, ..EventsOptions::default() };
        service.client.events(options).await.expect("events")
    };
    let job = training::job("told", sgd(0.05), 1);
    let mut worker = training::join(&service.client, &job, 0).await.expect("joined");
    training::round(&mut worker).await.expect("a round");
    service.client.control(&key("told"), JobCommand::Pause("night".to_owned())).await.expect("paused");
    service.client.control(&key("told"), JobCommand::Resume).await.expect("resumed");
    worker.leave().await.expect("left");
    service.client.control(&key("told"), JobCommand::Abort("enough".to_owned())).await.expect("aborted");
    service.client.delete(&key("told")).await.expect("deleted");
    let mut seen = Vec::new();
    loop {
        let event = tokio::time::timeout(Duration::from_secs(20), follow.next()).await;
        let event = event.unwrap_or_else(|_| panic!("only {seen:?}")).expect("no end").expect("an event");
        assert_eq!((event.tenant.as_str(), event.job.as_str()), ("default", "told"));
        let over = event.kind == EventKind::Deleted;
        seen.push(event.kind);
        if over {
            break;
        }
    }
    let position = |wanted: &dyn Fn(&EventKind) -> bool| seen.iter().position(wanted);
    // What follows each other faster than the gateway looks may be told as one.
    let order = [
        position(&|event| matches!(event, EventKind::Created { workers: 1, .. })),
        position(&|event| matches!(event, EventKind::Joined { rank: 0, .. })),
        position(&|event| matches!(event, EventKind::Left { rank: 0, .. })),
        position(&|event| matches!(event, EventKind::Failed { code: ErrorCode::Aborted, .. })),
        position(&|event| matches!(event, EventKind::Deleted)),
    ];
    assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{seen:?}");
    let last = EventsOptions { last: Some(1), ..EventsOptions::default() };
    let last: Vec<_> = service.client.events(last).await.expect("events").collect().await;
    assert_eq!(last.len(), 1);
    assert_eq!(last[0].as_ref().expect("an event").kind, EventKind::Deleted);
    service.stop().await;
}

/// A slab that is older than what the store has vouched for, as after a disk that lied: the job goes on from what is
/// left, by its policy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_lost_rounds_rolls_back_and_goes_on() {
    let cluster = Cluster::start(&["gateway.worker_lease_ms=1500"]);
    cluster.invoker("i0", "");
    let client = thalweg_sdk::Client::connect(cluster.url()).await.expect("connected");
    let job = training::job("lossy", sgd(0.05), 2).on_loss(OnLoss::RollBack);
    let joins = (0..2).map(|rank| training::join(&client, &job, rank));
    let mut workers = futures::future::try_join_all(joins).await.expect("all joined");
    for _ in 0..5 {
        all_round(&mut workers).await;
    }
    let life = workers[0].job().incarnation;
    let slab = cluster.directory().join("store").join(format!("{life}.slab"));
    let copy = cluster.directory().join("copy");
    // Nobody writes: all have the results of round 5, and nobody begins round 6.
    std::fs::copy(&slab, &copy).expect("a copy of the slab");
    for _ in 0..5 {
        all_round(&mut workers).await;
    }
    // In order, so that the index vouches for all ten rounds.
    cluster.stop("store");
    std::fs::copy(&copy, &slab).expect("the older slab in its place");
    cluster.restart_store("");
    let told = futures::future::join_all(workers.iter_mut().map(training::round)).await;
    for result in told {
        let error = result.expect_err("rounds were lost");
        let codes = [ErrorCode::Diverged, ErrorCode::JobFailed, ErrorCode::Gone, ErrorCode::LeaseLost];
        assert!(error.code().is_some_and(|code| codes.contains(&code)), "{error}");
    }
    drop(workers);
    // Whoever comes first trains alone until the other counts, so who was counted has to be looked up; and it trains on
    // until the other is there.
    let joined = Arc::new(AtomicUsize::new(0));
    let tasks = (0..2).map(|rank| {
        let (client, job, joined) = (client.clone(), job.clone(), joined.clone());
        tokio::spawn(async move {
            let mut worker = training::join(&client, &job, rank).await.expect("joined the next life");
            assert_ne!(worker.job().incarnation, life);
            assert_eq!(worker.job().first_version(), 5);
            joined.fetch_add(1, Ordering::Relaxed);
            let (mut book, mut last, mut parameters) = (training::Book::new(), 0, Vec::new());
            let mut together = 0;
            while together < 20 {
                last = worker.round();
                parameters = training::round(&mut worker).await.expect("a round").1;
                let ledgers = worker.ledgers().into_iter();
                book.extend(ledgers.map(|(shard, version, counted)| ((version, shard as usize), counted)));
                together += usize::from(joined.load(Ordering::Relaxed) == 2);
            }
            worker.leave().await.expect("left");
            (book, last, parameters)
        })
    });
    let mut book = full_book(2, 5);
    let mut results = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        let (more, last, parameters) = task.await.expect("a worker");
        book.extend(more);
        results.push((last, parameters));
    }
    for (last, parameters) in results {
        let expected = training::replay(&sgd(0.05), &book, last);
        training::assert_same_bits(&parameters, &expected, "after the roll-back");
    }
    let slabs = std::fs::read_dir(cluster.directory().join("store")).expect("the store's directory");
    let slabs = slabs.flatten().filter(|entry| entry.path().extension().is_some_and(|end| end == "slab"));
    assert_eq!(slabs.count(), 1, "the lost life has left nothing behind");
}

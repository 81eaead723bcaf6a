//! Holds, and jobs that do not begin at version 0.

use thalweg_protocol::{Durability, ErrorCode, Incarnation, Init, StoreJob, limits};

use super::{Subject, advance, bytes, created, done, fetch, head, job, refused, round};

/// Uploads with optimizer slots, and first versions other than 0.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn first_versions(store: &Subject, level: Durability) {
    let job = StoreJob { first_version: 41, ..job(level, Init::Upload) };
    let (id, upload) = (job.incarnation, Incarnation::random());
    done(store.create(job.clone()).await, "create registers a job");
    for shard in 0..3 {
        let whole = job.state_bytes(shard);
        refused(
            store.upload(id, upload, shard, bytes(whole - 4, 1)).await,
            ErrorCode::WrongShape,
            "any other length",
        );
        done(store.upload(id, upload, shard, bytes(whole, u64::from(shard))).await, "parameters and slots");
    }
    done(store.activate(id, upload).await, "activation of a complete upload");
    for shard in 0..3 {
        let state = fetch(store, &job, shard).await;
        assert_eq!(state.head.version, 41, "the upload becomes the first version");
        assert_eq!(state.values, bytes(job.state_bytes(shard), u64::from(shard)), "with its slots");
    }
    assert_eq!(done(store.fence(id, 1, 42).await, "fence"), 41, "the highest version of any shard");
    let hold = Incarnation::random();
    assert_eq!(done(store.hold(id, hold).await, "hold"), (41, true), "the first version can be held");
    let (mut commit, state) = round(&job, 0, head(store, &job, 0).await, 1);
    commit.ledger.round = 1;
    let outcome = done(store.commit(commit, state).await, "commit of another round");
    assert!(
        matches!(outcome, thalweg_protocol::CommitOutcome::Conflict(_)),
        "round 1 is long over: {outcome:?}"
    );
    let next = advance(store, &job, 0, 3).await;
    assert_eq!(next.head.version, 42, "rounds go on after the first version");
    let held = done(store.fetch_held(id, hold, 0, true).await, "fetch_held");
    assert_eq!(held.values, bytes(job.state_bytes(0), 0), "a hold keeps what was");
}

/// `hold`, `fetch_held` and `release`.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn holds(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let (id, hold) = (job.incarnation, Incarnation::random());
    let zeros = fetch(store, &job, 2).await;
    assert_eq!(done(store.hold(id, hold).await, "hold"), (0, true), "version 0 from zeros can be held");
    advance(store, &job, 2, 1).await;
    assert_eq!(done(store.fetch_held(id, hold, 2, true).await, "fetch_held"), zeros, "as it was");
    done(store.release(id, hold).await, "release");
    done(store.release(id, hold).await, "a hold that is not there: nothing happens");
    refused(store.fetch_held(id, hold, 2, true).await, ErrorCode::Expired, "fetch_held after release");

    // Shard 2 is ahead of the others: its version is held.
    assert_eq!(done(store.hold(id, hold).await, "hold"), (1, false), "the newest of any shard");
    refused(store.fetch_held(id, hold, 0, false).await, ErrorCode::NotReady, "a shard that is not there yet");
    let mut expected = vec![advance(store, &job, 0, 2).await, advance(store, &job, 1, 3).await];
    expected.push(fetch(store, &job, 2).await);
    // Many rounds later, by several times the number of slots.
    for seed in 0..20 {
        for shard in 0..3 {
            advance(store, &job, shard, 100 + seed).await;
        }
    }
    assert_eq!(done(store.hold(id, hold).await, "hold again"), (1, true), "the same version");
    for (shard, expected) in (0..).zip(&expected) {
        let held = done(store.fetch_held(id, hold, shard, true).await, "fetch_held");
        assert_eq!(held, *expected, "shard {shard} at the version of the hold");
        let parameters = done(store.fetch_held(id, hold, shard, false).await, "fetch_held");
        assert_eq!(parameters.values, expected.values.slice(..job.parameter_bytes(shard)), "without slots");
    }
    for _ in 1..limits::MAX_HOLDS {
        done(store.hold(id, Incarnation::random()).await, "several holds at once");
    }
    refused(store.hold(id, Incarnation::random()).await, ErrorCode::Limit, "too many at once");
    refused(store.hold(Incarnation::random(), hold).await, ErrorCode::Gone, "hold of an unknown job");
    done(store.release(Incarnation::random(), hold).await, "release of an unknown job: nothing happens");
    done(store.delete(id).await, "delete forgets a job with its holds");
    refused(store.fetch_held(id, hold, 0, true).await, ErrorCode::Gone, "fetch_held after delete");
}

/// Holds taken while commits run: every shard comes to the version of the hold, with the bytes committed then.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn hold_races(store: &Subject, level: Durability) {
    const ROUNDS: u64 = 40;
    let job = created(store, level, Init::Zeros).await;
    let committers: Vec<_> = (0..3)
        .map(|shard| {
            let (store, job) = (store.clone(), job.clone());
            tokio::spawn(async move {
                let mut history = Vec::new();
                for seed in 0..ROUNDS {
                    history.push(advance(&store, &job, shard, seed).await.values);
                }
                history
            })
        })
        .collect();
    let mut held = Vec::new();
    while !committers.iter().all(tokio::task::JoinHandle::is_finished) {
        let hold = Incarnation::random();
        let (version, _) = done(store.hold(job.incarnation, hold).await, "hold under load");
        let mut states = Vec::new();
        for shard in 0..3 {
            // The shards run on their own here, so one may be far behind.
            states.push(loop {
                match store.fetch_held(job.incarnation, hold, shard, true).await {
                    Ok(state) => break state,
                    Err(error) if error.code() == ErrorCode::NotReady => tokio::task::yield_now().await,
                    Err(error) => panic!("fetch_held of shard {shard}: {error}"),
                }
            });
        }
        done(store.release(job.incarnation, hold).await, "release");
        held.push((version, states));
    }
    let mut histories = Vec::new();
    for committer in committers {
        histories.push(committer.await.unwrap_or_else(|error| panic!("{error}")));
    }
    for (version, states) in held {
        for (state, history) in states.iter().zip(&histories) {
            assert_eq!(state.head.version, version, "all shards at one version");
            if version > 0 {
                assert_eq!(state.values, history[version as usize - 1], "the bytes of that version");
            }
        }
    }
}

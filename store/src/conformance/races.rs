//! Checks of calls that race each other.

use futures::future::join_all;
use thalweg_protocol::{CommitOutcome, Durability, Init, Layout, StoreJob, Version};

use super::{Subject, created, done, fetch, head, job, round};
use crate::ShardState;

/// Of many commits on one head exactly one succeeds.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn races(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    for turn in 0..8_u64 {
        let expect = head(store, &job, 0).await;
        // Two of each, so that the winner's twin finds its own commit.
        let runs = (0..12_u64).map(|task| {
            let (store, (commit, state)) = (store.clone(), round(&job, 0, expect, turn * 100 + task / 2 + 1));
            tokio::spawn(async move { (store.commit(commit.clone(), state.clone()).await, commit, state) })
        });
        let mut winners = Vec::new();
        let (mut already, mut conflicts) = (Vec::new(), Vec::new());
        for run in join_all(runs).await {
            let (outcome, commit, state) = run.unwrap_or_else(|error| panic!("{error}"));
            match done(outcome, "a race") {
                CommitOutcome::Committed(head) => {
                    winners.push(ShardState { head, ledger: commit.ledger, values: state });
                }
                CommitOutcome::AlreadyCommitted(head) => already.push(head),
                CommitOutcome::Conflict(head) => conflicts.push(head),
                other @ CommitOutcome::StaleRoster { .. } => panic!("no fence is set: {other:?}"),
            }
        }
        assert_eq!(winners.len(), 1, "exactly one of the racing commits succeeds");
        assert_eq!((already.len(), conflicts.len()), (1, 10), "its twin finds it, all others lose");
        assert!(
            already.iter().chain(&conflicts).all(|head| *head == winners[0].head),
            "losers see the winner"
        );
        assert_eq!(fetch(store, &job, 0).await, winners[0], "the winner's state is the shard's");
    }
}

/// No commit by an older roster slips past a fence that has answered.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn fence_races(store: &Subject, level: Durability) {
    // Shards large enough that a commit takes a while.
    let layout = Layout { elements: 4 * 32_768, shard_elements: 32_768 };
    let job = StoreJob { layout, slots: 0, ..job(level, Init::Zeros) };
    done(store.create(job.clone()).await, "create");
    for epoch in 1..=12 {
        let runs: Vec<_> = (0..4)
            .map(|shard| {
                let (store, job) = (store.clone(), job.clone());
                tokio::spawn(async move {
                    let mut expect = head(&store, &job, shard).await;
                    loop {
                        let (mut commit, state) = round(&job, shard, expect, epoch);
                        commit.ledger.roster_epoch = epoch;
                        match done(store.commit(commit, state).await, "commit") {
                            CommitOutcome::Committed(head) => expect = head,
                            CommitOutcome::StaleRoster { .. } => return expect.version,
                            other => panic!("nobody else commits this shard: {other:?}"),
                        }
                    }
                })
            })
            .collect();
        let begun: Version = head(store, &job, 0).await.version;
        while head(store, &job, 0).await.version < begun + 1 + epoch % 3 {
            tokio::task::yield_now().await;
        }
        let highest = done(store.fence(job.incarnation, epoch + 1, 1).await, "fence");
        for version in join_all(runs).await {
            let version = version.unwrap_or_else(|error| panic!("{error}"));
            assert!(
                version <= highest,
                "fence returned {highest} as the highest version of any shard at that moment, yet roster {epoch} \
                 closed round {version} afterwards"
            );
        }
    }
}

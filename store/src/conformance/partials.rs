//! Open rounds: partial commits (rule P12).

use thalweg_protocol::{
    CommitOutcome, Durability, ErrorCode, Head, Init, Partial, PartialCommit, ShardIndex, StoreJob, limits,
};

use super::{Subject, bytes, committed, created, done, fetch, head, refused, round};

/// A partial commit on `expect` of the ranks before `ranks`, and its fold.
#[must_use]
pub fn partial(job: &StoreJob, shard: ShardIndex, expect: Head, ranks: u32) -> (PartialCommit, bytes::Bytes) {
    let (commit, _) = round(job, shard, expect, 0);
    let mut partial = Partial { ledger: commit.ledger, first: 1000, since: 1 };
    partial.ledger.counted = (0..ranks).collect();
    partial.ledger.order = (0..ranks).rev().collect();
    let fold = bytes(job.parameter_bytes(shard) + 24, u64::from(ranks) << 8 | expect.version << 16);
    (PartialCommit { job: job.incarnation, shard, expect, partial }, fold)
}

/// `commit_partial`, `fetch_partial` and `open_rounds`; what they change of `fetch_head`, `commit` and `fence`.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn partials(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let id = job.incarnation;
    for shard in [0, 2] {
        partial_of(store, &job, shard).await;
    }
    refused(store.fetch_partial(id, 3).await, ErrorCode::WrongShape, "a shard that is not there");
    let (mut commit, fold) = partial(&job, 2, head(store, &job, 2).await, 1);
    let longest = job.parameter_bytes(2) + limits::PARTIAL_OVERHEAD_BYTES;
    let long = store.commit_partial(commit.clone(), bytes(longest + 1, 1)).await;
    refused(long, ErrorCode::WrongShape, "a fold that is too long");
    commit.partial.ledger.counted.insert(job.max_members);
    refused(store.commit_partial(commit, fold).await, ErrorCode::Limit, "a rank beyond max_members");
    fenced(store, &job).await;

    // Shards 0 and 2 are open in this job, and one shard of another.
    let other = created(store, level, Init::Zeros).await;
    for (job, shard) in [(&job, 0), (&job, 2), (&other, 1)] {
        let standing = done(store.fetch_head(job.incarnation, shard).await, "fetch_head");
        let (mut commit, fold) = partial(job, shard, standing.head, 2);
        (commit.partial.ledger.roster_epoch, commit.partial.since) = (9, 9);
        committed(store.commit_partial(commit, fold).await, "expected head in place");
    }
    let mut wanted = vec![(id, 0), (id, 2), (other.incarnation, 1)];
    wanted.sort_unstable();
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = done(store.open_rounds(after, 1).await, "open_rounds");
        let Some(open) = page.first() else { break };
        assert_eq!(page.len(), 1, "at most as many as asked for");
        after = Some((open.job, open.shard));
        if wanted.contains(&(open.job, open.shard)) {
            assert_eq!((open.counted, open.first, open.roster_epoch), (2, 1000, 9), "as it was committed");
            found.push((open.job, open.shard));
        }
    }
    assert_eq!(found, wanted, "in the order of job and shard");
    done(store.delete(id).await, "delete");
    refused(store.fetch_partial(id, 0).await, ErrorCode::Gone, "deletion takes the open rounds along");
    done(store.create(job.clone()).await, "create");
    let none = done(store.fetch_partial(id, 0).await, "fetch_partial");
    assert_eq!(none, None, "nothing of them is left");
}

async fn partial_of(store: &Subject, job: &StoreJob, shard: ShardIndex) {
    let id = job.incarnation;
    let zeros = fetch(store, job, shard).await;
    let before = done(store.fetch_head(id, shard).await, "fetch_head");
    assert_eq!((before.head, &before.partial), (zeros.head, &None), "nothing was folded yet");
    assert_eq!(done(store.fetch_partial(id, shard).await, "fetch_partial"), None, "nothing was folded yet");

    let (first, fold) = partial(job, shard, zeros.head, 1);
    let stands = committed(store.commit_partial(first.clone(), fold.clone()).await, "expected head in place");
    assert_eq!(stands, zeros.head.folded_on(), "the fold count advances, the version does not");
    let again = done(store.commit_partial(first.clone(), fold.clone()).await, "the very commit again");
    assert_eq!(again, CommitOutcome::AlreadyCommitted(stands), "the very commit is in place");
    let other = partial(job, shard, zeros.head, 2);
    let outcome = done(store.commit_partial(other.0, other.1).await, "a commit on another fold count");
    assert_eq!(outcome, CommitOutcome::Conflict(stands), "somebody else was there before");
    let standing = done(store.fetch_head(id, shard).await, "fetch_head");
    assert_eq!((standing.head, standing.partial), (stands, Some(first.partial.clone())), "who is in it");
    assert_eq!(fetch(store, job, shard).await, zeros, "the state is what it was");
    assert_eq!(head(store, job, shard).await, zeros.head, "for others the open round does not exist");

    // More than there are slots.
    let mut stands = stands;
    for ranks in 2..=5 {
        let (next, fold) = partial(job, shard, stands, ranks);
        stands = committed(store.commit_partial(next.clone(), fold.clone()).await, "expected head in place");
        let found = done(store.fetch_partial(id, shard).await, "fetch_partial");
        assert_eq!(found, Some((stands, next.partial, fold)), "head, ledger and fold belong together");
    }
    let (closing, state) = round(job, shard, zeros.head, 7);
    let outcome =
        done(store.commit(closing.clone(), state.clone()).await, "a commit that knows of no partial one");
    assert_eq!(outcome, CommitOutcome::Conflict(stands), "what was folded must not be left out");
    let closing = thalweg_protocol::Commit { expect: stands, ..closing };
    let closed = committed(store.commit(closing.clone(), state.clone()).await, "expected head in place");
    assert_eq!((closed.version, closed.fold_count), (stands.version + 1, 0), "the round is closed");
    let again = done(store.commit(closing, state).await, "the very commit again");
    assert_eq!(again, CommitOutcome::AlreadyCommitted(closed), "the very commit is the current state");
    assert_eq!(
        done(store.fetch_partial(id, shard).await, "fetch_partial"),
        None,
        "its partial commits are over"
    );
    let standing = done(store.fetch_head(id, shard).await, "fetch_head");
    assert_eq!((standing.head, standing.partial), (closed, None), "the next round has nothing yet");
}

/// What was folded by an older roster does not count behind a fence.
async fn fenced(store: &Subject, job: &StoreJob) {
    let id = job.incarnation;
    let (shard, before) = (1, head(store, job, 1).await);
    let (commit, fold) = partial(job, shard, before, 2);
    let stands = committed(store.commit_partial(commit, fold).await, "expected head in place");
    done(store.fence(id, 9, before.version + 2).await, "a fence on a later round");
    let standing = done(store.fetch_head(id, shard).await, "fetch_head");
    assert_eq!(standing.head, stands, "the open round is none of its business");
    done(store.fence(id, 9, before.version + 1).await, "a fence on the open round");
    let standing = done(store.fetch_head(id, shard).await, "fetch_head");
    assert_eq!((standing.head, standing.partial), (before, None), "the open round begins anew");
    let (mut commit, fold) = partial(job, shard, before, 3);
    let outcome = done(store.commit_partial(commit.clone(), fold.clone()).await, "by an old roster");
    assert_eq!(outcome, CommitOutcome::StaleRoster { needed: 9 }, "a fence asks for a newer roster");
    commit.partial.ledger.roster_epoch = 9;
    let outcome =
        done(store.commit_partial(commit.clone(), fold.clone()).await, "with somebody of an old roster");
    assert_eq!(outcome, CommitOutcome::StaleRoster { needed: 9 }, "a fence asks for a newer roster");
    commit.partial.since = 9;
    let stands = committed(store.commit_partial(commit, fold).await, "by the new roster");
    let (mut closing, state) = round(job, shard, stands, 3);
    closing.ledger.roster_epoch = 9;
    committed(store.commit(closing, state).await, "by the new roster");
}

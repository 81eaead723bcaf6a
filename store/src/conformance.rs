//! One suite for every backend: each check holds a store to lines of the contract in [`ShardStore`] and
//! panics with the line that it breaks. Checks make jobs of their own, so one store serves them all.

mod holds;
mod partials;
mod races;

use std::sync::Arc;

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use thalweg_protocol::{
    Commit, CommitOutcome, Durability, ErrorCode, Head, Incarnation, Init, JobKey, Layout, Ledger, Name,
    ShardIndex, StoreJob,
};

use crate::{ShardState, ShardStore, Standing, StoreError};
pub use holds::{first_versions, hold_races, holds};
pub use partials::{partial, partials};
pub use races::{fence_races, races};

/// A store under test.
pub type Subject = Arc<dyn ShardStore>;

/// Runs every check at both levels. The flush cycles of the store must run by themselves.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn suite(store: &Subject) {
    for level in [Durability::Process, Durability::Disk] {
        creation(store, level).await;
        uploads(store, level).await;
        replaced_uploads(store, level).await;
        heads(store, level).await;
        fetches(store, level).await;
        commits(store, level).await;
        conflicts(store, level).await;
        shapes(store, level).await;
        fences(store, level).await;
        deletion(store, level).await;
        independence(store, level).await;
        first_versions(store, level).await;
        holds(store, level).await;
        Box::pin(partials(store, level)).await;
        Box::pin(hold_races(store, level)).await;
        races(store, level).await;
        Box::pin(fence_races(store, level)).await;
    }
    unknown_jobs(store).await;
}

/// A job of three shards (64, 64 and 22 elements) with one slot beside the parameters.
#[must_use]
pub fn job(durability: Durability, init: Init) -> StoreJob {
    let name = |text: &str| Name::new(text).unwrap_or_else(|error| panic!("{error}"));
    StoreJob {
        key: JobKey { tenant: name("conformance"), job: name("job") },
        incarnation: Incarnation::random(),
        layout: Layout { elements: 150, shard_elements: 64 },
        slots: 1,
        durability,
        max_members: 64,
        init,
        first_version: 0,
    }
}

/// `len` bytes that only `seed` decides.
#[must_use]
pub fn bytes(len: usize, seed: u64) -> Bytes {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill(bytes.as_mut_slice());
    bytes.into()
}

/// A commit of the round after `expect`, closed by roster 1, with bytes that `seed` decides.
#[must_use]
pub fn round(job: &StoreJob, shard: ShardIndex, expect: Head, seed: u64) -> (Commit, Bytes) {
    let counted = (0..job.max_members.min(64)).filter(|rank| (seed >> rank) & 1 == 1).collect();
    let ledger = Ledger { round: expect.version + 1, roster_epoch: 1, counted, ..Ledger::default() };
    let commit = Commit { job: job.incarnation, shard, expect, ledger, function: [7; 16] };
    (commit, bytes(job.state_bytes(shard), seed ^ (expect.version << 32)))
}

/// The head of one shard.
///
/// # Panics
/// When the store does not tell.
pub async fn head(store: &Subject, job: &StoreJob, shard: ShardIndex) -> Head {
    let heads = store.heads(job.incarnation, shard, 1).await;
    heads.unwrap_or_else(|error| panic!("heads of shard {shard}: {error}"))[0]
}

/// Commits one more round of a shard and returns the state that the shard must have now.
///
/// # Panics
/// When the commit does not succeed.
pub async fn advance(store: &Subject, job: &StoreJob, shard: ShardIndex, seed: u64) -> ShardState {
    let (commit, state) = round(job, shard, head(store, job, shard).await, seed);
    let next = committed(store.commit(commit.clone(), state.clone()).await, "expected head in place");
    ShardState { head: next, ledger: commit.ledger, values: state }
}

#[track_caller]
fn committed(outcome: Result<CommitOutcome, StoreError>, behavior: &str) -> Head {
    match outcome {
        Ok(CommitOutcome::Committed(head)) => head,
        other => panic!("{behavior}: Committed, not {other:?}"),
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, StoreError>, code: ErrorCode, behavior: &str) {
    match result {
        Err(error) if error.code() == code => {}
        other => panic!("{behavior}: refused with {code}, not {other:?}"),
    }
}

#[track_caller]
fn done<T>(result: Result<T, StoreError>, behavior: &str) -> T {
    result.unwrap_or_else(|error| panic!("{behavior}: {error}"))
}

async fn fetch(store: &Subject, job: &StoreJob, shard: ShardIndex) -> ShardState {
    done(store.fetch(job.incarnation, shard, true).await, "fetch reads a shard")
}

async fn created(store: &Subject, level: Durability, init: Init) -> StoreJob {
    let job = job(level, init);
    done(store.create(job.clone()).await, "create registers a job");
    job
}

/// `create`: version 0 from zeros, idempotent, another description refused.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn creation(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let state = fetch(store, &job, 1).await;
    assert_eq!((state.head.version, &state.ledger), (0, &Ledger::default()), "all shards exist at version 0");
    assert!(state.values.iter().all(|&byte| byte == 0) && state.values.len() == 512, "zeros");
    let other = fetch(store, &job, 0).await;
    assert_ne!(other.head.state_id, state.head.state_id, "state ids name the shard");

    let state = advance(store, &job, 1, 3).await;
    done(store.create(job.clone()).await, "known incarnation with the same description: nothing happens");
    assert_eq!(fetch(store, &job, 1).await, state, "creation again changes nothing");
    for other in [
        StoreJob { slots: 2, ..job.clone() },
        StoreJob { init: Init::Upload, ..job.clone() },
        StoreJob { layout: Layout { elements: 151, ..job.layout }, ..job.clone() },
    ] {
        let behavior = "known incarnation with another description";
        refused(store.create(other).await, ErrorCode::SpecMismatch, behavior);
    }
    assert_eq!(fetch(store, &job, 1).await, state, "a refused creation changes nothing");
}

/// `upload` and `activate`: partial, complete, again, another upload.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn uploads(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Upload).await;
    let id = job.incarnation;
    let (upload, other) = (Incarnation::random(), Incarnation::random());
    for (first, count) in [(0, 3), (3, 1), (0, 0)] {
        refused(store.heads(id, first, count).await, ErrorCode::NotReady, "heads before activation");
    }
    refused(store.fetch_head(id, 0).await, ErrorCode::NotReady, "fetch_head before activation");
    refused(store.fetch(id, 0, true).await, ErrorCode::NotReady, "fetch before activation");
    let (commit, state) = round(&job, 0, Head::initial(upload.0, 0, 0), 1);
    refused(store.commit(commit, state).await, ErrorCode::NotReady, "commit before activation");
    refused(store.activate(id, upload).await, ErrorCode::NotReady, "some shard missing");
    for shard in 0..2 {
        done(store.upload(id, upload, shard, bytes(256, u64::from(shard))).await, "upload");
    }
    refused(store.activate(id, upload).await, ErrorCode::NotReady, "some shard missing");
    refused(store.heads(id, 0, 3).await, ErrorCode::NotReady, "heads before activation");
    let behavior = "wrong length";
    refused(store.upload(id, upload, 2, bytes(256, 2)).await, ErrorCode::WrongShape, behavior);
    refused(
        store.upload(id, upload, 3, bytes(88, 2)).await,
        ErrorCode::WrongShape,
        "a shard that is not there",
    );
    done(store.upload(id, upload, 2, bytes(88, 2)).await, "the last, short shard");
    refused(store.activate(id, other).await, ErrorCode::NotReady, "an upload of which nothing is there");

    done(store.activate(id, upload).await, "all shards uploaded");
    let before = fetch(store, &job, 2).await;
    assert_eq!(before.head.version, 0, "the job has version 0 from now on");
    assert_eq!(before.values[..88], bytes(88, 2)[..], "the parameters are those uploaded");
    assert!(before.values.len() == 176 && before.values[88..].iter().all(|&b| b == 0), "slots start at zero");
    done(store.activate(id, upload).await, "the same upload again: nothing happens");
    done(
        store.upload(id, upload, 2, bytes(88, 9)).await,
        "after activation of the same upload: nothing happens",
    );
    assert_eq!(fetch(store, &job, 2).await, before, "an upload after activation changes nothing");
    let behavior = "after activation of another upload";
    refused(store.upload(id, other, 2, bytes(88, 9)).await, ErrorCode::SpecMismatch, behavior);
    refused(store.activate(id, other).await, ErrorCode::SpecMismatch, "another upload active");

    let state = advance(store, &job, 2, 5).await;
    done(store.activate(id, upload).await, "the same upload again: nothing happens");
    assert_eq!(fetch(store, &job, 2).await, state, "activation again does not undo a round");

    let zeros = created(store, level, Init::Zeros).await;
    let behavior = "upload for a job that starts from zeros";
    refused(
        store.upload(zeros.incarnation, upload, 0, bytes(256, 0)).await,
        ErrorCode::SpecMismatch,
        behavior,
    );
    refused(store.activate(zeros.incarnation, upload).await, ErrorCode::SpecMismatch, behavior);
}

/// `upload`: what is not activated is replaced.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn replaced_uploads(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Upload).await;
    let id = job.incarnation;
    let (first, second) = (Incarnation::random(), Incarnation::random());
    for shard in 0..3 {
        let parameters = bytes(job.parameter_bytes(shard), 1);
        done(store.upload(id, first, shard, parameters).await, "upload");
    }
    done(store.upload(id, second, 1, bytes(256, 2)).await, "another upload of the same shard");
    let behavior = "another upload of a shard replaces it: the first is no longer complete";
    refused(store.activate(id, first).await, ErrorCode::NotReady, behavior);
    refused(store.activate(id, second).await, ErrorCode::NotReady, "the second is not complete either");
    for shard in [0, 2] {
        let parameters = bytes(job.parameter_bytes(shard), 2);
        done(store.upload(id, second, shard, parameters).await, "another upload of the same shard");
    }
    done(store.upload(id, second, 1, bytes(256, 3)).await, "the same shard of the same upload again");
    done(store.activate(id, second).await, "all shards uploaded");
    assert_eq!(fetch(store, &job, 0).await.values[..256], bytes(256, 2)[..], "the replacement counts");
    assert_eq!(fetch(store, &job, 1).await.values[..256], bytes(256, 3)[..], "the last replacement counts");
    refused(store.activate(id, first).await, ErrorCode::SpecMismatch, "another upload active");
}

/// `heads`: ranges, cut at the end of the job.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn heads(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let last = advance(store, &job, 2, 1).await;
    let all = done(store.heads(job.incarnation, 0, 3).await, "heads");
    assert_eq!(
        all.iter().map(|head| head.version).collect::<Vec<_>>(),
        [0, 0, 1],
        "one head a shard, in order"
    );
    for (first, count, wanted) in
        [(1, 1, &all[1..2]), (1, 100, &all[1..]), (2, u32::MAX, &[last.head]), (3, 5, &[])]
    {
        let heads = done(store.heads(job.incarnation, first, count).await, "heads");
        assert_eq!(heads, wanted, "{count} heads from {first} on, fewer at the end of the job");
    }
}

/// `fetch`: with and without slots; a shard that is not there.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn fetches(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    for (shard, len) in [(0, 256), (2, 88)] {
        let state = advance(store, &job, shard, 11).await;
        assert_eq!(fetch(store, &job, shard).await, state, "head, ledger and values belong together");
        let parameters = done(store.fetch(job.incarnation, shard, false).await, "fetch without slots");
        let wanted = ShardState { values: state.values.slice(..len), ..state };
        let found = done(store.fetch_head(job.incarnation, shard).await, "fetch_head");
        let standing = Standing { head: wanted.head, ledger: wanted.ledger.clone(), partial: None };
        assert_eq!(found, standing, "fetch_head tells what fetch does");
        assert_eq!(parameters, wanted, "parameters come first, slots only when asked for");
    }
    let behavior = "a shard that is not there";
    refused(store.fetch(job.incarnation, 3, true).await, ErrorCode::WrongShape, behavior);
    refused(store.fetch_head(job.incarnation, 3).await, ErrorCode::WrongShape, behavior);
}

/// `commit`: committed, and the same again.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn commits(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let mut before = head(store, &job, 2).await;
    // More rounds than a shard has slots, so that every slot is used again.
    for seed in 1..=12 {
        let (commit, state) = round(&job, 2, before, seed);
        let next = committed(store.commit(commit.clone(), state.clone()).await, "expected head in place");
        let checksum = thalweg_protocol::checksum(&[&state]);
        assert_eq!(next, before.next(&commit.ledger, commit.function, checksum), "heads follow rule P5");
        let again = done(store.commit(commit.clone(), state.clone()).await, "the very commit again");
        assert_eq!(again, CommitOutcome::AlreadyCommitted(next), "the very commit is the current state");
        let wanted = ShardState { head: next, ledger: commit.ledger, values: state };
        assert_eq!(fetch(store, &job, 2).await, wanted, "a commit replaces head, ledger and values");
        before = next;
    }
    assert_eq!(head(store, &job, 0).await.version, 0, "other shards stay where they are");
}

/// `commit`: what stands elsewhere stays there.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn conflicts(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let zero = head(store, &job, 0).await;
    let (old, old_state) = round(&job, 0, zero, 1);
    committed(store.commit(old.clone(), old_state.clone()).await, "expected head in place");
    let current = advance(store, &job, 0, 2).await;
    let (good, state) = round(&job, 0, current.head, 3);
    let changed = |change: &dyn Fn(&mut Commit)| {
        let mut commit = good.clone();
        change(&mut commit);
        commit
    };
    let elsewhere = Head::initial([9; 16], 0, 0).state_id;
    for (what, commit, state) in [
        ("a round that is not the newest again", old.clone(), old_state),
        ("another ledger for an old round", round(&job, 0, zero, 9).0, state.clone()),
        ("a skipped round", changed(&|commit| commit.ledger.round += 1), state.clone()),
        ("the same round twice", changed(&|commit| commit.ledger.round -= 1), state.clone()),
        ("a version ahead", changed(&|commit| commit.expect.version += 1), state.clone()),
        ("another history", changed(&|commit| commit.expect.state_id = elsewhere), state.clone()),
        ("another fold count", changed(&|commit| commit.expect.fold_count = 1), state.clone()),
        ("the newest round with other bytes", round(&job, 0, old.expect, 2).0, state.clone()),
    ] {
        let outcome = done(store.commit(commit, state).await, what);
        assert_eq!(outcome, CommitOutcome::Conflict(current.head), "{what}: conflict with the head in place");
        assert_eq!(fetch(store, &job, 0).await, current, "{what}: a conflict changes nothing");
    }
    committed(store.commit(good, state).await, "expected head in place, after conflicts");
}

/// `commit`: bytes that do not fit.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn shapes(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let (commit, state) = round(&job, 2, head(store, &job, 2).await, 1);
    for wrong in [state.slice(..88), state.slice(4..), Bytes::new(), bytes(512, 1)] {
        let outcome = store.commit(commit.clone(), wrong).await;
        refused(outcome, ErrorCode::WrongShape, "4 * (1 + slots) * elements bytes");
    }
    let outcome = store.commit(Commit { shard: 3, ..commit.clone() }, state.clone()).await;
    refused(outcome, ErrorCode::WrongShape, "a shard that is not there");
    let mut beyond = commit.clone();
    beyond.ledger.void.insert(job.max_members);
    refused(store.commit(beyond, state.clone()).await, ErrorCode::Limit, "a ledger beyond max_members");
    let mut full = commit;
    full.ledger.counted = (0..job.max_members).collect();
    committed(store.commit(full, state).await, "a ledger of max_members, after refusals");
}

/// `fence`: refuses older rosters from a round on, and tells how far any shard is.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn fences(store: &Subject, level: Durability) {
    let job = created(store, level, Init::Zeros).await;
    let fence = async |epoch, round| done(store.fence(job.incarnation, epoch, round).await, "fence");
    let by = |expect: Head, epoch: u64| {
        let (mut commit, state) = round(&job, 0, expect, 1);
        commit.ledger.roster_epoch = epoch;
        (commit, state)
    };
    assert_eq!(fence(3, 2).await, 0, "the highest version of any shard");
    for seed in 1..3 {
        let (mut commit, state) = round(&job, 1, head(store, &job, 1).await, seed);
        commit.ledger.roster_epoch = 3;
        committed(store.commit(commit, state).await, "a roster as new as the fence asks for");
    }
    assert_eq!(fence(3, 2).await, 2, "the highest version of any shard, not of all");
    assert_eq!(fence(2, 1).await, 2, "an older roster from an earlier round");

    let (commit, state) = by(head(store, &job, 0).await, 1);
    let outcome = done(store.commit(commit, state).await, "commit under a fence");
    assert_eq!(outcome, CommitOutcome::StaleRoster { needed: 2 }, "round 1 needs roster 2");
    let (first, first_state) = by(head(store, &job, 0).await, 2);
    let next = committed(store.commit(first.clone(), first_state.clone()).await, "round 1 by roster 2");
    let (commit, state) = by(next, 2);
    let outcome = done(store.commit(commit, state).await, "commit under a fence");
    assert_eq!(outcome, CommitOutcome::StaleRoster { needed: 3 }, "round 2 needs roster 3");
    assert_eq!(head(store, &job, 0).await, next, "a stale roster changes nothing");
    fence(7, 2).await;
    let again = done(store.commit(first, first_state).await, "a commit again under a later fence");
    assert_eq!(again, CommitOutcome::AlreadyCommitted(next), "what is committed stays committed");
    let (commit, state) = by(next, 8);
    committed(store.commit(commit, state).await, "a newer roster than the fence asks for");
}

/// `delete` and `list`.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn deletion(store: &Subject, level: Durability) {
    let (job, other) = (created(store, level, Init::Zeros).await, created(store, level, Init::Upload).await);
    let state = advance(store, &job, 0, 1).await;
    let listed = done(store.list().await, "list");
    assert!(listed.contains(&job) && listed.contains(&other), "list tells all jobs, activated or not");
    done(store.delete(other.incarnation).await, "delete forgets a job");
    done(store.delete(other.incarnation).await, "a job that is not there: nothing happens");
    let listed = done(store.list().await, "list");
    assert!(listed.contains(&job) && !listed.contains(&other), "list leaves out what is deleted");
    assert_eq!(fetch(store, &job, 0).await, state, "other jobs stay");
    done(store.delete(job.incarnation).await, "delete forgets a job");
    refused(store.fetch(job.incarnation, 0, true).await, ErrorCode::Gone, "fetch after delete");
    let (commit, bytes) = round(&job, 0, state.head, 2);
    refused(store.commit(commit, bytes).await, ErrorCode::Gone, "a commit never creates a shard");
    done(store.create(job.clone()).await, "create after delete");
    assert_eq!(fetch(store, &job, 0).await.head.version, 0, "nothing of the deleted job is left");
}

/// Two jobs with the same names and layout do not touch each other.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn independence(store: &Subject, level: Durability) {
    let (a, b) = (created(store, level, Init::Zeros).await, created(store, level, Init::Zeros).await);
    let zero = fetch(store, &b, 0).await;
    let state = advance(store, &a, 0, 1).await;
    assert_eq!(fetch(store, &b, 0).await, zero, "a commit changes one job");
    done(store.fence(b.incarnation, 5, 1).await, "fence");
    advance(store, &a, 0, 2).await;
    let (commit, bytes) = round(&b, 0, state.head, 3);
    let outcome = done(store.commit(commit, bytes).await, "a head of another job");
    assert_eq!(outcome, CommitOutcome::Conflict(zero.head), "a head of another job is another history");
}

/// A job that is not there.
///
/// # Panics
/// When the store breaks a line of the contract.
pub async fn unknown_jobs(store: &Subject) {
    let job = job(Durability::Process, Init::Upload);
    let (id, upload) = (job.incarnation, Incarnation::random());
    let (commit, state) = round(&job, 0, Head::initial(upload.0, 0, 0), 1);
    refused(store.commit(commit, state).await, ErrorCode::Gone, "commit of an unknown job");
    refused(store.heads(id, 0, 1).await, ErrorCode::Gone, "heads of an unknown job");
    refused(store.fetch(id, 0, false).await, ErrorCode::Gone, "fetch of an unknown job");
    refused(store.fetch_head(id, 0).await, ErrorCode::Gone, "fetch_head of an unknown job");
    refused(store.upload(id, upload, 0, bytes(256, 0)).await, ErrorCode::Gone, "upload of an unknown job");
    refused(store.activate(id, upload).await, ErrorCode::Gone, "activation of an unknown job");
    refused(store.fence(id, 1, 1).await, ErrorCode::Gone, "fence of an unknown job");
    done(store.delete(id).await, "a job that is not there: nothing happens");
}

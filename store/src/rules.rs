//! What a commit does, decided without I/O; both backends obey this one function.

use thalweg_protocol::{
    Commit, CommitOutcome, Epoch, ErrorCode, Head, Incarnation, Ledger, Partial, PartialCommit, Round,
    ShardIndex, StoreJob, Version, checksum, limits,
};

use crate::StoreError;

/// Outcome of looking at a commit before anything is written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Write the state; the shard then stands at this head.
    Write {
        /// The new head.
        next: Head,
        /// Checksum of the new state, for its slot.
        state_checksum: u64,
    },
    /// Nothing to write.
    Done(CommitOutcome),
}

/// Decides about `commit` for a shard that stands at `current`, its open round included.
pub(crate) fn admit(current: &Head, fences: &Fences, commit: &Commit, state: &[u8]) -> Admission {
    let state_checksum = checksum(&[state]);
    let next = commit.expect.next(&commit.ledger, commit.function, state_checksum);
    if next == current.closed() {
        return Admission::Done(CommitOutcome::AlreadyCommitted(next));
    }
    if commit.expect != *current || commit.ledger.round != current.version + 1 {
        return Admission::Done(CommitOutcome::Conflict(*current));
    }
    let needed = fences.needed(commit.ledger.round);
    if commit.ledger.roster_epoch < needed {
        return Admission::Done(CommitOutcome::StaleRoster { needed });
    }
    Admission::Write { next, state_checksum }
}

/// Whether `commit`, which met a conflict, counts the same contributions on the same version by the same function as what
/// made `current`, and yet came to other values than those with this checksum: then the function is not deterministic
/// (invariant I5). What is stored counts.
pub(crate) fn other_bits(current: &Head, state_checksum: u64, commit: &Commit) -> bool {
    // A head hashes all of them; with the stored values in place of the commit's only the rest is compared.
    commit.expect.next(&commit.ledger, commit.function, state_checksum) == current.closed()
}

/// Outcome of looking at a partial commit before anything is written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PartialAdmission {
    /// Write the fold.
    Write,
    /// Nothing to write.
    Done(CommitOutcome),
}

/// Decides about a partial commit for a shard that stands at `current`, with what its open round contains so far and
/// the checksum of that fold.
pub(crate) fn admit_partial(
    current: &Head,
    open: Option<(&Head, &Partial, u64)>,
    fences: &Fences,
    commit: &PartialCommit,
    checksum: u64,
) -> PartialAdmission {
    let head = open.map_or(*current, |(head, ..)| *head);
    let same = |open: (&Head, &Partial, u64)| open == (&commit.expect.folded_on(), &commit.partial, checksum);
    if open.is_some_and(same) {
        return PartialAdmission::Done(CommitOutcome::AlreadyCommitted(head));
    }
    let round = commit.partial.ledger.round;
    if commit.expect != head || round != current.version + 1 {
        return PartialAdmission::Done(CommitOutcome::Conflict(head));
    }
    let needed = fences.needed(round);
    if commit.partial.ledger.roster_epoch.min(commit.partial.since) < needed {
        return PartialAdmission::Done(CommitOutcome::StaleRoster { needed });
    }
    PartialAdmission::Write
}

/// Refuses commits and uploads that do not fit the job's description.
pub(crate) fn check_shape(
    job: &StoreJob,
    shard: ShardIndex,
    len: usize,
    wanted: usize,
) -> Result<(), StoreError> {
    if shard >= job.layout.shards() {
        let text = format!("shard {shard} of {}: the job has {} shards", job.key, job.layout.shards());
        return Err(StoreError::refused(ErrorCode::WrongShape, text));
    }
    if len != wanted {
        let text = format!("shard {shard} of {}: {len} bytes where {wanted} are expected", job.key);
        return Err(StoreError::refused(ErrorCode::WrongShape, text));
    }
    Ok(())
}

/// Refuses ledgers that a slot header has no room for.
pub(crate) fn check_ledger(job: &StoreJob, ledger: &Ledger) -> Result<(), StoreError> {
    match ledger.counted.iter().chain(ledger.void.iter()).find(|&rank| rank >= job.max_members) {
        Some(rank) => {
            let text = format!("rank {rank} in a ledger of {}: max_members is {}", job.key, job.max_members);
            Err(StoreError::refused(ErrorCode::Limit, text))
        }
        None if ledger.order.len() > job.max_members as usize => {
            let text = format!("a ledger of {} with more ranks in its order than max_members", job.key);
            Err(StoreError::refused(ErrorCode::Limit, text))
        }
        None => Ok(()),
    }
}

/// The refusal for a job that is not in the store.
pub(crate) fn gone(job: thalweg_protocol::Incarnation) -> StoreError {
    StoreError::refused(ErrorCode::Gone, format!("job incarnation {job} is not in this store"))
}

/// The refusal for a job without initial parameters.
pub(crate) fn not_ready(job: &StoreJob) -> StoreError {
    StoreError::refused(
        ErrorCode::NotReady,
        format!("job {} waits for initial parameters: rank 0 uploads them when it joins", job.key),
    )
}

/// The refusal for a job, or a snapshot, that the disk has no room for.
pub(crate) fn storage_full(job: &StoreJob, need: u64, free: u64) -> StoreError {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let text = format!(
        "job {} needs {} MiB of the store's disk (with what is left free, store.reserve_bytes), {} MiB are free: \
         delete jobs that are over (thalweg job ls, rm), or give the store a larger disk",
        job.key,
        mib(need),
        mib(free)
    );
    StoreError::refused(ErrorCode::StorageFull, text)
}

/// The refusal for a hold that is not there any more.
pub(crate) fn unknown_hold(job: &StoreJob) -> StoreError {
    let text = format!(
        "job {}: this hold is not kept any more, since nobody asked for {} s or the store was started again: begin \
         the snapshot anew",
        job.key,
        limits::HOLD_SECONDS
    );
    StoreError::refused(ErrorCode::Expired, text)
}

/// The refusal for one hold too many.
pub(crate) fn too_many_holds(job: &StoreJob) -> StoreError {
    let text = format!(
        "job {}: {} snapshots are being taken at once; wait until one has ended",
        job.key,
        limits::MAX_HOLDS
    );
    StoreError::refused(ErrorCode::Limit, text)
}

/// The refusal for a shard that does not have the version of a hold yet.
pub(crate) fn not_there_yet(shard: ShardIndex, version: Version) -> StoreError {
    StoreError::refused(ErrorCode::NotReady, format!("shard {shard} is not at version {version} yet"))
}

/// The state that an upload of `parameters`, or of parameters and slots, becomes; and its head.
///
/// # Errors
/// `wrong_shape` for any other length.
pub(crate) fn first_state(
    job: &StoreJob,
    upload: Incarnation,
    shard: ShardIndex,
    uploaded: &[u8],
) -> Result<(Vec<u8>, Head, u64), StoreError> {
    let whole = job.state_bytes(shard);
    if uploaded.len() != whole {
        check_shape(job, shard, uploaded.len(), job.parameter_bytes(shard))?;
    }
    let mut state = uploaded.to_vec();
    state.resize(whole, 0);
    let state_checksum = checksum(&[&state]);
    let head = Head::initial(upload.0, shard, state_checksum).at_version(job.first_version);
    Ok((state, head, state_checksum))
}

/// Where a shard of a job that starts from zeros stands before its first round.
pub(crate) fn zero_head(job: &StoreJob, shard: ShardIndex) -> Head {
    Head::initial(job.incarnation.0, shard, 0)
}

/// A ledger that says that nothing has been counted.
pub(crate) fn empty_ledger() -> Ledger {
    Ledger::default()
}

/// Roster epochs that commits need, by first round (the hard edge of rule P4).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Fences(Vec<(Round, Epoch)>);

impl Fences {
    /// Oldest epoch that may close `round`.
    pub(crate) fn needed(&self, round: Round) -> Epoch {
        self.0.iter().filter(|(from, _)| *from <= round).map(|(_, epoch)| *epoch).max().unwrap_or(0)
    }

    /// Adds a fence. Fences that every later round passes anyway are merged, so the list stays as
    /// short as the number of fences ahead of the slowest shard.
    pub(crate) fn add(&mut self, from_round: Round, epoch: Epoch, min_version: Version) {
        self.0.push((from_round, epoch));
        let passed = self.needed(min_version + 1);
        self.0.retain(|(from, _)| *from > min_version + 1);
        if passed > 0 {
            self.0.push((min_version + 1, passed));
        }
        // A later fence of an epoch that is not newer says nothing new.
        self.0.sort_unstable_by_key(|&(from, epoch)| (from, Epoch::MAX - epoch));
        let mut newest = 0;
        self.0.retain(|&(_, epoch)| {
            let says_more = epoch > newest;
            newest = newest.max(epoch);
            says_more
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_bits_are_told_from_other_rounds() {
        let zero = Head::initial([1; 16], 0, 0);
        let commit = |round, function| Commit {
            job: Incarnation([1; 16]),
            shard: 0,
            expect: zero,
            ledger: Ledger { round, ..Ledger::default() },
            function: [function; 16],
        };
        let winner = commit(1, 7);
        let stored = checksum(&[b"stored"]);
        let head = winner.expect.next(&winner.ledger, winner.function, stored);
        assert_eq!(
            admit(&head, &Fences::default(), &winner, b"others"),
            Admission::Done(CommitOutcome::Conflict(head))
        );
        assert!(other_bits(&head, stored, &winner));
        assert!(other_bits(&head.folded_on(), stored, &winner), "whatever is folded on it");
        let mut others = commit(1, 7);
        others.ledger.counted.insert(3);
        let elsewhere = Commit { expect: Head::initial([2; 16], 0, 0), ..commit(1, 7) };
        for (what, commit) in [
            ("another round", commit(2, 7)),
            ("another function", commit(1, 8)),
            ("another history", elsewhere),
            ("others are counted", others),
        ] {
            assert!(!other_bits(&head, stored, &commit), "{what}");
        }
    }

    #[test]
    fn fences_apply_from_their_round_and_stay_few() {
        let mut fences = Fences::default();
        assert_eq!(fences.needed(7), 0);
        fences.add(5, 2, 0);
        assert_eq!((fences.needed(4), fences.needed(5)), (0, 2));
        fences.add(9, 3, 4);
        assert_eq!((fences.needed(5), fences.needed(8), fences.needed(9)), (2, 2, 3));
        for round in 10..1000 {
            fences.add(round + 1, round, round - 1);
            assert_eq!(fences.needed(round + 1), round);
        }
        assert!(fences.0.len() <= 3, "{fences:?}");
        // Both of two fences that are ahead are asked for again and again.
        let mut fences = Fences::default();
        for _ in 0..1000 {
            fences.add(5, 2, 0);
            fences.add(9, 3, 0);
            fences.add(7, 2, 0);
        }
        assert_eq!(fences.0, [(5, 2), (9, 3)]);
    }
}

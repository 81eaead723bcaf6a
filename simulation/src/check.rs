//! What must hold after every step, worked out independently of those who are watched.

mod partial;

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use thalweg_functions::{AggregationFunction, Contribution, ShardContext};
use thalweg_invoker::Job;
use thalweg_protocol::{
    Commit, CommitOutcome, Durability, Epoch, ErrorCode, GradientHeader, Head, Incarnation, JobRecord,
    JobState, Ledger, Rank, Roster, Round, ShardIndex, StoreJob, Version, WireError, checksum,
};

/// An invariant does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Its id, as in ARCHITECTURE.md; or the rule.
    pub invariant: &'static str,
    /// What was found.
    pub what: String,
    /// The shard it is about, if one.
    pub shard: Option<ShardIndex>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.what)
    }
}

/// What a worker's life contributes: values whose sum depends on the order of adding.
pub(crate) fn values(worker: Incarnation, shard: ShardIndex, round: Round, elements: usize) -> Vec<u8> {
    let [a, b, c, ..] = worker.0;
    let seed = f32::from(a) + f32::from(b) * 0.37 + (u64::from(shard) * 7 + round) as f32 * 1.13;
    let big = if c.is_multiple_of(2) { 3.0e7 } else { -3.0e7 };
    let value = |index: usize| big * seed + 0.123 * seed / (index as f32 + 1.0);
    (0..elements).flat_map(|index| value(index).to_le_bytes()).collect()
}

#[derive(Debug)]
struct Shard {
    /// By version.
    versions: Vec<(Head, Ledger, Bytes)>,
    /// Commits that reached the store, by the head they would make: what a kill may leave behind.
    attempts: BTreeMap<Version, Vec<(Head, Ledger, Bytes)>>,
    /// The round that is open.
    open: partial::Open,
}

impl Shard {
    fn newest(&self) -> &(Head, Ledger, Bytes) {
        &self.versions[self.versions.len() - 1]
    }
}

#[derive(Debug)]
struct Checked {
    job: Job,
    rosters: BTreeMap<Epoch, Roster>,
    shards: Vec<Shard>,
    /// Why the job may fail, if it may.
    may_fail: Option<&'static str>,
    /// Functions by settings revision.
    functions: BTreeMap<u32, Arc<dyn AggregationFunction>>,
    /// Revisions that somebody was told of, with their first round.
    told: Vec<(u32, Round)>,
    /// Roster epochs that rounds need, by their first one.
    fences: Vec<(Round, Epoch)>,
    failed: Option<WireError>,
}

/// The history so far.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    jobs: BTreeMap<Incarnation, Checked>,
    /// What each worker's life was last given.
    given: BTreeMap<(Incarnation, ShardIndex), Version>,
    pub(crate) violation: Option<Violation>,
}

fn replay(checked: &Checked, shard: ShardIndex, before: &[u8], ledger: &Ledger) -> Option<Bytes> {
    let elements = checked.job.record.layout.len(shard);
    if ledger.counted.is_empty() {
        return Some(Bytes::copy_from_slice(before));
    }
    let function = checked.functions.get(&ledger.revision)?;
    let mut fold = function.begin(ShardContext { elements, groups: &[], round: ledger.round });
    for rank in partial::order(checked.job.record.spec.policy.order, ledger) {
        let member = partial::member_of(&checked.rosters, ledger, rank)?;
        let values = values(member.incarnation, shard, ledger.round, elements);
        fold.accept(Contribution { rank, weight: 1.0, values: &values });
    }
    let mut out = Vec::new();
    fold.finish(before, &mut out);
    Some(out.into())
}

impl Checker {
    pub(crate) fn fail(&mut self, invariant: &'static str, shard: Option<ShardIndex>, what: String) {
        self.violation.get_or_insert(Violation { invariant, what, shard });
    }

    /// A job's record was written.
    pub(crate) fn job_written(&mut self, record: &JobRecord) {
        let store_job = record.store_job();
        // What a life goes on from that was rolled back.
        let before: Vec<Vec<_>> = match (&record.life.origin, record.life.replaces.first()) {
            (Some(origin), Some(lost)) => {
                let most = usize::try_from(origin.version).unwrap_or(usize::MAX);
                let lost = self.jobs.get(lost).map(|lost| &lost.shards);
                let shards = lost.into_iter().flatten();
                shards.map(|shard| shard.versions.iter().take(most).cloned().collect()).collect()
            }
            _ => Vec::new(),
        };
        let checked = self.jobs.entry(record.incarnation).or_insert_with(|| {
            let roster = Roster { epoch: 0, ..Roster::new(record.incarnation) };
            let shards = (0..record.layout.shards()).map(|shard| {
                let head = Head::initial(record.incarnation.0, shard, 0);
                let state = vec![0; StoreJob::state_bytes(&store_job, shard)].into();
                let mut versions = before.get(shard as usize).cloned().unwrap_or_default();
                // The last one is filled in by its upload.
                let first = usize::try_from(record.first_version()).unwrap_or(0);
                versions
                    .resize(first + 1, (head.at_version(record.first_version()), Ledger::default(), state));
                Shard { versions, attempts: BTreeMap::new(), open: partial::Open::default() }
            });
            Checked {
                shards: shards.collect(),
                job: match Job::new(record.clone(), roster) {
                    Ok(job) => job,
                    Err(error) => unreachable!("the gateway has checked it: {error}"),
                },
                rosters: BTreeMap::new(),
                may_fail: None,
                functions: BTreeMap::new(),
                told: Vec::new(),
                fences: Vec::new(),
                failed: None,
            }
        });
        for revision in &record.settings {
            checked.functions.entry(revision.revision).or_insert_with(|| {
                match thalweg_functions::resolve(&revision.function) {
                    Ok(function) => Arc::from(function),
                    Err(error) => unreachable!("the gateway has checked it: {error}"),
                }
            });
        }
        if let JobState::Failed(error) = &record.state {
            checked.failed = Some(error.clone());
            if checked.may_fail.is_none() {
                let text = format!("job {} fails without a reason: {error}", record.spec.key);
                self.fail("L1", None, text);
            }
        }
    }

    /// From now on the job may fail.
    pub(crate) fn may_fail(&mut self, job: Incarnation, why: &'static str) {
        if let Some(checked) = self.jobs.get_mut(&job) {
            checked.may_fail.get_or_insert(why);
        }
    }

    /// All jobs are being deleted.
    pub(crate) fn all_may_fail(&mut self, why: &'static str) {
        self.jobs.values_mut().for_each(|checked| {
            checked.may_fail.get_or_insert(why);
        });
    }

    /// Whether it may.
    pub(crate) fn is_expected_to_fail(&self, job: Incarnation) -> bool {
        self.jobs.get(&job).is_some_and(|checked| checked.may_fail.is_some())
    }

    fn another_life_fails(&self, job: Incarnation) -> bool {
        let key = self.jobs.get(&job).map(|checked| &checked.job.record.spec.key);
        let mut lives = self.jobs.values().filter(|checked| Some(&checked.job.record.spec.key) == key);
        lives.any(|checked| checked.may_fail.is_some())
    }

    pub(crate) fn jobs_of_level(&self, durability: Durability) -> Vec<Incarnation> {
        let of_level = |checked: &&Checked| checked.job.record.spec.durability == durability;
        self.jobs.values().filter(of_level).map(|checked| checked.job.record.incarnation).collect()
    }

    pub(crate) fn newest_roster(&self, job: Incarnation) -> Option<&Roster> {
        self.jobs.get(&job)?.rosters.last_key_value().map(|(_, roster)| roster)
    }

    /// What a shard was one version before the one that a life goes on from.
    pub(crate) fn older_state(&self, job: Incarnation, index: ShardIndex) -> Option<Bytes> {
        let versions = &self.jobs.get(&job)?.shards.get(index as usize)?.versions;
        versions.len().checked_sub(2).map(|at| versions[at].2.clone())
    }

    /// A shard of a life's first version is uploaded.
    pub(crate) fn uploaded(
        &mut self,
        job: Incarnation,
        upload: Incarnation,
        index: ShardIndex,
        state: &Bytes,
    ) {
        let Some(checked) = self.jobs.get(&job) else { return };
        let record = &checked.job.record;
        let (version, replaces) = (record.first_version(), record.life.replaces.first().copied());
        let at = usize::try_from(version).unwrap_or(usize::MAX);
        let Some(shard) =
            self.jobs.get(&replaces.unwrap_or(job)).and_then(|lost| lost.shards.get(index as usize))
        else {
            return;
        };
        let known = shard.versions.get(at).is_some_and(|(_, _, known)| known == state);
        // Written and never answered, before the power failed.
        let attempted =
            shard.attempts.get(&version).is_some_and(|made| made.iter().any(|(_, _, known)| known == state));
        if !known && !attempted {
            let text = format!("shard {index} goes on from bytes that version {version} never had");
            return self.fail("P27", Some(index), text);
        }
        let head = Head::initial(upload.0, index, checksum(&[state])).at_version(version);
        if let Some(shard) =
            self.jobs.get_mut(&job).and_then(|checked| checked.shards.get_mut(index as usize))
            && shard.versions.len() == at + 1
        {
            shard.versions[at] = (head, Ledger::default(), state.clone());
        }
    }

    /// Somebody was told that `revision` is in force from `from_round` on.
    pub(crate) fn settings_told(&mut self, job: Incarnation, revision: u32, from_round: Round) {
        let Some(checked) = self.jobs.get_mut(&job) else { return };
        checked.told.push((revision, from_round));
        let wrong = checked
            .shards
            .iter()
            .flat_map(|shard| &shard.versions)
            .find_map(|(_, ledger, _)| wrong_settings(&checked.told, ledger));
        if let Some(what) = wrong {
            self.fail("P4", None, what);
        }
    }

    /// A roster was written.
    pub(crate) fn roster_written(&mut self, roster: &Roster) {
        let Some(checked) = self.jobs.get_mut(&roster.job) else { return };
        if let Some((epoch, _)) = checked.rosters.last_key_value()
            && *epoch >= roster.epoch
        {
            let text = format!("roster epoch {} is written after {epoch}", roster.epoch);
            return self.fail("P4", None, text);
        }
        for member in &roster.members {
            let other = roster.members.iter().find(|other| {
                other.incarnation != member.incarnation
                    && other.rank == member.rank
                    && other.from_round < member.until_round.unwrap_or(Round::MAX)
                    && member.from_round < other.until_round.unwrap_or(Round::MAX)
            });
            if let Some(other) = other {
                let text =
                    format!("two tenures of rank {} count in one round: {member:?}, {other:?}", member.rank);
                return self.fail("P4", None, text);
            }
        }
        checked.rosters.insert(roster.epoch, roster.clone());
    }

    /// A commit has reached the store.
    pub(crate) fn attempted(&mut self, commit: &Commit, state: &Bytes) {
        let next = commit.expect.next(&commit.ledger, commit.function, checksum(&[state]));
        let shards = self.jobs.get_mut(&commit.job).map(|checked| &mut checked.shards);
        if let Some(shard) = shards.and_then(|shards| shards.get_mut(commit.shard as usize)) {
            let attempts = shard.attempts.entry(next.version).or_default();
            if attempts.iter().all(|(head, ..)| *head != next) {
                attempts.push((next, commit.ledger.clone(), state.clone()));
            }
        }
    }

    /// The store has answered a commit.
    pub(crate) fn committed(
        &mut self,
        (job, index): (Incarnation, ShardIndex),
        ledger: &Ledger,
        state: &Bytes,
        outcome: &CommitOutcome,
    ) {
        let (head, again) = match outcome {
            CommitOutcome::Committed(head) => (*head, false),
            CommitOutcome::AlreadyCommitted(head) => (*head, true),
            _ => return,
        };
        let Some(shard) = self.jobs.get(&job).and_then(|checked| checked.shards.get(index as usize)) else {
            let text = format!("a commit to shard {index} of a job that nobody has seen");
            return self.fail("I1", Some(index), text);
        };
        if !again {
            return self.accept(job, index, head, ledger, state);
        }
        let at = usize::try_from(head.version).unwrap_or(usize::MAX);
        match shard.versions.get(at) {
            Some((known, ..)) if *known == head => {}
            // Its first try was written and never answered.
            None if shard.versions.len() == at => self.accept(job, index, head, ledger, state),
            _ => {
                let text = format!("shard {index}: version {} was never committed like that", head.version);
                self.fail("I1", Some(index), text);
            }
        }
    }

    /// A version has come to be.
    fn accept(&mut self, job: Incarnation, index: ShardIndex, head: Head, ledger: &Ledger, state: &Bytes) {
        let Some(checked) = self.jobs.get(&job) else { return };
        let (newest, _, before) = checked.shards[index as usize].newest();
        if head.version != newest.version + 1 || ledger.round != head.version {
            let text = format!("shard {index} goes from version {} to {}", newest.version, head.version);
            return self.fail("I1", Some(index), text);
        }
        let order = checked.job.record.spec.policy.order;
        let wrong = wrong_members(checked, &checked.shards[index as usize].open, ledger);
        if let Some(what) = wrong.or_else(|| partial::wrong_order(order, ledger)) {
            return self.fail("I1", Some(index), format!("shard {index} round {}: {what}", ledger.round));
        }
        if let Some(what) = wrong_settings(&checked.told, ledger) {
            return self.fail("P4", Some(index), what);
        }
        match replay(checked, index, before, ledger) {
            Some(expected) if expected == *state => {}
            _ => {
                let text = format!(
                    "shard {index} version {}: the state is not what its ledger says, {ledger:?}",
                    head.version
                );
                return self.fail("I5", Some(index), text);
            }
        }
        if let Some(checked) = self.jobs.get_mut(&job) {
            let shard = &mut checked.shards[index as usize];
            shard.versions.push((head, ledger.clone(), state.clone()));
            shard.attempts.retain(|version, _| *version > head.version);
            shard.open = partial::Open::default();
        }
    }

    /// The store has come back with these heads.
    pub(crate) fn reopened(&mut self, job: Incarnation, heads: &[Head]) {
        for (index, head) in (0..).zip(heads) {
            let Some(shard) = self.jobs.get(&job).and_then(|checked| checked.shards.get(index as usize))
            else {
                continue;
            };
            let newest = shard.newest().0;
            if newest == *head {
                continue;
            }
            let mut attempts = shard.attempts.get(&(newest.version + 1)).into_iter().flatten();
            let attempt = attempts.find(|(made, ..)| made == head).cloned();
            match attempt {
                // Written and never answered.
                Some((made, ledger, state)) => self.accept(job, index, made, &ledger, &state),
                None => {
                    let text =
                        format!("shard {index} was at {newest:?}, after the store came back at {head:?}");
                    self.fail("I2", Some(index), text);
                }
            }
        }
    }

    /// The store has come back and refuses a job.
    pub(crate) fn refused_after_start(&mut self, job: Incarnation, error: &WireError) {
        if error.code == ErrorCode::Diverged && !self.is_expected_to_fail(job) {
            self.fail("I2", None, format!("the store has lost a job: {error}"));
        }
    }

    /// A worker begins at these heads.
    pub(crate) fn joined(&mut self, worker: Incarnation, heads: &[Head]) {
        for (shard, head) in (0..).zip(heads) {
            self.given.insert((worker, shard), head.version);
        }
    }

    /// A worker was given a version of a shard.
    pub(crate) fn given(
        &mut self,
        (job, worker, rank): (Incarnation, Incarnation, Rank),
        index: ShardIndex,
        head: Head,
        ledger: &Ledger,
        parameters: &[u8],
    ) {
        let Some(checked) = self.jobs.get(&job) else { return };
        let may_skip = checked.job.record.spec.quorum.is_some();
        let at = usize::try_from(head.version).unwrap_or(usize::MAX);
        let shard = &checked.shards[index as usize];
        let found = match shard.versions.get(at) {
            Some((known, counted, state)) if *known == head && state[..parameters.len()] == *parameters => {
                (counted != ledger).then(|| ("I1", format!("another ledger of version {}", head.version)))
            }
            Some(_) => Some(("I4", format!("other bits of version {}", head.version))),
            None => Some(("I2", format!("version {} is not stored", head.version))),
        };
        if let Some((invariant, what)) = found {
            self.fail(invariant, Some(index), format!("rank {rank}, shard {index}: {what}"));
        }
        let last = self.given.insert((worker, index), head.version).unwrap_or(0);
        if head.version <= last || (head.version > last + 1 && !may_skip) {
            let text = format!("rank {rank}, shard {index}: version {} after {last}", head.version);
            self.fail("I3", Some(index), text);
        }
    }

    /// A contribution has left its queue for good; `copies` of it are still there.
    pub(crate) fn acknowledged(&mut self, header: &GradientHeader, copies: usize) {
        let Some(checked) = self.jobs.get(&header.job) else { return };
        let Some(shard) = checked.shards.get(header.shard as usize) else { return };
        let newest = shard.newest().0.version;
        let roster = checked.rosters.last_key_value().map(|(_, roster)| roster);
        let counts = roster
            .and_then(|roster| roster.tenure(header.worker))
            .is_some_and(|member| member.rank == header.rank && member.counts_in(header.round));
        let over = checked.failed.is_some() || checked.may_fail.is_some();
        let kept = shard.open.keeps(header.round, header.rank);
        if copies == 0 && newest < header.round && counts && !over && !kept {
            let text = format!(
                "rank {}, shard {}: the contribution to round {} was acknowledged, the store is at version {newest}",
                header.rank, header.shard, header.round
            );
            self.fail("I2", Some(header.shard), text);
        }
    }

    /// A worker that was in `round` is told that it has lost its rank.
    pub(crate) fn lost_its_lease(
        &mut self,
        (job, worker, rank): (Incarnation, Incarnation, Rank),
        round: Round,
        error: &WireError,
    ) {
        let tenure = self.newest_roster(job).and_then(|roster| roster.tenure(worker));
        // One that was removed may be on it again from a later round on, by a claim that came late.
        if tenure.is_some_and(|member| member.until_round.is_none() && member.from_round <= round) {
            self.fail("I3", None, format!("rank {rank} is on the roster and hears: {error}"));
        }
    }

    /// A training loop ends with this error.
    pub(crate) fn training_failed(&mut self, job: Incarnation, rank: Rank, error: &WireError) {
        let expected = matches!(error.code, ErrorCode::JobFailed | ErrorCode::Diverged | ErrorCode::Gone)
            && self.is_expected_to_fail(job);
        // One that was still joining may be told of the life before.
        let expected = expected || self.another_life_fails(job);
        if !expected {
            self.fail("L1", None, format!("rank {rank} fails: {error}"));
        }
    }

    /// Where every shard of every job stands, for reports.
    pub(crate) fn progress(&self) -> Vec<Vec<Version>> {
        let of = |checked: &Checked| {
            checked.shards.iter().map(|shard| shard.newest().0.version).collect::<Vec<_>>()
        };
        self.jobs.values().map(of).collect()
    }
}

/// What is wrong with the settings that a round was folded with, if anything. A round that counted nobody was
/// folded with none.
fn wrong_settings(told: &[(u32, Round)], ledger: &Ledger) -> Option<String> {
    let wrong = |(revision, from_round): &&(u32, Round)| {
        !ledger.counted.is_empty() && (ledger.round >= *from_round) != (ledger.revision >= *revision)
    };
    let (revision, from_round) = told.iter().find(wrong)?;
    Some(format!("revision {revision} was told from round {from_round} on: {ledger:?}"))
}

/// What is wrong with a ledger's members, if anything.
fn wrong_members(checked: &Checked, open: &partial::Open, ledger: &Ledger) -> Option<String> {
    let Some(roster) = checked.rosters.get(&ledger.roster_epoch) else {
        return Some(format!("closed by roster {}, which never was: {ledger:?}", ledger.roster_epoch));
    };
    let members: Vec<_> = roster.of_round(ledger.round).map(|member| member.rank).collect();
    let taking_part = || ledger.counted.iter().chain(ledger.void.iter());
    if taking_part().any(|rank| !members.contains(&rank) && !open.may_contain(rank)) {
        return Some(format!("somebody else than {members:?} is in it: {ledger:?}"));
    }
    if ledger.counted.iter().any(|rank| ledger.void.contains(rank)) {
        return Some(format!("counted and void at once: {ledger:?}"));
    }
    let all = members.iter().all(|rank| ledger.contains(*rank));
    // Whoever was told that it counts from this round on.
    let newest = checked.rosters.last_key_value().map_or(roster, |(_, newest)| newest);
    let forgotten = newest
        .of_round(ledger.round)
        .find(|member| member.confirmed && member.until_round.is_none() && !ledger.contains(member.rank));
    if let Some(member) = forgotten.filter(|_| checked.job.record.spec.quorum.is_none()) {
        return Some(format!("closed without {member:?}: {ledger:?}"));
    }
    match checked.job.record.spec.quorum {
        _ if all => None,
        None => Some(format!("closed without all of {members:?}: {ledger:?}")),
        Some(quorum) if ledger.counted.len() >= quorum as usize => None,
        Some(quorum) => Some(format!("closed with less than {quorum} of {members:?}: {ledger:?}")),
    }
}

/// The error of a job that was dropped after its failure, wherever a worker heard of it.
pub(crate) fn is_end_of_job(error: &WireError) -> bool {
    matches!(error.code, ErrorCode::JobFailed | ErrorCode::Diverged | ErrorCode::Gone | ErrorCode::UnknownJob)
}

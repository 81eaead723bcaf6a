//! Tables, and random histories of claims, removals and commits.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use thalweg_protocol::{
    Durability, FunctionSpec, Init, JobKey, JobSpec, JobState, Layout, Mode, NonFinite, Rank,
    SettingsRevision, StoreId, TensorSpec, WorkerRef,
};

use super::*;

const JOB: Incarnation = Incarnation([1; 16]);

fn key() -> JobKey {
    JobKey { tenant: "t".parse().unwrap(), job: "j".parse().unwrap() }
}

fn record(workers: u32) -> JobRecord {
    let function = FunctionSpec::named("sum");
    let spec = JobSpec {
        key: key(),
        tensors: vec![TensorSpec::f32("a", [8])],
        function: function.clone(),
        mode: Mode::Sync,
        workers,
        quorum: None,
        deadline_ms: 0,
        durability: Durability::Process,
        non_finite: NonFinite::Propagate,
        init: Init::Zeros,
        shard_bytes: 256,
        max_members: 4,
        policy: thalweg_protocol::Policy::default(),
    };
    JobRecord {
        spec,
        incarnation: JOB,
        layout: Layout { elements: 8, shard_elements: 4 },
        slots: 0,
        store: StoreId([0; 16]),
        partitions: 1,
        state: JobState::Running,
        settings: vec![SettingsRevision { revision: 0, from_round: 0, function }],
        life: thalweg_protocol::Life::default(),
    }
}

fn empty() -> Roster {
    Roster::new(JOB)
}

fn life(number: u8) -> Incarnation {
    Incarnation([number; 16])
}

fn claim_of(rank: Rank, id: &str, incarnation: Incarnation) -> Claim {
    Claim { worker: WorkerRef { key: key(), job: JOB, rank, incarnation }, id: id.to_owned(), replaces: None }
}

/// A claim by whoever has read the roster.
fn informed(roster: &Roster, claim: Claim) -> Claim {
    Claim { replaces: roster.former_life(claim.worker.rank, &claim.id), ..claim }
}

fn at(min: Version, max: Version) -> Versions {
    Versions { min, max }
}

/// A started job of `workers` founding members: rank r is life r + 1 of worker "w<r>".
fn started(workers: u8) -> (JobRecord, Roster) {
    let record = record(u32::from(workers));
    let mut roster = empty();
    for rank in 0..workers {
        let claimed =
            claim(&record, &roster, &claim_of(rank.into(), &format!("w{rank}"), life(rank + 1)), at(0, 0));
        let claimed = claimed.unwrap();
        assert_eq!((claimed.from_round, claimed.level), (1, None));
        let next = claimed.roster.unwrap();
        assert_eq!((next.epoch, next.started), (roster.epoch + 1, rank + 1 == workers));
        roster = next;
    }
    (record, roster)
}

fn code(result: Result<Claimed, WireError>) -> ErrorCode {
    result.expect_err("a claim that must be refused").code
}

#[test]
fn founding_members_count_from_round_one_and_the_last_of_them_starts_the_job() {
    let (_, roster) = started(3);
    assert_eq!(roster.of_round(1).count(), 3);
}

#[test]
fn a_claim_made_again_changes_nothing() {
    let (record, roster) = started(2);
    let again = claim(&record, &roster, &claim_of(1, "w1", life(2)), at(7, 8)).unwrap();
    assert_eq!(again, Claimed { roster: None, from_round: 1, confirmed: true, level: None });
}

#[test]
fn a_founding_member_may_leave_before_the_start() {
    let record = record(2);
    let first = claim(&record, &empty(), &claim_of(0, "w0", life(1)), at(0, 0)).unwrap().roster.unwrap();
    let (left, level) = remove(&first, life(1), at(0, 0)).unwrap();
    assert_eq!((left.members.len(), level, left.started), (0, None, false));
    // And a founding worker started again takes its own place.
    let restarted = informed(&first, claim_of(0, "w0", life(2)));
    let again = claim(&record, &first, &restarted, at(0, 0)).unwrap().roster.unwrap();
    assert_eq!((again.members.len(), again.started), (1, false));
    assert_eq!(again.members[0].incarnation, life(2));
}

#[test]
fn ranks_have_one_holder_and_an_end() {
    let (record, roster) = started(2);
    let other = claim_of(1, "stranger", life(9));
    assert_eq!(code(claim(&record, &roster, &other, at(3, 3))), ErrorCode::RankTaken);
    let beyond = claim_of(4, "w4", life(9));
    assert_eq!(code(claim(&record, &roster, &beyond, at(3, 3))), ErrorCode::Limit);
    assert!(claim(&record, &roster, &claim_of(3, "w3", life(9)), at(3, 3)).is_ok());
    // The same life under another rank.
    assert_eq!(code(claim(&record, &roster, &claim_of(3, "w1", life(2)), at(3, 3))), ErrorCode::LeaseLost);
}

#[test]
fn the_same_worker_started_again_takes_its_rank_over() {
    let (record, roster) = started(2);
    // Unless it knows whom it replaces: a claim of an older life may come late.
    assert_eq!(code(claim(&record, &roster, &claim_of(1, "w1", life(9)), at(4, 5))), ErrorCode::RankTaken);
    let restarted = informed(&roster, claim_of(1, "w1", life(9)));
    let claimed = claim(&record, &roster, &restarted, at(4, 5)).unwrap();
    let next = claimed.roster.unwrap();
    // The old life ends with the first round that is open anywhere, the new one counts after every one
    // that may be.
    assert_eq!(next.tenure(life(2)).unwrap().until_round, Some(5));
    assert_eq!((claimed.from_round, claimed.level), (7, None));
    // Its old life has lost the rank, and says so for as long as the roster remembers.
    assert_eq!(code(claim(&record, &next, &claim_of(1, "w1", life(2)), at(4, 5))), ErrorCode::LeaseLost);
}

#[test]
fn a_newcomer_counts_after_every_round_that_may_be_open() {
    for (versions, from_round) in [(at(0, 0), 2), (at(4, 4), 6), (at(4, 5), 7)] {
        let (record, roster) = started(2);
        let claimed = claim(&record, &roster, &claim_of(2, "w2", life(9)), versions).unwrap();
        assert_eq!((claimed.from_round, claimed.level), (from_round, None));
        let next = claimed.roster.unwrap();
        assert!((1..from_round).all(|round| next.of_round(round).count() == 2));
        assert_eq!(next.of_round(from_round).count(), 3);
    }
}

#[test]
fn a_newcomer_to_a_deserted_job_takes_the_open_round() {
    for (versions, level) in [(at(4, 4), None), (at(4, 5), Some(5))] {
        let (record, roster) = started(1);
        let (roster, levelled) = remove(&roster, life(1), versions).unwrap();
        assert_eq!(levelled, level, "the gateway levels at once");
        let claimed = claim(&record, &roster, &claim_of(0, "w9", life(9)), versions).unwrap();
        assert_eq!((claimed.from_round, claimed.level), (versions.max + 1, level));
        // Levelling that was cut short is asked for by the same claim made again.
        let next = claimed.roster.unwrap();
        let again = claim(&record, &next, &claim_of(0, "w9", life(9)), versions).unwrap();
        assert_eq!((again.roster, again.level), (None, level));
    }
}

#[test]
fn a_removal_ends_with_the_first_round_that_is_open_anywhere() {
    let (_, roster) = started(3);
    let (next, level) = remove(&roster, life(2), at(4, 5)).unwrap();
    assert_eq!((level, next.epoch), (None, roster.epoch + 1));
    assert_eq!(next.of_round(5).map(|member| member.rank).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(remove(&next, life(2), at(4, 5)), None, "it is off already");
    assert_eq!(remove(&next, life(77), at(4, 5)), None, "it was never on");
}

/// Who joined while others were in their last round waits for rounds that nobody is left to close.
#[test]
fn the_last_member_of_the_open_round_leaves_it_to_be_levelled() {
    for (versions, level) in [(at(4, 4), 5), (at(4, 5), 5)] {
        let (record, roster) = started(1);
        let joined = claim(&record, &roster, &claim_of(1, "w1", life(9)), at(4, 4)).unwrap();
        assert_eq!(joined.from_round, 6);
        let (next, levelled) = remove(&joined.roster.unwrap(), life(1), versions).unwrap();
        assert_eq!(next.of_round(5).count(), 0);
        assert_eq!(levelled, Some(level));
    }
}

#[test]
fn a_postponed_claimant_counts_after_what_has_closed() {
    let (record, roster) = started(1);
    let roster = claim(&record, &roster, &claim_of(1, "w1", life(9)), at(4, 4)).unwrap().roster.unwrap();
    let next = postpone(&roster, life(9), at(6, 6)).unwrap();
    assert_eq!((next.tenure(life(9)).unwrap().from_round, next.epoch), (8, roster.epoch + 1));
    let (alone, _) = remove(&roster, life(1), at(5, 5)).unwrap();
    assert_eq!(postpone(&alone, life(9), at(6, 6)).unwrap().tenure(life(9)).unwrap().from_round, 7);
    assert_eq!(postpone(&alone, life(1), at(6, 6)), None);
}

#[test]
fn tenures_that_no_open_round_asks_for_are_forgotten() {
    let (record, mut roster) = started(2);
    for number in 10..60 {
        let version = Version::from(number);
        let versions = at(version, version);
        let restarted = informed(&roster, claim_of(1, "w1", life(number)));
        roster = claim(&record, &roster, &restarted, versions).unwrap().roster.unwrap();
        assert!(roster.members.len() <= 3, "{:?}", roster.members);
    }
}

/// One thing that happens to a job's roster or rounds.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A claim; between reading and writing, so many rounds close by the old roster.
    Claim {
        rank: u8,
        same_id: bool,
        races: u8,
    },
    Remove {
        pick: u8,
        races: u8,
    },
    /// A shard closes its round, if somebody counts in it.
    Close {
        shard: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..5_u8, any::<bool>(), 0..3_u8)
            .prop_map(|(rank, same_id, races)| Step::Claim { rank, same_id, races }),
        2 => (any::<u8>(), 0..3_u8).prop_map(|(pick, races)| Step::Remove { pick, races }),
        6 => (0..3_u8).prop_map(|shard| Step::Close { shard }),
    ]
}

const SHARDS: usize = 3;

/// A job whose gateway does what the roster says, and whose store fences.
struct History {
    record: JobRecord,
    roster: Roster,
    versions: [Version; SHARDS],
    /// Oldest roster that may close rounds from the given one on.
    fences: Vec<(Round, u64)>,
    counted: BTreeMap<(Round, Rank), Incarnation>,
    lives: u8,
}

impl History {
    fn versions(&self) -> Versions {
        at(*self.versions.iter().min().unwrap(), *self.versions.iter().max().unwrap())
    }

    /// Closes the next round of a shard by `roster`; shards are never more than one round apart.
    fn close(&mut self, shard: usize, roster: &Roster) {
        let round = self.versions[shard] + 1;
        let fenced = self.fences.iter().any(|(from, epoch)| *from <= round && roster.epoch < *epoch);
        if fenced || !roster.started || round > self.versions().min + 1 {
            return;
        }
        let members: Vec<_> = roster.of_round(round).cloned().collect();
        if members.is_empty() {
            return;
        }
        for member in members {
            let known = *self.counted.entry((round, member.rank)).or_insert(member.incarnation);
            assert_eq!(known, member.incarnation, "two tenures of rank {} in round {round}", member.rank);
        }
        self.versions[shard] = round;
    }

    fn race(&mut self, races: u8) {
        let roster = self.roster.clone();
        (0..usize::from(races)).for_each(|shard| self.close(shard, &roster));
    }

    fn level(&mut self, level: Option<Version>) {
        for version in &mut self.versions {
            *version = (*version).max(level.unwrap_or(0));
        }
    }

    fn write(&mut self, next: Roster) {
        assert!(next.epoch > self.roster.epoch, "epochs grow");
        self.roster = next;
    }

    fn claim(&mut self, rank: Rank, same_id: bool, races: u8) {
        self.lives += 1;
        let worker = life(self.lives);
        let id = if same_id { format!("w{rank}") } else { format!("w{}", self.lives) };
        let (versions, before) = (self.versions(), self.roster.clone());
        let wanted = informed(&before, claim_of(rank, &id, worker));
        let claimed = match claim(&self.record, &before, &wanted, versions) {
            Ok(claimed) => claimed,
            Err(error) => {
                let held = before.members.iter().any(|m| m.rank == rank && m.until_round.is_none());
                let expected = if rank >= 4 { ErrorCode::Limit } else { ErrorCode::RankTaken };
                assert!(rank >= 4 || held);
                assert_eq!(error.code, expected);
                return;
            }
        };
        self.race(races);
        self.write(claimed.roster.unwrap());
        if !before.started {
            // Nobody pushes before the roster that holds all founding members.
            return;
        }
        self.level(claimed.level);
        let mut from_round = claimed.from_round;
        loop {
            self.fences.push((from_round, self.roster.epoch));
            if self.versions().max < from_round {
                break;
            }
            let versions = self.versions();
            let next = postpone(&self.roster, worker, versions).unwrap();
            self.write(next);
            self.level(deserted(&self.roster, versions));
            from_round = self.roster.tenure(worker).unwrap().from_round;
        }
        self.write(confirm(&self.roster, &[worker]).unwrap());
        // The same claim again, its answer lost: nothing changes, whatever has been closed since.
        let again = claim(&self.record, &self.roster, &claim_of(rank, &id, worker), self.versions()).unwrap();
        assert!(again.confirmed && again.roster.is_none() && again.from_round == from_round);
    }

    fn remove(&mut self, pick: u8, races: u8) {
        let present: Vec<_> = self.roster.members.iter().filter(|m| m.until_round.is_none()).collect();
        if present.is_empty() {
            return;
        }
        let worker = present[usize::from(pick) % present.len()].incarnation;
        let versions = self.versions();
        let (next, level) = remove(&self.roster, worker, versions).unwrap();
        self.race(races);
        self.write(next);
        self.level(level);
    }

    fn check(&self) {
        let Versions { min, max } = self.versions();
        for round in min + 1..=max + 3 {
            let ranks: Vec<_> = self.roster.of_round(round).map(|member| member.rank).collect();
            let distinct: BTreeSet<_> = ranks.iter().collect();
            assert_eq!(ranks.len(), distinct.len(), "round {round} of {:?}", self.roster);
            assert!(ranks.iter().all(|rank| *rank < 4));
        }
        assert!(self.roster.members.len() <= 8, "{:?}", self.roster);
    }

    /// While anybody is there, rounds go on.
    fn finish(&mut self) {
        let present = self.roster.members.iter().any(|member| member.until_round.is_none());
        if !self.roster.started || !present {
            return;
        }
        let wanted = self.versions().max + 3;
        for _ in 0..10 {
            let roster = self.roster.clone();
            (0..SHARDS).for_each(|shard| self.close(shard, &roster));
        }
        assert!(self.versions().min >= wanted, "stuck at {:?} with {:?}", self.versions, self.roster);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_tenure_of_a_rank_counts_in_a_round_and_rounds_go_on(
        workers in 1..4_u32,
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let mut history = History {
            record: record(workers),
            roster: empty(),
            versions: [0; SHARDS],
            fences: Vec::new(),
            counted: BTreeMap::new(),
            lives: 0,
        };
        for step in steps {
            match step {
                Step::Claim { rank, same_id, races } => history.claim(rank.into(), same_id, races),
                Step::Remove { pick, races } => history.remove(pick, races),
                Step::Close { shard } => {
                    let roster = history.roster.clone();
                    history.close(usize::from(shard), &roster);
                }
            }
            history.check();
        }
        history.finish();
    }
}

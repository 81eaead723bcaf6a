//! What must hold after every step, worked out independently of those who are watched.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use thalweg_functions::{Contribution, ShardContext};
use thalweg_invoker::Job;
use thalweg_protocol::{
    CommitOutcome, GradientHeader, Head, Kind, Ledger, Rank, Round, ShardIndex, Version, frame,
};

/// An invariant does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Its id, as in ARCHITECTURE.md.
    pub invariant: &'static str,
    /// What was found.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.what)
    }
}

/// What a worker contributes: values whose sum depends on the order of adding.
pub(crate) fn values(rank: Rank, shard: ShardIndex, round: Round, elements: usize) -> Vec<u8> {
    let seed = (u64::from(rank) * 31 + u64::from(shard) * 7 + round) as f32;
    let big = if rank.is_multiple_of(2) { 3.0e7 } else { -3.0e7 };
    let value = |index: usize| big * seed + 0.123 * seed / (index as f32 + 1.0);
    (0..elements).flat_map(|index| value(index).to_le_bytes()).collect()
}

/// Folds what a ledger names, from nothing but the ledger.
fn replay(job: &Job, shard: ShardIndex, before: &[u8], ledger: &Ledger) -> Bytes {
    let elements = job.record.layout.len(shard);
    let mut fold = job.function(ledger.round).begin(ShardContext { elements, groups: &[] }, before);
    for rank in ledger.counted.iter() {
        let values = values(rank, shard, ledger.round, elements);
        fold.accept(Contribution { rank, weight: 1.0, values: &values });
    }
    let mut out = Vec::new();
    fold.finish(&mut out);
    out.into()
}

/// The history so far.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    /// Every version of every shard: head, ledger, state.
    versions: BTreeMap<(ShardIndex, Version), (Head, Ledger, Bytes)>,
    pub(crate) newest: BTreeMap<ShardIndex, Version>,
    /// What each worker was last given.
    given: BTreeMap<(Rank, ShardIndex), Version>,
    pub(crate) violation: Option<Violation>,
}

impl Checker {
    pub(crate) fn fail(&mut self, invariant: &'static str, what: String) {
        self.violation.get_or_insert(Violation { invariant, what });
    }

    /// The store begins with these heads and states.
    pub(crate) fn begin(&mut self, shard: ShardIndex, head: Head, state: Bytes) {
        self.versions.insert((shard, 0), (head, Ledger::default(), state));
        self.newest.insert(shard, 0);
    }

    /// The store has answered a commit.
    pub(crate) fn committed(
        &mut self,
        job: &Job,
        shard: ShardIndex,
        ledger: &Ledger,
        state: &Bytes,
        outcome: &CommitOutcome,
    ) {
        let (head, again) = match outcome {
            CommitOutcome::Committed(head) => (*head, false),
            CommitOutcome::AlreadyCommitted(head) => (*head, true),
            _ => return,
        };
        let newest = self.newest.get(&shard).copied().unwrap_or(0);
        if again {
            let same = self.versions.get(&(shard, head.version)).is_some_and(|(known, ..)| *known == head);
            if !same {
                self.fail(
                    "I1",
                    format!("shard {shard}: version {} was never committed like that", head.version),
                );
            }
            return;
        }
        if head.version != newest + 1 || ledger.round != head.version {
            return self.fail("I1", format!("shard {shard} goes from version {newest} to {}", head.version));
        }
        let members: Vec<_> = job.roster.of_round(ledger.round).map(|member| member.rank).collect();
        let strangers: Vec<_> = ledger.counted.iter().filter(|rank| !members.contains(rank)).collect();
        if !strangers.is_empty() || ledger.counted.iter().any(|rank| ledger.void.contains(rank)) {
            return self.fail("I1", format!("shard {shard} round {}: {ledger:?}", ledger.round));
        }
        let all = ledger.counted.len() + ledger.void.len() == members.len();
        if job.record.spec.quorum.is_none() && !all {
            return self
                .fail("I1", format!("shard {shard} round {} closed without all: {ledger:?}", ledger.round));
        }
        let Some((_, _, before)) = self.versions.get(&(shard, newest)) else { return };
        let expected = replay(job, shard, before, ledger);
        if expected != *state {
            let text = format!(
                "shard {shard} version {}: the state is not what its ledger says, {ledger:?}",
                head.version
            );
            return self.fail("I5", text);
        }
        self.versions.insert((shard, head.version), (head, ledger.clone(), state.clone()));
        self.newest.insert(shard, head.version);
    }

    /// The store has come back with these heads.
    pub(crate) fn reopened(&mut self, heads: &[Head]) {
        for (shard, head) in (0..).zip(heads) {
            let newest = self.newest.get(&shard).copied().unwrap_or(0);
            let known = self.versions.get(&(shard, newest)).map(|(known, ..)| *known);
            if known != Some(*head) {
                let text =
                    format!("shard {shard} was at {known:?}, after a kill of the store it is at {head:?}");
                self.fail("I2", text);
            }
        }
    }

    /// A worker was given a version of a shard.
    pub(crate) fn given(
        &mut self,
        rank: Rank,
        shard: ShardIndex,
        head: Head,
        parameters: &[u8],
        may_skip: bool,
    ) {
        match self.versions.get(&(shard, head.version)) {
            Some((known, _, state)) if *known == head && state[..parameters.len()] == *parameters => {}
            Some(_) => {
                self.fail(
                    "I4",
                    format!("rank {rank}, shard {shard}: other bits of version {}", head.version),
                );
            }
            None => {
                self.fail(
                    "I2",
                    format!("rank {rank}, shard {shard}: version {} is not stored", head.version),
                );
            }
        }
        let last = self.given.insert((rank, shard), head.version).unwrap_or(0);
        if head.version <= last || (head.version > last + 1 && !may_skip) {
            self.fail("I3", format!("rank {rank}, shard {shard}: version {} after {last}", head.version));
        }
    }

    /// A contribution has left its queue for good, though perhaps not its only copy.
    pub(crate) fn acknowledged(&mut self, frame: &Bytes, copied: bool) {
        let Ok((header, _)) = frame::open::<GradientHeader>(Kind::Gradient, frame) else { return };
        if !copied && self.newest.get(&header.shard).copied().unwrap_or(0) < header.round {
            let text = format!(
                "rank {}, shard {}: the contribution to round {} was acknowledged, the store is at version {}",
                header.rank,
                header.shard,
                header.round,
                self.newest.get(&header.shard).copied().unwrap_or(0)
            );
            self.fail("I2", text);
        }
    }
}

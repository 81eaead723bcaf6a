//! What must hold of rounds that are open, worked out from the partial commits that the store has answered.

use std::collections::{BTreeMap, BTreeSet};

use thalweg_protocol::{
    CommitOutcome, Epoch, FoldOrder, Head, Incarnation, Ledger, Member, Partial, PartialCommit, Rank, Roster,
    Round, ShardIndex,
};
use thalweg_store::Standing;

use super::{Checked, Checker, Shard};

/// The open round of one shard.
#[derive(Debug, Default)]
pub(super) struct Open {
    /// The newest partial commit that was answered.
    answered: Option<(Head, Partial)>,
    /// Ranks in any partial commit that reached the store.
    tried: BTreeSet<Rank>,
}

impl Open {
    /// Whether a rank was folded into the round before it closed.
    pub(super) fn may_contain(&self, rank: Rank) -> bool {
        self.tried.contains(&rank)
    }

    /// Whether a contribution is safe in a round that builds on `version`.
    pub(super) fn keeps(&self, round: Round, rank: Rank) -> bool {
        self.answered.as_ref().is_some_and(|(head, partial)| {
            head.version + 1 == round && partial.ledger.round == round && partial.ledger.contains(rank)
        })
    }
}

/// Whose contribution a rank is in a round: that of the newest roster in which it counts. A rank that was folded
/// before the round closed may have left since.
pub(super) fn member_of<'a>(
    rosters: &'a BTreeMap<Epoch, Roster>,
    ledger: &Ledger,
    rank: Rank,
) -> Option<&'a Member> {
    let mut rosters = rosters.range(..=ledger.roster_epoch).rev().map(|(_, roster)| roster);
    rosters.find_map(|roster| roster.of_round(ledger.round).find(|member| member.rank == rank))
}

/// The order in which a round was folded.
pub(super) fn order(order: FoldOrder, ledger: &Ledger) -> Vec<Rank> {
    match order {
        FoldOrder::Rank => ledger.counted.iter().collect(),
        FoldOrder::Arrival => ledger.order.clone(),
    }
}

/// What is wrong with a recorded order, if anything.
pub(super) fn wrong_order(order: FoldOrder, ledger: &Ledger) -> Option<String> {
    let mut ranks = ledger.order.clone();
    ranks.sort_unstable();
    let wrong = match order {
        FoldOrder::Rank => !ranks.is_empty(),
        FoldOrder::Arrival => ranks != ledger.counted.iter().collect::<Vec<_>>(),
    };
    wrong.then(|| format!("an order of others than are counted: {ledger:?}"))
}

impl Checked {
    fn needed(&self, round: Round) -> Epoch {
        let fences = self.fences.iter().filter(|(from, _)| *from <= round);
        fences.map(|(_, epoch)| *epoch).max().unwrap_or(0)
    }

    fn wrong_partial(&self, shard: &Shard, head: Head, partial: &Partial) -> Option<String> {
        let newest = shard.newest().0;
        let ledger = &partial.ledger;
        if (head.version, head.state_id) != (newest.version, newest.state_id)
            || ledger.round != head.version + 1
        {
            return Some(format!("a partial commit of {head:?} where {newest:?} is in place"));
        }
        let Some(roster) = self.rosters.get(&ledger.roster_epoch) else {
            return Some(format!("folded by roster {}, which never was", ledger.roster_epoch));
        };
        let known = shard.open.answered.as_ref().filter(|(known, before)| {
            known.version == head.version && before.since >= self.needed(ledger.round)
        });
        if let Some((known, before)) = known {
            let kept = |rank| ledger.counted.contains(rank) == before.ledger.counted.contains(rank);
            let forgotten = before.ledger.counted.iter().find(|rank| !kept(*rank));
            if forgotten.is_some() || head.fold_count < known.fold_count {
                return Some(format!("{ledger:?} after {:?}: somebody was forgotten", before.ledger));
            }
            if !ledger.order.starts_with(&before.ledger.order) {
                return Some(format!("{ledger:?} after {:?}: another order", before.ledger));
            }
        }
        let stranger = ledger.counted.iter().chain(ledger.void.iter()).find(|rank| {
            !shard.open.may_contain(*rank) && roster.of_round(ledger.round).all(|member| member.rank != *rank)
        });
        if let Some(rank) = stranger {
            return Some(format!("rank {rank} is no member: {ledger:?}"));
        }
        wrong_order(self.job.record.spec.policy.order, ledger)
    }
}

impl Checker {
    /// A fence was asked for.
    pub(crate) fn fenced(&mut self, job: Incarnation, epoch: Epoch, from_round: Round) {
        if let Some(checked) = self.jobs.get_mut(&job) {
            checked.fences.push((from_round, epoch));
        }
    }

    /// A job is about to be deleted: its open rounds go first.
    pub(crate) fn deleting(&mut self, job: Incarnation) {
        for shard in self.jobs.get_mut(&job).into_iter().flat_map(|checked| &mut checked.shards) {
            shard.open.answered = None;
        }
    }

    /// A partial commit has reached the store.
    pub(crate) fn attempted_partial(&mut self, commit: &PartialCommit) {
        let shards = self.jobs.get_mut(&commit.job).map(|checked| &mut checked.shards);
        let Some(shard) = shards.and_then(|shards| shards.get_mut(commit.shard as usize)) else { return };
        let round = commit.partial.ledger.round;
        if round == shard.newest().0.version + 1 {
            let ledger = &commit.partial.ledger;
            shard.open.tried.extend(ledger.counted.iter().chain(ledger.void.iter()));
        }
    }

    /// The store has answered a partial commit.
    pub(crate) fn committed_partial(&mut self, commit: &PartialCommit, outcome: &CommitOutcome) {
        if let CommitOutcome::Committed(head) | CommitOutcome::AlreadyCommitted(head) = outcome {
            self.in_place(commit.job, commit.shard, *head, &commit.partial);
        }
    }

    /// A partial commit is in place.
    fn in_place(&mut self, job: Incarnation, index: ShardIndex, head: Head, partial: &Partial) {
        let Some(checked) = self.jobs.get(&job) else { return };
        let Some(shard) = checked.shards.get(index as usize) else { return };
        if partial.ledger.round <= shard.newest().0.version {
            // Answered late: the round has closed meanwhile.
            return;
        }
        if let Some(what) = checked.wrong_partial(shard, head, partial) {
            return self.fail("I1", Some(index), format!("shard {index}: {what}"));
        }
        if let Some(shard) =
            self.jobs.get_mut(&job).and_then(|checked| checked.shards.get_mut(index as usize))
        {
            shard.open.answered = Some((head, partial.clone()));
        }
    }

    /// The store has come back with a shard's open round.
    pub(crate) fn reopened_partial(&mut self, job: Incarnation, index: ShardIndex, standing: &Standing) {
        let Some(checked) = self.jobs.get(&job) else { return };
        let Some(shard) = checked.shards.get(index as usize) else { return };
        let known = shard.open.answered.as_ref().filter(|(head, partial)| {
            head.version == standing.head.version && partial.since >= checked.needed(head.version + 1)
        });
        let found = standing.partial.as_ref();
        let forgotten = known.filter(|(head, partial)| {
            let kept = |found: &Partial| {
                partial.ledger.counted.iter().all(|rank| found.ledger.counted.contains(rank))
                    && standing.head.fold_count >= head.fold_count
            };
            !found.is_some_and(kept)
        });
        if let Some((head, partial)) = forgotten {
            let text = format!(
                "shard {index} was at {head:?} with {:?}, after the store came back at {:?} with {found:?}",
                partial.ledger, standing.head
            );
            return self.fail("I2", Some(index), text);
        }
        // One that was not answered before the store died may be there, too.
        if let Some(partial) = found {
            self.in_place(job, index, standing.head, partial);
        }
    }
}

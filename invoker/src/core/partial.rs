//! Rounds that last: folding what is there before the others have come (rule P12).

use thalweg_protocol::{ErrorCode, FoldOrder, Head, JobKey, Nudge, Partial, Rank, Round, WireError};
use thalweg_store::StoreError;

use super::{
    Action, Core, Delivery, InvocationId, Millis, ShardKey, Timer,
    round::Invocation,
    shard::{Entry, Gathering, Known, Shard},
};
use crate::{Job, metrics};

/// Pause after a partial commit that failed: it is no hurry.
const PUT_OFF_MS: Millis = 1000;

/// How far our clock may be behind that of who nudges: so near its deadline a nudge waits, and the round with it.
pub(super) const NUDGED_EARLY_MS: Millis = 10_000;

/// The gathered contributions that may be folded now: in rank order those that nobody is missing before; on arrival
/// all. None while no round may close.
pub(super) fn foldable<'a>(
    job: &Job,
    round: Round,
    gathering: &'a Gathering,
    partial: Option<&Partial>,
) -> Vec<&'a Entry> {
    if !job.roster.started || job.record.life.paused.is_some() {
        return Vec::new();
    }
    let end = match job.record.spec.policy.order {
        FoldOrder::Arrival => Rank::MAX,
        FoldOrder::Rank => {
            let present = |rank: Rank| {
                partial.is_some_and(|partial| partial.ledger.contains(rank))
                    || gathering.entries.contains_key(&rank)
            };
            let missing = job.roster.of_round(round).map(|member| member.rank).filter(|rank| !present(*rank));
            missing.min().unwrap_or(Rank::MAX)
        }
    };
    gathering.entries.range(..end).map(|(_, entry)| entry).collect()
}

impl Core {
    /// Folds some of a round that cannot close yet, where enough has come or has waited long enough.
    pub(super) fn fold_early(&mut self, key: ShardKey, job: &Job, round: Round, partial: Option<&Partial>) {
        let Some(shard) = self.shards.get(&key) else { return };
        let Some(gathering) = shard.rounds.get(&round) else { return };
        let (linger, now) = (self.limits.linger, self.now);
        let enough = |entries: &mut dyn Iterator<Item = &Entry>| {
            let (count, bytes) =
                entries.fold((0, 0), |(count, bytes), entry| (count + 1, bytes + entry.held_bytes()));
            count >= self.limits.partial_entries || (bytes > 0 && bytes * 4 >= self.limits.held_bytes)
        };
        let oldest = |entries: &mut dyn Iterator<Item = &Entry>| entries.map(|entry| entry.published).min();
        // Looked at with every contribution: what is costly to find out only where it may be so.
        let Some(since) = oldest(&mut gathering.entries.values()) else { return };
        let due = if enough(&mut gathering.entries.values()) || since + linger <= now {
            let entries = foldable(job, round, gathering, partial);
            let Some(since) = oldest(&mut entries.iter().copied()) else { return };
            if enough(&mut entries.iter().copied()) { now } else { since + linger }
        } else {
            since + linger
        };
        let due = due.max(shard.partial_after);
        if due <= now {
            self.ready.insert(key);
        } else if shard.linger_armed.is_none_or(|armed| armed <= now || due < armed) {
            self.later(due - now, Timer::Evaluate(key));
            if let Some(shard) = self.shards.get_mut(&key) {
                shard.linger_armed = Some(due);
            }
        }
    }

    /// Contributions that are in the open round already: somebody has sent them again. `true` when where the shard
    /// stands has to be asked again first.
    pub(super) fn settle_folded(
        &mut self,
        key: ShardKey,
        round: Round,
        partial: Option<&Partial>,
        asked: u64,
    ) -> bool {
        let (Some(partial), Some(shard)) = (partial, self.shards.get_mut(&key)) else { return false };
        if shard.invoking.is_some() {
            return false;
        }
        let Some(gathering) = shard.rounds.get_mut(&round) else { return false };
        let folded: Vec<_> =
            gathering.entries.values().filter(|entry| partial.ledger.contains(entry.rank)).collect();
        // A fence may have undone what was folded (rule P4), and its rank may be somebody else's now.
        if folded.iter().any(|entry| entry.arrived > asked) {
            self.read_head(key);
            return true;
        }
        let folded: Vec<_> = folded.iter().map(|entry| entry.rank).collect();
        for rank in folded {
            let Some(entry) = gathering.entries.remove(&rank) else { continue };
            self.held_bytes -= entry.held_bytes();
            metrics::leftover("duplicate");
            self.actions.push(Action::Acknowledge(shard.partition, entry.sequence));
        }
        if gathering.entries.is_empty() {
            shard.rounds.remove(&round);
        }
        false
    }

    /// Committed: what was folded is the store's, so it leaves the queue.
    pub(super) fn finish_partial(&mut self, id: InvocationId, key: ShardKey, head: Head) {
        let Some(invocation) = self.invocations.remove(&id) else { return };
        let Some(shard) = self.shards.get_mut(&key) else { return };
        let Invocation { plan, partial, sequences, .. } = invocation;
        metrics::partial(plan.inputs.len(), plan.input_bytes());
        self.tally.partial(&plan.job.record.spec.key, (plan.input_bytes(), plan.result_bytes()));
        shard.invoking = None;
        let known = shard.head.take().filter(|known| known.head.closed() == head.closed());
        shard.head = known.map(|known| Known {
            head,
            ledger: known.ledger,
            partial: Some(partial),
            asked: self.clock,
        });
        if let Some(gathering) = shard.rounds.get_mut(&plan.round) {
            gathering.entries.retain(|_, entry| {
                let folded = sequences.contains(&entry.sequence);
                self.held_bytes -= if folded { entry.held_bytes() } else { 0 };
                !folded
            });
            if gathering.entries.is_empty() {
                shard.rounds.remove(&plan.round);
            }
        }
        for sequence in sequences {
            self.actions.push(Action::Acknowledge(plan.partition, sequence));
        }
        self.progress(plan.partition);
        self.ease(plan.partition);
        self.evaluate(key);
    }

    /// A partial commit has no answer: it may have happened.
    pub(super) fn put_off_partial(&mut self, id: InvocationId, key: ShardKey, error: &StoreError) {
        tracing::debug!(%error, "partial commit is put off");
        if let Some(shard) = self.shards.get_mut(&key) {
            shard.partial_after = self.now + PUT_OFF_MS;
        }
        self.abandon(id, key);
    }

    /// Somebody asks to look at an open round: by the newest roster, and where the shard stands now.
    pub(super) fn nudged(&mut self, delivery: Delivery, key: JobKey, nudge: &Nudge, seen: u32) {
        // The first answer may be that of a look-up begun before.
        if seen < 2 {
            return self.await_look_up(delivery, key, seen);
        }
        let job = self.jobs.get(&key).cloned().flatten().filter(|job| job.record.incarnation == nudge.job);
        let job = job.filter(|job| job.record.state.end(&key).is_none());
        let Some(job) = job else {
            return self.actions.push(Action::Acknowledge(delivery.partition, delivery.sequence));
        };
        let strays = nudge.shard >= job.record.layout.shards()
            || job.record.partition(nudge.shard) != delivery.partition;
        if strays {
            let text = format!("a nudge for shard {} in partition {}", nudge.shard, delivery.partition);
            return self.dead_letter(delivery, Some(key), WireError::new(ErrorCode::Malformed, text));
        }
        let shard_key = (nudge.job, nudge.shard);
        let (clock, partition) = (self.clock, delivery.partition);
        let shard = self.shards.entry(shard_key).or_insert_with(|| Shard::new(key, partition));
        if shard.nudges.iter().all(|(sequence, _)| *sequence != delivery.sequence) {
            shard.nudges.push((delivery.sequence, clock));
        }
        if shard.invoking.is_none() {
            self.read_head(shard_key);
        }
        self.evaluate(shard_key);
    }

    /// Nothing is to be done about a round for now: who asked has been heard.
    pub(super) fn settle_nudges(&mut self, key: ShardKey, asked: u64) {
        let Some(shard) = self.shards.get_mut(&key) else { return };
        let (heard, early): (Vec<_>, Vec<_>) =
            std::mem::take(&mut shard.nudges).into_iter().partition(|(_, arrived)| *arrived <= asked);
        let partition = shard.partition;
        self.actions.extend(heard.into_iter().map(|(sequence, _)| Action::Acknowledge(partition, sequence)));
        let ask = !early.is_empty();
        shard.nudges = early;
        if ask {
            self.read_head(key);
        }
    }
}

//! Closing a round: who is in it, folding, committing, publishing, acknowledging.

use bytes::Bytes;
use thalweg_protocol::{
    Commit, CommitOutcome, ErrorCode, FoldOrder, Head, Ledger, Partial, PartialCommit, ResultHeader, Round,
    StateId, WireError,
};
use thalweg_store::{Standing, StoreError};

use super::{
    Action, Core, FoldError, Gathered, Input, InvocationId, Millis, Plan, RETRY_MS, ShardKey, Timer, gone,
    may_pass,
    partial::{NUDGED_EARLY_MS, foldable},
    shard::{Gathering, Known, Payload, Shard},
};
use crate::{Job, metrics};

/// A round between its close and its acknowledgement.
#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) plan: Plan,
    /// What the round contains with it.
    pub(super) partial: Partial,
    /// The folded state, or the suspended fold, while a commit may have to be repeated.
    pub(super) state: Option<Bytes>,
    /// Everything that is in it now: to be acknowledged once it is committed.
    pub(super) sequences: Vec<u64>,
}

/// What the gathered contributions of a round amount to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Close { below_quorum: bool },
    WaitUntil(Millis),
    Wait,
}

/// Decides whether a round closes (rule P6): by what was gathered, and what has been folded already.
pub(super) fn verdict(
    job: &Job,
    round: Round,
    gathering: Option<&Gathering>,
    partial: Option<&Partial>,
    now: Millis,
) -> Verdict {
    if !job.roster.started || job.record.life.paused.is_some() {
        return Verdict::Wait;
    }
    let folded = |rank| partial.is_some_and(|partial| partial.ledger.contains(rank));
    let (mut members, mut present) = (0_usize, 0_usize);
    for member in job.roster.of_round(round) {
        // Folded for somebody who held this rank before; the fence under way tells whether that still counts.
        if !member.confirmed && folded(member.rank) {
            return Verdict::Wait;
        }
        members += 1;
        present += usize::from(folded(member.rank));
    }
    // Who has left since, but was folded, stays counted.
    let mut counted = partial.map_or(0, |partial| partial.ledger.counted.len());
    for entry in gathering.into_iter().flat_map(|gathering| gathering.entries.values()) {
        let tenure = job.tenure(entry.worker);
        if tenure.is_some_and(|member| member.rank == entry.rank && member.counts_in(round))
            && !folded(entry.rank)
        {
            present += 1;
            counted += usize::from(!entry.is_void());
        }
    }
    let quorum = job.record.spec.quorum.map(|quorum| quorum as usize);
    if members > 0 && present == members {
        return Verdict::Close { below_quorum: quorum.is_some_and(|quorum| counted < quorum) };
    }
    let Some(quorum) = quorum else { return Verdict::Wait };
    if counted < quorum || present == 0 {
        return Verdict::Wait;
    }
    let due = first(gathering, partial).unwrap_or(now).saturating_add(job.record.spec.deadline_ms);
    if now >= due { Verdict::Close { below_quorum: false } } else { Verdict::WaitUntil(due) }
}

/// When the broker stored the round's first contribution.
fn first(gathering: Option<&Gathering>, partial: Option<&Partial>) -> Option<Millis> {
    let gathered = gathering.and_then(|gathering| gathering.first);
    gathered.into_iter().chain(partial.map(|partial| partial.first)).min()
}

impl Core {
    /// Looks at a shard again after anything about it has changed.
    pub(super) fn evaluate(&mut self, key: ShardKey) {
        // Found complete by an older look: doubts may have come up since.
        self.ready.remove(&key);
        let Some(shard) = self.shards.get_mut(&key) else { return };
        if shard.invoking.is_none() && !shard.contested.is_empty() {
            for delivery in std::mem::take(&mut shard.contested) {
                self.deliver(delivery, 1);
            }
        }
        let Some(shard) = self.shards.get(&key) else { return };
        let Some(job) = self.job_of(key, &shard.key.clone()) else { return };
        let Some(Known { head, ledger, partial, asked }) = shard.head.clone() else {
            if shard.entries() > 0 {
                self.read_head(key);
            }
            return;
        };
        self.settle_past(key, &job, head.version, &ledger);
        if self.doubts(key, &job, &head, asked) {
            return;
        }
        let round = head.version + 1;
        if self.settle_folded(key, round, partial.as_ref(), asked) {
            return;
        }
        self.drop_departed(key, &job, round);
        let Some(shard) = self.shards.get_mut(&key) else { return };
        if shard.invoking.is_none() {
            let verdict = verdict(&job, round, shard.rounds.get(&round), partial.as_ref(), self.now);
            match verdict {
                Verdict::Close { .. } => {
                    self.ready.insert(key);
                }
                Verdict::WaitUntil(due) => {
                    if shard.deadline_armed != Some((round, due)) {
                        shard.deadline_armed = Some((round, due));
                        self.later(due.saturating_sub(self.now), Timer::Evaluate(key));
                    }
                    self.fold_early(key, &job, round, partial.as_ref());
                    // By the clock of whoever asked it may be due already.
                    if due > self.now + NUDGED_EARLY_MS {
                        self.settle_nudges(key, asked);
                    }
                }
                Verdict::Wait => {
                    self.fold_early(key, &job, round, partial.as_ref());
                    self.settle_nudges(key, asked);
                }
            }
        }
        if self.shards.len() > self.limits.idle_shards && self.shards.get(&key).is_some_and(Shard::is_idle) {
            self.shards.remove(&key);
        }
    }

    pub(super) fn read_head(&mut self, key: ShardKey) {
        if self.shards.contains_key(&key) && !self.reading.contains_key(&key) {
            self.reading.insert(key, self.clock);
            self.actions.push(Action::ReadHead(key));
        }
    }

    pub(super) fn head_read(&mut self, key: ShardKey, result: Result<Box<Standing>, StoreError>) {
        let Some(since) = self.reading.get(&key).copied() else { return };
        match result {
            Ok(standing) => {
                let Standing { head, ledger, partial } = *standing;
                self.reading.remove(&key);
                if let Some(shard) = self.shards.get_mut(&key) {
                    shard.head = Some(Known { head, ledger, partial, asked: since });
                }
                self.evaluate(key);
            }
            Err(error) if may_pass(&error) => {
                tracing::debug!(%error, "head not read; trying again");
                self.later(RETRY_MS, Timer::ReadHead(key));
            }
            Err(error) => {
                self.reading.remove(&key);
                self.store_refused(key, &error);
            }
        }
    }

    /// The store says that it cannot hold this job's rounds.
    fn store_refused(&mut self, key: ShardKey, error: &StoreError) {
        let Some(name) = self.shards.get(&key).map(|shard| shard.key.clone()) else { return };
        if error.code() == ErrorCode::Gone {
            self.drop_job(&name, key.0, &gone(&name));
            self.look_up(name);
        } else if let Some(job) = self.job_of(key, &name) {
            self.fail_job(&job, error.to_wire());
        }
    }

    /// Contributions of rounds that are over: duplicates and late ones (rule P9).
    fn settle_past(&mut self, key: ShardKey, job: &Job, version: u64, ledger: &Ledger) {
        let Some(shard) = self.shards.get_mut(&key) else { return };
        let invoking = shard.invoking;
        let mut again = false;
        while let Some(first) = shard.rounds.first_entry() {
            let round = *first.key();
            if round > version || invoking.is_some() {
                break;
            }
            for entry in first.remove().entries.into_values() {
                self.held_bytes -= entry.held_bytes();
                let duplicate = round < version || ledger.contains(entry.rank);
                metrics::leftover(if duplicate { "duplicate" } else { "late" });
                again |= round == version;
                self.actions.push(Action::Acknowledge(shard.partition, entry.sequence));
            }
        }
        // Somebody sent it again because the result did not arrive. Once per version is enough: whoever
        // misses that one asks the store.
        if again && shard.republished != Some(version) {
            shard.republished = Some(version);
            self.actions.push(Action::Republish(job.record.spec.key.clone(), key));
        }
    }

    /// Checks that contributions build on what the store has (rule P27); `true` when that cannot be
    /// said yet, or is not so.
    fn doubts(&mut self, key: ShardKey, job: &Job, head: &Head, asked: u64) -> bool {
        let Some(shard) = self.shards.get(&key) else { return true };
        let doubtful = |round: Round, base: StateId| round > head.version + 1 || base != head.state_id;
        let suspects: Vec<_> = shard
            .rounds
            .range(head.version + 1..)
            .flat_map(|(round, gathering)| gathering.entries.values().map(move |entry| (*round, entry)))
            .filter(|(round, entry)| doubtful(*round, entry.base))
            .map(|(round, entry)| (round, entry.rank, entry.arrived))
            .collect();
        if suspects.is_empty() {
            return false;
        }
        if shard.invoking.is_some() {
            // Its commit decides where the shard stands.
            return true;
        }
        if suspects.iter().any(|(_, _, arrived)| *arrived > asked) {
            self.read_head(key);
            return true;
        }
        let partition = shard.partition;
        let mut diverged = None;
        for (round, rank, _) in suspects {
            let entry = (self.shards.get_mut(&key))
                .and_then(|shard| shard.rounds.get_mut(&round))
                .and_then(|gathering| gathering.entries.remove(&rank));
            let Some(entry) = entry else { continue };
            self.held_bytes -= entry.held_bytes();
            let error = if round > head.version + 2 {
                let text = format!("round {round} of shard {}: it stands at version {}", key.1, head.version);
                WireError::new(ErrorCode::RoundAhead, text)
            } else {
                let text = format!(
                    "rank {rank} builds on another state of shard {} than the store has (version {}): rounds were \
                     lost; delete the job and start it again from a checkpoint",
                    key.1, head.version
                );
                diverged = Some(WireError::new(ErrorCode::Diverged, text));
                diverged.clone().unwrap_or_else(|| gone(&job.record.spec.key))
            };
            self.reject(&job.record.spec.key, &entry, key.1, round, error);
            self.actions.push(Action::Acknowledge(partition, entry.sequence));
        }
        if let Some(shard) = self.shards.get_mut(&key) {
            shard.rounds.retain(|_, gathering| !gathering.entries.is_empty());
        }
        let fails = diverged.is_some();
        if let Some(error) = diverged {
            self.fail_job(job, error);
        }
        fails
    }

    /// Contributions of workers that no longer count in this round.
    fn drop_departed(&mut self, key: ShardKey, job: &Job, round: Round) {
        let Some(shard) = self.shards.get_mut(&key) else { return };
        if shard.invoking.is_some() {
            return;
        }
        let Some(gathering) = shard.rounds.get_mut(&round) else { return };
        let departed: Vec<_> = gathering
            .entries
            .values()
            .filter(|entry| {
                !job.tenure(entry.worker).is_some_and(|m| m.rank == entry.rank && m.counts_in(round))
            })
            .map(|entry| entry.rank)
            .collect();
        for rank in departed {
            if let Some(entry) = gathering.entries.remove(&rank) {
                self.held_bytes -= entry.held_bytes();
                metrics::leftover("departed");
                self.actions.push(Action::Acknowledge(shard.partition, entry.sequence));
            }
        }
        if gathering.entries.is_empty() {
            shard.rounds.remove(&round);
        }
    }

    /// Starts invocations of complete rounds, as many as may run at once.
    pub(super) fn start_ready(&mut self) {
        let waiting = std::mem::take(&mut self.ready);
        let (solo, others): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|key| self.is_careful(*key));
        // A careful one runs alone, so that a death can be laid at its door.
        for key in solo {
            if self.invocations.is_empty() {
                self.start(key, true);
            } else {
                self.ready.insert(key);
            }
        }
        // One that waits for that holds the others back, or its turn might never come.
        let alone =
            !self.ready.is_empty() || self.invocations.values().any(|invocation| invocation.plan.careful);
        for key in others {
            if alone || self.invocations.len() >= self.limits.invocations {
                self.ready.insert(key);
            } else {
                self.start(key, false);
            }
        }
    }

    fn is_careful(&self, key: ShardKey) -> bool {
        (self.shards.get(&key))
            .and_then(|shard| self.partitions.get(&shard.partition))
            .is_some_and(|holding| holding.careful_until.is_some())
    }

    fn start(&mut self, key: ShardKey, careful: bool) {
        let Some(shard) = self.shards.get(&key) else { return };
        let drains = self.partitions.get(&shard.partition).is_none_or(|holding| holding.draining);
        if drains || self.failing.contains_key(&key.0) {
            return;
        }
        let (Some(job), Some(known)) = (self.job_of(key, &shard.key), shard.head.clone()) else {
            return;
        };
        let Known { head: expect, partial, .. } = known;
        let round = expect.version + 1;
        let gathering = shard.rounds.get(&round);
        // The roster may have changed since the round was found complete.
        let verdict = verdict(&job, round, gathering, partial.as_ref(), self.now);
        let mut entries = match (&verdict, gathering) {
            (_, None) => Vec::new(),
            (Verdict::Close { .. }, Some(gathering)) => gathering.entries.values().collect(),
            (_, Some(gathering)) => foldable(&job, round, gathering, partial.as_ref()),
        };
        let (suspend, below_quorum) = match verdict {
            Verdict::Close { below_quorum } => (false, below_quorum),
            _ if entries.is_empty() => return,
            _ => (true, false),
        };
        let by_arrival = job.record.spec.policy.order == FoldOrder::Arrival;
        if by_arrival {
            entries.sort_unstable_by_key(|entry| entry.sequence);
        }
        let (first, roster_epoch) = (first(gathering, partial.as_ref()), job.roster.epoch);
        let since = partial.as_ref().map_or(roster_epoch, |partial| partial.since);
        let ledger = partial.map(|partial| partial.ledger).unwrap_or_default();
        let revision = job.settings(round).revision;
        let mut ledger = Ledger { round, roster_epoch, revision, below_quorum, ..ledger };
        let mut inputs = Vec::new();
        for entry in &entries {
            let values = match &entry.payload {
                Payload::Held(bytes) => Some(bytes.clone()),
                Payload::Parked => None,
                Payload::Void => {
                    ledger.void.insert(entry.rank);
                    continue;
                }
            };
            ledger.counted.insert(entry.rank);
            if by_arrival {
                ledger.order.push(entry.rank);
            }
            let (rank, weight, sequence) = (entry.rank, entry.weight, entry.sequence);
            inputs.push(Input { rank, weight, sequence, checksum: entry.checksum, values });
        }
        let newest = entries.iter().max_by_key(|entry| (entry.published, entry.sequence));
        let last = newest.map_or(self.now, |entry| entry.published);
        let last_rank = newest.map(|entry| entry.rank);
        metrics::waited(self.now.saturating_sub(last));
        let sequences = entries.iter().map(|entry| entry.sequence).collect();
        let partial = Partial { ledger, first: first.unwrap_or(self.now), since };
        let partition = shard.partition;
        let gathered = Gathered { first: partial.first.min(last), last, last_rank };
        let plan = Plan { job, shard: key.1, round, expect, partition, inputs, suspend, careful, gathered };
        self.next_id += 1;
        let id = self.next_id;
        self.actions.push(Action::Fold(id, plan.clone()));
        self.invocations.insert(id, Invocation { plan, partial, state: None, sequences });
        if let Some(shard) = self.shards.get_mut(&key) {
            shard.invoking = Some(id);
        }
    }

    pub(super) fn folded(&mut self, id: InvocationId, result: Result<Bytes, FoldError>) {
        let Some(invocation) = self.invocations.get_mut(&id) else { return };
        let key = (invocation.plan.job.record.incarnation, invocation.plan.shard);
        match result {
            Ok(state) => {
                invocation.state = Some(state);
                self.commit_again(id);
            }
            Err(FoldError::Unavailable(reason)) => {
                tracing::debug!(reason, "fold waits");
                self.later(RETRY_MS, Timer::Refold(id));
            }
            Err(FoldError::Refused(error)) => {
                self.invocations.remove(&id);
                if let Some(shard) = self.shards.get_mut(&key) {
                    shard.invoking = None;
                }
                self.store_refused(key, &error);
            }
            Err(FoldError::ParkedGone(rank)) => {
                let round = invocation.plan.round;
                self.invocations.remove(&id);
                if let Some(shard) = self.shards.get_mut(&key) {
                    shard.invoking = None;
                    let gone =
                        shard.rounds.get_mut(&round).and_then(|gathering| gathering.entries.remove(&rank));
                    // Parked, so it holds no bytes here; a resend brings it back.
                    drop(gone);
                }
                self.evaluate(key);
            }
            Err(FoldError::Moved) => self.abandon(id, key),
            Err(FoldError::Function(reason)) => {
                let job = invocation.plan.job.clone();
                self.invocations.remove(&id);
                if let Some(shard) = self.shards.get_mut(&key) {
                    shard.invoking = None;
                }
                let text = format!("function {} failed: {reason}", job.record.spec.function.name);
                self.fail_job(&job, WireError::new(ErrorCode::Internal, text));
            }
        }
    }

    pub(super) fn fold_again(&mut self, id: InvocationId) {
        if let Some(invocation) = self.invocations.get(&id) {
            self.actions.push(Action::Fold(id, invocation.plan.clone()));
        }
    }

    pub(super) fn commit_again(&mut self, id: InvocationId) {
        let Some(invocation) = self.invocations.get(&id) else { return };
        let Some(state) = invocation.state.clone() else { return };
        let plan = &invocation.plan;
        let (job, shard, expect) = (plan.job.record.incarnation, plan.shard, plan.expect);
        if plan.suspend {
            let commit = PartialCommit { job, shard, expect, partial: invocation.partial.clone() };
            self.actions.push(Action::CommitPartial(id, commit, state));
            return;
        }
        let commit = Commit {
            job,
            shard,
            expect,
            ledger: invocation.partial.ledger.clone(),
            function: plan.job.function(plan.round).digest(),
        };
        self.actions.push(Action::Commit(id, commit, state));
    }

    /// The shard stands elsewhere: read where, and judge its contributions anew.
    pub(super) fn abandon(&mut self, id: InvocationId, key: ShardKey) {
        self.invocations.remove(&id);
        if let Some(shard) = self.shards.get_mut(&key) {
            shard.invoking = None;
            shard.head = None;
        }
        self.read_head(key);
    }

    pub(super) fn committed(&mut self, id: InvocationId, result: Result<CommitOutcome, StoreError>) {
        let Some(invocation) = self.invocations.get(&id) else { return };
        let key = (invocation.plan.job.record.incarnation, invocation.plan.shard);
        let suspends = invocation.plan.suspend;
        match result {
            Ok(CommitOutcome::Committed(head) | CommitOutcome::AlreadyCommitted(head)) if suspends => {
                self.finish_partial(id, key, head);
            }
            Ok(CommitOutcome::Committed(head) | CommitOutcome::AlreadyCommitted(head)) => {
                self.finish(id, key, head);
            }
            Ok(CommitOutcome::Conflict(_)) => {
                metrics::conflict();
                self.abandon(id, key);
            }
            Ok(CommitOutcome::StaleRoster { needed }) => {
                let name = invocation.plan.job.record.spec.key.clone();
                tracing::debug!(job = %name, needed, "round was closed by an old roster; reading the new one");
                self.invocations.remove(&id);
                if let Some(shard) = self.shards.get_mut(&key) {
                    shard.invoking = None;
                }
                self.look_up(name);
            }
            // It may have happened; and what completes the round must not wait for it.
            Err(error) if suspends && may_pass(&error) => self.put_off_partial(id, key, &error),
            Err(error) if may_pass(&error) => {
                tracing::debug!(%error, "commit is tried again");
                self.later(RETRY_MS, Timer::Recommit(id));
            }
            Err(error) => {
                self.invocations.remove(&id);
                if let Some(shard) = self.shards.get_mut(&key) {
                    shard.invoking = None;
                }
                self.store_refused(key, &error);
            }
        }
    }

    /// Committed: publish, then acknowledge (rule P1).
    fn finish(&mut self, id: InvocationId, key: ShardKey, head: Head) {
        let Some(invocation) = self.invocations.remove(&id) else { return };
        let Some(shard) = self.shards.get_mut(&key) else { return };
        let Invocation { plan, partial: Partial { ledger, .. }, state, sequences } = invocation;
        let result_bytes = plan.result_bytes();
        let values = state.unwrap_or_default().slice(..result_bytes as usize);
        metrics::round(ledger.counted.len(), plan.input_bytes(), ledger.below_quorum);
        let header = ResultHeader { job: key.0, shard: key.1, head, ledger: ledger.clone() };
        self.actions.push(Action::Publish(plan.job.record.spec.key.clone(), header, values));
        shard.invoking = None;
        shard.head = Some(Known { head, ledger, partial: None, asked: self.clock });
        let mut last_published = None;
        if let Some(gathering) = shard.rounds.remove(&plan.round) {
            for entry in gathering.entries.into_values() {
                self.held_bytes -= entry.held_bytes();
                // A contribution that came after the close was not counted.
                if sequences.contains(&entry.sequence) {
                    last_published = last_published.max(Some(entry.published));
                } else {
                    metrics::leftover("late");
                    self.actions.push(Action::Acknowledge(plan.partition, entry.sequence));
                }
            }
        }
        let delay = last_published.map_or(0, |last| self.now.saturating_sub(last));
        let (job, bytes) = (&plan.job.record.spec.key, (plan.input_bytes(), result_bytes));
        self.tally.round(job, plan.round, bytes, delay, self.now);
        let nudges = std::mem::take(&mut shard.nudges).into_iter().map(|(sequence, _)| sequence);
        for sequence in sequences.into_iter().chain(nudges) {
            self.actions.push(Action::Acknowledge(plan.partition, sequence));
        }
        self.progress(plan.partition);
        self.ease(plan.partition);
        self.evaluate(key);
    }

    /// A partition has come further: what was tried alone has killed nobody.
    pub(super) fn progress(&mut self, partition: u16) {
        if self.is_careful_partition(partition) {
            self.actions.push(Action::ClearSuspect(partition));
        }
    }

    /// Ends carefulness once the backlog of an unclean takeover is done (rule P18).
    pub(super) fn ease(&mut self, partition: u16) {
        let Some(holding) = self.partitions.get_mut(&partition) else { return };
        let Some(until) = holding.careful_until else { return };
        let waiting = self
            .shards
            .values()
            .filter(|shard| shard.partition == partition)
            .flat_map(|shard| shard.rounds.values())
            .flat_map(|gathering| gathering.entries.values())
            .any(|entry| entry.sequence <= until);
        if holding.delivered_until >= until && !waiting {
            holding.careful_until = None;
        }
    }
}

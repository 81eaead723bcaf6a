//! What may be sent, in which order (rules P8, P20).

use std::time::Instant;

use bytes::Bytes;
use thalweg_protocol::{
    Epoch, FrameBuilder, GradientHeader, Head, Incarnation, Kind, Rank, Round, ShardIndex,
};

use super::{Action, Engine, Sent, UNCONFIRMED_BYTES};

/// A void for the round that follows `head`, from a worker of this job, life and rank.
#[must_use]
pub fn void_after(
    (job, worker, rank): (Incarnation, Incarnation, Rank),
    roster_epoch: Epoch,
    shard: ShardIndex,
    head: &Head,
) -> Bytes {
    let header = GradientHeader {
        job,
        shard,
        round: head.version + 1,
        worker,
        rank,
        roster_epoch,
        base: head.state_id,
        weight: 0.0,
        void: true,
        elements: 0,
    };
    FrameBuilder::new(Kind::Gradient, &header, 0).finish()
}

/// The first round of a worker that counts from `from_round` on, once it may begin: round `from_round` waits for
/// it, so every shard comes to stand right before it. With a quorum others may have gone on meanwhile, and be in
/// the middle of a later round; it begins where they are, once they all stand at one version.
#[must_use]
pub fn first_round(heads: &[Head], from_round: Round) -> Option<Round> {
    let newest = heads.iter().map(|head| head.version).max().unwrap_or(0);
    let level = heads.iter().all(|head| head.version == newest && head.version + 1 >= from_round);
    level.then(|| newest.max(from_round - 1) + 1)
}

/// Shards on which a worker that joins holds others up: they are behind, and the round that they are at counts
/// it from `from_round` on. It has not seen the state before that round, so it contributes voids.
pub fn held_up(heads: &[Head], from_round: Round) -> impl Iterator<Item = (ShardIndex, &Head)> {
    let newest = heads.iter().map(|head| head.version).max().unwrap_or(0);
    let behind = move |head: &Head| head.version < newest && head.version + 1 >= from_round;
    (0..).zip(heads).filter(move |(_, head)| behind(head))
}

impl Engine {
    /// Sends what may be sent: the lowest shard without a result always, others within window and pace, and
    /// in ascending order where the window does not cover the model (rule P20). So a straggler's next
    /// message always fits, and no set of workers can block each other.
    pub(super) fn pump(&mut self, now: Instant) {
        if self.failure.is_some() {
            return;
        }
        let any_order = self.any_order();
        let mut next_in_order = self.lowest_missing;
        let mut from = 0;
        while let Some(index) = self.ready.range(from..).next().copied() {
            from = index + 1;
            let Some(len) = self.frame_len(index) else { continue };
            let lowest = index == self.lowest_missing;
            if !any_order {
                // Everything below must be sent or done.
                while next_in_order < index && !self.is_waiting(next_in_order) {
                    next_in_order += 1;
                }
                if next_in_order < index {
                    break;
                }
            }
            if !lowest && self.in_flight + len > self.window_bytes.min(self.pace_bytes) {
                break;
            }
            if self.unconfirmed > 0 && self.unconfirmed + len > UNCONFIRMED_BYTES {
                break;
            }
            let created = self.streams.get(index as usize).copied().unwrap_or_default();
            let round = self.round;
            let Some(pushed) = &mut self.shards[index as usize].pushed else { continue };
            if pushed.not_before.is_some_and(|at| now < at) {
                continue;
            }
            pushed.sent = Some(Sent { at: now, accepted: false, stream_created: created });
            self.actions.push(Action::Publish(index, round, pushed.frame.clone()));
            self.ready.remove(&index);
            self.in_flight += len;
            self.unconfirmed += len;
        }
    }

    /// Contributes a void to the rounds that others have begun ahead of this worker, so that none of them
    /// waits for it: should a quorum no longer be reached, they close when everybody is accounted for.
    pub(super) fn stand_aside(&mut self, now: Instant) {
        if self.failure.is_some() || self.target == self.round {
            return;
        }
        for index in 0..self.shards.len() {
            let shard = &self.shards[index];
            let Some(head) = shard.head.filter(|head| (self.round..self.target).contains(&head.version))
            else {
                continue;
            };
            let round = head.version + 1;
            let recent = |(sent, at): (Round, Instant)| sent == round && now < at + 2 * self.timing.ask_after;
            if shard.stood_aside.is_some_and(recent) {
                continue;
            }
            let shard = u32::try_from(index).unwrap_or(u32::MAX);
            let identity = (self.job, self.worker, self.rank);
            let frame = void_after(identity, self.roster_epoch, shard, &head);
            self.unconfirmed += frame.len() as u64;
            self.actions.push(Action::Publish(shard, round, frame));
            self.shards[index].stood_aside = Some((round, now));
        }
    }

    /// Whether a shard still has to be sent in this round.
    fn is_waiting(&self, shard: ShardIndex) -> bool {
        let state = &self.shards[shard as usize];
        match &state.pushed {
            Some(pushed) => pushed.sent.is_none(),
            None => state.head.is_none_or(|head| head.version < self.round),
        }
    }
}

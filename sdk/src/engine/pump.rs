//! What may be sent, in which order (rules P8, P20).

use std::time::Instant;

use thalweg_protocol::{FrameBuilder, GradientHeader, Kind, Round, ShardIndex};

use super::{Action, Engine, Sent, UNCONFIRMED_BYTES};

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
            let header = GradientHeader {
                job: self.job,
                shard: u32::try_from(index).unwrap_or(u32::MAX),
                round,
                worker: self.worker,
                rank: self.rank,
                roster_epoch: self.roster_epoch,
                base: head.state_id,
                weight: 0.0,
                void: true,
                elements: 0,
            };
            let frame = FrameBuilder::new(Kind::Gradient, &header, 0).finish();
            self.unconfirmed += frame.len() as u64;
            self.actions.push(Action::Publish(header.shard, round, frame));
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

//! What others say of what was pushed: the broker, the store, invokers.

use std::time::{Duration, Instant};

use bytes::Bytes;
use thalweg_protocol::{ErrorCode, Head, Ledger, Reject, Round, ShardIndex, WireError};

use super::{Action, Engine, SPARE_BYTES};

impl Engine {
    /// The broker has accepted a publication.
    pub fn confirmed(&mut self, shard: ShardIndex, round: Round, len: u64, now: Instant) -> Vec<Action> {
        self.unconfirmed = self.unconfirmed.saturating_sub(len);
        if round == self.round
            && let Some(pushed) = &mut self.shards[shard as usize].pushed
        {
            pushed.refusals = 0;
            if let Some(sent) = &mut pushed.sent {
                sent.accepted = true;
            }
        }
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    /// The broker has refused a publication, or did not answer (429, 10077, 503, time-out): it is tried
    /// again after a pause with jitter in 0 to 1.
    pub fn refused(
        &mut self,
        shard: ShardIndex,
        round: Round,
        len: u64,
        jitter: f64,
        now: Instant,
    ) -> Vec<Action> {
        self.unconfirmed = self.unconfirmed.saturating_sub(len);
        if round == self.round
            && let Some(pushed) = &mut self.shards[shard as usize].pushed
            && pushed.sent.is_some()
        {
            let ceiling = Duration::from_millis(20).saturating_mul(1 << pushed.refusals.min(10));
            pushed.refusals += 1;
            pushed.not_before =
                Some(now + ceiling.min(self.timing.retry_cap).mul_f64(jitter.clamp(0.05, 1.0)));
            pushed.sent = None;
            self.in_flight = self.in_flight.saturating_sub(len);
            self.ready.insert(shard);
        }
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    /// A result, published or fetched.
    pub fn result(
        &mut self,
        shard: ShardIndex,
        head: Head,
        ledger: Ledger,
        values: Bytes,
        now: Instant,
    ) -> Vec<Action> {
        self.roster_epoch = self.roster_epoch.max(ledger.roster_epoch);
        let Some(known) = self.shards.get_mut(shard as usize) else { return Vec::new() };
        let before = known.version();
        if head.version < self.round || before >= Some(head.version) {
            return Vec::new();
        }
        if self.full_roster && head.version > self.round {
            let text = format!(
                "rank {}: round {} was closed without it, so its lease has ended: join again",
                self.rank, head.version
            );
            self.fail(WireError::new(ErrorCode::LeaseLost, text));
            return Vec::new();
        }
        self.news += 1;
        self.progress_at = now;
        self.asked_at = None;
        self.patience = 1;
        known.head = Some(head);
        known.result = Some((ledger, values));
        if let Some(pushed) = known.pushed.take() {
            self.waiting -= 1;
            if pushed.sent.is_some() {
                self.in_flight = self.in_flight.saturating_sub(pushed.frame.len() as u64);
            }
            self.ready.remove(&shard);
            if self.spare_bytes + pushed.frame.len() <= SPARE_BYTES {
                self.spare_bytes += pushed.frame.len();
                self.spare.push(pushed.frame);
            }
        }
        if head.version > self.target {
            self.aim(head.version);
        } else if before < Some(self.target) && head.version == self.target {
            self.missing -= 1;
        }
        self.find_lowest();
        self.stand_aside(now);
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    /// The store's and the registry's answers to [`Action::Ask`]: where shards stand, and when each
    /// shard's stream was created.
    pub fn heads(&mut self, heads: &[Head], streams: Vec<i64>, now: Instant) -> Vec<Action> {
        for (index, head) in heads.iter().enumerate().take(self.shards.len()) {
            let shard = u32::try_from(index).unwrap_or(u32::MAX);
            let known = &mut self.shards[index];
            if head.version >= self.round && known.head.is_none_or(|known| head.version > known.version) {
                self.actions.push(Action::Fetch(shard));
                continue;
            }
            let created = streams.get(index).copied().unwrap_or_default();
            let Some(pushed) = &mut known.pushed else { continue };
            let Some(sent) = &pushed.sent else { continue };
            let lost = sent.stream_created != created && sent.stream_created != 0;
            let old = now.duration_since(sent.at) >= self.timing.resend_after;
            let never = !sent.accepted && now.duration_since(sent.at) >= self.timing.ask_after * 2;
            if lost || never {
                pushed.sent = None;
                self.in_flight = self.in_flight.saturating_sub(pushed.frame.len() as u64);
                self.ready.insert(shard);
            } else if old {
                // It may have been folded already, into a round that lasts.
                self.actions.push(Action::Look(shard));
            }
        }
        self.streams = streams;
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    /// The store's answer to [`Action::Look`]: where the shard stands, and whether its open round contains this
    /// worker's contribution. If so there is nothing to send; if not, it is sent again.
    pub fn looked(&mut self, shard: ShardIndex, head: Head, contained: bool, now: Instant) -> Vec<Action> {
        let round = self.round;
        let Some(known) = self.shards.get_mut(shard as usize) else { return Vec::new() };
        if let Some(pushed) = known.pushed.as_mut().filter(|_| head.version + 1 == round)
            && let Some(sent) = pushed.sent.as_mut()
            && now.duration_since(sent.at) >= self.timing.resend_after
        {
            if contained {
                sent.at = now;
            } else {
                pushed.sent = None;
                self.in_flight = self.in_flight.saturating_sub(pushed.frame.len() as u64);
                self.ready.insert(shard);
            }
        }
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    /// Somebody did not take a contribution.
    pub fn reject(&mut self, reject: Reject, now: Instant) -> Vec<Action> {
        let ours = reject.worker.is_none_or(|worker| worker == self.worker)
            && reject.job.is_none_or(|job| job == self.job);
        if !ours {
            return Vec::new();
        }
        let Some((shard, round)) = reject.at else {
            // Bytes that nobody could read: perhaps ours, broken on the way, perhaps a stranger's on our
            // subject. Sending again is harmless in both cases.
            if reject.error.code == ErrorCode::BadChecksum {
                let all = 0..u32::try_from(self.shards.len()).unwrap_or(u32::MAX);
                all.for_each(|shard| self.send_again(shard, now));
            } else {
                self.advice = Some(reject.error);
            }
            self.pump(now);
            return std::mem::take(&mut self.actions);
        };
        let current = round == self.round;
        match reject.error.code {
            ErrorCode::BadChecksum | ErrorCode::NotReady | ErrorCode::Unavailable | ErrorCode::Internal
                if current =>
            {
                self.send_again(shard, now);
            }
            // The contribution stays in its round as a void, and the result will come; or its job fails,
            // and that is told too.
            ErrorCode::WrongShape
            | ErrorCode::NonFinite
            | ErrorCode::Malformed
            | ErrorCode::PoisonContribution
                if current =>
            {
                self.advice = Some(reject.error);
            }
            _ if current => self.fail(reject.error),
            _ => {}
        }
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    /// Sends a shard's contribution once more, if it was sent at all.
    fn send_again(&mut self, shard: ShardIndex, now: Instant) {
        if let Some(pushed) = self.shards.get_mut(shard as usize).and_then(|shard| shard.pushed.as_mut())
            && pushed.sent.take().is_some()
        {
            pushed.not_before = Some(now + Duration::from_millis(50));
            self.in_flight = self.in_flight.saturating_sub(pushed.frame.len() as u64);
            self.ready.insert(shard);
        }
    }
}

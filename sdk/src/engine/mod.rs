//! The sans-I/O heart of a worker: what to send when, what to keep, what to ask (rules P7, P10, P20).
//!
//! Frames, results, replies and time come in; publications and questions come out. What was pushed is
//! kept until its result is held.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use bytes::Bytes;
use thalweg_protocol::{
    ErrorCode, Head, Incarnation, Ledger, Rank, Reject, Round, ShardIndex, Version, WireError,
};

#[cfg(test)]
mod tests;

/// Waits of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Silence after which the store is asked where the shards stand.
    pub ask_after: Duration,
    /// Age at which a payload is sent again though the broker has accepted it.
    pub resend_after: Duration,
    /// Longest pause between tries of a publication that the broker refuses.
    pub retry_cap: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            ask_after: Duration::from_secs(1),
            resend_after: Duration::from_secs(30),
            retry_cap: Duration::from_secs(1),
        }
    }
}

/// Unconfirmed bytes on their way to the broker: enough to keep the socket busy, few enough that the
/// broker's ingest buffers never overflow.
const UNCONFIRMED_BYTES: u64 = 16 << 20;

/// Memory of finished frames that is kept for the next ones.
const SPARE_BYTES: usize = 64 << 20;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Publish a shard's frame; answer with [`Engine::confirmed`] or [`Engine::refused`].
    Publish(ShardIndex, Round, Bytes),
    /// Ask the store where all shards stand, and the registry when the streams were created; answer with
    /// [`Engine::heads`].
    Ask,
    /// Read a shard from the store; answer with [`Engine::result`].
    Fetch(ShardIndex),
}

/// The result of one shard.
#[derive(Clone, Debug)]
pub struct ShardResult {
    /// Where the shard stands.
    pub head: Head,
    /// Who was counted.
    pub ledger: Ledger,
    /// Its parameters; empty once they have been pulled.
    pub values: Bytes,
}

#[derive(Debug, Default)]
struct Shard {
    head: Option<Head>,
    result: Option<(Ledger, Bytes)>,
    pushed: Option<Pushed>,
}

#[derive(Debug)]
struct Pushed {
    frame: Bytes,
    sent: Option<Sent>,
    /// Not before, after a refusal.
    not_before: Option<Instant>,
    refusals: u32,
}

#[derive(Debug)]
struct Sent {
    at: Instant,
    /// Accepted by the stream that was created then.
    accepted: bool,
    stream_created: i64,
}

/// See the module.
#[derive(Debug)]
pub struct Engine {
    timing: Timing,
    job: Incarnation,
    worker: Incarnation,
    rank: Rank,
    model_bytes: u64,
    shards: Vec<Shard>,
    round: Round,
    /// Version that completes the round: more than `round` when others went on without this worker.
    target: Version,
    window_bytes: u64,
    in_flight: u64,
    unconfirmed: u64,
    /// Pushed, not sent.
    ready: BTreeSet<ShardIndex>,
    /// Shards whose version is below the target.
    missing: usize,
    lowest_missing: ShardIndex,
    asked_at: Option<Instant>,
    progress_at: Instant,
    roster_epoch: u64,
    streams: Vec<i64>,
    failure: Option<WireError>,
    advice: Option<WireError>,
    /// Frames whose results are held, for their memory.
    spare: Vec<Bytes>,
    spare_bytes: usize,
    actions: Vec<Action>,
}

impl Engine {
    /// A worker whose next round is `round`, on shards that stand at `heads`.
    #[must_use]
    pub fn new(
        timing: Timing,
        (job, worker, rank): (Incarnation, Incarnation, Rank),
        heads: Vec<Head>,
        round: Round,
        model_bytes: u64,
        now: Instant,
    ) -> Self {
        let shards: Vec<_> =
            heads.into_iter().map(|head| Shard { head: Some(head), ..Shard::default() }).collect();
        Self {
            timing,
            job,
            worker,
            rank,
            model_bytes,
            missing: shards.len(),
            shards,
            round,
            target: round,
            window_bytes: 0,
            in_flight: 0,
            unconfirmed: 0,
            ready: BTreeSet::new(),
            lowest_missing: 0,
            asked_at: None,
            progress_at: now,
            roster_epoch: 0,
            streams: Vec::new(),
            failure: None,
            advice: None,
            spare: Vec::new(),
            spare_bytes: 0,
            actions: Vec::new(),
        }
    }

    /// The round that is being pushed.
    #[must_use]
    pub fn round(&self) -> Round {
        self.round
    }

    /// Newest roster seen.
    #[must_use]
    pub fn roster_epoch(&self) -> u64 {
        self.roster_epoch
    }

    /// Why nothing will ever come back, if so.
    #[must_use]
    pub fn failure(&self) -> Option<&WireError> {
        self.failure.as_ref()
    }

    /// What was said of this round's contribution, if anything: advice until the result shows it.
    #[must_use]
    pub fn advice(&self) -> Option<&WireError> {
        self.advice.as_ref()
    }

    /// Where a shard stands, as far as this worker knows.
    #[must_use]
    pub fn head(&self, shard: ShardIndex) -> Option<Head> {
        self.shards.get(shard as usize)?.head
    }

    /// Whether tensors may be pushed in any order: the window covers the whole model.
    #[must_use]
    pub fn any_order(&self) -> bool {
        self.window_bytes >= self.model_bytes
    }

    /// Bytes pushed and not yet sent.
    #[must_use]
    pub fn unsent_bytes(&self) -> u64 {
        self.ready.iter().filter_map(|shard| self.frame_len(*shard)).sum()
    }

    /// Whether anything is under way.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.shards.iter().any(|shard| shard.pushed.is_some())
    }

    /// The lowest shard that has no result of this round.
    #[must_use]
    pub fn lowest_missing(&self) -> Option<ShardIndex> {
        (self.missing > 0).then_some(self.lowest_missing)
    }

    /// Whether a shard was pushed in this round.
    #[must_use]
    pub fn is_pushed(&self, shard: ShardIndex) -> bool {
        let shard = &self.shards[shard as usize];
        shard.pushed.is_some() || shard.head.is_some_and(|head| head.version >= self.round)
    }

    /// Whether every shard has a result of the same version, at least this round's.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// The version that completes the round.
    #[must_use]
    pub fn target(&self) -> Version {
        self.target
    }

    /// The result of a shard, once its version is at least this round.
    #[must_use]
    pub fn shard_result(&self, shard: ShardIndex) -> Option<ShardResult> {
        let shard = self.shards.get(shard as usize)?;
        let head = shard.head.filter(|head| head.version >= self.round)?;
        let (ledger, values) = shard.result.as_ref()?;
        Some(ShardResult { head, ledger: ledger.clone(), values: values.clone() })
    }

    /// Memory for the next frame: that of a finished one which nobody else holds, or none.
    #[must_use]
    pub fn buffer(&mut self) -> Vec<u8> {
        let Some(index) = self.spare.iter().position(Bytes::is_unique) else { return Vec::new() };
        let frame = self.spare.swap_remove(index);
        self.spare_bytes -= frame.len();
        Vec::from(frame)
    }

    /// Drops a shard's values; its ledger stays until the next round.
    pub fn release(&mut self, shard: ShardIndex) {
        if let Some((_, values)) = self.shards.get_mut(shard as usize).and_then(|shard| shard.result.as_mut())
        {
            *values = Bytes::new();
        }
    }

    /// Begins the next round, when this one is complete; returns whether it was.
    pub fn advance(&mut self) -> bool {
        if !self.is_complete() {
            return false;
        }
        self.round = self.target + 1;
        self.target = self.round;
        self.missing = self.shards.len();
        self.lowest_missing = 0;
        self.advice = None;
        self.shards.iter_mut().for_each(|shard| shard.result = None);
        true
    }

    /// Takes a shard's contribution to this round.
    pub fn push(&mut self, shard: ShardIndex, frame: Bytes, now: Instant) -> Vec<Action> {
        if self.is_pushed(shard) {
            // Others have closed this round already: it is late and will not be counted.
            return Vec::new();
        }
        if !self.is_active() {
            self.progress_at = now;
        }
        self.shards[shard as usize].pushed =
            Some(Pushed { frame, sent: None, not_before: None, refusals: 0 });
        self.ready.insert(shard);
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    /// The gateway grants this many bytes in flight.
    pub fn window(&mut self, bytes: u64, roster_epoch: u64, now: Instant) -> Vec<Action> {
        self.window_bytes = bytes;
        self.roster_epoch = self.roster_epoch.max(roster_epoch);
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

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
        let newer = known.head.is_none_or(|known| head.version > known.version);
        if head.version < self.round || !newer {
            return Vec::new();
        }
        self.progress_at = now;
        self.asked_at = None;
        known.head = Some(head);
        known.result = Some((ledger, values));
        if let Some(pushed) = known.pushed.take() {
            if pushed.sent.is_some() {
                self.in_flight = self.in_flight.saturating_sub(pushed.frame.len() as u64);
            }
            self.ready.remove(&shard);
            if self.spare_bytes + pushed.frame.len() <= SPARE_BYTES {
                self.spare_bytes += pushed.frame.len();
                self.spare.push(pushed.frame);
            }
        }
        self.target = self.target.max(head.version);
        self.count_missing();
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    fn count_missing(&mut self) {
        let below = |shard: &Shard| shard.head.is_none_or(|head| head.version < self.target);
        self.missing = self.shards.iter().filter(|shard| below(shard)).count();
        // A shard that still needs this worker comes before one that others have gone on with.
        let open = |shard: &Shard| shard.head.is_none_or(|head| head.version < self.round);
        let lowest = self.shards.iter().position(open).or_else(|| self.shards.iter().position(below));
        let lowest = lowest.unwrap_or(0);
        self.lowest_missing = u32::try_from(lowest).unwrap_or(u32::MAX);
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
            let resend = known.pushed.as_mut().and_then(|pushed| {
                let sent = pushed.sent.as_ref()?;
                let lost = sent.stream_created != created && sent.stream_created != 0;
                let old = now.duration_since(sent.at) >= self.timing.resend_after;
                let never = !sent.accepted && now.duration_since(sent.at) >= self.timing.ask_after * 2;
                (lost || old || never).then(|| {
                    pushed.sent = None;
                    pushed.frame.len() as u64
                })
            });
            if let Some(len) = resend {
                self.in_flight = self.in_flight.saturating_sub(len);
                self.ready.insert(shard);
            }
        }
        self.streams = streams;
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

    /// Nothing will come back any more.
    pub fn fail(&mut self, error: WireError) {
        self.failure.get_or_insert(error);
    }

    /// The rank this worker holds.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The connection was lost and is back: ask at once.
    pub fn reconnected(&mut self, now: Instant) -> Vec<Action> {
        if self.is_active() {
            self.asked_at = Some(now);
            self.actions.push(Action::Ask);
        }
        std::mem::take(&mut self.actions)
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        let waiting = self.missing > 0 && (self.is_active() || self.target > self.round);
        let quiet = now.duration_since(self.asked_at.unwrap_or(self.progress_at).max(self.progress_at));
        if waiting && quiet >= self.timing.ask_after {
            self.asked_at = Some(now);
            self.actions.push(Action::Ask);
        }
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    fn frame_len(&self, shard: ShardIndex) -> Option<u64> {
        self.shards[shard as usize].pushed.as_ref().map(|pushed| pushed.frame.len() as u64)
    }

    /// Sends what may be sent: the lowest shard without a result always, others within the window, and
    /// in ascending order where the window does not cover the model (rule P20). So a straggler's next
    /// message always fits, and no set of workers can block each other.
    fn pump(&mut self, now: Instant) {
        if self.failure.is_some() {
            return;
        }
        let any_order = self.any_order();
        let mut next_in_order = self.lowest_missing;
        let candidates: Vec<_> = self.ready.iter().copied().collect();
        for index in candidates {
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
            if !lowest && self.in_flight + len > self.window_bytes {
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

    /// Whether a shard still has to be sent in this round.
    fn is_waiting(&self, shard: ShardIndex) -> bool {
        let state = &self.shards[shard as usize];
        match &state.pushed {
            Some(pushed) => pushed.sent.is_none(),
            None => state.head.is_none_or(|head| head.version < self.round),
        }
    }
}

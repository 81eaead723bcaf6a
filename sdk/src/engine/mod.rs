//! The sans-I/O heart of a worker: what to send when, what to keep, what to ask (rules P7, P10, P20).
//!
//! Frames, results, replies and time come in; publications and questions come out. What was pushed is
//! kept until its result is held.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use bytes::Bytes;
use thalweg_protocol::{Head, Incarnation, Ledger, Rank, Round, ShardIndex, Version, WireError};

mod answers;
mod pump;
#[cfg(test)]
mod tests;

pub use pump::{first_round, held_up, void_after};

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

/// Unconfirmed bytes on their way to the broker: enough to keep the socket busy, few enough that neither
/// the broker's ingest buffers nor its caches overflow.
const UNCONFIRMED_BYTES: u64 = 4 << 20;

/// Bytes without a result that a worker begins with, whatever its window: what waits at the broker for longer
/// than it takes to be folded only costs memory and caches (measured: a tenth of all CPU time).
const PACE_BYTES: u64 = 12 << 20;

/// Silence after which that pace doubles: others may be waiting for just what was held back.
const PACE_PATIENCE: Duration = Duration::from_millis(40);

/// Longest pause between two questions, in terms of [`Timing::ask_after`].
const MOST_PATIENCE: u32 = 8;

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
    /// Read what a shard's open round contains from the store; answer with [`Engine::looked`].
    Look(ShardIndex),
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
    /// The void last sent for a round that others closed ahead of this worker, and when.
    stood_aside: Option<(Round, Instant)>,
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

impl Shard {
    fn version(&self) -> Option<Version> {
        self.head.map(|head| head.version)
    }
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
    /// Bytes in flight that are reasonable now, and when that was last raised.
    pace_bytes: u64,
    paced_at: Instant,
    unconfirmed: u64,
    /// Shards with a contribution that has no result yet.
    waiting: usize,
    /// Pushed, not sent.
    ready: BTreeSet<ShardIndex>,
    /// Shards whose version is below the target.
    missing: usize,
    lowest_missing: ShardIndex,
    asked_at: Option<Instant>,
    /// How many times as long as usual to wait before asking again: nothing new was heard so often.
    patience: u32,
    progress_at: Instant,
    roster_epoch: u64,
    streams: Vec<i64>,
    failure: Option<WireError>,
    /// Every round waits for this worker.
    full_roster: bool,
    /// Counts results and failures, for whoever waits for one.
    news: u64,
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
            pace_bytes: PACE_BYTES,
            paced_at: now,
            unconfirmed: 0,
            waiting: 0,
            ready: BTreeSet::new(),
            lowest_missing: 0,
            asked_at: None,
            patience: 1,
            progress_at: now,
            roster_epoch: 0,
            streams: Vec::new(),
            failure: None,
            full_roster: false,
            news: 0,
            advice: None,
            spare: Vec::new(),
            spare_bytes: 0,
            actions: Vec::new(),
        }
    }

    /// Every round of the job waits for all its members (it has no quorum): a round that was closed without
    /// this worker then means that it is no member any more.
    #[must_use]
    pub fn full_roster(mut self, full: bool) -> Self {
        self.full_roster = full;
        self
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

    /// Changes with every result that was taken in, and with a failure.
    #[must_use]
    pub fn news(&self) -> u64 {
        self.news
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
        self.waiting > 0
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
        self.pace_bytes = PACE_BYTES;
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
            self.patience = 1;
        }
        self.shards[shard as usize].pushed =
            Some(Pushed { frame, sent: None, not_before: None, refusals: 0 });
        self.waiting += 1;
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

    /// Another version completes the round.
    fn aim(&mut self, target: Version) {
        self.target = target;
        self.missing = self.shards.iter().filter(|shard| shard.version() < Some(target)).count();
    }

    /// Finds the lowest shard without a result. One that still needs this worker comes before one that
    /// others have gone on with.
    fn find_lowest(&mut self) {
        let at = |index: ShardIndex| self.shards.get(index as usize);
        // Within a round versions only grow, so the search goes on where it stopped.
        while at(self.lowest_missing).is_some_and(|shard| shard.version() >= Some(self.round)) {
            self.lowest_missing += 1;
        }
        if at(self.lowest_missing).is_none() && self.missing > 0 {
            let below = self.shards.iter().position(|shard| shard.version() < Some(self.target));
            self.lowest_missing = below.and_then(|index| u32::try_from(index).ok()).unwrap_or(0);
        }
    }

    /// Nothing will come back any more.
    pub fn fail(&mut self, error: WireError) {
        self.failure.get_or_insert(error);
        self.news += 1;
    }

    /// The rank this worker holds.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The connection was lost and is back: ask at once.
    pub fn reconnected(&mut self, now: Instant) -> Vec<Action> {
        self.patience = 1;
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
        if waiting && quiet >= self.timing.ask_after * self.patience {
            self.asked_at = Some(now);
            // A round may last for hours, and have thousands of workers.
            self.patience = (self.patience * 2).min(MOST_PATIENCE);
            self.actions.push(Action::Ask);
        }
        if !self.ready.is_empty() && now >= self.progress_at.max(self.paced_at) + PACE_PATIENCE {
            self.paced_at = now;
            self.pace_bytes = self.pace_bytes.saturating_mul(2);
        }
        self.stand_aside(now);
        self.pump(now);
        std::mem::take(&mut self.actions)
    }

    fn frame_len(&self, shard: ShardIndex) -> Option<u64> {
        self.shards[shard as usize].pushed.as_ref().map(|pushed| pushed.frame.len() as u64)
    }
}

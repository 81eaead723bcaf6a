//! Open rounds that nobody looks at: their contributions have left the queues, so there may be no invoker (rule P12).
//!
//! The leading gateway asks the store which rounds are open. Where a deadline has passed, or the roster has changed
//! since the last partial commit, it puts a nudge into the shard's queue: depth brings an invoker, which decides by
//! itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use thalweg_broker::Queues;
use thalweg_protocol::{
    Epoch, Incarnation, JobRecord, Kind, Nudge, OpenRound, Roster, ShardIndex, StoreId, Version, frame,
    limits, subjects,
};
use thalweg_store::{ShardStore, StoreError};

use crate::{metrics, service::Gateway};

/// Open rounds of one store looked at in one sweep; the next one goes on behind them.
const MOST_ROUNDS: usize = 16 * limits::MAX_OPEN_ROUNDS as usize;

/// Tells the time of day, milliseconds since the Unix epoch. The simulation has its own.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Why somebody should look at an open round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reason {
    version: Version,
    epoch: Epoch,
    due: bool,
}

/// A round that is due closes when it is looked at; where it has not, whoever looked knew something older, so that
/// it is nudged again after so long. One that waits for somebody who has joined does not close, and each nudge costs
/// an invoker's start: the pause doubles, up to the longest.
const AGAIN_MS: u64 = 10_000;
const LONGEST_AGAIN_MS: u64 = 600_000;

/// A nudge that was given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given {
    reason: Reason,
    at: u64,
    again: u64,
}

/// A shard of a job, in the order in which stores tell of them.
type At = (Incarnation, ShardIndex);

/// The shards that were nudged.
pub(crate) type Nudged = BTreeMap<At, Given>;

/// Where the next sweep goes on, of stores that have more open rounds than one looks at.
pub(crate) type Bookmarks = BTreeMap<StoreId, At>;

/// What one sweep saw of a store: all open rounds behind `from` up to `to`; `None` for the beginning and the end.
struct Look {
    open: Vec<OpenRound>,
    from: Option<At>,
    to: Option<At>,
}

impl Look {
    async fn at(store: &dyn ShardStore, from: Option<At>, most: usize) -> Result<Self, StoreError> {
        let (mut open, mut to) = (Vec::new(), from);
        loop {
            let page = store.open_rounds(to, limits::MAX_OPEN_ROUNDS).await?;
            let last = page.len() < limits::MAX_OPEN_ROUNDS as usize;
            to = page.last().map_or(to, |round| Some((round.job, round.shard)));
            open.extend(page);
            if last {
                return Ok(Self { open, from, to: None });
            }
            if open.len() >= most {
                return Ok(Self { open, from, to });
            }
        }
    }

    /// Whether a round of this shard is not open, if it is not among those that were seen.
    fn covers(&self, at: &At) -> bool {
        self.from.is_none_or(|from| *at > from) && self.to.is_none_or(|to| *at <= to)
    }
}

impl Given {
    /// The nudge to give now, if any.
    fn next(known: Option<&Self>, reason: Reason, now: u64) -> Option<Self> {
        match known {
            Some(known) if known.reason == reason => {
                let again = if reason.due { AGAIN_MS } else { (known.again * 2).min(LONGEST_AGAIN_MS) };
                (now >= known.at + known.again).then_some(Self { reason, at: now, again })
            }
            _ => Some(Self { reason, at: now, again: AGAIN_MS }),
        }
    }
}

/// Whether an open round is to be looked at, and why.
fn reason(round: &OpenRound, record: &JobRecord, roster: &Roster, now: u64) -> Option<Reason> {
    let due_at = round.first.saturating_add(record.spec.deadline_ms);
    let due = record.spec.quorum.is_some_and(|quorum| round.counted >= quorum) && now >= due_at;
    let changed = roster.epoch > round.roster_epoch;
    let asks = (due || changed) && record.life.paused.is_none();
    asks.then_some(Reason { version: round.head.version, epoch: roster.epoch, due })
}

impl Gateway {
    /// Nudges whoever holds the shards of open rounds that nobody may be looking at.
    pub(crate) async fn nudge(&self, queues: &dyn Queues) {
        let jobs: BTreeMap<_, _> = {
            let shared = self.shared();
            shared
                .rosters
                .values()
                .map(|(record, roster)| (record.incarnation, (record.clone(), roster.clone())))
                .collect()
        };
        let stores: BTreeSet<_> = jobs.values().map(|(record, _)| record.store).collect();
        let mut open = Vec::new();
        for id in stores {
            let from = self.shared().bookmarks.remove(&id);
            let look = match Look::at(&*(self.jobs.stores)(id), from, MOST_ROUNDS).await {
                Ok(look) => look,
                // Nudges may come late; the next sweep asks again.
                Err(error) => return tracing::debug!(%error, "open rounds not read"),
            };
            let there: BTreeSet<_> = look.open.iter().map(|round| (round.job, round.shard)).collect();
            let mut shared = self.shared();
            shared.bookmarks.extend(look.to.map(|to| (id, to)));
            shared.nudged.retain(|at, _| match jobs.get(&at.0) {
                Some((record, _)) => record.store != id || !look.covers(at) || there.contains(at),
                None => false,
            });
            drop(shared);
            open.extend(look.open);
        }
        metrics::open_rounds(open.len());
        let now = (self.wall_clock)();
        let mut nudged = std::mem::take(&mut self.shared().nudged);
        for round in open {
            let Some((record, roster)) = jobs.get(&round.job) else { continue };
            let at = (round.job, round.shard);
            let Some(reason) = reason(&round, record, roster, now) else {
                nudged.remove(&at);
                continue;
            };
            let Some(given) = Given::next(nudged.get(&at), reason, now) else { continue };
            let partition = record.partition(round.shard);
            // The rank in it means nothing: who is nudged is who holds the partition.
            let subject = subjects::gradient(partition, &record.spec.key, 0);
            let nudge = Nudge { job: round.job, shard: round.shard };
            match queues.publish(partition, &subject, frame::seal(Kind::Nudge, &nudge, &[])).await {
                Ok(()) => {
                    metrics::nudged();
                    nudged.insert(at, given);
                }
                Err(error) => tracing::debug!(%error, key = %record.spec.key, "not nudged yet"),
            }
        }
        self.shared().nudged = nudged;
    }
}

#[cfg(test)]
mod tests {
    use thalweg_protocol::{
        Durability, FunctionSpec, Head, Init, JobKey, JobSpec, JobState, Layout, Ledger, Life, Mode,
        NonFinite, Partial, PartialCommit, Policy, StateId, StoreJob, TensorSpec,
    };

    use super::*;

    fn record(quorum: Option<u32>) -> JobRecord {
        let key = JobKey { tenant: "default".parse().unwrap(), job: "slow".parse().unwrap() };
        let spec = JobSpec {
            key,
            tensors: vec![TensorSpec::f32("t", [4])],
            function: FunctionSpec::named("mean"),
            mode: Mode::Sync,
            workers: 3,
            quorum,
            deadline_ms: 500,
            durability: Durability::Process,
            non_finite: NonFinite::Propagate,
            init: Init::Zeros,
            shard_bytes: 256,
            max_members: 3,
            policy: Policy::default(),
        };
        JobRecord {
            spec,
            incarnation: Incarnation([1; 16]),
            layout: Layout { elements: 4, shard_elements: 64 },
            slots: 0,
            store: StoreId([2; 16]),
            partitions: 1,
            state: JobState::Running,
            settings: Vec::new(),
            life: Life::default(),
        }
    }

    fn open(counted: u32, roster_epoch: Epoch) -> OpenRound {
        let record = record(None);
        let head = Head { version: 7, fold_count: 1, state_id: StateId([3; 16]) };
        let (job, key) = (record.incarnation, record.spec.key);
        OpenRound { job, key, shard: 0, head, first: 10_000, counted, roster_epoch }
    }

    #[test]
    fn rounds_are_looked_at_when_they_are_due_or_the_roster_has_changed() {
        let roster = |epoch| Roster { epoch, ..Roster::new(Incarnation([1; 16])) };
        let asks = |quorum, counted, epoch, now| {
            reason(&open(counted, 4), &record(quorum), &roster(epoch), now).is_some()
        };
        assert!(!asks(None, 2, 4, 99_999), "all have to come");
        assert!(asks(None, 2, 5, 10_000), "somebody may have left");
        assert!(!asks(Some(2), 1, 4, 99_999), "no quorum");
        assert!(!asks(Some(2), 2, 4, 10_499), "not due");
        assert!(asks(Some(2), 2, 4, 10_500), "due");
        let changed = reason(&open(2, 4), &record(None), &roster(5), 0).unwrap();
        let mut given = Given::next(None, changed, 0).unwrap();
        let mut times = Vec::new();
        for now in (0..2_000_000).step_by(10_000) {
            if let Some(next) = Given::next(Some(&given), changed, now) {
                times.push(now / 1000);
                given = next;
            }
        }
        assert_eq!(times, [10, 30, 70, 150, 310, 630, 1230, 1830], "ever more rarely, and for ever");
        let due = reason(&open(2, 5), &record(Some(2)), &roster(5), 10_500).unwrap();
        assert!(Given::next(Some(&given), due, 1_830_001).is_some(), "another reason");
        let mut paused = record(Some(2));
        paused.life.paused = Some("looking".to_owned());
        assert!(reason(&open(2, 4), &paused, &roster(5), 10_500).is_none(), "nothing closes while paused");
    }

    /// However many rounds are open, and none of them due, each is looked at.
    #[tokio::test]
    async fn a_look_goes_on_where_the_one_before_ended() {
        const SHARDS: u32 = 2 * limits::MAX_OPEN_ROUNDS + 9;
        let store = thalweg_store::MemoryStore::default();
        let record = record(None);
        let job = StoreJob {
            key: record.spec.key,
            incarnation: record.incarnation,
            layout: Layout { elements: u64::from(SHARDS) * 64, shard_elements: 64 },
            slots: 0,
            durability: Durability::Process,
            max_members: 3,
            init: Init::Zeros,
            first_version: 0,
        };
        store.create(job).await.unwrap();
        for shard in 0..SHARDS {
            let expect = store.fetch_head(record.incarnation, shard).await.unwrap().head;
            let ledger =
                Ledger { round: 1, roster_epoch: 4, counted: [0].into_iter().collect(), ..Ledger::default() };
            let partial = Partial { ledger, first: 0, since: 4 };
            let commit = PartialCommit { job: record.incarnation, shard, expect, partial };
            store.commit_partial(commit, bytes::Bytes::from_static(&[0; 64])).await.unwrap();
        }
        let (mut from, mut seen) = (None, Vec::new());
        for open in [256, 256, 9] {
            let look = Look::at(&store, from, 200).await.unwrap();
            assert_eq!(look.open.len(), open);
            for shard in 0..SHARDS {
                let at = (record.incarnation, shard);
                let looked_at = look.open.iter().any(|round| round.shard == shard);
                assert_eq!(look.covers(&at), looked_at, "{shard}");
            }
            seen.extend(look.open.iter().map(|round| round.shard));
            from = look.to;
        }
        assert!(from.is_none() && seen.into_iter().eq(0..SHARDS), "each once, and then from the beginning");
    }
}

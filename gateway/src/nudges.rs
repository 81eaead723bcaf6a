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
    Epoch, Incarnation, JobRecord, Kind, Nudge, OpenRound, Roster, ShardIndex, Version, frame, limits,
    subjects,
};

use crate::{metrics, service::Gateway};

/// Open rounds looked at in one sweep.
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

/// The shards that were nudged.
pub(crate) type Nudged = BTreeMap<(Incarnation, ShardIndex), Given>;

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
            let store = (self.jobs.stores)(id);
            let mut after = None;
            loop {
                let page = match store.open_rounds(after, limits::MAX_OPEN_ROUNDS).await {
                    Ok(page) => page,
                    // Nudges may come late; the next sweep asks again.
                    Err(error) => return tracing::debug!(%error, "open rounds not read"),
                };
                let last = page.len() < limits::MAX_OPEN_ROUNDS as usize;
                after = page.last().map(|round| (round.job, round.shard));
                open.extend(page);
                if last || open.len() >= MOST_ROUNDS {
                    break;
                }
            }
        }
        metrics::open_rounds(open.len());
        let now = (self.wall_clock)();
        let mut nudged = std::mem::take(&mut self.shared().nudged);
        let there: BTreeSet<_> = open.iter().map(|round| (round.job, round.shard)).collect();
        nudged.retain(|key, _| there.contains(key));
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
        Durability, FunctionSpec, Head, Init, JobKey, JobSpec, JobState, Layout, Life, Mode, NonFinite,
        Policy, StateId, StoreId, TensorSpec,
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
}

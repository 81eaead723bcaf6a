//! The invokers as the controller knows them.

use std::collections::{BTreeMap, VecDeque};

use thalweg_broker::{Said, metrics};
use thalweg_protocol::{Epoch, InvokerBeat, InvokerState, Partition, Placement};

use crate::{Candidate, Millis};

/// Ids of ended invokers that are remembered, so that a late beat does not bring one back to life.
const REMEMBERED: usize = 1024;
/// Age up to which what a beat says about load is used.
const BEAT_FRESH_MS: Millis = 2000;
/// Time from when an invoker is first known until the service rate it tells is that of later: in the beginning it
/// connects, takes partitions over and has cold caches, which halves the rate.
const WARM_AFTER_MS: Millis = 4000;

/// Where an invoker is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Started here, not yet heard.
    Starting,
    /// Has partitions, or gets some.
    Serving,
    /// Started by somebody else, ready, not needed now.
    Spare,
    /// Started here, no longer needed: its partitions move away, then it is stopped.
    Retiring,
    /// Told to stop.
    Stopping,
    /// Is leaving by itself, or was told to by somebody else.
    Leaving,
}

/// One invoker.
#[derive(Debug)]
pub(crate) struct Invoker {
    /// Started by this autoscaler's actuator.
    pub(crate) own: bool,
    pub(crate) phase: Phase,
    /// When it entered its phase.
    pub(crate) since: Millis,
    /// When it was first known.
    pub(crate) known: Millis,
    /// When it was last heard; when it was first known, if never.
    pub(crate) heard: Millis,
    pub(crate) beat: Option<InvokerBeat>,
    /// Since when it has said that it holds no partition.
    pub(crate) empty_since: Option<Millis>,
}

/// Weight of the newest start in the mean time that one takes.
const START_SMOOTHING: f64 = 0.3;

impl Invoker {
    pub(crate) fn new(own: bool, phase: Phase, now: Millis) -> Self {
        Self { own, phase, since: now, known: now, heard: now, beat: None, empty_since: None }
    }

    pub(crate) fn enter(&mut self, phase: Phase, now: Millis) {
        if self.phase != phase {
            (self.phase, self.since) = (phase, now);
        }
    }

    /// Whether it counts towards the target.
    pub(crate) fn counts(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Serving)
    }

    fn fresh_beat(&self, now: Millis) -> Option<&InvokerBeat> {
        self.beat.as_ref().filter(|_| self.heard + BEAT_FRESH_MS >= now)
    }
}

/// Load of all invokers together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    pub(crate) busy: f64,
    pub(crate) waiting_for_round: f64,
    /// Mean over those that are warm and have measured one.
    pub(crate) service_bytes_per_s: Option<f64>,
    /// Mean over all that have measured one.
    pub(crate) cold_bytes_per_s: Option<f64>,
}

/// All invokers by id.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    pub(crate) members: BTreeMap<String, Invoker>,
    ended: VecDeque<String>,
    /// Mean time from the start of an invoker to its first beat; 0 before the first.
    pub(crate) start_delay_ms: f64,
}

impl Fleet {
    /// Takes a beat in. Returns whether something follows from it before the next tick.
    pub(crate) fn beat(&mut self, beat: InvokerBeat, now: Millis) -> bool {
        if self.has_ended(&beat.invoker) {
            return false;
        }
        let id = beat.invoker.clone();
        if let Some((other, partition, epoch)) = self.rival(&beat) {
            static SAID: Said = Said::new();
            metrics::violated(metrics::TWO_HOLDERS);
            if SAID.is_new(&format!("{partition} {epoch}")) {
                tracing::error!(
                    partition,
                    epoch,
                    one = beat.invoker,
                    other,
                    "two invokers hold a partition by one epoch: commits are safe, but please report it"
                );
            }
        }
        let newcomer = !self.members.contains_key(&id);
        let invoker = self.members.entry(id).or_insert_with(|| Invoker::new(false, Phase::Leaving, now));
        let before = invoker.phase;
        let had_partitions = invoker.beat.as_ref().is_none_or(|beat| !beat.partitions.is_empty());
        let emptied = had_partitions && beat.partitions.is_empty();
        invoker.heard = now;
        match (invoker.phase, beat.state) {
            // What was decided stays decided.
            (Phase::Stopping, _) => {}
            (_, InvokerState::Draining) => invoker.enter(Phase::Leaving, now),
            (Phase::Starting, InvokerState::Ready) => {
                let took = (now - invoker.since) as f64;
                let mean = &mut self.start_delay_ms;
                *mean = if *mean == 0.0 { took } else { *mean + START_SMOOTHING * (took - *mean) };
                invoker.enter(Phase::Serving, now);
            }
            // Unknown so far, or another process with an id used before.
            (Phase::Leaving, InvokerState::Ready) if !invoker.own => invoker.enter(Phase::Spare, now),
            _ => {}
        }
        let changed = invoker.phase != before || newcomer;
        let empty_since = invoker.empty_since.unwrap_or(now);
        invoker.empty_since = beat.partitions.is_empty().then_some(empty_since);
        invoker.beat = Some(beat);
        changed || (invoker.phase == Phase::Retiring && emptied)
    }

    /// Another invoker that holds one of these partitions by the same epoch, which must never be (rule P14): its last
    /// beat may be old, but no epoch is ever given twice.
    fn rival(&self, beat: &InvokerBeat) -> Option<(&str, Partition, Epoch)> {
        let others = self.members.iter().filter(|(id, _)| **id != beat.invoker);
        others.filter_map(|(id, other)| Some((id, &other.beat.as_ref()?.partitions))).find_map(
            |(id, theirs)| {
                let (partition, epoch) = beat.partitions.iter().find(|own| theirs.contains(own))?;
                Some((id.as_str(), *partition, *epoch))
            },
        )
    }

    /// Forgets an invoker for good.
    pub(crate) fn end(&mut self, id: &str) -> Option<Invoker> {
        if self.ended.len() == REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(id.to_owned());
        self.members.remove(id)
    }

    /// Whether it is known to have ended.
    pub(crate) fn has_ended(&self, id: &str) -> bool {
        self.ended.iter().any(|ended| ended == id)
    }

    pub(crate) fn count(&self, wanted: impl Fn(&Invoker) -> bool) -> usize {
        self.members.values().filter(|invoker| wanted(invoker)).count()
    }

    pub(crate) fn in_phase(&self, phases: &[Phase]) -> usize {
        self.count(|invoker| phases.contains(&invoker.phase))
    }

    pub(crate) fn load(&self, now: Millis) -> Load {
        let heard = || self.members.values().filter_map(|invoker| Some((invoker, invoker.fresh_beat(now)?)));
        let (mut busy, mut waiting_for_round) = (0.0, 0.0);
        for (_, beat) in heard() {
            let share = if beat.busy.is_nan() { 0.0 } else { beat.busy.clamp(0.0, 1.0) };
            busy += share;
            waiting_for_round += beat.held_messages as f64 * (1.0 - share);
        }
        let rate = |counts: &dyn Fn(&Invoker) -> bool| {
            let rates =
                heard().filter(|(invoker, _)| counts(invoker)).map(|(_, beat)| beat.service_bytes_per_s);
            let measured = rates.filter(|rate| rate.is_finite() && *rate > 0.0);
            let (count, sum) = measured.fold((0.0, 0.0), |(count, sum), rate| (count + 1.0, sum + rate));
            (count > 0.0).then(|| sum / count)
        };
        Load {
            busy,
            waiting_for_round,
            service_bytes_per_s: rate(&|invoker| invoker.known + WARM_AFTER_MS <= now),
            cold_bytes_per_s: rate(&|_| true),
        }
    }

    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        let candidate = |(id, invoker): (&String, &Invoker)| Candidate {
            id: id.clone(),
            placeable: invoker.phase == Phase::Serving,
            held: invoker.beat.as_ref().map(|beat| beat.partitions.clone()).unwrap_or_default(),
        };
        self.members.iter().map(candidate).collect()
    }

    /// Those to retire first come first: what was started here (stopping it frees something), what serves
    /// least, what is youngest.
    pub(crate) fn retirement_order(&self, placement: &Placement) -> Vec<String> {
        let mut order: Vec<_> = (self.members.iter())
            .filter(|(_, invoker)| invoker.counts())
            .map(|(id, invoker)| {
                let youngest = std::cmp::Reverse(invoker.known);
                ((!invoker.own, placed_on(placement, id), youngest), id.clone())
            })
            .collect();
        order.sort();
        order.into_iter().map(|(_, id)| id).collect()
    }
}

/// How many partitions a placement gives an invoker.
pub(crate) fn placed_on(placement: &Placement, id: &str) -> usize {
    let holders = placement.partitions.iter().map(|placed| placed.holder.as_deref());
    holders.filter(|holder| *holder == Some(id)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(invoker: &str, partitions: &[(Partition, Epoch)]) -> InvokerBeat {
        InvokerBeat {
            invoker: invoker.to_owned(),
            state: InvokerState::Ready,
            partitions: partitions.to_vec(),
            service_bytes_per_s: 0.0,
            busy: 0.0,
            held_messages: 0,
            held_bytes: 0,
            cpu_quota: 1.0,
            jobs: Vec::new(),
        }
    }

    #[test]
    fn newcomers_do_not_spoil_the_service_rate() {
        let rated = |invoker, rate| InvokerBeat { service_bytes_per_s: rate, ..beat(invoker, &[]) };
        let rates = |fleet: &Fleet, now| {
            let load = fleet.load(now);
            (load.service_bytes_per_s, load.cold_bytes_per_s)
        };
        let mut fleet = Fleet::default();
        fleet.beat(rated("old", 50e6), 0);
        assert_eq!(rates(&fleet, 1000), (None, Some(50e6)));
        fleet.beat(rated("old", 100e6), WARM_AFTER_MS);
        fleet.beat(rated("new", 50e6), WARM_AFTER_MS);
        assert_eq!(rates(&fleet, WARM_AFTER_MS), (Some(100e6), Some(75e6)));
        // Only it is left.
        fleet.end("old");
        assert_eq!(rates(&fleet, WARM_AFTER_MS), (None, Some(50e6)));
        fleet.beat(rated("new", 90e6), 2 * WARM_AFTER_MS);
        assert_eq!(rates(&fleet, 2 * WARM_AFTER_MS), (Some(90e6), Some(90e6)));
    }

    #[test]
    fn two_holders_by_one_epoch_are_found() {
        let mut fleet = Fleet::default();
        fleet.beat(beat("left", &[(1, 5), (2, 7)]), 0);
        assert_eq!(fleet.rival(&beat("left", &[(1, 5)])), None, "nobody is his own rival");
        assert_eq!(fleet.rival(&beat("right", &[(1, 6), (2, 8)])), None, "it has been moved");
        assert_eq!(fleet.rival(&beat("right", &[(1, 6), (2, 7)])), Some(("left", 2, 7)));
    }
}

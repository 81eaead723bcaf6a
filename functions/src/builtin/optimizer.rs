//! What all optimizers share: the mean of the contributions moves the parameters.

use std::ops::Range;

use thalweg_protocol::{Round, Schedule};

use super::{
    accumulator::{Accumulator, Terms},
    lanes::{Lane, elements},
};
use crate::{
    AggregationFunction, Contribution, Digest, Fold, InvalidPartial, Kind, ShardContext, schedule,
    settings::Grouped,
};

/// The settings of one segment of a shard, and what they do to it.
pub(super) trait Step: Copy + std::fmt::Debug + Send + Sync + 'static {
    /// The function and its version, for the digest.
    fn identity(&self) -> &'static str;

    /// Slots that these settings need; slots beyond stay as they are.
    fn slots(&self) -> usize;

    /// Appends the next parameters to `out`. `sums` are those of `round.count` contributions; what stays in their
    /// place is what [`Step::slot`] is given.
    fn parameters(
        &self,
        round: InRound,
        sums: &mut [f32],
        parameters: Lane<'_>,
        slots: &[Lane<'_>],
        out: &mut Vec<u8>,
    );

    /// Appends the next values of the slot of index `slot` to `out`.
    fn slot(&self, slot: usize, sums: &mut [f32], values: Lane<'_>, out: &mut Vec<u8>);
}

/// What a step knows about the round.
#[derive(Clone, Copy, Debug)]
pub(super) struct InRound {
    /// Its number, from 1 on: the step count of the papers. A round in which nobody was counted changes no state, but
    /// the round after it has the next number all the same.
    pub(super) round: Round,
    /// The schedule's factor on every learning rate.
    pub(super) factor: f64,
    /// Number of contributions, above 0.
    pub(super) count: f32,
}

/// A function with its settings, those of groups and its schedule.
#[derive(Debug)]
pub(super) struct Optimizer<S> {
    settings: Grouped<S>,
    schedule: Schedule,
    slots: usize,
}

impl<S: Step> Optimizer<S> {
    /// The function of these settings.
    pub(super) fn new(settings: Grouped<S>, schedule: Schedule) -> Self {
        let slots = settings.groups.iter().fold(settings.base.slots(), |most, group| most.max(group.slots()));
        Self { settings, schedule, slots }
    }

    fn fold<'a>(&'a self, shard: &ShardContext<'_>, sums: Accumulator) -> Box<dyn Fold + 'a> {
        assert!(shard.round >= 1, "round 0 is folded by nobody: rounds count from 1");
        Box::new(OptimizerFold { function: self, segments: self.segments(shard), round: shard.round, sums })
    }

    /// Splits the shard into ranges with the same settings, ascending and without gaps.
    fn segments(&self, shard: &ShardContext<'_>) -> Vec<(Range<usize>, S)> {
        let Grouped { base, groups } = &self.settings;
        let mut segments = Vec::with_capacity(2 * shard.groups.len() + 1);
        let mut done = 0;
        for (range, group) in shard.groups {
            assert!(
                done <= range.start && range.start <= range.end && range.end <= shard.elements,
                "parameter group range {range:?} must be ascending, disjoint from those before (up to {done}) \
                 and inside a shard of {} elements",
                shard.elements,
            );
            let Some(settings) = groups.get(*group) else {
                panic!("parameter group {group} does not exist; the function has {}", groups.len());
            };
            segments.push((done..range.start, *base));
            segments.push((range.clone(), *settings));
            done = range.end;
        }
        segments.push((done..shard.elements, *base));
        segments.retain(|(range, _)| !range.is_empty());
        segments
    }
}

impl<S: Step> AggregationFunction for Optimizer<S> {
    fn digest(&self) -> Digest {
        super::digest(self.settings.base.identity())
    }

    fn slots(&self) -> usize {
        self.slots
    }

    fn kind(&self) -> Kind {
        Kind::Optimizer
    }

    fn partial_bytes(&self, elements: usize) -> usize {
        Accumulator::partial_bytes(elements)
    }

    fn begin<'a>(&'a self, shard: ShardContext<'a>) -> Box<dyn Fold + 'a> {
        self.fold(&shard, Accumulator::new(Terms::Values, shard.elements))
    }

    fn resume<'a>(
        &'a self,
        shard: ShardContext<'a>,
        partial: &[u8],
    ) -> Result<Box<dyn Fold + 'a>, InvalidPartial> {
        Ok(self.fold(&shard, Accumulator::resume(Terms::Values, shard.elements, partial)?))
    }
}

struct OptimizerFold<'a, S> {
    function: &'a Optimizer<S>,
    segments: Vec<(Range<usize>, S)>,
    round: Round,
    sums: Accumulator,
}

impl<S: Step> Fold for OptimizerFold<'_, S> {
    fn accept(&mut self, contribution: Contribution<'_>) {
        self.sums.add(&contribution);
    }

    fn needs_state(&self) -> bool {
        true
    }

    fn suspend(self: Box<Self>, out: &mut Vec<u8>) {
        self.sums.suspend(out);
    }

    fn finish(mut self: Box<Self>, state: &[u8], out: &mut Vec<u8>) {
        let (lane, slots) = (self.sums.elements(), self.function.slots);
        let bytes = 4 * (1 + slots) * lane;
        assert!(
            state.len() == bytes,
            "state has {} bytes; {lane} elements with {slots} optimizer slots have {bytes}",
            state.len(),
        );
        if self.sums.accepted() == 0 {
            return out.extend_from_slice(state);
        }
        out.reserve(bytes);
        let round = InRound {
            round: self.round,
            factor: schedule::factor(&self.function.schedule, self.round),
            count: self.sums.accepted() as f32,
        };
        let state = elements(state);
        // Of the parameters (0) or of a slot (from 1 on), the part that belongs to a segment.
        let part = |index: usize, range: &Range<usize>| &state[index * lane..][range.clone()];
        let sums = self.sums.sums();
        for (range, step) in &self.segments {
            let lanes: Vec<_> = (1..=slots).map(|slot| part(slot, range)).collect();
            step.parameters(round, &mut sums[range.clone()], part(0, range), &lanes, out);
        }
        for slot in 0..slots {
            for (range, step) in &self.segments {
                step.slot(slot, &mut sums[range.clone()], part(slot + 1, range), out);
            }
        }
    }
}

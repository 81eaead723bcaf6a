//! `sum`, `mean` and `weighted_mean`: the next state is a combination of the contributions alone.

use super::{
    accumulator::{Accumulator, Terms},
    lanes::append,
};
use crate::{AggregationFunction, Contribution, Digest, Fold, InvalidPartial, Kind, ShardContext};

/// How contributions are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Their sum.
    Sum,
    /// Their sum divided by how many there are.
    Mean,
    /// The sum of weight * value, divided by the sum of weights.
    WeightedMean,
}

impl Rule {
    fn terms(self) -> Terms {
        match self {
            Self::Sum | Self::Mean => Terms::Values,
            Self::WeightedMean => Terms::Weighted,
        }
    }
}

/// A function without settings and slots.
#[derive(Debug)]
pub(super) struct Reduction {
    rule: Rule,
}

impl Reduction {
    /// The function of `rule`.
    pub(super) fn new(rule: Rule) -> Self {
        Self { rule }
    }
}

impl AggregationFunction for Reduction {
    fn digest(&self) -> Digest {
        super::digest(match self.rule {
            Rule::Sum => "thalweg/sum/1",
            Rule::Mean => "thalweg/mean/1",
            Rule::WeightedMean => "thalweg/weighted_mean/1",
        })
    }

    fn slots(&self) -> usize {
        0
    }

    fn kind(&self) -> Kind {
        Kind::Reduction
    }

    fn partial_bytes(&self, elements: usize) -> usize {
        Accumulator::partial_bytes(elements)
    }

    fn begin<'a>(&'a self, shard: ShardContext<'a>) -> Box<dyn Fold + 'a> {
        let sums = Accumulator::new(self.rule.terms(), shard.elements);
        Box::new(ReductionFold { rule: self.rule, sums })
    }

    fn resume<'a>(
        &'a self,
        shard: ShardContext<'a>,
        partial: &[u8],
    ) -> Result<Box<dyn Fold + 'a>, InvalidPartial> {
        let sums = Accumulator::resume(self.rule.terms(), shard.elements, partial)?;
        Ok(Box::new(ReductionFold { rule: self.rule, sums }))
    }
}

struct ReductionFold {
    rule: Rule,
    sums: Accumulator,
}

impl Fold for ReductionFold {
    fn accept(&mut self, contribution: Contribution<'_>) {
        self.sums.add(&contribution);
    }

    fn needs_state(&self) -> bool {
        self.sums.accepted() == 0 || (self.rule == Rule::WeightedMean && self.sums.weights() == 0.0)
    }

    fn suspend(self: Box<Self>, out: &mut Vec<u8>) {
        self.sums.suspend(out);
    }

    fn finish(mut self: Box<Self>, state: &[u8], out: &mut Vec<u8>) {
        let elements = self.sums.elements();
        assert!(
            state.is_empty() || state.len() == 4 * elements,
            "state has {} bytes; a shard of {elements} elements has {} (or none at all)",
            state.len(),
            4 * elements,
        );
        if self.needs_state() {
            assert!(
                state.len() == 4 * elements,
                "nothing to combine: the state stays as it is, but finish was given none",
            );
            return out.extend_from_slice(state);
        }
        out.reserve(4 * elements);
        let count = self.sums.accepted() as f32;
        let weights = self.sums.weights();
        let sums = self.sums.sums();
        match self.rule {
            Rule::Sum => append(out, sums, |sum| sum),
            Rule::Mean => append(out, sums, |sum| sum / count),
            Rule::WeightedMean => append(out, sums, |sum| (f64::from(sum) / weights) as f32),
        }
    }
}

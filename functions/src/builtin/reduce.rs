//! `sum`, `mean` and `weighted_mean`: the next state is a combination of the contributions alone.

use super::lanes::{Accumulator, append};
use crate::{AggregationFunction, Contribution, Digest, Fold, Kind, ShardContext};

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

    fn begin<'a>(&'a self, shard: ShardContext<'a>, state: &'a [u8]) -> Box<dyn Fold + 'a> {
        let elements = shard.elements;
        assert!(
            state.is_empty() || state.len() == 4 * elements,
            "state has {} bytes; a shard of {elements} elements has {} (or none at all)",
            state.len(),
            4 * elements,
        );
        Box::new(ReductionFold {
            rule: self.rule,
            elements,
            state,
            sums: Accumulator::new(elements),
            weights: 0.0,
        })
    }
}

struct ReductionFold<'a> {
    rule: Rule,
    elements: usize,
    state: &'a [u8],
    sums: Accumulator,
    /// In f64, so that many small weights after a large one still count.
    weights: f64,
}

impl Fold for ReductionFold<'_> {
    fn accept(&mut self, contribution: Contribution<'_>) {
        match self.rule {
            Rule::Sum | Rule::Mean => self.sums.add(&contribution, |value| value),
            Rule::WeightedMean => {
                let weight = contribution.weight;
                self.sums.add(&contribution, |value| weight * value);
                self.weights += f64::from(weight);
            }
        }
    }

    fn finish(mut self: Box<Self>, out: &mut Vec<u8>) {
        let accepted = self.sums.accepted();
        let weights = self.weights;
        if accepted == 0 || (self.rule == Rule::WeightedMean && weights == 0.0) {
            assert!(
                self.state.len() == 4 * self.elements,
                "nothing to combine: the state stays as it is, but begin was given none",
            );
            return out.extend_from_slice(self.state);
        }
        out.reserve(4 * self.elements);
        let sums = self.sums.sums();
        // At most MAX_MEMBERS = 2^14 contributions: exact.
        let count = accepted as f32;
        match self.rule {
            Rule::Sum => append(out, sums, |sum| sum),
            Rule::Mean => append(out, sums, |sum| sum / count),
            Rule::WeightedMean => append(out, sums, |sum| (f64::from(sum) / weights) as f32),
        }
    }
}

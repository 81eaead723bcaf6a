//! What the tests share.

use std::ops::Range;

use thalweg_functions::{AggregationFunction, Contribution, ShardContext, resolve};
use thalweg_protocol::{FunctionSpec, Rank, Round};

/// Half the distance from 1 to the next f32: the relative error of one rounding.
pub(crate) const UNIT_ROUNDOFF: f64 = 1.0 / (1 << 24) as f64;

pub(crate) type Groups = [(Range<usize>, usize)];

pub(crate) fn function(spec: &FunctionSpec) -> Box<dyn AggregationFunction> {
    resolve(spec).unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) fn named(name: &str) -> Box<dyn AggregationFunction> {
    function(&FunctionSpec::named(name))
}

pub(crate) fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    chunks.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A shard in round 1.
pub(crate) fn shard(elements: usize, groups: &Groups) -> ShardContext<'_> {
    ShardContext { elements, groups, round: 1 }
}

/// Round 1 over values of weight 1.
pub(crate) fn round(
    function: &dyn AggregationFunction,
    groups: &Groups,
    state: &[f32],
    contributions: &[Vec<f32>],
) -> Vec<f32> {
    let weighted: Vec<_> = contributions.iter().map(|values| (1.0, values.clone())).collect();
    weighted_round(function, groups, state, &weighted)
}

/// Round 1; the position of a contribution is its rank.
pub(crate) fn weighted_round(
    function: &dyn AggregationFunction,
    groups: &Groups,
    state: &[f32],
    contributions: &[(f32, Vec<f32>)],
) -> Vec<f32> {
    round_at(1, function, groups, state, contributions)
}

/// Any round.
pub(crate) fn round_at(
    round: Round,
    function: &dyn AggregationFunction,
    groups: &Groups,
    state: &[f32],
    contributions: &[(f32, Vec<f32>)],
) -> Vec<f32> {
    let elements = state.len() / (1 + function.slots());
    let state = bytes(state);
    let mut fold = function.begin(ShardContext { elements, groups, round });
    for (rank, (weight, values)) in contributions.iter().enumerate() {
        let values = bytes(values);
        fold.accept(Contribution { rank: rank as Rank, weight: *weight, values: &values });
    }
    // What is already in `out` stays.
    let mut out = b"prefix".to_vec();
    fold.finish(&state, &mut out);
    assert_eq!(&out[..6], b"prefix");
    assert_eq!(out.len() - 6, state.len());
    floats(&out[6..])
}

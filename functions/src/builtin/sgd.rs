//! `sgd`: stochastic gradient descent on the mean of the contributions.
//!
//! As in PyTorch, without dampening, in f32:
//!
//! ```text
//! g = (sum of contributions) / count
//! g = g + weight_decay * p                      if weight_decay > 0
//! v = momentum * v + g                          if momentum > 0
//! g = g + momentum * v  (nesterov), or v        if momentum > 0
//! p = p - lr * g
//! ```
//!
//! Velocities start at zero. The velocity of elements without momentum stays as it is.

use std::ops::Range;

use super::lanes::{Accumulator, BLOCK, Block, append, elements, encode};
use crate::{AggregationFunction, Contribution, Digest, Fold, Kind, ShardContext, settings};

/// The function and its settings.
#[derive(Debug)]
pub(super) struct Sgd {
    base: settings::Sgd,
    groups: Vec<settings::Sgd>,
    slots: usize,
}

impl Sgd {
    /// `sgd` with its own settings and those of each parameter group.
    pub(super) fn new(base: settings::Sgd, groups: Vec<settings::Sgd>) -> Self {
        let momentum = base.momentum > 0.0 || groups.iter().any(|group| group.momentum > 0.0);
        Self { base, groups, slots: usize::from(momentum) }
    }

    /// Splits the shard into ranges with the same settings, ascending and without gaps.
    fn segments(&self, shard: &ShardContext<'_>) -> Vec<(Range<usize>, settings::Sgd)> {
        let mut segments = Vec::with_capacity(2 * shard.groups.len() + 1);
        let mut done = 0;
        for (range, group) in shard.groups {
            assert!(
                done <= range.start && range.start <= range.end && range.end <= shard.elements,
                "parameter group range {range:?} must be ascending, disjoint from those before (up to {done}) \
                 and inside a shard of {} elements",
                shard.elements,
            );
            let Some(settings) = self.groups.get(*group) else {
                panic!("parameter group {group} does not exist; the function has {}", self.groups.len());
            };
            segments.push((done..range.start, self.base));
            segments.push((range.clone(), *settings));
            done = range.end;
        }
        segments.push((done..shard.elements, self.base));
        segments.retain(|(range, _)| !range.is_empty());
        segments
    }
}

impl AggregationFunction for Sgd {
    fn digest(&self) -> Digest {
        super::digest("thalweg/sgd/1")
    }

    fn slots(&self) -> usize {
        self.slots
    }

    fn kind(&self) -> Kind {
        Kind::Optimizer
    }

    fn begin<'a>(&'a self, shard: ShardContext<'a>, state: &'a [u8]) -> Box<dyn Fold + 'a> {
        let bytes = 4 * (1 + self.slots) * shard.elements;
        assert!(
            state.len() == bytes,
            "state has {} bytes; {} elements with {} optimizer slots have {bytes}",
            state.len(),
            shard.elements,
            self.slots,
        );
        Box::new(SgdFold {
            segments: self.segments(&shard),
            state,
            parameters: 4 * shard.elements,
            sums: Accumulator::new(shard.elements),
        })
    }
}

struct SgdFold<'a> {
    segments: Vec<(Range<usize>, settings::Sgd)>,
    state: &'a [u8],
    /// Bytes of the state that are parameters; velocities follow, if any.
    parameters: usize,
    sums: Accumulator,
}

impl Fold for SgdFold<'_> {
    fn accept(&mut self, contribution: Contribution<'_>) {
        self.sums.add(&contribution, |value| value);
    }

    fn finish(mut self: Box<Self>, out: &mut Vec<u8>) {
        if self.sums.accepted() == 0 {
            return out.extend_from_slice(self.state);
        }
        out.reserve(self.state.len());
        let (parameters, velocities) = self.state.split_at(self.parameters);
        let (parameters, velocities) = (elements(parameters), elements(velocities));
        // At most MAX_MEMBERS = 2^14 contributions: exact.
        let count = self.sums.accepted() as f32;
        let sums = self.sums.sums();
        for (range, settings) in &self.segments {
            let sums = &mut sums[range.clone()];
            let parameters = &parameters[range.clone()];
            let decay = settings.weight_decay > 0.0;
            if settings.momentum > 0.0 {
                let velocities = &velocities[range.clone()];
                let step = match (settings.nesterov, decay) {
                    (false, false) => step_with_momentum::<false, false>,
                    (false, true) => step_with_momentum::<false, true>,
                    (true, false) => step_with_momentum::<true, false>,
                    (true, true) => step_with_momentum::<true, true>,
                };
                step(settings, count, sums, parameters, velocities, out);
            } else {
                let step = if decay { step::<true> } else { step::<false> };
                step(settings, count, sums, parameters, out);
                if let Some(velocities) = velocities.get(range.clone()) {
                    for (sum, &velocity) in sums.iter_mut().zip(velocities) {
                        *sum = f32::from_le_bytes(velocity);
                    }
                }
            }
        }
        if !velocities.is_empty() {
            // The steps left the velocities where the sums were.
            append(out, sums, |velocity| velocity);
        }
    }
}

/// Appends the next parameters of one segment without momentum.
fn step<const DECAY: bool>(
    settings: &settings::Sgd,
    count: f32,
    sums: &[f32],
    parameters: &[[u8; 4]],
    out: &mut Vec<u8>,
) {
    let settings::Sgd { lr, weight_decay, .. } = *settings;
    let mut block: Block = [[0; 4]; BLOCK];
    for (sums, parameters) in sums.chunks(BLOCK).zip(parameters.chunks(BLOCK)) {
        let bytes = &mut block[..sums.len()];
        for ((bytes, &sum), &parameter) in bytes.iter_mut().zip(sums).zip(parameters) {
            let parameter = f32::from_le_bytes(parameter);
            let mut gradient = sum / count;
            if DECAY {
                gradient += weight_decay * parameter;
            }
            *bytes = encode(parameter - lr * gradient);
        }
        out.extend_from_slice(bytes.as_flattened());
    }
}

/// Appends the next parameters of one segment with momentum; its next velocities replace `sums`.
fn step_with_momentum<const NESTEROV: bool, const DECAY: bool>(
    settings: &settings::Sgd,
    count: f32,
    sums: &mut [f32],
    parameters: &[[u8; 4]],
    velocities: &[[u8; 4]],
    out: &mut Vec<u8>,
) {
    let settings::Sgd { lr, momentum, weight_decay, .. } = *settings;
    let mut block: Block = [[0; 4]; BLOCK];
    let blocks = sums.chunks_mut(BLOCK).zip(parameters.chunks(BLOCK)).zip(velocities.chunks(BLOCK));
    for ((sums, parameters), velocities) in blocks {
        let bytes = &mut block[..sums.len()];
        let lanes = bytes.iter_mut().zip(sums).zip(parameters).zip(velocities);
        for (((bytes, sum), &parameter), &velocity) in lanes {
            let parameter = f32::from_le_bytes(parameter);
            let mut gradient = *sum / count;
            if DECAY {
                gradient += weight_decay * parameter;
            }
            let velocity = momentum * f32::from_le_bytes(velocity) + gradient;
            gradient = if NESTEROV { gradient + momentum * velocity } else { velocity };
            *sum = velocity;
            *bytes = encode(parameter - lr * gradient);
        }
        out.extend_from_slice(bytes.as_flattened());
    }
}

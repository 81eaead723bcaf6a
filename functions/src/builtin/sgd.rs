//! `sgd`: stochastic gradient descent on the mean of the contributions.
//!
//! As in PyTorch, without dampening, in f32:
//!
//! ```text
//! g = (sum of contributions) / count
//! g = g + weight_decay * p                      if weight_decay > 0
//! v = momentum * v + g                          if momentum > 0
//! g = g + momentum * v  (nesterov), or v        if momentum > 0
//! p = p - rate * g                              rate = lr * schedule's factor, in f64, rounded once
//! ```
//!
//! Velocities start at zero. The velocity of elements without momentum stays as it is.

use super::{
    lanes::{Lane, append, append_next},
    optimizer::{InRound, Step},
};
use crate::settings::Sgd;

impl Step for Sgd {
    fn identity(&self) -> &'static str {
        "thalweg/sgd/1"
    }

    fn slots(&self) -> usize {
        usize::from(self.momentum as f32 > 0.0)
    }

    fn parameters(
        &self,
        round: InRound,
        sums: &mut [f32],
        parameters: Lane<'_>,
        slots: &[Lane<'_>],
        out: &mut Vec<u8>,
    ) {
        let decay = self.weight_decay as f32 > 0.0;
        match slots {
            [velocities] if self.slots() == 1 => {
                let step = match (self.nesterov, decay) {
                    (false, false) => step_with_momentum::<false, false>,
                    (false, true) => step_with_momentum::<false, true>,
                    (true, false) => step_with_momentum::<true, false>,
                    (true, true) => step_with_momentum::<true, true>,
                };
                step(self, round, sums, parameters, velocities, out);
            }
            _ => {
                let step = if decay { step::<true> } else { step::<false> };
                step(self, round, sums, parameters, out);
                for velocities in slots {
                    for (sum, &velocity) in sums.iter_mut().zip(*velocities) {
                        *sum = f32::from_le_bytes(velocity);
                    }
                }
            }
        }
    }

    fn slot(&self, _: usize, sums: &mut [f32], _: Lane<'_>, out: &mut Vec<u8>) {
        // The steps left the velocities where the sums were.
        append(out, sums, |velocity| velocity);
    }
}

/// Appends the next parameters of one segment without momentum.
fn step<const DECAY: bool>(
    settings: &Sgd,
    round: InRound,
    sums: &mut [f32],
    parameters: Lane<'_>,
    out: &mut Vec<u8>,
) {
    let rate = (settings.lr * round.factor) as f32;
    let weight_decay = settings.weight_decay as f32;
    append_next(out, sums, [parameters], |sum, [parameter]| {
        let mut gradient = *sum / round.count;
        if DECAY {
            gradient += weight_decay * parameter;
        }
        parameter - rate * gradient
    });
}

/// Appends the next parameters of one segment with momentum; its next velocities replace `sums`.
fn step_with_momentum<const NESTEROV: bool, const DECAY: bool>(
    settings: &Sgd,
    round: InRound,
    sums: &mut [f32],
    parameters: Lane<'_>,
    velocities: Lane<'_>,
    out: &mut Vec<u8>,
) {
    let rate = (settings.lr * round.factor) as f32;
    let (momentum, weight_decay) = (settings.momentum as f32, settings.weight_decay as f32);
    append_next(out, sums, [parameters, velocities], |sum, [parameter, velocity]| {
        let mut gradient = *sum / round.count;
        if DECAY {
            gradient += weight_decay * parameter;
        }
        let velocity = momentum * velocity + gradient;
        gradient = if NESTEROV { gradient + momentum * velocity } else { velocity };
        *sum = velocity;
        parameter - rate * gradient
    });
}

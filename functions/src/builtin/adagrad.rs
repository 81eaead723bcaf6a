//! `adagrad`: steps scaled by the sum of all squared gradients so far.
//!
//! Duchi, Hazan and Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", as
//! PyTorch computes it:
//!
//! ```text
//! g = (sum of contributions) / count
//! g = g + weight_decay * p                      if weight_decay > 0
//! v = v + g * g                                 slot 0 (sum)
//! p = p - step * (g / (sqrt(v) + eps))
//!
//! step = lr * schedule's factor / (1 + (t - 1) * lr_decay)      in f64, rounded once
//! ```
//!
//! Elements in f32. `t` is the number of the round: rounds in which nobody was counted leave the state as it is but
//! count. PyTorch's `initial_accumulator_value` is not there: slots of a job start at zero.

use super::{
    lanes::{Lane, append_next},
    optimizer::{InRound, Step},
};
use crate::settings::Adagrad;

impl Step for Adagrad {
    fn identity(&self) -> &'static str {
        "thalweg/adagrad/1"
    }

    fn slots(&self) -> usize {
        1
    }

    fn parameters(
        &self,
        round: InRound,
        sums: &mut [f32],
        parameters: Lane<'_>,
        slots: &[Lane<'_>],
        out: &mut Vec<u8>,
    ) {
        let [squares] = slots else { unreachable!("an optimizer has all slots of its settings") };
        let step = if self.weight_decay as f32 > 0.0 { steps::<true> } else { steps::<false> };
        step(self, round, sums, [parameters, squares], out);
    }

    fn slot(&self, _: usize, sums: &mut [f32], values: Lane<'_>, out: &mut Vec<u8>) {
        // The steps left the gradients where the sums were.
        append_next(out, sums, [values], |gradient, [value]| value + *gradient * *gradient);
    }
}

/// Appends the next parameters of one segment; its gradients replace `sums`.
fn steps<const DECAY: bool>(
    settings: &Adagrad,
    round: InRound,
    sums: &mut [f32],
    lanes: [Lane<'_>; 2],
    out: &mut Vec<u8>,
) {
    let before = (round.round - 1) as f64;
    let step = (settings.lr * round.factor / (1.0 + before * settings.lr_decay)) as f32;
    let (eps, weight_decay) = (settings.eps as f32, settings.weight_decay as f32);
    append_next(out, sums, lanes, |sum, [parameter, square]| {
        let mut gradient = *sum / round.count;
        if DECAY {
            gradient += weight_decay * parameter;
        }
        *sum = gradient;
        let square = square + gradient * gradient;
        parameter - step * (gradient / (square.sqrt() + eps))
    });
}

//! `lion`: steps of one size in the direction of an average gradient's sign.
//!
//! Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2, with the decay as a product, as its
//! authors' code has it:
//!
//! ```text
//! g = (sum of contributions) / count
//! p = p * (1 - rate * weight_decay)             if weight_decay > 0
//! p = p - rate * sign(beta1 * m + (1 - beta1) * g)
//! m = beta2 * m + (1 - beta2) * g               slot 0 (exp_avg)
//!
//! rate = lr * schedule's factor
//! ```
//!
//! Elements in f32; `1 - beta`, `rate` and `1 - rate * weight_decay` in f64, rounded once. The sign of a zero is 0, that
//! of a NaN is NaN.

use super::{
    adam::Average,
    lanes::{Lane, append_next},
    optimizer::{InRound, Step},
};
use crate::settings::Lion;

impl Step for Lion {
    fn identity(&self) -> &'static str {
        "thalweg/lion/1"
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
        let [averages] = slots else { unreachable!("an optimizer has all slots of its settings") };
        let step = if self.weight_decay as f32 > 0.0 { steps::<true> } else { steps::<false> };
        step(self, round, sums, [parameters, averages], out);
    }

    fn slot(&self, _: usize, sums: &mut [f32], values: Lane<'_>, out: &mut Vec<u8>) {
        // The steps left the gradients where the sums were.
        let average = Average::new(self.beta2);
        append_next(out, sums, [values], |gradient, [value]| average.next(value, *gradient));
    }
}

/// Appends the next parameters of one segment; its gradients replace `sums`.
fn steps<const SHRINK: bool>(
    settings: &Lion,
    round: InRound,
    sums: &mut [f32],
    lanes: [Lane<'_>; 2],
    out: &mut Vec<u8>,
) {
    let average = Average::new(settings.beta1);
    let rate = settings.lr * round.factor;
    let shrink = (1.0 - rate * settings.weight_decay) as f32;
    let rate = rate as f32;
    append_next(out, sums, lanes, |sum, [mut parameter, m]| {
        let gradient = *sum / round.count;
        if SHRINK {
            parameter *= shrink;
        }
        *sum = gradient;
        parameter - rate * sign(average.next(m, gradient))
    });
}

/// 1, 0 or -1; NaN of a NaN. (`f32::signum` of a zero is 1 or -1.)
fn sign(value: f32) -> f32 {
    if value > 0.0 {
        1.0
    } else if value < 0.0 {
        -1.0
    } else if value == 0.0 {
        0.0
    } else {
        value
    }
}

//! `adam` and `adamw`: steps scaled by running averages of the gradient and of its square.
//!
//! Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", and Loshchilov and Hutter 2019, "Decoupled Weight
//! Decay Regularization", as PyTorch computes them, without amsgrad:
//!
//! ```text
//! g = (sum of contributions) / count
//! g = g + weight_decay * p                      adam, if weight_decay > 0
//! p = p * (1 - rate * weight_decay)             adamw, if weight_decay > 0
//! m = beta1 * m + (1 - beta1) * g               slot 0 (exp_avg)
//! v = beta2 * v + (1 - beta2) * (g * g)         slot 1 (exp_avg_sq)
//! p = p - step * (m / (sqrt(v) / correction + eps))
//!
//! rate       = lr * schedule's factor
//! step       = rate / (1 - beta1 ^ t)
//! correction = sqrt(1 - beta2 ^ t)
//! ```
//!
//! Elements in f32. What is the same for all of them (`1 - beta`, `1 - rate * weight_decay`, `step`, `correction`) in
//! f64 and rounded once: in f32, `1 - 0.999` would be wrong in its fifth digit. `t` is the number of the round: rounds
//! in which nobody was counted leave the state as it is but count. Averages start at zero, in round 1; to correct for
//! that is what the two powers of beta are for.

use super::{
    lanes::{Lane, append_next},
    optimizer::{InRound, Step},
};
use crate::{schedule::power, settings::Adam};

impl Step for Adam {
    fn identity(&self) -> &'static str {
        if self.decoupled { "thalweg/adamw/1" } else { "thalweg/adam/1" }
    }

    fn slots(&self) -> usize {
        2
    }

    fn parameters(
        &self,
        round: InRound,
        sums: &mut [f32],
        parameters: Lane<'_>,
        slots: &[Lane<'_>],
        out: &mut Vec<u8>,
    ) {
        let [averages, squares] = slots else { unreachable!("an optimizer has all slots of its settings") };
        let lanes = [parameters, averages, squares];
        match (self.weight_decay as f32 > 0.0, self.decoupled) {
            (false, _) => steps::<false, false>(self, round, sums, lanes, out),
            (true, false) => steps::<true, false>(self, round, sums, lanes, out),
            (true, true) => steps::<false, true>(self, round, sums, lanes, out),
        }
    }

    fn slot(&self, slot: usize, sums: &mut [f32], values: Lane<'_>, out: &mut Vec<u8>) {
        // The steps left the gradients where the sums were.
        if slot == 0 {
            let average = Average::new(self.beta1);
            append_next(out, sums, [values], |gradient, [value]| average.next(value, *gradient));
        } else {
            let average = Average::new(self.beta2);
            append_next(out, sums, [values], |gradient, [value]| average.next(value, *gradient * *gradient));
        }
    }
}

/// Appends the next parameters of one segment; its gradients replace `sums`.
fn steps<const L2: bool, const SHRINK: bool>(
    settings: &Adam,
    round: InRound,
    sums: &mut [f32],
    lanes: [Lane<'_>; 3],
    out: &mut Vec<u8>,
) {
    let (average, average_square) = (Average::new(settings.beta1), Average::new(settings.beta2));
    let rate = settings.lr * round.factor;
    let step = (rate / (1.0 - power(settings.beta1, round.round))) as f32;
    let correction = (1.0 - power(settings.beta2, round.round)).sqrt() as f32;
    let shrink = (1.0 - rate * settings.weight_decay) as f32;
    let (eps, weight_decay) = (settings.eps as f32, settings.weight_decay as f32);
    append_next(out, sums, lanes, |sum, [mut parameter, m, v]| {
        let mut gradient = *sum / round.count;
        if L2 {
            gradient += weight_decay * parameter;
        }
        if SHRINK {
            parameter *= shrink;
        }
        *sum = gradient;
        let m = average.next(m, gradient);
        let v = average_square.next(v, gradient * gradient);
        parameter - step * (m / (v.sqrt() / correction + eps))
    });
}

/// A running average: `keep` of the value so far, `take` of the new one.
#[derive(Clone, Copy)]
pub(super) struct Average {
    keep: f32,
    take: f32,
}

impl Average {
    /// The average of which the share `beta` survives a round.
    pub(super) fn new(beta: f64) -> Self {
        Self { keep: beta as f32, take: (1.0 - beta) as f32 }
    }

    /// The average with one more value.
    pub(super) fn next(self, average: f32, value: f32) -> f32 {
        self.keep * average + self.take * value
    }
}

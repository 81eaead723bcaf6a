//! The factor of a schedule in a round.
//!
//! In f64, from additions, products, quotients, square roots (which IEEE 754 rounds exactly) and a cosine that is the
//! same code everywhere. Whoever changes a bit of it raises the digests of the functions with a learning rate.

use std::f64::consts::PI;

use thalweg_protocol::{Decay, Round, Schedule};

/// What `schedule` multiplies the learning rate of `round` with. [`Schedule`] has the formulas.
pub(crate) fn factor(schedule: &Schedule, round: Round) -> f64 {
    let warmup = schedule.warmup_rounds;
    let peak = warmup.max(1);
    let since = round.saturating_sub(peak);
    let warm = if round < warmup { round as f64 / warmup as f64 } else { 1.0 };
    let decay = match &schedule.decay {
        Decay::Constant => 1.0,
        // The end is given, not computed: rounding might miss it.
        Decay::Linear { rounds, to } | Decay::Cosine { rounds, to } if since >= *rounds => *to,
        Decay::Linear { rounds, to } => 1.0 - (1.0 - to) * (since as f64 / *rounds as f64),
        Decay::Cosine { rounds, to } => {
            // `f64::cos` is that of the platform's C library: other bits elsewhere.
            let cosine = libm::cos(PI * (since as f64 / *rounds as f64));
            to + (1.0 - to) * ((1.0 + cosine) / 2.0)
        }
        Decay::Exponential { factor } => power(*factor, since),
        Decay::Steps { at, factor } => {
            let steps = at.iter().filter(|&&at| at <= round).count();
            power(*factor, steps as u64)
        }
        Decay::InverseSqrt => (peak as f64 / round.max(peak) as f64).sqrt(),
    };
    warm * decay
}

/// `base ^ exponent` by repeated squaring, from the exponent's lowest bit up. `f64::powi` and `powf` may give other
/// bits on other platforms and with other compilers.
pub(crate) fn power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut rest) = (1.0, base, exponent);
    while rest > 0 {
        if rest & 1 == 1 {
            result *= square;
        }
        square *= square;
        rest >>= 1;
    }
    result
}

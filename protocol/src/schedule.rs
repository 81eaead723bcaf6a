//! How a learning rate changes from round to round.

use serde::{Deserialize, Serialize};

/// Factors on the learning rate of a function, round by round: the rate of round r is
/// `lr * warm(r) * decay(r)`. The first round of a job is 1.
///
/// ```text
/// warm(r) = min(r / warmup_rounds, 1)           1 without a warm-up
/// s       = max(r - max(warmup_rounds, 1), 0)   rounds since the first with the full rate
/// ```
///
/// `decay` is that of [`Decay`], by `s` where not said otherwise: it is 1 during the warm-up and in the first round
/// with the full rate. A round counts by its number, whether or not anybody contributed to it.
///
/// As JSON: `{"warmup_rounds": 100, "decay": {"cosine": {"rounds": 1000, "to": 0.1}}}`. A name that is no field is
/// refused, so that a slip of the pen does not train with another rate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Rounds in which the rate grows linearly: from `1 / warmup_rounds` of it in round 1 to all of it in round
    /// `warmup_rounds`. 0 for none.
    pub warmup_rounds: u64,
    /// What follows.
    pub decay: Decay,
}

/// How a learning rate falls after the warm-up; `s` is that of [`Schedule`].
///
/// Tagged by its name on the outside, the one form of an enumeration that both MessagePack with structs as arrays and
/// JSON can read back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// Not at all: 1.
    #[default]
    Constant,
    /// `1 - (1 - to) * s / rounds`; `to` from `s = rounds` on.
    Linear {
        /// Rounds until `to` is reached, at least 1.
        rounds: u64,
        /// Factor at the end, from 0 to 1.
        to: f64,
    },
    /// `to + (1 - to) * (1 + cos(pi * s / rounds)) / 2`; `to` from `s = rounds` on. One period of the annealing of
    /// Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5.
    Cosine {
        /// Rounds until `to` is reached, at least 1.
        rounds: u64,
        /// Factor at the end, from 0 to 1.
        to: f64,
    },
    /// `factor ^ s`
    Exponential {
        /// Factor per round, above 0 and at most 1.
        factor: f64,
    },
    /// `factor ^ (number of entries in at that are r or less)`: from each of these rounds on, `factor` times as much.
    Steps {
        /// Rounds of the job (not counted from the warm-up), ascending, at least 1; at most
        /// [`crate::limits::MAX_SCHEDULE_STEPS`].
        at: Vec<u64>,
        /// Factor per step, above 0 and at most 1.
        factor: f64,
    },
    /// `sqrt(peak / (peak + s))` with `peak = max(warmup_rounds, 1)`, the first round with the full rate. With the
    /// warm-up, the schedule of Vaswani et al. 2017, "Attention Is All You Need", section 5.3.
    InverseSqrt,
}

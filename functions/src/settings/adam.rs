//! Settings of `adam` and `adamw`.

use thalweg_protocol::FunctionSpec;

use super::{
    Grouped, InvalidSettings,
    place::{Known, LR, Place, grouped, not_negative, positive, share},
};

/// Settings of `adam`.
pub(super) const ADAM: [Known; 5] = known(0.0);
/// Settings of `adamw`.
pub(super) const ADAMW: [Known; 5] = known(0.01);

const fn known(weight_decay: f64) -> [Known; 5] {
    [
        LR,
        share("beta1", 0.9),
        share("beta2", 0.999),
        positive("eps", 1e-8),
        not_negative("weight_decay", weight_decay),
    ]
}

/// What `adam` and `adamw` do to an element. Defaults are those of PyTorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Adam {
    /// Step size, finite and above 0.
    pub(crate) lr: f64,
    /// Share of the average gradient that survives a round, 0 or more and below 1; 0.9.
    pub(crate) beta1: f64,
    /// Share of the average squared gradient that survives a round, 0 or more and below 1; 0.999.
    pub(crate) beta2: f64,
    /// Added to the divisor, finite and above 0; 1e-8.
    pub(crate) eps: f64,
    /// Finite and 0 or more; 0 for `adam`, 0.01 for `adamw`.
    pub(crate) weight_decay: f64,
    /// Whether decay shrinks the parameter (`adamw`) or is part of the gradient (`adam`).
    pub(crate) decoupled: bool,
}

impl Adam {
    /// The settings of the function and of each of its groups; of `adamw` if `decoupled`, else of `adam`.
    pub(crate) fn parse(spec: &FunctionSpec, decoupled: bool) -> Result<Grouped<Self>, InvalidSettings> {
        grouped(spec, |base, place| Self::overlay(base, place, decoupled))
    }

    fn overlay(base: Option<Self>, place: &Place<'_>, decoupled: bool) -> Result<Self, InvalidSettings> {
        Ok(Self {
            lr: place.number("lr", base.map(|base| base.lr))?,
            beta1: place.number("beta1", base.map(|base| base.beta1))?,
            beta2: place.number("beta2", base.map(|base| base.beta2))?,
            eps: place.number("eps", base.map(|base| base.eps))?,
            weight_decay: place.number("weight_decay", base.map(|base| base.weight_decay))?,
            decoupled,
        })
    }
}

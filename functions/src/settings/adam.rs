//! Settings of `adam` and `adamw`.

use thalweg_protocol::FunctionSpec;

use super::{
    Grouped, InvalidSettings,
    place::{EPS, NOT_NEGATIVE, Place, SHARE, grouped},
};

const KNOWN: [&str; 5] = ["lr", "beta1", "beta2", "eps", "weight_decay"];

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
        grouped(spec, &KNOWN, |base, place| Self::overlay(base, place, decoupled))
    }

    fn overlay(base: Option<Self>, place: &Place<'_>, decoupled: bool) -> Result<Self, InvalidSettings> {
        let lr = place.lr(base.map(|base| base.lr))?;
        let weight_decay = if decoupled { 0.01 } else { 0.0 };
        let default = Self { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, decoupled };
        let base = base.unwrap_or(default);
        Ok(Self {
            lr,
            beta1: place.number("beta1", &SHARE)?.unwrap_or(base.beta1),
            beta2: place.number("beta2", &SHARE)?.unwrap_or(base.beta2),
            eps: place.number("eps", &EPS)?.unwrap_or(base.eps),
            weight_decay: place.number("weight_decay", &NOT_NEGATIVE)?.unwrap_or(base.weight_decay),
            decoupled,
        })
    }
}

//! Settings of `adagrad`.

use thalweg_protocol::FunctionSpec;

use super::{
    Grouped, InvalidSettings,
    place::{EPS, NOT_NEGATIVE, Place, grouped},
};

const KNOWN: [&str; 4] = ["lr", "lr_decay", "eps", "weight_decay"];

/// What `adagrad` does to an element. Defaults are those of PyTorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Adagrad {
    /// Step size, finite and above 0.
    pub(crate) lr: f64,
    /// How fast the step size falls by itself, finite and 0 or more; 0.
    pub(crate) lr_decay: f64,
    /// Added to the divisor, finite and above 0; 1e-10.
    pub(crate) eps: f64,
    /// L2 penalty, finite and 0 or more; 0.
    pub(crate) weight_decay: f64,
}

impl Adagrad {
    /// The settings of the function and of each of its groups.
    pub(crate) fn parse(spec: &FunctionSpec) -> Result<Grouped<Self>, InvalidSettings> {
        grouped(spec, &KNOWN, Self::overlay)
    }

    fn overlay(base: Option<Self>, place: &Place<'_>) -> Result<Self, InvalidSettings> {
        let lr = place.lr(base.map(|base| base.lr))?;
        let base = base.unwrap_or(Self { lr, lr_decay: 0.0, eps: 1e-10, weight_decay: 0.0 });
        Ok(Self {
            lr,
            lr_decay: place.number("lr_decay", &NOT_NEGATIVE)?.unwrap_or(base.lr_decay),
            eps: place.number("eps", &EPS)?.unwrap_or(base.eps),
            weight_decay: place.number("weight_decay", &NOT_NEGATIVE)?.unwrap_or(base.weight_decay),
        })
    }
}

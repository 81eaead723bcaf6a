//! Settings of `adagrad`.

use thalweg_protocol::FunctionSpec;

use super::{
    Grouped, InvalidSettings,
    place::{Known, LR, Place, grouped, not_negative, positive},
};

/// Its settings.
pub(super) const KNOWN: [Known; 4] =
    [LR, not_negative("lr_decay", 0.0), positive("eps", 1e-10), not_negative("weight_decay", 0.0)];

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
        grouped(spec, Self::overlay)
    }

    fn overlay(base: Option<Self>, place: &Place<'_>) -> Result<Self, InvalidSettings> {
        Ok(Self {
            lr: place.number("lr", base.map(|base| base.lr))?,
            lr_decay: place.number("lr_decay", base.map(|base| base.lr_decay))?,
            eps: place.number("eps", base.map(|base| base.eps))?,
            weight_decay: place.number("weight_decay", base.map(|base| base.weight_decay))?,
        })
    }
}

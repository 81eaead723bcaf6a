//! Settings of `lion`.

use thalweg_protocol::FunctionSpec;

use super::{
    Grouped, InvalidSettings,
    place::{Known, LR, Place, grouped, not_negative, share},
};

/// Its settings.
pub(super) const KNOWN: [Known; 4] =
    [LR, share("beta1", 0.9), share("beta2", 0.99), not_negative("weight_decay", 0.0)];

/// What `lion` does to an element. Defaults are those of its paper.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Lion {
    /// Step size, finite and above 0.
    pub(crate) lr: f64,
    /// Share of the average gradient in the step's direction, 0 or more and below 1; 0.9.
    pub(crate) beta1: f64,
    /// Share of the average gradient that survives a round, 0 or more and below 1; 0.99.
    pub(crate) beta2: f64,
    /// Decoupled, finite and 0 or more; 0.
    pub(crate) weight_decay: f64,
}

impl Lion {
    /// The settings of the function and of each of its groups.
    pub(crate) fn parse(spec: &FunctionSpec) -> Result<Grouped<Self>, InvalidSettings> {
        grouped(spec, Self::overlay)
    }

    fn overlay(base: Option<Self>, place: &Place<'_>) -> Result<Self, InvalidSettings> {
        Ok(Self {
            lr: place.number("lr", base.map(|base| base.lr))?,
            beta1: place.number("beta1", base.map(|base| base.beta1))?,
            beta2: place.number("beta2", base.map(|base| base.beta2))?,
            weight_decay: place.number("weight_decay", base.map(|base| base.weight_decay))?,
        })
    }
}

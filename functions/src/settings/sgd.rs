//! Settings of `sgd`.

use thalweg_protocol::FunctionSpec;

use super::{
    Grouped, InvalidSettings,
    place::{NOT_NEGATIVE, Place, SHARE, grouped},
};

const KNOWN: [&str; 4] = ["lr", "momentum", "nesterov", "weight_decay"];

/// What `sgd` does to an element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sgd {
    /// Step size, finite and above 0.
    pub(crate) lr: f64,
    /// Share of the velocity that survives a round, 0 or more and below 1.
    pub(crate) momentum: f64,
    /// Whether the step looks ahead along the velocity; only with momentum above 0.
    pub(crate) nesterov: bool,
    /// L2 penalty, finite and 0 or more.
    pub(crate) weight_decay: f64,
}

impl Sgd {
    /// The settings of the function and of each of its groups.
    pub(crate) fn parse(spec: &FunctionSpec) -> Result<Grouped<Self>, InvalidSettings> {
        grouped(spec, &KNOWN, Self::overlay)
    }

    fn overlay(base: Option<Self>, place: &Place<'_>) -> Result<Self, InvalidSettings> {
        let lr = place.lr(base.map(|base| base.lr))?;
        let momentum = place.number("momentum", &SHARE)?.or(base.map(|base| base.momentum));
        let nesterov = place.flag("nesterov")?.or(base.map(|base| base.nesterov));
        let weight_decay =
            place.number("weight_decay", &NOT_NEGATIVE)?.or(base.map(|base| base.weight_decay));
        let settings = Self {
            lr,
            momentum: momentum.unwrap_or(0.0),
            nesterov: nesterov.unwrap_or(false),
            weight_decay: weight_decay.unwrap_or(0.0),
        };
        // As f32, as the arithmetic sees it.
        if settings.nesterov && settings.momentum as f32 == 0.0 {
            return Err(InvalidSettings::NesterovWithoutMomentum { place: place.to_string() });
        }
        Ok(settings)
    }
}

//! Settings of `sgd`.

use thalweg_protocol::FunctionSpec;

use super::{
    Grouped, InvalidSettings,
    place::{Known, LR, Place, flag, grouped, not_negative, share},
};

/// Its settings.
pub(super) const KNOWN: [Known; 4] = [
    LR,
    share("momentum", 0.0),
    flag("nesterov", "a flag: true or false", false),
    not_negative("weight_decay", 0.0),
];

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
        grouped(spec, Self::overlay)
    }

    fn overlay(base: Option<Self>, place: &Place<'_>) -> Result<Self, InvalidSettings> {
        let settings = Self {
            lr: place.number("lr", base.map(|base| base.lr))?,
            momentum: place.number("momentum", base.map(|base| base.momentum))?,
            nesterov: place.flag("nesterov", base.map(|base| base.nesterov))?,
            weight_decay: place.number("weight_decay", base.map(|base| base.weight_decay))?,
        };
        // As f32, as the arithmetic sees it.
        if settings.nesterov && settings.momentum as f32 == 0.0 {
            return Err(InvalidSettings::NesterovWithoutMomentum { place: place.to_string() });
        }
        Ok(settings)
    }
}

//! Typed settings of the built-in functions, and why a job's settings may be refused.

use thalweg_protocol::{FunctionSpec, Setting, Settings};

/// Names of the built-in functions.
pub(crate) const FUNCTIONS: [&str; 4] = ["sum", "mean", "weighted_mean", "sgd"];
/// Settings of `sgd`.
const SGD: [&str; 4] = ["lr", "momentum", "nesterov", "weight_decay"];

/// Why a function was refused. Every message says what would be accepted.
///
/// `place` is the function (`sgd`) or one of its parameter groups (`sgd groups[1]`, from 0).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidSettings {
    /// No built-in function has this name.
    #[error("unknown function {name:?}; known functions: {}", FUNCTIONS.join(", "))]
    UnknownFunction {
        /// The name asked for.
        name: String,
    },
    /// The function has no such setting.
    #[error("{place}: unknown setting {setting:?}; {}", known_settings(known))]
    UnknownSetting {
        /// Function or parameter group.
        place: String,
        /// The setting given.
        setting: String,
        /// All settings the function has.
        known: &'static [&'static str],
    },
    /// A number where a flag belongs, or the other way round.
    #[error("{place}: {setting} must be {accepted}")]
    WrongType {
        /// Function or parameter group.
        place: String,
        /// The setting given.
        setting: &'static str,
        /// Type and range that would be accepted.
        accepted: &'static str,
    },
    /// A number outside the accepted range.
    #[error("{place}: {setting} = {value:?} is out of range; it must be {accepted}")]
    OutOfRange {
        /// Function or parameter group.
        place: String,
        /// The setting given.
        setting: &'static str,
        /// The value given.
        value: f64,
        /// Range that would be accepted.
        accepted: &'static str,
    },
    /// A setting without a default is missing.
    #[error("{place}: setting {setting:?} is required: {accepted}")]
    Missing {
        /// Function or parameter group.
        place: String,
        /// The setting that is not there.
        setting: &'static str,
        /// Range that would be accepted.
        accepted: &'static str,
    },
    /// `nesterov` without a momentum it could look ahead with.
    #[error("{place}: nesterov requires momentum above 0; set momentum, or nesterov to false")]
    NesterovWithoutMomentum {
        /// Function or parameter group.
        place: String,
    },
}

fn known_settings(known: &[&str]) -> String {
    if known.is_empty() {
        return "this function takes no settings".into();
    }
    format!("known settings: {}", known.join(", "))
}

/// Refuses any setting, those of groups included.
pub(crate) fn none(spec: &FunctionSpec) -> Result<(), InvalidSettings> {
    places(spec).try_for_each(|place| place.check_known(&[]))
}

/// What `sgd` does to an element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sgd {
    /// Step size, finite and above 0.
    pub(crate) lr: f32,
    /// Share of the velocity that survives a round, 0 or more and below 1.
    pub(crate) momentum: f32,
    /// Whether the step looks ahead along the velocity; only with momentum above 0.
    pub(crate) nesterov: bool,
    /// L2 penalty, finite and 0 or more.
    pub(crate) weight_decay: f32,
}

impl Sgd {
    /// The settings of the function and of each of its groups.
    pub(crate) fn parse(spec: &FunctionSpec) -> Result<(Self, Vec<Self>), InvalidSettings> {
        let mut places = places(spec).map(|place| place.check_known(&SGD).map(|()| place));
        let base = match places.next() {
            Some(place) => Self::overlay(None, &place?)?,
            None => unreachable!("the function itself is always a place"),
        };
        let groups = places.map(|place| Self::overlay(Some(base), &place?)).collect::<Result<_, _>>()?;
        Ok((base, groups))
    }

    /// The settings of `place`; what it leaves out comes from `base`, then from the defaults.
    fn overlay(base: Option<Self>, place: &Place<'_>) -> Result<Self, InvalidSettings> {
        const LR: Range = Range { accepted: "a finite number above 0 (as f32)", holds: |x| x > 0.0 };
        const MOMENTUM: Range =
            Range { accepted: "a number from 0 to below 1 (as f32)", holds: |x| (0.0..1.0).contains(&x) };
        const WEIGHT_DECAY: Range =
            Range { accepted: "a finite number, 0 or more (as f32)", holds: |x| x >= 0.0 };

        let lr = place.number("lr", &LR)?.or(base.map(|base| base.lr)).ok_or_else(|| {
            InvalidSettings::Missing { place: place.to_string(), setting: "lr", accepted: LR.accepted }
        })?;
        let momentum = place.number("momentum", &MOMENTUM)?.or(base.map(|base| base.momentum));
        let nesterov = place.flag("nesterov")?.or(base.map(|base| base.nesterov));
        let weight_decay =
            place.number("weight_decay", &WEIGHT_DECAY)?.or(base.map(|base| base.weight_decay));
        let settings = Self {
            lr,
            momentum: momentum.unwrap_or(0.0),
            nesterov: nesterov.unwrap_or(false),
            weight_decay: weight_decay.unwrap_or(0.0),
        };
        if settings.nesterov && settings.momentum == 0.0 {
            return Err(InvalidSettings::NesterovWithoutMomentum { place: place.to_string() });
        }
        Ok(settings)
    }
}

/// Accepted values of a number. Checked after rounding to f32, which is what the arithmetic uses:
/// a tiny `lr` that rounds to 0 would train nothing.
struct Range {
    accepted: &'static str,
    holds: fn(f32) -> bool,
}

/// Settings and where they were found.
struct Place<'a> {
    function: &'a str,
    group: Option<usize>,
    settings: &'a Settings,
}

/// The function's own settings, then those of each group.
fn places(spec: &FunctionSpec) -> impl Iterator<Item = Place<'_>> {
    let function = spec.name.as_str();
    let groups = spec.groups.iter().enumerate();
    std::iter::once(Place { function, group: None, settings: &spec.settings }).chain(
        groups.map(move |(index, group)| Place { function, group: Some(index), settings: &group.settings }),
    )
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.function)?;
        self.group.map_or(Ok(()), |index| write!(f, " groups[{index}]"))
    }
}

impl Place<'_> {
    fn check_known(&self, known: &'static [&'static str]) -> Result<(), InvalidSettings> {
        match self.settings.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                Err(InvalidSettings::UnknownSetting { place: self.to_string(), setting: name.clone(), known })
            }
        }
    }

    fn number(&self, setting: &'static str, range: &Range) -> Result<Option<f32>, InvalidSettings> {
        let accepted = range.accepted;
        match self.settings.get(setting) {
            None => Ok(None),
            Some(Setting::Flag(_)) => {
                Err(InvalidSettings::WrongType { place: self.to_string(), setting, accepted })
            }
            Some(&Setting::Number(value)) => {
                let rounded = value as f32;
                if rounded.is_finite() && (range.holds)(rounded) {
                    return Ok(Some(rounded));
                }
                Err(InvalidSettings::OutOfRange { place: self.to_string(), setting, value, accepted })
            }
        }
    }

    fn flag(&self, setting: &'static str) -> Result<Option<bool>, InvalidSettings> {
        match self.settings.get(setting) {
            None => Ok(None),
            Some(&Setting::Flag(flag)) => Ok(Some(flag)),
            Some(Setting::Number(_)) => Err(InvalidSettings::WrongType {
                place: self.to_string(),
                setting,
                accepted: "a flag: true or false",
            }),
        }
    }
}

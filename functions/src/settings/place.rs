//! One place where settings stand (a function or a parameter group), and reading them.

use thalweg_protocol::{FunctionSpec, Setting, Settings};

use super::{Grouped, InvalidSettings, known};

/// A share of an average that survives a round.
const SHARE: Range = Range::new("a number from 0 to below 1 (as f32)", Some(0.0), None, Some(1.0));
/// A penalty or a decay.
const NOT_NEGATIVE: Range = Range::new("a finite number, 0 or more (as f32)", Some(0.0), None, None);
/// What keeps a divisor away from 0, and what a step has to be. PyTorch takes 0 too, and gets NaN for elements without
/// a gradient.
const POSITIVE: Range = Range::new("a finite number above 0 (as f32)", None, Some(0.0), None);

/// The step size, which has no default.
pub(super) const LR: Known =
    Known { name: "lr", accepts: Accepts::Number { range: POSITIVE, default: None } };

pub(super) const fn share(name: &'static str, default: f64) -> Known {
    Known { name, accepts: Accepts::Number { range: SHARE, default: Some(default) } }
}

pub(super) const fn not_negative(name: &'static str, default: f64) -> Known {
    Known { name, accepts: Accepts::Number { range: NOT_NEGATIVE, default: Some(default) } }
}

pub(super) const fn positive(name: &'static str, default: f64) -> Known {
    Known { name, accepts: Accepts::Number { range: POSITIVE, default: Some(default) } }
}

pub(super) const fn flag(name: &'static str, accepted: &'static str, default: bool) -> Known {
    Known { name, accepts: Accepts::Flag { accepted, default } }
}

/// A setting of a function: the one place that says what it may be and what it is when left out, both for reading
/// settings and for describing them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Known {
    /// Its name.
    pub name: &'static str,
    /// What it may be.
    pub accepts: Accepts,
}

/// What a setting may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Accepts {
    /// A number.
    Number {
        /// Which.
        range: Range,
        /// What it is when left out; `None` where it has to be given.
        default: Option<f64>,
    },
    /// A switch.
    Flag {
        /// In words.
        accepted: &'static str,
        /// What it is when left out.
        default: bool,
    },
}

/// Refuses any setting, those of groups included, and a schedule.
pub(crate) fn none(spec: &FunctionSpec) -> Result<(), InvalidSettings> {
    places(spec).try_for_each(|place| place.check_known())?;
    match spec.schedule {
        None => Ok(()),
        Some(_) => Err(InvalidSettings::ScheduleWithoutRate { function: spec.name.clone() }),
    }
}

/// Accepted values of a number. Checked after rounding to f32, which is what the arithmetic over
/// elements uses: a tiny `lr` that rounds to 0 would train nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// In words.
    pub accepted: &'static str,
    /// At least this, if there is a bound.
    pub minimum: Option<f32>,
    /// Above this.
    pub above: Option<f32>,
    /// Below this.
    pub below: Option<f32>,
}

impl Range {
    const fn new(
        accepted: &'static str,
        minimum: Option<f32>,
        above: Option<f32>,
        below: Option<f32>,
    ) -> Self {
        Self { accepted, minimum, above, below }
    }

    fn holds(&self, value: f32) -> bool {
        value.is_finite()
            && self.minimum.is_none_or(|minimum| value >= minimum)
            && self.above.is_none_or(|bound| value > bound)
            && self.below.is_none_or(|bound| value < bound)
    }
}

/// Settings and where they were found.
pub(super) struct Place<'a> {
    function: &'a str,
    group: Option<usize>,
    settings: &'a Settings,
}

/// The settings of the function and of each of its groups, none of them outside of what the function knows.
///
/// `overlay` makes those of one place; what the place leaves out comes from the function's own, which it is given for
/// a group, then from the defaults.
pub(super) fn grouped<S: Copy>(
    spec: &FunctionSpec,
    overlay: impl Fn(Option<S>, &Place<'_>) -> Result<S, InvalidSettings>,
) -> Result<Grouped<S>, InvalidSettings> {
    let mut places = places(spec).map(|place| place.check_known().map(|()| place));
    let base = match places.next() {
        Some(place) => overlay(None, &place?)?,
        None => unreachable!("the function itself is always a place"),
    };
    let groups = places.map(|place| overlay(Some(base), &place?)).collect::<Result<_, _>>()?;
    Ok(Grouped { base, groups })
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
    fn check_known(&self) -> Result<(), InvalidSettings> {
        let known = || known(self.function).iter().map(|known| known.name);
        match self.settings.keys().find(|name| !known().any(|known| known == name.as_str())) {
            None => Ok(()),
            Some(name) => Err(InvalidSettings::UnknownSetting {
                place: self.to_string(),
                setting: name.clone(),
                known: known().collect(),
            }),
        }
    }

    fn accepts(&self, setting: &str) -> Accepts {
        match known(self.function).iter().find(|known| known.name == setting) {
            Some(known) => known.accepts,
            None => unreachable!("{} reads {setting}, which its table does not have", self.function),
        }
    }

    /// The number as given here, or else that of `base`, or else the default.
    ///
    /// # Panics
    /// When the function's table has no number of this name: every parse reads all of its settings.
    pub(super) fn number(&self, setting: &'static str, base: Option<f64>) -> Result<f64, InvalidSettings> {
        let Accepts::Number { range, default } = self.accepts(setting) else {
            unreachable!("{setting} of {} is a flag", self.function)
        };
        let accepted = range.accepted;
        match self.settings.get(setting) {
            None => base.or(default).ok_or_else(|| InvalidSettings::Missing {
                place: self.to_string(),
                setting,
                accepted,
            }),
            Some(Setting::Flag(_)) => {
                Err(InvalidSettings::WrongType { place: self.to_string(), setting, accepted })
            }
            Some(&Setting::Number(value)) if range.holds(value as f32) => Ok(value),
            Some(&Setting::Number(value)) => {
                Err(InvalidSettings::OutOfRange { place: self.to_string(), setting, value, accepted })
            }
        }
    }

    /// As [`Self::number`], of a flag.
    ///
    /// # Panics
    /// When the function's table has no flag of this name.
    pub(super) fn flag(&self, setting: &'static str, base: Option<bool>) -> Result<bool, InvalidSettings> {
        let Accepts::Flag { accepted, default } = self.accepts(setting) else {
            unreachable!("{setting} of {} is a number", self.function)
        };
        match self.settings.get(setting) {
            None => Ok(base.unwrap_or(default)),
            Some(&Setting::Flag(flag)) => Ok(flag),
            Some(Setting::Number(_)) => {
                Err(InvalidSettings::WrongType { place: self.to_string(), setting, accepted })
            }
        }
    }
}

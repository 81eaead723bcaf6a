//! One place where settings stand (a function or a parameter group), and reading them.

use thalweg_protocol::{FunctionSpec, Setting, Settings};

use super::{Grouped, InvalidSettings};

/// A share of an average that survives a round.
pub(super) const SHARE: Range =
    Range { accepted: "a number from 0 to below 1 (as f32)", holds: |x| (0.0..1.0).contains(&x) };
/// A penalty or a decay.
pub(super) const NOT_NEGATIVE: Range =
    Range { accepted: "a finite number, 0 or more (as f32)", holds: |x| x >= 0.0 };
/// What keeps a divisor away from 0. PyTorch takes 0 too, and gets NaN for elements without a gradient.
pub(super) const EPS: Range = Range { accepted: "a finite number above 0 (as f32)", holds: |x| x > 0.0 };

/// Refuses any setting, those of groups included, and a schedule.
pub(crate) fn none(spec: &FunctionSpec) -> Result<(), InvalidSettings> {
    places(spec).try_for_each(|place| place.check_known(&[]))?;
    match spec.schedule {
        None => Ok(()),
        Some(_) => Err(InvalidSettings::ScheduleWithoutRate { function: spec.name.clone() }),
    }
}

/// Accepted values of a number. Checked after rounding to f32, which is what the arithmetic over
/// elements uses: a tiny `lr` that rounds to 0 would train nothing.
pub(super) struct Range {
    pub(super) accepted: &'static str,
    pub(super) holds: fn(f32) -> bool,
}

/// Settings and where they were found.
pub(super) struct Place<'a> {
    function: &'a str,
    group: Option<usize>,
    settings: &'a Settings,
}

/// The settings of the function and of each of its groups, none of them outside of `known`.
///
/// `overlay` makes those of one place; what the place leaves out comes from the function's own, which it is given for
/// a group, then from the defaults.
pub(super) fn grouped<S: Copy>(
    spec: &FunctionSpec,
    known: &'static [&'static str],
    overlay: impl Fn(Option<S>, &Place<'_>) -> Result<S, InvalidSettings>,
) -> Result<Grouped<S>, InvalidSettings> {
    let mut places = places(spec).map(|place| place.check_known(known).map(|()| place));
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
    fn check_known(&self, known: &'static [&'static str]) -> Result<(), InvalidSettings> {
        match self.settings.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                Err(InvalidSettings::UnknownSetting { place: self.to_string(), setting: name.clone(), known })
            }
        }
    }

    /// The number as given, if it is in `range`.
    pub(super) fn number(
        &self,
        setting: &'static str,
        range: &Range,
    ) -> Result<Option<f64>, InvalidSettings> {
        let accepted = range.accepted;
        match self.settings.get(setting) {
            None => Ok(None),
            Some(Setting::Flag(_)) => {
                Err(InvalidSettings::WrongType { place: self.to_string(), setting, accepted })
            }
            Some(&Setting::Number(value)) => {
                let rounded = value as f32;
                if rounded.is_finite() && (range.holds)(rounded) {
                    return Ok(Some(value));
                }
                Err(InvalidSettings::OutOfRange { place: self.to_string(), setting, value, accepted })
            }
        }
    }

    /// The step size, which has no default.
    pub(super) fn lr(&self, base: Option<f64>) -> Result<f64, InvalidSettings> {
        const LR: Range = Range { accepted: "a finite number above 0 (as f32)", holds: |x| x > 0.0 };
        self.number("lr", &LR)?.or(base).ok_or_else(|| InvalidSettings::Missing {
            place: self.to_string(),
            setting: "lr",
            accepted: LR.accepted,
        })
    }

    pub(super) fn flag(&self, setting: &'static str) -> Result<Option<bool>, InvalidSettings> {
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

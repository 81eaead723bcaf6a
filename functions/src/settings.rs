//! Typed settings of the built-in functions, and why a job's settings may be refused.
//!
//! Numbers stay f64, as they were given: what is computed from them for a whole round (`1 - beta ^ t`, a schedule's
//! rate) is rounded to f32 once, at its end.

mod adagrad;
mod adam;
mod lion;
mod place;
mod schedule;
mod sgd;

pub(crate) use adagrad::Adagrad;
pub(crate) use adam::Adam;
pub(crate) use lion::Lion;
pub(crate) use place::none;
pub use place::{Accepts, Known, Range};
pub(crate) use schedule::checked as schedule;
pub(crate) use sgd::Sgd;

/// Names of the built-in functions.
pub(crate) const FUNCTIONS: [&str; 8] =
    ["sum", "mean", "weighted_mean", "sgd", "adam", "adamw", "adagrad", "lion"];

/// The settings that a function knows; none of a function that takes no settings, or does not exist.
pub(crate) fn known(function: &str) -> &'static [Known] {
    match function {
        "sgd" => &sgd::KNOWN,
        "adam" => &adam::ADAM,
        "adamw" => &adam::ADAMW,
        "adagrad" => &adagrad::KNOWN,
        "lion" => &lion::KNOWN,
        _ => &[],
    }
}

/// Settings of a function, and those of each of its parameter groups.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grouped<S> {
    /// Those of elements outside of groups.
    pub(crate) base: S,
    /// Those of the groups, by index; complete, with what they take over from `base`.
    pub(crate) groups: Vec<S>,
}

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
        known: Vec<&'static str>,
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
    /// A field of the schedule outside the accepted range.
    #[error("{function}: {field} is {value}; it must be {accepted}")]
    Schedule {
        /// The function.
        function: String,
        /// The field, as a path from the function's specification.
        field: &'static str,
        /// The value given, or what is wrong about it.
        value: String,
        /// Values that would be accepted.
        accepted: &'static str,
    },
    /// A schedule for a function without a learning rate.
    #[error("{function}: a schedule changes lr, and this function has none; leave the schedule out")]
    ScheduleWithoutRate {
        /// The function.
        function: String,
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

//! What a schedule may say.

use thalweg_protocol::{Decay, FunctionSpec, Schedule, limits};

use super::InvalidSettings;

/// The schedule of a function that has a learning rate.
pub(crate) fn checked(spec: &FunctionSpec) -> Result<Schedule, InvalidSettings> {
    const ROUNDS: &str = "at least 1";
    const TO: &str = "a number from 0 to 1";
    const FACTOR: &str = "a number above 0 and at most 1";
    const AT: &str = "at most 64 rounds, ascending, the first at least 1";
    const _: () = assert!(limits::MAX_SCHEDULE_STEPS == 64, "AT says 64");

    let schedule = spec.schedule.clone().unwrap_or_default();
    let refuse = |field, value: String, accepted| {
        Err(InvalidSettings::Schedule { function: spec.name.clone(), field, value, accepted })
    };
    match &schedule.decay {
        Decay::Constant | Decay::InverseSqrt => {}
        Decay::Linear { rounds: 0, .. } => return refuse("schedule.decay.linear.rounds", "0".into(), ROUNDS),
        Decay::Cosine { rounds: 0, .. } => return refuse("schedule.decay.cosine.rounds", "0".into(), ROUNDS),
        Decay::Linear { to, .. } if !(0.0..=1.0).contains(to) => {
            return refuse("schedule.decay.linear.to", format!("{to:?}"), TO);
        }
        Decay::Cosine { to, .. } if !(0.0..=1.0).contains(to) => {
            return refuse("schedule.decay.cosine.to", format!("{to:?}"), TO);
        }
        Decay::Exponential { factor } if !is_factor(*factor) => {
            return refuse("schedule.decay.exponential.factor", format!("{factor:?}"), FACTOR);
        }
        Decay::Steps { factor, .. } if !is_factor(*factor) => {
            return refuse("schedule.decay.steps.factor", format!("{factor:?}"), FACTOR);
        }
        Decay::Steps { at, .. } => {
            let wrong = if at.len() > limits::MAX_SCHEDULE_STEPS {
                Some(format!("a list of {} rounds", at.len()))
            } else if at.first() == Some(&0) {
                Some("a list that begins with 0".to_owned())
            } else {
                let pair = at.windows(2).find(|pair| pair[0] >= pair[1]);
                pair.map(|pair| format!("a list with {} after {}", pair[1], pair[0]))
            };
            if let Some(wrong) = wrong {
                return refuse("schedule.decay.steps.at", wrong, AT);
            }
        }
        Decay::Linear { .. } | Decay::Cosine { .. } | Decay::Exponential { .. } => {}
    }
    Ok(schedule)
}

/// Not a NaN either.
fn is_factor(factor: f64) -> bool {
    factor > 0.0 && factor <= 1.0
}

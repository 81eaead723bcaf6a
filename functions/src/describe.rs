//! What the built-in functions are called and what they take, for people and for forms.

use thalweg_protocol::FunctionSpec;

use crate::{
    Kind, resolve,
    settings::{Accepts, FUNCTIONS, Known, known},
};

/// A built-in function.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// Its name in a specification.
    pub name: &'static str,
    /// Whether it keeps parameters.
    pub kind: Kind,
    /// Its settings. What reads settings reads the same tables.
    pub settings: &'static [Known],
    /// Optimizer slots with its default settings.
    pub slots: usize,
    /// Optimizer slots with the settings that need most.
    pub most_slots: usize,
}

impl Description {
    /// Whether a schedule may change its `lr`.
    #[must_use]
    pub fn takes_schedule(&self) -> bool {
        self.kind == Kind::Optimizer
    }
}

/// All built-in functions. Kind and slots are those of the functions themselves, so that this cannot say anything
/// else than what they do.
///
/// # Panics
/// When a function refuses settings that its own table accepts, which a test excludes.
#[must_use]
pub fn describe() -> Vec<Description> {
    let resolved = |spec: &FunctionSpec| match resolve(spec) {
        Ok(function) => function,
        Err(error) => unreachable!("a function refuses what its table accepts: {error}"),
    };
    let described = |&name: &&'static str| {
        let settings = known(name);
        let (mut least, mut most) = (FunctionSpec::named(name), FunctionSpec::named(name));
        for setting in settings {
            if let Accepts::Number { default, .. } = setting.accepts {
                // In every range.
                most = most.number(setting.name, 0.5);
                if default.is_none() {
                    least = least.number(setting.name, 0.5);
                }
            }
        }
        let (least, most) = (resolved(&least), resolved(&most));
        Description { name, kind: least.kind(), settings, slots: least.slots(), most_slots: most.slots() }
    };
    FUNCTIONS.iter().map(described).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_say_what_the_functions_do() {
        let all = describe();
        assert_eq!(all.len(), FUNCTIONS.len());
        let slots: Vec<_> = all.iter().map(|f| (f.name, f.slots, f.most_slots)).collect();
        assert_eq!(slots[..4], [("sum", 0, 0), ("mean", 0, 0), ("weighted_mean", 0, 0), ("sgd", 0, 1)]);
        for function in &all {
            assert_eq!(function.takes_schedule(), function.settings.iter().any(|known| known.name == "lr"));
            for known in function.settings {
                let base = FunctionSpec::named(function.name).number("lr", 0.5);
                let refused = match known.accepts {
                    Accepts::Number { range, .. } => {
                        // The bounds that are told are those that are kept.
                        let bounds = [range.above, range.below, range.minimum.map(|bound| bound - 1.0)];
                        let refused = bounds.into_iter().flatten().map(f64::from);
                        for value in refused.chain([f64::NAN, f64::INFINITY]) {
                            let spec = base.clone().number(known.name, value);
                            assert!(resolve(&spec).is_err(), "{spec:?}");
                        }
                        base.clone().flag(known.name, true)
                    }
                    Accepts::Flag { .. } => base.clone().number(known.name, 1.0),
                };
                assert!(resolve(&refused).is_err(), "{refused:?}");
            }
        }
    }
}

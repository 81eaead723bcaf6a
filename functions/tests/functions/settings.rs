//! Settings that are refused, and what the refusal says.

use thalweg_functions::resolve;
use thalweg_protocol::{Decay, FunctionSpec, ParameterGroup, Schedule, Setting, Settings};

fn group(settings: &[(&str, Setting)]) -> ParameterGroup {
    let settings: Settings = settings.iter().map(|(name, setting)| ((*name).to_owned(), *setting)).collect();
    ParameterGroup { tensors: vec!["bias".to_owned()], settings }
}

fn sgd() -> FunctionSpec {
    FunctionSpec::named("sgd").number("lr", 0.1)
}

fn with_group(mut spec: FunctionSpec, settings: &[(&str, Setting)]) -> FunctionSpec {
    // The first group changes nothing and is fine everywhere.
    spec.groups = vec![group(&[]), group(settings)];
    spec
}

fn refusal(spec: &FunctionSpec) -> String {
    match resolve(spec) {
        Ok(function) => panic!("{spec:?} was accepted: {function:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn refusals_say_what_would_be_accepted() {
    use Setting::{Flag, Number};
    const LR: &str = "it must be a finite number above 0 (as f32)";
    const KNOWN: &str = "known settings: lr, momentum, nesterov, weight_decay";
    for (spec, expected) in [
        (
            FunctionSpec::named("adamax"),
            r#"unknown function "adamax"; known functions: sum, mean, weighted_mean, sgd, adam, adamw, adagrad, lion"#
                .to_owned(),
        ),
        (
            FunctionSpec::named("sum").number("lr", 0.1),
            r#"sum: unknown setting "lr"; this function takes no settings"#.to_owned(),
        ),
        (
            with_group(FunctionSpec::named("mean"), &[("x", Flag(true))]),
            r#"mean groups[1]: unknown setting "x"; this function takes no settings"#.to_owned(),
        ),
        (
            FunctionSpec::named("weighted_mean").flag("x", true),
            r#"weighted_mean: unknown setting "x"; this function takes no settings"#.to_owned(),
        ),
        (
            FunctionSpec::named("sgd"),
            r#"sgd: setting "lr" is required: a finite number above 0 (as f32)"#.to_owned(),
        ),
        // A group's lr does not cover the elements outside of groups.
        (
            with_group(FunctionSpec::named("sgd"), &[("lr", Number(0.1))]),
            r#"sgd: setting "lr" is required: a finite number above 0 (as f32)"#.to_owned(),
        ),
        (sgd().number("dampening", 0.1), format!(r#"sgd: unknown setting "dampening"; {KNOWN}"#)),
        (
            with_group(sgd(), &[("Lr", Number(0.1))]),
            format!(r#"sgd groups[1]: unknown setting "Lr"; {KNOWN}"#),
        ),
        (sgd().flag("lr", true), "sgd: lr must be a finite number above 0 (as f32)".to_owned()),
        (
            with_group(sgd(), &[("momentum", Flag(false))]),
            "sgd groups[1]: momentum must be a number from 0 to below 1 (as f32)".to_owned(),
        ),
        (sgd().number("nesterov", 1.0), "sgd: nesterov must be a flag: true or false".to_owned()),
        (sgd().number("lr", 0.0), format!("sgd: lr = 0.0 is out of range; {LR}")),
        (sgd().number("lr", -0.1), format!("sgd: lr = -0.1 is out of range; {LR}")),
        (sgd().number("lr", 1e-60), format!("sgd: lr = 1e-60 is out of range; {LR}")),
        (sgd().number("lr", 1e60), format!("sgd: lr = 1e60 is out of range; {LR}")),
        (sgd().number("lr", f64::NAN), format!("sgd: lr = NaN is out of range; {LR}")),
        (
            with_group(sgd(), &[("lr", Number(-1.0))]),
            format!("sgd groups[1]: lr = -1.0 is out of range; {LR}"),
        ),
        (
            sgd().number("momentum", 1.0),
            "sgd: momentum = 1.0 is out of range; it must be a number from 0 to below 1 (as f32)".to_owned(),
        ),
        (
            sgd().number("momentum", 0.999_999_999_9),
            "sgd: momentum = 0.9999999999 is out of range; it must be a number from 0 to below 1 (as f32)"
                .to_owned(),
        ),
        (
            sgd().number("weight_decay", f64::INFINITY),
            "sgd: weight_decay = inf is out of range; it must be a finite number, 0 or more (as f32)"
                .to_owned(),
        ),
        (
            sgd().number("weight_decay", -1.0),
            "sgd: weight_decay = -1.0 is out of range; it must be a finite number, 0 or more (as f32)"
                .to_owned(),
        ),
        (
            sgd().flag("nesterov", true),
            "sgd: nesterov requires momentum above 0; set momentum, or nesterov to false".to_owned(),
        ),
        (
            with_group(sgd().flag("nesterov", true).number("momentum", 0.9), &[("momentum", Number(0.0))]),
            "sgd groups[1]: nesterov requires momentum above 0; set momentum, or nesterov to false"
                .to_owned(),
        ),
    ] {
        assert_eq!(refusal(&spec), expected);
    }
}

#[test]
fn refusals_of_the_adaptive_functions() {
    const ADAM: &str = "known settings: lr, beta1, beta2, eps, weight_decay";
    const SHARE: &str = "it must be a number from 0 to below 1 (as f32)";
    const NOT_NEGATIVE: &str = "it must be a finite number, 0 or more (as f32)";
    const ABOVE: &str = "it must be a finite number above 0 (as f32)";
    let named = |name: &str| FunctionSpec::named(name).number("lr", 0.1);
    for name in ["adam", "adamw", "adagrad", "lion"] {
        let required = format!(r#"{name}: setting "lr" is required: a finite number above 0 (as f32)"#);
        assert_eq!(refusal(&FunctionSpec::named(name)), required);
        assert_eq!(
            refusal(&named(name).number("lr", 0.0)),
            format!("{name}: lr = 0.0 is out of range; {ABOVE}")
        );
        let negative = format!("{name}: weight_decay = -1.0 is out of range; {NOT_NEGATIVE}");
        assert_eq!(refusal(&named(name).number("weight_decay", -1.0)), negative);
        let flag = format!("{name} groups[1]: weight_decay must be a finite number, 0 or more (as f32)");
        assert_eq!(refusal(&with_group(named(name), &[("weight_decay", Setting::Flag(true))])), flag);
    }
    for name in ["adam", "adamw", "lion"] {
        for beta in ["beta1", "beta2"] {
            for value in [1.0, -0.5, 0.999_999_999_9, f64::NAN] {
                let expected = format!("{name}: {beta} = {value:?} is out of range; {SHARE}");
                assert_eq!(refusal(&named(name).number(beta, value)), expected);
            }
        }
    }
    for name in ["adam", "adamw", "adagrad"] {
        for eps in [0.0, -1e-8, 1e-60, f64::INFINITY] {
            let expected = format!("{name}: eps = {eps:?} is out of range; {ABOVE}");
            assert_eq!(refusal(&named(name).number("eps", eps)), expected);
        }
    }
    for (spec, expected) in [
        (named("adam").flag("amsgrad", true), format!(r#"adam: unknown setting "amsgrad"; {ADAM}"#)),
        (
            with_group(named("adamw"), &[("momentum", Setting::Number(0.9))]),
            format!(r#"adamw groups[1]: unknown setting "momentum"; {ADAM}"#),
        ),
        (
            named("adagrad").number("initial_accumulator_value", 0.1),
            r#"adagrad: unknown setting "initial_accumulator_value"; known settings: lr, lr_decay, eps, weight_decay"#
                .to_owned(),
        ),
        (
            named("adagrad").number("lr_decay", -0.5),
            format!("adagrad: lr_decay = -0.5 is out of range; {NOT_NEGATIVE}"),
        ),
        (
            named("lion").number("eps", 1e-8),
            r#"lion: unknown setting "eps"; known settings: lr, beta1, beta2, weight_decay"#.to_owned(),
        ),
    ] {
        assert_eq!(refusal(&spec), expected);
    }
}

#[test]
fn refusals_of_schedules_name_the_field() {
    let steps = |at: &[u64], factor| Decay::Steps { at: at.to_vec(), factor };
    const AT: &str = "it must be at most 64 rounds, ascending, the first at least 1";
    const FACTOR: &str = "it must be a number above 0 and at most 1";
    const TO: &str = "it must be a number from 0 to 1";
    let mut cases = vec![
        (steps(&[3, 3], 0.5), format!("schedule.decay.steps.at is a list with 3 after 3; {AT}")),
        (steps(&[1, 9, 4], 0.5), format!("schedule.decay.steps.at is a list with 4 after 9; {AT}")),
        (steps(&[0, 4], 0.5), format!("schedule.decay.steps.at is a list that begins with 0; {AT}")),
        (
            steps(&(1..=65).collect::<Vec<_>>(), 0.5),
            format!("schedule.decay.steps.at is a list of 65 rounds; {AT}"),
        ),
        (
            Decay::Linear { rounds: 0, to: 0.5 },
            "schedule.decay.linear.rounds is 0; it must be at least 1".to_owned(),
        ),
        (
            Decay::Cosine { rounds: 0, to: 0.5 },
            "schedule.decay.cosine.rounds is 0; it must be at least 1".to_owned(),
        ),
    ];
    for to in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        let linear = Decay::Linear { rounds: 1, to };
        cases.push((linear, format!("schedule.decay.linear.to is {to:?}; {TO}")));
        let cosine = Decay::Cosine { rounds: 1, to };
        cases.push((cosine, format!("schedule.decay.cosine.to is {to:?}; {TO}")));
    }
    for factor in [0.0, -0.5, 1.1, f64::NAN] {
        let exponential = Decay::Exponential { factor };
        cases.push((exponential, format!("schedule.decay.exponential.factor is {factor:?}; {FACTOR}")));
        cases.push((steps(&[1], factor), format!("schedule.decay.steps.factor is {factor:?}; {FACTOR}")));
    }
    for (decay, expected) in cases {
        for name in ["sgd", "adam", "adamw", "adagrad", "lion"] {
            let schedule = Schedule { warmup_rounds: 0, decay: decay.clone() };
            let spec = FunctionSpec::named(name).number("lr", 0.1).schedule(schedule);
            assert_eq!(refusal(&spec), format!("{name}: {expected}"));
        }
    }
    for name in ["sum", "mean", "weighted_mean"] {
        assert_eq!(
            refusal(&FunctionSpec::named(name).schedule(Schedule::default())),
            format!("{name}: a schedule changes lr, and this function has none; leave the schedule out"),
        );
    }
}

#[test]
fn accepted_schedules() {
    for decay in [
        Decay::Constant,
        Decay::InverseSqrt,
        Decay::Linear { rounds: 1, to: 0.0 },
        Decay::Linear { rounds: u64::MAX, to: 1.0 },
        Decay::Cosine { rounds: 1, to: 0.0 },
        Decay::Cosine { rounds: u64::MAX, to: 1.0 },
        Decay::Exponential { factor: 1e-300 },
        Decay::Exponential { factor: 1.0 },
        Decay::Steps { at: Vec::new(), factor: 1.0 },
        Decay::Steps { at: (1..=64).collect(), factor: 0.1 },
        Decay::Steps { at: vec![1, u64::MAX], factor: 0.1 },
    ] {
        for warmup_rounds in [0, 1, u64::MAX] {
            let schedule = Schedule { warmup_rounds, decay: decay.clone() };
            assert!(resolve(&sgd().schedule(schedule.clone())).is_ok(), "{schedule:?}");
        }
    }
}

#[test]
fn accepted_settings_and_their_slots() {
    use Setting::{Flag, Number};
    let nesterov = sgd().number("momentum", 0.9).flag("nesterov", true);
    for (spec, slots) in [
        (with_group(FunctionSpec::named("sum"), &[]), 0),
        (sgd(), 0),
        (sgd().number("momentum", 0.0).number("weight_decay", 0.0).flag("nesterov", false), 0),
        (sgd().number("momentum", 0.9), 1),
        (nesterov.clone(), 1),
        (with_group(sgd(), &[("momentum", Number(0.5)), ("nesterov", Flag(true))]), 1),
        (with_group(nesterov, &[("momentum", Number(0.0)), ("nesterov", Flag(false))]), 1),
        (with_group(sgd(), &[("lr", Number(1e-30)), ("weight_decay", Number(1e-60))]), 0),
        // 0 as f32, which is what the velocity would be multiplied with.
        (sgd().number("momentum", 1e-60), 0),
        (FunctionSpec::named("adam").number("lr", 0.1).number("beta1", 0.0).number("beta2", 0.0), 2),
        (FunctionSpec::named("adamw").number("lr", 0.1), 2),
        (FunctionSpec::named("adagrad").number("lr", 0.1).number("eps", 1e-30), 1),
        (with_group(FunctionSpec::named("lion").number("lr", 0.1), &[("beta1", Number(0.5))]), 1),
    ] {
        assert_eq!(resolve(&spec).unwrap().slots(), slots, "{spec:?}");
    }
}

//! Settings that are refused, and what the refusal says.

use thalweg_functions::resolve;
use thalweg_protocol::{FunctionSpec, ParameterGroup, Setting, Settings};

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
            FunctionSpec::named("adam"),
            r#"unknown function "adam"; known functions: sum, mean, weighted_mean, sgd"#.to_owned(),
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
    ] {
        assert_eq!(resolve(&spec).unwrap().slots(), slots, "{spec:?}");
    }
}

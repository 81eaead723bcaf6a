//! `adam`, `adamw`, `adagrad` and `lion`: examples, groups, rounds in which nobody was counted.

use thalweg_functions::Kind;
use thalweg_protocol::{FunctionSpec, ParameterGroup, Setting};

use crate::common::{bits, function, round, round_at, shard};

fn with_lr(name: &str) -> FunctionSpec {
    FunctionSpec::named(name).number("lr", 0.1)
}

/// The states after rounds 1 to 3 of one element that starts as 1. `None` is a round in which nobody is counted.
fn train(spec: &FunctionSpec, gradients: [Option<f32>; 3]) -> Vec<Vec<f32>> {
    let function = function(spec);
    let mut state = vec![1.0];
    state.resize(1 + function.slots(), 0.0);
    let mut states = Vec::new();
    for (round, gradient) in (1..).zip(gradients) {
        let contributions: Vec<_> = gradient.iter().map(|&gradient| (1.0, vec![gradient])).collect();
        state = round_at(round, &*function, &[], &state, &contributions);
        states.push(state.clone());
    }
    states
}

fn assert_close(spec: &FunctionSpec, actual: &[Vec<f32>], expected: &[&[f64]]) {
    assert_eq!(actual.len(), expected.len());
    for (round, (actual, expected)) in (1..).zip(actual.iter().zip(expected)) {
        assert_eq!(actual.len(), expected.len(), "{spec:?}");
        for (lane, (&actual, &expected)) in actual.iter().zip(*expected).enumerate() {
            // The constant is for averages in which gradients cancel.
            let off = (f64::from(actual) - expected).abs();
            assert!(
                off <= 3e-7 * expected.abs() + 1e-8,
                "{spec:?} round {round} lane {lane}: {actual} is not {expected}"
            );
        }
    }
}

/// Worked out in f64 in the order of PyTorch's single-tensor implementations (and that of the authors of Lion):
/// parameter, then slots.
#[test]
fn examples() {
    let gradients = [Some(0.5), Some(-1.0), Some(0.25)];
    let decay = |name: &str, decay| with_lr(name).number("weight_decay", decay);
    let cases: [(FunctionSpec, [&[f64]; 3]); 7] = [
        (
            with_lr("adam"),
            [
                &[0.900000002, 0.05, 0.00025],
                &[0.9366103542405654, -0.055, 0.00124975],
                &[0.9502794203389762, -0.0245, 0.00131100025],
            ],
        ),
        (
            decay("adam", 0.1),
            [
                &[0.9000000016666666, 0.06, 0.00036],
                &[0.9252635194456061, -0.03699999998333332, 0.0011877399996966678],
                &[0.9247305742687093, 0.000952635209456057, 0.0013038765614734203],
            ],
        ),
        // The default decay of 0.01.
        (
            with_lr("adamw"),
            [
                &[0.899000002, 0.05, 0.00025],
                &[0.9347113542385653, -0.055, 0.00124975],
                &[0.9474457089827375, -0.0245, 0.00131100025],
            ],
        ),
        (
            with_lr("adagrad"),
            [&[0.90000000002, 0.25], &[0.9894427191119917, 1.25], &[0.9676209300902971, 1.3125]],
        ),
        (
            decay("adagrad", 0.1).number("lr_decay", 0.5),
            [
                &[0.9000000000166667, 0.36],
                &[0.9556574923662696, 1.1880999999969668],
                &[0.940547047830134, 1.3075156870424383],
            ],
        ),
        (with_lr("lion"), [&[0.9, 0.005], &[1.0, -0.00505], &[0.9, -0.0024995]]),
        (decay("lion", 0.5), [&[0.85, 0.005], &[0.9075, -0.00505], &[0.762125, -0.0024995]]),
    ];
    for (spec, expected) in cases {
        assert_eq!(function(&spec).kind(), Kind::Optimizer);
        assert_close(&spec, &train(&spec, gradients), &expected);
    }
}

#[test]
fn a_round_without_anybody_changes_nothing_but_counts_as_a_step() {
    let gradients = [Some(0.5), None, Some(0.25)];
    let adam = with_lr("adam");
    let first: &[f64] = &[0.900000002, 0.05, 0.00025];
    // Corrected for three steps: for two it would be 0.7986...
    assert_close(&adam, &train(&adam, gradients), &[first, first, &[0.8199758729625516, 0.07, 0.00031225]]);
    let adagrad = with_lr("adagrad").number("lr_decay", 0.5);
    let first: &[f64] = &[0.90000000002, 0.25];
    assert_close(&adagrad, &train(&adagrad, gradients), &[first, first, &[0.8776393202490022, 0.3125]]);
    for name in ["adam", "adamw", "adagrad", "lion"] {
        let [first, second, _] = &train(&with_lr(name), gradients)[..] else { panic!("three rounds") };
        assert_eq!(bits(second), bits(first), "{name}");
    }
}

#[test]
fn an_empty_round_leaves_the_state_bit_for_bit() {
    for (name, slots) in [("adam", 2), ("adamw", 2), ("adagrad", 1), ("lion", 1)] {
        let function = function(&with_lr(name).number("weight_decay", 0.1));
        assert_eq!(function.slots(), slots);
        let state = [-0.0, f32::from_bits(1), f32::from_bits(0xffc0_1234), f32::NEG_INFINITY];
        let state: Vec<f32> = state.into_iter().cycle().take(4 * (1 + slots)).collect();
        assert_eq!(bits(&round(&*function, &[], &state, &[])), bits(&state), "{name}");
    }
}

#[test]
fn groups_override_and_inherit() {
    for (name, setting, value) in [
        ("adam", "lr", 0.5),
        ("adam", "beta1", 0.5),
        ("adam", "beta2", 0.5),
        ("adam", "eps", 0.5),
        ("adam", "weight_decay", 0.5),
        ("adamw", "lr", 0.5),
        ("adamw", "weight_decay", 0.5),
        ("adagrad", "lr", 0.5),
        ("adagrad", "lr_decay", 0.5),
        ("adagrad", "eps", 0.5),
        ("adagrad", "weight_decay", 0.5),
        ("lion", "lr", 0.5),
        ("lion", "beta1", 0.5),
        ("lion", "beta2", 0.5),
        ("lion", "weight_decay", 0.5),
    ] {
        // What the group does not set comes from here, not from the defaults.
        let base = with_lr(name).number("weight_decay", 0.02);
        let base = match name {
            "adagrad" => base.number("lr_decay", 0.1).number("eps", 0.25),
            "lion" => base.number("beta1", 0.95).number("beta2", 0.9),
            _ => base.number("beta1", 0.8).number("beta2", 0.9).number("eps", 0.25),
        };
        let group = ParameterGroup {
            tensors: Vec::new(),
            settings: [(setting.to_owned(), Setting::Number(value))].into(),
        };
        let grouped = FunctionSpec { groups: vec![group], ..base.clone() };
        let elements = 5;
        let slots = function(&base).slots();
        let state: Vec<f32> = (0..elements * (1 + slots)).map(|index| 1.0 + index as f32 / 8.0).collect();
        // Against averages that are positive: lion's two betas decide about its sign.
        let run = |spec: &FunctionSpec, groups: &[_]| {
            round_at(7, &*function(spec), groups, &state, &[(1.0, vec![-9.0; elements])])
        };
        let actual = run(&grouped, &[(1..3, 0)]);
        let inside = run(&base.clone().number(setting, value), &[]);
        let outside = run(&base, &[]);
        for element in 0..elements {
            let lanes = |state: &[f32]| -> Vec<u32> {
                (0..=slots).map(|lane| state[lane * elements + element].to_bits()).collect()
            };
            let expected = if (1..3).contains(&element) { &inside } else { &outside };
            assert_eq!(lanes(&actual), lanes(expected), "{name} {setting}, element {element}");
            assert_ne!(lanes(&inside), lanes(&outside), "{name} {setting} makes no difference");
        }
    }
}

#[test]
fn the_sign_of_zero_moves_nothing() {
    let function = function(&with_lr("lion"));
    for zero in [0.0, -0.0] {
        assert_eq!(round(&*function, &[], &[1.0, zero], &[vec![zero]]), [1.0, 0.0]);
    }
    let result = round(&*function, &[], &[1.0, 0.0], &[vec![f32::INFINITY]]);
    assert_eq!(bits(&result), bits(&[1.0 - 0.1, f32::INFINITY]));
}

#[test]
fn no_decay_means_no_product() {
    // 0 * inf would be NaN.
    for name in ["adam", "adamw", "adagrad", "lion"] {
        let function = function(&with_lr(name).number("weight_decay", 0.0));
        let mut state = vec![f32::INFINITY];
        state.resize(1 + function.slots(), 0.0);
        assert_eq!(round(&*function, &[], &state, &[vec![1.0]])[0], f32::INFINITY, "{name}");
    }
}

#[test]
#[should_panic(expected = "state has 8 bytes; 1 elements with 2 optimizer slots have 12")]
fn state_without_a_slot() {
    function(&with_lr("adam")).begin(shard(1, &[])).finish(&[0; 8], &mut Vec::new());
}

#[test]
#[should_panic(expected = "round 0 is folded by nobody: rounds count from 1")]
fn round_zero() {
    round_at(0, &*function(&with_lr("adam")), &[], &[1.0, 0.0, 0.0], &[(1.0, vec![1.0])]);
}

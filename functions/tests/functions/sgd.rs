//! `sgd`.

use std::ops::Range;

use proptest::prelude::*;
use thalweg_functions::Kind;
use thalweg_protocol::{FunctionSpec, ParameterGroup, Setting};

use crate::common::{Groups, UNIT_ROUNDOFF, bits, function, round, shard};

/// Settings of some elements.
#[derive(Clone, Copy, Debug)]
struct Hyper {
    lr: f32,
    momentum: f32,
    nesterov: bool,
    weight_decay: f32,
}

fn spec(base: Hyper, groups: &[Hyper]) -> FunctionSpec {
    let settings = |hyper: &Hyper| {
        FunctionSpec::named("sgd")
            .number("lr", f64::from(hyper.lr))
            .number("momentum", f64::from(hyper.momentum))
            .flag("nesterov", hyper.nesterov)
            .number("weight_decay", f64::from(hyper.weight_decay))
    };
    let groups = groups
        .iter()
        .map(|hyper| ParameterGroup { tensors: Vec::new(), settings: settings(hyper).settings })
        .collect();
    FunctionSpec { groups, ..settings(&base) }
}

#[test]
fn tables() {
    // All powers of two: exact in f32.
    let sgd = FunctionSpec::named("sgd").number("lr", 0.5);
    let momentum = sgd.clone().number("momentum", 0.5);
    let decay = sgd.clone().number("weight_decay", 0.25);
    let gradients = [vec![1.0, -4.0], vec![3.0, 0.0]];
    for (spec, state, expected) in [
        (sgd, vec![8.0, 8.0], vec![7.0, 9.0]),
        // g = 2 + 0.25 * 8, -2 + 0.25 * 8
        (decay, vec![8.0, 8.0], vec![6.0, 8.0]),
        // v = 0.5 * 2 + 2, 0.5 * 4 - 2
        (momentum.clone(), vec![8.0, 8.0, 2.0, 4.0], vec![6.5, 8.0, 3.0, 0.0]),
        // g = 2 + 0.5 * 3, -2 + 0.5 * 0
        (momentum.flag("nesterov", true), vec![8.0, 8.0, 2.0, 4.0], vec![6.25, 9.0, 3.0, 0.0]),
    ] {
        let function = function(&spec);
        assert_eq!(function.kind(), Kind::Optimizer);
        assert_eq!(round(&*function, &[], &state, &gradients), expected, "{spec:?}");
    }
}

#[test]
fn groups_override_and_inherit() {
    let mut spec = FunctionSpec::named("sgd").number("lr", 0.5).number("momentum", 0.5);
    let group = |name: &str, value| ParameterGroup {
        tensors: Vec::new(),
        settings: [(name.to_owned(), Setting::Number(value))].into(),
    };
    spec.groups = vec![group("lr", 1.0), group("momentum", 0.0)];
    let function = function(&spec);
    let groups = [(1..2, 1), (3..5, 0)];
    let state = [8.0, 8.0, 8.0, 8.0, 8.0, 2.0, 2.0, 2.0, 2.0, 2.0];
    // With momentum v = 3; group 0 steps twice as far; group 1 neither reads nor writes v.
    let expected = [6.5, 7.0, 6.5, 5.0, 5.0, 3.0, 2.0, 3.0, 3.0, 3.0];
    assert_eq!(round(&*function, &groups, &state, &[vec![2.0; 5]]), expected);
}

#[test]
fn an_empty_round_leaves_the_state_bit_for_bit() {
    let state = [1.5, -0.0, f32::from_bits(1), f32::from_bits(0xffc0_1234), -0.0, f32::NEG_INFINITY];
    for momentum in [0.0, 0.9] {
        let hyper = Hyper { lr: 0.1, momentum, nesterov: false, weight_decay: 0.1 };
        assert_eq!(bits(&round(&*function(&spec(hyper, &[])), &[], &state, &[])), bits(&state));
    }
}

#[test]
fn no_decay_means_no_product() {
    // 0 * inf would be NaN.
    let hyper = Hyper { lr: 0.1, momentum: 0.0, nesterov: false, weight_decay: 0.0 };
    let function = function(&spec(hyper, &[]));
    assert_eq!(round(&*function, &[], &[f32::INFINITY], &[vec![1.0]]), [f32::INFINITY]);
}

fn fold_nothing(elements: usize, groups: &Groups, state: &[u8]) {
    let hyper = Hyper { lr: 0.1, momentum: 0.9, nesterov: false, weight_decay: 0.0 };
    function(&spec(hyper, &[hyper])).begin(shard(elements, groups)).finish(state, &mut Vec::new());
}

#[test]
#[should_panic(expected = "state has 12 bytes; 3 elements with 1 optimizer slots have 24")]
fn state_without_its_slot() {
    fold_nothing(3, &[], &[0; 12]);
}

#[test]
#[should_panic(expected = "parameter group 1 does not exist; the function has 1")]
fn unknown_group() {
    fold_nothing(3, &[(0..1, 1)], &[0; 24]);
}

#[test]
#[should_panic(
    expected = "parameter group range 1..3 must be ascending, disjoint from those before (up to 2)"
)]
fn overlapping_groups() {
    fold_nothing(3, &[(0..2, 0), (1..3, 0)], &[0; 24]);
}

#[test]
#[should_panic(expected = "inside a shard of 3 elements")]
fn group_beyond_the_shard() {
    fold_nothing(3, &[(2..4, 0)], &[0; 24]);
}

/// One element in f64, with the magnitude of everything that went into it.
#[derive(Clone, Copy, Default)]
struct Exact {
    value: f64,
    magnitude: f64,
}

impl Exact {
    fn new(value: f32) -> Self {
        Self { value: f64::from(value), magnitude: f64::from(value.abs()) }
    }

    /// `self + factor * other`
    fn plus(self, factor: f64, other: Self) -> Self {
        Self {
            value: self.value + factor * other.value,
            magnitude: self.magnitude + factor.abs() * other.magnitude,
        }
    }
}

fn exact_step(hyper: Hyper, gradients: &[f32], parameter: &mut Exact, velocity: &mut Exact) {
    let share = 1.0 / gradients.len() as f64;
    let mut gradient =
        gradients.iter().fold(Exact::default(), |sum, &gradient| sum.plus(share, Exact::new(gradient)));
    gradient = gradient.plus(f64::from(hyper.weight_decay), *parameter);
    if hyper.momentum > 0.0 {
        let momentum = f64::from(hyper.momentum);
        *velocity = gradient.plus(momentum, *velocity);
        gradient = if hyper.nesterov { gradient.plus(momentum, *velocity) } else { *velocity };
    }
    *parameter = parameter.plus(-f64::from(hyper.lr), gradient);
}

/// The same in f32, one element after the other.
fn sequential_step(hyper: Hyper, gradients: &[f32], parameter: &mut f32, velocity: &mut f32) {
    let sum = gradients[1..].iter().fold(gradients[0], |sum, gradient| sum + gradient);
    let mut gradient = sum / gradients.len() as f32;
    if hyper.weight_decay > 0.0 {
        gradient += hyper.weight_decay * *parameter;
    }
    if hyper.momentum > 0.0 {
        *velocity = hyper.momentum * *velocity + gradient;
        gradient = if hyper.nesterov { gradient + hyper.momentum * *velocity } else { *velocity };
    }
    *parameter -= hyper.lr * gradient;
}

fn hypers() -> impl Strategy<Value = Hyper> {
    let momentum = prop_oneof![Just(0.0_f32), 0.01_f32..0.99];
    let weight_decay = prop_oneof![Just(0.0_f32), 1e-4_f32..0.5];
    (1e-4_f32..1.0, momentum, any::<bool>(), weight_decay).prop_map(
        |(lr, momentum, nesterov, weight_decay)| Hyper {
            lr,
            momentum,
            nesterov: nesterov && momentum > 0.0,
            weight_decay,
        },
    )
}

/// A job of one shard: settings, groups, first parameters, and the gradients of each round.
#[derive(Clone, Debug)]
struct Job {
    base: Hyper,
    hypers: Vec<Hyper>,
    groups: Vec<(Range<usize>, usize)>,
    parameters: Vec<f32>,
    rounds: Vec<Vec<Vec<f32>>>,
}

impl Job {
    fn hyper(&self, element: usize) -> Hyper {
        let group = self.groups.iter().find(|(range, _)| range.contains(&element));
        group.map_or(self.base, |(_, index)| self.hypers[*index])
    }
}

fn jobs() -> impl Strategy<Value = Job> {
    // Sizes around the vector width and around one output block.
    let elements = prop_oneof![4 => 1_usize..70, 1 => 1020_usize..1030];
    (elements, prop::collection::vec(hypers(), 1..4)).prop_flat_map(|(elements, hypers)| {
        let values = prop::collection::vec(-10.0_f32..10.0, elements);
        let contributions = prop::collection::vec(values.clone(), 1..6);
        let cuts = prop::collection::vec((0..=elements, 0..hypers.len()), 0..6);
        (hypers_and_base(hypers), cuts, values, prop::collection::vec(contributions, 1..6)).prop_map(
            |((base, hypers), mut cuts, parameters, rounds)| {
                cuts.sort_by_key(|cut| cut.0);
                // Every other stretch between two cuts is a group, empty ones included.
                let groups =
                    cuts.as_chunks::<2>().0.iter().map(|[from, to]| (from.0..to.0, from.1)).collect();
                Job { base, hypers, groups, parameters, rounds }
            },
        )
    })
}

fn hypers_and_base(groups: Vec<Hyper>) -> impl Strategy<Value = (Hyper, Vec<Hyper>)> {
    hypers().prop_map(move |base| (base, groups.clone()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn close_to_f64_and_bits_of_sequential_f32(job in jobs()) {
        let function = function(&spec(job.base, &job.hypers));
        let elements = job.parameters.len();
        let mut state = job.parameters.clone();
        state.resize(elements * (1 + function.slots()), 0.0);
        let mut exact: Vec<_> = job.parameters.iter().map(|&value| (Exact::new(value), Exact::default())).collect();
        let mut sequential: Vec<_> = job.parameters.iter().map(|&value| (value, 0.0)).collect();
        let mut roundings = 0;
        for contributions in &job.rounds {
            state = round(&*function, &job.groups, &state, contributions);
            // On its way into the state a value passes through at most `count - 1` additions and
            // a quotient, then products and sums for decay, momentum, look-ahead and step.
            roundings += contributions.len() + 8;
            for element in 0..elements {
                let gradients: Vec<f32> = contributions.iter().map(|values| values[element]).collect();
                let hyper = job.hyper(element);
                let (parameter, velocity) = &mut exact[element];
                exact_step(hyper, &gradients, parameter, velocity);
                let (parameter, velocity) = &mut sequential[element];
                sequential_step(hyper, &gradients, parameter, velocity);
            }
        }
        // The result is a sum of products of inputs. Each of these is off by at most `roundings`
        // factors (1 + d), |d| <= u, so the result is off by (1 + u)^roundings - 1 times the sum
        // of their absolute values, which `magnitude` tracks; `roundings + 1` covers the second
        // order and the f64 reference, the constant the subnormal range.
        let bound = |magnitude: f64| (roundings + 1) as f64 * UNIT_ROUNDOFF * magnitude + 1e-38;
        let off = |actual: f32, exact: Exact| (f64::from(actual) - exact.value).abs() > bound(exact.magnitude);
        for element in 0..elements {
            prop_assert!(!off(state[element], exact[element].0), "parameter {element}");
            prop_assert_eq!(state[element].to_bits(), sequential[element].0.to_bits());
            if function.slots() > 0 {
                prop_assert!(!off(state[elements + element], exact[element].1), "velocity {element}");
                prop_assert_eq!(state[elements + element].to_bits(), sequential[element].1.to_bits());
            }
        }
    }
}

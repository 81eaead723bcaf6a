//! `adam`, `adamw`, `adagrad` and `lion` against their formulas in f32 (bits) and f64 (error bounds).

use std::ops::Range;

use proptest::prelude::*;
use thalweg_protocol::{FunctionSpec, ParameterGroup, Round};

use crate::{
    approx::{Approx, Real},
    common::{function, round_at},
};

/// Settings of some elements. Each function uses those it knows.
#[derive(Clone, Copy, Debug)]
struct Hyper {
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    lr_decay: f64,
    weight_decay: f64,
}

const NAMES: [&str; 4] = ["adam", "adamw", "adagrad", "lion"];

fn spec(name: &str, base: Hyper, groups: &[Hyper]) -> FunctionSpec {
    let settings = |hyper: &Hyper| {
        let spec =
            FunctionSpec::named(name).number("lr", hyper.lr).number("weight_decay", hyper.weight_decay);
        match name {
            "adagrad" => spec.number("eps", hyper.eps).number("lr_decay", hyper.lr_decay),
            "lion" => spec.number("beta1", hyper.beta1).number("beta2", hyper.beta2),
            _ => spec.number("eps", hyper.eps).number("beta1", hyper.beta1).number("beta2", hyper.beta2),
        }
    };
    let group = |hyper| ParameterGroup { tensors: Vec::new(), settings: settings(hyper).settings };
    FunctionSpec { groups: groups.iter().map(group).collect(), ..settings(&base) }
}

/// One element: parameter, then slots; the second is only that of `adam` and `adamw`.
type Element<R> = [R; 3];

/// The next state of one element, from its gradients.
fn step<R: Real>(
    name: &str,
    hyper: Hyper,
    t: Round,
    power: fn(f64, u64) -> f64,
    gradients: &[R],
    [p, first, second]: Element<R>,
) -> Element<R> {
    let Hyper { lr, beta1, beta2, eps, lr_decay, weight_decay } = hyper;
    let sum = gradients[1..].iter().fold(gradients[0], |sum, &gradient| sum.plus(gradient));
    let mut g = sum.over(R::of(gradients.len() as f64));
    if weight_decay > 0.0 && ["adam", "adagrad"].contains(&name) {
        g = g.plus(R::of(weight_decay).times(p));
    }
    let average = |beta: f64, value: R, new: R| R::of(beta).times(value).plus(R::of(1.0 - beta).times(new));
    let shrunk = if weight_decay > 0.0 { p.times(R::of(1.0 - lr * weight_decay)) } else { p };
    match name {
        "adam" | "adamw" => {
            let m = average(beta1, first, g);
            let v = average(beta2, second, g.times(g));
            let correction = R::of((1.0 - power(beta2, t)).sqrt());
            let divisor = v.sqrt().over(correction).plus(R::of(eps));
            let p = if name == "adamw" { shrunk } else { p };
            [p.minus(R::of(lr / (1.0 - power(beta1, t))).times(m.over(divisor))), m, v]
        }
        "adagrad" => {
            let v = first.plus(g.times(g));
            let rate = R::of(lr / (1.0 + (t - 1) as f64 * lr_decay));
            [p.minus(rate.times(g.over(v.sqrt().plus(R::of(eps))))), v, second]
        }
        _ => {
            let sign = average(beta1, first, g).sign();
            [shrunk.minus(R::of(lr).times(sign)), average(beta2, first, g), second]
        }
    }
}

/// By repeated squaring from the lowest bit, as the bits of the function are specified.
fn squaring(base: f64, exponent: u64) -> f64 {
    let bits = (0..64).filter(|bit| exponent >> bit & 1 == 1);
    bits.map(|bit| (0..bit).fold(base, |square, _| square * square))
        .fold(1.0, |product, power| product * power)
}

fn hypers() -> impl Strategy<Value = Hyper> {
    let beta = || prop_oneof![Just(0.0), Just(0.9), Just(0.999), 0.01..0.9999];
    let eps = prop_oneof![Just(1e-8), 1e-10..0.1];
    let decay = || prop_oneof![Just(0.0), 1e-4..0.5];
    (1e-4..1.0, beta(), beta(), eps, decay(), decay()).prop_map(
        |(lr, beta1, beta2, eps, lr_decay, weight_decay)| Hyper {
            lr,
            beta1,
            beta2,
            eps,
            lr_decay,
            weight_decay,
        },
    )
}

/// A job of one shard: settings, groups, parameters, and the gradients of each round.
#[derive(Clone, Debug)]
struct Job {
    name: &'static str,
    first_round: Round,
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
    let name = prop::sample::select(NAMES.to_vec());
    let first_round = prop_oneof![Just(1), 1_u64..100, 1_u64..1_000_000_000];
    let hypers = (hypers(), prop::collection::vec(hypers(), 1..4));
    (name, first_round, elements, hypers).prop_flat_map(|(name, first_round, elements, (base, hypers))| {
        let value = prop_oneof![6 => -10.0_f32..10.0, 1 => -1e-6_f32..1e-6, 1 => Just(0.0)];
        let values = prop::collection::vec(value, elements);
        let contributions = prop::collection::vec(values.clone(), 1..6);
        let cuts = prop::collection::vec((0..=elements, 0..hypers.len()), 0..6);
        (cuts, values, prop::collection::vec(contributions, 1..6)).prop_map(
            move |(mut cuts, parameters, rounds)| {
                cuts.sort_by_key(|cut| cut.0);
                // Every other stretch between two cuts is a group, empty ones included.
                let groups =
                    cuts.as_chunks::<2>().0.iter().map(|[from, to]| (from.0..to.0, from.1)).collect();
                Job { name, first_round, base, hypers: hypers.clone(), groups, parameters, rounds }
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn close_to_f64_and_bits_of_sequential_f32(job in jobs()) {
        let function = function(&spec(job.name, job.base, &job.hypers));
        let (elements, slots) = (job.parameters.len(), function.slots());
        let mut state = job.parameters.clone();
        state.resize(elements * (1 + slots), 0.0);
        for (t, contributions) in (job.first_round..).zip(&job.rounds) {
            let weighted: Vec<_> = contributions.iter().map(|values| (1.0, values.clone())).collect();
            let next = round_at(t, &*function, &job.groups, &state, &weighted);
            for element in 0..elements {
                let at = |state: &[f32], lane: usize| if lane <= slots { state[lane * elements + element] } else { 0.0 };
                let before: Element<f32> = std::array::from_fn(|lane| at(&state, lane));
                let gradients: Vec<f32> = contributions.iter().map(|values| values[element]).collect();
                let exact: Vec<_> = gradients.iter().map(|&gradient| Approx::exact(gradient)).collect();
                let hyper = job.hyper(element);
                let bits = step(job.name, hyper, t, squaring, &gradients, before);
                // The bound is that of one round, from the state the function itself came to.
                let powf = |base: f64, exponent: u64| base.powf(exponent as f64);
                let bound = step(job.name, hyper, t, powf, &exact, before.map(Approx::exact));
                for lane in 0..=slots {
                    let actual = at(&next, lane);
                    prop_assert!(bound[lane].allows(actual), "{lane}: {actual} is not {:?}", bound[lane]);
                    prop_assert_eq!(actual.to_bits(), bits[lane].to_bits(), "{}: {} {}", lane, actual, bits[lane]);
                }
            }
            state = next;
        }
    }
}

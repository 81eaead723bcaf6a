//! Schedules of the learning rate.

use std::f64::consts::PI;

use proptest::prelude::*;
use thalweg_protocol::{Decay, FunctionSpec, ParameterGroup, Round, Schedule, Setting};

use crate::common::{UNIT_ROUNDOFF, bits, bytes, function, round_at};

/// The rate of a round: how far a gradient of -1 moves a parameter of 0.
fn rate(lr: f64, schedule: &Schedule, round: Round) -> f32 {
    let function = function(&FunctionSpec::named("sgd").number("lr", lr).schedule(schedule.clone()));
    round_at(round, &*function, &[], &[0.0], &[(1.0, vec![-1.0])])[0]
}

/// Rounds of warm-up, decay, and factors of some rounds.
type Case<'a> = (u64, Decay, &'a [(Round, f64)]);

#[test]
fn tables() {
    let steps = Decay::Steps { at: vec![3, 5], factor: 0.5 };
    let cosine = |to| Decay::Cosine { rounds: 4, to };
    let cases: [Case<'_>; 14] = [
        (0, Decay::Constant, &[(1, 1.0), (2, 1.0), (u64::MAX, 1.0)]),
        (1, Decay::Constant, &[(1, 1.0), (2, 1.0)]),
        (4, Decay::Constant, &[(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (5, 1.0)]),
        (
            0,
            Decay::Linear { rounds: 4, to: 0.5 },
            &[(1, 1.0), (2, 0.875), (3, 0.75), (4, 0.625), (5, 0.5), (6, 0.5), (u64::MAX, 0.5)],
        ),
        // From the last round of the warm-up on.
        (2, Decay::Linear { rounds: 2, to: 0.0 }, &[(1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0), (5, 0.0)]),
        (
            0,
            cosine(0.0),
            &[(1, 1.0), (2, 0.853_553_390_593_273_8), (3, 0.5), (4, 0.146_446_609_406_726_2), (5, 0.0)],
        ),
        (
            3,
            cosine(0.5),
            &[(1, 1.0 / 3.0), (3, 1.0), (4, 0.926_776_695_296_636_9), (5, 0.75), (7, 0.5), (99, 0.5)],
        ),
        (0, Decay::Cosine { rounds: 1, to: 0.25 }, &[(1, 1.0), (2, 0.25)]),
        (0, Decay::Exponential { factor: 0.5 }, &[(1, 1.0), (2, 0.5), (3, 0.25), (12, 1.0 / 2048.0)]),
        (2, Decay::Exponential { factor: 0.5 }, &[(1, 0.5), (2, 1.0), (3, 0.5)]),
        (0, steps.clone(), &[(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5), (5, 0.25), (u64::MAX, 0.25)]),
        // Steps are rounds of the job, also during the warm-up.
        (4, steps, &[(2, 0.5), (3, 0.375), (4, 0.5), (5, 0.25)]),
        (0, Decay::InverseSqrt, &[(1, 1.0), (4, 0.5), (16, 0.25)]),
        (4, Decay::InverseSqrt, &[(1, 0.25), (4, 1.0), (16, 0.5), (64, 0.25)]),
    ];
    for (warmup_rounds, decay, expected) in cases {
        let schedule = Schedule { warmup_rounds, decay };
        for &(round, factor) in expected {
            assert_eq!(rate(1.0, &schedule, round), factor as f32, "{schedule:?}, round {round}");
        }
    }
}

/// In f64, by the platform's own functions.
fn reference(schedule: &Schedule, round: Round) -> f64 {
    let warmup = schedule.warmup_rounds;
    let warm = if warmup == 0 { 1.0 } else { (round as f64 / warmup as f64).min(1.0) };
    let since = if round > warmup.max(1) { (round - warmup.max(1)) as f64 } else { 0.0 };
    let share = |rounds: u64| (since / rounds as f64).min(1.0);
    warm * match &schedule.decay {
        Decay::Constant => 1.0,
        Decay::Linear { rounds, to } => 1.0 + (to - 1.0) * share(*rounds),
        Decay::Cosine { rounds, to } => to + (1.0 - to) * 0.5 * (1.0 + (PI * share(*rounds)).cos()),
        Decay::Exponential { factor } => factor.powf(since),
        Decay::Steps { at, factor } => at.iter().filter(|at| **at <= round).map(|_| factor).product(),
        Decay::InverseSqrt => (1.0 + since / warmup.max(1) as f64).powf(-0.5),
    }
}

fn schedules() -> impl Strategy<Value = Schedule> {
    let rounds = || 1_u64..3000;
    let to = || prop_oneof![Just(0.0), Just(1.0), 0.0..1.0];
    let factor = || prop_oneof![Just(1.0), 0.9..1.0, 0.01..1.0];
    let at = prop::collection::btree_set(1_u64..2000, 0..64);
    let decay = prop_oneof![
        Just(Decay::Constant),
        (rounds(), to()).prop_map(|(rounds, to)| Decay::Linear { rounds, to }),
        (rounds(), to()).prop_map(|(rounds, to)| Decay::Cosine { rounds, to }),
        factor().prop_map(|factor| Decay::Exponential { factor }),
        (at, factor()).prop_map(|(at, factor)| Decay::Steps { at: at.into_iter().collect(), factor }),
        Just(Decay::InverseSqrt),
    ];
    (prop_oneof![Just(0), 1_u64..100], decay)
        .prop_map(|(warmup_rounds, decay)| Schedule { warmup_rounds, decay })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn close_to_f64(schedule in schedules(), lr in 0.001_f64..10.0, rounds in prop::collection::vec(1_u64..3000, 20)) {
        for round in rounds {
            let (expected, actual) = (lr * reference(&schedule, round), f64::from(rate(lr, &schedule, round)));
            // One rounding to f32, of a number whose own error is far smaller: cosines near -1 cancel to some 1e-16.
            let bound = (UNIT_ROUNDOFF + 1e-12) * expected + 1e-15 * lr + 1e-45;
            prop_assert!((actual - expected).abs() <= bound, "round {round}: {actual} is not {expected}");
        }
    }

    #[test]
    fn every_round_has_a_rate(schedule in schedules(), round in prop_oneof![1_u64.., Just(u64::MAX)]) {
        prop_assert!((0.0..=1.0).contains(&rate(1.0, &schedule, round)));
    }
}

/// Pinned as the results in `bits.rs`: the cosine has to be the same code everywhere.
#[test]
fn rates_never_change() {
    let schedules = [
        Schedule { warmup_rounds: 0, decay: Decay::Cosine { rounds: 3000, to: 0.0 } },
        Schedule { warmup_rounds: 7, decay: Decay::Exponential { factor: 0.999 } },
        Schedule { warmup_rounds: 30, decay: Decay::InverseSqrt },
        Schedule { warmup_rounds: 30, decay: Decay::Linear { rounds: 1000, to: 0.1 } },
    ];
    let hashes = schedules.map(|schedule| {
        let rates: Vec<_> = (1..=3001).map(|round| rate(0.1, &schedule, round)).collect();
        blake3::hash(&bytes(&rates)).to_hex()[..16].to_owned()
    });
    assert_eq!(hashes, ["158514a3c730c612", "74ab07198a0741ac", "f89fab4e7d3e7514", "b037cc08082589f1"]);
}

#[test]
fn a_schedule_is_another_lr_to_every_function() {
    let halve = Schedule { warmup_rounds: 0, decay: Decay::Steps { at: vec![2], factor: 0.5 } };
    for name in ["sgd", "adam", "adamw", "adagrad", "lion"] {
        let spec = |lr: f64, group_lr: f64| {
            let mut spec = FunctionSpec::named(name).number("lr", lr).number("weight_decay", 0.1);
            spec.groups = vec![ParameterGroup {
                tensors: Vec::new(),
                settings: [("lr".to_owned(), Setting::Number(group_lr))].into(),
            }];
            spec
        };
        let run = |spec: &FunctionSpec, round| {
            let function = function(spec);
            let state = vec![1.0; 4 * (1 + function.slots())];
            bits(&round_at(round, &*function, &[(1..3, 0)], &state, &[(1.0, vec![0.3; 4])]))
        };
        let (full, half) = (spec(0.1, 0.3), spec(0.05, 0.15));
        let scheduled = full.clone().schedule(halve.clone());
        assert_eq!(run(&scheduled, 1), run(&full, 1), "{name}");
        assert_eq!(run(&scheduled, 2), run(&half, 2), "{name}");
        assert_ne!(run(&half, 2), run(&full, 2), "{name}");
        assert_eq!(run(&full.clone().schedule(Schedule::default()), 2), run(&full, 2), "{name}");
    }
}

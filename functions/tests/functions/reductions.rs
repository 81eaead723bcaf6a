//! `sum`, `mean` and `weighted_mean`.

use proptest::prelude::*;
use thalweg_functions::{Contribution, Kind};

use crate::common::{UNIT_ROUNDOFF, bits, bytes, named, round, shard, weighted_round};

const REDUCTIONS: [&str; 3] = ["sum", "mean", "weighted_mean"];

#[test]
fn reductions_keep_no_slots() {
    for name in REDUCTIONS {
        assert_eq!((named(name).slots(), named(name).kind()), (0, Kind::Reduction), "{name}");
    }
}

#[test]
fn tables() {
    let contributions = [(1.0, vec![1.0, -2.0, 0.5]), (3.0, vec![5.0, 2.0, 0.5]), (4.0, vec![3.0, 9.0, 0.5])];
    for (name, expected) in [
        ("sum", [9.0, 9.0, 1.5]),
        ("mean", [3.0, 3.0, 0.5]),
        ("weighted_mean", [(1.0 + 15.0 + 12.0) / 8.0, (-2.0 + 6.0 + 36.0) / 8.0, 0.5]),
    ] {
        assert_eq!(weighted_round(&*named(name), &[], &[7.0; 3], &contributions), expected, "{name}");
    }
}

#[test]
fn nothing_accepted_leaves_the_state_bit_for_bit() {
    let state = [1.5, -0.0, f32::MIN_POSITIVE / 2.0, f32::INFINITY, f32::from_bits(0xffc0_1234)];
    for name in REDUCTIONS {
        assert_eq!(bits(&round(&*named(name), &[], &state, &[])), bits(&state), "{name}");
    }
    // A NaN in an ignored contribution does not matter either.
    let ignored = vec![(0.0, vec![f32::NAN; 5]), (0.0, vec![1.0; 5])];
    assert_eq!(bits(&weighted_round(&*named("weighted_mean"), &[], &state, &ignored)), bits(&state));
}

#[test]
fn state_may_be_left_out_when_something_is_accepted() {
    for name in REDUCTIONS {
        let function = named(name);
        let mut fold = function.begin(shard(1, &[]));
        assert!(fold.needs_state(), "{name}");
        fold.accept(Contribution { rank: 9, weight: 2.0, values: &bytes(&[4.0]) });
        assert!(!fold.needs_state(), "{name}");
        let mut out = Vec::new();
        fold.finish(&[], &mut out);
        assert_eq!(out, bytes(&[4.0]), "{name}");
    }
}

#[test]
#[should_panic(expected = "finish was given none")]
fn state_left_out_and_nothing_accepted() {
    named("sum").begin(shard(1, &[])).finish(&[], &mut Vec::new());
}

#[test]
fn weights_of_zero_need_the_state() {
    for (name, needs) in [("sum", false), ("mean", false), ("weighted_mean", true)] {
        let function = named(name);
        let mut fold = function.begin(shard(1, &[]));
        fold.accept(Contribution { rank: 0, weight: 0.0, values: &[0; 4] });
        assert_eq!(fold.needs_state(), needs, "{name}");
    }
}

#[test]
#[should_panic(expected = "state has 8 bytes; a shard of 3 elements has 12")]
fn state_of_the_wrong_length() {
    named("mean").begin(shard(3, &[])).finish(&[0; 8], &mut Vec::new());
}

#[test]
#[should_panic(expected = "contribution of rank 5 has 11 bytes; a shard of 3 elements takes 12")]
fn contribution_of_the_wrong_length() {
    let function = named("mean");
    let mut fold = function.begin(shard(3, &[]));
    fold.accept(Contribution { rank: 5, weight: 1.0, values: &[0; 11] });
}

#[test]
fn the_order_is_the_one_given_whatever_the_ranks() {
    let function = named("sum");
    for (values, expected) in [([1.0_f32, 1e8, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)] {
        let mut fold = function.begin(shard(1, &[]));
        for (rank, value) in [7, 2, 2].into_iter().zip(values) {
            fold.accept(Contribution { rank, weight: 1.0, values: &value.to_le_bytes() });
        }
        let mut out = Vec::new();
        fold.finish(&[], &mut out);
        assert_eq!(out, bytes(&[expected]));
    }
}

#[test]
fn weights_add_up_in_f64() {
    // In f32 every weight of 1 would vanish beside 2^24 and the divisor would be 2^24.
    let mut contributions = vec![((1 << 24) as f32, vec![0.0])];
    contributions.extend((0..4096).map(|_| (1.0, vec![1.0])));
    let result = weighted_round(&*named("weighted_mean"), &[], &[0.0], &contributions);
    assert_eq!(result, [(4096.0 / f64::from((1 << 24) + 4096)) as f32]);
}

#[test]
fn a_shard_of_no_elements() {
    for name in REDUCTIONS {
        assert!(round(&*named(name), &[], &[], &[vec![], vec![]]).is_empty());
    }
}

/// Contributions of one shard, with weights.
fn contributions() -> impl Strategy<Value = Vec<(f32, Vec<f32>)>> {
    (1_usize..70, 1_usize..20).prop_flat_map(|(elements, count)| {
        let value = prop_oneof![-1e3_f32..1e3, -1e-3_f32..1e-3, Just(0.0)];
        prop::collection::vec((0.01_f32..10.0, prop::collection::vec(value, elements)), count)
    })
}

proptest! {
    #[test]
    fn close_to_f64(contributions in contributions()) {
        let elements = contributions[0].1.len();
        let count = contributions.len() as f64;
        let total: f64 = contributions.iter().map(|(weight, _)| f64::from(*weight)).sum();
        let weighted = |index: usize| {
            contributions.iter().map(move |(weight, values)| f64::from(*weight) * f64::from(values[index]))
        };
        let plain = |index: usize| contributions.iter().map(move |(_, values)| f64::from(values[index]));
        let state = vec![0.0; elements];
        let run = |name: &str| weighted_round(&*named(name), &[], &state, &contributions);
        let (sum, mean, weighted_mean) = (run("sum"), run("mean"), run("weighted_mean"));
        // Each term passes through at most `count - 1` additions, one product and one quotient
        // (the one of weighted_mean rounds twice, once in f64): `count + 1` roundings, so its
        // relative error is below (count + 2) u. The errors of the f64 reference are far smaller.
        // The last term is for results in the subnormal range.
        let bound = |magnitude: f64| (count + 2.0) * UNIT_ROUNDOFF * magnitude + 1e-40;
        for index in 0..elements {
            let magnitude: f64 = plain(index).map(f64::abs).sum();
            let exact: f64 = plain(index).sum();
            prop_assert!((f64::from(sum[index]) - exact).abs() <= bound(magnitude));
            prop_assert!((f64::from(mean[index]) - exact / count).abs() <= bound(magnitude / count));
            let magnitude: f64 = weighted(index).map(f64::abs).sum();
            let exact: f64 = weighted(index).sum();
            prop_assert!((f64::from(weighted_mean[index]) - exact / total).abs() <= bound(magnitude / total));
        }
    }

    #[test]
    fn bits_of_sequential_f32(contributions in contributions()) {
        let elements = contributions[0].1.len();
        let (mut sums, mut products, mut total) = (Vec::new(), Vec::new(), 0.0);
        for (weight, values) in &contributions {
            let weighted: Vec<f32> = values.iter().map(|value| weight * value).collect();
            if sums.is_empty() {
                (sums, products) = (values.clone(), weighted);
            } else {
                for index in 0..elements {
                    sums[index] += values[index];
                    products[index] += weighted[index];
                }
            }
            total += f64::from(*weight);
        }
        let state = vec![0.0; elements];
        let run = |name: &str| bits(&weighted_round(&*named(name), &[], &state, &contributions));
        prop_assert_eq!(run("sum"), bits(&sums));
        let count = contributions.len() as f32;
        let mean: Vec<f32> = sums.iter().map(|sum| sum / count).collect();
        prop_assert_eq!(run("mean"), bits(&mean));
        let mean: Vec<f32> = products.iter().map(|&sum| (f64::from(sum) / total) as f32).collect();
        prop_assert_eq!(run("weighted_mean"), bits(&mean));
    }

    #[test]
    fn equal_weights_are_the_mean(contributions in contributions()) {
        let plain: Vec<_> = contributions.into_iter().map(|(_, values)| values).collect();
        let state = vec![0.0; plain[0].len()];
        let mean = round(&*named("mean"), &[], &state, &plain);
        prop_assert_eq!(bits(&round(&*named("weighted_mean"), &[], &state, &plain)), bits(&mean));
    }
}

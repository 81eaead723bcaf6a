//! Folds that are suspended and resumed.

use proptest::prelude::*;
use thalweg_functions::{AggregationFunction, Contribution, MAX_CONTRIBUTIONS, ShardContext};

use crate::{
    bits::specs,
    common::{bytes, floats, function, named, shard},
};

/// The next state and the bytes of the last suspension (if any) of a fold in round 3 that is suspended before the
/// contributions of the indices in `cuts`.
fn fold(
    function: &dyn AggregationFunction,
    state: &[u8],
    contributions: &[(f32, Vec<u8>)],
    cuts: &[usize],
) -> (Vec<u8>, Option<Vec<u8>>) {
    let elements = state.len() / 4 / (1 + function.slots());
    let context = || ShardContext { elements, groups: &[], round: 3 };
    let mut fold = function.begin(context());
    let mut last = None;
    for at in 0..=contributions.len() {
        for _ in cuts.iter().filter(|&&cut| cut == at) {
            // What is already in the vector stays.
            let mut partial = b"prefix".to_vec();
            fold.suspend(&mut partial);
            assert_eq!(&partial[..6], b"prefix");
            let partial = partial.split_off(6);
            assert!(partial.len() <= function.partial_bytes(elements));
            // The bytes are all there is: where they lie does not matter.
            let shifted = [&[0xee], &partial[..]].concat();
            fold = function.resume(context(), &shifted[1..]).expect("our own bytes");
            last = Some(partial);
        }
        if let Some((weight, values)) = contributions.get(at) {
            fold.accept(Contribution { rank: at as u32, weight: *weight, values });
        }
    }
    let mut out = Vec::new();
    fold.finish(state, &mut out);
    (out, last)
}

fn value() -> impl Strategy<Value = f32> {
    let special = prop::sample::select(vec![
        0.0,
        -0.0,
        f32::from_bits(1),
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::from_bits(0xff80_0001),
        f32::from_bits(0xffc0_1234),
    ]);
    prop_oneof![20 => -1e3_f32..1e3, 5 => -1e-3_f32..1e-3, 1 => special]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn suspended_or_not_the_bits_are_the_same(
        spec in prop::sample::select(specs()),
        (state, contributions) in (0_usize..40, 0_usize..9).prop_flat_map(|(elements, count)| {
            let values = prop::collection::vec(value(), elements);
            let weight = prop_oneof![1 => Just(0.0_f32), 6 => 0.01_f32..10.0];
            let contributions = prop::collection::vec((weight, values), count);
            (prop::collection::vec(0.0_f32..10.0, 3 * elements), contributions)
        }),
        cuts in prop::collection::vec(0_usize..10, 0..5),
    ) {
        let function = function(&spec);
        let state = bytes(&state[..state.len() / 3 * (1 + function.slots())]);
        let contributions: Vec<_> =
            contributions.into_iter().map(|(weight, values)| (weight, bytes(&values))).collect();
        let cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(contributions.len())).collect();
        let (expected, _) = fold(&*function, &state, &contributions, &[]);
        let (actual, last) = fold(&*function, &state, &contributions, &cuts);
        prop_assert_eq!(actual, expected);
        // And the partial bytes do not depend on how often the fold was suspended before.
        let end = cuts.iter().max().copied();
        prop_assert_eq!(last, end.and_then(|end| fold(&*function, &state, &contributions[..end], &[end]).1));
    }
}

/// `weighted_mean` after two contributions.
fn example() -> Vec<u8> {
    let function = named("weighted_mean");
    let mut fold = function.begin(shard(2, &[]));
    fold.accept(Contribution { rank: 4, weight: 0.5, values: &bytes(&[3.0, -0.0]) });
    fold.accept(Contribution { rank: 1, weight: 2.0, values: &bytes(&[1.0, -0.0]) });
    let mut partial = Vec::new();
    fold.suspend(&mut partial);
    partial
}

#[test]
fn the_layout_is_as_documented() {
    let header = [&[1, 1, 0, 0, 2, 0, 0, 0][..], &2.5_f64.to_le_bytes(), &[2, 0, 0, 0, 0, 0, 0, 0]].concat();
    assert_eq!(example(), [&header[..], &bytes(&[3.5, -0.0])].concat());
    let empty = |name: &str| {
        let mut partial = Vec::new();
        named(name).begin(shard(300, &[])).suspend(&mut partial);
        partial
    };
    let header = |tag| [&[1, tag][..], &[0; 14], &[0x2c, 1, 0, 0, 0, 0, 0, 0]].concat();
    for (name, tag) in [("sum", 0), ("mean", 0), ("weighted_mean", 1)] {
        assert_eq!(empty(name), header(tag), "{name}");
        assert_eq!(named(name).partial_bytes(300), 24 + 1200, "{name}");
    }
}

#[test]
fn nans_are_canonical_in_between_too() {
    let function = named("sum");
    let mut fold = function.begin(shard(1, &[]));
    fold.accept(Contribution { rank: 0, weight: 1.0, values: &0xff80_0001_u32.to_le_bytes() });
    let mut partial = Vec::new();
    fold.suspend(&mut partial);
    assert_eq!(partial[24..], 0x7fc0_0000_u32.to_le_bytes());
}

#[test]
fn sums_of_values_are_the_same_to_all_functions_that_add_them() {
    let mut partial = Vec::new();
    let sum = named("sum");
    let mut fold = sum.begin(shard(1, &[]));
    fold.accept(Contribution { rank: 0, weight: 1.0, values: &bytes(&[6.0]) });
    fold.accept(Contribution { rank: 1, weight: 1.0, values: &bytes(&[2.0]) });
    fold.suspend(&mut partial);
    let mut out = Vec::new();
    named("mean").resume(shard(1, &[]), &partial).unwrap().finish(&[], &mut out);
    assert_eq!(floats(&out), [4.0]);
}

#[test]
fn refusals_say_what_would_be_accepted() {
    let with = |at: usize, bytes: &[u8]| {
        let mut partial = example();
        partial[at..at + bytes.len()].copy_from_slice(bytes);
        partial
    };
    let weights = |value: f64| with(8, &value.to_le_bytes());
    let cut = |to: usize| example()[..to].to_vec();
    let terms = "(0 for sums of values, 1 for sums of weight * value)";
    let range = "it must be finite and not negative, and 0 where nothing is weighted";
    for (name, partial, expected) in [
        ("weighted_mean", with(0, &[2]), "partial fold of layout 2; this release reads layout 1".to_owned()),
        ("weighted_mean", Vec::new(), "partial fold of 0 bytes; it must have 24".to_owned()),
        ("weighted_mean", cut(23), "partial fold of 23 bytes; it must have 24".to_owned()),
        ("weighted_mean", cut(24), "partial fold of 24 bytes; it must have 32".to_owned()),
        ("weighted_mean", cut(31), "partial fold of 31 bytes; it must have 32".to_owned()),
        (
            "weighted_mean",
            [example(), vec![0]].concat(),
            "partial fold of 33 bytes; it must have 32".to_owned(),
        ),
        // Nothing was added: then there are no sums.
        (
            "mean",
            [&[1, 0][..], &[0; 14], &[2], &[0; 15]].concat(),
            "partial fold of 32 bytes; it must have 24".to_owned(),
        ),
        ("sum", example(), format!("partial fold of terms [1, 0, 0]; this function reads [0, 0, 0] {terms}")),
        (
            "weighted_mean",
            with(1, &[0]),
            format!("partial fold of terms [0, 0, 0]; this function reads [1, 0, 0] {terms}"),
        ),
        (
            "weighted_mean",
            with(3, &[9]),
            format!("partial fold of terms [1, 0, 9]; this function reads [1, 0, 0] {terms}"),
        ),
        ("weighted_mean", with(16, &[3]), "partial fold of 3 elements; the shard has 2".to_owned()),
        (
            "weighted_mean",
            with(23, &[1]),
            "partial fold of 72057594037927938 elements; the shard has 2".to_owned(),
        ),
        (
            "weighted_mean",
            with(4, &(MAX_CONTRIBUTIONS + 1).to_le_bytes()),
            "partial fold of 1048577 contributions; at most 1048576".to_owned(),
        ),
        ("weighted_mean", weights(-1.0), format!("partial fold with a sum of weights of -1.0; {range}")),
        ("weighted_mean", weights(f64::NAN), format!("partial fold with a sum of weights of NaN; {range}")),
        (
            "weighted_mean",
            weights(f64::INFINITY),
            format!("partial fold with a sum of weights of inf; {range}"),
        ),
        ("mean", with(1, &[0]), format!("partial fold with a sum of weights of 2.5; {range}")),
        ("weighted_mean", with(4, &[0]), format!("partial fold with a sum of weights of 2.5; {range}")),
    ] {
        match named(name).resume(shard(2, &[]), &partial) {
            Ok(_) => panic!("{name} accepted {partial:?}"),
            Err(error) => assert_eq!(error.to_string(), expected, "{name} {partial:?}"),
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(partial in prop::collection::vec(any::<u8>(), 0..60), cut in 0_usize..33) {
        for bytes in [partial.clone(), [&example()[..cut], &partial].concat()] {
            for name in ["sum", "weighted_mean"] {
                let _ = named(name).resume(shard(2, &[]), &bytes);
            }
        }
    }
}

/// The mean of ones: two less than a fold accepts, in a partial fold, and `after` more.
fn mean_of_ones(after: u32) -> f32 {
    let before = MAX_CONTRIBUTIONS - 2;
    let header = [&[1, 0, 0, 0][..], &before.to_le_bytes(), &[0; 8], &1_u64.to_le_bytes()].concat();
    let partial = [&header[..], &bytes(&[before as f32])].concat();
    let function = named("mean");
    let mut fold = function.resume(shard(1, &[]), &partial).expect("bytes as documented");
    for rank in 0..after {
        fold.accept(Contribution { rank, weight: 1.0, values: &bytes(&[1.0]) });
    }
    let mut out = Vec::new();
    fold.finish(&[], &mut out);
    floats(&out)[0]
}

#[test]
fn as_many_contributions_as_a_fold_accepts_are_counted_exactly() {
    assert_eq!([mean_of_ones(0), mean_of_ones(1), mean_of_ones(2)], [1.0; 3]);
    // Every count below is an f32, too.
    assert!((0..=MAX_CONTRIBUTIONS).all(|count| count as f32 as u32 == count));
}

#[test]
#[should_panic(expected = "contribution of rank 2 is one too many; a round has at most 1048576")]
fn one_contribution_too_many() {
    mean_of_ones(3);
}

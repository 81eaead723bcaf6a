//! Bit-identity: digests, order, alignment, NaNs (invariant I5).

use proptest::prelude::*;
use thalweg_functions::{Contribution, first_non_finite};
use thalweg_protocol::{Decay, FunctionSpec, Schedule};

use crate::common::{bits, bytes, function, named, round, round_at, shard};

/// Every function, with and without what changes its arithmetic.
pub(crate) fn specs() -> Vec<FunctionSpec> {
    let sgd = FunctionSpec::named("sgd").number("lr", 0.1);
    let momentum = sgd.clone().number("momentum", 0.9).number("weight_decay", 0.01);
    let nesterov = momentum.clone().flag("nesterov", true);
    let scheduled =
        momentum.clone().schedule(Schedule { warmup_rounds: 2, decay: Decay::Cosine { rounds: 7, to: 0.1 } });
    let with_lr = |name: &str| FunctionSpec::named(name).number("lr", 0.1);
    let with_decay = |name: &str| with_lr(name).number("weight_decay", 0.01);
    let averages = |name: &str| with_decay(name).number("beta1", 0.8).number("beta2", 0.9);
    ["sum", "mean", "weighted_mean"]
        .map(FunctionSpec::named)
        .into_iter()
        .chain([sgd, momentum, nesterov, scheduled])
        .chain([with_lr("adam"), averages("adam").number("eps", 0.5)])
        .chain([with_lr("adamw"), averages("adamw").number("weight_decay", 0.0)])
        .chain([with_lr("adagrad"), with_decay("adagrad").number("lr_decay", 0.3).number("eps", 0.5)])
        .chain([with_lr("lion"), averages("lion")])
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn digests_never_change() {
    for (name, expected) in [
        ("sum", "f4ac09f0c4ec8b8bf978e851d84f0624"),
        ("mean", "ae5391d9f1a148f08367db7313197db6"),
        ("weighted_mean", "eedaa441f887e79a1614812018f361d9"),
        ("sgd", "5e3e7035808a89dda9bbd11996004aaa"),
        ("adam", "174c23dcd62fd89150e6a12344868d61"),
        ("adamw", "d030877bbfc3b3e52ce97e4ed557cffa"),
        ("adagrad", "79978046ef3825a263fb5fe5f6be72ed"),
        ("lion", "af8cf635cbf3c856fecee3f16904e4c3"),
    ] {
        let identity = blake3::hash(format!("thalweg/{name}/1").as_bytes());
        // Settings have a revision of their own: all specs of a function share its digest.
        for spec in specs().iter().filter(|spec| spec.name == name) {
            let digest = function(spec).digest();
            assert_eq!(digest, identity.as_bytes()[..16], "{spec:?}");
            assert_eq!(hex(&digest), expected, "{spec:?}");
        }
    }
}

/// The bits themselves, pinned: another compiler or CPU has to agree. Whoever has to change one of
/// these has changed the arithmetic (a model in Python gave the same), and raises that function's digest.
#[test]
fn results_never_change() {
    let mut seed = 1_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 40) as f32 - 8_388_608.0) / 65_536.0
    };
    let mut results = Vec::new();
    for spec in specs() {
        let function = function(&spec);
        let elements = 3001;
        let mut state: Vec<f32> = (0..elements * (1 + function.slots())).map(|_| random()).collect();
        if spec.name != "sgd" {
            // Averages of squares are not negative.
            state[elements..].iter_mut().for_each(|value| *value = value.abs());
        }
        for (round, count) in [(1, 1), (2, 3), (3, 7)] {
            let mut contribution = || (random().abs(), (0..elements).map(|_| random()).collect());
            let contributions: Vec<_> = (0..count).map(|_| contribution()).collect();
            state = round_at(round, &*function, &[], &state, &contributions);
        }
        assert!(state.iter().all(|value| value.is_finite()), "{spec:?}");
        results.push(hex(&blake3::hash(&bytes(&state)).as_bytes()[..8]));
    }
    let expected = [
        "cc250e67f811f725",
        "cd49b9162e49754d",
        "ac41fc090951b1f3",
        "3b2caa8119c7e182",
        "7de0eb97fa93309d",
        "f59172da31fd07da",
        "5ce03f6dbacab846",
        "8723cc20def9d808",
        "fdc3c554954bca22",
        "fdc7970474e973bd",
        "4be6af605b001c41",
        "f5d9eb2cbd5407bd",
        "235ee4ae3f69eb5b",
        "553901e561abc451",
        "c8b76870c31c847c",
    ];
    assert_eq!(results, expected);
}

#[test]
fn one_contribution_is_its_own_sum() {
    let mut values: Vec<f32> = [-0.0, 0.0, 1.5, f32::MAX, f32::INFINITY, f32::NEG_INFINITY].into();
    values.extend([1, 0x007f_ffff, 0x8000_0001].map(f32::from_bits));
    let state = vec![3.0; values.len()];
    for name in ["sum", "mean", "weighted_mean"] {
        assert_eq!(bits(&round(&*named(name), &[], &state, &[values.clone()])), bits(&values), "{name}");
    }
}

#[test]
fn order_is_the_order_given() {
    // Another order, partial sums of lanes or a wider accumulator would give 1 here, ...
    let contributions = [1.0, 1e8, -1e8].map(|value| vec![value; 37]);
    assert_eq!(round(&*named("sum"), &[], &[0.0; 37], &contributions), [0.0; 37]);
    // ... or 0 here.
    let contributions = [1e8, -1e8, 1.0].map(|value| vec![value; 37]);
    assert_eq!(round(&*named("sum"), &[], &[0.0; 37], &contributions), [1.0; 37]);
}

#[test]
fn products_are_rounded_before_they_are_added() {
    // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: rounded, the last term is gone; fused, it would survive.
    let x = 1.0 + 2.0_f32.powi(-12);
    let function = function(&FunctionSpec::named("sgd").number("lr", f64::from(x)));
    let rounded = 1.0 + 2.0_f32.powi(-11);
    assert_eq!(round(&*function, &[], &[rounded; 9], &[vec![x; 9]]), [0.0; 9]);
}

#[test]
fn every_nan_is_the_canonical_one() {
    let nans =
        [0x7fc0_0000, 0xffc0_0000, 0x7fc0_1234, 0xff80_0001, 0x7f80_0001, 0x7fff_ffff].map(f32::from_bits);
    for spec in specs() {
        let function = function(&spec);
        let n = nans.len();
        let ones = vec![1.0; n];
        let rounds = [
            vec![nans.to_vec()],
            vec![nans.to_vec(), ones.clone()],
            vec![ones.clone(), nans.to_vec()],
            vec![nans.to_vec(), nans.iter().rev().copied().collect()],
            vec![vec![f32::INFINITY; n], vec![f32::NEG_INFINITY; n]],
        ];
        for contributions in rounds {
            let state = vec![1.0; n * (1 + function.slots())];
            let result = bits(&round(&*function, &[], &state, &contributions));
            assert_eq!(result, vec![0x7fc0_0000; result.len()], "{spec:?} {contributions:?}");
        }
    }
}

#[test]
fn alignment_does_not_matter() {
    for spec in specs() {
        let function = function(&spec);
        for elements in [1, 3, 4, 7, 64, 1023, 1024, 1025] {
            let values = |salt: usize, count: usize| {
                bytes(
                    &(0..count)
                        .map(|index| ((index * 37 + salt * 11) as f32).sin().abs())
                        .collect::<Vec<_>>(),
                )
            };
            let state = values(0, elements * (1 + function.slots()));
            let contributions = [values(1, elements), values(2, elements)];
            let run = |offset: usize| {
                let shift = |bytes: &[u8]| [&vec![0xee; offset], bytes].concat();
                let state = shift(&state);
                let mut fold = function.begin(shard(elements, &[]));
                for (rank, values) in (0..).zip(&contributions) {
                    let values = shift(values);
                    fold.accept(Contribution { rank, weight: 0.3, values: &values[offset..] });
                }
                let mut out = vec![0; offset];
                fold.finish(&state[offset..], &mut out);
                out.split_off(offset)
            };
            let aligned = run(0);
            for offset in 1..8 {
                assert_eq!(run(offset), aligned, "{spec:?}, {elements} elements, offset {offset}");
            }
        }
    }
}

#[test]
fn first_non_finite_finds_the_first() {
    assert_eq!(first_non_finite(&[]), None);
    assert_eq!(first_non_finite(&bytes(&[f32::MAX, -0.0, f32::MIN_POSITIVE / 4.0])), None);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xff80_0001)] {
        for at in [0, 1, 4095, 4096, 4097, 9000] {
            let mut values = vec![1.0; 9001];
            values[at] = bad;
            values[9000] = bad;
            let unaligned = [&[0], &bytes(&values)[..]].concat();
            assert_eq!(first_non_finite(&unaligned[1..]), Some(at));
        }
    }
}

proptest! {
    #[test]
    fn first_non_finite_agrees_with_a_scan(values in prop::collection::vec(any::<u32>(), 0..300)) {
        // Few exponents, so that non-finite values are neither rare nor always first.
        let values: Vec<f32> = values.into_iter().map(|bits| f32::from_bits(bits | 0x7e00_0000)).collect();
        let expected = values.iter().position(|value| !value.is_finite());
        prop_assert_eq!(first_non_finite(&bytes(&values)), expected);
    }
}

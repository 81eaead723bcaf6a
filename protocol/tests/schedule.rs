//! Schedules as people write them (JSON) and as they travel (MessagePack with structs as arrays).

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

use proptest::prelude::*;
use thalweg_protocol::{Decay, FunctionSpec, Schedule};

#[test]
fn json_reads_well() {
    for (json, warmup_rounds, decay) in [
        ("{}", 0, Decay::Constant),
        (r#"{"warmup_rounds": 5}"#, 5, Decay::Constant),
        (r#"{"decay": "constant"}"#, 0, Decay::Constant),
        (r#"{"decay": {"linear": {"rounds": 7, "to": 0}}}"#, 0, Decay::Linear { rounds: 7, to: 0.0 }),
        (
            r#"{"warmup_rounds": 100, "decay": {"cosine": {"rounds": 1000, "to": 0.1}}}"#,
            100,
            Decay::Cosine { rounds: 1000, to: 0.1 },
        ),
        (r#"{"decay": {"exponential": {"factor": 0.5}}}"#, 0, Decay::Exponential { factor: 0.5 }),
        (
            r#"{"decay": {"steps": {"at": [3, 9], "factor": 0.5}}}"#,
            0,
            Decay::Steps { at: vec![3, 9], factor: 0.5 },
        ),
        (r#"{"warmup_rounds": 1, "decay": "inverse_sqrt"}"#, 1, Decay::InverseSqrt),
    ] {
        let schedule: Schedule = serde_json::from_str(json).unwrap_or_else(|error| panic!("{json}: {error}"));
        assert_eq!(schedule, Schedule { warmup_rounds, decay }, "{json}");
    }
}

#[test]
fn json_with_a_slip_is_refused() {
    for (json, expected) in [
        (r#"{"warmup": 5}"#, "unknown field `warmup`, expected `warmup_rounds` or `decay`"),
        (r#"{"decay": "cosin"}"#, "unknown variant `cosin`, expected one of `constant`, `linear`, `cosine`"),
        (r#"{"decay": {"cosine": {"rounds": 9, "to": 0, "from": 1}}}"#, "unknown field `from`"),
        (r#"{"decay": {"cosine": {"rounds": 9}}}"#, "missing field `to`"),
        (r#"{"warmup_rounds": -1}"#, "invalid value: integer `-1`, expected u64"),
    ] {
        let error = serde_json::from_str::<Schedule>(json).unwrap_err().to_string();
        assert!(error.contains(expected), "{json}: {error}");
    }
}

#[test]
fn a_function_without_a_schedule_is_written_as_before_there_were_any() {
    let function = FunctionSpec::named("sgd");
    // [name, settings, groups]
    assert_eq!(rmp_serde::to_vec(&function).unwrap(), b"\x93\xa3sgd\x80\x90");
    assert_eq!(serde_json::to_string(&function).unwrap(), r#"{"name":"sgd","settings":{},"groups":[]}"#);
    let scheduled = function.schedule(Schedule { warmup_rounds: 2, decay: Decay::InverseSqrt });
    assert_eq!(rmp_serde::to_vec(&scheduled).unwrap(), b"\x94\xa3sgd\x80\x90\x92\x02\xacinverse_sqrt");
}

fn schedules() -> impl Strategy<Value = Schedule> {
    // Few digits: reading more of them from JSON may be off by one bit unless serde_json is built for it.
    let number = (-1_000_000..1_000_000).prop_map(|thousandths| f64::from(thousandths) / 1000.0);
    let decay = prop_oneof![
        Just(Decay::Constant),
        (any::<u64>(), number.clone()).prop_map(|(rounds, to)| Decay::Linear { rounds, to }),
        (any::<u64>(), number.clone()).prop_map(|(rounds, to)| Decay::Cosine { rounds, to }),
        number.clone().prop_map(|factor| Decay::Exponential { factor }),
        (prop::collection::vec(any::<u64>(), 0..5), number)
            .prop_map(|(at, factor)| Decay::Steps { at, factor }),
        Just(Decay::InverseSqrt),
    ];
    (any::<u64>(), decay).prop_map(|(warmup_rounds, decay)| Schedule { warmup_rounds, decay })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_reads_the_same(schedule in prop::option::of(schedules())) {
        let function = FunctionSpec { schedule, ..FunctionSpec::named("adam").number("lr", 0.1) };
        let bytes = rmp_serde::to_vec(&function).unwrap();
        prop_assert_eq!(&rmp_serde::from_slice::<FunctionSpec>(&bytes).unwrap(), &function);
        let json = serde_json::to_string(&function).unwrap();
        prop_assert_eq!(&serde_json::from_str::<FunctionSpec>(&json).unwrap(), &function);
    }
}

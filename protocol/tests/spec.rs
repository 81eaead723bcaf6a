//! Tables of what is accepted and what is refused, with the code and the words of each refusal.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::btree_set, prelude::*};
use thalweg_protocol::{
    Dtype, Durability, ErrorCode, FunctionSpec, Incarnation, Init, JobKey, JobRecord, JobSpec, JobState,
    Layout, Ledger, Life, Member, Mode, Name, NonFinite, ParameterGroup, Policy, RankSet, Roster, Settings,
    SettingsRevision, StateId, StoreId, StoreJob, TensorSpec, WireError, limits, offsets, partition_of,
    subjects,
};

fn key() -> JobKey {
    JobKey { tenant: "default".parse().unwrap(), job: "job".parse().unwrap() }
}

fn valid() -> JobSpec {
    JobSpec {
        key: key(),
        tensors: vec![TensorSpec::f32("weight", [64, 10]), TensorSpec::f32("bias", [10])],
        function: FunctionSpec::named("mean"),
        mode: Mode::Sync,
        workers: 4,
        quorum: None,
        deadline_ms: 0,
        durability: Durability::Process,
        non_finite: NonFinite::Propagate,
        init: Init::Zeros,
        shard_bytes: limits::DEFAULT_SHARD_BYTES,
        max_members: 16,
        policy: Policy::default(),
    }
}

fn tensors(tensors: impl Into<Vec<TensorSpec>>) -> JobSpec {
    JobSpec { tensors: tensors.into(), ..valid() }
}

/// Tensors `0`, `1`, ... of one element each.
fn scalars(count: usize) -> Vec<TensorSpec> {
    (0..count).map(|index| TensorSpec::f32(index.to_string(), [])).collect()
}

fn shape(shape: impl Into<Vec<u64>>) -> JobSpec {
    tensors([TensorSpec::f32("weight", shape)])
}

fn dtype(dtype: Dtype) -> JobSpec {
    tensors([TensorSpec { dtype, ..TensorSpec::f32("weight", [1]) }])
}

fn groups(groups: &[&[&str]]) -> JobSpec {
    let mut spec = valid();
    spec.function.groups = groups
        .iter()
        .map(|names| ParameterGroup {
            tensors: names.iter().map(|&name| name.to_owned()).collect(),
            settings: Settings::new(),
        })
        .collect();
    spec
}

fn quorum(quorum: u32, deadline_ms: u64) -> JobSpec {
    JobSpec { quorum: Some(quorum), deadline_ms, ..valid() }
}

#[test]
fn specifications_within_the_limits_are_valid() {
    let max = limits::MAX_ELEMENTS;
    let huge_shards = |spec: JobSpec| JobSpec { shard_bytes: 1 << 31, ..spec };
    let cases = [
        ("plain", valid()),
        ("scalar", shape([])),
        ("one element", shape([1; limits::MAX_DIMS])),
        ("10,000 tensors", tensors(scalars(10_000))),
        ("most tensors", tensors(scalars(limits::MAX_TENSORS))),
        ("longest name", tensors([TensorSpec::f32("é".repeat(limits::MAX_TENSOR_NAME_BYTES / 2), [1])])),
        ("most elements", huge_shards(shape([1 << 20, 1 << 20]))),
        (
            "most elements in two",
            huge_shards(tensors([TensorSpec::f32("a", [max - 1]), TensorSpec::f32("b", [])])),
        ),
        ("smallest shards", JobSpec { shard_bytes: limits::MIN_SHARD_BYTES, ..valid() }),
        ("largest shards", JobSpec { shard_bytes: u32::MAX - 3, ..valid() }),
        ("most shards", JobSpec { shard_bytes: 256, ..shape([limits::MAX_SHARDS * 64]) }),
        ("one worker", JobSpec { workers: 1, max_members: 1, ..valid() }),
        ("as many workers as members", JobSpec { workers: 16, ..valid() }),
        ("most members", JobSpec { max_members: limits::MAX_MEMBERS, ..valid() }),
        ("smallest quorum", quorum(1, 1)),
        ("largest quorum", quorum(4, limits::MAX_DEADLINE_MS)),
        ("no quorum, so no deadline", JobSpec { deadline_ms: u64::MAX, ..valid() }),
        ("groups", groups(&[&["bias"], &["weight"]])),
        ("empty groups", groups(&[&[][..]; limits::MAX_GROUPS])),
    ];
    for (name, spec) in cases {
        assert_eq!(spec.validate(), Ok(()), "{name}");
    }
}

#[test]
fn specifications_that_cannot_run_are_refused_by_name() {
    use ErrorCode::{InvalidSpec, Limit, WrongDtype};
    let max = limits::MAX_ELEMENTS;
    let name = |name: String| tensors([TensorSpec::f32(name, [1])]);
    let twice = || [TensorSpec::f32("weight", [1]), TensorSpec::f32("weight", [2])];
    let over_elements = r#"tensor "weight" has over 1099511627776 elements"#;
    let empty = r#"tensor "weight" is empty (a dimension is 0): leave it out"#;
    let not_f32 = "only f32 is aggregated: convert it first";
    let cases: Vec<(JobSpec, ErrorCode, &str)> = vec![
        (tensors([]), InvalidSpec, "at least one tensor"),
        (tensors(scalars(limits::MAX_TENSORS + 1)), Limit, "65537 tensors; at most 65536"),
        (name(String::new()), Limit, r#"tensor name of 0 bytes, not 1 to 256: """#),
        (name("x".repeat(257)), Limit, r#"tensor name of 257 bytes, not 1 to 256: "xxx"#),
        (name("é".repeat(129)), Limit, r#"tensor name of 258 bytes, not 1 to 256: "éé"#),
        // The rule comes before the name: a long text is cut at its end.
        (name("x".repeat(100_000)), Limit, "tensor name of 100000 bytes, not 1 to 256: "),
        (tensors(twice()), InvalidSpec, r#"two tensors are called "weight""#),
        (dtype(Dtype::F64), WrongDtype, r#"tensor "weight" is F64"#),
        (dtype(Dtype::F16), WrongDtype, r#"tensor "weight" is F16"#),
        (dtype(Dtype::BF16), WrongDtype, not_f32),
        (shape([1; limits::MAX_DIMS + 1]), Limit, r#"tensor "weight": at most 16 dimensions"#),
        (shape([0]), InvalidSpec, empty),
        (shape([5, 0, 7]), InvalidSpec, empty),
        (shape([0, u64::MAX, u64::MAX]), InvalidSpec, empty),
        (shape([max + 1]), Limit, over_elements),
        (shape([u64::MAX]), Limit, over_elements),
        // Products that are 0, 1 and small when they wrap.
        (shape([1 << 32, 1 << 32]), Limit, over_elements),
        (shape([u64::MAX, u64::MAX]), Limit, over_elements),
        (shape([(1 << 63) + 1, 2]), Limit, over_elements),
        (
            tensors([TensorSpec::f32("a", [max]), TensorSpec::f32("b", [])]),
            Limit,
            "the model has 1099511627777 elements; at most 1099511627776",
        ),
        (JobSpec { shard_bytes: 0, ..valid() }, InvalidSpec, "shard_bytes 0: a multiple of 4, at least 256"),
        (JobSpec { shard_bytes: 252, ..valid() }, InvalidSpec, "shard_bytes 252: "),
        (JobSpec { shard_bytes: 1022, ..valid() }, InvalidSpec, "shard_bytes 1022: "),
        (JobSpec { shard_bytes: u32::MAX, ..valid() }, InvalidSpec, "shard_bytes 4294967295: "),
        (
            JobSpec { shard_bytes: 256, ..shape([limits::MAX_SHARDS * 64 + 1]) },
            Limit,
            "more than 8388608 shards: raise shard_bytes",
        ),
        (JobSpec { max_members: 0, ..valid() }, Limit, "max_members 0: 1 to 16384"),
        (JobSpec { max_members: limits::MAX_MEMBERS + 1, ..valid() }, Limit, "max_members 16385: 1 to 16384"),
        (JobSpec { workers: 0, ..valid() }, InvalidSpec, "workers 0: 1 to max_members (16)"),
        (JobSpec { workers: 17, ..valid() }, InvalidSpec, "workers 17: 1 to max_members (16)"),
        (quorum(0, 1), InvalidSpec, "quorum 0: 1 to workers (4)"),
        (quorum(5, 1), InvalidSpec, "quorum 5: 1 to workers (4)"),
        (quorum(3, 0), InvalidSpec, "deadline_ms 0: 1 to 604800000"),
        (quorum(3, limits::MAX_DEADLINE_MS + 1), InvalidSpec, "deadline_ms 604800001: 1 to 604800000"),
        (groups(&[&[][..]; limits::MAX_GROUPS + 1]), Limit, "65 parameter groups; at most 64"),
        (groups(&[&["wieght"]]), InvalidSpec, r#"names what is no tensor of the job: "wieght""#),
        (groups(&[&[&*"x".repeat(5000)]]), InvalidSpec, "names what is no tensor of the job: "),
        (groups(&[&["bias"], &["bias"]]), InvalidSpec, r#"tensor "bias" is in two parameter groups"#),
        (groups(&[&["bias", "bias"]]), InvalidSpec, r#"tensor "bias" is in two parameter groups"#),
    ];
    for (spec, code, text) in cases {
        let error = spec.validate().expect_err(text);
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(text), "{error}\ndoes not say: {text}");
    }
}

/// What `T` makes of `value` as it comes over the wire.
fn decode<T: serde::de::DeserializeOwned>(value: &impl serde::Serialize) -> Result<T, String> {
    rmp_serde::from_slice(&rmp_serde::to_vec(value).unwrap()).map_err(|error| error.to_string())
}

#[test]
fn only_valid_names_come_over_the_wire() {
    let longest = "x".repeat(limits::MAX_NAME_BYTES);
    for name in ["a", "0", "-", "_", "bert-base_2", "az09-_", &longest] {
        assert_eq!(decode::<Name>(&name).unwrap().as_str(), name);
        assert_eq!(decode::<String>(&Name::new(name).unwrap()).unwrap(), name);
        assert_eq!(decode::<JobKey>(&(name, name)).unwrap().to_string(), format!("{name}/{name}"));
    }
    let too_long = "x".repeat(limits::MAX_NAME_BYTES + 1);
    let bad = ["", "A", "a.b", "a b", "a/b", "*", ">", "a>", "$kv", "é", "ß", "a\0", "a\n", "٣", &too_long];
    for name in bad {
        let error = decode::<Name>(&name).unwrap_err();
        assert!(
            error.contains(&format!("{name:?} is not a valid name: use 1 to 64 of a-z, 0-9, '-'")),
            "{error}"
        );
        assert_eq!(decode::<JobKey>(&("a", name)).unwrap_err(), error);
        assert_eq!(name.parse::<Name>().unwrap_err().0, name);
    }
    assert!(decode::<Name>(&7).is_err());
    assert!(decode::<Name>(&serde_bytes::Bytes::new(b"\xff")).is_err());
}

#[test]
fn ids_come_over_the_wire_as_16_bytes() {
    for len in (0..40).filter(|&len| len != 16) {
        let error = decode::<StateId>(&serde_bytes::ByteBuf::from(vec![1; len])).unwrap_err();
        assert!(error.contains("an id is 16 bytes"), "{len}: {error}");
    }
    let id = Incarnation([0xab; 16]);
    assert_eq!(decode(&serde_bytes::Bytes::new(&[0xab; 16])), Ok(id));
    assert_eq!(rmp_serde::to_vec(&id).unwrap()[..2], [0xc4, 16]);
}

#[test]
fn ids_parse_from_nothing_but_32_hexadecimal_digits() {
    let id = "00ff7f80a1b2c3d4e5f6079899abcdef";
    assert_eq!(id.parse::<StoreId>().unwrap().to_string(), id);
    assert_eq!(id.to_uppercase().parse::<StoreId>().unwrap().to_string(), id);
    let with_sign = "+f".repeat(16);
    let spaced = format!(" {}", &id[1..]);
    for bad in ["", &id[1..], &format!("{id}0"), &with_sign, &spaced, &id.replace('a', "g")] {
        let error = bad.parse::<StoreId>().expect_err(bad);
        assert_eq!(error.to_string(), format!("{bad:?} is not an id of 32 hexadecimal digits"));
    }
}

#[test]
fn long_errors_are_cut_between_characters() {
    for (unit, bytes) in [("x", 1), ("é", 2), ("…", 3), ("🦀", 4)] {
        for shift in 0..4 {
            for count in [1, limits::MAX_ERROR_BYTES / bytes - 4, limits::MAX_ERROR_BYTES, 5000] {
                let text = "-".repeat(shift) + &unit.repeat(count);
                let error = WireError::new(ErrorCode::Internal, text.clone());
                if text.len() <= limits::MAX_ERROR_BYTES {
                    assert_eq!(error.message, text);
                    continue;
                }
                let kept = error.message.strip_suffix('…').unwrap();
                assert!(text.starts_with(kept));
                let room = limits::MAX_ERROR_BYTES - error.message.len();
                assert!(room < bytes, "{room} bytes unused before the next {unit}");
                assert_eq!(WireError::new(ErrorCode::Internal, error.message.clone()), error);
            }
        }
    }
    let longest = "x".repeat(limits::MAX_ERROR_BYTES);
    assert_eq!(WireError::new(ErrorCode::Internal, longest.clone()).message, longest);
}

#[test]
fn codes_are_their_own_names() {
    let names: BTreeSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(names.len(), ErrorCode::ALL.len());
    for &code in ErrorCode::ALL {
        assert_eq!(decode::<String>(&code).unwrap(), code.as_str());
        assert_eq!(decode::<ErrorCode>(&code.as_str()), Ok(code));
        assert_eq!(code.to_string(), code.as_str());
        assert!(code.as_str().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'));
        assert_eq!(WireError::new(code, "why").to_string(), format!("why [{code}]"));
        assert_eq!(WireError::new(code, "why").is_retryable(), code.is_retryable());
    }
    assert!(decode::<ErrorCode>(&"no_such_code").is_err());
}

/// A set of ranks as it crosses the wire.
fn bytes_of(set: &RankSet) -> Vec<u8> {
    decode::<serde_bytes::ByteBuf>(set).unwrap().into_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_set_of_ranks_is_a_set(
        ranks in prop::collection::vec(0..limits::MAX_MEMBERS, 0..60),
        other in btree_set(0..40_u32, 0..40),
    ) {
        let model: BTreeSet<_> = ranks.iter().copied().collect();
        let set = RankSet::from_iter(ranks);
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
        prop_assert_eq!(set.len(), model.len());
        prop_assert_eq!(set.is_empty(), model.is_empty());
        for rank in model.iter().flat_map(|&rank| [rank, rank + 1, rank.saturating_sub(1)]).chain([0, u32::MAX]) {
            prop_assert_eq!(set.contains(rank), model.contains(&rank), "{}", rank);
        }
        prop_assert_eq!(format!("{set:?}"), format!("{model:?}"));

        // Equal sets have equal bytes, in whatever order they came to be.
        let backwards = RankSet::from_iter(model.iter().rev().copied());
        prop_assert_eq!(&backwards, &set);
        prop_assert_eq!(bytes_of(&backwards), bytes_of(&set));
        prop_assert!(!bytes_of(&set).ends_with(&[0]));
        prop_assert!(bytes_of(&set).len() <= limits::MAX_MEMBERS as usize / 8);
        prop_assert_eq!(&decode::<RankSet>(&set).unwrap(), &set);
        let other_set = RankSet::from_iter(other.iter().copied());
        prop_assert_eq!(other_set == set, other == model);

        let ledger = Ledger { counted: set, void: other_set, ..Ledger::default() };
        for rank in 0..64 {
            prop_assert_eq!(ledger.contains(rank), model.contains(&rank) || other.contains(&rank));
        }
    }

    #[test]
    fn a_layout_covers_every_element_once(
        elements in prop_oneof![1..5000_u64, 1..=limits::MAX_ELEMENTS],
        wanted in prop_oneof![1..5000_u32, 64..=u32::MAX / 4],
        at in any::<prop::sample::Index>(),
        span in any::<prop::sample::Index>(),
    ) {
        let fewest = elements.div_ceil(limits::MAX_SHARDS);
        let layout = Layout { elements, shard_elements: wanted.max(u32::try_from(fewest).unwrap()) };
        let shards = layout.shards();
        prop_assert!(!layout.is_empty());
        prop_assert!(u64::from(shards) <= limits::MAX_SHARDS);
        // Neighbours touch, the first starts at the start, the last ends at the end.
        let shard = u32::try_from(at.index(shards as usize)).unwrap();
        let range = layout.range(shard);
        prop_assert_eq!(range.start, if shard == 0 { 0 } else { layout.range(shard - 1).end });
        prop_assert_eq!(range.end == elements, shard + 1 == shards);
        prop_assert_eq!(layout.len(shard) as u64, range.end - range.start);
        prop_assert!((1..=layout.shard_elements as usize).contains(&layout.len(shard)));
        prop_assert!(shard + 1 == shards || layout.len(shard) == layout.shard_elements as usize);
        prop_assert_eq!(layout.len(shards), 0);
        prop_assert_eq!(layout.len(u32::MAX), 0);
        // The shards of a range are those that share an element with it.
        prop_assert_eq!(layout.shards_of(&(0..elements)), 0..shards);
        prop_assert_eq!(layout.shards_of(&range), shard..shard + 1);
        let start = at.index(usize::try_from(elements).unwrap()) as u64;
        let end = start + 1 + span.index(usize::try_from(elements - start).unwrap()) as u64;
        let touched = layout.shards_of(&(start..end));
        prop_assert!(layout.range(touched.start).contains(&start));
        prop_assert!(layout.range(touched.end - 1).contains(&(end - 1)));
    }

    #[test]
    fn partitions_are_shared_evenly(
        job in any::<[u8; 16]>(),
        first in 0..u32::MAX - 2048,
        partitions in 1..=limits::MAX_PARTITIONS,
    ) {
        let mut shares = BTreeMap::<_, u32>::new();
        for shard in first..first + 2 * u32::from(partitions) {
            *shares.entry(partition_of(Incarnation(job), shard, partitions)).or_default() += 1;
        }
        prop_assert_eq!(shares.keys().copied().collect::<Vec<_>>(), (0..partitions).collect::<Vec<_>>());
        prop_assert!(shares.values().all(|&share| share == 2));
    }
}

#[test]
fn layouts_without_elements_do_not_arrive() {
    assert_eq!(decode(&(1_u64, 1_u32)), Ok(Layout { elements: 1, shard_elements: 1 }));
    for empty in [(0_u64, 1_u32), (1, 0), (0, 0)] {
        assert_eq!(decode::<Layout>(&empty), Err("a layout has at least one element".to_owned()));
    }
}

/// Worker and gateway work it out for themselves.
#[test]
fn partitions_never_change() {
    let job = Incarnation(*b"\0\0\0\0\0\0\0\x2ajob more");
    for (shard, partitions, partition) in
        [(0, 32, 10), (21, 32, 31), (22, 32, 0), (u32::MAX, 32, 9), (5, 1, 0)]
    {
        assert_eq!(partition_of(job, shard, partitions), partition, "{shard} of {partitions}");
    }
    assert_eq!(partition_of(Incarnation([0xff; 16]), u32::MAX, 1024), 1022);
}

#[test]
fn tensors_lie_one_after_another() {
    assert_eq!(offsets(&[]), [0]);
    assert_eq!(offsets(&valid().tensors), [0, 640, 650]);
    assert_eq!(offsets(&scalars(3)), [0, 1, 2, 3]);
    assert_eq!(TensorSpec::f32("x", [1 << 32, 1 << 32]).elements(), None);
    assert_eq!(TensorSpec::f32("x", []).elements(), Some(1));
}

fn job(from_rounds: &[u64]) -> JobRecord {
    let settings = (0..).zip(from_rounds).map(|(revision, &from_round)| SettingsRevision {
        revision,
        from_round,
        function: FunctionSpec::named("sgd"),
    });
    JobRecord {
        spec: valid(),
        incarnation: Incarnation([1; 16]),
        layout: Layout { elements: 650, shard_elements: 512 },
        slots: 2,
        store: StoreId([2; 16]),
        partitions: 32,
        state: JobState::Running,
        settings: settings.collect(),
        life: Life::default(),
    }
}

#[test]
fn a_round_is_folded_by_the_newest_settings_that_have_begun() {
    type Cases<'a> = &'a [(&'a [u64], &'a [(u64, u32)])];
    let cases: Cases<'_> = &[
        (&[0], &[(0, 0), (1, 0), (u64::MAX, 0)]),
        (&[0, 10, 20], &[(0, 0), (9, 0), (10, 1), (11, 1), (19, 1), (20, 2), (u64::MAX, 2)]),
        // Changed twice before round 10: the later one counts, the other never did.
        (&[0, 10, 10], &[(9, 0), (10, 2)]),
        (&[0, u64::MAX], &[(u64::MAX - 1, 0), (u64::MAX, 1)]),
        // Nothing has begun: the oldest is the best there is.
        (&[5], &[(1, 0), (5, 0)]),
    ];
    for (from_rounds, expected) in cases {
        for &(round, revision) in *expected {
            let job = job(from_rounds);
            assert_eq!(job.settings_of(round).revision, revision, "round {round} of {from_rounds:?}");
        }
    }
}

#[test]
fn states_are_counted_in_bytes() {
    let record = job(&[0]);
    assert_eq!(record.state_bytes(), 512 * 4 * 3);
    assert_eq!(record.partition(3), partition_of(record.incarnation, 3, 32));
    let stored = StoreJob {
        key: key(),
        incarnation: record.incarnation,
        layout: record.layout,
        slots: record.slots,
        durability: Durability::Disk,
        max_members: 16,
        init: Init::Zeros,
        first_version: 0,
    };
    for (shard, elements) in [(0, 512), (1, 138), (2, 0)] {
        assert_eq!(stored.parameter_bytes(shard), elements * 4);
        assert_eq!(stored.state_bytes(shard), elements * 4 * 3);
    }
}

#[test]
fn a_round_waits_for_the_members_of_its_time() {
    let life = |byte| Incarnation([byte; 16]);
    let tenure = |rank, byte, from_round, until_round| Member {
        rank,
        worker: format!("worker-{rank}"),
        incarnation: life(byte),
        from_round,
        until_round,
        confirmed: true,
    };
    let roster = Roster {
        revision: 0,
        job: life(0),
        epoch: 4,
        started: true,
        members: vec![
            tenure(0, 10, 1, None),
            // Rank 1 was taken over in round 5.
            tenure(1, 11, 1, Some(5)),
            tenure(1, 12, 5, None),
            // Left before its first round.
            tenure(2, 13, 3, Some(3)),
            tenure(3, 14, 7, Some(8)),
        ],
    };
    let cases: [(u64, &[u8]); 8] = [
        (0, &[]),
        (1, &[10, 11]),
        (3, &[10, 11]),
        (4, &[10, 11]),
        (5, &[10, 12]),
        (7, &[10, 12, 14]),
        (8, &[10, 12]),
        (u64::MAX, &[10, 12]),
    ];
    for (round, lives) in cases {
        let members: Vec<_> = roster.of_round(round).map(|member| member.incarnation.0[0]).collect();
        assert_eq!(members, lives, "round {round}");
        let ranks: BTreeSet<_> = roster.of_round(round).map(|member| member.rank).collect();
        assert_eq!(ranks.len(), lives.len(), "two tenures of one rank in round {round}");
    }
    assert_eq!(roster.tenure(life(12)).unwrap().from_round, 5);
    assert_eq!(roster.tenure(life(15)), None);
}

#[test]
fn keys_and_subjects_keep_jobs_apart() {
    use thalweg_protocol::{job_key, lease_key, roster_key, suspect_key};
    assert_eq!(job_key(&key()), "job.default.job");
    assert_eq!(roster_key(&key()), "roster.default.job");
    assert_eq!((lease_key("gateway"), suspect_key(7)), ("lease.gateway".into(), "suspect.7".into()));
    assert_eq!(subjects::result(&key()), "thalweg.result.default.job");
    assert_eq!(subjects::reject(&key(), 3), "thalweg.reject.default.job.3");
    assert_eq!(subjects::dead_letter(Some(&key())), "thalweg.deadletter.default.job");
    assert_eq!(subjects::dead_letter(None), "thalweg.deadletter._._");
    assert_eq!(subjects::store(StoreId([0xab; 16])), format!("thalweg.store.{}", "ab".repeat(16)));
    assert_eq!(subjects::registry_hint(&job_key(&key())), "$KV.thalweg.job.default.job");
    assert_eq!(subjects::gradient_stream(7), "THALWEG_GRAD_7");
    assert_eq!(subjects::gradient_subjects(7), "thalweg.grad.7.>");
}

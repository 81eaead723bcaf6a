//! Frames under proptest and under attack: what is sealed opens to the same, what was changed does
//! not open, and nothing that arrives makes a component panic or reserve memory on its say-so.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

mod messages;

use bytes::Bytes;
use messages::{Message, message, open_as_each};
use proptest::{collection::vec, prelude::*, strategy::ValueTree, test_runner::TestRunner};
use thalweg_protocol::{
    ApiRequest, ErrorCode, FrameBuilder, FrameError, GradientHeader, Head, Incarnation, Kind, Lease, Ledger,
    RankSet, StateId, StoreReply, WIRE_VERSION, checksum, frame,
};

/// Bytes before the header: `[version, kind, codec, checksum as bin of 8]`.
const PRELUDE_BYTES: usize = 14;
const KINDS: [Kind; 14] = [
    Kind::Gradient,
    Kind::Result,
    Kind::Reject,
    Kind::StoreRequest,
    Kind::StoreReply,
    Kind::ApiRequest,
    Kind::ApiReply,
    Kind::Record,
    Kind::Beat,
    Kind::Nudge,
    Kind::Handover,
    Kind::HandedOver,
    Kind::TraceQuery,
    Kind::TraceReply,
];

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![1 => Just(Vec::new()), 4 => vec(any::<u8>(), 0..300)]
}

/// A frame around `body`, byte by byte as the format says, with the checksum that fits.
fn around(kind: Kind, body: &[u8]) -> Bytes {
    let sum = checksum(&[body]).to_be_bytes();
    [&[0x94, WIRE_VERSION, kind as u8, 0, 0xc4, 8], &sum[..], body].concat().into()
}

/// `count` messages of all types, the same in every run.
fn samples(count: usize) -> Vec<Message> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| message().new_tree(&mut runner).unwrap().current()).collect()
}

fn lease() -> Lease {
    Lease { holder: Incarnation([7; 16]), renewals: 3 }
}

proptest! {
    #![proptest_config(config(1024))]

    #[test]
    fn what_is_sealed_opens_to_the_same(message in message(), payload in payload()) {
        let sealed = message.seal(&payload);
        let (opened, bytes) = message.open(&sealed).unwrap();
        prop_assert_eq!(&opened, &message);
        prop_assert_eq!(&bytes[..], &payload[..]);
        prop_assert_eq!(opened.seal(&bytes), &sealed);
        prop_assert_eq!(around(message.kind(), &sealed[PRELUDE_BYTES..]), &sealed);
        if !payload.is_empty() {
            let ends_with = sealed.as_ptr_range().end;
            prop_assert_eq!(bytes.as_ptr_range(), ends_with.wrapping_sub(payload.len())..ends_with);
        }
    }

    #[test]
    fn a_changed_byte_is_noticed(
        message in message(),
        payload in payload(),
        at in any::<prop::sample::Index>(),
        change in 1..=u8::MAX,
    ) {
        let mut bytes = message.seal(&payload).to_vec();
        let at = PRELUDE_BYTES + at.index(bytes.len() - PRELUDE_BYTES);
        bytes[at] ^= change;
        prop_assert_eq!(message.open(&bytes.into()), Err(FrameError::Checksum));
    }

    #[test]
    fn random_bytes_are_refused(bytes in vec(any::<u8>(), 0..200)) {
        let bytes = bytes.into();
        prop_assert!(open_as_each(&bytes).iter().all(Result::is_err));
    }

    // The checksum stops accidents, not attackers: here it fits, and the decoders see everything.
    #[test]
    fn random_bodies_never_panic(body in vec(any::<u8>(), 0..200)) {
        for kind in KINDS {
            open_as_each(&around(kind, &body));
        }
    }

    #[test]
    fn mutated_bodies_never_panic(
        message in message(),
        payload in payload(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = message.seal(&payload)[PRELUDE_BYTES..].to_vec();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        open_as_each(&around(message.kind(), &body));
    }
}

proptest! {
    // Each case tries every length of its frame.
    #![proptest_config(config(96))]

    #[test]
    fn a_cut_frame_is_refused(message in message(), payload in payload()) {
        let sealed = message.seal(&payload);
        let body = &sealed[PRELUDE_BYTES..];
        for len in 0..sealed.len() {
            prop_assert!(message.open(&sealed.slice(..len)).is_err(), "{} of {} bytes", len, sealed.len());
        }
        for len in 0..body.len() {
            let opened = message.open(&around(message.kind(), &body[..len]));
            prop_assert!(matches!(opened, Err(FrameError::Malformed(_))), "{}: {:?}", len, opened);
        }
    }

    #[test]
    fn bytes_behind_the_payload_are_refused(
        message in message(),
        payload in payload(),
        more in vec(any::<u8>(), 1..20),
    ) {
        let mut longer = message.seal(&payload).to_vec();
        longer.extend(&more);
        let opened = message.open(&around(message.kind(), &longer[PRELUDE_BYTES..]));
        prop_assert!(matches!(opened, Err(FrameError::Malformed(_))), "{:?}", opened);
        prop_assert_eq!(message.open(&longer.into()), Err(FrameError::Checksum));
    }

    #[test]
    fn every_other_prelude_is_refused(message in message(), payload in payload()) {
        let sealed = message.seal(&payload);
        for at in 0..PRELUDE_BYTES {
            for change in 1..=u8::MAX {
                let mut bytes = sealed.to_vec();
                bytes[at] ^= change;
                let opened = message.open(&bytes.into());
                prop_assert!(opened.is_err(), "byte {} changed by {:#04x}: {:?}", at, change, opened);
            }
        }
    }
}

#[test]
fn every_kind_of_message_is_sampled() {
    let sampled: std::collections::HashSet<_> = samples(400).iter().map(std::mem::discriminant).collect();
    assert_eq!(sampled.len(), open_as_each(&Bytes::new()).len());
}

#[test]
fn numbers_that_are_not_finite_keep_their_bits() {
    for bits in [0x7fc0_0001, 0xffc0_0000, 0x7f80_0000, 0x8000_0000] {
        let header = GradientHeader {
            job: Incarnation([1; 16]),
            shard: 0,
            round: 1,
            worker: Incarnation([2; 16]),
            rank: 0,
            roster_epoch: 1,
            base: StateId([3; 16]),
            weight: f32::from_bits(bits),
            void: false,
            elements: 1,
        };
        let sealed = frame::seal(Kind::Gradient, &header, &bits.to_le_bytes());
        let (opened, payload) = frame::open::<GradientHeader>(Kind::Gradient, &sealed).unwrap();
        assert_eq!(opened.weight.to_bits(), bits);
        assert_eq!(payload[..], bits.to_le_bytes());
    }
}

#[test]
fn a_builder_starts_with_zeros_and_takes_what_is_written() {
    let mut builder = FrameBuilder::new(Kind::Record, &lease(), 70_000);
    assert_eq!(builder.payload_mut(), vec![0; 70_000]);
    builder.payload_mut()[69_999] = 9;
    let (opened, payload) = frame::open::<Lease>(Kind::Record, &builder.finish()).unwrap();
    assert_eq!(opened, lease());
    assert_eq!((payload.len(), payload[69_998], payload[69_999]), (70_000, 0, 9));
}

#[test]
fn a_frame_is_opened_only_as_its_own_kind() {
    for message in samples(60) {
        let sealed = message.seal(&[]);
        for kind in KINDS {
            let opened = frame::open::<Lease>(kind, &sealed);
            if kind != message.kind() {
                let text =
                    format!("kind {} where {} ({kind:?}) is expected", message.kind() as u8, kind as u8);
                assert_eq!(opened, Err(FrameError::Malformed(text)));
            }
        }
    }
}

#[test]
fn a_header_of_another_type_is_malformed() {
    let sealed = frame::seal(Kind::StoreReply, &lease(), &[]);
    let error = frame::open::<StoreReply>(Kind::StoreReply, &sealed).unwrap_err();
    assert!(matches!(&error, FrameError::Malformed(text) if text.starts_with("bad StoreReply header: ")));
    assert_eq!(error.to_wire().code, ErrorCode::Malformed);
}

#[test]
fn an_unknown_codec_is_told() {
    let sealed = frame::seal(Kind::Record, &lease(), &[1, 2, 3]);
    for codec in 1..0x80 {
        let mut bytes = sealed.to_vec();
        bytes[3] = codec;
        let error = frame::open_record::<Lease>(&bytes.into()).unwrap_err();
        assert_eq!(error, FrameError::Codec(codec));
        assert_eq!(error.to_wire().code, ErrorCode::Malformed);
        assert!(error.to_string().contains(&codec.to_string()));
    }
}

#[test]
fn a_broken_checksum_may_be_tried_again() {
    let mut bytes = frame::seal_record(&lease()).to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    let error = frame::open_record::<Lease>(&bytes.into()).unwrap_err().to_wire();
    assert_eq!(error.code, ErrorCode::BadChecksum);
    assert!(error.is_retryable());
}

#[test]
fn another_wire_version_is_told_whatever_follows_it() {
    // Versions of one and of two bytes; what follows is known, longer, different, or cut short.
    let preludes: &[(&str, &[u8], &[u8])] = &[
        ("the same prelude", &[0x94], &[1, 0, 0xc4, 8, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("a field more", &[0x95], &[1, 0, 0xc4, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0xc0]),
        (
            "many fields more",
            &[0xdc, 0, 16],
            &[1, 0, 0xc4, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 1, 1, 1, 1, 1, 1],
        ),
        ("a longer checksum", &[0x94], &[1, 0, 0xc4, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("an unknown kind and codec", &[0x94], &[99, 98, 0xc4, 8, 1, 2, 3, 4, 5, 6, 7, 8]),
    ];
    let headers: [&[u8]; 3] = [&[], &[0xc1, 0xff, 0xff], &[0x93, 1, 2, 3, 0xc4, 1, 0]];
    for theirs in (0..=u8::MAX).filter(|&version| version != WIRE_VERSION) {
        let version = if theirs < 0x80 { vec![theirs] } else { vec![0xcc, theirs] };
        for (what, marker, fields) in preludes {
            for header in headers {
                let bytes = [marker, &version[..], fields, header].concat().into();
                let error = frame::open_record::<Lease>(&bytes).unwrap_err();
                assert_eq!(error, FrameError::WireVersion { theirs, ours: WIRE_VERSION }, "{what}");
                let wire = error.to_wire();
                assert_eq!(wire.code, ErrorCode::WireVersion);
                assert!(
                    wire.message.contains(&format!("wire version {theirs}, this component {WIRE_VERSION}"))
                );
            }
        }
    }
}

#[test]
fn a_longer_prelude_of_our_own_version_is_malformed() {
    let mut bytes = frame::seal_record(&lease()).to_vec();
    bytes[0] = 0x95;
    bytes.insert(PRELUDE_BYTES, 0xc0);
    assert!(matches!(frame::open_record::<Lease>(&bytes.into()), Err(FrameError::Malformed(_))));
}

#[test]
fn a_set_of_ranks_decodes_only_from_its_own_bytes() {
    let head = Head { version: 1, fold_count: 0, state_id: StateId([0; 16]) };
    let ledger = Ledger { counted: RankSet::from_iter([0, 9]), ..Ledger::default() };
    let sealed = frame::seal(Kind::StoreReply, &StoreReply::State(head, ledger), &[]);
    let body = &sealed[PRELUDE_BYTES..];
    let at = body.windows(4).position(|bytes| bytes == [0xc4, 2, 0b1, 0b10]).unwrap();
    for set in [&[0xc4, 3, 0b1, 0b10, 0][..], &[0xc4, 1, 0], &[0xc4, 2, 0b1, 0]] {
        let longer = [&body[..at], set, &body[at + 4..]].concat();
        let opened = frame::open::<StoreReply>(Kind::StoreReply, &around(Kind::StoreReply, &longer));
        assert!(matches!(opened, Err(FrameError::Malformed(_))), "{set:x?}: {opened:?}");
    }
}

#[test]
fn deep_nesting_is_refused() {
    // Where an untagged setting buffers its value, at the end of a job's specification, and alone.
    let spec = samples(400)
        .into_iter()
        .find(|message| matches!(message, Message::ApiRequest(ApiRequest::OpenJob(_))))
        .unwrap();
    let body = spec.seal(&[])[PRELUDE_BYTES..].to_vec();
    for opening in [&[0x91][..], &[0x81], &[0x81, 0xa1, b'a'], &[0xdd, 0, 0, 0, 1]] {
        let nested = opening.repeat(100_000);
        for at in 0..body.len().min(400) {
            let bytes = around(Kind::ApiRequest, &[&body[..at], &nested[..]].concat());
            let opened = frame::open::<ApiRequest>(Kind::ApiRequest, &bytes);
            assert!(matches!(opened, Err(FrameError::Malformed(_))), "{opening:x?} at {at}");
        }
    }
}

/// Most virtual memory this process has ever had, bytes. Reserving counts, touching is not needed.
#[cfg(target_os = "linux")]
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[cfg(target_os = "linux")]
#[test]
fn lengths_beyond_the_frame_reserve_nothing() {
    // Every marker that declares a length, each declaring as much as it can.
    let hostile: [&[u8]; 8] = [
        &[0xdb, 0xff, 0xff, 0xff, 0xff],
        &[0xc6, 0xff, 0xff, 0xff, 0xff],
        &[0xdd, 0xff, 0xff, 0xff, 0xff],
        &[0xdf, 0xff, 0xff, 0xff, 0xff],
        &[0xc9, 0xff, 0xff, 0xff, 0xff, 1],
        &[0xda, 0xff, 0xff],
        &[0xdc, 0xff, 0xff],
        &[0xde, 0xff, 0xff],
    ];
    // Threads of the test harness may reserve arenas meanwhile, but nothing near the 4 GiB declared.
    let allowed = peak_bytes() + (2 << 30);
    for message in samples(80) {
        let body = message.seal(&[1, 2, 3, 4])[PRELUDE_BYTES..].to_vec();
        for at in 0..body.len().min(600) {
            for declared in hostile {
                let cut = around(message.kind(), &[&body[..at], declared].concat());
                let opened = message.open(&cut);
                // Longer ones may be the message again, with other bytes in its payload.
                assert!(
                    opened.is_err() || cut.len() >= PRELUDE_BYTES + body.len(),
                    "{declared:x?} at {at} of {message:?}"
                );
                let replaced = around(message.kind(), &[&body[..at], declared, &body[at + 1..]].concat());
                let _ = message.open(&replaced);
            }
        }
        assert!(peak_bytes() < allowed, "opening changed forms of {message:?}");
    }
    // The same before anything is known to be ours.
    for declared in hostile {
        for prelude in [&[][..], &[0x94], &[0x94, WIRE_VERSION, 8, 0]] {
            assert!(open_as_each(&[prelude, declared].concat().into()).iter().all(Result::is_err));
        }
    }
    assert!(peak_bytes() < allowed);
}

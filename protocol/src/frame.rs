//! The envelope of every message and record.
//!
//! A frame is three msgpack values one after another: the **prelude** (an array of wire version,
//! kind, codec and checksum), the **header** (a struct of the kind), and the **payload** (a `bin`,
//! borrowed when decoded). The prelude has a fixed size and never changes shape, so a component of
//! any later wire version can still be told apart and answered. The checksum is XXH3 (64 bits)
//! over everything after the prelude.

use std::hash::Hasher as _;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::{ErrorCode, WireError};

/// Version of the wire format that this build speaks.
pub const WIRE_VERSION: u8 = 2;

/// Bytes of an encoded prelude: array marker, three small integers, `bin8` marker, length, checksum.
const PRELUDE_BYTES: usize = 1 + 3 + 2 + 8;

/// How a payload is encoded. The door for compression and quantisation: today only raw values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// Little-endian f32, or no payload.
    Raw = 0,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// [`crate::GradientHeader`] with one shard's values.
    Gradient = 1,
    /// [`crate::ResultHeader`] with one shard's parameters.
    Result = 2,
    /// [`crate::Reject`].
    Reject = 3,
    /// [`crate::StoreRequest`].
    StoreRequest = 4,
    /// [`crate::StoreReply`].
    StoreReply = 5,
    /// [`crate::ApiRequest`].
    ApiRequest = 6,
    /// [`crate::ApiReply`].
    ApiReply = 7,
    /// A record in the registry.
    Record = 8,
    /// A heartbeat of an invoker.
    Beat = 9,
    /// [`crate::Nudge`], in the work queue of a shard.
    Nudge = 10,
    /// [`crate::AgentBeat`].
    AgentBeat = 11,
    /// [`crate::AgentRequest`].
    AgentRequest = 12,
    /// [`crate::AgentReply`].
    AgentReply = 13,
    /// [`crate::TraceQuery`].
    TraceQuery = 16,
    /// [`crate::TraceReply`].
    TraceReply = 17,
    // 14 and 15 were handovers that could not keep a consumer.
    /// [`crate::Handover`], from one invoker to another.
    Handover = 18,
    /// [`crate::HandedOver`].
    HandedOver = 19,
}

#[derive(Serialize)]
struct Prelude(u8, u8, u8, #[serde(with = "serde_bytes")] [u8; 8]);

/// Why bytes are not a frame of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not msgpack of the expected shape, or bytes left over.
    #[error("malformed frame: {0}")]
    Malformed(String),
    /// The sender speaks another wire version.
    #[error(
        "the sender speaks wire version {theirs}, this component {ours}: run the same release on both sides"
    )]
    WireVersion {
        /// Version in the frame.
        theirs: u8,
        /// [`WIRE_VERSION`].
        ours: u8,
    },
    /// The bytes changed on the way.
    #[error("the frame's checksum does not match its bytes")]
    Checksum,
    /// A payload encoding this build does not know.
    #[error("unknown payload codec {0}")]
    Codec(u8),
}

impl FrameError {
    /// The wire error that tells a sender about it.
    #[must_use]
    pub fn to_wire(&self) -> WireError {
        let code = match self {
            Self::Malformed(_) | Self::Codec(_) => ErrorCode::Malformed,
            Self::WireVersion { .. } => ErrorCode::WireVersion,
            Self::Checksum => ErrorCode::BadChecksum,
        };
        WireError::new(code, self.to_string())
    }
}

/// XXH3 (64 bits), the checksum of frames and slots. Every byte of a gradient is summed up four times on its
/// way, so this is chosen for speed: three times that of a CRC-64 with carry-less multiplication.
#[must_use]
pub fn checksum(parts: &[&[u8]]) -> u64 {
    let mut hasher = twox_hash::xxhash3_64::Hasher::new();
    parts.iter().for_each(|part| hasher.write(part));
    hasher.finish()
}

/// Builds a frame whose payload is written in place, so that values are copied exactly once.
#[derive(Debug)]
pub struct FrameBuilder {
    bytes: Vec<u8>,
    kind: Kind,
    payload: usize,
}

impl FrameBuilder {
    /// Starts a frame with `header` and room for exactly `payload_len` bytes, zeroed.
    ///
    /// # Panics
    /// When `payload_len` is 4 GiB or more; limits keep payloads far below that.
    #[must_use]
    pub fn new<H: Serialize>(kind: Kind, header: &H, payload_len: usize) -> Self {
        Self::reusing(Vec::new(), kind, header, payload_len)
    }

    /// As [`Self::new`], in the memory of an earlier frame: the payload holds whatever was there, so the
    /// caller overwrites all of it. Fresh memory for every large frame is a fifth of a sender's time.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn reusing<H: Serialize>(bytes: Vec<u8>, kind: Kind, header: &H, payload_len: usize) -> Self {
        let mut builder = Self::begin(bytes, kind, header, payload_len);
        builder.bytes.resize(builder.payload + payload_len, 0);
        builder
    }

    /// Everything but the payload's bytes, and room for those; bytes behind the header may be left from before.
    fn begin<H: Serialize>(mut bytes: Vec<u8>, kind: Kind, header: &H, payload_len: usize) -> Self {
        let mut head = Vec::with_capacity(PRELUDE_BYTES + 256);
        head.resize(PRELUDE_BYTES, 0);
        encode(&mut head, header);
        let len = u32::try_from(payload_len).unwrap_or_else(|_| panic!("payload of {payload_len} bytes"));
        rmp::encode::write_bin_len(&mut head, len)
            .unwrap_or_else(|error| panic!("writing to memory: {error}"));
        let payload = head.len();
        if bytes.len() < payload {
            bytes.clear();
            bytes.reserve_exact(payload + payload_len);
            bytes.extend_from_slice(&head);
        } else {
            bytes[..payload].copy_from_slice(&head);
        }
        Self { bytes, kind, payload }
    }

    /// The payload's bytes, to be filled.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.payload..]
    }

    /// Computes the checksum and returns the frame.
    #[must_use]
    pub fn finish(mut self) -> Bytes {
        let sum = checksum(&[&self.bytes[PRELUDE_BYTES..]]);
        let mut prelude = Vec::with_capacity(PRELUDE_BYTES);
        encode(&mut prelude, &Prelude(WIRE_VERSION, self.kind as u8, Codec::Raw as u8, sum.to_be_bytes()));
        assert_eq!(prelude.len(), PRELUDE_BYTES, "the prelude's size is part of the format");
        self.bytes[..PRELUDE_BYTES].copy_from_slice(&prelude);
        Bytes::from(self.bytes)
    }
}

fn encode<T: Serialize>(bytes: &mut Vec<u8>, value: &T) {
    // Memory never refuses a write and our types never refuse to serialise.
    rmp_serde::encode::write(bytes, value).unwrap_or_else(|error| panic!("encoding to memory: {error}"));
}

/// A frame around `header` with a copy of `payload`.
#[must_use]
pub fn seal<H: Serialize>(kind: Kind, header: &H, payload: &[u8]) -> Bytes {
    let mut builder = FrameBuilder::begin(Vec::new(), kind, header, payload.len());
    builder.bytes.extend_from_slice(payload);
    builder.finish()
}

/// Reads a prelude of this wire version. The version is judged before anything behind it is read:
/// another one may have changed or appended fields.
fn read_prelude(rest: &mut &[u8]) -> Result<Prelude, FrameError> {
    let none = |error: &dyn std::fmt::Display| FrameError::Malformed(format!("no prelude: {error}"));
    let fields = rmp::decode::read_array_len(rest).map_err(|error| none(&error))?;
    let version = rmp::decode::read_int(rest).map_err(|error| none(&error))?;
    if version != WIRE_VERSION {
        return Err(FrameError::WireVersion { theirs: version, ours: WIRE_VERSION });
    }
    let kind = rmp::decode::read_int(rest).map_err(|error| none(&error))?;
    let codec = rmp::decode::read_int(rest).map_err(|error| none(&error))?;
    let sum = rmp::decode::read_bin_len(rest).map_err(|error| none(&error))?;
    match rest.split_first_chunk::<8>() {
        Some((bytes, body)) if fields == 4 && sum == 8 => {
            *rest = body;
            Ok(Prelude(version, kind, codec, *bytes))
        }
        _ => Err(none(&format!("{fields} fields, a checksum of {sum} bytes"))),
    }
}

/// Opens a frame of the given kind; the payload is a slice of `frame`, not a copy.
///
/// # Errors
/// [`FrameError`] for anything but an intact frame of this wire version and kind.
pub fn open<H: DeserializeOwned>(kind: Kind, frame: &Bytes) -> Result<(H, Bytes), FrameError> {
    let malformed = |what: String| FrameError::Malformed(what);
    let mut rest: &[u8] = frame;
    let prelude = read_prelude(&mut rest)?;
    if prelude.1 != kind as u8 {
        return Err(malformed(format!("kind {} where {} ({kind:?}) is expected", prelude.1, kind as u8)));
    }
    if prelude.2 != Codec::Raw as u8 {
        return Err(FrameError::Codec(prelude.2));
    }
    if checksum(&[rest]) != u64::from_be_bytes(prelude.3) {
        return Err(FrameError::Checksum);
    }
    let header: H = rmp_serde::decode::from_read(&mut rest)
        .map_err(|error| malformed(format!("bad {kind:?} header: {error}")))?;
    let len =
        rmp::decode::read_bin_len(&mut rest).map_err(|error| malformed(format!("no payload: {error}")))?;
    if rest.len() != len as usize {
        return Err(malformed(format!("payload of {} bytes declared as {len}", rest.len())));
    }
    Ok((header, frame.slice(frame.len() - rest.len()..)))
}

/// A frame without payload, for records and requests.
#[must_use]
pub fn seal_record<H: Serialize>(header: &H) -> Bytes {
    seal(Kind::Record, header, &[])
}

/// Opens a frame made by [`seal_record`].
///
/// # Errors
/// As [`open`].
pub fn open_record<H: DeserializeOwned>(frame: &Bytes) -> Result<H, FrameError> {
    open(Kind::Record, frame).map(|(header, _)| header)
}

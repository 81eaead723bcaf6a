//! Slots: self-describing copies of one shard's state (rule P23).
//!
//! A slot is a header area followed by the state. The header area holds a length and a frame with a
//! checksum of its own that covers the checksum of the state, so a torn slot never passes for a whole
//! one. Both areas start at multiples of 4 KiB.

use std::io;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thalweg_protocol::{
    Durability, Head, Incarnation, Ledger, ShardIndex, StoreJob, checksum, frame, limits,
};

use crate::disk::DiskFile;

/// Alignment of slots in the file.
pub(crate) const PAGE: usize = 4096;
/// Fixed part of an encoded header with room to spare; the ledger's bitmaps and its order come on top.
const FIXED_HEADER: usize = 512;

/// What a slot says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SlotHeader {
    pub(crate) job: Incarnation,
    pub(crate) shard: ShardIndex,
    /// Grows with every write of the shard: of two whole slots the higher is newer.
    pub(crate) generation: u64,
    /// Upload that version 0 came from; rounds keep it.
    pub(crate) origin: Option<Incarnation>,
    pub(crate) head: Head,
    pub(crate) ledger: Ledger,
    pub(crate) durability: Durability,
    pub(crate) state_bytes: u64,
    pub(crate) state_checksum: u64,
}

/// Sizes of the slots of one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotGeometry {
    pub(crate) header_area: usize,
    pub(crate) slot: u64,
}

impl SlotGeometry {
    pub(crate) fn of(job: &StoreJob) -> Self {
        let members = job.max_members as usize;
        let ledger = 2 * members.div_ceil(8) + limits::ORDERED_RANK_BYTES * members;
        let header_area = (FIXED_HEADER + ledger).next_multiple_of(PAGE);
        let state = job.state_bytes(0).next_multiple_of(PAGE);
        Self { header_area, slot: (header_area + state) as u64 }
    }
}

/// Writes a slot at `offset` in one call.
pub(crate) fn write(
    file: &dyn DiskFile,
    geometry: SlotGeometry,
    offset: u64,
    header: &impl Serialize,
    state: &[u8],
) -> io::Result<()> {
    let frame = frame::seal_record(header);
    let mut area = vec![0; geometry.header_area];
    let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    if frame.len() + 4 > area.len() {
        // Bounded by max_members, which the protocol limits; a longer ledger is a bug of ours.
        return Err(io::Error::other(format!("slot header of {} bytes", frame.len())));
    }
    area[..4].copy_from_slice(&len.to_be_bytes());
    area[4..4 + frame.len()].copy_from_slice(&frame);
    file.write_at(&[&area, state], offset)
}

/// Reads the header at `offset`; `None` where there is no whole one.
pub(crate) fn read_header<H: DeserializeOwned>(
    file: &dyn DiskFile,
    geometry: SlotGeometry,
    offset: u64,
) -> io::Result<Option<H>> {
    let mut area = vec![0; geometry.header_area];
    match file.read_at(&mut area, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let len = u32::from_be_bytes([area[0], area[1], area[2], area[3]]) as usize;
    if len == 0 || len + 4 > area.len() {
        return Ok(None);
    }
    Ok(frame::open_record(&Bytes::from(area).slice(4..4 + len)).ok())
}

/// Reads the state of a slot and checks it against the header; `None` when it is torn.
pub(crate) fn read_state(
    file: &dyn DiskFile,
    geometry: SlotGeometry,
    offset: u64,
    header: &SlotHeader,
) -> io::Result<Option<Bytes>> {
    read_body(file, geometry, offset, (header.state_bytes, header.state_checksum))
}

/// Reads what follows a header, by its length and checksum; `None` when it is torn.
pub(crate) fn read_body(
    file: &dyn DiskFile,
    geometry: SlotGeometry,
    offset: u64,
    (bytes, wanted): (u64, u64),
) -> io::Result<Option<Bytes>> {
    let Ok(len) = usize::try_from(bytes) else { return Ok(None) };
    if (len + geometry.header_area) as u64 > geometry.slot {
        return Ok(None);
    }
    let mut state = vec![0; len];
    match file.read_at(&mut state, offset + geometry.header_area as u64) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    Ok((checksum(&[&state]) == wanted).then(|| state.into()))
}

#[cfg(test)]
mod tests;

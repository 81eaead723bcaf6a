use std::sync::Mutex;

use proptest::prelude::*;
use thalweg_protocol::{Init, JobKey, Layout, Name};

use super::*;

/// One file in memory.
#[derive(Debug, Default)]
struct Memory(Mutex<Vec<u8>>);

impl DiskFile for Memory {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.0.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        bytes.copy_from_slice(content.get(start..start + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let (mut content, data) = (self.0.lock().unwrap(), parts.concat());
        let start = usize::try_from(offset).unwrap();
        let len = content.len().max(start + data.len());
        content.resize(len, 0);
        content[start..start + data.len()].copy_from_slice(&data);
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }
}

fn job(max_members: u32) -> StoreJob {
    let name = |text: &str| Name::new(text).unwrap();
    StoreJob {
        key: JobKey { tenant: name("tenant"), job: name("job") },
        incarnation: Incarnation([1; 16]),
        layout: Layout { elements: 100, shard_elements: 64 },
        slots: 0,
        durability: Durability::Process,
        max_members,
        init: Init::Zeros,
        first_version: 0,
    }
}

fn header(state: &[u8]) -> SlotHeader {
    let ledger = Ledger {
        round: 7,
        roster_epoch: 3,
        revision: 2,
        counted: [0, 1, 9].into_iter().collect(),
        void: [2].into_iter().collect(),
        below_quorum: false,
        order: Vec::new(),
    };
    let state_checksum = checksum(&[state]);
    SlotHeader {
        job: Incarnation([1; 16]),
        shard: 1,
        generation: 12,
        origin: Some(Incarnation([2; 16])),
        head: Head::initial([1; 16], 1, 5).next(&ledger, [3; 16], state_checksum),
        ledger,
        durability: Durability::Process,
        state_bytes: state.len() as u64,
        state_checksum,
    }
}

/// Reads a slot as the slab does: header, then state.
fn read(file: &Memory, geometry: SlotGeometry) -> Option<(SlotHeader, Bytes)> {
    let header = read_header(file, geometry, 0).unwrap()?;
    let state = read_state(file, geometry, 0, &header).unwrap()?;
    Some((header, state))
}

/// Slots of an earlier release must stay readable: whoever changes this changes the format.
#[test]
fn the_encoding_is_this_one() {
    let frame = frame::seal_record(&header(&[5; 144]));
    let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN);
}

const GOLDEN: &str = "94020800c408b2f95a5ea9f2ece699c41001010101010101010101010101010101010cc41002020202020202\
    020202020202020202930700c4104c7be947dbe06c735b80f43c6c297c0296070302c4020302c40104c2a77072\
    6f63657373cc90cf3f608cfa7c029368c400";

#[test]
fn any_changed_byte_is_noticed() {
    let geometry = SlotGeometry::of(&job(64));
    let (file, state) = (Memory::default(), [5; 144]);
    let written = header(&state);
    write(&file, geometry, 0, &written, &state).unwrap();
    let used = 4 + frame::seal_record(&written).len();
    let len = geometry.header_area + state.len();
    for at in (0..used).chain(geometry.header_area..len) {
        for flip in [0x01, 0x80, 0xff] {
            file.0.lock().unwrap()[at] ^= flip;
            assert_eq!(read(&file, geometry), None, "byte {at} changed by {flip:#x}");
            file.0.lock().unwrap()[at] ^= flip;
        }
    }
    for cut in 0..len {
        let short = Memory(Mutex::new(file.0.lock().unwrap()[..cut].to_vec()));
        assert_eq!(read(&short, geometry), None, "cut at {cut}");
    }
    assert_eq!(read(&file, geometry), Some((written, Bytes::copy_from_slice(&state))));
}

/// A write that a kill tore, over an older slot: old, new or nothing, never a mix.
#[test]
fn a_torn_overwrite_is_no_slot() {
    let geometry = SlotGeometry::of(&job(64));
    let (old_state, new_state) = ([5; 144], [6; 144]);
    let (old, new) = (header(&old_state), SlotHeader { generation: 13, ..header(&new_state) });
    let image = |header: &SlotHeader, state: &[u8]| {
        let file = Memory::default();
        write(&file, geometry, 0, header, state).unwrap();
        file.0.into_inner().unwrap()
    };
    let (before, after) = (image(&old, &old_state), image(&new, &new_state));
    for cut in 0..=after.len() {
        // Written from the front, and from the back.
        for torn in [[&after[..cut], &before[cut..]].concat(), [&before[..cut], &after[cut..]].concat()] {
            if torn == before || torn == after {
                continue;
            }
            let found = read(&Memory(Mutex::new(torn)), geometry);
            assert_eq!(found, None, "torn at {cut}");
        }
    }
}

#[test]
fn a_ledger_of_all_members_fits() {
    for max_members in [1, 64, 1024, thalweg_protocol::limits::MAX_MEMBERS] {
        let geometry = SlotGeometry::of(&job(max_members));
        let mut largest = header(&[0; 256]);
        largest.ledger.counted = (0..max_members).collect();
        largest.ledger.void = (0..max_members).collect();
        (largest.ledger.round, largest.ledger.roster_epoch, largest.ledger.revision) =
            (u64::MAX, u64::MAX, u32::MAX);
        (largest.generation, largest.shard, largest.head.version) = (u64::MAX, u32::MAX, u64::MAX);
        let file = Memory::default();
        write(&file, geometry, 0, &largest, &[0; 256]).unwrap();
        assert_eq!(read(&file, geometry).unwrap().0, largest);
        assert!(geometry.slot.is_multiple_of(PAGE as u64) && geometry.header_area.is_multiple_of(PAGE));
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        generation: u64, shard: u32, round: u64, epoch: u64, revision: u32, fold_count: u32, id: [u8; 16],
        origin: Option<[u8; 16]>, disk: bool, below_quorum: bool,
        counted in prop::collection::vec(0..64_u32, 0..20), void in prop::collection::vec(0..64_u32, 0..20),
        state in prop::collection::vec(any::<u8>(), 0..256),
    ) {
        let geometry = SlotGeometry::of(&job(64));
        let mut written = header(&state);
        written.head = Head { version: round, fold_count, state_id: thalweg_protocol::StateId(id) };
        written.ledger = Ledger {
            round, roster_epoch: epoch, revision, counted: counted.into_iter().collect(),
            void: void.into_iter().collect(), below_quorum, order: Vec::new(),
        };
        written.durability = if disk { Durability::Disk } else { Durability::Process };
        (written.generation, written.shard, written.origin) = (generation, shard, origin.map(Incarnation));
        let file = Memory::default();
        write(&file, geometry, 0, &written, &state).unwrap();
        prop_assert_eq!(read(&file, geometry), Some((written, Bytes::from(state))));
    }
}

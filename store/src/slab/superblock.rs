//! What a slab file says about its job, so that nothing else has to know it.

use std::io;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thalweg_protocol::{FrameError, Incarnation, StoreJob, frame};

use crate::{disk::DiskFile, rules::Fences, slot::PAGE};

/// Bytes before the first slot: two copies, of which the older one is overwritten.
pub(super) const SUPERBLOCKS: u64 = 2 * SUPERBLOCK as u64;
const SUPERBLOCK: usize = 2 * PAGE;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Superblock {
    generation: u64,
    pub(super) job: StoreJob,
    pub(super) active: Option<Incarnation>,
    pub(super) fences: Fences,
    /// Why the job must not go on (rule P27).
    pub(super) lost: Option<String>,
}

impl Superblock {
    pub(super) fn new(job: StoreJob) -> Self {
        Self { generation: 0, job, active: None, fences: Fences::default(), lost: None }
    }

    /// The newer of the whole copies.
    ///
    /// # Errors
    /// Of kind `Unsupported` when there is none but of another wire version: such a file is no garbage.
    pub(super) fn read(file: &dyn DiskFile) -> io::Result<Option<Self>> {
        let copies = (0..2_u64).filter_map(|copy| {
            let mut area = vec![0; SUPERBLOCK];
            file.read_at(&mut area, copy * SUPERBLOCK as u64).ok()?;
            let len = u32::from_be_bytes([area[0], area[1], area[2], area[3]]) as usize;
            let end = len.checked_add(4).filter(|&end| len > 0 && end <= area.len())?;
            Some(frame::open_record::<Self>(&Bytes::from(area).slice(4..end)))
        });
        let (mut newest, mut foreign) = (None::<Self>, None);
        for copy in copies {
            match copy {
                Ok(copy) if newest.as_ref().is_none_or(|newest| newest.generation < copy.generation) => {
                    newest = Some(copy);
                }
                Err(error @ FrameError::WireVersion { .. }) => foreign = Some(error),
                _ => {}
            }
        }
        match (newest, foreign) {
            (None, Some(error)) => Err(io::Error::new(io::ErrorKind::Unsupported, error)),
            (newest, _) => Ok(newest),
        }
    }

    pub(super) fn write(&mut self, file: &dyn DiskFile) -> io::Result<()> {
        self.generation += 1;
        let frame = frame::seal_record(self);
        let mut area = vec![0; SUPERBLOCK];
        if frame.len() + 4 > area.len() {
            return Err(io::Error::other(format!("superblock of {} bytes", frame.len())));
        }
        area[..4].copy_from_slice(&u32::try_from(frame.len()).unwrap_or(u32::MAX).to_be_bytes());
        area[4..4 + frame.len()].copy_from_slice(&frame);
        file.write_at(&[&area], (self.generation % 2) * SUPERBLOCK as u64)
    }
}

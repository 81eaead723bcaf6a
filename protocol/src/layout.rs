//! How a model's tensors become shards.

use std::ops::Range;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::{Incarnation, Partition, ShardIndex, TensorSpec};

/// Split of a flattened parameter vector into equal shards (the last one may be shorter).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Elements of the whole model, at least 1.
    #[serde(deserialize_with = "at_least_one")]
    pub elements: u64,
    /// Elements of every shard but the last, at least 1.
    #[serde(deserialize_with = "at_least_one")]
    pub shard_elements: u32,
}

/// A layout that divides by zero must not arrive.
fn at_least_one<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default + PartialEq>(
    deserializer: D,
) -> Result<T, D::Error> {
    let value = T::deserialize(deserializer)?;
    if value == T::default() { Err(D::Error::custom("a layout has at least one element")) } else { Ok(value) }
}

impl Layout {
    /// Number of shards.
    #[must_use]
    pub fn shards(&self) -> ShardIndex {
        // Bounded by limits::MAX_SHARDS when the specification was validated.
        u32::try_from(self.elements.div_ceil(u64::from(self.shard_elements))).unwrap_or(u32::MAX)
    }

    /// Elements of the flattened vector that shard `shard` holds.
    #[must_use]
    pub fn range(&self, shard: ShardIndex) -> Range<u64> {
        let start = u64::from(shard) * u64::from(self.shard_elements);
        start..(start + u64::from(self.shard_elements)).min(self.elements)
    }

    /// Elements of one shard.
    #[must_use]
    pub fn len(&self, shard: ShardIndex) -> usize {
        let range = self.range(shard);
        range.end.saturating_sub(range.start) as usize
    }

    /// A layout has at least one element; here for completeness beside [`Self::len`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// The shards that hold any element of `range` (not empty).
    #[must_use]
    pub fn shards_of(&self, range: &Range<u64>) -> Range<ShardIndex> {
        let per_shard = u64::from(self.shard_elements);
        let first = u32::try_from(range.start / per_shard).unwrap_or(u32::MAX);
        let last = u32::try_from((range.end - 1) / per_shard).unwrap_or(u32::MAX);
        first..last + 1
    }
}

/// Start of each tensor in the flattened vector, and at the end the number of all elements.
#[must_use]
pub fn offsets(tensors: &[TensorSpec]) -> Vec<u64> {
    let mut offsets = Vec::with_capacity(tensors.len() + 1);
    let mut next = 0;
    for tensor in tensors {
        offsets.push(next);
        next += tensor.elements().unwrap_or(0);
    }
    offsets.push(next);
    offsets
}

/// The partition that serves a shard: consecutive shards on consecutive partitions, each job
/// starting elsewhere, so that one model spreads and many small ones do too.
#[must_use]
pub fn partition_of(job: Incarnation, shard: ShardIndex, partitions: Partition) -> Partition {
    let start =
        u64::from_be_bytes([job.0[0], job.0[1], job.0[2], job.0[3], job.0[4], job.0[5], job.0[6], job.0[7]]);
    let index = (start % u64::from(partitions) + u64::from(shard)) % u64::from(partitions);
    // A remainder of a u16 modulus fits u16.
    index as Partition
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_every_element_once() {
        for (elements, shard_elements) in [(1_u64, 1_u32), (1, 64), (9610, 1024), (4096, 1024), (4097, 1024)]
        {
            let layout = Layout { elements, shard_elements };
            let mut next = 0;
            for shard in 0..layout.shards() {
                assert_eq!(layout.range(shard).start, next);
                assert!(layout.len(shard) > 0);
                next = layout.range(shard).end;
            }
            assert_eq!(next, elements);
            assert_eq!(layout.shards_of(&(0..elements)), 0..layout.shards());
        }
    }

    #[test]
    fn consecutive_shards_take_consecutive_partitions() {
        let job = Incarnation([0xff; 16]);
        let partitions: std::collections::HashSet<_> =
            (0..32).map(|shard| partition_of(job, shard, 32)).collect();
        assert_eq!(partitions.len(), 32);
        assert_eq!(partition_of(job, 5, 32), partition_of(job, 37, 32));
    }
}

//! Element-wise loops over little-endian f32 bytes.
//!
//! Every loop treats each element by itself with one rounding per written operation, so LLVM may
//! vectorise it without changing a bit; nothing here may use `mul_add`, sum across elements or ask
//! what the CPU can do. The one thing IEEE 754 leaves open is which NaN an operation returns:
//! [`encode`] makes all of them the same.

use thalweg_protocol::Rank;

use crate::Contribution;

/// The only NaN a function writes: quiet, positive, without payload.
const CANONICAL_NAN: u32 = 0x7fc0_0000;

/// Elements written at a time: 4 KiB, so that staging them never leaves the L1 cache.
pub(super) const BLOCK: usize = 1024;

/// One block of output, before it is appended.
pub(super) type Block = [[u8; 4]; BLOCK];

/// `value` as result bytes; any NaN becomes the canonical one.
pub(super) fn encode(value: f32) -> [u8; 4] {
    let bits = if value.is_nan() { CANONICAL_NAN } else { value.to_bits() };
    bits.to_le_bytes()
}

/// The elements of `bytes`, whose length is a multiple of 4.
pub(super) fn elements(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks::<4>().0
}

/// Appends `map` of every value to `out`.
pub(super) fn append(out: &mut Vec<u8>, values: &[f32], map: impl Fn(f32) -> f32) {
    let mut block: Block = [[0; 4]; BLOCK];
    for values in values.chunks(BLOCK) {
        let bytes = &mut block[..values.len()];
        for (bytes, &value) in bytes.iter_mut().zip(values) {
            *bytes = encode(map(value));
        }
        out.extend_from_slice(bytes.as_flattened());
    }
}

/// Contributions added up in rank order, as f32.
pub(super) struct Accumulator {
    elements: usize,
    sums: Vec<f32>,
    accepted: u32,
    last: Option<Rank>,
}

impl Accumulator {
    /// Nothing added yet.
    pub(super) fn new(elements: usize) -> Self {
        Self { elements, sums: Vec::new(), accepted: 0, last: None }
    }

    /// Number of contributions added.
    pub(super) fn accepted(&self) -> u32 {
        self.accepted
    }

    /// The sums; empty when nothing was added.
    pub(super) fn sums(&mut self) -> &mut [f32] {
        &mut self.sums
    }

    /// Adds `map` of every value of `contribution`. The first is copied rather than added to zero:
    /// that keeps -0.0 and saves a pass.
    ///
    /// # Panics
    /// When the contribution has the wrong length, or its rank is not above all ranks before.
    pub(super) fn add(&mut self, contribution: &Contribution<'_>, map: impl Fn(f32) -> f32) {
        let Contribution { rank, values, .. } = *contribution;
        assert!(
            values.len() == 4 * self.elements,
            "contribution of rank {rank} has {} bytes; a shard of {} elements takes {}",
            values.len(),
            self.elements,
            4 * self.elements,
        );
        if let Some(last) = self.last {
            assert!(
                rank > last,
                "rank {rank} after rank {last}; contributions must come in ascending rank order"
            );
        }
        self.last = Some(rank);
        let values = elements(values).iter().map(|&bytes| map(f32::from_le_bytes(bytes)));
        if self.accepted == 0 {
            self.sums = values.collect();
        } else {
            for (sum, value) in self.sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
        self.accepted += 1;
    }
}

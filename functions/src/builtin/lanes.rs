//! Element-wise loops over little-endian f32 bytes.
//!
//! Every loop treats each element by itself with one rounding per written operation, so LLVM may
//! vectorise it without changing a bit; nothing here may use `mul_add`, sum across elements or ask
//! what the CPU can do. The one thing IEEE 754 leaves open is which NaN an operation returns:
//! [`encode`] makes all of them the same.

/// The only NaN a function writes: quiet, positive, without payload.
const CANONICAL_NAN: u32 = 0x7fc0_0000;

/// Elements written at a time: 4 KiB, so that staging them never leaves the L1 cache.
const BLOCK: usize = 1024;

/// One block of output, before it is appended.
type Block = [[u8; 4]; BLOCK];

/// `value` as result bytes; any NaN becomes the canonical one.
pub(super) fn encode(value: f32) -> [u8; 4] {
    let bits = if value.is_nan() { CANONICAL_NAN } else { value.to_bits() };
    bits.to_le_bytes()
}

/// The elements of `bytes`, whose length is a multiple of 4.
pub(super) fn elements(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks::<4>().0
}

/// The values of one segment, little-endian.
pub(super) type Lane<'a> = &'a [[u8; 4]];

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

/// Appends `next` of every element of a segment to `out`: it is given the element's sum, in whose place it may leave
/// what a later pass needs, and its value in each of `lanes`, which are as long as `sums`.
pub(super) fn append_next<const N: usize>(
    out: &mut Vec<u8>,
    sums: &mut [f32],
    lanes: [Lane<'_>; N],
    next: impl Fn(&mut f32, [f32; N]) -> f32,
) {
    let mut block: Block = [[0; 4]; BLOCK];
    for (index, sums) in sums.chunks_mut(BLOCK).enumerate() {
        // Cut to the same length, so that the compiler sees that no index is out of bounds.
        let lanes = lanes.map(|lane| &lane[index * BLOCK..][..sums.len()]);
        let bytes = &mut block[..sums.len()];
        for (element, (bytes, sum)) in bytes.iter_mut().zip(sums).enumerate() {
            *bytes = encode(next(sum, lanes.map(|lane| f32::from_le_bytes(lane[element]))));
        }
        out.extend_from_slice(bytes.as_flattened());
    }
}

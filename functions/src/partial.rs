//! Why a suspended fold may be refused.

/// Most contributions that one fold accepts, suspended or not. Their number is exact as f32 (up to 2^24), which is
/// what means are divided by.
pub const MAX_CONTRIBUTIONS: u32 = 1 << 20;

/// Why bytes are not a partial fold of this function and shard. Every message says what would be accepted.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum InvalidPartial {
    /// Written by another release.
    #[error("partial fold of layout {layout}; this release reads layout 1")]
    Layout {
        /// The first byte.
        layout: u8,
    },
    /// Another number of bytes than the header and the shard ask for.
    #[error("partial fold of {bytes} bytes; it must have {accepted}")]
    Length {
        /// Bytes given.
        bytes: usize,
        /// Bytes that would be accepted (that far at least, where the header itself is cut).
        accepted: usize,
    },
    /// A function that adds something else wrote it.
    #[error(
        "partial fold of terms {tag:?}; this function reads [{accepted}, 0, 0] \
         (0 for sums of values, 1 for sums of weight * value)"
    )]
    Terms {
        /// Bytes 1 to 3.
        tag: [u8; 3],
        /// The first of them that would be accepted, before two zeros.
        accepted: u8,
    },
    /// Of another shard.
    #[error("partial fold of {elements} elements; the shard has {accepted}")]
    Elements {
        /// Elements it says it has.
        elements: u64,
        /// Elements of the shard.
        accepted: usize,
    },
    /// More contributions than a fold accepts.
    #[error("partial fold of {contributions} contributions; at most {MAX_CONTRIBUTIONS}")]
    Contributions {
        /// The number it says it has.
        contributions: u32,
    },
    /// No fold adds weights up to this.
    #[error(
        "partial fold with a sum of weights of {weights:?}; \
         it must be finite and not negative, and 0 where nothing is weighted"
    )]
    Weights {
        /// The sum it says it has.
        weights: f64,
    },
}

//! The sum of a round's contributions, and its form as bytes when the fold is suspended.
//!
//! Layout 1, little-endian:
//!
//! ```text
//! byte 0     layout: 1
//! byte 1     what was added: 0 values, 1 weight * value
//! byte 2     two zeros
//! byte 4     u32 number of contributions, at most MAX_CONTRIBUTIONS
//! byte 8     f64 sum of weights, finite and not negative; 0 where byte 1 is 0
//! byte 16    u64 elements of the shard
//! byte 24    f32 sum of each element; not there when the number of contributions is 0
//! ```
//!
//! Sums are written bit for bit, but a NaN always as 0x7fc00000: so these bytes, too, are the same on every CPU.

use super::lanes::{append, elements};
use crate::{Contribution, InvalidPartial, MAX_CONTRIBUTIONS};

const LAYOUT: u8 = 1;
/// Bytes before the sums.
const HEADER: usize = 24;

/// What is added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Terms {
    /// The values.
    Values = 0,
    /// The product of weight and value.
    Weighted = 1,
}

/// Contributions added up in the order given, as f32.
pub(super) struct Accumulator {
    terms: Terms,
    elements: usize,
    sums: Vec<f32>,
    accepted: u32,
    /// In f64, so that many small weights after a large one still count.
    weights: f64,
}

impl Accumulator {
    /// Nothing added yet.
    pub(super) fn new(terms: Terms, elements: usize) -> Self {
        Self { terms, elements, sums: Vec::new(), accepted: 0, weights: 0.0 }
    }

    /// Most bytes that [`Accumulator::suspend`] writes.
    pub(super) fn partial_bytes(elements: usize) -> usize {
        HEADER + 4 * elements
    }

    /// Elements of the shard.
    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    /// Number of contributions added; exact as f32, since it is at most `MAX_CONTRIBUTIONS`.
    pub(super) fn accepted(&self) -> u32 {
        self.accepted
    }

    /// Sum of the weights; 0 when values are added as they are.
    pub(super) fn weights(&self) -> f64 {
        self.weights
    }

    /// The sums; empty when nothing was added.
    pub(super) fn sums(&mut self) -> &mut [f32] {
        &mut self.sums
    }

    /// Adds every value of `contribution`, or its product with the weight.
    ///
    /// # Panics
    /// When the contribution has the wrong length, or `MAX_CONTRIBUTIONS` were added already.
    pub(super) fn add(&mut self, contribution: &Contribution<'_>) {
        let Contribution { rank, weight, values } = *contribution;
        assert!(
            values.len() == 4 * self.elements,
            "contribution of rank {rank} has {} bytes; a shard of {} elements takes {}",
            values.len(),
            self.elements,
            4 * self.elements,
        );
        assert!(
            self.accepted < MAX_CONTRIBUTIONS,
            "contribution of rank {rank} is one too many; a round has at most {MAX_CONTRIBUTIONS}",
        );
        match self.terms {
            Terms::Values => self.add_values(values, |value| value),
            Terms::Weighted => {
                self.add_values(values, |value| weight * value);
                self.weights += f64::from(weight);
            }
        }
        self.accepted += 1;
    }

    /// The first is copied rather than added to zero: that keeps -0.0 and saves a pass.
    fn add_values(&mut self, values: &[u8], map: impl Fn(f32) -> f32) {
        let values = elements(values).iter().map(|&bytes| map(f32::from_le_bytes(bytes)));
        if self.accepted == 0 {
            self.sums = values.collect();
        } else {
            for (sum, value) in self.sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
    }

    /// Appends the accumulator's bytes to `out`.
    pub(super) fn suspend(&self, out: &mut Vec<u8>) {
        out.reserve(HEADER + 4 * self.sums.len());
        out.extend_from_slice(&[LAYOUT, self.terms as u8, 0, 0]);
        out.extend_from_slice(&self.accepted.to_le_bytes());
        out.extend_from_slice(&self.weights.to_le_bytes());
        out.extend_from_slice(&(self.elements as u64).to_le_bytes());
        append(out, &self.sums, |sum| sum);
    }

    /// The accumulator that [`Accumulator::suspend`] wrote.
    pub(super) fn resume(terms: Terms, elements: usize, partial: &[u8]) -> Result<Self, InvalidPartial> {
        let Some((header, sums)) = partial.split_first_chunk::<HEADER>() else {
            return Err(InvalidPartial::Length { bytes: partial.len(), accepted: HEADER });
        };
        if header[0] != LAYOUT {
            return Err(InvalidPartial::Layout { layout: header[0] });
        }
        if header[1] != terms as u8 || header[2..4] != [0, 0] {
            return Err(InvalidPartial::Terms {
                tag: [header[1], header[2], header[3]],
                accepted: terms as u8,
            });
        }
        let accepted = u32::from_le_bytes(field(header, 4));
        let weights = f64::from_le_bytes(field(header, 8));
        let theirs = u64::from_le_bytes(field(header, 16));
        if theirs != elements as u64 {
            return Err(InvalidPartial::Elements { elements: theirs, accepted: elements });
        }
        if accepted > MAX_CONTRIBUTIONS {
            return Err(InvalidPartial::Contributions { contributions: accepted });
        }
        let weighs = terms == Terms::Weighted && accepted > 0;
        if !(weights.is_finite() && weights >= 0.0 && (weighs || weights == 0.0)) {
            return Err(InvalidPartial::Weights { weights });
        }
        let bytes = if accepted == 0 { HEADER } else { Self::partial_bytes(elements) };
        if partial.len() != bytes {
            return Err(InvalidPartial::Length { bytes: partial.len(), accepted: bytes });
        }
        let sums = self::elements(sums).iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        Ok(Self { terms, elements, sums, accepted, weights })
    }
}

/// `N` bytes of the header from `at` on.
fn field<const N: usize>(header: &[u8; HEADER], at: usize) -> [u8; N] {
    std::array::from_fn(|index| header[at + index])
}

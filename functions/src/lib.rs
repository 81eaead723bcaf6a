//! Aggregation functions: pure maths over slices, and the trait they share.
//!
//! A function turns the state of one shard and the contributions of one round into the shard's
//! next state. It sees contributions one at a time in rank order, so a round never has to fit in
//! memory at once, and it does no I/O, reads no clock and draws no random numbers: the same
//! contributions give the same bits on every invoker (invariant I5).
//!
//! The state of a shard of `n` elements is `n` parameters followed by `slots` optimizer slots of
//! `n` elements each, little-endian f32.
//!
//! The built-in functions compute in f32, one rounding per operation, contributions strictly in
//! rank order. A NaN they compute is always written as 0x7fc00000: which NaN an operation returns
//! is up to the CPU. A state that stays unchanged is copied bit for bit, NaNs included.

mod builtin;
mod settings;

use std::ops::Range;

use thalweg_protocol::{FunctionSpec, Rank};

pub use settings::InvalidSettings;

/// Identity of a function's code and arithmetic; part of every state id (rule P5).
pub type Digest = [u8; 16];

/// One shard as a function sees it.
#[derive(Clone, Debug)]
pub struct ShardContext<'a> {
    /// Elements in the shard.
    pub elements: usize,
    /// Parameter groups that touch the shard: (range of the shard's elements, index into
    /// `FunctionSpec::groups`), ascending and disjoint. Elements outside every range use the
    /// function's own settings.
    pub groups: &'a [(Range<usize>, usize)],
}

/// One worker's non-void contribution to a round.
#[derive(Clone, Copy, Debug)]
pub struct Contribution<'a> {
    /// Who contributed.
    pub rank: Rank,
    /// Its weight; only `weighted_mean` looks at it. Finite and >= 0 (checked by the caller).
    pub weight: f32,
    /// `4 * elements` bytes of little-endian f32, at any alignment.
    pub values: &'a [u8],
}

/// How a function treats non-finite values unless the job says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The result is a pure combination of the round's contributions (`sum`, `mean`).
    Reduction,
    /// The state carries parameters that contributions update (`sgd`).
    Optimizer,
}

/// A function with its settings, ready to fold any shard of a job. Cheap to share.
pub trait AggregationFunction: Send + Sync + std::fmt::Debug {
    /// Identity of code and arithmetic, without settings (those have a revision of their own).
    fn digest(&self) -> Digest;

    /// Optimizer slots beside the parameters: the state is `(1 + slots) * elements` values.
    fn slots(&self) -> usize;

    /// Whether the function updates parameters or only combines contributions.
    fn kind(&self) -> Kind;

    /// Starts folding one round of one shard.
    ///
    /// `state` is the current state, `(1 + slots) * elements` f32 little endian. A
    /// [`Kind::Reduction`] ignores it unless nothing is accepted (or weights sum to zero), and may
    /// be given an empty slice when the caller knows that at least one contribution follows.
    ///
    /// # Panics
    /// When `state` has another length, or `shard.groups` are not ascending, disjoint, inside the
    /// shard and known to the function.
    fn begin<'a>(&'a self, shard: ShardContext<'a>, state: &'a [u8]) -> Box<dyn Fold + 'a>;
}

/// The fold of one round of one shard in progress.
pub trait Fold {
    /// Adds the next contribution. Call in ascending rank order, and never for a void one.
    ///
    /// # Panics
    /// When `contribution.values` is not `4 * elements` bytes (callers check shapes first), or
    /// `contribution.rank` is not above every rank accepted before.
    fn accept(&mut self, contribution: Contribution<'_>);

    /// Writes the next state, `4 * (1 + slots) * elements` bytes, to the end of `out`.
    ///
    /// With no contribution accepted (or weights that sum to zero) the state is unchanged.
    ///
    /// # Panics
    /// When the state has to stay unchanged but `begin` was given an empty slice.
    fn finish(self: Box<Self>, out: &mut Vec<u8>);
}

/// Looks a built-in function up and checks its settings, those of all groups included.
///
/// # Errors
/// [`InvalidSettings`] names the function or the setting and what would be accepted.
pub fn resolve(spec: &FunctionSpec) -> Result<Box<dyn AggregationFunction>, InvalidSettings> {
    builtin::resolve(spec)
}

/// Index of the first NaN or infinity in little-endian f32 `values`, for the policies of rule P8.
#[must_use]
pub fn first_non_finite(values: &[u8]) -> Option<usize> {
    let (chunks, _) = values.as_chunks::<4>();
    // Block-wise so that the common case (all finite) vectorises: no early exit inside a block.
    const BLOCK: usize = 4096;
    for (block, chunk) in chunks.chunks(BLOCK).enumerate() {
        let any = chunk.iter().fold(false, |any, &bytes| any | !f32::from_le_bytes(bytes).is_finite());
        if any {
            let inside = chunk.iter().position(|&bytes| !f32::from_le_bytes(bytes).is_finite());
            return inside.map(|index| block * BLOCK + index);
        }
    }
    None
}

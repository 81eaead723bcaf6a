//! Aggregation functions: pure maths over slices, and the trait they share.
//!
//! A function turns the state of one shard and the contributions of one round into the shard's
//! next state. It sees contributions one at a time, so a round never has to fit in memory at once,
//! and it does no I/O, reads no clock and draws no random numbers: the same contributions in the
//! same order give the same bits on every invoker (invariant I5). The order is the caller's affair
//! (by rank, or as recorded on arrival); another one may give other bits.
//!
//! A fold need not be done in one go: suspended between two contributions, it is a few bytes more
//! than the shard, and whoever resumes it gets the bits of an uninterrupted one. Until it finishes
//! it does not look at the state.
//!
//! The state of a shard of `n` elements is `n` parameters followed by `slots` optimizer slots of
//! `n` elements each, little-endian f32. Slots start at zero.
//!
//! The built-in functions compute elements in f32, one rounding per operation, and add
//! contributions strictly in the order given. A NaN they compute is always written as 0x7fc00000:
//! which NaN an operation returns is up to the CPU. A state that stays unchanged is copied bit for
//! bit, NaNs included.

mod builtin;
mod describe;
mod partial;
mod schedule;
mod settings;

use std::ops::Range;

use thalweg_protocol::{FunctionSpec, Rank, Round};

pub use describe::{Description, describe};
pub use partial::{InvalidPartial, MAX_CONTRIBUTIONS};
pub use settings::{Accepts, InvalidSettings, Known, Range as Accepted};

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
    /// The round being folded; the first is 1. Schedules and the corrections of `adam` go by it.
    pub round: Round,
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
    /// The state carries parameters that contributions update (`sgd`, `adam`).
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

    /// Most bytes that a suspended fold of a shard of `elements` elements takes.
    fn partial_bytes(&self, elements: usize) -> usize;

    /// Starts folding one round of one shard.
    ///
    /// # Panics
    /// Of a [`Kind::Optimizer`], when `shard.groups` are not ascending, disjoint, inside the shard and known to the
    /// function, or `shard.round` is 0.
    fn begin<'a>(&'a self, shard: ShardContext<'a>) -> Box<dyn Fold + 'a>;

    /// Goes on with a fold that was suspended. What is accepted from here on, and the end, give the bits of a fold
    /// that was never suspended.
    ///
    /// `partial` says how many contributions are in it and of how many elements, but not of which job, shard or
    /// round: to bring the right one is up to the caller. Settings may differ, since only the end of a fold uses them.
    ///
    /// # Errors
    /// [`InvalidPartial`] when `partial` is no partial fold of a function that adds the same, and of so many elements.
    ///
    /// # Panics
    /// As [`AggregationFunction::begin`].
    fn resume<'a>(
        &'a self,
        shard: ShardContext<'a>,
        partial: &[u8],
    ) -> Result<Box<dyn Fold + 'a>, InvalidPartial>;
}

/// The fold of one round of one shard in progress.
pub trait Fold {
    /// Adds the next contribution. The bits of the result depend on the order. Never call it for a void one.
    ///
    /// # Panics
    /// When `contribution.values` is not `4 * elements` bytes (callers check shapes first), or
    /// [`MAX_CONTRIBUTIONS`] were accepted before.
    fn accept(&mut self, contribution: Contribution<'_>);

    /// Whether [`Fold::finish`] would look at the state: always that of a [`Kind::Optimizer`], that of a
    /// [`Kind::Reduction`] only while nothing is accepted (or weights sum to zero).
    fn needs_state(&self) -> bool;

    /// Writes the fold as it stands to the end of `out`, at most [`AggregationFunction::partial_bytes`], for
    /// [`AggregationFunction::resume`]. The same contributions in the same order give the same bytes.
    fn suspend(self: Box<Self>, out: &mut Vec<u8>);

    /// Writes the next state, `4 * (1 + slots) * elements` bytes, to the end of `out`.
    ///
    /// `state` is the current state, `(1 + slots) * elements` f32 little endian; it may be empty when
    /// [`Fold::needs_state`] says no. With no contribution accepted (or weights that sum to zero) the state is
    /// unchanged.
    ///
    /// # Panics
    /// When `state` has another length, or is empty but needed.
    fn finish(self: Box<Self>, state: &[u8], out: &mut Vec<u8>);
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

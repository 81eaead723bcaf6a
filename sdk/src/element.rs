//! Numbers that a training loop may hold its tensors in.

use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A type of number that [`Worker::push`](crate::Worker::push) reads and [`Worker::pull`](crate::Worker::pull)
/// writes: `f32`, and the two halves. What travels and what is folded is f32, so the halves lose nothing on the way
/// in; a result is rounded to them once, to nearest even.
pub trait Element: sealed::Sealed + Copy + Send + Sync {
    /// The number itself.
    fn to_f32(self) -> f32;
    /// The nearest number of this type.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    fn to_f32(self) -> f32 {
        self.into()
    }

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for bf16 {
    fn to_f32(self) -> f32 {
        self.into()
    }

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

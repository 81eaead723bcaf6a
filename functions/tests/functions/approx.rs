//! Numbers to compute references with.

use crate::common::UNIT_ROUNDOFF;

/// A number that references are written over: f32 for the bits, [`Approx`] for how far they may be off.
pub(crate) trait Real: Copy {
    /// `value` rounded once.
    fn of(value: f64) -> Self;
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn over(self, other: Self) -> Self;
    fn sqrt(self) -> Self;
    /// -1, 0 or 1.
    fn sign(self) -> Self;

    fn minus(self, other: Self) -> Self {
        self.plus(other.times(Self::of(-1.0)))
    }
}

impl Real for f32 {
    fn of(value: f64) -> Self {
        value as Self
    }

    fn plus(self, other: Self) -> Self {
        self + other
    }

    fn times(self, other: Self) -> Self {
        self * other
    }

    fn over(self, other: Self) -> Self {
        self / other
    }

    fn sqrt(self) -> Self {
        self.sqrt()
    }

    fn sign(self) -> Self {
        if self == 0.0 { 0.0 } else { self.signum() }
    }
}

/// What exact arithmetic gives (in f64, whose own errors are far smaller), and how far f32 arithmetic with one
/// rounding per operation may be from it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Approx {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

impl Approx {
    /// No rounding at all.
    pub(crate) fn exact(value: f32) -> Self {
        Self { value: f64::from(value), error: 0.0 }
    }

    /// Whether `value` may be what f32 arithmetic gives.
    pub(crate) fn allows(self, value: f32) -> bool {
        (f64::from(value) - self.value).abs() <= self.error
    }

    /// The result of an operation whose operands are off by enough to move it by `error`. Rounding it adds its share;
    /// the constants cover the reference's own errors and the subnormal range.
    fn rounded(value: f64, error: f64) -> Self {
        Self { value, error: error + 1.001 * UNIT_ROUNDOFF * (value.abs() + error) + 1e-44 }
    }
}

impl Real for Approx {
    fn of(value: f64) -> Self {
        Self::rounded(value, 0.0)
    }

    fn plus(self, other: Self) -> Self {
        Self::rounded(self.value + other.value, self.error + other.error)
    }

    fn minus(self, other: Self) -> Self {
        Self::rounded(self.value - other.value, self.error + other.error)
    }

    fn times(self, other: Self) -> Self {
        let error =
            self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error;
        Self::rounded(self.value * other.value, error)
    }

    fn over(self, other: Self) -> Self {
        let value = self.value / other.value;
        let least = other.value.abs() - other.error;
        let error =
            if least > 0.0 { (self.error + value.abs() * other.error) / least } else { f64::INFINITY };
        Self::rounded(value, error)
    }

    fn sqrt(self) -> Self {
        let value = self.value.sqrt();
        let error = if self.error < self.value {
            value - (self.value - self.error).sqrt()
        } else {
            (self.value + self.error).sqrt()
        };
        Self::rounded(value, error)
    }

    fn sign(self) -> Self {
        if self.error == 0.0 && self.value == 0.0 {
            return self;
        }
        // Where f32 may be on the other side of 0, any sign is right.
        let error = if self.error < self.value.abs() { 0.0 } else { 2.0 };
        Self { value: self.value.signum(), error }
    }
}

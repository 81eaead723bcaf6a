//! Gradients whose aggregate is known exactly: small integers that depend on rank, round and element.

use anyhow::bail;
use clap::ValueEnum;
use thalweg_protocol::FunctionSpec;

/// Learning rate of `sgd`: a power of two, so that its parameters stay exact too.
const LEARNING_RATE: f32 = 1.0 / 128.0;

/// The aggregation function that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Function {
    Sum,
    Mean,
    Sgd,
}

impl Function {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Mean => "mean",
            Self::Sgd => "sgd",
        }
    }

    pub(super) fn spec(self) -> FunctionSpec {
        let spec = FunctionSpec::named(self.name());
        if self == Self::Sgd { spec.number("lr", f64::from(LEARNING_RATE)) } else { spec }
    }
}

/// An odd number in -127..=127, scrambled so that no shift or swap of elements or rounds goes unseen.
pub(super) fn base(element: u32, round: u32) -> f32 {
    let seed = element.wrapping_add(round.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    let scrambled = (seed ^ (seed >> 15)).wrapping_mul(0xc2b2_ae35);
    f32::from((scrambled >> 24) as u8 as i8 | 1)
}

/// Elements `first..` of a rank's gradient.
pub(super) fn fill(values: &mut [f32], first: usize, round: u32, rank: u32) {
    let factor = (rank + 1) as f32;
    for (offset, value) in values.iter_mut().enumerate() {
        *value = base((first + offset) as u32, round) * factor;
    }
}

/// Compares elements `first..` of a sum over all ranks.
pub(super) fn check_sum(values: &[f32], first: usize, round: u32, workers: u32) -> anyhow::Result<()> {
    let factor = (workers * (workers + 1) / 2) as f32;
    let expected = |offset: usize| base((first + offset) as u32, round) * factor;
    // Without an early end, so that it is vectorised.
    let wrong = values.iter().enumerate().filter(|(offset, value)| **value != expected(*offset)).count();
    if wrong > 0 {
        bail!("round {round}: {wrong} of {} sums from element {first} on are wrong", values.len());
    }
    Ok(())
}

/// What all rounds must come to, for every function.
pub(super) struct Expectation {
    function: Function,
    workers: u32,
    /// Of `sgd`.
    parameters: Vec<f32>,
}

impl Expectation {
    pub(super) fn new(function: Function, workers: u32, elements: usize) -> Self {
        let kept = if function == Function::Sgd { elements } else { 0 };
        Self { function, workers, parameters: vec![0.0; kept] }
    }

    /// Checks a round's results. Every round must come by once, in order.
    pub(super) fn check(&mut self, values: &[f32], round: u32) -> anyhow::Result<()> {
        if self.function == Function::Sum {
            return check_sum(values, 0, round, self.workers);
        }
        let mean = |element: usize| base(element as u32, round) * ((self.workers + 1) as f32 / 2.0);
        for (element, parameter) in self.parameters.iter_mut().enumerate() {
            *parameter -= LEARNING_RATE * mean(element);
        }
        let wrong = values.iter().enumerate().filter(|(element, value)| {
            let expected = self.parameters.get(*element).copied().unwrap_or_else(|| mean(*element));
            // Exact for 2^n workers; a mean over others is rounded.
            let rounded = if self.workers.is_power_of_two() { 0.0 } else { 1e-5 };
            let equal = (**value - expected).abs() <= rounded * expected.abs().max(1.0);
            !equal
        });
        match wrong.count() {
            0 => Ok(()),
            wrong => bail!("round {round}: {wrong} of {} elements are wrong", values.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_sum_is_seen() {
        let (workers, first, round) = (3, 1000, 7);
        let mut sum = vec![0.0; 5000];
        for rank in 0..workers {
            let mut values = vec![0.0; sum.len()];
            fill(&mut values, first, round, rank);
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        check_sum(&sum, first, round, workers).unwrap();
        assert!(check_sum(&sum, first + 1, round, workers).is_err());
        assert!(check_sum(&sum, first, round + 1, workers).is_err());
        sum[4321] += 1.0;
        assert!(check_sum(&sum, first, round, workers).is_err());
    }
}

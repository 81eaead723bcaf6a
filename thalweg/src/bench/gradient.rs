//! Which tensors a worker pushes.

use std::{fmt, str::FromStr, time::Duration};

use crate::models::{Model, Tensor};
use clap::ValueEnum as _;

/// The gradient of a benchmark's job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Gradient {
    /// That many elements, in tensors of so many; the last may be smaller.
    Even { elements: u64, tensor_elements: u64 },
    /// That of a model, so many times as large.
    Of { model: Model, scale: f64 },
}

impl Gradient {
    /// So many MiB of f32, in tensors of 4 MiB.
    pub(super) fn of_mib(mib: f64) -> Self {
        let elements = ((mib * f64::from(1 << 18)).round() as u64).max(1);
        Self::Even { elements, tensor_elements: 1 << 20 }
    }

    /// Its tensors in order.
    pub(super) fn tensors(self) -> Vec<Tensor> {
        match self {
            Self::Even { elements, tensor_elements } => {
                let starts = (0..elements).step_by(tensor_elements as usize).enumerate();
                let tensor = |(index, start): (usize, u64)| Tensor {
                    name: format!("t{index}"),
                    shape: vec![tensor_elements.min(elements - start)],
                };
                starts.map(tensor).collect()
            }
            Self::Of { model, scale } => model.scaled(scale).tensors,
        }
    }

    /// Elements of all its tensors.
    pub(super) fn elements(self) -> usize {
        match self {
            Self::Even { elements, .. } => elements as usize,
            Self::Of { model, scale } => model.scaled(scale).elements() as usize,
        }
    }

    /// What one GPU takes for it; nothing where it is of no model.
    pub(super) fn think_time(self) -> Duration {
        match self {
            Self::Even { .. } => Duration::ZERO,
            Self::Of { model, scale } => model.scaled(scale).think_time,
        }
    }

    /// Bytes of f32.
    pub(super) fn bytes(self) -> u64 {
        self.elements() as u64 * 4
    }
}

/// As [`FromStr`] reads it, for the command lines of workers.
impl fmt::Display for Gradient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Even { elements, tensor_elements } => write!(f, "even:{elements}:{tensor_elements}"),
            Self::Of { model, scale } => write!(f, "{}:{scale:?}", model.name()),
        }
    }
}

impl FromStr for Gradient {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no gradient: `even:<elements>:<per tensor>` or `<model>:<scale>`");
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        if kind == "even" {
            let (elements, tensor_elements) = rest.split_once(':').ok_or_else(bad)?;
            let number = |text: &str| text.parse::<u64>().ok().filter(|number| *number > 0).ok_or_else(bad);
            return Ok(Self::Even { elements: number(elements)?, tensor_elements: number(tensor_elements)? });
        }
        let model = Model::from_str(kind, false).map_err(|_| bad())?;
        Ok(Self::Of { model, scale: scale(rest).map_err(|_| bad())? })
    }
}

/// A scale as a flag gives it.
pub(super) fn scale(text: &str) -> Result<f64, String> {
    let scale = text.parse::<f64>().ok().filter(|scale| *scale > 0.0 && *scale <= 1.0);
    scale.ok_or_else(|| "expected a number above 0 and up to 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_carry_gradients() {
        for gradient in [
            Gradient::Even { elements: 2_500_000, tensor_elements: 1 << 20 },
            Gradient::Of { model: Model::BertBase, scale: 0.037 },
        ] {
            assert_eq!(gradient.to_string().parse(), Ok(gradient));
            let elements: u64 = gradient.tensors().iter().map(Tensor::elements).sum();
            assert_eq!(elements as usize, gradient.elements());
        }
        for bad in ["", "even:0:1", "even:5", "alexnet", "alexnet:0", "alexnet:1.5", "lenet:1", "vgg19:NaN"] {
            assert!(bad.parse::<Gradient>().is_err(), "{bad}");
        }
    }
}

//! The model the demo trains: a perceptron with one hidden layer, 64 inputs, 128 hidden units, 10 classes.
//!
//! Parameters and gradients are flat `f32` vectors, the tensors of [`TENSORS`] one after another, because that is the
//! form in which they travel. Nothing here knows about workers except [`batch`], which deals out the samples.

use super::digits::{CLASSES, Digits, PIXELS, SplitMix64};

const HIDDEN: usize = 128;

/// Number of parameters, the length of every flat parameter or gradient vector.
pub(crate) const PARAMETERS: usize = HIDDEN * PIXELS + HIDDEN + CLASSES * HIDDEN + CLASSES;

/// Name and shape of each tensor, in the order in which they lie in a flat vector; each is row-major.
pub(crate) const TENSORS: [(&str, &[usize]); 4] = [
    ("hidden.weight", &[HIDDEN, PIXELS]),
    ("hidden.bias", &[HIDDEN]),
    ("output.weight", &[CLASSES, HIDDEN]),
    ("output.bias", &[CLASSES]),
];

/// Fresh parameters that depend on `seed` alone: weights He-uniform (within `sqrt(6 / inputs)`), biases zero.
pub(crate) fn init(seed: u64) -> Vec<f32> {
    let mut generator = SplitMix64::new(seed);
    let mut params = Vec::with_capacity(PARAMETERS);
    for (_, shape) in TENSORS {
        let length = shape.iter().product();
        match shape {
            [_, inputs] => {
                let bound = (6.0 / *inputs as f32).sqrt();
                params.extend((0..length).map(|_| bound * generator.next_signed_unit()));
            }
            _ => params.extend(std::iter::repeat_n(0.0, length)),
        }
    }
    params
}

/// The samples of one worker's batch in one round, as indices taken from `train`.
///
/// The batches of all ranks, in rank order, are the global batch of the round, and the global batches in round order go
/// through one seeded permutation of `train` after another. So an epoch shows every sample once, and how many workers
/// share a global batch does not change what is in it. A batch that spans two epochs may hold a sample twice.
///
/// # Panics
/// If `rank` is not below `workers` or `train` is empty.
pub(crate) fn batch(
    train: &[usize],
    seed: u64,
    round: u64,
    workers: usize,
    rank: usize,
    batch_per_worker: usize,
) -> Vec<usize> {
    assert!(rank < workers, "rank {rank} of {workers} workers");
    assert!(!train.is_empty(), "no training samples");
    let epoch_length = train.len() as u64;
    let start = round * (workers * batch_per_worker) as u64 + (rank * batch_per_worker) as u64;
    let mut indices = Vec::with_capacity(batch_per_worker);
    let mut epoch = start / epoch_length;
    let mut offset = (start % epoch_length) as usize;
    while indices.len() < batch_per_worker {
        let mut order = train.to_vec();
        SplitMix64::with_stream(seed, epoch).shuffle(&mut order);
        indices.extend(order[offset..].iter().take(batch_per_worker - indices.len()));
        (epoch, offset) = (epoch + 1, 0);
    }
    indices
}

/// Mean cross-entropy over the samples `batch` of `data`, and its gradient in the layout of `params`.
///
/// The mean over workers of equal batches is therefore the gradient of the global batch, up to rounding.
///
/// # Panics
/// If `params` does not have [`PARAMETERS`] elements, `batch` is empty or an index is out of range.
pub(crate) fn gradient(params: &[f32], batch: &[usize], data: &Digits) -> (f32, Vec<f32>) {
    assert!(!batch.is_empty(), "the mean over no samples is undefined");
    let layers = Layers::of(params);
    let mut sum = vec![0.0; PARAMETERS];
    let mut loss = 0.0;
    for &sample in batch {
        loss += add_gradient(&layers, &data.images[sample], data.labels[sample], &mut sum);
    }
    let scale = 1.0 / batch.len() as f32;
    sum.iter_mut().for_each(|element| *element *= scale);
    (loss * scale, sum)
}

/// Share of the samples `indices` of `data` that the model classifies correctly, 0 to 1.
///
/// # Panics
/// As [`gradient`].
pub(crate) fn accuracy(params: &[f32], data: &Digits, indices: &[usize]) -> f32 {
    assert!(!indices.is_empty(), "the accuracy over no samples is undefined");
    let layers = Layers::of(params);
    let correct = indices.iter().filter(|&&sample| {
        let (_, logits) = layers.forward(&data.images[sample]);
        let own = usize::from(data.labels[sample]);
        // Written so that a logit that is not a number counts as wrong.
        (0..CLASSES).all(|class| class == own || logits[class] < logits[own])
    });
    correct.count() as f32 / indices.len() as f32
}

/// A flat parameter vector seen as the tensors it consists of.
struct Layers<'a> {
    hidden_weight: &'a [f32],
    hidden_bias: &'a [f32],
    output_weight: &'a [f32],
    output_bias: &'a [f32],
}

impl<'a> Layers<'a> {
    fn of(params: &'a [f32]) -> Self {
        assert_eq!(params.len(), PARAMETERS, "length of the parameter vector");
        let (hidden_weight, rest) = params.split_at(HIDDEN * PIXELS);
        let (hidden_bias, rest) = rest.split_at(HIDDEN);
        let (output_weight, output_bias) = rest.split_at(CLASSES * HIDDEN);
        Self { hidden_weight, hidden_bias, output_weight, output_bias }
    }

    /// Activations of the hidden layer (after the ReLU) and the logits.
    fn forward(&self, image: &[f32; PIXELS]) -> ([f32; HIDDEN], [f32; CLASSES]) {
        let mut hidden = [0.0; HIDDEN];
        for (unit, row) in self.hidden_weight.chunks_exact(PIXELS).enumerate() {
            hidden[unit] = (dot(row, image) + self.hidden_bias[unit]).max(0.0);
        }
        let mut logits = [0.0; CLASSES];
        for (class, row) in self.output_weight.chunks_exact(HIDDEN).enumerate() {
            logits[class] = dot(row, &hidden) + self.output_bias[class];
        }
        (hidden, logits)
    }
}

/// Adds one sample's gradient to `sum` and returns its loss.
fn add_gradient(layers: &Layers<'_>, image: &[f32; PIXELS], label: u8, sum: &mut [f32]) -> f32 {
    let (hidden, logits) = layers.forward(image);
    let (loss, logit_gradient) = cross_entropy(&logits, usize::from(label));

    let (hidden_weight, rest) = sum.split_at_mut(HIDDEN * PIXELS);
    let (hidden_bias, rest) = rest.split_at_mut(HIDDEN);
    let (output_weight, output_bias) = rest.split_at_mut(CLASSES * HIDDEN);

    let mut hidden_gradient = [0.0; HIDDEN];
    for (class, &error) in logit_gradient.iter().enumerate() {
        let row = class * HIDDEN..(class + 1) * HIDDEN;
        output_bias[class] += error;
        add_scaled(&mut output_weight[row.clone()], error, &hidden);
        add_scaled(&mut hidden_gradient, error, &layers.output_weight[row]);
    }
    for (unit, row) in hidden_weight.chunks_exact_mut(PIXELS).enumerate() {
        // A unit the ReLU cut off passes no gradient.
        if hidden[unit] > 0.0 {
            hidden_bias[unit] += hidden_gradient[unit];
            add_scaled(row, hidden_gradient[unit], image);
        }
    }
    loss
}

/// Cross-entropy of the softmax of `logits` against `label`, and its gradient with respect to the logits.
fn cross_entropy(logits: &[f32; CLASSES], label: usize) -> (f32, [f32; CLASSES]) {
    // Shifting by the largest logit changes nothing in the result and keeps exp() from overflowing.
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut softmax = logits.map(|logit| (logit - largest).exp());
    let total: f32 = softmax.iter().sum();
    let loss = total.ln() - (logits[label] - largest);
    softmax.iter_mut().for_each(|share| *share /= total);
    softmax[label] -= 1.0;
    (loss, softmax)
}

/// Dot product; the eight partial sums let the compiler use vector instructions, which one running sum forbids.
fn dot(left: &[f32], right: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (left, left_rest) = left.as_chunks::<8>();
    let (right, right_rest) = right.as_chunks::<8>();
    debug_assert!(left_rest.is_empty() && right_rest.is_empty(), "layer sizes are multiples of 8");
    for (left, right) in left.iter().zip(right) {
        for lane in 0..8 {
            lanes[lane] += left[lane] * right[lane];
        }
    }
    lanes.iter().sum()
}

fn add_scaled(target: &mut [f32], factor: f32, addend: &[f32]) {
    target.iter_mut().zip(addend).for_each(|(target, addend)| *target += factor * addend);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 1;

    fn range_of(tensor: &str) -> std::ops::Range<usize> {
        let mut start = 0;
        for (name, shape) in TENSORS {
            let end = start + shape.iter().product::<usize>();
            if name == tensor {
                return start..end;
            }
            start = end;
        }
        panic!("no tensor {tensor}");
    }

    #[test]
    fn tensors_cover_the_flat_vector() {
        assert_eq!(range_of("output.bias").end, PARAMETERS);
        assert_eq!(init(SEED).len(), PARAMETERS);
        assert_eq!(PARAMETERS, 9610);
    }

    #[test]
    fn init_is_seeded_and_bounded() {
        let params = init(SEED);
        assert_eq!(params, init(SEED));
        assert_ne!(params, init(SEED + 1));
        let bound = (6.0_f32 / 64.0).sqrt();
        assert!(params[range_of("hidden.weight")].iter().all(|weight| weight.abs() <= bound));
        assert!(params[range_of("hidden.bias")].iter().all(|bias| *bias == 0.0));
    }

    #[test]
    fn gradient_agrees_with_finite_differences() {
        let data = Digits::load().unwrap();
        let samples: Vec<usize> = (0..16).collect();
        let mut params = init(SEED);
        // Biases off zero, so that their gradients are tested at a point that is not special.
        let mut generator = SplitMix64::new(99);
        params.iter_mut().for_each(|param| *param += 0.05 * generator.next_signed_unit());
        let (_, analytic) = gradient(&params, &samples, &data);

        // Which hidden units the ReLU lets through: where that changes within the step, the loss has a kink and a
        // finite difference says nothing.
        let active = |params: &[f32]| -> Vec<bool> {
            let layers = Layers::of(params);
            samples
                .iter()
                .flat_map(|&sample| layers.forward(&data.images[sample]).0)
                .map(|h| h > 0.0)
                .collect()
        };

        let step = 2e-3;
        for (name, _) in TENSORS {
            let range = range_of(name);
            let stride = (range.len() / 97).max(1);
            let (mut checked, mut kinks) = (0, 0);
            for index in range.step_by(stride) {
                let (mut above, mut below) = (params.clone(), params.clone());
                above[index] += step;
                below[index] -= step;
                if active(&above) != active(&below) {
                    kinks += 1;
                    continue;
                }
                let numeric = (gradient(&above, &samples, &data).0 - gradient(&below, &samples, &data).0)
                    / (2.0 * step);
                let difference = (numeric - analytic[index]).abs();
                let allowed = 5e-4 + 0.01 * analytic[index].abs();
                assert!(difference < allowed, "{name}[{index}]: {numeric} against {}", analytic[index]);
                checked += u32::from(analytic[index].abs() > 4.0 * allowed);
            }
            // Gradients within the tolerance of zero prove nothing, so enough others must have been compared.
            assert!(checked >= 8 && kinks <= 20, "{name}: {checked} telling comparisons, {kinks} at kinks");
        }
    }

    #[test]
    fn mean_of_worker_gradients_is_the_gradient_of_the_global_batch() {
        let data = Digits::load().unwrap();
        let train = data.split(SEED).train;
        let params = init(SEED);
        let (loss, whole) = gradient(&params, &batch(&train, SEED, 3, 1, 0, 128), &data);
        let parts: Vec<_> =
            (0..4).map(|rank| gradient(&params, &batch(&train, SEED, 3, 4, rank, 32), &data)).collect();
        let mean_loss = parts.iter().map(|(loss, _)| loss / 4.0).sum::<f32>();
        assert!((loss - mean_loss).abs() < 1e-5);
        for (index, expected) in whole.iter().enumerate() {
            let mean = parts.iter().map(|(_, part)| part[index] / 4.0).sum::<f32>();
            assert!((mean - expected).abs() < 1e-6, "element {index}: {mean} against {expected}");
        }
    }

    #[test]
    fn global_batch_does_not_depend_on_the_number_of_workers() {
        let train: Vec<usize> = (100..1537).collect();
        for round in [0, 10, 11, 12, 1_000_000] {
            let alone = batch(&train, SEED, round, 1, 0, 128);
            for workers in [2, 4, 8] {
                let parts: Vec<usize> = (0..workers)
                    .flat_map(|rank| batch(&train, SEED, round, workers, rank, 128 / workers))
                    .collect();
                assert_eq!(parts, alone, "round {round}, {workers} workers");
            }
        }
    }

    #[test]
    fn every_epoch_shows_every_sample_once_in_its_own_order() {
        let train: Vec<usize> = (0..30).collect();
        let rounds: Vec<usize> = (0..15).flat_map(|round| batch(&train, SEED, round, 2, 1, 2)).collect();
        assert_eq!(rounds.len(), 30);
        // 4 samples a round do not divide 30: epochs begin in the middle of a round.
        let stream: Vec<usize> = (0..15).flat_map(|round| batch(&train, SEED, round, 1, 0, 4)).collect();
        let (first, second) = stream.split_at(30);
        assert_ne!(first, second);
        for epoch in [first, second] {
            let mut seen = epoch.to_vec();
            seen.sort_unstable();
            assert_eq!(seen, train);
        }
        assert_ne!(first, &batch(&train, SEED + 1, 0, 1, 0, 30)[..]);
        // A batch larger than the data goes through several epochs.
        assert_eq!(batch(&train, SEED, 0, 1, 0, 60), stream);
    }

    #[test]
    fn extreme_logits_give_a_finite_loss() {
        let mut logits = [0.0; CLASSES];
        logits[3] = 1e4;
        let (right, _) = cross_entropy(&logits, 3);
        let (wrong, slope) = cross_entropy(&logits, 4);
        assert_eq!(right, 0.0);
        assert!((wrong - 1e4).abs() < 1.0);
        assert_eq!((slope[3], slope[4]), (1.0, -1.0));
    }

    /// Test accuracy after training in one process by SGD with momentum, as PyTorch defines it.
    fn train(seed: u64, rate: f32, momentum: f32, rounds: u64) -> f32 {
        let data = Digits::load().unwrap();
        let split = data.split(seed);
        let mut params = init(seed);
        let mut velocity = vec![0.0; PARAMETERS];
        for round in 0..rounds {
            let (_, slope) = gradient(&params, &batch(&split.train, seed, round, 1, 0, 128), &data);
            for ((param, velocity), slope) in params.iter_mut().zip(&mut velocity).zip(slope) {
                *velocity = momentum * *velocity + slope;
                *param -= rate * *velocity;
            }
        }
        accuracy(&params, &data, &split.test)
    }

    #[test]
    fn sgd_learns_the_digits() {
        let reached = train(SEED, 0.2, 0.9, 300);
        assert!(reached >= 0.96, "test accuracy {reached}");
    }
}

//! The handwritten digits the demo trains on, and the seeded shuffles that decide who sees which of them.
//!
//! Every worker process reads the same embedded file and derives the same order from the same seed, so the workers
//! agree on the data without exchanging a byte about it. `thalweg/data/README.md` gives source and licence.

use anyhow::{Context, Result, ensure};

/// Pixels of one image: 8 by 8, row-major.
pub(crate) const PIXELS: usize = 64;
/// Number of classes, the digits 0 to 9.
pub(crate) const CLASSES: usize = 10;
/// Images held back to measure accuracy; the remaining 1,437 are trained on.
pub(crate) const TEST_IMAGES: usize = 360;

const CSV: &str = include_str!("../../data/digits.csv");
/// Brightest value a pixel has in the file.
const WHITE: u8 = 16;

/// All images with their labels, in the order of the file.
pub(crate) struct Digits {
    /// Pixels scaled to 0..=1.
    pub(crate) images: Vec<[f32; PIXELS]>,
    /// The digit each image shows, below [`CLASSES`].
    pub(crate) labels: Vec<u8>,
}

/// Which images to train on and which to test on, as indices into [`Digits`]. No image is in both.
pub(crate) struct Split {
    /// Indices of the training images.
    pub(crate) train: Vec<usize>,
    /// Indices of the [`TEST_IMAGES`] test images.
    pub(crate) test: Vec<usize>,
}

impl Digits {
    /// Parses the data embedded in the binary.
    ///
    /// # Errors
    /// Fails, naming the line, if the embedded file is malformed. That is a mistake of whoever built the binary.
    pub(crate) fn load() -> Result<Self> {
        Self::parse(CSV)
    }

    /// Splits the images into training and test set by a shuffle that depends on `seed` alone.
    pub(crate) fn split(&self, seed: u64) -> Split {
        let mut test: Vec<usize> = (0..self.labels.len()).collect();
        SplitMix64::new(seed).shuffle(&mut test);
        let train = test.split_off(TEST_IMAGES.min(test.len()));
        Split { train, test }
    }

    fn parse(csv: &str) -> Result<Self> {
        let mut digits = Self { images: Vec::new(), labels: Vec::new() };
        for (number, line) in (1..).zip(csv.lines()) {
            let (image, label) = parse_line(line).with_context(|| format!("digits.csv, line {number}"))?;
            digits.images.push(image);
            digits.labels.push(label);
        }
        Ok(digits)
    }
}

fn parse_line(line: &str) -> Result<([f32; PIXELS], u8)> {
    let mut image = [0.0; PIXELS];
    let mut fields = line.split(',');
    for (pixel, slot) in image.iter_mut().enumerate() {
        let field = fields.next().with_context(|| format!("only {pixel} of {PIXELS} pixels"))?;
        let value: u8 = field.parse().with_context(|| format!("pixel {pixel} is {field:?}"))?;
        ensure!(value <= WHITE, "pixel {pixel} is {value}, above {WHITE}");
        *slot = f32::from(value) / f32::from(WHITE);
    }
    let field = fields.next().context("no label")?;
    let label: u8 = field.parse().with_context(|| format!("the label is {field:?}"))?;
    ensure!(usize::from(label) < CLASSES, "the label is {label}, not a digit");
    ensure!(fields.next().is_none(), "fields after the label");
    Ok((image, label))
}

/// Steele, Lea and Flood's SplitMix64 generator (OOPSLA 2014): a counter passed through a mixing function.
///
/// The demo has its own because a shuffle must come out the same in every worker and every release, which random-number
/// crates do not promise across versions. Not for secrets.
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator whose whole sequence is determined by `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator for one of many independent uses of the same seed, such as one epoch.
    pub(crate) fn with_stream(seed: u64, stream: u64) -> Self {
        // The outer draw separates streams; seeding with `seed + stream` would make neighbouring seeds share streams.
        let mut outer = Self::new(seed);
        Self::new(outer.next_u64() ^ Self::new(stream).next_u64())
    }

    /// The next 64 random bits.
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number drawn uniformly from -1 (included) to 1 (excluded).
    pub(crate) fn next_signed_unit(&mut self) -> f32 {
        // 24 bits: as many as an f32 holds exactly, so that no draw rounds up to 1.
        let bits = (self.next_u64() >> 40) as f32;
        bits / (1_u32 << 23) as f32 - 1.0
    }

    /// Shuffles `items` in place (Fisher-Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            // The high half of a 128-bit product maps 64 random bits to 0..=last without a division.
            let product = u128::from(self.next_u64()) * (last as u128 + 1);
            items.swap(last, (product >> 64) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_data_is_complete() {
        let digits = Digits::load().unwrap();
        assert_eq!(digits.images.len(), 1797);
        assert_eq!(digits.labels.len(), 1797);
        assert_eq!(digits.images[0][2], 5.0 / 16.0);
        assert!(digits.images.iter().flatten().all(|pixel| (0.0..=1.0).contains(pixel)));
        for class in 0..10 {
            let count = digits.labels.iter().filter(|label| **label == class).count();
            assert!((174..=183).contains(&count), "{count} images of class {class}");
        }
    }

    #[test]
    fn malformed_lines_are_refused_by_number() {
        let good = format!("{}7", "0,".repeat(PIXELS));
        let cases = [
            ("0,1".to_owned(), "only 2 of 64 pixels"),
            (good.replacen('0', "17", 1), "pixel 0 is 17"),
            (good.replacen('0', "x", 1), "pixel 0 is \"x\""),
            (good.replace('7', "10"), "the label is 10"),
            (good.clone() + ",1", "fields after the label"),
            (good.trim_end_matches(",7").to_owned(), "no label"),
        ];
        for (bad, reason) in cases {
            let error = Digits::parse(&format!("{good}\n{bad}\n")).err().unwrap();
            let message = format!("{error:#}");
            assert!(message.contains("line 2") && message.contains(reason), "{message}");
        }
    }

    #[test]
    fn split_is_a_partition_and_depends_on_the_seed_alone() {
        let digits = Digits::load().unwrap();
        let split = digits.split(7);
        assert_eq!((split.train.len(), split.test.len()), (1437, 360));
        let mut all = [split.train.clone(), split.test.clone()].concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..1797));
        assert_eq!(split.train, digits.split(7).train);
        assert_ne!(split.test, digits.split(8).test);
    }

    #[test]
    fn generator_matches_the_published_sequence() {
        // First outputs of the reference implementation by Sebastiano Vigna for seed 1234567.
        let mut generator = SplitMix64::new(1_234_567);
        let drawn: Vec<u64> = (0..3).map(|_| generator.next_u64()).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn uniform_draws_stay_in_range_and_spread() {
        let mut generator = SplitMix64::new(3);
        let drawn: Vec<f32> = (0..10_000).map(|_| generator.next_signed_unit()).collect();
        assert!(drawn.iter().all(|value| (-1.0..1.0).contains(value)));
        let mean = drawn.iter().sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.03, "mean {mean}");
    }
}

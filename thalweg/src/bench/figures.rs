//! What figures of several runs come to.

/// 0 without values.
pub(super) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (count, sum) = values.into_iter().fold((0_u32, 0.0), |(count, sum), value| (count + 1, sum + value));
    sum / f64::from(count.max(1))
}

/// Half the width of the 95 % confidence interval of the mean, by Student's t.
pub(super) fn confidence(values: &[f64]) -> f64 {
    // For 1 to 10 degrees of freedom; beyond, the last one is a little too wide.
    const T: [f64; 10] = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];
    let (count, mean) = (values.len(), mean(values.iter().copied()));
    if count < 2 {
        return f64::NAN;
    }
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (squares / (count - 1) as f64).sqrt();
    T[(count - 2).min(T.len() - 1)] * deviation / (count as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confidence_is_that_of_students_t() {
        assert!((confidence(&[1.0, 3.0]) - 12.71).abs() < 1e-9);
        assert!((confidence(&[5.0; 7])).abs() < 1e-9);
        assert!(confidence(&[1.0]).is_nan());
    }
}

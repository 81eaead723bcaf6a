//! What a policy cost, and what it cost the jobs.

/// Ratios of periods are counted in classes of a thousandth, up to this one.
const LARGEST_RATIO: f64 = 64.0;
const CLASSES_PER_UNIT: f64 = 1000.0;
/// A change of direction within this time of the last one is a flap, milliseconds.
const FLAP_MS: f64 = 60_000.0;

/// Something per minute.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// Sum over each minute of what there was, in units times seconds.
    pub minutes: Vec<f64>,
}

impl Timeline {
    /// Adds `amount` from one moment to another, milliseconds.
    pub fn add(&mut self, from_ms: f64, to_ms: f64, amount: f64) {
        let mut at = from_ms;
        while at < to_ms {
            let minute = (at / 60_000.0).floor();
            let end = ((minute + 1.0) * 60_000.0).min(to_ms);
            let index = minute.max(0.0) as usize;
            if index >= self.minutes.len() {
                self.minutes.resize(index + 1, 0.0);
            }
            self.minutes[index] += amount * (end - at) / 1000.0;
            at = end;
        }
    }

    /// Share of the minutes in which there is anything in `other` where this is not more than that.
    #[must_use]
    pub fn share_not_above(&self, other: &Self) -> f64 {
        let (mut all, mut below) = (0.0, 0.0);
        for (index, theirs) in other.minutes.iter().enumerate().filter(|(_, theirs)| **theirs > 0.0) {
            let own = self.minutes.get(index).copied().unwrap_or(0.0);
            all += 1.0;
            below += f64::from(u8::from(own <= *theirs * (1.0 + 1e-9)));
        }
        if all > 0.0 { below / all } else { 1.0 }
    }
}

/// One run of one policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// From the request for an invoker to its end, summed.
    pub invoker_seconds: f64,
    /// Invokers by minute, those that are starting or stopping included.
    pub timeline: Timeline,
    /// Slowdown of every job that ended at least one round, by its place in the trace.
    pub slowdowns: Vec<(usize, f64)>,
    /// Changes of the number of invokers.
    pub scale_events: u64,
    /// Changes of direction within a minute.
    pub flaps: u64,
    /// Rounds by how many times as long they were as alone, in classes.
    ratios: Vec<f64>,
    last_change: Option<(f64, bool)>,
}

impl Default for Score {
    fn default() -> Self {
        Self {
            invoker_seconds: 0.0,
            timeline: Timeline::default(),
            slowdowns: Vec::new(),
            scale_events: 0,
            flaps: 0,
            ratios: vec![0.0; (LARGEST_RATIO * CLASSES_PER_UNIT) as usize + 1],
            last_change: None,
        }
    }
}

impl Score {
    /// That of jobs which all have what they asked for.
    #[must_use]
    pub fn undisturbed(invoker_seconds: f64, timeline: Timeline, jobs: usize) -> Self {
        let slowdowns = (0..jobs).map(|index| (index, 0.0)).collect();
        let mut score = Self { invoker_seconds, timeline, slowdowns, ..Self::default() };
        score.rounds(1.0, jobs as f64);
        score
    }

    /// What came after `earlier`, a shorter run of the same: invoker-seconds and rounds only.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let ratios = self.ratios.iter().zip(&earlier.ratios).map(|(all, before)| all - before).collect();
        Self { invoker_seconds: self.invoker_seconds - earlier.invoker_seconds, ratios, ..Self::default() }
    }

    /// Counts invokers from one moment to another, milliseconds.
    pub(super) fn invokers(&mut self, from_ms: f64, to_ms: f64, invokers: f64) {
        self.invoker_seconds += invokers * (to_ms - from_ms) / 1000.0;
        if invokers > 0.0 {
            self.timeline.add(from_ms, to_ms, invokers);
        }
    }

    /// Counts rounds that took `ratio` times as long as alone.
    pub(super) fn rounds(&mut self, ratio: f64, rounds: f64) {
        let class = (ratio * CLASSES_PER_UNIT).clamp(0.0, LARGEST_RATIO * CLASSES_PER_UNIT);
        self.ratios[class as usize] += rounds;
    }

    /// Counts a change of the target.
    pub(super) fn changed(&mut self, at_ms: f64, before: usize, after: usize) {
        let up = after > before;
        self.scale_events += 1;
        if self.last_change.is_some_and(|(last, was_up)| was_up != up && at_ms - last <= FLAP_MS) {
            self.flaps += 1;
        }
        self.last_change = Some((at_ms, up));
    }

    /// The period over the period alone that this share of all rounds does not exceed, to a thousandth.
    #[must_use]
    pub fn ratio_quantile(&self, share: f64) -> f64 {
        let all: f64 = self.ratios.iter().sum();
        let mut sum = 0.0;
        for (class, rounds) in self.ratios.iter().enumerate() {
            sum += rounds;
            if sum >= share * all {
                return (class as f64 + 1.0) / CLASSES_PER_UNIT;
            }
        }
        LARGEST_RATIO
    }

    /// Mean of the period over the period alone, over all rounds.
    #[must_use]
    pub fn ratio_mean(&self) -> f64 {
        let middle = |class: usize| (class as f64 + 0.5) / CLASSES_PER_UNIT;
        let all: f64 = self.ratios.iter().sum();
        let sum: f64 = self.ratios.iter().enumerate().map(|(class, rounds)| middle(class) * rounds).sum();
        if all > 0.0 { sum / all } else { 1.0 }
    }

    /// Mean over the jobs.
    #[must_use]
    pub fn slowdown_mean(&self) -> f64 {
        let sum: f64 = self.slowdowns.iter().map(|(_, slowdown)| slowdown).sum();
        sum / self.slowdowns.len().max(1) as f64
    }

    /// That of the worst job.
    #[must_use]
    pub fn slowdown_max(&self) -> f64 {
        self.slowdowns.iter().map(|(_, slowdown)| *slowdown).fold(f64::NEG_INFINITY, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_are_split_where_they_end() {
        let (mut own, mut other) = (Timeline::default(), Timeline::default());
        own.add(30_000.0, 150_000.0, 2.0);
        assert_eq!(own.minutes, [60.0, 120.0, 60.0]);
        other.add(0.0, 180_000.0, 1.5);
        assert!((own.share_not_above(&other) - 2.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn quantiles_and_flaps() {
        let mut score = Score::default();
        score.rounds(1.0, 99.0);
        score.rounds(1.5, 1.0);
        assert!((score.ratio_quantile(0.98) - 1.001).abs() < 1e-9);
        assert!((score.ratio_quantile(0.995) - 1.501).abs() < 1e-9);
        assert!((score.ratio_mean() - 1.0055).abs() < 1e-9);
        score.changed(0.0, 1, 2);
        score.changed(1000.0, 2, 3);
        score.changed(2000.0, 3, 2);
        score.changed(100_000.0, 2, 3);
        assert_eq!((score.scale_events, score.flaps), (4, 1));
    }
}

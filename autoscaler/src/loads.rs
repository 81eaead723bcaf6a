//! How much comes into each partition, and how much more is handled for it.

use thalweg_broker::PartitionDepth;
use thalweg_protocol::JobLoad;

use crate::Millis;

/// Time constant of the means, seconds.
const HORIZON_S: f64 = 10.0;
/// Time after which means say something.
const STEADY_MS: Millis = 20_000;
/// Time between observations from which on what went on in between is unknown.
const GAP_MS: Millis = 5000;

/// Bytes per second into every partition, as exponentially weighted means.
#[derive(Debug, Default)]
pub(crate) struct Loads {
    partitions: Vec<Flow>,
    /// Start and end of the time observed without a gap.
    observed: Option<(Millis, Millis)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    /// Messages that ever came.
    arrived: u64,
    /// Mean bytes of a message, as last seen in the queue; 0 before any was.
    message_bytes: f64,
    messages_per_s: f64,
}

impl Loads {
    /// Takes the depths of all partitions in.
    pub(crate) fn observe(&mut self, depths: &[PartitionDepth], now: Millis) {
        let before =
            self.observed.filter(|(_, end)| now <= end + GAP_MS && self.partitions.len() == depths.len());
        if before.is_none() {
            self.partitions = vec![Flow::default(); depths.len()];
        }
        for (flow, depth) in self.partitions.iter_mut().zip(depths) {
            if let Some((_, end)) = before.filter(|(_, end)| now > *end) {
                let seconds = (now - end) as f64 / 1e3;
                let rate = depth.last_sequence.saturating_sub(flow.arrived) as f64 / seconds;
                flow.messages_per_s += (1.0 - (-seconds / HORIZON_S).exp()) * (rate - flow.messages_per_s);
            }
            flow.arrived = depth.last_sequence;
            if depth.messages > 0 {
                flow.message_bytes = depth.bytes as f64 / depth.messages as f64;
            }
        }
        self.observed = Some((before.map_or(now, |(start, _)| start), now));
    }

    /// What happened meanwhile is unknown.
    pub(crate) fn interrupt(&mut self) {
        self.observed = None;
    }

    /// Bytes per second into every partition; `None` before they are known. Messages of a partition in which none was
    /// ever caught waiting have the mean size of the others'.
    pub(crate) fn bytes_per_s(&self) -> Option<Vec<f64>> {
        let (start, end) = self.observed?;
        if end < start + STEADY_MS {
            return None;
        }
        let sizes: Vec<f64> =
            self.partitions.iter().map(|flow| flow.message_bytes).filter(|size| *size > 0.0).collect();
        let mean = sizes.iter().sum::<f64>() / sizes.len().max(1) as f64;
        let bytes = |flow: &Flow| {
            flow.messages_per_s * if flow.message_bytes > 0.0 { flow.message_bytes } else { mean }
        };
        Some(self.partitions.iter().map(bytes).collect())
    }
}

/// What is handled for each byte of contributions: results come on top, of many workers less than of few.
#[derive(Debug, Default)]
pub(crate) struct Mix {
    /// Bytes of contributions and of results lately.
    contributions: f64,
    results: f64,
}

/// Part of what is remembered that an observation leaves.
const FADING: f64 = 0.98;

impl Mix {
    /// Takes in what an invoker tells.
    pub(crate) fn add(&mut self, loads: &[JobLoad]) {
        loads.iter().for_each(|load| self.count(load.bytes as f64, load.result_bytes as f64));
    }

    /// Counts bytes of contributions and of their results.
    pub(crate) fn count(&mut self, contributions: f64, results: f64) {
        self.contributions += contributions;
        self.results += results;
    }

    /// Time passes: what was long ago counts for less.
    pub(crate) fn fade(&mut self) {
        self.contributions *= FADING;
        self.results *= FADING;
    }

    /// Bytes handled for each byte of contributions; 1 before anything is known.
    pub(crate) fn handled_per_byte(&self) -> f64 {
        // Less than a byte is left of what was long ago.
        if self.contributions >= 1.0 { 1.0 + self.results / self.contributions } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The depths of two partitions: one with large messages that are seen, one whose messages never wait.
    fn depths(first: u64, second: u64) -> [PartitionDepth; 2] {
        let seen =
            PartitionDepth { messages: 2, bytes: 2000, last_sequence: first, ..PartitionDepth::default() };
        [seen, PartitionDepth { last_sequence: second, ..PartitionDepth::default() }]
    }

    #[test]
    fn rates_are_known_after_a_while_without_gaps() {
        let mut loads = Loads::default();
        for tick in 0..=300 {
            assert_eq!(loads.bytes_per_s().is_some(), tick > 200, "tick {tick}");
            loads.observe(&depths(1000 + tick, 7000 + 3 * tick), tick * 100);
        }
        let known = loads.bytes_per_s().expect("long enough");
        assert!((known[0] - 10_000.0).abs() < 600.0 && (known[1] / known[0] - 3.0).abs() < 1e-9, "{known:?}");
        loads.observe(&depths(0, 0), 60_000);
        assert_eq!(loads.bytes_per_s(), None, "there was a gap");
    }

    #[test]
    fn results_are_counted_beside_contributions() {
        let job: thalweg_protocol::Name = "a".parse().unwrap();
        let job = thalweg_protocol::JobKey { tenant: job.clone(), job };
        let load = JobLoad { bytes: 400, result_bytes: 100, ..JobLoad::new(job) };
        let mut mix = Mix::default();
        assert!((mix.handled_per_byte() - 1.0).abs() < 1e-9);
        for _ in 0..10 {
            mix.add(&[load.clone(), JobLoad { result_bytes: 300, ..load.clone() }]);
            mix.fade();
        }
        assert!((mix.handled_per_byte() - 1.5).abs() < 1e-9);
        (0..2000).for_each(|_| mix.fade());
        assert!((mix.handled_per_byte() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_stream_that_was_made_anew_is_no_flood() {
        let mut loads = Loads::default();
        for tick in 0..=300 {
            loads.observe(&depths(if tick < 150 { 1 << 60 } else { 0 }, 0), tick * 100);
        }
        assert_eq!(loads.bytes_per_s(), Some(vec![0.0, 0.0]));
    }
}

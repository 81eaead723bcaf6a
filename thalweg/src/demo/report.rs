//! What the demo shows at its end.

use std::time::Duration;

use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use serde_json::json;
use thalweg_protocol::Durability;

/// The pool at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) at: Duration,
    pub(super) invokers: usize,
}

/// All that was measured.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) workers: u32,
    pub(super) rounds: u64,
    pub(super) durability: Durability,
    pub(super) seconds: f64,
    pub(super) round_ms: Vec<f64>,
    pub(super) accuracy: f32,
    pub(super) single_process_accuracy: f32,
    pub(super) max_param_diff: f32,
    pub(super) invokers_final: usize,
    sent: u64,
    received: u64,
    pool: Vec<Sample>,
}

/// Columns of the picture of the pool.
const WIDTH: usize = 50;

impl Outcome {
    pub(super) fn new(workers: u32, rounds: u64, durability: Durability) -> Self {
        Self {
            workers,
            rounds,
            durability,
            seconds: 0.0,
            round_ms: Vec::new(),
            accuracy: 0.0,
            single_process_accuracy: 0.0,
            max_param_diff: f32::INFINITY,
            invokers_final: 0,
            sent: 0,
            received: 0,
            pool: Vec::new(),
        }
    }

    pub(super) fn count(&mut self, sent: u64, received: u64) {
        self.sent += sent;
        self.received += received;
    }

    pub(super) fn sample(&mut self, sample: Sample) {
        self.pool.push(sample);
    }

    fn peak(&self) -> usize {
        self.pool.iter().map(|sample| sample.invokers).max().unwrap_or(0)
    }

    pub(super) fn json(&self) -> serde_json::Value {
        json!({
            "accuracy": self.accuracy,
            "single_process_accuracy": self.single_process_accuracy,
            "max_param_diff": self.max_param_diff,
            "workers": self.workers,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "round_ms_p50": quantile(&self.round_ms, 0.5),
            "round_ms_p99": quantile(&self.round_ms, 0.99),
            "invokers_peak": self.peak(),
            "invokers_final": self.invokers_final,
            "durability": self.durability.to_string(),
        })
    }

    pub(super) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        table.set_header(["", "through Thalweg", "one process, same batches"]);
        let percent = |accuracy: f32| format!("{:.1} %", accuracy * 100.0);
        table.add_row(["test accuracy", &percent(self.accuracy), &percent(self.single_process_accuracy)]);
        table.add_row([
            "largest difference of a parameter",
            &format!("{:.1e} (relative)", self.max_param_diff),
            "",
        ]);
        table.add_row(["workers, rounds", &format!("{}, {}", self.workers, self.rounds), ""]);
        let times = format!(
            "{:.1} ms median, {:.1} ms p99",
            quantile(&self.round_ms, 0.5),
            quantile(&self.round_ms, 0.99)
        );
        table.add_row(["round, seen by a worker", &times, ""]);
        let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
        let bytes = format!("{} pushed, {} received", megabytes(self.sent), megabytes(self.received));
        table.add_row(["bytes, all workers", &bytes, ""]);
        table.add_row(["time, start-up included", &format!("{:.1} s", self.seconds), ""]);
        table.add_row(["durability level", &self.durability.to_string(), ""]);
        let pool = format!("{} (peak {}, at the end {})", self.picture(), self.peak(), self.invokers_final);
        table.add_row(["invokers over time", &pool, ""]);
        format!("{table}\n")
    }

    /// The size of the pool over time, as a line of bars.
    fn picture(&self) -> String {
        const BARS: [char; 9] = ['·', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let end = self.pool.last().map_or(0.0, |sample| sample.at.as_secs_f64()).max(1e-9);
        let peak = self.peak().max(1);
        let mut columns = [0_usize; WIDTH];
        for sample in &self.pool {
            let column = ((sample.at.as_secs_f64() / end) * (WIDTH - 1) as f64) as usize;
            columns[column.min(WIDTH - 1)] = columns[column.min(WIDTH - 1)].max(sample.invokers);
        }
        columns.iter().map(|invokers| BARS[(invokers * (BARS.len() - 1)).div_ceil(peak)]).collect()
    }
}

/// The value below which the share `q` of `values` lies; 0 without values.
pub(crate) fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return 0.0;
    }
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

//! Metrics of the autoscaler.

use metrics::{Label, counter, describe_counter, describe_gauge, gauge};
use thalweg_protocol::Name;

use crate::{Reason, Status};

const DEPTH_MESSAGES: &str = "thalweg_autoscaler_depth_messages";
const DEPTH_BYTES: &str = "thalweg_autoscaler_depth_bytes";
const INVOKERS: &str = "thalweg_autoscaler_invokers";
const TARGET: &str = "thalweg_autoscaler_target_invokers";
const DECISIONS: &str = "thalweg_autoscaler_decisions_total";
const MOVES: &str = "thalweg_autoscaler_placement_moves_total";
const STALE: &str = "thalweg_autoscaler_failed_observations_total";
const STARTS: &str = "thalweg_autoscaler_starts_total";

/// Describes the metrics; call once a recorder is installed.
pub fn describe() {
    describe_gauge!(DEPTH_MESSAGES, "Messages published and not yet acknowledged, as last observed");
    describe_gauge!(DEPTH_BYTES, "Their bytes");
    describe_gauge!(INVOKERS, "Invokers, by state");
    describe_gauge!(TARGET, "Wanted number of serving invokers");
    describe_counter!(DECISIONS, "Changes of the target, by reason");
    describe_counter!(MOVES, "Partitions that were given another holder, or none");
    describe_counter!(STALE, "Observations that failed, so that nothing was concluded from them");
    describe_counter!(STARTS, "Invokers started, by whether that worked");
}

/// The shared pool's gauges have no label of a pool.
pub(crate) fn status(pool: Option<&Name>, status: &Status) {
    let of_pool: Vec<_> = pool.map(|pool| Label::new("pool", pool.to_string())).into_iter().collect();
    gauge!(DEPTH_MESSAGES, of_pool.clone()).set(status.depth_messages as f64);
    gauge!(DEPTH_BYTES, of_pool.clone()).set(status.depth_bytes as f64);
    gauge!(TARGET, of_pool.clone()).set(status.target as f64);
    for (state, count) in [
        ("starting", status.starting),
        ("ready", status.ready),
        ("draining", status.draining),
        ("spare", status.spare),
    ] {
        let labels: Vec<_> = of_pool.iter().cloned().chain([Label::new("state", state)]).collect();
        gauge!(INVOKERS, labels).set(count as f64);
    }
}

pub(crate) fn decided(reason: Reason) {
    counter!(DECISIONS, "reason" => reason.as_str()).increment(1);
}

pub(crate) fn moved(partitions: usize) {
    counter!(MOVES).increment(partitions as u64);
}

pub(crate) fn observation_failed() {
    counter!(STALE).increment(1);
}

pub(crate) fn started(worked: bool) {
    counter!(STARTS, "worked" => if worked { "true" } else { "false" }).increment(1);
}

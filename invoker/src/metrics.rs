//! Metrics of the invokers.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use thalweg_protocol::ErrorCode;

const DELIVERED: &str = "thalweg_invoker_deliveries_total";
const DELIVERED_BYTES: &str = "thalweg_invoker_delivered_bytes_total";
const ROUNDS: &str = "thalweg_invoker_rounds_total";
const PARTIALS: &str = "thalweg_invoker_partial_commits_total";
const PARTIAL_CONTRIBUTORS: &str = "thalweg_invoker_partial_contributors";
const FOLDED_BYTES: &str = "thalweg_invoker_folded_bytes_total";
const CONTRIBUTORS: &str = "thalweg_invoker_round_contributions";
const LEFTOVERS: &str = "thalweg_invoker_leftovers_total";
const REJECTS: &str = "thalweg_invoker_rejects_total";
const DEAD_LETTERS: &str = "thalweg_invoker_dead_letters_total";
const PARKED: &str = "thalweg_invoker_parked_total";
const CONFLICTS: &str = "thalweg_invoker_conflicts_total";
const TAKEOVERS: &str = "thalweg_invoker_takeovers_total";
const HANDOVER: &str = "thalweg_invoker_handover_seconds";
const WAIT: &str = "thalweg_invoker_wait_seconds";
const PUBLISH: &str = "thalweg_invoker_publish_seconds";
const FOLD: &str = "thalweg_invoker_fold_seconds";
const COMMIT: &str = "thalweg_invoker_commit_seconds";
const HELD: &str = "thalweg_invoker_held_bytes";

/// Describes the metrics; call once a recorder is installed.
pub fn describe() {
    describe_counter!(DELIVERED, "Messages taken from work queues");
    describe_counter!(DELIVERED_BYTES, "Their bytes");
    describe_counter!(ROUNDS, "Rounds committed, by shard, with whether they closed below quorum");
    describe_counter!(PARTIALS, "Partial commits: some of a round that goes on");
    describe_counter!(FOLDED_BYTES, "Bytes of contributions in commits, partial or not");
    describe_histogram!(CONTRIBUTORS, "Contributions counted in a round of a shard");
    describe_histogram!(PARTIAL_CONTRIBUTORS, "Contributions counted in a partial commit");
    describe_counter!(LEFTOVERS, "Contributions acknowledged without being counted, by reason");
    describe_counter!(REJECTS, "Contributions that their senders were told about, by code");
    describe_counter!(DEAD_LETTERS, "Messages put aside, by code");
    describe_counter!(PARKED, "Contributions left in their stream for want of memory");
    describe_counter!(CONFLICTS, "Commits that found the shard elsewhere");
    describe_counter!(TAKEOVERS, "Partitions taken over, by whether their holder had left work behind");
    describe_histogram!(HANDOVER, "Time without a holder of a partition that was handed over in order");
    describe_histogram!(
        WAIT,
        "Time from when the broker stored the last contribution of a fold until it begins, by the invoker's clock"
    );
    describe_histogram!(PUBLISH, "Time to hand a result to the connection");
    describe_histogram!(FOLD, "Time to fold one round of one shard, reading its state included");
    describe_histogram!(COMMIT, "Time from commit to its return at the job's durability level");
    describe_gauge!(HELD, "Payload bytes held in memory");
}

pub(crate) fn delivered(bytes: usize) {
    counter!(DELIVERED).increment(1);
    counter!(DELIVERED_BYTES).increment(bytes as u64);
}

pub(crate) fn partial(contributions: usize, bytes: u64) {
    counter!(PARTIALS).increment(1);
    counter!(FOLDED_BYTES).increment(bytes);
    histogram!(PARTIAL_CONTRIBUTORS).record(contributions as f64);
}

pub(crate) fn round(contributions: usize, bytes: u64, below_quorum: bool) {
    counter!(ROUNDS, "below_quorum" => if below_quorum { "true" } else { "false" }).increment(1);
    counter!(FOLDED_BYTES).increment(bytes);
    histogram!(CONTRIBUTORS).record(contributions as f64);
}

pub(crate) fn leftover(reason: &'static str) {
    counter!(LEFTOVERS, "reason" => reason).increment(1);
}

pub(crate) fn rejected(code: ErrorCode) {
    counter!(REJECTS, "code" => code.as_str()).increment(1);
}

pub(crate) fn dead_letter(code: ErrorCode) {
    counter!(DEAD_LETTERS, "code" => code.as_str()).increment(1);
}

pub(crate) fn parked() {
    counter!(PARKED).increment(1);
}

pub(crate) fn conflict() {
    counter!(CONFLICTS).increment(1);
}

pub(crate) fn takeover(unclean: bool) {
    counter!(TAKEOVERS, "unclean" => if unclean { "true" } else { "false" }).increment(1);
}

pub(crate) fn handed_over(unserved: Duration) {
    histogram!(HANDOVER).record(unserved.as_secs_f64());
}

/// Milliseconds.
pub(crate) fn waited(duration: u64) {
    histogram!(WAIT).record(duration as f64 / 1e3);
}

pub(crate) fn published(duration: Duration) {
    histogram!(PUBLISH).record(duration.as_secs_f64());
}

pub(crate) fn folded(duration: Duration) {
    histogram!(FOLD).record(duration.as_secs_f64());
}

pub(crate) fn committed(duration: Duration) {
    histogram!(COMMIT).record(duration.as_secs_f64());
}

pub(crate) fn held(bytes: usize) {
    gauge!(HELD).set(bytes as f64);
}

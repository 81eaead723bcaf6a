//! Metrics of the store.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use thalweg_broker::{
    Said,
    metrics::{OTHER_BITS, violated},
};
use thalweg_protocol::{Commit, CommitOutcome, JobKey};

use crate::local::Usage;

const COMMITS: &str = "thalweg_store_commits_total";
const COMMIT_BYTES: &str = "thalweg_store_commit_bytes_total";
const PARTIALS: &str = "thalweg_store_partial_commits_total";
const REFUSALS: &str = "thalweg_store_refusals_total";
const TORN: &str = "thalweg_store_torn_slots_total";
const FLUSHES: &str = "thalweg_store_flush_seconds";
const SLOT_WAITS: &str = "thalweg_store_slot_waits_total";
const FREE: &str = "thalweg_store_disk_free_bytes";
const JOBS: &str = "thalweg_store_jobs";
const SLABS: &str = "thalweg_store_slab_bytes";
const LIVE: &str = "thalweg_store_live_bytes";
const UNSYNCED: &str = "thalweg_store_unsynced_bytes";
const LOST: &str = "thalweg_store_lost_jobs";

/// Describes the metrics; call once a recorder is installed.
pub fn describe() {
    describe_counter!(COMMITS, "Commits by outcome");
    describe_counter!(COMMIT_BYTES, "Bytes of state committed");
    describe_counter!(PARTIALS, "Partial commits by outcome");
    describe_counter!(REFUSALS, "Requests refused, by code");
    describe_counter!(TORN, "Slots found torn and set aside");
    describe_histogram!(FLUSHES, "Duration of flush cycles that had something to flush");
    describe_gauge!(FREE, "Bytes of the disk that can still be written");
    describe_gauge!(JOBS, "Jobs whose shards are here");
    describe_gauge!(SLABS, "Bytes of the disk that their slab files take");
    describe_gauge!(LIVE, "Bytes of parameters and optimizer slots in them, one version of each");
    describe_gauge!(UNSYNCED, "Bytes committed that a power loss could still take back");
    describe_gauge!(LOST, "Jobs that have lost state and wait for their policy on loss");
    describe_counter!(SLOT_WAITS, "Commits that had to wait for a flush cycle to free a slot");
}

pub(crate) fn free(bytes: u64) {
    gauge!(FREE).set(bytes as f64);
}

pub(crate) fn usage(usage: Usage) {
    gauge!(JOBS).set(usage.jobs as f64);
    gauge!(SLABS).set(usage.slab_bytes as f64);
    gauge!(LIVE).set(usage.live_bytes as f64);
    gauge!(LOST).set(usage.lost_jobs as f64);
}

pub(crate) fn unsynced(bytes: u64) {
    gauge!(UNSYNCED).set(bytes as f64);
}

fn name(outcome: &CommitOutcome) -> &'static str {
    match outcome {
        CommitOutcome::Committed(_) => "committed",
        CommitOutcome::AlreadyCommitted(_) => "already_committed",
        CommitOutcome::Conflict(_) => "conflict",
        CommitOutcome::StaleRoster { .. } => "stale_roster",
    }
}

pub(crate) fn committed_partial(outcome: &CommitOutcome) {
    counter!(PARTIALS, "outcome" => name(outcome)).increment(1);
}

pub(crate) fn committed(outcome: &CommitOutcome, bytes: usize) {
    counter!(COMMITS, "outcome" => name(outcome)).increment(1);
    if matches!(outcome, CommitOutcome::Committed(_)) {
        counter!(COMMIT_BYTES).increment(bytes as u64);
    }
}

/// Two invokers have come to different values of one round. What is stored counts, for all workers.
pub(crate) fn other_bits(job: &JobKey, commit: &Commit) {
    violated(OTHER_BITS);
    static SAID: Said = Said::new();
    if SAID.is_new(&job.to_string()) {
        let (shard, round) = (commit.shard, commit.ledger.round);
        tracing::error!(
            %job, shard, round,
            "two invocations of the aggregation function came to different bits from the same contributions: it is not \
             deterministic, or a host reckons wrongly; what was stored first counts"
        );
    }
}

pub(crate) fn refused(code: thalweg_protocol::ErrorCode) {
    counter!(REFUSALS, "code" => code.as_str()).increment(1);
}

pub(crate) fn torn_slot() {
    counter!(TORN).increment(1);
}

pub(crate) fn flush_cycle(duration: Duration) {
    histogram!(FLUSHES).record(duration.as_secs_f64());
}

pub(crate) fn slot_wait() {
    counter!(SLOT_WAITS).increment(1);
}

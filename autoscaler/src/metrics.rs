//! Metrics of the autoscaler.

use metrics::{Label, counter, describe_counter, describe_gauge, gauge};
use thalweg_broker::{PartitionDepth, Pool};
use thalweg_protocol::{JobKey, Name};

use crate::{Reason, Status};

const DEPTH_MESSAGES: &str = "thalweg_autoscaler_depth_messages";
const DEPTH_BYTES: &str = "thalweg_autoscaler_depth_bytes";
const INVOKERS: &str = "thalweg_autoscaler_invokers";
const TARGET: &str = "thalweg_autoscaler_target_invokers";
const DECISIONS: &str = "thalweg_autoscaler_decisions_total";
const MOVES: &str = "thalweg_autoscaler_placement_moves_total";
const STALE: &str = "thalweg_autoscaler_failed_observations_total";
const STARTS: &str = "thalweg_autoscaler_starts_total";
const PARTITION_MESSAGES: &str = "thalweg_autoscaler_partition_messages";
const PARTITION_BYTES: &str = "thalweg_autoscaler_partition_bytes";
const LEADS: &str = "thalweg_autoscaler_leads";
const SERVICE: &str = "thalweg_autoscaler_service_bytes_per_second";
const BUSY: &str = "thalweg_autoscaler_busy_invokers";
const JOB_ROUND: &str = "thalweg_job_round_seconds";
const JOB_AGGREGATION: &str = "thalweg_job_aggregation_seconds";
const JOB_SLOWDOWN: &str = "thalweg_job_slowdown_ratio";
const JOB_ROUNDS: &str = "thalweg_job_rounds_total";
const JOB_BYTES: &str = "thalweg_job_folded_bytes_total";
const JOB_COST: &str = "thalweg_job_invoker_seconds_total";

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
    // There from the beginning: a series that begins with 1 has never increased, as alerts see it.
    counter!(STARTS, "worked" => "false").increment(0);
    counter!(STALE).increment(0);
    describe_gauge!(PARTITION_MESSAGES, "Messages published and not yet acknowledged, by partition");
    describe_gauge!(PARTITION_BYTES, "Their bytes");
    describe_gauge!(LEADS, "1 where this autoscaler acts, 0 where it only watches");
    describe_gauge!(
        SERVICE,
        "Bytes of contributions and results that an invoker handles in a second in which it is busy"
    );
    describe_gauge!(BUSY, "How many invokers' worth of work is being done");
    describe_gauge!(JOB_ROUND, "Time from round to round of a job, mean over the last ten seconds");
    describe_gauge!(JOB_AGGREGATION, "Of that: from the last contribution to the commit");
    describe_gauge!(
        JOB_SLOWDOWN,
        "How much longer that is than on autoscaler.policy.reference_invokers invokers of its own; 0.1 is a tenth"
    );
    describe_counter!(JOB_ROUNDS, "Rounds of a job that have ended");
    describe_counter!(JOB_BYTES, "Bytes of contributions to a job in commits");
    describe_counter!(
        JOB_COST,
        "What a job has cost: seconds of invokers, busy for it, times their CPU quota"
    );
}

/// The shared pool's gauges have no label of a pool.
fn labels_of(pool: Option<&Name>) -> Vec<Label> {
    pool.map(|pool| Label::new("pool", pool.to_string())).into_iter().collect()
}

pub(crate) fn status(pool: Option<&Name>, status: &Status) {
    let of_pool = labels_of(pool);
    gauge!(DEPTH_MESSAGES, of_pool.clone()).set(status.depth_messages as f64);
    gauge!(DEPTH_BYTES, of_pool.clone()).set(status.depth_bytes as f64);
    gauge!(TARGET, of_pool.clone()).set(status.target as f64);
    gauge!(LEADS, of_pool.clone()).set(if status.leading { 1.0 } else { 0.0 });
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

/// Depths of a pool's partitions, by their numbers.
pub(crate) fn depths(pool: &Pool, depths: &[PartitionDepth]) {
    for (partition, depth) in (pool.first..).zip(depths) {
        let label = partition.to_string();
        gauge!(PARTITION_MESSAGES, "partition" => label.clone()).set(depth.messages as f64);
        gauge!(PARTITION_BYTES, "partition" => label).set(depth.bytes as f64);
    }
}

/// What invokers are able to do, and what they do.
pub(crate) fn service(pool: Option<&Name>, bytes_per_s: f64, busy: f64) {
    let of_pool = labels_of(pool);
    gauge!(SERVICE, of_pool.clone()).set(bytes_per_s);
    gauge!(BUSY, of_pool).set(busy);
}

/// The labels of one job's series.
#[derive(Clone, Debug)]
pub(crate) struct JobLabels([Label; 2]);

impl JobLabels {
    pub(crate) fn of(job: &JobKey) -> Self {
        Self([Label::new("tenant", job.tenant.to_string()), Label::new("job", job.job.to_string())])
    }

    /// Of all jobs that have no series of their own: no name has brackets.
    pub(crate) fn others() -> Self {
        Self([Label::new("tenant", "(other)"), Label::new("job", "(other)")])
    }

    fn get(&self) -> Vec<Label> {
        self.0.to_vec()
    }

    /// Rounds that ended, bytes in commits, and whole invoker seconds.
    pub(crate) fn spent(&self, rounds: u64, bytes: u64, invoker_seconds: u64) {
        counter!(JOB_ROUNDS, self.get()).increment(rounds);
        counter!(JOB_BYTES, self.get()).increment(bytes);
        counter!(JOB_COST, self.get()).increment(invoker_seconds);
    }

    pub(crate) fn rhythm(&self, Rhythm { round_s, aggregation_s, slowdown }: Rhythm) {
        gauge!(JOB_ROUND, self.get()).set(round_s);
        gauge!(JOB_AGGREGATION, self.get()).set(aggregation_s);
        gauge!(JOB_SLOWDOWN, self.get()).set(slowdown);
    }
}

/// How a job trains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rhythm {
    /// From round to round, seconds.
    pub(crate) round_s: f64,
    /// Of that, from the last contribution to the commit.
    pub(crate) aggregation_s: f64,
    /// Against invokers of its own, as a share.
    pub(crate) slowdown: f64,
}

impl Rhythm {
    /// That of a job that does not train: gaps in a curve.
    pub(crate) const NONE: Self = Self { round_s: f64::NAN, aggregation_s: f64::NAN, slowdown: f64::NAN };
}

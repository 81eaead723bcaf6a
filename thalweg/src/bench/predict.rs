//! What `thalweg simulate` says of a run that has taken place.

use thalweg_autoscaler::{
    Config, Elastic,
    trace::{TraceJob, fluid},
};

/// Identical jobs, as they were measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) jobs: usize,
    /// Of each job.
    pub(super) rounds: f64,
    pub(super) workers: f64,
    /// Bytes of a gradient.
    pub(super) bytes: f64,
    /// Time from round to round of a job that is alone on `reference` invokers of its own, seconds.
    pub(super) alone_s: f64,
    pub(super) reference: f64,
    /// Bytes of contributions and results that an invoker handles a second when it is busy.
    pub(super) service_bytes_per_s: f64,
    pub(super) max_invokers: usize,
    pub(super) partitions: u16,
}

/// Seconds of all invokers from zero to zero, by the means of the queueing network and the default policy.
pub(super) fn invoker_seconds(run: Run) -> anyhow::Result<f64> {
    let mut constants = crate::simulate::built_in_constants(run.partitions)?;
    constants.service_bytes_per_s = run.service_bytes_per_s;
    let (round_bytes, result_bytes) = (run.bytes * run.workers, run.bytes);
    let mut job = TraceJob {
        start_s: 0.0,
        duration_s: run.alone_s * run.rounds,
        round_bytes,
        result_bytes,
        think_s: 0.0,
        servers: run.reference,
    };
    job.think_s = (run.alone_s - job.load(&constants).alone()).max(0.0);
    let config = Config { max_invokers: run.max_invokers, ..Config::default() };
    let (jobs, mut policy) = (vec![job; run.jobs], Elastic::default());
    let setting = (&config, &constants, 0);
    let (score, _) = fluid(&jobs, &mut policy, setting, (None, f64::INFINITY), &[], &mut |_| ());
    Ok(score.invoker_seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_predicted_is_the_work_and_what_surrounds_it() {
        let run = Run {
            jobs: 4,
            rounds: 100.0,
            workers: 2.0,
            bytes: 1e6,
            alone_s: 1.0,
            reference: 2.0,
            service_bytes_per_s: 15e6,
            max_invokers: 8,
            partitions: 32,
        };
        let four = invoker_seconds(run).unwrap();
        // A fifth of a second of work in each of 400 rounds; on two invokers for 100 s, and for the idle timeout.
        assert!((80.0..=250.0).contains(&four), "{four}");
        let one = invoker_seconds(Run { jobs: 1, ..run }).unwrap();
        assert!(one >= 20.0 && one < four, "{one} {four}");
        let faster = invoker_seconds(Run { service_bytes_per_s: 150e6, ..run }).unwrap();
        assert!(faster < four, "{faster} {four}");
    }
}

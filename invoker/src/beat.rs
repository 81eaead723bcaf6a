//! What an invoker tells about itself.

use std::time::{Duration, Instant};

use thalweg_protocol::{Epoch, InvokerBeat, InvokerState, JobLoad, Partition};

use crate::quota::CpuScope;

/// Measures how busy an invoker is and how fast it serves while busy.
///
/// Busy is what uses its CPU quota up, receiving and throttled time included: the part of the quota that is left
/// can be given more work. Waiting for the store is not busy.
#[derive(Debug)]
pub(crate) struct Busyness {
    cpus: f64,
    scope: CpuScope,
    since: Instant,
    used_at: Duration,
    folded: u64,
    /// It has folded before: the time of its first fold is that of its start, too.
    started: bool,
    rate: f64,
}

/// Weight of the newest measurement in the service rate, where it is one of much work.
const SMOOTHING: f64 = 0.3;
/// That much, bytes: of less, the invoker's own upkeep is too large a part.
const MUCH_WORK: f64 = 4.0 * 1024.0 * 1024.0;

impl Busyness {
    /// Of an invoker that may use this many CPUs.
    pub(crate) fn new(cpus: f64, scope: CpuScope) -> Self {
        // Its work is one thread's.
        let cpus = cpus.clamp(0.01, 1.0);
        Self {
            cpus,
            scope,
            since: Instant::now(),
            used_at: scope.used(),
            folded: 0,
            started: false,
            rate: 0.0,
        }
    }

    /// Notes bytes of contributions folded, and of what they became.
    pub(crate) fn folded(&mut self, bytes: u64) {
        self.folded += bytes;
    }

    /// Share of time busy since the last call, and the service rate in bytes per busy second.
    fn take(&mut self) -> (f64, f64) {
        let (now, used) = (Instant::now(), self.scope.used());
        let elapsed = (now - self.since).as_secs_f64().max(1e-9);
        let busy = used.saturating_sub(self.used_at).as_secs_f64() / self.cpus;
        let folded = std::mem::take(&mut self.folded) as f64;
        (self.since, self.used_at) = (now, used);
        if self.started {
            self.rate = next_rate(self.rate, folded, busy);
        }
        self.started |= folded > 0.0;
        ((busy / elapsed).min(1.0), self.rate)
    }

    /// The beat of this moment.
    pub(crate) fn beat(
        &mut self,
        invoker: &str,
        state: InvokerState,
        partitions: Vec<(Partition, Epoch)>,
        held: (usize, usize),
        jobs: Vec<JobLoad>,
    ) -> InvokerBeat {
        let (busy, service_bytes_per_s) = self.take();
        InvokerBeat {
            invoker: invoker.to_owned(),
            state,
            partitions,
            service_bytes_per_s,
            busy,
            held_messages: held.0 as u64,
            held_bytes: held.1 as u64,
            cpu_quota: self.cpus,
            jobs,
        }
    }
}

/// The service rate after `folded` bytes in `busy` seconds.
fn next_rate(rate: f64, folded: f64, busy: f64) -> f64 {
    if folded <= 0.0 || busy <= 0.0 {
        return rate;
    }
    let measured = folded / busy;
    if rate == 0.0 {
        return measured;
    }
    rate + SMOOTHING * (folded / MUCH_WORK).min(1.0) * (measured - rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_work_tells_the_rate_and_little_work_does_not_spoil_it() {
        assert_eq!(next_rate(0.0, 1e8, 0.5), 2e8);
        assert_eq!(next_rate(2e8, 0.0, 0.5), 2e8);
        assert!((next_rate(2e8, 1e8, 1.0) - 1.7e8).abs() < 1.0);
        assert!(next_rate(2e8, 1000.0, 0.1) > 1.99e8);
    }

    #[test]
    fn busy_is_the_share_of_the_quota() {
        let scope = CpuScope::Thread;
        let mut busyness = Busyness::new(0.5, scope);
        busyness.folded(1 << 30);
        assert_eq!(busyness.take().1, 0.0, "that was its start");
        let begun = scope.used();
        while scope.used() - begun < Duration::from_millis(20) {
            busyness.folded(1);
        }
        let (busy, rate) = busyness.take();
        assert!(busy > 0.0 && busy <= 1.0 && rate > 0.0, "{busy} {rate}");
    }
}

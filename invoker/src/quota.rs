//! A CPU quota kept by the invoker itself, so that "one more invoker" means the same everywhere.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Debt and credit are carried over this long.
const WINDOW: Duration = Duration::from_millis(100);

/// Token bucket over the CPU time of the current thread.
#[derive(Debug)]
pub(crate) struct Quota {
    cpus: f64,
    since: Instant,
    used_at: Duration,
}

/// CPU time of the current thread so far.
pub(crate) fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Quota {
    /// `cpus` CPUs; a current-thread task cannot use more than one, so 1 and more never wait.
    pub(crate) fn new(cpus: f64) -> Self {
        Self { cpus, since: Instant::now(), used_at: thread_cpu() }
    }

    /// How long to pause before the next piece of work.
    pub(crate) fn debt(&mut self) -> Duration {
        if self.cpus >= 1.0 {
            return Duration::ZERO;
        }
        let debt = debt(self.cpus, thread_cpu().saturating_sub(self.used_at), self.since.elapsed());
        if debt.is_zero() && self.since.elapsed() > WINDOW {
            // Unused credit is not hoarded beyond one window.
            (self.since, self.used_at) = (Instant::now(), thread_cpu());
        }
        debt
    }
}

/// Time to wait until `used` CPU time is within `cpus` of the time passed.
fn debt(cpus: f64, used: Duration, elapsed: Duration) -> Duration {
    used.div_f64(cpus.max(0.01)).saturating_sub(elapsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debt_is_what_was_used_beyond_the_quota() {
        let ms = Duration::from_millis;
        assert_eq!(debt(0.5, ms(10), ms(30)), ms(0));
        assert_eq!(debt(0.5, ms(10), ms(5)), ms(15));
        assert_eq!(Quota::new(1.0).debt(), ms(0));
    }
}

//! A CPU quota kept by the invoker itself, so that "one more invoker" means the same everywhere.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Credit that may be saved up for a burst, as time without work.
const WINDOW: Duration = Duration::from_millis(100);

/// Whose CPU time an invoker's quota is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuScope {
    /// The process is the invoker: all of its threads count, and what was used before the invoker ran.
    Process,
    /// The invoker is a thread among others of its process, and runs all of its work on it.
    Thread,
}

impl CpuScope {
    pub(crate) fn used(self) -> Duration {
        let time = clock_gettime(match self {
            Self::Process => ClockId::ProcessCPUTime,
            Self::Thread => ClockId::ThreadCPUTime,
        });
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    }
}

/// Token bucket over CPU time.
#[derive(Debug)]
pub(crate) struct Quota {
    scope: CpuScope,
    account: Account,
    at: Instant,
    used: Duration,
}

impl Quota {
    /// `cpus` CPUs; with 1 and more there is never a pause.
    pub(crate) fn new(cpus: f64, scope: CpuScope) -> Self {
        let used = scope.used();
        let mut account = Account::new(cpus);
        if scope == CpuScope::Process {
            // Starting was work, too.
            account.book(Duration::ZERO, used);
        }
        Self { scope, account, at: Instant::now(), used }
    }

    /// How long to pause before the next piece of work.
    pub(crate) fn debt(&mut self) -> Duration {
        if self.account.cpus >= 1.0 {
            return Duration::ZERO;
        }
        let (at, used) = (Instant::now(), self.scope.used());
        self.account.book(at - self.at, used.saturating_sub(self.used));
        (self.at, self.used) = (at, used);
        self.account.debt()
    }
}

/// CPU seconds earned and spent.
#[derive(Debug)]
struct Account {
    cpus: f64,
    /// At most what a window earns; negative while more was spent than earned.
    balance: f64,
}

impl Account {
    fn new(cpus: f64) -> Self {
        Self { cpus: cpus.max(0.01), balance: 0.0 }
    }

    /// Some time has passed, of which `used` was spent working: after the rest of it, as far as is known. What that
    /// rest earns beyond a window is lost, so that a long rest does not pay for a long burst.
    fn book(&mut self, passed: Duration, used: Duration) {
        let most = self.cpus * WINDOW.as_secs_f64();
        let rest = passed.saturating_sub(used).as_secs_f64();
        let rested = (self.balance + self.cpus * rest).min(most);
        let worked = passed.min(used).as_secs_f64();
        self.balance = (rested + self.cpus * worked - used.as_secs_f64()).min(most);
    }

    /// Time until the balance is even.
    fn debt(&self) -> Duration {
        Duration::from_secs_f64((-self.balance / self.cpus).clamp(0.0, 3600.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn close(debt: Duration, expected: Duration) {
        assert!(debt.abs_diff(expected) < Duration::from_micros(10), "{debt:?} is not {expected:?}");
    }

    #[test]
    fn debt_is_what_was_used_beyond_the_quota() {
        let mut account = Account::new(0.5);
        account.book(MS(10), MS(10));
        close(account.debt(), MS(10));
        account.book(MS(5), MS(0));
        close(account.debt(), MS(5));
        account.book(MS(5), MS(0));
        close(account.debt(), MS(0));
        // Two threads at once.
        account.book(MS(10), MS(20));
        close(account.debt(), MS(30));
        assert_eq!(Quota::new(1.0, CpuScope::Thread).debt(), MS(0));
    }

    #[test]
    fn a_long_rest_pays_for_no_more_than_a_window() {
        let mut account = Account::new(0.2);
        account.book(MS(60_000), MS(0));
        account.book(MS(100), MS(100));
        // 100 ms of work take 500; 100 have passed with it, and 100 were saved up.
        close(account.debt(), MS(300));
        // The same when it is all seen at once.
        let mut account = Account::new(0.2);
        account.book(MS(60_100), MS(100));
        close(account.debt(), MS(300));
    }

    #[test]
    fn whatever_the_pattern_no_more_is_used_than_is_earned() {
        // Work in pieces of all sizes, with and without rests, each after the debt was waited for.
        let (mut account, mut passed, mut used) = (Account::new(0.2), MS(0), MS(0));
        for step in 0..1000_u64 {
            let (rest, work) = (MS(step * 7919 % 313 * (step % 2)), MS(1 + step * 31 % 97));
            let wait = account.debt();
            account.book(wait, MS(0));
            account.book(rest + work, work);
            (passed, used) = (passed + wait + rest + work, used + work);
            let last = MS(100).mul_f64(0.2) + work;
            assert!(used <= passed.mul_f64(0.2) + last, "{used:?} in {passed:?}");
        }
    }

    #[test]
    fn all_threads_of_a_process_count() {
        let mut process = Quota::new(0.5, CpuScope::Process);
        let before = process.used;
        let spin = || {
            let until = CpuScope::Thread.used() + MS(50);
            while CpuScope::Thread.used() < until {}
        };
        let mut thread = Quota::new(0.5, CpuScope::Thread);
        std::thread::spawn(spin).join().unwrap();
        process.debt();
        assert!(process.used >= before + MS(50));
        let before = thread.used;
        thread.debt();
        assert!(thread.used < before + MS(50), "what another thread has used is not ours");
    }
}

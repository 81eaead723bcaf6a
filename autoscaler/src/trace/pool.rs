//! The invokers of a simulated pool: on their way, there, and on their way out.

use super::{Constants, Score};
use crate::{Config, History, Millis, Policy, Sample};

/// Starts and stops what the policy says.
pub(super) struct Pool<'a> {
    pub(super) history: History,
    pub(super) config: &'a Config,
    pub(super) constants: &'a Constants,
    policy: &'a mut dyn Policy,
    ready: usize,
    /// When each that was started is there, ascending.
    starting: Vec<f64>,
    /// When each that was told to stop is gone, ascending.
    stopping: Vec<f64>,
    counted_until: f64,
    pub(super) score: Score,
}

/// What a policy sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// In the queues.
    pub(super) bytes: f64,
    /// Messages that ever came into them.
    pub(super) arrived: f64,
    /// Invokers' worth of work that is being done.
    pub(super) busy: f64,
    /// As in [`Sample`].
    pub(super) handled_per_byte: f64,
}

impl<'a> Pool<'a> {
    pub(super) fn new(
        policy: &'a mut dyn Policy,
        config: &'a Config,
        constants: &'a Constants,
        invokers: usize,
        at: f64,
    ) -> Self {
        let history = History::new(constants.partitions, invokers, at as Millis);
        let (starting, stopping, score) = (Vec::new(), Vec::new(), Score::default());
        Self {
            history,
            config,
            constants,
            policy,
            ready: invokers,
            starting,
            stopping,
            counted_until: at,
            score,
        }
    }

    /// Invokers that work.
    pub(super) fn ready(&self) -> usize {
        self.ready
    }

    pub(super) fn policy(&self) -> &dyn Policy {
        self.policy
    }

    /// When the next one comes or goes; infinite when none does.
    pub(super) fn next_change(&self) -> f64 {
        let first = |list: &[f64]| list.first().copied().unwrap_or(f64::INFINITY);
        first(&self.starting).min(first(&self.stopping))
    }

    /// Lets time pass, at most until [`Self::next_change`]. Returns whether the number of those that work has changed.
    pub(super) fn pass(&mut self, to: f64) -> bool {
        let all = self.ready + self.starting.len() + self.stopping.len();
        self.score.invokers(self.counted_until, to, all as f64);
        self.counted_until = to;
        let before = self.ready;
        while self.starting.first().is_some_and(|at| *at <= to) {
            self.starting.remove(0);
            self.ready += 1;
        }
        self.stopping.retain(|at| *at > to);
        self.ready != before
    }

    /// Shows the policy what there is to see, and does what it says. Returns whether the target has changed.
    pub(super) fn look(&mut self, at: f64, seen: Seen) -> bool {
        let (now, constants) = (at as Millis, self.constants);
        let Seen { bytes, arrived, busy, handled_per_byte } = seen;
        let sample = Sample {
            at: now,
            messages: constants.messages(bytes).ceil() as u64,
            bytes: bytes as u64,
            arrived: arrived as u64,
            active_partitions: usize::from(constants.partitions),
            waiting_for_round: 0.0,
            busy,
            service_bytes_per_s: constants.service_bytes_per_s,
            handled_per_byte,
            serving: self.ready,
            start_delay_ms: constants.start_delay_ms as f64,
        };
        self.history.record(sample, self.config);
        let decision = self.policy.decide(&self.history, now, self.config);
        let before = self.history.target();
        if decision.target == before {
            return false;
        }
        self.score.changed(at, before, decision.target);
        self.history.set_target(decision.target);
        let present = self.ready + self.starting.len();
        for _ in present..decision.target {
            self.starting.push(at + self.constants.start_delay_ms as f64);
        }
        for _ in decision.target..present {
            // Those that have not begun go first.
            if self.starting.pop().is_none() {
                self.ready -= 1;
            }
            self.stopping.push(at + self.constants.stop_delay_ms as f64);
        }
        true
    }
}

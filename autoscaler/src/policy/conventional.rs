//! How others scale, to be compared with: a fixed number, KEDA, the Horizontal Pod Autoscaler and Knative.
//!
//! Written down from their documentation (KEDA 2 concepts "Scaling deployments" and its NATS JetStream scaler; Kubernetes
//! "Horizontal Pod Autoscaling", algorithm details; Knative Serving "KPA" and its configuration), with their defaults;
//! what people tune is a field.

use std::collections::VecDeque;

use super::{Decision, Policy, Reason};
use crate::{Config, History, Millis};

/// Kubernetes looks this often.
const HPA_SYNC_MS: Millis = 15_000;
/// Relative difference that changes nothing.
const HPA_TOLERANCE: f64 = 0.1;
/// Down only to the highest that was recommended in this time.
const HPA_STABILIZATION_MS: Millis = 300_000;
/// Up by this many, or by doubling, in one sync.
const HPA_STEP: usize = 4;
/// KEDA polls the queue this often, which matters while there are none: it starts the first.
const KEDA_POLL_MS: Millis = 30_000;
/// And removes the last after this time without work.
const KEDA_COOLDOWN_MS: Millis = 300_000;
/// Knative's windows and ticks.
const KNATIVE_TICK_MS: Millis = 2000;
const KNATIVE_STABLE_MS: Millis = 60_000;
const KNATIVE_PANIC_MS: Millis = 6000;
/// Its panic begins when the short window asks for this many times as many as there are.
const KNATIVE_PANIC: f64 = 2.0;
/// It shrinks to no less than half in one tick.
const KNATIVE_DOWN: usize = 2;
/// And takes the last one this long after it last was needed.
const KNATIVE_GRACE_MS: Millis = 30_000;

/// Keeps to a clock, and to what was decided in between.
#[derive(Clone, Copy, Debug, Default)]
struct Ticks {
    next: Millis,
}

impl Ticks {
    fn due(&mut self, now: Millis, every: Millis) -> bool {
        let due = now >= self.next;
        if due {
            self.next = now - now % every + every;
        }
        due
    }
}

fn steady(history: &History) -> Decision {
    Decision { target: history.target(), reason: Reason::Steady }
}

fn to(history: &History, target: usize, config: &Config) -> Decision {
    let (fewest, most) = config.bounds(history.partitions());
    let (current, target) = (history.target(), target.clamp(fewest, most));
    let reason = match target.cmp(&current) {
        std::cmp::Ordering::Less if target == 0 => Reason::Idle,
        std::cmp::Ordering::Less => Reason::Shrink,
        std::cmp::Ordering::Equal => Reason::Steady,
        std::cmp::Ordering::Greater if current == 0 => Reason::FirstWork,
        std::cmp::Ordering::Greater => Reason::Backlog,
    };
    Decision { target, reason }
}

/// Always the same number.
#[derive(Clone, Copy, Debug)]
pub struct Fixed {
    /// That number.
    pub invokers: usize,
}

impl Policy for Fixed {
    fn name(&self) -> &'static str {
        "static"
    }

    fn decide(&mut self, history: &History, _: Millis, config: &Config) -> Decision {
        to(history, self.invokers, config)
    }

    fn look_every_ms(&self, _: &Config) -> Millis {
        HPA_SYNC_MS
    }

    fn settles_ms(&self, _: &Config) -> Option<Millis> {
        Some(HPA_SYNC_MS)
    }
}

/// What the Horizontal Pod Autoscaler does with any metric.
#[derive(Clone, Debug, Default)]
struct Controller {
    ticks: Ticks,
    recommended: VecDeque<(Millis, usize)>,
}

impl Controller {
    /// `ratio` is the metric over its target with `current` pods.
    fn sync(&mut self, current: usize, ratio: f64, now: Millis) -> usize {
        let wished = if (ratio - 1.0).abs() <= HPA_TOLERANCE {
            current
        } else {
            ((current as f64 * ratio).ceil() as usize).max(1)
        };
        let wished = wished.min((2 * current).max(current + HPA_STEP));
        while self.recommended.front().is_some_and(|(at, _)| at + HPA_STABILIZATION_MS < now) {
            self.recommended.pop_front();
        }
        if self.recommended.is_empty() {
            // Where it begins counts as recommended.
            self.recommended.push_back((now, current));
        }
        self.recommended.push_back((now, wished));
        let highest = self.recommended.iter().map(|(_, wished)| *wished).max().unwrap_or(wished);
        // Stabilisation is for the way down.
        if wished < current { highest.min(current) } else { wished }
    }
}

/// KEDA on the queue's depth: one invoker for every `lag_threshold` messages.
#[derive(Clone, Debug)]
pub struct Keda {
    /// Messages pending or unacknowledged for each invoker.
    pub lag_threshold: f64,
    hpa: Controller,
    polls: Ticks,
    worked_at: Millis,
}

impl Keda {
    /// With its defaults but for the threshold.
    #[must_use]
    pub fn new(lag_threshold: f64) -> Self {
        Self { lag_threshold, hpa: Controller::default(), polls: Ticks::default(), worked_at: 0 }
    }
}

impl Policy for Keda {
    fn name(&self) -> &'static str {
        "keda"
    }

    fn decide(&mut self, history: &History, now: Millis, config: &Config) -> Decision {
        let Some(latest) = history.latest(now, config) else { return steady(history) };
        let current = history.target();
        if latest.messages > 0 {
            self.worked_at = now;
        }
        if current == 0 {
            let starts = self.polls.due(now, KEDA_POLL_MS) && latest.messages > 0;
            return to(history, usize::from(starts), config);
        }
        if now >= self.worked_at + KEDA_COOLDOWN_MS {
            return to(history, 0, config);
        }
        if !self.hpa.ticks.due(now, HPA_SYNC_MS) {
            return steady(history);
        }
        let ratio = latest.messages as f64 / (current as f64 * self.lag_threshold);
        to(history, self.hpa.sync(current, ratio, now), config)
    }

    fn look_every_ms(&self, _: &Config) -> Millis {
        HPA_SYNC_MS
    }

    fn settles_ms(&self, _: &Config) -> Option<Millis> {
        None
    }
}

/// The Horizontal Pod Autoscaler on CPU utilisation; never fewer than one.
#[derive(Clone, Debug)]
pub struct Hpa {
    /// Share of its quota that an invoker should use.
    pub utilisation: f64,
    hpa: Controller,
}

impl Hpa {
    /// With its defaults but for the target.
    #[must_use]
    pub fn new(utilisation: f64) -> Self {
        Self { utilisation, hpa: Controller::default() }
    }
}

impl Policy for Hpa {
    fn name(&self) -> &'static str {
        "hpa"
    }

    fn decide(&mut self, history: &History, now: Millis, config: &Config) -> Decision {
        let Some(latest) = history.latest(now, config) else { return steady(history) };
        let current = history.target().max(1);
        if !self.hpa.ticks.due(now, HPA_SYNC_MS) {
            return to(history, current, config);
        }
        let (count, busy) = history
            .last(HPA_SYNC_MS)
            .fold((0.0, 0.0), |(count, busy), sample| (count + 1.0, busy + sample.busy));
        let busy = if count > 0.0 { busy / count } else { latest.busy };
        let ratio = busy / (current as f64 * self.utilisation);
        to(history, self.hpa.sync(current, ratio, now), config)
    }

    fn look_every_ms(&self, _: &Config) -> Millis {
        HPA_SYNC_MS
    }

    fn settles_ms(&self, _: &Config) -> Option<Millis> {
        None
    }
}

/// Knative's autoscaler on concurrency: messages that are in the queues at once for each invoker.
#[derive(Clone, Debug)]
pub struct Knative {
    /// That many.
    pub concurrency: f64,
    ticks: Ticks,
    panic_until: Option<Millis>,
    panicked_to: usize,
    needed_at: Millis,
    seen: VecDeque<(Millis, f64)>,
}

impl Knative {
    /// With its defaults but for the target.
    #[must_use]
    pub fn new(concurrency: f64) -> Self {
        let (ticks, seen) = (Ticks::default(), VecDeque::new());
        Self { concurrency, ticks, panic_until: None, panicked_to: 0, needed_at: 0, seen }
    }

    fn average(&self, window: Millis, now: Millis) -> f64 {
        let seen = self.seen.iter().rev().take_while(|(at, _)| at + window >= now);
        let (count, sum) = seen.fold((0.0, 0.0), |(count, sum), (_, messages)| (count + 1.0, sum + messages));
        if count > 0.0 { sum / count } else { 0.0 }
    }
}

impl Policy for Knative {
    fn name(&self) -> &'static str {
        "knative"
    }

    fn decide(&mut self, history: &History, now: Millis, config: &Config) -> Decision {
        let Some(latest) = history.latest(now, config) else { return steady(history) };
        let current = history.target();
        if self.seen.back().is_none_or(|(at, _)| *at < latest.at) {
            self.seen.push_back((latest.at, latest.messages as f64));
        }
        while self.seen.front().is_some_and(|(at, _)| at + KNATIVE_STABLE_MS < now) {
            self.seen.pop_front();
        }
        // The activator reports the first request at once.
        if current == 0 && latest.messages > 0 {
            self.needed_at = now;
            return to(history, 1, config);
        }
        if !self.ticks.due(now, KNATIVE_TICK_MS) {
            return steady(history);
        }
        let wished = |window| (self.average(window, now) / self.concurrency).ceil() as usize;
        let (stable, panic) = (wished(KNATIVE_STABLE_MS), wished(KNATIVE_PANIC_MS));
        if panic as f64 >= KNATIVE_PANIC * current.max(1) as f64 {
            self.panic_until = Some(now + KNATIVE_STABLE_MS);
            self.panicked_to = self.panicked_to.max(current);
        }
        let target = if self.panic_until.is_some_and(|until| now < until) {
            // While it panics it does not shrink.
            self.panicked_to = self.panicked_to.max(panic);
            self.panicked_to
        } else {
            (self.panic_until, self.panicked_to) = (None, 0);
            stable.max(current / KNATIVE_DOWN)
        };
        if target > 0 && stable > 0 {
            self.needed_at = now;
        }
        if stable == 0 && now >= self.needed_at + KNATIVE_GRACE_MS {
            return to(history, 0, config);
        }
        to(history, target.max(current.min(1)), config)
    }

    fn look_every_ms(&self, _: &Config) -> Millis {
        KNATIVE_TICK_MS
    }

    fn settles_ms(&self, _: &Config) -> Option<Millis> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sample;

    /// Decisions of a policy that is shown `seen(second)`, (messages, busy), every second.
    fn run(
        policy: &mut dyn Policy,
        start: usize,
        seconds: u64,
        seen: impl Fn(u64, usize) -> (u64, f64),
    ) -> Vec<usize> {
        let config = Config { max_invokers: 100, tick_ms: 1000, ..Config::default() };
        let mut history = History::new(1024, start, 0);
        let mut targets = Vec::new();
        for second in 0..seconds {
            let (messages, busy) = seen(second, history.target());
            let sample = Sample {
                at: second * 1000,
                messages,
                bytes: messages << 19,
                arrived: 0,
                active_partitions: 32,
                waiting_for_round: 0.0,
                busy,
                service_bytes_per_s: 1e9,
                handled_per_byte: 1.0,
                serving: history.target(),
                start_delay_ms: 0.0,
            };
            history.record(sample, &config);
            let decision = policy.decide(&history, second * 1000, &config);
            history.set_target(decision.target);
            targets.push(decision.target);
        }
        targets
    }

    #[test]
    fn keda_divides_the_depth_and_cools_down() {
        let targets = run(&mut Keda::new(10.0), 0, 900, |second, _| (if second < 100 { 95 } else { 0 }, 0.0));
        assert_eq!(targets[0], 1);
        assert_eq!(targets[99], 10);
        // Stabilised for five minutes, then one, and none after its cool-down.
        assert_eq!((targets[380], targets[440]), (10, 0));
        // Poll by poll while there is nobody.
        let targets = run(&mut Keda::new(10.0), 0, 60, |second, _| (u64::from(second >= 1), 0.0));
        assert_eq!((targets[29], targets[30]), (0, 1));
    }

    #[test]
    fn hpa_holds_utilisation_within_its_tolerance() {
        let load = 6.3;
        let targets = run(&mut Hpa::new(0.7), 1, 600, |_, current| (1, f64::min(load, current as f64)));
        assert_eq!(*targets.last().unwrap(), 9);
        let targets = run(&mut Hpa::new(0.7), 9, 600, |_, _| (1, 6.8));
        assert!(targets.iter().all(|target| *target == 9));
        let targets = run(&mut Hpa::new(0.7), 20, 600, |_, _| (1, 6.3));
        assert_eq!((targets[250], *targets.last().unwrap()), (20, 9));
    }

    #[test]
    fn knative_panics_and_goes_to_zero() {
        let seen = |second, _| {
            (
                if second < 60 {
                    10
                } else if second < 120 {
                    100
                } else {
                    0
                },
                0.0,
            )
        };
        let targets = run(&mut Knative::new(10.0), 0, 400, seen);
        assert_eq!((targets[0], targets[59]), (1, 1));
        assert!(targets[66] >= 8, "{:?}", &targets[60..70]);
        assert_eq!(*targets.last().unwrap(), 0);
    }

    #[test]
    fn a_fixed_number_is_fixed() {
        let targets = run(&mut Fixed { invokers: 7 }, 0, 10, |second, _| (second, 1.0));
        assert!(targets.iter().all(|target| *target == 7));
    }
}

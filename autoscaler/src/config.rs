//! Settings of the autoscaler.

use serde::{Deserialize, Serialize};
use thalweg_broker::LeaseConfig;
use thalweg_protocol::Partition;

use crate::{Millis, policy::FLOW_MS};

/// Longest window, milliseconds: bounds how many observations are kept.
const MAX_WINDOW_MS: u64 = 3_600_000;

/// Settings of the autoscaler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Invokers kept even when there is nothing to do. Default 0.
    pub min_invokers: usize,
    /// Most invokers, at least 1; there are never more than partitions. Default 4.
    pub max_invokers: usize,
    /// Time between observations, milliseconds, 10 to 10,000. Default 200. While there is nothing to do
    /// and nobody to do it, at least 400.
    pub tick_ms: u64,
    /// Share by which sharing invokers may make the rounds of a job longer, against `reference_invokers` of its own,
    /// above 0 and up to 10. Default 0.1.
    pub slowdown_limit: f64,
    /// Invokers of its own that a job is compared against, 1 to 1024. Default 2.
    pub reference_invokers: u32,
    /// Time in which a backlog should be drained that no known job's round explains, milliseconds, at least 1.
    /// Default 2000.
    pub catch_up_ms: u64,
    /// Share of its CPU quota an invoker should use for load that has no rhythm, above 0 and up to 1. Default 0.7.
    pub target_utilisation: f64,
    /// Service rate of an invoker before any has measured one, MB (10^6 bytes) per busy second. Default 200.
    pub default_service_mb_per_s: f64,
    /// Time without any message in the queues (held ones are in the queues) after which only
    /// `min_invokers` stay, milliseconds, up to one hour. Default 10,000.
    pub idle_timeout_ms: u64,
    /// Period of a job from which on its invokers are started for each of its bursts instead of kept in between,
    /// milliseconds. Default 10,000.
    pub gap_pays_ms: u64,
    /// Time throughout which fewer invokers must have been enough before there are fewer, milliseconds,
    /// up to one hour. Default 10,000.
    pub shrink_window_ms: u64,
    /// Time throughout which more invokers must have been needed before there are more, milliseconds, up to
    /// one hour; the first invoker never waits for it. Default 0: at once.
    pub grow_window_ms: u64,
    /// Shortest time from one change of the placement to an exchange of partitions between invokers that have more and
    /// less than their share of the load, milliseconds. Default 30,000; 0: they are never exchanged.
    pub exchange_pause_ms: u64,
    /// Silence after which an invoker is taken for dead, milliseconds, at least 1,000. It counts only
    /// while this autoscaler's observations succeed without a gap. Default 3,000.
    pub dead_after_ms: u64,
    /// Time a started invoker has for its first beat, milliseconds. Default 10,000.
    pub start_timeout_ms: u64,
    /// Time a retired invoker has to give its partitions up before it is stopped regardless,
    /// milliseconds. Default 10,000.
    pub drain_timeout_ms: u64,
    /// Whether the invokers started here are stopped when the autoscaler is. Default true. With false they
    /// keep running and the next autoscaler adopts them.
    pub drain_on_shutdown: bool,
    /// Lease on the role: of several autoscalers one acts.
    pub lease: LeaseConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            min_invokers: 0,
            max_invokers: 4,
            tick_ms: 200,
            slowdown_limit: 0.1,
            reference_invokers: 2,
            catch_up_ms: 2000,
            target_utilisation: 0.7,
            default_service_mb_per_s: 200.0,
            idle_timeout_ms: 10_000,
            gap_pays_ms: 10_000,
            shrink_window_ms: 10_000,
            grow_window_ms: 0,
            exchange_pause_ms: 30_000,
            dead_after_ms: 3000,
            start_timeout_ms: 10_000,
            drain_timeout_ms: 10_000,
            drain_on_shutdown: true,
            lease: LeaseConfig::default(),
        }
    }
}

/// What differs from the common policy for one pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolBounds {
    /// Invokers kept even when there is nothing to do. Default 0.
    pub min_invokers: usize,
    /// Most invokers, at least 1. Default 4.
    pub max_invokers: usize,
}

impl Default for PoolBounds {
    fn default() -> Self {
        let Config { min_invokers, max_invokers, .. } = Config::default();
        Self { min_invokers, max_invokers }
    }
}

impl Config {
    /// These settings with the bounds of one pool.
    #[must_use]
    pub fn within(&self, bounds: PoolBounds) -> Self {
        let PoolBounds { min_invokers, max_invokers } = bounds;
        Self { min_invokers, max_invokers, ..self.clone() }
    }

    /// Checks every value against its documented range.
    ///
    /// # Errors
    /// Names the setting and what it may be.
    pub fn validate(&self) -> Result<(), String> {
        let check = |ok: bool, text: &str| if ok { Ok(()) } else { Err(text.to_owned()) };
        check(self.max_invokers >= 1, "max_invokers must be at least 1")?;
        check(self.min_invokers <= self.max_invokers, "min_invokers must not exceed max_invokers")?;
        check((10..=10_000).contains(&self.tick_ms), "tick_ms must be 10 to 10000")?;
        let limit = self.slowdown_limit;
        check(limit > 0.0 && limit <= 10.0, "slowdown_limit must be above 0 and up to 10")?;
        check((1..=1024).contains(&self.reference_invokers), "reference_invokers must be 1 to 1024")?;
        check(self.catch_up_ms >= 1, "catch_up_ms must be at least 1")?;
        let share = self.target_utilisation;
        check(share > 0.0 && share <= 1.0, "target_utilisation must be above 0 and up to 1")?;
        let rate = self.default_service_mb_per_s;
        check(rate.is_finite() && rate > 0.0, "default_service_mb_per_s must be positive")?;
        for (name, window) in [
            ("idle_timeout_ms", self.idle_timeout_ms),
            ("shrink_window_ms", self.shrink_window_ms),
            ("grow_window_ms", self.grow_window_ms),
        ] {
            check(window <= MAX_WINDOW_MS, &format!("{name} must be at most {MAX_WINDOW_MS}"))?;
        }
        check(self.dead_after_ms >= 1000, "dead_after_ms must be at least 1000")
    }

    /// How far back observations are kept.
    pub(crate) fn longest_window(&self) -> Millis {
        self.shrink_window_ms.max(self.grow_window_ms).max(FLOW_MS)
    }

    /// These settings, with those of `running` that are in use since the start and cannot change before the
    /// next one: the lease that is kept, and what the actuator was made with.
    #[must_use]
    pub fn keeping_fixed(self, running: &Self) -> Self {
        Self {
            drain_timeout_ms: running.drain_timeout_ms,
            drain_on_shutdown: running.drain_on_shutdown,
            lease: running.lease,
            ..self
        }
    }

    /// Age at which an observation says nothing about the present any more.
    pub(crate) fn stale_after(&self) -> Millis {
        (5 * self.tick_ms).max(1000)
    }

    /// Fewest and most invokers with this many partitions.
    pub(crate) fn bounds(&self, partitions: Partition) -> (usize, usize) {
        let most = self.max_invokers.min(usize::from(partitions)).max(1);
        (self.min_invokers.min(most), most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_nonsense_is_named() {
        Config::default().validate().unwrap();
        for (json, setting) in [
            (r#"{"max_invokers":0}"#, "max_invokers"),
            (r#"{"min_invokers":5}"#, "min_invokers"),
            (r#"{"tick_ms":0}"#, "tick_ms"),
            (r#"{"catch_up_ms":0}"#, "catch_up_ms"),
            (r#"{"slowdown_limit":0.0}"#, "slowdown_limit"),
            (r#"{"reference_invokers":0}"#, "reference_invokers"),
            (r#"{"target_utilisation":0.0}"#, "target_utilisation"),
            (r#"{"target_utilisation":1.5}"#, "target_utilisation"),
            (r#"{"default_service_mb_per_s":-1.0}"#, "default_service_mb_per_s"),
            (r#"{"idle_timeout_ms":3600001}"#, "idle_timeout_ms"),
            (r#"{"dead_after_ms":10}"#, "dead_after_ms"),
        ] {
            let config: Config = serde_json::from_str(json).unwrap();
            let error = config.validate().unwrap_err();
            assert!(error.contains(setting), "{json}: {error}");
        }
        assert!(serde_json::from_str::<Config>(r#"{"max":1}"#).is_err());
    }
}

//! Leases: the right to be the only one in a role, held in the registry.
//!
//! The decision is a pure state machine ([`LeaseKeeper`]); callers do the reading and writing. A
//! lease is taken over only after its record stood still for a whole term *as observed by the
//! taker*, so no clocks are compared.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thalweg_protocol::{Incarnation, Lease, lease_key};

use crate::{Registry, RegistryError, Revision};

/// Terms of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LeaseConfig {
    /// Time between renewals, milliseconds. Default 500.
    pub renew_ms: u64,
    /// Stillness after which another may take over, milliseconds. Default 3000.
    pub term_ms: u64,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self { renew_ms: 500, term_ms: 3000 }
    }
}

/// One contender for a role.
#[derive(Debug)]
pub struct LeaseKeeper {
    key: String,
    me: Incarnation,
    config: LeaseConfig,
    /// Last renewal that was written, and when it was begun: leadership ends a term after that.
    held: Option<(Revision, u64, Instant)>,
    /// What another holds, and since when it has stood still.
    observed: Option<(Lease, Instant)>,
}

impl LeaseKeeper {
    /// A contender that holds nothing yet.
    #[must_use]
    pub fn new(role: &str, me: Incarnation, config: LeaseConfig) -> Self {
        Self { key: lease_key(role), me, config, held: None, observed: None }
    }

    /// Until when the role is ours, if it is: half a term after the last renewal was begun.
    #[must_use]
    pub fn held_until(&self) -> Option<Instant> {
        self.held.map(|(_, _, renewed)| renewed + self.term() / 2)
    }

    /// Whether the role is ours at `now`.
    #[must_use]
    pub fn holds(&self, now: Instant) -> bool {
        self.held_until().is_some_and(|until| now < until)
    }

    /// How often to call [`Self::tick`].
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.config.renew_ms)
    }

    fn term(&self) -> Duration {
        Duration::from_millis(self.config.term_ms)
    }

    /// Renews, takes over or waits; `begun` is the time now. [`Self::held_until`] then tells whether the role is
    /// ours.
    ///
    /// # Errors
    /// [`RegistryError`]; leadership then lapses by itself if it lasts.
    pub async fn tick(&mut self, registry: &Registry, begun: Instant) -> Result<(), RegistryError> {
        let (lease, revision) = registry.get::<Lease>(&self.key).await?;
        let Some(renewals) = self.decide(lease.as_ref(), begun) else {
            self.held = None;
            return Ok(());
        };
        let renewed = Lease { holder: self.me, renewals };
        self.held = match registry.put(&self.key, &renewed, revision).await? {
            Ok(revision) => {
                if self.held.is_none() {
                    tracing::info!(role = self.key, "took the lease");
                }
                Some((revision, renewals, begun))
            }
            Err(_) => None,
        };
        Ok(())
    }

    /// Gives the role up so that the next contender need not wait.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub async fn release(&mut self, registry: &Registry) -> Result<(), RegistryError> {
        if let Some((revision, _, _)) = self.held.take() {
            // A conflict means that somebody else holds it already.
            let _ = registry.delete(&self.key, revision).await?;
        }
        Ok(())
    }

    /// The renewal count to write, or `None` to wait.
    fn decide(&mut self, lease: Option<&Lease>, now: Instant) -> Option<u64> {
        match lease {
            None => Some(1),
            Some(lease) if lease.holder == self.me => Some(lease.renewals + 1),
            Some(lease) => {
                let since = match &self.observed {
                    Some((seen, since)) if seen == lease => *since,
                    _ => {
                        self.observed = Some((lease.clone(), now));
                        now
                    }
                };
                (now.duration_since(since) >= self.term()).then_some(lease.renewals + 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_moves_only_after_a_term_of_observed_stillness() {
        let mut keeper = LeaseKeeper::new("x", Incarnation([1; 16]), LeaseConfig::default());
        let start = Instant::now();
        let other = |renewals| Lease { holder: Incarnation([2; 16]), renewals };
        assert_eq!(keeper.decide(None, start), Some(1));
        assert_eq!(keeper.decide(Some(&other(5)), start), None);
        assert_eq!(keeper.decide(Some(&other(5)), start + Duration::from_millis(2999)), None);
        // A renewal just before the end starts the wait anew.
        assert_eq!(keeper.decide(Some(&other(6)), start + Duration::from_millis(2999)), None);
        assert_eq!(keeper.decide(Some(&other(6)), start + Duration::from_millis(5000)), None);
        assert_eq!(keeper.decide(Some(&other(6)), start + Duration::from_millis(5999)), Some(7));
        assert_eq!(keeper.decide(Some(&Lease { holder: Incarnation([1; 16]), renewals: 3 }), start), Some(4));
    }
}

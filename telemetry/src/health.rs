//! Health: which components of this process are ready, and what the others wait for.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

/// Readiness of every component in this process. Clones share it; all methods are thread-safe and
/// none of them blocks.
#[derive(Debug, Clone)]
pub struct Health {
    /// A watch channel because [`Health::wait_ready`] needs to hear of changes.
    components: Arc<watch::Sender<BTreeMap<String, Component>>>,
}

/// Readiness of one component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Component {
    /// Whether the component does its work.
    pub ready: bool,
    /// What it waits for; none once it is ready.
    pub reason: Option<String>,
}

/// All components at one instant, as `/readyz` shows them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Whether at least one component is registered and every registered one is ready.
    pub ready: bool,
    /// Components by name.
    pub components: BTreeMap<String, Component>,
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Health {
    /// No component: not ready, since a process that has registered nothing has not begun.
    pub fn new() -> Self {
        Self { components: Arc::new(watch::Sender::new(BTreeMap::new())) }
    }

    /// Registers a component as not ready; the same as [`Health::set_waiting`].
    ///
    /// Register all components before the first one is set ready, so that readiness does not flicker
    /// while a process starts.
    pub fn register(&self, name: &str, reason: impl Into<String>) {
        self.set_waiting(name, reason);
    }

    /// Marks a component ready; registers it if nobody did.
    pub fn set_ready(&self, name: &str) {
        let component = Component { ready: true, reason: None };
        if self.set(name, component) {
            tracing::info!(component = name, "component ready");
        }
    }

    /// Marks a component not ready, with what it waits for; registers it if nobody did.
    pub fn set_waiting(&self, name: &str, reason: impl Into<String>) {
        let reason = reason.into();
        let component = Component { ready: false, reason: Some(reason.clone()) };
        if self.set(name, component) {
            tracing::info!(component = name, %reason, "component waiting");
        }
    }

    /// Whether at least one component is registered and all are ready.
    pub fn is_ready(&self) -> bool {
        all_ready(&self.components.borrow())
    }

    /// All components at this instant.
    pub fn snapshot(&self) -> Snapshot {
        let components = self.components.borrow().clone();
        Snapshot { ready: all_ready(&components), components }
    }

    /// Waits until [`Health::is_ready`]. Without a limit of its own; cancel safe.
    pub async fn wait_ready(&self) {
        // The sender is alive for as long as `self` is, so the only error cannot happen.
        let _ = self.components.subscribe().wait_for(all_ready).await;
    }

    /// Returns whether anything changed, so that a component that repeats itself is logged once.
    fn set(&self, name: &str, component: Component) -> bool {
        self.components.send_if_modified(|components| {
            if components.get(name) == Some(&component) {
                return false;
            }
            components.insert(name.to_owned(), component);
            true
        })
    }
}

fn all_ready(components: &BTreeMap<String, Component>) -> bool {
    !components.is_empty() && components.values().all(|component| component.ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_every_component() {
        let health = Health::new();
        assert!(!health.is_ready(), "nothing registered");
        health.register("store", "opening");
        health.register("nats", "connecting");
        health.set_ready("store");
        assert!(!health.is_ready());
        health.set_ready("nats");
        assert!(health.is_ready());
        health.set_waiting("nats", "connection lost");
        assert!(!health.is_ready());
    }

    #[test]
    fn the_snapshot_has_the_documented_shape() {
        let health = Health::new();
        health.register("nats", "connecting");
        health.set_ready("store");
        assert_eq!(
            serde_json::to_value(health.snapshot()).unwrap(),
            serde_json::json!({
                "ready": false,
                "components": {
                    "nats": {"ready": false, "reason": "connecting"},
                    "store": {"ready": true, "reason": null},
                }
            })
        );
    }

    #[tokio::test]
    async fn waiting_ends_with_the_last_component() {
        let health = Health::new();
        health.register("store", "opening");
        health.register("nats", "connecting");
        let waiter = tokio::spawn({
            let health = health.clone();
            async move { health.wait_ready().await }
        });
        health.set_ready("store");
        assert!(!waiter.is_finished());
        health.set_ready("nats");
        waiter.await.unwrap();
    }

    #[test]
    fn repeating_a_state_changes_nothing() {
        let health = Health::new();
        assert!(health.set("a", Component { ready: true, reason: None }));
        assert!(!health.set("a", Component { ready: true, reason: None }));
    }
}

//! Starting and stopping invokers.

use async_trait::async_trait;

/// An invoker could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start invoker {id}: {source}")]
pub struct ActuatorError {
    /// The invoker's id.
    pub id: String,
    /// Why.
    pub source: std::io::Error,
}

/// Starts and stops invokers by some means.
#[async_trait]
pub trait Actuator: Send {
    /// Whether it can start invokers at all. Where it cannot, partitions are placed on every invoker that
    /// beats, whatever the target.
    fn starts(&self) -> bool {
        true
    }

    /// Starts an invoker that will beat under `id`; returns once it is on its way.
    ///
    /// # Errors
    /// When it cannot be started; the caller tries again later, with another id.
    async fn start(&mut self, id: &str) -> Result<(), ActuatorError>;

    /// Tells an invoker to drain and end; does not wait for it. Idempotent; unknown ids are ignored.
    async fn stop(&mut self, id: &str);

    /// Ids that have ended since the last call, by themselves or after [`Actuator::stop`]. Each is named once.
    /// Call it often: it also ends those that do not heed a stop, where that is possible.
    async fn reap(&mut self) -> Vec<String>;

    /// Stops everything that was started here and waits for it, for a bounded time.
    async fn stop_all(&mut self);
}

/// Starts nothing: the invokers are run by other means, such as an orchestrator that scales on the same
/// depth.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExternalActuator;

#[async_trait]
impl Actuator for ExternalActuator {
    fn starts(&self) -> bool {
        false
    }

    async fn start(&mut self, id: &str) -> Result<(), ActuatorError> {
        let source =
            std::io::Error::new(std::io::ErrorKind::Unsupported, "invokers are started by other means");
        Err(ActuatorError { id: id.to_owned(), source })
    }

    async fn stop(&mut self, _id: &str) {}

    async fn reap(&mut self) -> Vec<String> {
        Vec::new()
    }

    async fn stop_all(&mut self) {}
}

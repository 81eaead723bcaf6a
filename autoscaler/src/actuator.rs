//! Starting and stopping invokers.

use async_trait::async_trait;
use thalweg_protocol::{InvalidName, WireError};

/// An invoker could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start invoker {id}: {source}")]
pub struct ActuatorError {
    /// The invoker's id.
    pub id: String,
    /// Why.
    pub source: StartError,
}

impl ActuatorError {
    /// `id` could not be started because of `source`.
    #[must_use]
    pub fn new(id: &str, source: StartError) -> Self {
        Self { id: id.to_owned(), source }
    }
}

/// Why an invoker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It is not for this actuator to start invokers.
    #[error("invokers are started by other means")]
    Elsewhere,
    /// The system gives no process or thread for it.
    #[error("the system does not start it: {0}")]
    System(#[from] std::io::Error),
    /// Its id cannot be sent.
    #[error(transparent)]
    Id(#[from] InvalidName),
    /// No agent has room.
    #[error(
        "none of {agents} agents has room for it: run `thalweg agent` on another host, or raise agent.max_invokers"
    )]
    NoRoom {
        /// Agents that have been heard lately.
        agents: usize,
    },
    /// An agent refuses.
    #[error("agent {agent}: {error}")]
    Agent {
        /// The agent's name.
        agent: String,
        /// Its answer.
        error: WireError,
    },
    /// An agent does not answer. Should the invoker have been started nevertheless, it is stopped.
    #[error("agent {agent}: {error}")]
    Unanswered {
        /// The agent's name.
        agent: String,
        /// What happened instead.
        error: String,
    },
    /// The Docker Engine lacks the image.
    #[error(
        "the Docker Engine has no image {image:?}: build or pull it there, or name another one (autoscaler.docker.image)"
    )]
    NoImage {
        /// Its name.
        image: String,
    },
    /// The Docker Engine refuses, or is not there.
    #[error("Docker Engine: {0}")]
    Engine(String),
    /// Kubernetes refuses, or does not answer.
    #[error("Kubernetes: {0}")]
    Kubernetes(String),
}

/// Starts and stops invokers by some means.
///
/// `tests/src/actuators.rs` holds every implementation to what is said here.
#[async_trait]
pub trait Actuator: Send {
    /// Whether it can start invokers at all. Where it cannot, partitions are placed on every invoker that
    /// beats, whatever the target.
    fn starts(&self) -> bool {
        true
    }

    /// Starts an invoker that will beat under `id`; returns once it is on its way. One that cannot work and
    /// whose start did not fail ends soon, and is then named by [`Actuator::reap`].
    ///
    /// Cancelled, it may or may not have been started.
    ///
    /// # Errors
    /// When it cannot be started; the caller tries again later, with another id.
    async fn start(&mut self, id: &str) -> Result<(), ActuatorError>;

    /// Tells an invoker to drain and end; does not wait for it. Idempotent; unknown ids are ignored.
    async fn stop(&mut self, id: &str);

    /// Ids that have ended since the last call, by themselves or after [`Actuator::stop`]. Each is named once.
    /// Call it often: it also ends those that do not heed a stop, where that is possible.
    async fn reap(&mut self) -> Vec<String>;

    /// Takes charge of invokers that an earlier autoscaler has started by the same means and that still run:
    /// names those that were not in this actuator's charge, which are from now on. To be called often while this
    /// autoscaler leads, and not while another one does. Means that end with their autoscaler have none.
    async fn adopt(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// How many invokers there should be, for means that only take a number: those of which [`Actuator::starts`]
    /// says that they start none by id. Called often, while this autoscaler leads. Others have nothing to do.
    ///
    /// # Errors
    /// When the number could not be set. It is tried again by later calls.
    async fn scale(&mut self, _invokers: usize) -> Result<(), StartError> {
        Ok(())
    }

    /// Stops everything that was started here or adopted and waits for it, for a bounded time. What ends
    /// meanwhile need not be named by [`Actuator::reap`] any more.
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
        Err(ActuatorError::new(id, StartError::Elsewhere))
    }

    async fn stop(&mut self, _id: &str) {}

    async fn reap(&mut self) -> Vec<String> {
        Vec::new()
    }

    async fn stop_all(&mut self) {}
}

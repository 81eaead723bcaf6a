//! Invokers as containers of a Docker Engine.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error as EngineError,
    models::{
        ContainerCreateBody, ContainerSummary, ContainerSummaryStateEnum as State, EndpointSettings,
        HostConfig, NetworkingConfig,
    },
    query_parameters::{
        CreateContainerOptionsBuilder, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
        StopContainerOptionsBuilder,
    },
};
use serde::{Deserialize, Serialize};
use thalweg_protocol::Name;
use tokio::task::JoinSet;

use crate::{Actuator, ActuatorError, StartError};

/// Label with the deployment that a container belongs to.
const DEPLOYMENT: &str = "thalweg.deployment";
/// Label with the id of the invoker in a container.
const INVOKER: &str = "thalweg.invoker";
/// Name of all invokers on their network.
const ALIAS: &str = "thalweg-invokers";
/// Longest wait for an answer of the engine, seconds.
const ANSWER_SECONDS: u64 = 10;
/// Time between looks at the containers.
const LOOK: Duration = Duration::from_millis(250);
/// Time between looks at invokers that are being waited for.
const POLL: Duration = Duration::from_millis(20);
/// Beyond the drain timeout, for the engine.
const GRACE: Duration = Duration::from_secs(5);

/// Settings for invokers in containers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DockerConfig {
    /// The engine's socket. Default `/var/run/docker.sock`.
    pub socket: PathBuf,
    /// Value of the label `thalweg.deployment`: what carries it is this deployment's to stop and to remove. Default
    /// `default`.
    pub deployment: Name,
    /// The image; its entry point has to be the binary. It is never pulled. Default `thalweg`.
    pub image: String,
    /// The network, or `host`. Default `bridge`.
    pub network: String,
    /// URL of the NATS server as seen from a container; by default that of the autoscaler.
    pub nats_url: Option<String>,
    /// Address of the admin interface in a container. Default `127.0.0.1:0`, which nobody reaches from outside.
    pub admin: String,
    /// Memory of a container, bytes; 0 = no limit. Default 0.
    pub memory_bytes: u64,
    /// CPUs of a container; 0 = no limit. Default 1.
    pub cpus: f64,
}

impl Default for DockerConfig {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/var/run/docker.sock"),
            deployment: "default".parse().unwrap_or_else(|_| unreachable!("it is a name")),
            image: "thalweg".to_owned(),
            network: "bridge".to_owned(),
            nats_url: None,
            admin: "127.0.0.1:0".to_owned(),
            memory_bytes: 0,
            cpus: 1.0,
        }
    }
}

/// Runs every invoker in a container. Stopping is SIGTERM, and SIGKILL by the engine when the invoker has not ended
/// within the drain timeout, also if this process does not live to see it.
///
/// Containers carry the labels `thalweg.deployment` and `thalweg.invoker`. What has ended is removed, with those of
/// an earlier life of the autoscaler; what still runs of them is adopted.
#[derive(Debug)]
pub struct DockerActuator {
    engine: Docker,
    config: DockerConfig,
    arguments: Vec<String>,
    /// Files that a container sees where the engine's host has them.
    files: Vec<PathBuf>,
    drain_timeout: Duration,
    containers: BTreeMap<String, Container>,
    /// Run without being in our charge, as of the last look.
    others: BTreeSet<String>,
    looked: Option<Instant>,
    stops: JoinSet<(String, Result<(), EngineError>)>,
    /// Failures are logged when they begin and when they end.
    answers: bool,
}

#[derive(Debug)]
struct Container {
    stop: Stop,
}

/// How far the end of an invoker has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// It is to run.
    No,
    /// It is to end, and the engine has to be told.
    Wanted,
    /// The engine is at it.
    Asked,
}

impl DockerActuator {
    /// Reaches the engine, agrees on a version of its interface, and removes what has ended of an earlier life.
    /// `arguments` are those of the entry point, with `{id}` for the invoker's id; `files` are mounted read-only.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn open(
        config: DockerConfig,
        arguments: Vec<String>,
        files: Vec<PathBuf>,
        drain_timeout: Duration,
    ) -> Result<Self, StartError> {
        let socket = config.socket.display().to_string();
        let engine = Docker::connect_with_unix(&socket, ANSWER_SECONDS, API_DEFAULT_VERSION);
        let engine = match engine {
            Ok(engine) => engine.negotiate_version().await,
            Err(error) => Err(error),
        };
        let engine = engine.map_err(|error| StartError::Engine(format!("at {socket}: {error}")))?;
        let mut actuator = Self {
            engine,
            config,
            arguments,
            files,
            drain_timeout,
            containers: BTreeMap::new(),
            others: BTreeSet::new(),
            looked: None,
            stops: JoinSet::new(),
            answers: true,
        };
        actuator.look().await;
        Ok(actuator)
    }

    /// The container of an invoker.
    fn name(&self, id: &str) -> String {
        format!("thalweg-{}-{id}", self.config.deployment)
    }

    fn body(&self, id: &str) -> ContainerCreateBody {
        let config = &self.config;
        let labels = [(DEPLOYMENT, config.deployment.to_string()), (INVOKER, id.to_owned())];
        let limit = |limit: f64| (limit > 0.0).then_some(limit as i64);
        let bind = |path: &PathBuf| format!("{0}:{0}:ro", path.display());
        ContainerCreateBody {
            image: Some(config.image.clone()),
            cmd: Some(self.arguments.iter().map(|argument| argument.replace("{id}", id)).collect()),
            labels: Some(labels.map(|(label, value)| (label.to_owned(), value)).into()),
            networking_config: self.networking(),
            host_config: Some(HostConfig {
                network_mode: Some(config.network.clone()),
                memory: limit(config.memory_bytes as f64),
                nano_cpus: limit(config.cpus * 1e9),
                binds: Some(self.files.iter().map(bind).collect()),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        }
    }

    /// On a network of one's own, where an engine resolves names, all invokers are found by one: for Prometheus.
    fn networking(&self) -> Option<NetworkingConfig> {
        let network = &self.config.network;
        let shared = ["bridge", "default", "host", "none"].contains(&network.as_str());
        if shared || network.starts_with("container:") {
            return None;
        }
        let endpoint =
            EndpointSettings { aliases: Some(vec![ALIAS.to_owned()]), ..EndpointSettings::default() };
        Some(NetworkingConfig { endpoints_config: Some(HashMap::from([(network.clone(), endpoint)])) })
    }

    /// Removes a container whatever its state; one that is gone is gone.
    async fn remove(&self, id: &str) {
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        if let Err(error) = self.engine.remove_container(&self.name(id), Some(options)).await
            && status(&error) != Some(404)
        {
            // It is tried again by whoever looks next.
            tracing::debug!(invoker = id, %error, "a container stays");
        }
    }

    /// All containers of the deployment, by invoker; `None` while the engine does not answer.
    async fn list(&mut self) -> Option<BTreeMap<String, ContainerSummary>> {
        let label = format!("{DEPLOYMENT}={}", self.config.deployment);
        let filters = HashMap::from([("label", vec![label])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let listed = self.engine.list_containers(Some(options)).await;
        match &listed {
            Ok(_) if !self.answers => tracing::info!("the Docker Engine answers again"),
            Err(error) if self.answers => {
                tracing::warn!(%error, "the Docker Engine does not answer; everything stays as it is");
            }
            _ => {}
        }
        self.answers = listed.is_ok();
        let by_id = |container: ContainerSummary| {
            let id = container.labels.as_ref()?.get(INVOKER)?.clone();
            Some((id, container))
        };
        Some(listed.ok()?.into_iter().filter_map(by_id).collect())
    }

    /// Finds out who has ended, and removes their containers.
    async fn look(&mut self) -> Vec<String> {
        self.looked = Some(Instant::now());
        let Some(listed) = self.list().await else { return Vec::new() };
        let mut ended = Vec::new();
        self.others.clear();
        for (id, container) in &listed {
            let ours = self.containers.contains_key(id);
            match container.state {
                Some(State::EXITED | State::DEAD) => {
                    let state = container.status.as_deref().unwrap_or_default();
                    tracing::info!(invoker = id, state, ours, "invoker ended; removing its container");
                    self.remove(id).await;
                    ended.extend(ours.then(|| id.clone()));
                }
                // About to be started by somebody else.
                Some(State::CREATED | State::REMOVING) => {}
                _ if !ours => {
                    self.others.insert(id.clone());
                }
                _ => {}
            }
        }
        ended.extend(self.containers.keys().filter(|id| !listed.contains_key(*id)).cloned());
        for id in &ended {
            self.containers.remove(id);
        }
        ended
    }

    /// Tells the engine of the stops that it does not know of; hears how the others went.
    fn stop_wanted(&mut self) {
        while let Some(joined) = self.stops.try_join_next() {
            if let Ok((id, Err(error))) = joined
                // Its end has come before, in one way or the other.
                && !matches!(status(&error), Some(304 | 404))
                && let Some(container) = self.containers.get_mut(&id)
            {
                tracing::warn!(invoker = id, %error, "the Docker Engine has not stopped an invoker; asking again");
                container.stop = Stop::Wanted;
            }
        }
        let seconds = i32::try_from(self.drain_timeout.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::new().t(seconds).build();
        for (id, container) in self.containers.iter_mut().filter(|(_, each)| each.stop == Stop::Wanted) {
            container.stop = Stop::Asked;
            let (id, options) = (id.clone(), options.clone());
            // The answer comes when it has ended.
            let engine = self.engine.clone().with_timeout(self.drain_timeout + GRACE);
            let name = format!("thalweg-{}-{id}", self.config.deployment);
            self.stops.spawn(async move {
                let stopped = engine.stop_container(&name, Some(options)).await;
                (id, stopped)
            });
        }
    }
}

/// The engine's answer, if it gave one.
fn status(error: &EngineError) -> Option<u16> {
    match error {
        EngineError::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

#[async_trait]
impl Actuator for DockerActuator {
    async fn start(&mut self, id: &str) -> Result<(), ActuatorError> {
        let name = self.name(id);
        let options = CreateContainerOptionsBuilder::new().name(&name).build();
        let created = self.engine.create_container(Some(options), self.body(id)).await;
        created.map_err(|error| {
            let image = self.config.image.clone();
            let source = match status(&error) {
                Some(404) => StartError::NoImage { image },
                _ => StartError::Engine(error.to_string()),
            };
            ActuatorError::new(id, source)
        })?;
        if let Err(error) = self.engine.start_container(&name, None).await {
            self.remove(id).await;
            return Err(ActuatorError::new(id, StartError::Engine(error.to_string())));
        }
        tracing::info!(invoker = id, container = name, "started invoker");
        self.containers.insert(id.to_owned(), Container { stop: Stop::No });
        Ok(())
    }

    async fn stop(&mut self, id: &str) {
        if let Some(container) = self.containers.get_mut(id)
            && container.stop == Stop::No
        {
            container.stop = Stop::Wanted;
            self.stop_wanted();
        }
    }

    async fn reap(&mut self) -> Vec<String> {
        self.stop_wanted();
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return Vec::new();
        }
        self.look().await
    }

    async fn adopt(&mut self) -> Vec<String> {
        let adopted = std::mem::take(&mut self.others);
        for id in &adopted {
            self.containers.insert(id.clone(), Container { stop: Stop::No });
        }
        adopted.into_iter().collect()
    }

    async fn stop_all(&mut self) {
        for container in self.containers.values_mut().filter(|each| each.stop == Stop::No) {
            container.stop = Stop::Wanted;
        }
        let deadline = Instant::now() + self.drain_timeout + GRACE;
        while !self.containers.is_empty() && Instant::now() < deadline {
            self.reap().await;
            tokio::time::sleep(POLL).await;
        }
        if !self.containers.is_empty() {
            tracing::error!(invokers = self.containers.len(), "containers did not end in time");
        }
    }
}

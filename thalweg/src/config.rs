//! Configuration of all components in one tree: defaults, one TOML file, environment, flags.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};
use thalweg_autoscaler::PoolBounds;
use thalweg_broker::{NatsConfig, StreamsConfig};
use thalweg_protocol::Name;
use thalweg_telemetry::{config::Loader, logs::LogFormat};

/// Everything that can be set. Environment: `THALWEG__SECTION__KEY`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The NATS server that connects all components.
    pub nats: NatsConfig,
    /// The work queues; the same for gateway and autoscaler.
    pub streams: StreamsConfig,
    /// The gateway.
    pub gateway: thalweg_gateway::Config,
    /// The store.
    pub store: thalweg_store::Config,
    /// Invokers.
    pub invoker: thalweg_invoker::Config,
    /// The autoscaler.
    pub autoscaler: Autoscaler,
    /// Agents: those that run invokers on their hosts for an autoscaler elsewhere.
    pub agent: thalweg_autoscaler::AgentConfig,
    /// The embedded broker of `thalweg up`.
    pub embedded: Embedded,
    /// Health, metrics, and the log filter.
    pub admin: Admin,
    /// Logs.
    pub log: Log,
}

impl Config {
    /// Reads and checks it, when the process starts and when it is told to read it again.
    ///
    /// # Errors
    /// Naming the key, where it was set, and what would be accepted.
    pub fn load(loader: &Loader) -> anyhow::Result<Self> {
        let config: Self = loader.load()?;
        config.check()?;
        Ok(config)
    }

    /// This configuration, with what may change while a process runs taken from `read`. This is the only list
    /// of such settings; `docs/thalweg.toml` calls them reloadable, and a test compares the two.
    #[must_use]
    pub fn adopting(&self, read: &Self) -> Self {
        let mut next = self.clone();
        next.log.filter.clone_from(&read.log.filter);
        next.gateway.window_budget_bytes = read.gateway.window_budget_bytes;
        next.autoscaler.policy = read.autoscaler.policy.clone().keeping_fixed(&self.autoscaler.policy);
        next
    }

    /// Checks what no component can check by itself, or not in time.
    ///
    /// # Errors
    /// Naming the key and what would be accepted.
    pub fn check(&self) -> anyhow::Result<()> {
        let most = thalweg_protocol::limits::MAX_PARTITIONS;
        let pools = &self.streams.pools;
        for (name, pool) in pools {
            anyhow::ensure!(pool.partitions >= 1, "streams.pools.{name}.partitions = 0: at least 1");
        }
        let total = pools
            .values()
            .fold(u64::from(self.streams.partitions), |total, pool| total + u64::from(pool.partitions));
        anyhow::ensure!(
            total <= u64::from(most),
            "streams.pools: {total} partitions with the shared ones, at most {most}"
        );
        for (name, bounds) in &self.autoscaler.pools {
            anyhow::ensure!(
                pools.contains_key(name),
                "autoscaler.pools.{name}: no such pool in streams.pools"
            );
            let policy = self.autoscaler.policy.within(*bounds).validate();
            policy.map_err(|error| anyhow::anyhow!("autoscaler.pools.{name}: {error}"))?;
        }
        anyhow::ensure!(
            (1..=most).contains(&self.streams.partitions),
            "streams.partitions = {}: 1 to {most}",
            self.streams.partitions
        );
        // Each service checks its own settings when it starts; these may also come later, and then a mistake
        // has to be found before anything is changed.
        let policy = self.autoscaler.policy.validate();
        policy.map_err(|error| anyhow::anyhow!("autoscaler.policy: {error}"))
    }
}

/// The autoscaler and how it starts invokers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Autoscaler {
    /// How invokers are started and stopped.
    pub actuator: Actuator,
    /// Invokers in containers.
    pub docker: thalweg_autoscaler::DockerConfig,
    /// Invokers in pods.
    pub kubernetes: thalweg_autoscaler::KubernetesConfig,
    /// The policy.
    pub policy: thalweg_autoscaler::Config,
    /// Bounds of pools beside the shared one, by name; the rest of the policy is common. A pool that is not here has
    /// the shared one's.
    pub pools: BTreeMap<Name, PoolBounds>,
}

/// How invokers are started and stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Actuator {
    /// As threads of `thalweg up`; as processes of `thalweg autoscaler`.
    #[default]
    Auto,
    /// As processes on this host.
    Process,
    /// On the hosts where a `thalweg agent` runs.
    Agent,
    /// In containers of a Docker Engine.
    Docker,
    /// As pods of a Deployment that is scaled.
    Kubernetes,
    /// Not at all: whoever runs `thalweg invoker` is given work.
    External,
}

/// The embedded nats-server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Embedded {
    /// The nats-server binary; by default `THALWEG_NATS_SERVER`, else the one on PATH.
    pub nats_server: Option<PathBuf>,
    /// Its port on 127.0.0.1; 0 takes a free one. Default 4222.
    pub port: u16,
    /// Where it keeps the registry. Default `thalweg-data/nats`.
    pub data_dir: PathBuf,
    /// Memory for work queues, bytes. Default 2 GiB: the window budget and headroom.
    pub max_memory_bytes: u64,
    /// Sync every write of the registry to disk; durability level `disk` needs it. Default false.
    pub sync_always: bool,
}

impl Default for Embedded {
    fn default() -> Self {
        Self {
            nats_server: None,
            port: 4222,
            data_dir: PathBuf::from("thalweg-data/nats"),
            max_memory_bytes: 2 << 30,
            sync_always: false,
        }
    }
}

/// Health, metrics, and the log filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Address of /livez, /readyz, /metrics and /log; port 0 takes a free one. Default 127.0.0.1:9600.
    pub listen: SocketAddr,
    /// Whether metrics are recorded. Where not, /metrics is empty. Default true.
    pub metrics: bool,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9600)), metrics: true }
    }
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What is logged, in the syntax of tracing's EnvFilter. Default `info,async_nats=warn`.
    pub filter: String,
    /// `auto`, `human` or `json`; auto is human on a terminal. Default auto.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info,async_nats=warn,sled=warn".to_owned(), format: LogFormat::Auto }
    }
}

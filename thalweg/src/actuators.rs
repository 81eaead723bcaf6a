//! The means by which an autoscaler starts invokers, made from the configuration.

use std::{io, net::SocketAddr, path::Path, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::Context as _;
use thalweg_autoscaler::{
    Actuator, AgentActuator, DockerActuator, ExternalActuator, InProcessActuator, ProcessActuator,
};
use thalweg_broker::{Connection, NatsConfig, no_report};
use thalweg_invoker::{Control, CpuScope};
use thalweg_store::ShardStore;
use thalweg_telemetry::others::Others;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Config};

/// The actuator that the configuration names, for an autoscaler in a process of its own. The metrics of invokers that are
/// its children come to `others`.
///
/// # Errors
/// When its means are not there.
pub async fn open(
    config: &Config,
    connection: &Connection,
    others: Others,
) -> anyhow::Result<Box<dyn Actuator>> {
    Ok(match config.autoscaler.actuator {
        config::Actuator::External => Box::new(ExternalActuator),
        config::Actuator::Auto | config::Actuator::Process => {
            let program = std::env::current_exe().context("finding this program")?;
            Box::new(process(&program, config, others))
        }
        config::Actuator::Agent => Box::new(agents(config, connection).await?),
        config::Actuator::Docker => Box::new(docker(config).await?),
        config::Actuator::Kubernetes => kubernetes(config).await?,
    })
}

/// Time that an invoker has to end once it was told to.
fn drain_timeout(config: &Config) -> Duration {
    Duration::from_millis(config.autoscaler.policy.drain_timeout_ms)
}

/// Invokers as children of this process, with this process's settings for them. `program` is the binary.
#[must_use]
pub fn process(program: &Path, config: &Config, others: Others) -> ProcessActuator {
    let actuator = child(program, config, &[], drain_timeout(config), others);
    if config.autoscaler.policy.drain_on_shutdown { actuator } else { actuator.leave_running() }
}

/// As [`process`], for an agent: its children do not survive it, because nobody else could stop them.
#[must_use]
pub fn tied_process(program: &Path, config: &Config, others: Others) -> ProcessActuator {
    let drain = Duration::from_millis(config.agent.drain_timeout_ms);
    child(program, config, &["--with-stdin"], drain, others).tied()
}

/// With the help of the kernel where there is a quota: a whole CPU is what one thread can use at most.
fn child(program: &Path, config: &Config, more: &[&str], drain: Duration, others: Others) -> ProcessActuator {
    let mut arguments = arguments(config, &config.nats.url, "127.0.0.1:0");
    arguments.push("--announce".to_owned());
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    let announce = Arc::new(move |id: &str, address: Option<SocketAddr>| others.set(id, address));
    let actuator = ProcessActuator::new(program, arguments, drain).announcing(announce);
    let cpus = config.invoker.cpu_quota;
    if cpus < 1.0 { actuator.cpu_quota(cpus) } else { actuator }
}

/// Invokers on the hosts of agents.
///
/// # Errors
/// When the connection is closed.
pub async fn agents(config: &Config, connection: &Connection) -> anyhow::Result<AgentActuator> {
    let dead_after = Duration::from_millis(config.autoscaler.policy.dead_after_ms);
    let opened = AgentActuator::open(connection.clone(), dead_after, drain_timeout(config)).await;
    opened.context("listening for agents")
}

/// Invokers in containers, with this process's settings for them.
///
/// # Errors
/// When the engine does not answer.
pub async fn docker(config: &Config) -> anyhow::Result<DockerActuator> {
    let docker = config.autoscaler.docker.clone();
    let arguments = arguments(config, docker.nats_url.as_ref().unwrap_or(&config.nats.url), &docker.admin);
    let files = config.nats.credentials.iter().cloned().collect();
    Ok(DockerActuator::open(docker, arguments, files, drain_timeout(config)).await?)
}

/// Invokers as pods of a Deployment that is scaled.
#[cfg(feature = "kubernetes")]
async fn kubernetes(config: &Config) -> anyhow::Result<Box<dyn Actuator>> {
    let config = config.autoscaler.kubernetes.clone();
    Ok(Box::new(thalweg_autoscaler::KubernetesActuator::open(config).await?))
}

#[cfg(not(feature = "kubernetes"))]
async fn kubernetes(_config: &Config) -> anyhow::Result<Box<dyn Actuator>> {
    anyhow::bail!(
        "autoscaler.actuator = \"kubernetes\": this binary was built without it; \
         build it with `--features kubernetes`, or take \"external\""
    )
}

/// The arguments of an invoker, its id as `{id}`, with this process's settings for it.
fn arguments(config: &Config, nats_url: &str, admin: &str) -> Vec<String> {
    let invoker = &config.invoker;
    let sets = [
        ("invoker.cpu_quota", format!("{:?}", invoker.cpu_quota)),
        ("invoker.memory_bytes", invoker.memory_bytes.to_string()),
        ("invoker.invocations", invoker.invocations.to_string()),
        ("invoker.beat_ms", invoker.beat_ms.to_string()),
        ("invoker.drain_ms", invoker.drain_ms.to_string()),
        ("invoker.linger_ms", invoker.linger_ms.to_string()),
        ("admin.metrics", config.admin.metrics.to_string()),
        ("log.filter", config.log.filter.clone()),
        ("log.format", config.log.format.to_string()),
    ];
    let credentials =
        config.nats.credentials.iter().map(|path| ("nats.credentials", path.display().to_string()));
    let mut args: Vec<String> = vec!["invoker".into(), "--id".into(), "{id}".into(), "--admin".into()];
    args.push(admin.to_owned());
    args.extend(["--nats-url".into(), nats_url.to_owned()]);
    let pool = invoker.pool.iter().map(|pool| ("invoker.pool", pool.to_string()));
    for (key, value) in sets.into_iter().chain(pool).chain(credentials) {
        args.extend(["--set".into(), format!("{key}={value}")]);
    }
    args
}

/// Starts the thread of one invoker, given its id and the token that stops it.
type Spawn = Box<dyn Fn(String, CancellationToken) -> io::Result<JoinHandle<()>> + Send>;

/// Invokers as threads of this process, with this process's settings for them, calling `store` directly.
#[must_use]
pub fn in_process(config: &Config, store: Arc<dyn ShardStore>) -> InProcessActuator<Spawn> {
    let (nats, invoker) = (config.nats.clone(), config.invoker.clone());
    let spawn: Spawn = Box::new(move |id, token| {
        let (nats, store) = (nats.clone(), store.clone());
        let config = thalweg_invoker::Config { id: id.clone(), ..invoker.clone() };
        std::thread::Builder::new().name(id).spawn(move || invoke(config, &nats, store, &token))
    });
    InProcessActuator::new(spawn, drain_timeout(config))
}

/// One invoker on a thread of its own.
fn invoke(
    config: thalweg_invoker::Config,
    nats: &NatsConfig,
    store: Arc<dyn ShardStore>,
    token: &CancellationToken,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "an invoker could not start");
            return;
        }
    };
    runtime.block_on(async {
        let control = format!("{}-control", config.id);
        let opened = tokio::try_join!(
            Connection::open(&config.id, nats, token),
            Control::open(&control, nats, token),
        );
        let (connection, control) = match opened {
            Ok((Some(connection), Some(control))) => (connection, control),
            Ok(_) => return,
            Err(error) => {
                tracing::error!(%error, "an invoker could not connect");
                return;
            }
        };
        let (scope, token) = (CpuScope::Thread, token.clone());
        let ended = thalweg_invoker::run(config, connection, control, store, scope, no_report(), token).await;
        if let Err(error) = ended {
            tracing::warn!(%error, "an invoker ended");
        }
    });
}

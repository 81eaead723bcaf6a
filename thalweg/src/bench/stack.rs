//! A private deployment: every component a process of its own, so that its CPU time can be told apart.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;

use crate::{
    nats::{self, terminate},
    process,
};

/// What a deployment is like.
#[derive(Clone, Debug)]
pub(super) struct Options {
    /// Invokers, fixed.
    pub(super) invokers: usize,
    /// Memory for the broker's queues, bytes.
    pub(super) broker_memory_bytes: u64,
    /// Sync the registry, as level `disk` needs.
    pub(super) sync_always: bool,
    /// Further settings, `key=value`.
    pub(super) settings: Vec<String>,
    /// Where the logs stay, if anywhere.
    pub(super) logs: Option<PathBuf>,
}

/// CPU time of a deployment's parts, seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cpu {
    pub(super) broker: f64,
    pub(super) invokers: f64,
    pub(super) store: f64,
    /// Gateway and autoscaler.
    pub(super) gateway: f64,
}

/// A running deployment. Dropped, it is killed.
pub(super) struct Stack {
    // Ended from top to bottom: the autoscaler ends its invokers.
    autoscaler: Child,
    gateway: Child,
    store: Child,
    server: nats::Server,
    _directory: tempfile::TempDir,
    logs: PathBuf,
}

impl Stack {
    pub(super) fn start(options: &Options) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("creating a temporary directory")?;
        let logs = options.logs.clone().unwrap_or_else(|| directory.path().join("logs"));
        fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
        let server = nats::Server::start(nats::Options {
            binary: nats::find(None)?,
            port: 0,
            data_dir: directory.path().join("nats"),
            max_memory_bytes: options.broker_memory_bytes,
            sync_always: options.sync_always,
        })?;
        let invokers = options.invokers;
        let settings = options.settings.iter().cloned().chain([
            "gateway.http_listen=127.0.0.1:0".to_owned(),
            format!("autoscaler.policy.min_invokers={invokers}"),
            format!("autoscaler.policy.max_invokers={invokers}"),
        ]);
        let settings: Vec<_> = settings.flat_map(|setting| ["--set".to_owned(), setting]).collect();
        let spawn = |component: &str, more: &[&str]| {
            let log = File::create(logs.join(format!("{component}.log")))?;
            Command::new(std::env::current_exe()?)
                .args([component, "--admin", "127.0.0.1:0", "--nats-url", &server.url()])
                .args(&settings)
                .args(more)
                .current_dir(directory.path())
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .with_context(|| format!("starting {component}"))
        };
        let data = directory.path().join("store").display().to_string();
        let store = spawn("store", &["--data-dir", &data])?;
        let gateway = spawn("gateway", &[])?;
        let autoscaler = spawn("autoscaler", &[])?;
        Ok(Self { autoscaler, gateway, store, server, _directory: directory, logs })
    }

    /// URL of its NATS server.
    pub(super) fn url(&self) -> String {
        self.server.url()
    }

    /// Process ids of the invokers that live.
    pub(super) fn invokers(&self) -> Vec<u32> {
        process::children(self.autoscaler.id())
    }

    /// Process ids of all parts.
    pub(super) fn pids(&self) -> Vec<u32> {
        let parts = [self.server.pid(), self.store.id(), self.gateway.id(), self.autoscaler.id()];
        parts.into_iter().chain(self.invokers()).collect()
    }

    /// CPU time so far.
    pub(super) fn cpu(&self) -> Cpu {
        let (autoscaler, ended) = process::cpu_seconds(self.autoscaler.id());
        let living: f64 = self.invokers().into_iter().map(|pid| process::cpu_seconds(pid).0).sum();
        Cpu {
            broker: process::cpu_seconds(self.server.pid()).0,
            invokers: ended + living,
            store: process::cpu_seconds(self.store.id()).0,
            gateway: process::cpu_seconds(self.gateway.id()).0 + autoscaler,
        }
    }

    /// Shows the ends of the logs, to explain a failure.
    pub(super) fn explain(&self) {
        for log in ["gateway", "store", "autoscaler"] {
            if let Some(tail) = tail(&self.logs.join(format!("{log}.log"))) {
                eprintln!("--- end of the log of {log}\n{tail}");
            }
        }
    }

    /// Ends everything in order.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        for child in [&mut self.autoscaler, &mut self.gateway, &mut self.store] {
            terminate(child)?;
        }
        Ok(())
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        for child in [&mut self.autoscaler, &mut self.gateway, &mut self.store] {
            if matches!(child.try_wait(), Ok(None)) {
                let _ = terminate(child);
            }
        }
    }
}

fn tail(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let lines: Vec<_> = text.lines().rev().take(8).collect();
    Some(lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
}

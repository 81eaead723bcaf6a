//! A private deployment: every component a process of its own, so that its CPU time can be told apart.

use std::{
    ffi::OsStr,
    fs::{self, File},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;
use serde::Serialize;

use crate::{
    nats::{self, signal, terminate, wait},
    process,
};

/// Who starts invokers, and how many.
#[derive(Clone, Debug)]
pub(super) enum Invokers {
    /// The autoscaler, within these bounds.
    Scaled(RangeInclusive<usize>),
    /// The benchmark, with [`Stack::start_invoker`]; it also places them. There is no autoscaler.
    Own,
}

impl Invokers {
    /// Always that many.
    pub(super) fn fixed(count: usize) -> Self {
        Self::Scaled(count..=count)
    }
}

/// What a deployment is like.
#[derive(Clone, Debug)]
pub(super) struct Options {
    /// Its invokers.
    pub(super) invokers: Invokers,
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
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Cpu {
    pub(super) broker: f64,
    pub(super) invokers: f64,
    pub(super) store: f64,
    pub(super) gateway: f64,
    pub(super) autoscaler: f64,
}

impl Cpu {
    pub(super) fn total(self) -> f64 {
        self.broker + self.invokers + self.store + self.gateway + self.autoscaler
    }

    /// Part by part.
    pub(super) fn zip(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            broker: f(self.broker, other.broker),
            invokers: f(self.invokers, other.invokers),
            store: f(self.store, other.store),
            gateway: f(self.gateway, other.gateway),
            autoscaler: f(self.autoscaler, other.autoscaler),
        }
    }

    /// What was used after `before`.
    pub(super) fn since(self, before: Self) -> Self {
        self.zip(before, |after, before| after - before)
    }
}

/// A running deployment. Dropped, it is killed.
pub(super) struct Stack {
    // Ended from top to bottom: the autoscaler ends its invokers.
    own_invokers: Vec<(String, Child)>,
    /// CPU time of those that have been ended, seconds.
    ended_cpu: f64,
    autoscaler: Option<Child>,
    gateway: Child,
    store: Child,
    server: nats::Server,
    directory: tempfile::TempDir,
    logs: PathBuf,
    /// Flags of every component.
    settings: Vec<String>,
    /// The beginning of every component's command line, such as a profiler; mostly empty.
    wrapper: Vec<String>,
}

impl Stack {
    pub(super) fn start(options: &Options) -> anyhow::Result<Self> {
        Self::start_under(Vec::new(), options)
    }

    /// With every component but the broker run by another program, which is given its command line as arguments.
    pub(super) fn start_under(wrapper: Vec<String>, options: &Options) -> anyhow::Result<Self> {
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
        let mut settings = vec!["gateway.http_listen=127.0.0.1:0".to_owned(), "log.format=json".to_owned()];
        if let Invokers::Scaled(bounds) = &options.invokers {
            settings.push(format!("autoscaler.policy.min_invokers={}", bounds.start()));
            settings.push(format!("autoscaler.policy.max_invokers={}", bounds.end()));
        }
        settings.extend(options.settings.iter().cloned());
        let settings: Vec<_> =
            settings.into_iter().flat_map(|setting| ["--set".to_owned(), setting]).collect();
        let spawn = |component: &str, more: &[&str]| {
            let places = (directory.path(), logs.as_path());
            spawn(&wrapper, (component, component), &server.url(), (&settings, more), places)
        };
        let data = directory.path().join("store").display().to_string();
        let store = spawn("store", &["--data-dir", &data])?;
        let gateway = spawn("gateway", &[])?;
        let autoscaler = match options.invokers {
            Invokers::Scaled(_) => Some(spawn("autoscaler", &[])?),
            Invokers::Own => None,
        };
        let (own_invokers, ended_cpu) = (Vec::new(), 0.0);
        Ok(Self {
            own_invokers,
            ended_cpu,
            autoscaler,
            gateway,
            store,
            server,
            directory,
            logs,
            settings,
            wrapper,
        })
    }

    /// Starts an invoker that no autoscaler knows of, with a setting of its own if need be. Its log is `<id>.log`.
    pub(super) fn start_invoker(&mut self, id: &str, setting: Option<&str>) -> anyhow::Result<()> {
        let (settings, url) = (&self.settings, self.server.url());
        let mut more = vec!["--id", id];
        more.extend(setting.into_iter().flat_map(|setting| ["--set", setting]));
        let places = (self.directory.path(), self.logs.as_path());
        let child = spawn(&self.wrapper, ("invoker", id), &url, (settings, &more), places)?;
        self.own_invokers.push((id.to_owned(), child));
        Ok(())
    }

    /// The log of a component, or of an invoker by its id: lines of JSON. Invokers that the autoscaler has started
    /// write into its log.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// URL of its NATS server.
    pub(super) fn url(&self) -> String {
        self.server.url()
    }

    /// Process ids of the invokers that live.
    pub(super) fn invokers(&self) -> Vec<u32> {
        let own = self.own_invokers.iter().map(|(_, invoker)| invoker.id());
        let scaled = self.autoscaler.iter().flat_map(|autoscaler| process::children(autoscaler.id()));
        own.chain(scaled).collect()
    }

    /// Process ids of all parts.
    pub(super) fn pids(&self) -> Vec<u32> {
        let parts = [self.server.pid(), self.store.id(), self.gateway.id()];
        let autoscaler = self.autoscaler.iter().map(Child::id);
        parts.into_iter().chain(autoscaler).chain(self.invokers()).collect()
    }

    /// CPU time so far.
    pub(super) fn cpu(&self) -> Cpu {
        let autoscaler = self.autoscaler.as_ref();
        let (autoscaler, ended) =
            autoscaler.map_or((0.0, 0.0), |autoscaler| process::cpu_seconds(autoscaler.id()));
        let living: f64 = self.invokers().into_iter().map(|pid| process::cpu_seconds(pid).0).sum();
        Cpu {
            broker: process::cpu_seconds(self.server.pid()).0,
            invokers: self.ended_cpu + ended + living,
            store: process::cpu_seconds(self.store.id()).0,
            gateway: process::cpu_seconds(self.gateway.id()).0,
            autoscaler,
        }
    }

    /// Shows the ends of the logs, to explain a failure.
    pub(super) fn explain(&self) {
        for log in ["gateway", "store", "autoscaler"] {
            if let Some(tail) = tail(&self.log(log)) {
                eprintln!("--- end of the log of {log}\n{tail}");
            }
        }
    }

    /// Components of which the autoscaler ends its invokers, in the order in which they end.
    fn children(&mut self) -> impl Iterator<Item = &mut Child> {
        let invokers = self.own_invokers.iter_mut().map(|(_, invoker)| invoker).chain(&mut self.autoscaler);
        invokers.chain([&mut self.gateway, &mut self.store])
    }

    /// Ends the invokers that the benchmark has started under ids with this beginning, in order.
    pub(super) fn end_invokers(&mut self, beginning: &str) -> anyhow::Result<()> {
        let mut ending: Vec<_> =
            self.own_invokers.extract_if(.., |(id, _)| id.starts_with(beginning)).collect();
        // All at once, so that none waits for another; what they do after this is not in the CPU time.
        for (_, invoker) in &ending {
            self.ended_cpu += process::cpu_seconds(invoker.id()).0;
            signal(invoker);
        }
        ending.iter_mut().try_for_each(|(_, invoker)| wait(invoker))
    }

    /// Ends everything in order.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        self.children().try_for_each(|child| terminate(child).map(drop))
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        for child in self.children() {
            if matches!(child.try_wait(), Ok(None)) {
                let _ = terminate(child);
            }
        }
    }
}

/// Starts a component; `name` is that of its log.
fn spawn(
    wrapper: &[String],
    (component, name): (&str, &str),
    url: &str,
    (settings, more): (&[String], &[&str]),
    (directory, logs): (&Path, &Path),
) -> anyhow::Result<Child> {
    let log = File::create(logs.join(format!("{name}.log")))?;
    let binary = std::env::current_exe()?;
    let mut words = wrapper.iter().map(OsStr::new).chain([binary.as_os_str()]);
    let program = words.next().unwrap_or_default();
    Command::new(program)
        .args(words)
        .args([component, "--admin", "127.0.0.1:0", "--nats-url", url])
        .args(settings)
        .args(more)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {name} with {}", program.display()))
}

fn tail(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let lines: Vec<_> = text.lines().rev().take(8).collect();
    Some(lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
}

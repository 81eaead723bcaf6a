//! Every component as a process of its own, supervised: whoever dies is started again.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use thalweg::nats;

/// A running cluster. Dropped, everything is killed.
pub struct Cluster {
    shared: Arc<Shared>,
    supervisor: Option<std::thread::JoinHandle<()>>,
    directory: tempfile::TempDir,
    url: String,
}

struct Shared {
    directory: PathBuf,
    url: String,
    sets: Vec<String>,
    state: Mutex<State>,
    stop: AtomicBool,
}

struct State {
    broker: Option<nats::Server>,
    children: BTreeMap<String, Process>,
    deaths: BTreeMap<String, usize>,
}

struct Process {
    child: Child,
    failpoints: String,
    /// Started again after a death.
    supervised: bool,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The binary under test, beside the test's own.
///
/// # Panics
/// When it was not built.
#[must_use]
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("the test's path");
    let path = test.parent().and_then(Path::parent).expect("target directory").join("thalweg");
    assert!(path.is_file(), "{} is missing: `make test` builds it", path.display());
    path
}

impl Cluster {
    /// Starts nats-server, store, gateway and autoscaler; invokers come with [`Cluster::invoker`].
    /// `sets` are `key=value` settings for all.
    ///
    /// # Panics
    /// When something does not start.
    #[must_use]
    pub fn start(sets: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let options = nats::Options {
            binary: crate::nats_server(),
            port: 0,
            data_dir: directory.path().join("nats"),
            max_memory_bytes: 1 << 30,
            sync_always: false,
        };
        let broker = nats::Server::start(options).expect("nats-server starts");
        let url = broker.url();
        let defaults = [
            "gateway.http_listen=127.0.0.1:0",
            "autoscaler.actuator=external",
            "autoscaler.policy.tick_ms=100",
            // Quick to believe in a death: tests kill a lot.
            "autoscaler.policy.dead_after_ms=1000",
            "autoscaler.policy.lease.renew_ms=100",
            "autoscaler.policy.lease.term_ms=700",
            "gateway.lease.renew_ms=100",
            "gateway.lease.term_ms=700",
            "invoker.beat_ms=100",
            "store.flush_interval_ms=50",
        ];
        let sets = defaults.iter().chain(sets).map(|set| (*set).to_owned()).collect();
        let shared = Arc::new(Shared {
            directory: directory.path().to_owned(),
            url: url.clone(),
            sets,
            state: Mutex::new(State {
                broker: Some(broker),
                children: BTreeMap::new(),
                deaths: BTreeMap::new(),
            }),
            stop: AtomicBool::new(false),
        });
        shared.note_pid("nats", lock(&shared.state).broker.as_ref().expect("just started").pid());
        for role in ["gateway", "autoscaler"] {
            shared.spawn(role, &[role], "", true);
        }
        shared.spawn_store("");
        let supervised = shared.clone();
        let supervisor = std::thread::spawn(move || supervised.supervise());
        Self { shared, supervisor: Some(supervisor), directory, url }
    }

    /// URL of its NATS server.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its directory: data, logs, hits.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts an invoker called `id`, with fail points; it is not started again when it dies.
    pub fn invoker(&self, id: &str, failpoints: &str) {
        self.shared.spawn(id, &["invoker", "--id", id], failpoints, false);
    }

    /// Starts an agent called `name` for at most `most` invokers; it is not started again when it dies.
    pub fn agent(&self, name: &str, most: u32) {
        self.shared.spawn(name, &["agent", "--name", name, "--max-invokers", &most.to_string()], "", false);
    }

    /// Starts the gateway or the autoscaler again, after [`Cluster::kill`] or [`Cluster::stop`].
    pub fn start_again(&self, role: &str) {
        self.shared.spawn(role, &[role], "", true);
    }

    /// Starts an invoker of a pool beside the shared one.
    pub fn pooled_invoker(&self, id: &str, pool: &str) {
        let setting = format!("invoker.pool={pool}");
        self.shared.spawn(id, &["invoker", "--id", id, "--set", &setting], "", false);
    }

    /// Starts the store again, with fail points for its next life only.
    pub fn restart_store(&self, failpoints: &str) {
        self.kill("store");
        self.shared.spawn_store(failpoints);
    }

    /// Kills a process with SIGKILL; `nats` is the broker.
    pub fn kill(&self, name: &str) {
        let mut state = lock(&self.shared.state);
        if name == "nats" {
            let broker = state.broker.as_mut().expect("the broker runs");
            broker.kill().expect("killing nats-server");
            return;
        }
        if let Some(mut process) = state.children.remove(name) {
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }

    /// Asks a process to end (SIGTERM), and waits until it has.
    ///
    /// # Panics
    /// When it does not run.
    pub fn stop(&self, name: &str) {
        let process = lock(&self.shared.state).children.remove(name);
        let mut process = process.unwrap_or_else(|| panic!("{name} runs"));
        let asked = Command::new("kill").args(["-TERM", &process.child.id().to_string()]).status();
        assert!(asked.is_ok_and(|status| status.success()), "{name} can be told to end");
        let _ = process.child.wait();
    }

    /// The id of a process that was started last under a name.
    ///
    /// # Panics
    /// When none was.
    #[must_use]
    pub fn process(&self, name: &str) -> u32 {
        let pid = fs::read_to_string(self.directory().join(format!("{name}.pid"))).expect("it was started");
        pid.parse().expect("a process id")
    }

    /// Whether a process runs.
    #[must_use]
    pub fn is_alive(&self, name: &str) -> bool {
        let mut state = lock(&self.shared.state);
        state.children.get_mut(name).is_some_and(|process| matches!(process.child.try_wait(), Ok(None)))
    }

    /// Stages at which something was killed, one line each: stage and targets.
    #[must_use]
    pub fn hits(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory().join("hits")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// The end of every log, for a failing test.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let Ok(entries) = fs::read_dir(self.directory()) else { return text };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = fs::read_to_string(&path).unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                let tail = &lines[lines.len().saturating_sub(15)..];
                text +=
                    &format!("--- {}\n{}\n", path.file_name().unwrap_or_default().display(), tail.join("\n"));
            }
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
        let mut state = lock(&self.shared.state);
        for process in state.children.values_mut() {
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
        if std::thread::panicking() {
            drop(state);
            eprintln!("{}", self.logs());
        }
    }
}

impl Shared {
    fn note_pid(&self, name: &str, pid: u32) {
        fs::write(self.directory.join(format!("{name}.pid")), pid.to_string()).expect("writing a pid file");
    }

    fn spawn_store(&self, failpoints: &str) {
        let data = self.directory.join("store");
        self.spawn("store", &["store", "--data-dir", &data.display().to_string()], failpoints, true);
    }

    fn spawn(&self, name: &str, args: &[&str], failpoints: &str, supervised: bool) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.join(format!("{name}.log")))
            .expect("a log file");
        let mut command = Command::new(binary());
        command.args(args).args(["--nats-url", &self.url, "--admin", "127.0.0.1:0"]);
        for set in &self.sets {
            command.args(["--set", set]);
        }
        command
            .env("THALWEG_FAULTS", &self.directory)
            .env("FAILPOINTS", failpoints)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = command.spawn().expect("starting a component");
        self.note_pid(name, child.id());
        let process = Process { child, failpoints: failpoints.to_owned(), supervised };
        lock(&self.state).children.insert(name.to_owned(), process);
    }

    /// Starts again whoever has died, without fail points.
    fn supervise(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            let mut dead = Vec::new();
            {
                let mut state = lock(&self.state);
                if let Some(broker) = state.broker.as_mut()
                    && broker.revive().expect("nats-server starts again")
                {
                    let pid = broker.pid();
                    self.note_pid("nats", pid);
                    *state.deaths.entry("nats".to_owned()).or_default() += 1;
                }
                let ended: Vec<_> = (state.children.iter_mut())
                    .filter_map(|(name, process)| match process.child.try_wait() {
                        Ok(None) => None,
                        _ => Some((name.clone(), process.supervised, process.failpoints.clone())),
                    })
                    .collect();
                for (name, supervised, _) in ended {
                    state.children.remove(&name);
                    *state.deaths.entry(name.clone()).or_default() += 1;
                    if supervised {
                        dead.push(name);
                    }
                }
            }
            for name in dead {
                match name.as_str() {
                    "store" => self.spawn_store(""),
                    role => self.spawn(role, &[role], "", true),
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

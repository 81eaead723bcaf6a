//! Invokers as child processes.

use std::{collections::BTreeMap, ffi::OsString, net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use async_trait::async_trait;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    task::JoinSet,
    time::Instant,
};

use crate::{
    Actuator, ActuatorError,
    cgroup::{Cgroup, Cgroups},
};

/// Time between looks at children that are being waited for.
const POLL: Duration = Duration::from_millis(10);
/// Time a killed child has to disappear.
const KILL_GRACE: Duration = Duration::from_secs(1);
/// Longest line that is read of a child, bytes: an address and a port.
const MOST_LINE: u64 = 128;

/// Told where the admin port of an invoker is, by its id; `None` once it has ended.
pub type Announce = Arc<dyn Fn(&str, Option<SocketAddr>) + Send + Sync>;

/// Runs a command for every invoker: SIGTERM stops it, and SIGKILL does when it has not ended within the
/// drain timeout. Children inherit the environment (less systemd's `NOTIFY_SOCKET`), standard output and
/// standard error; they have a process group of their own, so that Ctrl-C reaches the autoscaler first, which then
/// stops them in order.
pub struct ProcessActuator {
    program: OsString,
    arguments: Vec<String>,
    drain_timeout: Duration,
    kill_on_drop: bool,
    tied: bool,
    /// Where the kernel keeps to the quota, and the quota.
    cgroups: Option<(Cgroups, f64)>,
    children: BTreeMap<String, Started>,
    announce: Option<Announce>,
}

impl std::fmt::Debug for ProcessActuator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessActuator").field("children", &self.children).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Started {
    /// With the other end of its standard input, where it is tied to us.
    child: Child,
    /// Goes with it.
    _cgroup: Option<Cgroup>,
    /// Told to stop; killed after that.
    kill_at: Option<Instant>,
    /// Waits for it to say where its admin port is; ends with this.
    _listens: JoinSet<()>,
}

/// Passes the first line of a child on, if it is an address.
async fn listen(id: String, stdout: ChildStdout, announce: Announce) {
    let mut line = String::new();
    let read = BufReader::new(stdout.take(MOST_LINE)).read_line(&mut line).await;
    match line.trim().parse() {
        Ok(address) if read.is_ok() => announce(&id, Some(address)),
        _ => tracing::debug!(invoker = id, line, "an invoker did not say where its admin port is"),
    }
}

impl ProcessActuator {
    /// Runs `program` with `arguments`, in which every `{id}` is replaced by the invoker's id. The drain
    /// timeout should exceed the invokers' own.
    #[must_use]
    pub fn new(program: impl Into<OsString>, arguments: Vec<String>, drain_timeout: Duration) -> Self {
        let program = program.into();
        Self {
            program,
            arguments,
            drain_timeout,
            kill_on_drop: true,
            tied: false,
            cgroups: None,
            children: BTreeMap::new(),
            announce: None,
        }
    }

    /// Reads the first line of every child's standard output, which has to be the address of its admin port (`thalweg
    /// invoker --announce`), and tells it on. The rest is not read.
    #[must_use]
    pub fn announcing(mut self, announce: Announce) -> Self {
        self.announce = Some(announce);
        self
    }

    /// Children are left running when the actuator is dropped, instead of being killed: for autoscalers
    /// that do not drain on shutdown.
    #[must_use]
    pub fn leave_running(mut self) -> Self {
        self.kill_on_drop = false;
        self
    }

    /// Children get a pipe as standard input, which ends when this process does, however that comes about. A
    /// program that stops with it (`thalweg invoker --with-stdin`) does not survive this process.
    ///
    /// The kernel could also send a signal to the child when its parent ends, but does so already when the
    /// *thread* ends that had started it; and the end of a pipe leaves an invoker the time to drain.
    #[must_use]
    pub fn tied(mut self) -> Self {
        self.tied = true;
        self
    }

    /// Has the kernel keep every child to `cpus` CPUs, all of its threads together, where this process may make
    /// cgroups of version 2; else that is left to the children. Says in the log which it is.
    #[must_use]
    pub fn cpu_quota(mut self, cpus: f64) -> Self {
        self.cgroups = match Cgroups::of_this_process() {
            Ok(cgroups) => {
                tracing::info!(cpus, "the kernel keeps invokers to their CPU quota");
                Some((cgroups, cpus))
            }
            Err(error) => {
                tracing::info!(cpus, %error, "invokers keep to their CPU quota by themselves");
                None
            }
        };
        self
    }

    /// The process of an invoker that has not ended yet.
    #[must_use]
    pub fn process_id(&self, id: &str) -> Option<u32> {
        self.children.get(id)?.child.id()
    }
}

impl Started {
    fn terminate(&mut self, id: &str, drain_timeout: Duration) {
        if self.kill_at.is_some() {
            return;
        }
        self.kill_at = Some(Instant::now() + drain_timeout);
        // The id stays ours until the child is reaped, which only we do: no other process can be hit.
        let process = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(process) = process
            && let Err(error) = kill_process(process, Signal::TERM)
        {
            tracing::debug!(invoker = id, %error, "invoker had ended already");
        }
    }

    fn kill_if_due(&mut self, id: &str) {
        if self.kill_at.is_some_and(|at| Instant::now() >= at) {
            tracing::warn!(invoker = id, "invoker did not end in time; killing it");
            if let Err(error) = self.child.start_kill() {
                tracing::debug!(invoker = id, %error, "invoker had ended already");
            }
            self.kill_at = Some(Instant::now() + KILL_GRACE);
        }
    }
}

#[async_trait]
impl Actuator for ProcessActuator {
    async fn start(&mut self, id: &str) -> Result<(), ActuatorError> {
        let mut child = Command::new(&self.program)
            .args(self.arguments.iter().map(|argument| argument.replace("{id}", id)))
            // Through it they would report their own readiness as that of the autoscaler.
            .env_remove("NOTIFY_SOCKET")
            .stdin(if self.tied { Stdio::piped() } else { Stdio::null() })
            .stdout(if self.announce.is_some() { Stdio::piped() } else { Stdio::inherit() })
            .process_group(0)
            .kill_on_drop(self.kill_on_drop)
            .spawn()
            .map_err(|error| ActuatorError::new(id, error.into()))?;
        tracing::info!(invoker = id, process = child.id(), "started invoker");
        let confined = self.cgroups.as_ref().zip(child.id()).map(|((cgroups, cpus), process)| {
            let cgroup = cgroups.make(id, *cpus)?;
            cgroup.take_in(process).map(|()| cgroup)
        });
        let cgroup = confined.transpose().unwrap_or_else(|error| {
            // It keeps to the quota by itself.
            tracing::warn!(invoker = id, %error, "an invoker has no cgroup");
            None
        });
        let mut listens = JoinSet::new();
        if let Some((announce, stdout)) = self.announce.clone().zip(child.stdout.take()) {
            listens.spawn(listen(id.to_owned(), stdout, announce));
        }
        let started = Started { child, _cgroup: cgroup, kill_at: None, _listens: listens };
        self.children.insert(id.to_owned(), started);
        Ok(())
    }

    async fn stop(&mut self, id: &str) {
        if let Some(started) = self.children.get_mut(id) {
            started.terminate(id, self.drain_timeout);
        }
    }

    async fn reap(&mut self) -> Vec<String> {
        let mut ended = Vec::new();
        for (id, started) in &mut self.children {
            match started.child.try_wait() {
                Ok(Some(status)) => {
                    if started.kill_at.is_none() {
                        tracing::warn!(invoker = id, %status, "invoker ended by itself");
                    } else {
                        tracing::info!(invoker = id, %status, "invoker ended");
                    }
                    ended.push(id.clone());
                }
                Ok(None) => started.kill_if_due(id),
                Err(error) => tracing::warn!(invoker = id, %error, "cannot ask for the state of an invoker"),
            }
        }
        for id in &ended {
            self.children.remove(id);
            if let Some(announce) = &self.announce {
                announce(id, None);
            }
        }
        ended
    }

    async fn stop_all(&mut self) {
        for (id, started) in &mut self.children {
            started.terminate(id, self.drain_timeout);
        }
        let deadline = Instant::now() + self.drain_timeout + KILL_GRACE;
        while !self.children.is_empty() && Instant::now() < deadline {
            self.reap().await;
            tokio::time::sleep(POLL).await;
        }
        if !self.children.is_empty() {
            tracing::error!(invokers = self.children.len(), "invokers could not be killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, drain: Duration) -> ProcessActuator {
        let arguments = ["-c", script, "{id}"].map(str::to_owned).to_vec();
        ProcessActuator::new("sh", arguments, drain)
    }

    async fn reaped(actuator: &mut ProcessActuator) -> String {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let mut ended = actuator.reap().await;
            if let Some(id) = ended.pop() {
                assert!(ended.is_empty());
                return id;
            }
            assert!(Instant::now() < deadline, "nothing ended");
            tokio::time::sleep(POLL).await;
        }
    }

    fn exists(process: u32) -> bool {
        // A zombie still has an entry.
        std::path::Path::new(&format!("/proc/{process}")).exists()
    }

    #[tokio::test]
    async fn a_child_that_ends_by_itself_is_reaped_once() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("id");
        let mut actuator = shell(&format!("echo $0 > {}", file.display()), Duration::from_secs(5));
        actuator.start("auto-1").await.unwrap();
        let process = actuator.process_id("auto-1").unwrap();
        assert_eq!(reaped(&mut actuator).await, "auto-1");
        assert_eq!(std::fs::read_to_string(file).unwrap(), "auto-1\n");
        assert!(!exists(process));
        assert!(actuator.reap().await.is_empty());
        actuator.stop("auto-1").await;
    }

    #[tokio::test]
    async fn stopping_is_graceful_and_idempotent() {
        let mut actuator = ProcessActuator::new("sleep", vec!["600".to_owned()], Duration::from_secs(30));
        actuator.start("a").await.unwrap();
        actuator.start("b").await.unwrap();
        let (first, second) = (actuator.process_id("a").unwrap(), actuator.process_id("b").unwrap());
        assert!(actuator.reap().await.is_empty());
        actuator.stop("a").await;
        actuator.stop("a").await;
        actuator.stop("nobody").await;
        assert_eq!(reaped(&mut actuator).await, "a");
        assert!(!exists(first) && exists(second));
        actuator.stop_all().await;
        assert!(!exists(second));
    }

    #[tokio::test]
    async fn whoever_does_not_heed_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("deaf");
        let script = format!("trap '' TERM; : > {}; while :; do sleep 0.05; done", file.display());
        let mut actuator = shell(&script, Duration::from_millis(200));
        actuator.start("deaf").await.unwrap();
        while !file.exists() {
            tokio::time::sleep(POLL).await;
        }
        let process = actuator.process_id("deaf").unwrap();
        let begun = Instant::now();
        actuator.stop("deaf").await;
        assert_eq!(reaped(&mut actuator).await, "deaf");
        assert!(begun.elapsed() >= Duration::from_millis(200));
        assert!(!exists(process));
    }

    #[tokio::test]
    async fn a_program_that_is_missing_is_an_error() {
        let mut actuator = ProcessActuator::new("/nonexistent/invoker", vec![], Duration::from_secs(1));
        let error = actuator.start("x").await.unwrap_err();
        assert!(error.to_string().contains("cannot start invoker x"), "{error}");
    }

    #[tokio::test]
    async fn dropping_the_actuator_kills_unless_told_otherwise() {
        let mut actuator = ProcessActuator::new("sleep", vec!["600".to_owned()], Duration::from_secs(1));
        actuator.start("a").await.unwrap();
        let process = actuator.process_id("a").unwrap();
        drop(actuator);
        while exists(process) {
            tokio::time::sleep(POLL).await;
        }

        let mut actuator =
            ProcessActuator::new("sleep", vec!["600".to_owned()], Duration::from_secs(1)).leave_running();
        actuator.start("a").await.unwrap();
        let process = actuator.process_id("a").unwrap();
        drop(actuator);
        tokio::time::sleep(5 * POLL).await;
        assert!(exists(process));
        let process = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
        kill_process(process, Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn the_kernel_keeps_all_threads_to_the_quota_where_it_can() {
        if let Err(error) = Cgroups::of_this_process() {
            eprintln!(
                "SKIPPED: quotas by cgroups were not tested, because this process may not make any: {error}"
            );
            return;
        }
        // Two threads' worth of work, for as long as it takes to use half a second.
        let script = "trap 'kill -KILL 0' TERM; (while :; do :; done) & while :; do :; done";
        let mut actuator = shell(script, Duration::from_secs(5)).cpu_quota(0.2);
        actuator.start("a").await.unwrap();
        let (process, begun) = (actuator.process_id("a").unwrap(), Instant::now());
        let own = std::fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
        assert!(own.trim_end().ends_with("/thalweg-a"), "{own}");
        let used = || {
            let (cgroups, _) = actuator.cgroups.as_ref().unwrap();
            let stat = std::fs::read_to_string(cgroups.path("a").join("cpu.stat")).unwrap();
            let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
            Duration::from_micros(micros.parse().unwrap())
        };
        while used() < Duration::from_millis(500) {
            tokio::time::sleep(POLL).await;
        }
        // A period's worth may be used at once.
        let most = begun.elapsed().mul_f64(0.2 * 1.05) + Duration::from_millis(20);
        assert!(used() <= most, "{:?} of at most {most:?}", used());
        actuator.stop_all().await;
    }
}

//! The embedded nats-server: a child process with a configuration of ours.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Environment variable that names the binary.
pub const ENV: &str = "THALWEG_NATS_SERVER";
/// Longest wait for the server to listen, and for it to stop.
const PATIENCE: Duration = Duration::from_secs(15);

/// How the server is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The binary; see [`find`].
    pub binary: PathBuf,
    /// Port on 127.0.0.1; 0 takes a free one.
    pub port: u16,
    /// Its data: configuration, log, JetStream files.
    pub data_dir: PathBuf,
    /// Memory for streams, bytes.
    pub max_memory_bytes: u64,
    /// Sync every write to disk.
    pub sync_always: bool,
}

/// A running server. Dropped, it is killed; see [`Server::stop`].
#[derive(Debug)]
pub struct Server {
    child: Child,
    options: Options,
    address: SocketAddr,
}

/// The nats-server binary: `explicit`, else `THALWEG_NATS_SERVER`, else the one on PATH.
///
/// # Errors
/// With what to do when there is none.
pub fn find(explicit: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = explicit {
        return Ok(path.to_owned());
    }
    if let Some(path) = std::env::var_os(ENV) {
        return Ok(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|directory| directory.join("nats-server")).find(|path| path.is_file()).context(
        "no nats-server: install version 2.11 or later on PATH, or set THALWEG_NATS_SERVER to one (in the source \
         tree, scripts/nats-server.py fetches one and prints its path)",
    )
}

impl Server {
    /// Starts the server and waits until it listens. A server that a former life of ours left behind in
    /// the same directory is ended first.
    ///
    /// # Errors
    /// When it cannot be started, with the end of its log.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        fs::create_dir_all(&options.data_dir)
            .with_context(|| format!("creating {}", options.data_dir.display()))?;
        let options = Options { data_dir: fs::canonicalize(&options.data_dir)?, ..options };
        end_leftover(&options.data_dir)?;
        let port = match options.port {
            0 => free_port()?,
            port => port,
        };
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let options = Options { port, ..options };
        let child = spawn(&options)?;
        let mut server = Self { child, options, address };
        server.wait()?;
        Ok(server)
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts it again on the same port and data, if it has died; returns whether it had.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn revive(&mut self) -> anyhow::Result<bool> {
        if self.child.try_wait()?.is_none() {
            return Ok(false);
        }
        self.child = spawn(&self.options)?;
        self.wait()?;
        Ok(true)
    }

    /// Kills it without warning, as a crash would.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            if TcpStream::connect_timeout(&self.address, Duration::from_millis(200)).is_ok() {
                return Ok(());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > until {
                let log = fs::read_to_string(self.options.data_dir.join("nats.log")).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(8).collect();
                let tail: Vec<_> = tail.into_iter().rev().collect();
                let _ = self.child.kill();
                bail!("nats-server does not listen on {}:\n{}", self.address, tail.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops it in order.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn stop(mut self) -> anyhow::Result<()> {
        terminate(&mut self.child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks a child to end; does not wait for it.
pub(crate) fn signal(child: &Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // One that has ended already cannot hear it.
        let _ = kill_process(pid, Signal::TERM);
    }
}

/// SIGTERM, and SIGKILL when that does not help.
pub(crate) fn terminate(child: &mut Child) -> anyhow::Result<()> {
    signal(child);
    wait(child)
}

/// Waits for a child that was asked to end, and kills it when it does not: a second signal would end it at once.
pub(crate) fn wait(child: &mut Child) -> anyhow::Result<()> {
    let until = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn spawn(options: &Options) -> anyhow::Result<Child> {
    let directory = &options.data_dir;
    let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
    let sync = if options.sync_always { "sync_interval: always" } else { "" };
    let config = format!(
        "# Written by thalweg; changes are lost.\n\
         server_name: thalweg\nlisten: \"127.0.0.1:{}\"\npid_file: {}\nlog_file: {}\n\
         # Messages hold a shard's state with its optimizer slots.\nmax_payload: 8MB\n\
         # A worker may lag behind by a whole model's results before it is cut off.\n\
         max_pending: 512MB\nwrite_deadline: \"20s\"\n\
         jetstream {{\n  store_dir: {}\n  max_memory_store: {}\n  max_file_store: 64GB\n  {sync}\n}}\n",
        options.port,
        quoted(directory.join("nats.pid")),
        quoted(directory.join("nats.log")),
        quoted(directory.join("jetstream")),
        options.max_memory_bytes,
    );
    let path = directory.join("nats.conf");
    fs::File::create(&path)?.write_all(config.as_bytes())?;
    Command::new(&options.binary)
        .arg("--config")
        .arg(&path)
        // It is not the one whose readiness systemd waits for.
        .env_remove(thalweg_telemetry::systemd::SOCKET_VARIABLE)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", options.binary.display()))
}

/// Ends a server of a former life that was killed before it could end its child.
fn end_leftover(directory: &Path) -> anyhow::Result<()> {
    let Ok(text) = fs::read_to_string(directory.join("nats.pid")) else { return Ok(()) };
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(()) };
    let config = directory.join("nats.conf");
    let ours = || {
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&config.display().to_string())
    };
    if !ours() {
        return Ok(());
    }
    tracing::info!(pid = pid.as_raw_nonzero().get(), "ending the nats-server that a former life left behind");
    let _ = kill_process(pid, Signal::TERM);
    let until = Instant::now() + PATIENCE;
    while ours() {
        if Instant::now() > until {
            bail!("nats-server {} holds {} and does not end", pid.as_raw_nonzero(), directory.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

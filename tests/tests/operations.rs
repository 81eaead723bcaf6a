//! Operating a process while it runs: log filter, reloading, systemd.

use std::{
    cell::Cell,
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use thalweg_tests::{PATIENCE, cluster, eventually};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// A `thalweg` with a directory of its own, ended with the test.
struct Process {
    child: Child,
    /// It was asked to end.
    told: Cell<bool>,
    directory: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        // In order, as long as that works: `thalweg up` has a nats-server to end.
        // A second request would be obeyed at once.
        if !self.told.get() {
            let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        }
        let until = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

impl Process {
    /// Starts it with this configuration file, which stays the test's to change.
    fn start(args: &[&str], config: &str, change: impl FnOnce(&mut Command)) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        fs::write(path("thalweg.toml"), config).expect("a configuration");
        let mut command = Command::new(cluster::binary());
        command
            .args(args)
            .arg("--config")
            .arg(path("thalweg.toml"))
            .args(["--admin", "127.0.0.1:0", "--set", "gateway.http_listen=127.0.0.1:0"])
            .current_dir(directory.path())
            .env_remove("RUST_LOG")
            .env_remove("THALWEG_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(path("log")).expect("a log"));
        change(&mut command);
        let child = command.spawn().expect("the binary runs");
        Self { child, told: Cell::new(false), directory }
    }

    /// A store that waits for a broker which never comes: enough of a process for most of this.
    fn waiting_store(config: &str, change: impl FnOnce(&mut Command)) -> Self {
        Self::start(&["store", "--nats-url", "nats://127.0.0.1:1"], config, change)
    }

    fn up(config: &str, change: impl FnOnce(&mut Command)) -> Self {
        let nats_server = format!("embedded.nats_server={}", thalweg_tests::nats_server().display());
        let args = ["up", "--set", "embedded.port=0", "--set", &nats_server];
        Self::start(&args, config, change)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Lines of the log with this message.
    fn said(&self, message: &str) -> Vec<serde_json::Value> {
        let log = self.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        lines.filter(|line| line["message"] == message).collect()
    }

    /// Waits for the first line with this message.
    async fn says(&self, message: &str) -> serde_json::Value {
        eventually(message, async || !self.said(message).is_empty()).await;
        self.said(message).swap_remove(0)
    }

    async fn admin(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let address = self.says("health and metrics").await["address"].as_str().expect("text").to_owned();
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}");
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await.expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        (head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status"), body.to_owned())
    }

    /// Value of a metric, its labels included in the name; 0 where nothing was recorded.
    async fn metric(&self, name: &str) -> f64 {
        let text = self.admin("GET", "/metrics", "").await.1;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or(0.0)
    }

    fn signal(&self, signal: &str) {
        self.told.set(self.told.get() || signal == "-TERM");
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status().expect("kill runs");
        assert!(status.success());
    }

    /// Changes the configuration, and has it read again.
    fn reload(&self, config: &str) {
        fs::write(self.directory.path().join("thalweg.toml"), config).expect("written");
        self.signal("-HUP");
    }
}

const APPLIED: &str = r#"thalweg_config_reloads_total{outcome="applied"}"#;
const REFUSED: &str = r#"thalweg_config_reloads_total{outcome="refused"}"#;
const RELOADED: &str = "the configuration was reloaded";
const CHANGED: &str = "a setting has changed";

#[tokio::test]
async fn the_log_filter_is_changed_over_http() {
    let store = Process::waiting_store("log.filter = 'info'\n", |_| {});
    assert_eq!(store.admin("GET", "/log", "").await, (200, "info\n".to_owned()));
    let (status, text) = store.admin("PUT", "/log", "thalweg=loud").await;
    assert!(status == 400 && text.contains("`thalweg=loud`"), "{status} {text}");

    assert_eq!(store.admin("PUT", "/log", "info,thalweg=warn").await.0, 200);
    let line = store.says("log filter changed").await;
    assert_eq!((&line["old"], &line["new"]), (&"\"info\"".into(), &"\"info,thalweg=warn\"".into()));
    assert_eq!(store.admin("GET", "/log", "").await.1, "info,thalweg=warn\n");
    store.signal("-HUP");
    eventually("the reload", async || store.metric(APPLIED).await >= 1.0).await;
    assert_eq!(store.admin("GET", "/log", "").await.1, "info\n", "reloading takes the file's word");
    assert_eq!(store.said(RELOADED).len(), 1, "and said so, at level info");

    assert_eq!(store.admin("PUT", "/log", "off").await.0, 200);
    let before = store.log();
    assert_eq!(store.admin("PUT", "/log", "nonsense=nonsense").await.0, 400);
    assert_eq!(store.admin("GET", "/livez", "").await.0, 200);
    assert_eq!(store.log(), before, "silence");
    // It tries to connect again and again, which is told at this level.
    assert_eq!(store.admin("PUT", "/log", "debug").await.0, 200);
    eventually("more than ever", async || store.log().contains("\"level\":\"DEBUG\"")).await;
}

#[tokio::test]
async fn a_hangup_changes_what_may_change_and_names_the_rest() {
    let store = Process::waiting_store("log.filter = 'info'\n", |_| {});
    store.says("health and metrics").await;
    store.reload(
        "log.filter = 'info,sled=error'\n[store]\nmax_requests = 9\n[gateway]\nworker_lease_ms = 9\n",
    );
    store.says(RELOADED).await;
    let line = store.says(CHANGED).await;
    assert_eq!(line["key"], "log.filter");
    assert_eq!((&line["old"], &line["new"]), (&"\"info\"".into(), &"\"info,sled=error\"".into()));
    assert_eq!(store.admin("GET", "/log", "").await.1, "info,sled=error\n");
    let line = store.says("settings have changed that wait for a restart").await;
    assert_eq!(line["keys"], "store.max_requests", "and nothing of the gateway's");
    assert_eq!(line["level"], "WARN");

    // Mistakes change nothing.
    let refused = "the configuration was not reloaded; everything stays as it is";
    for (count, bad) in
        ["log.filter = 'x=loud'\n", "log.filtre = 'off'\n", "log.filter = \n"].iter().enumerate()
    {
        store.reload(bad);
        eventually("the error", async || store.said(refused).len() > count).await;
        assert_eq!(store.said(refused)[count]["level"], "ERROR");
    }
    assert!(store.said(refused)[1]["error"].as_str().is_some_and(|text| text.contains("log.filtre")));
    assert_eq!(store.admin("GET", "/log", "").await.1, "info,sled=error\n");
    assert!((store.metric(REFUSED).await - 3.0).abs() < 0.1);
    assert!((store.metric(APPLIED).await - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn rust_log_wins_when_the_configuration_is_read_again() {
    let store = Process::waiting_store("log.filter = 'off'\n", |command| {
        command.env("RUST_LOG", "info,sled=off");
    });
    store.says("health and metrics").await;
    store.reload("log.filter = 'error'\n");
    store.says(RELOADED).await;
    assert_eq!(store.admin("GET", "/log", "").await.1, "info,sled=off\n");
    store.says("a setting has changed without effect: RUST_LOG is set, and wins over it").await;
}

#[tokio::test]
async fn policy_and_window_budget_change_while_everything_runs() {
    let up = Process::up("", |_| {});
    up.says("thalweg is up; stop it with Ctrl-C").await;
    let ready = r#"thalweg_autoscaler_invokers{state="ready"}"#;
    assert!(up.metric(ready).await < 0.1, "nothing to do, nobody there");
    up.reload(
        "[gateway]\nwindow_budget_bytes = 1000000\n[autoscaler.policy]\nmin_invokers = 2\nlease.term_ms = 9999\n",
    );
    eventually("two invokers", async || (up.metric(ready).await - 2.0).abs() < 0.1).await;
    assert_eq!(up.says("sharing another window budget").await["bytes"], 1_000_000);
    let line = up.says("settings have changed that wait for a restart").await;
    assert_eq!(line["keys"], "autoscaler.policy.lease.term_ms");
    // Out of range: refused as a whole.
    up.reload("[autoscaler.policy]\nmin_invokers = 9\nmax_invokers = 8\n");
    eventually("the refusal", async || up.metric(REFUSED).await >= 1.0).await;
    assert!((up.metric(ready).await - 2.0).abs() < 0.1);
}

#[tokio::test]
async fn systemd_is_told_of_readiness_and_of_the_end() {
    let sockets = tempfile::tempdir().expect("a directory");
    let socket = sockets.path().join("notify");
    let receiver = UnixDatagram::bind(&socket).expect("a socket");
    receiver.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let receive = || {
        let mut bytes = [0; 256];
        let length = receiver.recv(&mut bytes).expect("a message in time");
        String::from_utf8_lossy(&bytes[..length]).trim().to_owned()
    };
    let mut up =
        Process::up("autoscaler.actuator = 'process'\nautoscaler.policy.min_invokers = 1\n", |command| {
            command.env("NOTIFY_SOCKET", &socket);
        });
    assert_eq!(receive(), "READY=1");
    assert_eq!(up.admin("GET", "/readyz", "").await.0, 200);
    let ready = r#"thalweg_autoscaler_invokers{state="ready"}"#;
    eventually("an invoker", async || up.metric(ready).await >= 1.0).await;
    up.signal("-TERM");
    // Not the readiness of the invoker, which is a process of its own.
    assert_eq!(receive(), "STOPPING=1");
    assert!(up.child.wait().expect("it ends").success());
    receiver.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
    receiver.recv(&mut [0; 1]).expect_err("and nothing else");
}

#[tokio::test]
async fn a_process_that_waits_is_not_ready_for_systemd() {
    let sockets = tempfile::tempdir().expect("a directory");
    let socket = sockets.path().join("notify");
    let receiver = UnixDatagram::bind(&socket).expect("a socket");
    let mut store = Process::waiting_store("", |command| {
        command.env("NOTIFY_SOCKET", &socket);
    });
    store.says("health and metrics").await;
    store.signal("-TERM");
    store.child.wait().expect("it ends");
    let mut bytes = [0; 256];
    let length = receiver.recv(&mut bytes).expect("a message");
    assert_eq!(String::from_utf8_lossy(&bytes[..length]).trim(), "STOPPING=1", "and never READY=1");
}

fn units() -> Vec<(String, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd");
    let paths = fs::read_dir(directory).expect("deploy/systemd").map(|entry| entry.expect("an entry").path());
    let units = paths.filter(|path| path.extension().is_some_and(|extension| extension == "service"));
    let named = |path: PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, fs::read_to_string(path).expect("a unit"))
    };
    units.map(named).collect()
}

#[test]
fn systemd_accepts_the_units() {
    let units = units();
    assert_eq!(units.len(), 2);
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("SKIPPED: systemd-analyze is not installed, so the units were not verified");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    for (name, text) in units {
        // It looks for the program, which is not installed here.
        let installed = "ExecStart=/usr/local/bin/thalweg ";
        assert!(text.contains(installed), "{name}");
        let here = format!("ExecStart={} ", cluster::binary().display());
        let path = directory.path().join(name.replace('@', "@gateway"));
        fs::write(&path, text.replace(installed, &here)).expect("written");
        let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().expect("it runs");
        // Keys that it does not know are not a failure to it.
        let text = String::from_utf8_lossy(&output.stderr);
        let ours: Vec<_> = text.lines().filter(|line| line.contains("thalweg")).collect();
        assert!(output.status.success() && ours.is_empty(), "{name}: {text}");
    }
}

#[test]
fn the_units_leave_time_for_the_drain() {
    let policy = thalweg::config::Config::default().autoscaler.policy;
    for (name, text) in units() {
        let seconds = text.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")?.parse().ok());
        let stop = Duration::from_secs(seconds.expect("a time"));
        assert!(stop >= Duration::from_millis(policy.drain_timeout_ms) * 2, "{name}");
        assert!(text.contains("\nKillMode=mixed\n"), "{name}: invokers are stopped by the autoscaler");
    }
}

//! The autoscaler against a real nats-server, with invokers that only beat and follow the placement.
//!
//! Needs `THALWEG_NATS_SERVER`; run with `--ignored --nocapture`.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on panics, and this one reports times"
)]

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use thalweg_autoscaler::{Config, InProcessActuator, Status, run};
use thalweg_broker::{Connection, LeaseConfig, NatsConfig, Registry, StreamsConfig, no_report};
use thalweg_protocol::{
    InvokerBeat, InvokerState, Kind, PLACEMENT_KEY, Partition, Placement, frame, subjects,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

struct Server {
    child: Child,
    url: String,
    directory: tempfile::TempDir,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let directory = tempfile::tempdir().unwrap();
        let child = Self::spawn(port, directory.path());
        Self { child, url: format!("nats://127.0.0.1:{port}"), directory, port }
    }

    fn spawn(port: u16, directory: &std::path::Path) -> Child {
        let binary = std::env::var("THALWEG_NATS_SERVER").expect("THALWEG_NATS_SERVER names nats-server");
        let mut command = Command::new(binary);
        command.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"]).arg(directory);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = Self::spawn(self.port, self.directory.path());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ids whose fake invoker ends without a word.
type Deaths = Arc<Mutex<Vec<String>>>;

/// An invoker that holds what is placed on it and does nothing with it.
async fn fake_invoker(id: String, url: String, token: CancellationToken, deaths: Deaths) {
    let nats = NatsConfig { url, credentials: None };
    let Some(connection) = Connection::open(&id, &nats, &token).await.unwrap() else { return };
    let Ok(registry) = Registry::open(&connection.jetstream).await else { return };
    let mut last = None::<Instant>;
    loop {
        if deaths.lock().unwrap().contains(&id) {
            return;
        }
        let state = if token.is_cancelled() { InvokerState::Draining } else { InvokerState::Ready };
        let Ok((placement, _)) = registry.get::<Placement>(PLACEMENT_KEY).await else { continue };
        let placed = (0..).zip(placement.unwrap_or_default().partitions);
        let held: Vec<(Partition, u64)> = placed
            .filter(|(_, placed)| placed.holder.as_deref() == Some(&id))
            .map(|(partition, placed)| (partition, placed.epoch))
            .collect();
        if last.is_none_or(|last| last.elapsed() > Duration::from_millis(500)) {
            last = Some(Instant::now());
            let beat = InvokerBeat {
                invoker: id.clone(),
                state,
                partitions: held.clone(),
                service_bytes_per_s: 0.0,
                busy: 0.0,
                held_messages: 0,
                held_bytes: 0,
                cpu_quota: 1.0,
            };
            let frame = frame::seal(Kind::Beat, &beat, &[]);
            let _ = connection.client.publish(subjects::invoker_beat(&id), frame).await;
            let _ = connection.client.flush().await;
        }
        if state == InvokerState::Draining && held.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn actuator(url: String, deaths: Deaths) -> Box<dyn thalweg_autoscaler::Actuator> {
    let spawn = move |id: String, token: CancellationToken| -> JoinHandle<()> {
        let (url, deaths) = (url.clone(), deaths.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(fake_invoker(id, url, token, deaths));
        })
    };
    Box::new(InProcessActuator::new(spawn, Duration::from_secs(5)))
}

async fn until(
    status: &mut watch::Receiver<Status>,
    what: &str,
    holds: impl Fn(&Status) -> bool,
) -> Duration {
    let begun = Instant::now();
    let waiting = status.wait_for(|status| holds(status));
    match tokio::time::timeout(Duration::from_secs(20), waiting).await {
        Ok(status) => println!("{what}: {:?} {:?}", begun.elapsed(), *status.unwrap()),
        Err(_) => panic!("{what}: not within 20 s"),
    }
    begun.elapsed()
}

async fn wait_for_holders(registry: &Registry, wanted: impl Fn(&BTreeMap<String, usize>, usize) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (placement, _) = registry.get::<Placement>(PLACEMENT_KEY).await.unwrap_or_default();
        let mut counts = BTreeMap::new();
        let partitions = placement.unwrap_or_default().partitions;
        let homeless = partitions.iter().filter(|placed| placed.holder.is_none()).count();
        for holder in partitions.into_iter().filter_map(|placed| placed.holder) {
            *counts.entry(holder).or_default() += 1;
        }
        if wanted(&counts, homeless) {
            return;
        }
        assert!(Instant::now() < deadline, "placement stays {counts:?}, {homeless} with nobody");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// CPU time of a process, seconds.
fn cpu_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts a nats-server; the whole-system tests cover the same with real invokers"]
async fn scales_from_zero_and_back_through_death_and_outage() {
    let mut server = Server::start();
    let (stop, deaths) = (CancellationToken::new(), Deaths::default());
    let nats = NatsConfig { url: server.url.clone(), credentials: None };
    let connection = Connection::open("autoscaler", &nats, &stop).await.unwrap().unwrap();
    let registry = Registry::open(&connection.jetstream).await.unwrap();
    let config = Config {
        default_service_mb_per_s: 1.0,
        idle_timeout_ms: 2000,
        shrink_window_ms: 2000,
        lease: LeaseConfig { renew_ms: 200, term_ms: 1000 },
        ..Config::default()
    };
    let (sender, mut status) = watch::channel(Status::default());
    let task = tokio::spawn(run(
        config,
        StreamsConfig::default(),
        connection.clone(),
        actuator(server.url.clone(), deaths.clone()),
        no_report(),
        sender,
        stop.clone(),
    ));
    until(&mut status, "leads", |status| status.leading).await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let (own, server_cpu) = (cpu_seconds(std::process::id()), cpu_seconds(server.child.id()));
    tokio::time::sleep(Duration::from_secs(10)).await;
    println!(
        "idle: autoscaler {:.2} % and nats-server {:.2} % of a core",
        (cpu_seconds(std::process::id()) - own) * 10.0,
        (cpu_seconds(server.child.id()) - server_cpu) * 10.0
    );

    let begun = Instant::now();
    let publish = |bytes: usize| {
        let jetstream = connection.jetstream.clone();
        async move {
            for partition in 0..4 {
                let subject = format!("thalweg.grad.{partition}.default.job.0");
                jetstream.publish(subject, vec![0; bytes].into()).await.unwrap().await.unwrap();
            }
        }
    };
    publish(100).await;
    wait_for_holders(&registry, |counts, homeless| homeless == 0 && counts.len() == 1).await;
    println!("placed {:?} after the first message", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(1));

    // 0.35 MB an invoker: 4 * 300 kB need all four.
    publish(300_000).await;
    wait_for_holders(&registry, |counts, _| counts.len() == 4).await;
    until(&mut status, "four", |status| status.ready == 4).await;

    let victim = {
        let (placement, _) = registry.get::<Placement>(PLACEMENT_KEY).await.unwrap();
        placement.unwrap().partitions[0].holder.clone().unwrap()
    };
    let begun = Instant::now();
    deaths.lock().unwrap().push(victim.clone());
    wait_for_holders(&registry, |counts, homeless| homeless == 0 && !counts.contains_key(&victim)).await;
    println!("the dead one's partitions moved after {:?}", begun.elapsed());
    until(&mut status, "replaced", |status| status.ready == 4).await;

    // The broker dies with its memory streams, and is away for longer than an invoker may be silent.
    let before = status.borrow().clone();
    let (old, _) = registry.get::<Placement>(PLACEMENT_KEY).await.unwrap();
    server.kill();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(status.borrow().invokers, before.invokers, "nobody is given up for an outage");
    server.restart();
    until(&mut status, "streams are back, empty", |status| status.depth_messages == 0 && status.leading)
        .await;
    let (new, _) = registry.get::<Placement>(PLACEMENT_KEY).await.unwrap();
    assert_eq!(old, new);

    until(&mut status, "to zero", |status| status.invokers == 0 && status.target == 0).await;
    publish(100).await;
    until(&mut status, "one again", |status| status.ready == 1).await;
    let begun = Instant::now();
    stop.cancel();
    task.await.unwrap().unwrap();
    println!("stopped after {:?}", begun.elapsed());
    wait_for_holders(&registry, |counts, homeless| counts.is_empty() && homeless == 32).await;
}

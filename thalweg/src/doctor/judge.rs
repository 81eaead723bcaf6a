//! What needs no deployment: settings, this host, and what a number means.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{Access, access, statfs},
    process::{Resource, getrlimit},
};
use thalweg_broker::LeaseConfig;
use thalweg_protocol::limits;

use super::Finding;
use crate::config::{Actuator, Config};

/// Time between the broker's clock and ours from which on deadlines are off noticeably, and from which on rounds with one
/// are closed at random.
const CLOCK_WARNING: Duration = Duration::from_millis(500);
const CLOCK_ERROR: Duration = Duration::from_secs(10);
/// Files that a store with many jobs has open, and sockets.
const LEAST_FILES: u64 = 4096;
/// File systems in memory and on the network, by what `statfs` calls them (`linux/magic.h`).
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;
const NFS: i64 = 0x6969;
const SMB2: i64 = 0xfe53_4d42;

/// Settings that are each allowed and do not go together.
pub(super) fn settings(config: &Config) -> Vec<Finding> {
    let (policy, invoker) = (&config.autoscaler.policy, &config.invoker);
    let mut findings = Vec::new();
    let mut clash = |found: String, remedy: &str| findings.push(Finding::warning("settings", found, remedy));
    let partitions = usize::from(config.streams.partitions);
    if policy.max_invokers > partitions {
        clash(
            format!(
                "autoscaler.policy.max_invokers is {}, and there are {partitions} partitions",
                policy.max_invokers
            ),
            "no more invokers than partitions can work: raise streams.partitions before the first start",
        );
    }
    if policy.dead_after_ms < 3 * invoker.beat_ms {
        clash(
            format!(
                "autoscaler.policy.dead_after_ms is {}, invokers beat every {} ms (invoker.beat_ms)",
                policy.dead_after_ms, invoker.beat_ms
            ),
            "an invoker that loses two heartbeats is taken for dead: raise the first to 3 times the second",
        );
    }
    if policy.drain_timeout_ms < invoker.drain_ms {
        clash(
            format!(
                "autoscaler.policy.drain_timeout_ms is {}, invoker.drain_ms {}",
                policy.drain_timeout_ms, invoker.drain_ms
            ),
            "invokers are killed while they hand their partitions over: raise the first above the second",
        );
    }
    for (name, LeaseConfig { renew_ms, term_ms }) in
        [("gateway.lease", config.gateway.lease), ("autoscaler.policy.lease", policy.lease)]
    {
        if term_ms < 4 * renew_ms {
            clash(
                format!("{name}: term_ms is {term_ms}, renew_ms {renew_ms}"),
                "a single late renewal loses the lease: raise term_ms to 4 times renew_ms",
            );
        }
    }
    if config.gateway.worker_lease_ms < 2000 {
        clash(
            format!("gateway.worker_lease_ms is {}", config.gateway.worker_lease_ms),
            "a worker that stands still for a moment (a garbage collection, a checkpoint) loses its rank: 10000 is usual",
        );
    }
    let (docker, memory) = (&config.autoscaler.docker, invoker.memory_bytes as u64);
    if config.autoscaler.actuator == Actuator::Docker
        && docker.memory_bytes > 0
        && docker.memory_bytes < memory + memory / 2
    {
        clash(
            format!(
                "autoscaler.docker.memory_bytes is {}, invoker.memory_bytes {}",
                docker.memory_bytes, invoker.memory_bytes
            ),
            "containers are killed for want of memory: raise the first to 1.5 times the second",
        );
    }
    let (admin, http) = (config.admin.listen, config.gateway.http_listen);
    if admin == http && admin.port() != 0 {
        clash(
            format!("admin.listen and gateway.http_listen are both {admin}"),
            "a gateway cannot have both: change one of them",
        );
    }
    for (name, address) in [("admin.listen", admin), ("gateway.http_listen", http)] {
        if is_public(address) {
            clash(
                format!("{name} is {address}: whoever reaches it may change and stop things"),
                "there is no authentication: listen on 127.0.0.1, or let a firewall or a container's network guard it",
            );
        }
    }
    let (memory, windows) = (config.embedded.max_memory_bytes, config.gateway.window_budget_bytes);
    if memory < windows + windows / 4 {
        clash(
            format!("embedded.max_memory_bytes is {memory}, gateway.window_budget_bytes {windows}"),
            "`thalweg up`: the queues fill up before workers wait: raise the first above 1.25 times the second",
        );
    }
    if findings.is_empty() {
        findings.push(Finding::ok("settings", "they go together"));
    }
    findings
}

fn is_public(address: SocketAddr) -> bool {
    !address.ip().is_loopback()
}

/// This host's disk, limits and memory.
pub(super) fn host(config: &Config) -> Vec<Finding> {
    let mut findings = disk(&config.store.data_dir, config.store.reserve_bytes);
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    findings.push(open_files(files));
    findings.extend(credentials(config.nats.credentials.as_deref()));
    findings
}

/// The next directory upwards that is there.
fn existing(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn disk(data_dir: &Path, reserve: u64) -> Vec<Finding> {
    let (shown, place) = (data_dir.display(), existing(data_dir));
    let elsewhere =
        "or set store.data_dir to another place; where the store runs on another host, run doctor there";
    if access(&place, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let found = format!("{shown}: {} cannot be written to", place.display());
        return vec![Finding::error(
            "disk",
            found,
            format!("give it to the user that runs the store, {elsewhere}"),
        )];
    }
    let usage = match statfs(&place) {
        Ok(usage) => usage,
        Err(error) => {
            let found = format!("{shown}: the file system does not tell about itself: {error}");
            return vec![Finding::warning("disk", found, format!("see to {}, {elsewhere}", place.display()))];
        }
    };
    let free = u64::try_from(usage.f_bsize).unwrap_or(0).saturating_mul(usage.f_bavail);
    vec![room(&shown.to_string(), free, reserve), file_system(&shown.to_string(), usage.f_type)]
}

fn room(place: &str, free: u64, reserve: u64) -> Finding {
    let found = format!(
        "{place}: {} MiB free, {} MiB of them reserved (store.reserve_bytes)",
        free >> 20,
        reserve >> 20
    );
    if free < reserve {
        Finding::error(
            "disk",
            found,
            "no job can be created: make room. A job takes 3.1 times its model and slots",
        )
    } else {
        Finding::ok("disk", found)
    }
}

fn file_system(place: &str, kind: i64) -> Finding {
    match kind {
        TMPFS | RAMFS => Finding::warning(
            "disk",
            format!("{place} is in memory"),
            "all jobs are lost with the machine: set store.data_dir to a disk, unless that is wanted",
        ),
        NFS | SMB2 => Finding::warning(
            "disk",
            format!("{place} is on a network file system"),
            "the store relies on fdatasync and on one process at a time: use a local disk",
        ),
        _ => Finding::ok("disk", format!("{place} is on a disk")),
    }
}

fn open_files(limit: u64) -> Finding {
    if limit < LEAST_FILES {
        let found = format!("at most {limit} open files");
        let remedy = format!(
            "raise it to {LEAST_FILES} (ulimit -n, LimitNOFILE=): a store has one open for every job"
        );
        return Finding::warning("limits", found, remedy);
    }
    Finding::ok(
        "limits",
        if limit == u64::MAX { "any number of open files".to_owned() } else { format!("{limit} open files") },
    )
}

fn credentials(path: Option<&Path>) -> Option<Finding> {
    let path = path?;
    let shown = path.display();
    Some(match std::fs::read_to_string(path) {
        Err(error) => Finding::error(
            "credentials",
            format!("{shown}: {error}"),
            "correct nats.credentials, or the file's owner",
        ),
        Ok(_) => Finding::ok("credentials", format!("{shown} can be read")),
    })
}

/// The largest message of the server.
pub(super) fn payload(max_payload: usize) -> Finding {
    let found = format!("messages of up to {} KiB", max_payload >> 10);
    let shard = limits::DEFAULT_SHARD_BYTES as usize + limits::MESSAGE_OVERHEAD_BYTES;
    if max_payload < 64 << 10 {
        let remedy = "a job's description does not fit, nor do large models: set max_payload of the NATS server to 1MB or more";
        Finding::error("payload", found, remedy)
    } else if max_payload < shard {
        let remedy = "shards are made smaller, so that aggregation costs more: set max_payload of the NATS server to 1MB or more";
        Finding::warning("payload", found, remedy)
    } else {
        Finding::ok("payload", found)
    }
}

/// How far the broker's clock is from ours.
pub(super) fn clock(apart: Duration) -> Finding {
    let found = format!("this clock and the broker's are at least {} ms apart", apart.as_millis());
    let remedy =
        "deadlines of rounds are measured from the broker's time stamps: keep both hosts' time by NTP";
    if apart >= CLOCK_ERROR {
        Finding::error("clock", found, remedy)
    } else if apart >= CLOCK_WARNING {
        Finding::warning("clock", found, remedy)
    } else {
        Finding::ok("clock", "this clock and the broker's agree")
    }
}

/// What JetStream lets the account keep, where it says so, and what it keeps.
pub(super) fn room_of_account(most: Option<u64>, used: u64, windows: u64) -> Finding {
    let Some(most) = most else {
        let found =
            format!("JetStream keeps {} MiB in memory; the account has no limit of its own", used >> 20);
        return Finding::ok("memory", found);
    };
    let found = format!(
        "JetStream's account may keep {} MiB in memory, workers may have {} MiB in flight (gateway.window_budget_bytes)",
        most >> 20,
        windows >> 20
    );
    if most < windows {
        Finding::error(
            "memory",
            found,
            "pushes fail when queues are full: raise the account's limit, or lower the budget",
        )
    } else if most < windows + windows / 4 {
        Finding::warning(
            "memory",
            found,
            "that leaves little headroom: a quarter more than the budget is usual",
        )
    } else {
        Finding::ok("memory", found)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn defaults_go_together() {
        assert_eq!(settings(&Config::default()), [Finding::ok("settings", "they go together")]);
    }

    #[test]
    fn every_clash_is_found_and_says_what_to_do() {
        let clash = |change: fn(&mut Config), word: &str| {
            let mut config = Config::default();
            change(&mut config);
            let findings = settings(&config);
            let [finding] = &findings[..] else { panic!("{word}: {findings:?}") };
            assert_eq!(finding.level, Level::Warning);
            assert!(finding.found.contains(word) && finding.remedy.is_some(), "{finding:?}");
        };
        clash(|config| config.autoscaler.policy.max_invokers = 64, "32 partitions");
        clash(|config| config.invoker.beat_ms = 2000, "beat");
        clash(|config| config.autoscaler.policy.drain_timeout_ms = 1000, "drain_timeout_ms");
        clash(|config| config.gateway.lease.term_ms = 600, "gateway.lease");
        clash(|config| config.autoscaler.policy.lease.renew_ms = 2000, "autoscaler.policy.lease");
        clash(|config| config.gateway.worker_lease_ms = 500, "worker_lease_ms");
        clash(
            |config| {
                config.autoscaler.actuator = Actuator::Docker;
                config.autoscaler.docker.memory_bytes = 1 << 20;
            },
            "docker.memory_bytes",
        );
        clash(|config| config.gateway.http_listen = config.admin.listen, "both");
        clash(|config| config.admin.listen = SocketAddr::from(([0, 0, 0, 0], 9600)), "whoever reaches it");
        clash(|config| config.embedded.max_memory_bytes = 1 << 30, "max_memory_bytes");
    }

    #[test]
    fn numbers_mean_something() {
        let levels = |findings: &[Finding]| findings.iter().map(|finding| finding.level).collect::<Vec<_>>();
        let clocks = [0, 499, 500, 10_000].map(|ms| clock(Duration::from_millis(ms)));
        assert_eq!(levels(&clocks), [Level::Ok, Level::Ok, Level::Warning, Level::Error]);
        let payloads = [1 << 20, 256 << 10, 32 << 10].map(payload);
        assert_eq!(levels(&payloads), [Level::Ok, Level::Warning, Level::Error]);
        let rooms = [None, Some(2 << 30), Some(1200 << 20), Some(1 << 20)]
            .map(|most| room_of_account(most, 0, 1 << 30));
        assert_eq!(levels(&rooms), [Level::Ok, Level::Ok, Level::Warning, Level::Error]);
        assert_eq!(levels(&[room("x", 1 << 30, 1), room("x", 1, 1 << 20)]), [Level::Ok, Level::Error]);
        assert_eq!(levels(&[open_files(1 << 20), open_files(1024)]), [Level::Ok, Level::Warning]);
        let kinds = [0xef53, TMPFS, RAMFS, NFS, SMB2].map(|kind| file_system("x", kind));
        assert_eq!(levels(&kinds)[1..], [Level::Warning; 4]);
        assert_eq!(kinds[0].level, Level::Ok);
    }

    #[test]
    fn places_are_examined_for_real() {
        let folder = tempfile::tempdir().unwrap();
        let findings = disk(&folder.path().join("not/there/yet"), 0);
        assert!(findings.iter().all(|finding| finding.level < Level::Error), "{findings:?}");
        let findings = disk(folder.path(), u64::MAX);
        assert_eq!(findings[0].level, Level::Error, "{findings:?}");
        // Nobody can write there, not even root.
        let findings = disk(Path::new("/proc/1/thalweg"), 0);
        assert_eq!((findings.len(), findings[0].level), (1, Level::Error), "{findings:?}");
        assert_eq!(credentials(Some(Path::new("/nonexistent"))).unwrap().level, Level::Error);
        assert_eq!(credentials(None), None);
    }
}

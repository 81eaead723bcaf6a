//! What only the deployment can tell: the NATS server and what runs against it.

use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use serde::Deserialize;
use thalweg_broker::{Connection, DeadLetterQuery, Registry, RegistryError, dead_letters};
use thalweg_protocol::{Durability, STORE_KEY, STREAMS_KEY, StoreRecord, Streams, subjects};
use thalweg_sdk::Client;
use tokio_util::sync::CancellationToken;

use super::{Finding, judge};
use crate::{
    census::{Census, LISTEN, jobs_in},
    config::{Actuator, Config},
};

/// What a user of the NATS server has to be allowed.
const GRANTS: &str =
    "allow its user to publish and subscribe on thalweg.>, $JS.API.>, $JS.ACK.>, $KV.> and _INBOX.>";

/// Reaches the broker, and looks at everything from there.
pub(super) async fn examine(config: &Config, timeout: Duration) -> Vec<Finding> {
    let mut findings = Vec::new();
    let stop = CancellationToken::new();
    let url = config.nats.url.rsplit_once('@').map_or(config.nats.url.as_str(), |(_, host)| host);
    let opened = tokio::time::timeout(timeout, Connection::open("thalweg-doctor", &config.nats, &stop)).await;
    let connection = match opened {
        Ok(Ok(Some(connection))) => connection,
        Ok(Ok(None)) => return findings,
        Ok(Err(error)) => {
            // Only what waiting cannot cure; the text says what to do.
            findings.push(Finding::error("nats", error.to_string(), "correct nats.url, or the server"));
            return findings;
        }
        Err(_) => {
            let why =
                Connection::obstacle(&config.nats).await.unwrap_or_else(|| "it is there now".to_owned());
            let remedy = "start nats-server (or `thalweg up`) there, or correct nats.url (--nats-url, THALWEG_URL) and \
                          nats.credentials";
            findings.push(Finding::error(
                "nats",
                format!("{url}: no connection within {timeout:?}: {why}"),
                remedy,
            ));
            return findings;
        }
    };
    let server = connection.client.server_info();
    findings.push(Finding::ok("nats", format!("{url}: nats-server {}", server.version)));
    findings.push(judge::payload(server.max_payload));
    findings.push(permissions(&connection, timeout).await);
    if !jetstream(config, &connection, &mut findings).await {
        return findings;
    }
    if connection.jetstream.get_key_value(subjects::REGISTRY_BUCKET).await.is_err() {
        let remedy =
            "start `thalweg gateway`, `store` and `autoscaler` against it, in any order, or `thalweg up`";
        findings.push(Finding::warning(
            "registry",
            "nothing of Thalweg's has run on this NATS server yet",
            remedy,
        ));
        return findings;
    }
    findings.push(clock(&connection).await);
    if let Err(error) = components(config, &connection, timeout, &mut findings).await {
        let remedy = "see what else is amiss here; update the older of two releases, if that is what it says";
        findings.push(Finding::error("registry", error.to_string(), remedy));
    }
    findings
}

/// Sends a message to itself.
async fn permissions(connection: &Connection, timeout: Duration) -> Finding {
    let client = &connection.client;
    let probe = async {
        let subject = format!("thalweg.doctor.{:016x}", rand::random::<u64>());
        let mut heard = client.subscribe(subject.clone()).await.ok()?;
        client.publish(subject, "probe".into()).await.ok()?;
        client.flush().await.ok()?;
        heard.next().await
    };
    match tokio::time::timeout(timeout.min(LISTEN), probe).await {
        Ok(Some(_)) => Finding::ok("permissions", "messages on thalweg.> come through"),
        _ => Finding::error("permissions", "a message on thalweg.> does not come back to its sender", GRANTS),
    }
}

/// Whether there is a JetStream to go on with.
async fn jetstream(config: &Config, connection: &Connection, findings: &mut Vec<Finding>) -> bool {
    match connection.jetstream.query_account().await {
        Ok(account) => {
            let most = account.limits.max_memory.and_then(|most| u64::try_from(most).ok());
            findings.push(judge::room_of_account(most, account.memory, config.gateway.window_budget_bytes));
            let (most, wanted) = (account.limits.max_streams, i64::from(config.streams.total()) + 8);
            if let Some(most) = most.filter(|most| (0..wanted).contains(most)) {
                let remedy = "raise the account's limit of streams, or lower streams.partitions before the first start";
                let found = format!("JetStream's account may have {most} streams, {wanted} are needed");
                findings.push(Finding::error("streams", found, remedy));
            }
            true
        }
        Err(error) => {
            let remedy = format!(
                "enable it: `jetstream {{ store_dir: … }}` in the server's configuration; or {GRANTS}"
            );
            findings.push(Finding::error("jetstream", format!("JetStream does not answer: {error}"), remedy));
            false
        }
    }
}

/// The time in an answer of the broker has to lie between question and answer.
async fn clock(connection: &Connection) -> Finding {
    #[derive(Deserialize)]
    struct Answer {
        ts: String,
    }
    let subject = format!("$JS.API.STREAM.INFO.KV_{}", subjects::REGISTRY_BUCKET);
    let asked = SystemTime::now();
    let answer = connection.client.request(subject, "".into()).await;
    let answered = SystemTime::now();
    let told = answer.ok().and_then(|answer| serde_json::from_slice::<Answer>(&answer.payload).ok());
    let Some(told) = told.and_then(|told| humantime::parse_rfc3339_weak(&told.ts).ok()) else {
        let remedy = "compare the two clocks by hand";
        return Finding::warning("clock", "the broker does not tell its time", remedy);
    };
    let early = asked.duration_since(told).unwrap_or_default();
    let late = told.duration_since(answered).unwrap_or_default();
    judge::clock(early.max(late))
}

async fn components(
    config: &Config,
    connection: &Connection,
    timeout: Duration,
    findings: &mut Vec<Finding>,
) -> Result<(), RegistryError> {
    let registry = Registry::open(&connection.jetstream).await?;
    let (streams, _) = registry.get::<Streams>(STREAMS_KEY).await?;
    if let Some(streams) = streams {
        findings.push(partitions(streams.created.len(), config.streams.total()));
    }
    let census = Census::take(connection, &registry).await?;
    let gateway = census.gateway;
    for (role, leads) in [("gateway", gateway), ("autoscaler", census.autoscaler)] {
        findings.push(if leads {
            Finding::ok(role, "one leads")
        } else {
            Finding::error(role, "none leads", format!("start `thalweg {role}`, or see its log"))
        });
    }
    findings.extend(beating(census, config));
    let (store, _) = registry.get::<StoreRecord>(STORE_KEY).await?;
    findings.push(match store {
        None => Finding::error("store", "none has registered", "start `thalweg store`"),
        Some(store) => match jobs_in(&store, connection, timeout).await {
            Some(jobs) => Finding::ok("store", format!("{} answers, with {jobs} jobs", store.location)),
            None => Finding::error(
                "store",
                format!("{} does not answer", store.location),
                "start `thalweg store` with that data directory; if it is lost, `thalweg store --replace` gives its \
                 jobs up",
            ),
        },
    });
    if gateway {
        findings.extend(jobs(config, timeout).await);
    }
    let query = DeadLetterQuery { job: None, after: None, limit: 1, frames: false };
    if let Ok((letters, _)) = dead_letters(&connection.jetstream, &query).await
        && let Some(letter) = letters.first()
    {
        let found = format!("messages were put aside, the first because of {}", letter.code);
        let remedy = "`thalweg deadletter ls` and `show` tell about them; requeue or remove each";
        findings.push(Finding::warning("deadletters", found, remedy));
    }
    Ok(())
}

fn partitions(there: usize, configured: u16) -> Finding {
    let found = format!("{there} partitions");
    if there == usize::from(configured) {
        return Finding::ok("streams", found);
    }
    let remedy = format!(
        "this configuration says {configured} (streams.partitions and pools): use the configuration that gateway and \
         autoscaler have"
    );
    Finding::warning("streams", found, remedy)
}

/// What those who beat come to.
fn beating(census: Census, config: &Config) -> Vec<Finding> {
    let mut findings = vec![Finding::ok("invokers", format!("{} beat", census.invokers.len()))];
    for (invoker, why) in census.strangers {
        let remedy = "it gets no work: update it, or autoscaler and doctor, to the same release";
        findings.push(Finding::error("invokers", format!("{invoker}: {why}"), remedy));
    }
    if config.autoscaler.actuator == Actuator::Agent {
        findings.push(match census.agents.len() {
            0 => {
                Finding::error("agents", "none beats", "start `thalweg agent` on the hosts for the invokers")
            }
            agents => Finding::ok("agents", format!("{agents} beat")),
        });
    }
    findings
}

/// Those that do not train, and those that are promised more than is kept.
async fn jobs(config: &Config, timeout: Duration) -> Vec<Finding> {
    let listed = async { Client::connect_with(&config.nats).await?.patient_for(timeout).jobs(None).await };
    let jobs = match tokio::time::timeout(timeout, listed).await {
        Ok(Ok(jobs)) => jobs,
        Ok(Err(error)) => return vec![Finding::error("jobs", error.to_string(), "see the gateway's log")],
        Err(_) => {
            return vec![Finding::error("jobs", "the gateway does not list them", "see the gateway's log")];
        }
    };
    let mut findings = vec![Finding::ok("jobs", format!("{} in the registry", jobs.len()))];
    let of_state = |state: &str| {
        let names = jobs.iter().filter(|job| job.state == state).map(|job| job.key.to_string());
        names.collect::<Vec<_>>().join(", ")
    };
    for (state, remedy) in [
        ("failed", "`thalweg job show` says why; remove it, or restore it from a snapshot"),
        ("deleting", "its removal was cut short: `thalweg job rm` takes it up again"),
        ("paused", "`thalweg job show` says why; `thalweg job resume` lets it go on"),
    ] {
        let names = of_state(state);
        if !names.is_empty() {
            findings.push(Finding::warning("jobs", format!("{state}: {names}"), remedy));
        }
    }
    let strict = jobs.iter().filter(|job| job.durability == Durability::Disk).count();
    if strict > 0 && !config.gateway.nats_syncs_always {
        let found =
            format!("{strict} of level disk, and nobody has said that the NATS server syncs every write");
        let remedy = "run it with `sync_interval: always` in its jetstream section and set gateway.nats_syncs_always: \
                      else the records of such jobs may be lost with the power though their shards are not";
        findings.push(Finding::warning("durability", found, remedy));
    }
    findings
}

//! `thalweg status`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use serde_json::json;
use thalweg_broker::{Connection, Queues as _, Registry};
use thalweg_protocol::{
    InvokerBeat, Kind, Lease, PLACEMENT_KEY, Placement, STORE_KEY, STREAMS_KEY, StoreRecord, Streams, frame,
    lease_key, subjects,
};
use thalweg_store::{ShardStore as _, StoreClient};
use tokio_util::sync::CancellationToken;

use super::{Target, bytes, print, table};

/// How long invokers are listened to; they beat every second by default.
const LISTEN: Duration = Duration::from_millis(1500);

/// What runs and what it has to do.
pub(crate) async fn status(target: Target) -> anyhow::Result<()> {
    let (stop, config) = (CancellationToken::new(), target.config());
    let opening = Connection::open("thalweg-status", &config, &stop);
    let connection = match tokio::time::timeout(target.timeout(), opening).await {
        Ok(connection) => connection?,
        Err(_) => return Err(target.unreachable().into()),
    };
    let Some(connection) = connection else { return Ok(()) };
    let server = connection.client.server_info();
    let registry = Registry::open(&connection.jetstream).await?;
    let (store, _) = registry.get::<StoreRecord>(STORE_KEY).await?;
    let (streams, _) = registry.get::<Streams>(STREAMS_KEY).await?;
    let (placement, _) = registry.get::<Placement>(PLACEMENT_KEY).await?;
    let leads = async |role: &str| registry.get::<Lease>(&lease_key(role)).await.map(|(lease, _)| lease);
    let before = (leads("gateway").await?, leads("autoscaler").await?);
    let invokers = listen(&connection).await?;
    let after = (leads("gateway").await?, leads("autoscaler").await?);
    let partitions = streams.map_or(0, |streams| streams.created.len());
    let depths = connection.jetstream.depths(u16::try_from(partitions).unwrap_or(u16::MAX)).await;
    let depths = depths.map_err(|error| anyhow::anyhow!("queues: {error}"))?;
    let messages: u64 = depths.iter().map(|depth| depth.messages).sum();
    let queued: u64 = depths.iter().map(|depth| depth.bytes).sum();
    let answers = match &store {
        None => None,
        Some(store) => {
            let client = StoreClient::new(connection.client.clone(), store.id);
            let listed = tokio::time::timeout(target.timeout(), client.list()).await;
            listed.ok().and_then(Result::ok).map(|jobs| jobs.len())
        }
    };
    // A lease that is held is renewed several times in that time.
    let (gateway, autoscaler) =
        (after.0.is_some() && before.0 != after.0, after.1.is_some() && before.1 != after.1);
    let placed = placement.map_or(0, |placement| {
        placement.partitions.iter().filter(|partition| partition.holder.is_some()).count()
    });
    let jobs = if gateway { target.connect().await?.jobs(None).await? } else { Vec::new() };
    let of_state = jobs.iter().fold(BTreeMap::<&str, u32>::new(), |mut states, job| {
        *states.entry(job.state.as_str()).or_default() += 1;
        states
    });
    let value = json!({
        "nats": { "url": target.shown_url(), "version": server.version, "max_payload": server.max_payload },
        "gateway": gateway,
        "autoscaler": autoscaler,
        "store": store.as_ref().map(|store| json!({
            "id": store.id.to_string(),
            "location": store.location,
            "answers": answers.is_some(),
            "jobs": answers,
        })),
        "queues": { "partitions": partitions, "placed": placed, "messages": messages, "bytes": queued },
        "invokers": invokers.values().map(|beat| json!({
            "invoker": beat.invoker,
            "state": format!("{:?}", beat.state).to_lowercase(),
            "partitions": beat.partitions.len(),
            "busy": beat.busy,
            "bytes_per_s": beat.service_bytes_per_s,
            "held_messages": beat.held_messages,
            "held_bytes": beat.held_bytes,
            "cpu_quota": beat.cpu_quota,
        })).collect::<Vec<_>>(),
        "jobs": of_state,
    });
    if target.json {
        return print(&serde_json::to_string_pretty(&value)?);
    }
    let runs = |runs: bool, command: &str| {
        if runs { "runs".to_owned() } else { format!("does not run: start `thalweg {command}`") }
    };
    let mut lines = vec![
        format!("NATS        {} (nats-server {})", target.shown_url(), server.version),
        format!("gateway     {}", runs(gateway, "gateway")),
        format!("autoscaler  {}", runs(autoscaler, "autoscaler")),
    ];
    lines.push(match (&store, answers) {
        (None, _) => format!("store       {}", runs(false, "store")),
        (Some(store), None) => {
            format!("store       {} does not answer: start `thalweg store` there", store.location)
        }
        (Some(store), Some(jobs)) => format!("store       {} ({jobs} jobs)", store.location),
    });
    lines.push(format!(
        "queues      {messages} messages, {} waiting; {placed} of {partitions} partitions served",
        bytes(queued)
    ));
    let states = of_state.iter().map(|(state, count)| format!("{count} {state}")).collect::<Vec<_>>();
    lines.push(format!(
        "jobs        {}",
        if states.is_empty() { "none".to_owned() } else { states.join(", ") }
    ));
    lines.push(format!("invokers    {}", invokers.len()));
    if !invokers.is_empty() {
        let rows = invokers.values().map(|beat| {
            vec![
                beat.invoker.clone(),
                format!("{:?}", beat.state).to_lowercase(),
                beat.partitions.len().to_string(),
                format!("{:.0} %", beat.busy * 100.0),
                format!("{}/s", bytes(beat.service_bytes_per_s as u64)),
                bytes(beat.held_bytes),
            ]
        });
        lines.push(table(&["invoker", "state", "partitions", "busy", "folds", "holds"], rows));
    }
    print(&lines.join("\n"))
}

/// The newest heartbeat of every invoker that can be heard.
async fn listen(connection: &Connection) -> anyhow::Result<BTreeMap<String, InvokerBeat>> {
    let mut beats = connection.client.subscribe(subjects::INVOKER_BEATS).await?;
    let mut invokers = BTreeMap::new();
    let until = Instant::now() + LISTEN;
    while let Ok(Some(message)) =
        tokio::time::timeout(until.saturating_duration_since(Instant::now()), beats.next()).await
    {
        if let Ok((beat, _)) = frame::open::<InvokerBeat>(Kind::Beat, &message.payload) {
            invokers.insert(beat.invoker.clone(), beat);
        }
    }
    Ok(invokers)
}

//! `thalweg status`.

use std::collections::BTreeMap;

use serde_json::json;
use thalweg_broker::{PartitionDepth, Queues as _, Registry, RegistryError};
use thalweg_protocol::{PLACEMENT_KEY, Placement, STORE_KEY, STREAMS_KEY, StoreRecord, Streams, subjects};

use super::{Target, bytes, count, print, table};
use crate::census::{Census, jobs_in};

/// What runs and what it has to do.
pub(crate) async fn status(target: Target) -> anyhow::Result<()> {
    let connection = target.connection("thalweg-status").await?;
    let server = connection.client.server_info();
    // Looking must not make anything, as opening the registry would.
    if let Err(error) = connection.jetstream.get_key_value(subjects::REGISTRY_BUCKET).await {
        let text = format!(
            "nothing of Thalweg's has run on the NATS server at {} yet ({error}): start `thalweg up`, or `thalweg \
             gateway`, `store` and `autoscaler` against it",
            target.shown_url()
        );
        return Err(RegistryError::Unavailable(text).into());
    }
    let registry = Registry::open(&connection.jetstream).await?;
    let (store, _) = registry.get::<StoreRecord>(STORE_KEY).await?;
    let (streams, _) = registry.get::<Streams>(STREAMS_KEY).await?;
    let mut placed = 0;
    for key in registry.keys(PLACEMENT_KEY).await? {
        let (placement, _) = registry.get::<Placement>(&key).await?;
        let partitions = placement.into_iter().flat_map(|placement| placement.partitions);
        placed += partitions.filter(|partition| partition.holder.is_some()).count();
    }
    let Census { gateway, autoscaler, invokers, strangers, .. } =
        Census::take(&connection, &registry).await?;
    let partitions = streams.map_or(0, |streams| streams.created.len());
    let depths = connection.jetstream.depths(u16::try_from(partitions).unwrap_or(u16::MAX)).await;
    let queued = depths.map(|depths| {
        let sum = |of: fn(&PartitionDepth) -> u64| depths.iter().map(of).sum::<u64>();
        (sum(|depth| depth.messages), sum(|depth| depth.bytes))
    });
    let answers = match &store {
        None => None,
        Some(store) => jobs_in(store, &connection, target.timeout).await,
    };
    let jobs = if gateway {
        target.connect().await?.jobs(None).await.map_err(|error| error.to_string())
    } else {
        Err("no gateway tells".to_owned())
    };
    let of_state = jobs.as_ref().map(|jobs| {
        jobs.iter().fold(BTreeMap::<&str, u32>::new(), |mut states, job| {
            *states.entry(job.state.as_str()).or_default() += 1;
            states
        })
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
        "queues": {
            "partitions": partitions,
            "placed": placed,
            "messages": queued.as_ref().ok().map(|(messages, _)| messages),
            "bytes": queued.as_ref().ok().map(|(_, bytes)| bytes),
            "error": queued.as_ref().err().map(ToString::to_string),
        },
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
        "unreadable_invokers": strangers,
        "jobs": of_state.as_ref().ok(),
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
        (Some(store), Some(jobs)) => {
            format!("store       {} ({})", store.location, count(jobs as u64, "job"))
        }
    });
    lines.push(match &queued {
        Ok((messages, size)) => format!(
            "queues      {}, {} waiting; {placed} of {partitions} partitions served",
            count(*messages, "message"),
            bytes(*size)
        ),
        Err(error) => format!("queues      {error}"),
    });
    lines.push(match of_state {
        Ok(states) if states.is_empty() => {
            "jobs        none: a training loop creates its own, or `thalweg job create`".to_owned()
        }
        Ok(states) => {
            let states: Vec<_> = states.iter().map(|(state, count)| format!("{count} {state}")).collect();
            format!("jobs        {}", states.join(", "))
        }
        Err(error) => format!("jobs        {error}"),
    });
    lines.push(match invokers.len() {
        0 => "invokers    none; the autoscaler starts them when gradients come".to_owned(),
        count => format!("invokers    {count}"),
    });
    lines.extend(strangers.iter().map(|(invoker, error)| format!("            {invoker}: {error}")));
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

//! NATS subjects, streams and buckets.

use crate::{Epoch, Incarnation, JobKey, Name, Partition, Rank, StoreId};

/// Bucket of the registry.
pub const REGISTRY_BUCKET: &str = "thalweg";
/// Stream of dead letters.
pub const DEAD_LETTER_STREAM: &str = "THALWEG_DEADLETTER";
/// All subjects of the dead-letter stream.
pub const DEAD_LETTER_SUBJECTS: &str = "thalweg.deadletter.>";
/// Stream of events.
pub const EVENT_STREAM: &str = "THALWEG_EVENTS";
/// All subjects of the stream of events.
pub const EVENT_SUBJECTS: &str = "thalweg.event.>";
/// Requests of the SDK to the gateway.
pub const API: &str = "thalweg.api";
/// Heartbeats of all workers; every gateway hears them, the leading one answers.
pub const WORKER_BEAT: &str = "thalweg.beat.worker";
/// Heartbeats of all invokers.
pub const INVOKER_BEATS: &str = "thalweg.beat.invoker.*";
/// Heartbeats of all agents.
pub const AGENT_BEATS: &str = "thalweg.beat.agent.*";
/// Queue group in which gateways share requests.
pub const GATEWAY_GROUP: &str = "gateway";

/// Work queue of one partition.
#[must_use]
pub fn gradient_stream(partition: Partition) -> String {
    format!("THALWEG_GRAD_{partition}")
}

/// Name of a partition's consumer: `e<epoch>-<random>`, so that no name is ever used twice (rule P15).
#[must_use]
pub fn consumer(epoch: Epoch, random: u64) -> String {
    format!("e{epoch}-{random:016x}")
}

/// Epoch of a consumer named by [`consumer`]; 0 for any other name.
#[must_use]
pub fn consumer_epoch(name: &str) -> Epoch {
    let epoch = name.strip_prefix('e').and_then(|rest| rest.split('-').next());
    epoch.and_then(|epoch| epoch.parse().ok()).unwrap_or(0)
}

/// All subjects of one partition's work queue.
#[must_use]
pub fn gradient_subjects(partition: Partition) -> String {
    format!("thalweg.grad.{partition}.>")
}

/// Where a worker pushes its contributions for one partition.
#[must_use]
pub fn gradient(partition: Partition, key: &JobKey, rank: Rank) -> String {
    format!("thalweg.grad.{partition}.{}.{}.{rank}", key.tenant, key.job)
}

/// Reads a subject made by [`gradient`].
#[must_use]
pub fn parse_gradient(subject: &str) -> Option<(Partition, JobKey, Rank)> {
    let mut tokens = subject.strip_prefix("thalweg.grad.")?.split('.');
    let partition = tokens.next()?.parse().ok()?;
    let key = JobKey { tenant: Name::new(tokens.next()?).ok()?, job: Name::new(tokens.next()?).ok()? };
    let rank = tokens.next()?.parse().ok()?;
    tokens.next().is_none().then_some((partition, key, rank))
}

/// Where a job's results are published.
#[must_use]
pub fn result(key: &JobKey) -> String {
    format!("thalweg.result.{}.{}", key.tenant, key.job)
}

/// Where one rank hears why its contributions were not taken.
#[must_use]
pub fn reject(key: &JobKey, rank: Rank) -> String {
    format!("thalweg.reject.{}.{}.{rank}", key.tenant, key.job)
}

/// Where a message that cannot be processed ends up; `None` when not even its job is known.
#[must_use]
pub fn dead_letter(key: Option<&JobKey>) -> String {
    match key {
        Some(key) => format!("thalweg.deadletter.{}.{}", key.tenant, key.job),
        None => "thalweg.deadletter._._".to_owned(),
    }
}

/// Where events of a job are published, as JSON.
#[must_use]
pub fn event(tenant: &str, job: &str) -> String {
    format!("thalweg.event.{tenant}.{job}")
}

/// Requests to the store with this data directory.
#[must_use]
pub fn store(id: StoreId) -> String {
    format!("thalweg.store.{id}")
}

/// Heartbeats of one invoker.
#[must_use]
pub fn invoker_beat(invoker: &str) -> String {
    format!("thalweg.beat.invoker.{invoker}")
}

/// Heartbeats of one life of an agent.
#[must_use]
pub fn agent_beat(life: Incarnation) -> String {
    format!("thalweg.beat.agent.{life}")
}

/// Requests to one life of an agent.
#[must_use]
pub fn agent(life: Incarnation) -> String {
    format!("thalweg.agent.{life}")
}

/// Core subject on which writes to a registry key can be heard (a hint, not the truth: read the
/// key afterwards).
#[must_use]
pub fn registry_hint(key: &str) -> String {
    format!("$KV.{REGISTRY_BUCKET}.{key}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient_subjects_parse_back() {
        let key = JobKey { tenant: "default".parse().unwrap(), job: "a-b_1".parse().unwrap() };
        let subject = gradient(7, &key, 12);
        assert_eq!(subject, "thalweg.grad.7.default.a-b_1.12");
        assert_eq!(parse_gradient(&subject), Some((7, key, 12)));
        for bad in
            ["thalweg.grad.7.default.a.b.12", "thalweg.grad.x.d.j.1", "thalweg.grad.1.d.j", "other.1.d.j.1"]
        {
            assert_eq!(parse_gradient(bad), None, "{bad}");
        }
    }
}

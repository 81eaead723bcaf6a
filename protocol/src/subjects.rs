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
/// An empty message, by which a worker that pushes after a rest says so: an autoscaler that looks seldom because there
/// is nothing to do looks at once. Nothing depends on its arrival.
pub const WAKE: &str = "thalweg.wake";
/// Heartbeats of all agents.
pub const AGENT_BEATS: &str = "thalweg.beat.agent.*";
/// Heartbeats of all invokers, of whatever pool.
pub const ALL_INVOKER_BEATS: [&str; 2] = ["thalweg.beat.invoker.*", "thalweg.beat.pool.*.*"];
/// Questions for the spans of any job; services answer, whose work is for all of them.
pub const ALL_TRACES: &str = "thalweg.trace.>";
/// Queue group in which gateways share requests.
pub const GATEWAY_GROUP: &str = "gateway";

/// Work queue of one partition.
#[must_use]
pub fn gradient_stream(partition: Partition) -> String {
    format!("THALWEG_GRAD_{partition}")
}

/// Name of a partition's consumer: `e<epoch>-<random>`, so that no name is ever used twice (rule P15). The epoch is that
/// of the placement by which it was created; whoever it was handed over to holds the partition by a newer one.
#[must_use]
pub fn consumer(epoch: Epoch, random: u64) -> String {
    format!("e{epoch}-{random:016x}")
}

/// Where whoever holds a partition by this consumer is asked to hand it over (rule P19). Where nobody listens, it has
/// ended.
#[must_use]
pub fn handover(consumer: &str) -> String {
    format!("thalweg.handover.{consumer}")
}

/// Where the messages of a consumer are delivered to whoever holds its partition, and to whoever is about to.
#[must_use]
pub fn deliveries(consumer: &str) -> String {
    format!("thalweg.deliver.{consumer}")
}

/// Where an invoker's life hears itself.
#[must_use]
pub fn echo(life: u32) -> String {
    format!("thalweg.echo.{life:08x}")
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

/// Heartbeats of one invoker of a pool (`None`: the shared one).
#[must_use]
pub fn invoker_beat(pool: Option<&Name>, invoker: &str) -> String {
    match pool {
        None => format!("thalweg.beat.invoker.{invoker}"),
        Some(pool) => format!("thalweg.beat.pool.{pool}.{invoker}"),
    }
}

/// Heartbeats of all invokers of a pool.
#[must_use]
pub fn invoker_beats(pool: Option<&Name>) -> String {
    invoker_beat(pool, "*")
}

/// Questions for the spans of a job, which its workers and all services answer.
#[must_use]
pub fn trace(key: &JobKey) -> String {
    format!("thalweg.trace.{}.{}", key.tenant, key.job)
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
    fn consumers_name_their_epoch() {
        let name = consumer(7, 0x12_34ab_0000_0005);
        assert_eq!(name, "e7-001234ab00000005");
        assert_eq!(consumer_epoch(&name), 7);
        for foreign in ["", "worker", "e", "e-7"] {
            assert_eq!(consumer_epoch(foreign), 0, "{foreign}");
        }
    }

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

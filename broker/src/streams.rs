//! The partitions' work queues: their definition, their recreation (rule P16), their depth.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use async_nats::{
    Client,
    jetstream::{
        self, ErrorCode as JetStreamError,
        consumer::{AckPolicy, pull},
        context::GetStreamErrorKind,
        stream::{Config, DirectGetErrorKind, DiscardPolicy, RetentionPolicy, StorageType},
    },
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use thalweg_protocol::{Epoch, JobKey, Name, Partition, STREAMS_KEY, Streams, limits, subjects};

use crate::{Registry, RegistryError};

/// Where the broker keeps contributions until their round is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamStorage {
    /// In memory: fastest. A killed broker loses them, and the workers push them again.
    #[default]
    Memory,
    /// In files: survives the broker's kill, costs about a fifth of the throughput.
    File,
}

/// The work queues of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamsConfig {
    /// Number of partitions, 1 to 1024; every component must agree. Default 32.
    pub partitions: Partition,
    /// Storage of the work queues. Default memory.
    pub storage: StreamStorage,
    /// Copies the broker keeps of each queue; more than 1 needs a NATS cluster. Default 1.
    pub replicas: usize,
    /// Pools beside the shared one, by name: each has partitions of its own, and invokers that serve no others. Default
    /// none.
    pub pools: BTreeMap<Name, PoolConfig>,
}

/// A pool beside the shared one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// Number of its partitions, at least 1. Default 8.
    pub partitions: Partition,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { partitions: 8 }
    }
}

/// A pool with its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name; `None` for the shared one.
    pub name: Option<Name>,
    /// The first of its partitions.
    pub first: Partition,
    /// How many there are.
    pub partitions: Partition,
}

impl StreamsConfig {
    /// All pools: the shared one first, with the first partitions, then the others in the order of their names.
    pub fn all_pools(&self) -> impl Iterator<Item = Pool> {
        let shared = Pool { name: None, first: 0, partitions: self.partitions };
        let mut first = self.partitions;
        let named = self.pools.iter().map(move |(name, pool)| {
            let pool = Pool { name: Some(name.clone()), first, partitions: pool.partitions };
            first = first.saturating_add(pool.partitions);
            pool
        });
        std::iter::once(shared).chain(named)
    }

    /// The pool of that name (`None`: the shared one), if there is one.
    #[must_use]
    pub fn pool(&self, name: Option<&Name>) -> Option<Pool> {
        self.all_pools().find(|pool| pool.name.as_ref() == name)
    }

    /// Number of partitions of all pools.
    #[must_use]
    pub fn total(&self) -> Partition {
        self.all_pools().fold(0, |total, pool| total.saturating_add(pool.partitions))
    }
}

impl Default for StreamsConfig {
    fn default() -> Self {
        let (storage, pools) = (StreamStorage::Memory, BTreeMap::new());
        Self { partitions: limits::DEFAULT_PARTITIONS, storage, replicas: 1, pools }
    }
}

/// Contributions may wait as long as their round; redelivery comes from a takeover, not from this.
const ACK_WAIT: Duration = Duration::from_secs(600);

/// How long events are kept.
const EVENTS_AGE: Duration = Duration::from_secs(7 * 86_400);
/// And how many of them, bytes.
const EVENTS_BYTES: i64 = 64 << 20;

/// Why the work queues did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A killed broker has forgotten the stream.
    #[error("the stream of partition {0} is missing; gateway or autoscaler recreate it")]
    Missing(Partition),
    /// There is a consumer already.
    #[error("another consumer was quicker")]
    Raced,
    /// JetStream does not answer, or refuses.
    #[error("{0}")]
    Unavailable(String),
}

impl From<QueueError> for RegistryError {
    fn from(error: QueueError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// One queue at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// When its stream was created, nanoseconds by the broker's clock.
    pub created: i64,
    /// Messages in it.
    pub messages: u64,
    /// Sequence of the newest message that ever was.
    pub last_sequence: u64,
    /// Its consumers: name, and messages delivered and not acknowledged.
    pub consumers: Vec<(String, u64)>,
}

/// Control of the partitions' work queues: JetStream, or the simulation's model of it. Contributions
/// themselves are published, pulled and acknowledged past it.
#[async_trait]
pub trait Queues: Send + Sync + std::fmt::Debug {
    /// Creates the streams that are missing; returns when each was created, by partition.
    async fn ensure(&self, config: &StreamsConfig) -> Result<Vec<i64>, QueueError>;

    /// Depth of every partition; an error if any stream is missing, because a missing stream must never
    /// look like an empty one.
    async fn depths(&self, partitions: Partition) -> Result<Vec<PartitionDepth>, QueueError>;

    /// One queue with its consumers.
    async fn look(&self, partition: Partition) -> Result<Queue, QueueError>;

    /// Removes a consumer; one that is gone already is no error.
    async fn delete_consumer(&self, partition: Partition, name: &str) -> Result<(), QueueError>;

    /// Creates the only consumer of a queue, to which everything un-acknowledged is then delivered.
    async fn create_consumer(&self, partition: Partition, name: &str) -> Result<(), QueueError>;

    /// Reads a message by its sequence, delivered or not; `None` when it is not there any more.
    async fn read(&self, partition: Partition, sequence: u64) -> Result<Option<Bytes>, QueueError>;

    /// Stores a message in a queue; returns when it is there.
    async fn publish(&self, partition: Partition, subject: &str, frame: Bytes) -> Result<(), QueueError>;

    /// Removes a job's dead letters.
    async fn forget(&self, job: &JobKey) -> Result<(), QueueError>;
}

/// The only consumer of a queue.
fn consumer(name: &str) -> pull::Config {
    pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_ack_pending: -1,
        max_deliver: -1,
        ..pull::Config::default()
    }
}

/// Has the broker remove a consumer. Nothing is waited for: whoever depends on its absence finds out by creating the next
/// one.
pub async fn remove_consumer(client: &Client, partition: Partition, name: &str) {
    let stream = subjects::gradient_stream(partition);
    let _ = client.publish(format!("$JS.API.CONSUMER.DELETE.{stream}.{name}"), Bytes::new()).await;
}

/// How many deliveries a consumer has made.
///
/// # Errors
/// [`QueueError::Unavailable`], also when it is gone.
pub async fn delivered(
    context: &jetstream::Context,
    partition: Partition,
    name: &str,
) -> Result<u64, QueueError> {
    let stream = context.get_stream_no_info(subjects::gradient_stream(partition)).await;
    let info = stream.map_err(unavailable)?.consumer_info(name).await.map_err(unavailable)?;
    Ok(info.delivered.consumer_sequence)
}

/// Creates what is missing of the streams and records when each one was created. Idempotent; run it
/// on every connect, since a killed broker forgets memory streams with their definitions.
///
/// # Errors
/// [`RegistryError::Unavailable`] when JetStream does not answer or refuses (the text says why).
pub async fn ensure_streams(
    queues: &dyn Queues,
    registry: &Registry,
    config: &StreamsConfig,
) -> Result<Streams, RegistryError> {
    let streams = Streams { created: queues.ensure(config).await? };
    loop {
        let (known, revision) = registry.get::<Streams>(STREAMS_KEY).await?;
        if known.as_ref() == Some(&streams) {
            return Ok(streams);
        }
        if registry.put(STREAMS_KEY, &streams, revision).await?.is_ok() {
            if known.is_some() {
                tracing::warn!("streams were recreated; workers push again what was lost with them");
            }
            return Ok(streams);
        }
    }
}

/// The highest epoch in the names of each partition's consumers, for a registry that has forgotten the
/// placement while the streams have not (rule P14).
///
/// # Errors
/// [`RegistryError::Unavailable`], also when a stream is missing.
pub async fn consumer_epochs(
    queues: &dyn Queues,
    partitions: Range<Partition>,
) -> Result<Vec<Epoch>, RegistryError> {
    let mut epochs = Vec::with_capacity(partitions.len());
    for partition in partitions {
        let consumers = queues.look(partition).await?.consumers;
        epochs.push(consumers.iter().map(|(name, _)| subjects::consumer_epoch(name)).max().unwrap_or(0));
    }
    Ok(epochs)
}

fn gradient_stream(partition: Partition, config: &StreamsConfig) -> Config {
    Config {
        name: subjects::gradient_stream(partition),
        subjects: vec![subjects::gradient_subjects(partition)],
        retention: RetentionPolicy::WorkQueue,
        // Never drop unprocessed work to make room.
        discard: DiscardPolicy::New,
        storage: match config.storage {
            StreamStorage::Memory => StorageType::Memory,
            StreamStorage::File => StorageType::File,
        },
        num_replicas: config.replicas,
        // Parked contributions are read back by sequence (rule P17).
        allow_direct: true,
        ..Config::default()
    }
}

/// Unacknowledged work of one partition: waiting, held and parked alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PartitionDepth {
    /// Messages in the stream.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Sequence of the oldest message, or of the next one when there is none.
    pub first_sequence: u64,
    /// Sequence of the newest message that ever was.
    pub last_sequence: u64,
}

fn unavailable(error: impl std::fmt::Display) -> QueueError {
    QueueError::Unavailable(error.to_string())
}

#[async_trait]
impl Queues for jetstream::Context {
    async fn ensure(&self, config: &StreamsConfig) -> Result<Vec<i64>, QueueError> {
        let mut created = Vec::with_capacity(usize::from(config.total()));
        for partition in 0..config.total() {
            let stream = self.get_or_create_stream(gradient_stream(partition, config)).await;
            created
                .push(nanoseconds(stream.map_err(unavailable)?.cached_info().created.unix_timestamp_nanos()));
        }
        self.get_or_create_stream(Config {
            name: subjects::DEAD_LETTER_STREAM.to_owned(),
            subjects: vec![subjects::DEAD_LETTER_SUBJECTS.to_owned()],
            storage: StorageType::File,
            num_replicas: config.replicas,
            allow_direct: true,
            ..Config::default()
        })
        .await
        .map_err(unavailable)?;
        self.get_or_create_stream(Config {
            name: subjects::EVENT_STREAM.to_owned(),
            subjects: vec![subjects::EVENT_SUBJECTS.to_owned()],
            storage: StorageType::File,
            num_replicas: config.replicas,
            discard: DiscardPolicy::Old,
            max_age: EVENTS_AGE,
            max_bytes: EVENTS_BYTES,
            allow_direct: true,
            ..Config::default()
        })
        .await
        .map_err(unavailable)?;
        Ok(created)
    }

    async fn depths(&self, partitions: Partition) -> Result<Vec<PartitionDepth>, QueueError> {
        // One listing for all of them.
        let infos: Vec<_> = self.streams().try_collect().await.map_err(unavailable)?;
        (0..partitions)
            .map(|partition| {
                let name = subjects::gradient_stream(partition);
                let info = infos.iter().find(|info| info.config.name == name);
                let state = &info.ok_or(QueueError::Missing(partition))?.state;
                let empty = state.messages == 0;
                Ok(PartitionDepth {
                    messages: state.messages,
                    bytes: state.bytes,
                    first_sequence: if empty { state.last_sequence + 1 } else { state.first_sequence },
                    last_sequence: state.last_sequence,
                })
            })
            .collect()
    }

    async fn look(&self, partition: Partition) -> Result<Queue, QueueError> {
        let stream = self.get_stream(subjects::gradient_stream(partition)).await;
        let stream = stream.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(error)
                if error.error_code() == JetStreamError::STREAM_NOT_FOUND =>
            {
                QueueError::Missing(partition)
            }
            _ => unavailable(&error),
        })?;
        let consumers: Vec<_> = stream.consumers().try_collect().await.map_err(unavailable)?;
        let pending = |consumer: jetstream::consumer::Info| (consumer.name, consumer.num_ack_pending as u64);
        let info = stream.cached_info();
        Ok(Queue {
            created: nanoseconds(info.created.unix_timestamp_nanos()),
            messages: info.state.messages,
            last_sequence: info.state.last_sequence,
            consumers: consumers.into_iter().map(pending).collect(),
        })
    }

    async fn delete_consumer(&self, partition: Partition, name: &str) -> Result<(), QueueError> {
        if let Err(error) = self.delete_consumer_from_stream(name, subjects::gradient_stream(partition)).await
        {
            // Whoever depends on its absence finds out by creating the next one.
            tracing::debug!(%error, consumer = name, "consumer was gone already");
        }
        Ok(())
    }

    async fn create_consumer(&self, partition: Partition, name: &str) -> Result<(), QueueError> {
        let stream = subjects::gradient_stream(partition);
        match self.create_consumer_on_stream(consumer(name), stream).await {
            Ok(_) => Ok(()),
            Err(error) => {
                let text = error.to_string();
                let raced = text.contains("10099") || text.contains("multiple non-filtered");
                Err(if raced { QueueError::Raced } else { QueueError::Unavailable(text) })
            }
        }
    }

    async fn read(&self, partition: Partition, sequence: u64) -> Result<Option<Bytes>, QueueError> {
        let stream = self.get_stream_no_info(subjects::gradient_stream(partition)).await;
        match stream.map_err(unavailable)?.direct_get(sequence).await {
            Ok(message) => Ok(Some(message.payload)),
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn publish(&self, _: Partition, subject: &str, frame: Bytes) -> Result<(), QueueError> {
        let stored =
            jetstream::Context::publish(self, subject.to_owned(), frame).await.map_err(unavailable)?;
        stored.await.map(drop).map_err(unavailable)
    }

    async fn forget(&self, job: &JobKey) -> Result<(), QueueError> {
        let stream = self.get_stream_no_info(subjects::DEAD_LETTER_STREAM).await.map_err(unavailable)?;
        let purge = stream.purge().filter(subjects::dead_letter(Some(job)));
        purge.await.map(drop).map_err(unavailable)
    }
}

fn nanoseconds(time: i128) -> i64 {
    i64::try_from(time).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_follow_the_shared_partitions_in_the_order_of_their_names() {
        let name = |name: &str| Name::new(name).unwrap();
        let pools = [("b", 3), ("a", 5)].map(|(pool, partitions)| (name(pool), PoolConfig { partitions }));
        let config = StreamsConfig { partitions: 10, pools: pools.into(), ..StreamsConfig::default() };
        let range = |pool: Option<&str>| {
            config.pool(pool.map(name).as_ref()).map(|pool| (pool.first, pool.partitions))
        };
        assert_eq!(range(None), Some((0, 10)));
        assert_eq!(range(Some("a")), Some((10, 5)));
        assert_eq!(range(Some("b")), Some((15, 3)));
        assert_eq!(range(Some("c")), None);
        assert_eq!((config.total(), StreamsConfig::default().total()), (18, 32));
    }
}

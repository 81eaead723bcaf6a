//! The partitions' work queues: their definition, their recreation (rule P16), their depth.

use async_nats::jetstream::{
    self,
    stream::{Config, DiscardPolicy, RetentionPolicy, StorageType},
};
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use thalweg_protocol::{Epoch, Partition, STREAMS_KEY, Streams, limits, subjects};

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
}

impl Default for StreamsConfig {
    fn default() -> Self {
        Self { partitions: limits::DEFAULT_PARTITIONS, storage: StreamStorage::Memory, replicas: 1 }
    }
}

/// Creates what is missing of the streams and records when each one was created. Idempotent; run it
/// on every connect, since a killed broker forgets memory streams with their definitions.
///
/// # Errors
/// [`RegistryError::Unavailable`] when JetStream does not answer or refuses (the text says why).
pub async fn ensure_streams(
    jetstream: &jetstream::Context,
    registry: &Registry,
    config: &StreamsConfig,
) -> Result<Streams, RegistryError> {
    let unavailable = |error: &dyn std::fmt::Display| RegistryError::Unavailable(error.to_string());
    let mut created = Vec::with_capacity(usize::from(config.partitions));
    for partition in 0..config.partitions {
        let stream = jetstream
            .get_or_create_stream(gradient_stream(partition, config))
            .await
            .map_err(|error| unavailable(&error))?;
        let time = stream.cached_info().created.unix_timestamp_nanos();
        created.push(i64::try_from(time).unwrap_or(i64::MAX));
    }
    jetstream
        .get_or_create_stream(Config {
            name: subjects::DEAD_LETTER_STREAM.to_owned(),
            subjects: vec![subjects::DEAD_LETTER_SUBJECTS.to_owned()],
            storage: StorageType::File,
            num_replicas: config.replicas,
            allow_direct: true,
            ..Config::default()
        })
        .await
        .map_err(|error| unavailable(&error))?;
    let streams = Streams { created };
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
    jetstream: &jetstream::Context,
    partitions: Partition,
) -> Result<Vec<Epoch>, RegistryError> {
    let unavailable = |error: &dyn std::fmt::Display| RegistryError::Unavailable(error.to_string());
    let mut epochs = Vec::with_capacity(usize::from(partitions));
    for partition in 0..partitions {
        let name = subjects::gradient_stream(partition);
        let stream = jetstream.get_stream_no_info(name).await.map_err(|error| unavailable(&error))?;
        let names: Vec<String> =
            stream.consumer_names().try_collect().await.map_err(|error| unavailable(&error))?;
        epochs.push(names.iter().map(|name| subjects::consumer_epoch(name)).max().unwrap_or(0));
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

/// Depth of every partition, read in one listing; an error if any stream is missing, because a
/// missing stream must never look like an empty one.
///
/// # Errors
/// [`RegistryError::Unavailable`].
pub async fn stream_depths(
    jetstream: &jetstream::Context,
    partitions: Partition,
) -> Result<Vec<PartitionDepth>, RegistryError> {
    let infos: Vec<_> = jetstream
        .streams()
        .try_collect()
        .await
        .map_err(|error| RegistryError::Unavailable(error.to_string()))?;
    (0..partitions)
        .map(|partition| {
            let name = subjects::gradient_stream(partition);
            let info = infos.iter().find(|info| info.config.name == name);
            let info = info.ok_or_else(|| RegistryError::Unavailable(format!("stream {name} is missing")))?;
            let state = &info.state;
            Ok(PartitionDepth {
                messages: state.messages,
                bytes: state.bytes,
                first_sequence: if state.messages == 0 {
                    state.last_sequence + 1
                } else {
                    state.first_sequence
                },
                last_sequence: state.last_sequence,
            })
        })
        .collect()
}

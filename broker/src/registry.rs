//! The registry: a JetStream key-value bucket, changed only by compare-and-swap.

use std::sync::Arc;

use async_nats::jetstream::{self, kv, stream::StorageType};
use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use serde::{Serialize, de::DeserializeOwned};
use thalweg_protocol::{ErrorCode, WireError, frame, subjects};

use crate::Said;

/// Revision of a key at which it was read or written; 0 = the key does not exist.
pub type Revision = u64;

/// The key had another revision than expected: read it again and decide anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict;

/// The registry could not be asked, or holds something unreadable.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// NATS did not answer, or not in time; ask again.
    #[error("registry unavailable: {0}")]
    Unavailable(String),
    /// A record this release cannot read.
    #[error("registry key {key}: {error}")]
    Unreadable {
        /// The key.
        key: String,
        /// Why.
        error: frame::FrameError,
    },
}

impl RegistryError {
    /// The error as it crosses the wire. What cannot be read stays so until somebody does something about it.
    #[must_use]
    pub fn to_wire(&self) -> WireError {
        let code = match self {
            Self::Unavailable(_) => ErrorCode::Unavailable,
            Self::Unreadable { error, .. } => error.to_wire().code,
        };
        WireError::new(code, self.to_string())
    }

    /// Logs it: once and as an error when it does not pass by itself, else only for who looks closely.
    pub fn log(&self, what: &'static str) {
        static SAID: Said = Said::new();
        match self {
            Self::Unavailable(_) => tracing::debug!(error = %self, "{what}"),
            Self::Unreadable { .. } if SAID.is_new(&format!("{what}: {self}")) => {
                tracing::error!(error = %self, "{what}");
            }
            Self::Unreadable { .. } => {}
        }
    }
}

/// Where the keys live: a bucket of NATS, or the simulation's model of one.
#[async_trait]
pub trait Bucket: Send + Sync + std::fmt::Debug {
    /// The value of a key and its revision; a deleted key has a revision and no value, one that never was
    /// has revision 0.
    async fn entry(&self, key: &str) -> Result<(Option<Bytes>, Revision), RegistryError>;

    /// Writes a key that stands at `expect`.
    async fn update(
        &self,
        key: &str,
        value: Bytes,
        expect: Revision,
    ) -> Result<Result<Revision, Conflict>, RegistryError>;

    /// Deletes a key that stands at `expect`.
    async fn purge(&self, key: &str, expect: Revision) -> Result<Result<(), Conflict>, RegistryError>;

    /// The keys that have a value.
    async fn keys(&self) -> Result<Vec<String>, RegistryError>;
}

/// Handle to the registry; cheap to clone.
#[derive(Clone, Debug)]
pub struct Registry {
    bucket: Arc<dyn Bucket>,
}

impl Registry {
    /// Opens the bucket, creating it where it does not exist yet (file storage, one revision a key).
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when JetStream does not answer.
    pub async fn open(jetstream: &jetstream::Context) -> Result<Self, RegistryError> {
        if let Ok(bucket) = jetstream.get_key_value(subjects::REGISTRY_BUCKET).await {
            return Ok(Self::over(Arc::new(bucket)));
        }
        let config = kv::Config {
            bucket: subjects::REGISTRY_BUCKET.to_owned(),
            description: "Thalweg: jobs, rosters, placement, leases".to_owned(),
            history: 1,
            storage: StorageType::File,
            ..kv::Config::default()
        };
        let bucket = jetstream.create_key_value(config).await.map_err(unavailable)?;
        Ok(Self::over(Arc::new(bucket)))
    }

    /// The registry in `bucket`.
    #[must_use]
    pub fn over(bucket: Arc<dyn Bucket>) -> Self {
        Self { bucket }
    }

    /// Reads a key; `None` with revision 0 when it does not exist. A deleted key keeps its revision, which
    /// the next write must name.
    ///
    /// # Errors
    /// As [`RegistryError`].
    pub async fn get<T: DeserializeOwned>(&self, key: &str) -> Result<(Option<T>, Revision), RegistryError> {
        let (value, revision) = self.bucket.entry(key).await?;
        let record = value.map(|value| frame::open_record(&value)).transpose();
        let record = record.map_err(|error| RegistryError::Unreadable { key: key.to_owned(), error })?;
        Ok((record, revision))
    }

    /// Writes a key if it still has the revision at which it was read.
    ///
    /// # Errors
    /// As [`RegistryError`]. After an error the write may or may not have happened: read again.
    pub async fn put<T: Serialize>(
        &self,
        key: &str,
        record: &T,
        expect: Revision,
    ) -> Result<Result<Revision, Conflict>, RegistryError> {
        self.bucket.update(key, frame::seal_record(record), expect).await
    }

    /// Deletes a key if it still has the revision at which it was read.
    ///
    /// # Errors
    /// As [`Registry::put`].
    pub async fn delete(&self, key: &str, expect: Revision) -> Result<Result<(), Conflict>, RegistryError> {
        self.bucket.purge(key, expect).await
    }

    /// Keys that start with `prefix` and exist now.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`].
    pub async fn keys(&self, prefix: &str) -> Result<Vec<String>, RegistryError> {
        let keys = self.bucket.keys().await?;
        Ok(keys.into_iter().filter(|key| key.starts_with(prefix)).collect())
    }
}

#[async_trait]
impl Bucket for kv::Store {
    async fn entry(&self, key: &str) -> Result<(Option<Bytes>, Revision), RegistryError> {
        let entry = kv::Store::entry(self, key).await.map_err(unavailable)?;
        Ok(entry.map_or((None, 0), |entry| {
            ((entry.operation == kv::Operation::Put).then_some(entry.value), entry.revision)
        }))
    }

    async fn update(
        &self,
        key: &str,
        value: Bytes,
        expect: Revision,
    ) -> Result<Result<Revision, Conflict>, RegistryError> {
        match kv::Store::update(self, key, value, expect).await {
            Ok(revision) => Ok(Ok(revision)),
            Err(error) if error.kind() == kv::UpdateErrorKind::WrongLastRevision => Ok(Err(Conflict)),
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn purge(&self, key: &str, expect: Revision) -> Result<Result<(), Conflict>, RegistryError> {
        match self.purge_expect_revision(key, Some(expect)).await {
            Ok(()) => Ok(Ok(())),
            Err(error) if error.to_string().contains("wrong last sequence") => Ok(Err(Conflict)),
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn keys(&self) -> Result<Vec<String>, RegistryError> {
        let keys = kv::Store::keys(self).await.map_err(unavailable)?;
        keys.try_collect().await.map_err(unavailable)
    }
}

fn unavailable(error: impl std::fmt::Display) -> RegistryError {
    RegistryError::Unavailable(error.to_string())
}

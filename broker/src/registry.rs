//! The registry: a JetStream key-value bucket, changed only by compare-and-swap.

use async_nats::jetstream::{self, kv, stream::StorageType};
use futures::TryStreamExt;
use serde::{Serialize, de::DeserializeOwned};
use thalweg_protocol::{frame, subjects};

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

/// Handle to the bucket; cheap to clone.
#[derive(Clone, Debug)]
pub struct Registry {
    bucket: kv::Store,
}

impl Registry {
    /// Opens the bucket, creating it where it does not exist yet (file storage, one revision a key).
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when JetStream does not answer.
    pub async fn open(jetstream: &jetstream::Context) -> Result<Self, RegistryError> {
        if let Ok(bucket) = jetstream.get_key_value(subjects::REGISTRY_BUCKET).await {
            return Ok(Self { bucket });
        }
        let config = kv::Config {
            bucket: subjects::REGISTRY_BUCKET.to_owned(),
            description: "Thalweg: jobs, rosters, placement, leases".to_owned(),
            history: 1,
            storage: StorageType::File,
            ..kv::Config::default()
        };
        let bucket = jetstream.create_key_value(config).await.map_err(unavailable)?;
        Ok(Self { bucket })
    }

    /// Reads a key; `None` with revision 0 when it does not exist or was deleted.
    ///
    /// # Errors
    /// As [`RegistryError`].
    pub async fn get<T: DeserializeOwned>(&self, key: &str) -> Result<(Option<T>, Revision), RegistryError> {
        match self.bucket.entry(key).await.map_err(unavailable)? {
            Some(entry) if entry.operation == kv::Operation::Put => {
                let record = frame::open_record(&entry.value)
                    .map_err(|error| RegistryError::Unreadable { key: key.to_owned(), error })?;
                Ok((Some(record), entry.revision))
            }
            // A deleted key keeps its revision, which the next write must name.
            Some(entry) => Ok((None, entry.revision)),
            None => Ok((None, 0)),
        }
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
        match self.bucket.update(key, frame::seal_record(record), expect).await {
            Ok(revision) => Ok(Ok(revision)),
            Err(error) if error.kind() == kv::UpdateErrorKind::WrongLastRevision => Ok(Err(Conflict)),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// Deletes a key if it still has the revision at which it was read.
    ///
    /// # Errors
    /// As [`Registry::put`].
    pub async fn delete(&self, key: &str, expect: Revision) -> Result<Result<(), Conflict>, RegistryError> {
        match self.bucket.purge_expect_revision(key, Some(expect)).await {
            Ok(()) => Ok(Ok(())),
            Err(error) if error.to_string().contains("wrong last sequence") => Ok(Err(Conflict)),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// Keys that start with `prefix` and exist now.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`].
    pub async fn keys(&self, prefix: &str) -> Result<Vec<String>, RegistryError> {
        let keys: Vec<String> =
            self.bucket.keys().await.map_err(unavailable)?.try_collect().await.map_err(unavailable)?;
        Ok(keys.into_iter().filter(|key| key.starts_with(prefix)).collect())
    }
}

fn unavailable(error: impl std::fmt::Display) -> RegistryError {
    RegistryError::Unavailable(error.to_string())
}

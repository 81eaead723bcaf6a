//! A job's state as a safetensors file, sent while it is read.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use futures::{Stream, StreamExt as _, stream};
use serde::Deserialize;
use thalweg_protocol::{ErrorCode, Incarnation, JobKey, JobRecord, ShardIndex, Version, WireError, snapshot};
use thalweg_store::{ShardStore, StoreError};
use tokio::sync::OwnedSemaphorePermit;
use utoipa::{IntoParams, PartialSchema, ToSchema, openapi};

use super::{
    JobPath, Shared,
    problem::{Problem, Problems},
};

/// Shards on their way to one client.
const AT_ONCE: usize = 2;
/// Longest wait for a round to end on all shards.
const ROUND_PATIENCE: Duration = Duration::from_secs(300);
/// Longest wait for a store that does not answer.
const STORE_PATIENCE: Duration = Duration::from_secs(30);
/// Time between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// How a snapshot is taken.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct SnapshotQuery {
    /// Whether optimizer slots are in it. Without them it is smaller, and training from it starts with fresh ones.
    #[serde(default = "yes")]
    #[param(default = true)]
    slots: bool,
}

fn yes() -> bool {
    true
}

/// A safetensors file.
struct Safetensors;

impl PartialSchema for Safetensors {
    fn schema() -> openapi::RefOr<openapi::Schema> {
        let schema = openapi::ObjectBuilder::new().schema_type(openapi::Type::String);
        schema.content_media_type("application/octet-stream").into()
    }
}

impl ToSchema for Safetensors {}

/// A version that the store keeps readable for one client; let go of however that ends.
#[derive(Debug)]
struct Hold {
    store: Arc<dyn ShardStore>,
    job: Incarnation,
    id: Incarnation,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let (store, job, id) = (self.store.clone(), self.job, self.id);
        // Without a runtime, or an answer, the store forgets it by itself soon.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { store.release(job, id).await });
        }
    }
}

impl Hold {
    /// Waits until all shards have the version.
    async fn complete(&self) -> Result<Version, WireError> {
        let begun = Instant::now();
        loop {
            let waited = begun.elapsed();
            match self.store.hold(self.job, self.id).await {
                Ok((version, true)) => return Ok(version),
                Ok(_) if waited < ROUND_PATIENCE => {}
                Ok(_) => {
                    let text = "the round does not end on all shards: is the job training?";
                    return Err(WireError::new(ErrorCode::NotReady, text));
                }
                Err(StoreError::Unavailable(_)) if waited < STORE_PATIENCE => {}
                Err(error) => return Err(error.to_wire()),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Section `section` (0: parameters, then each slot) of a shard of `len` elements.
    async fn read(&self, section: usize, shard: ShardIndex, len: usize) -> io::Result<Bytes> {
        let begun = Instant::now();
        let state = loop {
            match self.store.fetch_held(self.job, self.id, shard, section > 0).await {
                Ok(state) => break state,
                Err(error) if error.is_retryable() && begun.elapsed() < STORE_PATIENCE => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        };
        let wanted = 4 * len * section..4 * len * (section + 1);
        if state.values.len() < wanted.end {
            let text = format!("shard {shard} has {} bytes, not {}", state.values.len(), wanted.end);
            return Err(io::Error::other(text));
        }
        Ok(state.values.slice(wanted))
    }

    /// The data of the file in its order: all shards of a section, then the next one. The state of a shard is read
    /// once for each section, which costs reads and saves memory: a file can be larger than that.
    fn data(self, record: &JobRecord, sections: u32) -> impl Stream<Item = io::Result<Bytes>> + use<> {
        let (hold, layout) = (Arc::new(self), record.layout);
        let parts =
            (0..sections).flat_map(move |section| (0..layout.shards()).map(move |shard| (section, shard)));
        let read = move |(section, shard): (u32, ShardIndex)| {
            let hold = hold.clone();
            async move { hold.read(section as usize, shard, layout.len(shard)).await }
        };
        stream::iter(parts).map(read).buffered(AT_ONCE)
    }
}

/// Take a snapshot
///
/// A safetensors file of the job's parameters and optimizer slots at one version: that of the shard which is furthest,
/// once all have come there, while rounds go on. It can be restored with the SDK or `thalweg job restore`. An answer
/// that ends before `content-length` is no snapshot: the store was restarted, or the gateway stopped; begin again.
#[utoipa::path(get, path = "/v1/jobs/{tenant}/{job}/snapshot", operation_id = "getSnapshot", tag = "jobs",
    params(JobPath, SnapshotQuery),
    responses(
        (status = 200, description = "The file.", content_type = "application/octet-stream", body = inline(Safetensors),
            headers(
                ("content-length" = u64, description = "Bytes of the file"),
                ("content-disposition" = String, description = "A name for it: TENANT-JOB-vVERSION.safetensors"),
            )),
        Problems,
    ),
)]
pub(super) async fn snapshot(
    State(api): Shared,
    Path(key): Path<JobPath>,
    Query(query): Query<SnapshotQuery>,
) -> Result<Response, Problem> {
    let stopping = api.shutdown.clone();
    let begun = begin(&api, key.into());
    let (hold, version, mut record) = tokio::select! {
        begun = begun => begun?,
        () = stopping.cancelled() => {
            return Err(Problem::new(ErrorCode::Unavailable, "the gateway stops: ask another one"));
        }
    };
    if !query.slots {
        record.slots = 0;
    }
    let header = snapshot::header(&record, version)?;
    let sections = 1 + record.slots;
    let bytes = header.len() as u64 + u64::from(sections) * 4 * record.layout.elements;
    let name = format!("{}-{}-v{version}.safetensors", record.spec.key.tenant, record.spec.key.job);
    let headers = [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_LENGTH, bytes.to_string()),
        (CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
    ];
    let data = hold.data(&record, sections).inspect(move |part| {
        if let Err(error) = part {
            tracing::warn!(job = %record.spec.key, %error, "a snapshot broke off");
        }
    });
    let file = stream::iter([Ok(Bytes::from(header))]).chain(data);
    Ok((headers, Body::from_stream(file.take_until(stopping.cancelled_owned()))).into_response())
}

/// Holds a version, and reads the job's record as it is then: with the settings of the version's next round.
async fn begin(api: &super::Api, key: JobKey) -> Result<(Hold, Version, JobRecord), Problem> {
    let permit = api.stream()?;
    let (record, _) = api.job(key.clone()).await?;
    let (store, job) = (api.gateway.jobs.store(&record), record.incarnation);
    let hold = Hold { store, job, id: Incarnation::random(), _permit: permit };
    let version = hold.complete().await?;
    let (record, _) = api.job(key).await?;
    if record.incarnation != job {
        let text = format!("job {} was replaced meanwhile: try again", record.spec.key);
        return Err(Problem::new(ErrorCode::Gone, text));
    }
    Ok((hold, version, record))
}

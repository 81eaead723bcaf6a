//! The store as a service on NATS.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use thalweg_broker::{Backoff, Connection, Registry, RegistryError, Report};
use thalweg_protocol::{
    ErrorCode, Kind, Ledger, MAX_HEADS, STORE_KEY, StoreId, StoreRecord, StoreReply, StoreRequest, WireError,
    frame, subjects,
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{LocalStore, ShardStore, Standing, StoreError, direct, metrics};

/// Settings of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Data directory. Default `thalweg-data`.
    pub data_dir: PathBuf,
    /// Longest time between flush cycles while anything was written, milliseconds. Default 500.
    pub flush_interval_ms: u64,
    /// Take over from another data directory that the registry names. The jobs in that one are
    /// unreachable afterwards, so this is never done by itself. Default false.
    pub replace: bool,
    /// Bytes of the disk that are left free: a job or snapshot that would need them is refused with
    /// `storage_full`. Default 256 MiB.
    pub reserve_bytes: u64,
    /// Requests worked on at once. Default 64.
    pub max_requests: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("thalweg-data"),
            flush_interval_ms: 500,
            replace: false,
            reserve_bytes: 256 << 20,
            max_requests: 64,
        }
    }
}

impl Config {
    /// Time between flush cycles.
    #[must_use]
    pub fn flush_interval(&self) -> Duration {
        Duration::from_millis(self.flush_interval_ms.max(1))
    }
}

/// Registers the store's identity, or finds that another store is the one in force (rule P26). `jobs` is how many it holds.
///
/// # Errors
/// [`ErrorCode::StoreMismatch`] when the registry names another data directory and `replace` is off; the same when it names
/// none though this one holds jobs: then the registry has been lost, and whoever opened a job of that name would begin it
/// anew without a word.
/// [`ErrorCode::WireVersion`] when another release wrote what it says; `Unavailable` when the registry does not answer.
pub async fn announce(
    registry: &Registry,
    id: StoreId,
    jobs: usize,
    config: &Config,
) -> Result<(), StoreError> {
    let unavailable = |error: RegistryError| match error {
        RegistryError::Unavailable(_) => StoreError::Unavailable(error.to_string()),
        RegistryError::Unreadable { .. } => StoreError::Refused(error.to_wire()),
    };
    loop {
        let (known, revision) = registry.get::<StoreRecord>(STORE_KEY).await.map_err(unavailable)?;
        let location = std::path::absolute(&config.data_dir).unwrap_or_else(|_| config.data_dir.clone());
        match known {
            Some(known) if known.id == id => return Ok(()),
            Some(known) if !config.replace => {
                let text = format!(
                    "the registry names store {} (data directory {}), this one is {id} ({}): start the store with \
                     that directory, or pass --replace to give its jobs up",
                    known.id,
                    known.location,
                    location.display()
                );
                return Err(StoreError::refused(ErrorCode::StoreMismatch, text));
            }
            None if jobs > 0 && !config.replace => {
                let text = format!(
                    "the registry knows no store, and this one ({}) holds {jobs} jobs: the NATS server has lost what it \
                     kept (a volume that is not mounted?). Bring that back, and all goes on; or pass --replace to give \
                     those jobs up: they can then begin anew, and their files are left in that directory",
                    location.display()
                );
                return Err(StoreError::refused(ErrorCode::StoreMismatch, text));
            }
            _ => {
                let record = StoreRecord { id, location: location.display().to_string() };
                if registry.put(STORE_KEY, &record, revision).await.map_err(unavailable)?.is_ok() {
                    tracing::info!(%id, location = record.location, "store registered");
                    return Ok(());
                }
            }
        }
    }
}

/// Serves `store` until `shutdown`, then finishes the requests under way and closes it.
///
/// # Errors
/// When the store may not serve (another one is registered), or its disk has failed.
pub async fn run(
    config: Config,
    connection: Connection,
    store: LocalStore,
    report: Report,
    shutdown: CancellationToken,
) -> Result<(), StoreError> {
    report(Some("waiting for the registry"));
    let jobs = store.list().await?.len();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    loop {
        let announced = match Registry::open(&connection.jetstream).await {
            Ok(registry) => announce(&registry, store.id(), jobs, &config).await,
            Err(error) => Err(StoreError::Unavailable(error.to_string())),
        };
        match announced {
            Ok(()) => break,
            Err(error @ StoreError::Refused(_)) => return Err(error),
            Err(error) => tracing::info!(%error, "store waits for the registry"),
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.delay()) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
    }
    let subject = subjects::store(store.id());
    let mut requests = connection
        .client
        .subscribe(subject)
        .await
        .map_err(|error| StoreError::Unavailable(error.to_string()))?;
    let questions = connection.client.subscribe(subjects::ALL_TRACES).await;
    let mut questions = questions.map_err(|error| StoreError::Unavailable(error.to_string()))?;
    let permits = Arc::new(Semaphore::new(config.max_requests.max(1)));
    match direct::listen(&config.data_dir) {
        Ok(listener) => {
            let (store, permits, shutdown) = (store.clone(), permits.clone(), shutdown.clone());
            tokio::spawn(direct::serve(listener, store, permits, shutdown));
        }
        Err(error) => tracing::warn!(%error, "no direct door: invokers of this host commit over NATS"),
    }
    report(None);
    tracing::info!(id = %store.id(), "store serves");
    let mut health = tokio::time::interval(Duration::from_millis(250));
    let stop = shutdown.child_token();
    let _stopped = stop.clone().drop_guard();
    tokio::spawn(watch_room(store.clone(), stop));
    loop {
        let message = tokio::select! {
            message = requests.next() => message,
            Some(question) = questions.next() => {
                store.spans().answer(&connection.client, &question).await;
                continue;
            }
            _ = health.tick() => {
                metrics::unsynced(store.unsynced_bytes());
                if store.has_failed() {
                    return Err(StoreError::Unavailable("the store's disk failed; see the log".to_owned()));
                }
                continue;
            }
            () = shutdown.cancelled() => None,
        };
        let Some(message) = message else { break };
        let Some(reply_to) = message.reply else { continue };
        // The semaphore is never closed, so this only waits.
        let Ok(permit) = permits.clone().acquire_owned().await else { break };
        let (store, client) = (store.clone(), connection.client.clone());
        tokio::spawn(async move {
            let reply = answer(&store, &message.payload).await;
            // A lost reply is a request that timed out: the sender asks again.
            let _ = client.publish(reply_to, reply).await;
            drop(permit);
        });
    }
    report(Some("draining"));
    // All permits back means that every request under way has been answered.
    let _ = permits.acquire_many(u32::try_from(config.max_requests.max(1)).unwrap_or(u32::MAX)).await;
    let _ = connection.client.flush().await;
    let closing = store.clone();
    let closed = tokio::task::spawn_blocking(move || closing.close()).await;
    closed.unwrap_or_else(|error| Err(StoreError::Unavailable(error.to_string())))
}

/// How often the room on the disk is looked at.
const ROOM_INTERVAL: Duration = Duration::from_secs(10);

/// Tells how much of the disk is free and taken, and warns once when it becomes too little, until `stop`.
async fn watch_room(store: LocalStore, stop: CancellationToken) {
    let mut looks = tokio::time::interval(ROOM_INTERVAL);
    let mut scarce = false;
    while stop.run_until_cancelled(looks.tick()).await.is_some() {
        let store = store.clone();
        // The files of all jobs are asked for their lengths, by a disk that may be slow.
        let looked = tokio::task::spawn_blocking(move || (store.usage(), store.room())).await;
        let Ok((usage, room)) = looked else { continue };
        metrics::usage(usage);
        let Ok((free, reserve)) = room else { continue };
        metrics::free(free);
        if free < reserve && !scarce {
            tracing::warn!(
                free,
                reserve,
                "the disk is nearly full: no more jobs or snapshots until there is room (store.reserve_bytes)"
            );
        }
        scarce = free < reserve;
    }
}

/// Answers one request: a frame for a frame.
pub async fn answer(store: &dyn ShardStore, frame: &Bytes) -> Bytes {
    let (reply, payload) = match frame::open::<StoreRequest>(Kind::StoreRequest, frame) {
        Ok((request, payload)) => match perform(store, request, payload).await {
            Ok(done) => done,
            Err(error) => (StoreReply::Error(error.to_wire()), Bytes::new()),
        },
        Err(error) => (StoreReply::Error(error.to_wire()), Bytes::new()),
    };
    frame::seal(Kind::StoreReply, &reply, &payload)
}

async fn perform(
    store: &dyn ShardStore,
    request: StoreRequest,
    payload: Bytes,
) -> Result<(StoreReply, Bytes), StoreError> {
    let reply = match request {
        StoreRequest::Create(job) => store.create(job).await.map(|()| StoreReply::Done)?,
        StoreRequest::Upload { job, upload, shard } => {
            store.upload(job, upload, shard, payload).await.map(|()| StoreReply::Done)?
        }
        StoreRequest::Activate { job, upload } => {
            store.activate(job, upload).await.map(|()| StoreReply::Done)?
        }
        StoreRequest::Heads { job, first, count } if count <= MAX_HEADS => {
            StoreReply::Heads(store.heads(job, first, count).await?)
        }
        StoreRequest::Heads { count, .. } => {
            let text = format!("{count} heads in one request; at most {MAX_HEADS}");
            StoreReply::Error(WireError::new(ErrorCode::Limit, text))
        }
        StoreRequest::Fetch { job, shard, slots } => {
            let state = store.fetch(job, shard, slots).await?;
            return Ok((StoreReply::State(state.head, state.ledger), state.values));
        }
        StoreRequest::FetchHead { job, shard } => {
            let Standing { head, ledger, partial } = store.fetch_head(job, shard).await?;
            match partial {
                Some(partial) => StoreReply::Open(head, ledger, Box::new(partial)),
                None => StoreReply::State(head, ledger),
            }
        }
        StoreRequest::Commit(commit) => StoreReply::Commit(store.commit(commit, payload).await?),
        StoreRequest::Fence { job, epoch, from_round } => {
            StoreReply::Fenced(store.fence(job, epoch, from_round).await?)
        }
        StoreRequest::Delete { job } => store.delete(job).await.map(|()| StoreReply::Done)?,
        StoreRequest::List => StoreReply::Jobs(store.list().await?),
        StoreRequest::Hold { job, hold } => {
            let (version, complete) = store.hold(job, hold).await?;
            StoreReply::Held { version, complete }
        }
        StoreRequest::FetchHeld { job, hold, shard, slots } => {
            let state = store.fetch_held(job, hold, shard, slots).await?;
            return Ok((StoreReply::State(state.head, state.ledger), state.values));
        }
        StoreRequest::CommitPartial(commit) => {
            StoreReply::Commit(store.commit_partial(commit, payload).await?)
        }
        StoreRequest::FetchPartial { job, shard } => match store.fetch_partial(job, shard).await? {
            Some((head, partial, fold)) => {
                return Ok((StoreReply::Open(head, Ledger::default(), Box::new(partial)), fold));
            }
            None => StoreReply::Done,
        },
        StoreRequest::OpenRounds { after, limit } => {
            StoreReply::OpenRounds(store.open_rounds(after, limit).await?)
        }
        StoreRequest::Release { job, hold } => store.release(job, hold).await.map(|()| StoreReply::Done)?,
    };
    Ok((reply, Bytes::new()))
}

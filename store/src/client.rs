//! The store over NATS, and over its direct door where that is open.

use std::{path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use thalweg_broker::{RequestError, request};
use thalweg_protocol::{
    Commit, CommitOutcome, Epoch, ErrorCode, Head, Incarnation, Kind, MAX_HEADS, OpenRound, PartialCommit,
    Round, ShardIndex, StoreId, StoreJob, StoreReply, StoreRequest, Version, frame, subjects,
};

use crate::{OpenFold, ShardState, ShardStore, Standing, StoreError, direct::Door};

/// Longest wait for a reply. A `disk` commit waits for two syncs, which a busy disk may draw out.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How requests reach a store.
#[async_trait]
pub trait Route: std::fmt::Debug + Send + Sync {
    /// Asks once, in frames of [`Kind::StoreRequest`] and [`Kind::StoreReply`].
    async fn ask(&self, query: &StoreRequest, payload: &[u8]) -> Result<(StoreReply, Bytes), StoreError>;
}

/// A store that some process on the same NATS serves. Requests are addressed to one data directory, so
/// that an empty store in its place is never taken for it (rule P26).
#[derive(Clone, Debug)]
pub struct StoreClient {
    route: Arc<dyn Route>,
}

impl StoreClient {
    /// Addresses the store with this identity.
    #[must_use]
    pub fn new(client: async_nats::Client, id: StoreId) -> Self {
        Self::over(Arc::new(NatsRoute { client, subject: subjects::store(id), door: None }))
    }

    /// As [`Self::new`], but requests go through the socket in the store's data directory where that is on
    /// this host and open. Which way a request takes makes no difference but to its cost.
    #[must_use]
    pub fn near(client: async_nats::Client, id: StoreId, data_dir: &Path) -> Self {
        let door = Some(Door::new(data_dir, id));
        Self::over(Arc::new(NatsRoute { client, subject: subjects::store(id), door }))
    }

    /// A store at the end of another route.
    #[must_use]
    pub fn over(route: Arc<dyn Route>) -> Self {
        Self { route }
    }

    async fn ask(&self, query: StoreRequest, payload: &[u8]) -> Result<(StoreReply, Bytes), StoreError> {
        match self.route.ask(&query, payload).await? {
            (StoreReply::Error(error), _) => Err(StoreError::from_wire(error)),
            reply => Ok(reply),
        }
    }
}

#[derive(Debug)]
struct NatsRoute {
    client: async_nats::Client,
    subject: String,
    door: Option<Door>,
}

#[async_trait]
impl Route for NatsRoute {
    async fn ask(&self, query: &StoreRequest, payload: &[u8]) -> Result<(StoreReply, Bytes), StoreError> {
        let kinds = (Kind::StoreRequest, Kind::StoreReply);
        if let Some(door) = &self.door
            && let Some(reply) = door.ask(&frame::seal(kinds.0, query, payload), TIMEOUT).await
        {
            return frame::open(kinds.1, &reply?).map_err(|error| StoreError::Refused(error.to_wire()));
        }
        request(&self.client, &self.subject, kinds, query, payload, TIMEOUT).await.map_err(
            |error| match error {
                RequestError::TooLarge(..) | RequestError::Frame(..) => StoreError::Refused(error.to_wire()),
                error => StoreError::Unavailable(error.to_string()),
            },
        )
    }
}

/// A reply of another kind than the request asks for: a bug on one of the two sides.
fn unexpected(reply: &StoreReply) -> StoreError {
    StoreError::refused(ErrorCode::Malformed, format!("unexpected reply of the store: {reply:?}"))
}

#[async_trait]
impl ShardStore for StoreClient {
    async fn create(&self, job: StoreJob) -> Result<(), StoreError> {
        match self.ask(StoreRequest::Create(job), &[]).await? {
            (StoreReply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn upload(
        &self,
        job: Incarnation,
        upload: Incarnation,
        shard: ShardIndex,
        parameters: Bytes,
    ) -> Result<(), StoreError> {
        match self.ask(StoreRequest::Upload { job, upload, shard }, &parameters).await? {
            (StoreReply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn activate(&self, job: Incarnation, upload: Incarnation) -> Result<(), StoreError> {
        match self.ask(StoreRequest::Activate { job, upload }, &[]).await? {
            (StoreReply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn heads(&self, job: Incarnation, first: ShardIndex, count: u32) -> Result<Vec<Head>, StoreError> {
        let mut heads = Vec::new();
        loop {
            let first = first.saturating_add(u32::try_from(heads.len()).unwrap_or(u32::MAX));
            let wanted = (u64::from(count) - heads.len() as u64).min(u64::from(MAX_HEADS));
            let query = StoreRequest::Heads { job, first, count: u32::try_from(wanted).unwrap_or(MAX_HEADS) };
            let got = match self.ask(query, &[]).await? {
                (StoreReply::Heads(got), _) => got,
                (other, _) => return Err(unexpected(&other)),
            };
            let end = (got.len() as u64) < wanted;
            heads.extend(got);
            if end || heads.len() as u64 >= u64::from(count) {
                return Ok(heads);
            }
        }
    }

    async fn fetch(
        &self,
        job: Incarnation,
        shard: ShardIndex,
        slots: bool,
    ) -> Result<ShardState, StoreError> {
        match self.ask(StoreRequest::Fetch { job, shard, slots }, &[]).await? {
            (StoreReply::State(head, ledger), values) => Ok(ShardState { head, ledger, values }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn fetch_head(&self, job: Incarnation, shard: ShardIndex) -> Result<Standing, StoreError> {
        match self.ask(StoreRequest::FetchHead { job, shard }, &[]).await? {
            (StoreReply::State(head, ledger), _) => Ok(Standing { head, ledger, partial: None }),
            (StoreReply::Open(head, ledger, partial), _) => {
                Ok(Standing { head, ledger, partial: Some(*partial) })
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn commit(&self, commit: Commit, state: Bytes) -> Result<CommitOutcome, StoreError> {
        match self.ask(StoreRequest::Commit(commit), &state).await? {
            (StoreReply::Commit(outcome), _) => Ok(outcome),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn commit_partial(&self, commit: PartialCommit, fold: Bytes) -> Result<CommitOutcome, StoreError> {
        match self.ask(StoreRequest::CommitPartial(commit), &fold).await? {
            (StoreReply::Commit(outcome), _) => Ok(outcome),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn fetch_partial(
        &self,
        job: Incarnation,
        shard: ShardIndex,
    ) -> Result<Option<OpenFold>, StoreError> {
        match self.ask(StoreRequest::FetchPartial { job, shard }, &[]).await? {
            (StoreReply::Open(head, _, partial), fold) => Ok(Some((head, *partial, fold))),
            (StoreReply::Done, _) => Ok(None),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn open_rounds(
        &self,
        after: Option<(Incarnation, ShardIndex)>,
        limit: u32,
    ) -> Result<Vec<OpenRound>, StoreError> {
        match self.ask(StoreRequest::OpenRounds { after, limit }, &[]).await? {
            (StoreReply::OpenRounds(rounds), _) => Ok(rounds),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn fence(&self, job: Incarnation, epoch: Epoch, from_round: Round) -> Result<Version, StoreError> {
        match self.ask(StoreRequest::Fence { job, epoch, from_round }, &[]).await? {
            (StoreReply::Fenced(version), _) => Ok(version),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn delete(&self, job: Incarnation) -> Result<(), StoreError> {
        match self.ask(StoreRequest::Delete { job }, &[]).await? {
            (StoreReply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn hold(&self, job: Incarnation, hold: Incarnation) -> Result<(Version, bool), StoreError> {
        match self.ask(StoreRequest::Hold { job, hold }, &[]).await? {
            (StoreReply::Held { version, complete }, _) => Ok((version, complete)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn fetch_held(
        &self,
        job: Incarnation,
        hold: Incarnation,
        shard: ShardIndex,
        slots: bool,
    ) -> Result<ShardState, StoreError> {
        match self.ask(StoreRequest::FetchHeld { job, hold, shard, slots }, &[]).await? {
            (StoreReply::State(head, ledger), values) => Ok(ShardState { head, ledger, values }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn release(&self, job: Incarnation, hold: Incarnation) -> Result<(), StoreError> {
        match self.ask(StoreRequest::Release { job, hold }, &[]).await? {
            (StoreReply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn list(&self) -> Result<Vec<StoreJob>, StoreError> {
        match self.ask(StoreRequest::List, &[]).await? {
            (StoreReply::Jobs(jobs), _) => Ok(jobs),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

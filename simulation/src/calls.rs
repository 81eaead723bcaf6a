//! Requests as futures: what real asynchronous code awaits, the world answers when it likes, or never.
//!
//! [`Remote`] is a process's way to broker and store. It stands where a NATS client stands in a deployment:
//! under [`thalweg_broker::Registry`], [`Queues`] and [`thalweg_store::StoreClient`].

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::Bytes;
use thalweg_broker::{
    Bucket, Conflict, PartitionDepth, Queue, QueueError, Queues, Registry, RegistryError, Revision,
    StreamsConfig,
};
use thalweg_invoker::{Peers, Silence};
use thalweg_protocol::{HandedOver, Handover, JobKey, Kind, Partition, StoreReply, StoreRequest, frame};
use thalweg_store::{Route, StoreClient, StoreError};

use crate::network::Millis;

pub(crate) type CallId = u64;

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    // Of the registry.
    Entry(String),
    Update(String, Bytes, Revision),
    Purge(String, Revision),
    Keys,
    // Of the work queues.
    Ensure,
    Depths,
    Look(Partition),
    DeleteConsumer(Partition, String),
    CreateConsumer(Partition, String),
    Read(Partition, u64),
    /// Stores a contribution: subject and frame.
    Publish(Partition, String, Bytes),
    /// Puts a message aside.
    DeadLetter(Bytes),
    /// Of the store: a frame for a frame.
    Store(Bytes),
    /// Of some gateway.
    Api(Bytes),
    /// Of all gateways; the leading one answers.
    Beat(Bytes),
    /// Of the invoker that holds a partition by some consumer: to hand it over.
    Handover(Handover),
    /// The same among its deliveries, to which whoever asks listens from then on.
    Listen(Handover),
    StopListening(Partition, String),
    /// Of nobody: time.
    Sleep(Millis),
}

/// What is answered.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Entry(Option<Bytes>, Revision),
    Written(Result<Revision, Conflict>),
    Purged(Result<(), Conflict>),
    Keys(Vec<String>),
    Created(Vec<i64>),
    Depths(Vec<PartitionDepth>),
    Queue(Queue),
    Message(Option<Bytes>),
    Refused(QueueError),
    Frame(Bytes),
    Done,
    /// Of a former holder.
    HandedOver(HandedOver),
    /// Nobody is there.
    Nobody,
    /// Nobody answered in time.
    Lost,
}

#[derive(Debug, Default)]
struct Calls {
    out: Vec<(CallId, Ask)>,
    waiting: BTreeSet<CallId>,
    answers: BTreeMap<CallId, Answer>,
}

/// See the module. Cheap to clone; all clones belong to one process.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    calls: Arc<Mutex<Calls>>,
    /// Numbers the calls of all processes.
    ids: Arc<AtomicU64>,
}

impl Remote {
    pub(crate) fn new(ids: Arc<AtomicU64>) -> Self {
        Self { calls: Arc::default(), ids }
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn ask(&self, ask: Ask) -> impl Future<Output = Answer> + Send + 'static {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let mut calls = self.calls();
        calls.out.push((id, ask));
        calls.waiting.insert(id);
        Call { remote: self.clone(), id }
    }

    pub(crate) async fn sleep(&self, delay: Millis) {
        let _ = self.ask(Ask::Sleep(delay)).await;
    }

    /// What was asked since this was last called.
    pub(crate) fn take(&self) -> Vec<(CallId, Ask)> {
        std::mem::take(&mut self.calls().out)
    }

    /// Whether the answer was still waited for.
    pub(crate) fn answer(&self, id: CallId, answer: Answer) -> bool {
        let mut calls = self.calls();
        let waited = calls.waiting.remove(&id);
        if waited {
            calls.answers.insert(id, answer);
        }
        waited
    }

    pub(crate) fn registry(&self) -> Registry {
        Registry::over(Arc::new(self.clone()))
    }

    pub(crate) fn store(&self) -> StoreClient {
        StoreClient::over(Arc::new(self.clone()))
    }
}

struct Call {
    remote: Remote,
    id: CallId,
}

impl Future for Call {
    type Output = Answer;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Answer> {
        // The world polls every task of a process after each answer, so nobody has to be woken.
        self.remote.calls().answers.remove(&self.id).map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = self.remote.calls();
        calls.waiting.remove(&self.id);
        calls.answers.remove(&self.id);
    }
}

fn lost() -> RegistryError {
    RegistryError::Unavailable("no answer in time".to_owned())
}

fn queue_lost(answer: Answer) -> QueueError {
    match answer {
        Answer::Refused(error) => error,
        _ => QueueError::Unavailable("no answer in time".to_owned()),
    }
}

#[async_trait]
impl Bucket for Remote {
    async fn entry(&self, key: &str) -> Result<(Option<Bytes>, Revision), RegistryError> {
        match self.ask(Ask::Entry(key.to_owned())).await {
            Answer::Entry(value, revision) => Ok((value, revision)),
            _ => Err(lost()),
        }
    }

    async fn update(
        &self,
        key: &str,
        value: Bytes,
        expect: Revision,
    ) -> Result<Result<Revision, Conflict>, RegistryError> {
        match self.ask(Ask::Update(key.to_owned(), value, expect)).await {
            Answer::Written(result) => Ok(result),
            _ => Err(lost()),
        }
    }

    async fn purge(&self, key: &str, expect: Revision) -> Result<Result<(), Conflict>, RegistryError> {
        match self.ask(Ask::Purge(key.to_owned(), expect)).await {
            Answer::Purged(result) => Ok(result),
            _ => Err(lost()),
        }
    }

    async fn keys(&self) -> Result<Vec<String>, RegistryError> {
        match self.ask(Ask::Keys).await {
            Answer::Keys(keys) => Ok(keys),
            _ => Err(lost()),
        }
    }
}

#[async_trait]
impl Queues for Remote {
    async fn ensure(&self, _: &StreamsConfig) -> Result<Vec<i64>, QueueError> {
        match self.ask(Ask::Ensure).await {
            Answer::Created(created) => Ok(created),
            other => Err(queue_lost(other)),
        }
    }

    async fn depths(&self, _: Partition) -> Result<Vec<PartitionDepth>, QueueError> {
        match self.ask(Ask::Depths).await {
            Answer::Depths(depths) => Ok(depths),
            other => Err(queue_lost(other)),
        }
    }

    async fn look(&self, partition: Partition) -> Result<Queue, QueueError> {
        match self.ask(Ask::Look(partition)).await {
            Answer::Queue(queue) => Ok(queue),
            other => Err(queue_lost(other)),
        }
    }

    async fn delete_consumer(&self, partition: Partition, name: &str) -> Result<(), QueueError> {
        // As with NATS, whoever depends on its absence finds out by creating the next one.
        let _ = self.ask(Ask::DeleteConsumer(partition, name.to_owned())).await;
        Ok(())
    }

    async fn create_consumer(&self, partition: Partition, name: &str) -> Result<(), QueueError> {
        match self.ask(Ask::CreateConsumer(partition, name.to_owned())).await {
            Answer::Done => Ok(()),
            other => Err(queue_lost(other)),
        }
    }

    async fn read(&self, partition: Partition, sequence: u64) -> Result<Option<Bytes>, QueueError> {
        match self.ask(Ask::Read(partition, sequence)).await {
            Answer::Message(message) => Ok(message),
            other => Err(queue_lost(other)),
        }
    }

    async fn publish(&self, partition: Partition, subject: &str, frame: Bytes) -> Result<(), QueueError> {
        match self.ask(Ask::Publish(partition, subject.to_owned(), frame)).await {
            Answer::Done => Ok(()),
            other => Err(queue_lost(other)),
        }
    }

    async fn forget(&self, _: &JobKey) -> Result<(), QueueError> {
        // Dead letters are counted here, not kept.
        Ok(())
    }
}

#[async_trait]
impl Peers for Remote {
    async fn ask(&self, handover: &Handover) -> Result<HandedOver, Silence> {
        said(Self::ask(self, Ask::Handover(handover.clone())).await)
    }

    async fn listen(&self, handover: &Handover) -> Result<HandedOver, Silence> {
        said(Self::ask(self, Ask::Listen(handover.clone())).await)
    }

    async fn stop_listening(&self, handover: &Handover) {
        let Handover { partition, consumer, .. } = handover.clone();
        let _ = Self::ask(self, Ask::StopListening(partition, consumer)).await;
    }
}

fn said(answer: Answer) -> Result<HandedOver, Silence> {
    match answer {
        Answer::HandedOver(said) => Ok(said),
        Answer::Nobody => Err(Silence::Nobody),
        _ => Err(Silence::Late),
    }
}

#[async_trait]
impl Route for Remote {
    async fn ask(&self, query: &StoreRequest, payload: &[u8]) -> Result<(StoreReply, Bytes), StoreError> {
        match Self::ask(self, Ask::Store(frame::seal(Kind::StoreRequest, query, payload))).await {
            Answer::Frame(reply) => frame::open(Kind::StoreReply, &reply)
                .map_err(|error| StoreError::Unavailable(error.to_string())),
            _ => Err(StoreError::Unavailable("no answer in time".to_owned())),
        }
    }
}

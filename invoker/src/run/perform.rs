//! What the core asks for: talking to broker, store and registry.

use std::time::Instant;

use bytes::Bytes;
use thalweg_broker::{Spans, stage, traced};
use thalweg_protocol::{JobKey, Kind, Partition, ResultHeader, Span, Stage, WireError, frame, subjects};

use super::{Done, Shell, now};
use crate::{
    Job,
    core::{Action, Event, FoldError, Gathered, InvocationId, Millis, Plan, ShardKey},
    fold::{FoldContext, fold},
    metrics,
    partition::clear_suspect,
};

impl Shell {
    /// Performs actions in order.
    pub(super) async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Acknowledge(partition, sequence) => {
                    stage::reached(stage::BEFORE_ACK);
                    self.acknowledge(partition, sequence, "+ACK").await;
                }
                Action::DeadLetter { partition, sequence, subject, key, error, frame } => {
                    let to = subjects::dead_letter(key.as_ref());
                    self.dead_letter((partition, sequence), &subject, to, &error, frame).await;
                }
                Action::Reject(key, rank, reject) => {
                    let frame = frame::seal(Kind::Reject, &reject, &[]);
                    let _ = self.connection.client.publish(subjects::reject(&key, rank), frame).await;
                }
                Action::LookUp(key) => self.look_up(key),
                Action::ReadHead(key) => self.read_head(key),
                Action::Fold(id, plan) => self.fold(id, plan),
                Action::Commit(id, commit, state) => {
                    let (store, spans, begun) = (self.store.clone(), self.spans.clone(), Instant::now());
                    let (round, shard) = ((commit.job, commit.ledger.round), commit.shard);
                    stage::reached(stage::BEFORE_COMMIT);
                    self.work.push(Box::pin(async move {
                        let result = store.commit(commit, state).await;
                        metrics::committed(begun.elapsed());
                        spans.ended(round, Stage::Commit, shard, None, begun);
                        Done::Event(Event::Committed(id, result))
                    }));
                }
                Action::CommitPartial(id, commit, fold) => {
                    let (store, spans, begun) = (self.store.clone(), self.spans.clone(), Instant::now());
                    let (round, shard) = ((commit.job, commit.partial.ledger.round), commit.shard);
                    stage::reached(stage::BEFORE_PARTIAL);
                    self.work.push(Box::pin(async move {
                        let result = store.commit_partial(commit, fold).await;
                        spans.ended(round, Stage::Commit, shard, None, begun);
                        Done::Event(Event::Committed(id, result))
                    }));
                }
                Action::ClearSuspect(partition) => self.clear_suspect(partition),
                Action::Publish(key, header, values) => {
                    stage::reached(stage::BEFORE_PUBLISH);
                    self.publish(&key, &header, &values).await;
                }
                Action::Republish(key, shard) => self.republish(key, shard),
                Action::FailJob(key, incarnation, error) => {
                    let registry = self.registry.clone();
                    self.work.push(Box::pin(async move {
                        match Job::fail(&registry, &key, incarnation, error).await {
                            Ok(job) => Done::Event(Event::Job(key, job)),
                            Err(_) => Done::Event(Event::LookUpFailed(key)),
                        }
                    }));
                }
            }
        }
    }

    async fn acknowledge(&mut self, partition: Partition, sequence: u64, kind: &'static str) {
        if let Some(reply) = self.holdings.reply(partition, sequence) {
            let _ = self.connection.client.publish(reply, Bytes::from_static(kind.as_bytes())).await;
        }
    }

    /// Puts a message aside before it is removed from its queue; when that fails it stays there.
    async fn dead_letter(
        &mut self,
        (partition, sequence): (Partition, u64),
        subject: &str,
        to: String,
        error: &WireError,
        frame: Bytes,
    ) {
        tracing::warn!(partition, sequence, %error, "dead letter");
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Thalweg-Code", error.code.as_str());
        headers.insert("Thalweg-Reason", error.message.replace(['\r', '\n'], " ").as_str());
        headers.insert("Thalweg-Partition", partition.to_string().as_str());
        headers.insert("Thalweg-Sequence", sequence.to_string().as_str());
        headers.insert("Thalweg-Subject", subject);
        let stored = self.connection.jetstream.publish_with_headers(to, headers, frame).await;
        let stored = match stored {
            Ok(acknowledgement) => acknowledgement.await.is_ok(),
            Err(_) => false,
        };
        if stored {
            self.acknowledge(partition, sequence, "+TERM").await;
        } else {
            tracing::warn!(partition, sequence, "dead letter was not stored; the message stays in its queue");
        }
    }

    async fn publish(&mut self, key: &JobKey, header: &ResultHeader, values: &[u8]) {
        let (begun, frame) = (Instant::now(), frame::seal(Kind::Result, header, values));
        let (round, shard) = ((header.job, header.head.version), header.shard);
        let headers = traced(round, Stage::Publish, shard, 0);
        // A result that does not arrive is asked for by its workers.
        let _ = self.connection.client.publish_with_headers(subjects::result(key), headers, frame).await;
        metrics::published(begun.elapsed());
        self.spans.ended(round, Stage::Publish, shard, None, begun);
    }

    fn clear_suspect(&self, partition: Partition) {
        let registry = self.registry.clone();
        self.work.push(Box::pin(async move {
            if let Err(error) = clear_suspect(&registry, partition).await {
                tracing::debug!(%error, "suspect not cleared");
            }
            Done::Nothing
        }));
    }

    pub(super) fn look_up(&self, key: JobKey) {
        let registry = self.registry.clone();
        self.work.push(Box::pin(async move {
            match Job::read(&registry, &key).await {
                Ok(job) => Done::Event(Event::Job(key, job)),
                Err(error) => {
                    tracing::debug!(%key, error, "job not read");
                    Done::Event(Event::LookUpFailed(key))
                }
            }
        }));
    }

    fn read_head(&self, key: ShardKey) {
        let store = self.store.clone();
        self.work.push(Box::pin(async move {
            let result = store.fetch_head(key.0, key.1).await;
            Done::Event(Event::Head(key, result.map(Box::new)))
        }));
    }

    fn republish(&self, key: JobKey, shard: ShardKey) {
        let (store, client) = (self.store.clone(), self.connection.client.clone());
        self.work.push(Box::pin(async move {
            if let Ok(state) = store.fetch(shard.0, shard.1, false).await {
                let (head, ledger) = (state.head, state.ledger);
                let header = ResultHeader { job: shard.0, shard: shard.1, head, ledger };
                let frame = frame::seal(Kind::Result, &header, &state.values);
                let _ = client.publish(subjects::result(&key), frame).await;
            }
            Done::Nothing
        }));
    }

    fn fold(&self, id: InvocationId, plan: Plan) {
        let (store, connection) = (self.store.clone(), self.connection.clone());
        let (registry, invoker) = (self.registry.clone(), self.id.clone());
        let (read_again, spans) = (self.read_again_bytes.clone(), self.spans.clone());
        let held = self.holdings.get(plan.partition);
        let (stream_created, suspect) =
            held.map_or((0, None), |held| (held.stream_created, held.suspect.clone()));
        self.work.push(Box::pin(async move {
            let begun = Instant::now();
            gathered(&spans, &plan);
            let context = FoldContext {
                store: &*store,
                queues: &connection.jetstream,
                registry: &registry,
                invoker: &invoker,
                stream_created,
                suspect,
                read_again_bytes: &read_again,
            };
            let result: Result<Bytes, FoldError> = fold(&context, &plan).await;
            metrics::folded(begun.elapsed());
            spans.ended((plan.job.record.incarnation, plan.round), Stage::Fold, plan.shard, None, begun);
            let bytes = if result.is_ok() { plan.input_bytes() + plan.result_bytes() } else { 0 };
            Done::Folded(Event::Folded(id, result), bytes)
        }));
    }
}

/// What a fold that begins now had to wait for.
fn gathered(spans: &Spans, plan: &Plan) {
    let round = (plan.job.record.incarnation, plan.round);
    let Gathered { first, last, last_rank } = plan.gathered;
    let span = |stage, rank, from: Millis, to: Millis| Span {
        stage,
        shard: plan.shard,
        rank,
        start_us: from * 1000,
        duration_us: to.saturating_sub(from) * 1000,
    };
    spans.keep(round, span(Stage::Gather, last_rank, first, last));
    spans.keep(round, span(Stage::Queue, None, last, now()));
}

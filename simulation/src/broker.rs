//! A model of what NATS JetStream does for Thalweg: work queues in memory with one consumer each, and a
//! registry in files.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use thalweg_protocol::{GradientHeader, Kind, Partition, Placement, Round, ShardIndex, frame};

use crate::network::{Millis, Queued, StreamState};

/// A partition's work queue.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) created: i64,
    last_sequence: u64,
    messages: BTreeMap<u64, Arc<Queued>>,
    consumer: Option<Consumer>,
}

/// Its only consumer.
#[derive(Debug)]
struct Consumer {
    name: String,
    /// Delivered and not acknowledged.
    pending: BTreeSet<u64>,
    /// Still to be delivered.
    waiting: VecDeque<u64>,
    delivered: u64,
    credit: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Broker {
    /// `None`: forgotten, until somebody defines it again (rule P16).
    pub(crate) streams: Vec<Option<Stream>>,
    /// The registry: what survives a restart.
    pub(crate) placement: Placement,
    pub(crate) recorded: Vec<i64>,
}

impl Broker {
    pub(crate) fn new(partitions: Partition) -> Self {
        let streams = (0..partitions).map(|_| None).collect();
        Self { streams, placement: Placement::default(), recorded: Vec::new() }
    }

    fn stream(&mut self, partition: Partition) -> Option<&mut Stream> {
        self.streams.get_mut(usize::from(partition))?.as_mut()
    }

    /// A kill: streams in memory are lost with their definitions.
    pub(crate) fn restart(&mut self) {
        self.streams.iter_mut().for_each(|stream| *stream = None);
    }

    /// Defines the streams that are missing and records when each was created.
    pub(crate) fn ensure_streams(&mut self, now: Millis) {
        let created = i64::try_from(now + 1).unwrap_or(i64::MAX);
        for stream in &mut self.streams {
            let anew = || Stream { created, last_sequence: 0, messages: BTreeMap::new(), consumer: None };
            stream.get_or_insert_with(anew);
        }
        self.recorded = self.streams.iter().flatten().map(|stream| stream.created).collect();
    }

    /// Stores a message; `None` where there is no stream (503).
    pub(crate) fn store(
        &mut self,
        partition: Partition,
        now: Millis,
        subject: String,
        frame: Bytes,
    ) -> Option<()> {
        let stream = self.stream(partition)?;
        stream.last_sequence += 1;
        let sequence = stream.last_sequence;
        stream.messages.insert(sequence, Arc::new(Queued { sequence, published: now, subject, frame }));
        if let Some(consumer) = &mut stream.consumer {
            consumer.waiting.push_back(sequence);
        }
        Some(())
    }

    /// Deliveries that are due: consumer, its sequence, message.
    pub(crate) fn deliveries(&mut self, partition: Partition) -> Vec<(String, u64, Arc<Queued>)> {
        let mut due = Vec::new();
        let Some(stream) = self.stream(partition) else { return due };
        let Some(consumer) = &mut stream.consumer else { return due };
        while consumer.credit > 0 {
            let Some(sequence) = consumer.waiting.pop_front() else { break };
            let Some(message) = stream.messages.get(&sequence) else { continue };
            consumer.credit -= 1;
            consumer.delivered += 1;
            consumer.pending.insert(sequence);
            due.push((consumer.name.clone(), consumer.delivered, message.clone()));
        }
        due
    }

    /// Names of the consumers, with what each has delivered and not heard of.
    pub(crate) fn list(&mut self, partition: Partition) -> Option<(Vec<(String, usize)>, StreamState)> {
        let stream = self.stream(partition)?;
        let consumers =
            stream.consumer.iter().map(|consumer| (consumer.name.clone(), consumer.pending.len()));
        let state = StreamState { messages: stream.messages.len(), last_sequence: stream.last_sequence };
        Some((consumers.collect(), state))
    }

    pub(crate) fn delete(&mut self, partition: Partition, name: &str) -> Option<()> {
        let stream = self.stream(partition)?;
        if stream.consumer.as_ref().is_some_and(|consumer| consumer.name == name) {
            stream.consumer = None;
        }
        Some(())
    }

    /// Creates a consumer, to which everything un-acknowledged is delivered; `None` without a stream, or
    /// when there is one of another name (10099). One of the same name is left as it is.
    pub(crate) fn create(&mut self, partition: Partition, name: &str) -> Option<()> {
        let stream = self.stream(partition)?;
        match &stream.consumer {
            Some(consumer) if consumer.name == name => Some(()),
            Some(_) => None,
            None => {
                let waiting = stream.messages.keys().copied().collect();
                let pending = BTreeSet::new();
                let name = name.to_owned();
                stream.consumer = Some(Consumer { name, pending, waiting, delivered: 0, credit: 0 });
                Some(())
            }
        }
    }

    /// Takes a pull request; `false` when there is no such consumer.
    pub(crate) fn pull(&mut self, partition: Partition, name: &str, batch: u64) -> bool {
        let consumer = self.stream(partition).and_then(|stream| stream.consumer.as_mut());
        match consumer.filter(|consumer| consumer.name == name) {
            Some(consumer) => {
                consumer.credit += batch;
                true
            }
            None => false,
        }
    }

    /// Takes an acknowledgement: it counts for what the consumer of that name has delivered.
    pub(crate) fn acknowledge(
        &mut self,
        partition: Partition,
        name: &str,
        sequence: u64,
    ) -> Option<Arc<Queued>> {
        let stream = self.stream(partition)?;
        let consumer = stream.consumer.as_mut().filter(|consumer| consumer.name == name)?;
        // Acknowledgements name stream and consumer sequence; what was not delivered yet is not removed.
        if !consumer.pending.remove(&sequence) {
            return None;
        }
        stream.messages.remove(&sequence)
    }

    /// Reads a message by its sequence.
    pub(crate) fn get(&self, partition: Partition, sequence: u64) -> Option<Arc<Queued>> {
        self.streams.get(usize::from(partition))?.as_ref()?.messages.get(&sequence).cloned()
    }

    /// Contributions in the queues to one round of a shard: partition and sequence.
    pub(crate) fn pending_of(&self, shard: ShardIndex, round: Round) -> Vec<(Partition, u64)> {
        let mut found = Vec::new();
        for (partition, stream) in (0..).zip(&self.streams) {
            for message in stream.iter().flat_map(|stream| stream.messages.values()) {
                let opened = frame::open::<GradientHeader>(Kind::Gradient, &message.frame);
                if opened.is_ok_and(|(header, _)| header.shard == shard && header.round == round) {
                    found.push((partition, message.sequence));
                }
            }
        }
        found
    }

    /// Messages in the queues that carry the same contribution.
    pub(crate) fn copies_of(&self, frame: &Bytes) -> usize {
        let messages = self.streams.iter().flatten().flat_map(|stream| stream.messages.values());
        messages.filter(|message| message.frame == *frame).count()
    }

    /// Messages and bytes of each partition; `None` while a stream is missing.
    pub(crate) fn depths(&self) -> Option<Vec<(u64, u64)>> {
        let depth = |stream: &Option<Stream>| {
            let stream = stream.as_ref()?;
            let bytes = stream.messages.values().map(|message| message.frame.len() as u64).sum();
            Some((stream.messages.len() as u64, bytes))
        };
        self.streams.iter().map(depth).collect()
    }
}

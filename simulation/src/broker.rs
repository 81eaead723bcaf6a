//! A model of what NATS JetStream does for Thalweg: work queues with one consumer each, and a registry.
//!
//! `tests/conformance.rs` holds it to real servers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use thalweg_broker::{Conflict, PartitionDepth, Queue, QueueError, Revision};
use thalweg_protocol::Partition;

/// What a message is in its queue.
#[derive(Clone, Debug)]
pub struct Message {
    /// When it was stored.
    pub published: u64,
    /// Its subject.
    pub subject: String,
    /// Its bytes.
    pub frame: Bytes,
}

/// A message on its way to whoever listens.
#[derive(Clone, Debug)]
pub struct Delivery<P> {
    /// Who listens.
    pub listeners: Vec<P>,
    /// The consumer.
    pub consumer: String,
    /// Counts the consumer's deliveries, from 1.
    pub consumer_sequence: u64,
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// The message.
    pub message: Message,
}

#[derive(Debug)]
struct Stream<P> {
    created: i64,
    last_sequence: u64,
    messages: BTreeMap<u64, Message>,
    consumer: Option<Consumer<P>>,
}

#[derive(Debug)]
struct Consumer<P> {
    name: String,
    /// Delivered and not acknowledged.
    pending: BTreeSet<u64>,
    /// Still to be delivered.
    waiting: VecDeque<u64>,
    delivered: u64,
    /// Who listens to the subject on which everything is delivered.
    listeners: Vec<P>,
    /// How many messages the pull requests may still bring.
    credit: u64,
}

/// See the module. `P` names whoever pulls.
#[derive(Debug)]
pub struct Broker<P> {
    /// Whether queues survive a kill.
    files: bool,
    streams: Vec<Option<Stream<P>>>,
    creations: i64,
    keys: BTreeMap<String, (Revision, Option<Bytes>)>,
    last_revision: Revision,
    /// Messages put aside.
    pub dead_letters: Vec<Bytes>,
}

impl<P: Copy + PartialEq> Broker<P> {
    /// A server without streams. `files` is whether queues are kept in files.
    #[must_use]
    pub fn new(partitions: Partition, files: bool) -> Self {
        Self {
            files,
            streams: (0..partitions).map(|_| None).collect(),
            creations: 0,
            keys: BTreeMap::new(),
            last_revision: 0,
            dead_letters: Vec::new(),
        }
    }

    fn stream(&mut self, partition: Partition) -> Result<&mut Stream<P>, QueueError> {
        let stream = self.streams.get_mut(usize::from(partition)).and_then(Option::as_mut);
        stream.ok_or(QueueError::Missing(partition))
    }

    /// A kill. Streams in memory are lost with their definitions; files, the registry among them, stay. Pull
    /// requests are gone with their connections.
    pub fn restart(&mut self) {
        if self.files {
            for stream in self.streams.iter_mut().flatten() {
                stream.consumer.iter_mut().for_each(|consumer| {
                    consumer.listeners.clear();
                    consumer.credit = 0;
                });
            }
        } else {
            self.streams.iter_mut().for_each(|stream| *stream = None);
        }
    }

    /// A connection is gone, and its subscriptions with it.
    pub fn disconnected(&mut self, gone: impl Fn(&P) -> bool) {
        for stream in self.streams.iter_mut().flatten() {
            if let Some(consumer) = &mut stream.consumer {
                consumer.listeners.retain(|listener| !gone(listener));
            }
        }
    }

    /// Defines the streams that are missing; tells when each was created.
    pub fn ensure(&mut self, now: u64) -> Vec<i64> {
        for stream in &mut self.streams {
            if stream.is_none() {
                self.creations += 1;
                let created = i64::try_from(now).unwrap_or(i64::MAX / 2_000) * 1_000 + self.creations;
                *stream =
                    Some(Stream { created, last_sequence: 0, messages: BTreeMap::new(), consumer: None });
            }
        }
        self.streams.iter().flatten().map(|stream| stream.created).collect()
    }

    /// Stores a message and tells its sequence.
    ///
    /// # Errors
    /// Without a stream (503).
    pub fn publish(
        &mut self,
        partition: Partition,
        subject: String,
        frame: Bytes,
        now: u64,
    ) -> Result<u64, QueueError> {
        let stream = self.stream(partition)?;
        stream.last_sequence += 1;
        let sequence = stream.last_sequence;
        stream.messages.insert(sequence, Message { published: now, subject, frame });
        if let Some(consumer) = &mut stream.consumer {
            consumer.waiting.push_back(sequence);
        }
        Ok(sequence)
    }

    fn consumer(&mut self, partition: Partition, name: &str) -> Option<&mut Consumer<P>> {
        let consumer = self.stream(partition).ok()?.consumer.as_mut();
        consumer.filter(|consumer| consumer.name == name)
    }

    /// Takes a pull request of somebody who listens; `false` when there is no such consumer (503).
    pub fn pull(&mut self, partition: Partition, name: &str, puller: P, batch: u64) -> bool {
        self.listen(partition, name, puller);
        let consumer = self.consumer(partition, name);
        consumer.map(|consumer| consumer.credit += batch).is_some()
    }

    /// Somebody listens to what is delivered to a consumer; tells who does besides.
    pub fn listen(&mut self, partition: Partition, name: &str, listener: P) -> Vec<P> {
        let Some(consumer) = self.consumer(partition, name) else { return Vec::new() };
        let others: Vec<_> = consumer.listeners.iter().copied().filter(|other| *other != listener).collect();
        if others.len() == consumer.listeners.len() {
            consumer.listeners.push(listener);
        }
        others
    }

    /// Somebody listens no more. Pull requests stay while anybody does.
    pub fn stop_listening(&mut self, partition: Partition, name: &str, listener: P) {
        if let Some(consumer) = self.consumer(partition, name) {
            consumer.listeners.retain(|other| *other != listener);
        }
    }

    /// Whether a pull request is alive, which its heartbeats show to whoever listens.
    #[must_use]
    pub fn is_pulled(&self, partition: Partition, name: &str, puller: P) -> bool {
        let stream = self.streams.get(usize::from(partition)).and_then(Option::as_ref);
        let consumer = stream.and_then(|stream| stream.consumer.as_ref());
        consumer.is_some_and(|consumer| {
            consumer.name == name && consumer.credit > 0 && consumer.listeners.contains(&puller)
        })
    }

    /// What is due to be delivered of a partition.
    pub fn deliveries(&mut self, partition: Partition) -> Vec<Delivery<P>> {
        let mut due = Vec::new();
        let Ok(stream) = self.stream(partition) else { return due };
        let Some(consumer) = &mut stream.consumer else { return due };
        if consumer.listeners.is_empty() && !consumer.waiting.is_empty() {
            // A request that nobody would hear the answer to is dropped.
            consumer.credit = 0;
        }
        while consumer.credit > 0 {
            let Some(sequence) = consumer.waiting.pop_front() else { break };
            consumer.credit -= 1;
            let Some(message) = stream.messages.get(&sequence) else { continue };
            consumer.delivered += 1;
            consumer.pending.insert(sequence);
            due.push(Delivery {
                listeners: consumer.listeners.clone(),
                consumer: consumer.name.clone(),
                consumer_sequence: consumer.delivered,
                sequence,
                message: message.clone(),
            });
        }
        due
    }

    /// Takes an acknowledgement: it counts for what the consumer of that name has delivered. Returns what it
    /// removed.
    pub fn acknowledge(&mut self, partition: Partition, name: &str, sequence: u64) -> Option<Message> {
        let stream = self.stream(partition).ok()?;
        let consumer = stream.consumer.as_mut().filter(|consumer| consumer.name == name)?;
        // What was not delivered yet is not removed.
        if !consumer.pending.remove(&sequence) {
            return None;
        }
        stream.messages.remove(&sequence)
    }

    /// Delivers a message again, if it is delivered and not acknowledged: its acknowledgement wait has run out,
    /// or its consumer has refused it. Returns whether it was.
    pub fn redeliver(&mut self, partition: Partition, sequence: u64) -> bool {
        let consumer = self.stream(partition).ok().and_then(|stream| stream.consumer.as_mut());
        let Some(consumer) = consumer else { return false };
        let was = consumer.pending.remove(&sequence);
        if was {
            // Before what was never delivered.
            consumer.waiting.push_front(sequence);
        }
        was
    }

    /// Messages of a partition that are delivered and not acknowledged.
    #[must_use]
    pub fn unacknowledged(&self, partition: Partition) -> Vec<u64> {
        let stream = self.streams.get(usize::from(partition)).and_then(Option::as_ref);
        let consumer = stream.and_then(|stream| stream.consumer.as_ref());
        consumer.map(|consumer| consumer.pending.iter().copied().collect()).unwrap_or_default()
    }

    /// One queue with its consumers.
    ///
    /// # Errors
    /// Without a stream.
    pub fn look(&mut self, partition: Partition) -> Result<Queue, QueueError> {
        let stream = self.stream(partition)?;
        let pending = |consumer: &Consumer<P>| (consumer.name.clone(), consumer.pending.len() as u64);
        Ok(Queue {
            created: stream.created,
            messages: stream.messages.len() as u64,
            last_sequence: stream.last_sequence,
            consumers: stream.consumer.iter().map(pending).collect(),
        })
    }

    /// Removes a consumer, if it is there; returns whoever hears that its pull requests have ended.
    pub fn delete_consumer(&mut self, partition: Partition, name: &str) -> Vec<P> {
        let Ok(stream) = self.stream(partition) else { return Vec::new() };
        match stream.consumer.take_if(|consumer| consumer.name == name) {
            Some(consumer) if consumer.credit > 0 => consumer.listeners,
            _ => Vec::new(),
        }
    }

    /// Creates a consumer, to which everything un-acknowledged is delivered. One of the same name is left as
    /// it is.
    ///
    /// # Errors
    /// Without a stream, or when there is a consumer of another name (10099).
    pub fn create_consumer(&mut self, partition: Partition, name: &str) -> Result<(), QueueError> {
        let stream = self.stream(partition)?;
        match &stream.consumer {
            Some(consumer) if consumer.name == name => Ok(()),
            Some(_) => Err(QueueError::Raced),
            None => {
                stream.consumer = Some(Consumer {
                    name: name.to_owned(),
                    pending: BTreeSet::new(),
                    waiting: stream.messages.keys().copied().collect(),
                    delivered: 0,
                    listeners: Vec::new(),
                    credit: 0,
                });
                Ok(())
            }
        }
    }

    /// Reads a message by its sequence, delivered or not.
    ///
    /// # Errors
    /// Without a stream.
    pub fn read(&mut self, partition: Partition, sequence: u64) -> Result<Option<Message>, QueueError> {
        Ok(self.stream(partition)?.messages.get(&sequence).cloned())
    }

    /// Depth of every partition.
    ///
    /// # Errors
    /// While a stream is missing.
    pub fn depths(&self) -> Result<Vec<PartitionDepth>, QueueError> {
        let depth = |(partition, stream): (Partition, &Option<Stream<P>>)| {
            let stream = stream.as_ref().ok_or(QueueError::Missing(partition))?;
            Ok(PartitionDepth {
                messages: stream.messages.len() as u64,
                bytes: stream.messages.values().map(|message| message.frame.len() as u64).sum(),
                first_sequence: stream.messages.keys().next().copied().unwrap_or(stream.last_sequence + 1),
                last_sequence: stream.last_sequence,
            })
        };
        (0..).zip(&self.streams).map(depth).collect()
    }

    /// All messages in all queues: partition, sequence, message.
    pub fn messages(&self) -> impl Iterator<Item = (Partition, u64, &Message)> {
        (0..).zip(&self.streams).flat_map(|(partition, stream)| {
            let messages = stream.iter().flat_map(|stream| &stream.messages);
            messages.map(move |(sequence, message)| (partition, *sequence, message))
        })
    }

    /// A key's value and revision.
    #[must_use]
    pub fn entry(&self, key: &str) -> (Option<Bytes>, Revision) {
        self.keys.get(key).map_or((None, 0), |(revision, value)| (value.clone(), *revision))
    }

    /// Writes a key that stands at `expect`; `None` leaves a mark of its deletion.
    ///
    /// # Errors
    /// [`Conflict`].
    pub fn update(
        &mut self,
        key: &str,
        value: Option<Bytes>,
        expect: Revision,
    ) -> Result<Revision, Conflict> {
        if self.entry(key).1 != expect {
            return Err(Conflict);
        }
        self.last_revision += 1;
        self.keys.insert(key.to_owned(), (self.last_revision, value));
        Ok(self.last_revision)
    }

    /// The keys that have a value.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.keys.iter().filter(|(_, (_, value))| value.is_some()).map(|(key, _)| key.clone()).collect()
    }
}

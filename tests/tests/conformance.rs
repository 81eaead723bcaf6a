//! The simulation's model of the broker is held to real servers: the same behaviours, one after another, from the
//! model and from the oldest and the newest nats-server that Thalweg supports.

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use thalweg::nats;
use thalweg_broker::{
    Bucket, Conflict, Connection, PartitionDepth, Queue, QueueError, Queues, Revision, StreamStorage,
    StreamsConfig,
};
use thalweg_protocol::{Partition, subjects};
use thalweg_simulation::broker::Broker;
use thalweg_tests::eventually;

const PARTITIONS: Partition = 2;
/// Silence after which nothing more is taken to come.
const NOTHING: Duration = Duration::from_millis(300);

/// Something that came to whoever pulled.
#[derive(Debug, PartialEq)]
enum Arrived {
    Message {
        consumer: String,
        consumer_sequence: u64,
        sequence: u64,
        frame: Bytes,
    },
    /// The consumer of a pull request is not there (any more).
    Gone,
}

/// What the model and a real server can both do.
#[async_trait(?Send)]
trait Subject {
    async fn ensure(&mut self) -> Vec<i64>;
    async fn publish(&mut self, partition: Partition, text: &str) -> Result<u64, QueueError>;
    async fn look(&mut self, partition: Partition) -> Result<Queue, QueueError>;
    async fn create(&mut self, partition: Partition, name: &str) -> Result<(), QueueError>;
    async fn delete(&mut self, partition: Partition, name: &str);
    async fn read(&mut self, partition: Partition, sequence: u64) -> Result<Option<Bytes>, QueueError>;
    async fn depths(&mut self) -> Result<Vec<PartitionDepth>, QueueError>;
    async fn pull(&mut self, partition: Partition, name: &str, batch: u64);
    /// Somebody else begins to listen to what is delivered to a consumer; from now on what comes to them counts.
    async fn listen(&mut self, partition: Partition, name: &str);
    /// Whoever listened first stops.
    async fn stop_listening(&mut self, partition: Partition, name: &str);
    /// What came next; `None` when nothing comes.
    async fn arrived(&mut self) -> Option<Arrived>;
    /// Acknowledges what this consumer once delivered. Nobody answers.
    async fn acknowledge(&mut self, partition: Partition, consumer: &str, sequence: u64);
    /// Refuses what this consumer once delivered, so that it is delivered again.
    async fn refuse(&mut self, partition: Partition, consumer: &str, sequence: u64);
    async fn entry(&mut self, key: &str) -> (Option<Bytes>, Revision);
    async fn update(&mut self, key: &str, value: &str, expect: Revision) -> Result<Revision, Conflict>;
    async fn purge(&mut self, key: &str, expect: Revision) -> Result<(), Conflict>;
    async fn keys(&mut self) -> Vec<String>;
    /// SIGKILL, and a new start on the same files.
    async fn kill(&mut self);
}

struct Model {
    broker: Broker<usize>,
    /// All that ever listened have lower numbers, or this one; the first so many have stopped.
    newest: usize,
    stopped: usize,
    inbox: VecDeque<Arrived>,
    now: u64,
}

impl Model {
    fn deliver(&mut self, partition: Partition) {
        for delivery in self.broker.deliveries(partition) {
            if !delivery.listeners.contains(&self.newest) {
                continue;
            }
            self.inbox.push_back(Arrived::Message {
                consumer: delivery.consumer,
                consumer_sequence: delivery.consumer_sequence,
                sequence: delivery.sequence,
                frame: delivery.message.frame,
            });
        }
    }
}

#[async_trait(?Send)]
impl Subject for Model {
    async fn ensure(&mut self) -> Vec<i64> {
        self.broker.ensure(self.now)
    }

    async fn publish(&mut self, partition: Partition, text: &str) -> Result<u64, QueueError> {
        self.now += 1;
        let frame = Bytes::copy_from_slice(text.as_bytes());
        let stored = self.broker.publish(partition, "subject".to_owned(), frame, self.now);
        self.deliver(partition);
        stored
    }

    async fn look(&mut self, partition: Partition) -> Result<Queue, QueueError> {
        self.broker.look(partition)
    }

    async fn create(&mut self, partition: Partition, name: &str) -> Result<(), QueueError> {
        self.broker.create_consumer(partition, name)
    }

    async fn delete(&mut self, partition: Partition, name: &str) {
        let pullers = self.broker.delete_consumer(partition, name);
        self.inbox.extend(pullers.into_iter().map(|_| Arrived::Gone));
    }

    async fn read(&mut self, partition: Partition, sequence: u64) -> Result<Option<Bytes>, QueueError> {
        Ok(self.broker.read(partition, sequence)?.map(|message| message.frame))
    }

    async fn depths(&mut self) -> Result<Vec<PartitionDepth>, QueueError> {
        self.broker.depths()
    }

    async fn pull(&mut self, partition: Partition, name: &str, batch: u64) {
        if self.broker.pull(partition, name, self.newest, batch) {
            self.deliver(partition);
        } else {
            self.inbox.push_back(Arrived::Gone);
        }
    }

    async fn listen(&mut self, partition: Partition, name: &str) {
        self.newest += 1;
        self.broker.listen(partition, name, self.newest);
    }

    async fn stop_listening(&mut self, partition: Partition, name: &str) {
        self.broker.stop_listening(partition, name, self.stopped);
        self.stopped += 1;
    }

    async fn arrived(&mut self) -> Option<Arrived> {
        self.inbox.pop_front()
    }

    async fn acknowledge(&mut self, partition: Partition, consumer: &str, sequence: u64) {
        self.broker.acknowledge(partition, consumer, sequence);
    }

    async fn refuse(&mut self, partition: Partition, _: &str, sequence: u64) {
        assert!(self.broker.redeliver(partition, sequence));
        self.deliver(partition);
    }

    async fn entry(&mut self, key: &str) -> (Option<Bytes>, Revision) {
        self.broker.entry(key)
    }

    async fn update(&mut self, key: &str, value: &str, expect: Revision) -> Result<Revision, Conflict> {
        self.broker.update(key, Some(Bytes::copy_from_slice(value.as_bytes())), expect)
    }

    async fn purge(&mut self, key: &str, expect: Revision) -> Result<(), Conflict> {
        self.broker.update(key, None, expect).map(drop)
    }

    async fn keys(&mut self) -> Vec<String> {
        self.broker.keys()
    }

    async fn kill(&mut self) {
        self.now += 1;
        self.broker.restart();
    }
}

struct Real {
    server: nats::Server,
    _directory: tempfile::TempDir,
    connection: Connection,
    bucket: async_nats::jetstream::kv::Store,
    config: StreamsConfig,
    inbox: String,
    messages: VecDeque<async_nats::Subscriber>,
    replies: HashMap<(Partition, String, u64), async_nats::Subject>,
}

impl Real {
    async fn start(binary: PathBuf, files: bool) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = nats::Server::start(nats::Options {
            binary,
            port: 0,
            data_dir: directory.path().to_owned(),
            max_memory_bytes: 64 << 20,
            sync_always: false,
        });
        let server = server.expect("nats-server starts");
        let connection = thalweg_tests::connect(&server.url()).await;
        let config = async_nats::jetstream::kv::Config {
            bucket: "conformance".to_owned(),
            history: 1,
            storage: async_nats::jetstream::stream::StorageType::File,
            ..async_nats::jetstream::kv::Config::default()
        };
        let bucket = connection.jetstream.create_key_value(config).await.expect("a bucket");
        let inbox = connection.client.new_inbox();
        let messages = connection.client.subscribe(format!("{inbox}.*")).await.expect("subscribed");
        let messages = VecDeque::from([messages]);
        let storage = if files { StreamStorage::File } else { StreamStorage::Memory };
        let config = StreamsConfig { partitions: PARTITIONS, storage, ..StreamsConfig::default() };
        let replies = HashMap::new();
        Self { server, _directory: directory, connection, bucket, config, inbox, messages, replies }
    }

    fn queues(&self) -> &dyn Queues {
        &self.connection.jetstream
    }
}

#[async_trait(?Send)]
impl Subject for Real {
    async fn ensure(&mut self) -> Vec<i64> {
        self.queues().ensure(&self.config).await.expect("streams")
    }

    async fn publish(&mut self, partition: Partition, text: &str) -> Result<u64, QueueError> {
        let subject = format!("thalweg.grad.{partition}.t.j.0");
        let failed = |error: &dyn std::fmt::Display| QueueError::Unavailable(error.to_string());
        let published = self.connection.jetstream.publish(subject, text.to_owned().into()).await;
        match published.map_err(|error| failed(&error))?.await {
            Ok(stored) => Ok(stored.sequence),
            Err(error)
                if error.kind() == async_nats::jetstream::context::PublishErrorKind::StreamNotFound =>
            {
                Err(QueueError::Missing(partition))
            }
            Err(error) => Err(failed(&error)),
        }
    }

    async fn look(&mut self, partition: Partition) -> Result<Queue, QueueError> {
        self.queues().look(partition).await
    }

    async fn create(&mut self, partition: Partition, name: &str) -> Result<(), QueueError> {
        self.queues().create_consumer(partition, name).await
    }

    async fn delete(&mut self, partition: Partition, name: &str) {
        self.queues().delete_consumer(partition, name).await.expect("no error when it is gone");
    }

    async fn read(&mut self, partition: Partition, sequence: u64) -> Result<Option<Bytes>, QueueError> {
        self.queues().read(partition, sequence).await
    }

    async fn depths(&mut self) -> Result<Vec<PartitionDepth>, QueueError> {
        self.queues().depths(PARTITIONS).await
    }

    async fn pull(&mut self, partition: Partition, name: &str, batch: u64) {
        let stream = subjects::gradient_stream(partition);
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}");
        let body = format!(r#"{{"batch":{batch},"expires":30000000000}}"#);
        let reply = format!("{}.{partition}", self.inbox);
        let client = &self.connection.client;
        client.publish_with_reply(subject, reply, body.into()).await.expect("sent");
        client.flush().await.expect("sent");
    }

    async fn listen(&mut self, _: Partition, _: &str) {
        let messages = self.connection.client.subscribe(format!("{}.*", self.inbox)).await;
        self.messages.push_back(messages.expect("subscribed"));
        self.connection.client.flush().await.expect("sent");
    }

    async fn stop_listening(&mut self, _: Partition, _: &str) {
        let mut first = self.messages.pop_front().expect("somebody listens");
        first.unsubscribe().await.expect("sent");
        self.connection.client.flush().await.expect("sent");
    }

    async fn arrived(&mut self) -> Option<Arrived> {
        let messages = self.messages.back_mut()?;
        let message = tokio::time::timeout(NOTHING, messages.next()).await.ok()??;
        if message.status.is_some() {
            return Some(Arrived::Gone);
        }
        let context = self.connection.jetstream.clone();
        let message = async_nats::jetstream::Message { message, context };
        let info = message.info().expect("JetStream's metadata");
        let (consumer, sequence) = (info.consumer.to_owned(), info.stream_sequence);
        let partition =
            info.stream.rsplit('_').next().and_then(|number| number.parse().ok()).expect("one of ours");
        let arrived = Arrived::Message {
            consumer: consumer.clone(),
            consumer_sequence: info.consumer_sequence,
            sequence,
            frame: message.payload.clone(),
        };
        let reply = message.reply.clone().expect("somewhere to acknowledge");
        self.replies.insert((partition, consumer, sequence), reply);
        Some(arrived)
    }

    async fn acknowledge(&mut self, partition: Partition, consumer: &str, sequence: u64) {
        let reply = self.replies[&(partition, consumer.to_owned(), sequence)].clone();
        self.connection.client.publish(reply, "+ACK".into()).await.expect("sent");
        self.connection.client.flush().await.expect("sent");
    }

    async fn refuse(&mut self, partition: Partition, consumer: &str, sequence: u64) {
        let reply = self.replies[&(partition, consumer.to_owned(), sequence)].clone();
        self.connection.client.publish(reply, "-NAK".into()).await.expect("sent");
    }

    async fn entry(&mut self, key: &str) -> (Option<Bytes>, Revision) {
        Bucket::entry(&self.bucket, key).await.expect("an answer")
    }

    async fn update(&mut self, key: &str, value: &str, expect: Revision) -> Result<Revision, Conflict> {
        Bucket::update(&self.bucket, key, value.to_owned().into(), expect).await.expect("an answer")
    }

    async fn purge(&mut self, key: &str, expect: Revision) -> Result<(), Conflict> {
        Bucket::purge(&self.bucket, key, expect).await.expect("an answer")
    }

    async fn keys(&mut self) -> Vec<String> {
        let mut keys = Bucket::keys(&self.bucket).await.expect("an answer");
        keys.sort();
        keys
    }

    async fn kill(&mut self) {
        let mut connects = self.connection.connects();
        connects.mark_unchanged();
        self.server.kill().expect("killed");
        self.server.revive().expect("started again");
        connects.changed().await.expect("connected again");
        let (client, bucket) = (self.connection.client.clone(), self.bucket.clone());
        // JetStream answers a moment after the port is open.
        eventually("JetStream", async || bucket.status().await.is_ok()).await;
        client.flush().await.expect("connected");
    }
}

async fn message(subject: &mut dyn Subject) -> (String, u64, u64, Bytes) {
    match subject.arrived().await {
        Some(Arrived::Message { consumer, consumer_sequence, sequence, frame }) => {
            (consumer, consumer_sequence, sequence, frame)
        }
        other => panic!("a message should have come: {other:?}"),
    }
}

/// An acknowledgement takes a moment to arrive.
async fn settles(subject: &mut dyn Subject, partition: Partition, messages: u64) {
    let until = std::time::Instant::now() + thalweg_tests::PATIENCE;
    loop {
        let queue = subject.look(partition).await.expect("the queue");
        if queue.messages == messages {
            return;
        }
        assert!(std::time::Instant::now() < until, "{} messages, not {messages}", queue.messages);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn without_a_stream_nothing_is_stored(subject: &mut dyn Subject) {
    assert_eq!(subject.publish(0, "a").await, Err(QueueError::Missing(0)));
    assert_eq!(subject.look(0).await, Err(QueueError::Missing(0)));
    assert_eq!(subject.depths().await, Err(QueueError::Missing(0)));
    let created = subject.ensure().await;
    assert_eq!(subject.ensure().await, created, "what is there stays as it is");
    assert_eq!(subject.publish(0, "a").await, Ok(1));
    assert_eq!(subject.publish(0, "b").await, Ok(2));
    assert_eq!(subject.publish(1, "c").await, Ok(1), "each stream counts by itself");
}

async fn a_consumer_gets_everything_in_order_and_by_credit(subject: &mut dyn Subject) {
    subject.ensure().await;
    for text in ["a", "b", "c"] {
        subject.publish(0, text).await.expect("stored");
    }
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 2).await;
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 1, 1, "a".into()));
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 2, 2, "b".into()));
    assert_eq!(subject.arrived().await, None, "two were asked for");
    subject.pull(0, "e1-x", 2).await;
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 3, 3, "c".into()));
    // The rest of the credit waits for what is published later.
    subject.publish(0, "d").await.expect("stored");
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 4, 4, "d".into()));
    let queue = subject.look(0).await.expect("the queue");
    assert_eq!((queue.messages, queue.last_sequence), (4, 4));
    assert_eq!(queue.consumers, [("e1-x".to_owned(), 4)]);
}

/// Which is how a partition is handed over with its consumer (rule P19).
async fn a_pull_request_is_anybodys_who_listens(subject: &mut dyn Subject) {
    subject.ensure().await;
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 4).await;
    subject.publish(0, "a").await.expect("stored");
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 1, 1, "a".into()));
    subject.listen(0, "e1-x").await;
    subject.publish(0, "b").await.expect("stored");
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 2, 2, "b".into()), "to both");
    subject.stop_listening(0, "e1-x").await;
    subject.publish(0, "c").await.expect("stored");
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 3, 3, "c".into()));
    // Also what was delivered to the former one before.
    for sequence in [2, 3] {
        subject.acknowledge(0, "e1-x", sequence).await;
    }
    settles(subject, 0, 1).await;
    // A request that nobody would hear the answer to is dropped, and what it asked for stays in the queue.
    subject.stop_listening(0, "e1-x").await;
    subject.publish(0, "d").await.expect("stored");
    settles(subject, 0, 2).await;
    subject.listen(0, "e1-x").await;
    assert_eq!(subject.arrived().await, None);
    subject.pull(0, "e1-x", 1).await;
    assert_eq!(message(subject).await, ("e1-x".to_owned(), 4, 4, "d".into()));
}

async fn a_queue_has_one_consumer(subject: &mut dyn Subject) {
    subject.ensure().await;
    subject.create(0, "e1-x").await.expect("created");
    assert_eq!(subject.create(0, "e2-y").await, Err(QueueError::Raced));
    subject.create(0, "e1-x").await.expect("the same one again");
    subject.create(1, "e2-y").await.expect("another queue has its own");
    subject.delete(0, "e1-x").await;
    subject.delete(0, "e1-x").await;
    subject.create(0, "e2-y").await.expect("created");
}

async fn a_replacement_gets_all_that_is_not_acknowledged(subject: &mut dyn Subject) {
    subject.ensure().await;
    for text in ["a", "b", "c"] {
        subject.publish(0, text).await.expect("stored");
    }
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 3).await;
    for _ in 0..3 {
        message(subject).await;
    }
    subject.acknowledge(0, "e1-x", 2).await;
    settles(subject, 0, 2).await;
    subject.delete(0, "e1-x").await;
    subject.create(0, "e2-y").await.expect("created");
    subject.pull(0, "e2-y", 3).await;
    assert_eq!(message(subject).await, ("e2-y".to_owned(), 1, 1, "a".into()), "at once, and counted anew");
    assert_eq!(message(subject).await, ("e2-y".to_owned(), 2, 3, "c".into()));
    // The old consumer's acknowledgement hits nothing. The one after it, on the same way, shows when it is past.
    subject.acknowledge(0, "e1-x", 1).await;
    subject.acknowledge(0, "e2-y", 3).await;
    settles(subject, 0, 1).await;
    assert_eq!(subject.read(0, 1).await, Ok(Some("a".into())));
}

async fn what_is_delivered_again_counts_as_another_delivery(subject: &mut dyn Subject) {
    subject.ensure().await;
    for text in ["a", "b", "c"] {
        subject.publish(0, text).await.expect("stored");
    }
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 2).await;
    message(subject).await;
    message(subject).await;
    subject.refuse(0, "e1-x", 1).await;
    subject.pull(0, "e1-x", 2).await;
    // One of both comes first: redeliveries are not in the order of the stream.
    let mut came = [message(subject).await, message(subject).await];
    assert_eq!([came[0].1, came[1].1], [3, 4], "numbered on");
    came.sort_by_key(|(_, _, sequence, _)| *sequence);
    assert_eq!((came[0].2, &came[0].3, came[1].2), (1, &Bytes::from("a"), 3));
    for (consumer, _, sequence, _) in came {
        subject.acknowledge(0, &consumer, sequence).await;
    }
    settles(subject, 0, 1).await;
}

async fn late_acknowledgements_hit_a_consumer_of_the_same_name(subject: &mut dyn Subject) {
    subject.ensure().await;
    subject.publish(0, "a").await.expect("stored");
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 1).await;
    message(subject).await;
    subject.kill().await;
    subject.ensure().await;
    subject.publish(0, "another").await.expect("stored");
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 1).await;
    assert_eq!(message(subject).await.3, "another");
    // Of a message that is long gone: this is why names are never used twice (rule P15).
    subject.acknowledge(0, "e1-x", 1).await;
    settles(subject, 0, 0).await;
}

async fn messages_are_read_by_sequence_until_they_are_acknowledged(subject: &mut dyn Subject) {
    subject.ensure().await;
    subject.publish(0, "a").await.expect("stored");
    assert_eq!(subject.read(0, 1).await, Ok(Some("a".into())));
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 1).await;
    message(subject).await;
    assert_eq!(subject.read(0, 1).await, Ok(Some("a".into())), "delivered, but there");
    subject.acknowledge(0, "e1-x", 1).await;
    settles(subject, 0, 0).await;
    assert_eq!(subject.read(0, 1).await, Ok(None));
    assert_eq!(subject.read(0, 7).await, Ok(None), "never was");
}

async fn pulling_from_a_consumer_that_is_gone_is_noticed(subject: &mut dyn Subject) {
    subject.ensure().await;
    subject.pull(0, "e1-x", 1).await;
    assert_eq!(subject.arrived().await, Some(Arrived::Gone), "never was");
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 1).await;
    assert_eq!(subject.arrived().await, None);
    subject.delete(0, "e1-x").await;
    assert_eq!(subject.arrived().await, Some(Arrived::Gone), "deleted under the request");
}

async fn depths_tell_first_and_last(subject: &mut dyn Subject) {
    subject.ensure().await;
    let depth = |messages, bytes, first_sequence, last_sequence| PartitionDepth {
        messages,
        bytes,
        first_sequence,
        last_sequence,
    };
    let mut depths = subject.depths().await.expect("depths");
    depths.iter_mut().for_each(|depth| depth.bytes = 0);
    assert_eq!(depths, [depth(0, 0, 1, 0), depth(0, 0, 1, 0)]);
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 2).await;
    for text in ["a", "b"] {
        subject.publish(0, text).await.expect("stored");
        message(subject).await;
    }
    let depths = subject.depths().await.expect("depths");
    assert!(depths[0].bytes > 0, "and in a real one more than the payload");
    assert_eq!((depths[0].messages, depths[0].first_sequence, depths[0].last_sequence), (2, 1, 2));
    subject.acknowledge(0, "e1-x", 1).await;
    settles(subject, 0, 1).await;
    assert_eq!(subject.depths().await.expect("depths")[0].first_sequence, 2);
    subject.acknowledge(0, "e1-x", 2).await;
    settles(subject, 0, 0).await;
    let depths = subject.depths().await.expect("depths");
    assert_eq!((depths[0].first_sequence, depths[0].last_sequence), (3, 2), "empty again");
}

async fn a_kill_forgets_queues_in_memory_with_their_definitions(subject: &mut dyn Subject) {
    let before = subject.ensure().await;
    subject.publish(0, "a").await.expect("stored");
    subject.create(0, "e1-x").await.expect("created");
    subject.kill().await;
    assert_eq!(subject.publish(0, "b").await, Err(QueueError::Missing(0)));
    assert_eq!(subject.look(0).await, Err(QueueError::Missing(0)));
    let after = subject.ensure().await;
    assert!(before.iter().zip(&after).all(|(before, after)| before < after), "{before:?}, {after:?}");
    let queue = subject.look(0).await.expect("the queue");
    assert_eq!((queue.messages, queue.last_sequence, queue.consumers), (0, 0, Vec::new()));
    assert_eq!(subject.publish(0, "b").await, Ok(1), "sequences begin again");
}

async fn a_kill_leaves_queues_in_files(subject: &mut dyn Subject) {
    let before = subject.ensure().await;
    for text in ["a", "b", "c"] {
        subject.publish(0, text).await.expect("stored");
    }
    subject.create(0, "e1-x").await.expect("created");
    subject.pull(0, "e1-x", 2).await;
    message(subject).await;
    message(subject).await;
    subject.acknowledge(0, "e1-x", 1).await;
    settles(subject, 0, 2).await;
    subject.kill().await;
    assert_eq!(subject.ensure().await, before, "the same streams");
    let queue = subject.look(0).await.expect("the queue");
    assert_eq!((queue.messages, queue.last_sequence), (2, 3));
    assert_eq!(queue.consumers.len(), 1);
    // A replacement gets what was delivered and not acknowledged, and the rest.
    subject.delete(0, "e1-x").await;
    while subject.arrived().await.is_some() {}
    subject.create(0, "e2-y").await.expect("created");
    subject.pull(0, "e2-y", 3).await;
    assert_eq!(message(subject).await, ("e2-y".to_owned(), 1, 2, "b".into()));
    assert_eq!(message(subject).await, ("e2-y".to_owned(), 2, 3, "c".into()));
    assert_eq!(subject.publish(0, "d").await, Ok(4));
}

async fn keys_change_by_compare_and_swap(subject: &mut dyn Subject) {
    assert_eq!(subject.entry("job.a").await, (None, 0));
    assert_eq!(subject.update("job.a", "1", 7).await, Err(Conflict), "it is not there");
    let first = subject.update("job.a", "1", 0).await.expect("created");
    assert_eq!(subject.update("job.a", "2", 0).await, Err(Conflict));
    assert_eq!(subject.entry("job.a").await, (Some("1".into()), first));
    let other = subject.update("job.b", "1", 0).await.expect("created");
    assert!(other > first, "revisions are those of the bucket");
    let second = subject.update("job.a", "2", first).await.expect("written");
    assert!(second > other);
    assert_eq!(subject.keys().await, ["job.a", "job.b"]);
    assert_eq!(subject.purge("job.a", first).await, Err(Conflict));
    subject.purge("job.a", second).await.expect("deleted");
    let (value, deleted) = subject.entry("job.a").await;
    assert_eq!(value, None);
    assert!(deleted > second, "a deleted key has a revision, which the next write must name");
    assert_eq!(subject.update("job.a", "3", 0).await, Err(Conflict));
    assert_eq!(subject.keys().await, ["job.b"]);
    subject.update("job.a", "3", deleted).await.expect("created again");
    subject.kill().await;
    assert_eq!(subject.entry("job.a").await.0, Some("3".into()), "the registry is in files");
    assert_eq!(subject.entry("job.b").await, (Some("1".into()), other));
}

/// Runs every behaviour on a fresh subject.
macro_rules! behaves {
    ($start:expr) => {{
        for files in [false, true] {
            without_a_stream_nothing_is_stored(&mut $start(files).await).await;
            a_consumer_gets_everything_in_order_and_by_credit(&mut $start(files).await).await;
            a_queue_has_one_consumer(&mut $start(files).await).await;
            a_pull_request_is_anybodys_who_listens(&mut $start(files).await).await;
            a_replacement_gets_all_that_is_not_acknowledged(&mut $start(files).await).await;
            what_is_delivered_again_counts_as_another_delivery(&mut $start(files).await).await;
            messages_are_read_by_sequence_until_they_are_acknowledged(&mut $start(files).await).await;
            pulling_from_a_consumer_that_is_gone_is_noticed(&mut $start(files).await).await;
            depths_tell_first_and_last(&mut $start(files).await).await;
        }
        late_acknowledgements_hit_a_consumer_of_the_same_name(&mut $start(false).await).await;
        a_kill_forgets_queues_in_memory_with_their_definitions(&mut $start(false).await).await;
        a_kill_leaves_queues_in_files(&mut $start(true).await).await;
        keys_change_by_compare_and_swap(&mut $start(false).await).await;
    }};
}

#[tokio::test]
async fn the_model_behaves() {
    let start = async |files| Model {
        broker: Broker::new(PARTITIONS, files),
        newest: 0,
        stopped: 0,
        inbox: VecDeque::new(),
        now: 1,
    };
    behaves!(start);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_nats_server_behaves() {
    let start = async |files| Real::start(thalweg_tests::nats_server(), files).await;
    behaves!(start);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_nats_server_behaves() {
    let binary = std::env::var_os("THALWEG_OLDEST_NATS_SERVER");
    let binary: PathBuf = binary
        .expect("THALWEG_OLDEST_NATS_SERVER names a nats-server 2.11.0; `make test` sees to that")
        .into();
    let start = async |files| Real::start(binary.clone(), files).await;
    behaves!(start);
}

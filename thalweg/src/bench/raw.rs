//! The bare pattern that Thalweg is measured against: workers publish to a JetStream work queue, one
//! folder sums, sends the sum to all by core NATS, and acknowledges. Nothing survives anything.
//!
//! A message is a header (round, chunk, rank: little-endian u32) and little-endian f32 values.

use std::collections::HashMap;

use anyhow::{Context as _, ensure};
use async_nats::jetstream::{
    self, AckKind,
    consumer::{AckPolicy, pull},
    stream::{DiscardPolicy, RetentionPolicy, StorageType},
};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, future::LocalBoxFuture, stream::FuturesUnordered};

use super::crew::{Reply, now_ns};

const STREAM: &str = "raw";
const PUSHES: &str = "raw.push";
const RESULTS: &str = "raw.result";
const HEADER_BYTES: usize = 12;
/// Bytes that the folder's pull requests ask for at once.
const PULL_BYTES: usize = 16 << 20;
/// Messages that the pull requests ask for: never the limit that matters.
const PULL_MESSAGES: usize = 1024;
/// Values converted at once.
const BLOCK: usize = 1024;

/// Arguments of the folder process.
#[derive(Debug, clap::Args)]
pub struct FolderArgs {
    #[arg(long)]
    url: String,
    #[arg(long)]
    workers: usize,
}

/// Connects as Thalweg's parts do: subscriptions that never overflow, a read buffer as large as allowed.
async fn connect(url: &str) -> anyhow::Result<async_nats::Client> {
    let options = async_nats::ConnectOptions::new()
        .subscription_capacity(16 * 1024)
        .client_capacity(256)
        .read_buffer_capacity(u16::MAX);
    Ok(options.connect(url).await?)
}

fn header(round: u32, chunk: u32, rank: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    for (bytes, value) in header.as_chunks_mut::<4>().0.iter_mut().zip([round, chunk, rank]) {
        *bytes = value.to_le_bytes();
    }
    header
}

/// Round, chunk, rank, and the values' bytes.
fn open(message: &[u8]) -> Option<([u32; 3], &[u8])> {
    let (header, values) = message.split_first_chunk::<HEADER_BYTES>()?;
    let field = |index: usize| u32::from_le_bytes(header.as_chunks::<4>().0[index]);
    Some(([field(0), field(1), field(2)], values))
}

/// A worker's end of the pattern.
pub(super) struct Pusher {
    jetstream: jetstream::Context,
    results: async_nats::Subscriber,
    rank: u32,
}

impl Pusher {
    pub(super) async fn connect(url: &str, rank: u32) -> anyhow::Result<Self> {
        let client = connect(url).await?;
        let results = client.subscribe(RESULTS).await?;
        client.flush().await?;
        Ok(Self { jetstream: jetstream::new(client), results, rank })
    }

    /// Pushes a gradient in messages of at most `message_bytes`, with at most `window_bytes` that the
    /// broker has not confirmed, and receives the sum. Returns when the last of it was there.
    pub(super) async fn round(
        &mut self,
        round: u32,
        gradient: &[f32],
        sum: &mut [f32],
        (message_bytes, window_bytes): (usize, usize),
    ) -> anyhow::Result<u64> {
        let elements = message_bytes / 4;
        let chunks = gradient.chunks(elements).len();
        let mut to_push: Vec<_> = (0..chunks).rev().collect();
        let mut confirmations: FuturesUnordered<LocalBoxFuture<'_, Result<usize, usize>>> =
            FuturesUnordered::new();
        let (mut unconfirmed, mut received) = (0, 0);
        while received < chunks {
            while unconfirmed == 0 || unconfirmed + elements * 4 <= window_bytes {
                let Some(chunk) = to_push.pop() else { break };
                let values = &gradient[chunk * elements..gradient.len().min((chunk + 1) * elements)];
                let message = seal(header(round, chunk as u32, self.rank), values);
                unconfirmed += elements * 4;
                let confirmation = self.jetstream.publish(PUSHES, message).await;
                confirmations.push(Box::pin(async move {
                    match confirmation {
                        Ok(confirmation) => confirmation.await.map(|_| chunk).map_err(|_| chunk),
                        Err(_) => Err(chunk),
                    }
                }));
            }
            tokio::select! {
                Some(confirmed) = confirmations.next() => {
                    unconfirmed -= elements * 4;
                    // Refused for now (429), or no answer: the folder counts each rank once.
                    to_push.extend(confirmed.err());
                }
                message = self.results.next() => {
                    let message = message.context("the connection was closed")?;
                    let Some(([of, chunk, _], values)) = open(&message.payload) else { continue };
                    if of != round {
                        continue;
                    }
                    let target = sum.chunks_mut(elements).nth(chunk as usize).context("no such chunk")?;
                    ensure!(values.len() == target.len() * 4, "a result of the wrong size");
                    for (value, bytes) in target.iter_mut().zip(values.as_chunks::<4>().0) {
                        *value = f32::from_le_bytes(*bytes);
                    }
                    received += 1;
                }
            }
        }
        let ended = now_ns();
        while confirmations.next().await.is_some() {}
        Ok(ended)
    }
}

fn seal(header: [u8; HEADER_BYTES], values: &[f32]) -> Bytes {
    let mut message = Vec::with_capacity(HEADER_BYTES + values.len() * 4);
    message.extend_from_slice(&header);
    let mut block = [[0; 4]; BLOCK];
    for values in values.chunks(BLOCK) {
        for (bytes, value) in block.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
        message.extend_from_slice(block[..values.len()].as_flattened());
    }
    Bytes::from(message)
}

/// A chunk that is being summed, in the message that will carry the sum.
struct Chunk {
    sum: Vec<u8>,
    counted: Vec<u32>,
    /// To be acknowledged once the sum is sent.
    held: Vec<jetstream::Message>,
}

/// The folder process; runs until its input is closed.
pub(super) async fn folder(args: FolderArgs) -> anyhow::Result<()> {
    let client = connect(&args.url).await?;
    let jetstream = jetstream::new(client.clone());
    let config = jetstream::stream::Config {
        name: STREAM.to_owned(),
        subjects: vec![PUSHES.to_owned()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        storage: StorageType::Memory,
        ..Default::default()
    };
    let stream = jetstream.create_stream(config).await?;
    let consumer = pull::Config {
        durable_name: Some("folder".to_owned()),
        ack_policy: AckPolicy::Explicit,
        max_ack_pending: -1,
        ..pull::Config::default()
    };
    let consumer = stream.create_consumer(consumer).await?;
    let messages = consumer.stream().max_messages_per_batch(PULL_MESSAGES).max_bytes_per_batch(PULL_BYTES);
    let mut messages = messages.messages().await?;
    super::worker::reply(Reply::Ready)?;
    let mut input = super::worker::commands();
    let mut chunks: HashMap<u32, Chunk> = HashMap::new();
    let mut newest = 0;
    loop {
        let message = tokio::select! {
            message = messages.try_next() => message?.context("the consumer has ended")?,
            command = input.recv() => match command {
                Some(_) => {
                    super::worker::reply(Reply::Ready)?;
                    continue;
                }
                None => return Ok(()),
            },
        };
        let Some(([round, chunk, rank], values)) = open(&message.message.payload) else { continue };
        if round > newest {
            (newest, chunks) = (round, HashMap::new());
        }
        let open = chunks.entry(chunk).or_insert_with(|| Chunk {
            sum: Vec::new(),
            counted: Vec::with_capacity(args.workers),
            held: Vec::with_capacity(args.workers),
        });
        if round < newest || open.counted.contains(&rank) {
            acknowledge(&message).await?;
            continue;
        }
        open.counted.push(rank);
        if open.sum.is_empty() {
            open.sum.extend_from_slice(&message.message.payload);
        } else {
            ensure!(open.sum.len() == HEADER_BYTES + values.len(), "contributions of different sizes");
            let sums = open.sum[HEADER_BYTES..].as_chunks_mut::<4>().0;
            for (sum, value) in sums.iter_mut().zip(values.as_chunks::<4>().0) {
                *sum = (f32::from_le_bytes(*sum) + f32::from_le_bytes(*value)).to_le_bytes();
            }
        }
        open.held.push(message);
        if open.counted.len() == args.workers {
            client.publish(RESULTS, Bytes::from(std::mem::take(&mut open.sum))).await?;
            for message in open.held.drain(..) {
                acknowledge(&message).await?;
            }
        }
    }
}

async fn acknowledge(message: &jetstream::Message) -> anyhow::Result<()> {
    message.ack_with(AckKind::Ack).await.map_err(anyhow::Error::from_boxed)
}

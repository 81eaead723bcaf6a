//! What travels between actors.
//!
//! A connection is a TCP stream to the broker: it loses nothing while it lives, and keeps the order of what is
//! sent to the broker; what comes from the broker keeps its order by kind of message only. When a connection
//! breaks, what was on its way is lost or not, what its owner sends meanwhile waits in the client and goes out
//! when the connection is back, and requests without an answer time out.

use bytes::Bytes;
use thalweg_protocol::{Handover, InvokerBeat, JobKey, Partition, Rank};

use crate::calls::{Answer, Ask, CallId};

/// Milliseconds of virtual time.
pub(crate) type Millis = u64;

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Actor {
    Broker,
    Store,
    Gateway(u32),
    Autoscaler(u32),
    Worker(u32),
    Invoker(u32),
    /// Deletes the jobs when all is over. Nothing ever happens to it.
    Operator,
}

/// What is told.
#[derive(Debug)]
pub(crate) enum Body {
    Ask(CallId, Ask),
    Answer(CallId, Answer),
    /// To a gateway: answer this frame to whoever asked. A heartbeat goes to all of them.
    Request {
        from: Actor,
        id: CallId,
        frame: Bytes,
        beat: bool,
    },
    /// To an invoker: hand this over and answer.
    Handover {
        from: Actor,
        id: CallId,
        handover: Handover,
    },
    /// To an invoker, among its deliveries: whoever asks for this hears them too; answer.
    Heard {
        from: Actor,
        id: CallId,
        handover: Handover,
    },
    /// Somebody wrote this key.
    Hint(String),
    Beat(InvokerBeat),
    Pull {
        partition: Partition,
        consumer: String,
        batch: u64,
    },
    ConsumerGone {
        partition: Partition,
        consumer: String,
    },
    Deliver(Box<Delivered>),
    Acknowledge {
        partition: Partition,
        consumer: String,
        sequence: u64,
    },
    Result(JobKey, Bytes),
    Reject(JobKey, Rank, Bytes),
}

/// A message of a work queue on its way to whoever listens.
#[derive(Clone, Debug)]
pub(crate) struct Delivered {
    pub(crate) partition: Partition,
    pub(crate) consumer: String,
    pub(crate) consumer_sequence: u64,
    pub(crate) sequence: u64,
    pub(crate) published: Millis,
    pub(crate) subject: String,
    pub(crate) frame: Bytes,
}

impl Body {
    /// Messages of one class from the broker keep their order.
    pub(crate) fn class(&self) -> u8 {
        match self {
            Self::Answer(..) | Self::Ask(..) | Self::Request { .. } | Self::Handover { .. } => 0,
            Self::Hint(_) => 1,
            Self::Beat(_) => 2,
            Self::Deliver(_)
            | Self::Heard { .. }
            | Self::Pull { .. }
            | Self::ConsumerGone { .. }
            | Self::Acknowledge { .. } => 3,
            Self::Result(..) => 4,
            Self::Reject(..) => 5,
        }
    }

    /// Whether it says nothing that a reader of a history would miss.
    pub(crate) fn is_noise(&self) -> bool {
        match self {
            Self::Beat(_) | Self::Pull { .. } | Self::Hint(_) | Self::Request { beat: true, .. } => true,
            Self::Ask(_, Ask::Update(key, ..)) => key.starts_with("lease."),
            Self::Ask(_, ask) => matches!(
                ask,
                Ask::Beat(_)
                    | Ask::Entry(_)
                    | Ask::Depths
                    | Ask::Ensure
                    | Ask::Keys
                    | Ask::Look(_)
                    | Ask::Sleep(_)
            ),
            Self::Answer(_, answer) => !matches!(
                answer,
                Answer::Lost | Answer::Refused(_) | Answer::Written(Err(_)) | Answer::Purged(Err(_))
            ),
            _ => false,
        }
    }

    /// In short, for a history.
    pub(crate) fn short(&self) -> String {
        let text = match self {
            Self::Ask(id, ask) => format!("#{id} asks {}", describe_ask(ask)),
            Self::Answer(id, answer) => format!("#{id} answered {}", describe_answer(answer)),
            Self::Request { from, id, frame, beat } => {
                format!("request #{id} of {from:?}, {} bytes, beat={beat}", frame.len())
            }
            Self::Deliver(message) => format!(
                "deliver p{} #{} ({} of {}): {}",
                message.partition,
                message.sequence,
                message.consumer_sequence,
                message.consumer,
                describe_contribution(&message.frame)
            ),
            Self::Result(_, frame) => format!("result {}", describe_result(frame)),
            Self::Reject(_, rank, frame) => format!("reject to rank {rank}: {}", describe_reject(frame)),
            other => format!("{other:?}"),
        };
        text.chars().take(200).collect()
    }
}

fn describe_contribution(frame: &Bytes) -> String {
    use thalweg_protocol::{GradientHeader, Kind, frame};
    match frame::open::<GradientHeader>(Kind::Gradient, frame) {
        Ok((header, _)) => format!(
            "rank {} shard {} round {} roster {}{}",
            header.rank,
            header.shard,
            header.round,
            header.roster_epoch,
            if header.void { " void" } else { "" }
        ),
        Err(error) => error.to_string(),
    }
}

fn describe_result(frame: &Bytes) -> String {
    use thalweg_protocol::{Kind, ResultHeader, frame};
    match frame::open::<ResultHeader>(Kind::Result, frame) {
        Ok((header, _)) => format!(
            "shard {} version {} roster {} counted {:?} void {:?}",
            header.shard,
            header.head.version,
            header.ledger.roster_epoch,
            header.ledger.counted,
            header.ledger.void
        ),
        Err(error) => error.to_string(),
    }
}

fn describe_reject(frame: &Bytes) -> String {
    use thalweg_protocol::{Kind, Reject, frame};
    match frame::open::<Reject>(Kind::Reject, frame) {
        Ok((reject, _)) => format!("{:?} {}", reject.at, reject.error),
        Err(error) => error.to_string(),
    }
}

fn describe_ask(ask: &Ask) -> String {
    use thalweg_protocol::{ApiRequest, Kind, StoreRequest, frame};
    match ask {
        Ask::Update(key, value, expect) => format!("to write {key} at {expect}, {} bytes", value.len()),
        Ask::Publish(partition, _, frame) => {
            format!("to publish to p{partition}: {}", describe_contribution(frame))
        }
        Ask::Store(frame) => match frame::open::<StoreRequest>(Kind::StoreRequest, frame) {
            Ok((StoreRequest::Commit(commit), _)) => format!(
                "to commit shard {} round {} roster {} counted {:?} void {:?} on version {}",
                commit.shard,
                commit.ledger.round,
                commit.ledger.roster_epoch,
                commit.ledger.counted,
                commit.ledger.void,
                commit.expect.version
            ),
            Ok((request, _)) => format!("the store {request:?}"),
            Err(error) => error.to_string(),
        },
        Ask::Api(frame) => match frame::open::<ApiRequest>(Kind::ApiRequest, frame) {
            Ok((request, _)) => format!("a gateway {request:?}"),
            Err(error) => error.to_string(),
        },
        other => format!("{other:?}"),
    }
}

fn describe_answer(answer: &Answer) -> String {
    use thalweg_protocol::{Kind, StoreReply, frame};
    match answer {
        Answer::Frame(bytes) => match frame::open::<StoreReply>(Kind::StoreReply, bytes) {
            Ok((reply, _)) => format!("{reply:?}"),
            Err(_) => format!("{} bytes", bytes.len()),
        },
        Answer::Entry(value, revision) => {
            format!("{} bytes at revision {revision}", value.as_ref().map_or(0, Bytes::len))
        }
        other => format!("{other:?}"),
    }
}

//! Traces: what the components did for one round of one job, and when.
//!
//! The ids follow from job, round, shard and rank. So every component knows the trace that it works for, and the span that
//! its own belong under, without being told; also where no header travels (the store's socket), and whoever it is that
//! does the work after a death.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::{Incarnation, Rank, Round, ShardIndex, checksum};

/// Header of a NATS message that names its span, as W3C Trace Context has it.
pub const TRACEPARENT: &str = "traceparent";

/// What a component did, in the order of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// A worker's round, from its first contribution to its last result.
    Round,
    /// A worker sends a contribution, until the broker has stored it.
    Push,
    /// From there until the worker holds the result.
    Wait,
    /// The first contribution of a shard to the last one that is folded, by the broker's clock. The rank is whose
    /// came last.
    Gather,
    /// From there until an invoker begins to fold: on the way to it, or waiting for it.
    Queue,
    /// The fold, with reading the state and parked contributions.
    Fold,
    /// The commit, as the invoker sees it.
    Commit,
    /// The store writes the state.
    Write,
    /// The store waits until what it wrote has reached the job's durability level.
    Flush,
    /// Handing the result to the connection.
    Publish,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Round,
        Self::Push,
        Self::Wait,
        Self::Gather,
        Self::Queue,
        Self::Fold,
        Self::Commit,
        Self::Write,
        Self::Flush,
        Self::Publish,
    ];

    /// In one word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Round => "round",
            Self::Push => "push",
            Self::Wait => "wait",
            Self::Gather => "gather",
            Self::Queue => "queue",
            Self::Fold => "fold",
            Self::Commit => "commit",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Publish => "publish",
        }
    }

    /// Whether each rank has a span of its own.
    fn is_of_workers(self) -> bool {
        matches!(self, Self::Round | Self::Push | Self::Wait)
    }
}

/// Names the trace of one round of one life of a job. Written as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId([u8; 16]);

/// Names a span in its trace. Written as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanId([u8; 8]);

impl TraceId {
    /// Of a round.
    #[must_use]
    pub fn new(job: Incarnation, round: Round) -> Self {
        let mut bytes = job.0;
        bytes[8..].iter_mut().zip(round.to_be_bytes()).for_each(|(byte, round)| *byte ^= round);
        Self(bytes)
    }

    /// Of a stage of it; `rank` counts only where every rank has its own.
    #[must_use]
    pub fn span(self, stage: Stage, shard: ShardIndex, rank: Rank) -> SpanId {
        let rank = if stage.is_of_workers() { rank } else { 0 };
        // A round is of all shards.
        let shard = if stage == Stage::Round { 0 } else { shard };
        let place = [&self.0[..], &[stage as u8], &shard.to_be_bytes(), &rank.to_be_bytes()];
        // All zeros would mean that there is none.
        SpanId(checksum(&place).max(1).to_be_bytes())
    }

    /// Value of the header [`TRACEPARENT`] of a message that is sent in this span.
    #[must_use]
    pub fn parent(self, span: SpanId) -> String {
        format!("00-{self}-{span}-01")
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl std::fmt::Display for TraceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl std::fmt::Display for SpanId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// Something that took time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// What it was.
    pub stage: Stage,
    /// For which shard; 0 for [`Stage::Round`].
    pub shard: ShardIndex,
    /// Whose; of [`Stage::Gather`] whose contribution came last; `None` otherwise.
    pub rank: Option<Rank>,
    /// When it began, microseconds since the Unix epoch by the clock of whoever tells.
    pub start_us: u64,
    /// How long it took, microseconds.
    pub duration_us: u64,
}

impl Span {
    /// When it ended, microseconds since the Unix epoch.
    #[must_use]
    pub fn end_us(&self) -> u64 {
        self.start_us.saturating_add(self.duration_us)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self, trace: TraceId) -> SpanId {
        trace.span(self.stage, self.shard, self.rank.unwrap_or(0))
    }

    /// The span that it belongs under: what a worker does under its round, what an invoker does under the contribution
    /// that it had to wait for last, what a store does under the commit.
    #[must_use]
    pub fn parent(&self, trace: TraceId) -> Option<SpanId> {
        let stage = match self.stage {
            Stage::Round => return None,
            Stage::Push | Stage::Wait => Stage::Round,
            Stage::Gather => Stage::Push,
            Stage::Queue | Stage::Fold | Stage::Commit | Stage::Publish => Stage::Gather,
            Stage::Write | Stage::Flush => Stage::Commit,
        };
        Some(trace.span(stage, self.shard, self.rank.unwrap_or(0)))
    }
}

/// Header of what asks all components for their spans of one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceQuery {
    /// Life of the job.
    pub job: Incarnation,
    /// The round.
    pub round: Round,
}

/// Header of an answer to it, of whoever has something to tell; one that has much answers several times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceReply {
    /// Kind of component: `worker`, `invoker` or `store`.
    pub component: String,
    /// Which one.
    pub name: String,
    /// What it did.
    pub spans: Vec<Span>,
}

/// Most spans in one answer; about 32 bytes each.
pub const MAX_SPANS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_what_w3c_says() {
        let trace = TraceId::new(Incarnation([0x11; 16]), 0x0203);
        assert_eq!(trace.to_string(), "11111111111111111111111111111312");
        let parent = trace.parent(trace.span(Stage::Push, 3, 1));
        let parts: Vec<_> = parent.split('-').collect();
        assert_eq!((parts[0], parts[3]), ("00", "01"));
        assert_eq!((parts[1].len(), parts[2].len(), parent.len()), (32, 16, 55));
        assert!(
            parent.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase())
        );
    }

    #[test]
    fn spans_of_a_round_differ_and_know_their_parents() {
        let trace = TraceId::new(Incarnation([7; 16]), 5);
        let span = |stage, shard, rank| Span { stage, shard, rank, start_us: 0, duration_us: 0 };
        let mut ids = std::collections::BTreeSet::new();
        for shard in 0..4 {
            for stage in Stage::ALL {
                for rank in 0..3 {
                    ids.insert(trace.span(stage, shard, rank).to_string());
                }
            }
        }
        // Three rounds, three pushes and waits a shard, and seven stages that no rank owns.
        assert_eq!(ids.len(), 3 + 4 * (2 * 3 + 7));
        let gather = span(Stage::Gather, 2, Some(1));
        assert_eq!(gather.parent(trace), Some(span(Stage::Push, 2, Some(1)).id(trace)));
        assert_eq!(span(Stage::Fold, 2, None).parent(trace), Some(gather.id(trace)));
        assert_eq!(span(Stage::Write, 2, None).parent(trace), Some(span(Stage::Commit, 2, None).id(trace)));
        let round = span(Stage::Round, 0, Some(1));
        assert_eq!(span(Stage::Wait, 2, Some(1)).parent(trace), Some(round.id(trace)));
        assert_eq!(round.parent(trace), None);
    }
}

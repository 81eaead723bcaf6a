//! What a worker remembers of its rounds, for `thalweg trace`.

use std::{collections::HashMap, time::Instant};

use async_nats::{Client, Message};
use thalweg_broker::Spans;
use thalweg_protocol::{Incarnation, Rank, Round, ShardIndex, Stage};

/// The round that is under way, and the spans of those before.
#[derive(Debug)]
pub(crate) struct Trace {
    rank: Rank,
    spans: Spans,
    round: (Incarnation, Round),
    /// Since its first contribution was sent.
    begun: Option<Instant>,
    /// What was sent and has no result.
    under_way: HashMap<ShardIndex, Contribution>,
}

#[derive(Clone, Copy, Debug)]
struct Contribution {
    /// When it was sent, then when the broker had stored it.
    since: Instant,
    stored: bool,
}

impl Trace {
    pub(crate) fn new(rank: Rank) -> Self {
        Self {
            rank,
            spans: Spans::new("worker", format!("rank {rank}")),
            round: (Incarnation([0; 16]), 0),
            begun: None,
            under_way: HashMap::new(),
        }
    }

    /// A contribution is sent; not for the first time, perhaps.
    pub(crate) fn sent(&mut self, round: (Incarnation, Round), shard: ShardIndex) {
        if round.1 < self.round.1 {
            return;
        }
        if round != self.round {
            self.round = round;
            self.begun = None;
            self.under_way.clear();
        }
        let since = Instant::now();
        self.begun.get_or_insert(since);
        self.under_way.entry(shard).or_insert(Contribution { since, stored: false });
    }

    /// The broker has stored it.
    pub(crate) fn stored(&mut self, round: Round, shard: ShardIndex) {
        if round != self.round.1 {
            return;
        }
        let Some(contribution) = self.under_way.get_mut(&shard).filter(|sent| !sent.stored) else { return };
        self.spans.ended(self.round, Stage::Push, shard, Some(self.rank), contribution.since);
        *contribution = Contribution { since: Instant::now(), stored: true };
    }

    /// There is a result, of all shards when `complete`.
    pub(crate) fn received(&mut self, shard: ShardIndex, complete: bool) {
        if let Some(contribution) = self.under_way.remove(&shard) {
            // A result can overtake the broker's word that the contribution is stored.
            let stage = if contribution.stored { Stage::Wait } else { Stage::Push };
            self.spans.ended(self.round, stage, shard, Some(self.rank), contribution.since);
        }
        if let Some(begun) = self.begun.take_if(|_| complete) {
            self.spans.ended(self.round, Stage::Round, 0, Some(self.rank), begun);
        }
    }

    pub(crate) async fn answer(&self, client: &Client, question: &Message) {
        self.spans.answer(client, question).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: Incarnation = Incarnation([9; 16]);

    fn stages(trace: &Trace, round: Round) -> Vec<(Stage, ShardIndex)> {
        trace.spans.of(JOB, round).iter().map(|span| (span.stage, span.shard)).collect()
    }

    #[test]
    fn a_round_has_a_push_and_a_wait_for_each_shard() {
        let mut trace = Trace::new(3);
        for shard in 0..2 {
            trace.sent((JOB, 1), shard);
        }
        trace.stored(1, 0);
        trace.received(0, false);
        // Sent again, confirmed twice: told once.
        trace.sent((JOB, 1), 1);
        trace.stored(1, 1);
        trace.stored(1, 1);
        trace.received(1, true);
        trace.received(1, true);
        let expected =
            [(Stage::Push, 0), (Stage::Wait, 0), (Stage::Push, 1), (Stage::Wait, 1), (Stage::Round, 0)];
        assert_eq!(stages(&trace, 1), expected);
        assert!(trace.spans.of(JOB, 1).iter().all(|span| span.rank == Some(3)));
    }

    #[test]
    fn what_is_late_is_not_taken_for_another_round() {
        let mut trace = Trace::new(0);
        trace.sent((JOB, 1), 0);
        trace.sent((JOB, 2), 0);
        trace.stored(1, 0);
        assert_eq!(stages(&trace, 1), []);
        // The result overtook the confirmation.
        trace.received(0, true);
        trace.stored(2, 0);
        assert_eq!(stages(&trace, 2), [(Stage::Push, 0), (Stage::Round, 0)]);
    }
}

//! What a component remembers of the rounds that it worked for, and tells whoever asks (`thalweg trace`).

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use async_nats::{Client, HeaderMap, Message};
use thalweg_protocol::{
    Incarnation, Kind, MAX_SPANS, Rank, Round, ShardIndex, Span, Stage, TRACEPARENT, TraceId, TraceQuery,
    TraceReply, frame,
};

/// Spans that a component keeps: about a mebibyte, once there have been so many.
const KEPT: usize = 16_384;

/// The newest spans of one component, in a bounded ring. Keeping one costs less than a microsecond, so that it is always
/// done: what was slow is asked for afterwards.
#[derive(Debug)]
pub struct Spans {
    component: &'static str,
    name: String,
    kept: Mutex<VecDeque<(Incarnation, Round, Span)>>,
}

impl Spans {
    /// Of the component called `name`.
    #[must_use]
    pub fn new(component: &'static str, name: impl Into<String>) -> Self {
        Self { component, name: name.into(), kept: Mutex::default() }
    }

    /// Keeps what has just ended.
    pub fn ended(
        &self,
        (job, round): (Incarnation, Round),
        stage: Stage,
        shard: ShardIndex,
        rank: Option<Rank>,
        begun: Instant,
    ) {
        let duration = begun.elapsed();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(duration);
        let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let (start_us, duration_us) = (micros(since), micros(duration));
        self.keep((job, round), Span { stage, shard, rank, start_us, duration_us });
    }

    /// Keeps a span; the oldest one goes when there are too many.
    pub fn keep(&self, (job, round): (Incarnation, Round), span: Span) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((job, round, span));
    }

    /// What is kept of a round, in the order in which it ended.
    #[must_use]
    pub fn of(&self, job: Incarnation, round: Round) -> Vec<Span> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let theirs = kept.iter().filter(|(of, at, _)| *of == job && *at == round);
        theirs.map(|(_, _, span)| *span).collect()
    }

    /// Answers a question for the spans of a round; says nothing when there are none.
    pub async fn answer(&self, client: &Client, question: &Message) {
        let Some(reply) = question.reply.clone() else { return };
        let Ok((query, _)) = frame::open::<TraceQuery>(Kind::TraceQuery, &question.payload) else { return };
        for spans in self.of(query.job, query.round).chunks(MAX_SPANS) {
            let (component, name) = (self.component.to_owned(), self.name.clone());
            let answer = TraceReply { component, name, spans: spans.to_vec() };
            // Whoever asks may do so again.
            let _ = client.publish(reply.clone(), frame::seal(Kind::TraceReply, &answer, &[])).await;
        }
    }
}

/// Headers that name the span which a message is sent in, for whoever traces messages.
#[must_use]
pub fn traced((job, round): (Incarnation, Round), stage: Stage, shard: ShardIndex, rank: Rank) -> HeaderMap {
    let trace = TraceId::new(job, round);
    let mut headers = HeaderMap::new();
    headers.insert(TRACEPARENT, trace.parent(trace.span(stage, shard, rank)));
    headers
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const JOB: Incarnation = Incarnation([1; 16]);

    #[test]
    fn the_ring_keeps_the_newest_and_tells_rounds_apart() {
        let spans = Spans::new("invoker", "i1");
        let span = |shard| Span { stage: Stage::Fold, shard, rank: None, start_us: 10, duration_us: 5 };
        let many = u32::try_from(KEPT).unwrap();
        (0..many).for_each(|shard| spans.keep((JOB, 1), span(shard)));
        assert_eq!(spans.of(JOB, 1).len(), KEPT);
        spans.keep((JOB, 2), span(0));
        spans.keep((Incarnation([2; 16]), 2), span(7));
        assert_eq!(spans.of(JOB, 1).first(), Some(&span(2)), "the two oldest are gone");
        assert_eq!(spans.of(JOB, 2), [span(0)]);
        assert_eq!(spans.of(JOB, 3), []);
    }

    #[test]
    fn what_has_ended_began_before() {
        let spans = Spans::new("store", "s");
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let begun = Instant::now();
        std::thread::sleep(Duration::from_millis(3));
        spans.ended((JOB, 1), Stage::Write, 4, None, begun);
        let [span] = spans.of(JOB, 1)[..] else { panic!() };
        assert!(span.duration_us >= 3000, "{span:?}");
        // The two clocks are read one after the other.
        assert!(u128::from(span.start_us) + 1000 >= before.as_micros(), "{span:?} {before:?}");
    }
}

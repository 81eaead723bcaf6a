//! Tables: what a worker sends, asks and gives up, when.

mod random;

use thalweg_protocol::{ErrorCode, RankSet, Reject, StateId};

use super::*;

const LEN: u64 = 100;

const JOB: Incarnation = Incarnation([1; 16]);
const WORKER: Incarnation = Incarnation([2; 16]);

fn head(version: u64) -> Head {
    let [id, ..] = version.to_le_bytes();
    Head { version, fold_count: 0, state_id: StateId([id; 16]) }
}

fn ledger(round: u64) -> Ledger {
    let counted = RankSet::from_iter([0]);
    let (void, order) = (RankSet::default(), Vec::new());
    Ledger { round, roster_epoch: 1, revision: 0, counted, void, below_quorum: false, order }
}

fn frame(len: u64) -> Bytes {
    Bytes::from(vec![0; usize::try_from(len).unwrap()])
}

/// An engine at round 1 of shards of [`LEN`] bytes.
struct Bench {
    engine: Engine,
    now: Instant,
}

impl Bench {
    fn new(shards: usize, window: u64) -> Self {
        let now = Instant::now();
        let model = shards as u64 * LEN;
        let mut engine =
            Engine::new(Timing::default(), (JOB, WORKER, 0), vec![head(0); shards], 1, model, now);
        assert!(engine.window(window, 1, now).is_empty());
        Self { engine, now }
    }

    fn after(&mut self, millis: u64) -> Vec<String> {
        self.now += Duration::from_millis(millis);
        short(&self.engine.tick(self.now))
    }

    fn push(&mut self, shard: ShardIndex) -> Vec<String> {
        short(&self.engine.push(shard, frame(LEN), self.now))
    }

    fn confirmed(&mut self, shard: ShardIndex) -> Vec<String> {
        short(&self.engine.confirmed(shard, self.engine.round(), LEN, self.now))
    }

    fn refused(&mut self, shard: ShardIndex) -> Vec<String> {
        short(&self.engine.refused(shard, self.engine.round(), LEN, 1.0, self.now))
    }

    fn result(&mut self, shard: ShardIndex, version: u64) -> Vec<String> {
        short(&self.engine.result(shard, head(version), ledger(version), frame(4), self.now))
    }

    fn heads(&mut self, versions: &[u64], stream: i64) -> Vec<String> {
        let heads: Vec<_> = versions.iter().map(|version| head(*version)).collect();
        short(&self.engine.heads(&heads, vec![stream; heads.len()], self.now))
    }

    fn looked(&mut self, shard: ShardIndex, version: u64, contained: bool) -> Vec<String> {
        short(&self.engine.looked(shard, head(version), contained, self.now))
    }

    fn reject(&mut self, code: ErrorCode, at: Option<(ShardIndex, Round)>) -> Vec<String> {
        let error = WireError::new(code, "no");
        let reject = Reject { job: Some(JOB), worker: Some(WORKER), at, error };
        short(&self.engine.reject(reject, self.now))
    }
}

fn short(actions: &[Action]) -> Vec<String> {
    let one = |action: &Action| match action {
        Action::Publish(shard, round, _) => format!("publish {shard}@{round}"),
        Action::Ask => "ask".to_owned(),
        Action::Fetch(shard) => format!("fetch {shard}"),
        Action::Look(shard) => format!("look {shard}"),
    };
    actions.iter().map(one).collect()
}

const NOTHING: [&str; 0] = [];

#[test]
fn the_lowest_shard_without_a_result_is_always_sent() {
    let mut bench = Bench::new(3, 0);
    assert_eq!(bench.push(1), NOTHING);
    assert_eq!(bench.push(0), ["publish 0@1"]);
    assert_eq!(bench.push(2), NOTHING);
    assert_eq!(bench.result(0, 1), ["publish 1@1"]);
    assert_eq!(bench.result(1, 1), ["publish 2@1"]);
}

#[test]
fn a_window_smaller_than_the_model_is_filled_in_ascending_order() {
    let mut bench = Bench::new(4, 250);
    assert_eq!(bench.push(2), NOTHING);
    assert_eq!(bench.push(1), NOTHING);
    assert_eq!(bench.push(0), ["publish 0@1", "publish 1@1"]);
    assert_eq!(bench.push(3), NOTHING);
    assert_eq!(bench.result(1, 1), ["publish 2@1"], "room again, though 0 is still out");
    assert!(!bench.engine.any_order());
    // A larger grant lets the rest go at once.
    assert_eq!(short(&bench.engine.window(400, 1, bench.now)), ["publish 3@1"]);
}

#[test]
fn a_window_that_covers_the_model_allows_any_order() {
    let mut bench = Bench::new(3, 300);
    assert!(bench.engine.any_order());
    for shard in [2, 0, 1] {
        assert_eq!(bench.push(shard), [format!("publish {shard}@1")]);
    }
}

#[test]
fn unconfirmed_bytes_are_bounded() {
    let mib = 1 << 20;
    let mut bench = Bench::new(3, u64::MAX);
    // One frame larger than the bound may go when nothing else is on its way.
    for (shard, size, sent) in [(0, 5 * mib, true), (1, mib, false), (2, 3 * mib, false)] {
        let actions = bench.engine.push(shard, frame(size), bench.now);
        assert_eq!(!actions.is_empty(), sent, "{shard}");
    }
    assert_eq!(bench.engine.unsent_bytes(), UNCONFIRMED_BYTES);
    let actions = bench.engine.confirmed(0, 1, 5 * mib, bench.now);
    assert_eq!(short(&actions), ["publish 1@1", "publish 2@1"], "exactly the bound");
}

#[test]
fn what_waits_at_the_broker_is_bounded_until_others_seem_to_wait_for_more() {
    let mib = 1 << 20;
    let mut bench = Bench::new(20, u64::MAX);
    for shard in 0..20 {
        bench.engine.push(shard, frame(mib), bench.now);
        bench.engine.confirmed(shard.saturating_sub(1), 1, mib, bench.now);
    }
    assert_eq!(bench.engine.in_flight, PACE_BYTES);
    assert_eq!(bench.result(0, 1), ["publish 12@1"], "a result makes room");
    assert_eq!(bench.after(39), NOTHING);
    bench.engine.unconfirmed = 0;
    let more: Vec<_> = (13..17).map(|shard| format!("publish {shard}@1")).collect();
    assert_eq!(bench.after(1), more, "as many as may be unconfirmed");
}

#[test]
fn a_refused_publication_is_tried_again_with_growing_pauses() {
    let mut bench = Bench::new(2, 200);
    bench.push(0);
    let mut pause = 20;
    for _ in 0..10 {
        assert_eq!(bench.refused(0), NOTHING);
        assert_eq!(bench.engine.in_flight, 0);
        assert_eq!(bench.after(pause - 1).iter().filter(|action| action.starts_with("publish")).count(), 0);
        assert!(bench.after(1).contains(&"publish 0@1".to_owned()), "after {pause} ms");
        pause = (pause * 2).min(1000);
    }
    // Accepted: the next refusal begins with short pauses again.
    assert_eq!(bench.confirmed(0), NOTHING);
    bench.heads(&[0, 0], 0);
    bench.now += Duration::from_secs(30);
    assert_eq!(bench.looked(0, 0, false), ["publish 0@1"]);
    bench.refused(0);
    assert!(bench.after(20).contains(&"publish 0@1".to_owned()));
}

#[test]
fn a_refused_shard_holds_others_back_only_where_order_counts() {
    for (window, expected) in [(300, vec!["publish 1@1"]), (250, vec![])] {
        let mut bench = Bench::new(3, window);
        bench.push(0);
        bench.refused(0);
        assert_eq!(bench.push(1), expected, "window {window}");
    }
}

#[test]
fn results_complete_a_round_and_the_next_one_begins() {
    let mut bench = Bench::new(2, 200);
    assert!(!bench.engine.advance());
    bench.push(0);
    bench.push(1);
    assert_eq!(bench.engine.lowest_missing(), Some(0));
    bench.result(0, 1);
    bench.result(0, 1);
    assert_eq!(bench.engine.lowest_missing(), Some(1));
    assert!(bench.engine.shard_result(0).is_some() && bench.engine.shard_result(1).is_none());
    bench.result(1, 1);
    assert!(bench.engine.is_complete() && !bench.engine.is_active());
    assert_eq!((bench.engine.in_flight, bench.engine.unconfirmed), (0, 200));
    assert_eq!(bench.engine.shard_result(0).unwrap().values.len(), 4);
    bench.engine.release(0);
    assert!(bench.engine.shard_result(0).unwrap().values.is_empty());
    assert_eq!(bench.engine.shard_result(0).unwrap().ledger, ledger(1));
    // Answers of the old round count, but belong to nothing of the new one.
    assert!(bench.engine.advance());
    assert_eq!((bench.engine.round(), bench.engine.shard_result(0).is_some()), (2, false));
    assert_eq!(bench.push(0), ["publish 0@2"]);
    bench.engine.confirmed(0, 1, LEN, bench.now);
    assert!(!bench.engine.shards[0].pushed.as_ref().unwrap().sent.as_ref().unwrap().accepted);
    bench.engine.refused(1, 1, LEN, 1.0, bench.now);
    assert_eq!((bench.engine.in_flight, bench.engine.unconfirmed), (100, 100));
    // A result of the past is not taken.
    assert_eq!(bench.result(0, 1), NOTHING);
    assert_eq!(bench.engine.head(0), Some(head(1)));
}

#[test]
fn a_round_that_others_have_left_behind_ends_at_the_newest_version() {
    let mut bench = Bench::new(2, 200);
    bench.push(0);
    bench.result(0, 3);
    assert_eq!((bench.engine.target(), bench.engine.lowest_missing()), (3, Some(1)));
    // What is closed already needs no contribution; what is open still does.
    assert!(bench.engine.is_pushed(0));
    assert_eq!(bench.push(0), NOTHING);
    assert_eq!(bench.push(1), ["publish 1@1"]);
    bench.result(1, 1);
    assert!(!bench.engine.is_complete(), "a result of another version than shard 0's");
    // Nothing is pushed any more, but something is awaited.
    assert_eq!(bench.after(1000), ["ask"]);
    assert_eq!(bench.heads(&[3, 2], 0), ["fetch 1"]);
    bench.result(1, 3);
    assert!(bench.engine.is_complete());
    assert!(bench.engine.advance());
    assert_eq!(bench.engine.round(), 4);
}

#[test]
fn a_shard_that_still_needs_this_worker_is_the_lowest_one() {
    let mut bench = Bench::new(3, 0);
    bench.result(0, 1);
    bench.result(2, 2);
    assert_eq!(bench.engine.target(), 2);
    assert_eq!(bench.push(1), ["publish 1@1"], "though shard 0 has to go further as well");
}

#[test]
fn a_payload_is_sent_again_only_for_a_reason() {
    // (accepted by the broker, stream recreated, milliseconds since it was sent, sent again)
    let cases = [
        (true, false, 0, false),
        (true, false, 29_999, false),
        (false, false, 1_999, false),
        (false, false, 2_000, true),
        (true, true, 0, true),
        (false, true, 0, true),
    ];
    for (accepted, recreated, age, again) in cases {
        let mut bench = Bench::new(1, 100);
        bench.heads(&[0], 7);
        bench.push(0);
        if accepted {
            bench.confirmed(0);
        }
        bench.now += Duration::from_millis(age);
        let actions = bench.heads(&[0], if recreated { 8 } else { 7 });
        assert_eq!(actions == ["publish 0@1"], again, "{accepted} {recreated} {age}");
        assert_eq!(bench.engine.in_flight, LEN);
        // Not twice for the same reason.
        assert_eq!(bench.heads(&[0], if recreated { 8 } else { 7 }), NOTHING);
    }
}

#[test]
fn an_old_payload_is_sent_again_only_if_the_open_round_does_not_contain_it() {
    for contained in [true, false] {
        let mut bench = Bench::new(1, 100);
        bench.heads(&[0], 7);
        bench.push(0);
        bench.confirmed(0);
        bench.now += Duration::from_secs(30);
        assert_eq!(bench.heads(&[0], 7), ["look 0"]);
        assert_eq!(bench.looked(0, 1, false), NOTHING, "a round that has ended since is fetched");
        assert_eq!(bench.looked(0, 0, contained), if contained { vec![] } else { vec!["publish 0@1"] });
        assert_eq!(bench.heads(&[0], 7), NOTHING, "not twice for the same reason");
        assert_eq!(bench.engine.in_flight, LEN);
        bench.now += Duration::from_secs(30);
        let again = if contained { vec!["look 0"] } else { vec!["publish 0@1"] };
        assert_eq!(bench.heads(&[0], 7), again, "what is unconfirmed needs no look");
    }
}

#[test]
fn questions_become_rarer_while_nothing_is_heard() {
    let mut bench = Bench::new(1, 100);
    bench.push(0);
    let mut waits = Vec::new();
    for _ in 0..6 {
        let asked = bench.now;
        while !short(&bench.engine.tick(bench.now)).contains(&"ask".to_owned()) {
            bench.now += Duration::from_millis(100);
        }
        waits.push(bench.now.duration_since(asked).as_secs());
    }
    assert_eq!(waits, [1, 2, 4, 8, 8, 8]);
    bench.result(0, 1);
    bench.engine.advance();
    assert_eq!(bench.push(0), ["publish 0@2"]);
    assert_eq!(bench.after(1000), ["ask"], "news make it ask soon again");
}

#[test]
fn a_version_in_the_store_is_fetched_instead() {
    let mut bench = Bench::new(2, 200);
    bench.push(0);
    bench.now += Duration::from_secs(60);
    assert_eq!(bench.heads(&[1, 0], 7), ["fetch 0"]);
    assert_eq!(bench.heads(&[0, 0], 7), ["publish 0@1"]);
    bench.result(0, 1);
    assert_eq!(bench.heads(&[1, 0], 7), NOTHING);
}

#[test]
fn rejects_do_what_their_code_says() {
    use ErrorCode as Code;
    // (code, of this round, sent again, advice, failure)
    let cases = [
        (Code::BadChecksum, true, true, false, false),
        (Code::NotReady, true, true, false, false),
        (Code::Unavailable, true, true, false, false),
        (Code::Unavailable, false, false, false, false),
        (Code::WrongShape, true, false, true, false),
        (Code::NonFinite, true, false, true, false),
        (Code::NonFinite, false, false, false, false),
        (Code::Gone, true, false, false, true),
        (Code::LeaseLost, true, false, false, true),
        (Code::LeaseLost, false, false, false, false),
        (Code::RoundAhead, true, false, false, true),
        (Code::Diverged, true, false, false, true),
        (Code::JobFailed, true, false, false, true),
        (Code::PoisonContribution, true, false, true, false),
    ];
    for (code, current, again, advice, failure) in cases {
        let mut bench = Bench::new(1, 100);
        bench.push(0);
        bench.confirmed(0);
        assert_eq!(bench.reject(code, Some((0, if current { 1 } else { 0 }))), NOTHING);
        assert_eq!(bench.after(49), NOTHING, "not at once");
        assert_eq!(bench.after(1) == ["publish 0@1"], again, "{code}");
        assert_eq!(bench.engine.advice().is_some(), advice, "{code}");
        assert_eq!(bench.engine.failure().is_some(), failure, "{code}");
    }
    // Bytes that nobody could read may be a stranger's on our subject: told, never fatal, sent again if they
    // may be ours, broken on the way.
    for (code, again) in [(Code::WireVersion, false), (Code::Malformed, false), (Code::BadChecksum, true)] {
        let mut bench = Bench::new(1, 100);
        bench.push(0);
        bench.confirmed(0);
        bench.reject(code, None);
        assert!(bench.engine.failure().is_none(), "{code}");
        assert_eq!(bench.engine.advice().is_some(), !again, "{code}");
        assert_eq!(bench.after(50) == ["publish 0@1"], again, "{code}");
    }
}

#[test]
fn rejects_of_other_lives_are_not_ours() {
    for (job, worker) in [(Some(JOB), Some(JOB)), (Some(WORKER), Some(WORKER)), (Some(WORKER), None)] {
        let mut bench = Bench::new(1, 100);
        bench.push(0);
        let error = WireError::new(ErrorCode::Gone, "no");
        bench.engine.reject(Reject { job, worker, at: Some((0, 1)), error }, bench.now);
        assert_eq!(bench.engine.failure(), None);
    }
}

#[test]
fn advice_ends_with_its_round_and_failure_does_not() {
    let mut bench = Bench::new(1, 100);
    bench.push(0);
    bench.reject(ErrorCode::NonFinite, Some((0, 1)));
    bench.result(0, 1);
    bench.engine.advance();
    assert_eq!(bench.engine.advice(), None);
    bench.engine.fail(WireError::new(ErrorCode::Gone, "first"));
    bench.engine.fail(WireError::new(ErrorCode::Gone, "second"));
    assert_eq!(bench.engine.failure().unwrap().message, "first");
    assert_eq!(bench.push(0), NOTHING, "nothing will come back");
}

#[test]
fn silence_makes_it_ask_and_only_while_something_is_awaited() {
    let mut bench = Bench::new(2, 200);
    assert_eq!(bench.after(10_000), NOTHING, "nothing was pushed");
    bench.push(0);
    assert_eq!(bench.after(999), NOTHING);
    assert_eq!(bench.after(1), ["ask"]);
    assert_eq!(bench.after(1999), NOTHING, "one question at a time");
    assert_eq!(bench.after(1), ["ask"], "unanswered: once more");
    bench.push(1);
    bench.after(500);
    bench.result(0, 1);
    assert_eq!(bench.after(999), NOTHING, "a result is progress");
    assert_eq!(bench.after(1), ["ask"]);
    bench.result(1, 1);
    assert_eq!(bench.after(10_000), NOTHING);
}

#[test]
fn a_connection_that_is_back_asks_at_once() {
    let mut bench = Bench::new(1, 100);
    assert_eq!(short(&bench.engine.reconnected(bench.now)), NOTHING);
    bench.push(0);
    bench.now += Duration::from_millis(900);
    assert_eq!(short(&bench.engine.reconnected(bench.now)), ["ask"]);
    assert_eq!(bench.after(999), NOTHING);
    assert_eq!(bench.after(1), ["ask"]);
}

#[test]
fn a_worker_left_behind_stands_aside_in_the_rounds_that_others_began() {
    let mut bench = Bench::new(2, 200);
    bench.push(0);
    bench.push(1);
    assert_eq!(bench.result(0, 1), NOTHING);
    // A quorum closed round 2 of shard 0: this worker will never push it, and says so on shard 1.
    assert_eq!(bench.result(0, 2), NOTHING, "shard 1 is still in this worker's own round");
    assert_eq!(bench.result(1, 1), ["publish 1@2"]);
    assert_eq!(bench.engine.lowest_missing(), Some(1));
    assert!(!bench.engine.is_complete());
    assert!(!bench.after(1999).contains(&"publish 1@2".to_owned()));
    assert!(bench.after(1).contains(&"publish 1@2".to_owned()), "the message may have been lost");
    assert_eq!(bench.result(1, 2), NOTHING);
    assert!(bench.engine.advance());
    assert_eq!(bench.engine.round(), 3);
    assert_eq!(bench.push(0), ["publish 0@3"]);
}

#[test]
fn a_round_closed_without_a_member_that_all_wait_for_means_that_it_is_none_any_more() {
    let mut bench = Bench::new(2, u64::MAX);
    bench.engine = bench.engine.full_roster(true);
    bench.push(0);
    bench.push(1);
    assert!(bench.result(0, 2).is_empty());
    assert_eq!(bench.engine.failure().unwrap().code, ErrorCode::LeaseLost);
    assert_eq!(bench.engine.head(0), Some(head(0)), "no version is handed out with a gap");
}

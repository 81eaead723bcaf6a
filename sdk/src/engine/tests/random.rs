//! Random losses: nothing leaks, and every round completes in bounded time once they stop.

use proptest::prelude::*;

use super::*;

const ROUNDS: u64 = 4;

#[derive(Clone, Copy, Debug)]
enum Step {
    Push(u8),
    /// The broker stores a publication and says so; stores it and does not; or neither.
    Stores(u8),
    StoresUnheard(u8),
    Refuses(u8),
    /// Others' contributions are there too: the round closes, and its result arrives or does not.
    Closes(u8, bool),
    /// A stored message is lost with its stream.
    Recreated,
    /// A stored message is dropped by an invoker, which says so.
    Rejected(u8),
    AnswersAsk(bool),
    AnswersFetch(u8, bool),
    /// A stored contribution becomes part of its open round; or what the round contains is dropped.
    Folds(u8),
    Drops,
    AnswersLook(u8, bool),
    Window(u8),
    Reconnected,
    Pass(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<u8>().prop_map(Step::Push),
        6 => any::<u8>().prop_map(Step::Stores),
        1 => any::<u8>().prop_map(Step::StoresUnheard),
        2 => any::<u8>().prop_map(Step::Refuses),
        5 => (any::<u8>(), any::<bool>()).prop_map(|(pick, heard)| Step::Closes(pick, heard)),
        1 => Just(Step::Recreated),
        1 => any::<u8>().prop_map(Step::Rejected),
        3 => any::<bool>().prop_map(Step::AnswersAsk),
        3 => (any::<u8>(), any::<bool>()).prop_map(|(pick, heard)| Step::AnswersFetch(pick, heard)),
        2 => any::<u8>().prop_map(Step::Folds),
        1 => Just(Step::Drops),
        3 => (any::<u8>(), any::<bool>()).prop_map(|(pick, heard)| Step::AnswersLook(pick, heard)),
        1 => any::<u8>().prop_map(Step::Window),
        1 => Just(Step::Reconnected),
        4 => (0..3000_u16).prop_map(Step::Pass),
        1 => (30_000..40_000_u16).prop_map(Step::Pass),
    ]
}

struct Run {
    bench: Bench,
    /// Publications without an answer.
    published: Vec<(ShardIndex, Round)>,
    stored: Vec<(ShardIndex, Round)>,
    /// What open rounds contain.
    folded: Vec<(ShardIndex, Round)>,
    versions: Vec<u64>,
    asks: u32,
    fetches: Vec<ShardIndex>,
    looks: Vec<ShardIndex>,
    created: i64,
}

impl Run {
    fn new(shards: usize, window: u64) -> Self {
        let mut bench = Bench::new(shards, window);
        let heads = vec![head(0); shards];
        bench.engine.heads(&heads, vec![1; shards], bench.now);
        let versions = vec![0; shards];
        Self {
            bench,
            published: Vec::new(),
            stored: Vec::new(),
            folded: Vec::new(),
            versions,
            asks: 0,
            fetches: Vec::new(),
            looks: Vec::new(),
            created: 1,
        }
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Publish(shard, round, _) => {
                    assert_eq!(round, self.bench.engine.round());
                    self.published.push((shard, round));
                }
                Action::Ask => self.asks += 1,
                Action::Fetch(shard) => self.fetches.push(shard),
                Action::Look(shard) => self.looks.push(shard),
            }
        }
        self.check();
    }

    fn check(&self) {
        let engine = &self.bench.engine;
        let pushed = || engine.shards.iter().filter_map(|shard| shard.pushed.as_ref());
        let sent: usize = pushed().filter(|pushed| pushed.sent.is_some()).count();
        assert_eq!(engine.in_flight, sent as u64 * LEN, "bytes in flight are those sent");
        assert_eq!(engine.unconfirmed, self.published.len() as u64 * LEN, "unanswered");
        assert_eq!(engine.ready.len(), pushed().count() - sent, "pushed and not sent");
        let behind = self.versions.iter().filter(|version| **version < engine.round()).count();
        assert!(engine.missing >= behind, "a result from nowhere");
        assert_eq!(engine.failure(), None);
    }

    fn begin(&mut self) {
        if self.bench.engine.round() < ROUNDS && self.bench.engine.advance() {
            assert_eq!(self.bench.engine.in_flight, 0);
        }
    }

    fn push(&mut self, shard: ShardIndex) {
        self.begin();
        let now = self.bench.now;
        let actions = self.bench.engine.push(shard, frame(LEN), now);
        self.act(actions);
    }

    fn shard(&self, pick: u8) -> ShardIndex {
        u32::from(pick) % u32::try_from(self.versions.len()).unwrap()
    }

    fn answer(&mut self, pick: u8, stored: bool, heard: bool) {
        if self.published.is_empty() {
            return;
        }
        let (shard, round) = self.published.remove(usize::from(pick) % self.published.len());
        if stored {
            self.stored.push((shard, round));
        }
        let now = self.bench.now;
        let actions = if heard && stored {
            self.bench.engine.confirmed(shard, round, LEN, now)
        } else {
            self.bench.engine.refused(shard, round, LEN, f64::from(pick) / 255.0, now)
        };
        self.act(actions);
    }

    fn close(&mut self, pick: u8, heard: bool) {
        let there = if self.folded.is_empty() { &mut self.stored } else { &mut self.folded };
        if there.is_empty() {
            return;
        }
        let (shard, round) = there.remove(usize::from(pick) % there.len());
        let version = &mut self.versions[shard as usize];
        // A duplicate or a late one changes nothing.
        if *version + 1 == round {
            *version = round;
        }
        if heard {
            self.result(shard);
        }
    }

    fn result(&mut self, shard: ShardIndex) {
        let (version, now) = (self.versions[shard as usize], self.bench.now);
        let actions = self.bench.engine.result(shard, head(version), ledger(version), frame(4), now);
        self.act(actions);
    }

    fn step(&mut self, step: Step) {
        let now = self.bench.now;
        match step {
            Step::Push(pick) => self.push(self.shard(pick)),
            Step::Stores(pick) => self.answer(pick, true, true),
            Step::StoresUnheard(pick) => self.answer(pick, true, false),
            Step::Refuses(pick) => self.answer(pick, false, true),
            Step::Closes(pick, heard) => self.close(pick, heard),
            Step::Recreated => {
                self.stored.clear();
                self.created += 1;
            }
            Step::Rejected(pick) if !self.stored.is_empty() => {
                let at = self.stored.remove(usize::from(pick) % self.stored.len());
                let error = WireError::new(ErrorCode::Unavailable, "no");
                let reject = Reject { job: None, worker: Some(WORKER), at: Some(at), error };
                let actions = self.bench.engine.reject(reject, now);
                self.act(actions);
            }
            Step::Rejected(_) => {}
            Step::AnswersAsk(heard) => {
                if self.asks > 0 {
                    self.asks -= 1;
                    if heard {
                        let heads: Vec<_> = self.versions.iter().map(|version| head(*version)).collect();
                        let streams = vec![self.created; heads.len()];
                        let actions = self.bench.engine.heads(&heads, streams, now);
                        self.act(actions);
                    }
                }
            }
            Step::AnswersFetch(pick, heard) => {
                if !self.fetches.is_empty() {
                    let shard = self.fetches.remove(usize::from(pick) % self.fetches.len());
                    if heard {
                        self.result(shard);
                    }
                }
            }
            Step::Folds(pick) => {
                if !self.stored.is_empty() {
                    let at = self.stored.remove(usize::from(pick) % self.stored.len());
                    self.folded.push(at);
                }
            }
            Step::Drops => self.folded.clear(),
            Step::AnswersLook(pick, heard) => {
                if !self.looks.is_empty() {
                    let shard = self.looks.remove(usize::from(pick) % self.looks.len());
                    let version = self.versions[shard as usize];
                    let contained = self.folded.contains(&(shard, version + 1));
                    if heard {
                        let actions = self.bench.engine.looked(shard, head(version), contained, now);
                        self.act(actions);
                    }
                }
            }
            Step::Window(pick) => {
                let actions = self.bench.engine.window(u64::from(pick) * 4, 1, now);
                self.act(actions);
            }
            Step::Reconnected => {
                let actions = self.bench.engine.reconnected(now);
                self.act(actions);
            }
            Step::Pass(millis) => {
                self.bench.now += Duration::from_millis(u64::from(millis));
                let actions = self.bench.engine.tick(self.bench.now);
                self.act(actions);
            }
        }
    }

    /// Faults have stopped; the window may still be the least there is.
    fn finish(&mut self) {
        let mut quiet_since = self.bench.now;
        while self.versions.iter().any(|version| *version < ROUNDS) || !self.bench.engine.is_complete() {
            let round = self.bench.engine.round();
            (0..self.versions.len()).for_each(|shard| self.push(u32::try_from(shard).unwrap()));
            while !self.published.is_empty() {
                self.answer(0, true, true);
            }
            while !self.stored.is_empty() || !self.folded.is_empty() {
                self.close(0, true);
            }
            self.step(Step::AnswersAsk(true));
            while !self.looks.is_empty() {
                self.step(Step::AnswersLook(0, true));
            }
            while !self.fetches.is_empty() {
                self.step(Step::AnswersFetch(0, true));
            }
            self.step(Step::Pass(20));
            if self.bench.engine.round() > round {
                quiet_since = self.bench.now;
            }
            let timing = self.bench.engine.timing;
            let limit = timing.resend_after + timing.ask_after * (MOST_PATIENCE + 3);
            assert!(self.bench.now - quiet_since < limit, "round {round} does not end");
        }
        while !self.published.is_empty() {
            self.answer(0, true, true);
        }
        assert_eq!((self.bench.engine.in_flight, self.bench.engine.unconfirmed), (0, 0));
        assert_eq!(self.bench.engine.unsent_bytes(), 0);
        assert!(!self.bench.engine.is_active());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_round_completes_and_nothing_leaks(
        shards in 1..6_usize,
        window in 0..800_u64,
        steps in prop::collection::vec(step(), 0..300),
    ) {
        let mut run = Run::new(shards, window);
        for step in steps {
            run.step(step);
        }
        run.finish();
    }

    /// Workers with any windows, pushing in any order, never block each other (rule P20).
    #[test]
    fn workers_never_block_each_other(
        windows in prop::collection::vec(0..600_u64, 2..4),
        seed in any::<u64>(),
    ) {
        const SHARDS: u32 = 5;
        let mut runs: Vec<_> = windows.iter().map(|window| Run::new(SHARDS as usize, *window)).collect();
        for (index, run) in runs.iter_mut().enumerate() {
            let mut order: Vec<_> = (0..SHARDS).collect();
            if run.bench.engine.any_order() {
                order.rotate_left((seed >> (8 * index)) as usize % SHARDS as usize);
            }
            order.into_iter().for_each(|shard| run.push(shard));
        }
        for _ in 0..=SHARDS {
            for run in &mut runs {
                while !run.published.is_empty() {
                    run.answer(0, true, true);
                }
            }
            // A shard closes when every worker's contribution is there.
            for shard in 0..SHARDS {
                if runs.iter().all(|run| run.stored.contains(&(shard, 1))) {
                    for run in &mut runs {
                        run.versions[shard as usize] = 1;
                        run.result(shard);
                    }
                }
            }
        }
        prop_assert!(runs.iter().all(|run| run.bench.engine.is_complete()));
    }
}

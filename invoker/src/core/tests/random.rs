//! Random interleavings: whatever happens, every round counts every rank once, with the same bits.

use proptest::prelude::*;
use thalweg_protocol::{CommitOutcome, Incarnation, Rank, Round};

use super::{
    super::{Action, Core, Event, FoldError, Limits},
    model::{BYTES, PARTITION, Push, World},
    setup::{limits, name, spec, sum_in_rank_order, unavailable},
};

const RANKS: u32 = 3;
const SHARDS: u32 = 2;
const ROUNDS: Round = 3;

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A worker pushes what it may push next.
    Push(u8),
    /// A worker pushes something again.
    Again(u8),
    /// The broker delivers the next message, or any one again.
    Deliver,
    Redeliver(u8),
    /// Something that takes time is done; its answer is under way.
    Perform(u8),
    /// It is done, and its answer is lost, or it was not done.
    Fails(u8),
    Answer(u8),
    /// The partition is taken away and comes back; the process is killed and another takes over.
    Takeover(bool),
    Kill,
    Pass(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<u8>().prop_map(Step::Push),
        1 => any::<u8>().prop_map(Step::Again),
        6 => Just(Step::Deliver),
        1 => any::<u8>().prop_map(Step::Redeliver),
        6 => any::<u8>().prop_map(Step::Perform),
        1 => any::<u8>().prop_map(Step::Fails),
        6 => any::<u8>().prop_map(Step::Answer),
        1 => any::<bool>().prop_map(Step::Takeover),
        1 => Just(Step::Kill),
        2 => any::<u8>().prop_map(Step::Pass),
    ]
}

struct Run {
    world: World,
    answers: Vec<Event>,
    /// Everything pushed by now: what a worker may push again.
    pushed: Vec<Push>,
    /// Rounds and shards pushed, by rank.
    done: Vec<(Round, u32)>,
    next_delivery: u64,
    kills: u32,
    takeovers: u32,
}

impl Run {
    fn new(limits: Limits) -> Self {
        let mut world = World::with(limits);
        world.open(spec("j", RANKS), 1);
        world.redelivers = true;
        Self {
            world,
            answers: Vec::new(),
            pushed: Vec::new(),
            done: vec![(1, 0); RANKS as usize],
            next_delivery: 1,
            kills: 0,
            takeovers: 0,
        }
    }

    fn job(&self) -> Incarnation {
        Incarnation([1; 16])
    }

    fn push(&mut self, rank: Rank) {
        let (round, shard) = self.done[rank as usize];
        // Round r + 1 is pushed only with the results of r of all shards in hand (rule P7).
        let holds = |shard| self.world.head("j", shard).version + 1 >= round;
        if round > ROUNDS || !(0..SHARDS).all(holds) {
            return;
        }
        let push = self.world.gradient(rank, shard, round);
        self.world.enqueue(&push);
        self.pushed.push(push);
        self.done[rank as usize] = if shard + 1 == SHARDS { (round + 1, 0) } else { (round, shard + 1) };
    }

    fn deliver(&mut self) -> bool {
        let Some(sequence) = self.world.queue.range(self.next_delivery..).next().map(|(next, _)| *next)
        else {
            return false;
        };
        self.next_delivery = sequence + 1;
        self.world.deliver(sequence);
        true
    }

    fn take<T>(list: &mut Vec<T>, pick: u8) -> Option<T> {
        if list.is_empty() { None } else { Some(list.remove(usize::from(pick) % list.len())) }
    }

    /// Does something whose answer does not come, or fails before anything was done.
    fn fail(&mut self, action: Action, applied: bool) {
        let event = match action {
            Action::LookUp(key) | Action::FailJob(key, ..) => Event::LookUpFailed(key),
            Action::ReadHead(key) => Event::Head(key, Err(unavailable())),
            Action::Fold(id, _) => Event::Folded(id, Err(FoldError::Unavailable("away".into()))),
            Action::Commit(id, commit, state) => {
                if applied {
                    self.world.perform(Action::Commit(id, commit, state));
                }
                Event::Committed(id, Err(unavailable()))
            }
            Action::CommitPartial(id, commit, state) => {
                if applied {
                    self.world.perform(Action::CommitPartial(id, commit, state));
                }
                Event::Committed(id, Err(unavailable()))
            }
            _ => return,
        };
        self.answers.push(event);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Push(pick) => self.push(u32::from(pick) % RANKS),
            Step::Again(pick) => {
                if !self.pushed.is_empty() {
                    let push = self.pushed[usize::from(pick) % self.pushed.len()].clone();
                    self.world.enqueue(&push);
                }
            }
            Step::Deliver => {
                self.deliver();
            }
            Step::Redeliver(pick) => {
                // Only what was delivered before: an acknowledgement wait ran out.
                let known: Vec<_> = self.world.queue.range(..self.next_delivery).map(|(at, _)| *at).collect();
                if !known.is_empty() {
                    self.world.deliver(known[usize::from(pick) % known.len()]);
                }
            }
            Step::Perform(pick) => {
                if let Some(action) = Self::take(&mut self.world.pending, pick) {
                    let event = self.world.perform(action);
                    self.answers.extend(event);
                }
            }
            Step::Fails(pick) => {
                if let Some(action) = Self::take(&mut self.world.pending, pick) {
                    self.fail(action, pick % 2 == 0);
                }
            }
            Step::Answer(pick) => {
                if let Some(event) = Self::take(&mut self.answers, pick) {
                    self.world.tell(event);
                }
            }
            Step::Takeover(careful) => {
                self.world.tell(Event::Lost(PARTITION));
                let careful_until = careful.then_some(self.world.next_sequence - 1);
                self.world.tell(Event::Held { partition: PARTITION, careful_until, poison: None });
                self.next_delivery = 1;
                self.takeovers += 1;
            }
            Step::Kill => {
                // Requests on their way may still arrive; nobody hears their answers.
                for action in std::mem::take(&mut self.world.pending) {
                    if let commit @ (Action::Commit(..) | Action::CommitPartial(..)) = action {
                        self.world.perform(commit);
                    }
                }
                self.answers.clear();
                self.world.core = Core::new(self.world.core.limits);
                self.world.hold();
                self.next_delivery = 1;
                self.kills += 1;
            }
            Step::Pass(millis) => {
                self.world.now += u64::from(millis);
                self.world.tell(Event::Tick);
            }
        }
    }

    /// No more faults: everything must come to its end, in bounded time.
    fn finish(&mut self) {
        for _ in 0..200 {
            (0..RANKS).for_each(|rank| self.push(rank));
            while self.deliver() {}
            while let Some(event) = Self::take(&mut self.answers, 0) {
                self.world.tell(event);
            }
            self.world.settle();
            self.world.now += 100;
            self.world.tell(Event::Tick);
            self.world.settle();
            let complete = (0..SHARDS).all(|shard| self.world.head("j", shard).version == ROUNDS);
            if complete && self.world.queue.is_empty() && self.answers.is_empty() {
                return;
            }
        }
        panic!("not complete: {:?}, {:?}", self.world.history, self.world.queue.keys());
    }

    fn check(&self) {
        self.world.assert_idle();
        for shard in 0..SHARDS {
            let key = (self.job(), shard);
            let ledgers = &self.world.history[&key];
            assert_eq!(ledgers.iter().map(|ledger| ledger.round).collect::<Vec<_>>(), [1, 2, 3]);
            for ledger in ledgers {
                assert_eq!(ledger.counted.iter().collect::<Vec<_>>(), [0, 1, 2]);
                assert!(ledger.void.is_empty());
            }
            let state = self.world.state(key.0, shard);
            assert_eq!(state.values, sum_in_rank_order(0..RANKS, shard, ROUNDS));
            // Bits and history are those of an undisturbed run.
            assert_eq!(state.head, undisturbed(shard));
            let mut versions = self.world.published.get(&key).cloned().unwrap_or_default();
            versions.dedup();
            // A commit whose end is not heard is published again only if it still is the newest.
            if self.kills + self.takeovers == 0 {
                assert_eq!(versions, [1, 2, 3], "published without gaps");
            }
        }
        assert!(self.world.rejects.is_empty(), "{:?}", self.world.rejects);
        assert!(self.world.core.knows(&name("j")) || self.kills > 0);
    }
}

fn undisturbed(shard: u32) -> thalweg_protocol::Head {
    let mut world = World::running(RANKS, |_| ());
    (1..=ROUNDS).for_each(|round| drop(world.round(&[0, 1, 2], shard, round)));
    world.head("j", shard)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_rank_counts_once_whatever_happens(
        steps in prop::collection::vec(step(), 0..400),
        held in prop_oneof![Just(64 * BYTES), Just(2 * BYTES), Just(0)],
        invocations in 1..3_usize,
        partial_entries in prop_oneof![Just(usize::MAX), 1..3_usize],
        linger in prop_oneof![Just(1 << 40), 0..300_u64],
    ) {
        let early = Limits { partial_entries, linger, ..limits() };
        let mut run = Run::new(Limits { held_bytes: held, invocations, ..early });
        for step in steps {
            run.step(step);
        }
        run.finish();
        run.check();
    }
}

#[test]
fn a_commit_repeated_after_it_was_applied_answers_already_committed() {
    let mut run = Run::new(limits());
    (0..RANKS).for_each(|rank| run.push(rank));
    while run.deliver() {}
    while !matches!(run.world.pending.first(), Some(Action::Commit(..))) {
        let action = run.world.pending.remove(0);
        run.world.perform(action).into_iter().for_each(|event| run.world.tell(event));
    }
    let Action::Commit(id, commit, state) = run.world.pending.remove(0) else { panic!() };
    run.world.perform(Action::Commit(id, commit.clone(), state.clone()));
    let again = run.world.perform(Action::Commit(id, commit, state)).unwrap();
    assert!(matches!(again, Event::Committed(_, Ok(CommitOutcome::AlreadyCommitted(_)))));
    run.world.tell(again);
    run.finish();
    run.check();
}

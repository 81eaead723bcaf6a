//! What is taken in, what is refused, and how.

use bytes::Bytes;
use thalweg_protocol::{ErrorCode, Incarnation, JobState, Kind, WIRE_VERSION, frame, subjects};

use super::{
    super::{Action, Event},
    model::{Note, PARTITION, World},
    setup::{name, poisoned_error, spec, worker},
};

#[test]
fn bytes_that_are_no_contribution_go_to_the_dead_letters() {
    let world = World::running(1, |_| ());
    let good = world.gradient(0, 0, 1).frame();
    let mut changed = good.to_vec();
    *changed.last_mut().unwrap() ^= 1;
    let mut future = good.to_vec();
    // The prelude: array marker, then the wire version.
    future[1] = WIRE_VERSION + 1;
    let other_kind = frame::seal(Kind::Reject, &poisoned_error(), &[]);
    let cases = [
        (Bytes::from_static(b"hello"), ErrorCode::Malformed),
        (Bytes::new(), ErrorCode::Malformed),
        (good.slice(..good.len() - 3), ErrorCode::BadChecksum),
        (Bytes::from(changed), ErrorCode::BadChecksum),
        (Bytes::from(future), ErrorCode::WireVersion),
        (other_kind, ErrorCode::Malformed),
    ];
    for (bytes, code) in cases {
        let mut world = World::running(1, |_| ());
        let sequence = world.enqueue_bytes(subjects::gradient(PARTITION, &name("j"), 5), bytes);
        world.deliver(sequence);
        assert_eq!(world.take_notes(), [Note::Reject(5, code), Note::Dead(1, code)]);
        world.assert_idle();
    }
    let mut world = World::running(1, |_| ());
    let sequence = world.enqueue_bytes("thalweg.grad.0.nonsense".into(), good);
    world.deliver(sequence);
    assert_eq!(world.take_notes(), [Note::Dead(1, ErrorCode::Malformed)]);
    world.assert_idle();
}

#[test]
fn a_rank_that_is_not_its_subjects_is_dead_lettered_and_the_subject_hears_of_it() {
    let mut world = World::running(2, |_| ());
    let mut push = world.gradient(0, 0, 1);
    push.subject_rank = 1;
    world.give(&push);
    let code = ErrorCode::Malformed;
    assert_eq!(world.take_notes(), [Note::Reject(1, code), Note::Dead(1, code)]);
    world.assert_idle();
}

#[test]
fn what_cannot_belong_to_a_round_is_refused() {
    type Spoil = fn(&mut super::model::Push);
    let cases: [(Spoil, ErrorCode); 6] = [
        (|push| push.header.shard = 2, ErrorCode::WrongShape),
        (|push| push.partition = 1, ErrorCode::Malformed),
        (|push| push.header.worker = Incarnation([77; 16]), ErrorCode::LeaseLost),
        (|push| push.header.worker = worker(1), ErrorCode::LeaseLost),
        (|push| push.header.round = 0, ErrorCode::RoundAhead),
        (|push| push.header.job = Incarnation([2; 16]), ErrorCode::Gone),
    ];
    for (spoil, code) in cases {
        let mut world = World::running(2, |_| ());
        let mut push = world.gradient(0, 0, 1);
        spoil(&mut push);
        world.give(&push);
        world.after(100);
        let notes: Vec<_> =
            world.take_notes().into_iter().filter(|note| !matches!(note, Note::LookUp)).collect();
        assert_eq!(notes, [Note::Reject(0, code), Note::Ack(1)]);
        world.assert_idle();
    }
}

#[test]
fn tenures_bound_the_rounds_of_a_worker() {
    let mut world = World::running(2, |_| ());
    world.change("j", |_, roster| {
        roster.members[0].until_round = Some(1);
        roster.members[1].from_round = 2;
    });
    for rank in [0, 1] {
        let push = world.gradient(rank, 0, 1);
        world.give(&push);
        assert_eq!(world.rejects.last().unwrap().2.error.code, ErrorCode::LeaseLost);
    }
    world.assert_idle();
}

#[test]
fn rounds_beyond_the_next_wait_for_a_fresh_head() {
    for (ahead, code) in [(2, ErrorCode::Diverged), (3, ErrorCode::RoundAhead), (90, ErrorCode::RoundAhead)] {
        let mut world = World::running(2, |_| ());
        world.round(&[0, 1], 0, 1);
        world.take_notes();
        let push = world.gradient(0, 0, 1 + ahead);
        let sequence = world.enqueue(&push);
        world.deliver(sequence);
        // Held until the head, read after it came, says that it cannot be.
        assert_eq!(world.take_notes(), [Note::ReadHead(0)]);
        assert!(world.queue.contains_key(&sequence));
        world.settle();
        let fails = code == ErrorCode::Diverged;
        assert_eq!(world.rejects[0].2.error.code, code);
        assert_eq!(world.take_notes().contains(&Note::Fail(code)), fails);
        world.assert_idle();
    }
}

#[test]
fn a_round_ahead_is_held_while_another_holder_is_ahead() {
    let mut world = World::running(1, |_| ());
    world.round(&[0], 0, 1);
    // What another holder commits is not known here.
    let mut other = World::running(1, |_| ());
    std::mem::swap(&mut world.store, &mut other.store);
    other.round(&[0], 0, 2);
    std::mem::swap(&mut world.store, &mut other.store);
    let push = world.gradient(0, 0, 3);
    world.give(&push);
    assert_eq!(world.head("j", 0).version, 3);
    assert!(world.rejects.is_empty());
    world.assert_idle();
}

#[test]
fn a_round_ahead_waits_for_the_commit_under_way() {
    let mut world = World::running(1, |_| ());
    let push = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    while !world.pending.iter().all(|action| matches!(action, Action::Commit(..))) {
        let action = world.pending.remove(0);
        world.perform(action).into_iter().for_each(|event| world.tell(event));
    }
    let commit = world.pending.remove(0);
    let answer = world.perform(commit).unwrap();
    // Committed in the store; the answer is on its way, and so is the worker's next contribution.
    let next = world.gradient(0, 0, 2);
    let sequence = world.enqueue(&next);
    world.deliver(sequence);
    assert!(world.rejects.is_empty());
    world.tell(answer);
    world.settle();
    assert_eq!(world.head("j", 0).version, 2);
    world.assert_idle();
}

#[test]
fn another_past_is_divergence_only_by_a_fresh_head_and_fails_the_job() {
    let mut world = World::running(2, |_| ());
    world.round(&[0, 1], 0, 1);
    let mut push = world.gradient(0, 0, 2);
    push.header.base = thalweg_protocol::StateId([3; 16]);
    let sequence = world.enqueue(&push);
    world.take_notes();
    world.deliver(sequence);
    assert_eq!(world.take_notes(), [Note::ReadHead(0)]);
    world.settle();
    assert_eq!(
        world.take_notes(),
        [Note::Reject(0, ErrorCode::Diverged), Note::Ack(3), Note::Fail(ErrorCode::Diverged)]
    );
    world.assert_idle();
}

/// The round was found complete while all invocations were busy; then a contribution from another past
/// came. It must not slip in.
#[test]
fn doubts_stop_a_round_that_waits_for_its_turn() {
    let limits = super::super::Limits { invocations: 1, ..super::setup::limits() };
    let mut world = World::with(limits);
    let mut spec = spec("j", 3);
    spec.quorum = Some(2);
    world.open(spec, 1);
    world.round(&[0, 1], 0, 1);
    world.round(&[0, 1], 1, 1);
    world.now += 1000;
    // Shard 0 is folded, shard 1 waits.
    world.tell(Event::Tick);
    assert_eq!(world.pending.len(), 1);
    let mut push = world.gradient(2, 1, 1);
    push.header.base = thalweg_protocol::StateId([3; 16]);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    // Shard 0 is done, a turn is free, and the head of shard 1 is still being read.
    let at = world.pending.iter().position(|action| matches!(action, Action::ReadHead(_))).unwrap();
    let read = world.pending.remove(at);
    world.settle();
    assert_eq!(world.history.len(), 1);
    world.pending.push(read);
    world.settle();
    let diverged = world.history.get(&(Incarnation([1; 16]), 1));
    assert!(diverged.is_none(), "{diverged:?}");
    world.assert_idle();
}

#[test]
fn an_unknown_job_is_looked_up_until_the_registry_answers() {
    let mut world = World::new();
    world.open(spec("j", 1), 1);
    let push = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    for _ in 0..5 {
        assert_eq!(world.take_notes(), [Note::LookUp]);
        world.pending.clear();
        world.tell(Event::LookUpFailed(name("j")));
        world.now += 99;
        world.tell(Event::Tick);
        assert_eq!(world.take_notes(), []);
        world.now += 1;
        world.tell(Event::Tick);
    }
    world.settle();
    assert_eq!(world.head("j", 0).version, 1);
    world.assert_idle();
}

#[test]
fn only_a_look_up_begun_later_says_that_a_job_is_gone() {
    let mut world = World::new();
    world.open(spec("j", 1), 1);
    let mut leftover = world.gradient(0, 0, 1);
    leftover.header.job = Incarnation([9; 16]);
    let gone = world.registry.insert(name("j"), None).unwrap();
    let first = world.enqueue(&leftover);
    world.deliver(first);
    let look_up = world.pending.remove(0);
    let before = world.perform(look_up).unwrap();
    // The job is created after the registry was read, and its first contribution comes.
    world.registry.insert(name("j"), gone);
    let push = world.gradient(0, 0, 1);
    let second = world.enqueue(&push);
    world.deliver(second);
    world.tell(before);
    world.settle();
    world.after(100);
    assert_eq!(world.head("j", 0).version, 1);
    let rejected: Vec<_> = world.rejects.iter().map(|(_, _, reject)| reject.job.unwrap()).collect();
    assert_eq!(rejected, [Incarnation([9; 16])]);
    world.assert_idle();
}

#[test]
fn a_job_that_is_gone_or_lives_again_gives_its_leftovers_back() {
    for again in [false, true] {
        let mut world = World::running(2, |_| ());
        world.round(&[0], 0, 1);
        world.round(&[1], 1, 1);
        if again {
            world.open(spec("j", 2), 2);
        } else {
            world.registry.insert(name("j"), None);
        }
        world.take_notes();
        world.hint("j");
        let notes = world.take_notes();
        assert_eq!(notes.iter().filter(|note| matches!(note, Note::Reject(_, ErrorCode::Gone))).count(), 2);
        world.assert_idle();
        assert_eq!(world.core.knows(&name("j")), again);
        if again {
            world.round(&[0, 1], 0, 1);
            assert_eq!(world.head("j", 0).version, 1);
        }
    }
}

#[test]
fn a_roster_newer_than_the_registrys_is_nonsense_in_the_end() {
    let mut world = World::running(1, |_| ());
    let mut push = world.gradient(0, 0, 1);
    push.header.roster_epoch = 99;
    world.give(&push);
    for _ in 0..30 {
        world.after(100);
    }
    assert!(world.notes.contains(&Note::Dead(1, ErrorCode::Malformed)));
    world.assert_idle();
}

/// The hint that parameters are there may be lost: a contribution makes sure.
#[test]
fn a_job_without_parameters_is_looked_up_before_it_is_refused() {
    let mut world = World::running(1, |_| ());
    let running = world.job("j");
    world.change("j", |record, _| record.state = JobState::Initialising);
    world.hint("j");
    let push = world.gradient(0, 0, 1);
    world.give(&push);
    assert_eq!(world.rejects.last().unwrap().2.error.code, ErrorCode::NotReady);
    world.change("j", |record, _| record.state = running.record.state.clone());
    let mut push = world.gradient(0, 0, 1);
    // The roster says nothing about parameters.
    push.header.roster_epoch = running.roster.epoch;
    world.give(&push);
    assert_eq!(world.head("j", 0).version, 1);
    world.assert_idle();
}

#[test]
fn jobs_do_not_disturb_each_other() {
    let mut world = World::new();
    world.open(spec("j", 2), 1);
    world.open(spec("k", 2), 2);
    for job in ["j", "k"] {
        let push = world.gradient_of(job, 0, 0, 1);
        world.give(&push);
    }
    world.registry.insert(name("k"), None);
    world.hint("k");
    let push = world.gradient_of("j", 1, 0, 1);
    world.give(&push);
    assert_eq!(world.head("j", 0).version, 1);
    assert_eq!(world.history.len(), 1);
    assert!(world.rejects.iter().all(|(key, _, _)| *key == name("k")));
    world.assert_idle();
}

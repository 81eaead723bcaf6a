//! Rounds that last: what is folded early, in which order, and what becomes of it (rule P12).

use thalweg_protocol::{FoldOrder, Incarnation, Kind, Member, Nudge, frame, subjects};
use thalweg_store::ShardStore as _;

use super::{
    super::{Core, Limits, Millis},
    model::{Note, PARTITION, World, now_or_never},
    setup::{limits, name, spec, sum_in_rank_order, worker},
};

/// What the tests let contributions wait.
const LINGER: Millis = 10_000;

/// A world in which rounds are folded early, with one job of `workers`.
fn lasting(workers: u32, change: impl FnOnce(&mut thalweg_protocol::JobSpec)) -> World {
    let mut world = World::with(Limits { linger: LINGER, ..limits() });
    let mut spec = spec("j", workers);
    change(&mut spec);
    world.open(spec, 1);
    world
}

fn by_arrival(spec: &mut thalweg_protocol::JobSpec) {
    spec.policy.order = FoldOrder::Arrival;
}

/// Another process takes over; the broker delivers again what is left.
fn taken_over(world: &mut World) {
    world.core = Core::new(world.core.limits);
    world.redelivers = true;
    world.hold();
    for sequence in world.queue.keys().copied().collect::<Vec<_>>() {
        world.deliver(sequence);
    }
    world.settle();
}

fn nudge(world: &mut World) -> u64 {
    let nudge = Nudge { job: Incarnation([1; 16]), shard: 0 };
    let subject = subjects::gradient(PARTITION, &name("j"), 0);
    let sequence = world.enqueue_bytes(subject, frame::seal(Kind::Nudge, &nudge, &[]));
    world.deliver(sequence);
    world.settle();
    world.after(100);
    sequence
}

fn folds(world: &mut World) -> Vec<Note> {
    let kept = |note: &Note| matches!(note, Note::Fold(..) | Note::Partial(..) | Note::Commit(..));
    world.take_notes().into_iter().filter(kept).collect()
}

#[test]
fn in_rank_order_what_nobody_is_missing_before_is_folded_after_a_while() {
    let mut world = lasting(4, |_| ());
    world.round(&[3, 1, 0], 0, 1);
    world.after(LINGER - 1);
    assert_eq!(folds(&mut world), []);
    world.after(1);
    assert_eq!(folds(&mut world), [Note::Fold(0, 1, vec![0, 1]), Note::Partial(0, 1, 2)]);
    assert_eq!(world.queue.keys().copied().collect::<Vec<_>>(), [1], "what is folded has left the queue");
    let before = world.state(Incarnation([1; 16]), 0);
    assert_eq!((before.head.version, before.head.fold_count), (0, 0), "readers see no open round");
    taken_over(&mut world);
    world.round(&[2], 0, 1);
    assert_eq!(folds(&mut world), [Note::Fold(0, 1, vec![2, 3]), Note::Commit(0, 1)]);
    let after = world.state(Incarnation([1; 16]), 0);
    assert_eq!(after.values, sum_in_rank_order(0..4, 0, 1));
    let mut at_once = World::running(4, |_| ());
    at_once.round(&[0, 1, 2, 3], 0, 1);
    assert_eq!(after.head, at_once.head("j", 0), "the same history as without");
    world.assert_idle();
}

#[test]
fn on_arrival_all_that_came_is_folded_and_the_order_is_recorded() {
    let mut world = lasting(4, by_arrival);
    world.round(&[3, 1], 0, 1);
    world.after(LINGER);
    assert_eq!(folds(&mut world), [Note::Fold(0, 1, vec![3, 1]), Note::Partial(0, 1, 2)]);
    world.round(&[2, 0], 0, 1);
    let state = world.state(Incarnation([1; 16]), 0);
    assert_eq!(state.ledger.order, [3, 1, 2, 0]);
    assert_eq!(state.values, sum_in_rank_order([3, 1, 2, 0].into_iter(), 0, 1));
    world.assert_idle();
}

#[test]
fn many_contributions_or_many_bytes_do_not_wait() {
    for limits in [Limits { partial_entries: 2, ..limits() }, Limits { held_bytes: 128, ..limits() }] {
        let mut world = World::with(limits);
        world.open(spec("j", 4), 1);
        world.round(&[0], 0, 1);
        assert_eq!(folds(&mut world), []);
        world.round(&[1], 0, 1);
        assert_eq!(folds(&mut world), [Note::Fold(0, 1, vec![0, 1]), Note::Partial(0, 1, 2)]);
    }
}

#[test]
fn void_contributions_are_part_of_an_open_round_as_well() {
    let mut world = lasting(3, |_| ());
    let mut push = world.gradient(0, 0, 1);
    push.header.void = true;
    world.give(&push);
    world.after(LINGER);
    assert_eq!(folds(&mut world), [Note::Fold(0, 1, vec![]), Note::Partial(0, 1, 1)]);
    world.round(&[1, 2], 0, 1);
    let state = world.state(Incarnation([1; 16]), 0);
    assert_eq!(state.ledger.void.iter().collect::<Vec<_>>(), [0]);
    assert_eq!(state.values, sum_in_rank_order(1..3, 0, 1));
}

#[test]
fn what_an_open_round_contains_is_not_folded_again() {
    let mut world = lasting(3, |_| ());
    world.round(&[0], 0, 1);
    world.after(LINGER);
    let again = world.gradient(0, 0, 1);
    world.give(&again);
    assert!(world.queue.is_empty(), "acknowledged: it is in the round");
    taken_over(&mut world);
    world.give(&again);
    assert!(world.queue.is_empty(), "by the next holder, too");
    world.round(&[1, 2], 0, 1);
    assert_eq!(world.state(Incarnation([1; 16]), 0).values, sum_in_rank_order(0..3, 0, 1));
    world.assert_idle();
}

#[test]
fn whoever_was_folded_stays_counted_after_leaving() {
    let mut world = lasting(3, |_| ());
    world.round(&[0], 0, 1);
    world.after(LINGER);
    world.change("j", |_, roster| roster.members[0].until_round = Some(1));
    world.hint("j");
    world.round(&[1, 2], 0, 1);
    let state = world.state(Incarnation([1; 16]), 0);
    assert_eq!(state.ledger.counted.len(), 3);
    assert_eq!(state.values, sum_in_rank_order(0..3, 0, 1));
    world.assert_idle();
}

/// A job that everybody had left: its open round is fenced, and the rank is another worker's.
#[test]
fn a_fence_on_the_open_round_drops_what_was_folded() {
    let mut world = lasting(2, |_| ());
    world.round(&[0], 0, 1);
    world.after(LINGER);
    assert_eq!(folds(&mut world).len(), 2);
    world.change("j", |_, roster| {
        let other = Member { incarnation: worker(9), ..roster.members[0].clone() };
        roster.members = vec![other];
    });
    let job = world.job("j");
    now_or_never(world.store.fence(job.record.incarnation, job.roster.epoch, 1)).unwrap();
    world.hint("j");
    let mut push = world.gradient(0, 0, 1);
    push.header.worker = worker(9);
    push.values = vec![1.0; push.values.len()];
    world.give(&push);
    let state = world.state(Incarnation([1; 16]), 0);
    assert_eq!((state.head.version, state.ledger.counted.len()), (1, 1));
    assert!(state.values.chunks(4).all(|value| value == 1.0_f32.to_le_bytes()), "only the newcomer's");
    world.assert_idle();
}

#[test]
fn a_deadline_closes_a_round_that_has_left_the_queue() {
    let quorum = |spec: &mut thalweg_protocol::JobSpec| (spec.quorum, spec.deadline_ms) = (Some(2), 60_000);
    let mut world = lasting(3, quorum);
    world.round(&[0, 1], 0, 1);
    world.after(LINGER);
    assert!(world.queue.is_empty());
    // Nobody is there any more: the gateway's nudge brings somebody.
    taken_over(&mut world);
    let early = nudge(&mut world);
    assert!(world.acknowledged.contains(&early), "not due: heard, and nothing is kept");
    assert_eq!(world.head("j", 0).version, 0);
    world.now += 60_000;
    taken_over(&mut world);
    nudge(&mut world);
    let state = world.state(Incarnation([1; 16]), 0);
    assert_eq!((state.head.version, state.ledger.counted.len()), (1, 2));
    world.assert_idle();
}

#[test]
fn a_departure_closes_a_round_that_has_left_the_queue() {
    let mut world = lasting(2, |_| ());
    world.round(&[0], 0, 1);
    world.after(LINGER);
    taken_over(&mut world);
    world.change("j", |_, roster| roster.members[1].until_round = Some(1));
    nudge(&mut world);
    assert_eq!(world.head("j", 0).version, 1);
    world.assert_idle();
}

#[test]
fn nothing_is_folded_early_while_a_job_is_paused() {
    let mut world = lasting(2, |_| ());
    world.change("j", |record, _| record.life.paused = Some("maintenance".to_owned()));
    world.round(&[0], 0, 1);
    world.after(LINGER);
    assert_eq!(folds(&mut world), []);
    world.change("j", |record, _| record.life.paused = None);
    world.hint("j");
    world.settle();
    assert_eq!(folds(&mut world).len(), 2);
}

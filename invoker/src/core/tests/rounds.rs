//! When a round closes, with whom, and in which order things become visible.

use thalweg_protocol::{CommitOutcome, ErrorCode, Member, NonFinite, WireError};
use thalweg_store::{ShardStore as _, StoreError};

use super::{
    super::{Action, Event, FoldError, Limits},
    model::{BYTES, Note, World, now_or_never},
    setup::{limits, name, sum_in_rank_order, unavailable, worker},
};

/// The pending action that `wanted` accepts, taken out.
fn take(world: &mut World, wanted: impl Fn(&Action) -> bool) -> Action {
    let at = world.pending.iter().position(wanted).expect("no such action is pending");
    world.pending.remove(at)
}

fn is_commit(action: &Action) -> bool {
    matches!(action, Action::Commit(..))
}

/// Performs everything up to the commit, which stays pending.
fn up_to_commit(world: &mut World) {
    while let Some(at) = world.pending.iter().position(|action| !is_commit(action)) {
        let action = world.pending.remove(at);
        if let Some(event) = world.perform(action) {
            world.tell(event);
        }
    }
}

#[test]
fn a_round_closes_exactly_when_every_member_has_contributed() {
    let mut world = World::running(3, |_| ());
    assert_eq!(world.round(&[0, 2], 0, 1), [1, 2]);
    world.after(1_000_000);
    assert_eq!(world.take_notes(), [Note::LookUp, Note::ReadHead(0)], "no deadline without a quorum");
    world.round(&[1], 0, 1);
    let expected = [
        Note::Fold(0, 1, vec![0, 1, 2]),
        Note::Commit(0, 1),
        Note::Publish(0, 1),
        Note::Ack(1),
        Note::Ack(3),
        Note::Ack(2),
    ];
    assert_eq!(world.take_notes(), expected);
    world.assert_idle();
}

#[test]
fn contributions_are_folded_in_rank_order_whatever_the_order_of_arrival() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut world = World::running(3, |_| ());
        world.round(&order, 1, 1);
        let job = world.job("j").record.incarnation;
        assert_eq!(world.state(job, 1).values, sum_in_rank_order(0..3, 1, 1), "{order:?}");
    }
}

#[test]
fn nothing_is_published_or_acknowledged_before_the_commit_has_returned() {
    let mut world = World::running(2, |_| ());
    for rank in 0..2 {
        let push = world.gradient(rank, 0, 1);
        let sequence = world.enqueue(&push);
        world.deliver(sequence);
    }
    up_to_commit(&mut world);
    let visible = |note: &Note| matches!(note, Note::Publish(..) | Note::Ack(_) | Note::Republish(_));
    assert!(!world.take_notes().iter().any(visible));
    assert_eq!(world.queue.len(), 2);
    world.settle();
    assert_eq!(world.take_notes(), [Note::Publish(0, 1), Note::Ack(1), Note::Ack(2)]);
}

#[test]
fn an_unanswered_commit_is_repeated_and_found_committed() {
    let mut world = World::running(1, |_| ());
    let push = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    up_to_commit(&mut world);
    let commit = take(&mut world, is_commit);
    let Some(Event::Committed(id, Ok(CommitOutcome::Committed(_)))) = world.perform(commit) else { panic!() };
    world.take_notes();
    world.tell(Event::Committed(id, Err(unavailable())));
    assert_eq!(world.take_notes(), []);
    world.after(100);
    assert_eq!(world.take_notes(), [Note::Commit(0, 1), Note::Publish(0, 1), Note::Ack(1)]);
    assert_eq!(world.history.values().flatten().count(), 1);
    world.assert_idle();
}

#[test]
fn a_conflict_is_settled_by_what_the_store_has() {
    let mut world = World::running(2, |_| ());
    world.round(&[0], 0, 1);
    let last = world.gradient(1, 0, 1);
    let sequence = world.enqueue(&last);
    world.deliver(sequence);
    up_to_commit(&mut world);
    // Another holder closed the round with rank 0 alone, say by a quorum.
    let Some(Action::Commit(_, commit, state)) = world.pending.iter().find(|action| is_commit(action)) else {
        panic!()
    };
    let mut theirs = commit.clone();
    theirs.ledger.counted = [0].into_iter().collect();
    now_or_never(world.store.commit(theirs, state.clone())).unwrap();
    world.take_notes();
    world.settle();
    let settled = world.take_notes();
    // The duplicate and the late one are both acknowledged; one publication of the stored version.
    assert_eq!(settled, [Note::ReadHead(0), Note::Ack(1), Note::Ack(2), Note::Republish(0)]);
    world.assert_idle();
    // Once per version: whoever misses that one asks the store.
    let mut again = last;
    again.header.base = world.head("j", 0).state_id;
    world.give(&again);
    assert_eq!(world.take_notes(), [Note::Ack(3)]);
    world.round(&[0, 1], 0, 2);
    let late = world.gradient(0, 0, 2);
    world.take_notes();
    world.give(&late);
    assert_eq!(world.take_notes(), [Note::Ack(6), Note::Republish(0)], "the next version, once more");
}

#[test]
fn the_same_contribution_twice_counts_once() {
    let mut world = World::running(2, |_| ());
    let push = world.gradient(0, 0, 1);
    let first = world.give(&push);
    // The same message again, then the same contribution pushed again.
    world.deliver(first);
    assert!(world.queue.contains_key(&first));
    let mut other = push;
    other.values = vec![1.0; 4];
    let second = world.give(&other);
    assert!(!world.queue.contains_key(&second), "the first in stream order wins");
    world.round(&[1], 0, 1);
    let job = world.job("j").record.incarnation;
    assert_eq!(world.state(job, 0).values, sum_in_rank_order(0..2, 0, 1));
    world.assert_idle();
}

#[test]
fn a_quorum_closes_at_the_deadline_by_the_brokers_clock() {
    let mut world = World::running(3, |spec| spec.quorum = Some(2));
    world.round(&[0], 0, 1);
    // One alone is below the quorum: no deadline closes it.
    world.after(400);
    world.round(&[2], 0, 1);
    assert_eq!(world.core.next_tick(), Some(1_001_000), "counted from the first contribution");
    world.after(599);
    assert!(world.history.is_empty());
    world.after(1);
    let ledger = world.history.values().next().unwrap()[0].clone();
    assert_eq!(ledger.counted.iter().collect::<Vec<_>>(), [0, 2]);
    assert!(!ledger.below_quorum);
    // Late: acknowledged, not counted.
    let mut late = world.gradient(1, 0, 1);
    late.header.base = worker_base();
    world.take_notes();
    world.give(&late);
    assert_eq!(world.take_notes(), [Note::Ack(3), Note::Republish(0)]);
    world.assert_idle();
}

fn worker_base() -> thalweg_protocol::StateId {
    thalweg_protocol::StateId([7; 16])
}

#[test]
fn a_contribution_between_close_and_commit_is_late() {
    let mut world = World::running(3, |spec| spec.quorum = Some(2));
    world.round(&[0, 1], 0, 1);
    let late = world.gradient(2, 0, 1);
    world.now += 1000;
    world.tell(Event::Tick);
    up_to_commit(&mut world);
    let sequence = world.enqueue(&late);
    world.deliver(sequence);
    world.settle();
    assert_eq!(world.history.values().next().unwrap()[0].counted.len(), 2);
    world.assert_idle();
}

#[test]
fn a_deadline_that_moves_is_waited_for_again() {
    let mut world = World::running(2, |spec| spec.quorum = Some(1));
    world.round(&[0], 0, 1);
    world.after(500);
    // Rank 0 leaves with its contribution; rank 1 begins the round anew.
    world.change("j", |_, roster| roster.members[0].until_round = Some(1));
    world.change("j", |_, roster| {
        let (rank, from_round) = (2, 1);
        let member = Member { rank, incarnation: worker(2), from_round, ..roster.members[1].clone() };
        roster.members.push(member);
    });
    world.hint("j");
    assert!(world.queue.is_empty());
    world.after(100);
    world.round(&[1], 0, 1);
    world.after(400);
    assert!(world.history.is_empty(), "that was the old deadline");
    world.after(600);
    assert_eq!(world.history.len(), 1);
    world.assert_idle();
}

#[test]
fn a_round_settled_below_its_quorum_closes_and_says_so() {
    let mut world = World::running(2, |spec| spec.quorum = Some(2));
    world.round(&[0], 0, 1);
    let mut void = world.gradient(1, 0, 1);
    void.header.void = true;
    world.give(&void);
    let ledger = &world.history.values().next().unwrap()[0];
    assert!(ledger.below_quorum);
    assert_eq!((ledger.counted.len(), ledger.void.iter().collect::<Vec<_>>()), (1, vec![1]));
    world.assert_idle();
}

#[test]
fn a_round_of_voids_leaves_the_state_as_it_is() {
    let mut world = World::running(1, |_| ());
    world.round(&[0], 0, 1);
    let job = world.job("j").record.incarnation;
    let before = world.state(job, 0);
    let mut void = world.gradient(0, 0, 2);
    void.header.void = true;
    world.give(&void);
    let after = world.state(job, 0);
    assert_eq!((after.head.version, after.values), (2, before.values));
    assert!(after.ledger.counted.is_empty() && after.ledger.void.contains(0));
}

#[test]
fn wrong_values_become_voids_and_their_sender_hears_of_it() {
    type Spoil = fn(&mut super::model::Push);
    let cases: [(NonFinite, Spoil, Option<ErrorCode>); 6] = [
        (NonFinite::Void, |push| push.values[2] = f32::NAN, Some(ErrorCode::NonFinite)),
        (NonFinite::Void, |push| push.values[2] = f32::INFINITY, Some(ErrorCode::NonFinite)),
        (NonFinite::Propagate, |push| push.values[2] = f32::NAN, None),
        (NonFinite::Propagate, |push| push.values.truncate(3), Some(ErrorCode::WrongShape)),
        (NonFinite::Propagate, |push| push.header.elements = 5, Some(ErrorCode::WrongShape)),
        (NonFinite::Propagate, |push| push.header.weight = -1.0, Some(ErrorCode::Malformed)),
    ];
    for (policy, spoil, code) in cases {
        let mut world = World::running(2, |spec| spec.non_finite = policy);
        let mut push = world.gradient(0, 0, 1);
        spoil(&mut push);
        world.give(&push);
        assert_eq!(world.rejects.first().map(|(_, _, reject)| reject.error.code), code);
        assert!(world.queue.contains_key(&1), "it stays until the round is committed");
        world.round(&[1], 0, 1);
        let ledger = &world.history.values().next().unwrap()[0];
        assert_eq!(ledger.void.contains(0), code.is_some());
        assert_eq!(ledger.counted.contains(0), code.is_none());
        world.assert_idle();
    }
}

#[test]
fn the_policy_fail_ends_the_job_and_no_round_closes_meanwhile() {
    let mut world = World::running(1, |spec| spec.non_finite = NonFinite::Fail);
    let mut push = world.gradient(0, 0, 1);
    push.values[0] = f32::NAN;
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    // The registry does not take the failure at first.
    while !matches!(world.pending.first(), None | Some(Action::FailJob(..))) {
        let action = world.pending.remove(0);
        if let Some(event) = world.perform(action) {
            world.tell(event);
        }
    }
    world.pending.retain(|action| !matches!(action, Action::FailJob(..)));
    world.tell(Event::LookUpFailed(name("j")));
    world.settle();
    assert!(world.history.is_empty());
    world.after(100);
    let codes: Vec<_> = world.rejects.iter().map(|(_, _, reject)| reject.error.code).collect();
    assert_eq!(codes, [ErrorCode::NonFinite, ErrorCode::JobFailed]);
    assert!(world.history.is_empty());
    world.assert_idle();
    // From now on everything is refused.
    let push = world.gradient(0, 1, 1);
    world.give(&push);
    assert_eq!(world.rejects.last().unwrap().2.error.code, ErrorCode::JobFailed);
    world.assert_idle();
}

#[test]
fn a_function_that_fails_ends_its_job_and_blocks_nobody() {
    let mut world = World::running(1, |_| ());
    let push = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    while let Some(at) = world.pending.iter().position(|action| !matches!(action, Action::Fold(..))) {
        let action = world.pending.remove(at);
        world.perform(action).into_iter().for_each(|event| world.tell(event));
    }
    let Action::Fold(id, _) = world.pending.remove(0) else { panic!() };
    world.tell(Event::Folded(id, Err(FoldError::Function("divided by zero".into()))));
    assert_eq!(world.core.invocations(), 0);
    world.pending.clear();
    world.tell(Event::LookUpFailed(name("j")));
    world.after(100);
    assert_eq!(world.rejects.last().unwrap().2.error.code, ErrorCode::JobFailed);
    assert_eq!(world.notes.iter().filter(|note| matches!(note, Note::Fold(..))).count(), 1);
    world.assert_idle();
}

#[test]
fn payloads_over_the_budget_are_parked_and_read_back() {
    let mut world = World::with(Limits { held_bytes: 2 * BYTES, ..limits() });
    world.open(super::setup::spec("j", 4), 1);
    world.round(&[3, 1, 2], 0, 1);
    assert_eq!((world.core.held_bytes(), world.core.held_messages()), (2 * BYTES, 3));
    world.round(&[0], 0, 1);
    let job = world.job("j").record.incarnation;
    assert_eq!(world.state(job, 0).values, sum_in_rank_order(0..4, 0, 1));
    world.assert_idle();
}

#[test]
fn a_parked_contribution_that_is_gone_is_waited_for_again() {
    let mut world = World::with(Limits { held_bytes: 0, ..limits() });
    world.open(super::setup::spec("j", 2), 1);
    let parked = world.gradient(0, 0, 1);
    let sequence = world.give(&parked);
    // The stream was created again.
    world.queue.remove(&sequence);
    world.round(&[1], 0, 1);
    assert!(world.history.is_empty());
    world.after(10_000);
    world.give(&parked);
    let job = world.job("j").record.incarnation;
    assert_eq!(world.state(job, 0).values, sum_in_rank_order(0..2, 0, 1));
    world.assert_idle();
}

#[test]
fn a_store_that_is_away_is_asked_again_and_one_that_refuses_fails_the_job() {
    let mut world = World::running(1, |_| ());
    let push = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    let look_up = world.pending.remove(0);
    let event = world.perform(look_up).unwrap();
    world.tell(event);
    let Action::ReadHead(key) = world.pending.remove(0) else { panic!() };
    world.tell(Event::Head(key, Err(unavailable())));
    assert!(world.pending.is_empty());
    world.now += 100;
    world.tell(Event::Tick);
    let Action::ReadHead(key) = world.pending.remove(0) else { panic!() };
    // Of another release for now, as in the middle of an upgrade.
    let error = WireError::new(ErrorCode::WireVersion, "theirs and ours");
    world.tell(Event::Head(key, Err(StoreError::Refused(error))));
    assert!(world.pending.is_empty(), "no job fails of that");
    world.now += 100;
    world.tell(Event::Tick);
    let Action::ReadHead(key) = world.pending.remove(0) else { panic!() };
    let error = WireError::new(ErrorCode::StoreMismatch, "another disk");
    world.tell(Event::Head(key, Err(StoreError::Refused(error))));
    world.settle();
    assert_eq!(world.rejects.last().unwrap().2.error.code, ErrorCode::JobFailed);
    world.assert_idle();
}

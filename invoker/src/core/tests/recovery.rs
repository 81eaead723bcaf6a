//! Changes of hands and of rosters, and contributions that kill.

use thalweg_protocol::{ErrorCode, JobState, Member};
use thalweg_store::ShardStore as _;

use crate::holdings::Rest;

use super::{
    super::{Action, Event},
    model::{Note, PARTITION, World, now_or_never},
    setup::{name, spec, sum_in_rank_order, worker},
};

fn held(world: &mut World, careful_until: Option<u64>, poison: Option<u64>) {
    world.tell(Event::Lost(PARTITION));
    assert_eq!((world.core.held_bytes(), world.core.held_messages(), world.core.invocations()), (0, 0, 0));
    world.tell(Event::Held { partition: PARTITION, careful_until, poison });
}

fn redeliver(world: &mut World) {
    for sequence in world.queue.keys().copied().collect::<Vec<_>>() {
        world.deliver(sequence);
    }
}

fn newcomer(world: &mut World, rank: u32, from_round: u64) {
    world.change("j", |_, roster| {
        let member = Member { rank, incarnation: worker(rank), from_round, ..roster.members[0].clone() };
        roster.members.push(member);
    });
}

#[test]
fn a_partition_lost_and_held_again_gathers_anew() {
    let mut world = World::running(3, |_| ());
    world.round(&[0, 1], 0, 1);
    held(&mut world, None, None);
    world.round(&[2], 0, 1);
    assert!(world.history.is_empty());
    redeliver(&mut world);
    world.settle();
    let job = world.job("j").record.incarnation;
    assert_eq!(world.state(job, 0).values, sum_in_rank_order(0..3, 0, 1));
    world.assert_idle();
}

#[test]
fn a_partition_that_is_not_ours_is_not_touched() {
    let mut world = World::running(1, |_| ());
    world.tell(Event::Lost(PARTITION));
    let push = world.gradient(0, 0, 1);
    world.give(&push);
    assert_eq!(world.take_notes(), []);
    assert_eq!(world.queue.len(), 1);
}

#[test]
fn a_commit_under_way_at_a_takeover_is_found_committed() {
    let mut world = World::running(1, |_| ());
    let push = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    while !world.pending.iter().all(|action| matches!(action, Action::Commit(..))) {
        let action = world.pending.remove(0);
        world.perform(action).into_iter().for_each(|event| world.tell(event));
    }
    let commit = world.pending.remove(0);
    held(&mut world, None, None);
    redeliver(&mut world);
    // The head is read before the old commit lands.
    let read = world.pending.remove(0);
    let head = world.perform(read).unwrap();
    let answer = world.perform(commit).unwrap();
    world.tell(answer);
    world.tell(head);
    world.settle();
    assert_eq!(world.history.values().flatten().count(), 1, "applied once");
    assert_eq!(world.published.values().next().unwrap(), &[1]);
    world.assert_idle();
}

/// An answer from before a takeover must not pass for a fresh one: it would call a worker diverged.
#[test]
fn a_head_read_before_a_takeover_is_old_news_after_it() {
    let mut world = World::running(1, |_| ());
    let push = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    let look_up = world.pending.remove(0);
    world.perform(look_up).into_iter().for_each(|event| world.tell(event));
    let read = world.pending.remove(0);
    let old = world.perform(read).unwrap();
    world.tell(Event::Lost(PARTITION));
    // Another holder closes round 1.
    let mut other = World::running(1, |_| ());
    std::mem::swap(&mut world.store, &mut other.store);
    other.give(&push);
    std::mem::swap(&mut world.store, &mut other.store);
    world.queue.clear();
    world.hold();
    let next = world.gradient(0, 0, 2);
    let sequence = world.enqueue(&next);
    world.deliver(sequence);
    world.tell(old);
    world.settle();
    assert!(world.rejects.is_empty(), "{:?}", world.rejects);
    assert_eq!(world.head("j", 0).version, 2);
    world.assert_idle();
}

#[test]
fn a_drained_partition_ends_what_runs_and_starts_nothing() {
    let mut world = World::running(1, |_| ());
    let pushes = [world.gradient(0, 0, 1), world.gradient(0, 1, 1)];
    let first = world.enqueue(&pushes[0]);
    world.deliver(first);
    while !matches!(world.pending.first(), Some(Action::Fold(..))) {
        let action = world.pending.remove(0);
        world.perform(action).into_iter().for_each(|event| world.tell(event));
    }
    world.tell(Event::Drain(PARTITION));
    assert_eq!(world.core.rest(PARTITION), Rest::Invocations);
    world.give(&pushes[1]);
    assert_eq!(world.core.rest(PARTITION), Rest::Contributions);
    assert_eq!(world.history.len(), 1);
    assert_eq!(world.queue.len(), 1, "the next holder's");
    held(&mut world, None, None);
    redeliver(&mut world);
    world.settle();
    assert_eq!(world.history.len(), 2);
    world.assert_idle();
}

#[test]
fn a_fenced_round_closes_with_the_newcomer() {
    let mut world = World::running(2, |_| ());
    world.round(&[0, 1], 0, 1);
    newcomer(&mut world, 2, 2);
    let job = world.job("j");
    now_or_never(world.store.fence(job.record.incarnation, job.roster.epoch, 2)).unwrap();
    // The members know only the old roster, and so does the core.
    for rank in 0..2 {
        let mut push = world.gradient(rank, 0, 2);
        push.header.roster_epoch = 1;
        world.give(&push);
    }
    assert_eq!(world.head("j", 0).version, 1);
    assert_eq!(world.queue.len(), 2);
    world.round(&[2], 0, 2);
    let ledgers = world.history.values().next().unwrap();
    assert_eq!((ledgers[1].counted.len(), ledgers[1].roster_epoch), (3, 2));
    world.assert_idle();
}

#[test]
fn a_look_up_of_a_newer_roster_is_tried_until_it_is_answered() {
    let mut world = World::running(1, |_| ());
    world.round(&[0], 0, 1);
    let push = world.gradient(0, 0, 2);
    world.change("j", |_, _| ());
    let job = world.job("j");
    now_or_never(world.store.fence(job.record.incarnation, job.roster.epoch, 2)).unwrap();
    let sequence = world.enqueue(&push);
    world.deliver(sequence);
    while !matches!(world.pending.first(), Some(Action::LookUp(_))) {
        let action = world.pending.remove(0);
        world.perform(action).into_iter().for_each(|event| world.tell(event));
    }
    world.pending.clear();
    world.tell(Event::LookUpFailed(name("j")));
    world.after(100);
    assert_eq!(world.head("j", 0).version, 2);
    world.assert_idle();
}

#[test]
fn contributions_of_the_departed_are_acknowledged_and_not_counted() {
    let mut world = World::running(3, |_| ());
    world.round(&[0, 1], 0, 1);
    world.change("j", |_, roster| {
        roster.members.remove(0);
    });
    world.hint("j");
    assert_eq!(world.queue.keys().copied().collect::<Vec<_>>(), [2]);
    world.round(&[2], 0, 1);
    let job = world.job("j").record.incarnation;
    assert_eq!(world.state(job, 0).values, sum_in_rank_order(1..3, 0, 1));
    world.assert_idle();
}

#[test]
fn the_departure_of_the_last_one_missing_closes_the_round() {
    let mut world = World::running(3, |_| ());
    world.round(&[0, 2], 0, 1);
    world.change("j", |_, roster| roster.members[1].until_round = Some(1));
    world.hint("j");
    world.settle();
    assert_eq!(world.history.values().next().unwrap()[0].counted.len(), 2);
    world.assert_idle();
}

/// A rank that changed hands: what its former holder left must not stand for the new one's.
#[test]
fn a_new_holder_of_a_rank_replaces_what_the_old_one_left() {
    let mut world = World::running(2, |_| ());
    let old = world.gradient(0, 0, 1);
    let sequence = world.enqueue(&old);
    world.deliver(sequence);
    let look_up = world.pending.remove(0);
    world.perform(look_up).into_iter().for_each(|event| world.tell(event));
    // The head is still being read when the roster changes.
    world.change("j", |_, roster| roster.members[0].incarnation = worker(9));
    let mut new = world.gradient(0, 0, 1);
    new.header.worker = worker(9);
    let sequence = world.enqueue(&new);
    world.deliver(sequence);
    // The look-up ends first.
    world.pending.reverse();
    world.settle();
    assert_eq!(world.queue.keys().copied().collect::<Vec<_>>(), [2]);
    world.round(&[1], 0, 1);
    assert_eq!(world.head("j", 0).version, 1);
    world.assert_idle();
}

#[test]
fn a_failed_job_gives_everything_back() {
    let mut world = World::running(2, |_| ());
    world.round(&[0], 0, 1);
    world.round(&[1], 1, 1);
    world.change("j", |record, _| record.state = JobState::Failed(super::setup::poisoned_error()));
    world.hint("j");
    let codes: Vec<_> = world.rejects.iter().map(|(_, _, reject)| reject.error.code).collect();
    assert_eq!(codes, [ErrorCode::JobFailed; 2]);
    world.assert_idle();
}

#[test]
fn poison_fails_a_full_roster_and_is_void_in_a_quorum() {
    for quorum in [None, Some(1)] {
        let mut world = World::running(2, |spec| spec.quorum = quorum);
        world.round(&[0], 0, 1);
        held(&mut world, Some(1), Some(1));
        world.take_notes();
        redeliver(&mut world);
        world.settle();
        let notes = world.take_notes();
        assert!(notes.contains(&Note::Reject(0, ErrorCode::PoisonContribution)), "{notes:?}");
        assert!(notes.contains(&Note::Dead(1, ErrorCode::PoisonContribution)), "{notes:?}");
        assert_eq!(notes.contains(&Note::Fail(ErrorCode::PoisonContribution)), quorum.is_none());
        let push = world.gradient(1, 0, 1);
        world.give(&push);
        let ledger = world.history.values().next().map(|ledgers| ledgers[0].clone());
        let ranks = ledger.map(|ledger| (ledger.void.contains(0), ledger.counted.contains(1)));
        assert_eq!(ranks, quorum.map(|_| (true, true)));
        world.assert_idle();
    }
}

#[test]
fn careful_rounds_run_alone_until_the_backlog_is_done() {
    let mut world = World::running(1, |_| ());
    world.open(spec("k", 1), 2);
    let backlog = [world.gradient(0, 0, 1), world.gradient(0, 1, 1), world.gradient_of("k", 0, 0, 1)];
    let sequences: Vec<_> = backlog.iter().map(|push| world.enqueue(push)).collect();
    held(&mut world, Some(3), None);
    sequences[..2].iter().for_each(|sequence| world.deliver(*sequence));
    let mut most = 0;
    while !world.pending.is_empty() {
        most = most.max(world.core.invocations());
        let action = world.pending.remove(0);
        world.perform(action).into_iter().for_each(|event| world.tell(event));
    }
    assert_eq!((most, world.history.len()), (1, 2));
    assert!(world.core.is_careful_partition(PARTITION), "the third has not been tried");
    world.deliver(sequences[2]);
    world.settle();
    assert!(!world.core.is_careful_partition(PARTITION));
    world.assert_idle();
}

#[test]
fn the_turn_of_a_careful_round_comes() {
    let mut world = World::running(1, |_| ());
    world.tell(Event::Held { partition: 1, careful_until: None, poison: None });
    held(&mut world, Some(100), None);
    // Both of these lives have their shard 1 on partition 1, when there are two.
    for (job, life) in [("k", 2), ("l", 4)] {
        world.open(spec(job, 1), life);
        world.change(job, |record, _| record.partitions = 2);
    }
    let elsewhere = |world: &mut World, job: &str| {
        let mut push = world.gradient_of(job, 0, 1, 1);
        push.partition = 1;
        let sequence = world.enqueue(&push);
        world.queue.get_mut(&sequence).unwrap().partition = 1;
        sequence
    };
    let up_to_fold = |world: &mut World, sequence: u64| {
        world.deliver(sequence);
        while let Some(at) = world.pending.iter().position(|action| !matches!(action, Action::Fold(..))) {
            let action = world.pending.remove(at);
            world.perform(action).into_iter().for_each(|event| world.tell(event));
        }
        (world.core.invocations(), world.core.ready.len())
    };
    let first = elsewhere(&mut world, "k");
    assert_eq!(up_to_fold(&mut world, first), (1, 0));
    let push = world.gradient(0, 0, 1);
    let careful = world.enqueue(&push);
    assert_eq!(up_to_fold(&mut world, careful), (1, 1), "it waits for the other to end");
    let second = elsewhere(&mut world, "l");
    assert_eq!(up_to_fold(&mut world, second), (1, 2), "and nothing begins before it");
    world.settle();
    assert_eq!(world.history.len(), 3);
    world.assert_idle();
}

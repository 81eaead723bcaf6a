//! Planned moves, step by step.

use thalweg_protocol::PlacedPartition;

use super::*;

const DRAIN_MS: Millis = 5000;

fn placed(epoch: Epoch, holder: Option<&str>) -> Placement {
    Placement { partitions: vec![PlacedPartition { epoch, holder: holder.map(str::to_owned) }], first: 0 }
}

/// An invoker `a` that holds partition 0 by epoch 1.
fn holder() -> Holdings {
    let mut holdings = Holdings::new("a".to_owned(), DRAIN_MS);
    let steps = holdings.follow(&placed(1, Some("a")), 0);
    assert!(matches!(steps[..], [Step::Take { partition: 0, epoch: 1, own: None }]), "{steps:?}");
    let partition = Box::new(Holding::taken(1, "e1-x"));
    let taken = Takeover::Held { partition, careful_until: None, poison: None };
    let steps = holdings.took(0, 1, Ok(taken), 0);
    assert!(matches!(steps[..], [Step::Tell(Event::Held { .. }), Step::Pull(0)]), "{steps:?}");
    holdings
}

/// What `settle` releases, as the time without service; it tells the core first.
fn released(steps: &[Step]) -> Option<Millis> {
    match steps {
        [] => None,
        [.., Step::Tell(Event::Lost(0)), Step::Release { partition: 0, consumer, unserved }] => {
            assert_eq!(consumer, "e1-x");
            Some(*unserved)
        }
        other => panic!("{other:?}"),
    }
}

/// What is to do, every echo heard at once.
fn settle(holdings: &mut Holdings, rest: Rest, now: Millis) -> Vec<Step> {
    let (echoes, mut steps): (Vec<_>, Vec<_>) =
        holdings.settle(|_| rest, now).into_iter().partition(|step| matches!(step, Step::Echo { .. }));
    for echo in &echoes {
        if let Step::Echo { partition, consumer, delivery } = echo {
            holdings.echoed(*partition, consumer, *delivery);
        }
    }
    if !echoes.is_empty() {
        steps.extend(holdings.settle(|_| rest, now));
    }
    steps
}

#[test]
fn a_pool_counts_from_its_first_partition() {
    let mut holdings = Holdings::new("a".to_owned(), DRAIN_MS);
    let placement = Placement { first: 32, ..placed(1, Some("a")) };
    let steps = holdings.follow(&placement, 0);
    assert!(matches!(steps[..], [Step::Take { partition: 32, epoch: 1, own: None }]), "{steps:?}");
}

#[test]
fn a_partition_is_served_until_the_next_holder_asks_for_it() {
    let mut holdings = holder();
    assert!(holdings.follow(&placed(2, Some("b")), 10).is_empty());
    assert_eq!(released(&settle(&mut holdings, Rest::Nothing, 500)), None);
    assert!(holdings.pulled(0).is_some());
    assert!(holdings.asked(0, "e1-x", 2, 500));
    assert_eq!(released(&settle(&mut holdings, Rest::Nothing, 500)), Some(0));
    assert!(!holdings.asked(0, "e1-x", 2, 501));
    assert!(holdings.pulled(0).is_none() && holdings.held().is_empty());
}

#[test]
fn who_is_asked_need_not_have_read_the_placement() {
    let mut holdings = holder();
    assert!(!holdings.asked(0, "e1-other", 2, 5), "another consumer");
    assert!(!holdings.asked(0, "e1-x", 1, 5), "not a newer placement");
    assert!(!holdings.asked(3, "e1-x", 2, 5), "another partition");
    assert!(holdings.asked(0, "e1-x", 2, 5));
    assert_eq!(released(&settle(&mut holdings, Rest::Nothing, 5)), Some(0));
}

#[test]
fn what_is_held_is_finished_before_a_handover_but_not_for_long() {
    let mut holdings = holder();
    assert!(holdings.asked(0, "e1-x", 2, 1000));
    for rest in [Rest::Invocations, Rest::Contributions] {
        assert!(settle(&mut holdings, rest, 1000).is_empty(), "{rest:?}");
    }
    assert!(holdings.pulled(0).is_some(), "or the others of a round would never come");
    let late = 1000 + SERVED_ON_MS;
    assert_eq!(holdings.settle_at(), Some(late));
    let steps = settle(&mut holdings, Rest::Invocations, late);
    assert!(matches!(steps[..], [Step::Tell(Event::Drain(0))]), "{steps:?}");
    assert!(holdings.pulled(0).is_none());
    assert!(settle(&mut holdings, Rest::Invocations, late + 7).is_empty(), "it is under way");
    assert_eq!(released(&settle(&mut holdings, Rest::Contributions, late + 8)), Some(8));
}

#[test]
fn what_is_on_its_way_is_waited_for() {
    let mut holdings = holder();
    let held = holdings.pulled(0).unwrap();
    assert_eq!(held.credit(2), Some(2));
    assert!(held.delivered(1, 1));
    held.left(5);
    assert!(holdings.asked(0, "e1-x", 2, 2) && holdings.is_leaving(0));
    assert!(settle(&mut holdings, Rest::Nothing, 2).is_empty(), "one of two is still to come");
    assert!(holdings.pulled(0).unwrap().delivered(2, 3));
    assert_eq!(released(&settle(&mut holdings, Rest::Nothing, 3)), Some(0));
}

#[test]
fn what_is_served_is_given_up_one_after_another() {
    let mut holdings = Holdings::new("a".to_owned(), DRAIN_MS);
    let placement = |epoch, holder: &str| {
        let placed = PlacedPartition { epoch, holder: Some(holder.to_owned()) };
        Placement { partitions: vec![placed; 4], first: 0 }
    };
    assert_eq!(holdings.follow(&placement(1, "a"), 0).len(), 4);
    for partition in 0..4 {
        let held = Box::new(Holding::taken(1, &format!("e1-{partition}")));
        let taken = Takeover::Held { partition: held, careful_until: None, poison: None };
        assert_eq!(holdings.took(partition, 1, Ok(taken), 0).len(), 2);
    }
    assert!(holdings.follow(&placement(2, "b"), 0).is_empty());
    for partition in 0..4 {
        assert!(holdings.asked(partition, &format!("e1-{partition}"), 2, 0));
    }
    let given_up = |steps: &[Step]| -> Vec<_> {
        let partition = |step: &Step| match step {
            Step::Release { partition, .. } => Some(*partition),
            _ => None,
        };
        steps.iter().filter_map(partition).collect()
    };
    assert_eq!(given_up(&settle(&mut holdings, Rest::Nothing, 1)), [0]);
    assert!(settle(&mut holdings, Rest::Nothing, 2).is_empty());
    assert!(holdings.pulled(1).is_some() && holdings.pulled(3).is_some(), "they are served meanwhile");
    holdings.released("e1-other");
    assert!(settle(&mut holdings, Rest::Nothing, 3).is_empty());
    holdings.released("e1-0");
    assert_eq!(given_up(&settle(&mut holdings, Rest::Nothing, 4)), [1]);
    // But they do not wait for ever.
    assert_eq!(given_up(&settle(&mut holdings, Rest::Nothing, SERVED_ON_MS)), [2, 3]);
}

#[test]
fn it_is_served_until_every_acknowledgement_has_arrived() {
    let mut holdings = holder();
    assert!(holdings.asked(0, "e1-x", 2, 1));
    let steps = holdings.settle(|_| Rest::Nothing, 1);
    assert!(matches!(&steps[..], [Step::Echo { partition: 0, consumer, delivery: 0 }] if consumer == "e1-x"));
    assert!(holdings.settle(|_| Rest::Nothing, 2).is_empty(), "it is on its way");
    // Another message comes meanwhile, and is done with.
    assert!(holdings.pulled(0).unwrap().delivered(1, 3));
    holdings.echoed(0, "e1-x", 0);
    let steps = holdings.settle(|_| Rest::Nothing, 4);
    assert!(matches!(steps[..], [Step::Echo { partition: 0, delivery: 1, .. }]), "{steps:?}");
    holdings.echoed(0, "e1-x", 0);
    holdings.echoed(0, "e1-other", 1);
    assert!(holdings.settle(|_| Rest::Nothing, 5).is_empty(), "neither is that echo");
    holdings.echoed(0, "e1-x", 1);
    assert!(holdings.settle(|_| Rest::Contributions, 6).is_empty(), "and yet another has come");
    assert_eq!(released(&holdings.settle(|_| Rest::Nothing, 7)), Some(0));
}

#[test]
fn an_echo_that_is_not_heard_is_not_waited_for_without_end() {
    let mut holdings = holder();
    assert!(holdings.asked(0, "e1-x", 2, 0));
    assert_eq!(holdings.settle(|_| Rest::Nothing, 0).len(), 1);
    let steps = holdings.settle(|_| Rest::Nothing, SERVED_ON_MS);
    assert!(matches!(steps[..], [Step::Tell(Event::Drain(0)), Step::Echo { delivery: u64::MAX, .. }]));
    holdings.echoed(0, "e1-x", 0);
    assert!(holdings.settle(|_| Rest::Nothing, DRAIN_MS / 2).is_empty(), "that was of before");
    let unserved = DRAIN_MS / 2 + 1 - SERVED_ON_MS;
    assert_eq!(released(&holdings.settle(|_| Rest::Nothing, DRAIN_MS / 2 + 1)), Some(unserved));
}

#[test]
fn an_invocation_that_does_not_end_is_given_up_with_its_partition() {
    let mut holdings = holder();
    assert!(holdings.asked(0, "e1-x", 2, 0));
    assert_eq!(settle(&mut holdings, Rest::Invocations, SERVED_ON_MS).len(), 1);
    assert!(settle(&mut holdings, Rest::Invocations, DRAIN_MS / 2).is_empty());
    let unserved = DRAIN_MS / 2 + 1 - SERVED_ON_MS;
    assert_eq!(released(&settle(&mut holdings, Rest::Invocations, DRAIN_MS / 2 + 1)), Some(unserved));
}

#[test]
fn nobody_has_to_ask_where_nobody_takes_over() {
    let mut holdings = holder();
    assert!(holdings.follow(&placed(2, None), 10).is_empty());
    assert_eq!(released(&settle(&mut holdings, Rest::Nothing, 10)), Some(0));

    // The next holder may be dead.
    let mut holdings = holder();
    assert!(holdings.follow(&placed(2, Some("b")), 10).is_empty());
    assert_eq!(holdings.settle_at(), Some(10 + UNASKED_MS));
    assert_eq!(released(&settle(&mut holdings, Rest::Nothing, 10 + UNASKED_MS)), Some(0));
}

#[test]
fn who_has_to_end_gives_everything_up() {
    let mut holdings = holder();
    holdings.drain(100);
    assert!(settle(&mut holdings, Rest::Nothing, 100).is_empty(), "somebody may take it in order");
    assert_eq!(holdings.settle_at(), Some(100 + DRAIN_MS));
    assert_eq!(released(&settle(&mut holdings, Rest::Invocations, 100 + DRAIN_MS)), Some(0));
    assert!(holdings.is_drained());
}

//! Planned moves, step by step.

use thalweg_protocol::{KeptConsumer, PlacedPartition};

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

/// What somebody with a newer placement says.
fn question() -> Handover {
    Handover { partition: 0, consumer: "e1-x".to_owned(), epoch: 2 }
}

/// Somebody asks for the partition, and has to wait.
fn ask(holdings: &mut Holdings, now: Millis) {
    assert_eq!(holdings.asked(&question(), now), None);
}

/// What `settle` has to say to whoever asks.
fn said(steps: &[Step]) -> Option<HandedOver> {
    match steps {
        [] => None,
        [Step::Answer { partition: 0, answer }] => Some(*answer),
        other => panic!("{other:?}"),
    }
}

/// Whoever asks listens: what it is told. When that is the partition, it is gone.
fn heard(holdings: &mut Holdings, rest: Rest) -> HandedOver {
    let (answer, steps) = holdings.heard(&question(), rest);
    match answer {
        HandedOver::Kept(_) => {
            assert!(matches!(steps[..], [Step::Tell(Event::Lost(0))]), "{steps:?}");
            assert!(holdings.get(0).is_none() && holdings.held().is_empty());
        }
        _ => assert!(steps.is_empty()),
    }
    answer
}

/// What is handed over after so many deliveries, without pull requests.
fn kept(deliveries: u64) -> HandedOver {
    HandedOver::Kept(KeptConsumer { next_delivery: deliveries + 1, credit: 0, pending: 0 })
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
fn a_partition_is_served_until_the_next_holder_listens() {
    let mut holdings = holder();
    assert!(holdings.follow(&placed(2, Some("b")), 10).is_empty());
    assert_eq!(released(&settle(&mut holdings, Rest::Nothing, 500)), None);
    ask(&mut holdings, 500);
    assert_eq!(said(&settle(&mut holdings, Rest::Nothing, 500)), Some(HandedOver::Ready));
    assert_eq!(said(&settle(&mut holdings, Rest::Nothing, 600)), None, "it has been told");
    assert!(holdings.pulled(0).is_some());
    assert_eq!(heard(&mut holdings, Rest::Nothing), kept(0));
    assert!(holdings.pulled(0).is_none());
    assert_eq!(holdings.asked(&question(), 501), Some(HandedOver::NotHeld));
    assert_eq!(heard(&mut holdings, Rest::Nothing), HandedOver::NotHeld);
}

#[test]
fn who_is_asked_need_not_have_read_the_placement() {
    let mut holdings = holder();
    let not_held = Some(HandedOver::NotHeld);
    assert_eq!(holdings.asked(&Handover { consumer: "e1-other".to_owned(), ..question() }, 5), not_held);
    assert_eq!(holdings.asked(&Handover { partition: 3, ..question() }, 5), not_held);
    let newer = Some(HandedOver::Newer(1));
    assert_eq!(holdings.asked(&Handover { epoch: 1, ..question() }, 5), newer, "not a newer placement");
    assert_eq!(heard(&mut holdings, Rest::Nothing), HandedOver::NotYet, "nobody has asked");
    ask(&mut holdings, 5);
    assert_eq!(said(&settle(&mut holdings, Rest::Nothing, 5)), Some(HandedOver::Ready));
}

#[test]
fn what_comes_before_the_next_holder_listens_is_finished_here() {
    let mut holdings = holder();
    ask(&mut holdings, 5);
    assert_eq!(said(&settle(&mut holdings, Rest::Nothing, 5)), Some(HandedOver::Ready));
    let held = holdings.pulled(0).unwrap();
    assert_eq!(held.credit(4), Some(4));
    assert!(held.delivered(1, 6));
    held.left(7);
    assert_eq!(heard(&mut holdings, Rest::Contributions), HandedOver::NotYet);
    assert_eq!(heard(&mut holdings, Rest::Nothing), HandedOver::NotYet, "it may not be acknowledged yet");
    assert!(holdings.leaving().eq([0]));
    ask(&mut holdings, 7);
    assert_eq!(said(&settle(&mut holdings, Rest::Nothing, 7)), None, "three of four are still to come");
    holdings.pulled(0).unwrap().left(0);
    assert_eq!(said(&settle(&mut holdings, Rest::Nothing, 8)), Some(HandedOver::Ready));
    // What was asked for and has not come is the next holder's.
    let kept = KeptConsumer { next_delivery: 2, credit: 3, pending: 0 };
    assert_eq!(heard(&mut holdings, Rest::Nothing), HandedOver::Kept(kept));
}

#[test]
fn who_takes_over_begins_where_the_former_holder_has_ended() {
    let mut holdings = holder();
    let held = holdings.pulled(0).unwrap();
    assert!(held.delivered(1, 0) && held.delivered(2, 0));
    let mut deliver =
        |number| matches!(holdings.delivered(0, "e1-x", (number, 10 + number), None, 1), Delivered::Ours);
    assert!(!deliver(1) && !deliver(2), "they were the former holder's");
    assert!(deliver(3));
    let gap = holdings.delivered(0, "e1-x", (5, 15), None, 1);
    assert!(matches!(gap, Delivered::Gap(_)), "{gap:?}");
}

#[test]
fn a_delivery_that_only_the_former_holder_was_sent_is_missed() {
    let mut holdings = holder();
    holdings.expect(0, "e1-other", 5, 10);
    holdings.expect(0, "e1-x", 1, 10);
    assert!(holdings.check_silence(3010).is_empty(), "it may be on its way");
    let steps = holdings.check_silence(3011);
    assert!(
        matches!(&steps[..], [Step::Tell(Event::Lost(0)), Step::Take { own: Some(own), .. }] if own == "e1-x"),
        "{steps:?}"
    );

    let mut holdings = holder();
    holdings.expect(0, "e1-x", 1, 10);
    assert!(holdings.pulled(0).unwrap().delivered(1, 3000));
    assert!(holdings.check_silence(3011).is_empty());
}

#[test]
fn what_is_held_is_finished_before_a_handover_but_not_for_long() {
    let mut holdings = holder();
    ask(&mut holdings, 1000);
    for rest in [Rest::Invocations, Rest::Contributions] {
        assert!(settle(&mut holdings, rest, 1000).is_empty(), "{rest:?}");
    }
    assert!(holdings.pulled(0).is_some(), "or the others of a round would never come");
    // Whoever asks hears that we are alive.
    assert_eq!(holdings.settle_at(), Some(1000 + SILENT_MS));
    let word = said(&settle(&mut holdings, Rest::Contributions, 1000 + SILENT_MS));
    assert_eq!(word, Some(HandedOver::NotYet));
    let late = 1000 + SERVED_ON_MS;
    assert_eq!(holdings.settle_at(), Some(late));
    let steps = settle(&mut holdings, Rest::Invocations, late);
    assert!(matches!(steps[..], [Step::Tell(Event::Drain(0))]), "{steps:?}");
    assert!(holdings.pulled(0).is_none());
    ask(&mut holdings, late);
    assert!(settle(&mut holdings, Rest::Invocations, late + 7).is_empty(), "it is under way");
    assert_eq!(released(&settle(&mut holdings, Rest::Contributions, late + 8)), Some(8));
}

#[test]
fn being_asked_again_and_again_does_not_put_the_end_off() {
    let mut holdings = holder();
    for now in (0..SERVED_ON_MS).step_by(usize::try_from(SILENT_MS).unwrap()) {
        ask(&mut holdings, now);
        assert!(settle(&mut holdings, Rest::Contributions, now).is_empty());
    }
    let steps = settle(&mut holdings, Rest::Invocations, SERVED_ON_MS);
    assert!(matches!(steps[..], [Step::Tell(Event::Drain(0)), ..]), "{steps:?}");
}

#[test]
fn what_is_on_its_way_is_waited_for() {
    let mut holdings = holder();
    let held = holdings.pulled(0).unwrap();
    assert_eq!(held.credit(2), Some(2));
    assert!(held.delivered(1, 1));
    held.left(5);
    ask(&mut holdings, 2);
    assert!(holdings.is_leaving(0));
    assert!(settle(&mut holdings, Rest::Nothing, 2).is_empty(), "one of two is still to come");
    assert!(holdings.pulled(0).unwrap().delivered(2, 3));
    assert_eq!(said(&settle(&mut holdings, Rest::Nothing, 3)), Some(HandedOver::Ready));
}

#[test]
fn it_is_served_until_every_acknowledgement_has_arrived() {
    let mut holdings = holder();
    ask(&mut holdings, 1);
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
    assert_eq!(heard(&mut holdings, Rest::Nothing), HandedOver::NotYet);
    holdings.echoed(0, "e1-x", 1);
    assert!(holdings.settle(|_| Rest::Contributions, 6).is_empty(), "and yet another has come");
    assert_eq!(said(&holdings.settle(|_| Rest::Nothing, 7)), Some(HandedOver::Ready));
    assert_eq!(heard(&mut holdings, Rest::Nothing), kept(1));
}

#[test]
fn an_echo_that_is_not_heard_is_not_waited_for_without_end() {
    let mut holdings = holder();
    assert!(holdings.follow(&placed(2, Some("b")), 0).is_empty());
    assert!(holdings.settle(|_| Rest::Nothing, 0).is_empty());
    let steps = holdings.settle(|_| Rest::Nothing, UNASKED_MS);
    assert!(matches!(steps[..], [Step::Tell(Event::Drain(0)), Step::Echo { delivery: u64::MAX, .. }]));
    holdings.echoed(0, "e1-x", 0);
    assert!(holdings.settle(|_| Rest::Nothing, DRAIN_MS / 2).is_empty(), "that was of before");
    let unserved = DRAIN_MS / 2 + 1 - UNASKED_MS;
    assert_eq!(released(&holdings.settle(|_| Rest::Nothing, DRAIN_MS / 2 + 1)), Some(unserved));
}

#[test]
fn an_invocation_that_does_not_end_is_given_up_with_its_partition() {
    let mut holdings = holder();
    assert!(holdings.follow(&placed(2, Some("b")), 0).is_empty());
    assert_eq!(settle(&mut holdings, Rest::Invocations, UNASKED_MS).len(), 1);
    assert!(settle(&mut holdings, Rest::Invocations, DRAIN_MS / 2).is_empty());
    let unserved = DRAIN_MS / 2 + 1 - UNASKED_MS;
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

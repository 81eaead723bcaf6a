use super::*;

const DEAD_AFTER: Duration = Duration::from_secs(3);
const A: Incarnation = Incarnation([1; 16]);
const B: Incarnation = Incarnation([2; 16]);

fn beat(life: Incarnation, slots: u32, changes: u64, invokers: &[&str]) -> AgentBeat {
    let invokers = invokers.iter().map(|id| id.parse().unwrap()).collect();
    AgentBeat { agent: "host".to_owned(), life, slots, changes, invokers }
}

fn hosts(beats: impl IntoIterator<Item = AgentBeat>) -> (Hosts, Instant) {
    let (mut hosts, now) = (Hosts::new(DEAD_AFTER), Instant::now());
    beats.into_iter().for_each(|beat| hosts.beat(beat, now));
    (hosts, now)
}

fn ended(ids: &[&str]) -> Swept {
    Swept { ended: ids.iter().map(|id| (*id).to_owned()).collect(), stop: Vec::new() }
}

#[test]
fn starts_are_spread_by_free_slots() {
    let (mut hosts, now) = hosts([beat(A, 3, 1, &["other"]), beat(B, 4, 0, &[])]);
    let mut order = Vec::new();
    for id in 0..6 {
        let life = hosts.choose().expect("there is room");
        hosts.started(&id.to_string(), life, 10);
        order.push(life);
    }
    assert_eq!(order, [B, B, B, A, B, A]);
    assert_eq!(hosts.choose(), None, "all slots are taken");
    // Who has no room, or is about to end, is left out, and so is who has just refused.
    hosts.beat(beat(B, 5, 14, &["0", "1", "2", "4"]), now);
    assert_eq!(hosts.choose(), Some(B));
    hosts.pass_over(B);
    assert_eq!(hosts.choose(), None);
    hosts.beat(beat(B, 0, 14, &["0", "1", "2", "4"]), now);
    assert_eq!(hosts.choose(), None);
}

#[test]
fn an_invoker_has_ended_when_a_beat_after_its_start_lacks_it() {
    let (mut hosts, now) = hosts([beat(A, 4, 0, &[])]);
    hosts.started("x", A, 1);
    hosts.beat(beat(A, 4, 0, &[]), now);
    assert_eq!(hosts.sweep(now), Swept::default(), "this beat was under way when it was started");
    hosts.beat(beat(A, 4, 1, &["x"]), now);
    assert_eq!(hosts.sweep(now), Swept::default());
    hosts.beat(beat(A, 4, 2, &[]), now);
    assert_eq!(hosts.sweep(now), ended(&["x"]));
    assert_eq!(hosts.sweep(now), Swept::default(), "each is named once");
    assert!(hosts.is_empty());
}

#[test]
fn a_stop_is_said_again_until_it_shows() {
    let (mut hosts, now) = hosts([beat(A, 4, 0, &[])]);
    hosts.started("x", A, 1);
    hosts.stop("x");
    hosts.stop("nobody");
    let said = Swept { stop: vec![(A, "x".to_owned())], ..Swept::default() };
    assert_eq!(hosts.sweep(now), said);
    assert_eq!(hosts.sweep(now), Swept::default());
    let later = now + STOP_AGAIN;
    hosts.beat(beat(A, 4, 1, &["x"]), later);
    assert_eq!(hosts.sweep(later), said);
    hosts.beat(beat(A, 4, 2, &[]), later);
    assert_eq!(hosts.sweep(later + STOP_AGAIN), ended(&["x"]));
}

#[test]
fn the_invokers_of_a_silent_agent_have_ended_and_are_stopped_if_they_come_back() {
    let (mut hosts, now) = hosts([beat(A, 4, 1, &["x"]), beat(B, 4, 1, &["y"])]);
    assert_eq!(hosts.adopt(), ["x", "y"]);
    let late = now + DEAD_AFTER;
    hosts.beat(beat(B, 4, 1, &["y"]), late);
    assert_eq!(hosts.sweep(late), ended(&["x"]));
    assert_eq!(hosts.count(), 1);
    // It was only cut off. Its place has been taken long ago.
    hosts.beat(beat(A, 4, 1, &["x"]), late);
    assert_eq!(hosts.adopt(), Vec::<String>::new());
    assert_eq!(hosts.sweep(late), Swept { stop: vec![(A, "x".to_owned())], ..Swept::default() });
}

#[test]
fn silence_while_nothing_could_be_heard_means_nothing() {
    let (mut hosts, now) = hosts([beat(A, 4, 1, &["x"])]);
    hosts.adopt();
    let late = now + 10 * DEAD_AFTER;
    hosts.interrupted(late);
    assert_eq!(hosts.sweep(late), Swept::default());
    assert_eq!(hosts.sweep(late + DEAD_AFTER), ended(&["x"]));
}

#[test]
fn a_start_without_an_answer_is_undone_when_it_shows() {
    let (mut hosts, now) = hosts([beat(A, 4, 0, &[])]);
    hosts.give_up("x");
    hosts.beat(beat(A, 4, 1, &["x"]), now);
    assert_eq!(hosts.adopt(), Vec::<String>::new());
    assert_eq!(hosts.sweep(now).stop, [(A, "x".to_owned())]);
    hosts.beat(beat(A, 4, 2, &[]), now);
    assert_eq!(hosts.sweep(now + STOP_AGAIN), Swept::default(), "it never counted");
}

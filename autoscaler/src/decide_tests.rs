use proptest::prelude::*;

use super::*;

const TICK: Millis = 200;
const MIB: u64 = 1 << 20;

fn sample(at: Millis, bytes: u64) -> Sample {
    Sample {
        at,
        messages: bytes.div_ceil(MIB),
        bytes,
        active_partitions: 32,
        waiting_for_round: 0.0,
        busy: 0.0,
        service_bytes_per_s: 200e6,
    }
}

fn history(target: usize, samples: impl IntoIterator<Item = Sample>, config: &Config) -> History {
    let mut history = History::new(32, target, 0);
    samples.into_iter().for_each(|sample| history.record(sample, config));
    history
}

/// Observations of `bytes` every tick in a range of time.
fn steady(from: Millis, to: Millis, bytes: u64) -> impl Iterator<Item = Sample> {
    (from..=to).step_by(usize::try_from(TICK).unwrap()).map(move |at| sample(at, bytes))
}

#[track_caller]
fn expect(history: &History, now: Millis, config: &Config, target: usize, reason: Reason) {
    assert_eq!(decide(history, now, config), Decision { target, reason });
}

#[test]
fn backlog_is_drained_within_the_catch_up_target() {
    // One invoker drains 200 MB/s * 0.7 * 0.5 s = 70 MB in time.
    let config = Config { max_invokers: 16, ..Config::default() };
    for (bytes, target) in [
        (1, 1),
        (70_000_000, 1),
        (70_000_001, 2),
        (140_000_001, 3),
        (700_000_000, 10),
        (70_000_000_000, 16),
        (u64::MAX, 16),
    ] {
        expect(&history(0, [sample(0, bytes)], &config), 0, &config, target, Reason::FirstWork);
    }
    let slow = Sample { service_bytes_per_s: 20e6, ..sample(0, 70_000_000) };
    expect(&history(1, [slow], &config), 0, &config, 10, Reason::Backlog);
}

#[test]
fn the_backlog_is_not_spread_wider_than_its_partitions() {
    let config = Config { max_invokers: 100, ..Config::default() };
    let narrow = Sample { active_partitions: 3, ..sample(0, 1 << 40) };
    expect(&history(0, [narrow], &config), 0, &config, 3, Reason::FirstWork);
    // And there are never more invokers than partitions.
    let wide = Sample { active_partitions: 1000, ..sample(0, 1 << 40) };
    expect(&history(0, [wide], &config), 0, &config, 32, Reason::FirstWork);
}

#[test]
fn contributions_that_wait_for_their_round_need_no_cpu() {
    let config = Config::default();
    let waiting = |share: f64| Sample { waiting_for_round: share * 256.0, ..sample(0, 256 * MIB) };
    expect(&history(1, [waiting(0.0)], &config), 0, &config, 4, Reason::Backlog);
    expect(&history(1, [waiting(0.5)], &config), 0, &config, 2, Reason::Backlog);
    expect(&history(1, [waiting(1.0)], &config), 0, &config, 1, Reason::Steady);
    expect(&history(1, [waiting(9.0)], &config), 0, &config, 1, Reason::Steady);
    // But they need somebody who holds them.
    expect(&history(0, [waiting(1.0)], &config), 0, &config, 1, Reason::FirstWork);
}

#[test]
fn missing_and_stale_observations_change_nothing() {
    let config = Config::default();
    for target in [0, 1, 3] {
        expect(&history(target, [], &config), 5, &config, target, Reason::Unobserved);
        let seen = history(target, [sample(0, u64::MAX)], &config);
        expect(&seen, 1001, &config, target, Reason::Unobserved);
        let idle = history(target, steady(0, 20_000, 0), &config);
        expect(&idle, 21_001, &config, target, Reason::Unobserved);
        let mut interrupted = history(target, steady(0, 20_000, 0), &config);
        interrupted.interrupt(20_001);
        expect(&interrupted, 20_002, &config, target, Reason::Unobserved);
    }
}

#[test]
fn shrinks_to_what_was_needed_in_the_window() {
    let config = Config::default();
    // Two needed in a burst at 1 s, otherwise one: four shrink to two, later to one.
    let burst = |to| steady(0, to, 1).map(|s| if s.at == 1000 { sample(1000, 100_000_000) } else { s });
    expect(&history(4, burst(9800), &config), 9800, &config, 4, Reason::Steady);
    expect(&history(4, burst(10_000), &config), 10_000, &config, 2, Reason::Shrink);
    expect(&history(2, burst(11_000), &config), 11_000, &config, 2, Reason::Steady);
    expect(&history(2, burst(11_200), &config), 11_200, &config, 1, Reason::Shrink);
    // A gap in the observations starts the window anew.
    let gap = steady(0, 9000, 1).chain(steady(10_200, 12_000, 1));
    expect(&history(4, gap, &config), 12_000, &config, 4, Reason::Steady);
}

#[test]
fn a_fleet_that_keeps_up_is_not_dismantled_for_it() {
    let config = Config::default();
    let busy = |sum: f64| steady(0, 12_000, 1).map(move |s| Sample { busy: sum, ..s });
    expect(&history(4, busy(2.5), &config), 12_000, &config, 4, Reason::Steady);
    expect(&history(4, busy(1.4), &config), 12_000, &config, 2, Reason::Shrink);
    // Load alone never grows the fleet.
    expect(&history(2, busy(2.0), &config), 12_000, &config, 2, Reason::Steady);
}

#[test]
fn goes_to_the_minimum_only_after_idling_throughout() {
    let config = Config::default();
    expect(&history(1, steady(0, 9800, 0), &config), 9800, &config, 1, Reason::Steady);
    expect(&history(1, steady(0, 10_000, 0), &config), 10_000, &config, 0, Reason::Idle);
    expect(&history(3, steady(0, 10_000, 0), &config), 10_000, &config, 0, Reason::Idle);
    // One message in between.
    let once = |to| steady(0, to, 0).map(|s| if s.at == 5000 { sample(5000, 1) } else { s });
    expect(&history(1, once(15_000), &config), 15_000, &config, 1, Reason::Steady);
    expect(&history(1, once(15_200), &config), 15_200, &config, 0, Reason::Idle);
    // One that is held for ever keeps one invoker for ever.
    let held = steady(0, 60_000, 1).map(|s| Sample { waiting_for_round: 1.0, ..s });
    expect(&history(3, held, &config), 60_000, &config, 1, Reason::Shrink);
    let config = Config { min_invokers: 2, ..config };
    expect(&history(4, steady(0, 10_000, 0), &config), 10_000, &config, 2, Reason::Idle);
}

#[test]
fn an_idle_fleet_shrinks_to_one_before_it_goes() {
    let config = Config { idle_timeout_ms: 30_000, ..Config::default() };
    expect(&history(4, steady(0, 10_000, 0), &config), 10_000, &config, 1, Reason::Shrink);
    expect(&history(1, steady(0, 29_800, 0), &config), 29_800, &config, 1, Reason::Steady);
    expect(&history(1, steady(0, 30_000, 0), &config), 30_000, &config, 0, Reason::Idle);
}

#[test]
fn a_grow_window_asks_for_a_lasting_backlog_but_not_of_the_first() {
    let config = Config { grow_window_ms: 1000, ..Config::default() };
    let late = |from| steady(0, 5000, 1).map(move |s| if s.at >= from { sample(s.at, u64::MAX) } else { s });
    expect(&history(1, late(4200), &config), 5000, &config, 1, Reason::Steady);
    expect(&history(1, late(4000), &config), 5000, &config, 4, Reason::Backlog);
    expect(&history(0, late(5000), &config), 5000, &config, 1, Reason::FirstWork);
}

#[test]
fn bounds_hold_without_work_too() {
    let config = Config { min_invokers: 2, ..Config::default() };
    expect(&history(0, [sample(0, 0)], &config), 0, &config, 2, Reason::Bounds);
    expect(&history(9, [sample(0, 1)], &config), 0, &config, 4, Reason::Bounds);
}

fn samples() -> impl Strategy<Value = Vec<Sample>> {
    let one = (
        prop_oneof![3 => 1_u64..400, 1 => 400_u64..3000],
        prop_oneof![Just(0), 0_u64..(1 << 32), Just(u64::MAX)],
        0_usize..40,
        prop_oneof![0.0..500.0, Just(f64::NAN), Just(f64::INFINITY)],
        prop_oneof![0.0..5.0, Just(f64::NAN)],
        prop_oneof![1e3..1e10, Just(0.0), Just(f64::NAN)],
    );
    prop::collection::vec(one, 0..80).prop_map(|steps| {
        let mut at = 0;
        let sample = |(wait, bytes, active_partitions, waiting_for_round, busy, service_bytes_per_s)| {
            at += wait;
            let messages = u64::div_ceil(bytes, MIB);
            Sample { at, messages, bytes, active_partitions, waiting_for_round, busy, service_bytes_per_s }
        };
        steps.into_iter().map(sample).collect()
    })
}

fn configs() -> impl Strategy<Value = Config> {
    (0_usize..3, 3_usize..9, 0_u64..8000, 0_u64..8000, 0_u64..2000).prop_map(
        |(min, max, idle, shrink, grow)| Config {
            min_invokers: min,
            max_invokers: max,
            idle_timeout_ms: idle,
            shrink_window_ms: shrink,
            grow_window_ms: grow,
            ..Config::default()
        },
    )
}

proptest! {
    #[test]
    fn decisions_keep_their_promises(
        config in configs(), target in 0_usize..9, samples in samples(), later in 0_u64..1500,
    ) {
        let target = target.min(config.max_invokers);
        let history = history(target, samples.clone(), &config);
        let now = samples.last().map_or(0, |last| last.at) + later;
        let decision = decide(&history, now, &config);
        prop_assert_eq!(decision, decide(&history, now, &config));

        let fresh = samples.last().filter(|last| now - last.at <= config.stale_after());
        let Some(last) = fresh else {
            prop_assert_eq!(decision, Decision { target, reason: Reason::Unobserved });
            return Ok(());
        };
        prop_assert!((config.min_invokers..=config.max_invokers).contains(&decision.target));
        if last.messages > 0 {
            prop_assert!(decision.target >= 1);
        }
        if decision.target == 0 && target > 0 {
            let idle = samples.iter().rev().take_while(|sample| sample.messages == 0);
            let since = idle.last().map_or(last.at, |first| first.at);
            prop_assert!(last.at - since >= config.idle_timeout_ms, "to zero although there was work");
        }
        if decision.reason == Reason::Shrink {
            prop_assert!(decision.target < target);
            prop_assert!(last.at >= config.shrink_window_ms);
        }
        if decision.target > target.max(config.min_invokers) {
            prop_assert!(last.messages > 0, "grew without work");
        }
    }

    #[test]
    fn more_backlog_never_means_fewer(
        config in configs(), target in 0_usize..4, samples in samples(), more in 0_u64..(1 << 34),
    ) {
        let Some(last) = samples.last().copied() else { return Ok(()) };
        let heavier = Sample {
            bytes: last.bytes.saturating_add(more),
            messages: last.messages + 1,
            active_partitions: last.active_partitions.max(1),
            waiting_for_round: 0.0,
            ..last
        };
        let lighter = Sample { waiting_for_round: 0.0, ..last };
        let with = |sample| {
            let rest = samples[..samples.len() - 1].iter().copied().chain([sample]);
            decide(&history(target, rest, &config), last.at, &config).target
        };
        prop_assert!(with(heavier) >= with(lighter));
    }
}

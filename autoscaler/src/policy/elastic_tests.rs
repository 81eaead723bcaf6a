use proptest::prelude::*;
use thalweg_protocol::JobKey;

use super::*;

const TICK: Millis = 200;
const MIB: u64 = 1 << 20;

fn sample(at: Millis, bytes: u64) -> Sample {
    Sample {
        at,
        messages: bytes.div_ceil(MIB),
        bytes,
        arrived: 0,
        active_partitions: 32,
        waiting_for_round: 0.0,
        busy: 0.0,
        service_bytes_per_s: 200e6,
        handled_per_byte: 1.0,
        serving: 1000,
        start_delay_ms: 0.0,
    }
}

/// Observations of `bytes` every tick in a range of time.
fn steady(from: Millis, to: Millis, bytes: u64) -> impl Iterator<Item = Sample> {
    (from..=to).step_by(usize::try_from(TICK).unwrap()).map(move |at| sample(at, bytes))
}

/// With the catch-up target that the figures below were reckoned for.
fn config() -> Config {
    Config { catch_up_ms: 350, ..Config::default() }
}

/// The decision at `now`, after one at every observation; the number of invokers stays at `target` meanwhile.
fn decided(
    target: usize,
    samples: impl IntoIterator<Item = Sample>,
    now: Millis,
    config: &Config,
) -> Decision {
    let (mut history, mut policy) = (History::new(32, target, 0), Elastic::default());
    for sample in samples {
        history.record(sample, config);
        policy.decide(&history, sample.at, config);
    }
    let decision = policy.decide(&history, now, config);
    assert_eq!(decision, policy.decide(&history, now, config), "asked twice");
    decision
}

#[track_caller]
fn expect(
    (current, samples): (usize, impl IntoIterator<Item = Sample>),
    now: Millis,
    config: &Config,
    target: usize,
    reason: Reason,
) {
    assert_eq!(decided(current, samples, now, config), Decision { target, reason });
}

#[test]
fn backlog_is_drained_within_the_catch_up_target() {
    // One invoker drains 200 MB/s * 0.35 s = 70 MB in time.
    let config = Config { max_invokers: 16, ..config() };
    for (bytes, target) in [
        (1, 1),
        (70_000_000, 1),
        (70_000_001, 2),
        (140_000_001, 3),
        (700_000_000, 10),
        (70_000_000_000, 16),
        (u64::MAX, 16),
    ] {
        expect((0, [sample(0, bytes)]), 0, &config, target, Reason::FirstWork);
    }
    let slow = Sample { service_bytes_per_s: 20e6, ..sample(0, 70_000_000) };
    expect((1, [slow]), 0, &config, 10, Reason::Backlog);
}

#[test]
fn the_backlog_is_not_spread_wider_than_its_partitions() {
    let config = Config { max_invokers: 100, ..config() };
    let narrow = Sample { active_partitions: 3, ..sample(0, 1 << 40) };
    expect((0, [narrow]), 0, &config, 3, Reason::FirstWork);
    // And there are never more invokers than partitions.
    let wide = Sample { active_partitions: 1000, ..sample(0, 1 << 40) };
    expect((0, [wide]), 0, &config, 32, Reason::FirstWork);
}

#[test]
fn contributions_that_wait_for_their_round_need_no_cpu() {
    let config = config();
    let waiting = |share: f64| Sample { waiting_for_round: share * 256.0, ..sample(0, 256 * MIB) };
    expect((1, [waiting(0.0)]), 0, &config, 4, Reason::Backlog);
    expect((1, [waiting(0.5)]), 0, &config, 2, Reason::Backlog);
    expect((1, [waiting(1.0)]), 0, &config, 1, Reason::Steady);
    expect((1, [waiting(9.0)]), 0, &config, 1, Reason::Steady);
    // Results come on top of contributions.
    expect((1, [Sample { handled_per_byte: 2.0, ..waiting(0.5) }]), 0, &config, 4, Reason::Backlog);
    // But they need somebody who holds them.
    expect((0, [waiting(1.0)]), 0, &config, 1, Reason::FirstWork);
}

#[test]
fn missing_and_stale_observations_change_nothing() {
    let config = config();
    for target in [0, 1, 3] {
        expect((target, []), 5, &config, target, Reason::Unobserved);
        expect((target, [sample(0, u64::MAX)]), 1001, &config, target, Reason::Unobserved);
        expect((target, steady(0, 20_000, 0)), 21_001, &config, target, Reason::Unobserved);
        let (mut history, mut policy) = (History::new(32, target, 0), Elastic::default());
        for sample in steady(0, 20_000, 0) {
            history.record(sample, &config);
            policy.decide(&history, sample.at, &config);
        }
        history.interrupt(20_001);
        let decision = policy.decide(&history, 20_002, &config);
        assert_eq!(decision, Decision { target, reason: Reason::Unobserved });
    }
}

#[test]
fn shrinks_to_what_was_needed_in_the_window() {
    let config = config();
    // Two needed in a burst at 1 s, otherwise one: four shrink to two, later to one.
    let burst = |to| steady(0, to, 1).map(|s| if s.at == 1000 { sample(1000, 100_000_000) } else { s });
    expect((4, burst(9800)), 9800, &config, 4, Reason::Steady);
    expect((4, burst(10_000)), 10_000, &config, 2, Reason::Shrink);
    expect((2, burst(11_000)), 11_000, &config, 2, Reason::Steady);
    expect((2, burst(11_200)), 11_200, &config, 1, Reason::Shrink);
    // A gap in the observations starts the window anew.
    let gap = steady(0, 9000, 1).chain(steady(10_200, 12_000, 1));
    expect((4, gap), 12_000, &config, 4, Reason::Steady);
}

#[test]
fn a_fleet_that_keeps_up_is_not_dismantled_for_it() {
    let config = config();
    let busy = |sum: f64| steady(0, 12_000, 1).map(move |s| Sample { busy: sum, ..s });
    expect((4, busy(2.5)), 12_000, &config, 4, Reason::Steady);
    expect((4, busy(1.4)), 12_000, &config, 2, Reason::Shrink);
    // Load alone never grows the fleet.
    expect((2, busy(2.0)), 12_000, &config, 2, Reason::Steady);
}

#[test]
fn goes_to_the_minimum_only_after_idling_throughout() {
    let config = config();
    expect((1, steady(0, 9800, 0)), 9800, &config, 1, Reason::Steady);
    expect((1, steady(0, 10_000, 0)), 10_000, &config, 0, Reason::Idle);
    expect((3, steady(0, 10_000, 0)), 10_000, &config, 0, Reason::Idle);
    // One message in between.
    let once = |to| steady(0, to, 0).map(|s| if s.at == 5000 { sample(5000, 1) } else { s });
    expect((1, once(15_000)), 15_000, &config, 1, Reason::Steady);
    expect((1, once(15_200)), 15_200, &config, 0, Reason::Idle);
    // One that is held for ever keeps one invoker for ever.
    let held = steady(0, 60_000, 1).map(|s| Sample { waiting_for_round: 1.0, ..s });
    expect((3, held), 60_000, &config, 1, Reason::Shrink);
    let config = Config { min_invokers: 2, ..config };
    expect((4, steady(0, 10_000, 0)), 10_000, &config, 2, Reason::Idle);
}

#[test]
fn an_idle_fleet_shrinks_to_one_before_it_goes() {
    let config = Config { idle_timeout_ms: 30_000, ..Config::default() };
    expect((4, steady(0, 10_000, 0)), 10_000, &config, 1, Reason::Shrink);
    expect((1, steady(0, 29_800, 0)), 29_800, &config, 1, Reason::Steady);
    expect((1, steady(0, 30_000, 0)), 30_000, &config, 0, Reason::Idle);
}

#[test]
fn a_grow_window_asks_for_a_lasting_backlog_but_not_of_the_first() {
    let config = Config { grow_window_ms: 1000, ..config() };
    let late = |from| steady(0, 5000, 1).map(move |s| if s.at >= from { sample(s.at, u64::MAX) } else { s });
    expect((1, late(4200)), 5000, &config, 1, Reason::Steady);
    expect((1, late(4000)), 5000, &config, 4, Reason::Backlog);
    expect((0, late(5000)), 5000, &config, 1, Reason::FirstWork);
}

#[test]
fn bounds_hold_without_work_too() {
    let config = Config { min_invokers: 2, ..Config::default() };
    expect((0, [sample(0, 0)]), 0, &config, 2, Reason::Bounds);
    expect((9, [sample(0, 1)]), 0, &config, 4, Reason::Bounds);
}

fn key(name: &str) -> JobKey {
    JobKey { tenant: "default".parse().unwrap(), job: name.parse().unwrap() }
}

/// Jobs whose demand is known, and queues that are as the test wants them.
struct World {
    config: Config,
    history: History,
    policy: Elastic,
    now: Millis,
    reasons: Vec<(Millis, usize, Reason)>,
}

impl World {
    fn new(config: Config, target: usize) -> Self {
        let history = History::new(32, target, 0);
        Self { config, history, policy: Elastic::default(), now: 0, reasons: Vec::new() }
    }

    /// A job of this work (invoker-seconds at 200 MB/s), think time and period, seconds, whose last round ended now.
    fn round(&mut self, name: &str, work: f64, think: f64, period: f64) {
        let demand = Demand {
            round_bytes: work * 200e6,
            result_bytes: 0.0,
            shards: 0.0,
            period_ms: period * 1000.0,
            recent_period_ms: period * 1000.0,
            jitter_ms: 0.0,
            delay_ms: (period - think) * 1000.0,
            moved_at: self.now,
            heard_at: self.now,
            reference: None,
        };
        self.history.jobs_mut().set(key(name), demand);
    }

    fn tick(&mut self, seen: Sample) {
        self.now += TICK;
        self.history.record(Sample { at: self.now, serving: self.history.target(), ..seen }, &self.config);
        let decision = self.policy.decide(&self.history, self.now, &self.config);
        if decision.target != self.history.target() {
            self.reasons.push((self.now, decision.target, decision.reason));
        }
        self.history.set_target(decision.target);
    }

    fn pass(&mut self, millis: Millis, seen: Sample) {
        (0..millis / TICK).for_each(|_| self.tick(seen));
    }
}

#[test]
fn known_jobs_get_what_keeps_their_limits_and_no_more() {
    // Four jobs that are busy a tenth of their time on two invokers of their own.
    for (limit, invokers) in [(0.5, 1), (0.1, 2), (0.02, 3)] {
        let mut world = World::new(Config { slowdown_limit: limit, max_invokers: 16, ..config() }, 0);
        for name in ["a", "b", "c", "d"] {
            world.round(name, 0.2, 0.9, 1.0);
        }
        // All four rounds in the queues at once are no backlog.
        world.tick(sample(0, 160_000_000));
        assert_eq!(world.history.target(), invokers, "{limit}: {:?}", world.reasons);
        assert_eq!(world.reasons[0].2, Reason::FirstWork);
    }
}

#[test]
fn more_jobs_need_more_and_the_reason_is_told() {
    let mut world = World::new(Config { max_invokers: 16, ..config() }, 2);
    for number in 0..20 {
        world.round(&format!("job-{number}"), 0.2, 0.9, 1.0);
    }
    world.tick(sample(0, 1));
    assert!(world.history.target() > 2, "{:?}", world.reasons);
    assert_eq!(world.reasons[0].2, Reason::Slowdown);
    let before = world.history.target();
    for _ in 0..60 {
        world.round("job-0", 0.2, 0.9, 1.0);
        world.pass(1000, sample(0, 1));
    }
    // The others have ended.
    assert!(world.history.target() < before, "{:?}", world.reasons);
}

#[test]
fn a_burst_is_prepared_for_and_the_gap_after_it_pays() {
    let mut world = World::new(Config { gap_pays_ms: 10_000, ..config() }, 0);
    let burst = Sample { start_delay_ms: 300.0, ..sample(0, 1 << 20) };
    let quiet = Sample { start_delay_ms: 300.0, ..sample(0, 0) };
    for _ in 0..5 {
        world.pass(1000, burst);
        world.round("slow", 1.0, 59.0, 60.0);
        world.pass(59_000, quiet);
    }
    let ups: Vec<_> = world.reasons.iter().filter(|(_, target, _)| *target > 0).collect();
    let downs = world.reasons.iter().filter(|(_, target, reason)| *target == 0 && *reason == Reason::Gap);
    assert!(downs.count() >= 4, "{:?}", world.reasons);
    assert_eq!(ups[0].2, Reason::FirstWork);
    for (at, _, reason) in &ups[1..] {
        assert_eq!(*reason, Reason::Prewarm, "{:?}", world.reasons);
        // Shortly before the burst, which begins at whole minutes.
        let before = 60_000 - at % 60_000;
        assert!((1000..=2500).contains(&before), "{before} ms before");
    }
}

#[test]
fn a_burst_that_does_not_come_is_not_waited_for() {
    let mut world = World::new(config(), 0);
    world.pass(1000, sample(0, 1));
    world.round("gone", 1.0, 59.0, 60.0);
    world.pass(400_000, sample(0, 0));
    assert_eq!(world.history.target(), 0);
    assert!(world.reasons.len() <= 4, "{:?}", world.reasons);
}

#[test]
fn a_shrink_that_broke_a_limit_is_reverted_and_not_repeated_soon() {
    let mut world = World::new(Config { max_invokers: 8, ..config() }, 4);
    // Its work is twice what was measured: what the model promises on one invoker does not hold.
    for _ in 0..300 {
        let period = if world.history.target() < 4 { 1.6 } else { 1.0 };
        world.round("a", 0.1, 0.9, 1.0);
        let mut demand = *world.history.jobs().active(world.now).next().unwrap().1;
        demand.recent_period_ms = period * 1000.0;
        world.history.jobs_mut().set(key("a"), demand);
        world.pass(1000, sample(0, 1));
    }
    let reasons: Vec<_> = world.reasons.iter().map(|(_, _, reason)| *reason).collect();
    assert_eq!(reasons[..2], [Reason::Shrink, Reason::Reverted], "{:?}", world.reasons);
    let reverts = reasons.iter().filter(|reason| **reason == Reason::Reverted).count();
    assert!((2..=3).contains(&reverts), "{:?}", world.reasons);
}

#[test]
fn growth_without_effect_ends() {
    let mut world = World::new(Config { max_invokers: 64, ..config() }, 1);
    let mut arrived = 0;
    let mut backlog = 0;
    for _ in 0..150 {
        // A hundred messages a tick come in and ten leave, however many invokers there are.
        arrived += 100;
        backlog += 90;
        let seen = Sample { messages: backlog, bytes: backlog << 19, arrived, ..sample(0, 0) };
        world.tick(Sample { active_partitions: 32, ..seen });
    }
    assert!(world.history.target() < 32, "{:?}", world.reasons);
}

/// Open load: as much as the invokers can is done, the rest piles up.
fn open_load(
    world: &mut World,
    millis: Millis,
    backlog: &mut f64,
    mut load: impl FnMut() -> f64,
    arrived: &mut f64,
) {
    for _ in 0..millis / TICK {
        let seconds = TICK as f64 / 1000.0;
        let came = load() * seconds * 200e6;
        let can = world.history.target() as f64 * seconds * 200e6;
        *arrived += came;
        let done = can.min(*backlog + came);
        *backlog += came - done;
        let bytes = backlog.max(came / 10.0) as u64;
        let messages = bytes.div_ceil(1 << 19);
        let busy = done / seconds / 200e6;
        let seen =
            Sample { messages, bytes, busy, arrived: (*arrived / f64::from(1 << 19)) as u64, ..sample(0, 0) };
        world.tick(seen);
    }
}

#[test]
fn a_step_is_followed_in_a_few_decisions_and_noise_by_none() {
    let mut world = World::new(Config { max_invokers: 32, ..Config::default() }, 0);
    let (mut backlog, mut arrived) = (0.0, 0.0);
    open_load(&mut world, 20_000, &mut backlog, || 0.6, &mut arrived);
    assert_eq!(world.history.target(), 1, "{:?}", world.reasons);
    world.reasons.clear();
    open_load(&mut world, 2000, &mut backlog, || 4.8, &mut arrived);
    assert!((7..=9).contains(&world.history.target()), "{:?}", world.reasons);
    assert!(world.reasons.len() <= 3, "{:?}", world.reasons);
    open_load(&mut world, 30_000, &mut backlog, || 4.8, &mut arrived);
    world.reasons.clear();
    let mut seed = 7_u64;
    let noisy = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        4.8 * (0.8 + 0.4 * (seed >> 33) as f64 / f64::from(1_u32 << 31))
    };
    open_load(&mut world, 60_000, &mut backlog, noisy, &mut arrived);
    // One more may be right; back and forth is not.
    assert!(world.reasons.len() <= 1 && world.history.target() >= 7, "{:?}", world.reasons);
    open_load(&mut world, 40_000, &mut backlog, || 0.6, &mut arrived);
    assert_eq!(world.history.target(), 1, "{:?}", world.reasons);
    world.pass(11_000, sample(0, 0));
    assert_eq!(world.history.target(), 0);
}

#[test]
fn a_thousand_idle_jobs_and_strange_ones_ask_for_nothing() {
    let mut world = World::new(config(), 0);
    for number in 0..1000 {
        world.round(&format!("idle-{number}"), 0.1, 1.0, 1.1);
    }
    world.round("an-hour", 1.0, 3599.0, 3600.0);
    world.round("a-millisecond", 0.0001, 0.0009, 0.001);
    world.pass(120_000, sample(0, 0));
    assert_eq!(world.history.target(), 0, "{:?}", world.reasons);
    world.pass(200, sample(0, 1));
    assert_eq!(world.history.target(), 1);
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
            let base = Sample { active_partitions, waiting_for_round, busy, ..self::sample(at, bytes) };
            Sample { messages, service_bytes_per_s, ..base }
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
            ..config()
        },
    )
}

proptest! {
    #[test]
    fn decisions_keep_their_promises(
        config in configs(), target in 0_usize..9, samples in samples(), later in 0_u64..1500,
    ) {
        let target = target.min(config.max_invokers);
        let now = samples.last().map_or(0, |last| last.at) + later;
        let decision = decided(target, samples.clone(), now, &config);

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
            decided(target, rest, last.at, &config).target
        };
        prop_assert!(with(heavier) >= with(lighter));
    }
}

use super::*;
use crate::{Config, Elastic, Fixed, Keda};

const CONSTANTS: Constants = Constants {
    service_bytes_per_s: 1e9,
    start_delay_ms: 300,
    stop_delay_ms: 100,
    message_bytes: 524_288.0,
    partitions: 1024,
};

/// A tenth of its time busy on `servers` of its own.
fn job(start_s: f64, duration_s: f64, servers: f64) -> TraceJob {
    let work = 0.1e9 * servers;
    TraceJob {
        start_s,
        duration_s,
        round_bytes: work * 0.75,
        result_bytes: work * 0.25,
        think_s: 0.9,
        servers,
    }
}

fn config() -> Config {
    Config { max_invokers: 200, ..Config::default() }
}

/// The same with the coarse look that is enough between arrivals.
fn coarse() -> Config {
    Config { tick_ms: 2000, ..config() }
}

#[test]
fn alone_on_its_own_servers_a_job_is_not_slowed() {
    let jobs = [job(10.0, 100.0, 2.0)];
    let mut policy = Fixed { invokers: 2 };
    let start = State { at: 0.0, invokers: 2, jobs: Vec::new() };
    let (score, _) =
        fluid(&jobs, &mut policy, (&config(), &CONSTANTS, 1), (Some(&start), 200_000.0), &[], &mut |_| {});
    assert!(score.slowdown_max().abs() < 1e-9, "{}", score.slowdown_max());
    assert!((score.invoker_seconds - 400.0).abs() < 1e-6);
    let (played, rounds) =
        events(&jobs, &mut policy, (&config(), &CONSTANTS, 1), (&start, 200_000.0), &Thinking::Around(0.1));
    assert!(played.slowdown_max().abs() < 1e-9);
    assert_eq!(rounds.jobs[0].1, 100);
}

#[test]
fn fewest_servers_hold_the_limit() {
    let heavy = TraceJob {
        start_s: 0.0,
        duration_s: 1.0,
        round_bytes: 0.6e9,
        result_bytes: 0.2e9,
        think_s: 0.8,
        servers: 4.0,
    };
    // 1 s on four; 0.8 + 0.8 / 3 = 1.067 on three, 1.2 on two.
    assert!((heavy.fewest_servers(0.1, &CONSTANTS) - 3.0).abs() < 1e-9);
    assert!((heavy.fewest_servers(0.3, &CONSTANTS) - 2.0).abs() < 1e-9);
    assert!((heavy.fewest_servers(9.0, &CONSTANTS) - 1.0).abs() < 1e-9);
}

#[test]
fn an_elastic_pool_needs_a_fraction_and_ends_with_its_jobs() {
    let jobs: Vec<_> = (0..40).map(|number| job(f64::from(number) * 60.0, 3600.0, 4.0)).collect();
    let asked: f64 = jobs.iter().map(|job| job.duration_s * job.servers).sum();
    let mut policy = Elastic::default();
    let (score, states) = fluid(
        &jobs,
        &mut policy,
        (&coarse(), &CONSTANTS, 1),
        (None, f64::INFINITY),
        &[1_800_000.0],
        &mut |_| {},
    );
    assert_eq!(score.slowdowns.len(), 40);
    assert!(score.slowdown_max() <= 0.1, "{}", score.slowdown_max());
    assert!(score.invoker_seconds < 0.25 * asked, "{} of {asked}", score.invoker_seconds);
    assert_eq!(states[0].jobs.len(), 30);
    // Work that must be done whatever the policy.
    let work: f64 = jobs.iter().map(|job| job.duration_s * 0.4).sum();
    assert!(score.invoker_seconds > work);
    let again = fluid(
        &jobs,
        &mut Elastic::default(),
        (&coarse(), &CONSTANTS, 1),
        (None, f64::INFINITY),
        &[1_800_000.0],
        &mut |_| {},
    );
    assert_eq!(again, (score, states), "deterministic");
}

#[test]
fn means_and_single_rounds_agree() {
    let jobs: Vec<_> =
        (0..12).map(|number| job(f64::from(number), 1e5, 1.0 + f64::from(number % 4))).collect();
    let state = State { at: 60_000.0, invokers: 6, jobs: (0..12).map(|index| (index, 1e4)).collect() };
    let until = 360_000.0;
    for invokers in [6, 8, 12] {
        let state = State { invokers, ..state.clone() };
        let mut policy = Fixed { invokers };
        let (means, _) =
            fluid(&jobs, &mut policy, (&coarse(), &CONSTANTS, 1), (Some(&state), until), &[], &mut |_| {});
        let (played, _) =
            events(&jobs, &mut policy, (&config(), &CONSTANTS, 1), (&state, until), &Thinking::Around(0.3));
        let off = means.ratio_mean() / played.ratio_mean() - 1.0;
        assert!(off.abs() < 0.02, "{invokers}: {} {}", means.ratio_mean(), played.ratio_mean());
    }
}

#[test]
fn a_policy_on_depth_sees_depth() {
    let jobs: Vec<_> = (0..20).map(|number| job(f64::from(number), 3000.0, 4.0)).collect();
    let (score, _) = fluid(
        &jobs,
        &mut Keda::new(20.0),
        (&coarse(), &CONSTANTS, 3),
        (None, f64::INFINITY),
        &[],
        &mut |_| {},
    );
    assert_eq!(score.slowdowns.len(), 20);
    assert!(score.scale_events > 2, "{}", score.scale_events);
}

#[test]
fn the_policy_learns_single_rounds_like_heartbeats() {
    let jobs: Vec<_> = (0..4).map(|_| job(1.0, 60.0, 2.0)).collect();
    let state = State { at: 0.0, invokers: 0, jobs: Vec::new() };
    let config = Config { max_invokers: 16, ..Config::default() };
    let constants = Constants { partitions: 32, ..CONSTANTS };
    let (score, rounds) = events(
        &jobs,
        &mut Elastic::default(),
        (&config, &constants, 1),
        (&state, 200_000.0),
        &Thinking::Around(0.05),
    );
    assert_eq!(rounds.jobs.len(), 4);
    assert!(score.slowdown_max() < 0.1, "{:?}", score.slowdowns);
    // Four jobs with two servers each for a minute.
    assert!(score.invoker_seconds < 0.4 * 480.0, "{}", score.invoker_seconds);
}

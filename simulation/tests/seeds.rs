//! Seeds whose every invariant holds, and bugs that the simulation must find.

use std::sync::atomic::{AtomicU64, Ordering};

use thalweg_simulation::{Mutation, Options, Report, minimise, run};

const SEEDS: u64 = 1000;
/// Seeds within which each bug must be found.
const TO_FIND: u64 = 2000;
/// Seeds that once broke something; `docs/simulation.md` tells what.
const REGRESSIONS: [u64; 42] = [
    5, 17, 19, 27, 41, 153, 200, 311, 513, 527, 600, 708, 724, 781, 824, 980, 1030, 1302, 1496, 1683, 1963,
    2055, 2075, 2171, 2796, 2910, 3928, 5975, 6071, 6870, 7126, 7949, 14_123, 15_112, 15_192, 15_527, 18_896,
    29_104, 37_260, 51_619, 55_500, 69_223,
];

fn play(seed: u64, mutation: Option<Mutation>) -> Report {
    run(&Options { seed, mutation, ..Options::default() }).expect("the simulation runs")
}

fn hold(seeds: impl IntoIterator<Item = u64>) -> u64 {
    let mut faults = 0;
    for seed in seeds {
        let report = play(seed, None);
        faults += report.faults.len() as u64;
        if let Some(violation) = report.violation {
            panic!("seed {seed}: {violation}; replay: thalweg-simulate --seed {seed} --minimise");
        }
    }
    faults
}

#[test]
fn every_invariant_holds_in_a_thousand_seeds() {
    let faults = hold(0..SEEDS);
    assert!(faults > 5 * SEEDS, "only {faults} faults");
}

#[test]
fn what_was_found_once_stays_mended() {
    hold(REGRESSIONS);
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in [42, 43, 44] {
        let play = || run(&Options { seed, trace: true, ..Options::default() }).expect("the simulation runs");
        let (one, other) = (play(), play());
        assert_eq!((one.steps, one.virtual_ms, &one.trace), (other.steps, other.virtual_ms, &other.trace));
    }
}

#[test]
fn bugs_put_back_are_found() {
    let next = AtomicU64::new(0);
    let hunt = || loop {
        let index = usize::try_from(next.fetch_add(1, Ordering::Relaxed)).expect("few");
        let Some(mutation) = Mutation::all().get(index).copied() else { return };
        let found = (0..TO_FIND).find(|seed| play(*seed, Some(mutation)).violation.is_some());
        let Some(seed) = found else { panic!("{} is not found in {TO_FIND} seeds", mutation.name()) };
        eprintln!("{}: seed {seed}", mutation.name());
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(hunt)).collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

#[test]
fn a_history_is_made_shorter_without_losing_what_it_shows() {
    let options = Options { seed: 0, mutation: Some(Mutation::PublishBeforeCommit), ..Options::default() };
    let whole = run(&options).expect("the simulation runs");
    let (shorter, report) = minimise(&options).expect("the simulation runs").expect("it breaks something");
    let (before, after) = (whole.violation.expect("it breaks"), report.violation.expect("it still breaks"));
    assert_eq!(before.invariant, after.invariant);
    assert!(report.faults.len() < whole.faults.len(), "{} faults are left", report.faults.len());
    assert!(!report.trace.is_empty());
    // What is printed replays it.
    let again = run(&shorter).expect("the simulation runs");
    assert_eq!((again.steps, again.trace), (report.steps, report.trace));
}

//! Seeds whose every invariant holds, and bugs that the simulation must find.

use thalweg_simulation::{Mutation, Options, run};

const SEEDS: u64 = 1000;
/// Seeds within which each bug must be found.
const TO_FIND: u64 = 2000;

#[test]
fn every_invariant_holds_in_a_thousand_seeds() {
    for seed in 0..SEEDS {
        let report = run(&Options { seed, mutation: None, trace: false }).expect("the simulation runs");
        assert!(report.faults > 0 || report.virtual_ms < 6000, "seed {seed} had no fault");
        if let Some(violation) = report.violation {
            panic!("seed {seed}: {violation}; replay: thalweg-simulate --seed {seed}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    let play = || run(&Options { seed: 42, mutation: None, trace: true }).expect("the simulation runs");
    let (one, other) = (play(), play());
    assert_eq!((one.steps, one.virtual_ms, &one.trace), (other.steps, other.virtual_ms, &other.trace));
}

#[test]
fn bugs_put_back_are_found() {
    for mutation in Mutation::ALL {
        let found = (0..TO_FIND).find(|seed| {
            let options = Options { seed: *seed, mutation: Some(mutation), trace: false };
            run(&options).expect("the simulation runs").violation.is_some()
        });
        assert!(found.is_some(), "{} is not found in {TO_FIND} seeds", mutation.name());
        eprintln!("{}: seed {}", mutation.name(), found.unwrap_or_default());
    }
}

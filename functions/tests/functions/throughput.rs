//! How fast shards fold: `cargo test --release -p thalweg-functions throughput -- --ignored --nocapture`.

use std::time::Instant;

use thalweg_functions::{Contribution, ShardContext, first_non_finite};
use thalweg_protocol::FunctionSpec;

use crate::common::{bytes, function};

#[test]
#[ignore = "prints measurements, asserts nothing"]
fn throughput() {
    const ELEMENTS: usize = 128 * 1024;
    const WORKERS: u32 = 8;
    const ROUNDS: u32 = 200;
    let values: Vec<Vec<u8>> = (0..WORKERS).map(|rank| bytes(&vec![rank as f32 + 0.3; ELEMENTS])).collect();
    let sgd = FunctionSpec::named("sgd").number("lr", 0.1);
    let nesterov = sgd.clone().number("momentum", 0.9).flag("nesterov", true).number("weight_decay", 0.01);
    let specs = ["sum", "mean", "weighted_mean"].map(FunctionSpec::named);
    for spec in specs.into_iter().chain([sgd, nesterov]) {
        let function = function(&spec);
        let state = vec![0; 4 * ELEMENTS * (1 + function.slots())];
        let mut out = Vec::new();
        let (mut accepting, mut finishing) = (0.0, 0.0);
        for _ in 0..ROUNDS {
            out.clear();
            let start = Instant::now();
            let mut fold = function.begin(ShardContext { elements: ELEMENTS, groups: &[] }, &state);
            for (rank, values) in (0..).zip(&values) {
                fold.accept(Contribution { rank, weight: 0.5, values });
            }
            accepting += start.elapsed().as_secs_f64();
            let start = Instant::now();
            fold.finish(&mut out);
            finishing += start.elapsed().as_secs_f64();
        }
        let folded = f64::from(ROUNDS) * f64::from(WORKERS) * (4 * ELEMENTS) as f64 / 1e9;
        let finished = f64::from(ROUNDS) * out.len() as f64 / 1e9;
        println!(
            "{:14} {} slots: accept {:5.1} GB/s, finish {:5.1} GB/s, round of {WORKERS} {:5.1} GB/s",
            spec.name,
            function.slots(),
            folded / accepting,
            finished / finishing,
            folded / (accepting + finishing),
        );
    }
    let start = Instant::now();
    for _ in 0..ROUNDS {
        assert!(values.iter().all(|values| first_non_finite(std::hint::black_box(values)).is_none()));
    }
    let scanned = f64::from(ROUNDS) * f64::from(WORKERS) * (4 * ELEMENTS) as f64 / 1e9;
    println!("first_non_finite {:5.1} GB/s", scanned / start.elapsed().as_secs_f64());
}

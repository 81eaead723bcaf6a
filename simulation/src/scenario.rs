//! What a seed plays: jobs, sizes and limits.

use rand::{RngExt as _, rngs::StdRng};
use thalweg_invoker::core::Limits;
use thalweg_protocol::{
    Durability, FoldOrder, FunctionSpec, Init, JobKey, JobSpec, Mode, NonFinite, OnLoss, Partition, Policy,
    Round, TensorSpec,
};

use crate::network::Millis;

pub(crate) struct Scenario {
    pub(crate) specs: Vec<JobSpec>,
    pub(crate) rounds: Round,
    pub(crate) partitions: Partition,
    /// Work queues in files.
    pub(crate) files: bool,
    /// Invokers are on the store's host.
    pub(crate) direct: bool,
    pub(crate) window_budget: u64,
    /// Workers use this part of their windows, since the least one is large beside these models.
    pub(crate) window_divisor: u64,
    pub(crate) most_invokers: usize,
    pub(crate) limits: Limits,
    /// Clocks of invokers are up to so much fast or slow.
    pub(crate) most_skew: Millis,
    pub(crate) faults_until: Millis,
    pub(crate) gateways: u32,
    pub(crate) autoscalers: u32,
}

const ELEMENTS: u32 = 64;

fn spec(rng: &mut StdRng, name: &str) -> anyhow::Result<JobSpec> {
    let (workers, shards) = (rng.random_range(1..=4_u32), rng.random_range(1..=4_u64));
    let function = match rng.random_range(0..3) {
        0 => FunctionSpec::named("sum"),
        1 => FunctionSpec::named("mean"),
        _ => FunctionSpec::named("sgd").number("lr", 0.05).number("momentum", 0.9),
    };
    let quorum = (workers > 1 && rng.random_bool(0.4)).then(|| rng.random_range(1..workers));
    Ok(JobSpec {
        key: JobKey { tenant: "t".parse()?, job: name.parse()? },
        tensors: vec![TensorSpec::f32("a", vec![shards * u64::from(ELEMENTS) - 3])],
        function,
        mode: Mode::Sync,
        workers,
        quorum,
        deadline_ms: rng.random_range(20..500),
        durability: if rng.random_bool(0.4) { Durability::Disk } else { Durability::Process },
        non_finite: if rng.random_bool(0.5) { NonFinite::Void } else { NonFinite::Propagate },
        init: Init::Zeros,
        shard_bytes: ELEMENTS * 4,
        max_members: 16,
        policy: Policy {
            on_loss: [OnLoss::Fail, OnLoss::RollBack, OnLoss::RollBack, OnLoss::Reseed]
                [rng.random_range(0..4)],
            order: if rng.random_bool(0.5) { FoldOrder::Arrival } else { FoldOrder::Rank },
            ..Policy::default()
        },
    })
}

impl Scenario {
    pub(crate) fn draw(rng: &mut StdRng) -> anyhow::Result<Self> {
        let mut specs = vec![spec(rng, "one")?];
        if rng.random_bool(0.25) {
            specs.push(spec(rng, "two")?);
        }
        let held_bytes = rng.random_range(1..=6) * ELEMENTS as usize * 4;
        Ok(Self {
            specs,
            rounds: rng.random_range(3..=10),
            partitions: rng.random_range(1..=4),
            files: rng.random_bool(0.3),
            direct: rng.random_bool(0.5),
            window_budget: [1 << 30, 20_000, 60_000][rng.random_range(0..3)],
            window_divisor: [1, 8, 32][rng.random_range(0..3)],
            most_invokers: rng.random_range(1..=3),
            limits: Limits {
                held_bytes,
                invocations: rng.random_range(1..=4),
                idle_shards: 64,
                partial_entries: rng.random_range(1..=4),
                linger: rng.random_range(1..400),
            },
            most_skew: rng.random_range(0..200),
            faults_until: rng.random_range(500..8000),
            gateways: rng.random_range(1..=2),
            autoscalers: if rng.random_bool(0.3) { 2 } else { 1 },
        })
    }
}

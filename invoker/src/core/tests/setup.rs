//! Jobs, workers and values of the model.

use bytes::Bytes;
use thalweg_functions::{Contribution, ShardContext};
use thalweg_protocol::{
    Durability, ErrorCode, FunctionSpec, Incarnation, Init, JobKey, JobSpec, Mode, NonFinite, Rank, Round,
    ShardIndex, TensorSpec, WireError,
};
use thalweg_store::StoreError;

use super::{
    super::Limits,
    model::{BYTES, ELEMENTS},
};

pub(super) fn limits() -> Limits {
    // No round is folded early unless a test wants it.
    Limits {
        held_bytes: 64 * BYTES,
        invocations: 4,
        idle_shards: 64,
        partial_entries: usize::MAX,
        linger: 1 << 40,
    }
}

pub(super) fn name(job: &str) -> JobKey {
    JobKey { tenant: "t".parse().unwrap(), job: job.parse().unwrap() }
}

/// The life of the worker that founded `rank`.
pub(super) fn worker(rank: Rank) -> Incarnation {
    Incarnation([u8::try_from(rank).unwrap() + 1; 16])
}

pub(super) fn spec(job: &str, workers: u32) -> JobSpec {
    JobSpec {
        key: name(job),
        tensors: vec![TensorSpec::f32("a", vec![ELEMENTS as u64 * 2])],
        function: FunctionSpec::named("sum"),
        mode: Mode::Sync,
        workers,
        quorum: None,
        deadline_ms: 1000,
        durability: Durability::Process,
        non_finite: NonFinite::Propagate,
        init: Init::Zeros,
        shard_bytes: BYTES as u32,
        max_members: 16,
        policy: thalweg_protocol::Policy::default(),
    }
}

/// Values whose sum depends on the order of adding.
pub(super) fn values(rank: Rank, shard: ShardIndex, round: Round) -> Vec<f32> {
    let seed = f32::from(u8::try_from(u64::from(rank * 31 + shard * 7) + round).unwrap());
    let big = if rank.is_multiple_of(2) { 3.0e7 } else { -3.0e7 };
    (0..ELEMENTS).map(|i| big * seed + 0.123 * seed / (i as f32 + 1.0)).collect()
}

/// The state of a shard after `rounds` undisturbed rounds of a `sum`.
pub(super) fn sum_in_rank_order(ranks: impl Iterator<Item = Rank>, shard: u32, round: Round) -> Bytes {
    let function = thalweg_functions::resolve(&FunctionSpec::named("sum")).unwrap();
    let mut fold = function.begin(ShardContext { elements: ELEMENTS, groups: &[], round });
    for rank in ranks {
        let bytes: Vec<u8> =
            values(rank, shard, round).iter().flat_map(|value| value.to_le_bytes()).collect();
        fold.accept(Contribution { rank, weight: 1.0, values: &bytes });
    }
    let mut out = Vec::new();
    fold.finish(&[], &mut out);
    out.into()
}

pub(super) fn unavailable() -> StoreError {
    StoreError::Unavailable("the model says so".to_owned())
}

pub(super) fn poisoned_error() -> WireError {
    WireError::new(ErrorCode::Internal, "the model says so")
}

//! Every limit of the wire in one place: name, unit, default and what happens beyond it.
//!
//! Beyond a limit the sender gets a typed [`crate::WireError`] that names the limit; nothing is
//! truncated in silence.

/// Longest tenant or job name, bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Longest tensor name, bytes.
pub const MAX_TENSOR_NAME_BYTES: usize = 256;
/// Longest worker id, bytes.
pub const MAX_WORKER_ID_BYTES: usize = 128;
/// Most tensors in one job. The job's record also has to fit one NATS message.
pub const MAX_TENSORS: usize = 65_536;
/// Most dimensions of one tensor.
pub const MAX_DIMS: usize = 16;
/// Most parameter groups in one job.
pub const MAX_GROUPS: usize = 64;
/// Most entries of `schedule.decay.steps.at` of a function.
pub const MAX_SCHEDULE_STEPS: usize = 64;
/// Most members a job may have; bounds the ledger in every slot header.
pub const MAX_MEMBERS: u32 = 16_384;
/// Most elements in one job's flattened parameter vector (2^40 f32 = 4 TiB).
pub const MAX_ELEMENTS: u64 = 1 << 40;
/// Most shards in one job.
pub const MAX_SHARDS: u64 = 1 << 23;
/// Default shard size, bytes of f32: as fast as larger ones and fits a default `max_payload` of 1 MiB.
pub const DEFAULT_SHARD_BYTES: u32 = 512 * 1024;
/// Smallest shard a job may ask for, bytes.
pub const MIN_SHARD_BYTES: u32 = 256;
/// What header, ledger and framing may add to the payload of one message, bytes. A ledger of
/// [`MAX_MEMBERS`] ranks takes two bitmaps of 2 KiB; one that records an order, [`ORDERED_RANK_BYTES`] a rank more.
pub const MESSAGE_OVERHEAD_BYTES: usize = 8 * 1024;
/// Most bytes of a rank in the recorded order of a ledger.
pub const ORDERED_RANK_BYTES: usize = 3;
/// What a suspended fold may take beyond one f32 an element, bytes.
pub const PARTIAL_OVERHEAD_BYTES: usize = 256;
/// Most open rounds in one answer of the store.
pub const MAX_OPEN_ROUNDS: u32 = 256;
/// Most jobs in one heartbeat of an invoker.
pub const MAX_BEAT_JOBS: usize = 256;
/// Default number of partitions.
pub const DEFAULT_PARTITIONS: u16 = 32;
/// Most partitions a deployment may have.
pub const MAX_PARTITIONS: u16 = 1024;
/// Longest deadline of a round, milliseconds: a week.
pub const MAX_DEADLINE_MS: u64 = 7 * 24 * 3_600_000;
/// Longest human-readable message in a wire error, bytes; longer ones are cut with an ellipsis.
pub const MAX_ERROR_BYTES: usize = 1024;
/// Most entries of a page of any list.
pub const MAX_PAGE: u32 = 1000;
/// Seconds without a request after which a store forgets a hold.
pub const HOLD_SECONDS: u64 = 60;
/// Most holds on one job at once: each may take another slot a shard.
pub const MAX_HOLDS: usize = 4;
/// Most settings revisions that a job keeps ahead of its slowest shard.
pub const MAX_REVISIONS: usize = 64;
/// Longest reason of a pause or an abort, bytes.
pub const MAX_REASON_BYTES: usize = 512;

//! The words of Thalweg's wire: ids, messages, records, subjects, limits and errors.
//!
//! No I/O happens here, and no other crate of the project is used: whoever wants to speak to a
//! Thalweg deployment needs this crate and a NATS connection. A message is a [`frame`]: a fixed
//! prelude with wire version and checksum, a header, and a payload that is borrowed, never copied,
//! when the frame is opened.

mod agents;
mod error;
mod event;
pub mod frame;
mod ids;
mod layout;
mod ledger;
pub mod limits;
mod messages;
#[cfg(feature = "openapi")]
mod openapi;
mod records;
mod schedule;
pub mod snapshot;
mod spec;
pub mod subjects;
mod trace;

pub use agents::{AgentBeat, AgentReply, AgentRequest};
pub use error::{ErrorCode, WireError};
pub use event::{Event, EventKind};
pub use frame::{FrameBuilder, FrameError, Kind, WIRE_VERSION, checksum};
pub use ids::{
    Epoch, Incarnation, InvalidId, InvalidName, JobKey, Name, Partition, Rank, Round, ShardIndex, StateId,
    StoreId, Version,
};
pub use layout::{Layout, offsets, partition_of};
pub use ledger::{Head, Ledger, Partial, RankSet};
pub use messages::{
    ApiReply, ApiRequest, Claim, Commit, CommitOutcome, GradientHeader, HandedOver, Handover, JobCommand,
    JobSummary, KeptConsumer, MAX_HEADS, Nudge, OpenRound, PartialCommit, Progress, Reject, ResultHeader,
    SettingsChange, StoreJob, StoreReply, StoreRequest, WorkerRef,
};
pub use records::{
    InvokerBeat, InvokerState, JobLoad, JobRecord, JobState, Lease, Life, Member, Origin, PLACEMENT_KEY,
    PlacedPartition, Placement, Roster, STORE_KEY, STREAMS_KEY, StoreRecord, Streams, Suspect, job_key,
    lease_key, placement_key, roster_key, suspect_key,
};
pub use schedule::{Decay, Schedule};
pub use spec::{
    Dtype, Durability, FoldOrder, FunctionSpec, Init, JobSpec, Mode, NonFinite, OnLoss, ParameterGroup,
    Policy, Setting, Settings, SettingsRevision, TensorSpec,
};
pub use trace::{MAX_SPANS, Span, SpanId, Stage, TRACEPARENT, TraceId, TraceQuery, TraceReply};

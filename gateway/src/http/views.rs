//! What HTTP shows of records whose own form is that of the wire.

use serde::Serialize;
use thalweg_protocol::{
    Durability, JobKey, JobRecord, JobState, JobSummary, Member, Name, Roster, SettingsRevision, WireError,
};
use utoipa::ToSchema;

use crate::control::summary;

/// A job in a list.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobEntry {
    tenant: Name,
    job: Name,
    /// Id of this life of it.
    incarnation: String,
    /// `creating`, `initialising`, `running`, `paused`, `failed`, `aborted` or `deleting`.
    state: String,
    /// Name of its function.
    function: String,
    durability: Durability,
    /// Founding members.
    workers: u32,
    /// Members that have not left.
    members: u32,
    /// Elements of the model.
    elements: u64,
}

impl From<JobSummary> for JobEntry {
    fn from(job: JobSummary) -> Self {
        Self {
            tenant: job.key.tenant,
            job: job.key.job,
            incarnation: job.incarnation.to_string(),
            state: job.state,
            function: job.function,
            durability: job.durability,
            workers: job.workers,
            members: job.members,
            elements: job.elements,
        }
    }
}

/// A page of jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobPage {
    /// In the order of tenant and name.
    pub(super) jobs: Vec<JobEntry>,
    /// What to ask for as `after` to get the next page; `null` with the last one.
    pub(super) next: Option<String>,
}

/// A job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Job)]
pub(super) struct JobView {
    #[serde(flatten)]
    entry: JobEntry,
    /// Why it is paused, if it is.
    paused: Option<String>,
    /// Why it has ended, if it has.
    error: Option<WireError>,
    /// Number of tensors.
    tensors: usize,
    /// Number of shards.
    shards: u32,
    /// Optimizer slots beside the parameters.
    slots: u32,
    roster: RosterView,
}

impl JobView {
    pub(super) fn new(record: &JobRecord, roster: &Roster) -> Self {
        let error = match &record.state {
            JobState::Failed(error) => Some(error.clone()),
            _ => None,
        };
        Self {
            entry: summary(record, Some(roster)).into(),
            paused: record.life.paused.clone(),
            error,
            tensors: record.spec.tensors.len(),
            shards: record.layout.shards(),
            slots: record.slots,
            roster: RosterView::new(roster),
        }
    }
}

/// Who counts in which rounds.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Roster)]
pub(super) struct RosterView {
    /// Grows with every change.
    epoch: u64,
    /// Whether all founding members have joined.
    started: bool,
    /// Present and recent members.
    members: Vec<MemberView>,
}

impl RosterView {
    pub(super) fn new(roster: &Roster) -> Self {
        let member = |member: &Member| MemberView {
            rank: member.rank,
            worker: member.worker.clone(),
            from_round: member.from_round,
            until_round: member.until_round,
        };
        Self {
            epoch: roster.epoch,
            started: roster.started,
            members: roster.members.iter().map(member).collect(),
        }
    }
}

/// One rank's tenure.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Member)]
pub(super) struct MemberView {
    rank: u32,
    /// Id of the worker.
    worker: String,
    /// First round that counts it.
    from_round: u64,
    /// First round that no longer counts it; `null` for one that has not left.
    until_round: Option<u64>,
}

/// Settings of a job by first round.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SettingsList {
    /// Ascending; those that no open round can ask for any more are forgotten.
    pub(super) revisions: Vec<SettingsRevision>,
}

/// How a job is named in `after` and `next`.
pub(super) fn cursor(key: &JobKey) -> String {
    key.to_string()
}

//! Jobs: listing, creating, looking at and deleting them.

use axum::{
    Json,
    extract::{Path, Query, State},
    http::{StatusCode, header::LOCATION},
    response::{AppendHeaders, IntoResponse},
};
use serde::Deserialize;
use thalweg_protocol::{ApiReply, ApiRequest, ErrorCode, JobKey, JobRecord, JobSpec, Name, Progress, Roster};
use utoipa::IntoParams;

use super::{
    JobPath, Shared, default_page,
    problem::{Problem, Problems},
    views::{JobPage, JobView, RosterView, cursor},
};

/// Which jobs.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct JobsQuery {
    /// Only this tenant's.
    #[param(inline)]
    tenant: Option<Name>,
    /// Only those behind this one, TENANT/JOB: `next` of the page before.
    #[param(example = "default/digits")]
    after: Option<String>,
    /// Most jobs in the answer.
    #[serde(default = "default_page")]
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: u32,
}

fn after(text: &str) -> Result<JobKey, Problem> {
    let key = text
        .split_once('/')
        .and_then(|(tenant, job)| Some(JobKey { tenant: tenant.parse().ok()?, job: job.parse().ok()? }));
    key.ok_or_else(|| Problem::new(ErrorCode::Malformed, format!("after={text:?}: TENANT/JOB is expected")))
}

/// The answer to a request of another kind: cannot happen.
pub(super) fn unexpected(reply: &ApiReply) -> Problem {
    Problem::new(ErrorCode::Internal, format!("an unexpected answer: {reply:?}"))
}

impl super::Api {
    pub(super) async fn ask(&self, request: ApiRequest) -> Result<ApiReply, Problem> {
        Ok(self.gateway.perform(request).await?)
    }

    pub(super) async fn job(&self, key: JobKey) -> Result<(JobRecord, Roster), Problem> {
        match self.ask(ApiRequest::GetJob(key)).await? {
            ApiReply::Job(record, roster) => Ok((*record, roster)),
            other => Err(unexpected(&other)),
        }
    }
}

/// List jobs
///
/// In the order of tenant and name, a page at a time.
#[utoipa::path(get, path = "/v1/jobs", operation_id = "listJobs", tag = "jobs", params(JobsQuery), responses(
    (status = 200, description = "A page of jobs.", body = JobPage), Problems,
))]
pub(super) async fn list(
    State(api): Shared,
    Query(query): Query<JobsQuery>,
) -> Result<Json<JobPage>, Problem> {
    let after = query.after.as_deref().map(after).transpose()?;
    let limit = super::page(query.limit)?;
    match api.ask(ApiRequest::Jobs { tenant: query.tenant, after, limit }).await? {
        ApiReply::JobPage { jobs, next } => Ok(Json(JobPage {
            jobs: jobs.into_iter().map(Into::into).collect(),
            next: next.as_ref().map(cursor),
        })),
        other => Err(unexpected(&other)),
    }
}

/// Create a job
///
/// Safe to repeat: a job that exists with the same specification is left as it is.
#[utoipa::path(post, path = "/v1/jobs", operation_id = "createJob", tag = "jobs",
    request_body(content = JobSpec, example = json!({
        "key": { "tenant": "default", "job": "digits" },
        "tensors": [{ "name": "weight", "shape": [64, 10], "dtype": "f32" }],
        "function": { "name": "sgd", "settings": { "lr": 0.1, "momentum": 0.9 } },
        "mode": "sync",
        "workers": 4,
        "quorum": null,
        "deadline_ms": 0,
        "durability": "process",
        "non_finite": "void",
        "init": "zeros",
        "shard_bytes": 524_288,
        "max_members": 16
    })),
    responses(
        (status = 201, description = "The job, new.", body = JobView,
            headers(("location" = String, description = "Path of the job"))),
        (status = 200, description = "The job, which existed alike.", body = JobView,
            headers(("location" = String, description = "Path of the job"))),
        Problems,
    ),
)]
pub(super) async fn create(
    State(api): Shared,
    Json(spec): Json<JobSpec>,
) -> Result<impl IntoResponse, Problem> {
    let location = format!("/v1/jobs/{}", spec.key);
    let (record, roster, created) = api.gateway.create(spec).await?;
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, AppendHeaders([(LOCATION, location)]), Json(JobView::new(&record, &roster))))
}

/// Look at a job
#[utoipa::path(get, path = "/v1/jobs/{tenant}/{job}", operation_id = "getJob", tag = "jobs", params(JobPath),
    responses((status = 200, description = "The job.", body = JobView), Problems),
)]
pub(super) async fn show(State(api): Shared, Path(key): Path<JobPath>) -> Result<Json<JobView>, Problem> {
    let (record, roster) = api.job(key.into()).await?;
    Ok(Json(JobView::new(&record, &roster)))
}

/// Delete a job with everything of it
///
/// Its workers are told that it is gone.
#[utoipa::path(delete, path = "/v1/jobs/{tenant}/{job}", operation_id = "deleteJob", tag = "jobs", params(JobPath),
    responses((status = 204, description = "It is gone."), Problems),
)]
pub(super) async fn delete(State(api): Shared, Path(key): Path<JobPath>) -> Result<StatusCode, Problem> {
    api.ask(ApiRequest::DeleteJob(key.into())).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Who is in a job
#[utoipa::path(get, path = "/v1/jobs/{tenant}/{job}/members", operation_id = "getMembers", tag = "jobs",
    params(JobPath), responses((status = 200, description = "Its roster.", body = RosterView), Problems),
)]
pub(super) async fn members(
    State(api): Shared,
    Path(key): Path<JobPath>,
) -> Result<Json<RosterView>, Problem> {
    let (_, roster) = api.job(key.into()).await?;
    Ok(Json(RosterView::new(&roster)))
}

/// Where a job's shards stand
#[utoipa::path(get, path = "/v1/jobs/{tenant}/{job}/progress", operation_id = "getProgress", tag = "jobs",
    params(JobPath),
    responses((status = 200, description = "Versions of its slowest and fastest shard.", body = Progress), Problems),
)]
pub(super) async fn progress(
    State(api): Shared,
    Path(key): Path<JobPath>,
) -> Result<Json<Progress>, Problem> {
    match api.ask(ApiRequest::Progress(key.into())).await? {
        ApiReply::Progress(progress) => Ok(Json(progress)),
        other => Err(unexpected(&other)),
    }
}

//! HTTP for people and dashboards: health, and the jobs with their rosters.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    response::IntoResponse,
    routing::get,
};
use serde::Serialize;
use serde_json::json;
use thalweg_protocol::{ErrorCode, JobKey, JobRecord, JobState, Member, Name, Roster, WireError};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{control::summary, service::Gateway};

/// A job as HTTP shows it.
#[derive(Debug, Serialize)]
struct JobView {
    tenant: String,
    job: String,
    incarnation: String,
    state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<WireError>,
    function: String,
    durability: String,
    workers: u32,
    tensors: usize,
    elements: u64,
    shards: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    roster: Option<RosterView>,
}

#[derive(Debug, Serialize)]
struct RosterView {
    epoch: u64,
    started: bool,
    members: Vec<MemberView>,
}

#[derive(Debug, Serialize)]
struct MemberView {
    rank: u32,
    worker: String,
    from_round: u64,
    until_round: Option<u64>,
}

impl JobView {
    fn new(record: &JobRecord, roster: Option<&Roster>) -> Self {
        let error = match &record.state {
            JobState::Failed(error) => Some(error.clone()),
            _ => None,
        };
        let member = |member: &Member| MemberView {
            rank: member.rank,
            worker: member.worker.clone(),
            from_round: member.from_round,
            until_round: member.until_round,
        };
        Self {
            tenant: record.spec.key.tenant.to_string(),
            job: record.spec.key.job.to_string(),
            incarnation: record.incarnation.to_string(),
            state: summary(record, roster).state,
            error,
            function: record.spec.function.name.clone(),
            durability: record.spec.durability.to_string(),
            workers: record.spec.workers,
            tensors: record.spec.tensors.len(),
            elements: record.layout.elements,
            shards: record.layout.shards(),
            roster: roster.map(|roster| RosterView {
                epoch: roster.epoch,
                started: roster.started,
                members: roster.members.iter().map(member).collect(),
            }),
        }
    }
}

/// Serves until `shutdown`.
pub(crate) async fn serve(listener: TcpListener, gateway: Arc<Gateway>, shutdown: CancellationToken) {
    let app = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/v1/jobs", get(list))
        .route("/v1/jobs/{tenant}/{job}", get(show))
        .with_state(gateway);
    let served = axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "HTTP interface ended");
    }
}

async fn list(State(gateway): State<Arc<Gateway>>) -> impl IntoResponse {
    match gateway.jobs.list().await {
        Ok(jobs) => {
            Json(json!({ "jobs": jobs.iter().map(|job| JobView::new(job, None)).collect::<Vec<_>>() }))
                .into_response()
        }
        Err(error) => problem(&error).into_response(),
    }
}

async fn show(
    State(gateway): State<Arc<Gateway>>,
    Path((tenant, job)): Path<(String, String)>,
) -> impl IntoResponse {
    let key = match (Name::new(tenant), Name::new(job)) {
        (Ok(tenant), Ok(job)) => JobKey { tenant, job },
        (Err(error), _) | (_, Err(error)) => {
            return problem(&WireError::new(ErrorCode::InvalidSpec, error.to_string())).into_response();
        }
    };
    match gateway.jobs.get(&key).await {
        Ok((record, roster)) => Json(JobView::new(&record, Some(&roster))).into_response(),
        Err(error) => problem(&error).into_response(),
    }
}

fn problem(error: &WireError) -> impl IntoResponse + use<> {
    let status = match error.code {
        ErrorCode::UnknownJob => StatusCode::NOT_FOUND,
        ErrorCode::InvalidSpec => StatusCode::BAD_REQUEST,
        code if code.is_retryable() => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::CONFLICT,
    };
    (status, Json(json!({ "code": error.code, "message": error.message })))
}

//! Changing jobs: pause, resume, abort, settings.

use axum::{
    Json,
    extract::{Path, State},
};
use serde::Deserialize;
use thalweg_protocol::{ApiReply, ApiRequest, JobCommand, JobKey, SettingsChange, SettingsRevision};
use utoipa::ToSchema;

use super::{
    Api, JobPath, Shared,
    jobs::unexpected,
    problem::{Problem, Problems},
    views::{JobView, SettingsList},
};

/// Why something is done to a job.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Reason {
    /// For its workers and for people, at most 512 bytes.
    #[schema(example = "maintenance")]
    reason: String,
}

async fn command(api: &Api, key: JobKey, command: JobCommand) -> Result<Json<JobView>, Problem> {
    api.ask(ApiRequest::Control(key.clone(), command)).await?;
    let (record, roster) = api.job(key).await?;
    Ok(Json(JobView::new(&record, &roster)))
}

/// Pause a job
///
/// It closes no more rounds; its workers wait and are told why. In force once all invokers have heard of it: at once,
/// as a rule, after two seconds at the latest.
#[utoipa::path(post, path = "/v1/jobs/{tenant}/{job}/pause", operation_id = "pauseJob", tag = "control",
    params(JobPath), request_body(content = Reason, example = json!({ "reason": "maintenance" })),
    responses((status = 200, description = "The job.", body = JobView), Problems),
)]
pub(super) async fn pause(
    State(api): Shared,
    Path(key): Path<JobPath>,
    Json(body): Json<Reason>,
) -> Result<Json<JobView>, Problem> {
    command(&api, key.into(), JobCommand::Pause(body.reason)).await
}

/// Let a job go on
#[utoipa::path(post, path = "/v1/jobs/{tenant}/{job}/resume", operation_id = "resumeJob", tag = "control",
    params(JobPath), responses((status = 200, description = "The job.", body = JobView), Problems),
)]
pub(super) async fn resume(State(api): Shared, Path(key): Path<JobPath>) -> Result<Json<JobView>, Problem> {
    command(&api, key.into(), JobCommand::Resume).await
}

/// End a job
///
/// Every worker is told why. Its parameters stay until it is deleted.
#[utoipa::path(post, path = "/v1/jobs/{tenant}/{job}/abort", operation_id = "abortJob", tag = "control",
    params(JobPath), request_body(content = Reason, example = json!({ "reason": "wrong data" })),
    responses((status = 200, description = "The job.", body = JobView), Problems),
)]
pub(super) async fn abort(
    State(api): Shared,
    Path(key): Path<JobPath>,
    Json(body): Json<Reason>,
) -> Result<Json<JobView>, Problem> {
    command(&api, key.into(), JobCommand::Abort(body.reason)).await
}

/// Settings of a job's function
#[utoipa::path(get, path = "/v1/jobs/{tenant}/{job}/settings", operation_id = "getSettings", tag = "control",
    params(JobPath), responses((status = 200, description = "By first round.", body = SettingsList), Problems),
)]
pub(super) async fn settings(
    State(api): Shared,
    Path(key): Path<JobPath>,
) -> Result<Json<SettingsList>, Problem> {
    let (record, _) = api.job(key.into()).await?;
    Ok(Json(SettingsList { revisions: record.settings }))
}

/// Change settings of a job's function
///
/// From one round on, on all shards. Without `from_round`, from the next round that no shard can have begun.
#[utoipa::path(post, path = "/v1/jobs/{tenant}/{job}/settings", operation_id = "setSettings", tag = "control",
    params(JobPath), request_body(content = SettingsChange, example = json!({ "settings": { "lr": 0.01 } })),
    responses(
        (status = 200, description = "The new settings, with the round from which they count.", body = SettingsRevision),
        Problems,
    ),
)]
pub(super) async fn set_settings(
    State(api): Shared,
    Path(key): Path<JobPath>,
    Json(change): Json<SettingsChange>,
) -> Result<Json<SettingsRevision>, Problem> {
    match api.ask(ApiRequest::SetSettings { key: key.into(), change }).await? {
        ApiReply::Settings(revision) => Ok(Json(revision)),
        other => Err(unexpected(&other)),
    }
}

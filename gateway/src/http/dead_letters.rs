//! Messages that nobody could process: looking at them, putting them back, removing them.

use axum::{
    Json,
    extract::{Path, Query, State},
    http::StatusCode,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use thalweg_broker::{DeadLetter, DeadLetterQuery, RequeueError};
use thalweg_protocol::{ErrorCode, JobKey, Name};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api, Shared, default_page,
    problem::{Problem, Problems},
};

/// Which dead letters.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LettersQuery {
    /// Only those of one job, together with `job`.
    #[param(inline)]
    tenant: Option<Name>,
    /// Only those of one job, together with `tenant`.
    #[param(inline)]
    job: Option<Name>,
    /// Only those behind this one: `next` of the page before.
    after: Option<u64>,
    /// Most letters in the answer.
    #[serde(default = "default_page")]
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: u32,
}

/// A dead letter in a path.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct LetterPath {
    /// Its number.
    #[param(minimum = 1, example = 1)]
    sequence: u64,
}

/// A message that nobody could process.
#[derive(Serialize, ToSchema)]
#[schema(as = DeadLetter)]
struct LetterView {
    /// Its number.
    sequence: u64,
    /// When it was put aside, milliseconds since the Unix epoch.
    at_ms: u64,
    /// Whose it is, where that could be read.
    tenant: Option<Name>,
    /// Whose it is, where that could be read.
    job: Option<Name>,
    /// Stable code of the reason.
    code: String,
    /// The reason, for people.
    reason: String,
    /// Partition in whose queue it was.
    partition: String,
    /// Subject that it was sent to; `null` where nobody noted it, and then it cannot be put back.
    subject: Option<String>,
    /// Length of its frame.
    frame_bytes: u64,
}

impl From<&DeadLetter> for LetterView {
    fn from(letter: &DeadLetter) -> Self {
        let (tenant, job) = letter.job.clone().map(|key| (key.tenant, key.job)).unzip();
        Self {
            sequence: letter.sequence,
            at_ms: letter.at_ms,
            tenant,
            job,
            code: letter.code.clone(),
            reason: letter.reason.clone(),
            partition: letter.partition.clone(),
            subject: letter.subject.clone(),
            frame_bytes: letter.frame_bytes,
        }
    }
}

/// A page of dead letters, without their frames.
#[derive(Serialize, ToSchema)]
pub(super) struct DeadLetterPage {
    /// Oldest first.
    letters: Vec<LetterView>,
    /// What to ask for as `after` to get the next page; `null` with the last one.
    next: Option<u64>,
}

/// A dead letter with its frame.
#[derive(Serialize, ToSchema)]
pub(super) struct FullDeadLetter {
    #[serde(flatten)]
    letter: LetterView,
    /// Its bytes in Base64.
    frame: String,
}

async fn find(api: &Api, sequence: u64) -> Result<DeadLetter, Problem> {
    let letter = thalweg_broker::dead_letter(&api.jetstream, sequence).await?;
    letter.ok_or_else(|| {
        Problem::new(ErrorCode::Expired, format!("no dead letter {sequence}: it was removed, or never was"))
            .not_found()
    })
}

/// List dead letters
///
/// Oldest first, a page at a time.
#[utoipa::path(get, path = "/v1/deadletters", operation_id = "listDeadLetters", tag = "dead letters",
    params(LettersQuery),
    responses((status = 200, description = "A page of dead letters.", body = DeadLetterPage), Problems),
)]
pub(super) async fn list(
    State(api): Shared,
    Query(query): Query<LettersQuery>,
) -> Result<Json<DeadLetterPage>, Problem> {
    let job = match (query.tenant, query.job) {
        (Some(tenant), Some(job)) => Some(JobKey { tenant, job }),
        (None, None) => None,
        _ => return Err(Problem::new(ErrorCode::Malformed, "a job is named by both tenant and job")),
    };
    let limit = super::page(query.limit)? as usize;
    let query = DeadLetterQuery { job, after: query.after, limit, frames: false };
    let (letters, more) = thalweg_broker::dead_letters(&api.jetstream, &query).await?;
    let next = letters.last().filter(|_| more).map(|letter| letter.sequence);
    Ok(Json(DeadLetterPage { letters: letters.iter().map(Into::into).collect(), next }))
}

/// Look at a dead letter
#[utoipa::path(get, path = "/v1/deadletters/{sequence}", operation_id = "getDeadLetter", tag = "dead letters",
    params(LetterPath),
    responses((status = 200, description = "The letter with its frame.", body = FullDeadLetter), Problems),
)]
pub(super) async fn show(
    State(api): Shared,
    Path(path): Path<LetterPath>,
) -> Result<Json<FullDeadLetter>, Problem> {
    let letter = find(&api, path.sequence).await?;
    Ok(Json(FullDeadLetter { letter: (&letter).into(), frame: BASE64_STANDARD.encode(&letter.frame) }))
}

/// Remove a dead letter for good
#[utoipa::path(delete, path = "/v1/deadletters/{sequence}", operation_id = "deleteDeadLetter", tag = "dead letters",
    params(LetterPath), responses((status = 204, description = "It is gone."), Problems),
)]
pub(super) async fn delete(State(api): Shared, Path(path): Path<LetterPath>) -> Result<StatusCode, Problem> {
    let letter = find(&api, path.sequence).await?;
    thalweg_broker::remove_dead_letter(&api.jetstream, letter.sequence).await?;
    tracing::info!(sequence = letter.sequence, "dead letter removed");
    Ok(StatusCode::NO_CONTENT)
}

/// Put a dead letter back into its queue
///
/// As it came, once what was wrong is mended; it is judged anew.
#[utoipa::path(post, path = "/v1/deadletters/{sequence}/requeue", operation_id = "requeueDeadLetter",
    tag = "dead letters", params(LetterPath),
    responses((status = 204, description = "It is in its queue, and no dead letter any more."), Problems),
)]
pub(super) async fn requeue(State(api): Shared, Path(path): Path<LetterPath>) -> Result<StatusCode, Problem> {
    let letter = find(&api, path.sequence).await?;
    match thalweg_broker::requeue(&api.jetstream, &letter).await {
        Ok(()) => {
            tracing::info!(sequence = letter.sequence, subject = ?letter.subject, "dead letter put back");
            Ok(StatusCode::NO_CONTENT)
        }
        Err(RequeueError::Stream(error)) => Err(error.into()),
        Err(error @ RequeueError::NoSubject(_)) => Err(Problem::new(ErrorCode::Expired, error.to_string())),
    }
}

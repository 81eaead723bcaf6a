//! What happens to jobs, as server-sent events.

use std::convert::Infallible;

use axum::{
    extract::{Path, Query, State},
    http::HeaderMap,
    response::{
        IntoResponse, Response,
        sse::{Event as Sent, KeepAlive, Sse},
    },
};
use futures::{StreamExt as _, future};
use serde::Deserialize;
use thalweg_broker::EventsQuery;
use thalweg_protocol::{ErrorCode, JobKey};
use utoipa::{IntoParams, PartialSchema, ToSchema, openapi};

use super::{
    Api, JobPath, Shared,
    problem::{Problem, Problems},
};

/// Header with the last event that a client has seen; browsers send it when they connect again.
const LAST_EVENT_ID: &str = "last-event-id";

/// Which events.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsParameters {
    /// Go on with what happens from now on; without it the answer ends with the newest event.
    #[serde(default)]
    #[param(default = false)]
    follow: bool,
    /// Only so many of the past, the newest; else all that are kept: a week, 64 MiB.
    #[param(minimum = 0)]
    last: Option<u32>,
}

/// Lines of server-sent events.
struct EventStream;

impl PartialSchema for EventStream {
    fn schema() -> openapi::RefOr<openapi::Schema> {
        let text = "Server-sent events. `data` is an `Event` as JSON, `id` its sequence: sent back as \
                    `Last-Event-ID`, the answer goes on behind it.";
        openapi::ObjectBuilder::new().schema_type(openapi::Type::String).description(Some(text)).into()
    }
}

impl ToSchema for EventStream {}

fn last_seen(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(value) = headers.get(LAST_EVENT_ID) else { return Ok(None) };
    match value.to_str().ok().and_then(|text| text.parse().ok()) {
        Some(sequence) => Ok(Some(sequence)),
        None => {
            let text = format!("{LAST_EVENT_ID} {value:?}: the id of an event is expected, a number");
            Err(Problem::new(ErrorCode::Malformed, text))
        }
    }
}

async fn send(
    api: &Api,
    job: Option<JobKey>,
    query: &EventsParameters,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let last = query.last.map(|last| last as usize);
    let query = EventsQuery { job, follow: query.follow, last, after: last_seen(headers)? };
    let permit = api.stream()?;
    let events = thalweg_broker::events(&api.jetstream, query).await?;
    let events = events.scan(permit, |_permit, event| {
        let sent = event.map(|(sequence, event)| {
            // An event is names, numbers and texts: writing it cannot fail.
            let text = serde_json::to_string(&event).unwrap_or_default();
            Sent::default().id(sequence.to_string()).data(text)
        });
        // The client connects again, and goes on behind the last one.
        future::ready(sent.inspect_err(|error| tracing::debug!(%error, "an event stream ends")).ok())
    });
    let events = events.map(Ok::<_, Infallible>).take_until(api.shutdown.clone().cancelled_owned());
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

/// What happens to all jobs
#[utoipa::path(get, path = "/v1/events", operation_id = "getEvents", tag = "events",
    params(
        EventsParameters,
        ("last-event-id" = Option<u64>, Header, description = "Only events behind this one; `last` then counts for nothing."),
    ),
    responses(
        (status = 200, description = "Events, oldest first.", content_type = "text/event-stream", body = inline(EventStream)),
        Problems,
    ),
)]
pub(super) async fn all(
    State(api): Shared,
    Query(query): Query<EventsParameters>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    send(&api, None, &query, &headers).await
}

/// What happens to a job
///
/// Also to one that is not there any more, or not yet.
#[utoipa::path(get, path = "/v1/jobs/{tenant}/{job}/events", operation_id = "getJobEvents", tag = "events",
    params(
        JobPath,
        EventsParameters,
        ("last-event-id" = Option<u64>, Header, description = "Only events behind this one; `last` then counts for nothing."),
    ),
    responses(
        (status = 200, description = "Events, oldest first.", content_type = "text/event-stream", body = inline(EventStream)),
        Problems,
    ),
)]
pub(super) async fn of_job(
    State(api): Shared,
    Path(key): Path<JobPath>,
    Query(query): Query<EventsParameters>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    send(&api, Some(key.into()), &query, &headers).await
}

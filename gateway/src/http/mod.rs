//! HTTP for people, dashboards and scripts: jobs, snapshots, events, functions, dead letters.
//!
//! [`shell`] is around every request (its id, its log line, its metric, limits), [`problem`] is what any answer with
//! an error looks like. The other modules hold the routes, each beside the description from which the OpenAPI
//! document is made. Routes are only ever added with `routes!`, which takes path and method from that description,
//! so that there is none without one. A test drives all of them from the document alone.

mod control;
mod dead_letters;
mod events;
mod functions;
mod jobs;
mod problem;
mod shell;
mod snapshot;
mod views;

use std::{sync::Arc, time::Duration};

use async_nats::jetstream;
use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::header::CONTENT_TYPE,
    middleware::{from_fn, from_fn_with_state},
    response::IntoResponse,
};
use serde::Deserialize;
use thalweg_protocol::{Event, JobKey, Name, limits};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::CancellationToken;
use utoipa::{IntoParams, OpenApi as _};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::service::Gateway;
use problem::{Problem, Problems};

/// Largest body of a request: a specification of the most tensors, with names of ordinary length.
const MAX_BODY_BYTES: usize = 8 << 20;
/// Requests worked on at once; their bodies are in memory.
const MAX_REQUESTS: usize = 32;
/// Longest time until an answer that is no stream.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Answers that go on for long, snapshots and followed events, at once; each may have a few shards in memory.
const MAX_STREAMS: usize = 64;
/// Entries of a page when nobody says how many.
const DEFAULT_PAGE: u32 = 100;

/// What the routes share.
struct Api {
    gateway: Arc<Gateway>,
    jetstream: jetstream::Context,
    shutdown: CancellationToken,
    streams: Arc<Semaphore>,
    document: Bytes,
}

type Shared = State<Arc<Api>>;

impl Api {
    /// The right to answer with a stream, for as long as that takes.
    fn stream(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.streams.clone().try_acquire_owned().map_err(|_| Problem::busy("snapshots and event streams"))
    }
}

/// A job in a path.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct JobPath {
    /// Owner of the job.
    #[param(inline, example = "default")]
    tenant: Name,
    /// Name of the job within its tenant.
    #[param(inline, example = "digits")]
    job: Name,
}

impl From<JobPath> for JobKey {
    fn from(path: JobPath) -> Self {
        Self { tenant: path.tenant, job: path.job }
    }
}

fn default_page() -> u32 {
    DEFAULT_PAGE
}

/// Refuses pages that hold nothing, or too much.
fn page(limit: u32) -> Result<u32, Problem> {
    // The parameters' descriptions say so.
    const _: () = assert!(limits::MAX_PAGE == 1000 && DEFAULT_PAGE == 100);
    match limit {
        1..=limits::MAX_PAGE => Ok(limit),
        _ => Err(Problem::limit(format!("a page of {limit}; 1 to {}", limits::MAX_PAGE))),
    }
}

/// The document without its paths.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Thalweg gateway",
        description = "Jobs, snapshots, events, functions and dead letters of a Thalweg deployment.\n\n\
            Errors are problems (RFC 9457). Match on `code`; `detail` is for people. Every answer names its request in \
            `x-request-id`, taken over from the request where that has 1 to 128 visible ASCII characters.\n\n\
            There is no authentication: whoever reaches this address may do all of it."
    ),
    components(schemas(Event, problem::ProblemBody)),
    tags(
        (name = "jobs", description = "Jobs, their members and their progress"),
        (name = "control", description = "Pausing, changing and ending jobs"),
        (name = "events", description = "What happens to jobs"),
        (name = "functions", description = "Aggregation functions"),
        (name = "dead letters", description = "Messages that nobody could process"),
        (name = "service", description = "The gateway itself"),
    )
)]
struct Document;

/// All routes with their descriptions.
fn routes() -> OpenApiRouter<Arc<Api>> {
    let limits = shell::Limits { requests: Semaphore::new(MAX_REQUESTS), time: REQUEST_TIMEOUT };
    let limited = OpenApiRouter::new()
        .routes(routes!(document))
        .routes(routes!(jobs::list, jobs::create))
        .routes(routes!(jobs::show, jobs::delete))
        .routes(routes!(jobs::members))
        .routes(routes!(jobs::progress))
        .routes(routes!(control::pause))
        .routes(routes!(control::resume))
        .routes(routes!(control::abort))
        .routes(routes!(control::settings, control::set_settings))
        .routes(routes!(functions::list))
        .routes(routes!(dead_letters::list))
        .routes(routes!(dead_letters::show, dead_letters::delete))
        .routes(routes!(dead_letters::requeue))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(Arc::new(limits), shell::limited));
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(healthz))
        .routes(routes!(events::all))
        .routes(routes!(events::of_job))
        .routes(routes!(snapshot::snapshot))
        .merge(limited)
}

fn app(gateway: Arc<Gateway>, jetstream: jetstream::Context, shutdown: CancellationToken) -> Router {
    let (router, document) = routes().split_for_parts();
    // Maps with keys of text and values of JSON: writing them cannot fail.
    let document = document.to_json().unwrap_or_default().into();
    let streams = Arc::new(Semaphore::new(MAX_STREAMS));
    let api = Api { gateway, jetstream, shutdown, streams, document };
    // Outermost, so that answers of the framework itself (no such path, no such method) are problems too.
    router.layer(from_fn(shell::shell)).with_state(Arc::new(api))
}

/// Serves until `shutdown`, then ends streams and finishes the requests under way.
pub(crate) async fn serve(
    listener: TcpListener,
    gateway: Arc<Gateway>,
    jetstream: jetstream::Context,
    shutdown: CancellationToken,
) {
    let app = app(gateway, jetstream, shutdown.clone());
    let served = axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "HTTP interface ended");
    }
}

/// Whether the gateway answers
///
/// It does not say that NATS or a store do: see `/readyz` on the admin port.
#[utoipa::path(get, path = "/healthz", operation_id = "health", tag = "service", responses(
    (status = 200, description = "It does.", content_type = "text/plain", body = String, example = "ok"),
    Problems,
))]
async fn healthz() -> &'static str {
    "ok"
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", operation_id = "openapi", tag = "service", responses(
    (status = 200, description = "The OpenAPI document.", content_type = "application/json", body = Object),
    Problems,
))]
async fn document(State(api): Shared) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], api.document.clone())
}

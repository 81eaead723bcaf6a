//! What is around every request: its id, its line in the log, its metric, and limits.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method},
    middleware::Next,
    response::{IntoResponse, Response},
};
use thalweg_protocol::Incarnation;
use tokio::sync::Semaphore;
use tracing::Instrument as _;

use super::problem::{self, Problem};
use crate::metrics;

/// Header that names a request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over, bytes.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// The id that the sender gave, if it can stand in a log line as it is; else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).map(HeaderValue::as_bytes).unwrap_or_default();
    let fits = (1..=MAX_REQUEST_ID_BYTES).contains(&given.len()) && given.iter().all(u8::is_ascii_graphic);
    if fits { String::from_utf8_lossy(given).into_owned() } else { Incarnation::random().to_string() }
}

/// Around all routes, and around the answers of the framework where there is none.
pub(super) async fn shell(request: Request, next: Next) -> Response {
    let (start, id) = (Instant::now(), request_id(request.headers()));
    let route = request.extensions().get::<MatchedPath>();
    // Never the path itself: names of jobs would fill the metrics.
    let route = route.map_or_else(|| "unmatched".to_owned(), |route| route.as_str().to_owned());
    let method = request.method().clone();
    let span = tracing::info_span!("http", request_id = %id);
    let response = next.run(request).instrument(span.clone()).await;
    let mut response = problem::told(response, &id).await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let (status, elapsed) = (response.status(), start.elapsed());
    metrics::http(&route, status.as_u16(), elapsed);
    let (status, ms) = (status.as_u16(), elapsed.as_millis());
    span.in_scope(|| match method {
        _ if status >= 500 => tracing::warn!(%method, route, status, ms, "HTTP request failed"),
        Method::GET | Method::HEAD => tracing::debug!(%method, route, status, ms, "HTTP request"),
        _ => tracing::info!(%method, route, status, ms, "HTTP request"),
    });
    response
}

/// How much of what is asked for at once, and for how long, is worked on.
#[derive(Debug)]
pub(super) struct Limits {
    pub(super) requests: Semaphore,
    pub(super) time: Duration,
}

/// Around routes whose answers are no streams. A change that is cut short by the time-out stands as it would after a
/// crash: every step can be repeated, and the next request, or the leading gateway, takes it up.
pub(super) async fn limited(State(limits): State<Arc<Limits>>, request: Request, next: Next) -> Response {
    let Ok(_permit) = limits.requests.try_acquire() else { return Problem::busy("requests").into_response() };
    match tokio::time::timeout(limits.time, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::timed_out(limits.time).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        body::Body,
        middleware::{from_fn, from_fn_with_state},
        routing::get,
    };
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn too_much_at_once_and_too_long_are_problems() {
        let status = async |requests, ms| {
            let limits = Limits { requests: Semaphore::new(requests), time: Duration::from_millis(ms) };
            let slow = get(async || tokio::time::sleep(Duration::from_millis(200)).await);
            let app = Router::new().route("/slow", slow).layer(from_fn_with_state(Arc::new(limits), limited));
            let request =
                Request::builder().uri("/slow").header(REQUEST_ID, "mine").body(Body::empty()).unwrap();
            let response = app.layer(from_fn(shell)).oneshot(request).await.unwrap();
            assert_eq!(response.headers()[REQUEST_ID], "mine");
            response.status().as_u16()
        };
        assert_eq!(status(1, 60_000).await, 200);
        assert_eq!(status(0, 60_000).await, 503, "nothing more is taken on");
        assert_eq!(status(1, 10).await, 504, "and nothing is waited for without end");
    }

    #[test]
    fn sane_request_ids_are_taken_over_and_others_replaced() {
        let id = |value: &[u8]| {
            let value = HeaderValue::from_bytes(value).unwrap();
            request_id(&HeaderMap::from_iter([(REQUEST_ID, value)]))
        };
        assert_eq!(id(b"abc-123/~!"), "abc-123/~!");
        let longest = "x".repeat(MAX_REQUEST_ID_BYTES);
        assert_eq!(id(longest.as_bytes()), longest);
        let replaced =
            [b"".as_slice(), b"two words", b"tab\there", "ä".as_bytes(), &[b'x'; MAX_REQUEST_ID_BYTES + 1]];
        for value in replaced {
            let made = id(value);
            assert_eq!(
                (made.len(), made.bytes().all(|byte| byte.is_ascii_hexdigit())),
                (32, true),
                "{value:?}"
            );
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}

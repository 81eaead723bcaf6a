//! The admin server: `/livez`, `/readyz`, `/metrics` and `/log` over HTTP/1.1.
//!
//! It shows nothing secret, but has neither authentication nor a limit on connections: bind it where
//! only the operator and the scraper reach it. Whoever reaches it can also change what is logged:
//! silence the process, or have it write so much that it slows down and fills the disk.

use std::io;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::health::Health;
use crate::logs::{LogError, LogHandle};
use crate::metrics::MetricsHandle;
use crate::others::Others;

/// How long open requests may take to finish once the server stops; what is left is cut off.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// Content type of the Prometheus text format.
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Longest log filter that is taken in, bytes.
const MAX_FILTER_BYTES: usize = 4096;

/// Serves the admin endpoints until `shutdown` is cancelled.
///
/// * `GET /livez`: 200 `ok`, for as long as the process can answer at all;
/// * `GET /readyz`: 200 or 503, with [`crate::health::Snapshot`] as JSON;
/// * `GET /metrics`: the Prometheus text format, with the metrics of `others`;
/// * `GET /log`: the log filter in force, as text;
/// * `PUT /log`: the body (text, 4 KiB at most) becomes the filter in force, until it is changed again
///   or the process ends; 200 with the new filter, or 400 with what is wrong with it. Without `logs`,
///   in a program whose logs are not ours to change, `/log` answers 404.
///
/// The server stops with its token: to stay observable while the process drains, give it a token that
/// is cancelled when the drain is over. It then accepts nothing more and lets open requests finish,
/// for [`STOP_TIMEOUT`] (3 s) at most.
///
/// Dropping the future stops accepting at once and leaves open requests to the runtime.
///
/// # Errors
///
/// An I/O error that ends the listener. A client that misbehaves is not one.
pub async fn serve(
    listener: TcpListener,
    health: Health,
    metrics: (MetricsHandle, Others),
    logs: Option<LogHandle>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    run(listener, router(health, metrics, logs), shutdown).await
}

/// Apart from the routes, so that a test can bring one that never answers.
async fn run(listener: TcpListener, router: Router, shutdown: CancellationToken) -> io::Result<()> {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "admin server listening");
    }
    let serving = axum::serve(listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let overtime = async {
        shutdown.cancelled().await;
        tokio::time::sleep(STOP_TIMEOUT).await;
    };
    tokio::select! {
        result = serving => result,
        () = overtime => {
            tracing::warn!(timeout = ?STOP_TIMEOUT, "admin requests cut off");
            Ok(())
        }
    }
}

fn router(health: Health, metrics: (MetricsHandle, Others), logs: Option<LogHandle>) -> Router {
    let ready = Router::new().route("/readyz", get(readyz)).with_state(health);
    let scrape = Router::new().route("/metrics", get(scrape)).with_state(metrics);
    let log = logs.map_or_else(Router::new, |logs| {
        let limit = DefaultBodyLimit::max(MAX_FILTER_BYTES);
        Router::new().route("/log", get(log_filter).put(set_log_filter)).layer(limit).with_state(logs)
    });
    Router::new()
        .route("/livez", get(async || "ok"))
        .merge(ready)
        .merge(scrape)
        .merge(log)
        .fallback(unknown_path)
}

async fn readyz(State(health): State<Health>) -> Response {
    let snapshot = health.snapshot();
    let status = if snapshot.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(snapshot)).into_response()
}

async fn scrape(State((metrics, others)): State<(MetricsHandle, Others)>) -> Response {
    ([(header::CONTENT_TYPE, PROMETHEUS_TEXT)], others.with(metrics.render()).await).into_response()
}

async fn log_filter(State(logs): State<LogHandle>) -> String {
    logs.filter() + "\n"
}

async fn set_log_filter(State(logs): State<LogHandle>, body: String) -> (StatusCode, String) {
    let filter = body.trim();
    // It would parse, and silence everything but errors: more likely a request that lost its body.
    if filter.is_empty() {
        let text = "the body has to be a log filter, such as `info,thalweg_store=debug`; `off` is silence\n";
        return (StatusCode::BAD_REQUEST, text.to_owned());
    }
    match logs.set(filter) {
        Ok(()) => (StatusCode::OK, format!("{filter}\n")),
        Err(error @ LogError::Gone) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

async fn unknown_path() -> (StatusCode, &'static str) {
    (StatusCode::NOT_FOUND, "not found: try /livez, /readyz, /metrics or /log\n")
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::*;

    struct Server {
        address: SocketAddr,
        health: Health,
        shutdown: CancellationToken,
        task: JoinHandle<io::Result<()>>,
    }

    impl Server {
        async fn start() -> Self {
            Self::with_logs(None).await
        }

        async fn with_logs(logs: Option<LogHandle>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let health = Health::new();
            let shutdown = CancellationToken::new();
            let metrics = crate::metrics::install().unwrap();
            let task = tokio::spawn(serve(
                listener,
                health.clone(),
                (metrics, Others::new("who")),
                logs,
                shutdown.clone(),
            ));
            Self { address, health, shutdown, task }
        }

        /// Status, lower-case head, body.
        async fn get(&self, path: &str) -> (u16, String, String) {
            self.ask("GET", path, "").await
        }

        async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String, String) {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            (status, head.to_lowercase(), body.to_owned())
        }

        async fn stop(self) {
            self.shutdown.cancel();
            self.task.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn live_before_it_is_ready() {
        let server = Server::start().await;
        server.health.register("store", "opening sled");
        let (status, _, body) = server.get("/livez").await;
        assert_eq!((status, body.as_str()), (200, "ok"));

        let (status, head, body) = server.get("/readyz").await;
        assert_eq!(status, 503);
        assert!(head.contains("content-type: application/json"), "{head}");
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["components"]["store"]["reason"], "opening sled");

        server.health.set_ready("store");
        let (status, _, body) = server.get("/readyz").await;
        assert_eq!(status, 200);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["ready"], true);
        server.stop().await;
    }

    #[tokio::test]
    async fn metrics_are_prometheus_text() {
        let server = Server::start().await;
        ::metrics::counter!("thalweg_test_scraped_total").increment(3);
        let (status, head, body) = server.get("/metrics").await;
        assert_eq!(status, 200);
        assert!(head.contains(&format!("content-type: {PROMETHEUS_TEXT}")), "{head}");
        assert!(body.contains("thalweg_test_scraped_total 3"), "{body}");
        server.stop().await;
    }

    // The only test of this crate that sets the process's subscriber: there can be one only.
    #[tokio::test]
    async fn the_log_filter_is_shown_and_changed() {
        let logs = crate::logs::init("warn,axum=error", crate::logs::LogFormat::Auto).unwrap();
        let server = Server::with_logs(crate::logs::installed()).await;
        let before = logs.filter();
        let (status, _, body) = server.get("/log").await;
        assert_eq!((status, body), (200, format!("{before}\n")));
        assert!(!tracing::enabled!(target: "thalweg_telemetry", tracing::Level::TRACE));

        for nonsense in ["thalweg=loud", "", " \n", &"x".repeat(MAX_FILTER_BYTES + 1)] {
            let (status, _, body) = server.ask("PUT", "/log", nonsense).await;
            assert!((400..500).contains(&status) && !body.is_empty(), "{status} {body}");
            assert_eq!(logs.filter(), before);
        }
        let (_, _, body) = server.ask("PUT", "/log", "thalweg=loud").await;
        assert!(body.contains("`thalweg=loud` (from the request)"), "{body}");

        let (status, _, body) = server.ask("PUT", "/log", "off,thalweg_telemetry=trace\n").await;
        assert_eq!((status, body.as_str()), (200, "off,thalweg_telemetry=trace\n"));
        assert_eq!(server.get("/log").await.2, body);
        assert!(tracing::enabled!(target: "thalweg_telemetry", tracing::Level::TRACE));
        assert!(!tracing::enabled!(target: "axum", tracing::Level::ERROR));
        server.stop().await;
    }

    #[tokio::test]
    async fn where_the_logs_are_not_ours_there_is_no_filter() {
        let server = Server::start().await;
        assert_eq!(server.ask("PUT", "/log", "info").await.0, 404);
        server.stop().await;
    }

    #[tokio::test]
    async fn an_unknown_path_names_the_known_ones() {
        let server = Server::start().await;
        let (status, _, body) = server.get("/").await;
        assert_eq!(status, 404);
        for path in ["/livez", "/readyz", "/metrics", "/log"] {
            assert!(body.contains(path), "{body}");
        }
        assert_eq!(body.lines().count(), 1);
        server.stop().await;
    }

    #[tokio::test]
    async fn an_idle_connection_does_not_delay_the_stop() {
        let server = Server::start().await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        idle.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut first = [0; 12];
        idle.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        server.stop().await;
    }

    // Time is paused: it jumps to the next timer when every task waits, so no real second passes.
    #[tokio::test(start_paused = true)]
    async fn a_request_that_never_ends_is_cut_off() {
        let entered = CancellationToken::new();
        let handler = {
            let entered = entered.clone();
            async move || {
                entered.cancel();
                std::future::pending::<()>().await;
            }
        };
        let router = Router::new().route("/", get(handler));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(run(listener, router, shutdown.clone()));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        entered.cancelled().await;

        let begin = tokio::time::Instant::now();
        shutdown.cancel();
        server.await.unwrap().unwrap();
        assert!(begin.elapsed() >= STOP_TIMEOUT);
    }
}

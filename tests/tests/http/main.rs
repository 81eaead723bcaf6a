//! The gateway's HTTP API, spoken to over a socket.

mod generated;
mod routes;
mod streams;

use reqwest::{Method, StatusCode, header::HeaderMap};
use serde_json::{Value, json};
use thalweg_tests::embedded::Embedded;

/// A client of one gateway.
pub(crate) struct Http {
    base: String,
    client: reqwest::Client,
}

/// What a gateway has answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Http {
    pub(crate) fn of(service: &Embedded) -> Self {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { base: format!("http://{}", service.service().http()), client }
    }

    /// A request to be completed.
    pub(crate) fn request(&self, method: &Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method.clone(), format!("{}{path}", self.base))
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        read(self.request(&Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        read(with_json(self.request(&Method::POST, path), body.to_string())).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        read(self.request(&Method::DELETE, path)).await
    }
}

pub(crate) fn with_json(
    request: reqwest::RequestBuilder,
    body: impl Into<reqwest::Body>,
) -> reqwest::RequestBuilder {
    request.header("content-type", "application/json").body(body)
}

/// Sends a request and reads all of its answer.
pub(crate) async fn read(request: reqwest::RequestBuilder) -> Answer {
    let response = request.send().await.expect("an answer");
    let (status, headers) = (response.status(), response.headers().clone());
    Answer { status, headers, body: response.bytes().await.expect("all of the answer").to_vec() }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The body of a success.
    #[track_caller]
    pub(crate) fn ok(self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", String::from_utf8_lossy(&self.body));
        if self.body.is_empty() { Value::Null } else { self.json() }
    }

    /// The body of a problem, which has everything that a problem has.
    #[track_caller]
    pub(crate) fn problem(self, status: u16, code: &str) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["status"], status, "{problem}");
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["request_id"], self.header("x-request-id"), "{problem}");
        for field in ["type", "title", "detail"] {
            assert!(problem[field].as_str().is_some_and(|text| !text.is_empty()), "{field}: {problem}");
        }
        problem
    }
}

/// A specification of a job that needs no upload.
pub(crate) fn spec(tenant: &str, job: &str, elements: u64) -> Value {
    json!({
        "key": { "tenant": tenant, "job": job },
        "tensors": [{ "name": "weight", "shape": [elements], "dtype": "f32" }],
        "function": { "name": "sgd", "settings": { "lr": 0.1, "momentum": 0.9 } },
        "mode": "sync",
        "workers": 2,
        "deadline_ms": 0,
        "durability": "process",
        "non_finite": "void",
        "init": "zeros",
        "shard_bytes": 524_288,
        "max_members": 4
    })
}

/// A service and a client of its HTTP API.
pub(crate) async fn start() -> (Embedded, Http) {
    let service = Embedded::start(|_| {}).await;
    let http = Http::of(&service);
    (service, http)
}

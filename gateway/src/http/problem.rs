//! Errors as HTTP tells them: problems of RFC 9457, whoever they come from.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use thalweg_broker::StreamError;
use thalweg_protocol::{ErrorCode, WireError};
use utoipa::{IntoResponses, ToSchema, openapi};

/// Media type of a problem.
pub(super) const PROBLEM_JSON: &str = "application/problem+json";
/// Longest text of the framework's own errors that is told on.
const MAX_TEXT_BYTES: usize = 4096;

/// The status of an error: the one place that decides it.
fn status_of(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::Malformed | ErrorCode::BadChecksum | ErrorCode::WireVersion => StatusCode::BAD_REQUEST,
        ErrorCode::UnknownJob => StatusCode::NOT_FOUND,
        // The state of what was asked about stands against it.
        ErrorCode::SpecMismatch
        | ErrorCode::LeaseLost
        | ErrorCode::RankTaken
        | ErrorCode::RoundAhead
        | ErrorCode::Diverged
        | ErrorCode::PoisonContribution
        | ErrorCode::JobFailed
        | ErrorCode::Aborted
        | ErrorCode::StoreMismatch
        | ErrorCode::NotReady => StatusCode::CONFLICT,
        ErrorCode::Gone | ErrorCode::Expired => StatusCode::GONE,
        // It can be read, and makes no sense.
        ErrorCode::InvalidSpec
        | ErrorCode::Limit
        | ErrorCode::WrongShape
        | ErrorCode::WrongDtype
        | ErrorCode::NonFinite => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
    }
}

/// An error on its way out. The shell around all routes writes it down, because only that knows the request's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    status: StatusCode,
    code: ErrorCode,
    detail: String,
    /// Whether the status says all there is to say: then there is no type of problem beside it.
    plain: bool,
}

impl Problem {
    pub(super) fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { status: status_of(code), code, detail: detail.into(), plain: false }
    }

    pub(super) fn limit(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Limit, detail)
    }

    /// Nothing was done: too much is going on already.
    pub(super) fn busy(what: &str) -> Self {
        Self::new(ErrorCode::Unavailable, format!("too many {what} at once: try again later"))
    }

    /// Whether anything was done is unknown.
    pub(super) fn timed_out(after: Duration) -> Self {
        let text = format!(
            "no answer within {after:?}; what was asked for may have been done: look, then try again"
        );
        Self { status: StatusCode::GATEWAY_TIMEOUT, ..Self::new(ErrorCode::Unavailable, text) }
    }

    /// The same, where the address itself names what is not there.
    pub(super) fn not_found(self) -> Self {
        Self { status: StatusCode::NOT_FOUND, ..self }
    }

    /// An error of the framework, which answers in plain text or not at all.
    fn of_status(status: StatusCode, text: &str) -> Self {
        let code = match status {
            StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::Limit,
            status if status.is_server_error() => ErrorCode::Internal,
            _ => ErrorCode::Malformed,
        };
        let detail = match (text.trim(), status) {
            ("", StatusCode::NOT_FOUND) => "no such path: /v1/openapi.json lists those there are",
            ("", StatusCode::METHOD_NOT_ALLOWED) => {
                "this path does not take this method; Allow lists those it takes"
            }
            ("", _) => status.canonical_reason().unwrap_or("refused"),
            (text, _) => text,
        };
        Self { status, code, detail: detail.to_owned(), plain: true }
    }

    fn body(&self, request_id: &str) -> ProblemBody {
        let status = self.status;
        let (kind, title) = if self.plain {
            ("about:blank".to_owned(), status.canonical_reason().unwrap_or("Error").to_owned())
        } else {
            (format!("urn:thalweg:problem:{}", self.code), self.code.as_str().replace('_', " "))
        };
        ProblemBody {
            kind,
            title,
            status: status.as_u16(),
            detail: self.detail.clone(),
            code: self.code,
            request_id: request_id.to_owned(),
        }
    }
}

impl From<WireError> for Problem {
    fn from(error: WireError) -> Self {
        Self::new(error.code, error.message)
    }
}

impl From<StreamError> for Problem {
    fn from(error: StreamError) -> Self {
        Self::new(ErrorCode::Unavailable, error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Makes a problem of whatever tells of an error; leaves other answers as they are.
pub(super) async fn told(response: Response, request_id: &str) -> Response {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let problem = match parts.extensions.remove::<Problem>() {
        Some(problem) => problem,
        None => {
            // One that is longer, or breaks off, tells nothing.
            let text = axum::body::to_bytes(body, MAX_TEXT_BYTES).await.unwrap_or_default();
            Problem::of_status(status, &String::from_utf8_lossy(&text))
        }
    };
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        parts.headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    // Six fields of text: writing them cannot fail.
    let text = serde_json::to_vec(&problem.body(request_id)).unwrap_or_default();
    Response::from_parts(parts, Body::from(text))
}

/// An error, as RFC 9457 has it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct ProblemBody {
    /// URI of the kind of problem: `urn:thalweg:problem:<code>`, or `about:blank` where the status says it all.
    #[serde(rename = "type")]
    kind: String,
    /// The kind of problem in a few words.
    title: String,
    /// The status of the answer.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What happened and what to do, for people.
    detail: String,
    code: ErrorCode,
    /// Id of the request, as in `x-request-id` and in the gateway's log.
    request_id: String,
}

/// Every problem that any route may answer with, for its description.
pub(super) struct Problems;

impl IntoResponses for Problems {
    fn responses() -> BTreeMap<String, openapi::RefOr<openapi::Response>> {
        let mut texts: BTreeMap<StatusCode, String> = [
            (StatusCode::BAD_REQUEST, "Path, query, header or body cannot be read."),
            (StatusCode::NOT_FOUND, "There is nothing of this name."),
            (StatusCode::PAYLOAD_TOO_LARGE, "The body is too large."),
            (StatusCode::UNSUPPORTED_MEDIA_TYPE, "The body is not declared as application/json."),
            (StatusCode::GATEWAY_TIMEOUT, "No answer in time; whether anything was done is unknown."),
        ]
        .map(|(status, text)| (status, text.to_owned()))
        .into();
        for &code in ErrorCode::ALL {
            let text = texts.entry(status_of(code)).or_default();
            let comma = if text.contains('`') { ", " } else { " Codes: " };
            *text = format!("{text}{comma}`{code}`").trim_start().to_owned();
        }
        let schema = openapi::Ref::from_schema_name("Problem");
        let described = |(status, text): (StatusCode, String)| {
            let content = openapi::ContentBuilder::new().schema(Some(schema.clone())).build();
            let response = openapi::ResponseBuilder::new().description(text).content(PROBLEM_JSON, content);
            (status.as_str().to_owned(), response.build().into())
        };
        texts.into_iter().map(described).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(response: Response) -> (StatusCode, serde_json::Value) {
        let status = response.status();
        assert_eq!(response.headers()[header::CONTENT_TYPE], PROBLEM_JSON);
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn every_code_becomes_a_problem_with_a_described_status() {
        let described = Problems::responses();
        for &code in ErrorCode::ALL {
            let response = Problem::from(WireError::new(code, "what happened")).into_response();
            let (status, body) = read(told(response, "id-1").await).await;
            assert!(described.contains_key(status.as_str()), "{code}: {status}");
            let expected = serde_json::json!({
                "type": format!("urn:thalweg:problem:{code}"),
                "title": code.as_str().replace('_', " "),
                "status": status.as_u16(),
                "detail": "what happened",
                "code": code.as_str(),
                "request_id": "id-1",
            });
            assert_eq!(body, expected);
        }
        let status = |code| status_of(code).as_u16();
        assert_eq!(status(ErrorCode::UnknownJob), 404);
        assert_eq!(status(ErrorCode::SpecMismatch), 409);
        assert_eq!(status(ErrorCode::InvalidSpec), 422);
        assert_eq!(status(ErrorCode::Unavailable), 503);
    }

    #[tokio::test]
    async fn errors_of_the_framework_become_problems_and_other_answers_stay() {
        let plain = [
            (StatusCode::NOT_FOUND, "", "no such path", "malformed"),
            (StatusCode::METHOD_NOT_ALLOWED, "", "Allow", "malformed"),
            (StatusCode::PAYLOAD_TOO_LARGE, "length limit exceeded", "length limit exceeded", "limit"),
            (StatusCode::UNPROCESSABLE_ENTITY, "missing field `key`", "missing field `key`", "malformed"),
            (StatusCode::INTERNAL_SERVER_ERROR, "", "Internal Server Error", "internal"),
        ];
        for (status, text, detail, code) in plain {
            let (told, body) = read(told((status, text).into_response(), "id-2").await).await;
            assert_eq!((told, body["status"].as_u64()), (status, Some(status.as_u16().into())));
            assert!(body["detail"].as_str().unwrap().contains(detail), "{body}");
            assert_eq!((body["code"].as_str(), body["type"].as_str()), (Some(code), Some("about:blank")));
        }
        let busy = told(Problem::busy("requests").into_response(), "id-3").await;
        assert_eq!(busy.headers()[header::RETRY_AFTER], "1");
        let fine = told((StatusCode::CREATED, "text").into_response(), "id-4").await;
        assert_eq!(&axum::body::to_bytes(fine.into_body(), 99).await.unwrap()[..], b"text");
    }
}

//! A client made of nothing but the OpenAPI document: it builds every request from the described path, parameters
//! and bodies, and holds every answer against the described one.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::Method;
use serde_json::{Map, Value, json};
use thalweg_tests::{connect, embedded::Embedded};

use super::{Answer, Http, read, start, with_json};

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// The document.
struct Document(Value);

/// A described operation.
struct Operation<'a> {
    id: &'a str,
    method: Method,
    path: &'a str,
    parameters: Vec<&'a Value>,
    body: Option<&'a Value>,
    responses: &'a Map<String, Value>,
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("a text is expected: {value}"))
}

impl Document {
    fn operations(&self) -> Vec<Operation<'_>> {
        let mut operations = Vec::new();
        for (path, item) in entries(&self.0["paths"]) {
            for (method, operation) in entries(item) {
                assert!(METHODS.contains(&method.as_str()), "{path}: what is {method:?}?");
                operations.push(Operation {
                    id: text(&operation["operationId"]),
                    method: method.to_uppercase().parse().expect("a method"),
                    path,
                    parameters: list(&operation["parameters"]).collect(),
                    body: operation.get("requestBody").map(|body| &body["content"]["application/json"]),
                    responses: operation["responses"].as_object().expect("responses"),
                });
            }
        }
        operations
    }

    /// Panics where `value` does not match a schema of the document.
    fn check(&self, what: &str, schema: &Value, value: &Value) {
        let root = json!({ "allOf": [schema], "components": self.0["components"] });
        let validator = jsonschema::draft202012::new(&root).expect("a schema");
        let errors: Vec<_> = validator.iter_errors(value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{what}: {errors:?}\n{value}");
    }

    /// Every rule of OpenAPI 3.1 that a client made from the document depends on.
    fn check_itself(&self) {
        let Self(document) = self;
        assert!(text(&document["openapi"]).starts_with("3.1."));
        assert!(
            !text(&document["info"]["title"]).is_empty() && !text(&document["info"]["version"]).is_empty()
        );
        self.check_references(document);
        for (name, schema) in entries(&document["components"]["schemas"]) {
            assert!(
                name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)),
                "{name}"
            );
            jsonschema::meta::validate(schema).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let tags: BTreeSet<_> = list(&document["tags"]).map(|tag| text(&tag["name"])).collect();
        let mut ids = BTreeSet::new();
        for operation in self.operations() {
            let Operation { id, path, .. } = operation;
            assert!(ids.insert(id), "two operations are called {id}");
            let described = &document["paths"][path][operation.method.as_str().to_lowercase()];
            assert!(!text(&described["summary"]).is_empty(), "{id}: a summary");
            assert!(list(&described["tags"]).count() == 1, "{id}: one tag");
            assert!(list(&described["tags"]).all(|tag| tags.contains(text(tag))), "{id}: a known tag");
            let in_path: BTreeSet<_> = path.split('/').filter_map(|part| part.strip_prefix('{')).collect();
            let in_path: BTreeSet<_> = in_path.iter().map(|name| name.trim_end_matches('}')).collect();
            let mut named = BTreeSet::new();
            let mut pairs = BTreeSet::new();
            for parameter in &operation.parameters {
                let (name, place) = (text(&parameter["name"]), text(&parameter["in"]));
                assert!(pairs.insert((name, place)), "{id}: {name} twice");
                assert!(!text(&parameter["description"]).is_empty(), "{id}: {name} is not described");
                jsonschema::meta::validate(&parameter["schema"]).expect("a schema");
                if place == "path" {
                    assert_eq!(parameter["required"], true, "{id}: {name}");
                    named.insert(name);
                }
            }
            assert_eq!(named, in_path, "{id}: parameters of the path");
            let success = |status: &&String| status.starts_with('2');
            assert!(operation.responses.keys().any(|status| success(&status)), "{id}: no success");
            for (status, response) in operation.responses {
                assert!(!text(&response["description"]).is_empty(), "{id}: {status}");
                for (_, media) in entries(&response["content"]) {
                    jsonschema::meta::validate(&media["schema"]).expect("a schema");
                }
            }
            if let Some(body) = operation.body {
                self.check(id, &body["schema"], example(body).unwrap_or_else(|| panic!("{id}: no example")));
            }
        }
    }

    fn check_references(&self, value: &Value) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(reference)) = fields.get("$ref") {
                    let pointer = reference.strip_prefix('#').expect("a reference within the document");
                    assert!(self.0.pointer(pointer).is_some(), "{reference} leads nowhere");
                }
                fields.values().for_each(|value| self.check_references(value));
            }
            Value::Array(values) => values.iter().for_each(|value| self.check_references(value)),
            _ => {}
        }
    }

    /// Holds an answer against what the operation says about it.
    fn check_answer(&self, operation: &Operation<'_>, answer: &Answer) {
        let (id, status) = (operation.id, answer.status.as_str());
        let body = || String::from_utf8_lossy(&answer.body).into_owned();
        let described = operation.responses.get(status);
        let described =
            described.unwrap_or_else(|| panic!("{id}: status {status} is not described: {}", body()));
        for (name, header) in entries(&described["headers"]) {
            let value = answer.header(name);
            assert!(!value.is_empty(), "{id}: the answer lacks {name}");
            let value = match header["schema"]["type"].as_str() {
                Some("integer") => json!(value.parse::<u64>().expect("a number")),
                _ => json!(value),
            };
            self.check(&format!("{id}: {name}"), &header["schema"], &value);
        }
        let media = answer.header("content-type").split(';').next().unwrap_or_default();
        let Some(content) = described.get("content") else {
            assert!(answer.body.is_empty(), "{id}: {status} has a body that is not described: {}", body());
            return;
        };
        let content = content.get(media);
        let schema =
            &content.unwrap_or_else(|| panic!("{id}: {media:?} is not described for {status}"))["schema"];
        match media {
            "application/json" | "application/problem+json" => self.check(id, schema, &answer.json()),
            "text/event-stream" => {
                self.check(id, schema, &json!(body()));
                let event = json!({ "$ref": "#/components/schemas/Event" });
                for data in body().lines().filter_map(|line| line.strip_prefix("data: ")) {
                    self.check(id, &event, &serde_json::from_str(data).expect("JSON"));
                }
            }
            _ => self.check(id, schema, &json!(body())),
        }
    }
}

/// An example of a parameter or a body.
fn example(described: &Value) -> Option<&Value> {
    described.get("example").or_else(|| described["schema"].get("example"))
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// A value that a parameter may have, from its description alone.
fn value_of(parameter: &Value) -> String {
    let schema = &parameter["schema"];
    let is = |name: &str| schema["type"] == name || list(&schema["type"]).any(|kind| kind == name);
    let found = example(parameter).or_else(|| schema.get("default")).or_else(|| schema.get("minimum"));
    match found {
        Some(value) => plain(value),
        None if is("boolean") => "true".to_owned(),
        None if is("integer") => "1".to_owned(),
        None => "default".to_owned(),
    }
}

/// Which values a request is made with.
#[derive(Clone, Copy, PartialEq)]
enum Choice {
    /// Only what is required.
    Required,
    /// Every parameter there is.
    Everything,
    /// A path that names nothing there is.
    Nowhere,
    /// Query and header parameters that are no numbers and no switches.
    Garbage,
}

impl Operation<'_> {
    fn request(
        &self,
        http: &Http,
        fixture: &BTreeMap<&str, String>,
        choice: Choice,
    ) -> reqwest::RequestBuilder {
        let (mut path, mut query, mut headers) = (self.path.to_owned(), Vec::new(), Vec::new());
        for parameter in &self.parameters {
            let name = text(&parameter["name"]);
            let typed = !parameter["schema"].to_string().contains("\"string\"");
            let value = match choice {
                Choice::Garbage if typed => "garbage".to_owned(),
                Choice::Nowhere if typed => "999999999".to_owned(),
                Choice::Nowhere => "nowhere".to_owned(),
                _ => fixture.get(name).cloned().unwrap_or_else(|| value_of(parameter)),
            };
            let wanted = match choice {
                Choice::Required | Choice::Nowhere => parameter["required"] == true,
                Choice::Everything => true,
                Choice::Garbage => typed,
            };
            match text(&parameter["in"]) {
                "path" => path = path.replace(&format!("{{{name}}}"), &value),
                "query" if wanted => query.push(format!("{name}={value}")),
                "header" if wanted => headers.push((name, value)),
                _ => {}
            }
        }
        let mark = if query.is_empty() { "" } else { "?" };
        let mut request = http.request(&self.method, &format!("{path}{mark}{}", query.join("&")));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        match self.body {
            Some(body) => with_json(request, example(body).expect("an example").to_string()),
            None => request,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_is_all_that_a_client_needs() {
    let (service, http) = start().await;
    let nats = connect(service.service().url()).await;
    let document = Document(http.get("/v1/openapi.json").await.ok(200));
    document.check_itself();
    let operations = document.operations();
    let called = |id: &str| operations.iter().find(|o| o.id == id).unwrap_or_else(|| panic!("no {id}"));
    let (create, delete) = (called("createJob"), called("deleteJob"));
    let mut seen = BTreeSet::new();

    for operation in &operations {
        for choice in [Choice::Required, Choice::Everything, Choice::Nowhere, Choice::Garbage] {
            // Each request meets the same world: the job of the examples, new, and a dead letter.
            let mut fixture = BTreeMap::new();
            let gone = read(delete.request(&http, &fixture, Choice::Required)).await;
            document.check_answer(delete, &gone);
            if operation.path != create.path {
                let made = read(create.request(&http, &fixture, Choice::Required)).await;
                assert_eq!(made.status, 201, "{:?}", String::from_utf8_lossy(&made.body));
            }
            if operation.path.contains("{sequence}") {
                let mut headers = async_nats::HeaderMap::new();
                headers.insert("Thalweg-Code", "malformed");
                headers.insert("Thalweg-Subject", "thalweg.event.put.back");
                let sent =
                    nats.jetstream.publish_with_headers("thalweg.deadletter.t.j", headers, "{}".into());
                let stored = sent.await.expect("sent").await.expect("stored");
                fixture.insert("sequence", stored.sequence.to_string());
            }
            let answer = read(operation.request(&http, &fixture, choice)).await;
            document.check_answer(operation, &answer);
            let status = answer.status.as_u16();
            let what = format!("{}: {}", operation.id, String::from_utf8_lossy(&answer.body));
            let names_job = operation.path.contains("{job}") && operation.id != "getJobEvents";
            match choice {
                Choice::Required | Choice::Everything => assert!(answer.status.is_success(), "{what}"),
                Choice::Nowhere if names_job || operation.path.contains("{sequence}") => {
                    assert_eq!(status, 404, "{what}");
                }
                Choice::Garbage if operation.parameters.iter().any(|p| p["schema"]["type"] != "string") => {
                    assert_eq!(status, 400, "{what}");
                }
                _ => {}
            }
            seen.insert((operation.id, answer.status.as_str().to_owned()));
            if operation.body.is_some() && choice == Choice::Required {
                // Safe to repeat, where the document has an answer for that.
                let again = read(operation.request(&http, &fixture, choice)).await;
                document.check_answer(operation, &again);
                seen.insert((operation.id, again.status.as_str().to_owned()));
                for (body, status) in [("{", 400), ("[]", 422), (r#"{"reason":7}"#, 422)] {
                    let request = operation.request(&http, &fixture, choice).body(body);
                    let answer = read(request).await;
                    document.check_answer(operation, &answer);
                    assert!(
                        answer.status == status || (body == "[]" && answer.status.is_client_error()),
                        "{}: {body}: {}",
                        operation.id,
                        answer.status
                    );
                }
            }
        }
        for status in operation.responses.keys().filter(|status| status.starts_with('2')) {
            assert!(seen.contains(&(operation.id, status.clone())), "{} never gave {status}", operation.id);
        }
    }
    nothing_else(&document, &http).await;
    service.stop().await;
}

/// No route and no method answers that the document does not describe.
async fn nothing_else(document: &Document, http: &Http) {
    let problem = json!({ "$ref": "#/components/schemas/Problem" });
    for (path, item) in entries(&document.0["paths"]) {
        let described: BTreeSet<_> = entries(item).map(|(method, _)| method.to_uppercase()).collect();
        let address = path.replace("{tenant}", "t").replace("{job}", "j").replace("{sequence}", "1");
        for method in METHODS.map(str::to_uppercase).iter().filter(|method| !described.contains(*method)) {
            let answer = read(http.request(&method.parse().expect("a method"), &address)).await;
            assert_eq!(answer.status, 405, "{method} {path} is not described");
            document.check(path, &problem, &answer.json());
            let allowed: BTreeSet<_> = answer.header("allow").split(',').map(ToOwned::to_owned).collect();
            let mut expected = described.clone();
            if expected.contains("GET") {
                expected.insert("HEAD".to_owned());
            }
            assert_eq!(allowed, expected, "{path}");
        }
    }
    // Routes come with their descriptions, or not at all: `routes!` takes the path from there.
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway/src/http");
    for file in std::fs::read_dir(folder).expect("the gateway's routes") {
        let path = file.expect("a file").path();
        let source = std::fs::read_to_string(&path).expect("source");
        let source = source.split("#[cfg(test)]").next().unwrap_or_default();
        for call in [".route(", ".route_service(", ".nest(", ".nest_service(", ".fallback("] {
            assert!(!source.contains(call), "{}: {call} adds what is not described", path.display());
        }
    }
    // And what has answered in this process is described.
    let metrics = thalweg_telemetry::metrics::install().expect("the recorder is installed").render();
    let routes = metrics.lines().filter(|line| line.starts_with("thalweg_gateway_http_requests_total{"));
    for line in routes {
        let route = line.split("route=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a route");
        let known = route == "unmatched" || document.0["paths"].get(route).is_some();
        assert!(known, "{route} is not described");
    }
    assert!(Embedded::metric("thalweg_gateway_http_requests_total", "route=\"/v1/jobs\"") > 0.0);
}

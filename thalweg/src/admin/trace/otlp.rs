//! Spans for a collector of OpenTelemetry: OTLP over HTTP, in its JSON form
//! (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>).

use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use thalweg_protocol::{JobKey, Round, TraceId};

use super::story::Told;

/// Spans in one request.
const BATCH: usize = 2048;
/// Longest wait for the collector.
const PATIENCE: Duration = Duration::from_secs(10);
/// `SPAN_KIND_INTERNAL` of the specification.
const INTERNAL: u32 = 1;

/// Reads the address of a collector: the path of its traces is added, unless it is there.
pub(super) fn parse_url(text: &str) -> Result<String, String> {
    let hint = "expected the address of a collector, such as http://127.0.0.1:4318";
    let url = text.parse::<reqwest::Url>().map_err(|error| format!("{error}; {hint}"))?;
    if url.scheme() != "http" {
        return Err(format!("{}: only http is spoken; {hint}", url.scheme()));
    }
    let text = text.trim_end_matches('/');
    Ok(if text.ends_with("/v1/traces") { text.to_owned() } else { format!("{text}/v1/traces") })
}

/// Sends the spans of a round.
pub(super) async fn export(
    url: &str,
    job: &JobKey,
    trace: TraceId,
    round: Round,
    spans: &[Told],
) -> anyhow::Result<()> {
    let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
    for spans in spans.chunks(BATCH) {
        let body = request(job, trace, round, spans).to_string();
        let request = client.post(url).header("content-type", "application/json").body(body);
        let answer = request.send().await.with_context(|| format!("no collector takes spans at {url}"))?;
        let status = answer.status();
        if !status.is_success() {
            let text = answer.text().await.unwrap_or_default();
            anyhow::bail!("the collector at {url} answers {status}: {}", text.trim());
        }
    }
    Ok(())
}

/// An `ExportTraceServiceRequest`.
fn request(job: &JobKey, trace: TraceId, round: Round, spans: &[Told]) -> Value {
    // One resource for each component, in the order in which they come.
    let mut resources: Vec<((&str, &str), Vec<Value>)> = Vec::new();
    for told in spans {
        let whose = (told.component.as_str(), told.name.as_str());
        let spans = match resources.iter_mut().find(|(known, _)| *known == whose) {
            Some((_, spans)) => spans,
            None => {
                resources.push((whose, Vec::new()));
                let last = resources.len() - 1;
                &mut resources[last].1
            }
        };
        spans.push(span(job, trace, round, told));
    }
    let resources: Vec<_> = resources
        .into_iter()
        .map(|((component, name), spans)| {
            let attributes = [
                text("service.namespace", "thalweg"),
                text("service.name", &format!("thalweg-{component}")),
                text("service.instance.id", name),
            ];
            json!({
                "resource": {"attributes": attributes},
                "scopeSpans": [{"scope": {"name": "thalweg", "version": env!("CARGO_PKG_VERSION")}, "spans": spans}],
            })
        })
        .collect();
    json!({"resourceSpans": resources})
}

fn span(job: &JobKey, trace: TraceId, round: Round, told: &Told) -> Value {
    let span = &told.span;
    let mut attributes = vec![
        text("thalweg.tenant", job.tenant.as_str()),
        text("thalweg.job", job.job.as_str()),
        number("thalweg.round", round),
        number("thalweg.shard", span.shard.into()),
    ];
    attributes.extend(span.rank.map(|rank| number("thalweg.rank", rank.into())));
    let nanoseconds = |us: u64| us.saturating_mul(1000).to_string();
    let mut value = json!({
        "traceId": trace.to_string(),
        "spanId": span.id(trace).to_string(),
        "name": span.stage.name(),
        "kind": INTERNAL,
        "startTimeUnixNano": nanoseconds(span.start_us),
        "endTimeUnixNano": nanoseconds(span.end_us()),
        "attributes": attributes,
    });
    if let Some(parent) = span.parent(trace) {
        value["parentSpanId"] = parent.to_string().into();
    }
    value
}

fn text(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

/// 64-bit integers are texts, as in all of protobuf's JSON.
fn number(key: &str, value: u64) -> Value {
    json!({"key": key, "value": {"intValue": value.to_string()}})
}

#[cfg(test)]
mod tests {
    use thalweg_protocol::{Incarnation, Span, Stage};

    use super::*;

    #[test]
    fn addresses_of_collectors_are_read() {
        for good in ["http://127.0.0.1:4318", "http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"] {
            assert_eq!(parse_url(good).as_deref(), Ok("http://127.0.0.1:4318/v1/traces"));
        }
        for bad in ["collector", "https://x", "127.0.0.1:4318", ""] {
            assert!(parse_url(bad).unwrap_err().contains("http://127.0.0.1:4318"), "{bad}");
        }
    }

    #[test]
    fn every_component_is_a_resource_and_a_round_has_no_parent() {
        let job = JobKey { tenant: "default".parse().unwrap(), job: "digits".parse().unwrap() };
        let trace = TraceId::new(Incarnation([3; 16]), 7);
        let told = |component: &str, stage, rank| Told {
            component: component.to_owned(),
            name: "one".to_owned(),
            span: Span { stage, shard: 2, rank, start_us: 5, duration_us: 3 },
        };
        let spans = [
            told("worker", Stage::Round, Some(1)),
            told("invoker", Stage::Fold, None),
            told("worker", Stage::Push, Some(1)),
        ];
        let value = request(&job, trace, 7, &spans);
        let resources = value["resourceSpans"].as_array().unwrap();
        let of = |index: usize| &resources[index]["scopeSpans"][0]["spans"];
        assert_eq!((resources.len(), of(0).as_array().unwrap().len()), (2, 2));
        let (round, push) = (&of(0)[0], &of(0)[1]);
        assert_eq!(round.get("parentSpanId"), None);
        assert_eq!(push["parentSpanId"], round["spanId"]);
        assert_eq!(
            (push["startTimeUnixNano"].as_str(), push["endTimeUnixNano"].as_str()),
            (Some("5000"), Some("8000"))
        );
        assert_eq!(push["traceId"].as_str().unwrap().len(), 32);
    }
}

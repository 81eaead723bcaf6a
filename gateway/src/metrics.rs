//! Metrics of the gateway.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use thalweg_protocol::ErrorCode;

const REQUESTS: &str = "thalweg_gateway_requests_total";
const ERRORS: &str = "thalweg_gateway_errors_total";
const EXPIRED: &str = "thalweg_gateway_workers_expired_total";
const JOBS: &str = "thalweg_gateway_jobs";
const WORKERS: &str = "thalweg_gateway_workers";
const GRANTED: &str = "thalweg_gateway_window_bytes";
const OPEN_ROUNDS: &str = "thalweg_gateway_open_rounds";
const NUDGES: &str = "thalweg_gateway_nudges_total";
const HTTP_REQUESTS: &str = "thalweg_gateway_http_requests_total";
const HTTP_DURATION: &str = "thalweg_gateway_http_request_seconds";

const LEADS: &str = "thalweg_gateway_leads";
const ROUND_TRIP: &str = "thalweg_broker_round_trip_seconds";
const BROKER_MEMORY: &str = "thalweg_broker_memory_bytes";
const BROKER_STORAGE: &str = "thalweg_broker_storage_bytes";
const BROKER_FAILURES: &str = "thalweg_broker_failed_looks_total";
const DEAD_LETTERS: &str = "thalweg_dead_letters";

/// Describes the metrics; call once a recorder is installed.
pub fn describe() {
    describe_counter!(REQUESTS, "Requests about jobs, by NATS or HTTP, by kind");
    describe_counter!(ERRORS, "Requests refused, by code");
    describe_counter!(EXPIRED, "Workers taken off their roster after a lease of silence");
    describe_gauge!(JOBS, "Jobs in the registry");
    describe_gauge!(WORKERS, "Workers on rosters");
    describe_gauge!(GRANTED, "Bytes in flight granted to workers");
    describe_gauge!(OPEN_ROUNDS, "Shards whose next round has partial commits");
    describe_counter!(NUDGES, "Messages that ask invokers to look at open rounds again");
    describe_gauge!(LEADS, "1 where this gateway grants windows and expires workers, else 0");
    describe_histogram!(ROUND_TRIP, "Time to ask JetStream for its account's usage");
    describe_gauge!(BROKER_MEMORY, "Bytes of JetStream's memory in use, by all of the account");
    describe_gauge!(BROKER_STORAGE, "Bytes of JetStream's disk in use, by all of the account");
    describe_counter!(BROKER_FAILURES, "Times that JetStream did not tell its usage");
    describe_gauge!(DEAD_LETTERS, "Messages put aside that nobody has decided about");
    counter!(BROKER_FAILURES).increment(0);
    counter!(EXPIRED).increment(0);
    describe_counter!(HTTP_REQUESTS, "HTTP requests, by the route's template and status");
    describe_histogram!(
        HTTP_DURATION,
        "Time until the head of an HTTP answer (what is streamed may take longer), by the route's template"
    );
}

pub(crate) fn open_rounds(shards: usize) {
    gauge!(OPEN_ROUNDS).set(shards as f64);
}

pub(crate) fn nudged() {
    counter!(NUDGES).increment(1);
}

pub(crate) fn request(kind: &'static str) {
    counter!(REQUESTS, "kind" => kind).increment(1);
}

pub(crate) fn refused(code: ErrorCode) {
    counter!(ERRORS, "code" => code.as_str()).increment(1);
}

pub(crate) fn expired() {
    counter!(EXPIRED).increment(1);
}

pub(crate) fn totals(jobs: usize, workers: usize, granted: u64) {
    gauge!(JOBS).set(jobs as f64);
    gauge!(WORKERS).set(workers as f64);
    gauge!(GRANTED).set(granted as f64);
}

/// `route` is a template: the names in a path would make a series each.
pub(crate) fn http(route: &str, status: u16, elapsed: Duration) {
    counter!(HTTP_REQUESTS, "route" => route.to_owned(), "status" => status.to_string()).increment(1);
    histogram!(HTTP_DURATION, "route" => route.to_owned()).record(elapsed);
}

pub(crate) fn leads(leads: bool) {
    gauge!(LEADS).set(if leads { 1.0 } else { 0.0 });
}

pub(crate) fn broker(memory: u64, storage: u64, round_trip: Duration) {
    gauge!(BROKER_MEMORY).set(memory as f64);
    gauge!(BROKER_STORAGE).set(storage as f64);
    histogram!(ROUND_TRIP).record(round_trip.as_secs_f64());
}

pub(crate) fn broker_failed() {
    counter!(BROKER_FAILURES).increment(1);
}

pub(crate) fn dead_letters(messages: u64) {
    gauge!(DEAD_LETTERS).set(messages as f64);
}

//! Harness of the whole-system tests.
//!
//! [`actuators`] holds every actuator to what the trait promises. [`cluster`] runs every component as a process of its own, beside a real nats-server, and starts them
//! again when they die. [`command`] runs the binary as a user does. [`embedded`] runs the embedded service in the test's process. [`training`] is a
//! job whose every result can be recomputed bit for bit.

pub mod actuators;
pub mod cluster;
pub mod command;
pub mod embedded;
pub mod training;

use std::{path::PathBuf, time::Duration};

use thalweg_broker::{Connection, NatsConfig};
use tokio_util::sync::CancellationToken;

/// Longest wait for anything in a test.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The nats-server to test against.
///
/// # Panics
/// When there is none: a test that needs it must not pass without.
#[must_use]
pub fn nats_server() -> PathBuf {
    thalweg::nats::find(None).unwrap_or_else(|error| panic!("{error:#}; `make test` sees to that"))
}

/// A connection of the test's own.
///
/// # Panics
/// When the URL cannot be read.
pub async fn connect(url: &str) -> Connection {
    let config = NatsConfig { url: url.to_owned(), ..NatsConfig::default() };
    let connection = Connection::open("test", &config, &CancellationToken::new()).await;
    connection.expect("a URL").expect("connected")
}

/// Waits until `done` says so.
///
/// # Panics
/// After [`PATIENCE`], naming `what`.
pub async fn eventually(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let until = std::time::Instant::now() + PATIENCE;
    while !done().await {
        assert!(std::time::Instant::now() < until, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

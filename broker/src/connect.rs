//! Connecting, in any start order, and noticing reconnects.

use std::{path::PathBuf, time::Duration};

use async_nats::{Client, ConnectOptions, Event, ServerAddr, jetstream};
use bytes::Bytes;
use futures::StreamExt as _;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::metrics;

/// How to reach NATS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsConfig {
    /// Server URL; may carry user and password, or a token: `nats://user:password@host`, `nats://token@host`. Default `nats://127.0.0.1:4222`.
    pub url: String,
    /// Credentials file (JWT and nkey seed), if the server asks for one.
    pub credentials: Option<PathBuf>,
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self { url: "nats://127.0.0.1:4222".to_owned(), credentials: None }
    }
}

/// An open connection. Cheap to clone; all clones share one socket.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Core NATS.
    pub client: Client,
    /// JetStream on the same connection.
    pub jetstream: jetstream::Context,
    connects: watch::Receiver<u64>,
}

/// Messages a subscription may hold before the client drops some and says so. Everything that
/// flows in bulk is pulled by credit or bounded by windows, so this only has to absorb bursts.
const SUBSCRIPTION_CAPACITY: usize = 16 * 1024;
/// The first version that refuses publications beyond its buffers (429) instead of dropping them.
const LEAST_VERSION: (u32, u32) = (2, 11);
const JETSTREAM_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest time to find out why there is no connection.
const OBSTACLE: Duration = Duration::from_secs(1);
const PING_INTERVAL: Duration = Duration::from_secs(5);

impl Connection {
    /// Connects, waiting as long as it takes for the server to appear, and says so in the log.
    ///
    /// Returns `None` when `shutdown` fires first. Cancel safe.
    ///
    /// # Errors
    /// Only what waiting cannot cure: a URL or credentials file that cannot be read.
    pub async fn open(
        name: &str,
        config: &NatsConfig,
        shutdown: &CancellationToken,
    ) -> std::io::Result<Option<Self>> {
        let (notify, connects) = watch::channel(0_u64);
        let mut reported = false;
        loop {
            let notify = notify.clone();
            let options = options(config)?
                .name(name)
                .subscription_capacity(SUBSCRIPTION_CAPACITY)
                .client_capacity(256)
                .ping_interval(PING_INTERVAL)
                .read_buffer_capacity(u16::MAX)
                .reconnect_delay_callback(|attempts| {
                    // Quick at first: most disconnects are a server restart.
                    Duration::from_millis((20_u64 << attempts.min(6)).min(1000))
                })
                .event_callback(move |event| {
                    let notify = notify.clone();
                    async move {
                        match event {
                            Event::Connected => {
                                metrics::connected(true);
                                notify.send_modify(|count| *count += 1);
                            }
                            Event::Disconnected => {
                                metrics::connected(false);
                                tracing::warn!("connection to NATS lost; reconnecting");
                            }
                            Event::SlowConsumer(sid) => {
                                metrics::overflowed();
                                tracing::warn!(sid, "a subscription overflowed");
                            }
                            Event::ServerError(error) => tracing::warn!(%error, "NATS reports an error"),
                            other => tracing::debug!(event = %other, "NATS event"),
                        }
                    }
                });
            let attempt = async_nats::connect_with_options(config.url.as_str(), options);
            let result = tokio::select! {
                result = attempt => result,
                () = shutdown.cancelled() => return Ok(None),
            };
            match result {
                Ok(client) => {
                    let version = client.server_info().version;
                    if !is_recent(&version) {
                        return Err(std::io::Error::other(format!(
                            "the NATS server at {} has version {version}; {}.{} or later is needed: update nats-server",
                            redacted(&config.url),
                            LEAST_VERSION.0,
                            LEAST_VERSION.1
                        )));
                    }
                    if reported {
                        tracing::info!(url = redacted(&config.url), "NATS is there");
                    }
                    let mut jetstream = jetstream::new(client.clone());
                    jetstream.set_timeout(JETSTREAM_TIMEOUT);
                    return Ok(Some(Self { client, jetstream, connects }));
                }
                Err(error) if error.kind() == async_nats::ConnectErrorKind::ServerParse => {
                    return Err(std::io::Error::new(
                        std::io::ErrorKind::InvalidInput,
                        format!("NATS URL {:?}: {error}; expected nats://host:port", redacted(&config.url)),
                    ));
                }
                Err(error) => {
                    if !reported {
                        tracing::info!(
                            url = redacted(&config.url), %error,
                            "waiting for NATS: start nats-server there, or set another URL"
                        );
                        reported = true;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_millis(200)) => {}
                        () = shutdown.cancelled() => return Ok(None),
                    }
                }
            }
        }
    }

    /// Tries once and says what is in the way; `None` when nothing is.
    pub async fn obstacle(config: &NatsConfig) -> Option<String> {
        let options = match options(config) {
            Ok(options) => options.connection_timeout(OBSTACLE),
            Err(error) => return Some(error.to_string()),
        };
        match async_nats::connect_with_options(config.url.as_str(), options).await {
            Ok(_) => None,
            // The error behind it says more: refused, or not authorised.
            Err(error) => {
                let source = std::error::Error::source(&error);
                Some(source.map_or_else(|| error.to_string(), ToString::to_string))
            }
        }
    }

    /// Waits until the server has taken in everything that was published so far, at most for so long: a message to ourselves
    /// comes back behind it. A flush tells only that the system has the bytes; what the server has not read when its client
    /// ends may be lost.
    pub async fn taken_in(&self, patience: Duration) {
        let echo = async {
            let inbox = self.client.new_inbox();
            let mut heard = self.client.subscribe(inbox.clone()).await.ok()?;
            self.client.publish(inbox, Bytes::new()).await.ok()?;
            self.client.flush().await.ok()?;
            heard.next().await
        };
        if !matches!(tokio::time::timeout(patience, echo).await, Ok(Some(_))) {
            tracing::debug!("the last messages may not have reached NATS");
        }
    }

    /// Counts connects; changes whenever the connection was lost and is back.
    #[must_use]
    pub fn connects(&self) -> watch::Receiver<u64> {
        self.connects.clone()
    }
}

fn options(config: &NatsConfig) -> std::io::Result<ConnectOptions> {
    let Some(path) = &config.credentials else {
        return Ok(match in_url(&config.url) {
            // The client reads a URL's host and port only.
            Some((user, Some(password))) => ConnectOptions::with_user_and_password(user, password),
            Some((token, None)) => ConnectOptions::with_token(token),
            None => ConnectOptions::new(),
        });
    };
    let text = std::fs::read_to_string(path).map_err(|error| {
        std::io::Error::new(error.kind(), format!("NATS credentials {}: {error}", path.display()))
    })?;
    ConnectOptions::with_credentials(&text)
}

/// User and password of a URL, or its token, which stands there without a password.
fn in_url(url: &str) -> Option<(String, Option<String>)> {
    let address: ServerAddr = url.parse().ok()?;
    let plain = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    Some((plain(address.username()?), address.password().map(plain)))
}

/// Whether a server's version is one that has what is used here. One that cannot be read is let pass: a
/// build of somebody's own.
fn is_recent(version: &str) -> bool {
    let mut parts = version.trim_start_matches('v').split('.').map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= LEAST_VERSION,
        _ => true,
    }
}

/// The URL without user and password.
fn redacted(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, host)) => format!("nats://…@{host}"),
        None => url.to_owned(),
    }
}

/// How a service tells its host whether it is ready: `None`, or what it waits for.
pub type Report = std::sync::Arc<dyn Fn(Option<&str>) + Send + Sync>;

/// A report that nobody reads.
#[must_use]
pub fn no_report() -> Report {
    std::sync::Arc::new(|_| {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_servers_are_refused() {
        for version in ["2.11.0", "2.15.1", "3.0.0", "v2.11.0-RC.1", "dev"] {
            assert!(is_recent(version), "{version}");
        }
        for version in ["2.10.29", "2.9.10", "1.4.1"] {
            assert!(!is_recent(version), "{version}");
        }
    }

    #[test]
    fn a_url_may_carry_who_connects() {
        let of = |url: &str| in_url(url).map(|(user, password)| (user, password.unwrap_or_default()));
        let expected = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(of("nats://me:se%40cret@host:4222"), expected("me", "se@cret"));
        assert_eq!(of("nats://t0ken@host"), expected("t0ken", ""));
        assert_eq!(of("nats://host:4222"), None);
    }

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(redacted("nats://me:secret@host:4222"), "nats://…@host:4222");
        assert_eq!(redacted("nats://host:4222"), "nats://host:4222");
    }
}

//! Commands that look at a deployment and change its jobs, over NATS: the URL is all they need.

mod dead_letter;
mod events;
mod job;
mod model;
mod status;

use std::{io::Write as _, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use serde::Serialize;
use thalweg_sdk::{Client, Error, ErrorCode, JobKey, NatsConfig};

pub(crate) use dead_letter::{DeadLetterCommand, dead_letter};
pub(crate) use events::{EventsArgs, events};
pub(crate) use job::{JobCommand, job};
pub(crate) use status::status;

/// For `thalweg --help`.
pub(crate) const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 no such job, dead letter or \
                                     file; 4 refused; 5 nobody answered in time.";

/// Which deployment, and how to show what it says.
#[derive(Clone, Debug, Args)]
pub(crate) struct Target {
    /// NATS server of the deployment
    #[arg(long, env = "THALWEG_URL", default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// Credentials file, if the server asks for one
    #[arg(long, env = "THALWEG_CREDENTIALS")]
    credentials: Option<PathBuf>,
    /// Longest wait for an answer, seconds
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
    /// Print JSON for programs instead of text for people
    #[arg(long)]
    pub(crate) json: bool,
}

impl Target {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::try_from_secs_f64(self.timeout)
            .unwrap_or(Duration::from_secs(10))
            .max(Duration::from_millis(1))
    }

    fn config(&self) -> NatsConfig {
        NatsConfig { url: self.nats_url.clone(), credentials: self.credentials.clone() }
    }

    /// Without credentials that a URL may carry.
    fn shown_url(&self) -> String {
        match self.nats_url.split_once('@') {
            Some((_, host)) => format!("nats://{host}"),
            None => self.nats_url.clone(),
        }
    }

    /// A connection of the SDK.
    async fn connect(&self) -> anyhow::Result<Client> {
        let client = tokio::time::timeout(self.timeout(), Client::connect_with(&self.config())).await;
        let client = client.map_err(|_| self.unreachable())?;
        Ok(client?.patient_for(self.timeout()))
    }

    fn unreachable(&self) -> Error {
        Error::TimedOut {
            what: format!("NATS at {}", self.shown_url()),
            after: self.timeout(),
            hint: "Start `thalweg up`, or name the server with --nats-url (or THALWEG_URL).".to_owned(),
        }
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    fn show<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(value)? } else { text(value) };
        print(&text)
    }
}

/// Prints a line, or many; a reader that has gone away is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("printing"),
        _ => Ok(()),
    }
}

fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(header.iter().map(|name| (*name).to_owned()));
    for row in rows {
        table.add_row(row);
    }
    table.to_string()
}

/// Reads `job` (of the tenant `default`) or `tenant/job`.
fn parse_job(text: &str) -> Result<JobKey, String> {
    let (tenant, job) = text.split_once('/').unwrap_or(("default", text));
    let name = |text: &str| text.parse::<thalweg_sdk::Name>().map_err(|error| error.to_string());
    Ok(JobKey { tenant: name(tenant)?, job: name(job)? })
}

/// What was asked for is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotFound(String);

/// Exit code of an error that ends the program.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<NotFound>().is_some() {
        return 3;
    }
    if error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    {
        return 3;
    }
    match error.downcast_ref::<Error>() {
        Some(Error::TimedOut { .. } | Error::Connect(_)) => 5,
        Some(Error::Refused(error)) if error.code == ErrorCode::UnknownJob => 3,
        Some(Error::Refused(error)) if error.is_retryable() => 5,
        Some(Error::Refused(_)) => 4,
        _ => 1,
    }
}

/// Bytes for people.
fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Seconds since the Unix epoch as UTC, as in RFC 3339.
fn time(at_ms: u64) -> String {
    let at = std::time::UNIX_EPOCH + Duration::from_millis(at_ms);
    humantime::format_rfc3339_millis(at).to_string()
}

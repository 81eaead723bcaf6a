//! Commands that look at a deployment and change its jobs, over NATS: the URL is all they need.

mod dead_letter;
mod error;
mod events;
mod job;
mod model;
mod record;
mod status;
mod trace;

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use comfy_table::{ContentArrangement, Table, presets::NOTHING};
use serde::Serialize;
use thalweg_broker::Connection;
use thalweg_sdk::{Client, Error, JobKey, NatsConfig};
use tokio_util::sync::CancellationToken;

pub(crate) use dead_letter::{DeadLetterCommand, dead_letter};
pub(crate) use error::{Complaint, describe as describe_error, exit_code};
pub(crate) use events::{EventsArgs, events};
pub(crate) use job::{JobCommand, job};
pub(crate) use record::{RecordArgs, record};
pub(crate) use status::status;
pub(crate) use trace::{TraceArgs, trace};

/// For `thalweg --help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 no such job, dead letter or file; 4 refused; 5 nobody answered in
time. Errors go to standard error; with --json as {\"error\":{\"code\":…,\"message\":…}}.";

/// Of the options that all commands have.
const HEADING: &str = "Deployment and output";

/// Which deployment, and how to show what it says.
#[derive(Clone, Debug, Args)]
pub(crate) struct Target {
    /// NATS server of the deployment
    #[arg(long, env = "THALWEG_URL", default_value = "nats://127.0.0.1:4222", hide_env_values = true,
        value_name = "URL", value_parser = parse_url, help_heading = HEADING)]
    nats_url: String,
    /// Credentials file, if the server asks for one
    #[arg(long, env = "THALWEG_CREDENTIALS", hide_env_values = true, value_name = "FILE", help_heading = HEADING)]
    credentials: Option<PathBuf>,
    /// Longest wait for an answer, such as 30s or 500ms
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_wait, help_heading = HEADING)]
    timeout: Duration,
    /// Print JSON for programs instead of text for people
    #[arg(long, help_heading = HEADING)]
    pub(crate) json: bool,
}

impl Target {
    fn config(&self) -> NatsConfig {
        NatsConfig { url: self.nats_url.clone(), credentials: self.credentials.clone() }
    }

    /// Without credentials that a URL may carry.
    fn shown_url(&self) -> String {
        match self.nats_url.rsplit_once('@') {
            Some((_, host)) => format!("nats://{host}"),
            None => self.nats_url.clone(),
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        match &self.credentials {
            Some(path) if !path.is_file() => {
                Err(Complaint::NotFound(format!("no credentials file {}: see --credentials", path.display()))
                    .into())
            }
            _ => Ok(()),
        }
    }

    /// A connection of the SDK.
    async fn connect(&self) -> anyhow::Result<Client> {
        self.check()?;
        match tokio::time::timeout(self.timeout, Client::connect_with(&self.config())).await {
            Ok(client) => Ok(client?.patient_for(self.timeout)),
            Err(_) => Err(self.unreachable().await.into()),
        }
    }

    /// A connection for what the SDK does not tell, called `name` on the server.
    async fn connection(&self, name: &str) -> anyhow::Result<Connection> {
        self.check()?;
        let (stop, config) = (CancellationToken::new(), self.config());
        match tokio::time::timeout(self.timeout, Connection::open(name, &config, &stop)).await {
            Ok(connection) => connection?.context("stopped while connecting"),
            Err(_) => Err(self.unreachable().await.into()),
        }
    }

    /// There is no connection in time.
    async fn unreachable(&self) -> Error {
        let reason =
            Connection::obstacle(&self.config()).await.unwrap_or_else(|| "it is there now".to_owned());
        let hint = "start `thalweg up`, or name the server with --nats-url (or THALWEG_URL)";
        Error::TimedOut {
            what: format!("NATS at {}", self.shown_url()),
            after: self.timeout,
            hint: format!("{reason}; {hint}"),
        }
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    fn show<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(value)? } else { text(value) };
        print(&text)
    }
}

/// Prints a line, or many. A reader that has gone away ends the program, and is no error (`main` sees to that).
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()).context("printing")
}

/// Columns under their names; on a terminal no wider than that.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header.iter().map(|name| name.to_uppercase()));
    if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    for row in rows {
        table.add_row(row);
    }
    let text = table.to_string();
    text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end()).collect::<Vec<_>>().join("\n")
}

/// Reads `job` (of the tenant `default`) or `tenant/job`.
fn parse_job(text: &str) -> Result<JobKey, String> {
    let (tenant, job) = text.split_once('/').unwrap_or(("default", text));
    let name = |text: &str| text.parse::<thalweg_sdk::Name>().map_err(|error| error.to_string());
    Ok(JobKey { tenant: name(tenant)?, job: name(job)? })
}

pub(crate) fn parse_url(text: &str) -> Result<String, String> {
    match text.parse::<async_nats::ServerAddr>() {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; expected nats://HOST:PORT")),
    }
}

/// Reads `30s`, `500ms`, or a number of seconds.
pub(crate) fn parse_wait(text: &str) -> Result<Duration, String> {
    let wait = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?,
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string())?,
    };
    if wait.is_zero() { Err("a wait of more than nothing, such as 10s".to_owned()) } else { Ok(wait) }
}

/// So many of something.
fn count(number: impl Into<u64>, what: &str) -> String {
    let number = number.into();
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Bytes for people.
fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Milliseconds since the Unix epoch as UTC, to the second, for people.
fn time(at_ms: u64) -> String {
    humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + Duration::from_millis(at_ms)).to_string()
}

/// The same to the millisecond, for programs.
fn exact_time(at_ms: u64) -> String {
    humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + Duration::from_millis(at_ms)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_and_urls_are_read() {
        assert_eq!(parse_wait("2.5"), Ok(Duration::from_millis(2500)));
        assert_eq!(parse_wait("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["0", "-1", "nan", "soon", "inf"] {
            assert!(parse_wait(bad).is_err(), "{bad}");
        }
        assert!(parse_url("nats://127.0.0.1:4222").is_ok() && parse_url("host").is_ok());
        assert!(parse_url("http://x").unwrap_err().contains("nats://HOST:PORT"));
    }
}

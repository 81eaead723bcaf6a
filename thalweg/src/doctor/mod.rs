//! `thalweg doctor`: what is wrong with a set-up, and what to do about it.

mod broker;
mod judge;

use std::time::Duration;

use anyhow::ensure;
use serde::Serialize;
use serde_json::json;

use crate::{
    admin::{print, table},
    config::Config,
};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// It works, and will hurt.
    Warning,
    /// It does not work.
    Error,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    level: Level,
    /// In one word, for programs.
    check: &'static str,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { level: Level::Ok, check, found: found.into(), remedy: None }
    }

    fn warning(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Warning, check, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn error(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Error, ..Self::warning(check, found, remedy) }
    }
}

/// Examines a configuration (or why there is none), this host and the deployment, and says what it found.
///
/// # Errors
/// When something does not work, after having said what.
pub(crate) async fn run(config: anyhow::Result<Config>, timeout: Duration, json: bool) -> anyhow::Result<()> {
    let mut findings = Vec::new();
    match config {
        Err(error) => {
            let remedy = "docs/thalweg.toml has every key with its default; nothing else was examined";
            findings.push(Finding::error("configuration", format!("{error:#}"), remedy));
        }
        Ok(config) => {
            findings.extend(judge::settings(&config));
            findings.extend(judge::host(&config));
            findings.extend(broker::examine(&config, timeout).await);
        }
    }
    let count = |level: Level| findings.iter().filter(|finding| finding.level == level).count();
    let (errors, warnings) = (count(Level::Error), count(Level::Warning));
    if json {
        let report = json!({ "errors": errors, "warnings": warnings, "findings": findings });
        print(&serde_json::to_string_pretty(&report)?)?;
    } else {
        print(&text(&findings))?;
    }
    ensure!(errors == 0, "{errors} of {} checks found something that does not work", findings.len());
    Ok(())
}

/// The worst first, each with its remedy.
fn text(findings: &[Finding]) -> String {
    let mut sorted: Vec<_> = findings.iter().collect();
    sorted.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    let rows = sorted.into_iter().flat_map(|finding| {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "ERROR",
        };
        let row = vec![level.to_owned(), finding.check.to_owned(), finding.found.clone()];
        let remedy =
            finding.remedy.iter().map(|remedy| vec![String::new(), String::new(), format!("-> {remedy}")]);
        std::iter::once(row).chain(remedy)
    });
    table(&["", "check", "found"], rows)
}

//! What components write into their logs, as far as benchmarks measure by it.

use std::{path::Path, time::SystemTime};

use anyhow::Context as _;
use serde_json::Value;

/// One event of a log.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) at: SystemTime,
    pub(super) message: String,
    fields: Value,
}

impl Line {
    /// A field that is a number.
    pub(super) fn number(&self, name: &str) -> Option<f64> {
        self.fields.get(name)?.as_f64()
    }

    /// A field that is a text.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.fields.get(name)?.as_str()
    }

    fn parse(line: &str) -> Option<Self> {
        let fields: Value = serde_json::from_str(line).ok()?;
        let at = humantime::parse_rfc3339(fields.get("timestamp")?.as_str()?).ok()?;
        let message = fields.get("message")?.as_str()?.to_owned();
        Some(Self { at, message, fields })
    }
}

/// The events with one of these messages, in order. What is no event, such as a panic's text, is passed over.
pub(super) fn read(path: &Path, messages: &[&str]) -> anyhow::Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let wanted = |line: &Line| messages.contains(&line.message.as_str());
    Ok(text.lines().filter_map(Line::parse).filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_among_other_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = "thread 'main' panicked\n\
            {\"timestamp\":\"2026-01-02T03:04:05.250000Z\",\"level\":\"INFO\",\"message\":\"a\",\"n\":3,\"id\":\"x\"}\n\
            {\"timestamp\":\"2026-01-02T03:04:06Z\",\"level\":\"INFO\",\"message\":\"b\"}\n";
        std::fs::write(&path, log).unwrap();
        let lines = read(&path, &["a"]).unwrap();
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].number("n"), lines[0].text("id")), (Some(3.0), Some("x")));
        let both = read(&path, &["a", "b"]).unwrap();
        assert_eq!(both[1].at.duration_since(both[0].at).unwrap().as_millis(), 750);
        assert!(read(&folder.path().join("none"), &["a"]).is_err());
    }
}

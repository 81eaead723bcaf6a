//! Logs: one line per event on stderr, for people on a terminal, as JSON everywhere else.

mod handle;

use std::fmt;
use std::io::{self, IsTerminal};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

pub use self::handle::{LogHandle, installed};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// [`LogFormat::Human`] when stderr is a terminal, [`LogFormat::Json`] when it is not.
    #[default]
    Auto,
    /// Lines for people; coloured on a terminal unless `NO_COLOR` is set.
    Human,
    /// One JSON object per line, the event's fields at its top level.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Human => "human",
            Self::Json => "json",
        })
    }
}

impl FromStr for LogFormat {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        [Self::Auto, Self::Human, Self::Json]
            .into_iter()
            .find(|format| format.to_string() == text)
            .ok_or_else(|| LogError::Format(text.to_owned()))
    }
}

/// Why logs could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not a list of `target=level` directives.
    #[error("invalid log filter `{filter}` (from {origin}): {source}")]
    Filter {
        /// The text that did not parse.
        filter: String,
        /// `RUST_LOG`, `the configuration` or `the request`.
        origin: &'static str,
        /// What the parser said.
        source: ParseError,
    },
    /// No such format.
    #[error("unknown log format `{0}`: use `auto`, `human` or `json`")]
    Format(String),
    /// Somebody else has already set the process's subscriber.
    #[error("logs are already set up in this process")]
    AlreadySet,
    /// The subscriber whose filter was to be changed is no more.
    #[error("the logs whose filter was to be changed have ended: start the process again")]
    Gone,
}

/// Sets the process's log subscriber, once; the handle changes its filter afterwards. [`installed`]
/// returns the same one.
///
/// `filter` has the syntax of `RUST_LOG` (for example `info,thalweg_store=debug`); a `RUST_LOG` that
/// is set and not empty wins over it. An empty filter lets errors through and nothing else.
///
/// # Errors
///
/// [`LogError::Filter`] when the filter in force does not parse, [`LogError::AlreadySet`] when the
/// process has a subscriber already; nothing is changed in either case.
pub fn init(filter: &str, format: LogFormat) -> Result<LogHandle, LogError> {
    let variable = std::env::var("RUST_LOG").ok();
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = Style::choose(format, io::stderr().is_terminal(), plain);
    let (subscriber, handle) = subscriber(variable, filter, style, io::stderr)?;
    subscriber.try_init().map_err(|_| LogError::AlreadySet)?;
    Ok(handle::install(handle))
}

/// [`LogFormat`] once the terminal is known.
#[derive(Debug, PartialEq, Eq)]
enum Style {
    Human { colour: bool },
    Json,
}

impl Style {
    fn choose(format: LogFormat, terminal: bool, plain: bool) -> Self {
        match format {
            LogFormat::Json => Self::Json,
            LogFormat::Auto if !terminal => Self::Json,
            LogFormat::Auto | LogFormat::Human => Self::Human { colour: terminal && !plain },
        }
    }
}

/// Which filter is in force, and where it was set: `RUST_LOG` wins over the configuration unless it is empty.
fn choose<'a>(variable: Option<&'a str>, filter: &'a str) -> (&'a str, &'static str) {
    match variable {
        Some(text) if !text.is_empty() => (text, "RUST_LOG"),
        _ => (filter, "the configuration"),
    }
}

fn parse((filter, origin): (&str, &'static str)) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(filter).map_err(|source| LogError::Filter {
        filter: filter.to_owned(),
        origin,
        source,
    })
}

type Subscriber = Box<dyn tracing::Subscriber + Send + Sync>;

fn subscriber<W>(
    variable: Option<String>,
    filter: &str,
    style: Style,
    writer: W,
) -> Result<(Subscriber, LogHandle), LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let chosen = choose(variable.as_deref(), filter);
    let (text, filter) = (chosen.0.to_owned(), parse(chosen)?);
    // Right above the registry, where its type does not depend on the style of the lines.
    let (filter, reload) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let subscriber: Subscriber = match style {
        Style::Human { colour } => Box::new(registry.with(lines.with_ansi(colour))),
        // Span lists repeat the current span once per level; the innermost one is enough to search by.
        Style::Json => Box::new(
            registry.with(lines.json().flatten_event(true).with_current_span(true).with_span_list(false)),
        ),
    };
    Ok((subscriber, LogHandle::new(variable, text, reload)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    pub(super) struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(filter: &str, style: Style, events: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let (subscriber, _) = subscriber(None, filter, style, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, events);
        text(&sink)
    }

    pub(super) fn text(sink: &Sink) -> String {
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn style_follows_the_terminal_only_for_auto() {
        let table = [
            (LogFormat::Auto, true, false, Style::Human { colour: true }),
            (LogFormat::Auto, true, true, Style::Human { colour: false }),
            (LogFormat::Auto, false, false, Style::Json),
            (LogFormat::Human, false, false, Style::Human { colour: false }),
            (LogFormat::Json, true, false, Style::Json),
        ];
        for (format, terminal, plain, expected) in table {
            assert_eq!(Style::choose(format, terminal, plain), expected);
        }
    }

    #[test]
    fn json_lines_carry_fields_at_the_top_level() {
        let text = logged("info", Style::Json, || {
            tracing::info!(partition = 7, "partition moved");
            tracing::debug!("left out");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["message"], "partition moved");
        assert_eq!(line["partition"], 7);
        assert_eq!(line["level"], "INFO");
    }

    #[test]
    fn human_lines_without_colour_have_no_escapes() {
        let text = logged("debug", Style::Human { colour: false }, || {
            tracing::debug!(partition = 7, "partition moved");
        });
        assert!(text.contains("partition moved partition=7"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn rust_log_wins_over_the_filter_unless_empty() {
        let text = |variable, filter| choose(variable, filter).0;
        assert_eq!(text(Some("debug"), "info"), "debug");
        assert_eq!(text(Some(""), "info"), "info");
        assert_eq!(text(None, "info"), "info");
    }

    #[test]
    fn a_bad_filter_is_named_with_its_origin() {
        let error = parse(choose(None, "thalweg=loud")).unwrap_err().to_string();
        assert!(error.contains("`thalweg=loud`"), "{error}");
        assert!(error.contains("the configuration"), "{error}");
        let error = parse(choose(Some("x=loud"), "info")).unwrap_err();
        assert!(error.to_string().contains("RUST_LOG"), "{error}");
    }

    #[test]
    fn formats_have_one_spelling() {
        for format in [LogFormat::Auto, LogFormat::Human, LogFormat::Json] {
            assert_eq!(format.to_string().parse::<LogFormat>().unwrap(), format);
            let json = serde_json::to_string(&format).unwrap();
            assert_eq!(json, format!("\"{format}\""));
        }
        assert!("JSON".parse::<LogFormat>().is_err());
    }
}

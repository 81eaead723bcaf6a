//! What the SDK logs, for Python's `logging`.
//!
//! The SDK logs on its own threads. Those never take the interpreter's lock, which a training loop may hold for long
//! and which is gone when the interpreter ends: records stay here until a thread of Python's waits for something.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
};

use pyo3::{prelude::*, sync::PyOnceLock};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context, prelude::*};

/// Records that are kept at most; of more, the oldest are dropped.
const KEPT: usize = 256;

/// (level of `logging`, text).
static RECORDS: Mutex<VecDeque<(u8, String)>> = Mutex::new(VecDeque::new());
static SINK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

struct Collector;

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = write!(self.fields, " {}={value}", field.name());
    }
}

impl<S: Subscriber> Layer<S> for Collector {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let level = match *metadata.level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            // There is one of these for every message.
            Level::DEBUG | Level::TRACE => return,
        };
        if !metadata.target().starts_with("thalweg") {
            return;
        }
        let mut text = Text::default();
        event.record(&mut text);
        let mut records = RECORDS.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() == KEPT {
            records.pop_front();
        }
        records.push_back((level, text.message + &text.fields));
    }
}

/// Starts collecting. Where another subscriber is installed in this process, that one keeps what it gets.
pub(crate) fn install() {
    let _ = tracing_subscriber::registry().with(Collector).try_init();
}

/// Hands what was logged to the sink.
pub(crate) fn deliver(py: Python<'_>) -> PyResult<()> {
    let Some(sink) = SINK.get(py) else { return Ok(()) };
    loop {
        let record = RECORDS.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        match record {
            Some(record) => sink.call1(py, record)?,
            None => return Ok(()),
        };
    }
}

/// Says who is called with the level and the text of what the SDK logs; the first to be said stays.
#[pyfunction]
pub fn set_log_sink(py: Python<'_>, sink: Py<PyAny>) {
    // A second one means that the package was imported again.
    let _ = SINK.set(py, sink);
}

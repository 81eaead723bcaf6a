//! Changing the log filter of a running process.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tracing_subscriber::{EnvFilter, Registry, reload};

use super::{LogError, choose, parse};

/// Access to the filter of the process's logs. Clones share it; all methods are thread-safe.
#[derive(Clone)]
pub struct LogHandle {
    shared: Arc<Shared>,
}

struct Shared {
    /// `RUST_LOG` as it was when the logs were set up: the environment of a process does not change.
    variable: Option<String>,
    /// The filter in force, as it was given: [`EnvFilter`] would write it in another order.
    text: Mutex<String>,
    reload: reload::Handle<EnvFilter, Registry>,
}

impl fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogHandle").field("filter", &self.filter()).finish_non_exhaustive()
    }
}

impl LogHandle {
    pub(super) fn new(
        variable: Option<String>,
        text: String,
        reload: reload::Handle<EnvFilter, Registry>,
    ) -> Self {
        Self { shared: Arc::new(Shared { variable, text: Mutex::new(text), reload }) }
    }

    /// The filter in force.
    #[must_use]
    pub fn filter(&self) -> String {
        self.text().clone()
    }

    /// Whether `RUST_LOG` is set, so that [`LogHandle::configure`] does not follow its argument.
    #[must_use]
    pub fn is_overridden(&self) -> bool {
        self.shared.variable.as_ref().is_some_and(|text| !text.is_empty())
    }

    /// Puts this filter in force, whatever `RUST_LOG` says: the word of somebody who asks for it now.
    ///
    /// # Errors
    ///
    /// As of [`LogHandle::configure`].
    pub fn set(&self, filter: &str) -> Result<(), LogError> {
        self.change((filter, "the request"))
    }

    /// Puts the filter in force that [`super::init`] would choose, `RUST_LOG` before `filter`.
    ///
    /// # Errors
    ///
    /// [`LogError::Filter`] when it does not parse, [`LogError::Gone`] when the subscriber of this handle
    /// is no more; nothing is changed in either case.
    pub fn configure(&self, filter: &str) -> Result<(), LogError> {
        self.change(choose(self.shared.variable.as_deref(), filter))
    }

    fn change(&self, chosen: (&str, &'static str)) -> Result<(), LogError> {
        let (new, filter) = (chosen.0, parse(chosen)?);
        // Held throughout, so that of two changes the later one is both in force and shown.
        let mut shown = self.text();
        if *shown == new {
            return Ok(());
        }
        // A filter that hides this line must not hide that it came: said under the old filter where that
        // shows it, and else under the new one.
        let said = tracing::enabled!(tracing::Level::INFO);
        let say = |old: &str| tracing::info!(?old, ?new, "log filter changed");
        if said {
            say(&shown);
        }
        self.shared.reload.reload(filter).map_err(|_| LogError::Gone)?;
        if !said {
            say(&shown);
        }
        new.clone_into(&mut shown);
        Ok(())
    }

    fn text(&self) -> MutexGuard<'_, String> {
        self.shared.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process has one subscriber and never lets go of it.
static INSTALLED: OnceLock<LogHandle> = OnceLock::new();

pub(super) fn install(handle: LogHandle) -> LogHandle {
    INSTALLED.get_or_init(|| handle).clone()
}

/// The handle of this process's logs; none where [`super::init`] was not called, or failed, because a
/// program that embeds Thalweg logs in its own way.
#[must_use]
pub fn installed() -> Option<LogHandle> {
    INSTALLED.get().cloned()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Sink, text};
    use super::super::{Style, subscriber};
    use super::*;

    /// What is logged at each level, after `change` has been at the handle.
    fn logged(variable: Option<&str>, change: impl FnOnce(&LogHandle)) -> (String, LogHandle) {
        let sink = Sink::default();
        let writer = sink.clone();
        let variable = variable.map(str::to_owned);
        let style = Style::Human { colour: false };
        let (subscriber, handle) = subscriber(variable, "warn", style, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            change(&handle);
            tracing::warn!("a warning");
            tracing::debug!("a detail");
        });
        (text(&sink), handle)
    }

    #[test]
    fn a_filter_that_is_set_is_in_force_and_said() {
        let (text, handle) = logged(None, |handle| handle.set("debug").unwrap());
        assert!(text.contains("a detail"), "{text}");
        assert_eq!(text.matches("log filter changed").count(), 1, "under the new filter: {text}");
        assert_eq!(handle.filter(), "debug");

        let (text, _) = logged(None, |handle| {
            handle.set("info").unwrap();
            handle.set("off").unwrap();
        });
        assert!(!text.contains("a warning"), "{text}");
        assert!(text.contains(r#"old="info" new="off""#), "under the old filter: {text}");
    }

    #[test]
    fn a_bad_filter_changes_nothing() {
        let (text, handle) = logged(None, |handle| {
            let error = handle.set("thalweg=loud").unwrap_err().to_string();
            assert!(error.contains("`thalweg=loud` (from the request)"), "{error}");
            handle.configure("thalweg=loud").unwrap_err();
        });
        assert!(text.contains("a warning") && !text.contains("a detail"), "{text}");
        assert_eq!(handle.filter(), "warn");
    }

    #[test]
    fn rust_log_wins_over_the_configuration_and_not_over_a_request() {
        let (_, handle) = logged(Some("error"), |handle| {
            assert!(handle.is_overridden());
            handle.configure("debug").unwrap();
            assert_eq!(handle.filter(), "error");
            handle.set("debug").unwrap();
            assert_eq!(handle.filter(), "debug");
            handle.configure("info").unwrap();
        });
        assert_eq!(handle.filter(), "error");
    }

    #[test]
    fn a_handle_outlives_its_subscriber() {
        let (_, handle) = logged(None, |_| {});
        assert!(matches!(handle.set("info"), Err(LogError::Gone)));
        assert_eq!(handle.filter(), "warn");
    }
}

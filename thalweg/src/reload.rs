//! Reading the configuration again while the process runs, on SIGHUP.
//!
//! What may change is what [`Config::adopting`] takes over. It reaches the logs through their handle and the
//! services through watch channels; everything else is only named, for the next restart.

use std::io;

use thalweg_autoscaler::Config as Policy;
use thalweg_telemetry::{
    config::{Change, Loader, diff},
    logs,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{config::Config, metrics};

/// Settings that may change while the process runs. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    policy: watch::Sender<Policy>,
    window_budget: watch::Sender<u64>,
}

impl Live {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            policy: watch::Sender::new(config.autoscaler.policy.clone()),
            window_budget: watch::Sender::new(config.gateway.window_budget_bytes),
        }
    }

    /// The autoscaler's policy.
    pub(crate) fn policy(&self) -> watch::Receiver<Policy> {
        self.policy.subscribe()
    }

    /// The gateway's budget of bytes in flight.
    pub(crate) fn window_budget(&self) -> watch::Receiver<u64> {
        self.window_budget.subscribe()
    }

    fn send(&self, config: &Config) {
        send(&self.policy, &config.autoscaler.policy);
        send(&self.window_budget, &config.gateway.window_budget_bytes);
    }
}

/// Wakes nobody for a value that is the same.
fn send<T: Clone + PartialEq>(sender: &watch::Sender<T>, value: &T) {
    sender.send_if_modified(|sent| {
        let changed = sent != value;
        sent.clone_from(value);
        changed
    });
}

/// The configuration of this process, and where to read it again.
#[derive(Debug)]
pub(crate) struct Reload {
    loader: Loader,
    /// The sections that this process reads. Changes in others are none of its business: one file serves all
    /// components.
    sections: &'static [&'static str],
    running: Config,
    live: Live,
}

impl Reload {
    /// `running` is what `loader` gave when the process started.
    pub(crate) fn new(
        loader: Loader,
        sections: &'static [&'static str],
        running: &Config,
        live: Live,
    ) -> Self {
        Self { loader, sections, running: running.clone(), live }
    }

    /// Reads again at every SIGHUP from now on, in a task of its own that never ends. The handler is in place
    /// when this returns.
    pub(crate) fn at_hangups(mut self) -> io::Result<()> {
        let mut hangups = signal(SignalKind::hangup())?;
        tokio::spawn(async move {
            while hangups.recv().await.is_some() {
                // Files may be slow, and an invoker is a single thread.
                let read = tokio::task::spawn_blocking(move || {
                    self.reload();
                    self
                });
                match read.await {
                    Ok(reload) => self = reload,
                    Err(error) => {
                        tracing::error!(%error, "reloading panicked, and is not possible any more; this is a bug");
                        return;
                    }
                }
            }
        });
        Ok(())
    }

    fn reload(&mut self) {
        let result = self.try_reload();
        metrics::reloaded(result.is_ok());
        if let Err(error) = result {
            let error = format!("{error:#}");
            tracing::error!(error, "the configuration was not reloaded; everything stays as it is");
        }
    }

    /// All or nothing: what can fail comes first.
    fn try_reload(&mut self) -> anyhow::Result<()> {
        let read = Config::load(&self.loader)?;
        let adopted = self.running.adopting(&read);
        let (applied, waiting) = (self.changes(&self.running, &adopted)?, self.changes(&adopted, &read)?);
        let logs = logs::installed();
        if let Some(logs) = &logs {
            // Also where it is the same in the file: somebody may have changed it over HTTP since.
            logs.configure(&adopted.log.filter)?;
        }
        self.live.send(&adopted);
        self.running = adopted;
        for Change { key, old, new } in &applied {
            if key == "log.filter" && logs.as_ref().is_none_or(logs::LogHandle::is_overridden) {
                tracing::warn!(
                    key,
                    "a setting has changed without effect: RUST_LOG is set, and wins over it"
                );
            } else {
                tracing::info!(key, old, new, "a setting has changed");
            }
        }
        if !waiting.is_empty() {
            let keys: Vec<_> = waiting.into_iter().map(|change| change.key).collect();
            tracing::warn!(keys = keys.join(", "), "settings have changed that wait for a restart");
        }
        tracing::info!(changed = applied.len(), "the configuration was reloaded");
        Ok(())
    }

    fn changes(&self, old: &Config, new: &Config) -> anyhow::Result<Vec<Change>> {
        let mut changes = diff(old, new)?;
        changes.retain(|change| self.sections.contains(&change.key.split('.').next().unwrap_or_default()));
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    struct Process {
        file: tempfile::NamedTempFile,
        live: Live,
        reload: Reload,
    }

    impl Process {
        fn start(overrides: &[(&str, &str)]) -> Self {
            let file = tempfile::NamedTempFile::new().expect("a file");
            let overrides = overrides.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            let loader = Loader::new("THALWEG")
                .file(Some(file.path().to_owned()))
                .environment([])
                .overrides(overrides.collect());
            let running = Config::load(&loader).expect("it loads");
            let live = Live::new(&running);
            let reload = Reload::new(loader, &["gateway", "autoscaler"], &running, live.clone());
            Self { file, live, reload }
        }

        fn write(&self, text: &str) {
            fs::write(Path::new(self.file.path()), text).expect("it is written");
        }
    }

    #[test]
    fn what_may_change_reaches_the_services_once() {
        let mut process = Process::start(&[]);
        let (mut policy, mut budget) = (process.live.policy(), process.live.window_budget());
        process.write(
            "[gateway]\nwindow_budget_bytes = 7\nworker_lease_ms = 1\n[autoscaler.policy]\nmax_invokers = 9\n",
        );
        process.reload.try_reload().expect("reloaded");
        assert_eq!(*budget.borrow_and_update(), 7);
        assert_eq!(policy.borrow_and_update().max_invokers, 9);
        // What waits for a restart goes on waiting, and the rest has been said.
        let read = Config::load(&process.reload.loader).expect("it loads");
        let waiting = process.reload.changes(&process.reload.running, &read).expect("compared");
        let keys: Vec<_> = waiting.into_iter().map(|change| change.key).collect();
        assert_eq!(keys, ["gateway.worker_lease_ms"]);
        process.reload.try_reload().expect("reloaded");
        assert!(!budget.has_changed().expect("open") && !policy.has_changed().expect("open"));
    }

    #[test]
    fn a_bad_file_changes_nothing() {
        let mut process = Process::start(&[]);
        let before = process.reload.running.clone();
        let budget = process.live.window_budget();
        for bad in ["gibberish", "log.filtre = 'info'", "autoscaler.policy.max_invokers = 0", "gateway = 1"] {
            process.write(&format!("gateway.window_budget_bytes = 7\n{bad}\n"));
            process.reload.try_reload().expect_err(bad);
            assert_eq!(process.reload.running, before, "{bad}");
            assert!(!budget.has_changed().expect("open"), "{bad}");
        }
        fs::remove_file(process.file.path()).expect("removed");
        process.reload.try_reload().expect_err("no file");
    }

    #[test]
    fn precedence_is_that_of_the_start() {
        let mut process = Process::start(&[("gateway.window_budget_bytes", "5")]);
        process.write("gateway.window_budget_bytes = 7\n");
        process.reload.try_reload().expect("reloaded");
        assert_eq!(*process.live.window_budget().borrow(), 5);
    }

    #[test]
    fn sections_of_others_are_not_looked_at() {
        let process = Process::start(&[]);
        let mut read = process.reload.running.clone();
        read.store.max_requests += 1;
        assert_eq!(process.reload.changes(&process.reload.running, &read).expect("compared"), []);
    }
}

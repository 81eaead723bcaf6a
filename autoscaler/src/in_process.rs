//! Invokers as threads of this process.

use std::{
    collections::BTreeMap,
    fmt, io,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{Actuator, ActuatorError};

/// Time between looks at threads that are being waited for.
const POLL: Duration = Duration::from_millis(10);

/// Runs every invoker on a thread that a closure spawns; cancelling its token stops it. A thread cannot be
/// killed: one that does not heed is waited for no longer than the drain timeout.
///
/// Dropping the actuator cancels all tokens.
pub struct InProcessActuator<F> {
    spawn: F,
    drain_timeout: Duration,
    threads: BTreeMap<String, (CancellationToken, JoinHandle<()>)>,
    all: CancellationToken,
    _cancel_all: DropGuard,
}

impl<F> InProcessActuator<F>
where
    F: Fn(String, CancellationToken) -> io::Result<JoinHandle<()>> + Send,
{
    /// Spawns invokers with `spawn`, which gets the id and the token that stops it; its errors are those of
    /// [`Actuator::start`].
    #[must_use]
    pub fn new(spawn: F, drain_timeout: Duration) -> Self {
        let all = CancellationToken::new();
        let _cancel_all = all.clone().drop_guard();
        Self { spawn, drain_timeout, threads: BTreeMap::new(), all, _cancel_all }
    }
}

impl<F> fmt::Debug for InProcessActuator<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InProcessActuator").field("threads", &self.threads.keys()).finish_non_exhaustive()
    }
}

#[async_trait]
impl<F> Actuator for InProcessActuator<F>
where
    F: Fn(String, CancellationToken) -> io::Result<JoinHandle<()>> + Send,
{
    async fn start(&mut self, id: &str) -> Result<(), ActuatorError> {
        let token = self.all.child_token();
        let thread = (self.spawn)(id.to_owned(), token.clone());
        let thread = thread.map_err(|error| ActuatorError::new(id, error.into()))?;
        tracing::info!(invoker = id, "started invoker in this process");
        self.threads.insert(id.to_owned(), (token, thread));
        Ok(())
    }

    async fn stop(&mut self, id: &str) {
        if let Some((token, _)) = self.threads.get(id) {
            token.cancel();
        }
    }

    async fn reap(&mut self) -> Vec<String> {
        let finished = |(_, thread): &(CancellationToken, JoinHandle<()>)| thread.is_finished();
        let ended: Vec<_> =
            self.threads.iter().filter(|(_, entry)| finished(entry)).map(|(id, _)| id.clone()).collect();
        for id in &ended {
            let Some((token, thread)) = self.threads.remove(id) else { continue };
            match (thread.join(), token.is_cancelled()) {
                (Ok(()), true) => tracing::info!(invoker = id, "invoker ended"),
                (Ok(()), false) => tracing::warn!(invoker = id, "invoker ended by itself"),
                (Err(_), _) => tracing::error!(invoker = id, "invoker panicked; this is a bug"),
            }
        }
        ended
    }

    async fn stop_all(&mut self) {
        self.threads.values().for_each(|(token, _)| token.cancel());
        let deadline = Instant::now() + self.drain_timeout;
        loop {
            self.reap().await;
            if self.threads.is_empty() {
                return;
            }
            if Instant::now() >= deadline {
                tracing::warn!(invokers = self.threads.len(), "invokers did not end in time; leaving them");
                return;
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StartError;

    fn parked(_: String, token: CancellationToken) -> io::Result<JoinHandle<()>> {
        Ok(std::thread::spawn(move || {
            while !token.is_cancelled() {
                std::thread::sleep(POLL);
            }
        }))
    }

    #[tokio::test]
    async fn threads_are_stopped_and_reaped_one_by_one() {
        let mut actuator = InProcessActuator::new(parked, Duration::from_secs(10));
        for id in ["a", "b", "c"] {
            actuator.start(id).await.unwrap();
        }
        assert!(actuator.reap().await.is_empty());
        actuator.stop("b").await;
        actuator.stop("nobody").await;
        loop {
            let ended = actuator.reap().await;
            if !ended.is_empty() {
                assert_eq!(ended, ["b"]);
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        actuator.stop_all().await;
        assert!(actuator.threads.is_empty());
    }

    #[tokio::test]
    async fn a_panic_is_an_end_and_a_deaf_thread_is_left() {
        let spawn = |id: String, _| {
            Ok(std::thread::spawn(move || match id.as_str() {
                "deaf" => std::thread::sleep(Duration::from_secs(2)),
                _ => panic!("as the test wants it"),
            }))
        };
        let mut actuator = InProcessActuator::new(spawn, Duration::from_millis(100));
        actuator.start("panics").await.unwrap();
        actuator.start("deaf").await.unwrap();
        while actuator.threads.len() > 1 {
            actuator.reap().await;
            tokio::time::sleep(POLL).await;
        }
        actuator.stop_all().await;
        assert_eq!(actuator.threads.len(), 1);
    }

    #[tokio::test]
    async fn a_thread_that_the_system_refuses_is_an_error() {
        let refuse = |_: String, _: CancellationToken| Err(io::ErrorKind::OutOfMemory.into());
        let mut actuator = InProcessActuator::new(refuse, Duration::from_secs(1));
        let error = actuator.start("x").await.unwrap_err();
        assert!(matches!(error.source, StartError::System(_)), "{error}");
        assert!(actuator.reap().await.is_empty());
    }
}

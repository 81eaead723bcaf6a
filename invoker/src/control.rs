//! The connection for takeovers and handovers, with a thread of its own.

use std::io;

use thalweg_broker::{Connection, NatsConfig};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// A second connection to NATS, which does not wait for folds: while a partition changes hands nobody serves it, and the
/// thread of an invoker is busy for milliseconds at a time. This one does hardly anything, so a system under load runs it
/// at once.
#[derive(Debug)]
pub struct Control {
    pub(crate) connection: Connection,
    thread: Thread,
}

impl Control {
    /// Connects as [`Connection::open`] does; cancel safe.
    ///
    /// # Errors
    /// Its errors; also when there can be no thread.
    pub async fn open(
        name: &str,
        config: &NatsConfig,
        shutdown: &CancellationToken,
    ) -> io::Result<Option<Self>> {
        let thread = Thread::start()?;
        let (name, config, shutdown) = (name.to_owned(), config.clone(), shutdown.clone());
        // What a connection consists of runs where it is opened.
        let opening = thread.spawn(async move { Connection::open(&name, &config, &shutdown).await });
        Ok(opening.await??.map(|connection| Self { connection, thread }))
    }

    /// Runs something on its thread.
    pub(crate) fn spawn<F>(&self, work: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.thread.spawn(work)
    }
}

/// A runtime of one thread, which may be dropped by another one.
#[derive(Debug)]
struct Thread(Option<Runtime>);

impl Thread {
    fn start() -> io::Result<Self> {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("control").enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    fn spawn<F>(&self, work: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let runtime = self.0.as_ref().expect("it is there until it is dropped");
        runtime.spawn(work)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

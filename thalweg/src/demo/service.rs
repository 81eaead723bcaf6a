//! Where the demo trains: through a service of its own, or through one that runs already.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures::{Stream, StreamExt as _};
use thalweg_autoscaler::Status;
use thalweg_broker::{Connection, NatsConfig};
use thalweg_protocol::{ErrorCode, subjects};
use thalweg_sdk::{Client, JobKey};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::up;

/// Longest wait for the NATS server of a service that should be there.
const PATIENCE: Duration = Duration::from_secs(30);
/// Silence after which an invoker is no longer counted; three of its heartbeats.
const SILENCE: Duration = Duration::from_millis(1500);
/// How often invokers are counted.
const COUNT: Duration = Duration::from_millis(250);

/// A service to train through.
pub(super) enum Service {
    /// Started by the demo, and stopped by it.
    Own(Box<up::Service>, watch::Receiver<Status>),
    /// Somebody else's.
    Other(Box<Deployment>),
}

/// A service that runs by itself.
pub(super) struct Deployment {
    url: String,
    client: Client,
    job: JobKey,
    invokers: watch::Receiver<usize>,
    /// Ends the counting.
    _counting: DropGuard,
}

/// What the pool looks like.
pub(super) struct Pool {
    pub(super) invokers: usize,
    /// Messages that wait, where that is known.
    pub(super) depth: Option<u64>,
}

impl Service {
    /// One that was started for the demo.
    pub(super) fn own(service: up::Service) -> Self {
        let status = service.status();
        Self::Own(Box::new(service), status)
    }

    /// URL of its NATS server.
    pub(super) fn url(&self) -> &str {
        match self {
            Self::Own(service, _) => service.url(),
            Self::Other(deployment) => &deployment.url,
        }
    }

    /// The pool at this moment.
    pub(super) fn pool(&self) -> Pool {
        match self {
            Self::Own(_, status) => {
                let status = status.borrow();
                Pool { invokers: status.invokers, depth: Some(status.depth_messages) }
            }
            Self::Other(deployment) => Pool { invokers: *deployment.invokers.borrow(), depth: None },
        }
    }

    /// Whether all of its pool is the demo's, so that it will shrink to nothing.
    pub(super) fn is_own(&self) -> bool {
        matches!(self, Self::Own(..))
    }

    /// Stops it, or takes the demo's job out of it unless that is to be kept or was not finished.
    pub(super) async fn end(self, keep_job: bool) -> anyhow::Result<()> {
        match self {
            Self::Own(service, _) => service.stop().await,
            Self::Other(_) if keep_job => Ok(()),
            Self::Other(deployment) => Ok(deployment.client.delete(&deployment.job).await?),
        }
    }
}

impl Deployment {
    /// The one at `url`, if `job` can be trained there up to `rounds`.
    ///
    /// # Errors
    /// When nobody answers there, or the job has had these rounds.
    pub(super) async fn at(url: &str, job: JobKey, rounds: u64) -> anyhow::Result<Self> {
        let config = NatsConfig { url: url.to_owned(), credentials: None };
        let stop = CancellationToken::new();
        let opening = Connection::open("thalweg-demo", &config, &stop);
        let Ok(connection) = tokio::time::timeout(PATIENCE, opening).await else {
            let obstacle =
                Connection::obstacle(&config).await.unwrap_or_else(|| "it is there now".to_owned());
            bail!("no NATS server answered within {PATIENCE:?} ({obstacle}): see --nats-url");
        };
        let connection = connection?.context("stopped while connecting")?;
        let client = Client::connect_with(&config).await?.patient_for(PATIENCE);
        match client.job(&job).await {
            Ok(_) => {
                let trained = client.progress(&job).await?.min;
                if trained >= rounds {
                    bail!(
                        "job {job} has had {trained} rounds already: take more (--rounds), another name (--job), or \
                         remove it with `thalweg job rm {job}`"
                    );
                }
                tracing::info!(%job, trained, "the job is there; going on with it");
            }
            Err(error) if error.code() == Some(ErrorCode::UnknownJob) => {}
            Err(error) => return Err(error.into()),
        }
        let [shared, pooled] = subjects::ALL_INVOKER_BEATS;
        let shared = connection.client.subscribe(shared).await?;
        let pooled = connection.client.subscribe(pooled).await?;
        let beats = futures::stream::select(shared, pooled).map(|message| message.subject.to_string());
        let (sender, invokers) = watch::channel(0);
        let counting = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = count(beats, &sender) => {}
                () = counting.cancelled() => drop(connection),
            }
        });
        Ok(Self { url: url.to_owned(), client, job, invokers, _counting: stop.drop_guard() })
    }
}

/// Counts who beats; an item of `beats` is the subject of a beat, so the name of an invoker.
async fn count(mut beats: impl Stream<Item = String> + Unpin, number: &watch::Sender<usize>) {
    let mut heard = HashMap::new();
    let mut tick = tokio::time::interval(COUNT);
    loop {
        tokio::select! {
            beat = beats.next() => match beat {
                Some(invoker) => drop(heard.insert(invoker, Instant::now())),
                None => return,
            },
            _ = tick.tick() => {
                heard.retain(|_, at| at.elapsed() < SILENCE);
                number.send_replace(heard.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn invokers_count_while_they_beat() {
        let (beats, received) = tokio::sync::mpsc::unbounded_channel::<String>();
        let (sender, mut number) = watch::channel(0);
        let stream = futures::stream::unfold(received, async |mut received| {
            let beat = received.recv().await?;
            Some((beat, received))
        });
        let counting = tokio::spawn(async move { count(Box::pin(stream), &sender).await });
        for beat in ["a", "b", "a"] {
            beats.send(beat.to_owned()).unwrap();
        }
        number.wait_for(|number| *number == 2).await.unwrap();
        number.wait_for(|number| *number == 0).await.unwrap();
        drop(beats);
        counting.await.unwrap();
    }
}

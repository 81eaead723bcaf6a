//! Readiness for systemd, as `Type=notify` units wait for it.

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use sd_notify::NotifyState;

use crate::health::Health;

/// The variable in which systemd names its socket. It is meant for this process alone: children have to
/// be started without it, or they would report in its name.
pub const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// Tells systemd `READY=1` when `health` is ready for the first time and `STOPPING=1` when `shutdown` is
/// cancelled, in a task of its own. Does nothing where nobody asked for it, that is without
/// `NOTIFY_SOCKET`.
///
/// Later losses of readiness are not told: systemd has no word for them, `/readyz` has. A message that
/// cannot be sent is logged as a warning, since systemd would wait for it in vain and in the end kill
/// the process.
///
/// # Panics
///
/// Outside a tokio runtime.
pub fn notify(health: Health, shutdown: CancellationToken) -> Option<JoinHandle<()>> {
    std::env::var_os(SOCKET_VARIABLE)?;
    Some(tokio::spawn(tell(health, shutdown, send)))
}

async fn tell(health: Health, shutdown: CancellationToken, send: impl Fn(NotifyState<'static>)) {
    tokio::select! {
        // A process that is told to stop is not reported as ready, even if it is that as well.
        biased;
        () = shutdown.cancelled() => {}
        () = health.wait_ready() => {
            send(NotifyState::Ready);
            shutdown.cancelled().await;
        }
    }
    send(NotifyState::Stopping);
}

fn send(state: NotifyState<'static>) {
    match sd_notify::notify(std::slice::from_ref(&state)) {
        Ok(()) => tracing::debug!(%state, "told systemd"),
        Err(error) => {
            tracing::warn!(%state, %error, "cannot tell systemd: the socket {SOCKET_VARIABLE} names does not answer");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    async fn told(play: impl AsyncFnOnce(&Health, &CancellationToken)) -> Vec<String> {
        let (health, shutdown) = (Health::new(), CancellationToken::new());
        health.register("store", "opening");
        let said = Arc::new(Mutex::new(Vec::new()));
        let send = {
            let said = said.clone();
            move |state: NotifyState<'static>| said.lock().unwrap().push(state.to_string())
        };
        let task = tokio::spawn(tell(health.clone(), shutdown.clone(), send));
        play(&health, &shutdown).await;
        shutdown.cancel();
        task.await.unwrap();
        said.lock().unwrap().clone()
    }

    #[tokio::test]
    async fn ready_is_told_once_and_stopping_last() {
        let said = told(async |health, _| {
            for _ in 0..2 {
                health.set_ready("store");
                tokio::task::yield_now().await;
                health.set_waiting("store", "lost its connection");
                health.set_ready("store");
                tokio::task::yield_now().await;
            }
        });
        assert_eq!(said.await, ["READY=1", "STOPPING=1"]);
    }

    #[tokio::test]
    async fn a_process_that_never_was_ready_does_not_say_so() {
        assert_eq!(told(async |_, _| {}).await, ["STOPPING=1"]);
        let said = told(async |health, shutdown| {
            health.set_ready("store");
            shutdown.cancel();
        });
        assert_eq!(said.await, ["STOPPING=1"]);
    }
}

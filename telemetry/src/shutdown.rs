//! Signals: the first SIGTERM or SIGINT drains, the second one exits.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Exit code after the second signal: what shells report for a process that SIGINT ended.
pub const EXIT_CODE_FORCED: i32 = 130;

/// Listens for SIGTERM and SIGINT from now on, in a task of its own.
///
/// The first one of either cancels `token`, which everything that drains listens to; the second one
/// exits the process at once with [`EXIT_CODE_FORCED`] (130), for a drain that takes longer than
/// the operator's patience. A `token` that something else has cancelled makes no difference: exiting
/// without a drain always takes two signals. The task never ends before that; aborting it leaves the
/// signals caught and without effect.
///
/// The handlers are in place when this returns.
///
/// # Errors
///
/// An I/O error if a handler could not be installed.
///
/// # Panics
///
/// Outside a tokio runtime with I/O enabled.
pub fn signals(token: CancellationToken) -> io::Result<JoinHandle<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::spawn(async move {
        let mut escalation = Escalation::default();
        loop {
            let name = tokio::select! {
                Some(()) = terminate.recv() => "SIGTERM",
                Some(()) = interrupt.recv() => "SIGINT",
                else => return,
            };
            match escalation.on_signal() {
                Action::Drain => {
                    tracing::info!(signal = name, "draining; the next signal exits at once");
                    token.cancel();
                }
                Action::Exit(code) => {
                    tracing::warn!(signal = name, code, "exiting without a drain");
                    std::process::exit(code);
                }
            }
        }
    }))
}

/// What a signal means, apart from where it came from.
#[derive(Debug, Default)]
struct Escalation {
    draining: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Action {
    Drain,
    Exit(i32),
}

impl Escalation {
    fn on_signal(&mut self) -> Action {
        if self.draining {
            return Action::Exit(EXIT_CODE_FORCED);
        }
        self.draining = true;
        Action::Drain
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, ChildStdout, Command, Stdio};
    use std::time::Duration;

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    #[test]
    fn the_second_signal_exits() {
        let mut escalation = Escalation::default();
        assert_eq!(escalation.on_signal(), Action::Drain);
        assert_eq!(escalation.on_signal(), Action::Exit(130));
    }

    /// Set in the child process of the test below.
    const IN_CHILD: &str = "THALWEG_TEST_SIGNALS_CHILD";

    /// Not a test by itself: the process that the test below sends signals to.
    #[tokio::test]
    async fn child() {
        if std::env::var_os(IN_CHILD).is_none() {
            return;
        }
        let token = CancellationToken::new();
        signals(token.clone()).unwrap();
        println!("armed");
        token.cancelled().await;
        println!("draining");
        // A drain that hangs. The limit only keeps the child from outliving a parent that was killed.
        tokio::time::sleep(Duration::from_secs(60)).await;
    }

    fn wait_for(word: &str, lines: &mut BufReader<ChildStdout>) {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            let bytes = lines.read_line(&mut line).unwrap();
            assert_ne!(bytes, 0, "the child ended before it said {word:?}");
        }
    }

    fn send(signal: Signal, child: &Child) {
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    #[test]
    fn a_process_drains_and_then_exits_at_once() {
        let orders = [(Signal::TERM, Signal::INT), (Signal::INT, Signal::TERM)];
        for (first, second) in orders {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "shutdown::tests::child", "--nocapture"])
                .env(IN_CHILD, "1")
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap());
            wait_for("armed", &mut lines);
            send(first, &child);
            wait_for("draining", &mut lines);
            send(second, &child);
            assert_eq!(child.wait().unwrap().code(), Some(130));
        }
    }
}

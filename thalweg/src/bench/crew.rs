//! Worker processes, told what to do line by line.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, Command as Process, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::process;

/// Silence of a worker after which the benchmark is given up.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a worker is told, a line of JSON each.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(super) enum Command {
    /// Make this round's gradient.
    Prepare { round: u32 },
    /// Push it and pull its result through Thalweg.
    Thalweg,
    /// Be ready for raw rounds.
    ConnectRaw,
    /// Push it and pull its result through the raw pattern.
    Raw { message_bytes: usize, window_bytes: usize },
    /// Check the result; `raw` tells of which.
    Check { raw: bool },
    /// Push the model once without ever holding it, this many tensors ahead of the results.
    Backlog { ahead: usize },
    /// Train so many rounds by the clock, after others that do not count.
    Train { rounds: u32, warm_up: u32 },
    /// Tell what was pushed so far, and what became of it.
    Account,
    /// Leave the job and end.
    Leave,
}

/// What a worker answers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(tag = "done", rename_all = "snake_case")]
pub(super) enum Reply {
    Ready,
    Round(Span),
    /// Mean time from round to round, and a checksum of the last result.
    Trained {
        period_s: f64,
        digest: u64,
    },
    /// Bytes sent, resends included; contributions that ledgers of rounds lacked or had twice.
    Account {
        sent_bytes: u64,
        lost: u64,
        repeated: u64,
    },
}

/// From the first push to the last result, by the host's monotonic clock.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Span {
    pub(super) first_push_ns: u64,
    pub(super) last_result_ns: u64,
}

/// The host's monotonic clock, the same in all processes.
pub(super) fn now_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap_or(0)
}

/// The processes of one benchmark. Dropped, they end: their input closes.
pub(super) struct Crew {
    members: Vec<(Child, ChildStdin)>,
    replies: mpsc::Receiver<(usize, Option<Reply>)>,
    sender: mpsc::Sender<(usize, Option<Reply>)>,
}

impl Crew {
    pub(super) fn new() -> Self {
        let (sender, replies) = mpsc::channel();
        Self { members: Vec::new(), replies, sender }
    }

    /// Starts one more process of this program. It says that it is ready.
    pub(super) fn hire(&mut self, arguments: &[String]) -> anyhow::Result<()> {
        let mut child = Process::new(std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", arguments.join(" ")))?;
        let output = child.stdout.take().context("a worker has no output")?;
        let input = child.stdin.take().context("a worker has no input")?;
        let (member, sender) = (self.members.len(), self.sender.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(reply) = serde_json::from_str(&line)
                    && sender.send((member, Some(reply))).is_err()
                {
                    return;
                }
            }
            let _ = sender.send((member, None));
        });
        self.members.push((child, input));
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Tells one worker something.
    pub(super) fn tell(&mut self, member: usize, command: Command) -> anyhow::Result<()> {
        let line = serde_json::to_string(&command)? + "\n";
        let (_, input) = &mut self.members[member];
        input.write_all(line.as_bytes()).with_context(|| format!("worker {member} has ended"))
    }

    /// Waits for an answer of everybody.
    pub(super) fn hear(&mut self) -> anyhow::Result<Vec<Reply>> {
        let mut replies = vec![None; self.members.len()];
        let until = Instant::now() + PATIENCE;
        while replies.iter().any(Option::is_none) {
            match self.replies.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((member, Some(reply))) => replies[member] = Some(reply),
                // One that has answered may have ended because it was told to.
                Ok((member, None)) if replies[member].is_some() => {}
                Ok((member, None)) => bail!("worker {member} has ended; it said why above"),
                Err(_) => bail!("a worker has not answered for {PATIENCE:?}"),
            }
        }
        Ok(replies.into_iter().flatten().collect())
    }

    /// Tells everybody the same and waits for all answers.
    pub(super) fn all(&mut self, command: Command) -> anyhow::Result<Vec<Reply>> {
        (0..self.len()).try_for_each(|member| self.tell(member, command))?;
        self.hear()
    }

    /// A round of everybody, seconds: from the first push of any to the last result of the last one.
    pub(super) fn round(&mut self, command: Command) -> anyhow::Result<f64> {
        seconds(&self.all(command)?)
    }

    /// CPU time so far, seconds.
    pub(super) fn cpu_seconds(&self) -> f64 {
        self.members.iter().map(|(child, _)| process::cpu_seconds(child.id()).0).sum()
    }

    /// Sends everybody home.
    pub(super) fn dismiss(mut self) -> anyhow::Result<()> {
        self.all(Command::Leave)?;
        for (member, (mut child, input)) in self.members.drain(..).enumerate() {
            drop(input);
            let status = child.wait()?;
            if !status.success() {
                bail!("worker {member} ended with {status}");
            }
        }
        Ok(())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for (mut child, input) in self.members.drain(..) {
            drop(input);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The length of a round that these answers tell of.
pub(super) fn seconds(replies: &[Reply]) -> anyhow::Result<f64> {
    let spans = || {
        replies.iter().filter_map(|reply| match reply {
            Reply::Round(span) => Some(span),
            Reply::Ready | Reply::Account { .. } | Reply::Trained { .. } => None,
        })
    };
    let begun = spans().map(|span| span.first_push_ns).min().context("no worker told of a round")?;
    let ended = spans().map(|span| span.last_result_ns).max().unwrap_or(begun);
    Ok((ended - begun) as f64 / 1e9)
}

//! `thalweg deadletter`.

use clap::{Args, Subcommand};
use serde_json::json;
use thalweg_protocol::{GradientHeader, Kind, frame};
use thalweg_sdk::{Client, DeadLetter, JobKey};

use super::{Complaint, Target, bytes, exact_time, parse_job, table, time};

const LS_EXAMPLES: &str = "\
Examples:
  thalweg deadletter ls --job digits
  thalweg deadletter ls --json | jq -r '.dead_letters[].number'
";
const REQUEUE_EXAMPLES: &str = "\
Examples:
  thalweg deadletter show 7                    why it was put aside
  thalweg deadletter requeue 7 8               once that is mended
";

#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetterCommand {
    /// List them, oldest first
    #[command(after_help = LS_EXAMPLES)]
    Ls {
        #[command(flatten)]
        target: Target,
        /// Only those of one job: NAME or TENANT/NAME
        #[arg(long, value_parser = parse_job)]
        job: Option<JobKey>,
        /// At most so many
        #[arg(long, value_name = "COUNT", default_value_t = 100)]
        limit: usize,
    },
    /// Show one with everything that can be read of it
    Show {
        #[command(flatten)]
        target: Target,
        /// Its number, from `thalweg deadletter ls`
        number: u64,
    },
    /// Put some back into their queues, once what was wrong is mended; they are judged anew
    #[command(after_help = REQUEUE_EXAMPLES)]
    Requeue(Numbers),
    /// Remove some for good
    Rm(Numbers),
}

#[derive(Debug, Args)]
pub(crate) struct Numbers {
    #[command(flatten)]
    target: Target,
    /// Their numbers, from `thalweg deadletter ls`
    #[arg(required = true, value_name = "NUMBER")]
    numbers: Vec<u64>,
}

impl DeadLetterCommand {
    pub(crate) fn target(&self) -> &Target {
        match self {
            Self::Ls { target, .. }
            | Self::Show { target, .. }
            | Self::Requeue(Numbers { target, .. })
            | Self::Rm(Numbers { target, .. }) => target,
        }
    }
}

impl Target {
    /// Dead letters by number; all of them, or an error.
    async fn letters(&self, numbers: &[u64]) -> anyhow::Result<(Client, Vec<DeadLetter>)> {
        let client = self.connect().await?;
        let mut letters = Vec::new();
        for number in numbers {
            let text = || format!("no dead letter {number}: see `thalweg deadletter ls`");
            letters.push(client.dead_letter(*number).await?.ok_or_else(|| Complaint::NotFound(text()))?);
        }
        Ok((client, letters))
    }
}

fn list(letters: &[DeadLetter], more: bool) -> String {
    if letters.is_empty() {
        return "no dead letters: every message could be processed".to_owned();
    }
    let rows = letters.iter().map(|letter| {
        vec![
            letter.sequence.to_string(),
            time(letter.at_ms),
            letter.job.as_ref().map_or_else(|| "?".to_owned(), ToString::to_string),
            letter.code.clone(),
            bytes(letter.frame.len() as u64),
        ]
    });
    let text = table(&["number", "when", "job", "code", "size"], rows);
    if more { format!("{text}\nand more: raise --limit to see them") } else { text }
}

fn sheet(letter: &DeadLetter) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, text: &str| lines.push(format!("{name:<12} {text}"));
    line("number", &letter.sequence.to_string());
    line("when", &time(letter.at_ms));
    line("job", &letter.job.as_ref().map_or_else(|| "not known".to_owned(), ToString::to_string));
    line("code", &letter.code);
    line("reason", &letter.reason);
    line("subject", letter.subject.as_deref().unwrap_or("not known"));
    line("size", &bytes(letter.frame.len() as u64));
    match frame::open::<GradientHeader>(Kind::Gradient, &letter.frame) {
        Ok((header, payload)) => line(
            "contribution",
            &format!(
                "of rank {} (worker {}) to shard {} in round {}, {} of values",
                header.rank,
                header.worker,
                header.shard,
                header.round,
                bytes(payload.len() as u64)
            ),
        ),
        Err(error) => line("contribution", &format!("not readable: {error}")),
    }
    lines.join("\n")
}

pub(crate) async fn dead_letter(command: DeadLetterCommand) -> anyhow::Result<()> {
    match command {
        DeadLetterCommand::Ls { target, job, limit } => {
            let client = target.connect().await?;
            let mut letters = client.dead_letters(job.as_ref(), limit.saturating_add(1)).await?;
            let more = letters.len() > limit;
            letters.truncate(limit);
            let described: Vec<_> = letters.iter().map(describe).collect();
            target.show(&json!({ "dead_letters": described, "more": more }), |_| list(&letters, more))
        }
        DeadLetterCommand::Show { target, number } => {
            let (_, letters) = target.letters(&[number]).await?;
            let letter = &letters[0];
            target.show(&describe(letter), |_| sheet(letter))
        }
        DeadLetterCommand::Requeue(Numbers { target, numbers }) => {
            let (client, letters) = target.letters(&numbers).await?;
            for letter in &letters {
                client.requeue(letter).await?;
            }
            let what = if numbers.len() == 1 { "is in its queue" } else { "are in their queues" };
            target.show(&json!({ "requeued": numbers }), |_| format!("{} {what} again", named(&numbers)))
        }
        DeadLetterCommand::Rm(Numbers { target, numbers }) => {
            let (client, _) = target.letters(&numbers).await?;
            for number in &numbers {
                client.remove_dead_letter(*number).await?;
            }
            let what = if numbers.len() == 1 { "is gone" } else { "are gone" };
            target.show(&json!({ "removed": numbers }), |_| format!("{} {what}", named(&numbers)))
        }
    }
}

fn named(numbers: &[u64]) -> String {
    let list = numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!("dead letter{} {list}", if numbers.len() == 1 { "" } else { "s" })
}

fn describe(letter: &DeadLetter) -> serde_json::Value {
    let contribution = frame::open::<GradientHeader>(Kind::Gradient, &letter.frame).ok();
    let contribution = contribution.map(|(header, payload)| {
        json!({
            "rank": header.rank,
            "worker": header.worker.to_string(),
            "shard": header.shard,
            "round": header.round,
            "weight": header.weight,
            "void": header.void,
            "payload_bytes": payload.len(),
        })
    });
    json!({
        "number": letter.sequence,
        "when": exact_time(letter.at_ms),
        "job": letter.job.as_ref().map(ToString::to_string),
        "code": letter.code,
        "reason": letter.reason,
        "subject": letter.subject,
        "partition": letter.partition,
        "bytes": letter.frame.len(),
        "contribution": contribution,
    })
}

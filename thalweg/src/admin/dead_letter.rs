//! `thalweg deadletter`.

use clap::{Args, Subcommand};
use serde_json::json;
use thalweg_protocol::{GradientHeader, Kind, frame};
use thalweg_sdk::{Client, DeadLetter, JobKey};

use super::{NotFound, Target, bytes, parse_job, print, table, time};

#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetterCommand {
    /// List them, oldest first
    Ls {
        #[command(flatten)]
        target: Target,
        /// Only those of one job: NAME or TENANT/NAME
        #[arg(long, value_parser = parse_job)]
        job: Option<JobKey>,
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Show one with everything that can be read of it
    Show(One),
    /// Put one back into its queue, once what was wrong is mended; it is judged anew
    Requeue(One),
    /// Remove one for good
    Rm(One),
}

#[derive(Debug, Args)]
pub(crate) struct One {
    #[command(flatten)]
    target: Target,
    /// Its number, from `thalweg deadletter ls`
    number: u64,
}

impl One {
    async fn find(&self) -> anyhow::Result<(Client, DeadLetter)> {
        let client = self.target.connect().await?;
        let letter = client.dead_letter(self.number).await?;
        let text = format!("no dead letter {}: see `thalweg deadletter ls`", self.number);
        Ok((client, letter.ok_or(NotFound(text))?))
    }
}

pub(crate) async fn dead_letter(command: DeadLetterCommand) -> anyhow::Result<()> {
    match command {
        DeadLetterCommand::Ls { target, job, limit } => {
            let client = target.connect().await?;
            let letters = client.dead_letters(job.as_ref(), limit).await?;
            if target.json {
                let letters: Vec<_> = letters.iter().map(describe).collect();
                return print(&serde_json::to_string_pretty(&json!({ "dead_letters": letters }))?);
            }
            if letters.is_empty() {
                return print("no dead letters");
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
            print(&table(&["number", "when", "job", "code", "size"], rows))
        }
        DeadLetterCommand::Show(one) => {
            let (_, letter) = one.find().await?;
            one.target.show(&describe(&letter), |value| {
                let fields = value.as_object().into_iter().flatten();
                let line = |(name, value): (&String, &serde_json::Value)| {
                    let text = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
                    format!("{name:<12} {text}")
                };
                fields.map(line).collect::<Vec<_>>().join("\n")
            })
        }
        DeadLetterCommand::Requeue(one) => {
            let (client, letter) = one.find().await?;
            client.requeue(&letter).await?;
            one.target.show(&json!({ "requeued": letter.sequence }), |_| {
                format!("dead letter {} is in its queue again", letter.sequence)
            })
        }
        DeadLetterCommand::Rm(one) => {
            let (client, letter) = one.find().await?;
            client.remove_dead_letter(letter.sequence).await?;
            one.target.show(&json!({ "removed": letter.sequence }), |_| {
                format!("dead letter {} is gone", letter.sequence)
            })
        }
    }
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
        "when": time(letter.at_ms),
        "job": letter.job.as_ref().map(ToString::to_string),
        "code": letter.code,
        "reason": letter.reason,
        "subject": letter.subject,
        "partition": letter.partition,
        "bytes": letter.frame.len(),
        "contribution": contribution,
    })
}

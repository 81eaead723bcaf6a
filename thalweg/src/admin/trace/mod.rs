//! `thalweg trace`.

mod otlp;
mod story;

use std::{io::IsTerminal as _, time::Duration};

use clap::Args;
use futures::StreamExt as _;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use thalweg_broker::Connection;
use thalweg_protocol::{
    Incarnation, JobKey, Kind, Round, Stage, TraceId, TraceQuery, TraceReply, frame, subjects,
};
use thalweg_sdk::Client;

use super::{Complaint, Target, count, exact_time, parse_job, print, table};
use story::{Story, Told};

/// Nobody has said anything for so long: that was all.
const QUIET: Duration = Duration::from_millis(400);
/// How often new rounds are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// Rounds told of at one look; of more than that only the newest are.
const AT_ONCE: u64 = 32;
/// Workers shown to people, the latest first.
const SHOWN_RANKS: usize = 16;

const EXAMPLES: &str = "\
Every component keeps what it did for the newest rounds (16384 spans, about a mebibyte), so this works without having been
switched on, until the round has been forgotten. With --otlp the spans also go to a collector of OpenTelemetry: one trace
for each round, with the ids that the header `traceparent` of contributions and results names.

Examples:
  thalweg trace digits                         the newest round that is complete
  thalweg trace digits 1200
  thalweg trace digits --follow                a line for each round from now on
  thalweg trace digits --follow --otlp http://127.0.0.1:4318
";

/// Where the time of a round went: who was waited for, and what each stage took
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TraceArgs {
    #[command(flatten)]
    target: Target,
    /// The job: NAME or TENANT/NAME
    #[arg(value_parser = parse_job)]
    job: JobKey,
    /// The round; without it the newest one that is complete
    #[arg(conflicts_with = "follow")]
    round: Option<Round>,
    /// Tell of every round from now on, until interrupted; of a very fast job only of the newest 32 a second
    #[arg(long, short)]
    follow: bool,
    /// Send the spans to this collector, as OTLP over HTTP (JSON)
    #[arg(long, value_name = "URL", value_parser = otlp::parse_url)]
    otlp: Option<String>,
}

impl TraceArgs {
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }
}

pub(crate) async fn trace(args: TraceArgs) -> anyhow::Result<()> {
    let client = args.target.connect().await?;
    let connection = args.target.connection("thalweg-trace").await?;
    let job = client.job(&args.job).await?.0.incarnation;
    let teller = Teller { args: &args, connection, job };
    if args.follow {
        return teller.follow(&client).await;
    }
    let newest = client.progress(&args.job).await?.min;
    let round = match args.round {
        Some(round) => round,
        None if newest > 0 => newest,
        None => {
            let text = format!("no round of {} is complete yet", args.job);
            return Err(Complaint::NotFound(text).into());
        }
    };
    let spans = teller.ask(round).await?;
    if spans.is_empty() {
        let text = format!(
            "nobody remembers round {round} of {}: components keep what they did for the newest rounds only, and forget it \
             when they end; the newest complete round is {newest}",
            args.job
        );
        return Err(Complaint::NotFound(text).into());
    }
    teller.tell(round, spans).await
}

/// Asks, and shows what is answered.
struct Teller<'a> {
    args: &'a TraceArgs,
    connection: Connection,
    job: Incarnation,
}

impl Teller<'_> {
    /// What all components remember of a round.
    async fn ask(&self, round: Round) -> anyhow::Result<Vec<Told>> {
        let client = &self.connection.client;
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await?;
        let question = frame::seal(Kind::TraceQuery, &TraceQuery { job: self.job, round }, &[]);
        client.publish_with_reply(subjects::trace(&self.args.job), inbox, question).await?;
        let mut spans = Vec::new();
        // Those that are not there do not answer, so only silence tells the end. Somebody who goes on for ever is not
        // listened to for longer than for any other answer.
        let end = tokio::time::Instant::now() + self.args.target.timeout;
        while let Ok(Some(message)) = tokio::time::timeout(QUIET, answers.next()).await {
            // Nobody listens: a status without a payload, which is no frame either.
            if let Ok((reply, _)) = frame::open::<TraceReply>(Kind::TraceReply, &message.payload) {
                let TraceReply { component, name, spans: told } = reply;
                let told = told.into_iter();
                spans.extend(told.map(|span| Told {
                    component: component.clone(),
                    name: name.clone(),
                    span,
                }));
            }
            if tokio::time::Instant::now() >= end {
                break;
            }
        }
        Ok(spans)
    }

    async fn export(&self, round: Round, spans: &[Told]) -> anyhow::Result<()> {
        let Some(url) = &self.args.otlp else { return Ok(()) };
        otlp::export(url, &self.args.job, TraceId::new(self.job, round), round, spans).await
    }

    async fn tell(&self, round: Round, spans: Vec<Told>) -> anyhow::Result<()> {
        self.export(round, &spans).await?;
        let story = Story::of(spans);
        let trace = TraceId::new(self.job, round);
        let value = self.value(round, &story, true);
        self.args.target.show(&value, |_| text(&self.args.job, round, trace, &story))
    }

    /// A line for each round that becomes complete from now on.
    async fn follow(&self, client: &Client) -> anyhow::Result<()> {
        let bar = match std::io::stderr().is_terminal() && !self.args.target.json {
            true => {
                ProgressBar::new_spinner().with_message(format!("waiting for rounds of {}", self.args.job))
            }
            false => ProgressBar::hidden(),
        };
        let mut told = client.progress(&self.args.job).await?.min;
        let mut looks = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => return Ok(()),
                _ = looks.tick() => bar.tick(),
            }
            let newest = client.progress(&self.args.job).await?.min;
            let rounds = newest.saturating_sub(AT_ONCE).max(told) + 1..=newest;
            let answers = futures::future::try_join_all(rounds.clone().map(|round| self.ask(round))).await?;
            for (round, spans) in rounds.zip(answers) {
                self.export(round, &spans).await?;
                let story = Story::of(spans);
                let line = match self.args.target.json {
                    true => serde_json::to_string(&self.value(round, &story, false))?,
                    false => format!("round {round}: {}", story.line()),
                };
                bar.suspend(|| print(&line))?;
            }
            // A job that was rolled back begins again at an older one.
            told = newest;
        }
    }

    fn value(&self, round: Round, story: &Story, with_spans: bool) -> Value {
        let seconds = |us: u64| us as f64 / 1e6;
        let path: Vec<_> = story
            .path
            .iter()
            .map(|step| json!({"step": step.name, "rank": step.rank, "seconds": seconds(step.us)}))
            .collect();
        let stages: Vec<_> = story
            .stages
            .iter()
            .map(|stage| {
                json!({
                    "stage": stage.stage.name(), "spans": stage.count, "median_s": seconds(stage.median_us),
                    "longest_s": seconds(stage.longest.duration_us), "longest_shard": stage.longest.shard,
                    "longest_rank": stage.longest.rank, "total_s": seconds(stage.total_us),
                })
            })
            .collect();
        let ranks: Vec<_> = story
            .ranks
            .iter()
            .map(|rank| json!({"rank": rank.rank, "last_push_s": seconds(rank.last_push_us)}))
            .collect();
        let trace = TraceId::new(self.job, round).to_string();
        let mut value = json!({
            "job": self.args.job.to_string(), "round": round, "trace_id": trace,
            "begun": exact_time(story.begun_us / 1000), "seconds": seconds(story.total_us),
            "shard": story.shard, "path": path, "stages": stages, "ranks": ranks, "components": story.components,
        });
        if with_spans {
            value["spans"] = story.spans.iter().map(Told::json).collect();
        }
        value
    }
}

fn text(job: &JobKey, round: Round, trace: TraceId, story: &Story) -> String {
    let components = story.components.iter().map(|(component, number)| count(*number, component));
    let mut lines = vec![format!(
        "round {round} of {job}: {} since {}; told by {}; trace {trace}",
        story::time(story.total_us),
        exact_time(story.begun_us / 1000),
        components.collect::<Vec<_>>().join(", "),
    )];
    if let Some(shard) = story.shard {
        lines.push(format!("\nThe way of shard {shard}, which ended last:"));
        lines.push(story.bars());
    }
    lines.push("\nAll shards:".to_owned());
    let rows = story.stages.iter().map(|stage| {
        let whose = match (stage.stage, stage.longest.rank) {
            (Stage::Round, Some(rank)) => format!("rank {rank}"),
            (Stage::Gather, Some(rank)) => format!("shard {}, rank {rank} came last", stage.longest.shard),
            (_, Some(rank)) => format!("shard {}, rank {rank}", stage.longest.shard),
            (_, None) => format!("shard {}", stage.longest.shard),
        };
        vec![
            stage.stage.name().to_owned(),
            stage.count.to_string(),
            story::time(stage.median_us),
            story::time(stage.longest.duration_us),
            story::time(stage.total_us),
            whose,
        ]
    });
    lines.push(table(&["stage", "spans", "median", "longest", "sum", "longest of"], rows));
    if story.ranks.len() > 1 {
        lines.push("\nWhen workers had sent their last contribution, the latest first:".to_owned());
        let shown = story.ranks.iter().take(SHOWN_RANKS);
        let rows = shown.map(|rank| vec![format!("rank {}", rank.rank), story::time(rank.last_push_us)]);
        lines.push(table(&["worker", "after"], rows));
        let more = story.ranks.len().saturating_sub(SHOWN_RANKS);
        if more > 0 {
            lines.push(format!("and {} before", count(more as u64, "worker")));
        }
    }
    lines.join("\n")
}

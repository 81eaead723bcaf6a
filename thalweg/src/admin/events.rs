//! `thalweg events`.

use clap::Args;
use futures::StreamExt as _;
use thalweg_sdk::{Event, EventKind, EventsOptions, JobKey};

use super::{Target, count, parse_job, print, time};

const EXAMPLES: &str = "\
Examples:
  thalweg events --job digits                  what happened to one job in the last week
  thalweg events -n 20                         the last twenty events of all
  thalweg events --follow -n 0 --json | jq .event
";

/// What happened to jobs in the last week, and with --follow what happens from now on
///
/// Oldest first: created, started, joined, left, paused, settings changed, failed, deleted. With --json one object a
/// line.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    target: Target,
    /// Only those of one job: NAME or TENANT/NAME
    #[arg(long, value_parser = parse_job)]
    job: Option<JobKey>,
    /// Go on with what happens from now on, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Only so many of the past, the newest
    #[arg(long, short = 'n', value_name = "COUNT")]
    last: Option<usize>,
}

impl EventsArgs {
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }
}

pub(crate) async fn events(args: EventsArgs) -> anyhow::Result<()> {
    let client = args.target.connect().await?;
    let options = EventsOptions { job: args.job, follow: args.follow, last: args.last };
    let mut events = client.events(options).await?;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        let Some(event) = event else { return Ok(()) };
        let event = event?;
        print(&if args.target.json { serde_json::to_string(&event)? } else { line(&event) })?;
    }
}

fn line(event: &Event) -> String {
    let what = match &event.kind {
        EventKind::Created { function, workers, elements, version: 0 } => {
            format!("created: {function}, {}, {}", count(*workers, "worker"), count(*elements, "element"))
        }
        EventKind::Created { function, workers, version, .. } => {
            format!("created: {function}, {}, goes on after round {version}", count(*workers, "worker"))
        }
        EventKind::Ready => "its parameters are there".to_owned(),
        EventKind::Started => "all founding workers have joined".to_owned(),
        EventKind::Joined { rank, worker, from_round } => {
            format!("rank {rank} joins from round {from_round} on ({worker})")
        }
        EventKind::Left { rank, worker } => format!("rank {rank} leaves ({worker})"),
        EventKind::Paused { reason } => format!("paused: {reason}"),
        EventKind::Resumed => "resumed".to_owned(),
        EventKind::Settings { revision, from_round } => {
            format!("settings revision {revision} from round {from_round} on")
        }
        EventKind::Failed { message, .. } => format!("over: {message}"),
        EventKind::Deleted => "deleted".to_owned(),
    };
    format!("{}  {}/{}  {what}", time(event.at_ms), event.tenant, event.job)
}

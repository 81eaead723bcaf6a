//! `thalweg job`.

use std::{collections::BTreeMap, path::PathBuf};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use thalweg_protocol::JobRecord;
use thalweg_sdk::{
    Job, JobCommand as Command, JobKey, JobSummary, Name, RestoreOptions, Roster, Setting, SettingsChange,
    SnapshotOptions,
};

use anyhow::Context as _;

use super::{
    Complaint, Target, bytes, count,
    model::{JobArgs, parse_group_setting, parse_setting, read_spec},
    parse_job, parse_wait, print, table,
};

const CREATE_EXAMPLES: &str = "\
Examples:
  thalweg job create digits --tensor weight:64x10 --tensor bias:10 --workers 4
  thalweg job create digits --tensor weight:64x10 --function sgd --set lr=0.1 --set momentum=0.9
  thalweg job create finetune --from model.safetensors --function adamw --set lr=1e-4
  thalweg job show digits --json > digits.json && thalweg job create again --spec digits.json
";
const SET_EXAMPLES: &str = "\
Examples:
  thalweg job set digits lr=0.01                       as soon as possible; the answer names the round
  thalweg job set digits lr=0.01 --from-round 5000
  thalweg job set digits --group 1:weight_decay=0
";
const SNAPSHOT_EXAMPLES: &str = "\
The file is safetensors; it appears under its name when it is complete and on disk, in place of one that was there.

Examples:
  thalweg job snapshot digits digits.safetensors
  thalweg job snapshot digits weights.safetensors --parameters-only --rate 0
";
const RESTORE_EXAMPLES: &str = "\
Examples:
  thalweg job restore digits.safetensors --replace     go back: workers have to join again
  thalweg job restore digits.safetensors --as digits-2 beside the job it was taken of
";

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    #[command(after_help = CREATE_EXAMPLES)]
    /// Create a job, or say that it exists alike; training loops create theirs by themselves
    Create {
        #[command(flatten)]
        one: One,
        #[command(flatten)]
        job: Box<JobArgs>,
        /// A whole specification in JSON or TOML instead of flags, as `show --json` prints it under "spec"
        #[arg(long, value_name = "FILE", conflicts_with = "JobArgs")]
        spec: Option<PathBuf>,
    },
    /// List jobs
    Ls {
        #[command(flatten)]
        target: Target,
        /// Only this tenant's
        #[arg(long)]
        tenant: Option<Name>,
    },
    /// Show one job: who is in it, how far it is, with which settings
    Show(One),
    /// Close no more rounds; workers wait
    Pause(Reason),
    /// Go on
    Resume(One),
    /// End a job: every worker gets an error with the reason; its parameters stay until `rm`
    Abort(Reason),
    /// Remove a job with everything of it
    Rm {
        #[command(flatten)]
        one: One,
        /// Even if workers are in it
        #[arg(long)]
        force: bool,
    },
    #[command(after_help = SET_EXAMPLES)]
    /// Change settings, such as the learning rate, from some round on
    Set {
        #[command(flatten)]
        one: One,
        /// Settings of the function, such as lr=0.01
        #[arg(value_name = "NAME=VALUE", value_parser = parse_setting, required_unless_present = "groups")]
        settings: Vec<(String, Setting)>,
        /// A setting of a parameter group, such as 1:lr=0.01
        #[arg(long = "group", value_name = "GROUP:NAME=VALUE", value_parser = parse_group_setting)]
        groups: Vec<(u32, String, Setting)>,
        /// First round with them; by default the next one that cannot have begun
        #[arg(long, value_name = "ROUND")]
        from_round: Option<u64>,
    },
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    /// Write a job's state at one round to a safetensors file, while training goes on
    Snapshot {
        #[command(flatten)]
        one: One,
        /// The file
        file: PathBuf,
        /// Leave the optimizer's slots out
        #[arg(long)]
        parameters_only: bool,
        /// MiB a second to read at most, so that training is not held up; 0 for as fast as it goes
        #[arg(long, value_name = "MIB", default_value_t = 128)]
        rate: u64,
        /// Longest wait for the round to end on all shards, such as 5m
        #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = parse_wait)]
        patience: std::time::Duration,
    },
    #[command(after_help = RESTORE_EXAMPLES)]
    /// Create a job from a snapshot; it goes on after the snapshot's round
    Restore {
        #[command(flatten)]
        target: Target,
        /// The file
        file: PathBuf,
        /// Another name than that of the job it was taken of: NAME or TENANT/NAME
        #[arg(long = "as", value_name = "JOB", value_parser = parse_job)]
        key: Option<JobKey>,
        /// Take the place of the job that has the name: its state is lost, its workers have to join again
        #[arg(long)]
        replace: bool,
    },
}

impl JobCommand {
    pub(crate) fn target(&self) -> &Target {
        match self {
            Self::Ls { target, .. } | Self::Restore { target, .. } => target,
            Self::Show(one) | Self::Resume(one) => &one.target,
            Self::Pause(reason) | Self::Abort(reason) => &reason.one.target,
            Self::Create { one, .. }
            | Self::Rm { one, .. }
            | Self::Set { one, .. }
            | Self::Snapshot { one, .. } => &one.target,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct One {
    #[command(flatten)]
    target: Target,
    /// The job: NAME or TENANT/NAME
    #[arg(value_name = "JOB", value_parser = parse_job)]
    key: JobKey,
}

#[derive(Debug, Args)]
pub(crate) struct Reason {
    #[command(flatten)]
    one: One,
    /// Why; workers are told
    #[arg(long, default_value = "by hand")]
    reason: String,
}

/// Does what was asked.
pub(crate) async fn job(command: JobCommand) -> anyhow::Result<()> {
    match command {
        JobCommand::Create { one, job, spec } => create(&one, &job, spec).await,
        JobCommand::Ls { target, tenant } => {
            let jobs = target.connect().await?.jobs(tenant.as_ref()).await?;
            target.show(&json!({ "jobs": jobs }), |_| list(&jobs))
        }
        JobCommand::Show(one) => show(&one).await,
        JobCommand::Pause(reason) => {
            control(&reason.one, Command::Pause(reason.reason.clone()), "is paused").await
        }
        JobCommand::Resume(one) => control(&one, Command::Resume, "goes on").await,
        JobCommand::Abort(reason) => {
            control(&reason.one, Command::Abort(reason.reason.clone()), "is aborted").await
        }
        JobCommand::Rm { one, force } => remove(&one, force).await,
        JobCommand::Set { one, settings, groups, from_round } => {
            set(&one, settings, groups, from_round).await
        }
        JobCommand::Snapshot { one, file, parameters_only, rate, patience } => {
            let options = SnapshotOptions {
                parameters_only,
                timeout: patience,
                bytes_per_s: rate.saturating_mul(1 << 20),
            };
            let client = one.target.connect().await?;
            let bar = byte_bar(&one.target);
            let taken = client.snapshot(&one.key, &file, &options, |done, all| {
                bar.set_length(all);
                bar.set_position(done);
            });
            let taken = interruptible(&bar, taken, "no file was written").await?;
            let value = json!({
                "job": taken.key.to_string(),
                "incarnation": taken.incarnation.to_string(),
                "version": taken.version,
                "bytes": taken.bytes,
                "file": file,
            });
            one.target.show(&value, |_| {
                let size = bytes(taken.bytes);
                format!("{} after round {}: {size} in {}", taken.key, taken.version, file.display())
            })
        }
        JobCommand::Restore { target, file, key, replace } => {
            restore(&target, &file, RestoreOptions { key, replace, ..RestoreOptions::default() }).await
        }
    }
}

async fn create(one: &One, args: &JobArgs, spec: Option<PathBuf>) -> anyhow::Result<()> {
    let job = match spec {
        Some(path) => {
            let spec = read_spec(&path)?;
            Job::from_spec(thalweg_protocol::JobSpec { key: one.key.clone(), ..spec })
        }
        None => args.job(&one.key)?,
    };
    if let Some(file) = &args.from {
        let options = RestoreOptions { job: Some(job), ..RestoreOptions::default() };
        return restore(&one.target, file, options).await;
    }
    let client = one.target.connect().await?;
    let record = client.open(&job).await?;
    one.target.show(&describe(&record, None), |_| {
        format!("job {} is there: {}", record.spec.key, record.state.name())
    })
}

async fn restore(target: &Target, file: &std::path::Path, options: RestoreOptions) -> anyhow::Result<()> {
    let client = target.connect().await?;
    let bar = bar(target);
    let restored = client.restore(file, options, |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    let hint = "the job waits for its parameters: restore it again with --replace, or remove it";
    let record = interruptible(&bar, restored, hint).await?;
    target.show(&describe(&record, None), |_| match record.first_version() {
        0 => format!("job {} begins with the parameters of {}", record.spec.key, file.display()),
        version => format!("job {} goes on after round {version}", record.spec.key),
    })
}

async fn control(one: &One, command: Command, what: &str) -> anyhow::Result<()> {
    one.target.connect().await?.control(&one.key, command).await?;
    one.target
        .show(&json!({ "job": one.key.to_string(), "done": true }), |_| format!("job {} {what}", one.key))
}

async fn remove(one: &One, force: bool) -> anyhow::Result<()> {
    let client = one.target.connect().await?;
    if !force {
        // One that is half made or half deleted has no members, and can be removed.
        let jobs = client.jobs(Some(&one.key.tenant)).await?;
        let Some(job) = jobs.iter().find(|job| job.key == one.key) else {
            return Err(unknown(&one.key));
        };
        if job.members > 0 {
            let text = format!(
                "{} in job {}: stop them first, or remove it with --force; they get an error then",
                count(job.members, "worker"),
                one.key
            );
            return Err(Complaint::Refused(text).into());
        }
    }
    client.delete(&one.key).await?;
    one.target
        .show(&json!({ "job": one.key.to_string(), "removed": true }), |_| format!("job {} is gone", one.key))
}

async fn set(
    one: &One,
    settings: Vec<(String, Setting)>,
    groups: Vec<(u32, String, Setting)>,
    from_round: Option<u64>,
) -> anyhow::Result<()> {
    let mut by_group = BTreeMap::<u32, thalweg_protocol::Settings>::new();
    for (group, name, setting) in groups {
        by_group.entry(group).or_default().insert(name, setting);
    }
    let settings = settings.into_iter().collect();
    let change = SettingsChange { from_round, settings, groups: by_group };
    let revision = one.target.connect().await?.set_settings(&one.key, change).await?;
    one.target.show(&revision, |revision| {
        format!(
            "job {}: settings revision {} from round {} on",
            one.key, revision.revision, revision.from_round
        )
    })
}

fn list(jobs: &[JobSummary]) -> String {
    if jobs.is_empty() {
        return "no jobs: a training loop creates its job when it joins, or use `thalweg job create`"
            .to_owned();
    }
    let rows = jobs.iter().map(|job| {
        vec![
            job.key.to_string(),
            job.state.clone(),
            job.function.clone(),
            format!("{}/{}", job.members, job.workers),
            bytes(job.elements * 4),
            job.durability.to_string(),
        ]
    });
    table(&["job", "state", "function", "workers", "model", "durability"], rows)
}

async fn show(one: &One) -> anyhow::Result<()> {
    let client = one.target.connect().await?;
    // One that is half made or half deleted has no roster to wait for.
    let jobs = client.jobs(Some(&one.key.tenant)).await?;
    let Some(summary) = jobs.iter().find(|job| job.key == one.key) else { return Err(unknown(&one.key)) };
    if matches!(summary.state.as_str(), "creating" | "deleting") {
        let value = json!({
            "job": one.key.to_string(),
            "incarnation": summary.incarnation.to_string(),
            "state": summary.state,
        });
        return one.target.show(&value, |_| {
            format!(
                "job          {} (incarnation {})\nstate        {}; if that does not pass, its maker was killed: \
                 create or remove it again",
                one.key, summary.incarnation, summary.state
            )
        });
    }
    let (record, roster) = client.job(&one.key).await?;
    let mut value = describe(&record, Some(&roster));
    // A job whose store is away, or that has lost rounds, can be shown all the same, and soon.
    let patience = one.target.timeout.min(std::time::Duration::from_secs(3));
    match client.patient_for(patience).progress(&one.key).await {
        Ok(progress) => value["progress"] = json!(progress),
        Err(error) => value["progress_error"] = json!(error.to_string()),
    }
    if one.target.json {
        return print(&serde_json::to_string_pretty(&value)?);
    }
    print(&sheet(&record, &roster, &value))
}

fn describe(record: &JobRecord, roster: Option<&Roster>) -> Value {
    let members = roster.map(|roster| {
        let member = |member: &thalweg_protocol::Member| {
            json!({
                "rank": member.rank,
                "worker": member.worker,
                "incarnation": member.incarnation.to_string(),
                "from_round": member.from_round,
                "until_round": member.until_round,
            })
        };
        roster.members.iter().map(member).collect::<Vec<_>>()
    });
    json!({
        "job": record.spec.key.to_string(),
        "incarnation": record.incarnation.to_string(),
        "state": record.state.name(),
        "error": record.state.end(&record.spec.key),
        "paused": record.life.paused,
        "first_version": record.first_version(),
        "spec": record.spec,
        "settings": record.settings,
        "shards": record.layout.shards(),
        "elements": record.layout.elements,
        "started": roster.map(|roster| roster.started),
        "roster_epoch": roster.map(|roster| roster.epoch),
        "members": members,
    })
}

fn sheet(record: &JobRecord, roster: &Roster, value: &Value) -> String {
    let spec = &record.spec;
    let mut lines = vec![format!("job          {} (incarnation {})", spec.key, record.incarnation)];
    let mut line = |name: &str, text: String| lines.push(format!("{name:<12} {text}"));
    line("state", record.state.name().to_owned());
    if let Some(reason) = &record.life.paused {
        line("paused", if reason.is_empty() { "no reason given".to_owned() } else { reason.clone() });
    }
    if let Some(error) = record.state.end(&spec.key) {
        line("error", error.to_string());
    }
    match (value.get("progress"), value.get("progress_error")) {
        (Some(progress), _) if progress["min"] == progress["max"] => {
            line("round", progress["min"].to_string());
        }
        (Some(progress), _) => {
            line("round", format!("{}, some shards {}", progress["min"], progress["max"]));
        }
        (_, error) => {
            let text = error.and_then(Value::as_str).unwrap_or_default();
            line("round", format!("not known: {text}"));
        }
    }
    let shards = record.layout.shards();
    let size = bytes(record.layout.elements * 4);
    let tensors = count(spec.tensors.len() as u64, "tensor");
    line("model", format!("{tensors}, {size}, {}", count(shards, "shard")));
    for revision in &record.settings {
        let groups = revision.function.groups.iter().enumerate();
        let groups = groups.filter(|(_, group)| !group.settings.is_empty());
        let groups = groups.map(|(index, group)| format!("{index}:[{}]", listed(&group.settings)));
        let settings = std::iter::once(listed(&revision.function.settings)).chain(groups);
        let settings = settings.collect::<Vec<_>>().join(" ");
        let from = match revision.from_round {
            0 => String::new(),
            round => format!(" (revision {}, from round {round} on)", revision.revision),
        };
        line("function", format!("{} {settings}", revision.function.name).trim_end().to_owned() + &from);
    }
    line("durability", spec.durability.to_string());
    if let Some(quorum) = spec.quorum {
        line("quorum", format!("{quorum} of {} after {} ms", spec.workers, spec.deadline_ms));
    }
    let present = roster.members.iter().filter(|member| member.until_round.is_none());
    let rows: Vec<_> = present
        .map(|member| vec![member.rank.to_string(), member.worker.clone(), member.from_round.to_string()])
        .collect();
    let state = if roster.started { "" } else { ", waiting for the others" };
    line("workers", format!("{} of {}{state}", rows.len(), spec.workers));
    if !rows.is_empty() {
        lines.push(table(&["rank", "worker", "from round"], rows));
    }
    lines.join("\n")
}

fn listed(settings: &thalweg_protocol::Settings) -> String {
    let one = |(name, value): (&String, &Setting)| match value {
        Setting::Flag(flag) => format!("{name}={flag}"),
        Setting::Number(number) => format!("{name}={number}"),
    };
    settings.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn unknown(key: &JobKey) -> anyhow::Error {
    Complaint::NotFound(format!("no job {key}: check tenant and name (thalweg job ls)")).into()
}

/// Waits for the end, or for Ctrl-C; what was begun then cleans up after itself.
async fn interruptible<T>(
    bar: &ProgressBar,
    work: impl Future<Output = Result<T, thalweg_sdk::Error>>,
    hint: &str,
) -> anyhow::Result<T> {
    let done = tokio::select! {
        done = work => Some(done),
        _ = tokio::signal::ctrl_c() => None,
    };
    bar.finish_and_clear();
    Ok(done.with_context(|| format!("interrupted: {hint}"))??)
}

fn bar(target: &Target) -> ProgressBar {
    // On a terminal only, by itself.
    if target.json { ProgressBar::hidden() } else { ProgressBar::new(0) }
}

fn byte_bar(target: &Target) -> ProgressBar {
    let bar = bar(target);
    if let Ok(style) = ProgressStyle::with_template(
        "{bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
    ) {
        bar.set_style(style);
    }
    bar
}

//! `thalweg simulate`: what a trace would have cost under one policy or another.

mod plot;
mod profiles;
mod read;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    panic::resume_unwind,
    path::PathBuf,
    thread,
};

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use indicatif::{MultiProgress, ProgressBar};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use serde_json::json;
use thalweg_autoscaler::{
    Config, Elastic, Hpa, Keda, Knative, Policy,
    trace::{Constants, Score, State, Thinking, Timeline, events, fluid},
};

use crate::admin::table as table_of;
use profiles::Profiles;
pub(crate) use read::Recorded;
use read::Trace;

/// Arguments of `thalweg simulate`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// CSV: a cluster trace (timestamp, duration, num_gpus), iterations of one job (worker, time, batch_time_norm), or
    /// jobs as `thalweg record` writes them (start_s, duration_s, workers, round_bytes, think_s)
    #[arg(long)]
    trace: PathBuf,
    /// Policies to compare; those other than thalweg are fitted: the fewest invokers with which their rounds last no
    /// longer, at the 99th percentile, than with thalweg (or than the limit, if thalweg is not among them)
    #[arg(long, value_delimiter = ',', default_value = "thalweg")]
    policy: Vec<Kind>,
    /// Job profiles and measured constants (TOML); their values are printed with the result
    #[arg(long)]
    profiles: Option<PathBuf>,
    /// Most that a job may lose against servers of its own, as a share
    #[arg(long, default_value_t = 0.1)]
    slowdown_limit: f64,
    /// Servers that a job requested for each of its workers
    #[arg(long, default_value_t = 1.0)]
    servers_per_worker: f64,
    /// Jobs that a file of iterations stands for
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    copies: u32,
    /// Windows that are played round by round beside the means, to compare
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=1000))]
    windows: u32,
    /// Their length, seconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(10..=86_400))]
    window_s: u32,
    /// Of everything that is left to chance
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// File for plots (.svg): invokers over time, by minute, and slowdowns
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Print one line of JSON and nothing else
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  thalweg simulate --trace philly.csv --policy thalweg,keda,hpa,knative --plot philly.svg
  thalweg simulate --trace job_1_norm.csv --copies 4 --json
  thalweg record jobs.csv --for 1h && thalweg simulate --trace jobs.csv
";

/// A policy by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Kind {
    /// Every job on servers of its own, as many as it requested
    Static,
    Thalweg,
    /// Queue depth over a threshold, as KEDA does
    Keda,
    /// CPU utilisation, as the Horizontal Pod Autoscaler does
    Hpa,
    /// Messages in the queues, as Knative does with concurrency
    Knative,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Thalweg => "thalweg",
            Self::Keda => "keda",
            Self::Hpa => "hpa",
            Self::Knative => "knative",
        }
    }

    /// What is tried for its one parameter, from many invokers to few; empty where there is none.
    fn grid(self) -> Vec<f64> {
        match self {
            Self::Static | Self::Thalweg => Vec::new(),
            // Messages: 1 to 4096 in steps of a twentieth; of a fifth for Knative, which takes many times as long to play.
            Self::Keda => (0..=192).map(|step| 2_f64.powf(f64::from(step) / 16.0)).collect(),
            Self::Knative => (0..=48).map(|step| 2_f64.powf(f64::from(step) / 4.0)).collect(),
            // Utilisation, in steps of half a percent.
            Self::Hpa => (10..=190).map(|step| f64::from(step) / 200.0).collect(),
        }
    }

    fn policy(self, parameter: f64) -> Box<dyn Policy> {
        match self {
            Self::Static | Self::Thalweg => Box::new(Elastic::default()),
            Self::Keda => Box::new(Keda::new(parameter)),
            Self::Hpa => Box::new(Hpa::new(parameter)),
            Self::Knative => Box::new(Knative::new(parameter)),
        }
    }
}

/// Time between the looks of Thalweg's policy where only means are reckoned; live it is `autoscaler.policy.tick_ms`.
const COARSE_TICK_MS: u64 = 2000;
/// Most invokers, and partitions to spread over them: beyond what any policy should want.
const MOST: u16 = 1024;
/// Of the rounds that others are fitted by.
const P99: f64 = 0.99;
/// Multiple of the trace's length after which nothing is waited for any more.
const PATIENCE: f64 = 1.5;
/// Time that is played before a window, milliseconds.
const LEARNING_MS: f64 = 120_000.0;
/// Variation of think times in the windows that are played round by round.
const VARIATION: f64 = 0.1;

/// What was measured of the system, as the built-in profiles have it.
pub(crate) fn built_in_constants(partitions: u16) -> anyhow::Result<Constants> {
    Ok(Profiles::load(None)?.constants(partitions))
}

struct Setting<'a> {
    trace: &'a Trace,
    config: Config,
    constants: Constants,
    seed: u64,
    /// Seen on a terminal only.
    bars: MultiProgress,
}

/// One policy's result.
struct Outcome {
    score: Score,
    parameter: Option<f64>,
}

/// Simulates.
///
/// # Errors
/// When the trace or the profiles cannot be read or make no sense, or the plot cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let limit = args.slowdown_limit;
    ensure!(limit > 0.0 && limit <= 10.0, "--slowdown-limit must be above 0 and up to 10");
    ensure!(args.servers_per_worker > 0.0, "--servers-per-worker must be positive");
    let profiles = Profiles::load(args.profiles.as_deref())?;
    let options = read::Options {
        seed: args.seed,
        servers_per_worker: args.servers_per_worker,
        copies: args.copies as usize,
    };
    let trace = read::read(&args.trace, &profiles, options)?;
    let config = Config { max_invokers: usize::from(MOST), slowdown_limit: limit, ..Config::default() };
    let (constants, seed, bars) = (profiles.constants(MOST), args.seed, MultiProgress::new());
    let setting = Setting { trace: &trace, config, constants, seed, bars };
    let statically = Static::of(&setting);
    let begun = std::time::Instant::now();
    let outcomes = setting.play_all(&args.policy, &statically);
    let seconds = begun.elapsed().as_secs_f64();
    let agreement = setting.compare(args);
    if let Some(file) = &args.plot {
        let curves: Vec<_> = outcomes.iter().map(|(kind, outcome)| (kind.name(), &outcome.score)).collect();
        plot::draw(file, &curves, &statically.timeline)
            .with_context(|| format!("drawing {}", file.display()))?;
    }
    let report = |outcome: &Outcome| {
        let score = &outcome.score;
        json!({
            "invoker_seconds": score.invoker_seconds,
            "reduction_vs_static": 1.0 - score.invoker_seconds / statically.requested_seconds,
            "minutes_below_static": score.timeline.share_not_above(&statically.timeline),
            "slowdown_mean": score.slowdown_mean(),
            "slowdown_max": score.slowdown_max(),
            "p99_round_over_alone": score.ratio_quantile(P99),
            "scale_events": score.scale_events,
            "flaps": score.flaps,
            "fitted": outcome.parameter,
        })
    };
    let policies: serde_json::Map<_, _> =
        outcomes.iter().map(|(kind, outcome)| (kind.name().to_owned(), report(outcome))).collect();
    let work: f64 = trace
        .jobs
        .iter()
        .map(|job| (job.duration_s, job.load(&setting.constants)))
        .map(|(duration, load)| duration / load.alone() * load.work)
        .sum();
    let line = json!({
        "policies": policies,
        "static": {
            "servers_as_requested_seconds": statically.requested_seconds,
            "fewest_that_hold_limit_seconds": statically.fewest_seconds,
        },
        "jobs_total": trace.total,
        "jobs_with_aggregation": trace.jobs.len(),
        "work_invoker_seconds": work,
        "agreement": agreement,
        "profiles": profiles,
        "servers_per_worker": args.servers_per_worker,
        "slowdown_limit": limit,
        "seed": args.seed,
        "seconds": seconds,
    });
    let mut out = std::io::stdout().lock();
    if !args.json {
        table(&mut out, &outcomes, &statically, &trace, work)?;
    }
    Ok(writeln!(out, "{line}")?)
}

fn table(
    out: &mut impl std::io::Write,
    outcomes: &BTreeMap<Kind, Outcome>,
    statically: &Static,
    trace: &Trace,
    work: f64,
) -> anyhow::Result<()> {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let row = |(kind, Outcome { score, parameter }): (&Kind, &Outcome)| {
        vec![
            parameter.map_or(kind.name().to_owned(), |value| format!("{} ({value:.3})", kind.name())),
            format!("{:.0}", score.invoker_seconds / 3600.0),
            percent(1.0 - score.invoker_seconds / statically.requested_seconds),
            percent(score.timeline.share_not_above(&statically.timeline)),
            percent(score.slowdown_mean()),
            percent(score.slowdown_max()),
            format!("{:.3}", score.ratio_quantile(P99)),
            score.scale_events.to_string(),
            score.flaps.to_string(),
        ]
    };
    let header = [
        "policy",
        "invoker hours",
        "saved",
        "minutes below",
        "slowdown",
        "worst",
        "p99 round",
        "changes",
        "flaps",
    ];
    let table = table_of(&header, outcomes.iter().map(row));
    writeln!(
        out,
        "{} of {} jobs need aggregation. Servers as requested: {:.0} hours; the fewest that hold the limit: {:.0} hours; \
         work that there is: {:.0} hours.\n{table}",
        trace.jobs.len(),
        trace.total,
        statically.requested_seconds / 3600.0,
        statically.fewest_seconds / 3600.0,
        work / 3600.0,
    )?;
    Ok(())
}

/// Every job on servers of its own.
struct Static {
    requested_seconds: f64,
    fewest_seconds: f64,
    timeline: Timeline,
}

impl Static {
    fn of(setting: &Setting<'_>) -> Self {
        let (mut requested_seconds, mut fewest_seconds) = (0.0, 0.0);
        let mut timeline = Timeline::default();
        for job in &setting.trace.jobs {
            requested_seconds += job.servers * job.duration_s;
            let fewest = job.fewest_servers(setting.config.slowdown_limit, &setting.constants);
            let load = job.load(&setting.constants);
            let longer = (load.think + load.work / fewest) / load.alone();
            fewest_seconds += fewest * job.duration_s * longer;
            timeline.add(job.start_s * 1000.0, (job.start_s + job.duration_s) * 1000.0, job.servers);
        }
        Self { requested_seconds, fewest_seconds, timeline }
    }
}

impl Setting<'_> {
    /// Plays ours first, if it is among them, and then the others at once, fitted to it.
    fn play_all(&self, policies: &[Kind], statically: &Static) -> BTreeMap<Kind, Outcome> {
        let (ours, others): (BTreeSet<_>, BTreeSet<_>) =
            policies.iter().copied().partition(|kind| *kind == Kind::Thalweg);
        let limit = 1.0 + self.config.slowdown_limit;
        let mut outcomes: BTreeMap<_, _> =
            ours.into_iter().map(|kind| (kind, self.play(kind, limit, statically))).collect();
        let reference = outcomes.get(&Kind::Thalweg).map(|outcome| outcome.score.ratio_quantile(P99));
        let play = |kind| (kind, self.play(kind, reference.unwrap_or(limit), statically));
        outcomes.extend(thread::scope(|scope| {
            let playing: Vec<_> = others.into_iter().map(|kind| scope.spawn(move || play(kind))).collect();
            let ended =
                playing.into_iter().map(|player| player.join().unwrap_or_else(|panic| resume_unwind(panic)));
            ended.collect::<Vec<_>>()
        }));
        outcomes
    }

    /// Plays a policy that is not thalweg with the parameter that it needs the fewest invokers with among those with
    /// which its rounds last no longer over alone, at the 99th percentile, than `reference`: a bisection, since fewer
    /// invokers mean longer rounds. Where none does that, with the one of the most invokers.
    fn play(&self, kind: Kind, reference: f64, statically: &Static) -> Outcome {
        if kind == Kind::Static {
            let timeline = statically.timeline.clone();
            let score = Score::undisturbed(statically.requested_seconds, timeline, self.trace.jobs.len());
            return Outcome { score, parameter: None };
        }
        let grid = kind.grid();
        let (mut from, mut to) = (1, grid.len());
        let mut best = self.once(kind, grid.first().copied(), "");
        while from < to {
            let middle = usize::midpoint(from, to);
            let tried =
                self.once(kind, Some(grid[middle]), &format!(", {} tries left", (to - from).ilog2() + 1));
            if tried.score.ratio_quantile(P99) <= reference {
                (best, from) = (tried, middle + 1);
            } else {
                to = middle;
            }
        }
        best
    }

    fn once(&self, kind: Kind, parameter: Option<f64>, note: &str) -> Outcome {
        let policy = &mut *kind.policy(parameter.unwrap_or(0.0));
        let score = match &self.trace.iterations {
            Some(times) => self.rounds(policy, times),
            None => self.means(policy, &format!("{}{note} ", kind.name())),
        };
        Outcome { score, parameter }
    }

    fn bar(&self, length: usize, what: &str) -> ProgressBar {
        let style =
            indicatif::ProgressStyle::with_template("{prefix}{wide_bar} {pos}/{len} jobs, {eta} left");
        let bar = ProgressBar::new(length as u64)
            .with_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()))
            .with_prefix(what.to_owned());
        self.bars.add(bar)
    }

    fn coarse(&self) -> Config {
        Config { tick_ms: COARSE_TICK_MS, ..self.config.clone() }
    }

    fn means(&self, policy: &mut dyn Policy, what: &str) -> Score {
        let jobs = &self.trace.jobs[..];
        let bar = self.bar(jobs.len(), what);
        let config = self.coarse();
        let inputs = (&config, &self.constants, self.seed);
        // A parameter that starves the jobs need not be followed to its end, which may be years away.
        let last = jobs.iter().map(|job| job.start_s + job.duration_s).fold(0.0, f64::max);
        let until = last * 1000.0 * PATIENCE;
        let (score, _) =
            fluid(jobs, policy, inputs, (None, until), &[], &mut |ended| bar.set_position(ended as u64));
        bar.finish_and_clear();
        score
    }

    fn rounds(&self, policy: &mut dyn Policy, times: &[f64]) -> Score {
        let start = State { at: 0.0, invokers: 0, jobs: Vec::new() };
        let inputs = (&self.config, &self.constants, self.seed);
        events(&self.trace.jobs, policy, inputs, (&start, f64::INFINITY), &Thinking::Recorded(times)).0
    }

    /// Plays windows round by round from where the means stood, and compares invoker-seconds and rounds.
    fn compare(&self, args: &Args) -> serde_json::Value {
        if args.windows == 0 || self.trace.iterations.is_some() {
            return serde_json::Value::Null;
        }
        let config = self.coarse();
        let inputs = (&config, &self.constants, self.seed);
        let jobs = &self.trace.jobs[..];
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let span = jobs.last().map_or(0.0, |job| job.start_s * 1000.0);
        let mut at: Vec<f64> = (0..args.windows).map(|_| rng.random::<f64>() * span).collect();
        at.sort_by(f64::total_cmp);
        let (_, states) = fluid(jobs, &mut Elastic::default(), inputs, (None, span + 1.0), &at, &mut |_| {});
        let length = f64::from(args.window_s) * 1000.0;
        let (mut worst, mut played) = ((0.0_f64, 0.0_f64), 0);
        let mut sums = (0.0, 0.0, 0.0, 0.0);
        let bar = self.bar(states.len(), "round by round ");
        for state in states.iter().filter(|state| !state.jobs.is_empty()) {
            let fine = (&self.config, &self.constants, self.seed);
            // What the policy does while it learns the jobs' rhythm anew is no part of the comparison.
            let (begin, end) = (state.at + LEARNING_MS, state.at + LEARNING_MS + length);
            let [(means_before, rounds_before), (means, rounds)] = [begin, end].map(|until| {
                let policy = &mut Elastic::default();
                let (means, _) = fluid(jobs, policy, inputs, (Some(state), until), &[], &mut |_| {});
                let thinking = Thinking::Around(VARIATION);
                let (rounds, _) = events(jobs, &mut Elastic::default(), fine, (state, until), &thinking);
                (means, rounds)
            });
            let (means, rounds) = (means.since(&means_before), rounds.since(&rounds_before));
            let off = |means: f64, rounds: f64| (means / rounds - 1.0).abs();
            let (cost, ratio) = (
                off(means.invoker_seconds, rounds.invoker_seconds),
                off(means.ratio_mean(), rounds.ratio_mean()),
            );
            worst = (worst.0.max(cost), worst.1.max(ratio));
            played += 1;
            sums = (
                sums.0 + means.invoker_seconds,
                sums.1 + rounds.invoker_seconds,
                sums.2 + means.ratio_mean(),
                sums.3 + rounds.ratio_mean(),
            );
            bar.inc(1);
        }
        bar.finish_and_clear();
        json!({
            "windows": played,
            "window_s": args.window_s,
            "invoker_seconds_off": (sums.0 / sums.1 - 1.0).abs(),
            "round_over_alone_off": (sums.2 / sums.3 - 1.0).abs(),
            "invoker_seconds_off_max": worst.0,
            "round_over_alone_off_max": worst.1,
        })
    }
}

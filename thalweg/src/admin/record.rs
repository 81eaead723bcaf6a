//! `thalweg record`.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use futures::StreamExt as _;
use indicatif::ProgressBar;
use serde_json::json;
use thalweg_protocol::{InvokerBeat, JobKey, JobLoad, Kind, Round, frame, subjects};
use thalweg_sdk::Client;

use super::{Target, count, parse_wait, print};
use crate::simulate::Recorded;

const EXAMPLES: &str = "\
Examples:
  thalweg record jobs.csv                       until it is interrupted
  thalweg record jobs.csv --for 1h && thalweg simulate --trace jobs.csv --policy thalweg,keda
";

/// A job of which nothing is heard for so long has ended; what comes later is another row.
const PAUSE: Duration = Duration::from_secs(60);
/// Time between looks at the jobs' numbers of workers, and between writings of the file.
const LOOK: Duration = Duration::from_secs(5);

/// Writes down what jobs ask of the invokers, for `thalweg simulate`
///
/// A row for each job: when it began and for how long it trained (seconds), its workers, bytes of contributions in a
/// round, and seconds between a round and the last contribution to the next. All of it comes from the invokers' heartbeats,
/// so listening costs the deployment nothing. A job has to finish two rounds to be recorded. The file is written anew every
/// five seconds and at the end.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RecordArgs {
    #[command(flatten)]
    target: Target,
    /// The file (CSV)
    file: PathBuf,
    /// How long, such as 90s or 1h [default: until interrupted]
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_wait)]
    length: Option<Duration>,
}

impl RecordArgs {
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }
}

pub(crate) async fn record(args: RecordArgs) -> anyhow::Result<()> {
    let client = args.target.connect().await?;
    let connection = args.target.connection("thalweg-record").await?;
    let [shared, pooled] = subjects::ALL_INVOKER_BEATS;
    let shared = connection.client.subscribe(shared).await?;
    let mut beats = futures::stream::select(shared, connection.client.subscribe(pooled).await?);
    let begun = Instant::now();
    let mut recording = Recording::default();
    // A file that cannot be written is known before an hour has passed.
    recording.write(&args.file)?;
    let bar = if std::io::stderr().is_terminal() && !args.target.json {
        ProgressBar::new_spinner()
    } else {
        ProgressBar::hidden()
    };
    let end = async {
        match args.length {
            Some(length) => tokio::time::sleep(length).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(end);
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = &mut end => break,
            _ = tokio::signal::ctrl_c() => break,
            _ = look.tick() => {
                recording.count_workers(&client).await;
                recording.write(&args.file)?;
                bar.set_message(recording.summary(&args.file));
                bar.tick();
            }
            message = beats.next() => {
                let message = message.context("the connection to NATS was closed")?;
                // Those that are not understood are `thalweg status`'s to tell of.
                if let Ok((beat, _)) = frame::open::<InvokerBeat>(Kind::Beat, &message.payload) {
                    recording.hear(&beat, begun.elapsed());
                }
            }
        }
    }
    recording.count_workers(&client).await;
    recording.write(&args.file)?;
    bar.finish_and_clear();
    let rows = recording.rows();
    if args.target.json {
        return print(&serde_json::to_string_pretty(&json!({
            "file": args.file,
            "seconds": begun.elapsed().as_secs_f64(),
            "jobs": rows.len(),
            "rounds": recording.rounds(),
            "service_bytes_per_s": recording.service_bytes_per_s(),
        }))?);
    }
    print(&recording.summary(&args.file))
}

/// What was heard.
#[derive(Debug, Default)]
struct Recording {
    jobs: BTreeMap<JobKey, Vec<Stretch>>,
    workers: BTreeMap<JobKey, u32>,
    /// Of each invoker, as it said last.
    rates: BTreeMap<String, f64>,
}

/// One job training without a pause. What was heard first ended before the time that is recorded.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    first: (Duration, Round),
    last: (Duration, Round),
    heard: Duration,
    bytes: u64,
    /// Rounds whose delays are in `delay_ms`.
    ended: u64,
    delay_ms: u64,
}

impl Recording {
    fn hear(&mut self, beat: &InvokerBeat, at: Duration) {
        if beat.service_bytes_per_s > 0.0 {
            self.rates.insert(beat.invoker.clone(), beat.service_bytes_per_s);
        }
        for load in beat.jobs.iter().filter(|load| load.round > 0) {
            let stretches = self.jobs.entry(load.job.clone()).or_default();
            match stretches.last_mut() {
                // An invoker may be a round behind the others; more than that is a new life.
                Some(last) if at < last.heard + PAUSE && load.round + 2 >= last.last.1 => last.hear(load, at),
                _ => stretches.push(Stretch::new(load, at)),
            }
        }
    }

    /// Asks how many workers the jobs have. Nobody who answers changes nothing: it is tried again.
    async fn count_workers(&mut self, client: &Client) {
        let Ok(jobs) = client.jobs(None).await else { return };
        for job in jobs {
            let most = self.workers.entry(job.key).or_default();
            *most = (*most).max(job.members.max(job.workers));
        }
    }

    fn rows(&self) -> Vec<Recorded> {
        let row = |(job, stretch): (&JobKey, &Stretch)| {
            let rounds = stretch.last.1.saturating_sub(stretch.first.1);
            let seconds = stretch.last.0.saturating_sub(stretch.first.0).as_secs_f64();
            if rounds == 0 || seconds <= 0.0 {
                return None;
            }
            let (period, delay) =
                (seconds / rounds as f64, stretch.delay_ms as f64 / 1e3 / stretch.ended.max(1) as f64);
            let start_s = stretch.first.0.as_secs_f64();
            Some(Recorded {
                start_s,
                duration_s: seconds,
                // One that has been deleted before anybody asked had one at least.
                workers: f64::from(self.workers.get(job).copied().unwrap_or(1).max(1)),
                round_bytes: stretch.bytes as f64 / rounds as f64,
                think_s: (period - delay).max(0.0),
            })
        };
        let stretches = self.jobs.iter().flat_map(|(job, all)| all.iter().map(move |stretch| (job, stretch)));
        let mut rows: Vec<_> = stretches.filter_map(row).collect();
        rows.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
        rows
    }

    fn rounds(&self) -> u64 {
        self.jobs.values().flatten().map(|stretch| stretch.last.1 - stretch.first.1).sum()
    }

    /// Mean of the invokers heard; 0 before any has measured one.
    fn service_bytes_per_s(&self) -> f64 {
        self.rates.values().sum::<f64>() / self.rates.len().max(1) as f64
    }

    fn summary(&self, file: &Path) -> String {
        let (jobs, rate) = (self.rows().len(), self.service_bytes_per_s());
        let rate = if rate > 0.0 {
            format!("; invokers handle {:.0} MB a busy second", rate / 1e6)
        } else {
            String::new()
        };
        format!(
            "{}, {} in {}{rate}",
            count(jobs as u64, "job"),
            count(self.rounds(), "round"),
            file.display()
        )
    }

    /// Writes all rows, beside the file first, so that it is whole at any time.
    fn write(&self, file: &Path) -> anyhow::Result<()> {
        let beside = file.with_extension("csv.new");
        let write = || -> anyhow::Result<()> {
            let mut writer = csv::WriterBuilder::new().has_headers(false).from_path(&beside)?;
            writer.write_record(["start_s", "duration_s", "workers", "round_bytes", "think_s"])?;
            self.rows().into_iter().try_for_each(|row| writer.serialize(row))?;
            writer.flush()?;
            Ok(std::fs::rename(&beside, file)?)
        };
        write().with_context(|| format!("writing {}", file.display()))
    }
}

impl Stretch {
    fn new(load: &JobLoad, at: Duration) -> Self {
        Self { first: (at, load.round), last: (at, load.round), heard: at, bytes: 0, ended: 0, delay_ms: 0 }
    }

    fn hear(&mut self, load: &JobLoad, at: Duration) {
        self.heard = at;
        self.bytes += load.bytes;
        self.ended += load.rounds;
        self.delay_ms += load.delay_ms;
        if load.round > self.last.1 {
            self.last = (at, load.round);
        }
    }
}

#[cfg(test)]
mod tests {
    use thalweg_protocol::InvokerState;

    use super::*;

    fn beat(invoker: &str, jobs: Vec<JobLoad>) -> InvokerBeat {
        InvokerBeat {
            invoker: invoker.to_owned(),
            state: InvokerState::Ready,
            partitions: Vec::new(),
            service_bytes_per_s: 100e6,
            busy: 0.5,
            held_messages: 0,
            held_bytes: 0,
            cpu_quota: 1.0,
            jobs,
        }
    }

    fn load(round: Round, bytes: u64) -> JobLoad {
        let job = JobKey { tenant: "default".parse().unwrap(), job: "a".parse().unwrap() };
        JobLoad { round, rounds: 1, bytes, delay_ms: 100, ..JobLoad::new(job) }
    }

    #[test]
    fn what_two_invokers_tell_of_a_job_is_one_row() {
        let mut recording = Recording::default();
        for round in 1..=21_u64 {
            let at = Duration::from_secs(2 * round);
            recording.hear(&beat("left", vec![load(round, 600)]), at);
            recording.hear(&beat("right", vec![load(round, 400)]), at + Duration::from_millis(300));
        }
        let rows = recording.rows();
        let [row] = rows[..] else { panic!("{rows:?}") };
        assert_eq!((row.start_s, row.duration_s, row.workers), (2.0, 40.0, 1.0));
        assert!((row.round_bytes - 1000.0).abs() < 30.0 && (row.think_s - 1.9).abs() < 1e-9, "{row:?}");
        assert_eq!((recording.rounds(), recording.service_bytes_per_s()), (20, 100e6));
    }

    #[test]
    fn a_pause_and_a_new_life_begin_a_row() {
        let mut recording = Recording::default();
        for (seconds, round) in [(0, 1), (1, 2), (2, 3), (100, 4), (101, 5), (102, 1), (103, 2), (104, 3)] {
            recording.hear(&beat("one", vec![load(round, 1000)]), Duration::from_secs(seconds));
        }
        let starts: Vec<_> = recording.rows().iter().map(|row| (row.start_s, row.duration_s)).collect();
        assert_eq!(starts, [(0.0, 2.0), (100.0, 1.0), (102.0, 2.0)]);
    }

    #[test]
    fn the_file_is_there_from_the_beginning_and_a_bad_place_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("jobs.csv");
        let recording = Recording::default();
        recording.write(&file).unwrap();
        assert_eq!(
            std::fs::read_to_string(&file).unwrap(),
            "start_s,duration_s,workers,round_bytes,think_s\n"
        );
        let error = format!("{:#}", recording.write(&folder.path().join("no/jobs.csv")).unwrap_err());
        assert!(error.contains("no/jobs.csv"), "{error}");
    }
}

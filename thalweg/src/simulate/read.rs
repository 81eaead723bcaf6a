//! Reading traces: which kind a file is, its header tells.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use thalweg_autoscaler::trace::TraceJob;

use super::profiles::Profiles;

/// What a file holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Trace {
    /// Jobs that need aggregation, by start.
    pub(super) jobs: Vec<TraceJob>,
    /// All jobs, those of one worker included.
    pub(super) total: usize,
    /// Think times of one job, seconds, where the file is of single iterations.
    pub(super) iterations: Option<Vec<f64>>,
}

/// `timestamp,duration,num_gpus,gpu_time,cluster`: the Philly trace as the Pollux authors reduced it.
#[derive(Debug, Deserialize)]
struct Philly {
    timestamp: String,
    duration: f64,
    num_gpus: f64,
}

/// `worker,gpu,time,batch_time_norm`: mini-batches of one job's workers, milliseconds.
#[derive(Debug, Deserialize)]
struct Iteration {
    worker: u32,
    time: u64,
    batch_time_norm: f64,
}

/// Jobs of which everything is known: what `thalweg record` writes.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct Recorded {
    pub(crate) start_s: f64,
    pub(crate) duration_s: f64,
    pub(crate) workers: f64,
    /// Contributions of all workers.
    pub(crate) round_bytes: f64,
    /// From the end of a round to the last contribution to the next.
    pub(crate) think_s: f64,
}

/// Settings of reading.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub(super) seed: u64,
    /// Servers that a job requested for each of its workers.
    pub(super) servers_per_worker: f64,
    /// Jobs that a file of single iterations stands for.
    pub(super) copies: usize,
}

pub(super) fn read(file: &Path, profiles: &Profiles, options: Options) -> anyhow::Result<Trace> {
    let name = || format!("reading {}", file.display());
    let mut reader = csv::Reader::from_path(file).with_context(name)?;
    let headers: Vec<_> = reader.headers().with_context(name)?.iter().map(str::to_owned).collect();
    let has = |column: &str| headers.iter().any(|header| header == column);
    let trace = if has("num_gpus") && has("timestamp") {
        philly(reader.deserialize(), profiles, options)
    } else if has("batch_time_norm") {
        iterations(reader.deserialize(), profiles, options)
    } else if has("round_bytes") {
        recorded(reader.deserialize(), options)
    } else {
        bail!(
            "{}: its columns are {}; known are traces with timestamp, duration and num_gpus, iterations with worker, \
             time and batch_time_norm, and jobs with start_s, duration_s, workers, round_bytes and think_s",
            file.display(),
            headers.join(", ")
        )
    };
    let mut trace = trace.with_context(name)?;
    ensure!(!trace.jobs.is_empty(), "{}: no job in it has more than one worker", file.display());
    trace.jobs.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
    Ok(trace)
}

type Rows<'r, T> = csv::DeserializeRecordsIter<'r, std::fs::File, T>;

fn philly(rows: Rows<'_, Philly>, profiles: &Profiles, options: Options) -> anyhow::Result<Trace> {
    let (mut jobs, mut total, mut first) = (Vec::new(), 0, None);
    for row in rows {
        let row = row?;
        let start = seconds(&row.timestamp).with_context(|| format!("timestamp {:?}", row.timestamp))?;
        let first = *first.get_or_insert(start);
        total += 1;
        let known = row.duration.is_finite() && row.duration > 0.0;
        if !(known && row.num_gpus > 1.0) {
            continue;
        }
        let profile = profiles.draw(share(options.seed, total));
        jobs.push(TraceJob {
            start_s: start - first,
            duration_s: row.duration,
            round_bytes: profile.parameters as f64 * 4.0 * row.num_gpus,
            result_bytes: profile.parameters as f64 * 4.0,
            think_s: profile.think_ms / 1000.0,
            servers: (row.num_gpus * options.servers_per_worker).max(1.0),
        });
    }
    let earliest = jobs.iter().map(|job| job.start_s).fold(f64::INFINITY, f64::min);
    jobs.iter_mut().for_each(|job| job.start_s -= earliest);
    Ok(Trace { jobs, total, iterations: None })
}

fn iterations(rows: Rows<'_, Iteration>, profiles: &Profiles, options: Options) -> anyhow::Result<Trace> {
    let mut slowest = std::collections::BTreeMap::<u64, f64>::new();
    let mut workers = std::collections::BTreeSet::new();
    for row in rows {
        let row = row?;
        // A round waits for its last worker.
        let longest = slowest.entry(row.time).or_default();
        *longest = longest.max(row.batch_time_norm / 1000.0);
        workers.insert(row.worker);
    }
    ensure!(!slowest.is_empty(), "it has no rows");
    let times: Vec<_> = slowest.into_values().collect();
    let think_s = times.iter().sum::<f64>() / times.len() as f64;
    let profile = &profiles.jobs[0];
    let count = workers.len() as f64;
    let mut job = TraceJob {
        start_s: 0.0,
        duration_s: 0.0,
        round_bytes: profile.parameters as f64 * 4.0 * count,
        result_bytes: profile.parameters as f64 * 4.0,
        think_s,
        servers: (count * options.servers_per_worker).max(1.0),
    };
    job.duration_s = job.load(&profiles.constants(1024)).alone() * times.len() as f64;
    Ok(Trace { jobs: vec![job; options.copies], total: options.copies, iterations: Some(times) })
}

fn recorded(rows: Rows<'_, Recorded>, options: Options) -> anyhow::Result<Trace> {
    let (mut jobs, mut total) = (Vec::new(), 0);
    for row in rows {
        let row = row?;
        total += 1;
        let fits = [row.start_s, row.duration_s, row.round_bytes, row.think_s, row.workers];
        ensure!(
            fits.iter().all(|value| value.is_finite() && *value >= 0.0),
            "{row:?}: negative or not a number"
        );
        if row.duration_s > 0.0 && row.round_bytes > 0.0 {
            jobs.push(TraceJob {
                start_s: row.start_s,
                duration_s: row.duration_s,
                round_bytes: row.round_bytes,
                result_bytes: row.round_bytes / row.workers.max(1.0),
                think_s: row.think_s,
                servers: (row.workers * options.servers_per_worker).max(1.0),
            });
        }
    }
    Ok(Trace { jobs, total, iterations: None })
}

/// A number between 0 and 1 that seed and place determine (SplitMix64, Steele, Lea and Flood, 2014).
fn share(seed: u64, place: usize) -> f64 {
    let mut bits = seed.wrapping_add((place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Seconds since the epoch of `2017-09-04 10:30:41`.
fn seconds(timestamp: &str) -> anyhow::Result<f64> {
    let with_zone = format!("{}Z", timestamp.trim().replacen(' ', "T", 1));
    let time = humantime::parse_rfc3339(&with_zone)?;
    Ok(time.duration_since(std::time::UNIX_EPOCH)?.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: Options = Options { seed: 1, servers_per_worker: 1.0, copies: 3 };

    fn read_text(text: &str) -> anyhow::Result<Trace> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("trace.csv");
        std::fs::write(&file, text).unwrap();
        read(&file, &Profiles::load(None).unwrap(), OPTIONS)
    }

    #[test]
    fn jobs_of_many_gpus_are_read_from_a_cluster_trace() {
        let text = "timestamp,duration,num_gpus,gpu_time,cluster\n\
                    2017-09-04 10:30:41,100.0,1,100.0,a\n\
                    2017-09-04 10:31:41,200.0,4,800.0,a\n\
                    2017-09-04 10:31:11,300.0,8,2400.0,b\n";
        let trace = read_text(text).unwrap();
        assert_eq!((trace.total, trace.jobs.len()), (3, 2));
        let [first, second] = &trace.jobs[..] else { panic!() };
        assert_eq!((first.start_s, first.duration_s, first.servers), (0.0, 300.0, 8.0));
        assert_eq!((second.start_s, second.servers), (30.0, 4.0));
    }

    #[test]
    fn iterations_wait_for_their_slowest_worker() {
        let text =
            ",worker,gpu,time,batch_time_norm\n0,0,25,1,400\n1,1,25,1,500\n2,0,25,2,600\n3,1,25,2,100\n";
        let trace = read_text(text).unwrap();
        assert_eq!(trace.iterations.unwrap(), [0.5, 0.6]);
        assert_eq!((trace.jobs.len(), trace.jobs[0].servers), (3, 2.0));
        assert!((trace.jobs[0].think_s - 0.55).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_trace_is_refused_with_what_would_be() {
        let error = read_text("a,b\n1,2\n").unwrap_err().to_string();
        assert!(error.contains("columns are a, b") && error.contains("num_gpus"), "{error}");
        let error = format!("{:#}", read_text("timestamp,duration,num_gpus\nyesterday,1,2\n").unwrap_err());
        assert!(error.contains("yesterday"), "{error}");
        let none =
            read_text("timestamp,duration,num_gpus\n2017-09-04 10:30:41,1,1\n").unwrap_err().to_string();
        assert!(none.contains("more than one worker"), "{none}");
    }
}

//! Rounds on demand: the Rust side of `sdk/python/benchmarks/overhead.py`, which measures what Python adds.
//!
//! For each line on standard input one `push_pull` of a tensor, whose seconds are printed; at the end the peak memory of
//! this process in bytes.
//!
//! ```sh
//! target/release/thalweg up
//! cargo run --release --package thalweg-sdk --example rounds -- my-job 16777216
//! ```

use std::{io::BufRead as _, time::Instant};

use thalweg_sdk::{Client, Job};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(name), Some(elements)) = (args.next(), args.next()) else {
        return Err("usage: rounds JOB ELEMENTS, with rounds asked for on standard input".into());
    };
    let elements: usize = elements.parse()?;
    let url = std::env::var("THALWEG_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());
    let job = Job::new(&name)?.tensor("value", [elements as u64]).function("mean");
    let client = Client::connect(&url).await?;
    let mut worker = client.join(job, 0).await?;
    let values: Vec<f32> = (0..elements).map(|index| (index % 1000) as f32).collect();
    for line in std::io::stdin().lock().lines() {
        line?;
        let start = Instant::now();
        let round = worker.push_pull(&[("value", &values)]).await?;
        let seconds = start.elapsed().as_secs_f64();
        if round.tensors[0] != values {
            return Err("the mean over one worker is not what it pushed".into());
        }
        // Dropped before the next one, as Python does.
        drop(round);
        output(&seconds.to_string())?;
    }
    worker.leave().await?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    let kibibytes: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    output(&(kibibytes * 1024).to_string())
}

fn output(text: &str) -> Result<(), Box<dyn std::error::Error>> {
    use std::io::Write as _;
    let mut out = std::io::stdout();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

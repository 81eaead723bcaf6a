//! `thalweg bench store`: commits of whole models, against the bare writes they need.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use serde_json::json;
use thalweg_protocol::{
    Commit, CommitOutcome, Durability, Incarnation, Init, JobKey, Layout, Ledger, StoreJob, limits,
};
use thalweg_store::{LocalStore, OpenOptions, ShardStore as _};

use crate::{demo::quantile, process};

/// Arguments of `thalweg bench store`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Size of the model, MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    mib: u64,
    /// Rounds: every shard is committed once in each
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Print one line of JSON at the end
    #[arg(long)]
    json: bool,
    /// Directory on the disk to measure; default: the temporary directory
    #[arg(long)]
    directory: Option<std::path::PathBuf>,
}

/// Time between flush cycles, as in the store's default.
const FLUSH: Duration = Duration::from_millis(500);
/// Commits under way at once, as one invoker has.
const CONCURRENT: usize = 8;

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let parent = args.directory.clone().unwrap_or_else(std::env::temp_dir);
    let directory = tempfile::tempdir_in(&parent).with_context(|| format!("in {}", parent.display()))?;
    let job = StoreJob {
        key: JobKey { tenant: "bench".parse()?, job: "store".parse()? },
        incarnation: Incarnation::random(),
        layout: Layout { elements: args.mib << 18, shard_elements: limits::DEFAULT_SHARD_BYTES / 4 },
        slots: 0,
        durability: Durability::Process,
        max_members: 256,
        init: Init::Zeros,
        first_version: 0,
    };
    let runtime = crate::cli::runtime()?;
    let path = directory.path().join("store");
    let store = LocalStore::open(OpenOptions::directory(&path, FLUSH)?)?;
    runtime.block_on(store.create(job.clone()))?;
    let bare_path = directory.path().join("bare");
    let bare = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&bare_path)?;
    let shard_bytes = limits::DEFAULT_SHARD_BYTES as usize;
    let mut rates = (Vec::new(), Vec::new());
    let bytes = (args.mib << 20) as f64;
    // Round 0 warms both sides up: it extends the files.
    for round in 0..=args.rounds {
        let state = pattern(round, shard_bytes);
        // Alternating which side goes first, so that neither always meets the other's dirty pages.
        for side in [round % 2, 1 - round % 2] {
            let seconds = if side == 0 {
                commit_round(&runtime, &store, &job, round + 1, &state)?
            } else {
                bare_round(&bare, round, args.mib, &state)?
            };
            if round > 0 {
                let rates = if side == 0 { &mut rates.0 } else { &mut rates.1 };
                rates.push(bytes / 1e6 / seconds);
            }
        }
    }
    store.close().context("closing the store")?;
    drop(store);
    let over_live = allocated(&path)? as f64 / bytes;
    let begun = Instant::now();
    let store = LocalStore::open(OpenOptions::directory(&path, FLUSH)?)?;
    let heads = runtime.block_on(store.heads(job.incarnation, 0, u32::MAX))?;
    let reopen_ms = begun.elapsed().as_secs_f64() * 1e3;
    ensure!(heads.iter().all(|head| head.version == args.rounds + 1), "a commit is missing after reopening");
    let last = runtime.block_on(store.fetch(job.incarnation, 0, true))?;
    ensure!(last.values == pattern(args.rounds, shard_bytes), "other bytes were read than committed");
    let (commit, bare) = (quantile(&rates.0, 0.5), quantile(&rates.1, 0.5));
    let ratios: Vec<_> = rates.0.iter().zip(&rates.1).map(|(commit, bare)| commit / bare).collect();
    let report = json!({
        "mib": args.mib,
        "rounds": args.rounds,
        "commit_mb_per_s": commit,
        "bare_mb_per_s": bare,
        "ratio_bare": quantile(&ratios, 0.5),
        "disk_over_live": over_live,
        "reopen_ms": reopen_ms,
        "rss_mib": process::peak_rss_bytes(std::process::id()) as f64 / f64::from(1 << 20),
    });
    let mut out = std::io::stdout().lock();
    if !args.json {
        writeln!(
            out,
            "commits {commit:.0} MB/s, bare writes {bare:.0} MB/s, disk {over_live:.2} x live, reopened in {reopen_ms:.0} ms"
        )?;
    }
    writeln!(out, "{report}")?;
    Ok(())
}

/// Values that differ from round to round and from page to page.
fn pattern(round: u64, len: usize) -> Bytes {
    let words = (0..len as u64 / 8).map(|word| (word ^ (round << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect::<Vec<_>>().into()
}

/// Commits every shard once and then flushes; returns seconds.
fn commit_round(
    runtime: &tokio::runtime::Runtime,
    store: &LocalStore,
    job: &StoreJob,
    round: u64,
    state: &Bytes,
) -> anyhow::Result<f64> {
    let begun = Instant::now();
    runtime.block_on(async {
        use futures::StreamExt as _;
        let heads = store.heads(job.incarnation, 0, u32::MAX).await?;
        let commits = heads.into_iter().enumerate().map(|(shard, expect)| {
            let shard = u32::try_from(shard).unwrap_or(u32::MAX);
            let ledger = Ledger { round, counted: [0, 1, 2, 3].into_iter().collect(), ..Ledger::default() };
            let commit = Commit { job: job.incarnation, shard, expect, ledger, function: [1; 16] };
            store.commit(commit, state.slice(..job.state_bytes(shard)))
        });
        let mut commits = futures::stream::iter(commits).buffer_unordered(CONCURRENT);
        while let Some(outcome) = commits.next().await {
            ensure!(matches!(outcome?, CommitOutcome::Committed(_)), "a commit did not go through");
        }
        Ok(())
    })?;
    store.flush()?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Writes the same bytes in place, alternating between two copies, and syncs them; returns seconds.
fn bare_round(file: &fs::File, round: u64, mib: u64, state: &[u8]) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let total = mib << 20;
    let mut offset = 0;
    while offset < total {
        let len = (total - offset).min(state.len() as u64);
        file.write_all_at(&state[..len as usize], (round % 2) * total + offset)?;
        offset += len;
    }
    file.sync_data()?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Bytes of allocated blocks under a directory.
fn allocated(path: &Path) -> anyhow::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += if metadata.is_dir() { allocated(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(sum)
}

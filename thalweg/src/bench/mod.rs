//! `thalweg bench`.

mod allreduce;
mod backlog;
mod callgrind;
mod contributors;
mod crew;
mod elasticity;
mod figures;
mod gradient;
mod journal;
mod load;
mod metrics;
mod migrate;
mod offered;
mod predict;
mod raw;
mod service;
mod stack;
mod step;
mod store;
mod train;
mod worker;

use clap::Subcommand;
use tokio::signal::unix::{SignalKind, signal};

pub use raw::FolderArgs;
pub use worker::WorkerArgs;

/// Arguments of `thalweg bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Rounds of worker processes through a whole private deployment, results checked
    Allreduce(allreduce::Args),
    /// A model far larger than an invoker's memory, with a straggler
    Backlog(backlog::Args),
    /// One round of thousands of contributors
    Contributors(contributors::Args),
    /// Jobs that share elastic invokers, against jobs with invokers of their own
    Elasticity(elasticity::Args),
    /// What recording metrics costs
    Metrics(metrics::Args),
    /// Moves of all partitions of a running job
    Migrate(migrate::Args),
    /// What joining, snapshots and idle jobs cost those who train
    Service(service::Args),
    /// Load that jumps, on invokers that follow it
    Step(step::Args),
    /// Commits of shards against a bare pwrite and fdatasync of the same bytes
    Store(store::Args),
}

/// Runs a benchmark.
///
/// # Errors
/// When a part cannot run or a result is wrong.
pub fn run(args: Args) -> anyhow::Result<()> {
    survive_interrupts()?;
    match args.what {
        What::Allreduce(args) => allreduce::run(&args),
        What::Backlog(args) => backlog::run(&args),
        What::Contributors(args) => contributors::run(&args),
        What::Elasticity(args) => elasticity::run(&args),
        What::Metrics(args) => metrics::run(&args),
        What::Migrate(args) => migrate::run(&args),
        What::Service(args) => service::run(&args),
        What::Step(args) => step::run(&args),
        What::Store(args) => store::run(&args),
    }
}

/// Ctrl-C ends the processes of a benchmark, which then ends by itself and cleans up.
fn survive_interrupts() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut interrupts = runtime.block_on(async { signal(SignalKind::interrupt()) })?;
    std::thread::spawn(move || runtime.block_on(async { while interrupts.recv().await.is_some() {} }));
    Ok(())
}

/// By how much a worker stands back that must not disturb what is measured.
const YIELDING: i32 = 15;

/// A worker process.
///
/// # Errors
/// Those of the SDK, and when a result is wrong.
pub fn worker(args: WorkerArgs) -> anyhow::Result<()> {
    if args.yielding {
        // Before there is another thread, which would not follow.
        rustix::process::nice(YIELDING)?;
    }
    // One thread for either pattern: nothing here computes meanwhile, and hand-overs between threads cost more
    // than they gain on a machine that the whole deployment shares.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(worker::run(args))
}

/// The folder of the raw pattern.
///
/// # Errors
/// Those of NATS.
pub fn folder(args: FolderArgs) -> anyhow::Result<()> {
    // As an invoker: one thread.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(raw::folder(args))
}

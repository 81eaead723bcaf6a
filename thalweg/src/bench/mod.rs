//! `thalweg bench`.

use clap::Subcommand;

mod store;

/// Arguments of `thalweg bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Commits of shards against a bare pwrite and fdatasync of the same bytes
    Store(store::Args),
}

/// Placeholder.
#[derive(Debug, clap::Args)]
pub struct WorkerArgs {}
/// Placeholder.
#[derive(Debug, clap::Args)]
pub struct FolderArgs {}

/// Runs a benchmark.
///
/// # Errors
/// When a part cannot run or a result is wrong.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Store(args) => store::run(&args),
    }
}
/// w
/// # Errors
/// e
pub fn worker(_: WorkerArgs) -> anyhow::Result<()> {
    Ok(())
}
/// w
/// # Errors
/// e
pub fn folder(_: FolderArgs) -> anyhow::Result<()> {
    Ok(())
}

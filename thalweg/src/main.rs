//! See the library.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    thalweg_broker::stage::arm();
    match thalweg::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("thalweg: {error:#}");
            ExitCode::FAILURE
        }
    }
}

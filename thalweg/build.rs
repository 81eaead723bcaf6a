//! Tells the program which commit it was built from: `THALWEG_COMMIT` if that is set, as in an image, whose builder
//! sees no repository; else, in optimised builds, what git says; else nothing. Whoever works on it builds many commits, and
//! need not build this for each.

use std::{path::Path, process::Command};

/// What git answers, if it is there and has an answer.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

fn commit() -> Option<String> {
    println!("cargo:rerun-if-env-changed=THALWEG_COMMIT");
    if let Ok(commit) = std::env::var("THALWEG_COMMIT")
        && !commit.is_empty()
    {
        return Some(commit);
    }
    if std::env::var("PROFILE").is_ok_and(|profile| profile != "release") {
        return None;
    }
    // Sources that were unpacked inside of somebody else's repository are not of its commits.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    let branch = git(&["rev-parse", "--symbolic-full-name", "HEAD"]).unwrap_or_default();
    for file in ["HEAD", "packed-refs", &branch] {
        // Cargo would take a file that is not there for one that has changed.
        if let Some(path) = git(&["rev-parse", "--git-path", file])
            && Path::new(&path).is_file()
        {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let version = env!("CARGO_PKG_VERSION");
    let version = commit().map_or(version.to_owned(), |commit| format!("{version} ({commit})"));
    println!("cargo:rustc-env=THALWEG_VERSION={version}");
}

//! Stages of an invocation and of a flush cycle at which the crash tests kill something.
//!
//! Without the feature `failpoints` [`reached`] is empty. With it, the environment variable
//! `FAILPOINTS` (see the `fail` crate) arms a stage, for example
//! `before_commit=7*off->1*return(nats)`: the eighth time that stage is reached, the process whose
//! id is in the file `nats.pid` of the directory `THALWEG_FAULTS` is killed with SIGKILL, `self`
//! being this process, and a line is appended to `hits` there.

/// Before the contributions of a round are folded.
pub const BEFORE_FOLD: &str = "before_fold";
/// Folded, not yet sent to the store.
pub const BEFORE_COMMIT: &str = "before_commit";
/// Committed, not yet published.
pub const BEFORE_PUBLISH: &str = "before_publish";
/// Published, not yet acknowledged.
pub const BEFORE_ACK: &str = "before_ack";
/// Slabs synced, durable pointers not yet written.
pub const IN_FLUSH: &str = "in_flush";
/// Some of a round folded, not yet sent to the store. Only rounds that last come here, so it is not one of [`ALL`].
pub const BEFORE_PARTIAL: &str = "before_partial";
/// The stages that every round comes by.
pub const ALL: [&str; 5] = [BEFORE_FOLD, BEFORE_COMMIT, BEFORE_PUBLISH, BEFORE_ACK, IN_FLUSH];

/// Marks that `stage` has been reached.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn reached(_stage: &str) {}

/// Marks that `stage` has been reached; kills what an armed fail point names.
#[cfg(feature = "failpoints")]
pub fn reached(stage: &str) {
    fail::fail_point!(stage, |targets| kill(stage, &targets.unwrap_or_default()));
}

#[cfg(feature = "failpoints")]
fn kill(stage: &str, targets: &str) {
    use std::io::Write as _;
    let Some(directory) = std::env::var_os("THALWEG_FAULTS").map(std::path::PathBuf::from) else {
        return;
    };
    let line = format!("{stage} {targets}\n");
    let hits = std::fs::OpenOptions::new().create(true).append(true).open(directory.join("hits"));
    if let Ok(mut hits) = hits {
        let _ = hits.write_all(line.as_bytes());
    }
    // This process dies last, or it could not kill the others.
    let own = std::process::id();
    let mut suicide = false;
    for target in targets.split('+') {
        let pid = match target {
            "self" => Some(own),
            name => std::fs::read_to_string(directory.join(format!("{name}.pid")))
                .ok()
                .and_then(|text| text.trim().parse().ok()),
        };
        match pid {
            Some(pid) if pid == own => suicide = true,
            Some(pid) => sigkill(pid),
            None => {}
        }
    }
    if suicide {
        sigkill(own);
    }
}

#[cfg(feature = "failpoints")]
fn sigkill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Weight of the contribution that plays the poison in tests: folding it kills the invoker while the
/// fail point `poison` is armed.
pub const POISON_WEIGHT: f32 = 666.0;

/// Dies here when `weight` marks the poison of a test.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn poisoned(_weight: f32) {}

/// Dies here when `weight` marks the poison of a test.
#[cfg(feature = "failpoints")]
pub fn poisoned(weight: f32) {
    if weight == POISON_WEIGHT {
        reached("poison");
    }
}

/// Reads `FAILPOINTS`; call once, first thing in a process.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn arm() {}

/// Reads `FAILPOINTS`; call once, first thing in a process.
#[cfg(feature = "failpoints")]
pub fn arm() {
    // Armed for the rest of the process: dropping the scenario would disarm.
    std::mem::forget(fail::FailScenario::setup());
}

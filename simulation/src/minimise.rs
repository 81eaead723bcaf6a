//! From a history that breaks an invariant to a shorter one that breaks it too.

use crate::{Options, Report, run};

/// Leaves out faults and rounds as long as the same invariant breaks; returns what is left, with its history.
/// `None` when the seed breaks nothing.
///
/// # Errors
/// When the simulation itself cannot run.
pub fn minimise(options: &Options) -> anyhow::Result<Option<(Options, Report)>> {
    let mut best = Options { trace: false, ..options.clone() };
    let report = run(&best)?;
    let Some(violation) = report.violation else { return Ok(None) };
    let breaks = |options: &Options| -> anyhow::Result<Option<Report>> {
        let report = run(options)?;
        let same = report.violation.as_ref().is_some_and(|found| found.invariant == violation.invariant);
        Ok(same.then_some(report))
    };
    // Faults: halves first, then quarters, then one by one (delta debugging).
    let mut faults: Vec<u32> = report.faults.iter().map(|(number, ..)| *number).collect();
    let mut size = faults.len().div_ceil(2);
    while size > 0 {
        let mut from = 0;
        while from < faults.len() {
            let to = (from + size).min(faults.len());
            let skip = best.skip.iter().chain(&faults[from..to]).copied().collect();
            let fewer = Options { skip, ..best.clone() };
            if breaks(&fewer)?.is_some() {
                best = fewer;
                faults.drain(from..to);
            } else {
                from = to;
            }
        }
        size = if size == 1 { 0 } else { size.div_ceil(2) };
    }
    for rounds in 1..report.rounds {
        let shorter = Options { rounds: Some(rounds), ..best.clone() };
        if breaks(&shorter)?.is_some() {
            best = shorter;
            break;
        }
    }
    best.trace = true;
    let report = run(&best)?;
    Ok(Some((best, report)))
}

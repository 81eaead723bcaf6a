//! CPU time and memory of processes.

use procfs::process::{Process, Stat, all_processes};

/// User and system time of a process and of its reaped children, seconds.
pub(crate) fn cpu_seconds(pid: u32) -> (f64, f64) {
    let Some(stat) = stat(pid) else { return (0.0, 0.0) };
    let seconds = |ticks: f64| ticks / procfs::ticks_per_second() as f64;
    let children = stat.cutime.max(0) as f64 + stat.cstime.max(0) as f64;
    (seconds((stat.utime + stat.stime) as f64), seconds(children))
}

/// Peak resident memory of a process, bytes.
pub(crate) fn peak_rss_bytes(pid: u32) -> u64 {
    let process = i32::try_from(pid).ok().and_then(|pid| Process::new(pid).ok());
    process.and_then(|process| process.status().ok()).and_then(|status| status.vmhwm).unwrap_or(0) * 1024
}

/// Resident memory of a process, bytes.
pub(crate) fn rss_bytes(pid: u32) -> u64 {
    let process = i32::try_from(pid).ok().and_then(|pid| Process::new(pid).ok());
    process.and_then(|process| process.status().ok()).and_then(|status| status.vmrss).unwrap_or(0) * 1024
}

/// Living children of a process.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let Ok(processes) = all_processes() else { return Vec::new() };
    processes
        .filter_map(|process| process.ok()?.stat().ok())
        .filter(|stat| u32::try_from(stat.ppid) == Ok(pid))
        .filter_map(|stat| u32::try_from(stat.pid).ok())
        .collect()
}

fn stat(pid: u32) -> Option<Stat> {
    Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()
}

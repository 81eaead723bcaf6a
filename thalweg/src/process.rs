//! CPU time and memory of processes.

/// User and system time of a process and its reaped children, seconds.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let Some(stat) = stat(pid) else { return 0.0 };
    let own = (stat.utime + stat.stime) as f64;
    let children = stat.cutime.max(0) as f64 + stat.cstime.max(0) as f64;
    (own + children) / procfs::ticks_per_second() as f64
}

/// Peak resident memory of a process, bytes.
pub(crate) fn peak_rss_bytes(pid: u32) -> u64 {
    let process = i32::try_from(pid).ok().and_then(|pid| procfs::process::Process::new(pid).ok());
    process.and_then(|process| process.status().ok()).and_then(|status| status.vmhwm).unwrap_or(0) * 1024
}

fn stat(pid: u32) -> Option<procfs::process::Stat> {
    procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()
}

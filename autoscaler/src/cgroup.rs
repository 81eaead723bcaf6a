//! CPU quotas kept by the kernel: cgroups of version 2 below that of this process, where it may make some.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The kernel looks at a quota once in this time, microseconds; its own default.
const PERIOD_US: f64 = 100_000.0;
/// Smallest quota the kernel takes, microseconds a period.
const LEAST_US: f64 = 1000.0;
/// Where this process moves to: a cgroup with processes in it cannot share its controllers out.
const OURS: &str = "thalweg-main";

/// A cgroup below which others can be made.
#[derive(Debug)]
pub(crate) struct Cgroups {
    parent: PathBuf,
}

/// The cgroup of one invoker; removed when it is dropped, if nothing is in it any more.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroups {
    /// Below the cgroup of this process, which moves into a child of it where the kernel asks for that.
    ///
    /// # Errors
    /// When the kernel has none of version 2 with the CPU controller, or this process may not write there: under
    /// systemd that takes `Delegate=cpu`.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let parent = locate(&mounts, &own).ok_or_else(|| unsupported("no cgroups of version 2"))?;
        Self::below(parent)
    }

    fn below(parent: PathBuf) -> io::Result<Self> {
        // An earlier life may have been there: its place is above what it moved into.
        let above = parent.parent().filter(|_| parent.ends_with(OURS)).map(Path::to_owned);
        let parent = above.unwrap_or(parent);
        if !has_cpu(&fs::read_to_string(parent.join("cgroup.controllers"))?) {
            return Err(unsupported("the CPU controller is not delegated to this cgroup"));
        }
        // The root, which alone has no type, may have processes beside those in its children. Elsewhere the kernel takes
        // the controller all the same, and then no processes into the children.
        if parent.join("cgroup.type").exists() {
            move_aside(&parent)?;
        }
        let shared = parent.join("cgroup.subtree_control");
        if !has_cpu(&fs::read_to_string(&shared)?) {
            fs::write(&shared, "+cpu")?;
        }
        Ok(Self { parent })
    }

    /// Makes the cgroup of the invoker `id`, for at most `cpus` CPUs.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(crate) fn make(&self, id: &str, cpus: f64) -> io::Result<Cgroup> {
        let path = self.path(id);
        fs::create_dir(&path)?;
        let made = Cgroup { path };
        fs::write(made.path.join("cpu.max"), limit(cpus))?;
        Ok(made)
    }

    /// The cgroup of the invoker `id`.
    pub(crate) fn path(&self, id: &str) -> PathBuf {
        self.parent.join(format!("thalweg-{id}"))
    }
}

impl Cgroup {
    /// Moves a process into it, with all of its threads.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(crate) fn take_in(&self, process: u32) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), process.to_string())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "a cgroup stays");
        }
    }
}

/// Moves this process out of a cgroup, into a child of it, if it is there.
fn move_aside(parent: &Path) -> io::Result<()> {
    let inside = fs::read_to_string(parent.join("cgroup.procs"))?;
    let own = std::process::id().to_string();
    if inside.lines().any(|process| process != own) {
        return Err(unsupported(
            "other processes are in this cgroup too, such as a shell that has started this one",
        ));
    }
    if inside.is_empty() {
        return Ok(());
    }
    let ours = parent.join(OURS);
    match fs::create_dir(&ours) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // 0 stands for whoever writes it.
    fs::write(ours.join("cgroup.procs"), "0")
}

fn unsupported(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

fn has_cpu(controllers: &str) -> bool {
    controllers.split_whitespace().any(|controller| controller == "cpu")
}

fn limit(cpus: f64) -> String {
    format!("{:.0} {PERIOD_US:.0}", (cpus * PERIOD_US).max(LEAST_US))
}

/// The directory of this process's cgroup, from `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn locate(mounts: &str, own: &str) -> Option<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then_some(())?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // What is mounted may be a part of the hierarchy.
        let below = Path::new(own).strip_prefix(root).ok()?;
        Some(Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_found_where_it_is_mounted() {
        let mounts = "22 1 0:20 / /proc rw - proc proc rw\n\
            30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        let own = "1:cpu:/other\n0::/system.slice/thalweg-agent.service\n";
        let found = locate(mounts, own).unwrap();
        assert_eq!(found, Path::new("/sys/fs/cgroup/system.slice/thalweg-agent.service"));
        let part = mounts.replace("0:26 / ", "0:26 /system.slice ");
        assert_eq!(locate(&part, own).unwrap(), Path::new("/sys/fs/cgroup/thalweg-agent.service"));
        assert_eq!(locate(&part, "0::/user.slice\n"), None);
        assert_eq!(locate("30 22 0:26 / /cpu rw - cgroup cgroup rw,cpu\n", own), None);
        assert_eq!(locate(mounts, "1:cpu:/\n"), None);
    }

    #[test]
    fn limits_are_what_the_kernel_takes() {
        assert_eq!(limit(0.2), "20000 100000");
        assert_eq!(limit(0.001), "1000 100000");
    }

    #[test]
    fn what_is_not_delegated_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("cgroup.controllers"), "memory pids").unwrap();
        let error = Cgroups::below(directory.path().to_owned()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn whoever_is_in_the_cgroup_moves_aside() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        write("cgroup.controllers", "cpu");
        write("cgroup.subtree_control", "");
        write("cgroup.type", "domain\n");
        let own = std::process::id();
        write("cgroup.procs", &format!("{own}\n1\n"));
        let error = Cgroups::below(directory.path().to_owned()).unwrap_err();
        assert!(error.to_string().contains("other processes"), "{error}");
        assert!(!directory.path().join(OURS).exists());
        write("cgroup.procs", &format!("{own}\n"));
        let ours = Cgroups::below(directory.path().to_owned()).map(|_| directory.path().join(OURS)).unwrap();
        assert_eq!(fs::read_to_string(ours.join("cgroup.procs")).unwrap(), "0");
        // A later life finds itself there already.
        write("cgroup.procs", "");
        assert_eq!(Cgroups::below(ours).unwrap().parent, directory.path());
    }

    #[test]
    fn a_cgroup_goes_with_its_invoker() {
        // On a plain directory: which files are written, with what. The kernel's part is in `process.rs`.
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("cgroup.controllers"), "cpuset cpu io").unwrap();
        fs::write(directory.path().join("cgroup.subtree_control"), "").unwrap();
        let cgroups = Cgroups::below(directory.path().to_owned()).unwrap();
        let read = |file: &str| fs::read_to_string(directory.path().join(file)).unwrap();
        assert_eq!(read("cgroup.subtree_control"), "+cpu");
        let made = cgroups.make("auto-1", 0.25).unwrap();
        made.take_in(42).unwrap();
        assert_eq!(
            (read("thalweg-auto-1/cpu.max"), read("thalweg-auto-1/cgroup.procs")),
            ("25000 100000".to_owned(), "42".to_owned())
        );
        assert!(cgroups.make("auto-1", 0.25).is_err(), "ids never repeat");
    }
}

//! The file layer under the slabs: the real one, and for tests one that forgets what was not synced.

use std::{
    fs, io,
    io::IoSlice,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Files of one store. Names are flat.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Opens a file, creating it if it is not there.
    ///
    /// # Errors
    /// Those of the file system.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Removes a file; one that is not there is fine.
    ///
    /// # Errors
    /// Those of the file system.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Names of all files.
    ///
    /// # Errors
    /// Those of the file system.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes creations and removals of files survive power loss.
    ///
    /// # Errors
    /// Those of the file system; the caller must stop, since what was lost is unknown.
    fn sync_names(&self) -> io::Result<()>;
    /// Bytes that can still be written.
    ///
    /// # Errors
    /// Those of the file system.
    fn free(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

/// One open file.
pub trait DiskFile: Send + Sync + std::fmt::Debug {
    /// Reads exactly `bytes` from `offset` on; past the end is an error of kind `UnexpectedEof`.
    ///
    /// # Errors
    /// Those of the file system.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all `parts` one after another from `offset` on.
    ///
    /// # Errors
    /// Those of the file system; what reached the file is then unknown.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    /// Makes everything written so far survive power loss (`fdatasync`).
    ///
    /// # Errors
    /// Those of the file system; the caller must stop, since the kernel may call lost pages clean.
    fn sync(&self) -> io::Result<()>;
    /// Takes the room for the first `len` bytes, so that writing them never finds the disk full. The file's length
    /// stays what it is. File systems that cannot do so are no error.
    ///
    /// # Errors
    /// Those of the file system, of kind `StorageFull` when there is not enough.
    fn reserve(&self, _len: u64) -> io::Result<()> {
        Ok(())
    }
    /// Length in bytes.
    ///
    /// # Errors
    /// Those of the file system.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    ///
    /// # Errors
    /// Those of the file system.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// A directory of the file system.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// Opens `path`, creating it if needed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self(path.to_owned()))
    }
}

impl Disk for Directory {
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.0.join(name);
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.0.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.extend(entry.file_name().into_string().ok());
            }
        }
        Ok(names)
    }

    fn sync_names(&self) -> io::Result<()> {
        fs::File::open(&self.0)?.sync_all()
    }

    fn free(&self) -> io::Result<u64> {
        let usage = rustix::fs::statvfs(&self.0)?;
        Ok(usage.f_bavail.saturating_mul(usage.f_frsize))
    }
}

#[derive(Debug)]
struct RealFile(fs::File);

impl DiskFile for RealFile {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        // One pwritev in the usual case; the rest of a short write follows piece by piece.
        let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut written = rustix::io::pwritev(&self.0, &slices, offset)?;
        let mut at = offset;
        for part in parts {
            let done = written.min(part.len());
            written -= done;
            if done < part.len() {
                self.0.write_all_at(&part[done..], at + done as u64)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn reserve(&self, len: u64) -> io::Result<()> {
        use rustix::{fs::FallocateFlags, io::Errno};
        match rustix::fs::fallocate(&self.0, FallocateFlags::KEEP_SIZE, 0, len) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

#[cfg(feature = "testing")]
pub use forgetful::ForgetfulDisk;

/// A disk in memory that loses or tears un-synced writes when the power fails.
#[cfg(feature = "testing")]
mod forgetful {
    use std::{
        collections::BTreeMap,
        io,
        sync::{
            Arc, Mutex, PoisonError,
            atomic::{AtomicBool, AtomicU32, Ordering},
        },
    };

    use rand::{RngExt as _, rngs::StdRng};

    use super::{Disk, DiskFile};

    /// See the module.
    #[derive(Debug, Default)]
    pub struct ForgetfulDisk {
        files: Mutex<BTreeMap<String, Arc<MemoryFile>>>,
        /// Files that existed at the last `sync_names`.
        named: Mutex<Vec<String>>,
        faults: Arc<Faults>,
        /// Bytes that may still be reserved, if that is limited.
        room: Mutex<Option<u64>>,
    }

    #[derive(Debug, Default)]
    struct Faults {
        ignore_syncs: AtomicBool,
        /// Syncs until one fails; 0: none will.
        fail_sync: AtomicU32,
    }

    #[derive(Debug, Default)]
    struct MemoryFile {
        content: Mutex<Content>,
        faults: Arc<Faults>,
    }

    #[derive(Debug, Default, Clone)]
    struct Content {
        cached: Vec<u8>,
        synced: Vec<u8>,
        pending: Vec<(u64, Vec<u8>)>,
    }

    fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(data);
    }

    impl ForgetfulDisk {
        /// From now on `sync` returns without syncing: the mutation that tests must notice.
        pub fn ignore_syncs(&self) {
            self.faults.ignore_syncs.store(true, Ordering::SeqCst);
        }

        /// The `nth` sync of a file from now on fails (0: none does), and as in Linux the kernel then calls
        /// the file's pages clean: they are read as written until the power fails, and no later sync
        /// writes them.
        pub fn fail_sync(&self, nth: u32) {
            self.faults.fail_sync.store(nth, Ordering::SeqCst);
        }

        /// From now on only so many bytes are free.
        pub fn limit(&self, bytes: u64) {
            *lock(&self.room) = Some(bytes);
        }

        /// Cuts the power: every un-synced write is kept, lost, or torn at a 512-byte sector.
        pub fn power_loss(&self, rng: &mut StdRng) {
            let named = lock(&self.named).clone();
            let mut files = lock(&self.files);
            files.retain(|name, _| named.contains(name));
            for file in files.values() {
                let mut content = lock(&file.content);
                let mut bytes = content.synced.clone();
                for (offset, data) in std::mem::take(&mut content.pending) {
                    match rng.random_range(0..3) {
                        0 => apply(&mut bytes, offset, &data),
                        1 => {}
                        _ => {
                            let cut = rng.random_range(0..=data.len()) / 512 * 512;
                            apply(&mut bytes, offset, &data[..cut]);
                        }
                    }
                }
                *content = Content { cached: bytes.clone(), synced: bytes, pending: Vec::new() };
            }
        }

        /// Overwrites part of the newest write of a file, as a kill in the middle of it would leave it.
        pub fn tear_last_write(&self, name: &str, rng: &mut StdRng) {
            let Some(file) = lock(&self.files).get(name).cloned() else { return };
            let mut content = lock(&file.content);
            if let Some((offset, data)) = content.pending.last().cloned() {
                let cut = rng.random_range(0..data.len()) / 512 * 512;
                let garbage = vec![0xa5; data.len() - cut];
                apply(&mut content.cached, offset + cut as u64, &garbage);
            }
        }
    }

    impl Disk for ForgetfulDisk {
        fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
            let faults = self.faults.clone();
            let mut files = lock(&self.files);
            let file = files
                .entry(name.to_owned())
                .or_insert_with(|| Arc::new(MemoryFile { content: Mutex::default(), faults }));
            Ok(file.clone())
        }

        fn remove(&self, name: &str) -> io::Result<()> {
            lock(&self.files).remove(name);
            Ok(())
        }

        fn list(&self) -> io::Result<Vec<String>> {
            Ok(lock(&self.files).keys().cloned().collect())
        }

        fn sync_names(&self) -> io::Result<()> {
            if !self.faults.ignore_syncs.load(Ordering::SeqCst) {
                *lock(&self.named) = self.list()?;
            }
            Ok(())
        }

        fn free(&self) -> io::Result<u64> {
            Ok(lock(&self.room).unwrap_or(u64::MAX))
        }
    }

    impl DiskFile for MemoryFile {
        fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
            let content = lock(&self.content);
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let source =
                content.cached.get(start..start + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            bytes.copy_from_slice(source);
            Ok(())
        }

        fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
            let data = parts.concat();
            let mut content = lock(&self.content);
            apply(&mut content.cached, offset, &data);
            content.pending.push((offset, data));
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            let mut content = lock(&self.content);
            let count = |left: u32| left.checked_sub(1);
            if self.faults.fail_sync.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count) == Ok(1) {
                content.pending.clear();
                return Err(io::Error::other("the disk failed"));
            }
            if !self.faults.ignore_syncs.load(Ordering::SeqCst) {
                let Content { synced, pending, .. } = &mut *content;
                pending.drain(..).for_each(|(offset, data)| apply(synced, offset, &data));
            }
            Ok(())
        }

        fn len(&self) -> io::Result<u64> {
            Ok(lock(&self.content).cached.len() as u64)
        }
    }
}

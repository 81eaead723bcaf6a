//! The index: small records beside the slabs. Nothing in it is irreplaceable (rule P25): a store whose
//! index is deleted, or an older one, rebuilds it from the slabs.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thalweg_protocol::{FrameError, Incarnation, ShardIndex, StoreJob, frame};

/// The last copy of a shard that is known to survive power loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Durable {
    /// Its slot.
    pub slot: u32,
    /// The generation in the slot's header.
    pub generation: u64,
    /// The version it holds.
    pub version: u64,
}

/// A change of the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A job has a slab.
    Job(Box<StoreJob>),
    /// A job is gone, with all that belongs to it.
    Remove(Incarnation),
    /// A shard's durable pointer.
    Durable(Incarnation, ShardIndex, Durable),
    /// A file that is no slab was set aside, and why.
    Quarantine(String, String),
    /// Boot of the machine at which the store was opened last, and whether it was closed since.
    Opened {
        /// Boot id of the kernel.
        boot: String,
        /// Closed in order.
        clean: bool,
    },
}

/// All that the index knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexContents {
    /// Jobs with slabs.
    pub jobs: HashMap<Incarnation, StoreJob>,
    /// Durable pointers.
    pub durable: HashMap<(Incarnation, ShardIndex), Durable>,
    /// Files set aside.
    pub quarantine: HashMap<String, String>,
    /// As in [`Change::Opened`].
    pub opened: Option<(String, bool)>,
}

impl IndexContents {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Job(job) => {
                self.jobs.insert(job.incarnation, (**job).clone());
            }
            Change::Remove(job) => {
                self.jobs.remove(job);
                self.durable.retain(|(owner, _), _| owner != job);
            }
            Change::Durable(job, shard, durable) => {
                self.durable.insert((*job, *shard), *durable);
            }
            Change::Quarantine(file, reason) => {
                self.quarantine.insert(file.clone(), reason.clone());
            }
            Change::Opened { boot, clean } => self.opened = Some((boot.clone(), *clean)),
        }
    }
}

/// Where the index lives.
pub trait Index: Send + Sync + std::fmt::Debug {
    /// Reads everything.
    ///
    /// # Errors
    /// Those of the storage.
    fn load(&self) -> io::Result<IndexContents>;
    /// Applies all changes or none. Survives nothing until [`Index::sync`].
    ///
    /// # Errors
    /// Those of the storage.
    fn apply(&self, changes: &[Change]) -> io::Result<()>;
    /// Makes everything applied survive power loss.
    ///
    /// # Errors
    /// Those of the storage; the caller must stop.
    fn sync(&self) -> io::Result<()>;
}

/// The index in memory: the model of [`SledIndex`], with a power cut.
#[derive(Debug, Default)]
pub struct MemoryIndex {
    state: Mutex<(IndexContents, IndexContents)>,
}

impl MemoryIndex {
    /// Forgets what was not synced.
    pub fn power_loss(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = state.1.clone();
    }
}

impl Index for MemoryIndex {
    fn load(&self) -> io::Result<IndexContents> {
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner).0.clone())
    }

    fn apply(&self, changes: &[Change]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        changes.iter().for_each(|change| state.0.apply(change));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 = state.0.clone();
        Ok(())
    }
}

/// The index in sled. One key space with a letter per kind of record, so that a batch over all kinds
/// is one atomic write.
#[derive(Debug)]
pub struct SledIndex {
    db: sled::Db,
    path: PathBuf,
    /// Quarantined names already known, so that a restart does not count them twice.
    known: Mutex<HashSet<String>>,
}

const JOB: u8 = b'j';
const DURABLE: u8 = b'd';
const QUARANTINE: u8 = b'q';
const OPENED: &[u8] = b"opened";
/// sled's cache; the index of a 1 GiB model is about 100 KiB.
const CACHE_BYTES: u64 = 8 << 20;
/// How long to wait for the lock of an earlier owner: sled's threads hold it for a moment after the last
/// handle is dropped.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

impl SledIndex {
    /// Opens or creates the index in `path`.
    ///
    /// # Errors
    /// When another process has it open (the message says so), or the file system fails.
    pub fn open(path: &Path) -> io::Result<Self> {
        let config = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE_BYTES)
            // Our flush cycle decides when; sled's own timer would only add input and output.
            .flush_every_ms(None);
        let begun = Instant::now();
        let db = loop {
            match config.open() {
                Ok(db) => break db,
                Err(sled::Error::Io(error)) if is_lock(&error) => {
                    if begun.elapsed() > LOCK_PATIENCE {
                        let text = format!(
                            "{} is in use by another process: a data directory has one store",
                            path.display()
                        );
                        return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(io::Error::other(format!("{}: {error}", path.display()))),
            }
        };
        Ok(Self { db, path: path.to_owned(), known: Mutex::default() })
    }

    fn durable_key(job: Incarnation, shard: ShardIndex) -> Vec<u8> {
        [&[DURABLE], job.0.as_slice(), &shard.to_be_bytes()].concat()
    }
}

fn is_lock(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.to_string().contains("lock")
}

fn corrupt(key: &[u8]) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("index record {key:?} cannot be read"))
}

fn read<T: serde::de::DeserializeOwned>(key: &[u8], value: &[u8]) -> io::Result<T> {
    frame::open_record(&Bytes::copy_from_slice(value)).map_err(|error| match error {
        FrameError::WireVersion { .. } => {
            io::Error::new(io::ErrorKind::Unsupported, format!("the index: {error}"))
        }
        _ => corrupt(key),
    })
}

impl Index for SledIndex {
    fn load(&self) -> io::Result<IndexContents> {
        let mut contents = IndexContents::default();
        for entry in self.db.iter() {
            let (key, value) = entry.map_err(io::Error::from)?;
            if key.as_ref() == OPENED {
                contents.opened = Some(read(&key, &value)?);
                continue;
            }
            match (key.first(), key.get(1..)) {
                (Some(&JOB), Some(_)) => {
                    let job: StoreJob = read(&key, &value)?;
                    contents.jobs.insert(job.incarnation, job);
                }
                (Some(&DURABLE), Some(rest)) if rest.len() == 20 => {
                    let job = Incarnation(rest[..16].try_into().map_err(|_| corrupt(&key))?);
                    let shard = u32::from_be_bytes(rest[16..].try_into().map_err(|_| corrupt(&key))?);
                    contents.durable.insert((job, shard), read(&key, &value)?);
                }
                (Some(&QUARANTINE), Some(rest)) => {
                    let name = String::from_utf8_lossy(rest).into_owned();
                    self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
                    contents.quarantine.insert(name, read(&key, &value)?);
                }
                _ => return Err(corrupt(&key)),
            }
        }
        Ok(contents)
    }

    fn apply(&self, changes: &[Change]) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for change in changes {
            match change {
                Change::Job(job) => {
                    let key = [&[JOB], job.incarnation.0.as_slice()].concat();
                    batch.insert(key, frame::seal_record(&**job).as_ref());
                }
                Change::Remove(job) => {
                    batch.remove([&[JOB], job.0.as_slice()].concat());
                    for key in self.db.scan_prefix([&[DURABLE], job.0.as_slice()].concat()).keys() {
                        batch.remove(key.map_err(io::Error::from)?);
                    }
                }
                Change::Durable(job, shard, durable) => {
                    batch.insert(Self::durable_key(*job, *shard), frame::seal_record(durable).as_ref());
                }
                Change::Quarantine(file, reason) => {
                    if self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(file.clone()) {
                        let key = [&[QUARANTINE], file.as_bytes()].concat();
                        batch.insert(key, frame::seal_record(reason).as_ref());
                    }
                }
                Change::Opened { boot, clean } => {
                    batch.insert(OPENED, frame::seal_record(&(boot, clean)).as_ref());
                }
            }
        }
        self.db.apply_batch(batch).map_err(io::Error::from)
    }

    fn sync(&self) -> io::Result<()> {
        self.db.flush().map_err(io::Error::from)?;
        // sled's own flush is sync_file_range on Linux, which reaches no platter.
        fs::File::open(self.path.join("db"))?.sync_data()
    }
}

//! Snapshots to and from safetensors files (the format stands in [`thalweg_protocol::snapshot`]).

use std::{
    fs::File,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use half::{bf16, f16};
use thalweg_protocol::{
    ApiReply, ApiRequest, Dtype, ErrorCode, Incarnation, Init, JobKey, JobRecord, JobSpec, ShardIndex,
    StoreReply, StoreRequest, TensorSpec, Version, WireError, offsets,
    snapshot::{self, Contents, FileTensor, MAX_HEADER_BYTES},
};

use crate::{
    Client, Error, Job,
    client::{Patience, unexpected},
    driver::ask_store,
};

/// Shards on their way at once.
const AT_ONCE: usize = 4;

/// How a snapshot is taken.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    /// Leave the optimizer slots out: smaller, but training from it starts with fresh ones. Default false.
    pub parameters_only: bool,
    /// Longest wait for a round to end on all shards, and for answers. Default 5 minutes.
    pub timeout: Duration,
    /// Bytes a second to read at most, so that training is not held up; 0 for as fast as it goes. Default
    /// 128 MiB/s.
    pub bytes_per_s: u64,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self { parameters_only: false, timeout: Duration::from_secs(300), bytes_per_s: 128 << 20 }
    }
}

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Which job.
    pub key: JobKey,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// The last round that it contains, on all shards alike.
    pub version: Version,
    /// Size of the file.
    pub bytes: u64,
}

/// How a job is restored.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// Another name than that of the job that the snapshot was taken of.
    pub key: Option<JobKey>,
    /// Take the place of the job that has this name, whose state is then lost. Without it a name that is in use is
    /// refused.
    pub replace: bool,
    /// What to create; by default what the snapshot says of itself. A file that is no snapshot of Thalweg's needs
    /// it; its tensors then have to be in the file, under the same names.
    pub job: Option<Job>,
    /// Longest wait for answers. Default 5 minutes.
    pub timeout: Option<Duration>,
}

fn failed(path: &Path, error: &std::io::Error) -> Error {
    Error::File { path: path.display().to_string(), reason: error.to_string(), kind: error.kind() }
}

/// A file that goes with this, unless it got its name.
#[derive(Debug)]
struct Partial(Option<PathBuf>);

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // What cannot be removed shows by its name that it is not whole.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Runs file work off the async threads.
async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| failed(path, &error.into()))?.map_err(|error| failed(path, &error))
}

fn read_contents(file: &File) -> std::io::Result<Contents> {
    let invalid = |text: String| std::io::Error::new(std::io::ErrorKind::InvalidData, text);
    let len = file.metadata()?.len();
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0)
        .map_err(|_| invalid("no safetensors file: under 8 bytes".to_owned()))?;
    let header = u64::from_le_bytes(prefix);
    if header > MAX_HEADER_BYTES || header + 8 > len {
        return Err(invalid(format!("no safetensors file: a header of {header} bytes in {len}")));
    }
    let mut text = vec![0; usize::try_from(header).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut text, 8)?;
    let contents = Contents::read(&text).map_err(|error| invalid(error.message))?;
    let end = contents.tensors.iter().chain(contents.slots.values()).map(|tensor| tensor.bytes.end).max();
    match end {
        Some(end) if end > len => Err(invalid(format!("cut off: {len} bytes of {end}"))),
        _ => Ok(contents),
    }
}

/// The tensors of a safetensors file, to describe a job that starts from it.
///
/// # Errors
/// [`Error::File`].
pub fn model_of(path: &Path) -> Result<Vec<TensorSpec>, Error> {
    let file = File::open(path).map_err(|error| failed(path, &error))?;
    let contents = read_contents(&file).map_err(|error| failed(path, &error))?;
    Ok(contents.tensors.into_iter().map(|tensor| TensorSpec { dtype: Dtype::F32, ..tensor.spec }).collect())
}

/// Elements `from..to` of a tensor as little-endian f32.
fn read_elements(file: &File, tensor: &FileTensor, from: u64, to: u64) -> std::io::Result<Vec<u8>> {
    let width = match tensor.spec.dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        Dtype::F64 => 8,
    };
    let mut bytes = vec![0; usize::try_from((to - from) * width).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, tensor.bytes.start + from * width)?;
    let halves = |bytes: &[u8], wide: fn(u16) -> f32| {
        let values = bytes.as_chunks::<2>().0.iter().map(|half| wide(u16::from_le_bytes(*half)));
        values.flat_map(f32::to_le_bytes).collect()
    };
    Ok(match tensor.spec.dtype {
        Dtype::F32 => bytes,
        Dtype::F16 => halves(&bytes, |bits| f16::from_bits(bits).to_f32()),
        Dtype::BF16 => halves(&bytes, |bits| bf16::from_bits(bits).to_f32()),
        // The one lossy conversion: everything is aggregated in f32.
        Dtype::F64 => {
            let values = bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32);
            values.flat_map(f32::to_le_bytes).collect()
        }
    })
}

/// A file's tensors in the order of a job, with its slots where it has all of them.
#[derive(Debug)]
struct Source {
    file: File,
    /// By section: parameters, then each slot.
    sections: Vec<Vec<FileTensor>>,
    starts: Vec<u64>,
}

impl Source {
    fn new(file: File, contents: &Contents, record: &JobRecord) -> Result<Self, WireError> {
        let malformed = |text: String| WireError::new(ErrorCode::WrongShape, text);
        let mut sections = vec![Vec::new()];
        for tensor in &record.spec.tensors {
            let found = contents.tensors.iter().find(|found| found.spec.name == tensor.name);
            let Some(found) = found else {
                return Err(malformed(format!("the file has no tensor {:?}", tensor.name)));
            };
            if found.spec.shape != tensor.shape {
                let text = format!(
                    "tensor {:?} is {:?} in the file and {:?} in the job",
                    tensor.name, found.spec.shape, tensor.shape
                );
                return Err(malformed(text));
            }
            sections[0].push(found.clone());
        }
        if contents.slots() >= record.slots {
            for slot in 0..record.slots {
                let of = |tensor: &TensorSpec| contents.slots.get(&(slot, tensor.name.clone())).cloned();
                sections.push(record.spec.tensors.iter().filter_map(of).collect());
            }
        }
        Ok(Self { file, sections, starts: offsets(&record.spec.tensors) })
    }

    /// What is uploaded of a shard: its parameters, and its slots if the file has them.
    fn shard(&self, record: &JobRecord, shard: ShardIndex) -> std::io::Result<Vec<u8>> {
        let bounds = record.layout.range(shard);
        let first = self.starts.partition_point(|start| *start <= bounds.start) - 1;
        let mut bytes = Vec::new();
        for section in &self.sections {
            for (tensor, range) in section.iter().zip(self.starts.windows(2)).skip(first) {
                if range[0] >= bounds.end {
                    break;
                }
                let (from, to) = (bounds.start.max(range[0]), bounds.end.min(range[1]));
                bytes.extend(read_elements(&self.file, tensor, from - range[0], to - range[0])?);
            }
        }
        Ok(bytes)
    }
}

/// Sleeps as long as `bytes` since `start` are ahead of the rate.
async fn pace(start: Instant, bytes: u64, bytes_per_s: u64) {
    if bytes_per_s > 0 {
        let due = Duration::from_secs_f64(bytes as f64 / bytes_per_s as f64);
        tokio::time::sleep(due.saturating_sub(start.elapsed())).await;
    }
}

impl Client {
    /// Writes a job's state at one version to a safetensors file, while rounds go on: the version of the shard that
    /// is furthest, once all have come there. The file appears under its name when it is complete and on disk.
    ///
    /// `progress` hears of bytes done and of all.
    ///
    /// Cancelled, it leaves nothing; killed, a file that ends in `.partial`, which nothing reads.
    ///
    /// # Errors
    /// `not_ready` for a job without parameters; `expired` when the store was restarted meanwhile: begin again;
    /// [`Error::TimedOut`] when the round does not end; [`Error::File`].
    pub async fn snapshot(
        &self,
        key: &JobKey,
        path: &Path,
        options: &SnapshotOptions,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Snapshot, Error> {
        if path.is_dir() {
            return Err(failed(path, &std::io::ErrorKind::IsADirectory.into()));
        }
        let (mut record, _) = self.job(key).await?;
        let (job, hold) = (record.incarnation, Incarnation::random());
        let mut patience = Patience::new(options.timeout);
        let version = loop {
            let query = StoreRequest::Hold { job, hold };
            match ask_store(self.nats(), &record, query, &[]).await {
                Ok((StoreReply::Held { version, complete: true }, _)) => break version,
                Ok(_) => patience.wait("the round to end on all shards", "is the job training?").await?,
                Err(error) if error.is_retryable() && error.code != ErrorCode::NotReady => {
                    patience.wait("the store", &error.message).await?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        // Settings may have changed since the record was read.
        record = self.job(key).await?.0;
        if options.parameters_only {
            record.slots = 0;
        }
        let header = snapshot::header(&record, version)?;
        let (data, sections) = (header.len() as u64, 1 + u64::from(record.slots));
        let section_bytes = 4 * record.layout.elements;
        let total = data + sections * section_bytes;
        // Of its own, should two write to one name at once: the last one wins, and each is whole.
        let partial = PathBuf::from(format!("{}.{hold}.partial", path.display()));
        let mut guard = Partial(Some(partial.clone()));
        let target = partial.clone();
        let file = blocking(path, move || {
            let mut file = File::create(target)?;
            file.write_all(&header)?;
            Ok(Arc::new(file))
        })
        .await?;
        let (start, mut done) = (Instant::now(), 0);
        let record = Arc::new(record);
        let mut shards = futures::stream::iter(0..record.layout.shards())
            .map(|shard| self.held_shard(&record, hold, shard, options.timeout))
            .buffered(AT_ONCE);
        while let Some((shard, values)) = shards.try_next().await? {
            done += values.len() as u64;
            let (file, bounds) = (file.clone(), record.layout.range(shard));
            blocking(path, move || {
                let len = usize::try_from(4 * (bounds.end - bounds.start)).unwrap_or(usize::MAX);
                for (section, values) in (0..sections).zip(values.chunks(len)) {
                    file.write_all_at(values, data + section * section_bytes + 4 * bounds.start)?;
                }
                Ok(())
            })
            .await?;
            progress(data + done, total);
            pace(start, done, options.bytes_per_s).await;
        }
        drop(shards);
        let target = path.to_owned();
        blocking(path, move || {
            file.sync_all()?;
            std::fs::rename(&partial, &target)?;
            let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        })
        .await?;
        guard.0 = None;
        // Forgotten by itself soon, if this does not arrive.
        let _ = ask_store(self.nats(), &record, StoreRequest::Release { job, hold }, &[]).await;
        Ok(Snapshot { key: key.clone(), incarnation: job, version, bytes: total })
    }

    async fn held_shard(
        &self,
        record: &JobRecord,
        hold: Incarnation,
        shard: ShardIndex,
        timeout: Duration,
    ) -> Result<(ShardIndex, Bytes), Error> {
        let mut patience = Patience::new(timeout);
        loop {
            let job = record.incarnation;
            let query = StoreRequest::FetchHeld { job, hold, shard, slots: record.slots > 0 };
            match ask_store(self.nats(), record, query, &[]).await {
                Ok((StoreReply::State(..), values)) => return Ok((shard, values)),
                Ok(_) => {
                    return Err(WireError::new(ErrorCode::Malformed, "the store gave no shard").into());
                }
                Err(error) if error.is_retryable() => patience.wait("the store", &error.message).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Creates a job from a safetensors file: the job that a snapshot was taken of, in a new life that goes on after
    /// the snapshot's version; or any job whose tensors are in the file, from version 0. f16, bf16 and f64 become
    /// f32. Workers join it as ever.
    ///
    /// `progress` hears of shards done and of all.
    ///
    /// Safe to cancel: the job then waits for its parameters; restore it again with `replace`, or delete it.
    ///
    /// # Errors
    /// `spec_mismatch` when the name is in use; `wrong_shape` when the file does not have the job's tensors;
    /// [`Error::File`].
    pub async fn restore(
        &self,
        path: &Path,
        options: RestoreOptions,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<JobRecord, Error> {
        let opened = path.to_owned();
        let (file, contents) = blocking(path, move || {
            let file = File::open(opened)?;
            let contents = read_contents(&file)?;
            Ok((file, contents))
        })
        .await?;
        let (mut spec, function, version) = describe(path, &options, &contents)?;
        if let Some(key) = options.key {
            spec.key = key;
        }
        let mut patience = Patience::new(options.timeout.unwrap_or(Duration::from_secs(300)));
        let replaces = match self.job(&spec.key).await {
            Ok((known, _)) if options.replace => Some(known.incarnation),
            Err(error) if error.code() != Some(ErrorCode::UnknownJob) => return Err(error),
            _ => None,
        };
        let upload = Incarnation::random();
        let query = ApiRequest::Restore { spec: Box::new(spec), function, upload, version, replaces };
        let record = match self.ask(&query, &mut patience).await? {
            ApiReply::Job(record, _) => *record,
            other => return Err(unexpected(&other)),
        };
        let source = Arc::new(Source::new(file, &contents, &record)?);
        let (job, shards) = (record.incarnation, record.layout.shards());
        for shard in 0..shards {
            let (from, of) = (source.clone(), record.clone());
            let bytes = blocking(path, move || from.shard(&of, shard)).await?;
            loop {
                let query = StoreRequest::Upload { job, upload, shard };
                match ask_store(self.nats(), &record, query, &bytes).await {
                    Ok(_) => break,
                    Err(error) if error.is_retryable() => patience.wait("the store", &error.message).await?,
                    Err(error) => return Err(error.into()),
                }
            }
            progress(u64::from(shard) + 1, u64::from(shards));
        }
        let query = ApiRequest::Activate { key: record.spec.key.clone(), job, upload };
        self.ask(&query, &mut patience).await?;
        Ok(self.job(&record.spec.key).await?.0)
    }
}

type Described = (JobSpec, Option<thalweg_protocol::FunctionSpec>, Version);

/// What to create from a file.
fn describe(path: &Path, options: &RestoreOptions, contents: &Contents) -> Result<Described, Error> {
    match (&options.job, &contents.job) {
        (Some(job), known) => {
            let spec = JobSpec { init: Init::Upload, ..job.spec()? };
            // Another function, another history: only the same one can go on with its rounds.
            let version = known.as_ref().filter(|(known, ..)| known.function.name == spec.function.name);
            Ok((spec, None, version.map_or(0, |(.., version)| *version)))
        }
        (None, Some((spec, function, version))) => Ok((spec.clone(), Some(function.clone()), *version)),
        (None, None) => {
            let text = "no snapshot of Thalweg's: say which job to create from it (function, workers)";
            Err(failed(path, &std::io::Error::new(std::io::ErrorKind::InvalidData, text)))
        }
    }
}

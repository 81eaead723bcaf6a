//! Snapshots: a job's parameters and optimizer slots at one version, as a safetensors file.
//!
//! The tensors keep their names; slot `k` of tensor `t` is `thalweg.slot.<k>/<t>`. The data of all tensors follow
//! each other in the job's order, then slot 0 of all tensors, and so on, so that element `e` of the flattened
//! vector (of slot `k`) lies at a place that follows from its number. The file's metadata say which job it was and
//! with which settings, so that it can be restored from the file alone; other programs read the tensors and need
//! not know that.

use std::{collections::HashMap, ops::Range};

use safetensors::{
    Dtype as FileDtype,
    tensor::{Metadata, TensorInfo},
};

use crate::{Dtype, ErrorCode, FunctionSpec, JobRecord, JobSpec, TensorSpec, Version, WireError};

/// Value of `format` in the metadata.
const FORMAT: &str = "thalweg.snapshot/1";
/// Longest header that is read, bytes: the limit of the safetensors library.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

fn slot_name(slot: u32, tensor: &str) -> String {
    format!("thalweg.slot.{slot}/{tensor}")
}

/// The beginning of a snapshot file: everything before the data, whose
/// `4 * (1 + slots) * elements` bytes follow.
///
/// # Errors
/// `invalid_spec` when a tensor is called like a slot of another one.
pub fn header(record: &JobRecord, version: Version) -> Result<Vec<u8>, WireError> {
    let mut tensors = Vec::new();
    let mut offset = 0_usize;
    for section in 0..=record.slots {
        for tensor in &record.spec.tensors {
            let bytes = usize::try_from(tensor.elements().unwrap_or(0) * 4).unwrap_or(usize::MAX);
            let name = match section.checked_sub(1) {
                None => tensor.name.clone(),
                Some(slot) => slot_name(slot, &tensor.name),
            };
            let shape = tensor.shape.iter().map(|&dim| usize::try_from(dim).unwrap_or(usize::MAX)).collect();
            let data_offsets = (offset, offset + bytes);
            tensors.push((name, TensorInfo { dtype: FileDtype::F32, shape, data_offsets }));
            offset += bytes;
        }
    }
    let settings = record.settings_of(version + 1);
    let json = |value: Result<String, serde_json::Error>| value.unwrap_or_default();
    let metadata = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("tenant".to_owned(), record.spec.key.tenant.to_string()),
        ("job".to_owned(), record.spec.key.job.to_string()),
        ("incarnation".to_owned(), record.incarnation.to_string()),
        ("version".to_owned(), version.to_string()),
        ("spec".to_owned(), json(serde_json::to_string(&record.spec))),
        ("function".to_owned(), json(serde_json::to_string(&settings.function))),
    ]);
    let described = Metadata::new(Some(metadata), tensors).map_err(|error| {
        WireError::new(ErrorCode::InvalidSpec, format!("not a safetensors file: {error}"))
    })?;
    let mut text = json(serde_json::to_string(&described)).into_bytes();
    // Data begin at a multiple of 8; the format pads with spaces.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok(header)
}

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// Name, shape and element type.
    pub spec: TensorSpec,
    /// Where its data are, from the beginning of the file.
    pub bytes: Range<u64>,
}

/// What a safetensors file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// Tensors, slots apart, in the order of their data.
    pub tensors: Vec<FileTensor>,
    /// Slots by number and by name of their tensor.
    pub slots: HashMap<(u32, String), FileTensor>,
    /// The job that it was taken of, with the settings that its next round would have had, and its version; `None`
    /// for files of others.
    pub job: Option<(JobSpec, FunctionSpec, Version)>,
}

impl Contents {
    /// Number of optimizer slots that every tensor has.
    #[must_use]
    pub fn slots(&self) -> u32 {
        let all = |slot: u32| {
            self.tensors.iter().all(|tensor| self.slots.contains_key(&(slot, tensor.spec.name.clone())))
        };
        (0..).take_while(|slot| all(*slot) && !self.tensors.is_empty()).last().map_or(0, |last| last + 1)
    }

    /// Reads the header of a file: `text` are the bytes behind its length, which is the file's first 8 bytes,
    /// little endian.
    ///
    /// # Errors
    /// `malformed` when it is no safetensors file, or its metadata make no sense.
    pub fn read(text: &[u8]) -> Result<Self, WireError> {
        let malformed = |text: String| WireError::new(ErrorCode::Malformed, text);
        let metadata: Metadata = serde_json::from_slice(text)
            .map_err(|error| malformed(format!("the header is not that of a safetensors file: {error}")))?;
        let data = 8 + text.len() as u64;
        let mut contents = Self::default();
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let dtype = match info.dtype {
                FileDtype::F32 => Dtype::F32,
                FileDtype::F16 => Dtype::F16,
                FileDtype::BF16 => Dtype::BF16,
                FileDtype::F64 => Dtype::F64,
                other => {
                    let text = format!("tensor {name:?} is {other:?}; f32, f16, bf16 and f64 can be read");
                    return Err(WireError::new(ErrorCode::WrongDtype, text));
                }
            };
            let shape = info.shape.iter().map(|&dim| dim as u64).collect();
            let (start, end) = info.data_offsets;
            let bytes = data + start as u64..data + end as u64;
            let slot = name.strip_prefix("thalweg.slot.").and_then(|rest| rest.split_once('/'));
            match slot.and_then(|(slot, tensor)| Some((slot.parse::<u32>().ok()?, tensor.to_owned()))) {
                Some((slot, tensor)) => {
                    let spec = TensorSpec { name: tensor.clone(), shape, dtype };
                    contents.slots.insert((slot, tensor), FileTensor { spec, bytes });
                }
                None => {
                    let spec = TensorSpec { name, shape, dtype };
                    contents.tensors.push(FileTensor { spec, bytes });
                }
            }
        }
        let about = metadata.metadata().clone().unwrap_or_default();
        if let Some(format) = about.get("format").filter(|format| format.starts_with("thalweg.snapshot/")) {
            if format != FORMAT {
                let text = format!("a snapshot of format {format:?}; this release reads {FORMAT:?}");
                return Err(malformed(text));
            }
            let field = |name: &str| {
                about.get(name).ok_or_else(|| malformed(format!("the snapshot's metadata lack {name:?}")))
            };
            let no_json = |error: serde_json::Error| malformed(format!("the snapshot's metadata: {error}"));
            contents.job = Some((
                serde_json::from_str(field("spec")?).map_err(no_json)?,
                serde_json::from_str(field("function")?).map_err(no_json)?,
                field("version")?.parse().map_err(|_| malformed("the snapshot's version".to_owned()))?,
            ));
        }
        Ok(contents)
    }
}

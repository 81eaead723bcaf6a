//! What a job is: its model, its function, its mode and its guarantees.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct as _};

use crate::{ErrorCode, JobKey, Name, Round, Schedule, WireError, limits};

/// Element type of a tensor. Only [`Dtype::F32`] is aggregated today.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE 754 binary32, little endian on the wire.
    F32,
    /// IEEE 754 binary64; refused with [`ErrorCode::WrongDtype`].
    F64,
    /// IEEE 754 binary16; refused with [`ErrorCode::WrongDtype`].
    F16,
    /// bfloat16; refused with [`ErrorCode::WrongDtype`].
    BF16,
}

/// One named tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Unique within the job, at most [`limits::MAX_TENSOR_NAME_BYTES`].
    pub name: String,
    /// Dimensions, outermost first. `[]` is a scalar of one element.
    pub shape: Vec<u64>,
    /// Element type.
    pub dtype: Dtype,
}

impl TensorSpec {
    /// An f32 tensor.
    #[must_use]
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<u64>>) -> Self {
        Self { name: name.into(), shape: shape.into(), dtype: Dtype::F32 }
    }

    /// Number of elements, or `None` when it overflows.
    #[must_use]
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim))
    }
}

/// One setting of an aggregation function.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum Setting {
    /// A switch, such as `nesterov`.
    Flag(bool),
    /// A number, such as `lr`.
    Number(f64),
}

/// Settings of an aggregation function by name; names a function does not know are refused.
pub type Settings = BTreeMap<String, Setting>;

/// Settings that apply to some tensors only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Names of the tensors in this group; a tensor is in at most one.
    pub tensors: Vec<String>,
    /// What differs from the function's own settings.
    pub settings: Settings,
}

/// Which aggregation function a job runs, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct FunctionSpec {
    /// `sum`, `mean`, `weighted_mean`, `sgd`, `adam`, `adamw`, `adagrad` or `lion`.
    pub name: String,
    /// Settings of all tensors.
    #[serde(default)]
    pub settings: Settings,
    /// Settings of some tensors.
    #[serde(default)]
    pub groups: Vec<ParameterGroup>,
    /// How `lr` changes from round to round, that of groups included; `None` leaves it as it is. Last and left out
    /// when there is none: then the bytes are those of releases that knew no schedules, which refuse what has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
}

impl FunctionSpec {
    /// A function without settings.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), settings: Settings::new(), groups: Vec::new(), schedule: None }
    }

    /// Adds or replaces a number.
    #[must_use]
    pub fn number(mut self, name: &str, value: f64) -> Self {
        self.settings.insert(name.to_owned(), Setting::Number(value));
        self
    }

    /// Adds or replaces a switch.
    #[must_use]
    pub fn flag(mut self, name: &str, value: bool) -> Self {
        self.settings.insert(name.to_owned(), Setting::Flag(value));
        self
    }

    /// Sets or replaces how `lr` changes from round to round.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = Some(schedule);
        self
    }
}

/// Settings from one round on (they never change within a round).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SettingsRevision {
    /// 0 for the settings of job creation, then counting up.
    pub revision: u32,
    /// First round that uses them.
    pub from_round: Round,
    /// The function with these settings.
    pub function: FunctionSpec,
}

/// When contributions are applied. Only [`Mode::Sync`] exists today.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Rounds with a quorum.
    Sync,
}

/// What a commit has survived by the time anybody sees it (rule P2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The kill of any or all processes.
    Process,
    /// Power loss.
    Disk,
}

impl std::fmt::Display for Durability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Process => "process",
            Self::Disk => "disk",
        })
    }
}

/// What happens to a contribution with a NaN or an infinity (rule P8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// Folded like any number; every worker sees the NaN, as with an all-reduce.
    Propagate,
    /// The contribution becomes void: present, adds nothing.
    Void,
    /// The job fails with [`ErrorCode::NonFinite`].
    Fail,
}

/// Where a job's version 0 comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// All zeros, for functions that keep no parameters (`sum`, `mean`).
    Zeros,
    /// Uploaded by rank 0, then activated by one compare-and-swap.
    Upload,
}

/// All that a job is created with. Opening a job again with another spec is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Whose job, and its name.
    pub key: JobKey,
    /// The model: tensors in canonical order.
    pub tensors: Vec<TensorSpec>,
    /// The aggregation function.
    pub function: FunctionSpec,
    /// When contributions are applied.
    pub mode: Mode,
    /// Founding members: round 1 waits for this many.
    pub workers: u32,
    /// Contributions that close a round once `deadline_ms` has passed; `None` waits for all.
    pub quorum: Option<u32>,
    /// Time from a round's first contribution to its close below the full roster, milliseconds.
    pub deadline_ms: u64,
    /// What a commit survives.
    pub durability: Durability,
    /// Policy for NaN and infinities.
    pub non_finite: NonFinite,
    /// Origin of version 0.
    pub init: Init,
    /// Wanted shard size, bytes of f32; a multiple of 4.
    pub shard_bytes: u32,
    /// Most ranks the job may ever have; bounds its ledgers.
    pub max_members: u32,
    /// What happens around its rounds.
    #[serde(default, skip_serializing_if = "Policy::is_default")]
    pub policy: Policy,
}

/// What happens to a job `process` whose rounds were lost with the power (rule P27).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// It fails with [`ErrorCode::Diverged`].
    #[default]
    Fail,
    /// A new life goes on from the newest version that all shards still have; its workers join again.
    RollBack,
    /// A new life waits for the parameters of a worker that joins again.
    Reseed,
}

/// In which order a round's contributions are folded. The bits of the result depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum FoldOrder {
    /// By rank, so that runs with the same contributions give the same bits. What comes before its turn waits in the
    /// queue.
    #[default]
    Rank,
    /// As they come; the ledger records the order. For rounds of thousands, or of hours.
    Arrival,
}

/// What happens around a job's rounds, and who serves it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Time without any member after which the job is deleted, milliseconds; `None` for never.
    pub ttl_ms: Option<u64>,
    /// What happens when state is lost.
    pub on_loss: OnLoss,
    /// In which order a round's contributions are folded.
    pub order: FoldOrder,
    /// The pool of invokers that serves it; `None` for the shared one.
    pub pool: Option<Name>,
}

/// Trailing fields are left out where they and all after them have their defaults: then the bytes are those of releases
/// that did not know them.
impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ordered = self.pool.is_some() || self.order != FoldOrder::default();
        let fields = 2 + usize::from(ordered) + usize::from(self.pool.is_some());
        let mut out = serializer.serialize_struct("Policy", fields)?;
        out.serialize_field("ttl_ms", &self.ttl_ms)?;
        out.serialize_field("on_loss", &self.on_loss)?;
        if ordered {
            out.serialize_field("order", &self.order)?;
        }
        if self.pool.is_some() {
            out.serialize_field("pool", &self.pool)?;
        }
        out.end()
    }
}

impl Policy {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl JobSpec {
    /// Checks everything that needs no knowledge of functions or of the server.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidSpec`], [`ErrorCode::WrongDtype`] or [`ErrorCode::Limit`], naming the
    /// field and what would be accepted.
    pub fn validate(&self) -> Result<(), WireError> {
        let invalid = |text: String| Err(WireError::new(ErrorCode::InvalidSpec, text));
        let limit = |text: String| Err(WireError::new(ErrorCode::Limit, text));
        if self.tensors.is_empty() {
            return invalid("a job needs at least one tensor".into());
        }
        if self.tensors.len() > limits::MAX_TENSORS {
            return limit(format!("{} tensors; at most {}", self.tensors.len(), limits::MAX_TENSORS));
        }
        let mut names = std::collections::HashSet::new();
        let mut total = 0_u64;
        for tensor in &self.tensors {
            if tensor.name.is_empty() || tensor.name.len() > limits::MAX_TENSOR_NAME_BYTES {
                return limit(format!(
                    "tensor name of {} bytes, not 1 to {}: {:?}",
                    tensor.name.len(),
                    limits::MAX_TENSOR_NAME_BYTES,
                    tensor.name
                ));
            }
            if !names.insert(tensor.name.as_str()) {
                return invalid(format!("two tensors are called {:?}", tensor.name));
            }
            if tensor.dtype != Dtype::F32 {
                return Err(WireError::new(
                    ErrorCode::WrongDtype,
                    format!(
                        "tensor {:?} is {:?}; only f32 is aggregated: convert it first",
                        tensor.name, tensor.dtype
                    ),
                ));
            }
            if tensor.shape.len() > limits::MAX_DIMS {
                return limit(format!("tensor {:?}: at most {} dimensions", tensor.name, limits::MAX_DIMS));
            }
            total = match tensor.elements().filter(|&n| n <= limits::MAX_ELEMENTS) {
                None => {
                    return limit(format!(
                        "tensor {:?} has over {} elements",
                        tensor.name,
                        limits::MAX_ELEMENTS
                    ));
                }
                Some(0) => {
                    return invalid(format!(
                        "tensor {:?} is empty (a dimension is 0): leave it out",
                        tensor.name
                    ));
                }
                // At most MAX_TENSORS * MAX_ELEMENTS = 2^56: cannot overflow.
                Some(elements) => total + elements,
            };
        }
        if total > limits::MAX_ELEMENTS {
            return limit(format!("the model has {total} elements; at most {}", limits::MAX_ELEMENTS));
        }
        if self.shard_bytes < limits::MIN_SHARD_BYTES || !self.shard_bytes.is_multiple_of(4) {
            return invalid(format!(
                "shard_bytes {}: a multiple of 4, at least {}",
                self.shard_bytes,
                limits::MIN_SHARD_BYTES
            ));
        }
        if total.div_ceil(u64::from(self.shard_bytes / 4)) > limits::MAX_SHARDS {
            return limit(format!("more than {} shards: raise shard_bytes", limits::MAX_SHARDS));
        }
        if self.max_members == 0 || self.max_members > limits::MAX_MEMBERS {
            return limit(format!("max_members {}: 1 to {}", self.max_members, limits::MAX_MEMBERS));
        }
        if self.workers == 0 || self.workers > self.max_members {
            return invalid(format!("workers {}: 1 to max_members ({})", self.workers, self.max_members));
        }
        if let Some(quorum) = self.quorum {
            if quorum == 0 || quorum > self.workers {
                return invalid(format!("quorum {quorum}: 1 to workers ({})", self.workers));
            }
            if self.deadline_ms == 0 || self.deadline_ms > limits::MAX_DEADLINE_MS {
                return invalid(format!(
                    "deadline_ms {}: 1 to {}",
                    self.deadline_ms,
                    limits::MAX_DEADLINE_MS
                ));
            }
        }
        if self.policy.ttl_ms == Some(0) {
            return invalid("policy.ttl_ms 0: leave it out for a job that nobody deletes but you".into());
        }
        if self.function.groups.len() > limits::MAX_GROUPS {
            return limit(format!(
                "{} parameter groups; at most {}",
                self.function.groups.len(),
                limits::MAX_GROUPS
            ));
        }
        let mut grouped = std::collections::HashSet::new();
        for name in self.function.groups.iter().flat_map(|group| &group.tensors) {
            if !names.contains(name.as_str()) {
                return invalid(format!("a parameter group names what is no tensor of the job: {name:?}"));
            }
            if !grouped.insert(name.as_str()) {
                return invalid(format!("tensor {name:?} is in two parameter groups"));
            }
        }
        Ok(())
    }
}

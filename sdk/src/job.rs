//! Describing a job.

use thalweg_protocol::{
    Dtype, Durability, FoldOrder, FunctionSpec, Init, JobKey, JobSpec, Mode, Name, NonFinite, OnLoss,
    ParameterGroup, Policy, TensorSpec, limits,
};

use crate::Error;

/// Description of a job, the same in all of its workers; the first to come creates it.
///
/// Defaults: function `mean`, 1 worker, no quorum (every round waits for every worker), durability
/// `process`, shards of 512 KiB, tenant `default`.
#[derive(Clone, Debug)]
pub struct Job {
    spec: JobSpec,
    non_finite: Option<NonFinite>,
}

impl Job {
    /// A job of the tenant `default`.
    ///
    /// # Errors
    /// When `name` is not 1 to 64 of `a-z 0-9 - _`.
    pub fn new(name: &str) -> Result<Self, Error> {
        Self::of_tenant("default", name)
    }

    /// A job of some tenant.
    ///
    /// # Errors
    /// As [`Job::new`], for either name.
    pub fn of_tenant(tenant: &str, name: &str) -> Result<Self, Error> {
        let valid = |name: &str| {
            Name::new(name).map_err(|error| {
                thalweg_protocol::WireError::new(thalweg_protocol::ErrorCode::InvalidSpec, error.to_string())
            })
        };
        let spec = JobSpec {
            key: JobKey { tenant: valid(tenant)?, job: valid(name)? },
            tensors: Vec::new(),
            function: FunctionSpec::named("mean"),
            mode: Mode::Sync,
            workers: 1,
            quorum: None,
            deadline_ms: 0,
            durability: Durability::Process,
            non_finite: NonFinite::Propagate,
            init: Init::Zeros,
            shard_bytes: limits::DEFAULT_SHARD_BYTES,
            max_members: 256,
            policy: Policy::default(),
        };
        Ok(Self { spec, non_finite: None })
    }

    /// A job as somebody else has described it, such as [`Client::job`](crate::Client::job).
    #[must_use]
    pub fn from_spec(spec: JobSpec) -> Self {
        let non_finite = Some(spec.non_finite);
        Self { spec, non_finite }
    }

    /// Adds an f32 tensor. Order matters: all workers add the same tensors in the same order.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>, shape: impl Into<Vec<u64>>) -> Self {
        self.spec.tensors.push(TensorSpec { name: name.into(), shape: shape.into(), dtype: Dtype::F32 });
        self
    }

    /// The aggregation function by name, without settings.
    #[must_use]
    pub fn function(self, name: &str) -> Self {
        self.function_spec(FunctionSpec::named(name))
    }

    /// The aggregation function with settings. A function that keeps parameters (`sgd`, `adam`) starts from those
    /// that rank 0 gives when it joins.
    #[must_use]
    pub fn function_spec(mut self, function: FunctionSpec) -> Self {
        let reduces = matches!(function.name.as_str(), "sum" | "mean" | "weighted_mean");
        self.spec.init = if reduces { Init::Zeros } else { Init::Upload };
        self.spec.function = function;
        self
    }

    /// Settings that differ for some tensors.
    #[must_use]
    pub fn group(mut self, group: ParameterGroup) -> Self {
        self.spec.function.groups.push(group);
        self
    }

    /// Number of workers that the first round waits for.
    #[must_use]
    pub fn workers(mut self, workers: u32) -> Self {
        self.spec.workers = workers;
        self.spec.max_members = self.spec.max_members.max(workers);
        self
    }

    /// Closes a round with `quorum` contributions once `deadline` has passed since the first of them.
    #[must_use]
    pub fn quorum(mut self, quorum: u32, deadline: std::time::Duration) -> Self {
        self.spec.quorum = Some(quorum);
        self.spec.deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// What a result has survived by the time a worker sees it.
    #[must_use]
    pub fn durability(mut self, durability: Durability) -> Self {
        self.spec.durability = durability;
        self
    }

    /// What happens to contributions with NaN or infinity. Default: `propagate` for `sum` and `mean`,
    /// `void` for functions that keep parameters.
    #[must_use]
    pub fn non_finite(mut self, policy: NonFinite) -> Self {
        self.non_finite = Some(policy);
        self
    }

    /// Shard size in bytes: the unit of messages and of work.
    #[must_use]
    pub fn shard_bytes(mut self, bytes: u32) -> Self {
        self.spec.shard_bytes = bytes;
        self
    }

    /// Deletes the job once nobody has been in it for so long. Default: never.
    #[must_use]
    pub fn time_to_live(mut self, ttl: std::time::Duration) -> Self {
        self.spec.policy.ttl_ms = Some(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// What happens when rounds are lost with the power (durability `process`). Default: the job fails.
    #[must_use]
    pub fn on_loss(mut self, on_loss: OnLoss) -> Self {
        self.spec.policy.on_loss = on_loss;
        self
    }

    /// Has the job served by the invokers of this pool alone, which the operator has configured (`streams.pools`).
    /// Default: the shared pool. A pool that there is not is refused when the job is opened.
    ///
    /// # Errors
    /// When `name` is not 1 to 64 of `a-z 0-9 - _`.
    pub fn pool(mut self, name: &str) -> Result<Self, Error> {
        let name = Name::new(name).map_err(|error| {
            thalweg_protocol::WireError::new(thalweg_protocol::ErrorCode::InvalidSpec, error.to_string())
        })?;
        self.spec.policy.pool = Some(name);
        Ok(self)
    }

    /// In which order a round's contributions are folded. Default: by rank.
    #[must_use]
    pub fn order(mut self, order: FoldOrder) -> Self {
        self.spec.policy.order = order;
        self
    }

    /// The specification as it goes to the gateway.
    ///
    /// # Errors
    /// When it could not be run; the text names the field.
    pub fn spec(&self) -> Result<JobSpec, Error> {
        let mut spec = self.spec.clone();
        spec.non_finite = self.non_finite.unwrap_or(match spec.init {
            Init::Zeros => NonFinite::Propagate,
            Init::Upload => NonFinite::Void,
        });
        spec.validate()?;
        Ok(spec)
    }
}

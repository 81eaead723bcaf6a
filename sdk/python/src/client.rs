//! A connection, and jobs from outside.

use std::{path::PathBuf, time::Duration};

use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods as _};
use pyo3::{exceptions::PyValueError, prelude::*};
use serde::{Deserialize, de::DeserializeOwned};
use thalweg_sdk::{
    Durability, FoldOrder, FunctionSpec, Job, JobCommand, JobKey, JoinOptions, Name, NonFinite, OnLoss,
    RestoreOptions, SettingsChange, SnapshotOptions,
};

use crate::{
    Owner,
    error::{BadInputError, ConnectError, OrRaise as _},
    wait::{seconds, wait},
    worker::Worker,
};

/// A job as the package describes it. What is left out stays as the SDK has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    tenant: String,
    name: String,
    /// Names and shapes.
    tensors: Vec<(String, Vec<u64>)>,
    function: FunctionSpec,
    workers: u32,
    /// Contributions, and seconds.
    quorum: Option<(u32, f64)>,
    durability: Option<Durability>,
    non_finite: Option<NonFinite>,
    order: Option<FoldOrder>,
    on_loss: Option<OnLoss>,
    shard_bytes: Option<u32>,
    /// Seconds.
    time_to_live: Option<f64>,
}

fn read<T: DeserializeOwned>(json: &str) -> PyResult<T> {
    serde_json::from_str(json).map_err(|error| PyValueError::new_err(error.to_string()))
}

fn name(text: &str) -> PyResult<Name> {
    Name::new(text).map_err(|error| BadInputError::new_err(error.to_string()))
}

fn describe(json: &str) -> PyResult<Job> {
    let wanted: Description = read(json)?;
    let mut job = Job::of_tenant(&wanted.tenant, &wanted.name).or_raise()?;
    for (name, shape) in wanted.tensors {
        job = job.tensor(name, shape);
    }
    job = job.function_spec(wanted.function).workers(wanted.workers);
    if let Some((quorum, deadline)) = wanted.quorum {
        job = job.quorum(quorum, seconds(Some(deadline))?.unwrap_or_default());
    }
    if let Some(durability) = wanted.durability {
        job = job.durability(durability);
    }
    if let Some(policy) = wanted.non_finite {
        job = job.non_finite(policy);
    }
    if let Some(order) = wanted.order {
        job = job.order(order);
    }
    if let Some(on_loss) = wanted.on_loss {
        job = job.on_loss(on_loss);
    }
    if let Some(bytes) = wanted.shard_bytes {
        job = job.shard_bytes(bytes);
    }
    if let Some(ttl) = seconds(wanted.time_to_live)? {
        job = job.time_to_live(ttl);
    }
    Ok(job)
}

/// Hands progress, (done, of all), to a function of Python's.
fn tell(progress: Option<Py<PyAny>>) -> impl FnMut(u64, u64) + Send {
    move |done, total| {
        if let Some(progress) = &progress {
            Python::attach(|py| {
                // A bar that cannot be drawn is no reason to stop.
                if let Err(error) = progress.call1(py, (done, total)) {
                    error.write_unraisable(py, None);
                }
            });
        }
    }
}

/// A connection to a deployment.
#[pyclass(frozen, module = "thalweg._native")]
pub struct Client {
    client: Option<thalweg_sdk::Client>,
    owner: Owner,
}

impl Drop for Client {
    fn drop(&mut self) {
        // The tasks behind a connection are not here in a forked process; some of their locks may be held for ever.
        if !self.owner.is_here() {
            std::mem::forget(self.client.take());
        }
    }
}

impl Client {
    fn get(&self) -> PyResult<&thalweg_sdk::Client> {
        self.owner.check()?;
        self.client.as_ref().ok_or(thalweg_sdk::Error::Left).or_raise()
    }
}

/// Connects within `timeout` seconds, which is also how long answers about jobs are waited for.
#[pyfunction]
pub fn connect(py: Python<'_>, url: &str, timeout: f64) -> PyResult<Client> {
    let patience = seconds(Some(timeout))?.unwrap_or_default();
    let connecting = async { tokio::time::timeout(patience, thalweg_sdk::Client::connect(url)).await };
    match wait(py, connecting)? {
        Ok(client) => {
            let client = client.or_raise()?.patient_for(patience);
            Ok(Client { client: Some(client), owner: Owner::here() })
        }
        Err(_) => Err(ConnectError::new_err(format!(
            "no NATS server answers at {url} after {timeout} s: start a service there (python -m thalweg up, or \
             `with thalweg.up():`), or name another one by url= or THALWEG_URL"
        ))),
    }
}

/// Names and shapes of the tensors in a safetensors file.
#[pyfunction]
pub fn model_of(path: PathBuf) -> PyResult<Vec<(String, Vec<u64>)>> {
    let tensors = thalweg_sdk::model_of(&path).or_raise()?;
    Ok(tensors.into_iter().map(|tensor| (tensor.name, tensor.shape)).collect())
}

#[pymethods]
impl Client {
    /// Waits for an answer of the gateway: is this a deployment?
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let tenant = name("default")?;
        wait(py, self.get()?.jobs(Some(&tenant)))?.or_raise().map(drop)
    }

    /// Joins the job that `description` (JSON) describes.
    fn join(
        &self,
        py: Python<'_>,
        description: &str,
        rank: u32,
        timeout: f64,
        worker_id: Option<String>,
        initial: Vec<(String, PyReadonlyArrayDyn<'_, f32>)>,
    ) -> PyResult<Worker> {
        let client = self.get()?;
        let job = describe(description)?;
        let mut options =
            JoinOptions { timeout: seconds(Some(timeout))?.unwrap_or_default(), ..Default::default() };
        if let Some(id) = worker_id {
            options.worker_id = id;
        }
        for (name, values) in &initial {
            debug_assert!(values.is_contiguous());
            let values =
                values.as_slice().map_err(|error| BadInputError::new_err(format!("{name}: {error}")))?;
            options.initial.push((name.clone(), values.to_vec()));
        }
        drop(initial);
        let worker = wait(py, client.join_with(job, rank, options))?.or_raise()?;
        Ok(Worker::new(worker))
    }

    /// Who is on a job's roster: the ranks that no round is known to be without.
    fn members(&self, py: Python<'_>, tenant: &str, job: &str) -> PyResult<Vec<u32>> {
        let key = JobKey { tenant: name(tenant)?, job: name(job)? };
        let (_, roster) = wait(py, self.get()?.job(&key))?.or_raise()?;
        let present = roster.members.iter().filter(|member| member.until_round.is_none());
        Ok(present.map(|member| member.rank).collect())
    }

    /// Names of a tenant's jobs.
    fn jobs(&self, py: Python<'_>, tenant: &str) -> PyResult<Vec<String>> {
        let tenant = name(tenant)?;
        let jobs = wait(py, self.get()?.jobs(Some(&tenant)))?.or_raise()?;
        Ok(jobs.into_iter().map(|job| job.key.job.to_string()).collect())
    }

    /// Changes settings (JSON); (number of the settings, first round that uses them).
    fn set_settings(&self, py: Python<'_>, tenant: &str, job: &str, change: &str) -> PyResult<(u32, u64)> {
        let key = JobKey { tenant: name(tenant)?, job: name(job)? };
        let change: SettingsChange = read(change)?;
        let revision = wait(py, self.get()?.set_settings(&key, change))?.or_raise()?;
        Ok((revision.revision, revision.from_round))
    }

    /// Pauses, resumes or aborts a job (JSON).
    fn control(&self, py: Python<'_>, tenant: &str, job: &str, command: &str) -> PyResult<()> {
        let key = JobKey { tenant: name(tenant)?, job: name(job)? };
        let command: JobCommand = read(command)?;
        wait(py, self.get()?.control(&key, command))?.or_raise()
    }

    /// Removes a job.
    fn delete(&self, py: Python<'_>, tenant: &str, job: &str) -> PyResult<()> {
        let key = JobKey { tenant: name(tenant)?, job: name(job)? };
        wait(py, self.get()?.delete(&key))?.or_raise()
    }

    /// Writes a job's state to a file; (last round in it, bytes).
    #[pyo3(signature = (tenant, job, path, parameters_only, bytes_per_s, timeout, progress=None))]
    #[allow(clippy::too_many_arguments)]
    fn snapshot(
        &self,
        py: Python<'_>,
        tenant: &str,
        job: &str,
        path: PathBuf,
        parameters_only: bool,
        bytes_per_s: Option<u64>,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(u64, u64)> {
        let key = JobKey { tenant: name(tenant)?, job: name(job)? };
        let default = SnapshotOptions::default();
        let options = SnapshotOptions {
            parameters_only,
            bytes_per_s: bytes_per_s.unwrap_or(default.bytes_per_s),
            timeout: seconds(timeout)?.unwrap_or(default.timeout),
        };
        let snapshot = wait(py, self.get()?.snapshot(&key, &path, &options, tell(progress)))?.or_raise()?;
        Ok((snapshot.version, snapshot.bytes))
    }

    /// Creates a job from a file.
    #[pyo3(signature = (path, tenant, job, description, replace, timeout, progress=None))]
    #[allow(clippy::too_many_arguments)]
    fn restore(
        &self,
        py: Python<'_>,
        path: PathBuf,
        tenant: &str,
        job: Option<&str>,
        description: Option<&str>,
        replace: bool,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<String> {
        let tenant = name(tenant)?;
        let key = job.map(name).transpose()?.map(|job| JobKey { tenant, job });
        let job = description.map(describe).transpose()?;
        let timeout: Option<Duration> = seconds(timeout)?;
        let options = RestoreOptions { key, replace, job, timeout };
        let record = wait(py, self.get()?.restore(&path, options, tell(progress)))?.or_raise()?;
        Ok(record.spec.key.job.to_string())
    }
}

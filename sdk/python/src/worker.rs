//! A member of a job.

use std::sync::Arc;

use futures::FutureExt as _;
use half::{bf16, f16, slice::HalfBitsSliceExt as _};
use numpy::{PyArray1, PyReadonlyArrayDyn, PyReadwriteArrayDyn};
use pyo3::{exceptions::PyValueError, prelude::*};
use thalweg_sdk::{Error, NonFinite};
use tokio::sync::Mutex;

use crate::{
    Owner,
    error::{BadInputError, OrRaise as _},
    wait::{SLICE, runtime, seconds, wait},
};

/// Number, contributors, whether counted, superseded, roster changed, number of the settings, advice.
type Round = (u64, usize, bool, bool, bool, u32, Option<String>);

/// A member of a job. Its calls wait for one another.
#[pyclass(frozen, module = "thalweg._native")]
pub struct Worker {
    worker: Option<Arc<Mutex<Option<thalweg_sdk::Worker>>>>,
    owner: Owner,
    rank: u32,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // As that of a client.
        if !self.owner.is_here() {
            std::mem::forget(self.worker.take());
        }
    }
}

/// One tensor's values, borrowed from Python.
enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl Values<'_> {
    fn is_finite(&self) -> bool {
        match self {
            Self::F32(values) => values.iter().all(|value| value.is_finite()),
            Self::F16(values) => values.iter().all(|value| value.is_finite()),
            Self::Bf16(values) => values.iter().all(|value| value.is_finite()),
        }
    }
}

/// An array of Python's that is read. The halves come as the bits that they are.
enum Reading<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F16(PyReadonlyArrayDyn<'py, u16>),
    Bf16(PyReadonlyArrayDyn<'py, u16>),
}

/// An array of Python's that is written.
enum Writing<'py> {
    F32(PyReadwriteArrayDyn<'py, f32>),
    F16(PyReadwriteArrayDyn<'py, u16>),
    Bf16(PyReadwriteArrayDyn<'py, u16>),
}

/// Name, array, and "f32", "f16" or "bf16".
type Item<'py> = (String, Bound<'py, PyAny>, String);

fn unknown(kind: &str) -> PyErr {
    PyValueError::new_err(format!("{kind:?} is none of f32, f16, bf16"))
}

fn not_plain(name: &str, error: impl std::fmt::Display) -> PyErr {
    BadInputError::new_err(format!("tensor {name:?}: {error}"))
}

impl<'py> Reading<'py> {
    fn of((_, array, kind): &Item<'py>) -> PyResult<Self> {
        Ok(match kind.as_str() {
            "f32" => Self::F32(array.extract()?),
            "f16" => Self::F16(array.extract()?),
            "bf16" => Self::Bf16(array.extract()?),
            other => return Err(unknown(other)),
        })
    }

    fn values(&self, name: &str) -> PyResult<Values<'_>> {
        let plain = |error| not_plain(name, error);
        Ok(match self {
            Self::F32(array) => Values::F32(array.as_slice().map_err(plain)?),
            Self::F16(array) => Values::F16(array.as_slice().map_err(plain)?.reinterpret_cast()),
            Self::Bf16(array) => Values::Bf16(array.as_slice().map_err(plain)?.reinterpret_cast()),
        })
    }
}

enum ValuesMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
}

impl<'py> Writing<'py> {
    fn of((_, array, kind): &Item<'py>) -> PyResult<Self> {
        Ok(match kind.as_str() {
            "f32" => Self::F32(array.extract()?),
            "f16" => Self::F16(array.extract()?),
            "bf16" => Self::Bf16(array.extract()?),
            other => return Err(unknown(other)),
        })
    }

    fn values(&mut self, name: &str) -> PyResult<ValuesMut<'_>> {
        let plain = |error| not_plain(name, error);
        Ok(match self {
            Self::F32(array) => ValuesMut::F32(array.as_slice_mut().map_err(plain)?),
            Self::F16(array) => ValuesMut::F16(array.as_slice_mut().map_err(plain)?.reinterpret_cast_mut()),
            Self::Bf16(array) => ValuesMut::Bf16(array.as_slice_mut().map_err(plain)?.reinterpret_cast_mut()),
        })
    }
}

fn described(round: thalweg_sdk::Round) -> Round {
    let advice = round.advice.map(|advice| advice.to_string());
    let flags = (round.counted, round.superseded, round.roster_changed);
    (round.round, round.contributors, flags.0, flags.1, flags.2, round.settings_revision, advice)
}

impl Worker {
    pub(crate) fn new(worker: thalweg_sdk::Worker) -> Self {
        let rank = worker.rank();
        Self { worker: Some(Arc::new(Mutex::new(Some(worker)))), owner: Owner::here(), rank }
    }

    fn get(&self) -> PyResult<&Arc<Mutex<Option<thalweg_sdk::Worker>>>> {
        self.owner.check()?;
        self.worker.as_ref().ok_or(Error::Left).or_raise()
    }

    /// Reads something that needs no waiting but for other calls.
    fn look<T: Send>(
        &self,
        py: Python<'_>,
        look: impl FnOnce(&mut thalweg_sdk::Worker) -> T + Send,
    ) -> PyResult<T> {
        let worker = self.get()?;
        let looked = wait(py, async { worker.lock().await.as_mut().map(look) })?;
        looked.ok_or(Error::Left).or_raise()
    }
}

#[pymethods]
impl Worker {
    /// The rank.
    #[getter]
    fn rank(&self) -> u32 {
        self.rank
    }

    /// The round that is being pushed.
    fn round(&self, py: Python<'_>) -> PyResult<u64> {
        self.look(py, |worker| worker.round())
    }

    /// Bytes sent and received.
    fn traffic(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        self.look(py, |worker| worker.traffic())
    }

    /// Why the job is paused, if it is.
    fn paused(&self, py: Python<'_>) -> PyResult<Option<String>> {
        self.look(py, |worker| worker.paused())
    }

    /// Weight of what is pushed from now on.
    fn set_weight(&self, py: Python<'_>, weight: f32) -> PyResult<()> {
        self.look(py, |worker| worker.set_weight(weight))
    }

    /// Whether the round that has ended counts `rank` on all shards.
    fn counts(&self, py: Python<'_>, rank: u32) -> PyResult<bool> {
        self.look(py, |worker| {
            let shards = worker.job().layout.shards() as usize;
            let ledgers = worker.ledgers();
            ledgers.len() == shards && ledgers.iter().all(|(_, _, counted)| counted.contains(&rank))
        })
    }

    /// Ranks that the round that has ended counts on all shards, in ascending order.
    fn counted(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        self.look(py, |worker| {
            let mut ledgers = worker.ledgers().into_iter().map(|(_, _, counted)| counted);
            let mut ranks = ledgers.next().unwrap_or_default();
            for counted in ledgers {
                ranks.retain(|rank| counted.contains(rank));
            }
            ranks.sort_unstable();
            ranks
        })
    }

    /// Pushes tensors: each is copied once, into the messages. With policy `void`, a NaN or an infinity makes the
    /// whole contribution void if all tensors of the job come in one call.
    fn push(&self, py: Python<'_>, items: Vec<Item<'_>>) -> PyResult<()> {
        let worker = self.get()?;
        let arrays = items.iter().map(Reading::of).collect::<PyResult<Vec<_>>>()?;
        let mut values = Vec::with_capacity(items.len());
        for ((name, ..), array) in items.iter().zip(&arrays) {
            values.push((name.as_str(), array.values(name)?));
        }
        let pushing = async {
            let mut worker = worker.lock().await;
            let worker = worker.as_mut().ok_or(Error::Left)?;
            let spec = &worker.job().spec;
            let whole = spec.non_finite == NonFinite::Void && spec.tensors.len() == values.len();
            if whole && !values.iter().all(|(_, values)| values.is_finite()) {
                return worker.push_void().await;
            }
            for (name, values) in values {
                match values {
                    Values::F32(values) => worker.push(name, values).await?,
                    Values::F16(values) => worker.push(name, values).await?,
                    Values::Bf16(values) => worker.push(name, values).await?,
                }
            }
            Ok(())
        };
        wait(py, pushing)?.or_raise()
    }

    /// Contributes nothing to this round.
    fn push_void(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.get()?;
        let pushing = async { worker.lock().await.as_mut().ok_or(Error::Left)?.push_void().await };
        wait(py, pushing)?.or_raise()
    }

    /// Waits until the round is complete; `None` when it is not after `timeout` seconds.
    #[pyo3(signature = (timeout=None))]
    fn finish(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<Round>> {
        let worker = self.get()?;
        let patience = seconds(timeout)?;
        let finishing = async {
            let finish = async { worker.lock().await.as_mut().ok_or(Error::Left)?.finish().await };
            match patience {
                Some(patience) => tokio::time::timeout(patience, finish).await.ok().transpose(),
                None => finish.await.map(Some),
            }
        };
        Ok(wait(py, finishing)?.or_raise()?.map(described))
    }

    /// Whether the round is complete; does not wait.
    fn poll(&self) -> PyResult<bool> {
        let worker = self.get()?;
        // Somebody waits for it: then it is not.
        let Ok(mut worker) = worker.try_lock() else { return Ok(false) };
        let finish = worker.as_mut().ok_or(Error::Left).or_raise()?.finish().now_or_never();
        finish.transpose().or_raise().map(|round| round.is_some())
    }

    /// Calls `callback`, on a thread of the SDK's, when the round is complete or will never be.
    fn when_complete(&self, callback: Py<PyAny>) -> PyResult<()> {
        let worker = self.get()?.clone();
        runtime()?.spawn(async move {
            // Not held all the time, so that leaving need not wait for a round that never ends.
            loop {
                let mut worker = worker.lock().await;
                let Some(worker) = worker.as_mut() else { break };
                if tokio::time::timeout(SLICE, worker.finish()).await.is_ok() {
                    // What came of it is told to whoever asks for the result.
                    break;
                }
            }
            let called = tokio::task::spawn_blocking(move || {
                Python::try_attach(|py| {
                    if let Err(error) = callback.call0(py) {
                        error.write_unraisable(py, None);
                    }
                })
            });
            // Nobody to be told when the interpreter ends.
            let _ = called.await;
        });
        Ok(())
    }

    /// Waits for results and copies them into the arrays.
    fn pull(&self, py: Python<'_>, items: Vec<Item<'_>>) -> PyResult<()> {
        let worker = self.get()?;
        let mut arrays = items.iter().map(Writing::of).collect::<PyResult<Vec<_>>>()?;
        let mut values = Vec::with_capacity(items.len());
        for ((name, ..), array) in items.iter().zip(&mut arrays) {
            values.push((name.as_str(), array.values(name)?));
        }
        let pulling = async {
            let mut worker = worker.lock().await;
            let worker = worker.as_mut().ok_or(Error::Left)?;
            for (name, values) in values {
                match values {
                    ValuesMut::F32(values) => worker.pull(name, values).await?,
                    ValuesMut::F16(values) => worker.pull(name, values).await?,
                    ValuesMut::Bf16(values) => worker.pull(name, values).await?,
                }
            }
            Ok(())
        };
        wait(py, pulling)?.or_raise()
    }

    /// The parameters that the service holds, flat, in the order of the job's tensors.
    fn parameters<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyArray1<f32>>>> {
        let worker = self.get()?;
        let reading = async { worker.lock().await.as_ref().ok_or(Error::Left)?.parameters().await };
        let tensors = wait(py, reading)?.or_raise()?;
        Ok(tensors.into_iter().map(|tensor| PyArray1::from_vec(py, tensor)).collect())
    }

    /// Gives the rank back.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        let worker = self.get()?;
        let leaving = async {
            let left = worker.lock().await.take();
            match left {
                Some(worker) => worker.leave().await,
                None => Ok(()),
            }
        };
        wait(py, leaving)?.or_raise()
    }
}

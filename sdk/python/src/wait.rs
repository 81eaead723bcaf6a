//! Waiting for the SDK: without the interpreter's lock, and interrupted by signals.

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pyo3::{exceptions::PyRuntimeError, prelude::*};
use tokio::runtime::Runtime;

use crate::Owner;

/// How long Ctrl-C may go unnoticed.
pub(crate) const SLICE: Duration = Duration::from_millis(20);
/// The SDK's tasks copy and send; training needs the other cores.
const THREADS: usize = 2;

static RUNTIME: Mutex<Option<(Owner, Arc<Runtime>)>> = Mutex::new(None);

/// The runtime of this process. The one of a process that this was forked from is left alone: its threads are not
/// here, and ending it would wait for them.
pub(crate) fn runtime() -> PyResult<Arc<Runtime>> {
    let mut known = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((owner, runtime)) = known.as_ref()
        && owner.is_here()
    {
        return Ok(runtime.clone());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("thalweg")
        .enable_all()
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("no threads for Thalweg: {error}")))?;
    let runtime = Arc::new(runtime);
    let inherited = known.replace((Owner::here(), runtime.clone()));
    std::mem::forget(inherited);
    Ok(runtime)
}

/// Waits for `future` while other threads of Python run. A signal's handler that raises, as that of Ctrl-C does, ends
/// the wait and drops the future.
pub(crate) fn wait<T: Send>(py: Python<'_>, future: impl Future<Output = T> + Send) -> PyResult<T> {
    let runtime = runtime()?;
    let mut future = pin!(future);
    loop {
        let slice =
            py.detach(|| runtime.block_on(async { tokio::time::timeout(SLICE, future.as_mut()).await }));
        crate::logs::deliver(py)?;
        match slice {
            Ok(value) => return Ok(value),
            Err(_) => py.check_signals()?,
        }
    }
}

/// What a duration in seconds says, if it says anything; `None` for no end.
pub(crate) fn seconds(seconds: Option<f64>) -> PyResult<Option<Duration>> {
    seconds.map_or(Ok(None), |seconds| match Duration::try_from_secs_f64(seconds) {
        Ok(duration) => Ok(Some(duration)),
        Err(_) => Err(pyo3::exceptions::PyValueError::new_err(format!(
            "a time of {seconds} seconds: give a positive number, or None to wait without an end"
        ))),
    })
}

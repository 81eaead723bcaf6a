//! The native module `thalweg._native`: the Rust SDK as Python sees it.
//!
//! It is thin on purpose. What a tree of tensors is, which names tensors have, what a handle is and everything else
//! that a reader of Python expects stands in the package beside it (`python/thalweg`); here calls are handed to the
//! SDK, and waited for in a way that Python can live with (`wait.rs`).

// What `#[pyclass]` and `#[pyfunction]` make public is a module of Python's; its documentation is `_native.pyi`.
#![allow(missing_docs, unreachable_pub)]

mod client;
mod error;
mod logs;
mod wait;
mod worker;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::{
        client::{Client, connect, model_of},
        logs::set_log_sink,
        worker::Worker,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::logs::install();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

/// A process that was forked has none of the threads that its parent's connections live on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner(u32);

impl Owner {
    pub(crate) fn here() -> Self {
        Self(std::process::id())
    }

    pub(crate) fn is_here(self) -> bool {
        self.0 == std::process::id()
    }

    pub(crate) fn check(self) -> PyResult<()> {
        if self.is_here() {
            return Ok(());
        }
        Err(error::ForkedError::new_err(format!(
            "this object belongs to process {}, from which this one was forked: connections do not survive a fork; \
             call thalweg.init() (or make a Job) in the child, or start children with the method \"spawn\"",
            self.0
        )))
    }
}

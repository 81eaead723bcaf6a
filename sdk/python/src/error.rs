//! The SDK's errors as the exceptions of `thalweg.errors`.

use pyo3::{import_exception, prelude::*};
use thalweg_sdk::Error;

import_exception!(thalweg.errors, AlreadyPulledError);
import_exception!(thalweg.errors, AlreadyPushedError);
import_exception!(thalweg.errors, BadInputError);
import_exception!(thalweg.errors, ConnectError);
import_exception!(thalweg.errors, FileError);
import_exception!(thalweg.errors, ForkedError);
import_exception!(thalweg.errors, LeftError);
import_exception!(thalweg.errors, MissingTensorError);
import_exception!(thalweg.errors, RefusedError);
import_exception!(thalweg.errors, ShapeError);
import_exception!(thalweg.errors, ThalwegError);
import_exception!(thalweg.errors, TimedOutError);
import_exception!(thalweg.errors, UnknownTensorError);

/// The exception for an error.
pub(crate) fn raise(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Connect(_) => ConnectError::new_err(text),
        Error::TimedOut { .. } => TimedOutError::new_err(text),
        Error::Refused(error) => RefusedError::new_err((error.message, error.code.as_str())),
        Error::UnknownTensor(_) => UnknownTensorError::new_err(text),
        Error::Shape { .. } => ShapeError::new_err(text),
        Error::AlreadyPushed(_) => AlreadyPushedError::new_err(text),
        Error::AlreadyPulled(_) => AlreadyPulledError::new_err(text),
        Error::NeverEnds { .. } => MissingTensorError::new_err(text),
        Error::File { .. } => FileError::new_err(text),
        Error::Left => LeftError::new_err(text),
        // Those that a later SDK may have.
        _ => ThalwegError::new_err(text),
    }
}

/// For `?` on results of the SDK.
pub(crate) trait OrRaise<T> {
    fn or_raise(self) -> PyResult<T>;
}

impl<T> OrRaise<T> for Result<T, Error> {
    fn or_raise(self) -> PyResult<T> {
        self.map_err(raise)
    }
}

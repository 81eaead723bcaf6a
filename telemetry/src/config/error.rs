//! What can be wrong with a configuration.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why a configuration could not be loaded or dumped. All of these are for an operator to mend;
/// none goes away by trying again.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was asked for does not exist.
    #[error(
        "configuration file `{}` does not exist: create it, correct the path, or leave the path out \
         to run on defaults, environment and overrides", path.display()
    )]
    FileMissing {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The file could not be read.
    #[error("configuration file `{}` could not be read: {source}", path.display())]
    FileUnreadable {
        /// The path as it was given.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Text that is not TOML.
    #[error("{origin} is not valid TOML: {message}")]
    Syntax {
        /// Which text.
        origin: String,
        /// Line, column and cause.
        message: String,
    },
    /// A variable or override whose name or text cannot be used.
    #[error("{origin}: {reason}")]
    Name {
        /// Which variable or override.
        origin: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A key that the configuration does not have.
    #[error("unknown key `{key}` from {origin}: {expected}")]
    UnknownKey {
        /// The key, with dots between sections.
        key: String,
        /// Where it was set.
        origin: String,
        /// Which keys exist in its place.
        expected: String,
    },
    /// A value that does not fit its key.
    #[error("invalid value for `{key}` from {origin}: {message}")]
    Value {
        /// The key, with dots between sections; empty when only the whole did not fit.
        key: String,
        /// Where it was set.
        origin: String,
        /// What is wrong with it.
        message: String,
    },
    /// A value, the defaults included, that TOML cannot express.
    #[error("the configuration cannot be written as TOML: {message}")]
    NotToml {
        /// What is wrong with it.
        message: String,
    },
}

impl ConfigError {
    pub(super) fn not_toml(error: impl fmt::Display) -> Self {
        Self::NotToml { message: error.to_string() }
    }
}

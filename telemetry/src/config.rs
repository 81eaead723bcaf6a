//! Configuration in layers: defaults < TOML file < environment < overrides.
//!
//! The configuration type decides what exists: its structs carry `#[serde(default,
//! deny_unknown_fields)]`, so that a misspelt key is an error and not a setting without effect.
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use thalweg_telemetry::config::Loader;
//!
//! #[derive(Default, Serialize, Deserialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct Settings {
//!     nats_url: String,
//! }
//!
//! let settings: Settings = Loader::new("THALWEG")
//!     .environment([("THALWEG__NATS_URL".to_owned(), "nats://127.0.0.1:4222".to_owned())])
//!     .load()?;
//! assert_eq!(settings.nats_url, "nats://127.0.0.1:4222");
//! # Ok::<(), thalweg_telemetry::config::ConfigError>(())
//! ```

mod diff;
mod error;
mod explain;
mod layer;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use ::config::Config;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::diff::{Change, diff};
pub use self::error::ConfigError;
use self::layer::Layer;

/// Merges the layers of configuration into one typed value.
#[derive(Debug, Clone)]
pub struct Loader {
    prefix: String,
    file: Option<PathBuf>,
    /// None means the process's own environment, read at load; tests inject theirs, since the real
    /// one is shared by every test of the process.
    environment: Option<BTreeMap<String, String>>,
    overrides: Vec<(String, String)>,
}

impl Loader {
    /// A loader whose environment variables are named `<prefix>__SECTION__KEY`.
    ///
    /// The double underscore also follows the prefix: `THALWEG__STORE__PATH` sets `store.path`,
    /// while `THALWEG_URL` is none of the loader's business. Keys are lower-cased.
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), file: None, environment: None, overrides: Vec::new() }
    }

    /// Reads this TOML file, which has to exist. None (the default) reads no file.
    #[must_use]
    pub fn file(mut self, path: Option<PathBuf>) -> Self {
        self.file = path;
        self
    }

    /// Uses these variables in place of the process's environment.
    #[must_use]
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        self.environment = Some(variables.into_iter().collect());
        self
    }

    /// Sets `section.key` to a value over everything else; of several for one key the last wins.
    /// [`parse_override`] makes such a pair of `section.key=value`.
    #[must_use]
    pub fn overrides(mut self, overrides: Vec<(String, String)>) -> Self {
        self.overrides = overrides;
        self
    }

    /// Merges defaults, file, environment and overrides, in rising precedence.
    ///
    /// Tables merge key by key; anything else, arrays too, is replaced whole. Text from the environment
    /// and from overrides becomes what the field wants: a boolean, an integer, a float, a string, or
    /// an array in TOML's notation (`["a", "b"]`).
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key and where its value came from as far as these are known.
    /// A number that the field's type would have to round is an error as well.
    pub fn load<T>(&self) -> Result<T, ConfigError>
    where
        T: Serialize + DeserializeOwned + Default,
    {
        let mut layers = Vec::new();
        if let Some(path) = &self.file {
            layers.push(Layer::file(path)?);
        }
        layers.extend(match &self.environment {
            Some(variables) => Layer::environment(&self.prefix, variables)?,
            None => Layer::environment(&self.prefix, &layer::process(&self.prefix)?)?,
        });
        layers.extend(Layer::overrides(&self.overrides)?);
        merge(layers)
    }
}

/// Splits `section.key=value` as given on a command line.
///
/// # Errors
///
/// [`ConfigError::Name`] when there is no `=`, or no key before it.
pub fn parse_override(text: &str) -> Result<(String, String), ConfigError> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err(ConfigError::Name {
            origin: layer::override_origin(text),
            reason: "expected `section.key=value`",
        }),
    }
}

/// Writes a configuration as TOML that [`Loader::load`] reads back to the same value.
///
/// Secrets in the value are in the text as well.
///
/// # Errors
///
/// [`ConfigError::NotToml`] when no TOML file says the same: an integer above `i64::MAX`, a NaN, or
/// an absent option (or map entry) whose default is present, which TOML has no way to take away.
pub fn dump<T>(value: &T) -> Result<String, ConfigError>
where
    T: Serialize + DeserializeOwned + Default,
{
    let text = toml::to_string_pretty(value).map_err(ConfigError::not_toml)?;
    let back: T = merge(vec![Layer::written(&text, "the dump")?])?;
    // Compared as tables: two texts of one hash map may differ in order.
    let table = |value: &T| toml::Table::try_from(value).map_err(ConfigError::not_toml);
    if table(&back)? == table(value)? {
        Ok(text)
    } else {
        Err(ConfigError::NotToml {
            message: "read back, it differs (is an option with a default set to none?)".into(),
        })
    }
}

/// Lays the layers over the defaults, later ones over earlier ones.
fn merge<T>(layers: Vec<Layer>) -> Result<T, ConfigError>
where
    T: Serialize + DeserializeOwned + Default,
{
    let mut builder = Config::builder().add_source(Layer::defaults(&T::default())?);
    for layer in layers {
        builder = builder.add_source(layer);
    }
    let merged = builder.build().map_err(|error| explain::error(error, &::config::Value::default()))?;
    let tree = merged.cache.clone();
    let value: T = merged.try_deserialize().map_err(|error| explain::error(error, &tree))?;
    explain::check_numbers(&tree, &value)?;
    Ok(value)
}

//! One layer of configuration: a table whose leaves know where they were set.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use ::config::{File, FileFormat, Map, Source, Value, ValueKind};
use serde::Serialize;

use super::ConfigError;

/// Between the prefix, sections and key of an environment variable.
const SEPARATOR: &str = "__";

/// Origin of the values that nobody has set.
pub(super) const DEFAULTS: &str = "the built-in defaults";

/// One source of values. `config` has sources of its own, but its environment parses `007` into 7
/// even for a string, and neither it nor overrides remember the name a value came from.
#[derive(Debug, Clone)]
pub(super) struct Layer(Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ::config::ConfigError> {
        Ok(self.0.clone())
    }
}

impl Layer {
    /// The defaults go through TOML like everything else, so that what is absent in TOML (an option
    /// without a value) is absent here.
    pub(super) fn defaults<T: Serialize>(value: &T) -> Result<Self, ConfigError> {
        let text = toml::to_string(value).map_err(ConfigError::not_toml)?;
        Self::written(&text, DEFAULTS)
    }

    /// Reads TOML that was written here and not by an operator: integers above `i64::MAX` are written
    /// without complaint, and refused only on the way back.
    pub(super) fn written(text: &str, origin: &str) -> Result<Self, ConfigError> {
        Self::toml(text, origin).map_err(ConfigError::not_toml)
    }

    pub(super) fn file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => ConfigError::FileMissing { path: path.into() },
            _ => ConfigError::FileUnreadable { path: path.into(), source },
        })?;
        Self::toml(&text, &format!("configuration file `{}`", path.display()))
    }

    fn toml(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let origin = origin.to_owned();
        match File::from_str(text, FileFormat::Toml).collect() {
            Ok(table) => Ok(Self(stamp_table(table, &origin))),
            Err(error) => Err(ConfigError::Syntax { origin, message: error.to_string() }),
        }
    }

    /// One layer per variable, in the order of their names.
    pub(super) fn environment(
        prefix: &str,
        variables: &BTreeMap<String, String>,
    ) -> Result<Vec<Self>, ConfigError> {
        let prefix = format!("{prefix}{SEPARATOR}");
        let ours = variables.iter().filter_map(|(name, text)| {
            let key = name.strip_prefix(&prefix)?.to_lowercase();
            Some((name, key, text))
        });
        ours.map(|(name, key, text)| {
            let path = key.split(SEPARATOR).collect();
            Self::leaf(path, text, environment_origin(name))
        })
        .collect()
    }

    /// One layer per override, in the order given.
    pub(super) fn overrides(pairs: &[(String, String)]) -> Result<Vec<Self>, ConfigError> {
        pairs
            .iter()
            .map(|(key, text)| {
                let origin = override_origin(&format!("{key}={text}"));
                Self::leaf(key.split('.').collect(), text, origin)
            })
            .collect()
    }

    fn leaf(path: Vec<&str>, text: &str, origin: String) -> Result<Self, ConfigError> {
        if path.iter().any(|part| part.is_empty()) {
            let reason = "a part of the key is empty";
            return Err(ConfigError::Name { origin, reason });
        }
        let mut table = Map::new();
        let mut value = stamp(fit(text), &origin);
        for part in path.into_iter().rev() {
            table = Map::from_iter([(part.to_owned(), value)]);
            value = Value::new(Some(&origin), table.clone());
        }
        Ok(Self(table))
    }
}

pub(super) fn environment_origin(name: &str) -> String {
    format!("environment variable `{name}`")
}

pub(super) fn override_origin(text: &str) -> String {
    format!("override `{text}`")
}

/// The process's own variables with this prefix.
pub(super) fn process(prefix: &str) -> Result<BTreeMap<String, String>, ConfigError> {
    let prefix = format!("{prefix}{SEPARATOR}");
    let mut variables = BTreeMap::new();
    for (name, text) in std::env::vars_os() {
        // Others may hold what they like, valid text or not.
        let Some(name) = name.to_str().filter(|name| name.starts_with(&prefix)) else {
            continue;
        };
        let Some(text) = text.to_str() else {
            return Err(ConfigError::Name {
                origin: environment_origin(name),
                reason: "its value is not UTF-8",
            });
        };
        variables.insert(name.to_owned(), text.to_owned());
    }
    Ok(variables)
}

/// Text as the type it looks like, if that type writes it back the same way: a string field that gets
/// `007`, `1.10` or `1e3` must see just that. What stays a string still becomes a number where the
/// field is one, since deserialising converts it then.
fn fit(text: &str) -> Value {
    if let Ok(value) = text.parse::<bool>() {
        return Value::new(None, value);
    }
    if let Some(value) = canonical::<i64>(text) {
        return Value::new(None, value);
    }
    if let Some(value) = canonical::<u64>(text) {
        return Value::new(None, value);
    }
    if let Some(value) = canonical::<f64>(text) {
        return Value::new(None, value);
    }
    array(text).unwrap_or_else(|| Value::new(None, text))
}

fn canonical<T: std::str::FromStr + ToString>(text: &str) -> Option<T> {
    text.parse().ok().filter(|value: &T| value.to_string() == text)
}

/// An array in TOML's notation; an IPv6 address or a log directive in brackets is not one.
fn array(text: &str) -> Option<Value> {
    if !text.starts_with('[') {
        return None;
    }
    let line = format!("array = {text}");
    let mut table = File::from_str(&line, FileFormat::Toml).collect().ok()?;
    let value = table.remove("array")?;
    // Text with a line break in it could have defined more than the one key.
    table.is_empty().then_some(value)
}

fn stamp_table(table: Map<String, Value>, origin: &String) -> Map<String, Value> {
    let stamped = table.into_iter();
    stamped.map(|(key, value)| (key, stamp(value, origin))).collect()
}

fn stamp(value: Value, origin: &String) -> Value {
    let kind = match value.kind {
        ValueKind::Table(table) => ValueKind::Table(stamp_table(table, origin)),
        ValueKind::Array(items) => {
            let items = items.into_iter();
            ValueKind::Array(items.map(|item| stamp(item, origin)).collect())
        }
        leaf => leaf,
    };
    Value::new(Some(origin), kind)
}

//! Turns what deserialising says into the key and the source an operator has to look at.

use std::collections::BTreeSet;

use ::config::{Value, ValueKind};
use serde::Serialize;

use super::ConfigError;
use super::layer::DEFAULTS;

/// `tree` is what was deserialised; its leaves know where they were set.
pub(super) fn error(error: ::config::ConfigError, tree: &Value) -> ConfigError {
    let (key, message) = key_and_message(error);
    // serde reports an unknown field at the table around it, and names the field in its message only.
    if let Some(rest) = message.strip_prefix("unknown field `")
        && let Some((field, expected)) = rest.split_once('`')
    {
        let key = if key.is_empty() { field.to_owned() } else { format!("{key}.{field}") };
        return ConfigError::UnknownKey {
            origin: origin_of(tree, &key),
            key,
            expected: expected.trim_start_matches([',', ' ']).to_owned(),
        };
    }
    ConfigError::Value { origin: origin_of(tree, &key), key, message }
}

/// Fails where deserialising has changed a number in silence: `config` rounds 1.5 to 2 for an
/// integer field, and reads `true` as 1.
pub(super) fn check_numbers<T: Serialize>(tree: &Value, value: &T) -> Result<(), ConfigError> {
    // A value that TOML cannot hold cannot be compared; that is no reason not to use it.
    match toml::Value::try_from(value) {
        Ok(result) => compare(tree, &result, String::new()),
        Err(_) => Ok(()),
    }
}

fn compare(given: &Value, got: &toml::Value, key: String) -> Result<(), ConfigError> {
    match (&given.kind, got) {
        (ValueKind::Table(given), toml::Value::Table(got)) => {
            for (name, given) in given {
                if let Some(got) = got.get(name) {
                    let dot = if key.is_empty() { "" } else { "." };
                    compare(given, got, format!("{key}{dot}{name}"))?;
                }
            }
            Ok(())
        }
        (ValueKind::Array(given), toml::Value::Array(got)) => {
            for (index, (given, got)) in given.iter().zip(got).enumerate() {
                compare(given, got, format!("{key}[{index}]"))?;
            }
            Ok(())
        }
        (ValueKind::Float(_) | ValueKind::Boolean(_), toml::Value::Integer(_))
        | (ValueKind::Boolean(_), toml::Value::Float(_)) => Err(ConfigError::Value {
            origin: whole(given),
            key,
            message: format!("`{given}` would be read as the number `{got}`"),
        }),
        _ => Ok(()),
    }
}

fn key_and_message(error: ::config::ConfigError) -> (String, String) {
    use ::config::ConfigError as E;
    match error {
        E::Type { unexpected, expected, key, .. } => {
            (key.unwrap_or_default(), format!("found {unexpected}, expected {expected}"))
        }
        E::At { error, key, .. } => (key.unwrap_or_default(), error.to_string()),
        E::NotFound(key) => (key, "it is required and missing".to_owned()),
        other => (String::new(), other.to_string()),
    }
}

/// Where `key` was set; for a key that is missing, where the nearest section around it was.
fn origin_of(tree: &Value, key: &str) -> String {
    let mut key = key;
    while !key.is_empty() {
        if let Some(places) = find(tree, key).and_then(origins) {
            return places;
        }
        key = &key[..key.rfind(['.', '[']).unwrap_or(0)];
    }
    whole(tree)
}

/// Defaults alone are no answer here: they are whole, so what is wrong is an empty section, and whoever
/// wrote that is forgotten.
fn whole(tree: &Value) -> String {
    let places = origins(tree).filter(|places| places != DEFAULTS);
    places.unwrap_or_else(|| "the merged configuration".to_owned())
}

/// Walks a key such as `tenants[1].quota`. Matches names rather than splitting at dots, since a name
/// in a map may have dots in it.
fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match &value.kind {
        _ if key.is_empty() => Some(value),
        ValueKind::Table(table) => table.iter().find_map(|(name, child)| {
            let rest = key.strip_prefix(name.as_str())?;
            match rest.chars().next() {
                Some('.') => find(child, &rest[1..]),
                Some('[') | None => find(child, rest),
                Some(_) => None,
            }
        }),
        ValueKind::Array(items) => {
            let (index, rest) = key.strip_prefix('[')?.split_once(']')?;
            let child = items.get(index.parse::<usize>().ok()?)?;
            find(child, rest.strip_prefix('.').unwrap_or(rest))
        }
        _ => None,
    }
}

/// Where a value's leaves were set, each place once; none for an empty section, which merging leaves
/// without an origin. The defaults count only when nobody else had a part in it.
fn origins(value: &Value) -> Option<String> {
    let mut places = BTreeSet::new();
    collect(value, &mut places);
    if places.len() > 1 {
        places.remove(DEFAULTS);
    }
    let places: Vec<_> = places.into_iter().collect();
    (!places.is_empty()).then(|| places.join(", "))
}

fn collect<'a>(value: &'a Value, places: &mut BTreeSet<&'a str>) {
    match &value.kind {
        ValueKind::Table(table) if !table.is_empty() => {
            for child in table.values() {
                collect(child, places);
            }
        }
        _ => places.extend(value.origin()),
    }
}

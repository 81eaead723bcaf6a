//! What has changed between two configurations.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::ConfigError;

/// One key whose value is not the same in two configurations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key, with dots between sections.
    pub key: String,
    /// What it was, as TOML; none where it was absent.
    pub old: Option<String>,
    /// What it is now, as TOML; none where it is absent.
    pub new: Option<String>,
}

/// The keys that differ, in the order of their names. Tables are compared key by key; anything else,
/// arrays too, as a whole.
///
/// Secrets in the values are in the changes as well.
///
/// # Errors
///
/// [`ConfigError::NotToml`] when one of them holds what TOML cannot express.
pub fn diff<T: Serialize>(old: &T, new: &T) -> Result<Vec<Change>, ConfigError> {
    let (mut old, mut new) = (flat(old)?, flat(new)?);
    let keys: BTreeSet<String> = old.keys().chain(new.keys()).cloned().collect();
    let changes = keys.into_iter().map(|key| Change { old: old.remove(&key), new: new.remove(&key), key });
    Ok(changes.filter(|change| change.old != change.new).collect())
}

fn flat<T: Serialize>(value: &T) -> Result<BTreeMap<String, String>, ConfigError> {
    let table = toml::Table::try_from(value).map_err(ConfigError::not_toml)?;
    let mut leaves = BTreeMap::new();
    flatten(&toml::Value::Table(table), String::new(), &mut leaves);
    Ok(leaves)
}

fn flatten(value: &toml::Value, key: String, leaves: &mut BTreeMap<String, String>) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table {
                let dot = if key.is_empty() { "" } else { "." };
                flatten(value, format!("{key}{dot}{name}"), leaves);
            }
        }
        leaf => drop(leaves.insert(key, leaf.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn changes(old: &Value, new: &Value) -> Vec<(String, Option<String>, Option<String>)> {
        diff(old, new).unwrap().into_iter().map(|change| (change.key, change.old, change.new)).collect()
    }

    #[test]
    fn changed_added_and_removed_keys_are_named_with_their_sections() {
        let old = json!({"same": 1, "log": {"filter": "info"}, "policy": {"lease": {"ms": 3}, "gone": [1]}});
        let new = json!({"same": 1, "log": {"filter": "warn"}, "policy": {"lease": {"ms": 4}, "come": true}});
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            changes(&old, &new),
            [
                ("log.filter".to_owned(), text("\"info\""), text("\"warn\"")),
                ("policy.come".to_owned(), None, text("true")),
                ("policy.gone".to_owned(), text("[1]"), None),
                ("policy.lease.ms".to_owned(), text("3"), text("4")),
            ]
        );
        assert_eq!(changes(&old, &old), []);
    }

    #[test]
    fn what_toml_cannot_say_is_an_error() {
        diff(&json!({"big": u64::MAX}), &json!({})).unwrap_err();
    }
}

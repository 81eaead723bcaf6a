//! The shape of the workspace is part of the design: who may depend on whom.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Edges among our crates, as ARCHITECTURE.md draws them.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let edges: [(&str, &[&str]); 13] = [
        ("thalweg-protocol", &[]),
        ("thalweg-functions", &["thalweg-protocol"]),
        ("thalweg-broker", &["thalweg-protocol"]),
        ("thalweg-store", &["thalweg-protocol", "thalweg-broker"]),
        ("thalweg-invoker", &["thalweg-protocol", "thalweg-broker", "thalweg-functions", "thalweg-store"]),
        ("thalweg-gateway", &["thalweg-protocol", "thalweg-broker", "thalweg-functions", "thalweg-store"]),
        ("thalweg-autoscaler", &["thalweg-protocol", "thalweg-broker"]),
        ("thalweg-sdk", &["thalweg-protocol", "thalweg-broker"]),
        ("thalweg-python", &["thalweg-sdk"]),
        ("thalweg-telemetry", &[]),
        ("thalweg", &["*"]),
        ("thalweg-simulation", &["*"]),
        ("thalweg-tests", &["*"]),
    ];
    edges.into_iter().map(|(from, to)| (from, to.iter().copied().collect())).collect()
}

#[test]
fn crates_depend_on_each_other_only_as_drawn() {
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec().expect("cargo metadata");
    let allowed = allowed();
    let names: BTreeSet<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let drawn: BTreeSet<&str> = allowed.keys().copied().collect();
    assert_eq!(names, drawn, "the drawing names every crate and no other");
    for package in &metadata.packages {
        let may = &allowed[package.name.as_str()];
        for dependency in &package.dependencies {
            let ours = dependency.name.starts_with("thalweg") && dependency.kind == DependencyKind::Normal;
            assert!(
                !ours || may.contains("*") || may.contains(dependency.name.as_str()),
                "{} must not depend on {}",
                package.name,
                dependency.name
            );
            // One owner for each of these.
            for (library, owner) in [
                ("sled", "thalweg-store"),
                ("metrics-exporter-prometheus", "thalweg-telemetry"),
                ("bollard", "thalweg-autoscaler"),
                ("kube", "thalweg-autoscaler"),
            ] {
                assert!(
                    dependency.name != library || package.name.as_str() == owner,
                    "only {owner} may know {library}, not {}",
                    package.name
                );
            }
            let io = ["tokio", "async-nats", "axum"].contains(&dependency.name.as_str());
            let pure = ["thalweg-protocol", "thalweg-functions"].contains(&package.name.as_str());
            assert!(
                !(io && pure),
                "{} does no input or output, {} is for that",
                package.name,
                dependency.name
            );
        }
    }
}

#[test]
fn the_shipped_configuration_is_the_default_one() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/thalweg.toml");
    let text = std::fs::read_to_string(path).expect("docs/thalweg.toml");
    let shipped: thalweg::config::Config = toml::from_str(&text).expect("it loads");
    assert_eq!(shipped, thalweg::config::Config::default());
    // Every key that has a value by default stands in the file, so that readers find it.
    let default = toml::Value::try_from(thalweg::config::Config::default()).expect("it can be written");
    let written: toml::Value = toml::from_str(&text).expect("it parses");
    missing_in(&default, &written, "");
}

#[test]
fn the_shipped_configuration_marks_what_can_be_reloaded() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/thalweg.toml");
    let text = std::fs::read_to_string(path).expect("docs/thalweg.toml");
    assert_eq!(marked(&text), reloadable());
}

/// Keys whose comment says "Reloadable.".
fn marked(text: &str) -> BTreeSet<String> {
    let (mut section, mut marked, mut keys) = (String::new(), false, BTreeSet::new());
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix('#') {
            marked |= comment.contains(" Reloadable.");
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        } else if let Some((key, _)) = line.split_once(" = ")
            && marked
        {
            keys.insert(format!("{section}.{key}"));
        }
        marked = false;
    }
    keys
}

/// Keys that a running process adopts, found by changing each of them.
fn reloadable() -> BTreeSet<String> {
    use thalweg::config::Config;
    let default = Config::default();
    let mut keys = BTreeSet::new();
    each_changed(&toml::Value::try_from(&default).expect("it can be written"), &mut |changed| {
        let Ok(changed) = changed.try_into::<Config>() else { return false };
        assert_ne!(changed, default);
        let adopted = default.adopting(&changed);
        assert!(adopted == default || adopted == changed, "a key is adopted or it is not");
        let changes = thalweg_telemetry::config::diff(&default, &adopted).expect("compared");
        keys.extend(changes.into_iter().map(|change| change.key));
        true
    });
    keys
}

/// Calls `take` with `tree`, one leaf changed at a time; where it returns false the new value was none for this
/// key, and another one is tried.
fn each_changed(tree: &toml::Value, take: &mut dyn FnMut(toml::Value) -> bool) {
    let toml::Value::Table(table) = tree else {
        use toml::Value::{Boolean, Float, Integer, String};
        let others = match tree {
            Boolean(value) => vec![Boolean(!value)],
            Integer(value) => vec![Integer(value + 1)],
            Float(value) => vec![Float(value / 2.0)],
            // Of what has a form: an address, a format, an actuator, a place for the queues.
            String(_) => {
                ["other", "127.0.0.1:1", "json", "external", "file"].map(|text| String(text.into())).into()
            }
            other => panic!("no other value is known for {other}"),
        };
        assert!(others.into_iter().any(take), "no other value was accepted in place of {tree}");
        return;
    };
    for (key, value) in table {
        each_changed(value, &mut |changed| {
            let mut table = table.clone();
            table.insert(key.clone(), changed);
            take(toml::Value::Table(table))
        });
    }
}

fn missing_in(default: &toml::Value, written: &toml::Value, path: &str) {
    if let toml::Value::Table(table) = default {
        for (key, value) in table {
            let here = format!("{path}.{key}");
            let found = written.get(key).unwrap_or_else(|| panic!("docs/thalweg.toml lacks {here}"));
            missing_in(value, found, &here);
        }
    }
}

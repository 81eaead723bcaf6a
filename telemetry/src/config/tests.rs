//! Layers, errors and dumps of one configuration that has every shape ours have.

use std::collections::BTreeMap;
use std::io::Write;

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    store: Store,
    level: Level,
    name: String,
    invokers: u16,
    budget: u64,
    target: f64,
    embedded: bool,
    token: Option<String>,
    peers: Vec<String>,
    quotas: BTreeMap<String, Quota>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Store {
    path: String,
    slab_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Quota {
    invokers: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Process,
    Disk,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            store: Store::default(),
            level: Level::Process,
            name: "default".into(),
            invokers: 1,
            budget: 1 << 30,
            target: 0.5,
            embedded: true,
            token: None,
            peers: Vec::new(),
            quotas: BTreeMap::new(),
        }
    }
}

impl Default for Store {
    fn default() -> Self {
        Self { path: "data".into(), slab_bytes: 4096 }
    }
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = pairs.iter();
    owned.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn loader(environment: &[(&str, &str)], overrides: &[(&str, &str)]) -> Loader {
    Loader::new("THALWEG").environment(pairs(environment)).overrides(pairs(overrides))
}

fn load(environment: &[(&str, &str)], overrides: &[(&str, &str)]) -> Settings {
    loader(environment, overrides).load().unwrap()
}

fn failure(loader: &Loader) -> String {
    loader.load::<Settings>().unwrap_err().to_string()
}

fn assert_says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "no {word:?} in: {error}");
    }
}

#[test]
fn without_layers_the_defaults_hold() {
    assert_eq!(load(&[], &[]), Settings::default());
}

#[test]
fn each_layer_covers_the_one_below() {
    let file = file("invokers = 2\nbudget = 2\nname = 'file'\n[store]\nslab_bytes = 2\n");
    let settings: Settings =
        loader(&[("THALWEG__BUDGET", "3"), ("THALWEG__NAME", "environment")], &[("name", "override")])
            .file(Some(file.path().to_owned()))
            .load()
            .unwrap();
    let expected = Settings {
        invokers: 2,
        budget: 3,
        name: "override".into(),
        store: Store { slab_bytes: 2, ..Store::default() },
        ..Settings::default()
    };
    assert_eq!(settings, expected);
}

#[test]
fn text_becomes_what_the_field_wants() {
    let settings = load(
        &[
            ("THALWEG__EMBEDDED", "false"),
            ("THALWEG__INVOKERS", "12"),
            ("THALWEG__BUDGET", "18446744073709551615"),
            ("THALWEG__TARGET", "2"),
            ("THALWEG__LEVEL", "disk"),
            ("THALWEG__STORE__SLAB_BYTES", "0512"),
            ("THALWEG__PEERS", "['a', \"b\"]"),
        ],
        &[("quotas.a.invokers", "3")],
    );
    assert!(!settings.embedded);
    assert_eq!(settings.invokers, 12);
    assert_eq!(settings.budget, u64::MAX);
    assert!((settings.target - 2.0).abs() < f64::EPSILON);
    assert_eq!(settings.level, Level::Disk);
    assert_eq!(settings.store.slab_bytes, 512);
    assert_eq!(settings.peers, ["a", "b"]);
    assert_eq!(settings.quotas["a"], Quota { invokers: 3, note: None });
    assert!((load(&[], &[("target", "25e-2")]).target - 0.25).abs() < f64::EPSILON);
}

#[test]
fn strings_arrive_as_they_were_written() {
    let texts = [
        "007",
        "1.10",
        "1e3",
        "true",
        "12",
        "1.5",
        "+1",
        "",
        " x ",
        "inf",
        "-0",
        "[::1]:4222",
        "[1]x",
        "[span]=debug",
        "a=b",
        "\"quoted\"",
        "18446744073709551616",
        "-0.0",
    ];
    for text in texts {
        assert_eq!(load(&[("THALWEG__NAME", text)], &[]).name, text);
        let token = load(&[], &[("token", text)]).token;
        assert_eq!(token.as_deref(), Some(text));
    }
}

#[test]
fn other_variables_are_left_alone() {
    let settings = load(
        &[("THALWEG_URL", "nats://x"), ("THALWEG_NO_SUCH", "1"), ("THALWEGS__NAME", "x"), ("NAME", "x")],
        &[],
    );
    assert_eq!(settings, Settings::default());
}

#[test]
fn an_unknown_key_is_named_with_its_source() {
    let error = failure(&loader(&[("THALWEG__STORE__SLAB_BITES", "1")], &[]));
    assert_says(
        &error,
        &[
            "unknown key `store.slab_bites`",
            "environment variable `THALWEG__STORE__SLAB_BITES`",
            "`slab_bytes`",
        ],
    );

    let error = failure(&loader(&[], &[("nmae", "x")]));
    assert_says(&error, &["unknown key `nmae`", "override `nmae=x`"]);

    let file = file("[quotas.'a.b']\ninvokers = 1\ncolour = 'red'\n");
    let path = file.path().to_str().unwrap();
    let error = failure(&loader(&[], &[]).file(Some(path.into())));
    assert_says(&error, &["unknown key `quotas.a.b.colour`", path]);
}

#[test]
fn a_bad_value_is_named_with_its_source() {
    let environment = [("THALWEG__STORE__SLAB_BYTES", "lots")];
    let table = [
        (loader(&environment, &[]), "store.slab_bytes", "`THALWEG__STORE__SLAB_BYTES`"),
        (loader(&[], &[("invokers", "-1")]), "invokers", "`invokers=-1`"),
        (loader(&[], &[("invokers", "65536")]), "invokers", "`invokers=65536`"),
        (loader(&[], &[("level", "memory")]), "level", "`level=memory`"),
        (loader(&[], &[("store", "x")]), "store", "`store=x`"),
        (loader(&[], &[("peers", "x")]), "peers", "`peers=x`"),
    ];
    for (loader, key, origin) in table {
        let error = failure(&loader);
        assert_says(&error, &[&format!("invalid value for `{key}`"), origin]);
    }
}

#[test]
fn numbers_are_never_rounded_in_silence() {
    for text in ["1.5", "true"] {
        let error = failure(&loader(&[], &[("invokers", text)]));
        assert_says(&error, &["`invokers`", text]);
    }
    let file = file("[quotas.a]\ninvokers = 1.5\n");
    let error = failure(&loader(&[], &[]).file(Some(file.path().into())));
    assert_says(&error, &["`quotas.a.invokers`", "configuration file"]);
}

#[test]
fn a_missing_field_names_what_wrote_the_section() {
    let file = file("[quotas.a]\n");
    let path = file.path().to_str().unwrap();
    let loader = loader(&[], &[]).file(Some(path.into()));
    // An empty section has no leaf that could remember the file.
    assert_says(&failure(&loader), &["`quotas.a.invokers`", "missing", "merged"]);
    let error = failure(&loader.overrides(pairs(&[("quotas.a.note", "x")])));
    assert_says(&error, &["`quotas.a.invokers`", "missing", "`quotas.a.note=x`"]);
}

#[test]
fn a_missing_file_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("thalweg.toml");
    let error = failure(&loader(&[], &[]).file(Some(path.clone())));
    assert_says(&error, &[path.to_str().unwrap(), "does not exist", "create it"]);
    let error = failure(&loader(&[], &[]).file(Some(folder.path().into())));
    assert_says(&error, &["could not be read"]);
}

#[test]
fn broken_toml_names_file_and_line() {
    let file = file("name = 'x'\ninvokers = = 2\n");
    let path = file.path().to_str().unwrap();
    let error = failure(&loader(&[], &[]).file(Some(path.into())));
    assert_says(&error, &[path, "line 2"]);
}

#[test]
fn a_key_with_an_empty_part_is_an_error() {
    for name in ["THALWEG__", "THALWEG__STORE__", "THALWEG____NAME"] {
        assert_says(&failure(&loader(&[(name, "x")], &[])), &[name, "empty"]);
    }
    assert_says(&failure(&loader(&[], &[("store.", "x")])), &["store.", "empty"]);
}

#[test]
fn overrides_split_at_the_first_equals_sign() {
    let split = |text| parse_override(text).unwrap();
    assert_eq!(split("a.b=c=d"), ("a.b".into(), "c=d".into()));
    assert_eq!(split("a="), ("a".into(), String::new()));
    for text in ["a", "=b", ""] {
        assert_says(&parse_override(text).unwrap_err().to_string(), &["section.key=value"]);
    }
}

#[test]
fn of_two_overrides_the_last_wins() {
    assert_eq!(load(&[], &[("name", "a"), ("name", "b")]).name, "b");
}

#[test]
fn a_dump_loads_back_to_the_same_value() {
    let changed = Settings {
        store: Store { path: "C:\\\"data\"\n".into(), slab_bytes: 1 },
        level: Level::Disk,
        name: "007".into(),
        invokers: 9,
        budget: i64::MAX as u64,
        target: 1e-9,
        embedded: false,
        token: Some("true".into()),
        peers: vec!["a".into(), String::new()],
        quotas: BTreeMap::from([("a.b c".into(), Quota { invokers: 2, note: Some("x".into()) })]),
    };
    for settings in [Settings::default(), changed] {
        let file = file(&dump(&settings).unwrap());
        let loader = loader(&[], &[]).file(Some(file.path().into()));
        assert_eq!(loader.load::<Settings>().unwrap(), settings);
    }
}

#[test]
fn what_toml_cannot_say_is_not_dumped() {
    let huge = Settings { budget: u64::MAX, ..Settings::default() };
    assert!(matches!(dump(&huge), Err(ConfigError::NotToml { .. })));

    #[derive(Serialize, Deserialize)]
    #[serde(default)]
    struct Present {
        token: Option<u8>,
    }
    impl Default for Present {
        fn default() -> Self {
            Self { token: Some(1) }
        }
    }
    let absent = Present { token: None };
    assert!(matches!(dump(&absent), Err(ConfigError::NotToml { .. })));
}

#[test]
fn the_process_environment_is_read_by_default() {
    // Nobody sets variables with this prefix, so this shows that reading works and leaves others out.
    let settings: Settings = Loader::new("THALWEG_TEST_NOBODY").load().unwrap();
    assert_eq!(settings, Settings::default());
}

//! The command line, as a user runs it.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The binary, pointed at a deployment.
#[derive(Clone, Debug)]
pub struct Thalweg {
    url: String,
}

impl Thalweg {
    /// Against the NATS server at `url`.
    #[must_use]
    pub fn at(url: &str) -> Self {
        Self { url: url.to_owned() }
    }

    /// The command, to be started in a way of the caller's.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(crate::cluster::binary());
        command.args(args).env("THALWEG_URL", &self.url).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    /// What a command prints that has to succeed.
    ///
    /// # Panics
    /// When it fails, or complains.
    #[must_use]
    pub fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && err.is_empty(), "{args:?}: {}\n{out}\n{err}", output.status);
        out.into_owned()
    }

    /// What a command prints with `--json` that has to succeed.
    ///
    /// # Panics
    /// When it fails, or prints anything else.
    #[must_use]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.text(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}\n{text}"))
    }

    /// Runs a command that has to fail with `exit` and `code`, in both forms and with nothing on standard output;
    /// its text has to contain all of `words`.
    ///
    /// # Panics
    /// Otherwise.
    pub fn fails(&self, args: &[&str], exit: i32, code: &str, words: &[&str]) {
        let output = self.run(args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {text}");
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
        for word in words {
            assert!(text.contains(word), "{args:?} should say {word:?}: {text}");
        }
        let output = self.run(&[args, &["--json"]].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        let value: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"));
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {text}");
        assert_eq!(value["error"]["code"], code, "{args:?}: {value}");
        assert!(value["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{value}");
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
    }
}

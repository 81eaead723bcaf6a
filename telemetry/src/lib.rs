//! Process scaffolding of Thalweg: what every component needs around its work, and nothing of the
//! work itself.
//!
//! * [`config`]: defaults, file, environment and overrides, merged into one typed value, and what
//!   has changed between two of them;
//! * [`logs`]: lines for people on a terminal, JSON for machines everywhere else; the filter can be
//!   changed while the process runs;
//! * [`metrics`]: the Prometheus recorder, with real histograms;
//! * [`others`]: the metrics of processes that this one has started, among its own;
//! * [`health`]: which components are ready, and what the others wait for;
//! * [`admin`]: `/livez`, `/readyz`, `/metrics` and `/log` over HTTP;
//! * [`http`]: asking the admin port of another process;
//! * [`shutdown`]: the first signal drains, the second one exits;
//! * [`systemd`]: tells systemd when the process is ready and when it stops.
//!
//! This crate depends on no other crate of the project, and is the only one that knows the
//! Prometheus exporter: the others record through the `metrics` facade.

pub mod admin;
pub mod config;
pub mod health;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod others;
pub mod shutdown;
pub mod systemd;

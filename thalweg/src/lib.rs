//! The one binary of Thalweg, as a library: configuration, the services' hosts, the embedded broker,
//! the demo and the benchmarks. `main.rs` only parses arguments.

pub mod actuators;
mod admin;
pub mod bench;
mod census;
pub mod cli;
pub mod config;
pub mod demo;
mod doctor;
mod health;
mod host;
mod metrics;
mod models;
pub mod nats;
mod pools;
mod process;
mod reload;
pub mod services;
pub mod simulate;
pub mod up;

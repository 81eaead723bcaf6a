//! The built-in functions, seen through the public API.

mod approx;
mod bits;
mod common;
mod optimizers;
mod partial;
mod reductions;
mod references;
mod schedules;
mod settings;
mod sgd;

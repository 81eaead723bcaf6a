//! The built-in functions, seen through the public API.

mod bits;
mod common;
mod reductions;
mod settings;
mod sgd;

//! Tests of the core against a model of everything around it.

mod admission;
mod model;
mod partial;
mod random;
mod recovery;
mod rounds;
mod setup;

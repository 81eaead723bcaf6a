//! The built-in functions.

mod accumulator;
mod adagrad;
mod adam;
mod lanes;
mod lion;
mod optimizer;
mod reduce;
mod sgd;

use thalweg_protocol::FunctionSpec;

use self::optimizer::{Optimizer, Step};
use crate::{
    AggregationFunction, Digest, InvalidSettings,
    settings::{self, Grouped},
};

/// See [`crate::resolve`].
pub(crate) fn resolve(spec: &FunctionSpec) -> Result<Box<dyn AggregationFunction>, InvalidSettings> {
    let rule = match spec.name.as_str() {
        "sum" => reduce::Rule::Sum,
        "mean" => reduce::Rule::Mean,
        "weighted_mean" => reduce::Rule::WeightedMean,
        "sgd" => return optimizer(spec, settings::Sgd::parse(spec)?),
        "adam" => return optimizer(spec, settings::Adam::parse(spec, false)?),
        "adamw" => return optimizer(spec, settings::Adam::parse(spec, true)?),
        "adagrad" => return optimizer(spec, settings::Adagrad::parse(spec)?),
        "lion" => return optimizer(spec, settings::Lion::parse(spec)?),
        name => return Err(InvalidSettings::UnknownFunction { name: name.to_owned() }),
    };
    settings::none(spec)?;
    Ok(Box::new(reduce::Reduction::new(rule)))
}

fn optimizer<S: Step>(
    spec: &FunctionSpec,
    settings: Grouped<S>,
) -> Result<Box<dyn AggregationFunction>, InvalidSettings> {
    Ok(Box::new(Optimizer::new(settings, settings::schedule(spec)?)))
}

/// Digest of a built-in function. Whoever changes a bit of what a function computes raises its
/// version in `identity`: it is not derived from the code, so that rebuilding never changes it.
fn digest(identity: &str) -> Digest {
    let mut digest = Digest::default();
    blake3::Hasher::new().update(identity.as_bytes()).finalize_xof().fill(&mut digest);
    digest
}

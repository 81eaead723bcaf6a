//! The built-in functions.

mod lanes;
mod reduce;
mod sgd;

use thalweg_protocol::FunctionSpec;

use crate::{AggregationFunction, Digest, InvalidSettings, settings};

/// See [`crate::resolve`].
pub(crate) fn resolve(spec: &FunctionSpec) -> Result<Box<dyn AggregationFunction>, InvalidSettings> {
    let rule = match spec.name.as_str() {
        "sum" => reduce::Rule::Sum,
        "mean" => reduce::Rule::Mean,
        "weighted_mean" => reduce::Rule::WeightedMean,
        "sgd" => {
            let (base, groups) = settings::Sgd::parse(spec)?;
            return Ok(Box::new(sgd::Sgd::new(base, groups)));
        }
        name => return Err(InvalidSettings::UnknownFunction { name: name.to_owned() }),
    };
    settings::none(spec)?;
    Ok(Box::new(reduce::Reduction::new(rule)))
}

/// Digest of a built-in function. Whoever changes a bit of what a function computes raises its
/// version in `identity`: it is not derived from the code, so that rebuilding never changes it.
fn digest(identity: &str) -> Digest {
    let mut digest = Digest::default();
    blake3::Hasher::new().update(identity.as_bytes()).finalize_xof().fill(&mut digest);
    digest
}

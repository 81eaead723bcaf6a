//! Performing a fold: state from the store, contributions in rank order, parked ones from the stream.

use std::panic::AssertUnwindSafe;

use async_nats::jetstream;
use bytes::Bytes;
use thalweg_broker::{Registry, stage};
use thalweg_functions::{Contribution, Kind as FunctionKind, ShardContext};
use thalweg_protocol::{GradientHeader, Kind, Suspect, checksum, frame, subjects, suspect_key};
use thalweg_store::ShardStore;

use crate::core::{FoldError, Input, Plan};

/// What a fold needs from outside.
pub(crate) struct FoldContext<'a> {
    pub(crate) store: &'a dyn ShardStore,
    pub(crate) jetstream: &'a jetstream::Context,
    pub(crate) registry: &'a Registry,
    pub(crate) invoker: &'a str,
    /// Creation of the partition's stream, and the suspect found when it was taken over.
    pub(crate) stream_created: i64,
    pub(crate) suspect: Option<Suspect>,
}

/// Folds one round of one shard; returns the next state.
pub(crate) async fn fold(context: &FoldContext<'_>, plan: &Plan) -> Result<Bytes, FoldError> {
    stage::reached(stage::BEFORE_FOLD);
    let function = plan.job.function(plan.round).clone();
    let elements = plan.job.record.layout.len(plan.shard);
    let weights: f64 = plan.inputs.iter().map(|input| f64::from(input.weight)).sum();
    // A reduction overwrites the state, so that it need not be read, unless it may stay as it is.
    let needs_state = function.kind() == FunctionKind::Optimizer || plan.inputs.is_empty() || weights == 0.0;
    let state = if needs_state {
        let job = plan.job.record.incarnation;
        let state = context.store.fetch(job, plan.shard, true).await;
        let state = state.map_err(|error| FoldError::Unavailable(error.to_string()))?;
        if state.head != plan.expect {
            return Err(FoldError::Moved);
        }
        state.values
    } else {
        Bytes::new()
    };
    let groups = plan.job.groups(plan.shard);
    let mut out = Vec::with_capacity(elements * 4 * (1 + function.slots()));
    let mut fold = function.begin(ShardContext { elements, groups: &groups }, &state);
    for input in &plan.inputs {
        let parked;
        let values = match &input.values {
            Some(values) => values,
            None => {
                parked = read_parked(context, plan, input).await?;
                &parked
            }
        };
        if plan.careful {
            mark(context, plan, input).await?;
        }
        stage::poisoned(input.weight);
        let contribution = Contribution { rank: input.rank, weight: input.weight, values };
        guard(|| fold.accept(contribution))?;
    }
    guard(|| fold.finish(&mut out))?;
    Ok(Bytes::from(out))
}

/// A function that panics fails its job, not its invoker.
fn guard(work: impl FnOnce()) -> Result<(), FoldError> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        FoldError::Function(text.unwrap_or_else(|| "panic".to_owned()))
    })
}

/// Reads a parked contribution back and makes sure that it is the one that was parked (rule P17).
async fn read_parked(context: &FoldContext<'_>, plan: &Plan, input: &Input) -> Result<Bytes, FoldError> {
    let unavailable = |error: &dyn std::fmt::Display| FoldError::Unavailable(error.to_string());
    let name = subjects::gradient_stream(plan.partition);
    let stream = context.jetstream.get_stream_no_info(name).await.map_err(|error| unavailable(&error))?;
    let message = match stream.direct_get(input.sequence).await {
        Ok(message) => message,
        Err(error) if error.kind() == jetstream::stream::DirectGetErrorKind::NotFound => {
            return Err(FoldError::ParkedGone(input.rank));
        }
        Err(error) => return Err(unavailable(&error)),
    };
    if checksum(&[&message.payload]) != input.checksum {
        return Err(FoldError::ParkedGone(input.rank));
    }
    let opened = frame::open::<GradientHeader>(Kind::Gradient, &message.payload);
    opened.map(|(_, payload)| payload).map_err(|_| FoldError::ParkedGone(input.rank))
}

/// Writes down which contribution is tried next, in case it kills us (rule P18).
async fn mark(context: &FoldContext<'_>, plan: &Plan, input: &Input) -> Result<(), FoldError> {
    let unavailable = |error: &dyn std::fmt::Display| FoldError::Unavailable(error.to_string());
    let key = suspect_key(plan.partition);
    let (_, revision) = context.registry.get::<Suspect>(&key).await.map_err(|error| unavailable(&error))?;
    let before = context.suspect.as_ref().filter(|suspect| {
        suspect.sequence == input.sequence && suspect.stream_created == context.stream_created
    });
    let suspect = Suspect {
        sequence: input.sequence,
        stream_created: context.stream_created,
        attempt: before.map_or(1, |suspect| suspect.attempt + 1),
        invoker: context.invoker.to_owned(),
    };
    match context.registry.put(&key, &suspect, revision).await {
        Ok(Ok(_)) => Ok(()),
        // Somebody else writes here: the partition is about to be taken from us.
        Ok(Err(_)) => {
            Err(FoldError::Unavailable("another invoker tries this partition's suspects".to_owned()))
        }
        Err(error) => Err(unavailable(&error)),
    }
}

//! Performing a fold: state from the store, contributions in rank order, parked ones from the stream.

use std::{cell::Cell, panic::AssertUnwindSafe};

use bytes::Bytes;
use thalweg_broker::{Queues, Registry, stage};
use thalweg_functions::{Contribution, ShardContext};
use thalweg_protocol::{GradientHeader, Kind, Suspect, checksum, frame, suspect_key};
use thalweg_store::{ShardStore, StoreError};

use crate::core::{FoldError, Input, Plan, may_pass};

/// What a fold needs from outside.
#[derive(Debug)]
pub struct FoldContext<'a> {
    /// For the state.
    pub store: &'a dyn ShardStore,
    /// For parked contributions.
    pub queues: &'a dyn Queues,
    /// For suspect records.
    pub registry: &'a Registry,
    /// Our id.
    pub invoker: &'a str,
    /// Creation of the partition's stream.
    pub stream_created: i64,
    /// The suspect found when the partition was taken over.
    pub suspect: Option<Suspect>,
    /// Counts the bytes of parked contributions.
    pub read_again_bytes: &'a Cell<u64>,
}

/// Folds one round of one shard, or some more of it; returns the next state, or the suspended fold.
///
/// # Errors
/// [`FoldError`].
pub async fn fold(context: &FoldContext<'_>, plan: &Plan) -> Result<Bytes, FoldError> {
    stage::reached(stage::BEFORE_FOLD);
    let function = plan.job.function(plan.round).clone();
    let elements = plan.job.record.layout.len(plan.shard);
    let groups = plan.job.groups(plan.shard);
    let shard = ShardContext { elements, groups: &groups, round: plan.round };
    let mut fold = if plan.expect.fold_count > 0 {
        let open = context.store.fetch_partial(plan.job.record.incarnation, plan.shard).await;
        let Some((head, _, partial)) = open.map_err(refused)? else { return Err(FoldError::Moved) };
        if head != plan.expect {
            return Err(FoldError::Moved);
        }
        function.resume(shard, &partial).map_err(|error| FoldError::Function(error.to_string()))?
    } else {
        function.begin(shard)
    };
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
    if plan.suspend {
        let mut out = Vec::with_capacity(function.partial_bytes(elements));
        guard(|| fold.suspend(&mut out))?;
        return Ok(Bytes::from(out));
    }
    // A reduction overwrites the state, so that it need not be read, unless it stays as it is.
    let state = if fold.needs_state() {
        let state =
            context.store.fetch(plan.job.record.incarnation, plan.shard, true).await.map_err(refused)?;
        if state.head != plan.expect.closed() {
            return Err(FoldError::Moved);
        }
        state.values
    } else {
        Bytes::new()
    };
    let mut out = Vec::with_capacity(elements * 4 * (1 + function.slots()));
    guard(|| fold.finish(&state, &mut out))?;
    Ok(Bytes::from(out))
}

/// What the store says when it gives nothing.
fn refused(error: StoreError) -> FoldError {
    if may_pass(&error) { FoldError::Unavailable(error.to_string()) } else { FoldError::Refused(error) }
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
    let message = context.queues.read(plan.partition, input.sequence).await;
    let message = message.map_err(|error| unavailable(&error))?.ok_or(FoldError::ParkedGone(input.rank))?;
    context.read_again_bytes.set(context.read_again_bytes.get() + message.len() as u64);
    if checksum(&[&message]) != input.checksum {
        return Err(FoldError::ParkedGone(input.rank));
    }
    let opened = frame::open::<GradientHeader>(Kind::Gradient, &message);
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

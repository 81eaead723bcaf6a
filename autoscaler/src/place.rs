//! Which invoker serves which partition: a pure function.

use std::collections::{BTreeMap, HashMap};

use thalweg_protocol::{Epoch, Partition, PlacedPartition, Placement};

/// An invoker, as placement sees it. Whoever is not among the candidates is taken for dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: String,
    /// Whether it may hold partitions; one that is draining may not.
    pub placeable: bool,
    /// What its last beat said it holds.
    pub held: Vec<(Partition, Epoch)>,
}

/// The next placement, with `partitions` entries.
///
/// * Levelled: the placeable candidates' counts differ by at most one.
/// * As few partitions as possible change their holder; those of dead and draining invokers have to.
/// * A partition whose holder changes gets epoch 1 + the highest epoch known, in `current` or in any beat
///   (rule P14). So does one whose invokers report an epoch above the current one (a registry that was
///   lost), since they would not listen otherwise. All others stay exactly as they are.
/// * The holder is `None` when there is nobody.
///
/// Deterministic and idempotent.
#[must_use]
pub fn place(current: &Placement, candidates: &[Candidate], partitions: Partition) -> Placement {
    let mut next = Placement { partitions: current.partitions.clone(), first: current.first };
    next.partitions.resize(usize::from(partitions), PlacedPartition::default());
    let holders = assign(&next, candidates);
    let mut reported: HashMap<usize, Epoch> = HashMap::new();
    for (partition, epoch) in candidates.iter().flat_map(|candidate| &candidate.held) {
        let Some(index) = partition.checked_sub(current.first) else { continue };
        let highest = reported.entry(usize::from(index)).or_default();
        *highest = (*highest).max(*epoch);
    }
    for (index, (placed, holder)) in next.partitions.iter_mut().zip(holders).enumerate() {
        let reported = reported.get(&index).copied().unwrap_or(0);
        if placed.holder.as_deref() != holder || (holder.is_some() && reported > placed.epoch) {
            *placed = PlacedPartition {
                epoch: placed.epoch.max(reported).saturating_add(1),
                holder: holder.map(str::to_owned),
            };
        }
    }
    next
}

/// The holder of every partition.
fn assign<'a>(current: &Placement, candidates: &'a [Candidate]) -> Vec<Option<&'a str>> {
    let mut kept: BTreeMap<&str, Vec<usize>> = (candidates.iter())
        .filter(|candidate| candidate.placeable)
        .map(|candidate| (candidate.id.as_str(), Vec::new()))
        .collect();
    let total = current.partitions.len();
    let mut holders = vec![None; total];
    if kept.is_empty() {
        return holders;
    }
    let mut homeless = Vec::new();
    for (index, placed) in current.partitions.iter().enumerate() {
        match placed.holder.as_deref().and_then(|holder| kept.get_mut(holder)) {
            Some(own) => own.push(index),
            None => homeless.push(index),
        }
    }
    // Whoever holds most gets the larger share, so that the fewest have to move.
    let (share, mut larger) = (total / kept.len(), total % kept.len());
    let mut by_count: Vec<(&str, Vec<usize>)> = kept.into_iter().collect();
    by_count.sort_by_key(|(id, own)| (std::cmp::Reverse(own.len()), *id));
    let mut shares = Vec::with_capacity(by_count.len());
    for (id, mut own) in by_count {
        let wanted = share + usize::from(larger > 0);
        larger = larger.saturating_sub(1);
        homeless.extend(own.split_off(own.len().min(wanted)));
        shares.push((id, own, wanted));
    }
    homeless.sort_unstable();
    let mut homeless = homeless.into_iter();
    for (id, own, wanted) in shares {
        let missing = wanted - own.len();
        for index in own.into_iter().chain(homeless.by_ref().take(missing)) {
            holders[index] = Some(id);
        }
    }
    holders
}

/// Partitions whose holder differs between two placements.
#[must_use]
pub fn moves(before: &Placement, after: &Placement) -> usize {
    let holder = |placement: &Placement, index: usize| {
        placement.partitions.get(index).and_then(|placed| placed.holder.clone())
    };
    (0..before.partitions.len().max(after.partitions.len()))
        .filter(|index| holder(before, *index) != holder(after, *index))
        .count()
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;

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
    hand_to(next, &holders, candidates)
}

/// An invoker with more than this times the mean load gives some of it away.
const HEAVY: f64 = 1.25;
/// What an exchange has to take off the heavier of the two, in mean loads: it costs two moves.
const WORTH: f64 = 0.1;
/// Exchanges at a time.
const EXCHANGES: usize = 4;

/// The same placement with partitions exchanged between invokers with more and with less than their share of the load;
/// `None` where that would not help. `loads` are those of all partitions, in any unit; invokers with less than `least` in
/// all give nothing away.
///
/// Counts stay levelled, so [`place`] keeps what was exchanged. While the heaviest invoker has more than `HEAVY` times
/// the mean, it gives the partition to the lightest (and takes one back, where it has not one more than that) that leaves
/// the smaller largest load; at most `EXCHANGES` times, and not for less than `WORTH`. What holds a single partition
/// that is heavy by itself keeps it.
#[must_use]
pub fn exchange(
    current: &Placement,
    candidates: &[Candidate],
    loads: &[f64],
    least: f64,
) -> Option<Placement> {
    let able = candidates.iter().filter(|candidate| candidate.placeable);
    let mut shares: BTreeMap<&str, Share> =
        able.map(|candidate| (candidate.id.as_str(), Share::default())).collect();
    for ((index, placed), load) in current.partitions.iter().enumerate().zip(loads) {
        let share = placed.holder.as_deref().and_then(|holder| shares.get_mut(holder))?;
        share.load += load;
        share.partitions.push(index);
    }
    let mean = shares.values().map(|share| share.load).sum::<f64>() / shares.len().max(1) as f64;
    let mut exchanged = false;
    for _ in 0..EXCHANGES {
        let by_load = |a: &(&&str, &Share), b: &(&&str, &Share)| a.1.load.total_cmp(&b.1.load);
        let (heaviest, heavy) = shares.iter().max_by(by_load)?;
        let (lightest, light) = shares.iter().min_by(by_load)?;
        if heavy.load <= HEAVY * mean || heavy.load < least {
            break;
        }
        let back = light.partitions.iter().map(|index| Some(*index));
        let alone = (heavy.partitions.len() > light.partitions.len()).then_some(None);
        let load_of = |index: Option<usize>| index.map_or(0.0, |index| loads[index]);
        // Of two that are as good, the one with a single move.
        let options = alone.into_iter().chain(back).flat_map(|taken| {
            heavy.partitions.iter().map(move |given| (load_of(Some(*given)) - load_of(taken), *given, taken))
        });
        let largest_after = |difference: f64| (heavy.load - difference).max(light.load + difference);
        let best = options.min_by(|a, b| largest_after(a.0).total_cmp(&largest_after(b.0)));
        let Some((difference, given, taken)) = best else { break };
        if heavy.load - largest_after(difference) < WORTH * mean {
            break;
        }
        let (heaviest, lightest) = (*heaviest, *lightest);
        for (id, gives, takes, change) in
            [(heaviest, Some(given), taken, -difference), (lightest, taken, Some(given), difference)]
        {
            let share = shares.get_mut(id)?;
            share.load += change;
            share.partitions.retain(|index| Some(*index) != gives);
            share.partitions.extend(takes);
        }
        exchanged = true;
    }
    let mut holders = vec![None; current.partitions.len()];
    for (id, share) in &shares {
        share.partitions.iter().for_each(|index| holders[*index] = Some(*id));
    }
    let same = Placement { partitions: current.partitions.clone(), first: current.first };
    exchanged.then(|| hand_to(same, &holders, candidates))
}

/// What one invoker has of the load.
#[derive(Default)]
struct Share {
    load: f64,
    partitions: Vec<usize>,
}

/// A placement with these holders, and with new epochs where they are due.
fn hand_to(mut next: Placement, holders: &[Option<&str>], candidates: &[Candidate]) -> Placement {
    let mut reported: HashMap<usize, Epoch> = HashMap::new();
    for (partition, epoch) in candidates.iter().flat_map(|candidate| &candidate.held) {
        let Some(index) = partition.checked_sub(next.first) else { continue };
        let highest = reported.entry(usize::from(index)).or_default();
        *highest = (*highest).max(*epoch);
    }
    for (index, (placed, holder)) in next.partitions.iter_mut().zip(holders).enumerate() {
        let reported = reported.get(&index).copied().unwrap_or(0);
        if placed.holder.as_deref() != *holder || (holder.is_some() && reported > placed.epoch) {
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

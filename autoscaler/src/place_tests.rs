use proptest::prelude::*;

use super::*;

fn candidate(id: &str, placeable: bool) -> Candidate {
    Candidate { id: id.to_owned(), placeable, held: Vec::new() }
}

fn placement(holders: &[(Epoch, Option<&str>)]) -> Placement {
    let placed = |(epoch, holder): &(Epoch, Option<&str>)| PlacedPartition {
        epoch: *epoch,
        holder: holder.map(str::to_owned),
    };
    Placement { partitions: holders.iter().map(placed).collect(), first: 0 }
}

fn counts(placement: &Placement) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for holder in placement.partitions.iter().filter_map(|placed| placed.holder.clone()) {
        *counts.entry(holder).or_default() += 1;
    }
    counts
}

#[test]
fn first_invokers_share_everything() {
    let two = place(&Placement::default(), &[candidate("a", true), candidate("b", true)], 5);
    assert!(two.partitions.iter().all(|placed| placed.epoch == 1 && placed.holder.is_some()));
    assert_eq!(counts(&two), BTreeMap::from([("a".to_owned(), 3), ("b".to_owned(), 2)]));
}

#[test]
fn a_newcomer_takes_only_its_share() {
    let before = placement(&[(3, Some("a")), (4, Some("a")), (5, Some("b")), (6, Some("b"))]);
    let members = [candidate("a", true), candidate("b", true), candidate("c", true)];
    let after = place(&before, &members, 4);
    assert_eq!(after, placement(&[(3, Some("a")), (4, Some("a")), (5, Some("b")), (7, Some("c"))]));
    assert_eq!(moves(&before, &after), 1);
}

#[test]
fn the_dead_and_the_draining_lose_theirs() {
    let before = placement(&[(1, Some("dead")), (1, Some("drains")), (1, Some("a")), (0, None)]);
    let after = place(&before, &[candidate("a", true), candidate("drains", false)], 4);
    assert_eq!(after, placement(&[(2, Some("a")), (2, Some("a")), (1, Some("a")), (1, Some("a"))]));
}

#[test]
fn nobody_is_nobody_and_costs_one_epoch() {
    let before = placement(&[(7, Some("a")), (9, None)]);
    let after = place(&before, &[candidate("a", false)], 2);
    assert_eq!(after, placement(&[(8, None), (9, None)]));
    assert_eq!(place(&after, &[], 2), after);
}

#[test]
fn epochs_seen_in_beats_count() {
    // The registry was lost; an invoker still holds a partition by an epoch of the old one.
    let held = Candidate { held: vec![(0, 41), (9, 3)], ..candidate("a", true) };
    let after = place(&Placement::default(), std::slice::from_ref(&held), 2);
    assert_eq!(after, placement(&[(42, Some("a")), (1, Some("a"))]));
    assert_eq!(place(&after, std::slice::from_ref(&held), 2), after);
    // Also where the holder is the right one already: it would not listen to an older epoch.
    let stale = placement(&[(5, Some("a")), (1, Some("a"))]);
    assert_eq!(place(&stale, &[held], 2), after);
}

#[test]
fn the_heavily_loaded_give_to_the_lightly_loaded() {
    let before = placement(&[(1, Some("a")), (1, Some("a")), (1, Some("b")), (1, Some("b"))]);
    let members = [candidate("a", true), candidate("b", true)];
    let after = exchange(&before, &members, &[5.0, 5.0, 1.0, 1.0], 0.0);
    assert_eq!(after, Some(placement(&[(2, Some("b")), (1, Some("a")), (2, Some("a")), (1, Some("b"))])));
    // Little in all, even enough, or heavy by itself.
    assert_eq!(exchange(&before, &members, &[5.0, 5.0, 1.0, 1.0], 11.0), None);
    assert_eq!(exchange(&before, &members, &[1.2, 1.0, 1.0, 1.0], 0.0), None);
    assert_eq!(exchange(&before, &members, &[9.0, 0.0, 0.1, 0.1], 0.0), None);
    // Somebody is about to be relieved anyway.
    let draining = [candidate("a", true), candidate("b", false)];
    assert_eq!(exchange(&before, &draining, &[5.0, 5.0, 1.0, 1.0], 0.0), None);
}

#[test]
fn who_has_one_more_gives_without_taking() {
    let before = placement(&[(1, Some("a")), (1, Some("a")), (1, Some("b"))]);
    let after = exchange(&before, &[candidate("a", true), candidate("b", true)], &[3.0, 3.0, 1.0], 0.0);
    assert_eq!(after, Some(placement(&[(2, Some("b")), (1, Some("a")), (1, Some("b"))])));
}

fn holders() -> impl Strategy<Value = Vec<(Epoch, Option<u8>)>> {
    prop::collection::vec((0_u64..50, prop::option::weighted(0.9, 0_u8..8)), 0..40)
}

proptest! {
    #[test]
    fn placements_keep_their_promises(
        holders in holders(),
        members in prop::collection::btree_map(
            0_u8..8, (any::<bool>(), prop::collection::vec((0_u16..40, 0_u64..60), 0..4)), 0..8,
        ),
        partitions in 1_u16..40,
    ) {
        let before = Placement { partitions: holders.iter().map(|(epoch, holder)| PlacedPartition {
            epoch: *epoch, holder: holder.map(|id| id.to_string()),
        }).collect(), first: 0 };
        let members: Vec<_> = members.into_iter().map(|(id, (placeable, held))| Candidate {
            id: id.to_string(), placeable, held,
        }).collect();
        let able: Vec<_> = members.iter().filter(|m| m.placeable).map(|m| m.id.clone()).collect();
        let after = place(&before, &members, partitions);
        let total = usize::from(partitions);
        prop_assert_eq!(after.partitions.len(), total);

        // Levelled, and only on those who may hold something.
        let counts = counts(&after);
        prop_assert!(counts.keys().all(|id| able.contains(id)));
        let of = |id: &String| counts.get(id).copied().unwrap_or(0);
        if let (Some(least), Some(most)) = (able.iter().map(of).min(), able.iter().map(of).max()) {
            prop_assert!(most - least <= 1);
            prop_assert!(after.partitions.iter().all(|placed| placed.holder.is_some()));
        }

        let mut old = before;
        old.partitions.resize(total, PlacedPartition::default());
        let mut stayed = 0;
        for (index, (was, is)) in old.partitions.iter().zip(&after.partitions).enumerate() {
            let reported = members.iter().flat_map(|m| &m.held)
                .filter(|(p, _)| usize::from(*p) == index).map(|(_, epoch)| *epoch).max().unwrap_or(0);
            stayed += usize::from(was.holder == is.holder && is.holder.is_some());
            if was.holder != is.holder {
                prop_assert_eq!(is.epoch, 1 + was.epoch.max(reported));
            } else if is.holder.is_none() || reported <= was.epoch {
                prop_assert_eq!(was, is);
            } else {
                prop_assert_eq!(is.epoch, 1 + reported);
            }
        }

        // As few moves as any levelled placement: what stays is what fits into the shares when those
        // who hold most get the larger ones.
        if !able.is_empty() {
            let mut owned: Vec<usize> = able.iter().map(|id| {
                old.partitions.iter().filter(|placed| placed.holder.as_ref() == Some(id)).count()
            }).collect();
            owned.sort_unstable_by(|a, b| b.cmp(a));
            let (share, larger) = (total / able.len(), total % able.len());
            let best: usize = owned.iter().enumerate()
                .map(|(index, own)| (*own).min(share + usize::from(index < larger))).sum();
            prop_assert_eq!(stayed, best);
        }

        prop_assert_eq!(place(&after, &members, partitions), after);
    }

    #[test]
    fn exchanges_help_and_last(
        loads in prop::collection::vec(prop_oneof![Just(0.0), 0.0..10.0_f64, 50.0..100.0_f64], 1..40),
        invokers in 1_usize..9,
    ) {
        let members: Vec<_> = (0..invokers).map(|id| candidate(&id.to_string(), true)).collect();
        let partitions = Partition::try_from(loads.len()).unwrap();
        let mut current = place(&Placement::default(), &members, partitions);
        let heaviest = |placement: &Placement| {
            let of = |id: &str| -> f64 {
                let own = placement.partitions.iter().zip(&loads).filter(|(placed, _)| placed.holder.as_deref() == Some(id));
                own.map(|(_, load)| load).sum()
            };
            members.iter().map(|member| of(&member.id)).fold(0.0, f64::max)
        };
        let mut times = 0;
        while let Some(next) = exchange(&current, &members, &loads, 0.0) {
            prop_assert!(heaviest(&next) <= heaviest(&current));
            prop_assert!((1..=8).contains(&moves(&current, &next)));
            // It stays: counts are as levelled as before, and epochs are new where holders are.
            prop_assert_eq!(place(&next, &members, partitions), next.clone());
            for (was, is) in current.partitions.iter().zip(&next.partitions) {
                prop_assert_eq!(is.epoch, was.epoch + u64::from(was.holder != is.holder));
            }
            current = next;
            times += 1;
            prop_assert!(times <= 20, "it goes on and on");
        }
    }
}

//! Windows: one budget of bytes in flight, shared fairly by the workers that have work (rule P20).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use thalweg_broker::PartitionDepth;
use thalweg_protocol::Incarnation;

/// The grants of one gateway. Pure: time comes in as an argument.
#[derive(Debug)]
pub struct Windows {
    budget_bytes: u64,
    /// Until then grants made by a former leader may still be in use unseen: only least windows are
    /// given to newcomers.
    settled_at: Instant,
    grants: HashMap<Incarnation, Grant>,
}

#[derive(Debug, Clone)]
struct Grant {
    bytes: u64,
    least: u64,
    active: bool,
    presence: Presence,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Presence {
    Member,
    /// Off the roster, but its messages may still be with the broker: all of them are among the first so
    /// many of each queue, as was read after it had left.
    Gone(Option<Vec<u64>>),
}

impl Windows {
    /// An empty table; `settle` is how long former grants may stay unseen.
    #[must_use]
    pub fn new(budget_bytes: u64, now: Instant, settle: Duration) -> Self {
        Self { budget_bytes, settled_at: now + settle, grants: HashMap::new() }
    }

    /// Grants a window to a worker that joins; `expected` is the number of workers that will share.
    pub fn join(&mut self, worker: Incarnation, least: u64, expected: u32, now: Instant) -> u64 {
        let share = self.budget_bytes / u64::from(expected.max(1)).max(self.active() + 1);
        self.grant(worker, least, share, true, now)
    }

    /// Renews a worker's window; idle workers are left with the least one.
    pub fn beat(&mut self, worker: Incarnation, held: u64, least: u64, active: bool, now: Instant) -> u64 {
        // A worker that a former leader knew: what it holds is in use.
        self.grants.entry(worker).or_insert(Grant { bytes: held, least, active, presence: Presence::Member });
        let others = self.active() - u64::from(self.grants.get(&worker).is_some_and(|grant| grant.active));
        let share = if active { self.budget_bytes / (others + 1) } else { least };
        self.grant(worker, least, share, active, now)
    }

    fn grant(&mut self, worker: Incarnation, least: u64, share: u64, active: bool, now: Instant) -> u64 {
        let current = self.grants.get(&worker).map_or(0, |grant| grant.bytes);
        let others: u64 =
            self.grants.iter().filter(|(id, _)| **id != worker).map(|(_, grant)| grant.bytes).sum();
        // What others have not given back yet cannot be given away.
        let free = self.budget_bytes.saturating_sub(others);
        let mut bytes = share.min(free).max(least);
        if now < self.settled_at {
            bytes = bytes.min(current.max(least));
        }
        self.grants.insert(worker, Grant { bytes, least, active, presence: Presence::Member });
        bytes
    }

    /// The worker has left the roster: its window stays taken until its messages are gone.
    pub fn leave(&mut self, worker: Incarnation) {
        if let Some(grant) = self.grants.get_mut(&worker) {
            (grant.presence, grant.active) = (Presence::Gone(None), false);
        }
    }

    /// Whether windows of workers that left wait to be freed.
    #[must_use]
    pub fn has_gone(&self) -> bool {
        self.grants.values().any(|grant| grant.presence != Presence::Member)
    }

    /// Frees the windows of workers that left, once every message that was queued then has left its queue.
    /// `queues` are all partitions, read after [`Self::leave`].
    pub fn settle(&mut self, queues: &[PartitionDepth]) {
        self.grants.retain(|_, grant| {
            let Presence::Gone(marks) = &mut grant.presence else { return true };
            let Some(marks) = marks else {
                *marks = Some(queues.iter().map(|queue| queue.last_sequence).collect());
                return true;
            };
            // A queue that has not come that far was created anew, and the old messages went with it.
            let passed = |(queue, mark): (&PartitionDepth, &u64)| {
                queue.first_sequence > *mark || queue.last_sequence < *mark
            };
            !queues.iter().zip(marks.iter()).all(passed)
        });
    }

    fn active(&self) -> u64 {
        self.grants.values().filter(|grant| grant.active).count() as u64
    }

    /// Bytes granted beyond the least windows that everybody always has.
    #[must_use]
    pub fn granted_bytes(&self) -> u64 {
        self.grants.values().map(|grant| grant.bytes).sum()
    }

    /// Whether the grants keep to the budget, counting least windows as headroom.
    #[must_use]
    pub fn within_budget(&self) -> bool {
        let headroom: u64 = self.grants.values().map(|grant| grant.least).sum();
        self.granted_bytes() <= self.budget_bytes + headroom
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u8) -> Incarnation {
        Incarnation([n; 16])
    }

    #[test]
    fn shares_are_fair_once_everybody_has_beaten() {
        let now = Instant::now();
        let mut windows = Windows::new(100, now, Duration::ZERO);
        assert_eq!(windows.join(id(1), 1, 1, now), 100);
        assert_eq!(windows.join(id(2), 1, 1, now), 1, "the first one holds everything");
        assert_eq!(windows.beat(id(1), 100, 1, true, now), 50);
        assert_eq!(windows.beat(id(2), 1, 1, true, now), 50);
        // An idle one gives its window back.
        assert_eq!(windows.beat(id(1), 50, 1, false, now), 1);
        assert_eq!(windows.beat(id(2), 50, 1, true, now), 99);
        windows.leave(id(2));
        assert_eq!(windows.beat(id(1), 1, 1, true, now), 1, "a dead one's messages are still there");
        let queue = |first_sequence, last_sequence| PartitionDepth {
            first_sequence,
            last_sequence,
            ..PartitionDepth::default()
        };
        windows.settle(&[queue(3, 7), queue(1, 0)]);
        windows.settle(&[queue(7, 20), queue(1, 4)]);
        assert!(windows.has_gone(), "message 7 may be its");
        windows.settle(&[queue(8, 20), queue(1, 4)]);
        assert!(!windows.has_gone(), "though the queues are not empty");
        assert_eq!(windows.beat(id(1), 1, 1, true, now), 100);
    }

    #[test]
    fn a_new_leader_gives_nothing_away_before_it_has_heard_everybody() {
        let now = Instant::now();
        let mut windows = Windows::new(100, now, Duration::from_secs(5));
        assert_eq!(windows.join(id(1), 2, 1, now), 2);
        assert_eq!(windows.beat(id(2), 60, 2, true, now), 50);
        assert_eq!(windows.beat(id(1), 2, 2, true, now + Duration::from_secs(5)), 50);
    }

    proptest! {
        #[test]
        fn grants_never_exceed_the_budget(steps in prop::collection::vec((0_u8..6, 0_u8..4, 1_u64..20), 1..200)) {
            let now = Instant::now();
            let mut windows = Windows::new(1000, now, Duration::ZERO);
            let mut held = HashMap::new();
            for (worker, step, least) in steps {
                match step {
                    0 => { held.insert(worker, windows.join(id(worker), least, 3, now)); }
                    1 | 2 => {
                        let before = held.get(&worker).copied().unwrap_or(0);
                        let after = windows.beat(id(worker), before, least, step == 1, now);
                        prop_assert!(after >= least);
                        held.insert(worker, after);
                    }
                    _ => { windows.leave(id(worker)); }
                }
                prop_assert!(windows.within_budget());
            }
        }
    }
}

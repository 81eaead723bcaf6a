//! Windows: one budget of bytes in flight, shared fairly by the workers that have work (rule P20).

use std::collections::{HashMap, HashSet};

use thalweg_broker::PartitionDepth;
use thalweg_protocol::Incarnation;

/// The grants of one gateway. Pure.
#[derive(Debug)]
pub struct Windows {
    budget_bytes: u64,
    /// Members that a former leader has granted nobody knows what. Until all of them have been heard, or are
    /// off their rosters, nobody gets more than it has.
    unheard: HashSet<Incarnation>,
    grants: HashMap<Incarnation, Grant>,
}

#[derive(Debug, Clone)]
struct Grant {
    /// What the worker may be using: the last window that it is known to have taken over, then those it was
    /// told since, in order, with the heartbeats that it has sent since then. A smaller window is in force only
    /// once the worker has said so.
    told: Vec<(u64, u32)>,
    least: u64,
    active: bool,
    presence: Presence,
}

impl Grant {
    fn new(bytes: u64, least: u64, active: bool) -> Self {
        Self { told: vec![(bytes, 0)], least, active, presence: Presence::Member }
    }

    /// The most that may be in use.
    fn bytes(&self) -> u64 {
        self.told.iter().map(|(bytes, _)| *bytes).max().unwrap_or(0)
    }

    /// The worker says that it holds this window, so it is past all that it was told before.
    fn holds(&mut self, bytes: u64) {
        match self.told.iter().position(|(told, _)| *told == bytes) {
            Some(position) => drop(self.told.drain(..position)),
            None => self.told.insert(0, (bytes, 0)),
        }
        self.told.iter_mut().for_each(|(_, beats)| *beats += 1);
        let mut first = true;
        self.told.retain(|(_, beats)| std::mem::take(&mut first) || *beats < BEATS_TO_ANSWER);
    }

    fn tell(&mut self, bytes: u64) {
        if self.told.last().is_none_or(|(last, _)| *last != bytes) {
            self.told.push((bytes, 0));
        }
    }
}

/// Heartbeats after which an answer that a worker does not show to have taken over was lost: it stops waiting for
/// one after three seconds, and sends one a second.
const BEATS_TO_ANSWER: u32 = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Presence {
    Member,
    /// Off the roster, but its messages may still be with the broker: all of them are among the first so
    /// many of each queue, as was read after it had left.
    Gone(Option<Vec<u64>>),
}

impl Windows {
    /// The table of a new leader; `members` are those of all rosters.
    #[must_use]
    pub fn new(budget_bytes: u64, members: impl IntoIterator<Item = Incarnation>) -> Self {
        Self { budget_bytes, unheard: members.into_iter().collect(), grants: HashMap::new() }
    }

    /// What all workers together may have in flight.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// Shares another budget from now on. Each worker learns its new share with its next heartbeat; of a
    /// smaller budget nobody is given more than its least window until enough has been given back.
    pub fn set_budget(&mut self, budget_bytes: u64) {
        self.budget_bytes = budget_bytes;
    }

    /// Grants a window to a worker that joins; `expected` is the number of workers that will share.
    pub fn join(&mut self, worker: Incarnation, least: u64, expected: u32) -> u64 {
        let share = self.budget_bytes / u64::from(expected.max(1)).max(self.active() + 1);
        self.grant(worker, least, share, true)
    }

    /// Renews a worker's window; idle workers are left with the least one.
    pub fn beat(&mut self, worker: Incarnation, held: u64, least: u64, active: bool) -> u64 {
        self.unheard.remove(&worker);
        // Of a worker that a former leader knew, what it holds is in use.
        self.grants.entry(worker).or_insert_with(|| Grant::new(held, least, active)).holds(held);
        let others = self.active() - u64::from(self.grants.get(&worker).is_some_and(|grant| grant.active));
        let share = if active { self.budget_bytes / (others + 1) } else { least };
        self.grant(worker, least, share, active)
    }

    fn grant(&mut self, worker: Incarnation, least: u64, share: u64, active: bool) -> u64 {
        let current = self.grants.get(&worker).map_or(0, Grant::bytes);
        let others: u64 =
            self.grants.iter().filter(|(id, _)| **id != worker).map(|(_, grant)| grant.bytes()).sum();
        // What others have not given back yet cannot be given away.
        let free = self.budget_bytes.saturating_sub(others);
        let mut bytes = share.min(free).max(least);
        if !self.unheard.is_empty() {
            bytes = bytes.min(current.max(least));
        }
        let grant = self.grants.entry(worker).or_insert_with(|| Grant::new(bytes, least, active));
        (grant.least, grant.active, grant.presence) = (least, active, Presence::Member);
        grant.tell(bytes);
        bytes
    }

    /// The worker has left the roster: its window stays taken until its messages are gone.
    pub fn leave(&mut self, worker: Incarnation) {
        self.unheard.remove(&worker);
        if let Some(grant) = self.grants.get_mut(&worker) {
            (grant.presence, grant.active) = (Presence::Gone(None), false);
        }
    }

    /// Whoever is on no roster any more has left, whichever gateway it told.
    pub fn keep(&mut self, present: impl Fn(&Incarnation) -> bool) {
        self.unheard.retain(&present);
        for (worker, grant) in &mut self.grants {
            if grant.presence == Presence::Member && !present(worker) {
                (grant.presence, grant.active) = (Presence::Gone(None), false);
            }
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

    /// Bytes that may be in flight, the least windows that everybody always has included.
    #[must_use]
    pub fn granted_bytes(&self) -> u64 {
        self.grants.values().map(Grant::bytes).sum()
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
        let mut windows = Windows::new(100, []);
        assert_eq!(windows.join(id(1), 1, 1), 100);
        assert_eq!(windows.join(id(2), 1, 1), 1, "the first one holds everything");
        assert_eq!(windows.beat(id(1), 100, 1, true), 50);
        // That answer may be on its way still, or lost: until the first one says that it keeps to it, the second
        // gets no more.
        assert_eq!(windows.beat(id(2), 1, 1, true), 1);
        assert_eq!(windows.beat(id(1), 100, 1, true), 50);
        assert_eq!(windows.beat(id(2), 1, 1, true), 1);
        assert_eq!(windows.beat(id(1), 50, 1, true), 50);
        assert_eq!(windows.beat(id(2), 1, 1, true), 50);
        // An idle one gives its window back.
        assert_eq!(windows.beat(id(1), 50, 1, false), 1);
        assert_eq!(windows.beat(id(1), 1, 1, false), 1);
        assert_eq!(windows.beat(id(2), 50, 1, true), 99);
        windows.leave(id(2));
        assert_eq!(windows.beat(id(1), 1, 1, true), 1, "a dead one's messages are still there");
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
        assert_eq!(windows.beat(id(1), 1, 1, true), 100);
    }

    #[test]
    fn another_budget_is_shared_with_the_next_heartbeats() {
        let mut windows = Windows::new(100, []);
        assert_eq!(windows.join(id(1), 1, 2), 50);
        assert_eq!(windows.join(id(2), 1, 2), 50);
        windows.set_budget(200);
        assert_eq!(windows.beat(id(1), 50, 1, true), 100);
        assert_eq!(windows.beat(id(2), 50, 1, true), 100);
        windows.set_budget(60);
        let mut held = [100, 100];
        for _ in 0..4 {
            for (worker, held) in held.iter_mut().enumerate() {
                *held = windows.beat(id(worker as u8 + 1), *held, 1, true);
            }
        }
        assert_eq!(held, [30, 30]);
        assert!(windows.within_budget(), "{windows:?}");
    }

    #[test]
    fn a_new_leader_gives_nothing_away_before_it_has_heard_everybody() {
        let mut windows = Windows::new(100, [id(2), id(3)]);
        assert_eq!(windows.join(id(1), 2, 1), 2);
        assert_eq!(windows.beat(id(2), 60, 2, true), 50);
        assert_eq!(windows.beat(id(2), 50, 2, true), 50);
        assert_eq!(windows.beat(id(1), 2, 2, true), 2, "the third one may hold anything");
        windows.leave(id(3));
        assert_eq!(windows.beat(id(1), 2, 2, true), 50);
    }

    proptest! {
        #[test]
        /// What workers really use, when answers come late or not at all.
        fn grants_never_exceed_the_budget(steps in prop::collection::vec((0_u8..6, 0_u8..5, any::<bool>()), 1..300)) {
            let mut windows = Windows::new(1000, []);
            let mut used = HashMap::new();
            let mut on_the_way: HashMap<u8, Vec<u64>> = HashMap::new();
            let mut beats: HashMap<u8, u32> = HashMap::new();
            for (worker, step, lost) in steps {
                let joined = used.contains_key(&worker);
                match step {
                    0 if !joined => { used.insert(worker, windows.join(id(worker), 10, 3)); }
                    1 | 2 if joined => {
                        let sent = beats.entry(worker).or_default();
                        *sent += 1;
                        if sent.is_multiple_of(6) {
                            // It has stopped to wait for older answers.
                            on_the_way.entry(worker).or_default().clear();
                        }
                        let window = windows.beat(id(worker), used[&worker], 10, step == 1);
                        prop_assert!(window >= 10);
                        if !lost {
                            on_the_way.entry(worker).or_default().push(window);
                        }
                    }
                    3 | 4 if joined => {
                        let answers = on_the_way.entry(worker).or_default();
                        if !answers.is_empty() {
                            used.insert(worker, answers.remove(0));
                        }
                    }
                    _ => {}
                }
                prop_assert!(windows.within_budget());
                prop_assert!(used.values().sum::<u64>() <= 1000 + 10 * used.len() as u64);
            }
        }
    }
}

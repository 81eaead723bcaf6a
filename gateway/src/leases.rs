//! Who is alive: silence counts only while we were listening (rule P21).

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Observed signs of life. Pure: time comes in as an argument.
#[derive(Debug)]
pub struct Leases<W> {
    term: Duration,
    heard: HashMap<W, Instant>,
}

impl<W: Eq + Hash + Clone> Leases<W> {
    /// Nobody has been heard yet; a lease lasts `term`.
    #[must_use]
    pub fn new(term: Duration) -> Self {
        Self { term, heard: HashMap::new() }
    }

    /// A sign of life.
    pub fn hear(&mut self, worker: W, now: Instant) {
        self.heard.insert(worker, now);
    }

    /// We could not listen for a while: everybody's silence starts anew.
    pub fn interrupted(&mut self, now: Instant) {
        self.heard.values_mut().for_each(|heard| *heard = now);
    }

    /// Whether a worker has still not been heard for a full term.
    #[must_use]
    pub fn is_silent(&self, worker: &W, now: Instant) -> bool {
        self.heard.get(worker).is_some_and(|heard| now.duration_since(*heard) >= self.term)
    }

    /// Of `present`, those silent for a full term. Whoever is seen for the first time is heard now;
    /// whoever is not present any more is forgotten.
    pub fn expired(&mut self, present: impl IntoIterator<Item = W>, now: Instant) -> Vec<W> {
        let mut heard = HashMap::new();
        let mut expired = Vec::new();
        for worker in present {
            let last = self.heard.get(&worker).copied().unwrap_or(now);
            if now.duration_since(last) >= self.term {
                expired.push(worker.clone());
            }
            heard.insert(worker, last);
        }
        self.heard = heard;
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_observed_silence_ends_a_lease() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut leases = Leases::new(Duration::from_secs(10));
        assert!(leases.expired(["a", "b"], at(0)).is_empty());
        leases.hear("a", at(6));
        assert_eq!(leases.expired(["a", "b"], at(10)), ["b"]);
        // We were cut off from 11 to 30: nobody can be blamed for that.
        leases.interrupted(at(30));
        assert!(leases.expired(["a", "b"], at(30)).is_empty());
        assert!(leases.expired(["a", "b"], at(39)).is_empty());
        leases.hear("b", at(39));
        assert_eq!(leases.expired(["a", "b"], at(40)), ["a"]);
    }
}

//! What each job has asked of this invoker, for its heartbeats.

use std::collections::BTreeMap;

use thalweg_protocol::{JobKey, JobLoad, Round, limits::MAX_BEAT_JOBS};

use super::Millis;

/// Jobs remembered between heartbeats; of one that is forgotten a round is counted again, nothing else.
const REMEMBERED: usize = 16 * MAX_BEAT_JOBS;

/// Counts by job since they were last taken.
#[derive(Debug, Default)]
pub(super) struct Tally {
    jobs: BTreeMap<JobKey, Entry>,
}

#[derive(Debug)]
struct Entry {
    load: JobLoad,
    /// Longest delay among the shards of `load.round` so far, and when the first of them was committed.
    longest: Millis,
    since: Millis,
    /// Something to tell.
    news: bool,
}

impl Tally {
    /// Counts a commit of some contributions to an open round.
    pub(super) fn partial(&mut self, job: &JobKey, (bytes, result_bytes): (u64, u64)) {
        let entry = self.entry(job);
        entry.load.bytes += bytes;
        entry.load.result_bytes += result_bytes;
        entry.news = true;
    }

    /// Counts the commit of a shard's round, `delay` after its last contribution had been stored by the broker.
    pub(super) fn round(
        &mut self,
        job: &JobKey,
        round: Round,
        (bytes, result_bytes): (u64, u64),
        delay: Millis,
        now: Millis,
    ) {
        let entry = self.entry(job);
        entry.load.bytes += bytes;
        entry.load.result_bytes += result_bytes;
        entry.load.shards += 1;
        entry.news = true;
        if round > entry.load.round {
            entry.load.rounds += 1;
            entry.load.delay_ms += delay;
            (entry.load.round, entry.longest, entry.since) = (round, delay, now);
        } else if round == entry.load.round {
            entry.load.delay_ms += delay.saturating_sub(entry.longest);
            entry.longest = entry.longest.max(delay);
        } else {
            // A job of the same name that began anew.
            let (rounds, shards, delay_ms) = (1, 1, delay);
            let rest = JobLoad::new(job.clone());
            let load = JobLoad { round, rounds, bytes, result_bytes, shards, delay_ms, ..rest };
            *entry = Entry { load, longest: delay, since: now, news: true };
        }
    }

    fn entry(&mut self, job: &JobKey) -> &mut Entry {
        if self.jobs.len() >= REMEMBERED && !self.jobs.contains_key(job) {
            self.jobs.retain(|_, entry| entry.news);
        }
        let new = || Entry { load: JobLoad::new(job.clone()), longest: 0, since: 0, news: false };
        self.jobs.entry(job.clone()).or_insert_with(new)
    }

    /// What there is to tell, of at most [`MAX_BEAT_JOBS`] jobs, those with the most bytes first; the others' turn
    /// comes with the next call.
    pub(super) fn take(&mut self, now: Millis) -> Vec<JobLoad> {
        let mut news: Vec<_> = self.jobs.values_mut().filter(|entry| entry.news).collect();
        news.sort_by_key(|entry| std::cmp::Reverse(entry.load.bytes));
        news.truncate(MAX_BEAT_JOBS);
        let take = |entry: &mut Entry| {
            entry.news = false;
            entry.load.age_ms = if entry.load.round > 0 { now.saturating_sub(entry.since) } else { 0 };
            let rest = JobLoad { round: entry.load.round, ..JobLoad::new(entry.load.job.clone()) };
            std::mem::replace(&mut entry.load, rest)
        };
        news.into_iter().map(take).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str) -> JobKey {
        JobKey { tenant: "default".parse().unwrap(), job: name.parse().unwrap() }
    }

    fn load(name: &str, round: Round, rounds: u64, (shards, bytes): (u64, u64), delay_ms: Millis) -> JobLoad {
        JobLoad { job: job(name), round, rounds, bytes, delay_ms, result_bytes: 3 * bytes, shards, age_ms: 0 }
    }

    #[test]
    fn a_rounds_delay_is_that_of_its_slowest_shard() {
        let mut tally = Tally::default();
        for (round, delay) in [(7, 3), (7, 9), (7, 1), (8, 2), (8, 4)] {
            tally.round(&job("a"), round, (100, 300), delay, 0);
        }
        tally.partial(&job("b"), (5, 15));
        assert_eq!(tally.take(0), [load("a", 8, 2, (5, 500), 13), load("b", 0, 0, (0, 5), 0)]);
        assert!(tally.take(0).is_empty());
        tally.round(&job("a"), 10, (1, 3), 6, 0);
        assert_eq!(tally.take(0), [load("a", 10, 1, (1, 1), 6)]);
        // Deleted and begun anew.
        tally.round(&job("a"), 1, (1, 3), 2, 0);
        tally.round(&job("a"), 2, (1, 3), 2, 0);
        assert_eq!(tally.take(0), [load("a", 2, 2, (2, 2), 4)]);
    }

    #[test]
    fn a_rounds_age_is_that_of_its_first_commit() {
        let mut tally = Tally::default();
        tally.round(&job("a"), 4, (1, 3), 0, 1000);
        tally.round(&job("a"), 5, (1, 3), 0, 1300);
        tally.round(&job("a"), 5, (1, 3), 0, 1350);
        assert_eq!(tally.take(1500)[0].age_ms, 200);
        tally.partial(&job("a"), (1, 3));
        assert_eq!(tally.take(2000)[0].age_ms, 700);
    }

    #[test]
    fn many_jobs_take_turns() {
        let mut tally = Tally::default();
        let jobs: Vec<_> = (0..=MAX_BEAT_JOBS).map(|number| job(&format!("job-{number}"))).collect();
        for (job, bytes) in jobs.iter().zip(1..) {
            tally.round(job, 1, (bytes, 3 * bytes), 0, 0);
        }
        let first = tally.take(0);
        assert_eq!(first.len(), MAX_BEAT_JOBS);
        assert_eq!(first[0].bytes, MAX_BEAT_JOBS as u64 + 1);
        assert_eq!(tally.take(0), [load("job-0", 1, 1, (1, 1), 0)]);
        assert!(tally.take(0).is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut tally = Tally::default();
        for number in 0..2 * REMEMBERED {
            tally.round(&job(&format!("job-{number}")), 1, (1, 3), 0, 0);
            tally.take(0);
        }
        assert!(tally.jobs.len() <= REMEMBERED);
    }
}

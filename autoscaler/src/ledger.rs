//! What each job costs: for whoever pays, and for dashboards.

use std::collections::{BTreeMap, BTreeSet};

use thalweg_protocol::{InvokerBeat, JobKey, Round};

use crate::metrics::{JobLabels, Rhythm};

/// Jobs with series of their own, over the life of the process: each makes six, which stay for that long. The costs of
/// jobs beyond are added up under one name.
const NAMED: usize = 500;

/// Adds up what invokers tell of jobs.
#[derive(Debug)]
pub(crate) struct Ledger {
    accounts: BTreeMap<JobKey, Account>,
    others: Account,
    /// Jobs whose rhythm is shown.
    shown: BTreeSet<JobKey>,
}

#[derive(Debug)]
struct Account {
    labels: JobLabels,
    round: Round,
    /// Invoker seconds that are not a whole one yet.
    rest: f64,
}

impl Account {
    fn new(labels: JobLabels) -> Self {
        Self { labels, round: 0, rest: 0.0 }
    }

    fn add(&mut self, rounds: u64, bytes: u64, invoker_seconds: f64) {
        self.rest += invoker_seconds;
        let whole = self.rest.floor();
        self.rest -= whole;
        self.labels.spent(rounds, bytes, whole as u64);
    }
}

impl Default for Ledger {
    fn default() -> Self {
        let others = Account::new(JobLabels::others());
        Self { accounts: BTreeMap::new(), others, shown: BTreeSet::new() }
    }
}

impl Ledger {
    /// Takes in what an invoker tells. Its share of a job's cost is what its contributions and results take at its
    /// service rate.
    pub(crate) fn account(&mut self, beat: &InvokerBeat) {
        let rate = beat.service_bytes_per_s;
        for load in &beat.jobs {
            let seconds = if rate.is_finite() && rate > 0.0 {
                (load.bytes + load.result_bytes) as f64 / rate * beat.cpu_quota.max(0.0)
            } else {
                0.0
            };
            let room = self.accounts.len() < NAMED;
            match self.accounts.get_mut(&load.job) {
                Some(account) => {
                    // Every invoker tells of the same rounds. A job that began anew counts from where it is.
                    let rounds =
                        if account.round == 0 { 0 } else { load.round.saturating_sub(account.round) };
                    if load.round + 2 < account.round || load.round > account.round {
                        account.round = load.round;
                    }
                    account.add(rounds, load.bytes, seconds);
                }
                None if room => {
                    let mut account = Account::new(JobLabels::of(&load.job));
                    account.round = load.round;
                    account.add(load.rounds, load.bytes, seconds);
                    self.accounts.insert(load.job.clone(), account);
                }
                None => self.others.add(load.rounds, load.bytes, seconds),
            }
        }
    }

    /// Shows the rhythm of these jobs, and no others': one that does not train has none.
    pub(crate) fn show<'a>(&mut self, rhythms: impl Iterator<Item = (&'a JobKey, Rhythm)>) {
        let before = std::mem::take(&mut self.shown);
        for (job, rhythm) in rhythms {
            if let Some(account) = self.accounts.get(job) {
                account.labels.rhythm(rhythm);
                self.shown.insert(job.clone());
            }
        }
        for job in before.difference(&self.shown) {
            if let Some(account) = self.accounts.get(job) {
                account.labels.rhythm(Rhythm::NONE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use thalweg_protocol::{InvokerState, JobLoad};

    use super::*;

    fn beat(jobs: Vec<JobLoad>) -> InvokerBeat {
        InvokerBeat {
            invoker: "one".to_owned(),
            state: InvokerState::Ready,
            partitions: Vec::new(),
            service_bytes_per_s: 100e6,
            busy: 0.5,
            held_messages: 0,
            held_bytes: 0,
            cpu_quota: 0.5,
            jobs,
        }
    }

    fn load(name: &str, round: Round, bytes: u64) -> JobLoad {
        let job = JobKey { tenant: "default".parse().unwrap(), job: name.parse().unwrap() };
        JobLoad { round, rounds: 1, bytes: bytes - bytes / 4, result_bytes: bytes / 4, ..JobLoad::new(job) }
    }

    #[test]
    fn rounds_are_counted_once_and_seconds_lose_nothing() {
        let mut ledger = Ledger::default();
        let counted = |ledger: &Ledger, name: &str| {
            let account = &ledger.accounts[&load(name, 1, 0).job];
            (account.round, account.rest)
        };
        // 150 MB at 100 MB per busy second, of half a CPU: three quarters of a second.
        ledger.account(&beat(vec![load("a", 7, 150_000_000)]));
        assert_eq!(counted(&ledger, "a"), (7, 0.75));
        ledger.account(&beat(vec![load("a", 8, 150_000_000)]));
        ledger.account(&beat(vec![load("a", 7, 0)]));
        assert_eq!(counted(&ledger, "a"), (8, 0.5));
        ledger.account(&beat(vec![load("a", 1, 0)]));
        assert_eq!(counted(&ledger, "a").0, 1, "it began anew");
    }

    #[test]
    fn series_are_bounded() {
        let mut ledger = Ledger::default();
        for number in 0..NAMED + 10 {
            ledger.account(&beat(vec![load(&format!("job-{number}"), 1, 25_000_000)]));
        }
        assert_eq!(ledger.accounts.len(), NAMED);
        assert_eq!(
            ledger.others.rest, 0.25,
            "ten times an eighth of a second, less the whole one that was told"
        );
    }
}

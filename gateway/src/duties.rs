//! What a gateway does without being asked: reading rosters, expiring the silent, freeing windows.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use thalweg_broker::{Queues, Said};
use thalweg_protocol::{ErrorCode, Incarnation, JobKey, JobState, Name, Partition, WireError, subjects};

use crate::{
    metrics, recovery,
    service::{Gateway, describe},
    windows::Windows,
};

/// Jobs that are read again in one sweep, in case a hint of their change was lost.
const MOST_READ: usize = 8;

/// Says once that a job cannot be looked after.
fn left_alone(key: &JobKey, error: &WireError) {
    static SAID: Said = Said::new();
    if SAID.is_new(&format!("{key}: {error}")) {
        tracing::error!(%error, %key, "a job is left alone");
    }
}

impl Gateway {
    /// The connection was lost and is back: nobody's silence meanwhile counts.
    pub fn interrupted(&self) {
        let now = (self.clock)();
        self.shared().leases.interrupted(now);
    }

    /// Until when the lease is ours, if it is. A new leader reads all rosters first; as long as that fails it does
    /// not act as one.
    pub async fn lead(&self, until: Option<Instant>) {
        if until.is_some_and(|until| (self.clock)() < until) && !self.shared().leads((self.clock)()) {
            if let Err(error) = self.read_rosters().await {
                tracing::info!(%error, "rosters not read yet");
                return;
            }
            let now = (self.clock)();
            let mut shared = self.shared();
            let members = shared.members().into_iter().map(|worker| worker.incarnation);
            shared.windows = Windows::new(shared.windows.budget_bytes(), members);
            shared.leases.interrupted(now);
            shared.swept_at = now;
        }
        self.shared().leads_until = until;
    }

    async fn read_rosters(&self) -> Result<(), WireError> {
        for record in &self.jobs.list().await? {
            if recovery::is_due(record) {
                self.shared().recovering.insert(record.spec.key.clone());
            }
            if record.state == JobState::Deleting {
                let now = (self.clock)();
                self.shared().deleting.entry(record.spec.key.clone()).or_insert(now);
                continue;
            }
            match self.jobs.roster_of(record).await {
                Ok(Some(roster)) => drop(self.shared().remember(record, &roster)),
                Err(error) if error.is_retryable() => return Err(error),
                Ok(None) => {}
                Err(error) => left_alone(&record.spec.key, &error),
            }
        }
        Ok(())
    }

    /// Reads a job that somebody wrote, so that heartbeats are judged by the newest state. `subject` is that
    /// of the write ([`subjects::registry_hint`]).
    pub async fn refresh(&self, subject: &str) {
        let prefix = subjects::registry_hint("");
        let mut tokens = subject.strip_prefix(prefix.as_str()).unwrap_or_default().split('.');
        if !matches!(tokens.next(), Some("job" | "roster")) {
            return;
        }
        let (Some(Ok(tenant)), Some(Ok(job))) = (tokens.next().map(Name::new), tokens.next().map(Name::new))
        else {
            return;
        };
        self.read_job(JobKey { tenant, job }).await;
    }

    async fn read_job(&self, key: JobKey) {
        match self.jobs.get(&key).await {
            Ok((record, roster)) => {
                let now = (self.clock)();
                let mut shared = self.shared();
                shared.remember(&record, &roster);
                shared.read_at.insert(key, now);
            }
            Err(error) if error.code == ErrorCode::UnknownJob => self.shared().forget(&key),
            Err(error) if error.code == ErrorCode::Unavailable => {
                if matches!(self.jobs.is_deleting(&key).await, Ok(true)) {
                    let now = (self.clock)();
                    self.shared().deleting.entry(key).or_insert(now);
                } else {
                    tracing::debug!(%error, %key, "job not read");
                }
            }
            Err(error) => left_alone(&key, &error),
        }
    }

    /// How often to call [`Self::sweep`]: a few times a lease. Three times as long without a call is taken for a
    /// time in which the gateway stood still.
    #[must_use]
    pub fn sweep_interval(&self) -> Duration {
        (self.lease / 8).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }

    /// Where this gateway leads: expires silent workers, levels shards that nobody else would, nudges who holds open
    /// rounds, and frees the windows of those whose messages are gone.
    pub async fn sweep(&self, queues: &dyn Queues, partitions: Partition) {
        let (expired, has_gone, stale, unfinished, unfenced, abandoned) = {
            let now = (self.clock)();
            let mut shared = self.shared();
            // Frozen, or starved: what came meanwhile has not been taken in yet, so it was no silence.
            let last = std::mem::replace(&mut shared.swept_at, now);
            if now.duration_since(last) > 3 * self.sweep_interval() {
                shared.leases.interrupted(now);
            }
            if !shared.leads(now) {
                return;
            }
            let members = shared.members();
            let present: HashSet<_> = members.iter().map(|worker| worker.incarnation).collect();
            shared.windows.keep(|worker| present.contains(worker));
            let (jobs, workers) = (shared.rosters.len(), members.len());
            metrics::totals(jobs, workers, shared.windows.granted_bytes());
            let stale = shared.stale(self.lease / 2, MOST_READ, now);
            let late = |since: &Instant| now.duration_since(*since) >= self.lease / 2;
            let unfinished: Vec<_> =
                shared.deleting.iter().filter(|(_, since)| late(since)).map(|(key, _)| key.clone()).collect();
            let (unfenced, abandoned) = (shared.unfenced(), shared.abandoned(now));
            let expired = shared.leases.expired(members, now);
            (expired, shared.windows.has_gone(), stale, unfinished, unfenced, abandoned)
        };
        for key in stale {
            self.read_job(key).await;
        }
        for worker in expired {
            let (job, rank, incarnation) = describe(&worker);
            let silent = {
                // Time has passed since the others were removed.
                let now = (self.clock)();
                let shared = self.shared();
                shared.leads(now) && shared.leases.is_silent(&worker, now)
            };
            if !silent {
                continue;
            }
            match self.jobs.remove(&worker.key, worker.job, worker.incarnation).await {
                Ok(()) => {
                    tracing::warn!(job, rank, %incarnation, "worker expired after a lease of silence");
                    metrics::expired();
                    self.shared().windows.leave(worker.incarnation);
                    // The hint of it may get lost, and the job may have been gone for long.
                    self.read_job(worker.key).await;
                }
                Err(error) => tracing::info!(job, rank, %error, "worker not expired yet"),
            }
        }
        let recovering: Vec<_> = self.shared().recovering.iter().cloned().collect();
        for key in recovering {
            self.recover(key).await;
        }
        for key in unfinished {
            self.finish_deletion(key).await;
        }
        for (key, job, revision) in unfenced {
            // Whoever changed the settings is at it, or has died over it.
            if let Err(error) = self.jobs.fence_settings(&key, job, revision).await {
                tracing::debug!(%error, %key, "settings not vouched for yet");
            }
            self.read_job(key).await;
        }
        for (key, job) in abandoned {
            self.abandon(key, job).await;
        }
        let unlevelled = self.shared().unlevelled();
        for (key, epoch) in unlevelled {
            match self.jobs.level_deserted(&key).await {
                Ok(()) => drop(self.shared().levelled.insert(key, epoch)),
                Err(error) => tracing::debug!(%key, %error, "shards not levelled yet"),
            }
        }
        self.nudge(queues).await;
        if has_gone && let Ok(depths) = queues.depths(partitions).await {
            self.shared().windows.settle(&depths);
        }
    }

    /// Gives a job that has lost rounds a new life, where its policy says so.
    async fn recover(&self, key: JobKey) {
        match self.jobs.recover(&key).await {
            Ok(()) => {
                self.shared().recovering.remove(&key);
                self.read_job(key).await;
            }
            Err(error) => tracing::warn!(%error, %key, "job not recovered yet"),
        }
    }

    /// Takes up a deletion that was cut short.
    async fn finish_deletion(&self, key: JobKey) {
        let done = match self.jobs.is_deleting(&key).await {
            Ok(true) => self.jobs.delete(&key).await,
            other => other.map(drop),
        };
        match done {
            Ok(()) => {
                self.shared().deleting.remove(&key);
                self.read_job(key).await;
            }
            Err(error) => tracing::debug!(%error, %key, "job not deleted yet"),
        }
    }

    /// Deletes a job that nobody has been in for its time to live.
    async fn abandon(&self, key: JobKey, job: Incarnation) {
        // The last look may be old.
        self.read_job(key.clone()).await;
        let deserted = self.shared().rosters.get(&key).is_some_and(|(record, roster)| {
            record.incarnation == job && roster.members.iter().all(|member| member.until_round.is_some())
        });
        if !deserted {
            return;
        }
        tracing::warn!(%key, "job deleted: nobody has been in it for its time to live (policy.ttl_ms)");
        match self.jobs.delete(&key).await {
            Ok(()) => self.shared().forget(&key),
            Err(error) => tracing::debug!(%error, %key, "abandoned job not deleted yet"),
        }
    }

    /// Bytes that workers may have in flight together, those of workers that left included until their
    /// messages are gone.
    #[must_use]
    pub fn granted_bytes(&self) -> u64 {
        self.shared().windows.granted_bytes()
    }
}

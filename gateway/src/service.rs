//! Requests of the SDK.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use thalweg_protocol::{
    ApiReply, ApiRequest, Claim, ErrorCode, EventKind, Incarnation, JobCommand, JobKey, JobRecord, JobSpec,
    Kind, Member, Name, Origin, Roster, WireError, WorkerRef, frame, limits,
};

use crate::{
    doors::Doors,
    events::{self, Sink},
    jobs::{Jobs, over},
    leases::Leases,
    metrics,
    nudges::{Bookmarks, Nudged, WallClock},
    recovery,
    windows::Windows,
};

/// Least time between two readings of a job because of heartbeats; they are repeated anyway.
const READ_AGAIN: Duration = Duration::from_millis(100);

/// Tells the time. The simulation has its own.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// One gateway without its wires; everything in it can be lost.
pub struct Gateway {
    pub(crate) jobs: Jobs,
    pub(crate) clock: Clock,
    pub(crate) wall_clock: WallClock,
    pub(crate) lease: Duration,
    doors: Doors,
    shared: Mutex<Shared>,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("jobs", &self.jobs).finish_non_exhaustive()
    }
}

pub(crate) struct Shared {
    pub(crate) leases: Leases<WorkerRef>,
    pub(crate) windows: Windows,
    /// Until when this gateway leads, if it does: it grants windows and expires workers.
    pub(crate) leads_until: Option<Instant>,
    /// Jobs with their rosters as last read, for heartbeats: members in the order of their lives, so that each of
    /// thousands is found at once.
    pub(crate) rosters: BTreeMap<JobKey, (Arc<JobRecord>, Arc<Roster>)>,
    /// Roster epochs whose shards were found level, or were levelled.
    pub(crate) levelled: BTreeMap<JobKey, u64>,
    /// When each of them was last read to be up to date, for hints may get lost.
    pub(crate) read_at: BTreeMap<JobKey, Instant>,
    /// When silent workers were last looked for.
    pub(crate) swept_at: Instant,
    /// Jobs that were seen half deleted, and since when.
    pub(crate) deleting: BTreeMap<JobKey, Instant>,
    /// Jobs that were seen to have lost rounds, or halfway to a new life.
    pub(crate) recovering: BTreeSet<JobKey>,
    /// Since when lives of jobs have had no member.
    pub(crate) deserted_since: BTreeMap<JobKey, (Incarnation, Instant)>,
    /// Open rounds that somebody was asked to look at.
    pub(crate) nudged: Nudged,
    /// Where the next look at them goes on.
    pub(crate) bookmarks: Bookmarks,
    events: Option<Sink>,
}

impl Gateway {
    /// A gateway that has heard nobody. `lease` is the silence after which a worker loses its rank,
    /// `window_budget_bytes` what all workers together may have in flight.
    #[must_use]
    pub fn new(jobs: Jobs, clock: Clock, lease: Duration, window_budget_bytes: u64) -> Self {
        let shared = Shared {
            leases: Leases::new(lease),
            windows: Windows::new(window_budget_bytes, []),
            leads_until: None,
            rosters: BTreeMap::new(),
            levelled: BTreeMap::new(),
            read_at: BTreeMap::new(),
            swept_at: clock(),
            deleting: BTreeMap::new(),
            deserted_since: BTreeMap::new(),
            recovering: BTreeSet::new(),
            nudged: Nudged::new(),
            bookmarks: Bookmarks::new(),
            events: None,
        };
        let wall_clock = Arc::new(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
        Self { jobs, clock, wall_clock, lease, doors: Doors::default(), shared: Mutex::new(shared) }
    }

    /// Goes by another time of day than the system's: deadlines of rounds count by it.
    #[must_use]
    pub fn on_wall_clock(self, wall_clock: WallClock) -> Self {
        Self { wall_clock, ..self }
    }

    /// Shares another budget of bytes in flight from now on ([`Windows::set_budget`]).
    pub fn set_window_budget(&self, bytes: u64) {
        self.shared().windows.set_budget(bytes);
    }

    /// Tells `sink` what happens to jobs while this gateway leads.
    #[must_use]
    pub fn telling(self, sink: Sink) -> Self {
        self.shared().events = Some(sink);
        self
    }

    pub(crate) fn shared(&self) -> MutexGuard<'_, Shared> {
        // Each use leaves the tables consistent before it can panic.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers one request.
    pub async fn answer(&self, frame: &Bytes) -> Bytes {
        let reply = match frame::open::<ApiRequest>(Kind::ApiRequest, frame) {
            Ok((request, _)) => self.perform(request).await,
            Err(error) => Err(error.to_wire()),
        };
        let reply = reply.unwrap_or_else(|error| {
            metrics::refused(error.code);
            ApiReply::Error(error)
        });
        frame::seal(Kind::ApiReply, &reply, &[])
    }

    /// Answers one request that was read.
    pub(crate) async fn perform(&self, request: ApiRequest) -> Result<ApiReply, WireError> {
        metrics::request(kind(&request));
        match request {
            ApiRequest::OpenJob(spec) => {
                self.jobs.open(spec).await.map(|(job, roster)| self.job(job, roster))
            }
            ApiRequest::GetJob(key) => self.jobs.get(&key).await.map(|(job, roster)| self.job(job, roster)),
            ApiRequest::ListJobs => self.jobs.list().await.map(ApiReply::Jobs),
            ApiRequest::DeleteJob(key) => {
                self.jobs.delete(&key).await?;
                self.shared().forget(&key);
                Ok(ApiReply::Done)
            }
            ApiRequest::Activate { key, job, upload } => {
                self.jobs.activate(&key, job, upload).await.map(|()| ApiReply::Done)
            }
            ApiRequest::Join(claim) => {
                if claim.id.is_empty() || claim.id.len() > limits::MAX_WORKER_ID_BYTES {
                    let text = format!("a worker id has 1 to {} bytes", limits::MAX_WORKER_ID_BYTES);
                    return Err(WireError::new(ErrorCode::Limit, text));
                }
                // Asking is a sign of life too, however long the answer takes.
                let now = (self.clock)();
                self.shared().leases.hear(claim.worker.clone(), now);
                let worker = claim.worker.clone();
                let (key, job) = (&worker.key, worker.job);
                let admit = async move |claims: Vec<Claim>| {
                    let admissions = self.jobs.join(key, job, &claims).await;
                    if let Some((record, roster)) =
                        admissions.iter().find_map(|admission| admission.as_ref().ok())
                    {
                        self.shared().remember(record, roster);
                    }
                    admissions
                };
                let (record, roster) = self.doors.enter(claim, admit).await?;
                let now = (self.clock)();
                let mut shared = self.shared();
                shared.leases.hear(worker.clone(), now);
                let least = least_window(&record);
                let window_bytes = if shared.leads(now) {
                    shared.windows.join(worker.incarnation, least, record.spec.workers)
                } else {
                    least
                };
                drop(shared);
                Ok(ApiReply::Joined {
                    roster: roster.concerning(worker.incarnation),
                    window_bytes,
                    lease_ms: u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX),
                })
            }
            ApiRequest::Leave(worker) => {
                self.jobs.remove(&worker.key, worker.job, worker.incarnation).await?;
                self.shared().windows.leave(worker.incarnation);
                Ok(ApiReply::Done)
            }
            ApiRequest::Jobs { tenant, after, limit } => {
                let tenant = tenant.as_ref().map(Name::as_str);
                let (jobs, next) = self.jobs.page(tenant, after.as_ref(), limit).await?;
                Ok(ApiReply::JobPage { jobs, next })
            }
            ApiRequest::Progress(key) => self.jobs.progress(&key).await.map(ApiReply::Progress),
            ApiRequest::Control(key, command) => {
                self.jobs.control(&key, &command).await.map(|()| ApiReply::Done)
            }
            ApiRequest::SetSettings { key, change } => {
                self.jobs.set_settings(&key, &change).await.map(ApiReply::Settings)
            }
            ApiRequest::Restore { spec, function, upload, version, replaces } => {
                let origin = Origin { upload, version, rolled_back: false };
                let restored = self.jobs.restore(&spec, function, &origin, replaces).await;
                restored.map(|(job, roster)| self.job(job, roster))
            }
            ApiRequest::Beat { .. } => {
                let text = "heartbeats have a subject of their own";
                Err(WireError::new(ErrorCode::Malformed, text))
            }
        }
    }

    /// As [`ApiRequest::OpenJob`], and says whether the job is new.
    pub(crate) async fn create(&self, spec: JobSpec) -> Result<(JobRecord, Roster, bool), WireError> {
        metrics::request("open_job");
        let (record, roster, created) = self.jobs.create(spec).await?;
        self.shared().remember(&record, &roster);
        Ok((record, roster, created))
    }

    fn job(&self, record: JobRecord, roster: Roster) -> ApiReply {
        self.shared().remember(&record, &roster);
        ApiReply::Job(Box::new(record), roster)
    }

    /// Takes a heartbeat; the leading gateway answers it.
    pub async fn beat(&self, frame: &Bytes) -> Option<Bytes> {
        let opened = frame::open::<ApiRequest>(Kind::ApiRequest, frame);
        let (worker, window_bytes, active) = match opened {
            Ok((ApiRequest::Beat { worker, window_bytes, active }, _)) => (worker, window_bytes, active),
            Ok(_) => return None,
            Err(error) => {
                metrics::refused(error.to_wire().code);
                // Another gateway may be of the sender's release.
                let leads = self.shared().leads((self.clock)());
                return leads.then(|| frame::seal(Kind::ApiReply, &ApiReply::Error(error.to_wire()), &[]));
            }
        };
        let known = self.shared().rosters.get(&worker.key).cloned();
        let fits = |job: &JobRecord, roster: &Roster| {
            job.incarnation == worker.job && remembered(roster, worker.incarnation).is_some()
        };
        let known = match known {
            Some((job, roster)) if fits(&job, &roster) => Ok((job, roster)),
            // A roster that we have not read yet, or one that has lost this worker. Where thousands join, each is unknown
            // for a moment, and what all of them wait for would be read for each.
            _ => {
                let now = (self.clock)();
                if !self.shared().may_read(&worker.key, now) {
                    return None;
                }
                match self.jobs.get(&worker.key).await {
                    Ok((record, roster)) => Ok(self.shared().remember(&record, &roster)),
                    Err(error) => {
                        self.shared().read_at.remove(&worker.key);
                        Err(error)
                    }
                }
            }
        };
        let now = (self.clock)();
        let mut shared = self.shared();
        let reply = match known {
            Ok((record, roster)) => {
                let tenure =
                    remembered(&roster, worker.incarnation).filter(|member| member.until_round.is_none());
                if record.incarnation == worker.job
                    && let Some(error) = record.state.end(&record.spec.key)
                {
                    ApiReply::Error(error)
                } else if record.incarnation == worker.job && tenure.is_some() {
                    shared.leases.hear(worker.clone(), now);
                    let least = least_window(&record);
                    if !shared.leads(now) {
                        return None;
                    }
                    let granted = shared.windows.beat(worker.incarnation, window_bytes, least, active);
                    ApiReply::Beat {
                        window_bytes: granted,
                        roster_epoch: if roster.started { roster.epoch } else { 0 },
                        paused: record.life.paused.clone(),
                    }
                } else if record.incarnation == worker.job {
                    ApiReply::Error(lost(&worker))
                } else {
                    ApiReply::Error(over(&worker.key))
                }
            }
            Err(error) if error.is_retryable() => return None,
            Err(error) => ApiReply::Error(error),
        };
        shared.leads(now).then(|| frame::seal(Kind::ApiReply, &reply, &[]))
    }
}

/// A worker's tenure on a roster as [`Shared::rosters`] has it.
fn remembered(roster: &Roster, worker: Incarnation) -> Option<&Member> {
    let found = roster.members.binary_search_by_key(&worker, |member| member.incarnation);
    found.ok().map(|index| &roster.members[index])
}

impl Shared {
    pub(crate) fn leads(&self, now: Instant) -> bool {
        self.leads_until.is_some_and(|until| now < until)
    }

    /// Whether it is time to read a job again because of what somebody says; it is then taken to have been read.
    fn may_read(&mut self, key: &JobKey, now: Instant) -> bool {
        let before = self.read_at.get(key);
        if before.is_some_and(|before| now.saturating_duration_since(*before) < READ_AGAIN) {
            return false;
        }
        self.read_at.insert(key.clone(), now);
        true
    }

    pub(crate) fn remember(&mut self, record: &JobRecord, roster: &Roster) -> (Arc<JobRecord>, Arc<Roster>) {
        let known = self.rosters.get(&record.spec.key);
        if let Some((job, newer)) = known
            && job.incarnation == record.incarnation
            && newer.epoch > roster.epoch
        {
            // Read before that one, and answered later.
            return (job.clone(), newer.clone());
        }
        if let Some(events) = &self.events
            && self.leads_until.is_some()
        {
            let before = known.map(|(job, roster)| (&**job, &**roster));
            events::between(before, record, roster).into_iter().for_each(|event| events(record, event));
        }
        if recovery::is_due(record) {
            self.recovering.insert(record.spec.key.clone());
        }
        let mut roster = roster.clone();
        roster.members.sort_unstable_by_key(|member| member.incarnation);
        let view = (Arc::new(record.clone()), Arc::new(roster));
        self.rosters.insert(record.spec.key.clone(), view.clone());
        view
    }

    /// A job is gone.
    pub(crate) fn forget(&mut self, key: &JobKey) {
        let known = self.rosters.remove(key);
        if let (Some(events), Some((record, _)), true) = (&self.events, known, self.leads_until.is_some()) {
            events(&record, EventKind::Deleted);
        }
        self.levelled.remove(key);
        self.read_at.remove(key);
        self.deleting.remove(key);
        self.deserted_since.remove(key);
        self.recovering.remove(key);
    }

    /// Jobs whose newest settings the roster does not vouch for yet.
    pub(crate) fn unfenced(&self) -> Vec<(JobKey, Incarnation, u32)> {
        let unfenced = |(key, (record, roster)): (&JobKey, &(Arc<JobRecord>, Arc<Roster>))| {
            let newest = record.settings.last()?.revision;
            let open = record.state.end(key).is_none() && roster.revision < newest;
            open.then(|| (key.clone(), record.incarnation, newest))
        };
        self.rosters.iter().filter_map(unfenced).collect()
    }

    /// Jobs that have had no member for as long as they may.
    pub(crate) fn abandoned(&mut self, now: Instant) -> Vec<(JobKey, Incarnation)> {
        let mut abandoned = Vec::new();
        for (key, (record, roster)) in &self.rosters {
            let present = roster.members.iter().any(|member| member.until_round.is_none());
            let Some(ttl) = record.spec.policy.ttl_ms.filter(|_| !present) else {
                self.deserted_since.remove(key);
                continue;
            };
            let since = self.deserted_since.entry(key.clone()).or_insert((record.incarnation, now));
            if since.0 != record.incarnation {
                *since = (record.incarnation, now);
            }
            if now.duration_since(since.1) >= Duration::from_millis(ttl) {
                abandoned.push((key.clone(), record.incarnation));
            }
        }
        abandoned
    }

    /// Jobs whose roster has changed since their shards were last found level.
    pub(crate) fn unlevelled(&self) -> Vec<(JobKey, u64)> {
        let changed = |(key, (_, roster)): (&JobKey, &(Arc<JobRecord>, Arc<Roster>))| {
            let seen = self.levelled.get(key) == Some(&roster.epoch);
            (roster.started && !seen).then(|| (key.clone(), roster.epoch))
        };
        self.rosters.iter().filter_map(changed).collect()
    }

    /// Jobs that were not read for so long, the longest first, at most so many.
    pub(crate) fn stale(&self, age: Duration, most: usize, now: Instant) -> Vec<JobKey> {
        let read_at = |key: &JobKey| self.read_at.get(key).copied();
        let old = |at: Option<Instant>| at.is_none_or(|at| now.duration_since(at) >= age);
        let mut stale: Vec<_> =
            self.rosters.keys().map(|key| (read_at(key), key)).filter(|(at, _)| old(*at)).collect();
        stale.sort();
        stale.into_iter().take(most).map(|(_, key)| key.clone()).collect()
    }

    /// Live members of all known rosters.
    pub(crate) fn members(&self) -> Vec<WorkerRef> {
        self.rosters
            .iter()
            .flat_map(|(key, (record, roster))| {
                roster.members.iter().filter(|member| member.until_round.is_none()).map(|member| WorkerRef {
                    key: key.clone(),
                    job: record.incarnation,
                    rank: member.rank,
                    incarnation: member.incarnation,
                })
            })
            .collect()
    }
}

fn lost(worker: &WorkerRef) -> WireError {
    let text = format!(
        "rank {} of job {} no longer belongs to this worker: its lease ended, or it was started again elsewhere",
        worker.rank, worker.key
    );
    WireError::new(ErrorCode::LeaseLost, text)
}

/// Bytes that every worker may have in flight whatever happens: one shard's message.
fn least_window(record: &JobRecord) -> u64 {
    (record.layout.len(0) * 4 + limits::MESSAGE_OVERHEAD_BYTES) as u64
}

fn kind(request: &ApiRequest) -> &'static str {
    match request {
        ApiRequest::OpenJob(_) => "open_job",
        ApiRequest::GetJob(_) => "get_job",
        ApiRequest::ListJobs => "list_jobs",
        ApiRequest::DeleteJob(_) => "delete_job",
        ApiRequest::Activate { .. } => "activate",
        ApiRequest::Join(_) => "join",
        ApiRequest::Leave(_) => "leave",
        ApiRequest::Beat { .. } => "beat",
        ApiRequest::Jobs { .. } => "jobs",
        ApiRequest::Progress(_) => "progress",
        ApiRequest::Control(_, JobCommand::Pause(_)) => "pause",
        ApiRequest::Control(_, JobCommand::Resume) => "resume",
        ApiRequest::Control(_, JobCommand::Abort(_)) => "abort",
        ApiRequest::SetSettings { .. } => "set_settings",
        ApiRequest::Restore { .. } => "restore",
    }
}

/// Id of a worker in logs.
pub(crate) fn describe(worker: &WorkerRef) -> (String, u32, Incarnation) {
    (worker.key.to_string(), worker.rank, worker.incarnation)
}

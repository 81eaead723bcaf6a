//! Connecting, opening jobs, joining them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use thalweg_broker::{Backoff, Connection, NatsConfig, Registry, RequestError, request};
use thalweg_protocol::{
    ApiReply, ApiRequest, Claim, Epoch, ErrorCode, Incarnation, JobRecord, JobState, Kind, OnLoss, Rank,
    Roster, StoreRequest, WireError, WorkerRef, frame, offsets, subjects,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Error, Job, Worker,
    driver::{Driver, Shared, ask_store, read_heads, read_streams},
    engine::{Engine, Timing, first_round, held_up, void_after},
    trace::Trace,
};

/// Longest wait for one reply of the gateway.
const REQUEST: Duration = Duration::from_secs(5);
/// How often a wait is explained in the log.
const EXPLAIN: Duration = Duration::from_secs(2);

/// A connection to a Thalweg deployment. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    connection: Connection,
    /// As in [`Client::patient_for`], if that was said.
    patience: Option<Duration>,
}

/// How a worker joins.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// Stable id of this worker. A worker that is started again with the same id takes its rank back at
    /// once; with the default, a random one, it waits until its former lease has ended.
    pub worker_id: String,
    /// Longest wait for everything joining needs: a gateway, a store, initial parameters, the other
    /// workers. Default 5 minutes.
    pub timeout: Duration,
    /// Longest wait, within `timeout`, for a rank that another worker holds. Default 20 seconds, twice
    /// the default lease.
    pub rank_timeout: Duration,
    /// Initial parameters by tensor name, used by rank 0 of a job whose function keeps parameters.
    pub initial: Vec<(String, Vec<f32>)>,
    /// Waits of the protocol.
    pub timing: Timing,
}

impl Default for JoinOptions {
    fn default() -> Self {
        Self {
            worker_id: Incarnation::random().to_string(),
            timeout: Duration::from_secs(300),
            rank_timeout: Duration::from_secs(20),
            initial: Vec::new(),
            timing: Timing::default(),
        }
    }
}

/// A wait with an end, explained now and then.
pub(crate) struct Patience {
    until: Instant,
    explained: Instant,
    backoff: Backoff,
    after: Duration,
}

impl Patience {
    pub(crate) fn new(after: Duration) -> Self {
        let now = Instant::now();
        let backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(250));
        Self { until: now + after, explained: now, backoff, after }
    }

    /// Waits a little for `what`.
    pub(crate) async fn wait(&mut self, what: &str, hint: &str) -> Result<(), Error> {
        let now = Instant::now();
        if now >= self.until {
            return Err(Error::TimedOut { what: what.to_owned(), after: self.after, hint: hint.to_owned() });
        }
        if now.duration_since(self.explained) >= EXPLAIN {
            self.explained = now;
            tracing::info!(hint, "waiting for {what}");
        }
        tokio::time::sleep(self.backoff.delay().max(Duration::from_millis(5))).await;
        Ok(())
    }
}

impl Client {
    /// Connects; waits until the NATS server is there.
    ///
    /// # Errors
    /// [`Error::Connect`] for a URL that cannot be used.
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::connect_with(&NatsConfig { url: url.to_owned(), ..NatsConfig::default() }).await
    }

    /// Connects with credentials.
    ///
    /// # Errors
    /// As [`Client::connect`], and when the credentials cannot be read.
    pub async fn connect_with(config: &NatsConfig) -> Result<Self, Error> {
        let connection = Connection::open("thalweg-sdk", config, &CancellationToken::new()).await;
        let connection = connection.map_err(|error| Error::Connect(error.to_string()))?;
        connection.map(|connection| Self { connection, patience: None }).ok_or(Error::Left)
    }

    /// How long to wait for an answer about a job, of a gateway that may be starting; joining has waits of its own
    /// ([`JoinOptions`]). Default 30 seconds, and as long as joining for [`Client::open`].
    #[must_use]
    pub fn patient_for(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    pub(crate) fn patience(&self) -> Patience {
        Patience::new(self.patience.unwrap_or(REQUEST * 6))
    }

    /// Asks the gateway once.
    async fn ask_once(
        &self,
        query: &ApiRequest,
        timeout: Duration,
    ) -> Result<Result<ApiReply, WireError>, RequestError> {
        let kinds = (Kind::ApiRequest, Kind::ApiReply);
        let (reply, _) = request(&self.connection.client, subjects::API, kinds, query, &[], timeout).await?;
        Ok(match reply {
            ApiReply::Error(error) => Err(error),
            reply => Ok(reply),
        })
    }

    /// Asks the gateway until it answers, or says something that waiting cannot cure.
    pub(crate) async fn ask(&self, query: &ApiRequest, patience: &mut Patience) -> Result<ApiReply, Error> {
        self.ask_as(None, query, patience).await
    }

    /// As [`Self::ask`], for a worker that may be on the roster already, with its window: it shows that it is
    /// alive as long as it waits, or its lease would end.
    async fn ask_as(
        &self,
        worker: Option<(&WorkerRef, u64)>,
        query: &ApiRequest,
        patience: &mut Patience,
    ) -> Result<ApiReply, Error> {
        loop {
            if let Some((worker, window_bytes)) = worker {
                let beat = ApiRequest::Beat { worker: worker.clone(), window_bytes, active: false };
                let frame = frame::seal(Kind::ApiRequest, &beat, &[]);
                // Nobody waits for an answer: whether the rank is lost is found out by what is asked.
                let _ = self.connection.client.publish(subjects::WORKER_BEAT, frame).await;
            }
            let hint = match self.ask_once(query, REQUEST.min(patience.after)).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(error)) if !error.is_retryable() => return Err(error.into()),
                Ok(Err(error)) => error.to_string(),
                Err(error @ (RequestError::Frame(..) | RequestError::TooLarge(..))) => {
                    return Err(error.to_wire().into());
                }
                Err(RequestError::NoResponders(_)) => {
                    "no gateway runs: start one (thalweg up, or thalweg gateway)".to_owned()
                }
                Err(error) => error.to_string(),
            };
            patience.wait("an answer of the gateway", &hint).await?;
        }
    }

    /// Creates a job, or finds the one that was created alike.
    ///
    /// # Errors
    /// `invalid_spec`, `limit`, `wrong_dtype` or `spec_mismatch`, naming the field.
    pub async fn open(&self, job: &Job) -> Result<JobRecord, Error> {
        let query = ApiRequest::OpenJob(job.spec()?);
        let patience = self.patience.unwrap_or(JoinOptions::default().timeout);
        match self.ask(&query, &mut Patience::new(patience)).await? {
            ApiReply::Job(record, _) => Ok(*record),
            other => Err(unexpected(&other)),
        }
    }

    /// Joins a job with the defaults of [`JoinOptions`].
    ///
    /// # Errors
    /// As [`Client::join_with`].
    pub async fn join(&self, job: Job, rank: Rank) -> Result<Worker, Error> {
        self.join_with(job, rank, JoinOptions::default()).await
    }

    /// Opens the job, claims `rank` and waits until all founding workers are there. A worker that joins
    /// a job that has started counts from the next round that nobody can have begun.
    ///
    /// Safe to cancel: a rank that was claimed falls back when its lease ends.
    ///
    /// # Errors
    /// Those of [`Client::open`]; `rank_taken` when another worker keeps the rank; [`Error::TimedOut`]
    /// with what was missing.
    pub async fn join_with(&self, job: Job, rank: Rank, options: JoinOptions) -> Result<Worker, Error> {
        let mut patience = Patience::new(options.timeout);
        let spec = job.spec()?;
        let query = ApiRequest::OpenJob(spec);
        let ApiReply::Job(record, roster) = self.ask(&query, &mut patience).await? else {
            return Err(unexpected(&ApiReply::Done));
        };
        let record = self.initialise(*record, rank, &options, &mut patience).await?;
        let worker = WorkerRef {
            key: record.spec.key.clone(),
            job: record.incarnation,
            rank,
            incarnation: Incarnation::random(),
        };
        let (roster, window_bytes, lease) = self.claim(&worker, roster, &options, &mut patience).await?;
        let registry = loop {
            match Registry::open(&self.connection.jetstream).await {
                Ok(registry) => break registry,
                Err(error) => patience.wait("the registry", &error.to_string()).await?,
            }
        };
        let roster_epoch =
            self.wait_for_start(&record, (&worker, window_bytes), &roster, lease, &mut patience).await?;
        let from_round = roster.tenure(worker.incarnation).map_or(1, |member| member.from_round);
        let (heads, round) = loop {
            match read_heads(&self.connection.client, &record).await {
                Ok(heads) => {
                    if let Some(round) = first_round(&heads, from_round) {
                        break (heads, round);
                    }
                    self.stand_aside(&record, &worker, roster_epoch, from_round, &heads).await;
                    patience.wait("the present round to end", "other workers are in it").await?;
                }
                Err(error) if error.is_retryable() => patience.wait("the store", &error.message).await?,
                Err(error) => return Err(error.into()),
            }
            self.keep_alive(&worker, window_bytes).await?;
        };
        let shards = u64::from(record.layout.shards());
        let model_bytes = record.layout.elements * 4 + shards * 256;
        let streams = read_streams(&registry, &record).await.unwrap_or_default();
        let identity = (record.incarnation, worker.incarnation, rank);
        let now = Instant::now();
        let mut engine = Engine::new(options.timing, identity, heads.clone(), round, model_bytes, now)
            .full_roster(record.spec.quorum.is_none());
        engine.window(window_bytes, roster_epoch, now);
        engine.heads(&heads, streams, now);
        let results = self.subscribe(subjects::result(&worker.key)).await?;
        let rejects = self.subscribe(subjects::reject(&worker.key, rank)).await?;
        let questions = self.subscribe(subjects::trace(&worker.key)).await?;
        let shared = Arc::new(Shared::new(engine));
        let stop = CancellationToken::new();
        let record = Arc::new(record);
        let driver = Driver {
            shared: shared.clone(),
            connection: self.connection.clone(),
            registry,
            record: record.clone(),
            worker: worker.clone(),
            lease,
            window_bytes: watch::Sender::new(window_bytes),
            stop: stop.clone(),
            trace: Trace::new(rank),
        };
        tokio::spawn(driver.run(results, rejects, questions));
        Ok(Worker::new(self.clone(), record, worker, shared, stop))
    }

    /// With a quorum, rounds that count this worker may be closed on some shards and wait for it on others,
    /// perhaps for it alone.
    async fn stand_aside(
        &self,
        record: &JobRecord,
        worker: &WorkerRef,
        roster_epoch: Epoch,
        from_round: thalweg_protocol::Round,
        heads: &[thalweg_protocol::Head],
    ) {
        for (shard, head) in held_up(heads, from_round) {
            let identity = (worker.job, worker.incarnation, worker.rank);
            let frame = void_after(identity, roster_epoch, shard, head);
            let subject = subjects::gradient(record.partition(shard), &worker.key, worker.rank);
            // One that does not arrive is sent again with the next look.
            if let Err(error) = self.connection.jetstream.publish(subject, frame).await {
                tracing::debug!(%error, shard, "void not sent");
            }
        }
    }

    async fn subscribe(&self, subject: String) -> Result<async_nats::Subscriber, Error> {
        self.connection.client.subscribe(subject).await.map_err(|error| Error::Connect(error.to_string()))
    }

    /// Uploads initial parameters as rank 0, or waits until they are there.
    async fn initialise(
        &self,
        mut record: JobRecord,
        rank: Rank,
        options: &JoinOptions,
        patience: &mut Patience,
    ) -> Result<JobRecord, Error> {
        loop {
            match &record.state {
                JobState::Running => return Ok(record),
                JobState::Failed(error)
                    if error.code == ErrorCode::Diverged && record.spec.policy.on_loss != OnLoss::Fail =>
                {
                    patience.wait("the job's new life", &error.message).await?;
                    record = self.job(&record.spec.key).await?.0;
                    continue;
                }
                state => {
                    if let Some(error) = state.end(&record.spec.key) {
                        return Err(error.into());
                    }
                }
            }
            if record.life.origin.is_some() {
                let hint = "it is being restored; if that was cut short, restore it again";
                patience.wait("the parameters of the snapshot", hint).await?;
            } else if rank == 0 && !options.initial.is_empty() {
                self.upload(&record, &options.initial, patience).await?;
            } else {
                let hint = "rank 0 gives them when it joins (JoinOptions::initial)";
                patience.wait("initial parameters", hint).await?;
            }
            let query = ApiRequest::GetJob(record.spec.key.clone());
            match self.ask(&query, patience).await? {
                ApiReply::Job(newer, _) => record = *newer,
                other => return Err(unexpected(&other)),
            }
        }
    }

    async fn upload(
        &self,
        record: &JobRecord,
        initial: &[(String, Vec<f32>)],
        patience: &mut Patience,
    ) -> Result<(), Error> {
        let mut flat = vec![0_f32; usize::try_from(record.layout.elements).unwrap_or(usize::MAX)];
        let starts = offsets(&record.spec.tensors);
        for (tensor, bounds) in record.spec.tensors.iter().zip(starts.windows(2)) {
            let given = initial.iter().find(|(name, _)| *name == tensor.name);
            let Some((_, values)) = given else { return Err(Error::UnknownTensor(tensor.name.clone())) };
            let expected = (bounds[1] - bounds[0]) as usize;
            if values.len() != expected {
                let tensor = tensor.name.clone();
                return Err(Error::Shape { tensor, expected, actual: values.len() });
            }
            flat[bounds[0] as usize..bounds[1] as usize].copy_from_slice(values);
        }
        let (job, upload) = (record.incarnation, Incarnation::random());
        for shard in 0..record.layout.shards() {
            let range = record.layout.range(shard);
            let bytes: Vec<u8> = flat[range.start as usize..range.end as usize]
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            let bytes = Bytes::from(bytes);
            loop {
                let query = StoreRequest::Upload { job, upload, shard };
                match ask_store(&self.connection.client, record, query, &bytes).await {
                    Ok(_) => break,
                    // Somebody else's parameters are active: those count.
                    Err(error) if error.code == ErrorCode::SpecMismatch => return Ok(()),
                    Err(error) if error.is_retryable() => patience.wait("the store", &error.message).await?,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let query = ApiRequest::Activate { key: record.spec.key.clone(), job, upload };
        match self.ask(&query, patience).await {
            Ok(_) => Ok(()),
            Err(Error::Refused(error)) if error.code == ErrorCode::SpecMismatch => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn claim(
        &self,
        worker: &WorkerRef,
        mut known: Roster,
        options: &JoinOptions,
        patience: &mut Patience,
    ) -> Result<(Roster, u64, Duration), Error> {
        let until = Instant::now() + options.rank_timeout;
        loop {
            let replaces = known.former_life(worker.rank, &options.worker_id);
            let claim = Claim { worker: worker.clone(), id: options.worker_id.clone(), replaces };
            match self.ask_as(Some((worker, 0)), &ApiRequest::Join(claim), patience).await {
                Ok(ApiReply::Joined { roster, window_bytes, lease_ms }) => {
                    return Ok((roster, window_bytes, Duration::from_millis(lease_ms)));
                }
                Ok(other) => return Err(unexpected(&other)),
                Err(Error::Refused(error))
                    if error.code == ErrorCode::RankTaken && Instant::now() < until =>
                {
                    patience.wait("the rank", &error.message).await?;
                    match self
                        .ask_as(Some((worker, 0)), &ApiRequest::GetJob(worker.key.clone()), patience)
                        .await?
                    {
                        ApiReply::Job(_, roster) => known = roster,
                        other => return Err(unexpected(&other)),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until all founding members are there; returns the epoch of a roster that holds them.
    async fn wait_for_start(
        &self,
        record: &JobRecord,
        (worker, window_bytes): (&WorkerRef, u64),
        roster: &Roster,
        lease: Duration,
        patience: &mut Patience,
    ) -> Result<Epoch, Error> {
        if roster.started {
            return Ok(roster.epoch);
        }
        let (mut beaten, mut read) = (Instant::now(), Instant::now());
        // An entry has about 50 bytes, so that all founding members together read 50 MB a second at most. Where they are
        // thousands it is the answer to a heartbeat that tells.
        let read_every = Duration::from_micros(1) * record.spec.workers.saturating_mul(record.spec.workers);
        let mut text = format!("there must be {}", record.spec.workers);
        loop {
            patience.wait("the other workers", &text).await?;
            if beaten.elapsed() >= lease / 8 {
                let epoch = self.keep_alive(worker, window_bytes).await?;
                if epoch > 0 {
                    return Ok(epoch);
                }
                beaten = Instant::now();
            }
            if read.elapsed() < read_every {
                continue;
            }
            read = Instant::now();
            match self
                .ask_as(Some((worker, window_bytes)), &ApiRequest::GetJob(record.spec.key.clone()), patience)
                .await?
            {
                ApiReply::Job(newer, _) if newer.incarnation != record.incarnation => {
                    let text = format!("this life of job {} is over: open the job again", record.spec.key);
                    return Err(WireError::new(ErrorCode::Gone, text).into());
                }
                ApiReply::Job(newer, roster) => {
                    if let Some(error) = newer.state.end(&record.spec.key) {
                        return Err(error.into());
                    }
                    if roster.started {
                        return Ok(roster.epoch);
                    }
                    text = format!(
                        "{} of {} workers are there; ranks: {:?}",
                        roster.members.len(),
                        record.spec.workers,
                        roster.members.iter().map(|member| member.rank).collect::<Vec<_>>()
                    );
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// A heartbeat while joining; returns the epoch of a roster that holds all founding members, or 0.
    async fn keep_alive(&self, worker: &WorkerRef, window_bytes: u64) -> Result<Epoch, Error> {
        // It pushes nothing yet, so it needs no window, whatever it is told.
        let beat = ApiRequest::Beat { worker: worker.clone(), window_bytes, active: false };
        let kinds = (Kind::ApiRequest, Kind::ApiReply);
        let client = &self.connection.client;
        let reply =
            request(client, subjects::WORKER_BEAT, kinds, &beat, &[], Duration::from_millis(500)).await;
        match reply {
            Ok((ApiReply::Error(error), _)) if !error.is_retryable() => Err(error.into()),
            Ok((ApiReply::Beat { roster_epoch, .. }, _)) => Ok(roster_epoch),
            // An unanswered one is repeated soon.
            _ => Ok(0),
        }
    }

    /// Gives a worker's rank back.
    pub(crate) async fn leave(&self, worker: &WorkerRef) -> Result<(), Error> {
        match self.ask(&ApiRequest::Leave(worker.clone()), &mut self.patience()).await? {
            ApiReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// JetStream, for dead letters and events.
    pub(crate) fn jetstream(&self) -> &async_nats::jetstream::Context {
        &self.connection.jetstream
    }

    /// The connection, for what this crate does not offer.
    pub(crate) fn nats(&self) -> &async_nats::Client {
        &self.connection.client
    }
}

pub(crate) fn unexpected(reply: &ApiReply) -> Error {
    WireError::new(ErrorCode::Malformed, format!("unexpected reply of the gateway: {reply:?}")).into()
}

//! The bytes of every message and record, one file each under `golden/<wire version>/`.
//!
//! Two releases of one wire version have to understand each other, and a store reads what an older
//! release wrote. So a change of these bytes needs a higher [`WIRE_VERSION`], and with it a new
//! folder: run the tests with `THALWEG_BLESS=1` to write its files. The folders of older versions
//! stay, as frames that must be told apart.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

use std::{
    collections::BTreeSet,
    fmt::{Debug, Write as _},
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use thalweg_protocol::{
    AgentBeat, AgentReply, AgentRequest, ApiReply, ApiRequest, Claim, Commit, CommitOutcome, Decay, Dtype,
    Durability, ErrorCode, FoldOrder, FrameError, FunctionSpec, GradientHeader, HandedOver, Handover, Head,
    Incarnation, Init, InvokerBeat, InvokerState, JobCommand, JobKey, JobLoad, JobRecord, JobSpec, JobState,
    JobSummary, KeptConsumer, Kind, Layout, Lease, Ledger, Life, Member, Mode, NonFinite, Nudge, OnLoss,
    OpenRound, Origin, ParameterGroup, Partial, PartialCommit, PlacedPartition, Placement, Policy, Progress,
    RankSet, Reject, ResultHeader, Roster, Schedule, Setting, Settings, SettingsChange, SettingsRevision,
    Span, Stage, StateId, StoreId, StoreJob, StoreRecord, StoreReply, StoreRequest, Streams, Suspect,
    TensorSpec, TraceQuery, TraceReply, WIRE_VERSION, WireError, WorkerRef, checksum, frame,
};

const BLESS: &str = "THALWEG_BLESS";

type Check = Box<dyn Fn(&Bytes) -> Result<(), String>>;

/// One file: its name, the bytes of this build, and whether bytes decode to what these came from.
struct Golden {
    name: String,
    bytes: Bytes,
    check: Check,
}

fn golden<H>(name: &str, kind: Kind, header: H, payload: &'static [u8]) -> Golden
where
    H: Serialize + DeserializeOwned + PartialEq + Debug + 'static,
{
    let bytes = frame::seal(kind, &header, payload);
    let check = move |bytes: &Bytes| {
        let (opened, rest) = frame::open::<H>(kind, bytes).map_err(|error| error.to_string())?;
        if opened == header && rest == payload {
            Ok(())
        } else {
            Err(format!("decoded {opened:?} with payload {rest:?}, not {header:?} with {payload:?}"))
        }
    };
    Golden { name: name.to_owned(), bytes, check: Box::new(check) }
}

fn record<H>(name: &str, record: H) -> Golden
where
    H: Serialize + DeserializeOwned + PartialEq + Debug + 'static,
{
    golden(name, Kind::Record, record, &[])
}

const JOB: Incarnation = Incarnation(*b"job's incarnatio");
const WORKER: Incarnation = Incarnation(*b"worker's incarna");
const UPLOAD: Incarnation = Incarnation(*b"upload's incarna");
const STORE: StoreId = StoreId(*b"store's identity");
/// 1.0, -2.5
const VALUES: &[u8] = &[0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0];

fn key() -> JobKey {
    JobKey { tenant: "acme".parse().unwrap(), job: "bert-base_2".parse().unwrap() }
}

fn head() -> Head {
    Head { version: 41, fold_count: 0, state_id: StateId(*b"state of version") }
}

fn ledger() -> Ledger {
    Ledger {
        round: 41,
        roster_epoch: 300,
        revision: 1,
        counted: RankSet::from_iter([0, 1, 9]),
        void: RankSet::from_iter([2]),
        below_quorum: true,
        order: Vec::new(),
    }
}

fn open_round() -> Partial {
    let ledger = Ledger { round: 42, below_quorum: false, order: vec![9, 0, 300], ..ledger() };
    Partial { ledger, first: 1_785_000_000_000, since: 299 }
}

fn error() -> WireError {
    WireError::new(ErrorCode::LeaseLost, "rank 2 belongs to another life: join again")
}

fn layout() -> Layout {
    Layout { elements: 1 << 33, shard_elements: 131_072 }
}

fn function() -> FunctionSpec {
    let group = ParameterGroup {
        tensors: vec!["bias".into()],
        settings: [("weight_decay".to_owned(), Setting::Number(0.0))].into(),
    };
    let mut function = FunctionSpec::named("sgd").number("lr", 0.1).flag("nesterov", true);
    function.groups.push(group);
    function
}

fn spec() -> JobSpec {
    JobSpec {
        key: key(),
        tensors: vec![TensorSpec::f32("weight", [70_000, 512]), TensorSpec::f32("bias", [])],
        function: function(),
        mode: Mode::Sync,
        workers: 4,
        quorum: Some(3),
        deadline_ms: 30_000,
        durability: Durability::Process,
        non_finite: NonFinite::Void,
        init: Init::Upload,
        shard_bytes: 524_288,
        max_members: 16,
        policy: Policy::default(),
    }
}

/// The other word of every choice in [`spec`], and nothing where something may be left out.
fn other_spec(non_finite: NonFinite) -> JobSpec {
    let tensors = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16]
        .map(|dtype| TensorSpec { dtype, ..TensorSpec::f32(format!("{dtype:?}"), [3]) });
    JobSpec {
        tensors: tensors.into(),
        function: FunctionSpec::named("mean"),
        quorum: None,
        deadline_ms: 0,
        durability: Durability::Disk,
        init: Init::Zeros,
        non_finite,
        ..spec()
    }
}

fn job(state: JobState) -> JobRecord {
    JobRecord {
        spec: spec(),
        incarnation: JOB,
        layout: layout(),
        slots: 1,
        store: STORE,
        partitions: 32,
        state,
        settings: vec![
            SettingsRevision { revision: 0, from_round: 0, function: function() },
            SettingsRevision { revision: 1, from_round: 40, function: FunctionSpec::named("sgd") },
        ],
        life: Life::default(),
    }
}

fn roster() -> Roster {
    let member = Member {
        rank: 0,
        worker: "host-a".into(),
        incarnation: WORKER,
        from_round: 1,
        until_round: None,
        confirmed: false,
    };
    let gone = Member { rank: 1, worker: "host-b".into(), until_round: Some(40), ..member };
    Roster { job: JOB, epoch: 300, started: true, members: vec![member, gone], revision: 0 }
}

fn worker() -> WorkerRef {
    WorkerRef { key: key(), job: JOB, rank: 2, incarnation: WORKER }
}

fn store_job() -> StoreJob {
    StoreJob {
        key: key(),
        incarnation: JOB,
        layout: layout(),
        slots: 1,
        durability: Durability::Disk,
        max_members: 16,
        init: Init::Upload,
        first_version: 0,
    }
}

fn settings_change() -> SettingsChange {
    let lr = || Settings::from([("lr".to_owned(), Setting::Number(0.05))]);
    SettingsChange { from_round: Some(300), settings: lr(), groups: [(1, lr())].into() }
}

fn summary() -> JobSummary {
    JobSummary {
        key: key(),
        incarnation: JOB,
        state: "running".into(),
        function: "sgd".into(),
        workers: 4,
        members: 3,
        elements: 650,
        durability: Durability::Process,
    }
}

/// A variant without an arm does not compile: give it one, and a value in [`goldens`].
fn request_name(request: &StoreRequest) -> &'static str {
    match request {
        StoreRequest::Create(_) => "store_request_create",
        StoreRequest::Upload { .. } => "store_request_upload",
        StoreRequest::Activate { .. } => "store_request_activate",
        StoreRequest::Heads { .. } => "store_request_heads",
        StoreRequest::Fetch { .. } => "store_request_fetch",
        StoreRequest::FetchHead { .. } => "store_request_fetch_head",
        StoreRequest::Commit(_) => "store_request_commit",
        StoreRequest::Fence { .. } => "store_request_fence",
        StoreRequest::Delete { .. } => "store_request_delete",
        StoreRequest::List => "store_request_list",
        StoreRequest::Hold { .. } => "store_request_hold",
        StoreRequest::FetchHeld { .. } => "store_request_fetch_held",
        StoreRequest::Release { .. } => "store_request_release",
        StoreRequest::CommitPartial(_) => "store_request_commit_partial",
        StoreRequest::FetchPartial { .. } => "store_request_fetch_partial",
        StoreRequest::OpenRounds { .. } => "store_request_open_rounds",
    }
}

/// As [`request_name`].
fn reply_name(reply: &StoreReply) -> &'static str {
    match reply {
        StoreReply::Done => "store_reply_done",
        StoreReply::Heads(_) => "store_reply_heads",
        StoreReply::State(..) => "store_reply_state",
        StoreReply::Commit(CommitOutcome::Committed(_)) => "store_reply_commit_committed",
        StoreReply::Commit(CommitOutcome::AlreadyCommitted(_)) => "store_reply_commit_already_committed",
        StoreReply::Commit(CommitOutcome::Conflict(_)) => "store_reply_commit_conflict",
        StoreReply::Commit(CommitOutcome::StaleRoster { .. }) => "store_reply_commit_stale_roster",
        StoreReply::Fenced(_) => "store_reply_fenced",
        StoreReply::Jobs(_) => "store_reply_jobs",
        StoreReply::Error(_) => "store_reply_error",
        StoreReply::Held { .. } => "store_reply_held",
        StoreReply::Open(..) => "store_reply_open",
        StoreReply::OpenRounds(_) => "store_reply_open_rounds",
    }
}

/// As [`request_name`].
fn api_request_name(request: &ApiRequest) -> &'static str {
    match request {
        ApiRequest::OpenJob(_) => "api_request_open_job",
        ApiRequest::GetJob(_) => "api_request_get_job",
        ApiRequest::ListJobs => "api_request_list_jobs",
        ApiRequest::DeleteJob(_) => "api_request_delete_job",
        ApiRequest::Activate { .. } => "api_request_activate",
        ApiRequest::Join(_) => "api_request_join",
        ApiRequest::Leave(_) => "api_request_leave",
        ApiRequest::Beat { .. } => "api_request_beat",
        ApiRequest::Jobs { .. } => "api_request_jobs",
        ApiRequest::Progress(_) => "api_request_progress",
        ApiRequest::Control(_, JobCommand::Pause(_)) => "api_request_pause",
        ApiRequest::Control(_, JobCommand::Resume) => "api_request_resume",
        ApiRequest::Control(_, JobCommand::Abort(_)) => "api_request_abort",
        ApiRequest::SetSettings { .. } => "api_request_set_settings",
        ApiRequest::Restore { .. } => "api_request_restore",
    }
}

/// As [`request_name`].
fn api_reply_name(reply: &ApiReply) -> &'static str {
    match reply {
        ApiReply::Done => "api_reply_done",
        ApiReply::Job(..) => "api_reply_job",
        ApiReply::Jobs(_) => "api_reply_jobs",
        ApiReply::Joined { .. } => "api_reply_joined",
        ApiReply::Beat { paused: None, .. } => "api_reply_beat",
        ApiReply::Beat { paused: Some(_), .. } => "api_reply_beat_paused",
        ApiReply::JobPage { .. } => "api_reply_job_page",
        ApiReply::Progress(_) => "api_reply_progress",
        ApiReply::Settings(_) => "api_reply_settings",
        ApiReply::Error(_) => "api_reply_error",
    }
}

/// As [`request_name`].
fn job_name(state: &JobState) -> &'static str {
    match state {
        JobState::Creating => "record_job_creating",
        JobState::Initialising => "record_job_initialising",
        JobState::Running => "record_job_running",
        JobState::Failed(_) => "record_job_failed",
        JobState::Deleting => "record_job_deleting",
    }
}

/// As [`request_name`].
fn beat_name(state: InvokerState) -> &'static str {
    match state {
        InvokerState::Starting => "beat_starting",
        InvokerState::Ready => "beat_ready",
        InvokerState::Draining => "beat_draining",
    }
}

fn workers_and_results() -> Vec<Golden> {
    let gradient = GradientHeader {
        job: JOB,
        shard: 70_000,
        round: 42,
        worker: WORKER,
        rank: 2,
        roster_epoch: 300,
        base: head().state_id,
        weight: 0.75,
        void: false,
        elements: 2,
    };
    let void = GradientHeader { void: true, weight: 0.0, ..gradient };
    let result = ResultHeader { job: JOB, shard: 3, head: head(), ledger: ledger() };
    let kept = KeptConsumer { next_delivery: 300, credit: 2, pending: 0 };
    let reject = Reject { job: Some(JOB), worker: Some(WORKER), at: Some((3, 42)), error: error() };
    let unreadable = Reject { job: None, worker: None, at: None, error: error() };
    vec![
        golden("gradient", Kind::Gradient, gradient, VALUES),
        golden("gradient_void", Kind::Gradient, void, &[]),
        golden("result", Kind::Result, result, VALUES),
        golden("reject", Kind::Reject, reject, &[]),
        golden("reject_unreadable", Kind::Reject, unreadable, &[]),
        golden("nudge", Kind::Nudge, Nudge { job: JOB, shard: 3 }, &[]),
        golden(
            "handover_question",
            Kind::Handover,
            Handover { partition: 31, consumer: "e7-001234ab00000005".into(), epoch: 8 },
            &[],
        ),
        golden("handed_over_not_held", Kind::HandedOver, HandedOver::NotHeld, &[]),
        golden("handed_over_newer", Kind::HandedOver, HandedOver::Newer(300), &[]),
        golden("handed_over_ready", Kind::HandedOver, HandedOver::Ready, &[]),
        golden("handed_over_not_yet", Kind::HandedOver, HandedOver::NotYet, &[]),
        golden("handed_over_kept", Kind::HandedOver, HandedOver::Kept(kept), &[]),
        golden("handed_over_left", Kind::HandedOver, HandedOver::Left(70_000), &[]),
    ]
}

fn store_messages() -> Vec<Golden> {
    let commit = Commit { job: JOB, shard: 3, expect: head(), ledger: ledger(), function: [0xf5; 16] };
    let partial = PartialCommit { job: JOB, shard: 3, expect: head(), partial: open_round() };
    let open = OpenRound {
        job: JOB,
        key: key(),
        shard: 3,
        head: head().folded_on(),
        first: 1_785_000_000_000,
        counted: 3,
        roster_epoch: 300,
    };
    let requests = [
        (StoreRequest::Create(store_job()), &[][..]),
        (StoreRequest::Upload { job: JOB, upload: UPLOAD, shard: 3 }, VALUES),
        (StoreRequest::Activate { job: JOB, upload: UPLOAD }, &[]),
        (StoreRequest::Heads { job: JOB, first: 3, count: 8192 }, &[]),
        (StoreRequest::Fetch { job: JOB, shard: 3, slots: true }, &[]),
        (StoreRequest::FetchHead { job: JOB, shard: 3 }, &[]),
        (StoreRequest::Commit(commit), VALUES),
        (StoreRequest::Fence { job: JOB, epoch: 300, from_round: 42 }, &[]),
        (StoreRequest::Delete { job: JOB }, &[]),
        (StoreRequest::List, &[]),
        (StoreRequest::Hold { job: JOB, hold: UPLOAD }, &[]),
        (StoreRequest::FetchHeld { job: JOB, hold: UPLOAD, shard: 1, slots: true }, &[]),
        (StoreRequest::Release { job: JOB, hold: UPLOAD }, &[]),
        (StoreRequest::CommitPartial(partial), VALUES),
        (StoreRequest::FetchPartial { job: JOB, shard: 3 }, &[]),
        (StoreRequest::OpenRounds { after: Some((JOB, 3)), limit: 256 }, &[]),
    ];
    let replies = [
        (StoreReply::Done, &[][..]),
        (StoreReply::Heads(vec![head(), Head { version: 0, ..head() }]), &[]),
        (StoreReply::State(head(), ledger()), VALUES),
        (StoreReply::Commit(CommitOutcome::Committed(head())), &[]),
        (StoreReply::Commit(CommitOutcome::AlreadyCommitted(head())), &[]),
        (StoreReply::Commit(CommitOutcome::Conflict(head())), &[]),
        (StoreReply::Commit(CommitOutcome::StaleRoster { needed: 301 }), &[]),
        (StoreReply::Fenced(41), &[]),
        (StoreReply::Jobs(vec![store_job()]), &[]),
        (StoreReply::Error(error()), &[]),
        (StoreReply::Held { version: 300, complete: true }, &[]),
        (StoreReply::Open(head().folded_on(), ledger(), Box::new(open_round())), VALUES),
        (StoreReply::OpenRounds(vec![open]), &[]),
    ];
    let requests = requests
        .into_iter()
        .map(|(request, payload)| golden(request_name(&request), Kind::StoreRequest, request, payload));
    let replies = replies
        .into_iter()
        .map(|(reply, payload)| golden(reply_name(&reply), Kind::StoreReply, reply, payload));
    requests.chain(replies).collect()
}

fn api_messages() -> Vec<Golden> {
    let requests = [
        ApiRequest::OpenJob(spec()),
        ApiRequest::GetJob(key()),
        ApiRequest::ListJobs,
        ApiRequest::DeleteJob(key()),
        ApiRequest::Activate { key: key(), job: JOB, upload: UPLOAD },
        ApiRequest::Join(Claim { worker: worker(), id: "host-a".into(), replaces: None }),
        ApiRequest::Leave(worker()),
        ApiRequest::Beat { worker: worker(), window_bytes: 1 << 26, active: true },
        ApiRequest::Jobs { tenant: Some(key().tenant), after: Some(key()), limit: 100 },
        ApiRequest::Progress(key()),
        ApiRequest::Control(key(), JobCommand::Pause("for maintenance".into())),
        ApiRequest::Control(key(), JobCommand::Resume),
        ApiRequest::Control(key(), JobCommand::Abort("wrong data".into())),
        ApiRequest::SetSettings { key: key(), change: settings_change() },
        ApiRequest::Restore {
            spec: Box::new(spec()),
            function: Some(function()),
            upload: UPLOAD,
            version: 300,
            replaces: Some(JOB),
        },
    ];
    let replies = [
        ApiReply::Done,
        ApiReply::Job(Box::new(job(JobState::Running)), roster()),
        ApiReply::Jobs(vec![job(JobState::Initialising)]),
        ApiReply::Joined { roster: roster(), window_bytes: 1 << 26, lease_ms: 10_000 },
        ApiReply::Beat { window_bytes: 1 << 26, roster_epoch: 300, paused: None },
        ApiReply::Beat { window_bytes: 1 << 26, roster_epoch: 300, paused: Some("for maintenance".into()) },
        ApiReply::JobPage { jobs: vec![summary()], next: Some(key()) },
        ApiReply::Progress(Progress { min: 300, max: 301 }),
        ApiReply::Settings(SettingsRevision { revision: 1, from_round: 300, function: function() }),
        ApiReply::Error(error()),
    ];
    let requests = requests
        .into_iter()
        .map(|request| golden(api_request_name(&request), Kind::ApiRequest, request, &[]));
    let replies = replies.into_iter().map(|reply| golden(api_reply_name(&reply), Kind::ApiReply, reply, &[]));
    let others = [
        ("api_request_open_job_propagate", NonFinite::Propagate),
        ("api_request_open_job_fail", NonFinite::Fail),
    ]
    .map(|(name, policy)| golden(name, Kind::ApiRequest, ApiRequest::OpenJob(other_spec(policy)), &[]));
    let scheduled = schedules().into_iter().map(|(name, schedule)| {
        let spec = JobSpec { function: function().schedule(schedule), ..spec() };
        golden(&format!("api_request_open_job_{name}"), Kind::ApiRequest, ApiRequest::OpenJob(spec), &[])
    });
    let again = Claim { worker: worker(), id: "host-a".into(), replaces: Some(UPLOAD) };
    let again = golden("api_request_join_again", Kind::ApiRequest, ApiRequest::Join(again), &[]);
    requests.chain(replies).chain(others).chain(scheduled).chain([again]).collect()
}

fn schedules() -> Vec<(&'static str, Schedule)> {
    let decays = [
        Decay::Constant,
        Decay::Linear { rounds: 70_000, to: 0.0 },
        Decay::Cosine { rounds: 1000, to: 0.1 },
        Decay::Exponential { factor: 0.999 },
        Decay::Steps { at: vec![300, 70_000], factor: 0.5 },
        Decay::InverseSqrt,
    ];
    let names = decays.into_iter().map(|decay| {
        // A decay without an arm does not compile: give it one, and a value above.
        let name = match decay {
            Decay::Constant => "constant",
            Decay::Linear { .. } => "linear",
            Decay::Cosine { .. } => "cosine",
            Decay::Exponential { .. } => "exponential",
            Decay::Steps { .. } => "steps",
            Decay::InverseSqrt => "inverse_sqrt",
        };
        (name, Schedule { warmup_rounds: 100, decay })
    });
    names.collect()
}

fn records() -> Vec<Golden> {
    let placement = Placement {
        partitions: vec![
            PlacedPartition { epoch: 7, holder: Some("invoker-1".into()) },
            PlacedPartition { epoch: 0, holder: None },
        ],
        first: 0,
    };
    let suspect = Suspect {
        sequence: 1 << 40,
        stream_created: 1_760_000_000_123_456_789,
        attempt: 2,
        invoker: "invoker-1".into(),
    };
    let mut goldens = vec![
        record("record_roster", roster()),
        record("record_placement", placement),
        record("record_streams", Streams { created: vec![1_760_000_000_123_456_789, 0, -1] }),
        record("record_store", StoreRecord { id: STORE, location: "host-a:/var/lib/thalweg".into() }),
        record("record_lease", Lease { holder: WORKER, renewals: 70_000 }),
        record("record_suspect", suspect),
        record("error_codes", ErrorCode::ALL.to_vec()),
    ];
    let states = [
        JobState::Creating,
        JobState::Initialising,
        JobState::Running,
        JobState::Failed(error()),
        JobState::Deleting,
    ];
    for state in states {
        goldens.push(record(job_name(&state), job(state)));
    }
    let origin = Origin { upload: UPLOAD, version: 300, rolled_back: true };
    let paused = Some("for maintenance".into());
    let life = Life { paused, origin: Some(origin), replaces: vec![WORKER], first_partition: 0 };
    let policy = Policy { ttl_ms: Some(3_600_000), on_loss: OnLoss::RollBack, ..Policy::default() };
    let by_arrival = Policy { order: FoldOrder::Arrival, ..Policy::default() };
    let plain = job(JobState::Running);
    goldens.push(record(
        "record_job_restored",
        JobRecord { life, spec: JobSpec { policy, ..spec() }, ..plain.clone() },
    ));
    let arrives = JobSpec { policy: by_arrival, ..spec() };
    goldens.push(record("record_job_by_arrival", JobRecord { spec: arrives, ..plain }));
    let member = Member { confirmed: true, ..roster().members[0].clone() };
    goldens
        .push(record("record_roster_confirmed", Roster { members: vec![member], revision: 7, ..roster() }));
    for state in [InvokerState::Starting, InvokerState::Ready, InvokerState::Draining] {
        let beat = InvokerBeat {
            invoker: "invoker-1".into(),
            state,
            partitions: vec![(0, 7), (31, 300)],
            service_bytes_per_s: 1.5e9,
            busy: 0.25,
            held_messages: 12,
            held_bytes: 1 << 33,
            cpu_quota: 2.0,
            jobs: Vec::new(),
        };
        goldens.push(golden(beat_name(state), Kind::Beat, beat.clone(), &[]));
        if state == InvokerState::Ready {
            let load =
                JobLoad { round: 300, rounds: 2, bytes: 1 << 33, delay_ms: 17, ..JobLoad::new(spec().key) };
            let with_results = JobLoad { result_bytes: 1 << 31, shards: 600, age_ms: 499, ..load.clone() };
            let beat = InvokerBeat { jobs: vec![load], ..beat };
            goldens.push(golden("beat_with_jobs", Kind::Beat, beat.clone(), &[]));
            let beat = InvokerBeat { jobs: vec![with_results], ..beat };
            goldens.push(golden("beat_with_results", Kind::Beat, beat, &[]));
        }
    }
    // What pools of their own add, left out by default.
    let pooled = Life { first_partition: 32, ..Life::default() };
    let pool = Some(thalweg_protocol::Name::new("big").unwrap());
    let policy = Policy { pool, ..Policy::default() };
    let record_of_pool =
        JobRecord { spec: JobSpec { policy, ..spec() }, life: pooled, ..job(JobState::Running) };
    goldens.push(record("record_job_pool", record_of_pool));
    goldens.push(record("record_placement_pool", Placement { partitions: Vec::new(), first: 32 }));
    goldens
}

fn agents() -> Vec<Golden> {
    let invoker = || "auto-0badcafe".parse().unwrap();
    let beat = AgentBeat {
        agent: "host-a".into(),
        life: WORKER,
        slots: 8,
        changes: 300,
        invokers: vec![invoker(), "auto-1".parse().unwrap()],
    };
    let requests = [AgentRequest::Start { invoker: invoker() }, AgentRequest::Stop { invoker: invoker() }]
        .map(|request| {
            // A variant without an arm does not compile: give it one, and a value above.
            let name = match request {
                AgentRequest::Start { .. } => "agent_request_start",
                AgentRequest::Stop { .. } => "agent_request_stop",
            };
            golden(name, Kind::AgentRequest, request, &[])
        });
    let replies = [AgentReply::Done { changes: 300 }, AgentReply::Error(error())].map(|reply| {
        let name = match reply {
            AgentReply::Done { .. } => "agent_reply_done",
            AgentReply::Error(_) => "agent_reply_error",
        };
        golden(name, Kind::AgentReply, reply, &[])
    });
    let beat = golden("agent_beat", Kind::AgentBeat, beat, &[]);
    requests.into_iter().chain(replies).chain([beat]).collect()
}

fn traces() -> Vec<Golden> {
    let span = |(place, stage)| Span {
        stage,
        shard: 3,
        rank: (place % 2 == 0).then_some(70_000),
        start_us: 1_790_000_000_000_000,
        duration_us: 300,
    };
    let spans = (0..).zip(Stage::ALL).map(span).collect();
    let reply = TraceReply { component: "worker".into(), name: "rank 1".into(), spans };
    vec![
        golden("trace_query", Kind::TraceQuery, TraceQuery { job: JOB, round: 300 }, &[]),
        golden("trace_reply", Kind::TraceReply, reply, &[]),
    ]
}

fn goldens() -> Vec<Golden> {
    [workers_and_results(), store_messages(), api_messages(), records(), agents(), traces()]
        .into_iter()
        .flatten()
        .collect()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Lines of 32 bytes.
fn to_hex(bytes: &[u8]) -> String {
    bytes.chunks(32).fold(String::new(), |mut text, line| {
        line.iter().for_each(|byte| write!(text, "{byte:02x}").unwrap());
        text + "\n"
    })
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.chars().filter(|c| !c.is_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(&String::from_iter(pair), 16).expect("hexadecimal digits in pairs"))
        .collect()
}

#[test]
fn bytes_of_this_wire_version_never_change() {
    let folder = folder().join(WIRE_VERSION.to_string());
    let bless = std::env::var_os(BLESS).is_some_and(|value| value == "1");
    if bless {
        fs::create_dir_all(&folder).unwrap();
    }
    let mut wrong = Vec::new();
    let mut known = BTreeSet::new();
    for Golden { name, bytes, check } in goldens() {
        let path = folder.join(&name).with_extension("hex");
        if bless {
            fs::write(&path, to_hex(&bytes)).unwrap();
        }
        match fs::read_to_string(&path).map(|text| Bytes::from(from_hex(&text))) {
            Err(error) => wrong.push(format!("{}: {error}; {BLESS}=1 writes it", path.display())),
            Ok(golden) => {
                if let Err(error) = check(&golden) {
                    wrong.push(format!("{name}: the old bytes no longer mean the same: {error}"));
                }
                if golden != bytes {
                    wrong.push(format!("{name}: encoded as\n{}not\n{}", to_hex(&bytes), to_hex(&golden)));
                }
            }
        }
        assert!(known.insert(path), "{name} is there twice");
    }
    let there = if folder.exists() { files(&folder) } else { BTreeSet::new() };
    for path in there.difference(&known) {
        wrong.push(format!("{}: no message makes these bytes any more", path.display()));
    }
    assert!(
        wrong.is_empty(),
        "the bytes on the wire are not those of wire version {WIRE_VERSION}. If that is intended, raise \
         frame::WIRE_VERSION and run this test with {BLESS}=1; keep the old folder.\n\n{}",
        wrong.join("\n")
    );
}

#[test]
fn frames_of_older_wire_versions_are_told_apart() {
    for folder in files(&folder()) {
        let theirs: u8 = folder.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let files = files(&folder);
        assert!(!files.is_empty(), "{} is empty", folder.display());
        for path in files.iter().filter(|_| theirs != WIRE_VERSION) {
            let bytes = from_hex(&fs::read_to_string(path).unwrap()).into();
            let opened = frame::open_record::<Lease>(&bytes);
            assert_eq!(opened, Err(FrameError::WireVersion { theirs, ours: WIRE_VERSION }));
        }
    }
}

#[test]
fn every_kind_has_golden_bytes() {
    let kinds: BTreeSet<_> = goldens().iter().map(|golden| golden.bytes[2]).collect();
    assert_eq!(kinds, (1..=13).chain(16..=19).collect());
    // A new kind does not compile here: then raise the number above, too.
    match Kind::Record {
        Kind::Gradient | Kind::Result | Kind::Reject | Kind::StoreRequest | Kind::StoreReply => {}
        Kind::ApiRequest | Kind::ApiReply | Kind::Record | Kind::Beat | Kind::Nudge => {}
        Kind::AgentBeat | Kind::AgentRequest | Kind::AgentReply => {}
        Kind::Handover | Kind::HandedOver | Kind::TraceQuery | Kind::TraceReply => {}
    }
}

#[test]
fn a_frame_is_written_as_documented() {
    let frame = frame::seal(Kind::Record, &Lease { holder: Incarnation([0xaa; 16]), renewals: 5 }, &[1, 2]);
    let body = [&[0x92, 0xc4, 16][..], &[0xaa; 16], &[5, 0xc4, 2, 1, 2]].concat();
    let prelude = [0x94, WIRE_VERSION, Kind::Record as u8, 0, 0xc4, 8];
    assert_eq!(frame, [&prelude[..], &checksum(&[&body]).to_be_bytes(), &body].concat());
}

#[test]
fn the_checksum_is_xxh3() {
    // From the reference implementation (xxhsum -H3).
    assert_eq!(checksum(&[b"123456789"]), 0x72dc_b18b_67a1_7dff);
    assert_eq!(checksum(&[b"1234", b"", b"56789"]), checksum(&[b"123456789"]));
    assert_eq!(checksum(&[]), 0x2d06_8005_38d3_94c2);
}

/// A worker, an invoker and a store each work these out for themselves, and slabs keep them.
#[test]
fn state_ids_never_change() {
    let initial = Head::initial([1; 16], 2, 3);
    let next = initial.next(&ledger(), [4; 16], 5);
    assert_eq!(initial.state_id.to_string(), "2b0c4ffc2584fce2398d871e2da7a3f1");
    assert_eq!(next.state_id.to_string(), "c7478fc9f5f131c2f3e66f1c0ce2fd4b");
    assert_eq!((initial.version, next.version, next.fold_count), (0, 41, 0));
}

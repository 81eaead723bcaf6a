//! Everything that crosses the wire: one enum over all headers and records, and proptest
//! strategies for each.

use bytes::Bytes;
use proptest::{
    bool::ANY as BOOL,
    collection::{btree_map, vec},
    num, option,
    prelude::*,
    sample,
};
use thalweg_protocol::{
    AgentBeat, AgentReply, AgentRequest, ApiReply, ApiRequest, Claim, Commit, CommitOutcome, Decay, Dtype,
    Durability, ErrorCode, FoldOrder, FrameError, FunctionSpec, GradientHeader, HandedOver, Handover, Head,
    Incarnation, Init, InvokerBeat, InvokerState, JobCommand, JobKey, JobLoad, JobRecord, JobSpec, JobState,
    JobSummary, KeptConsumer, Kind, Layout, Lease, Ledger, Life, Member, Mode, Name, NonFinite, Nudge,
    OnLoss, OpenRound, Origin, ParameterGroup, Partial, PartialCommit, PlacedPartition, Placement, Policy,
    Progress, RankSet, Reject, ResultHeader, Roster, Schedule, Setting, Settings, SettingsChange,
    SettingsRevision, Span, Stage, StateId, StoreId, StoreJob, StoreRecord, StoreReply, StoreRequest,
    Streams, Suspect, TensorSpec, TraceQuery, TraceReply, WireError, WorkerRef, frame,
};

const U16: num::u16::Any = num::u16::ANY;
const U32: num::u32::Any = num::u32::ANY;
const U64: num::u64::Any = num::u64::ANY;
const I64: num::i64::Any = num::i64::ANY;

macro_rules! messages {
    ($($name:ident: $kind:ident, $strategy:expr;)*) => {
        /// Any header or record.
        #[derive(Clone, Debug, PartialEq)]
        pub(crate) enum Message {
            $($name($name),)*
        }

        impl Message {
            pub(crate) fn kind(&self) -> Kind {
                match self { $(Self::$name(_) => Kind::$kind,)* }
            }

            pub(crate) fn seal(&self, payload: &[u8]) -> Bytes {
                match self { $(Self::$name(header) => frame::seal(Kind::$kind, header, payload),)* }
            }

            /// Opens `bytes` as a message of the same type as this one.
            pub(crate) fn open(&self, bytes: &Bytes) -> Result<(Self, Bytes), FrameError> {
                match self {
                    $(Self::$name(_) => {
                        let (header, payload) = frame::open(Kind::$kind, bytes)?;
                        Ok((Self::$name(header), payload))
                    })*
                }
            }
        }

        /// Opens `bytes` as every type of message, one after another.
        pub(crate) fn open_as_each(bytes: &Bytes) -> Vec<Result<(Message, Bytes), FrameError>> {
            vec![
                $(frame::open(Kind::$kind, bytes)
                    .map(|(header, payload)| (Message::$name(header), payload)),)*
            ]
        }

        /// A message of any type.
        pub(crate) fn message() -> impl Strategy<Value = Message> {
            prop::strategy::Union::new([$($strategy.prop_map(Message::$name).boxed(),)*])
        }
    };
}

messages! {
    GradientHeader: Gradient, gradient_header();
    ResultHeader: Result, result_header();
    Reject: Reject, reject();
    StoreRequest: StoreRequest, store_request();
    StoreReply: StoreReply, store_reply();
    ApiRequest: ApiRequest, api_request();
    ApiReply: ApiReply, api_reply();
    JobRecord: Record, job_record();
    Roster: Record, roster();
    Placement: Record, placement();
    Streams: Record, vec(I64, 0..40).prop_map(|created| Streams { created });
    StoreRecord: Record, (store_id(), text()).prop_map(|(id, location)| StoreRecord { id, location });
    Lease: Record, (incarnation(), U64).prop_map(|(holder, renewals)| Lease { holder, renewals });
    Suspect: Record, suspect();
    InvokerBeat: Beat, invoker_beat();
    Handover: Handover, (U16, text(), U64)
        .prop_map(|(partition, consumer, epoch)| Handover { partition, consumer, epoch });
    HandedOver: HandedOver, handed_over();
    Nudge: Nudge, (incarnation(), U32).prop_map(|(job, shard)| Nudge { job, shard });
    AgentBeat: AgentBeat, agent_beat();
    AgentRequest: AgentRequest, (BOOL, name()).prop_map(|(start, invoker)| match start {
        true => AgentRequest::Start { invoker },
        false => AgentRequest::Stop { invoker },
    });
    TraceQuery: TraceQuery, (incarnation(), U64).prop_map(|(job, round)| TraceQuery { job, round });
    TraceReply: TraceReply, (text(), text(), vec(span(), 0..40))
        .prop_map(|(component, name, spans)| TraceReply { component, name, spans });
    AgentReply: AgentReply, prop_oneof![
        U64.prop_map(|changes| AgentReply::Done { changes }),
        wire_error().prop_map(AgentReply::Error),
    ];
}

/// Any text, with some characters of several bytes, long enough for every length marker but `str32`.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![8 => "\\PC{0,20}", 1 => "[a-zé]{30,300}"]
}

/// A number that equals itself; `roundtrip.rs` looks at NaN alone.
fn number() -> impl Strategy<Value = f64> {
    num::f64::NORMAL | num::f64::SUBNORMAL | num::f64::ZERO | num::f64::INFINITE
}

fn incarnation() -> impl Strategy<Value = Incarnation> {
    any::<[u8; 16]>().prop_map(Incarnation)
}

fn span() -> impl Strategy<Value = Span> {
    (sample::select(&Stage::ALL[..]), U32, option::of(U32), U64, U64).prop_map(
        |(stage, shard, rank, start_us, duration_us)| Span { stage, shard, rank, start_us, duration_us },
    )
}

fn store_id() -> impl Strategy<Value = StoreId> {
    any::<[u8; 16]>().prop_map(StoreId)
}

fn name() -> impl Strategy<Value = Name> {
    "[a-z0-9_-]{1,64}".prop_map(|name| Name::new(name).unwrap())
}

fn key() -> impl Strategy<Value = JobKey> {
    (name(), name()).prop_map(|(tenant, job)| JobKey { tenant, job })
}

fn wire_error() -> impl Strategy<Value = WireError> {
    (prop::sample::select(ErrorCode::ALL), text()).prop_map(|(code, message)| WireError { code, message })
}

fn ranks() -> impl Strategy<Value = RankSet> {
    vec(0..3000_u32, 0..20).prop_map(RankSet::from_iter)
}

fn ledger() -> impl Strategy<Value = Ledger> {
    (U64, U64, U32, ranks(), ranks(), BOOL, vec(0..3000_u32, 0..20)).prop_map(
        |(round, roster_epoch, revision, counted, void, below_quorum, order)| Ledger {
            round,
            roster_epoch,
            revision,
            counted,
            void,
            below_quorum,
            order,
        },
    )
}

fn partial() -> impl Strategy<Value = Partial> {
    (ledger(), U64, U64).prop_map(|(ledger, first, since)| Partial { ledger, first, since })
}

fn open_round() -> impl Strategy<Value = OpenRound> {
    let counts = (U64, U32, U64);
    (incarnation(), key(), U32, head(), counts).prop_map(
        |(job, key, shard, head, (first, counted, roster_epoch))| OpenRound {
            job,
            key,
            shard,
            head,
            first,
            counted,
            roster_epoch,
        },
    )
}

fn head() -> impl Strategy<Value = Head> {
    (U64, U32, any::<[u8; 16]>()).prop_map(|(version, fold_count, id)| Head {
        version,
        fold_count,
        state_id: StateId(id),
    })
}

fn gradient_header() -> impl Strategy<Value = GradientHeader> {
    let weight = num::f32::NORMAL | num::f32::SUBNORMAL | num::f32::ZERO | num::f32::INFINITE;
    let from = (incarnation(), U32, U64, incarnation(), U32);
    (from, U64, any::<[u8; 16]>(), weight, BOOL, U32).prop_map(
        |((job, shard, round, worker, rank), roster_epoch, base, weight, void, elements)| GradientHeader {
            job,
            shard,
            round,
            worker,
            rank,
            roster_epoch,
            base: StateId(base),
            weight,
            void,
            elements,
        },
    )
}

fn result_header() -> impl Strategy<Value = ResultHeader> {
    (incarnation(), U32, head(), ledger()).prop_map(|(job, shard, head, ledger)| ResultHeader {
        job,
        shard,
        head,
        ledger,
    })
}

fn reject() -> impl Strategy<Value = Reject> {
    (option::of(incarnation()), option::of(incarnation()), option::of((U32, U64)), wire_error())
        .prop_map(|(job, worker, at, error)| Reject { job, worker, at, error })
}

fn durability() -> impl Strategy<Value = Durability> {
    prop_oneof![Just(Durability::Process), Just(Durability::Disk)]
}

fn init() -> impl Strategy<Value = Init> {
    prop_oneof![Just(Init::Zeros), Just(Init::Upload)]
}

fn layout() -> impl Strategy<Value = Layout> {
    (1_u64.., 1_u32..).prop_map(|(elements, shard_elements)| Layout { elements, shard_elements })
}

fn store_job() -> impl Strategy<Value = StoreJob> {
    (key(), incarnation(), layout(), U32, durability(), U32, init(), U64).prop_map(
        |(key, incarnation, layout, slots, durability, max_members, init, first_version)| StoreJob {
            key,
            incarnation,
            layout,
            slots,
            durability,
            max_members,
            init,
            first_version,
        },
    )
}

fn store_request() -> impl Strategy<Value = StoreRequest> {
    let job = incarnation;
    prop_oneof![
        store_job().prop_map(StoreRequest::Create),
        (job(), incarnation(), U32).prop_map(|(job, upload, shard)| StoreRequest::Upload {
            job,
            upload,
            shard
        }),
        (job(), incarnation()).prop_map(|(job, upload)| StoreRequest::Activate { job, upload }),
        (job(), U32, U32).prop_map(|(job, first, count)| StoreRequest::Heads { job, first, count }),
        (job(), U32, BOOL).prop_map(|(job, shard, slots)| StoreRequest::Fetch { job, shard, slots }),
        (job(), U32).prop_map(|(job, shard)| StoreRequest::FetchHead { job, shard }),
        (job(), U32, head(), ledger(), any::<[u8; 16]>()).prop_map(
            |(job, shard, expect, ledger, function)| {
                StoreRequest::Commit(Commit { job, shard, expect, ledger, function })
            }
        ),
        (job(), U64, U64).prop_map(|(job, epoch, from_round)| StoreRequest::Fence { job, epoch, from_round }),
        job().prop_map(|job| StoreRequest::Delete { job }),
        Just(StoreRequest::List),
        (job(), incarnation()).prop_map(|(job, hold)| StoreRequest::Hold { job, hold }),
        (job(), incarnation(), U32, BOOL).prop_map(|(job, hold, shard, slots)| StoreRequest::FetchHeld {
            job,
            hold,
            shard,
            slots
        }),
        (job(), incarnation()).prop_map(|(job, hold)| StoreRequest::Release { job, hold }),
        (job(), U32, head(), partial()).prop_map(|(job, shard, expect, partial)| {
            StoreRequest::CommitPartial(PartialCommit { job, shard, expect, partial })
        }),
        (job(), U32).prop_map(|(job, shard)| StoreRequest::FetchPartial { job, shard }),
        (option::of((job(), U32)), U32).prop_map(|(after, limit)| StoreRequest::OpenRounds { after, limit }),
    ]
}

fn store_reply() -> impl Strategy<Value = StoreReply> {
    let outcome = prop_oneof![
        head().prop_map(CommitOutcome::Committed),
        head().prop_map(CommitOutcome::AlreadyCommitted),
        head().prop_map(CommitOutcome::Conflict),
        U64.prop_map(|needed| CommitOutcome::StaleRoster { needed }),
    ];
    prop_oneof![
        Just(StoreReply::Done),
        vec(head(), 0..20).prop_map(StoreReply::Heads),
        (head(), ledger()).prop_map(|(head, ledger)| StoreReply::State(head, ledger)),
        outcome.prop_map(StoreReply::Commit),
        U64.prop_map(StoreReply::Fenced),
        vec(store_job(), 0..4).prop_map(StoreReply::Jobs),
        (U64, BOOL).prop_map(|(version, complete)| StoreReply::Held { version, complete }),
        (head(), ledger(), partial()).prop_map(|(head, ledger, partial)| StoreReply::Open(
            head,
            ledger,
            Box::new(partial)
        )),
        vec(open_round(), 0..4).prop_map(StoreReply::OpenRounds),
        wire_error().prop_map(StoreReply::Error),
    ]
}

fn settings() -> impl Strategy<Value = Settings> {
    let setting = prop_oneof![BOOL.prop_map(Setting::Flag), number().prop_map(Setting::Number)];
    btree_map(text(), setting, 0..4)
}

fn function() -> impl Strategy<Value = FunctionSpec> {
    let group =
        (vec(text(), 0..4), settings()).prop_map(|(tensors, settings)| ParameterGroup { tensors, settings });
    let schedule = option::of(schedule());
    (text(), settings(), vec(group, 0..3), schedule)
        .prop_map(|(name, settings, groups, schedule)| FunctionSpec { name, settings, groups, schedule })
}

/// Also numbers that no function accepts.
fn schedule() -> impl Strategy<Value = Schedule> {
    let decay = prop_oneof![
        Just(Decay::Constant),
        (U64, number()).prop_map(|(rounds, to)| Decay::Linear { rounds, to }),
        (U64, number()).prop_map(|(rounds, to)| Decay::Cosine { rounds, to }),
        number().prop_map(|factor| Decay::Exponential { factor }),
        (vec(U64, 0..4), number()).prop_map(|(at, factor)| Decay::Steps { at, factor }),
        Just(Decay::InverseSqrt),
    ];
    (U64, decay).prop_map(|(warmup_rounds, decay)| Schedule { warmup_rounds, decay })
}

/// A specification of the right types; most are not valid.
fn job_spec() -> impl Strategy<Value = JobSpec> {
    let dtype = prop::sample::select(vec![Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16]);
    let tensor =
        (text(), vec(U64, 0..5), dtype).prop_map(|(name, shape, dtype)| TensorSpec { name, shape, dtype });
    let non_finite = prop::sample::select(vec![NonFinite::Propagate, NonFinite::Void, NonFinite::Fail]);
    let model = (key(), vec(tensor, 0..5), function());
    let round = (U32, option::of(U32), U64);
    let guarantees = (durability(), non_finite, init());
    let on_loss = prop::sample::select(vec![OnLoss::Fail, OnLoss::RollBack, OnLoss::Reseed]);
    let order = prop::sample::select(vec![FoldOrder::Rank, FoldOrder::Arrival]);
    let pool = option::of(name());
    let policy = (option::of(U64), on_loss, order, pool).prop_map(|(ttl_ms, on_loss, order, pool)| Policy {
        ttl_ms,
        on_loss,
        order,
        pool,
    });
    (model, round, guarantees, U32, U32, policy).prop_map(
        |(
            (key, tensors, function),
            (workers, quorum, deadline_ms),
            (durability, non_finite, init),
            shard_bytes,
            max_members,
            policy,
        )| JobSpec {
            key,
            tensors,
            function,
            mode: Mode::Sync,
            workers,
            quorum,
            deadline_ms,
            durability,
            non_finite,
            init,
            shard_bytes,
            max_members,
            policy,
        },
    )
}

fn job_record() -> impl Strategy<Value = JobRecord> {
    let state = prop_oneof![
        Just(JobState::Creating),
        Just(JobState::Initialising),
        Just(JobState::Running),
        wire_error().prop_map(JobState::Failed),
        Just(JobState::Deleting),
    ];
    let revision = (U32, U64, function()).prop_map(|(revision, from_round, function)| SettingsRevision {
        revision,
        from_round,
        function,
    });
    let place = (layout(), U32, store_id(), U16);
    let origin = (incarnation(), U64, BOOL).prop_map(|(upload, version, rolled_back)| Origin {
        upload,
        version,
        rolled_back,
    });
    let life = (option::of(text()), option::of(origin), vec(incarnation(), 0..3), U16).prop_map(
        |(paused, origin, replaces, first_partition)| Life { paused, origin, replaces, first_partition },
    );
    (job_spec(), incarnation(), place, state, vec(revision, 0..3), life).prop_map(
        |(spec, incarnation, (layout, slots, store, partitions), state, settings, life)| JobRecord {
            spec,
            incarnation,
            layout,
            slots,
            store,
            partitions,
            state,
            settings,
            life,
        },
    )
}

fn roster() -> impl Strategy<Value = Roster> {
    let member = (U32, text(), incarnation(), U64, option::of(U64), BOOL).prop_map(
        |(rank, worker, incarnation, from_round, until_round, confirmed)| Member {
            rank,
            worker,
            incarnation,
            from_round,
            until_round,
            confirmed,
        },
    );
    (incarnation(), U64, BOOL, vec(member, 0..20), U32).prop_map(
        |(job, epoch, started, members, revision)| Roster { job, epoch, started, members, revision },
    )
}

fn worker_ref() -> impl Strategy<Value = WorkerRef> {
    (key(), incarnation(), U32, incarnation()).prop_map(|(key, job, rank, incarnation)| WorkerRef {
        key,
        job,
        rank,
        incarnation,
    })
}

fn api_request() -> impl Strategy<Value = ApiRequest> {
    prop_oneof![
        job_spec().prop_map(ApiRequest::OpenJob),
        key().prop_map(ApiRequest::GetJob),
        Just(ApiRequest::ListJobs),
        key().prop_map(ApiRequest::DeleteJob),
        (key(), incarnation(), incarnation()).prop_map(|(key, job, upload)| ApiRequest::Activate {
            key,
            job,
            upload
        }),
        (worker_ref(), text(), option::of(incarnation()))
            .prop_map(|(worker, id, replaces)| ApiRequest::Join(Claim { worker, id, replaces })),
        worker_ref().prop_map(ApiRequest::Leave),
        (worker_ref(), U64, BOOL).prop_map(|(worker, window_bytes, active)| ApiRequest::Beat {
            worker,
            window_bytes,
            active
        }),
        (option::of(key()), U32).prop_map(|(after, limit)| ApiRequest::Jobs {
            tenant: after.as_ref().map(|key| key.tenant.clone()),
            after,
            limit
        }),
        key().prop_map(ApiRequest::Progress),
        (key(), job_command()).prop_map(|(key, command)| ApiRequest::Control(key, command)),
        (key(), option::of(U64), settings(), btree_map(U32, settings(), 0..3)).prop_map(
            |(key, from_round, settings, groups)| ApiRequest::SetSettings {
                key,
                change: SettingsChange { from_round, settings, groups }
            }
        ),
        (job_spec(), option::of(function()), incarnation(), U64, option::of(incarnation())).prop_map(
            |(spec, function, upload, version, replaces)| ApiRequest::Restore {
                spec: Box::new(spec),
                function,
                upload,
                version,
                replaces
            }
        ),
    ]
}

fn job_command() -> impl Strategy<Value = JobCommand> {
    prop_oneof![
        text().prop_map(JobCommand::Pause),
        Just(JobCommand::Resume),
        text().prop_map(JobCommand::Abort),
    ]
}

fn job_summary() -> impl Strategy<Value = JobSummary> {
    (key(), incarnation(), text(), text(), (U32, U32, U64), durability()).prop_map(
        |(key, incarnation, state, function, (workers, members, elements), durability)| JobSummary {
            key,
            incarnation,
            state,
            function,
            workers,
            members,
            elements,
            durability,
        },
    )
}

fn api_reply() -> impl Strategy<Value = ApiReply> {
    prop_oneof![
        Just(ApiReply::Done),
        (job_record(), roster()).prop_map(|(job, roster)| ApiReply::Job(Box::new(job), roster)),
        vec(job_record(), 0..3).prop_map(ApiReply::Jobs),
        (roster(), U64, U64).prop_map(|(roster, window_bytes, lease_ms)| ApiReply::Joined {
            roster,
            window_bytes,
            lease_ms
        }),
        (U64, U64, option::of(text())).prop_map(|(window_bytes, roster_epoch, paused)| ApiReply::Beat {
            window_bytes,
            roster_epoch,
            paused
        }),
        (vec(job_summary(), 0..4), option::of(key()))
            .prop_map(|(jobs, next)| ApiReply::JobPage { jobs, next }),
        (U64, U64).prop_map(|(min, max)| ApiReply::Progress(Progress { min, max })),
        (U32, U64, function()).prop_map(|(revision, from_round, function)| {
            ApiReply::Settings(SettingsRevision { revision, from_round, function })
        }),
        wire_error().prop_map(ApiReply::Error),
    ]
}

fn placement() -> impl Strategy<Value = Placement> {
    let placed = (U64, option::of(text())).prop_map(|(epoch, holder)| PlacedPartition { epoch, holder });
    (vec(placed, 0..40), U16).prop_map(|(partitions, first)| Placement { partitions, first })
}

fn suspect() -> impl Strategy<Value = Suspect> {
    (U64, I64, U32, text()).prop_map(|(sequence, stream_created, attempt, invoker)| Suspect {
        sequence,
        stream_created,
        attempt,
        invoker,
    })
}

fn agent_beat() -> impl Strategy<Value = AgentBeat> {
    (text(), incarnation(), U32, U64, vec(name(), 0..20)).prop_map(
        |(agent, life, slots, changes, invokers)| AgentBeat { agent, life, slots, changes, invokers },
    )
}

fn invoker_beat() -> impl Strategy<Value = InvokerBeat> {
    let state =
        prop::sample::select(vec![InvokerState::Starting, InvokerState::Ready, InvokerState::Draining]);
    let numbers = (number(), number(), number());
    let load = (key(), U64, U64, (U64, U64), (U64, U64, U64));
    let load = load.prop_map(|(job, round, rounds, (bytes, result_bytes), (delay_ms, shards, age_ms))| {
        JobLoad { job, round, rounds, bytes, delay_ms, result_bytes, shards, age_ms }
    });
    (text(), state, vec((U16, U64), 0..40), numbers, (U64, U64), vec(load, 0..3)).prop_map(
        |(invoker, state, partitions, (service_bytes_per_s, busy, cpu_quota), held, jobs)| {
            let (held_messages, held_bytes) = held;
            InvokerBeat {
                invoker,
                state,
                partitions,
                service_bytes_per_s,
                busy,
                held_messages,
                held_bytes,
                cpu_quota,
                jobs,
            }
        },
    )
}

fn handed_over() -> impl Strategy<Value = HandedOver> {
    let kept = (U64, U64, U64).prop_map(|(next_delivery, credit, pending)| {
        HandedOver::Kept(KeptConsumer { next_delivery, credit, pending })
    });
    prop_oneof![
        Just(HandedOver::NotHeld),
        Just(HandedOver::Ready),
        Just(HandedOver::NotYet),
        U64.prop_map(HandedOver::Newer),
        kept,
        U64.prop_map(HandedOver::Left),
    ]
}

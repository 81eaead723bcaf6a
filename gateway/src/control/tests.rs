//! Commands and settings, as tables; what happened, from two views.

use thalweg_protocol::{
    Durability, EventKind, FunctionSpec, Layout, Life, Member, Mode, NonFinite, Policy, Setting, Settings,
    StoreId, TensorSpec,
};

use super::*;
use crate::events;

const JOB: Incarnation = Incarnation([1; 16]);

pub(crate) fn record() -> JobRecord {
    let function = FunctionSpec::named("sgd").number("lr", 0.1).number("momentum", 0.9);
    let spec = JobSpec {
        key: JobKey { tenant: "t".parse().unwrap(), job: "j".parse().unwrap() },
        tensors: vec![TensorSpec::f32("a", [8])],
        function: function.clone(),
        mode: Mode::Sync,
        workers: 2,
        quorum: None,
        deadline_ms: 0,
        durability: Durability::Process,
        non_finite: NonFinite::Void,
        init: Init::Upload,
        shard_bytes: 256,
        max_members: 4,
        policy: Policy::default(),
    };
    JobRecord {
        spec,
        incarnation: JOB,
        layout: Layout { elements: 8, shard_elements: 4 },
        slots: 1,
        store: StoreId([0; 16]),
        partitions: 1,
        state: JobState::Running,
        settings: vec![SettingsRevision { revision: 0, from_round: 0, function }],
        life: Life::default(),
    }
}

fn change(name: &str, value: Setting) -> SettingsChange {
    SettingsChange { settings: Settings::from([(name.to_owned(), value)]), ..SettingsChange::default() }
}

#[test]
fn commands_change_what_they_say_and_nothing_twice() {
    let mut job = record();
    let pause = JobCommand::Pause("night".to_owned());
    assert_eq!(apply(&mut job, &pause), Ok(true));
    assert_eq!(apply(&mut job, &pause), Ok(false), "the same pause again");
    assert_eq!(summary(&job, None).state, "paused");
    assert_eq!(apply(&mut job, &JobCommand::Resume), Ok(true));
    assert_eq!(apply(&mut job, &JobCommand::Resume), Ok(false));
    assert_eq!(summary(&job, None).state, "running");
    assert_eq!(apply(&mut job, &pause), Ok(true));
    let abort = JobCommand::Abort("wrong data".to_owned());
    assert_eq!(apply(&mut job, &abort), Ok(true));
    assert_eq!(summary(&job, None).state, "aborted", "an end is told before a pause");
    assert_eq!(apply(&mut job, &abort), Ok(false), "an end is an end");
    let error = apply(&mut job, &pause).unwrap_err();
    assert_eq!(error.code, ErrorCode::Aborted);
    assert!(error.message.contains("wrong data"), "{error}");
    let long = JobCommand::Pause("x".repeat(limits::MAX_REASON_BYTES + 1));
    assert_eq!(apply(&mut record(), &long).unwrap_err().code, ErrorCode::Limit);
}

#[test]
fn settings_are_laid_over_the_last_ones() {
    let mut job = record();
    let added = revise(&mut job, &change("lr", Setting::Number(0.01)), 12, (9, 9)).unwrap();
    assert_eq!((added.revision, added.from_round), (1, 12));
    assert_eq!(added.function.settings["lr"], Setting::Number(0.01));
    assert_eq!(added.function.settings["momentum"], Setting::Number(0.9), "kept");
    assert_eq!(job.settings_of(11).revision, 0);
    assert_eq!(job.settings_of(12).revision, 1);
    // Once round 12 is complete everywhere, nobody asks for the first ones any more.
    let added = revise(&mut job, &change("lr", Setting::Number(0.001)), 14, (12, 9)).unwrap();
    assert_eq!(added.revision, 2);
    assert_eq!(job.settings.iter().map(|revision| revision.revision).collect::<Vec<_>>(), [1, 2]);
    let refused = [
        (change("lr", Setting::Number(-1.0)), 20, "out of range"),
        (change("speed", Setting::Number(1.0)), 20, "unknown setting"),
        (change("momentum", Setting::Number(0.0)), 20, "optimizer slots"),
        (change("lr", Setting::Number(0.1)), 13, "begins with round 14"),
        (
            SettingsChange { groups: [(0, Settings::new())].into(), ..SettingsChange::default() },
            20,
            "group 0",
        ),
    ];
    for (change, round, text) in refused {
        let before = job.clone();
        let error = revise(&mut job, &change, round, (12, 9)).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidSpec);
        assert!(error.message.contains(text), "{error}");
        assert_eq!(job, before, "a refused change leaves the job as it is");
    }
    for round in 0..100 {
        if let Err(error) = revise(&mut job, &change("lr", Setting::Number(0.1)), 20 + round, (12, 999)) {
            assert_eq!(error.code, ErrorCode::Limit);
            assert_eq!(job.settings.len(), limits::MAX_REVISIONS);
            return;
        }
    }
    panic!("revisions pile up without a limit");
}

#[test]
fn events_are_what_differs() {
    let member = |rank: u32, id: u8| Member {
        rank,
        worker: format!("w{rank}"),
        incarnation: Incarnation([id; 16]),
        from_round: 1,
        until_round: None,
        confirmed: true,
    };
    let job = record();
    let empty = Roster::new(JOB);
    let names = |events: Vec<EventKind>| -> Vec<String> {
        let name = |event| serde_json::to_value(event).unwrap()["event"].as_str().unwrap().to_owned();
        events.into_iter().map(name).collect()
    };
    assert_eq!(names(events::between(None, &job, &empty)), ["created", "ready"]);
    assert_eq!(names(events::between(Some((&job, &empty)), &job, &empty)), [""; 0]);
    let both = Roster { members: vec![member(0, 1), member(1, 2)], started: true, ..empty };
    assert_eq!(names(events::between(Some((&job, &empty)), &job, &both)), ["joined", "joined", "started"]);
    let other = Roster { members: vec![member(0, 1), member(1, 3)], ..both };
    assert_eq!(names(events::between(Some((&job, &both)), &job, &other)), ["left", "joined"]);
    let mut later = job.clone();
    apply(&mut later, &JobCommand::Pause("night".to_owned())).unwrap();
    revise(&mut later, &change("lr", Setting::Number(0.01)), 12, (9, 9)).unwrap();
    assert_eq!(names(events::between(Some((&job, &both)), &later, &both)), ["paused", "settings"]);
    let mut over = later.clone();
    apply(&mut over, &JobCommand::Abort("enough".to_owned())).unwrap();
    assert_eq!(names(events::between(Some((&later, &both)), &over, &both)), ["failed"]);
    let again = JobRecord { incarnation: Incarnation([9; 16]), ..job };
    assert_eq!(names(events::between(Some((&over, &both)), &again, &empty)), ["created", "ready"]);
}

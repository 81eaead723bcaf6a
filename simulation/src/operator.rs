//! Who looks after the jobs: pauses them, changes their settings, deletes them in the end.

use rand::RngExt as _;
use thalweg_protocol::{ApiReply, ApiRequest, JobCommand, Setting, SettingsChange};

use crate::{
    network::{Actor, Millis},
    worker::ask_gateway,
    world::{Done, World},
};

/// How often the operator looks for jobs that a late command has paused again.
const LOOK_MS: Millis = 3000;
/// And how often at most.
const LOOKS: u32 = 100;

impl World {
    fn operator_lives(&mut self) {
        if self.life(Actor::Operator) == 0 {
            self.born(Actor::Operator);
        }
    }

    /// Stops one job for a while.
    pub(crate) fn operator_pauses(&mut self) -> String {
        self.operator_lives();
        let job = self.fault_rng.random_range(0..self.specs.len());
        let for_ms = self.fault_rng.random_range(50..3000);
        let (key, remote) = (self.specs[job].key.clone(), self.remote(Actor::Operator));
        let first = self.paused.insert(job);
        self.spawn(Actor::Operator, async move {
            let pause = ApiRequest::Control(key.clone(), JobCommand::Pause("a pause".to_owned()));
            let _ = ask_gateway(&remote, None, &pause).await;
            remote.sleep(for_ms).await;
            // The pause may be carried out once more, by a gateway that stood still with it.
            for _ in 0..if first { LOOKS } else { 1 } {
                let resume = ApiRequest::Control(key.clone(), JobCommand::Resume);
                let _ = ask_gateway(&remote, None, &resume).await;
                remote.sleep(LOOK_MS).await;
            }
            Done::Nothing
        });
        format!("job {job} is paused for {for_ms} ms")
    }

    /// Changes the learning rate of a job that has one.
    pub(crate) fn operator_changes_settings(&mut self) -> Option<String> {
        let job = (0..self.specs.len()).find(|job| self.specs[*job].function.name == "sgd")?;
        self.operator_lives();
        let lr = f64::from(self.fault_rng.random_range(1..100_u32)) / 1000.0;
        let life = self.record_of(job)?.incarnation;
        let (key, remote) = (self.specs[job].key.clone(), self.remote(Actor::Operator));
        self.spawn(Actor::Operator, async move {
            let settings = [("lr".to_owned(), Setting::Number(lr))].into();
            let change = SettingsChange { settings, ..SettingsChange::default() };
            let request = ApiRequest::SetSettings { key: key.clone(), change };
            match ask_gateway(&remote, None, &request).await {
                Ok(ApiReply::Settings(revision)) => Done::Settings(key, life, revision),
                // The job is over, or has not begun.
                _ => Done::Nothing,
            }
        });
        Some(format!("job {job} gets a learning rate of {lr}"))
    }

    /// Deletes every job, as its user would in the end.
    pub(crate) fn operator_deletes(&mut self) {
        self.operator_lives();
        let remote = self.remote(Actor::Operator);
        let keys: Vec<_> = self.specs.iter().map(|spec| spec.key.clone()).collect();
        self.note(|| "the jobs are deleted".to_owned());
        self.checker.all_may_fail("its deletion");
        self.spawn(Actor::Operator, async move {
            for key in keys {
                // Either deleted, or not there (any more).
                let _ = ask_gateway(&remote, None, &ApiRequest::DeleteJob(key)).await;
            }
            Done::Deleted
        });
    }

    pub(crate) fn operator_done(&mut self, done: Done) {
        match done {
            Done::Deleted => self.deleting = Some(true),
            // Of a life that has ended meanwhile nothing is known for certain.
            Done::Settings(key, life, revision)
                if self.record(&key).is_some_and(|record| record.incarnation == life) =>
            {
                self.checker.settings_told(life, revision.revision, revision.from_round);
            }
            _ => {}
        }
    }
}

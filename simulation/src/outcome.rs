//! The end of a history: whether everything has come to its end, and what is left.

use crate::{network::Millis, worker, world::World};

/// Virtual time after the last fault in which everything must come to its end.
const PATIENCE_MS: Millis = 60_000;

impl World {
    /// Whether all is done; a violation when that takes too long.
    pub(crate) fn is_over(&mut self) -> anyhow::Result<bool> {
        let finished = |host: &worker::Host| {
            matches!(host.state, worker::State::Done | worker::State::Away { returns: false })
        };
        let finished = self.workers.iter().all(finished);
        // A gateway that was frozen may answer an old request to open a job after its deletion.
        let again =
            self.deleting == Some(true) && self.broker.keys().iter().any(|key| key.starts_with("job."));
        if finished && (self.deleting.is_none() || again) {
            self.deleting = Some(false);
            self.operator_deletes();
            self.follow_up()?;
        }
        let left = self.leftovers()?;
        if finished && self.deleting == Some(true) && left.is_none() {
            return Ok(true);
        }
        if self.now > self.faults_until + PATIENCE_MS {
            let invariant = if finished { "L2" } else { "L1" };
            let text = format!(
                "{} s after the last fault: {}; {}",
                PATIENCE_MS / 1000,
                self.unfinished(),
                left.unwrap_or_default()
            );
            self.checker.fail(invariant, None, text);
        }
        Ok(false)
    }

    /// What is left of anything, if something is.
    fn leftovers(&self) -> anyhow::Result<Option<String>> {
        match self.broker.depths() {
            Ok(depths) if depths.iter().all(|depth| depth.messages == 0) => {}
            Ok(depths) => {
                let counts: Vec<_> = depths.iter().map(|depth| depth.messages).collect();
                return Ok(Some(format!("messages in the queues: {counts:?}")));
            }
            Err(error) => return Ok(Some(error.to_string())),
        }
        // Those whose autoscaler has died are nobody's to stop.
        let owned: Vec<_> = (self.invokers.iter())
            .filter(|(_, host)| self.autoscalers.contains_key(&host.starter))
            .map(|(number, _)| number)
            .collect();
        if !owned.is_empty() {
            return Ok(Some(format!("invokers: {owned:?}")));
        }
        let expected = |key: &String| {
            ["placement", "streams", "store"].contains(&key.as_str())
                || key.starts_with("lease.")
                || key.starts_with("suspect.")
        };
        let keys: Vec<_> = self.broker.keys().into_iter().filter(|key| !expected(key)).collect();
        if !keys.is_empty() {
            return Ok(Some(format!("keys in the registry: {keys:?}")));
        }
        let slabs = self.store.slabs()?;
        if !slabs.is_empty() {
            return Ok(Some(format!("slabs in the store: {slabs:?}")));
        }
        let granted: u64 =
            (self.gateways.values().filter(|host| host.leads)).map(|host| host.gateway.granted_bytes()).sum();
        Ok((granted > 0).then(|| format!("{granted} bytes of windows granted to nobody")))
    }

    fn unfinished(&self) -> String {
        let workers: Vec<_> = (self.workers.iter())
            .map(|host| match &host.state {
                worker::State::Away { returns } => format!("away, returns: {returns}"),
                worker::State::Joining => "joining".to_owned(),
                worker::State::Training(training) => format!("in round {}", training.engine.round()),
                worker::State::Leaving => "leaving".to_owned(),
                worker::State::Done => "done".to_owned(),
            })
            .collect();
        format!("workers {workers:?} of {} rounds, shards at {:?}", self.rounds, self.checker.progress())
    }
}

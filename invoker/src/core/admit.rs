//! From a message to a contribution that waits for its round, or to the reason why not.

use std::sync::Arc;

use bytes::Bytes;
use thalweg_protocol::{
    ErrorCode, FrameError, GradientHeader, JobKey, JobState, Kind, NonFinite, Nudge, Rank, Reject, WireError,
    checksum, frame, subjects,
};

use super::{
    Action, Core, Delivery, MAX_LOOK_UPS, RETRY_MS, Timer, gone,
    shard::{Entry, Payload, Shard},
};
use crate::{Job, metrics};

impl Core {
    /// Takes a message in. `seen` counts the look-ups made for it.
    pub(super) fn deliver(&mut self, delivery: Delivery, seen: u32) {
        let Some(holding) = self.partitions.get_mut(&delivery.partition) else { return };
        holding.delivered_until = holding.delivered_until.max(delivery.sequence);
        let poison = holding.poison == Some(delivery.sequence);
        if seen == 0 {
            metrics::delivered(delivery.frame.len());
        }
        let Some((partition, key, rank)) = subjects::parse_gradient(&delivery.subject) else {
            let text = format!("subject {:?} names no partition, job and rank", delivery.subject);
            return self.dead_letter(delivery, None, WireError::new(ErrorCode::Malformed, text));
        };
        let (header, payload) = match frame::open::<GradientHeader>(Kind::Gradient, &delivery.frame) {
            Ok(opened) => opened,
            Err(error) => {
                return match frame::open::<Nudge>(Kind::Nudge, &delivery.frame) {
                    Ok((nudge, _)) => self.nudged(delivery, key, &nudge, seen),
                    Err(_) => self.unreadable(delivery, key, rank, &error),
                };
            }
        };
        if header.rank != rank {
            let text = format!("header of rank {} on the subject of rank {rank}", header.rank);
            // Who may publish on a subject is who listens to its rejects.
            let header = GradientHeader { rank, ..header };
            return self.refuse(delivery, &key, &header, WireError::new(ErrorCode::Malformed, text), true);
        }
        let job = match self.jobs.get(&key) {
            Some(Some(job))
                if job.record.incarnation == header.job
                    && job.roster.epoch >= header.roster_epoch
                    && (seen > 0
                        || !matches!(job.record.state, JobState::Initialising | JobState::Creating)) =>
            {
                job.clone()
            }
            // Only a look-up begun after the message came may say that its job is gone; the first answer
            // may be that of an older one.
            Some(None) if seen > 1 => return self.refuse(delivery, &key, &header, gone(&key), false),
            Some(Some(job)) if seen > 1 && job.record.incarnation != header.job => {
                return self.refuse(delivery, &key, &header, gone(&key), false);
            }
            Some(Some(_)) if seen > MAX_LOOK_UPS => {
                let text = format!("roster epoch {} is not known to the registry", header.roster_epoch);
                return self.refuse(
                    delivery,
                    &key,
                    &header,
                    WireError::new(ErrorCode::Malformed, text),
                    true,
                );
            }
            _ => return self.await_look_up(delivery, key, seen),
        };
        if let Some(error) = refusal(&job, &header, partition, delivery.partition) {
            return self.refuse(delivery, &key, &header, error, false);
        }
        if poison {
            return self.poisoned(&job, delivery, &header);
        }
        self.gather(&job, &delivery, &header, payload);
    }

    /// Keeps a message until the registry has said (again) what it knows of its job.
    pub(super) fn await_look_up(&mut self, delivery: Delivery, key: JobKey, seen: u32) {
        self.unknown.entry(key.clone()).or_default().push((delivery, seen));
        if seen == 0 {
            self.look_up(key);
        } else {
            self.later(RETRY_MS, Timer::LookUp(key));
        }
    }

    /// Puts a contribution into its round, as itself or as a void (rule P8).
    fn gather(&mut self, job: &Arc<Job>, delivery: &Delivery, header: &GradientHeader, payload: Bytes) {
        let key = job.record.spec.key.clone();
        let shard_key = (header.job, header.shard);
        let shard =
            self.shards.entry(shard_key).or_insert_with(|| Shard::new(key.clone(), delivery.partition));
        let gathering = shard.rounds.entry(header.round).or_default();
        if let Some(known) = gathering.entries.get(&header.rank) {
            // The same message again (its acknowledgement wait ran out), or the same contribution pushed
            // twice: the first in stream order wins.
            // An entry of another worker has departed: one tenure of a rank counts in a round, and the
            // sender has it.
            if known.worker != header.worker && shard.invoking.is_some() {
                // An invocation under way is left as it is; a fence will stop it, or has let it pass.
                if shard.contested.iter().all(|other| other.sequence != delivery.sequence) {
                    shard.contested.push(delivery.clone());
                }
                return;
            }
            if known.worker == header.worker {
                if known.sequence != delivery.sequence {
                    metrics::leftover("duplicate");
                    self.actions.push(Action::Acknowledge(delivery.partition, delivery.sequence));
                }
                return;
            }
            metrics::leftover("departed");
            self.held_bytes -= known.held_bytes();
            self.actions.push(Action::Acknowledge(delivery.partition, known.sequence));
            gathering.entries.remove(&header.rank);
        }
        let fault = fault_of(job, header, &payload);
        let payload = if header.void || fault.is_some() {
            Payload::Void
        } else if self.held_bytes + payload.len() > self.limits.held_bytes {
            metrics::parked();
            Payload::Parked
        } else {
            self.held_bytes += payload.len();
            Payload::Held(payload)
        };
        let entry = Entry {
            sequence: delivery.sequence,
            worker: header.worker,
            rank: header.rank,
            base: header.base,
            weight: header.weight,
            checksum: match &payload {
                // The frame's own checksum was verified a moment ago; this one recognises it when read back.
                Payload::Parked => checksum(&[&delivery.frame]),
                Payload::Held(_) | Payload::Void => 0,
            },
            payload,
            published: delivery.published,
            arrived: self.clock,
        };
        gathering.first =
            Some(gathering.first.map_or(delivery.published, |first| first.min(delivery.published)));
        if let Some(error) = fault {
            metrics::rejected(error.code);
            let fails = error.code == ErrorCode::NonFinite && job.record.spec.non_finite == NonFinite::Fail;
            let reject = Reject {
                job: Some(header.job),
                worker: Some(header.worker),
                at: Some((header.shard, header.round)),
                error: error.clone(),
            };
            self.actions.push(Action::Reject(key, header.rank, reject));
            if fails {
                self.fail_job(job, error);
            }
        }
        gathering_insert(self, shard_key, header.round, entry);
        self.evaluate(shard_key);
    }

    /// Refuses a message: its sender hears why, and it leaves the queue (through the dead letters when
    /// it should never have been sent).
    fn refuse(
        &mut self,
        delivery: Delivery,
        key: &JobKey,
        header: &GradientHeader,
        error: WireError,
        dead_letter: bool,
    ) {
        let reject = Reject {
            job: Some(header.job),
            worker: Some(header.worker),
            at: Some((header.shard, header.round)),
            error: error.clone(),
        };
        self.actions.push(Action::Reject(key.clone(), header.rank, reject));
        metrics::rejected(error.code);
        if dead_letter {
            self.dead_letter(delivery, Some(key.clone()), error);
        } else {
            self.actions.push(Action::Acknowledge(delivery.partition, delivery.sequence));
        }
    }

    /// Bytes that are no contribution: the subject still tells whom to answer.
    fn unreadable(&mut self, delivery: Delivery, key: JobKey, rank: Rank, error: &FrameError) {
        let error = error.to_wire();
        metrics::rejected(error.code);
        let reject = Reject { job: None, worker: None, at: None, error: error.clone() };
        self.actions.push(Action::Reject(key.clone(), rank, reject));
        self.dead_letter(delivery, Some(key), error);
    }

    pub(super) fn dead_letter(&mut self, delivery: Delivery, key: Option<JobKey>, error: WireError) {
        metrics::dead_letter(error.code);
        let Delivery { partition, sequence, subject, frame, .. } = delivery;
        self.actions.push(Action::DeadLetter { partition, sequence, subject, key, error, frame });
    }

    /// A contribution that has killed its invoker time and again (rule P18).
    fn poisoned(&mut self, job: &Arc<Job>, delivery: Delivery, header: &GradientHeader) {
        let text = format!(
            "the contribution of rank {} to round {} (shard {}) killed every invoker that folded it; it is in the \
             dead letters",
            header.rank, header.round, header.shard
        );
        let error = WireError::new(ErrorCode::PoisonContribution, text);
        if job.record.spec.quorum.is_none() {
            self.fail_job(job, error.clone());
        } else {
            let void = GradientHeader { void: true, ..header.clone() };
            self.gather(job, &delivery, &void, Bytes::new());
        }
        self.refuse(delivery, &job.record.spec.key, header, error, true);
    }
}

fn gathering_insert(core: &mut Core, key: super::ShardKey, round: u64, entry: Entry) {
    if let Some(gathering) = core.shards.get_mut(&key).and_then(|shard| shard.rounds.get_mut(&round)) {
        gathering.entries.insert(entry.rank, entry);
    }
}

/// Why a contribution cannot belong to any round of the job as it is now.
fn refusal(job: &Job, header: &GradientHeader, subject_partition: u16, partition: u16) -> Option<WireError> {
    let key = &job.record.spec.key;
    if let Some(error) = job.record.state.end(key) {
        return Some(error);
    }
    if job.record.state != JobState::Running {
        let text = format!("job {key} has no initial parameters yet: rank 0 uploads them when it joins");
        return Some(WireError::new(ErrorCode::NotReady, text));
    }
    if header.shard >= job.record.layout.shards() {
        let text =
            format!("shard {} of {}: job {key} is split otherwise", header.shard, job.record.layout.shards());
        return Some(WireError::new(ErrorCode::WrongShape, text));
    }
    if job.record.partition(header.shard) != partition || subject_partition != partition {
        let text = format!("shard {} of job {key} does not belong to partition {partition}", header.shard);
        return Some(WireError::new(ErrorCode::Malformed, text));
    }
    let tenure = job.tenure(header.worker).filter(|member| member.rank == header.rank);
    let Some(tenure) = tenure else {
        let text = format!("rank {} of job {key} is not held by this worker: join again", header.rank);
        return Some(WireError::new(ErrorCode::LeaseLost, text));
    };
    let first = job.record.first_version() + 1;
    if header.round < first {
        let text = format!("there is no round {} of job {key}: its first is {first}", header.round);
        return Some(WireError::new(ErrorCode::RoundAhead, text));
    }
    if header.round < tenure.from_round {
        // It was told to begin there by a roster that has lost it since; then a claim came late that it had made twice.
        let text = format!(
            "rank {} of job {key} counts from round {} on, not in {}: it was given up, and taken again: join again",
            header.rank, tenure.from_round, header.round
        );
        return Some(WireError::new(ErrorCode::LeaseLost, text));
    }
    if !tenure.counts_in(header.round) {
        let text =
            format!("rank {} of job {key} was given up at round {}: join again", header.rank, header.round);
        return Some(WireError::new(ErrorCode::LeaseLost, text));
    }
    None
}

/// What makes a contribution void.
fn fault_of(job: &Job, header: &GradientHeader, payload: &[u8]) -> Option<WireError> {
    if header.void {
        return None;
    }
    let elements = job.record.layout.len(header.shard);
    if payload.len() != elements * 4 || header.elements as usize != elements {
        let text = format!(
            "shard {} has {elements} elements ({} bytes); the contribution declares {} and carries {} bytes",
            header.shard,
            elements * 4,
            header.elements,
            payload.len()
        );
        return Some(WireError::new(ErrorCode::WrongShape, text));
    }
    if !header.weight.is_finite() || header.weight < 0.0 {
        let text = format!("weight {} is not a finite number of at least 0", header.weight);
        return Some(WireError::new(ErrorCode::Malformed, text));
    }
    if job.record.spec.non_finite == NonFinite::Propagate {
        return None;
    }
    let index = thalweg_functions::first_non_finite(payload)?;
    let text = format!(
        "element {} of shard {} is NaN or infinite; policy {:?} does not fold it",
        index, header.shard, job.record.spec.non_finite
    );
    Some(WireError::new(ErrorCode::NonFinite, text))
}

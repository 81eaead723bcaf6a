//! What an invoker knows of one shard.

use std::collections::BTreeMap;

use bytes::Bytes;
use thalweg_protocol::{Head, Incarnation, JobKey, Ledger, Partial, Partition, Rank, Round, StateId};

use super::{Delivery, InvocationId, Millis};

/// A contribution that waits, un-acknowledged, for its round.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) sequence: u64,
    pub(super) worker: Incarnation,
    pub(super) rank: Rank,
    pub(super) base: StateId,
    pub(super) weight: f32,
    pub(super) checksum: u64,
    pub(super) payload: Payload,
    /// When the broker stored it.
    pub(super) published: Millis,
    /// The core's clock when it came.
    pub(super) arrived: u64,
}

#[derive(Debug)]
pub(super) enum Payload {
    Held(Bytes),
    /// In the stream only; read back when its turn comes (rule P17).
    Parked,
    /// Present, adds nothing (rule P8).
    Void,
}

#[derive(Debug, Default)]
pub(super) struct Gathering {
    pub(super) entries: BTreeMap<Rank, Entry>,
    /// Broker's time of the first contribution: the deadline counts from here.
    pub(super) first: Option<Millis>,
}

/// What is known of where a shard stands.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) head: Head,
    pub(super) ledger: Ledger,
    /// What the open round contains so far, where it has partial commits.
    pub(super) partial: Option<Partial>,
    /// The core's clock when that was asked.
    pub(super) asked: u64,
}

#[derive(Debug)]
pub(super) struct Shard {
    pub(super) key: JobKey,
    pub(super) partition: Partition,
    /// `None` while unknown.
    pub(super) head: Option<Known>,
    pub(super) rounds: BTreeMap<Round, Gathering>,
    pub(super) invoking: Option<InvocationId>,
    /// Contributions of ranks whose former lives' are being folded: judged when that has ended.
    pub(super) contested: Vec<Delivery>,
    /// Version last published again for a worker that missed it.
    pub(super) republished: Option<u64>,
    /// The round and moment for which a timer was set.
    pub(super) deadline_armed: Option<(Round, Millis)>,
    /// The moment for which a timer was set to fold what lingers.
    pub(super) linger_armed: Option<Millis>,
    /// No partial commit before, after one that failed.
    pub(super) partial_after: Millis,
    /// Messages that ask to look at the open round, with the core's clock when they came.
    pub(super) nudges: Vec<(u64, u64)>,
}

impl Shard {
    pub(super) fn new(key: JobKey, partition: Partition) -> Self {
        Self {
            key,
            partition,
            head: None,
            rounds: BTreeMap::new(),
            invoking: None,
            contested: Vec::new(),
            republished: None,
            deadline_armed: None,
            linger_armed: None,
            partial_after: 0,
            nudges: Vec::new(),
        }
    }

    pub(super) fn entries(&self) -> usize {
        let gathered = self.rounds.values().map(|round| round.entries.len()).sum::<usize>();
        gathered + self.contested.len() + self.nudges.len()
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.rounds.values().flat_map(|round| round.entries.values()).map(Entry::held_bytes).sum()
    }

    pub(super) fn take_all(&mut self) -> Vec<(Round, Entry)> {
        std::mem::take(&mut self.rounds)
            .into_iter()
            .flat_map(|(round, gathering)| gathering.entries.into_values().map(move |entry| (round, entry)))
            .collect()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.entries() == 0 && self.invoking.is_none()
    }
}

impl Entry {
    pub(super) fn held_bytes(&self) -> usize {
        match &self.payload {
            Payload::Held(bytes) => bytes.len(),
            Payload::Parked | Payload::Void => 0,
        }
    }

    pub(super) fn is_void(&self) -> bool {
        matches!(self.payload, Payload::Void)
    }
}

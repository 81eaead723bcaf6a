//! Which contributions a version contains, and the id that names a version by its history.

use serde::{Deserialize, Serialize};

use crate::{Epoch, Rank, Round, StateId};

/// A set of ranks as a bitmap, trailing zero bytes left out so that equal sets have equal bytes.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "serde_bytes::ByteBuf")]
pub struct RankSet(#[serde(with = "serde_bytes")] Vec<u8>);

impl TryFrom<serde_bytes::ByteBuf> for RankSet {
    type Error = &'static str;

    fn try_from(bytes: serde_bytes::ByteBuf) -> Result<Self, Self::Error> {
        let bytes = bytes.into_vec();
        if bytes.last() == Some(&0) { Err("a set of ranks ends with a zero byte") } else { Ok(Self(bytes)) }
    }
}

impl RankSet {
    /// Adds a rank.
    pub fn insert(&mut self, rank: Rank) {
        let byte = rank as usize / 8;
        if self.0.len() <= byte {
            self.0.resize(byte + 1, 0);
        }
        self.0[byte] |= 1 << (rank % 8);
    }

    /// Whether `rank` is in the set.
    #[must_use]
    pub fn contains(&self, rank: Rank) -> bool {
        self.0.get(rank as usize / 8).is_some_and(|byte| byte & (1 << (rank % 8)) != 0)
    }

    /// Number of ranks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Whether no rank is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ranks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Rank> + '_ {
        (0..u32::try_from(self.0.len() * 8).unwrap_or(u32::MAX)).filter(|&rank| self.contains(rank))
    }
}

impl FromIterator<Rank> for RankSet {
    fn from_iter<I: IntoIterator<Item = Rank>>(ranks: I) -> Self {
        let mut set = Self::default();
        ranks.into_iter().for_each(|rank| set.insert(rank));
        set
    }
}

impl std::fmt::Debug for RankSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// What the newest round of a shard contains. Committed in the same write as the values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The round; equals the version it made.
    pub round: Round,
    /// Roster that closed the round.
    pub roster_epoch: Epoch,
    /// Settings revision that folded it.
    pub revision: u32,
    /// Ranks whose contribution was folded.
    pub counted: RankSet,
    /// Ranks whose contribution was present and added nothing.
    pub void: RankSet,
    /// The round closed with fewer contributions than its quorum, because nobody else could come.
    pub below_quorum: bool,
    /// The counted ranks in the order in which they were folded, of a job whose order is
    /// [`crate::FoldOrder::Arrival`]; empty where that is by rank.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub order: Vec<Rank>,
}

impl Ledger {
    /// Whether `rank` took part in the round, counted or void.
    #[must_use]
    pub fn contains(&self, rank: Rank) -> bool {
        self.counted.contains(rank) || self.void.contains(rank)
    }
}

/// What an open round contains so far: its partial commits (rule P12). Kept beside the state, which stays what it is
/// until the round closes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partial {
    /// As that of a round that has closed; its roster and settings revision are those of the newest partial commit.
    pub ledger: Ledger,
    /// When the broker stored the round's first contribution, milliseconds since the Unix epoch: the deadline counts
    /// from here.
    pub first: u64,
    /// Oldest roster by which somebody in it was taken to be a member.
    pub since: Epoch,
}

/// Where a shard stands; what a commit expects and what it makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Head {
    /// Rounds applied.
    pub version: u64,
    /// Partial commits since that version (rule P12). The state is the same whatever their number.
    pub fold_count: u32,
    /// Names the version by its whole history.
    pub state_id: StateId,
}

impl Head {
    /// The same version after another partial commit.
    #[must_use]
    pub fn folded_on(self) -> Self {
        Self { fold_count: self.fold_count + 1, ..self }
    }

    /// The version, whatever has been folded towards the next one.
    #[must_use]
    pub fn closed(self) -> Self {
        Self { fold_count: 0, ..self }
    }

    /// The same state at another version: the first one of a life that goes on from a snapshot.
    #[must_use]
    pub fn at_version(self, version: u64) -> Self {
        Self { version, ..self }
    }

    /// The head of a shard that no round has touched, from the checksum of its initial values.
    #[must_use]
    pub fn initial(origin: [u8; 16], shard: u32, checksum: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"thalweg/state/0")
            .update(&origin)
            .update(&shard.to_be_bytes())
            .update(&checksum.to_be_bytes());
        Self { version: 0, fold_count: 0, state_id: truncate(&hasher) }
    }

    /// The head after a round: hash of the previous id, the ledger, the settings revision (in the
    /// ledger), the function's digest and the new state's checksum (rule P5).
    #[must_use]
    pub fn next(&self, ledger: &Ledger, function: [u8; 16], checksum: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"thalweg/state/1").update(&self.state_id.0);
        hasher.update(&ledger.round.to_be_bytes()).update(&ledger.roster_epoch.to_be_bytes());
        hasher.update(&ledger.revision.to_be_bytes()).update(&[u8::from(ledger.below_quorum)]);
        for set in [&ledger.counted, &ledger.void] {
            hasher.update(&(set.0.len() as u64).to_be_bytes()).update(&set.0);
        }
        if !ledger.order.is_empty() {
            hasher.update(&(ledger.order.len() as u64).to_be_bytes());
            for rank in &ledger.order {
                hasher.update(&rank.to_be_bytes());
            }
        }
        hasher.update(&function).update(&checksum.to_be_bytes());
        Self { version: ledger.round, fold_count: 0, state_id: truncate(&hasher) }
    }
}

fn truncate(hasher: &blake3::Hasher) -> StateId {
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    StateId(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_sets_are_canonical() {
        let set: RankSet = [9, 0, 3].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 3, 9]);
        assert_eq!(set.len(), 3);
        assert!(set.contains(9) && !set.contains(8) && !set.contains(4000));
        assert_eq!(set, [0, 9, 3, 3].into_iter().collect());
    }

    #[test]
    fn every_part_of_history_changes_the_state_id() {
        let start = Head::initial([1; 16], 0, 7);
        let ledger =
            Ledger { round: 1, roster_epoch: 1, counted: [0, 1].into_iter().collect(), ..Ledger::default() };
        let head = start.next(&ledger, [2; 16], 8);
        let mut others = vec![start.next(&ledger, [3; 16], 8), start.next(&ledger, [2; 16], 9)];
        others.push(Head::initial([1; 16], 1, 7).next(&ledger, [2; 16], 8));
        others.push(start.next(&Ledger { roster_epoch: 2, ..ledger.clone() }, [2; 16], 8));
        others.push(start.next(&Ledger { revision: 1, ..ledger.clone() }, [2; 16], 8));
        others.push(start.next(&Ledger { below_quorum: true, ..ledger.clone() }, [2; 16], 8));
        others.push(start.next(&Ledger { order: vec![0, 1], ..ledger.clone() }, [2; 16], 8));
        others.push(start.next(&Ledger { order: vec![1, 0], ..ledger.clone() }, [2; 16], 8));
        let swapped = Ledger { void: ledger.counted.clone(), counted: RankSet::default(), ..ledger.clone() };
        others.push(start.next(&swapped, [2; 16], 8));
        assert!(others.iter().all(|other| other.state_id != head.state_id));
        assert_eq!(start.next(&ledger, [2; 16], 8), head);
    }
}

//! Bugs to re-introduce on purpose, so that it is known that the simulation would find them.

/// One deliberate bug in the shells around the state machines, or in what they rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Contributions are acknowledged when their commit is sent, not when it has returned (rule P1).
    AcknowledgeBeforeCommit,
    /// The result is published when its commit is sent (rule P1).
    PublishBeforeCommit,
    /// The store takes a commit whatever head it expects: no compare-and-swap (rule P1).
    CommitOnAnyHead,
    /// A taker keeps the consumer that is there instead of replacing it (rule P15).
    ConsumerKept,
    /// After a reconnect partitions are not taken over again (rule P15).
    NoRetakeAfterReconnect,
    /// Contributions are folded as they are at hand, not in rank order (rule P6).
    FoldInAnyOrder,
    /// Workers never ask the store where their shards stand (rule P10).
    NeverAsk,
    /// Workers are not told by the store what they missed: a fetch is never answered (rule P10).
    NeverFetch,
    /// The ledger leaves out a contribution that was folded (I1).
    RankForgotten,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::AcknowledgeBeforeCommit,
        Self::PublishBeforeCommit,
        Self::CommitOnAnyHead,
        Self::ConsumerKept,
        Self::NoRetakeAfterReconnect,
        Self::FoldInAnyOrder,
        Self::NeverAsk,
        Self::NeverFetch,
        Self::RankForgotten,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.extend(letter.to_lowercase());
        }
        name
    }
}

//! Bugs to re-introduce on purpose, so that it is known that the simulation would find them.

use clap::ValueEnum;

/// One deliberate bug, in the shells around the state machines, in what they rely on, or in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mutation {
    /// Contributions are acknowledged when their commit is sent, not when it has returned (rule P1).
    AcknowledgeBeforeCommit,
    /// The result is published when its commit is sent (rule P1).
    PublishBeforeCommit,
    /// The disk says that it has synced and has not: commits return before their level (rule P2).
    SyncSkipped,
    /// The store takes a commit whatever head it expects: no compare-and-swap (rule P1).
    CommitOnAnyHead,
    /// A commit that is there already is answered with an error instead of `AlreadyCommitted` (rule P5).
    AlreadyCommittedForgotten,
    /// The ledger leaves out a contribution that was folded (I1).
    RankForgotten,
    /// The ledger is kept in memory, not with the values: a restart of the store forgets it (rule P23).
    LedgerOutsideCommit,
    /// A commit overwrites the last durable copy of its shard (rule P22).
    DurableSlotOverwritten,
    /// A read copies half of a shard before and half after the next commit (rule P26).
    SlotReusedUnderReader,
    /// The checksum of a slot is not looked at (rule P23).
    TornSlotTrusted,
    /// After a power loss the store believes that the machine has not been off (rule P27).
    PowerLossUnnoticed,
    /// A taker keeps the consumer that is there instead of replacing it (rule P15).
    ConsumerKept,
    /// Consumers of one partition always have the same name, so late acknowledgements hit whichever is there
    /// (rule P15).
    ConsumerNameReused,
    /// A placement with another holder keeps the epoch (rule P14).
    EpochNotRaised,
    /// Neither after a reconnect nor after a long silence are partitions taken over again (rule P15).
    NeverRetaken,
    /// Nobody writes down which contribution is tried after an unclean takeover (rule P18).
    SuspectNotRecorded,
    /// Contributions are folded as they are at hand, not in rank order (rule P6).
    FoldInAnyOrder,
    /// A contribution of a worker's former life is taken for one of its present life (rule P3).
    IncarnationIgnored,
    /// A contribution that is rejected leaves its round instead of staying as a void (rule P8).
    RejectWithoutVoid,
    /// Workers never ask the store where their shards stand (rule P10).
    NeverAsk,
    /// Workers are not told by the store what they missed (rule P10).
    NeverFetch,
    /// A stream that was recreated looks like the old one, and nothing is sent again because of its age (rules
    /// P10, P16).
    RecreationUnnoticed,
    /// An invoker goes on with the settings that it read first, whatever roster it reads later (rule P4).
    SettingsForgotten,
    /// What a job goes on from after a power loss is read as it is, not as it was at the version that all shards
    /// have (rule P27).
    RollBackUneven,
    /// What is folded of an open round leaves the queue when that is sent to the store, not when it has returned
    /// (rule P12).
    PartialAcknowledgedEarly,
    /// Open rounds are kept in memory: a restart of the store forgets what was folded of them (rule P12).
    PartialForgotten,
    /// The store does not tell who is in an open round, so a contribution that was sent again is folded twice
    /// (rule P12).
    PartialLedgerForgotten,
    /// Nobody asks to look at open rounds whose queues are empty (rule P12).
    NudgeForgotten,
    /// No fence stands before a newcomer's first round (rule P4).
    FenceForgotten,
    /// Rounds that nobody is left to complete are not closed (rule P11).
    DesertedNotLevelled,
    /// Workers expire while nobody could hear them (rule P21).
    LeaseExpiredThroughOutage,
    /// Every worker is granted the whole budget (rule P20).
    WindowNotReserved,
}

impl Mutation {
    /// All of them.
    #[must_use]
    pub fn all() -> &'static [Self] {
        Self::value_variants()
    }

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

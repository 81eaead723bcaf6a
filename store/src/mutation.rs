//! Bugs to plant in the store of one thread, so that it is known that the simulation would find them. Only with
//! the feature `testing`; without it nothing can be planted.

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A commit overwrites the last durable copy (against rule P22).
    OverwriteDurable,
    /// A slot is taken for whole without a look at its checksum (against rule P23).
    TrustTorn,
}

#[cfg(feature = "testing")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in what this thread does from now on, or removes it.
#[cfg(feature = "testing")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

#[cfg(feature = "testing")]
pub(crate) fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

#[cfg(not(feature = "testing"))]
pub(crate) const fn is_planted(_: Bug) -> bool {
    false
}

//! Metrics of connections to NATS, and of what must never happen.

use metrics::{counter, describe_counter, describe_gauge, gauge};

const CONNECTED: &str = "thalweg_nats_connected";
const DISCONNECTS: &str = "thalweg_nats_disconnects_total";
const OVERFLOWS: &str = "thalweg_nats_overflows_total";
const VIOLATIONS: &str = "thalweg_invariant_violations_total";

/// What [`violated`] knows.
const INVARIANTS: [&str; 2] = [TWO_HOLDERS, OTHER_BITS];
/// Two invokers say that they hold one partition by the same epoch.
pub const TWO_HOLDERS: &str = "two_holders";
/// Two invocations of a function came to different values from the same contributions (invariant I5).
pub const OTHER_BITS: &str = "other_bits";

/// Describes the metrics; call once a recorder is installed.
pub fn describe() {
    describe_gauge!(CONNECTED, "1 while the process is connected to NATS, else 0");
    describe_counter!(DISCONNECTS, "Connections to NATS that were lost");
    describe_counter!(OVERFLOWS, "Times a subscription was full, so that messages were dropped");
    describe_counter!(
        VIOLATIONS,
        "Things that must never happen and did, by which; each is in the log with the details"
    );
    // Those that alerts look at are there from the beginning: a series that begins with 1 has never increased.
    counter!(DISCONNECTS).increment(0);
    counter!(OVERFLOWS).increment(0);
    for invariant in INVARIANTS {
        counter!(VIOLATIONS, "invariant" => invariant).increment(0);
    }
}

pub(crate) fn connected(connected: bool) {
    gauge!(CONNECTED).set(if connected { 1.0 } else { 0.0 });
    if !connected {
        counter!(DISCONNECTS).increment(1);
    }
}

pub(crate) fn overflowed() {
    counter!(OVERFLOWS).increment(1);
}

/// Something that must never happen has happened: one of the invariants of this module. The caller logs the details.
pub fn violated(invariant: &'static str) {
    counter!(VIOLATIONS, "invariant" => invariant).increment(1);
}

//! Metrics of every process.

use metrics::{counter, describe_counter};

const RELOADS: &str = "thalweg_config_reloads_total";

/// Describes the metrics; call once a recorder is installed.
pub(crate) fn describe() {
    describe_counter!(RELOADS, "Times the configuration was read again, by outcome (applied or refused)");
    // There from the beginning: a series that begins with 1 has never increased, as alerts see it.
    counter!(RELOADS, "outcome" => "refused").increment(0);
}

pub(crate) fn reloaded(applied: bool) {
    counter!(RELOADS, "outcome" => if applied { "applied" } else { "refused" }).increment(1);
}

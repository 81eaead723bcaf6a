//! The Prometheus recorder behind the `metrics` facade.

use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Upper bounds of histograms whose name ends in `_seconds`, seconds. From half a millisecond (a
/// message over loopback) to the half minute after which everything here has timed out.
pub const SECONDS_BUCKETS: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Upper bounds of histograms whose name ends in `_bytes`, bytes: powers of four from 256 B to
/// 1 GiB, and the 512 KiB of a default shard.
pub const BYTES_BUCKETS: [f64; 13] = [
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    524_288.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
];

/// Upper bounds of every other histogram, which by our names counts things.
pub const COUNT_BUCKETS: [f64; 15] =
    [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0];

/// How often recorded samples are folded into their buckets. Until then each sample takes eight
/// bytes, so this bounds memory when nobody scrapes.
pub const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Why the recorder could not be installed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MetricsError {
    /// Another recorder is already installed in this process.
    #[error("the metrics recorder could not be installed: {0}")]
    Recorder(String),
    /// The upkeep thread could not be started.
    #[error("the metrics upkeep thread could not be started: {0}")]
    Upkeep(String),
}

/// Access to what the installed recorder has recorded. Clones share it.
#[derive(Debug, Clone)]
pub struct MetricsHandle {
    prometheus: PrometheusHandle,
}

impl MetricsHandle {
    /// Everything recorded so far, in the Prometheus text format 0.0.4.
    pub fn render(&self) -> String {
        self.prometheus.render()
    }
}

/// The facade allows one recorder per process and never lets go of it, so the outcome of the first
/// attempt is the outcome of all.
static INSTALLED: OnceLock<Result<MetricsHandle, MetricsError>> = OnceLock::new();

/// Installs the process's metrics recorder; later calls return the first call's handle.
///
/// Every histogram gets buckets by its name's suffix ([`SECONDS_BUCKETS`], [`BYTES_BUCKETS`], else
/// [`COUNT_BUCKETS`]): without them the exporter would render summaries, which cannot be added up
/// over processes. Needs no async runtime.
///
/// # Errors
///
/// [`MetricsError`] when someone else's recorder is installed, or when no thread could be started.
pub fn install() -> Result<MetricsHandle, MetricsError> {
    INSTALLED.get_or_init(install_first).clone()
}

/// What there is to show where nothing is recorded.
///
/// # Errors
///
/// As of [`install`].
pub fn nothing() -> Result<MetricsHandle, MetricsError> {
    let recorder = builder().map_err(|error| MetricsError::Recorder(error.to_string()))?.build_recorder();
    Ok(MetricsHandle { prometheus: recorder.handle() })
}

fn install_first() -> Result<MetricsHandle, MetricsError> {
    let prometheus = builder()
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| MetricsError::Recorder(error.to_string()))?;
    let upkeep = prometheus.clone();
    // A thread and not a tokio task: the recorder lives as long as the process, while the runtime of
    // whoever happened to install it (a test, an embedding program) may not.
    thread::Builder::new()
        .name("thalweg-metrics".into())
        .spawn(move || {
            loop {
                thread::sleep(UPKEEP_INTERVAL);
                upkeep.run_upkeep();
            }
        })
        .map_err(|error| MetricsError::Upkeep(error.to_string()))?;
    Ok(MetricsHandle { prometheus })
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let suffix = |text: &str| Matcher::Suffix(text.to_owned());
    PrometheusBuilder::new()
        .set_buckets(&COUNT_BUCKETS)?
        .set_buckets_for_metric(suffix("_seconds"), &SECONDS_BUCKETS)?
        .set_buckets_for_metric(suffix("_bytes"), &BYTES_BUCKETS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Renders what a recorder of its own recorded: no test shares state with another.
    fn rendered(record: impl FnOnce()) -> String {
        let recorder = builder().unwrap().build_recorder();
        ::metrics::with_local_recorder(&recorder, record);
        recorder.handle().render()
    }

    #[test]
    fn histograms_have_buckets_by_suffix() {
        let text = rendered(|| {
            ::metrics::histogram!("commit_seconds").record(0.003);
            ::metrics::histogram!("payload_bytes").record(524_288.0);
            ::metrics::histogram!("invocation_contributions").record(3.0);
        });
        assert!(text.contains("# TYPE commit_seconds histogram"), "{text}");
        assert!(text.contains("commit_seconds_bucket{le=\"0.0025\"} 0"), "{text}");
        assert!(text.contains("commit_seconds_bucket{le=\"0.005\"} 1"), "{text}");
        assert!(text.contains("payload_bytes_bucket{le=\"262144\"} 0"), "{text}");
        assert!(text.contains("payload_bytes_bucket{le=\"524288\"} 1"), "{text}");
        assert!(text.contains("invocation_contributions_bucket{le=\"4\"} 1"), "{text}");
        assert!(!text.contains("summary"), "{text}");
    }

    #[test]
    fn buckets_rise() {
        for buckets in [&SECONDS_BUCKETS[..], &BYTES_BUCKETS, &COUNT_BUCKETS] {
            assert!(buckets.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn installing_again_returns_the_same_recorder() {
        let first = install().unwrap();
        ::metrics::counter!("thalweg_test_installed_total").increment(1);
        let second = install().unwrap();
        ::metrics::counter!("thalweg_test_installed_total").increment(1);
        for handle in [first, second] {
            let text = handle.render();
            assert!(text.contains("thalweg_test_installed_total 2"), "{text}");
        }
    }
}

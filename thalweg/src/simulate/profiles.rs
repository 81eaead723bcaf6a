//! What jobs and invokers are taken for.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use thalweg_autoscaler::trace::Constants;

/// The profiles that are used where no file is named.
const DEFAULT: &str = include_str!("../../profiles/default.toml");

/// A file of profiles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profiles {
    pub(super) constants: Measured,
    #[serde(rename = "job")]
    pub(super) jobs: Vec<JobProfile>,
}

/// What was measured of the system.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Measured {
    pub(super) service_mb_per_s: f64,
    pub(super) start_delay_ms: u64,
    pub(super) stop_delay_ms: u64,
    pub(super) message_kib: f64,
}

/// A kind of job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JobProfile {
    pub(super) name: String,
    pub(super) parameters: u64,
    pub(super) think_ms: f64,
    pub(super) weight: f64,
}

impl Profiles {
    /// Reads a file, or takes the built-in ones.
    pub(super) fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let (text, name) = match file {
            Some(file) => {
                let text =
                    std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
                (text, file.display().to_string())
            }
            None => (DEFAULT.to_owned(), "the built-in profiles".to_owned()),
        };
        let profiles: Self = toml::from_str(&text).with_context(|| format!("in {name}"))?;
        profiles.check().with_context(|| format!("in {name}"))?;
        Ok(profiles)
    }

    fn check(&self) -> anyhow::Result<()> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        ensure!(positive(self.constants.service_mb_per_s), "constants.service_mb_per_s must be positive");
        ensure!(positive(self.constants.message_kib), "constants.message_kib must be positive");
        ensure!(!self.jobs.is_empty(), "there is no [[job]]");
        for job in &self.jobs {
            let fits =
                job.parameters > 0 && job.think_ms.is_finite() && job.think_ms >= 0.0 && positive(job.weight);
            ensure!(
                fits,
                "job {:?}: parameters and weight must be positive, think_ms not negative",
                job.name
            );
        }
        Ok(())
    }

    pub(super) fn constants(&self, partitions: u16) -> Constants {
        Constants {
            service_bytes_per_s: self.constants.service_mb_per_s * 1e6,
            start_delay_ms: self.constants.start_delay_ms,
            stop_delay_ms: self.constants.stop_delay_ms,
            message_bytes: self.constants.message_kib * 1024.0,
            partitions,
        }
    }

    /// The profile of a job, from a number between 0 and 1.
    pub(super) fn draw(&self, share: f64) -> &JobProfile {
        let all: f64 = self.jobs.iter().map(|job| job.weight).sum();
        let mut left = share * all;
        for job in &self.jobs {
            left -= job.weight;
            if left < 0.0 {
                return job;
            }
        }
        &self.jobs[self.jobs.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_are_sound_and_drawn_by_weight() {
        let profiles = Profiles::load(None).unwrap();
        assert_eq!(profiles.draw(0.0).name, "alexnet");
        assert_eq!(profiles.draw(0.26).name, "vgg16");
        assert_eq!(profiles.draw(0.999_999).name, "resnet50");
    }

    #[test]
    fn a_mistake_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("profiles.toml");
        for (from, to, says) in [
            ("service_mb_per_s = 1715.0", "service_mb_per_s = 0.0", "service_mb_per_s"),
            ("weight = 1.0", "weight = -1.0", "alexnet"),
            ("[constants]", "[measured]", "measured"),
        ] {
            let text = DEFAULT.replacen(from, to, 1);
            assert_ne!(text, DEFAULT, "{from}");
            std::fs::write(&file, text).unwrap();
            let error = format!("{:#}", Profiles::load(Some(&file)).unwrap_err());
            assert!(error.contains(says) && error.contains("profiles.toml"), "{error}");
        }
    }
}

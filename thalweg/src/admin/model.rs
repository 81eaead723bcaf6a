//! Describing a job on the command line.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use thalweg_protocol::TensorSpec;
use thalweg_sdk::{Durability, FoldOrder, FunctionSpec, Job, JobKey, NonFinite, OnLoss, Setting, model_of};

use super::Complaint;

/// A job's model, function and guarantees.
#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// Tensors and first parameters from a safetensors file; else give --tensor
    #[arg(long, value_name = "FILE")]
    pub(super) from: Option<PathBuf>,
    /// A tensor, as NAME:DIMxDIM (NAME: for a scalar); in the order in which the workers describe them
    #[arg(long = "tensor", value_name = "NAME:SHAPE", value_parser = parse_tensor, conflicts_with = "from")]
    tensors: Vec<TensorSpec>,
    /// Aggregation function: sum, mean, weighted_mean, sgd, adam, adamw, adagrad, lion
    #[arg(long, default_value = "mean")]
    function: String,
    /// A setting of the function, such as lr=0.1 or nesterov=true
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = parse_setting)]
    settings: Vec<(String, Setting)>,
    /// Workers that the first round waits for
    #[arg(long, default_value_t = 1)]
    workers: u32,
    /// Contributions that close a round once the deadline has passed; without it every round waits for all
    #[arg(long, requires = "deadline")]
    quorum: Option<u32>,
    /// Time from a round's first contribution to its close below the full roster, such as 500ms or 10s
    #[arg(long, value_parser = humantime::parse_duration, requires = "quorum")]
    deadline: Option<std::time::Duration>,
    /// What a result has survived by the time a worker sees it
    #[arg(long, value_enum, default_value_t = DurabilityArg::Process)]
    durability: DurabilityArg,
    /// What happens to contributions with NaN or infinity; by default propagate for sum and mean, void for others
    #[arg(long, value_enum)]
    non_finite: Option<NonFiniteArg>,
    /// Size of a shard, bytes
    #[arg(long)]
    shard_bytes: Option<u32>,
    /// Delete the job once nobody has been in it for so long, such as 7d; without it, never
    #[arg(long, value_parser = humantime::parse_duration)]
    ttl: Option<std::time::Duration>,
    /// What happens when rounds are lost with the power
    #[arg(long, value_enum, default_value_t = OnLossArg::Fail)]
    on_loss: OnLossArg,
    /// In which order contributions are folded; on arrival suits rounds of thousands of workers, or of hours
    #[arg(long, value_enum, default_value_t = OrderArg::Rank)]
    order: OrderArg,
    /// The pool whose invokers alone serve the job; without it, the shared one
    #[arg(long)]
    pool: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DurabilityArg {
    /// The kill of any or all processes
    Process,
    /// Power loss
    Disk,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum NonFiniteArg {
    /// They are added like any other value
    Propagate,
    /// The contribution counts as absent in its shard
    Void,
    /// The job fails
    Fail,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnLossArg {
    /// The job fails
    Fail,
    /// It goes on from the newest version that all shards still have
    RollBack,
    /// It waits for the parameters of a worker that joins again
    Reseed,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OrderArg {
    /// By rank: the same contributions give the same bits
    Rank,
    /// As they come; the order is recorded with the round
    Arrival,
}

impl JobArgs {
    /// The job.
    pub(super) fn job(&self, key: &JobKey) -> anyhow::Result<Job> {
        let tensors = match &self.from {
            Some(path) => model_of(path)?,
            None => self.tensors.clone(),
        };
        if tensors.is_empty() {
            let text =
                "a job needs tensors: name them with --tensor NAME:SHAPE, or a file with --from or --spec";
            return Err(Complaint::Usage(text.to_owned()).into());
        }
        let mut job = Job::of_tenant(key.tenant.as_str(), key.job.as_str())?;
        for tensor in tensors {
            job = job.tensor(tensor.name, tensor.shape);
        }
        let mut function = FunctionSpec::named(self.function.as_str());
        function.settings.extend(self.settings.iter().cloned());
        job = job.function_spec(function).workers(self.workers);
        if let (Some(quorum), Some(deadline)) = (self.quorum, self.deadline) {
            job = job.quorum(quorum, deadline);
        }
        job = job.durability(match self.durability {
            DurabilityArg::Process => Durability::Process,
            DurabilityArg::Disk => Durability::Disk,
        });
        if let Some(policy) = self.non_finite {
            job = job.non_finite(match policy {
                NonFiniteArg::Propagate => NonFinite::Propagate,
                NonFiniteArg::Void => NonFinite::Void,
                NonFiniteArg::Fail => NonFinite::Fail,
            });
        }
        if let Some(bytes) = self.shard_bytes {
            job = job.shard_bytes(bytes);
        }
        if let Some(pool) = &self.pool {
            job = job.pool(pool)?;
        }
        if let Some(ttl) = self.ttl {
            job = job.time_to_live(ttl);
        }
        job = job.order(match self.order {
            OrderArg::Rank => FoldOrder::Rank,
            OrderArg::Arrival => FoldOrder::Arrival,
        });
        Ok(job.on_loss(match self.on_loss {
            OnLossArg::Fail => OnLoss::Fail,
            OnLossArg::RollBack => OnLoss::RollBack,
            OnLossArg::Reseed => OnLoss::Reseed,
        }))
    }
}

/// Reads `weight:64x10`.
fn parse_tensor(text: &str) -> Result<TensorSpec, String> {
    let (name, shape) = text.rsplit_once(':').ok_or("expected NAME:DIMxDIM, such as weight:64x10")?;
    let dims = shape.split('x').filter(|dim| !dim.is_empty());
    let shape = dims.map(|dim| dim.parse().map_err(|error| format!("dimension {dim:?}: {error}")));
    Ok(TensorSpec::f32(name, shape.collect::<Result<Vec<u64>, String>>()?))
}

/// Reads `lr=0.1` or `nesterov=true`.
pub(super) fn parse_setting(text: &str) -> Result<(String, Setting), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE, such as lr=0.1")?;
    let setting = match value {
        "true" => Setting::Flag(true),
        "false" => Setting::Flag(false),
        number => Setting::Number(
            number
                .parse()
                .map_err(|_| format!("{name}: expected a number, true or false, not {number:?}"))?,
        ),
    };
    Ok((name.to_owned(), setting))
}

/// Reads `1:lr=0.1`: a setting of parameter group 1.
pub(super) fn parse_group_setting(text: &str) -> Result<(u32, String, Setting), String> {
    let (group, setting) = text.split_once(':').ok_or("expected GROUP:NAME=VALUE, such as 1:lr=0.1")?;
    let group = group.parse().map_err(|_| format!("{group:?} is no number of a parameter group"))?;
    let (name, setting) = parse_setting(setting)?;
    Ok((group, name, setting))
}

/// Reads a whole specification, as `thalweg job show --json` prints it under `spec`, from JSON or TOML.
pub(super) fn read_spec(path: &std::path::Path) -> anyhow::Result<thalweg_protocol::JobSpec> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    // As printed, or all of what `show --json` prints.
    #[derive(serde::Deserialize)]
    struct Shown {
        spec: thalweg_protocol::JobSpec,
    }
    let parsed = if path.extension().is_some_and(|extension| extension == "toml") {
        toml::from_str(&text).map_err(anyhow::Error::from)
    } else {
        let shown = serde_json::from_str::<Shown>(&text).map(|shown| shown.spec);
        shown.or_else(|_| serde_json::from_str(&text)).map_err(anyhow::Error::from)
    };
    parsed.with_context(|| {
        format!(
            "{}: no job specification, as `thalweg job show --json` prints it under \"spec\"",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_and_settings_are_read() {
        assert_eq!(parse_tensor("w:64x10"), Ok(TensorSpec::f32("w", [64, 10])));
        assert_eq!(parse_tensor("layer:0:b:3"), Ok(TensorSpec::f32("layer:0:b", [3])));
        assert_eq!(parse_tensor("scale:"), Ok(TensorSpec::f32("scale", [])));
        assert!(parse_tensor("w").unwrap_err().contains("NAME:DIM"));
        assert!(parse_tensor("w:3xa").unwrap_err().contains("\"a\""));
        assert_eq!(parse_setting("lr=1e-3"), Ok(("lr".to_owned(), Setting::Number(1e-3))));
        assert_eq!(parse_setting("nesterov=true"), Ok(("nesterov".to_owned(), Setting::Flag(true))));
        assert!(parse_setting("lr=fast").unwrap_err().contains("lr"));
        assert_eq!(parse_group_setting("1:lr=2"), Ok((1, "lr".to_owned(), Setting::Number(2.0))));
        assert!(parse_group_setting("lr=2").is_err());
    }
}

//! Training as a loop does it: think, push, pull.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use thalweg_protocol::checksum;
use thalweg_sdk::Worker;

use super::{
    crew::Reply,
    load::{self, Expectation},
    worker::{Part, miscounted},
};

/// What a worker trains, and how it fares.
pub(super) struct Loop<'a> {
    pub(super) worker: &'a mut Worker,
    pub(super) workers: u32,
    pub(super) parts: &'a [Part],
    pub(super) gradient: &'a mut [f32],
    pub(super) result: &'a mut [f32],
    pub(super) expectation: &'a mut Expectation,
    /// From iteration to iteration; it begins anew at its end.
    pub(super) think_times: &'a [Duration],
    /// The round that was trained last.
    pub(super) round: &'a mut u32,
    pub(super) lost: &'a mut u64,
    pub(super) repeated: &'a mut u64,
}

impl Loop<'_> {
    /// Trains `warm_up` rounds and then `rounds` that count. What makes the gradient and checks the result is done in the
    /// time of thinking.
    pub(super) async fn train(&mut self, rounds: u32, warm_up: u32) -> anyhow::Result<Reply> {
        let rank = self.worker.rank();
        let (mut ended, mut counted_from) = (Instant::now(), Instant::now());
        for number in 0..warm_up + rounds {
            if number == warm_up {
                counted_from = ended;
            }
            *self.round += 1;
            load::fill(self.gradient, 0, *self.round, rank);
            let think = self.think_times[number as usize % self.think_times.len()];
            tokio::time::sleep_until((ended + think).into()).await;
            for Part { name, bounds, .. } in self.parts {
                self.worker.push(name, &self.gradient[bounds.clone()]).await?;
            }
            for Part { name, bounds, .. } in self.parts {
                self.worker.pull(name, &mut self.result[bounds.clone()]).await?;
            }
            ended = Instant::now();
            self.expectation.check(self.result, *self.round)?;
            let (lost, repeated) = miscounted(self.worker, self.workers);
            *self.lost += lost;
            *self.repeated += repeated;
        }
        let period_s = (ended - counted_from).as_secs_f64() / f64::from(rounds);
        let bytes: Vec<_> = self.result.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(Reply::Trained { period_s, digest: checksum(&[&bytes]) })
    }
}

/// Think times of one rank from a file of iterations, whose mean over all of them becomes `mean`.
///
/// The file has a line for each iteration of each worker, and a header that names the columns `worker`, `time` (the
/// number of the iteration) and `batch_time_norm` (in any unit) among others. There may be more ranks than workers in
/// the file: then they take them in turn.
pub(super) fn irregular(path: &Path, rank: u32, mean: Duration) -> anyhow::Result<Vec<Duration>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text, rank, mean).with_context(|| format!("in {}", path.display()))
}

fn parse(text: &str, rank: u32, mean: Duration) -> anyhow::Result<Vec<Duration>> {
    let mut lines = text.lines();
    let header: Vec<_> = lines.next().context("it is empty")?.split(',').map(str::trim).collect();
    let column = |name: &str| {
        header.iter().position(|column| *column == name).with_context(|| format!("there is no column {name}"))
    };
    let (worker, time, value) = (column("worker")?, column("time")?, column("batch_time_norm")?);
    let mut rows = Vec::new();
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let fields: Vec<_> = line.split(',').collect();
        let field = |index: usize| {
            let field = fields.get(index).and_then(|field| field.trim().parse::<f64>().ok());
            field.filter(|value| value.is_finite()).with_context(|| format!("{line:?} is no iteration"))
        };
        rows.push((field(worker)? as u32, field(time)?, field(value)?));
    }
    let average = rows.iter().map(|(_, _, value)| value).sum::<f64>() / rows.len().max(1) as f64;
    ensure!(average > 0.0, "there is no iteration that takes any time");
    let workers = rows.iter().map(|(worker, _, _)| *worker).max().unwrap_or(0) + 1;
    rows.retain(|(worker, _, value)| *worker == rank % workers && *value >= 0.0);
    rows.sort_by(|one, other| one.1.total_cmp(&other.1));
    ensure!(!rows.is_empty(), "worker {} has no iteration", rank % workers);
    Ok(rows.into_iter().map(|(_, _, value)| mean.mul_f64(value / average)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iterations_of_a_rank_are_scaled_by_the_mean_of_all() {
        let text = ",worker,gpu,time,batch_time_norm\n0,0,25,2,30\n1,1,25,1,20\n2,0,25,1,10\n3,1,25,2,20\n";
        let ms = Duration::from_millis;
        assert_eq!(parse(text, 0, ms(100)).unwrap(), [ms(50), ms(150)]);
        assert_eq!(parse(text, 3, ms(100)).unwrap(), [ms(100), ms(100)]);
        for bad in
            ["", "worker,time\n", "worker,time,batch_time_norm\n", "worker,time,batch_time_norm\n0,1,x\n"]
        {
            assert!(parse(bad, 0, ms(1)).is_err(), "{bad:?}");
        }
    }
}

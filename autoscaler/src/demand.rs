//! How long rounds take with so many invokers: a closed queueing network.
//!
//! A synchronous job alternates between thinking (its workers compute; nobody serves it) and one round of aggregation,
//! which all invokers serve together, since its shards are spread over all partitions. So every job is one customer
//! of a network of a delay station (its think time) and a processor-sharing station (the invokers). By the arrival
//! theorem (Reiser and Lavenberg, *Mean-value analysis of closed multichain queueing networks*, 1980; Lazowska et al.,
//! *Quantitative System Performance*, chapter 7) a round finds the mean queue that there is without its job:
//!
//! ```text
//! R_j = S_j (1 + A_j),   S_j = D_j / (n (1 - u)),   A = sum over k of Q_k,   Q_k = R_k / (Z_k + R_k)
//! ```
//!
//! with think time Z, work D in invoker-seconds, n invokers and the share u of them that other load takes. P. Schweitzer
//! (*Approximate analysis of multiclass closed networks of queues*, 1979) takes `A - Q_j` for A_j: as if the others' queues
//! stayed what they are without the job. They are shorter then, in turn shortening each other, which to the first order
//! comes to
//!
//! ```text
//! A_j = A - Q_j / (1 - sum over k != j of dQ_k / dA)
//! ```
//!
//! with the derivatives of his solution. So periods are 0.2 % off the exact ones of identical jobs up to a slowdown of a fifth,
//! where his are 4 % off. A job whose shards occupy fewer than n invokers at once is served by that many and stands in the
//! way of as many.

/// Iterations at most. Each about squares what is left to go; six are enough in practice.
const ITERATIONS: usize = 100;
/// Relative change of the queue at which it has converged.
const PRECISE: f64 = 1e-6;

/// One job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Work of one round, invoker-seconds.
    pub work: f64,
    /// Time between a round's result and the next round's contributions, seconds.
    pub think: f64,
    /// Invokers of its own that it is compared against.
    pub reference: f64,
    /// Invokers that can work on its round at once.
    pub parallel: f64,
}

impl Load {
    /// Its period alone on the invokers it is compared against, seconds.
    #[must_use]
    pub fn alone(&self) -> f64 {
        self.think + self.work / self.reference.min(self.parallel).max(f64::MIN_POSITIVE)
    }

    /// How much longer this period is: 0.1 for a tenth.
    #[must_use]
    pub fn slowdown(&self, period: f64) -> f64 {
        period / self.alone().max(f64::MIN_POSITIVE) - 1.0
    }
}

/// Invokers' worth of work that `invokers` of them can do when partitions are spread evenly: the one with the most
/// partitions is done last.
#[must_use]
pub fn effective(invokers: usize, partitions: usize) -> f64 {
    if invokers == 0 || partitions == 0 {
        return 0.0;
    }
    partitions as f64 / partitions.div_ceil(invokers) as f64
}

/// Mean period of every job, seconds, on this many invokers of which other work takes `open`. `None` where that
/// leaves nothing.
#[must_use]
pub fn periods(loads: &[Load], open: f64, invokers: f64) -> Option<Vec<f64>> {
    let left = 1.0 - open / invokers;
    // Also what is not a number.
    if !(left > 0.0 && invokers > 0.0) {
        return None;
    }
    let served = |load: &Load| load.parallel.clamp(f64::MIN_POSITIVE, invokers);
    let alone = |load: &Load| load.work / (served(load) * left);
    let station =
        |load: &Load| Station { think: load.think, alone: alone(load), share: served(load) / invokers };
    let stations: Vec<_> = loads.iter().map(station).collect();
    Some(loads.iter().zip(residences(&stations)).map(|(load, residence)| load.think + residence).collect())
}

/// A job in the network.
struct Station {
    think: f64,
    /// Time that its round takes alone.
    alone: f64,
    /// Of the invokers, how many serve it.
    share: f64,
}

impl Station {
    /// How long its round takes where all jobs' queue is `all` and without it would be shorter by `absence` times its
    /// own part; that part, and the derivative of that by `all`. The time is the positive root of
    /// `R^2 + R (Z - S (1 + A) + S w) - S (1 + A) Z = 0` with w the absence times the share.
    fn at(&self, all: f64, absence: f64) -> (f64, f64, f64) {
        let Self { think, alone, share } = *self;
        let linear = think - alone * (1.0 + all) + alone * absence * share;
        let root = (linear * linear + 4.0 * alone * (1.0 + all) * think).sqrt();
        let residence = (root - linear) / 2.0;
        let period = think + residence;
        if !(period > 0.0 && root > 0.0) {
            return (residence, 0.0, 0.0);
        }
        (residence, share * residence / period, share * think / period * alone / root)
    }
}

/// The queue of all jobs, by Newton's method: what they make of a queue grows ever slower with it, so from above there is
/// no overshooting. `absence` is that of each job.
fn queue(stations: &[Station], absence: impl Fn(usize) -> f64) -> f64 {
    let mut all = stations.iter().map(|station| station.share).sum::<f64>();
    for _ in 0..ITERATIONS {
        let (mut made, mut slope) = (0.0, 0.0);
        for (job, station) in stations.iter().enumerate() {
            let (_, part, derivative) = station.at(all, absence(job));
            (made, slope) = (made + part, slope + derivative);
        }
        let next = (all - (all - made) / (1.0 - slope).max(PRECISE)).max(0.0);
        let change = (next - all).abs();
        all = next;
        if change <= PRECISE * all {
            break;
        }
    }
    all
}

/// How long each job's round takes.
fn residences(stations: &[Station]) -> Vec<f64> {
    let all = queue(stations, |_| 1.0);
    let slopes: Vec<f64> = stations.iter().map(|station| station.at(all, 1.0).2).collect();
    let slope: f64 = slopes.iter().sum();
    let absence = |job: usize| 1.0 / (1.0 - (slope - slopes[job])).max(PRECISE);
    let all = queue(stations, absence);
    stations.iter().enumerate().map(|(job, station)| station.at(all, absence(job)).0).collect()
}

/// Fewest of 1 to `most` invokers with which no job loses more than `limit` and other work takes no more than
/// `utilisation` of them; `most` where even that is too few. 0 when there is nothing to do.
#[must_use]
pub fn fewest(
    loads: &[Load],
    open: f64,
    limit: f64,
    utilisation: f64,
    partitions: usize,
    most: usize,
) -> usize {
    if loads.is_empty() && open <= 0.0 {
        return 0;
    }
    let fits = |invokers: usize| {
        let invokers = effective(invokers, partitions);
        open <= utilisation * invokers
            && periods(loads, open, invokers).is_some_and(|periods| {
                loads.iter().zip(periods).all(|(load, period)| load.slowdown(period) <= limit)
            })
    };
    // No fewer than the work that has to be done with the limit kept. From there on in growing steps, then by halving:
    // more invokers never make anything slower.
    let least: f64 = loads.iter().map(|load| load.work / (load.alone() * (1.0 + limit))).sum::<f64>() + open;
    let most = most.max(1);
    let (mut low, mut step) = ((least.floor() as usize).clamp(1, most), 1);
    let mut high = low;
    while high < most && !fits(high) {
        low = high + 1;
        high = (high + step).min(most);
        step *= 2;
    }
    while low < high {
        let middle = low.midpoint(high);
        if fits(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(work: f64, think: f64) -> Load {
        Load { work, think, reference: 2.0, parallel: 1024.0 }
    }

    /// Exact mean value analysis of identical single-customer classes: the recursion over the population.
    fn exact(jobs: usize, service: f64, think: f64) -> f64 {
        let mut queue = 0.0;
        let mut residence = service;
        for population in 1..=jobs {
            residence = service * (1.0 + queue);
            queue = population as f64 * residence / (think + residence);
        }
        think + residence
    }

    #[test]
    fn is_close_to_exact_mean_value_analysis() {
        for jobs in [1, 2, 3, 4, 8, 20, 40, 100, 400] {
            for work in [0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.5, 2.5] {
                let busy = (work / jobs as f64).min(1.0);
                let loads = vec![load(busy * 2.0, 1.0 - busy); jobs];
                let period = periods(&loads, 0.0, 2.0).unwrap()[0];
                let exact = exact(jobs, busy, 1.0 - busy);
                // Beyond a fifth of slowdown it errs to the safe side, and no limit is that wide by default.
                let off = period / exact - 1.0;
                let most = if exact < 1.2 { 0.002 } else { 0.02 };
                assert!(off > -0.002 && off < most, "{jobs} x {busy}: {off} of {exact}");
            }
        }
    }

    #[test]
    fn alone_on_its_own_invokers_nothing_is_lost() {
        let job = load(0.4, 0.8);
        assert!((job.alone() - 1.0).abs() < 1e-12);
        let period = periods(&[job], 0.0, 2.0).unwrap()[0];
        assert!(job.slowdown(period).abs() < 1e-9);
        assert!(job.slowdown(periods(&[job], 0.0, 8.0).unwrap()[0]) < -0.1);
        assert_eq!(periods(&[job], 2.0, 2.0), None);
        assert_eq!(periods(&[job], f64::NAN, 2.0), None);
    }

    #[test]
    fn a_job_of_one_shard_is_not_helped_by_many_invokers() {
        let job = Load { parallel: 1.0, ..load(0.4, 0.6) };
        assert!((periods(&[job], 0.0, 8.0).unwrap()[0] - 1.0).abs() < 1e-9);
        // And two of them are not in each other's way.
        let two = periods(&[job, job], 0.0, 32.0).unwrap()[0];
        assert!(job.slowdown(two) < 0.01, "{two}");
    }

    #[test]
    fn uneven_partitions_are_counted() {
        for (invokers, expected) in [(0, 0.0), (1, 1.0), (2, 2.0), (5, 32.0 / 7.0), (31, 16.0), (32, 32.0)] {
            assert!((effective(invokers, 32) - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn four_jobs_share_two_invokers() {
        let loads = vec![load(0.2, 0.9); 4];
        assert_eq!(fewest(&loads, 0.0, 0.05, 0.7, 32, 16), 2);
        assert_eq!(fewest(&[], 0.0, 0.05, 0.7, 32, 16), 0);
        assert_eq!(fewest(&[], 2.0, 0.05, 0.7, 32, 16), 3);
        assert_eq!(fewest(&loads, f64::INFINITY, 0.05, 0.7, 32, 16), 16);
        let heavy = vec![load(2.0, 0.0); 4];
        assert_eq!(fewest(&heavy, 0.0, 0.1, 0.7, 32, 16), 8);
    }

    fn loads() -> impl Strategy<Value = Vec<Load>> {
        let one = (0.0..4.0_f64, 0.0..4.0_f64, 1_u32..8, prop_oneof![Just(1.0), 1.0..64.0_f64]);
        let one = one.prop_map(|(work, think, reference, parallel)| Load {
            work,
            think,
            reference: f64::from(reference),
            parallel,
        });
        prop::collection::vec(one, 1..12)
    }

    proptest! {
        #[test]
        fn more_invokers_are_never_slower(loads in loads(), open in 0.0..2.0_f64, invokers in 1.0..16.0_f64, more in 0.0..8.0_f64) {
            if let Some(fewer) = periods(&loads, open, invokers) {
                for (fewer, more) in fewer.iter().zip(periods(&loads, open, invokers + more).unwrap()) {
                    prop_assert!(more <= fewer * (1.0 + 1e-4) + 1e-9, "{fewer} {more}");
                }
            }
        }

        #[test]
        fn no_more_work_is_done_than_there_are_invokers(loads in loads(), invokers in 1.0..16.0_f64) {
            let periods = periods(&loads, 0.0, invokers).unwrap();
            let done: f64 = loads.iter().zip(periods).filter(|(_, period)| *period > 0.0)
                .map(|(load, period)| load.work / period).sum();
            prop_assert!(done <= invokers * 1.02, "{done} of {invokers}");
        }

        #[test]
        fn fewest_is_the_first_that_fits(loads in loads(), open in 0.0..4.0_f64) {
            let fewest = fewest(&loads, open, 0.1, 0.7, 1024, 64);
            prop_assert!((1..=64).contains(&fewest));
            let holds = |n: usize| open <= 0.7 * n as f64 && periods(&loads, open, n as f64).is_some_and(|periods| {
                loads.iter().zip(periods).all(|(load, period)| load.slowdown(period) <= 0.1)
            });
            if fewest > 1 {
                prop_assert!(!holds(fewest - 1) || effective(fewest - 1, 1024) < (fewest - 1) as f64);
            }
        }
    }
}

//! How long rounds take with so many invokers: a closed queueing network.
//!
//! A synchronous job alternates between thinking (its workers compute; nobody serves it) and one round of aggregation,
//! which all invokers serve together, since its shards are spread over all partitions. So every job is one customer
//! of a network of a delay station (its think time) and a processor-sharing station (the invokers). Solved by
//! Schweitzer's approximate mean value analysis (P. Schweitzer, *Approximate analysis of multiclass closed networks of
//! queues*, 1979; Lazowska et al., *Quantitative System Performance*, chapter 7): with one customer in every class,
//! the queue that a round finds on arrival is the mean queue of all other jobs,
//!
//! ```text
//! R_j = S_j (1 + sum over k != j of Q_k),   S_j = D_j / (n (1 - u)),   Q_k = R_k / (Z_k + R_k)
//! ```
//!
//! with think time Z, work D in invoker-seconds, n invokers and the share u of them that other load takes. Of few jobs
//! each one's absence shortens the queue that it finds noticeably; there Q_k is taken without the part of R_k that j
//! causes. A job whose shards occupy fewer than n invokers at once is served by that many and stands in the way of as
//! many.

/// Iterations at most. Each contracts; twenty are enough in practice.
const ITERATIONS: usize = 100;
/// Up to so many jobs the absence of one is noticeable.
const FEW: usize = 32;
/// Relative change of every residence time at which it has converged.
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
    let station = |load: &Load| (load.think, alone(load), served(load) / invokers);
    let stations: Vec<_> = loads.iter().map(station).collect();
    let residence = if loads.len() > FEW { of_many(&stations) } else { of_few(&stations) };
    Some(loads.iter().zip(residence).map(|(load, residence)| load.think + residence).collect())
}

/// What a job is to the others while its round takes `residence`: its part of the mean queue. A station is a job's think
/// time, its round's time alone, and the share of the invokers that serve it.
fn queue((think, _, share): (f64, f64, f64), residence: f64) -> f64 {
    let period = think + residence;
    if period > 0.0 { residence / period * share } else { 0.0 }
}

/// Residence times where each job sees the mean queue of all others. With the whole queue A given, each is the positive
/// root of `R^2 + R (Z - S (1 + A) + S w) - S (1 + A) Z = 0`; A is found by halving.
fn of_many(stations: &[(f64, f64, f64)]) -> Vec<f64> {
    let residence = |(think, alone, share): (f64, f64, f64), all: f64| {
        let (linear, constant) = (think - alone * (1.0 + all) + alone * share, alone * (1.0 + all) * think);
        (-linear + (linear * linear + 4.0 * constant).sqrt()) / 2.0
    };
    let sum = |all: f64| stations.iter().map(|each| queue(*each, residence(*each, all))).sum::<f64>();
    let (mut low, mut high) = (0.0, stations.iter().map(|(.., share)| share).sum::<f64>());
    while high - low > PRECISE * high {
        let middle = f64::midpoint(low, high);
        if sum(middle) > middle {
            low = middle;
        } else {
            high = middle;
        }
    }
    stations.iter().map(|each| residence(*each, high)).collect()
}

/// Residence times where each job sees the queue of all others without its own influence on it, by iteration.
fn of_few(stations: &[(f64, f64, f64)]) -> Vec<f64> {
    let mut residence: Vec<f64> = stations.iter().map(|(_, alone, _)| *alone).collect();
    for _ in 0..ITERATIONS {
        let queues: Vec<f64> =
            stations.iter().zip(&residence).map(|(each, own)| queue(*each, *own)).collect();
        let all: f64 = queues.iter().sum();
        let found = |job: usize| {
            let without = |other: usize| {
                let (_, alone, _) = stations[other];
                queue(stations[other], alone * (1.0 + (all - queues[other] - queues[job]).max(0.0)))
            };
            (0..stations.len()).filter(|other| *other != job).map(without).sum::<f64>()
        };
        let mut change: f64 = 0.0;
        for (job, residence) in residence.iter_mut().enumerate() {
            let next = stations[job].1 * (1.0 + found(job));
            change = change.max((next - *residence).abs() / next.max(f64::MIN_POSITIVE));
            *residence = next;
        }
        if change < PRECISE {
            break;
        }
    }
    residence
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
        for jobs in [1, 2, 4, 8, 20] {
            for busy in [0.02, 0.05, 0.1, 0.2] {
                let loads = vec![load(busy * 2.0, 1.0 - busy); jobs];
                let period = periods(&loads, 0.0, 2.0).unwrap()[0];
                let exact = exact(jobs, busy, 1.0 - busy);
                // Beyond a fifth of slowdown it errs to the safe side, and no limit is that wide by default.
                let off = period / exact - 1.0;
                assert!(off > -0.005 && off < if exact < 1.2 { 0.03 } else { 0.1 }, "{jobs} x {busy}: {off}");
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

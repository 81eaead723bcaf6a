use std::collections::{BTreeMap, BTreeSet};

use thalweg_protocol::{InvokerState, PlacedPartition};

use super::*;

const PARTITIONS: Partition = 8;
const MIB: u64 = 1 << 20;

/// With the catch-up target that the figures below were reckoned for.
fn config() -> Config {
    Config { catch_up_ms: 350, ..Config::default() }
}

/// The registry, the queues and the invokers around a controller.
struct World {
    controller: Controller,
    now: Millis,
    depth_bytes: u64,
    /// Messages that come into each partition between two observations, and that ever came.
    inflow: BTreeMap<Partition, u64>,
    arrived: BTreeMap<Partition, u64>,
    observable: bool,
    placement: Placement,
    /// What each invoker holds; the frozen and the dead are not in here.
    invokers: BTreeMap<String, BTreeSet<Partition>>,
    started: Vec<String>,
    stopped: Vec<String>,
    places: usize,
}

impl World {
    fn with(config: Config, starts: bool) -> Self {
        let mut count = 0;
        let ids = Box::new(move || {
            count += 1;
            format!("auto-{count}")
        });
        Self {
            controller: Controller::new(config, PARTITIONS, starts, ids, 0),
            now: 0,
            depth_bytes: 0,
            inflow: BTreeMap::new(),
            arrived: BTreeMap::new(),
            observable: true,
            placement: Placement::default(),
            invokers: BTreeMap::new(),
            started: Vec::new(),
            stopped: Vec::new(),
            places: 0,
        }
    }

    fn leading(config: Config) -> Self {
        let mut world = Self::with(config, true);
        world.controller.lead(Placement::default(), 0);
        // The first step writes that nobody holds anything.
        world.step();
        world.places = 0;
        world
    }

    /// A world with this many own invokers serving, 64 MiB of backlog for each.
    fn serving(count: usize) -> Self {
        let mut world = Self::leading(config());
        world.depth_bytes = 64 * MIB * count as u64;
        world.observe();
        for id in world.started.clone() {
            world.beat(&id);
        }
        world.pass(1000);
        assert_eq!(world.serving_now(), count);
        world
    }

    fn step(&mut self) {
        for action in self.controller.step(self.now) {
            match action {
                Action::Decided(record) => assert_ne!(record.previous, record.target),
                Action::Start(id) => self.started.push(id),
                Action::Stop(id) => {
                    assert!(self.started.contains(&id), "stopped {id}, which was not started here");
                    self.stopped.push(id);
                }
                Action::Place(placement) => {
                    self.places += 1;
                    self.placement = placement.clone();
                    self.controller.placed(placement, self.now);
                }
            }
        }
    }

    fn observe(&mut self) {
        self.now += 1;
        if self.observable {
            let bytes = self.depth_bytes / u64::from(PARTITIONS);
            let depth = |partition| {
                let arrived = self.arrived.entry(partition).or_default();
                *arrived += self.inflow.get(&partition).copied().unwrap_or_default();
                let messages = bytes.div_ceil(MIB);
                PartitionDepth { messages, bytes, last_sequence: *arrived, ..PartitionDepth::default() }
            };
            let depths: Vec<_> = (0..PARTITIONS).map(depth).collect();
            self.controller.observed(&depths, self.now);
        }
        self.step();
    }

    fn placed_on(&self, id: &str) -> BTreeSet<Partition> {
        let holders = (0..).zip(&self.placement.partitions);
        holders.filter(|(_, p)| p.holder.as_deref() == Some(id)).map(|(index, _)| index).collect()
    }

    fn serving_now(&self) -> usize {
        self.invokers.keys().filter(|id| !self.placed_on(id).is_empty()).count()
    }

    /// One beat of an invoker, which then follows the placement.
    fn beat_as(&mut self, id: &str, state: InvokerState) {
        let held = self.invokers.entry(id.to_owned()).or_default().clone();
        let epoch = |partition: Partition| {
            self.placement.partitions.get(usize::from(partition)).map_or(0, |placed| placed.epoch)
        };
        let beat = InvokerBeat {
            invoker: id.to_owned(),
            state,
            partitions: held.into_iter().map(|partition| (partition, epoch(partition))).collect(),
            service_bytes_per_s: 200e6,
            busy: 0.1,
            held_messages: 0,
            held_bytes: 0,
            cpu_quota: 1.0,
            jobs: Vec::new(),
        };
        if self.controller.beat(beat, self.now) {
            self.step();
        }
        let placed = self.placed_on(id);
        self.invokers.insert(id.to_owned(), placed);
    }

    fn beat(&mut self, id: &str) {
        self.beat_as(id, InvokerState::Ready);
    }

    /// Lets time pass in ticks of 200 ms, with everybody who lives beating.
    fn pass(&mut self, millis: Millis) {
        for _ in 0..millis / 200 {
            self.now += 200;
            for id in self.invokers.keys().cloned().collect::<Vec<_>>() {
                self.beat(&id);
            }
            self.observe();
        }
    }

    fn holders(&self) -> BTreeSet<&str> {
        self.placement.partitions.iter().filter_map(|placed| placed.holder.as_deref()).collect()
    }
}

#[test]
fn the_first_work_starts_an_invoker_and_its_first_beat_places_everything() {
    let mut world = World::leading(config());
    world.pass(30_000);
    assert!(world.started.is_empty() && world.places == 0 && world.controller.is_asleep());
    assert!(world.controller.is_quiet());
    world.depth_bytes = 8;
    world.observe();
    assert!(!world.controller.is_quiet(), "something waits");
    world.depth_bytes = 0;
    world.observe();
    assert!(!world.controller.is_quiet(), "somebody comes");
    assert_eq!(world.started, ["auto-1"]);
    assert_eq!(world.places, 0);
    world.now += 70;
    world.beat("auto-1");
    assert_eq!((world.places, world.placed_on("auto-1").len()), (1, 8));
    assert!(world.controller.is_quiet());
}

#[test]
fn newcomers_wait_a_moment_for_each_other() {
    let mut world = World::leading(config());
    world.depth_bytes = 1 << 40;
    world.observe();
    assert_eq!(world.started.len(), 4);
    world.now += 100;
    world.beat("auto-1");
    assert_eq!((world.places, world.controller.wake_at()), (0, Some(world.now + SETTLE_MS)));
    for id in ["auto-2", "auto-3", "auto-4"] {
        world.now += 5;
        world.beat(id);
    }
    assert_eq!((world.places, world.holders().len()), (1, 4));
    assert_eq!(world.controller.wake_at(), None);

    // But not for ever.
    let mut world = World::leading(config());
    world.depth_bytes = 1 << 40;
    world.observe();
    world.beat("auto-1");
    world.now += SETTLE_MS;
    world.step();
    assert_eq!((world.places, world.holders().len()), (1, 1));
}

#[test]
fn partitions_are_exchanged_by_their_load() {
    let mut world = World::leading(Config { min_invokers: 2, max_invokers: 2, ..config() });
    world.depth_bytes = 8 * MIB;
    world.pass(200);
    for id in world.started.clone() {
        world.beat(&id);
    }
    world.pass(1000);
    let (placed, heavy) = (world.places, world.placed_on("auto-1"));
    assert_eq!(heavy.len(), 4);
    world.inflow = heavy.iter().map(|partition| (*partition, 10)).collect();
    world.pass(27_000);
    assert_eq!(world.places, placed, "not yet");
    world.pass(5000);
    assert_eq!(world.placed_on("auto-1").intersection(&heavy).count(), 2);
    assert_eq!((world.places, world.placed_on("auto-1").len()), (placed + 1, 4));
    world.pass(120_000);
    assert_eq!(world.places, placed + 1, "once is enough");

    // Where nobody has much to do, nothing moves; nor where it is not wanted.
    let uneven = world.placed_on("auto-1");
    world.inflow.clear();
    world.pass(60_000);
    world.inflow = uneven.iter().map(|partition| (*partition, 1)).collect();
    world.pass(120_000);
    assert_eq!(world.places, placed + 1);
    world.inflow = uneven.iter().map(|partition| (*partition, 10)).collect();
    let policy = Config { exchange_pause_ms: 0, min_invokers: 2, max_invokers: 2, ..config() };
    world.controller.set_policy(policy, world.now);
    world.pass(120_000);
    assert_eq!(world.places, placed + 1);
}

#[test]
fn a_retired_invoker_is_stopped_only_once_it_is_empty() {
    let mut world = World::serving(4);
    world.depth_bytes = 64 * MIB;
    while world.holders().len() > 1 {
        let before = world.stopped.len();
        world.now += 200;
        world.observe();
        assert_eq!(world.stopped.len(), before, "stopped before its beat showed that it is empty");
        for id in world.invokers.keys().cloned().collect::<Vec<_>>() {
            world.beat(&id);
        }
        assert!(world.now < 60_000);
    }
    world.pass(400);
    assert_eq!(world.stopped.len(), 3);
    assert!(!world.stopped.contains(&world.holders().pop_first().unwrap().to_owned()));

    // Whoever clings to its partitions is stopped in the end.
    let mut world = World::serving(2);
    world.depth_bytes = 0;
    for _ in 0..150 {
        world.now += 200;
        for id in world.started.clone() {
            let held = world.invokers[&id].clone();
            world.beat(&id);
            world.invokers.insert(id, held);
        }
        world.observe();
    }
    assert_eq!(world.stopped.len(), 2);
}

#[test]
fn returning_work_calls_the_retired_back() {
    let mut world = World::serving(2);
    world.depth_bytes = 1;
    while world.holders().len() > 1 {
        world.now += 200;
        world.observe();
        for id in ["auto-1", "auto-2"] {
            // Still holding, so still in use for a while.
            let held = world.invokers[id].clone();
            world.beat(id);
            world.invokers.insert(id.to_owned(), held);
        }
    }
    world.depth_bytes = 128 * MIB;
    world.observe();
    assert_eq!((world.started.len(), world.stopped.len(), world.holders().len()), (2, 0, 2));
}

#[test]
fn the_dead_are_replaced_at_once() {
    let mut world = World::serving(2);
    world.now += 200;
    world.invokers.remove("auto-1");
    world.controller.reaped(&["auto-1".to_owned()], world.now);
    world.observe();
    assert_eq!(world.placed_on("auto-2").len(), 8);
    // It was too young: that counts as a failed start, and the next one waits a little.
    assert_eq!(world.started.len(), 2);
    world.pass(200);
    assert_eq!(world.started.len(), 3);
    // A beat that was still on its way does not bring it back.
    let spare = world.controller.status().spare;
    world.beat("auto-1");
    assert_eq!(world.controller.status().spare, spare);
}

#[test]
fn a_draining_invoker_loses_its_partitions_with_that_beat() {
    let mut world = World::serving(2);
    world.beat_as("auto-1", InvokerState::Draining);
    assert_eq!((world.placed_on("auto-1").len(), world.placed_on("auto-2").len()), (0, 8));
    assert_eq!(world.started.len(), 3, "and somebody takes its place");
}

#[test]
fn silence_counts_only_while_observing_without_a_gap() {
    let mut world = World::serving(2);
    world.invokers.remove("auto-1");
    world.pass(2800);
    assert_eq!(world.holders().len(), 2);
    // An outage: nothing observed, nobody heard. Then everything is back, but for the silent one.
    let survivors = std::mem::take(&mut world.invokers);
    world.observable = false;
    let before = (world.started.len(), world.stopped.len(), world.places);
    world.pass(60_000);
    world.controller.interrupted(world.now);
    world.observable = true;
    world.pass(2800);
    assert_eq!((world.started.len(), world.stopped.len(), world.places), before);
    world.invokers = survivors;
    world.pass(600);
    assert_eq!(world.stopped, ["auto-1"], "it may be frozen, and its process is still there");
    assert_eq!(world.placed_on("auto-2").len(), 8);
    assert_eq!(world.started.len(), 3);
}

#[test]
fn holders_found_at_the_start_are_adopted_until_their_silence_is_known() {
    let placed = |holder: &str| PlacedPartition { epoch: 5, holder: Some(holder.to_owned()) };
    let found = Placement {
        partitions: (0..8).map(|i| placed(if i < 4 { "old-1" } else { "old-2" })).collect(),
        first: 0,
    };
    let mut world = World::with(config(), true);
    world.placement = found.clone();
    world.depth_bytes = 64 * MIB;
    world.invokers.insert("old-1".to_owned(), world.placed_on("old-1"));
    // Watching only: somebody else leads.
    world.pass(400);
    assert_eq!(world.places, 0);
    world.controller.lead(found, world.now);
    assert_eq!(world.controller.status().target, 2);
    world.pass(2400);
    assert_eq!((world.places, world.started.len()), (0, 0));
    world.pass(600);
    assert_eq!(world.holders(), BTreeSet::from(["old-1"]));
    assert_eq!(world.started.len(), 1, "the target is what was found until less has proved to be enough");
    assert!(world.placement.partitions.iter().all(|placed| placed.epoch >= 5));
}

#[test]
fn others_are_used_before_any_is_started_and_kept_longest() {
    let mut world = World::leading(config());
    for id in ["theirs-1", "theirs-2"] {
        world.beat(id);
    }
    world.observe();
    assert_eq!((world.places, world.controller.status().spare), (0, 2));
    world.depth_bytes = 3 * 64 * MIB;
    world.observe();
    world.now += SETTLE_MS;
    world.step();
    assert_eq!((world.started.len(), world.holders().len()), (1, 2));
    world.beat("auto-1");
    world.observe();
    assert_eq!(world.holders().len(), 3);
    world.depth_bytes = 64 * MIB;
    world.pass(15_000);
    assert_eq!(world.stopped, ["auto-1"]);
    assert_eq!((world.holders().len(), world.controller.status().spare), (1, 1));
}

#[test]
fn without_an_actuator_everybody_serves() {
    let mut world = World::with(config(), false);
    world.controller.lead(Placement::default(), 0);
    world.observe();
    for count in 1..=6 {
        world.beat(&format!("i{count}"));
        assert_eq!(world.holders().len(), count);
    }
    world.depth_bytes = 1 << 40;
    world.pass(30_000);
    world.depth_bytes = 0;
    world.pass(30_000);
    assert_eq!((world.holders().len(), world.started.len()), (6, 0));
    world.invokers.clear();
    world.pass(3400);
    assert_eq!(world.holders().len(), 0);
}

#[test]
fn failed_starts_back_off() {
    let mut world = World::leading(Config { max_invokers: 1, ..config() });
    world.depth_bytes = 8;
    for _ in 0..300 {
        world.pass(200);
        for id in world.started.clone() {
            world.controller.not_started(&id, world.now);
        }
    }
    // 60 s: after 0.1, 0.2, 0.4, ... 5, 5, 5 s, as far as ticks allow.
    assert!((12..=20).contains(&world.started.len()), "{}", world.started.len());
    // One that never beats is given up too.
    let mut world = World::leading(Config { max_invokers: 1, ..config() });
    world.depth_bytes = 8;
    world.pass(10_400);
    assert_eq!(world.stopped, ["auto-1"]);
    world.pass(200);
    assert_eq!(world.started.len(), 2);
}

#[test]
fn nothing_is_done_without_the_lease() {
    let mut world = World::serving(2);
    world.controller.lapsed();
    let before = (world.started.len(), world.stopped.len(), world.places);
    world.invokers.clear();
    world.depth_bytes = 0;
    world.pass(60_000);
    assert_eq!((world.started.len(), world.stopped.len(), world.places), before);
}

#[test]
fn a_standby_stops_its_own_invokers_once_the_leader_does_not_use_them() {
    let mut world = World::serving(2);
    let (used, unused) = (world.started[0].clone(), world.started[1].clone());
    world.controller.lapsed();
    world.beat("theirs");
    // The new leader leaves one without partitions.
    world.invokers.insert(unused.clone(), BTreeSet::new());
    for _ in 0..11 {
        world.now += 1000;
        let epoch = |partition: Partition| (partition, 1);
        for (id, partitions) in [(&used, vec![epoch(0)]), (&unused, Vec::new())] {
            let beat = InvokerBeat {
                invoker: id.clone(),
                state: InvokerState::Ready,
                partitions,
                service_bytes_per_s: 0.0,
                busy: 0.0,
                held_messages: 0,
                held_bytes: 0,
                cpu_quota: 1.0,
                jobs: Vec::new(),
            };
            world.controller.beat(beat, world.now);
        }
        world.step();
    }
    assert_eq!(world.stopped, [unused]);
}

#[test]
fn handing_over_takes_the_partitions_from_our_own() {
    let mut world = World::serving(2);
    let placement = world.controller.hand_over(world.now).unwrap();
    assert!(placement.partitions.iter().all(|placed| placed.holder.is_none()));
    assert!(world.controller.step(world.now).is_empty());
    let mut world = World::serving(1);
    world.beat("theirs");
    let placement = world.controller.hand_over(world.now).unwrap();
    assert!(placement.partitions.iter().all(|placed| placed.holder.as_deref() == Some("theirs")));
}

#[path = "controller_faults.rs"]
mod faults;

#[test]
fn another_policy_is_followed_with_the_next_step() {
    let mut world = World::serving(2);
    let policy = Config { min_invokers: 3, max_invokers: 3, ..config() };
    world.controller.set_policy(policy, world.now);
    world.step();
    assert_eq!(world.started.len(), 3);
    let policy = Config { max_invokers: 1, ..config() };
    world.controller.set_policy(policy, world.now);
    world.pass(1000);
    assert_eq!(world.holders().len(), 1);
}

#[test]
fn a_longer_window_is_not_judged_by_what_a_shorter_one_has_kept() {
    let mut world = World::serving(4);
    world.pass(5000);
    world.depth_bytes = 64 * MIB;
    world.pass(9000);
    // Of the time before the last ten seconds nothing is known any more, so the new window begins now.
    let policy = Config { shrink_window_ms: 20_000, ..config() };
    world.controller.set_policy(policy, world.now);
    world.pass(19_000);
    assert_eq!(world.holders().len(), 4);
    world.pass(2000);
    assert_eq!(world.holders().len(), 1);
}

#[test]
fn a_new_default_rate_counts_until_a_rate_was_measured() {
    let slow = Config { default_service_mb_per_s: 1.0, ..config() };
    let mut world = World::leading(config());
    world.controller.set_policy(slow.clone(), world.now);
    world.depth_bytes = 64 * MIB;
    world.observe();
    assert_eq!(world.started.len(), 4, "64 MiB are much for 1 MB/s");

    let mut world = World::serving(1);
    world.controller.set_policy(slow, world.now);
    world.pass(2000);
    assert_eq!(world.started.len(), 1, "200 MB/s were measured");
}

#[test]
fn what_is_fixed_at_the_start_stays() {
    let running = config();
    let lease = thalweg_broker::LeaseConfig { term_ms: 1, ..running.lease };
    let read = Config { min_invokers: 1, drain_timeout_ms: 1, drain_on_shutdown: false, lease, ..config() };
    assert_eq!(read.keeping_fixed(&running), Config { min_invokers: 1, ..running });
}

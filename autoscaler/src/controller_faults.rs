use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Fault {
    Pass(Millis),
    Depth(u64),
    Outage(Millis),
    /// Nth invoker: ends, is reaped.
    Kill(usize),
    /// Nth invoker: never heard again, its process stays.
    Freeze(usize),
    Drain(usize),
    Join(u8),
    LoseLease(Millis),
    /// Started ones come up.
    ComeUp,
}

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let fault = prop_oneof![
        4 => (200_u64..8000).prop_map(Fault::Pass),
        2 => prop_oneof![Just(0), 1..(1_u64 << 30)].prop_map(Fault::Depth),
        1 => (200_u64..8000).prop_map(Fault::Outage),
        1 => any::<usize>().prop_map(Fault::Kill),
        1 => any::<usize>().prop_map(Fault::Freeze),
        1 => any::<usize>().prop_map(Fault::Drain),
        1 => (0_u8..4).prop_map(Fault::Join),
        1 => (200_u64..8000).prop_map(Fault::LoseLease),
        4 => Just(Fault::ComeUp),
    ];
    prop::collection::vec(fault, 0..40)
}

impl World {
    fn come_up(&mut self, gone: &BTreeSet<String>) {
        for id in self.started.clone() {
            if !gone.contains(&id) && !self.stopped.contains(&id) && !self.invokers.contains_key(&id) {
                self.beat(&id);
            }
        }
    }

    /// Stopped invokers end and are reaped.
    fn end_stopped(&mut self, gone: &mut BTreeSet<String>) {
        for id in std::mem::take(&mut self.stopped) {
            self.invokers.remove(&id);
            gone.insert(id.clone());
            self.controller.reaped(&[id], self.now);
        }
    }

    fn suffer(&mut self, fault: Fault, gone: &mut BTreeSet<String>) {
        let nth = |world: &Self, n: usize| {
            let ids: Vec<_> = world.invokers.keys().cloned().collect();
            (!ids.is_empty()).then(|| ids[n % ids.len()].clone())
        };
        match fault {
            Fault::Pass(millis) => self.pass(millis),
            Fault::Depth(bytes) => self.depth_bytes = bytes,
            Fault::Outage(millis) => {
                let heard = std::mem::take(&mut self.invokers);
                self.observable = false;
                self.pass(millis);
                (self.observable, self.invokers) = (true, heard);
            }
            Fault::Kill(n) => {
                if let Some(id) = nth(self, n) {
                    self.invokers.remove(&id);
                    gone.insert(id.clone());
                    if self.started.contains(&id) {
                        self.controller.reaped(&[id], self.now);
                    }
                }
            }
            Fault::Freeze(n) => {
                if let Some(id) = nth(self, n) {
                    self.invokers.remove(&id);
                    gone.insert(id);
                }
            }
            Fault::Drain(n) => {
                if let Some(id) = nth(self, n) {
                    self.beat_as(&id, InvokerState::Draining);
                    self.invokers.remove(&id);
                    gone.insert(id);
                }
            }
            Fault::Join(n) => self.beat(&format!("theirs-{n}")),
            Fault::LoseLease(millis) => {
                self.controller.lapsed();
                self.pass(millis);
                self.controller.lead(self.placement.clone(), self.now);
            }
            Fault::ComeUp => self.come_up(gone),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever happens: epochs never go back, nobody else's invoker is stopped (asserted in `step`); and
    /// once it is over, the backlog is served by as many as there should be, who are all alive.
    #[test]
    fn the_controller_recovers_from_anything(faults in faults()) {
        let mut world = World::leading(Config { catch_up_ms: 350, ..Config::default() });
        let mut gone = BTreeSet::new();
        let mut epochs = vec![0; usize::from(PARTITIONS)];
        for fault in faults {
            world.suffer(fault, &mut gone);
            world.end_stopped(&mut gone);
            for (epoch, placed) in epochs.iter_mut().zip(&world.placement.partitions) {
                prop_assert!(placed.epoch >= *epoch);
                *epoch = placed.epoch;
            }
        }
        world.depth_bytes = 2 * 64 * MIB;
        for _ in 0..200 {
            world.come_up(&gone);
            world.pass(200);
            world.end_stopped(&mut gone);
        }
        prop_assert_eq!(world.controller.status().target, 2);
        prop_assert_eq!(world.holders().len(), 2);
        prop_assert!(world.holders().iter().all(|id| world.invokers.contains_key(*id)));
        prop_assert!(world.placement.partitions.iter().all(|placed| placed.holder.is_some()));
        let settled = world.placement.clone();
        world.pass(10_000);
        prop_assert_eq!(&world.placement, &settled);
    }
}

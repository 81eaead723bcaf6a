//! What [`Actuator`] promises, checked on whatever implements it, with invokers that do real work.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use thalweg_autoscaler::Actuator;
use thalweg_protocol::{InvokerBeat, InvokerState, Kind, frame, subjects};

use crate::{PATIENCE, cluster::Cluster, eventually};

/// What can be expected beyond the trait's word.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traits {
    /// Its invokers are processes of this machine, so that they can be killed and counted.
    pub processes: bool,
}

/// The newest heartbeat of every invoker.
struct Beats {
    subscription: async_nats::Subscriber,
    newest: BTreeMap<String, (Instant, InvokerBeat)>,
}

impl Beats {
    async fn listen(cluster: &Cluster) -> Self {
        let client = crate::connect(cluster.url()).await.client;
        let subscription = client.subscribe(subjects::invoker_beats(None)).await.expect("subscribed");
        client.flush().await.expect("flushed");
        Self { subscription, newest: BTreeMap::new() }
    }

    fn take_in(&mut self) {
        use futures::{FutureExt as _, StreamExt as _};
        while let Some(Some(message)) = self.subscription.next().now_or_never() {
            let (beat, _) = frame::open::<InvokerBeat>(Kind::Beat, &message.payload).expect("a heartbeat");
            self.newest.insert(beat.invoker.clone(), (Instant::now(), beat));
        }
    }

    fn of(&mut self, id: &str) -> Option<&InvokerBeat> {
        self.take_in();
        self.newest.get(id).map(|(_, beat)| beat)
    }

    /// Waits for the last word of an invoker that has ended: that it held nothing any more.
    async fn drained(&mut self, id: &str) {
        eventually(&format!("{id} to have said that it is drained"), async || {
            self.of(id).is_some_and(|last| last.state == InvokerState::Draining && last.partitions.is_empty())
        })
        .await;
    }

    /// Waits until `id` has partitions and nothing ends meanwhile.
    async fn serving(&mut self, actuator: &mut dyn Actuator, id: &str) {
        eventually(&format!("{id} to beat and to be given partitions"), async || {
            assert!(actuator.reap().await.is_empty(), "nothing was stopped");
            self.of(id).is_some_and(|beat| !beat.partitions.is_empty())
        })
        .await;
    }
}

/// Every invoker that `actuator` says has ended, until it names one.
async fn reaped(actuator: &mut dyn Actuator) -> Vec<String> {
    let mut ended = Vec::new();
    eventually("an invoker to end", async || {
        ended = actuator.reap().await;
        !ended.is_empty()
    })
    .await;
    ended
}

/// Process ids of the invokers called `id` on this machine, in containers or not.
#[must_use]
pub fn processes_of(id: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let is_it = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let args: Vec<_> = line.split(|byte| *byte == 0).collect();
        args.contains(&&b"invoker"[..]) && args.windows(2).any(|pair| pair == [b"--id", id.as_bytes()])
    };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(is_it).collect()
}

/// Kills processes with SIGKILL, all at once.
///
/// # Panics
/// When one of them is not there.
pub fn kill(pids: &[u32]) {
    assert!(!pids.is_empty(), "there is somebody to kill");
    let killed =
        std::process::Command::new("kill").arg("-KILL").args(pids.iter().map(u32::to_string)).status();
    assert!(killed.is_ok_and(|status| status.success()), "{pids:?} can be killed");
}

/// Checks what the trait promises of an actuator that can start invokers. `cluster` has none of its own, and its
/// autoscaler places partitions on whoever beats. The drain timeout of `actuator` is to be longer than
/// [`PATIENCE`], so that whoever is not told to stop is noticed.
///
/// # Panics
/// When a promise is broken.
pub async fn conforms(actuator: &mut dyn Actuator, cluster: &Cluster, traits: Traits) {
    assert!(actuator.starts());
    let mut beats = Beats::listen(cluster).await;
    let [a, b, c] = ["a", "b", "c"].map(|name| format!("conforms-{name}-{:08x}", rand::random::<u32>()));

    for id in [&a, &b] {
        actuator.start(id).await.expect("started");
    }
    for id in [&a, &b] {
        beats.serving(actuator, id).await;
    }

    // Whom nobody knows is nobody's loss, and twice is as good as once.
    actuator.stop("nobody").await;
    let begun = Instant::now();
    actuator.stop(&a).await;
    assert!(begun.elapsed() < PATIENCE / 3, "a stop does not wait for the end");
    actuator.stop(&a).await;
    assert_eq!(reaped(actuator).await, [a.as_str()], "the one that was stopped has ended");
    actuator.stop(&a).await;
    beats.drained(&a).await;
    if traits.processes {
        assert!(processes_of(&a).is_empty(), "its process is gone");
    }
    let heard = Instant::now();
    eventually("the other one to go on", async || {
        assert!(actuator.reap().await.is_empty(), "each is named once, and {b} was not stopped");
        beats.take_in();
        beats.newest[&b].0 > heard
    })
    .await;

    // Those that end by themselves are named as well.
    if traits.processes {
        kill(&processes_of(&b));
        assert_eq!(reaped(actuator).await, [b.as_str()]);
        actuator.stop(&b).await;
    }

    actuator.start(&c).await.expect("started");
    beats.serving(actuator, &c).await;
    actuator.stop_all().await;
    beats.drained(&c).await;
    let left: BTreeSet<_> = actuator.reap().await.into_iter().collect();
    assert!(left.is_subset(&[b.clone(), c.clone()].into()), "{left:?}");
    if traits.processes {
        assert!([&a, &b, &c].iter().all(|id| processes_of(id).is_empty()), "nothing is left");
    }
    assert!(actuator.reap().await.is_empty());
}

/// Checks that an invoker that cannot work is an error when it is started, or ends soon; returns the error.
///
/// # Panics
/// When it seems to run.
pub async fn refuses(actuator: &mut dyn Actuator) -> Option<String> {
    let id = format!("refuses-{:08x}", rand::random::<u32>());
    match actuator.start(&id).await {
        Ok(()) => {
            assert_eq!(reaped(actuator).await, [id.as_str()]);
            None
        }
        Err(error) => {
            assert_eq!(error.id, id);
            assert!(actuator.reap().await.is_empty(), "what was not started does not end");
            actuator.stop(&id).await;
            Some(error.to_string())
        }
    }
}

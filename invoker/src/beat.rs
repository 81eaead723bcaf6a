//! What an invoker tells about itself.

use std::time::{Duration, Instant};

use thalweg_protocol::{Epoch, InvokerBeat, InvokerState, Partition};

/// Measures how busy an invoker is and how fast it serves while busy.
#[derive(Debug)]
pub(crate) struct Busyness {
    since: Instant,
    busy: Duration,
    busy_from: Option<Instant>,
    folded: u64,
    rate: f64,
}

/// Weight of the newest measurement in the service rate.
const SMOOTHING: f64 = 0.3;

impl Busyness {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), busy: Duration::ZERO, busy_from: None, folded: 0, rate: 0.0 }
    }

    /// Notes whether there is work under way from now on.
    pub(crate) fn set(&mut self, busy: bool) {
        match (busy, self.busy_from) {
            (true, None) => self.busy_from = Some(Instant::now()),
            (false, Some(from)) => {
                self.busy += from.elapsed();
                self.busy_from = None;
            }
            _ => {}
        }
    }

    /// Notes bytes of contributions folded.
    pub(crate) fn folded(&mut self, bytes: u64) {
        self.folded += bytes;
    }

    /// Share of time busy since the last call, and the service rate in bytes per busy second.
    fn take(&mut self) -> (f64, f64) {
        if let Some(from) = self.busy_from.replace(Instant::now()) {
            self.busy += from.elapsed();
        } else {
            self.busy_from = None;
        }
        let elapsed = self.since.elapsed().as_secs_f64().max(1e-9);
        let busy = self.busy.as_secs_f64();
        if self.folded > 0 && busy > 0.0 {
            let measured = self.folded as f64 / busy;
            self.rate =
                if self.rate == 0.0 { measured } else { self.rate + SMOOTHING * (measured - self.rate) };
        }
        (self.since, self.busy, self.folded) = (Instant::now(), Duration::ZERO, 0);
        ((busy / elapsed).min(1.0), self.rate)
    }

    /// The beat of this moment.
    pub(crate) fn beat(
        &mut self,
        invoker: &str,
        state: InvokerState,
        partitions: Vec<(Partition, Epoch)>,
        held: (usize, usize),
        cpu_quota: f64,
    ) -> InvokerBeat {
        let was_busy = self.busy_from.is_some();
        let (busy, service_bytes_per_s) = self.take();
        if !was_busy {
            self.busy_from = None;
        }
        InvokerBeat {
            invoker: invoker.to_owned(),
            state,
            partitions,
            service_bytes_per_s,
            busy,
            held_messages: held.0 as u64,
            held_bytes: held.1 as u64,
            cpu_quota,
        }
    }
}

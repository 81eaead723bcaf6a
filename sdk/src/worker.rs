//! A worker: pushing tensors, pulling results.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures::{StreamExt as _, TryStreamExt as _};
use thalweg_protocol::{
    FrameBuilder, GradientHeader, Head, JobRecord, Kind, NonFinite, Rank, ShardIndex, Version, WireError,
    WorkerRef, offsets,
};
use tokio_util::sync::CancellationToken;

use crate::{
    Client, Element, Error,
    driver::{Shared, fetch, lock},
};

/// Bytes copied and not yet sent that a push tolerates before it waits.
const UNSENT_BYTES: u64 = 64 << 20;
/// Shards on their way at once when parameters are read.
const FETCHED_AT_ONCE: usize = 8;

/// A member of a job. Dropped without [`Worker::leave`], its rank falls back when its lease ends.
#[derive(Debug)]
pub struct Worker {
    client: Client,
    record: Arc<JobRecord>,
    worker: WorkerRef,
    shared: Arc<Shared>,
    stop: CancellationToken,
    weight: f32,
    by_name: HashMap<String, usize>,
    /// First element of each tensor, and the end.
    starts: Vec<u64>,
    pushed: Vec<bool>,
    pulled: Vec<bool>,
    /// Frames under construction, with the elements still missing.
    building: HashMap<ShardIndex, (FrameBuilder, usize)>,
    /// Tensors of each shard's results that were not pulled yet.
    unpulled: HashMap<ShardIndex, usize>,
    /// Rounds that were finished last, with their roster: to tell what has changed since the one before.
    rosters: [(Version, u64); 2],
}

/// A finished round.
#[derive(Clone, Debug)]
pub struct Round {
    /// Its number. It only ever grows; it skips numbers when others went on without this worker
    /// ([`Round::superseded`]).
    pub round: Version,
    /// Contributions counted: the least over all shards.
    pub contributors: usize,
    /// Whether this worker's contribution was counted in all shards.
    pub counted: bool,
    /// Others closed rounds without this worker; the tensors are those of the newest one.
    pub superseded: bool,
    /// Roster that closed it: the newest of any shard. It grows when workers join or leave.
    pub roster_epoch: u64,
    /// Whether that is another roster than the one of this worker's round before: somebody has joined or left
    /// ([`Client::job`] tells who is there).
    pub roster_changed: bool,
    /// Number of the settings that it was folded with, 0 for those of the job's creation
    /// ([`Client::set_settings`]).
    pub settings_revision: u32,
    /// Why this worker's contribution was taken as void, if somebody said so.
    pub advice: Option<WireError>,
    /// Results in the order of the tensors that were pushed (only from [`Worker::push_pull`]).
    pub tensors: Vec<Vec<f32>>,
}

impl Worker {
    pub(crate) fn new(
        client: Client,
        record: Arc<JobRecord>,
        worker: WorkerRef,
        shared: Arc<Shared>,
        stop: CancellationToken,
    ) -> Self {
        let names = record.spec.tensors.iter().enumerate();
        let tensors = record.spec.tensors.len();
        Self {
            by_name: names.map(|(index, tensor)| (tensor.name.clone(), index)).collect(),
            starts: offsets(&record.spec.tensors),
            pushed: vec![false; tensors],
            pulled: vec![false; tensors],
            building: HashMap::new(),
            unpulled: HashMap::new(),
            rosters: [(0, 0); 2],
            weight: 1.0,
            client,
            record,
            worker,
            shared,
            stop,
        }
    }

    /// The rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.worker.rank
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> &JobRecord {
        &self.record
    }

    /// The round that is being pushed; once it is complete, the one that the next push begins.
    #[must_use]
    pub fn round(&self) -> Version {
        let engine = self.shared.engine();
        if engine.is_complete() { engine.target() + 1 } else { engine.round() }
    }

    /// Bytes sent to and received from the broker: messages with their headers, resends included.
    #[must_use]
    pub fn traffic(&self) -> (u64, u64) {
        (self.shared.sent_bytes.load(Ordering::Relaxed), self.shared.received_bytes.load(Ordering::Relaxed))
    }

    /// Weight of this worker's contributions from the next push on, for `weighted_mean`: the number of
    /// samples, say. Default 1.
    pub fn set_weight(&mut self, weight: f32) {
        self.weight = weight;
    }

    /// Reads the parameters that the service holds, by tensor in the job's order: what a worker that
    /// joins starts from. Call it before the first push; all shards stand right before this worker's
    /// first round then, and cannot move without it.
    ///
    /// # Errors
    /// [`Error::Refused`] when the job is over.
    pub async fn parameters(&self) -> Result<Vec<Vec<f32>>, Error> {
        let mut flat = Vec::with_capacity(usize::try_from(self.record.layout.elements).unwrap_or(0));
        let shards = futures::stream::iter(0..self.record.layout.shards());
        let mut shards = shards.map(|shard| self.shard_parameters(shard)).buffered(FETCHED_AT_ONCE);
        while let Some(values) = shards.try_next().await? {
            flat.extend(values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
        Ok(self
            .starts
            .windows(2)
            .map(|bounds| flat[bounds[0] as usize..bounds[1] as usize].to_vec())
            .collect())
    }

    async fn shard_parameters(&self, shard: ShardIndex) -> Result<bytes::Bytes, Error> {
        loop {
            match fetch(self.client.nats(), &self.record, shard).await {
                Ok((_, _, values)) => return Ok(values),
                Err(error) if error.is_retryable() => {
                    self.check()?;
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Pushes all tensors of one round and waits for their results.
    ///
    /// `gradients` names every tensor of the job once, in any order. With policy `void`, a NaN or an
    /// infinity anywhere makes the whole contribution void, on all shards alike.
    ///
    /// Cancel safe only in that nothing is lost or counted twice: the round stays pushed, and its results
    /// have to be pulled with [`Worker::pull`] before the next one.
    ///
    /// # Errors
    /// [`Error::Refused`] when the job is over or this worker has lost its rank; the others for wrong
    /// arguments, before anything is sent.
    pub async fn push_pull(&mut self, gradients: &[(&str, &[f32])]) -> Result<Round, Error> {
        for (name, values) in gradients {
            self.check_tensor(name, values.len())?;
        }
        let given: std::collections::HashSet<_> = gradients.iter().map(|(name, _)| *name).collect();
        if let Some(missing) =
            self.record.spec.tensors.iter().find(|tensor| !given.contains(tensor.name.as_str()))
        {
            return Err(Error::NeverEnds { waiting: "the round".to_owned(), missing: missing.name.clone() });
        }
        let non_finite = self.record.spec.non_finite == NonFinite::Void
            && gradients.iter().any(|(_, values)| values.iter().any(|value| !value.is_finite()));
        if non_finite {
            self.push_void().await?;
        } else {
            for (name, values) in gradients {
                self.push(name, values).await?;
            }
        }
        let mut round = self.finish().await?;
        for (name, values) in gradients {
            let mut tensor = vec![0.0; values.len()];
            self.pull(name, &mut tensor).await?;
            round.tensors.push(tensor);
        }
        Ok(round)
    }

    /// Contributes nothing to this round on any shard, so that it need not wait for this worker.
    ///
    /// # Errors
    /// As [`Worker::push_pull`]; [`Error::AlreadyPushed`] when a tensor of this round was pushed.
    pub async fn skip(&mut self) -> Result<Round, Error> {
        self.push_void().await?;
        self.finish().await
    }

    /// Contributes nothing to this round, as [`Worker::skip`] does, and does not wait for its end: as
    /// [`Worker::push`] of every tensor.
    ///
    /// # Errors
    /// As [`Worker::skip`].
    pub async fn push_void(&mut self) -> Result<(), Error> {
        // Before waiting: a round that lacks tensors would never end.
        if let Some(tensor) = self.pushed.iter().position(|pushed| *pushed)
            && !self.pushed.iter().all(|pushed| *pushed)
        {
            return Err(Error::AlreadyPushed(self.record.spec.tensors[tensor].name.clone()));
        }
        self.begin_round().await?;
        self.pushed.fill(true);
        for shard in 0..self.record.layout.shards() {
            let Some(frame) = self.frame(shard, true) else { continue };
            let mut engine = self.shared.engine();
            let actions = engine.push(shard, frame.finish(), Instant::now());
            drop(engine);
            self.shared.act(actions);
        }
        Ok(())
    }

    /// Pushes one tensor. Copies it into the messages and returns; waits only while more than 64 MiB are
    /// copied and unsent. The first push of a round waits until the round before is complete.
    ///
    /// Cancel safe: a cancelled push has pushed nothing, or all of the tensor.
    ///
    /// # Errors
    /// As [`Worker::push_pull`]; [`Error::NeverEnds`] when the round before lacks a tensor.
    pub async fn push<T: Element>(&mut self, name: &str, values: &[T]) -> Result<(), Error> {
        let tensor = self.check_tensor(name, values.len())?;
        if self.pushed[tensor] {
            if let Some(missing) = self.pushed.iter().position(|pushed| !pushed) {
                let missing = self.record.spec.tensors[missing].name.clone();
                return Err(Error::NeverEnds {
                    waiting: format!("the round before this push of {name}"),
                    missing,
                });
            }
            self.begin_round().await?;
        }
        self.wait_for_room().await?;
        let range = self.starts[tensor]..self.starts[tensor + 1];
        for shard in self.record.layout.shards_of(&range) {
            let bounds = self.record.layout.range(shard);
            let (start, end) = (range.start.max(bounds.start), range.end.min(bounds.end));
            let source = &values[(start - range.start) as usize..(end - range.start) as usize];
            if !self.building.contains_key(&shard) {
                // Late for this shard: others have closed the round already.
                let Some(frame) = self.frame(shard, false) else { continue };
                self.building.insert(shard, (frame, self.record.layout.len(shard)));
            }
            let Some((frame, missing)) = self.building.get_mut(&shard) else { continue };
            let offset = (start - bounds.start) as usize * 4;
            let target = &mut frame.payload_mut()[offset..offset + source.len() * 4];
            for (bytes, value) in target.as_chunks_mut::<4>().0.iter_mut().zip(source) {
                *bytes = value.to_f32().to_le_bytes();
            }
            *missing -= source.len();
            if *missing == 0
                && let Some((frame, _)) = self.building.remove(&shard)
            {
                let mut engine = self.shared.engine();
                let actions = engine.push(shard, frame.finish(), Instant::now());
                drop(engine);
                self.shared.act(actions);
            }
        }
        self.pushed[tensor] = true;
        // Lets the frames go out while they are in the cache, where one thread does it all.
        tokio::task::yield_now().await;
        Ok(())
    }

    /// A frame for this round's contribution; `None` when the shard has moved on already.
    fn frame(&self, shard: ShardIndex, void: bool) -> Option<FrameBuilder> {
        let mut engine = self.shared.engine();
        let Head { version, state_id, .. } = engine.head(shard)?;
        let round = engine.round();
        if version >= round {
            return None;
        }
        let elements = self.record.layout.len(shard);
        let header = GradientHeader {
            job: self.worker.job,
            shard,
            round,
            worker: self.worker.incarnation,
            rank: self.worker.rank,
            roster_epoch: engine.roster_epoch(),
            base: state_id,
            weight: self.weight,
            void,
            elements: u32::try_from(elements).unwrap_or(u32::MAX),
        };
        if void {
            return Some(FrameBuilder::new(Kind::Gradient, &header, 0));
        }
        // Every element is written before the frame is finished, so what the memory held before never shows.
        Some(FrameBuilder::reusing(engine.buffer(), Kind::Gradient, &header, elements * 4))
    }

    /// Waits for a tensor's result and copies it into `values`. A tensor can be pulled once a round.
    ///
    /// Cancel safe: a cancelled pull has pulled nothing.
    ///
    /// # Errors
    /// As [`Worker::push_pull`]; [`Error::NeverEnds`] names a tensor that has to be pushed before.
    pub async fn pull<T: Element>(&mut self, name: &str, values: &mut [T]) -> Result<(), Error> {
        let tensor = self.check_tensor(name, values.len())?;
        if self.pulled[tensor] {
            return Err(Error::AlreadyPulled(name.to_owned()));
        }
        let range = self.starts[tensor]..self.starts[tensor + 1];
        let shards = self.record.layout.shards_of(&range);
        self.check_order(name, &shards)?;
        self.wait_until(|engine| shards.clone().all(|shard| engine.shard_result(shard).is_some())).await?;
        for shard in shards {
            let bounds = self.record.layout.range(shard);
            let (start, end) = (range.start.max(bounds.start), range.end.min(bounds.end));
            let Some(result) = self.shared.engine().shard_result(shard) else { continue };
            let offset = (start - bounds.start) as usize * 4;
            let source = &result.values[offset..offset + (end - start) as usize * 4];
            let target = &mut values[(start - range.start) as usize..(end - range.start) as usize];
            for (value, bytes) in target.iter_mut().zip(source.as_chunks::<4>().0) {
                *value = T::from_f32(f32::from_le_bytes(*bytes));
            }
            let left = self.unpulled.entry(shard).or_insert_with(|| tensors_in(&self.starts, &bounds));
            *left -= 1;
            if *left == 0 {
                // Everybody has copied what they wanted: a model need not be held twice.
                self.shared.engine().release(shard);
            }
        }
        self.pulled[tensor] = true;
        Ok(())
    }

    /// Waits until the round is complete on all shards and tells about it. Results can be pulled before
    /// and after, until the next push.
    ///
    /// # Errors
    /// As [`Worker::pull`].
    pub async fn finish(&mut self) -> Result<Round, Error> {
        if let Some(missing) = self.pushed.iter().position(|pushed| !pushed) {
            let missing = self.record.spec.tensors[missing].name.clone();
            return Err(Error::NeverEnds { waiting: "the round".to_owned(), missing });
        }
        self.wait_until(crate::engine::Engine::is_complete).await?;
        let engine = self.shared.engine();
        let ledgers = || (0..self.record.layout.shards()).filter_map(|shard| engine.shard_result(shard));
        let roster_epoch = ledgers().map(|result| result.ledger.roster_epoch).max().unwrap_or(0);
        if self.rosters[1].0 < engine.target() {
            self.rosters = [self.rosters[1], (engine.target(), roster_epoch)];
        }
        Ok(Round {
            roster_epoch,
            roster_changed: self.rosters[0].0 > 0 && self.rosters[0].1 != roster_epoch,
            settings_revision: ledgers().map(|result| result.ledger.revision).max().unwrap_or(0),
            round: engine.target(),
            contributors: ledgers().map(|result| result.ledger.counted.len()).min().unwrap_or(0),
            counted: ledgers().all(|result| result.ledger.counted.contains(self.worker.rank)),
            superseded: engine.target() > engine.round(),
            advice: engine.advice().cloned(),
            tensors: Vec::new(),
        })
    }

    /// Why the job is paused, if it is: rounds then wait until somebody resumes it.
    #[must_use]
    pub fn paused(&self) -> Option<String> {
        lock(&self.shared.paused).clone()
    }

    /// Ledgers of the round by shard, for those who keep books: (shard, version, counted ranks in the order in which
    /// they were folded).
    #[must_use]
    pub fn ledgers(&self) -> Vec<(ShardIndex, Version, Vec<Rank>)> {
        let engine = self.shared.engine();
        (0..self.record.layout.shards())
            .filter_map(|shard| {
                let result = engine.shard_result(shard)?;
                let ledger = &result.ledger;
                let by_arrival = !ledger.order.is_empty();
                let counted = if by_arrival { ledger.order.clone() } else { ledger.counted.iter().collect() };
                Some((shard, result.head.version, counted))
            })
            .collect()
    }

    /// Gives the rank back. Rounds that are open no longer wait for this worker.
    ///
    /// # Errors
    /// When no gateway answers; the rank then falls back with its lease.
    pub async fn leave(self) -> Result<(), Error> {
        let left = self.client.leave(&self.worker).await;
        self.stop.cancel();
        left
    }

    /// Begins the next round if this one was pushed; waits for its end.
    async fn begin_round(&mut self) -> Result<(), Error> {
        if self.pushed.iter().any(|pushed| *pushed) {
            self.wait_until(crate::engine::Engine::is_complete).await?;
            self.shared.engine().advance();
            self.pushed.fill(false);
            self.pulled.fill(false);
            self.unpulled.clear();
        }
        Ok(())
    }

    fn check_tensor(&self, name: &str, len: usize) -> Result<usize, Error> {
        let tensor = *self.by_name.get(name).ok_or_else(|| Error::UnknownTensor(name.to_owned()))?;
        let expected = (self.starts[tensor + 1] - self.starts[tensor]) as usize;
        if len == expected {
            Ok(tensor)
        } else {
            Err(Error::Shape { tensor: name.to_owned(), expected, actual: len })
        }
    }

    fn check(&self) -> Result<(), Error> {
        self.shared.engine().failure().map_or(Ok(()), |error| Err(error.clone().into()))
    }

    /// Fails a wait that could never end, naming what is missing (rule P20).
    fn check_order(&self, name: &str, shards: &Range<ShardIndex>) -> Result<(), Error> {
        let missing_in = |shards: Range<ShardIndex>| {
            let engine = self.shared.engine();
            let open = shards.into_iter().find(|shard| !engine.is_pushed(*shard))?;
            let bounds = self.record.layout.range(open);
            let first = self.starts.partition_point(|start| *start <= bounds.start) - 1;
            (first..self.pushed.len())
                .take_while(|tensor| self.starts[*tensor] < bounds.end)
                .find(|tensor| !self.pushed[*tensor])
        };
        let any_order = self.shared.engine().any_order();
        let missing =
            missing_in(shards.clone()).or_else(|| if any_order { None } else { missing_in(0..shards.start) });
        match missing {
            Some(tensor) => {
                let missing = self.record.spec.tensors[tensor].name.clone();
                Err(Error::NeverEnds { waiting: name.to_owned(), missing })
            }
            None => Ok(()),
        }
    }

    /// Waits while too much is copied and unsent, unless only a further push can get things moving.
    async fn wait_for_room(&self) -> Result<(), Error> {
        self.wait_for(&self.shared.sent, |engine| {
            let stuck = engine.lowest_missing().is_some_and(|lowest| !engine.is_pushed(lowest));
            stuck || engine.unsent_bytes() < UNSENT_BYTES
        })
        .await
    }

    async fn wait_until(&self, ready: impl Fn(&crate::engine::Engine) -> bool) -> Result<(), Error> {
        self.wait_for(&self.shared.changed, ready).await
    }

    async fn wait_for(
        &self,
        notify: &tokio::sync::Notify,
        ready: impl Fn(&crate::engine::Engine) -> bool,
    ) -> Result<(), Error> {
        loop {
            let changed = notify.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change in between is missed.
            changed.as_mut().enable();
            {
                let engine = self.shared.engine();
                if let Some(error) = engine.failure() {
                    return Err(error.clone().into());
                }
                if ready(&engine) {
                    return Ok(());
                }
            }
            changed.await;
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Number of tensors with an element in `bounds`.
fn tensors_in(starts: &[u64], bounds: &Range<u64>) -> usize {
    let first = starts.partition_point(|start| *start <= bounds.start) - 1;
    starts[first..starts.len() - 1].iter().take_while(|start| **start < bounds.end).count()
}

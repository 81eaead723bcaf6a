//! Claims of one job's ranks, together: those that come while others are being written wait for each other, and go
//! into the roster in one write. It is written whole each time, and may have thousands of members.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use thalweg_protocol::{Claim, ErrorCode, Incarnation, JobKey, JobRecord, Roster, WireError};
use tokio::sync::oneshot;

/// What a claimant is told: the roster has it, and no round from its first one on can close without it.
pub(crate) type Admission = Result<(Arc<JobRecord>, Arc<Roster>), WireError>;

type Key = (JobKey, Incarnation);

/// The doors of all jobs that somebody is joining.
#[derive(Debug, Default)]
pub(crate) struct Doors(Mutex<BTreeMap<Key, Arc<Door>>>);

#[derive(Debug, Default)]
struct Door {
    /// Whoever has it writes for all who wait. First come, first served.
    turn: tokio::sync::Mutex<()>,
    waiting: Mutex<Vec<(Claim, oneshot::Sender<Admission>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use leaves it consistent before it can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Doors {
    /// Waits for a turn, then has `admit` write all claims that wait: it answers each, in order. A claim that somebody
    /// else has written by then is not written again.
    ///
    /// Safe to cancel: if it was somebody's turn, those whom it wrote for are told to try again.
    pub(crate) async fn enter<F>(&self, claim: Claim, admit: impl FnOnce(Vec<Claim>) -> F) -> Admission
    where
        F: Future<Output = Vec<Admission>>,
    {
        let key = (claim.worker.key.clone(), claim.worker.job);
        let door = lock(&self.0).entry(key.clone()).or_default().clone();
        let (sender, mut answer) = oneshot::channel();
        lock(&door.waiting).push((claim, sender));
        let turn = door.turn.lock().await;
        let answer = match answer.try_recv() {
            Ok(answer) => answer,
            Err(oneshot::error::TryRecvError::Empty) => {
                let (claims, senders): (Vec<_>, Vec<_>) =
                    mem::take(&mut *lock(&door.waiting)).into_iter().unzip();
                for (sender, answer) in senders.into_iter().zip(admit(claims).await) {
                    // Some have gone away.
                    let _ = sender.send(answer);
                }
                answer.try_recv().unwrap_or_else(|_| Err(cut_short()))
            }
            Err(oneshot::error::TryRecvError::Closed) => Err(cut_short()),
        };
        drop(turn);
        let mut doors = lock(&self.0);
        // The table's and this one: nobody else is at it, and nobody can come without the table.
        if doors.get(&key).is_some_and(|known| Arc::ptr_eq(known, &door)) && Arc::strong_count(&door) == 2 {
            doors.remove(&key);
        }
        answer
    }
}

fn cut_short() -> WireError {
    WireError::new(ErrorCode::Unavailable, "joining was cut short: try again")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures::{FutureExt as _, future::join_all};
    use thalweg_protocol::WorkerRef;

    use super::*;

    fn claim(rank: u32) -> Claim {
        let key = JobKey { tenant: "t".parse().unwrap(), job: "j".parse().unwrap() };
        let (job, incarnation) = (Incarnation([7; 16]), Incarnation([rank as u8; 16]));
        Claim { worker: WorkerRef { key, job, rank, incarnation }, id: String::new(), replaces: None }
    }

    /// Answers with an error that tells for whom it was.
    fn refuse(claims: Vec<Claim>) -> Vec<Admission> {
        let error = |claim: &Claim| WireError::new(ErrorCode::RankTaken, claim.worker.rank.to_string());
        claims.iter().map(|claim| Err(error(claim))).collect()
    }

    #[tokio::test]
    async fn who_waits_is_written_with_the_next() {
        let doors = Doors::default();
        let (writes, largest) = (Cell::new(0), Cell::new(0));
        let joins = (0..100).map(|rank| {
            let (doors, writes, largest) = (&doors, &writes, &largest);
            async move {
                let admit = async |claims: Vec<Claim>| {
                    writes.set(writes.get() + 1);
                    largest.set(largest.get().max(claims.len()));
                    tokio::task::yield_now().await;
                    refuse(claims)
                };
                let error = doors.enter(claim(rank), admit).await.unwrap_err();
                assert_eq!(error.message, rank.to_string(), "an answer to somebody else");
            }
        });
        join_all(joins).await;
        assert_eq!((writes.get(), largest.get()), (2, 99), "the first alone, all others together");
        assert!(lock(&doors.0).is_empty(), "the door is closed behind the last");
    }

    #[tokio::test]
    async fn a_turn_that_is_cut_short_is_repeated_by_those_who_waited() {
        let doors = Doors::default();
        let mut first = Box::pin(doors.enter(claim(0), async |_| std::future::pending().await));
        assert!((&mut first).now_or_never().is_none());
        let mut second = Box::pin(doors.enter(claim(1), async |claims| refuse(claims)));
        assert!((&mut second).now_or_never().is_none(), "it is the first one's turn");
        drop(first);
        assert_eq!(second.await.unwrap_err().message, "1");
        assert_eq!(doors.enter(claim(2), async |claims| refuse(claims)).await.unwrap_err().message, "2");
        assert!(lock(&doors.0).is_empty());
    }
}

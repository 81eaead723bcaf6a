//! Who counts from which round to which: pure decisions about rosters (rules P3, P4, P11).

use thalweg_protocol::{Claim, ErrorCode, Incarnation, JobRecord, Member, Roster, Round, Version, WireError};

/// Versions of a job's shards at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The least.
    pub min: Version,
    /// The greatest.
    pub max: Version,
}

/// What a claim leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// The roster to write; `None` when it holds the claim already.
    pub roster: Option<Roster>,
    /// First round that counts the claimant.
    pub from_round: Round,
    /// That is certain, and needs no fence any more.
    pub confirmed: bool,
    /// Shards below this version have to be levelled with empty rounds, because nobody is left to
    /// complete them (rule P11).
    pub level: Option<Version>,
}

/// Decides about a claim of a rank.
///
/// Before the job has started, claimants are founding members and count from its first round; the last of them
/// starts it. Later a claimant counts from the first round that no shard can have opened yet.
///
/// # Errors
/// `rank_taken`, `lease_lost`, `limit` or `job_failed`, with what to do.
pub fn claim(
    record: &JobRecord,
    roster: &Roster,
    claim: &Claim,
    versions: Versions,
) -> Result<Claimed, WireError> {
    let (rank, worker) = (claim.worker.rank, claim.worker.incarnation);
    if rank >= record.spec.max_members {
        let text = format!("rank {rank}: the job allows 0 to {} (max_members)", record.spec.max_members - 1);
        return Err(WireError::new(ErrorCode::Limit, text));
    }
    if let Some(tenure) = roster.tenure(worker) {
        if tenure.rank != rank || tenure.until_round.is_some() {
            let text =
                format!("this worker held rank {} and lost it: join again as a new worker", tenure.rank);
            return Err(WireError::new(ErrorCode::LeaseLost, text));
        }
        // Asked again: levelling may have been cut short.
        let (from_round, confirmed) = (tenure.from_round, tenure.confirmed);
        let level = deserted(roster, versions);
        return Ok(Claimed { roster: None, from_round, confirmed, level });
    }
    let mut next = roster.clone();
    next.epoch += 1;
    prune(&mut next, versions);
    let holder = next.members.iter().position(|member| member.rank == rank && member.until_round.is_none());
    if let Some(holder) = holder {
        let replaced = claim.replaces == Some(next.members[holder].incarnation);
        if next.members[holder].worker != claim.id || !replaced {
            let text = format!(
                "rank {rank} of job {} is held by worker {:?}, which is alive: use another rank, or wait until its \
                 lease ends",
                record.spec.key, next.members[holder].worker
            );
            return Err(WireError::new(ErrorCode::RankTaken, text));
        }
        // The same worker, started again: its former life is over.
        end(&mut next, holder, versions);
    }
    let mut member = Member {
        rank,
        worker: claim.id.clone(),
        incarnation: worker,
        from_round: record.first_version() + 1,
        until_round: None,
        // Founding members need no fence: nobody pushes before the roster that holds them all, and every
        // contribution names it.
        confirmed: !next.started,
    };
    if next.started {
        // Contributors of the round that may be open now; without any, the claimant completes it.
        let open = versions.max + 1;
        let alone = next.of_round(open).next().is_none();
        member.from_round = if alone { open } else { open + 1 };
    }
    let (from_round, confirmed) = (member.from_round, member.confirmed);
    next.members.push(member);
    let level = deserted(&next, versions);
    if !next.started {
        next.started = next.members.len() as u64 >= u64::from(record.spec.workers);
    }
    Ok(Claimed { roster: Some(next), from_round, confirmed, level })
}

/// No round from these claimants' first ones on can close without them any more: they may be told. Without that
/// mark, the same claim made again (its answer was lost) could be taken for one whose first round has
/// closed already, when it was the claimant itself who closed it.
#[must_use]
pub fn confirm(roster: &Roster, workers: &[Incarnation]) -> Option<Roster> {
    let mut next = roster.clone();
    for worker in workers {
        next.members.iter_mut().find(|member| member.incarnation == *worker)?.confirmed = true;
    }
    next.epoch += 1;
    Some(next)
}

/// The claimant's first round may have closed without it: counts it from a later one.
#[must_use]
pub fn postpone(roster: &Roster, worker: Incarnation, versions: Versions) -> Option<Roster> {
    let mut next = roster.clone();
    let others =
        next.members.iter().any(|member| member.incarnation != worker && member.counts_in(versions.max + 1));
    let member = next.members.iter_mut().find(|member| member.incarnation == worker)?;
    member.from_round = if others { versions.max + 2 } else { versions.max + 1 };
    next.epoch += 1;
    Some(next)
}

/// Takes a worker off the roster from the first round that is not complete on all shards; `None` when
/// it was not on it. The second value asks to level shards, as in [`Claimed`].
#[must_use]
pub fn remove(roster: &Roster, worker: Incarnation, versions: Versions) -> Option<(Roster, Option<Version>)> {
    let index = roster
        .members
        .iter()
        .position(|member| member.incarnation == worker && member.until_round.is_none())?;
    let mut next = roster.clone();
    next.epoch += 1;
    end(&mut next, index, versions);
    prune(&mut next, versions);
    let level = deserted(&next, versions);
    Some((next, level))
}

/// The version up to which shards have to be levelled, if any: rounds in which nobody counts would stay
/// open for ever. Those are the rounds before the first one of all members that have not left (who
/// joined while others were in their last round may count from a later one), or, without any member,
/// those that some shards have closed and others not.
#[must_use]
pub fn deserted(roster: &Roster, versions: Versions) -> Option<Version> {
    let present = roster.members.iter().filter(|member| member.until_round.is_none());
    let last = present.map(|member| member.from_round - 1).min().unwrap_or(versions.max);
    (roster.started && versions.min < last).then_some(last)
}

fn end(roster: &mut Roster, index: usize, versions: Versions) {
    if roster.started {
        roster.members[index].until_round = Some(versions.min + 1);
    } else {
        roster.members.remove(index);
    }
}

/// Forgets tenures that no open round can ask for.
fn prune(roster: &mut Roster, versions: Versions) {
    roster.members.retain(|member| {
        member.until_round.is_none_or(|until| until > member.from_round && until > versions.min + 1)
    });
}

#[cfg(test)]
mod tests;

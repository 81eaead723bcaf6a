//! What has happened to a job between two looks at it.

use std::{collections::BTreeSet, sync::Arc};

use thalweg_protocol::{EventKind, Incarnation, JobRecord, JobState, Member, Roster};

/// Takes in what happened to a job.
pub type Sink = Arc<dyn Fn(&JobRecord, EventKind) + Send + Sync>;

/// The events that lead from one view of a job to a later one; without an earlier one it was just created.
#[must_use]
pub fn between(before: Option<(&JobRecord, &Roster)>, record: &JobRecord, roster: &Roster) -> Vec<EventKind> {
    let before = before.filter(|(before, _)| before.incarnation == record.incarnation);
    let mut events = Vec::new();
    if before.is_none() {
        events.push(EventKind::Created {
            function: record.spec.function.name.clone(),
            workers: record.spec.workers,
            elements: record.layout.elements,
            version: record.first_version(),
        });
    }
    let was = |state: &JobState| before.is_some_and(|(before, _)| before.state == *state);
    match &record.state {
        JobState::Running if !was(&JobState::Running) => events.push(EventKind::Ready),
        JobState::Failed(error) if !before.is_some_and(|(b, _)| matches!(b.state, JobState::Failed(_))) => {
            events.push(EventKind::Failed { code: error.code, message: error.message.clone() });
        }
        _ => {}
    }
    let paused = before.and_then(|(before, _)| before.life.paused.as_ref());
    match &record.life.paused {
        Some(reason) if paused != Some(reason) => events.push(EventKind::Paused { reason: reason.clone() }),
        None if paused.is_some() && record.state.end(&record.spec.key).is_none() => {
            events.push(EventKind::Resumed);
        }
        _ => {}
    }
    let known = before.and_then(|(before, _)| before.settings.last()).map_or(0, |last| last.revision);
    events.extend(record.settings.iter().filter(|revision| revision.revision > known).map(|revision| {
        EventKind::Settings { revision: revision.revision, from_round: revision.from_round }
    }));
    let no_members = Vec::new();
    let members = before.map_or(&no_members, |(_, roster)| &roster.members);
    let present = |members: &[Member]| -> BTreeSet<Incarnation> {
        let present = members.iter().filter(|member| member.until_round.is_none());
        present.map(|member| member.incarnation).collect()
    };
    let (before_it, after_it) = (present(members), present(&roster.members));
    events.extend(
        members
            .iter()
            .filter(|member| member.until_round.is_none() && !after_it.contains(&member.incarnation))
            .map(|member| EventKind::Left { rank: member.rank, worker: member.worker.clone() }),
    );
    events.extend(
        (roster.members.iter())
            .filter(|member| member.until_round.is_none() && !before_it.contains(&member.incarnation))
            .map(|member| EventKind::Joined {
                rank: member.rank,
                worker: member.worker.clone(),
                from_round: member.from_round,
            }),
    );
    if roster.started && !before.is_some_and(|(_, roster)| roster.started) {
        events.push(EventKind::Started);
    }
    events
}

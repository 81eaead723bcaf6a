//! Thalweg's own policy.

use std::collections::VecDeque;

use super::{Decision, Policy, Reason};
use crate::{
    Config, History, Millis, Sample,
    demand::{self, Load},
    jobs::Demand,
};

/// Time over which what comes in is averaged.
pub(crate) const FLOW_MS: Millis = 1000;
/// A utilisation this much above the target is tolerated before there are more: what makes them grow is not what
/// makes them shrink, so that noise does neither.
const TOLERATED_UTILISATION: f64 = 1.18;
/// Share of a job's limit that a number of invokers is chosen for; up to the whole limit it is kept.
const CHOSEN_FOR: f64 = 0.7;
/// A heartbeat is this late at most, so what was heard of longer ago than this is over.
const BEAT_MS: Millis = 1200;
/// Time that an expected burst may be late before it is no longer waited for, at least.
const LATE_MS: f64 = 2000.0;
/// Time after which newly added invokers must have made a difference.
const EFFECT_MS: Millis = 3000;
/// Time that those who were just added have to begin with their work before there are more, unless twice as many are
/// needed: two heartbeats and some, so that what they make of the jobs has been heard. While some have not begun at all
/// there are no more either.
const GROW_PAUSE_MS: Millis = 1500;
/// At most so many times as many at once for the sake of jobs: what is known of them while they wait for too few invokers
/// is half or twice the truth, and in [`GROW_PAUSE_MS`] more is known.
const GROW_FACTOR: usize = 4;
/// Share of the growth by which the throughput must have grown.
const EFFECT: f64 = 0.2;
/// Time for which no more are added when the last ones made none.
const INEFFECTIVE_MS: Millis = 30_000;
/// After a shrink the jobs are watched for so many of the longest of their periods.
const WATCHED_PERIODS: f64 = 4.0;
/// And for so long at least and at most.
const WATCHED_MS: (f64, f64) = (24_000.0, 120_000.0);
/// A limit counts as broken from this multiple of it on: a period is known no better than to the time between beats.
const BROKEN: f64 = 1.25;
/// Invokers may be this busy with rounds whose jobs keep their limits.
const CLOSED_UTILISATION: f64 = 0.95;
/// Time for which a shrink that broke a limit is not tried again; doubles with every further one up to the longest.
const FLOOR_MS: Millis = 60_000;
const LONGEST_FLOOR_MS: Millis = 3_600_000;

/// * Missing or stale observations change nothing.
/// * Sizes so that no job loses more than its limit against invokers of its own ([`demand`]), that load which belongs
///   to no known rhythm takes no more than the target utilisation, and that its backlog is gone within the catch-up
///   target. A round in flight of each known job is no backlog. Work where nobody is gets an invoker at once.
/// * Grows at once (or after the grow window), shrinks when fewer would have been enough throughout the shrink window.
/// * Takes a shrink back that made a job lose more than its limit, and does not repeat it soon.
/// * Adds no more where the last ones made no difference.
/// * Jobs with long periods get their invokers shortly before their next burst, and where every job's next burst is
///   far away there are only `min_invokers`; so there are when the queues were empty throughout the idle timeout.
///   Never zero otherwise.
#[derive(Clone, Debug, Default)]
pub struct Elastic {
    /// What was asked for lately, newest last.
    wanted: VecDeque<Wanted>,
    shrunk: Option<Shrunk>,
    floor: Option<Floor>,
    grown: Option<Grown>,
    last_growth: Option<Millis>,
    /// No more than so many, until then.
    ceiling: Option<(usize, Millis)>,
}

#[derive(Clone, Copy, Debug)]
struct Wanted {
    at: Millis,
    /// What one would choose.
    chosen: usize,
    /// Fewest that would be tolerated; not more than `chosen`.
    kept: usize,
    /// What load asks for that belongs to no job: it is counted, not learned.
    hurried: usize,
}

#[derive(Clone, Copy, Debug)]
struct Shrunk {
    at: Millis,
    from: usize,
}

#[derive(Clone, Copy, Debug)]
struct Floor {
    invokers: usize,
    until: Millis,
    held_for: Millis,
}

#[derive(Clone, Copy, Debug)]
struct Grown {
    at: Millis,
    from: usize,
    to: usize,
    messages_per_s: f64,
}

/// What there is to do, now and soon.
struct Outlook {
    /// Jobs that need invokers now.
    hot: Vec<Load>,
    /// Slowdown of each of `hot` lately.
    measured: Vec<f64>,
    /// Invokers' worth of work that they ask for.
    explained: f64,
    /// Longest of their periods, milliseconds.
    longest_period_ms: f64,
    /// Invokers' worth of load that belongs to no job in `hot`.
    open: f64,
    /// The same including what drains its backlog in time.
    urgent: f64,
    /// Time until somebody's next burst has to be prepared for, milliseconds; `None` when nobody's is expected.
    next_burst_ms: Option<f64>,
}

/// When this job's next burst is to be prepared for, and whether it needs invokers now.
fn rhythm(demand: &Demand, latest: &Sample, now: Millis, config: &Config) -> (bool, f64) {
    if demand.period_ms < config.gap_pays_ms as f64 {
        return (true, 0.0);
    }
    // Bursts come `delay` before the round's end that was heard of.
    let due = demand.moved_at as f64 + demand.period_ms - demand.delay_ms;
    let lead = latest.start_delay_ms + 2.0 * config.tick_ms as f64 + 500.0 + 2.0 * demand.jitter_ms;
    let late = (4.0 * demand.jitter_ms).max(LATE_MS);
    let until = due - lead - now as f64;
    let expected = until <= 0.0 && (now as f64) <= due + late;
    let under_way = latest.messages > 0 && now <= demand.heard_at + BEAT_MS;
    // One that is overdue is no longer waited for: when it comes, it is found.
    (expected || under_way, if (now as f64) > due + late { f64::INFINITY } else { until.max(0.0) })
}

impl Outlook {
    fn new(history: &History, latest: &Sample, now: Millis, config: &Config) -> Self {
        let rate = latest.service_bytes_per_s;
        // Of contributions, for those of which no more is known: results come on top.
        let contributions = rate / latest.handled_per_byte;
        let mut outlook = Self {
            hot: Vec::new(),
            measured: Vec::new(),
            explained: 0.0,
            longest_period_ms: 0.0,
            open: 0.0,
            urgent: 0.0,
            next_burst_ms: None,
        };
        let flow = history.flow(FLOW_MS);
        let seconds = flow.map_or(0.0, |(seconds, ..)| seconds);
        let (mut explained, mut in_flight) = (0.0, 0.0);
        for (_, demand) in history.jobs().active(now) {
            let (hot, until) = rhythm(demand, latest, now, config);
            outlook.next_burst_ms = Some(outlook.next_burst_ms.map_or(until, |next| next.min(until)));
            // In any stretch of time there may be one round more than its length suggests.
            explained += demand.round_bytes * (seconds * 1000.0 / demand.period_ms.max(1.0) + 1.0);
            in_flight += demand.round_bytes;
            if hot {
                let parallel = f64::from(history.partitions());
                let load = demand.load(rate, f64::from(config.reference_invokers), parallel);
                outlook.measured.push(load.slowdown(demand.recent_period_ms / 1000.0));
                outlook.explained += load.work / (demand.period_ms / 1000.0);
                outlook.hot.push(load);
                outlook.longest_period_ms = outlook.longest_period_ms.max(demand.period_ms);
            }
        }
        if let Some((seconds, came, _)) = flow {
            outlook.open = ((came - explained) / seconds / contributions).max(0.0);
        }
        let backlog = (latest.workable_bytes() - in_flight).max(0.0);
        // Only what lasts has to leave room: a backlog may take all of them.
        outlook.urgent = outlook.open + backlog / contributions / (config.catch_up_ms as f64 / 1000.0);
        outlook
    }

    /// Invokers for it, with this share of the limits and of the target utilisation.
    fn need(&self, view: View<'_>, limits: f64, tolerated: f64) -> usize {
        let held = self.held(&self.hot, view, limits, tolerated);
        let (_, most) = view.config.bounds(view.history.partitions());
        let least = usize::from(view.latest.messages > 0 || !self.hot.is_empty());
        self.hurried(view, tolerated).max(held).clamp(least, most)
    }

    /// What other load and its backlog ask for. Not wider than the messages are spread; the conversion saturates, and
    /// what is not a number becomes 0.
    fn hurried(&self, view: View<'_>, tolerated: f64) -> usize {
        let hurried = f64::max(self.open / view.utilisation(tolerated), self.urgent / tolerated);
        (hurried.ceil() as usize).min(view.latest.active_partitions.max(1))
    }

    /// What holds the limits of these jobs beside the other load.
    fn held(&self, jobs: &[Load], view: View<'_>, limits: f64, tolerated: f64) -> usize {
        let View { history, config, .. } = view;
        let (_, most) = config.bounds(history.partitions());
        let utilisation = view.utilisation(tolerated);
        let open = self.open.min(utilisation * most as f64);
        let partitions = usize::from(history.partitions());
        demand::fewest(jobs, open, config.slowdown_limit * limits, utilisation, partitions, most)
    }

    /// Whether it is a job's limit that what there is does not hold, not other load alone.
    fn breaks_a_limit(&self, view: View<'_>) -> bool {
        let held = |jobs: &[Load]| self.held(jobs, view, 1.0, TOLERATED_UTILISATION);
        held(&self.hot) > self.hurried(view, TOLERATED_UTILISATION).max(held(&[]))
    }
}

/// What a decision is made from.
#[derive(Clone, Copy)]
struct View<'a> {
    history: &'a History,
    latest: &'a Sample,
    config: &'a Config,
}

impl View<'_> {
    fn utilisation(self, tolerated: f64) -> f64 {
        (self.config.target_utilisation * tolerated).min(1.0)
    }
}

impl Policy for Elastic {
    fn name(&self) -> &'static str {
        "thalweg"
    }

    fn look_every_ms(&self, config: &Config) -> Millis {
        config.tick_ms
    }

    fn settles_ms(&self, config: &Config) -> Option<Millis> {
        Some(config.longest_window().max(config.idle_timeout_ms) + 2 * config.tick_ms)
    }

    fn decide(&mut self, history: &History, now: Millis, config: &Config) -> Decision {
        let (fewest, most) = config.bounds(history.partitions());
        let current = history.target();
        let Some(latest) = history.latest(now, config) else {
            return Decision { target: current, reason: Reason::Unobserved };
        };
        let outlook = Outlook::new(history, latest, now, config);
        let quiet = |time: Millis| history.idle_since().is_some_and(|since| latest.at - since >= time);
        if outlook.hot.is_empty() {
            if quiet(config.idle_timeout_ms) {
                return self.rest(fewest, Reason::Idle);
            }
            let far = outlook.next_burst_ms.is_some_and(|next| next >= config.gap_pays_ms as f64 / 2.0);
            if far && quiet(BEAT_MS) && current > fewest {
                return self.rest(fewest, Reason::Gap);
            }
            if current == 0 && latest.messages == 0 {
                return Decision { target: fewest, reason: bounds(fewest, current) };
            }
        }
        let view = View { history, latest, config };
        let chosen = outlook.need(view, CHOSEN_FOR, 1.0);
        let kept = outlook.need(view, 1.0, TOLERATED_UTILISATION);
        let (chosen, hurried) = (chosen.max(kept), outlook.hurried(view, 1.0));
        self.remember(history, Wanted { at: latest.at, chosen, kept, hurried }, config);
        let bounded = current.clamp(fewest, most);
        if let Some(reverted) = self.revert(&outlook, bounded, now, config) {
            return reverted;
        }
        let grown = self.grown_to(bounded, latest.serving, config).clamp(fewest, most);
        if grown > bounded {
            return self.grow(view, &outlook, (current, bounded, grown), now);
        }
        if latest.at >= history.continuous_since() + config.shrink_window_ms {
            let floor = self.floor.filter(|floor| now < floor.until).map_or(0, |floor| floor.invokers);
            let enough =
                self.enough(history, &outlook, config).max(floor).clamp(fewest.max(1).min(bounded), most);
            if enough < bounded {
                self.shrunk = Some(Shrunk { at: now, from: bounded });
                return Decision { target: enough, reason: Reason::Shrink };
            }
        }
        Decision { target: bounded, reason: bounds(bounded, current) }
    }
}

fn bounds(bounded: usize, current: usize) -> Reason {
    if bounded == current { Reason::Steady } else { Reason::Bounds }
}

impl Elastic {
    fn rest(&mut self, target: usize, reason: Reason) -> Decision {
        self.wanted.clear();
        (self.shrunk, self.grown) = (None, None);
        Decision { target, reason }
    }

    fn remember(&mut self, history: &History, wanted: Wanted, config: &Config) {
        let since = history.continuous_since().max(wanted.at.saturating_sub(config.longest_window()));
        self.wanted.retain(|before| before.at >= since && before.at != wanted.at);
        self.wanted.push_back(wanted);
    }

    /// What was asked for in the last `window`, newest first.
    fn recent(&self, window: Millis) -> impl Iterator<Item = &Wanted> {
        let at = self.wanted.back().map_or(0, |newest| newest.at);
        self.wanted.iter().rev().take_while(move |wanted| wanted.at + window >= at)
    }

    /// More than there are, if what there are was not tolerable throughout the grow window.
    fn grown_to(&self, current: usize, serving: usize, config: &Config) -> usize {
        let lasting =
            |of: fn(&Wanted) -> usize| self.recent(config.grow_window_ms).map(of).min().unwrap_or(0);
        let (kept, chosen) = (lasting(|wanted| wanted.kept), lasting(|wanted| wanted.chosen));
        let at = self.wanted.back().map_or(0, |newest| newest.at);
        let waits = self.last_growth.is_some_and(|last| at < last + GROW_PAUSE_MS) || serving < current;
        let paused = waits && kept < 2 * current;
        if kept > current && !paused {
            let most = usize::max(GROW_FACTOR * current, lasting(|wanted| wanted.hurried));
            return if current > 0 { chosen.min(most) } else { chosen };
        }
        // The first never waits.
        current.max(self.wanted.back().map_or(0, |newest| newest.kept.min(1)))
    }

    /// What would have been enough throughout the shrink window.
    fn enough(&self, history: &History, outlook: &Outlook, config: &Config) -> usize {
        let wanted = self.recent(config.shrink_window_ms).map(|wanted| wanted.chosen).max().unwrap_or(0);
        let (count, busy) = history
            .last(config.shrink_window_ms)
            .fold((0.0, 0.0), |(count, busy), sample| (count + 1.0, busy + sample.busy));
        let busy = busy / f64::max(count, 1.0);
        let explained = outlook.explained.min(busy);
        // Load keeps what is there, it does not ask for more: a fleet that keeps up is not dismantled for it.
        let load = (busy - explained) / config.target_utilisation + explained / CLOSED_UTILISATION;
        wanted.max(load.ceil() as usize)
    }

    fn grow(
        &mut self,
        view: View<'_>,
        outlook: &Outlook,
        (current, from, to): (usize, usize, usize),
        now: Millis,
    ) -> Decision {
        let View { history, latest, .. } = view;
        let messages_per_s = history.flow(FLOW_MS).map_or(0.0, |(seconds, _, left)| left / seconds);
        if let Some(grown) = self.grown
            && now >= grown.at + EFFECT_MS
        {
            let wished = 1.0 + EFFECT * (grown.to as f64 / grown.from.max(1) as f64 - 1.0);
            let recent = now <= grown.at + INEFFECTIVE_MS && latest.serving >= grown.to && from >= grown.to;
            if recent && grown.messages_per_s > 0.0 && messages_per_s < grown.messages_per_s * wished {
                self.ceiling = Some((from, now + INEFFECTIVE_MS));
            }
            self.grown = None;
        }
        self.ceiling = self.ceiling.filter(|(_, until)| now < *until);
        if let Some((ceiling, _)) = self.ceiling
            && from >= ceiling
        {
            return Decision { target: from, reason: Reason::Ineffective };
        }
        let reason = match current {
            0 if latest.messages == 0 => Reason::Prewarm,
            0 => Reason::FirstWork,
            _ if outlook.breaks_a_limit(view) => Reason::Slowdown,
            _ => Reason::Backlog,
        };
        self.last_growth = Some(now);
        self.grown = match self.grown {
            Some(grown) => Some(Grown { to, ..grown }),
            None if from > 0 && reason == Reason::Backlog => {
                Some(Grown { at: now, from, to, messages_per_s })
            }
            None => None,
        };
        self.shrunk = None;
        Decision { target: to, reason }
    }

    fn revert(
        &mut self,
        outlook: &Outlook,
        current: usize,
        now: Millis,
        config: &Config,
    ) -> Option<Decision> {
        let shrunk = self.shrunk?;
        let watched = (WATCHED_PERIODS * outlook.longest_period_ms).clamp(WATCHED_MS.0, WATCHED_MS.1);
        if now > shrunk.at + watched as Millis || shrunk.from <= current {
            self.shrunk = None;
            return None;
        }
        let broken = outlook.measured.iter().any(|slowdown| *slowdown > BROKEN * config.slowdown_limit);
        // Until then what is measured is from before it, in part.
        if !broken || now < shrunk.at + (watched / 2.0) as Millis {
            return None;
        }
        self.shrunk = None;
        let held_for = self.floor.map_or(FLOOR_MS, |floor| (2 * floor.held_for).min(LONGEST_FLOOR_MS));
        self.floor = Some(Floor { invokers: shrunk.from, until: now + held_for, held_for });
        Some(Decision { target: shrunk.from, reason: Reason::Reverted })
    }
}

#[cfg(test)]
#[path = "elastic_tests.rs"]
mod tests;

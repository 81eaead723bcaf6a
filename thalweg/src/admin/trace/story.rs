//! From spans to where the time went. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use thalweg_protocol::{Rank, ShardIndex, Span, Stage};

/// Columns of the bars.
const WIDTH: u64 = 40;

/// A span and who told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) component: String,
    pub(super) name: String,
    pub(super) span: Span,
}

impl Told {
    pub(super) fn json(&self) -> Value {
        json!({
            "component": self.component, "name": self.name, "stage": self.span.stage.name(),
            "shard": self.span.shard, "rank": self.span.rank, "start_us": self.span.start_us,
            "duration_us": self.span.duration_us,
        })
    }
}

/// A part of the round's time, on the way of the shard that ended last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) name: &'static str,
    /// Who was waited for, where it was a worker.
    pub(super) rank: Option<Rank>,
    pub(super) us: u64,
}

/// All spans of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StageSum {
    pub(super) stage: Stage,
    pub(super) count: usize,
    pub(super) median_us: u64,
    pub(super) longest: Span,
    pub(super) total_us: u64,
}

/// One worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RankSum {
    pub(super) rank: Rank,
    /// From the beginning of the round until it sent its last contribution.
    pub(super) last_push_us: u64,
}

/// What a round's spans say. Times of several hosts are by their own clocks: a step between two hosts is only as good as
/// those agree, and none is ever shown as negative.
#[derive(Clone, Debug, Default)]
pub(super) struct Story {
    /// When the first contribution was sent, or whatever was first; microseconds since the Unix epoch.
    pub(super) begun_us: u64,
    /// From there to the last end.
    pub(super) total_us: u64,
    /// The shard that ended last.
    pub(super) shard: Option<ShardIndex>,
    /// Its way, without gaps.
    pub(super) path: Vec<Step>,
    pub(super) stages: Vec<StageSum>,
    /// The latest first.
    pub(super) ranks: Vec<RankSum>,
    /// How many of each kind have told.
    pub(super) components: BTreeMap<String, u32>,
    pub(super) spans: Vec<Told>,
}

impl Story {
    pub(super) fn of(mut spans: Vec<Told>) -> Self {
        spans.sort_by_key(|told| (told.span.start_us, told.span.stage, told.span.shard, told.span.rank));
        let all: Vec<Span> = spans.iter().map(|told| told.span).collect();
        let Some(begun_us) = all.iter().map(|span| span.start_us).min() else { return Self::default() };
        let end_us = all.iter().map(Span::end_us).max().unwrap_or(begun_us);
        let of_shards = all.iter().filter(|span| span.stage != Stage::Round);
        let shard = of_shards.max_by_key(|span| (span.end_us(), span.shard)).map(|span| span.shard);
        let mut components = BTreeMap::<_, std::collections::BTreeSet<_>>::new();
        for told in &spans {
            components.entry(told.component.clone()).or_default().insert(told.name.as_str());
        }
        let components = components
            .into_iter()
            .map(|(component, names)| (component, u32::try_from(names.len()).unwrap_or(u32::MAX)));
        let components = components.collect();
        Self {
            begun_us,
            total_us: end_us - begun_us,
            shard,
            path: shard.map(|shard| path(&all, begun_us, shard)).unwrap_or_default(),
            stages: Stage::ALL.iter().filter_map(|stage| stage_sum(&all, *stage)).collect(),
            ranks: ranks(&all, begun_us),
            components,
            spans,
        }
    }

    /// In one line.
    pub(super) fn line(&self) -> String {
        if self.spans.is_empty() {
            return "nobody remembers it".to_owned();
        }
        let steps = self.path.iter().filter(|step| step.us > 0);
        let steps = steps.map(|step| format!("{} {}", step.title(), time(step.us)));
        format!("{}: {}", time(self.total_us), steps.collect::<Vec<_>>().join(", "))
    }

    /// The way as bars, one line for each step.
    pub(super) fn bars(&self) -> String {
        let whole = self.path.iter().map(|step| step.us).sum::<u64>().max(1);
        let mut at = 0;
        let lines = self.path.iter().map(|step| {
            let (from, to) = (at * WIDTH / whole, (at + step.us) * WIDTH / whole);
            at += step.us;
            let fill = |columns: u64, with: &str| with.repeat(usize::try_from(columns).unwrap_or(0));
            // What took time is visible.
            let length = (to - from).max(u64::from(step.us > 0));
            let from = from.min(WIDTH - length);
            let bar =
                [fill(from, " "), fill(length, "#"), fill(WIDTH.saturating_sub(from + length), " ")].concat();
            let share = step.us as f64 * 100.0 / whole as f64;
            format!("  {:<26} |{bar}| {:>9} {share:>5.1} %", step.title(), time(step.us))
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

impl Step {
    fn title(&self) -> String {
        match self.rank {
            Some(rank) => format!("{} of rank {rank}", self.name),
            None => self.name.to_owned(),
        }
    }
}

/// Where the time of one shard's round went. A step ends where the last span of its kind does, and never before the step
/// before it: the steps add up.
fn path(spans: &[Span], begun: u64, shard: ShardIndex) -> Vec<Step> {
    let of = |stage: Stage| spans.iter().filter(move |span| span.stage == stage && span.shard == shard);
    let last = |stage: Stage| of(stage).max_by_key(|span| span.end_us());
    let gather = last(Stage::Gather);
    let rank = gather.and_then(|span| span.rank);
    let push = of(Stage::Push).filter(|span| span.rank == rank).max_by_key(|span| span.end_us());
    let ends = [
        ("before the push", rank, push.map(|span| span.start_us)),
        ("push", rank, gather.map(Span::end_us)),
        ("queue", None, last(Stage::Queue).map(Span::end_us)),
        ("fold", None, last(Stage::Fold).map(Span::end_us)),
        ("write", None, last(Stage::Write).map(Span::end_us)),
        ("flush", None, last(Stage::Flush).map(Span::end_us)),
        ("commit, the rest", None, last(Stage::Commit).map(Span::end_us)),
        ("publish", None, last(Stage::Publish).map(Span::end_us)),
        ("deliver", None, last(Stage::Wait).map(Span::end_us)),
    ];
    let mut at = begun;
    let steps = ends.into_iter().filter_map(|(name, rank, end)| {
        let end = end?;
        let us = end.saturating_sub(at);
        at = at.max(end);
        Some(Step { name, rank, us })
    });
    steps.collect()
}

fn stage_sum(spans: &[Span], stage: Stage) -> Option<StageSum> {
    let mut of: Vec<_> = spans.iter().filter(|span| span.stage == stage).collect();
    of.sort_by_key(|span| span.duration_us);
    let longest = **of.last()?;
    let total_us = of.iter().map(|span| span.duration_us).sum();
    Some(StageSum { stage, count: of.len(), median_us: of[of.len() / 2].duration_us, longest, total_us })
}

fn ranks(spans: &[Span], begun: u64) -> Vec<RankSum> {
    let mut last = BTreeMap::<Rank, u64>::new();
    for span in spans.iter().filter(|span| span.stage == Stage::Push) {
        let sent = last.entry(span.rank.unwrap_or(0)).or_default();
        *sent = (*sent).max(span.start_us - begun);
    }
    let mut ranks: Vec<_> =
        last.into_iter().map(|(rank, last_push_us)| RankSum { rank, last_push_us }).collect();
    ranks.sort_by_key(|rank| (std::cmp::Reverse(rank.last_push_us), rank.rank));
    ranks
}

/// For people.
pub(super) fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(
        component: &str,
        stage: Stage,
        shard: ShardIndex,
        rank: Option<Rank>,
        from: u64,
        to: u64,
    ) -> Told {
        let span = Span { stage, shard, rank, start_us: 1_000_000 + from, duration_us: to - from };
        Told { component: component.to_owned(), name: format!("{component} {}", rank.unwrap_or(0)), span }
    }

    /// Rank 1 is late; shard 1 ends last.
    fn round() -> Vec<Told> {
        let mut spans = vec![
            told("worker", Stage::Round, 0, Some(0), 0, 9_000),
            told("worker", Stage::Round, 0, Some(1), 5_000, 9_500),
        ];
        for shard in 0..2 {
            let late = u64::from(shard) * 100;
            spans.extend([
                told("worker", Stage::Push, shard, Some(0), late, late + 500),
                told("worker", Stage::Push, shard, Some(1), 5_000 + late, 5_600 + late),
                told("invoker", Stage::Gather, shard, Some(1), late, 5_500 + late),
                told("invoker", Stage::Queue, shard, None, 5_500 + late, 6_000 + late),
                told("invoker", Stage::Fold, shard, None, 6_000 + late, 6_400 + late),
                told("invoker", Stage::Commit, shard, None, 6_400 + late, 8_000 + late),
                told("store", Stage::Write, shard, None, 6_500 + late, 7_000 + late),
                told("store", Stage::Flush, shard, None, 7_000 + late, 7_900 + late),
                told("invoker", Stage::Publish, shard, None, 8_000 + late, 8_100 + late),
                told("worker", Stage::Wait, shard, Some(0), late + 500, 8_900 + late),
                told("worker", Stage::Wait, shard, Some(1), 5_600 + late, 9_000 + late),
            ]);
        }
        spans
    }

    #[test]
    fn the_steps_of_the_last_shard_add_up_and_name_the_straggler() {
        let story = Story::of(round());
        assert_eq!((story.begun_us, story.total_us, story.shard), (1_000_000, 9_500, Some(1)));
        let steps: Vec<_> = story.path.iter().map(|step| (step.name, step.rank, step.us)).collect();
        assert_eq!(
            steps,
            [
                ("before the push", Some(1), 5_100),
                ("push", Some(1), 500),
                ("queue", None, 500),
                ("fold", None, 400),
                ("write", None, 600),
                ("flush", None, 900),
                ("commit, the rest", None, 100),
                ("publish", None, 100),
                ("deliver", None, 900),
            ]
        );
        assert_eq!(story.ranks[0], RankSum { rank: 1, last_push_us: 5_100 });
        assert_eq!(story.components["worker"], 2);
        assert!(
            story.line().starts_with("9.5 ms: before the push of rank 1 5.1 ms, push of rank 1 500 µs"),
            "{}",
            story.line()
        );
        let fold = story.stages.iter().find(|stage| stage.stage == Stage::Fold).unwrap();
        assert_eq!((fold.count, fold.median_us, fold.total_us), (2, 400, 800));
    }

    #[test]
    fn bars_have_one_width_and_the_shares_add_up() {
        let bars = Story::of(round()).bars();
        let widths: Vec<_> =
            bars.lines().map(|line| line.split('|').nth(1).unwrap().chars().count()).collect();
        assert!(widths.iter().all(|width| *width == usize::try_from(WIDTH).unwrap()), "{bars}");
        assert!(bars.lines().all(|line| line.contains('#')), "{bars}");
    }

    #[test]
    fn clocks_that_disagree_never_give_negative_steps() {
        let mut spans = round();
        for told in spans.iter_mut().filter(|told| told.component == "store") {
            told.span.start_us += 3_600_000_000;
        }
        let story = Story::of(spans);
        let sum: u64 = story.path.iter().map(|step| step.us).sum();
        assert!(sum <= story.total_us, "{story:?}");
    }

    #[test]
    fn a_part_of_a_round_has_a_part_of_a_story() {
        assert_eq!(Story::of(Vec::new()).line(), "nobody remembers it");
        let only_store: Vec<_> = round().into_iter().filter(|told| told.component == "store").collect();
        let story = Story::of(only_store);
        let names: Vec<_> = story.path.iter().map(|step| step.name).collect();
        assert_eq!(names, ["write", "flush"]);
        assert!(story.ranks.is_empty());
    }
}

//! Plots of a simulation.

use std::path::Path;

use anyhow::anyhow;
use plotters::{coord::Shift, prelude::*};
use thalweg_autoscaler::trace::{Score, Timeline};

const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
];
const GREY: RGBColor = RGBColor(140, 140, 140);
/// Points along the time axis.
const POINTS: usize = 1200;

/// What the legend calls it, its colour, its points.
type Series = (String, RGBColor, Vec<(f64, f64)>);
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws invokers over time, their distribution over minutes, and the jobs' slowdowns.
pub(super) fn draw(file: &Path, curves: &[(&str, &Score)], statically: &Timeline) -> anyhow::Result<()> {
    let failed = |error: String| anyhow!(error);
    let root = SVGBackend::new(file, (960, 900)).into_drawing_area();
    root.fill(&WHITE).map_err(|error| failed(error.to_string()))?;
    let (above, below) = root.split_vertically(420);
    let (left, right) = below.split_horizontally(480);
    over_time(&above, curves, statically).map_err(failed)?;
    by_minute(&left, curves, statically).map_err(failed)?;
    slowdowns(&right, curves).map_err(failed)?;
    root.present().map_err(|error| failed(error.to_string()))
}

/// Mean invokers in each of at most [`POINTS`] stretches: days since the start, invokers.
fn stretches(timeline: &Timeline) -> Vec<(f64, f64)> {
    let each = timeline.minutes.len().div_ceil(POINTS).max(1);
    let mean = |(index, minutes): (usize, &[f64])| {
        let day = (index * each) as f64 / 1440.0;
        (day, minutes.iter().sum::<f64>() / minutes.len() as f64 / 60.0)
    };
    timeline.minutes.chunks(each).enumerate().map(mean).collect()
}

/// Shares of the sorted values: value, share that is not above it.
fn distribution(mut values: Vec<f64>) -> Vec<(f64, f64)> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let all = values.len();
    let each = all.div_ceil(POINTS).max(1);
    let share = |(index, value): (usize, f64)| (value, (index + 1) as f64 / all as f64);
    let last = all.saturating_sub(1);
    values
        .into_iter()
        .enumerate()
        .filter(|(index, _)| index % each == 0 || *index == last)
        .map(share)
        .collect()
}

fn lines(
    area: &Area<'_>,
    caption: &str,
    (x, y): (&str, &str),
    series: &[Series],
    (left, right): (f64, f64),
) -> Result<(), String> {
    let highest = series.iter().flat_map(|(_, _, points)| points).map(|(_, y)| *y).fold(0.0, f64::max);
    let text = |error: DrawingAreaErrorKind<_>| format!("{error}");
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(left..right, 0.0..(highest * 1.05).max(f64::MIN_POSITIVE))
        .map_err(text)?;
    chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw().map_err(text)?;
    for (name, colour, points) in series {
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(1)))
            .map_err(text)?
            .label(name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(GREY)
        .position(SeriesLabelPosition::UpperRight)
        .draw()
        .map_err(text)
}

fn over_time(area: &Area<'_>, curves: &[(&str, &Score)], statically: &Timeline) -> Result<(), String> {
    let requested = stretches(statically);
    let mut series = vec![("servers as requested".to_owned(), GREY, requested)];
    for ((name, score), colour) in curves.iter().zip(COLOURS).filter(|((name, _), _)| *name != "static") {
        series.push(((*name).to_owned(), colour, stretches(&score.timeline)));
    }
    let days =
        series.iter().filter_map(|(_, _, points)| points.last()).map(|(day, _)| *day).fold(0.01, f64::max);
    lines(area, "Invokers over time", ("days", "invokers"), &series, (0.0, days))
}

fn by_minute(area: &Area<'_>, curves: &[(&str, &Score)], statically: &Timeline) -> Result<(), String> {
    let shares = |timeline: &Timeline| {
        let minutes = statically.minutes.iter().enumerate().filter(|(_, asked)| **asked > 0.0);
        let share =
            |(index, asked): (usize, &f64)| timeline.minutes.get(index).copied().unwrap_or(0.0) / asked;
        distribution(minutes.map(share).collect())
    };
    let drawn = curves.iter().zip(COLOURS).filter(|((name, _), _)| *name != "static");
    let series: Vec<_> =
        drawn.map(|((name, score), colour)| ((*name).to_owned(), colour, shares(&score.timeline))).collect();
    lines(area, "By minute", ("invokers over servers as requested", "share of minutes"), &series, (0.0, 1.5))
}

fn slowdowns(area: &Area<'_>, curves: &[(&str, &Score)]) -> Result<(), String> {
    let drawn = curves.iter().zip(COLOURS).filter(|((name, _), _)| *name != "static");
    let percent = |score: &Score| score.slowdowns.iter().map(|(_, slowdown)| slowdown * 100.0).collect();
    let series: Vec<_> = drawn
        .map(|((name, score), colour)| ((*name).to_owned(), colour, distribution(percent(score))))
        .collect();
    lines(area, "Slowdown of jobs", ("percent longer than alone", "share of jobs"), &series, (-40.0, 20.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_shows_every_policy() {
        let (mut score, mut statically) = (Score::default(), Timeline::default());
        score.timeline.add(0.0, 3_600_000.0, 3.0);
        score.slowdowns = vec![(0, 0.01), (1, -0.02)];
        statically.add(0.0, 3_600_000.0, 8.0);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("plot.svg");
        draw(&file, &[("thalweg", &score), ("keda", &score)], &statically).unwrap();
        let svg = std::fs::read_to_string(&file).unwrap();
        for text in ["thalweg", "keda", "servers as requested", "Slowdown of jobs", "By minute"] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn distributions_end_with_everything() {
        let points = distribution(vec![3.0, 1.0, f64::NAN, 2.0]);
        assert_eq!(points, [(1.0, 1.0 / 3.0), (2.0, 2.0 / 3.0), (3.0, 1.0)]);
    }
}

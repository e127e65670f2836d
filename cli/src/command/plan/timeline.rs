//! A plan's memory over its predicted time, as an SVG that stands alone: no script, no font, no background, in
//! colours that read on light and dark pages.

use latile_runtime::pipeline::budget::{Parts, mib};
use latile_runtime::pipeline::{Pace, Strategy};
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 52.0;
/// The share of the width that a stage has at least, and that the file's writing has, which has no time.
const LEAST: f64 = 0.08;

/// Names and colours, from the bottom of the stack.
const PARTS: [(&str, &str); 5] = [
    ("base", "#8a8f98"),
    ("picture", "#c98a2b"),
    ("pipeline", "#2f9e8f"),
    ("arena", "#3f7fd1"),
    ("weights", "#a565c9"),
];

fn bytes(p: &Parts) -> [usize; 5] {
    [p.base, p.picture, p.pipeline, p.arena, p.weights]
}

/// Draws `strategy`, with a line where the budget ends.
pub(super) fn draw(title: &str, strategy: &Strategy, pace: &Pace, limit: Option<usize>) -> String {
    let mut stages: Vec<(String, Parts, Option<f64>)> = strategy
        .stages
        .iter()
        .map(|s| {
            (format!("{}, {}", s.stage, s.choice.offer.way), s.parts, Some(pace.stage_seconds(s)))
        })
        .collect();
    stages.push(("file".to_owned(), strategy.finish, None));
    let all: f64 = stages.iter().filter_map(|s| s.2).sum();
    let share = |seconds: Option<f64>| match seconds {
        Some(s) if all > 0.0 => (s / all).max(LEAST),
        _ => LEAST,
    };
    let shares: f64 = stages.iter().map(|s| share(s.2)).sum();
    // A budget far above the plan would flatten it.
    let shown = limit.filter(|&l| l <= 2 * strategy.peak());
    let top = shown.unwrap_or(0).max(strategy.peak()).max(1) as f64 * 1.08;
    let (wide, high) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    let y = |bytes: usize| TOP + high * (1.0 - bytes as f64 / top);

    let mut svg = String::new();
    // Writing to a string cannot fail.
    let mut put = |text: std::fmt::Arguments<'_>| {
        let _ = svg.write_fmt(text);
        svg.push('\n');
    };
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"13\" fill=\"#808080\">"
    ));
    put(format_args!("<title>{}</title>", escape(title)));
    put(format_args!("<text x=\"{LEFT}\" y=\"20\" font-size=\"15\">{}</text>", escape(title)));
    put(format_args!("<text x=\"{LEFT}\" y=\"40\">{}</text>", escape(&strategy.to_string())));
    for i in 0..=4 {
        let at = (top / 4.0 * f64::from(i)) as usize;
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#808080\" stroke-opacity=\"0.3\"/><text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            LEFT + wide,
            y(at),
            LEFT - 8.0,
            y(at) + 4.0,
            mib(at)
        ));
    }
    let mut x = LEFT;
    for (name, parts, seconds) in &stages {
        let width = wide * share(*seconds) / shares;
        let mut below = 0;
        for ((part, colour), n) in PARTS.iter().zip(bytes(parts)) {
            if n == 0 {
                continue;
            }
            put(format_args!(
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"><title>{}: {part} {}</title></rect>",
                y(below + n),
                (width - 1.0).max(0.5),
                y(below) - y(below + n),
                escape(name),
                mib(n)
            ));
            below += n;
        }
        let time = seconds.map_or(String::new(), |s| format!(" {}", super::seconds(s)));
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x + width / 2.0,
            HEIGHT - BOTTOM + 18.0,
            escape(name),
            x + width / 2.0,
            HEIGHT - BOTTOM + 36.0,
            time.trim()
        ));
        x += width;
    }
    if let Some(limit) = shown {
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#d1495b\" stroke-width=\"1.5\" stroke-dasharray=\"6 4\"/><text x=\"{2:.1}\" y=\"{3:.1}\" fill=\"#d1495b\">budget {4}</text>",
            LEFT + wide,
            y(limit),
            LEFT + wide + 6.0,
            y(limit) + 4.0,
            mib(limit)
        ));
    }
    for (i, (part, colour)) in PARTS.iter().rev().enumerate() {
        let at = TOP + 40.0 + 22.0 * i as f64;
        let left = LEFT + wide + 16.0;
        put(format_args!(
            "<rect x=\"{left}\" y=\"{at}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"{}\">{part}</text>",
            left + 18.0,
            at + 11.0
        ));
    }
    put(format_args!("</svg>"));
    svg
}

/// Text as XML has it; a model's name is whatever its file says.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

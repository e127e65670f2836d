//! Signal-to-noise ratio by layer and group of timesteps, a map for each network.

use super::html::{db, escape};
use super::{Layer, QualityReport};
use std::fmt::Write;

/// Of a cell, in pixels.
const WIDTH: usize = 54;
const HEIGHT: usize = 15;
/// Room for layers' names.
const NAMES: usize = 330;
/// Of the estimated or the measured half at least: room for its heading.
const HALF: usize = 66;
/// Between the two.
const GAP: usize = 18;
/// Rows of headings.
const HEAD: usize = 34;
/// What the ends of the colour scale stand for, in dB.
const SCALE: (f32, f32) = (15.0, 45.0);

pub(super) fn write(page: &mut String, report: &QualityReport<'_>) {
    page.push_str(
        "<h2>Signal-to-noise ratio by layer and timesteps</h2>\n<p class=\"note\">In dB. Estimated: of the layer's own result, from the calibration table and its weights, errors of layers before it left out. Measured: of what the layer reads when the int8 network is run on the float network's inputs, the errors of all layers before it included. Rows without an estimate are float. Layers over vectors (the timestep's way) are float and not listed; attention products are further down.</p>\n",
    );
    for c in report.components {
        let of = |l: &&Layer<'_>| l.summary.component == c.role;
        let layers: Vec<&Layer<'_>> = report.layers.iter().filter(of).collect();
        if layers.iter().any(|l| l.summary.int8) {
            let groups = columns(&layers, report.timestep_groups);
            let _ = writeln!(page, "<h3>{}</h3>", escape(&c.role));
            map(page, &layers, &groups);
        }
    }
}

/// Headings of the groups that the layers have: `t < bound`.
fn columns(layers: &[&Layer<'_>], bounds: &[u32]) -> Vec<String> {
    let most = layers.iter().map(|l| l.summary.sqnr_db.len().max(l.measured_input_sqnr_db.len()));
    match most.max().unwrap_or(0) {
        n if n == bounds.len() => bounds.iter().map(|b| format!("t < {b}")).collect(),
        n => (0..n).map(|_| "all".to_owned()).collect(),
    }
}

fn map(page: &mut String, layers: &[&Layer<'_>], groups: &[String]) {
    let half = (groups.len() * WIDTH).max(HALF);
    let measured = layers.iter().any(|l| !l.measured_input_sqnr_db.is_empty());
    let width = NAMES + half + if measured { GAP + half } else { 0 };
    let height = HEAD + layers.len() * HEIGHT;
    let _ = writeln!(
        page,
        "<div class=\"scroll\"><svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" role=\"img\">"
    );
    let mut starts = vec![(NAMES, "estimated")];
    if measured {
        starts.push((NAMES + half + GAP, "measured"));
    }
    for &(x, what) in &starts {
        let _ = writeln!(page, "<text x=\"{x}\" y=\"12\">{what}</text>");
        for (i, group) in groups.iter().enumerate() {
            let _ =
                writeln!(page, "<text x=\"{}\" y=\"27\">{}</text>", x + i * WIDTH, escape(group));
        }
    }
    for (row, layer) in layers.iter().enumerate() {
        let y = HEAD + row * HEIGHT;
        let name = escape(&layer.summary.layer);
        let _ = writeln!(page, "<text x=\"0\" y=\"{}\">{name}</text>", y + 11);
        let estimated: Vec<Option<f32>> = layer.summary.sqnr_db.iter().copied().map(Some).collect();
        let halves = [&estimated[..], layer.measured_input_sqnr_db];
        for (&(x, what), values) in starts.iter().zip(halves) {
            for (i, value) in values.iter().enumerate() {
                cell(page, [x + i * WIDTH, y], *value, &format!("{name}, {what}"));
            }
        }
    }
    page.push_str("</svg></div>\n");
}

/// `what` is escaped.
fn cell(page: &mut String, [x, y]: [usize; 2], value: Option<f32>, what: &str) {
    let Some(v) = value else { return };
    let _ = writeln!(
        page,
        "<g><title>{what}: {v:.1} dB</title><rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{}</text></g>",
        WIDTH - 2,
        HEIGHT - 1,
        colour(v),
        x + 6,
        y + 11,
        db(value)
    );
}

/// From red over yellow to green, pale enough for black text.
fn colour(db: f32) -> String {
    let (low, high) = SCALE;
    let t = ((db - low) / (high - low)).clamp(0.0, 1.0);
    let stops = [[244.0, 150.0, 140.0], [250.0, 233.0, 150.0], [150.0, 214.0, 150.0]];
    let (from, to, t) =
        if t < 0.5 { (stops[0], stops[1], t * 2.0) } else { (stops[1], stops[2], t * 2.0 - 1.0) };
    let mix = |i: usize| (from[i] + (to[i] - from[i]) * t).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_run_from_red_to_green() {
        assert_eq!((colour(-5.0), colour(15.0)), ("#f4968c".into(), "#f4968c".into()));
        assert_eq!(colour(30.0), "#fae996");
        assert_eq!(colour(150.0), "#96d696");
    }
}

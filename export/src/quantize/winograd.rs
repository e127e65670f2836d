//! Which int8 convolutions are computed by Winograd's algorithms, and with which integers.
//!
//! Lives here: the choice between F(2 × 2, 3 × 3), F(2, 3) along rows and the direct convolution, by the table alone, and the
//! weights of the points. Never here: how a matrix of weights is rounded ([`super::weights`]), or what the algorithms
//! compute ([`Algorithm`]).
//!
//! **What it loses.** Two outputs along an axis are y₀ = m₀ + m₁ + m₂ and y₁ = m₁ − m₂ − m₃, each mₖ a sum of rounded inputs
//! times weights wₖ. Let e₀, e₁, e₂ be the mean squared errors of the three kinds of rounded inputs (differences of pixels
//! two apart, sums and differences of neighbours), taken as white, and the weights g₀, g₁, g₂ of a window's row as
//! independent with variance σ². Then w₀ = g₀ and w₃ = g₂ have variance σ², and w₁, w₂ = (g₀ ± g₁ + g₂) / 2 have ¾ σ²:
//! the noise of either output is σ² (e₀ + ¾ e₁ + ¾ e₂) for each row of each channel's window, where a direct
//! convolution with inputs off by e has 3 σ² e. So it is as if the direct one's inputs were off by a third of that sum.
//! Along both axes the factors multiply: with eᵢⱼ the error of kind i down and j across, and k = (1, ¾, ¾), it is as if
//! the inputs were off by a ninth of Σ kᵢ kⱼ eᵢⱼ.

use super::weights::{self, Input, Quantized};
use super::{Quantization, estimate};
use latile_calibration::{LayerTable, Range};
use latile_runtime::format::Role;
use latile_runtime::graph::{Node, Op, QuantRange, Winograd as Algorithm};

/// What the input's noise may grow by, in dB, in the worst group of timesteps, for a convolution to be computed by F(2, 3)
/// without being asked for. In photo-x4 it grows by 4.1 dB at most, and with all of its layers computed so the result is as
/// near to the float one's, and to the truth, as with none; beyond 6 dB a bit is lost.
pub const MOST_NOISE_DB: f32 = 6.0;
/// The same for F(2 × 2, 3 × 3): 6.9 dB at most in photo-x4, with results as near again.
pub const MOST_SQUARE_NOISE_DB: f32 = 9.0;

/// Side of the component's input at which the pixels of a layer's output are counted.
pub(super) const NOMINAL_SIDE: usize = 64;
/// Least pixels of a layer's output for it to be worth while: weights grow by a third, and where there are
/// few pixels they are most of what a layer reads (benches/record).
const LEAST_PIXELS: usize = 256;
/// The same for F(2 × 2, 3 × 3), whose weights grow by seven ninths: of the published LDM-SR the layers of 16 x 16 are faster by
/// F(2, 3), though in the cache they are not.
const LEAST_SQUARE_PIXELS: usize = 1024;
/// Least channels, the harmonic mean of input and output, for F(2 × 2, 3 × 3) to be worth while: what making points and joining
/// sums costs grows with the channels, what multiplying them saves with their product. With 96 it takes 0.79 to 1.05 of the
/// time or instructions of F(2, 3), depending on the instruction set, with 64 0.86 to 1.15 (benches/record).
const LEAST_CHANNELS: f32 = 96.0;
/// Side of the window.
const SIDE: usize = 3;
/// Weights of a window.
const WINDOW: usize = SIDE * SIDE;
/// Steps of words for one of the smallest range's bytes, where words need not be larger: their rounding then adds 1 / 64 to
/// the noise of bytes at most, four to each.
const WORDS_A_STEP: f32 = 16.0;
/// The largest input that calibration saw becomes the largest word over this.
const HEADROOM: f32 = 2.0;

/// Which int8 convolutions are computed by Winograd's algorithms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Winograd {
    /// Those whose input's noise grows by [`MOST_SQUARE_NOISE_DB`] at most by F(2 × 2, 3 × 3), and of the others those
    /// whose noise grows by [`MOST_NOISE_DB`] at most by F(2, 3).
    #[default]
    Auto,
    /// None.
    Off,
    /// As `Auto`, but none by F(2 × 2, 3 × 3).
    Rows,
    /// All that can be, by F(2 × 2, 3 × 3) where that can.
    All,
}

/// A way to compute a convolution by Winograd's.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Way {
    pub(super) by: Algorithm,
    /// By group of timesteps, [`kinds`] each.
    pub(super) ranges: Vec<Range>,
    /// What one step of a word is worth, by group; only of squares.
    pub(super) words: Vec<f32>,
    /// What the input's noise grows by in the worst group of timesteps, in dB.
    pub(super) noise_db: f32,
}

/// Kinds of points: measured ranges of a group.
pub(super) const fn kinds(by: Algorithm) -> usize {
    match by {
        Algorithm::Rows => 3,
        Algorithm::Square => 9,
    }
}

impl Way {
    /// The ranges as they are stored.
    pub(super) fn stored(&self) -> Vec<QuantRange> {
        let mut stored = Vec::new();
        for (group, ranges) in self.ranges.chunks(kinds(self.by)).enumerate() {
            let word = self.words.get(group);
            stored.extend(word.map(|&scale| QuantRange { scale, zero_point: 0 }));
            stored.extend(ranges.iter().map(Range::quant));
        }
        stored
    }
}

/// What is decided about a 3 × 3 convolution of stride 1.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// What the input's noise grows by in the worst group of timesteps, in dB, by F(2, 3) where the layer is direct, where
    /// the table knows.
    pub(super) noise_db: Option<f32>,
    /// The ways that may be taken, the best first; none where it stays direct.
    pub(super) ways: Vec<Way>,
    /// Why it stays direct; empty where it does not.
    pub(super) why: Option<String>,
}

/// Decides about layer `node` of so many input and output channels, whose output has `pixels`; `None` where no algorithm is
/// for it.
pub(super) fn decide(
    node: &Node,
    role: Role,
    table: &LayerTable,
    how: &Quantization,
    (channels, pixels): ([usize; 2], usize),
) -> Option<Verdict> {
    let Op::Conv2d { kernel: [3, 3], stride: [1, 1], .. } = node.op else { return None };
    let direct =
        |noise_db, why: String| Some(Verdict { noise_db, ways: Vec::new(), why: Some(why) });
    let (Some(rows), Some(input)) = (table.winograd(how.method), table.ranges(how.method)) else {
        return direct(None, "the calibration table has no ranges for it".to_owned());
    };
    let rows = way(Algorithm::Rows, rows.into_flattened(), Vec::new(), &input);
    let noise_db = Some(rows.noise_db);
    if how.winograd == Winograd::Off {
        return direct(noise_db, "--winograd off asks for it".to_owned());
    }
    if let Some(glob) = how.keep_direct.iter().find(|g| g.is_of(role.name(), &node.name)) {
        return direct(noise_db, format!("--keep-direct {} asks for it", glob.text()));
    }
    let all = how.winograd == Winograd::All;
    let worst = rows.noise_db;
    let mut ways = Vec::new();
    if how.winograd != Winograd::Rows {
        let squares = squares(table, how, &input);
        let [c, n] = channels.map(|c| c as f32);
        let many = 2.0 * c * n >= LEAST_CHANNELS * (c + n);
        let worth = many && pixels >= LEAST_SQUARE_PIXELS;
        let auto = |way: &Way| worth && way.noise_db <= MOST_SQUARE_NOISE_DB;
        ways.extend(squares.filter(|way| all || auto(way)));
    }
    if all || worst <= MOST_NOISE_DB {
        ways.push(rows);
    }
    if ways.is_empty() {
        let why =
            format!("its input's noise would grow by {worst:.1} dB, more than {MOST_NOISE_DB} dB");
        return direct(noise_db, why);
    }
    if !all && pixels < LEAST_PIXELS {
        let why = format!("{pixels} pixels of output are too few to be worth more weights");
        return direct(noise_db, why);
    }
    Some(Verdict { noise_db: ways.first().map(|w| w.noise_db), ways, why: None })
}

/// A way with these ranges, whose noise is compared with that of direct ranges.
fn way(by: Algorithm, ranges: Vec<Range>, words: Vec<f32>, direct: &[Range]) -> Way {
    let growth = |(w, d): (&[Range], &Range)| estimate::db(input_error(w), f64::from(d.error));
    let noise_db =
        ranges.chunks(kinds(by)).zip(direct).map(growth).fold(f32::NEG_INFINITY, f32::max);
    Way { by, ranges, words, noise_db }
}

/// F(2 × 2, 3 × 3), where the table knows it and there are words that all of its bytes can be made of.
fn squares(table: &LayerTable, how: &Quantization, direct: &[Range]) -> Option<Way> {
    let mut ranges = table.squares(how.method)?;
    let mut words = Vec::new();
    for (ranges, group) in ranges.iter_mut().zip(&table.groups) {
        let least = ranges.iter().map(|r| r.scale).fold(f32::INFINITY, f32::min);
        let largest = group.max.max(-group.min);
        let word = (least / WORDS_A_STEP).max(HEADROOM * largest / f32::from(Algorithm::MOST_WORD));
        if ranges.iter().any(|r| Algorithm::factor(word, r.scale).is_none()) || !word.is_normal() {
            return None;
        }
        // Each byte is made of four rounded words.
        ranges.iter_mut().for_each(|r| r.error += word * word / 3.0);
        words.push(word);
    }
    Some(way(Algorithm::Square, ranges.into_flattened(), words, direct))
}

/// The mean squared error of a direct convolution's input that makes as much noise as inputs rounded to `ranges`.
pub(super) fn input_error(ranges: &[Range]) -> f64 {
    const WEIGHT: [f64; SIDE] = [1.0, 0.75, 0.75];
    let weighted = |ranges: &[Range]| -> f64 {
        ranges.iter().zip(WEIGHT).map(|(r, k)| k * f64::from(r.error)).sum::<f64>() / SIDE as f64
    };
    match ranges.len() {
        SIDE => weighted(ranges),
        WINDOW => {
            let rows = ranges.chunks_exact(SIDE).zip(WEIGHT);
            rows.map(|(row, k)| k * weighted(row)).sum::<f64>() / SIDE as f64
        }
        _ => ranges.iter().map(|r| f64::from(r.error)).sum(),
    }
}

/// What calibration knows of the input at `point`. With v and ρ a channel's variance and its correlation of
/// neighbours, ρ² that of pixels two apart, the variances along an axis are 2v (1 − ρ²) of points 0 and 3 and 2v (1 ± ρ) of
/// 1 and 2; pixels across it are as alike as those of the input. Sums have twice the mean, differences none. Along both
/// axes the factors multiply, ρ being taken as that of neighbours below each other too.
fn input_at(by: Algorithm, point: usize, input: &Input) -> Input {
    let rho = input.neighbour();
    let along = |point: usize| match Algorithm::KIND[point] {
        0 => (0.0, 2.0 * (1.0 - rho * rho)),
        1 => (2.0, 2.0 * (1.0 + rho)),
        _ => (0.0, 2.0 * (1.0 - rho)),
    };
    let across = along(point % 4);
    let down = match by {
        Algorithm::Rows => (1.0, 1.0),
        Algorithm::Square => along(point / 4),
    };
    input.times(down.0 * across.0, down.1 * across.1)
}

/// The number of the kind of `point`, and by how much its mean square counts: along an axis points 0 and 3 count half, each
/// being in one of two outputs.
fn kind_of(by: Algorithm, point: usize) -> (usize, f64) {
    const SHARE: [f64; 4] = [0.5, 1.0, 1.0, 0.5];
    match by {
        Algorithm::Rows => (Algorithm::KIND[point], SHARE[point]),
        Algorithm::Square => {
            let [down, across] = [point / 4, point % 4];
            let kind = SIDE * Algorithm::KIND[down] + Algorithm::KIND[across];
            (kind, SHARE[down] * SHARE[across])
        }
    }
}

/// The point whose input has a mean.
const fn mean_point(by: Algorithm) -> usize {
    match by {
        Algorithm::Rows => 1,
        Algorithm::Square => 5,
    }
}

/// Replaces the weights `values`, `[n, c, 3, 3]`, by the integers of the points, `[points · m, c, …]` for m = n
/// rounded up to a multiple of 16.
///
/// Only sums have a mean, and their point is part of all outputs alike, so the bias makes up for what rounding it shifts.
/// Of mean squares, what two points' errors have in common is left out, their roundings being independent.
///
/// # Errors
/// As [`weights::quantize`]; the index is of the weight as it was given.
pub(super) fn quantize(
    by: Algorithm,
    values: &mut Vec<f32>,
    input: &Input,
) -> Result<Quantized, usize> {
    let row = input.channels() * WINDOW;
    let n = values.len() / row.max(1);
    let mut signal = 0.0;
    for filter in values.chunks_exact_mut(row) {
        input.divide(filter, WINDOW);
        signal += weights::form(filter, WINDOW, input, 1.0);
    }
    let m = by.filters(n as u32) as usize / by.points();
    // Weights of a window at a point.
    let window = by.kernel().map(|k| k as usize).iter().product::<usize>();
    transform(by, values, m * input.channels());
    let mut out = Quantized::default();
    out.power.signal = signal;
    let part = m * input.channels() * window;
    for (point, rows) in values.chunks_exact_mut(part).enumerate() {
        // Filters and channels are in the order that they had.
        let given = |i: usize| i / window * WINDOW + i % window * SIDE;
        let found = weights::quantize(rows, window, &input_at(by, point, input)).map_err(given)?;
        out.scale.extend(found.scale);
        out.sum.extend(found.sum);
        if point == mean_point(by) {
            out.bias = found.bias;
        }
        let (kind, share) = kind_of(by, point);
        out.power.weights += share * found.power.weights;
        out.power.gain[kind] += share * found.power.gain[0];
        out.power.nearest += share * found.power.nearest;
    }
    out.bias.truncate(n);
    Ok(out)
}

/// Replaces windows of 3 × 3 by what they are at each point, each point's padded with zeros to so many `columns` of channels
/// and filters.
fn transform(by: Algorithm, values: &mut Vec<f32>, columns: usize) {
    let stored = std::mem::take(values);
    let window = by.kernel().map(|k| k as usize).iter().product::<usize>();
    values.reserve_exact(by.points() * columns * window);
    for point in 0..by.points() {
        for g in stored.as_chunks::<WINDOW>().0 {
            let g = g.map(f64::from);
            match by {
                Algorithm::Rows => {
                    for row in g.as_chunks::<SIDE>().0 {
                        values.push(along(point, *row) as f32);
                    }
                }
                Algorithm::Square => {
                    let down = [0, 1, 2].map(|x| along(point / 4, [g[x], g[3 + x], g[6 + x]]));
                    values.push(along(point % 4, down) as f32);
                }
            }
        }
        values.resize((point + 1) * columns * window, 0.0);
    }
}

/// What three weights along an axis are at `point`.
fn along(point: usize, [a, b, c]: [f64; SIDE]) -> f64 {
    match point {
        0 => a,
        1 => (a + b + c) * 0.5,
        2 => (a - b + c) * 0.5,
        _ => c,
    }
}

#[cfg(test)]
mod tests;

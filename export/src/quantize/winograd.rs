//! Which int8 convolutions are computed by Winograd's F(2, 3) along rows, and with which integers.
//!
//! Lives here: the choice between that and the direct convolution, by the table alone, and the weights of the four
//! points. Never here: how a matrix of weights is rounded ([`super::weights`]), or what the algorithm computes
//! ([`Quant::winograd`](latile_runtime::graph::Quant)).
//!
//! **What it loses.** Two outputs are y₀ = m₀ + m₁ + m₂ and y₁ = m₁ − m₂ − m₃, each mₖ a sum of rounded inputs times
//! weights wₖ. Let e₀, e₁, e₂ be the mean squared errors of the three kinds of rounded inputs (differences of pixels
//! two apart, sums and differences of neighbours), taken as white, and the weights g₀, g₁, g₂ of a window's row as
//! independent with variance σ². Then w₀ = g₀ and w₃ = g₂ have variance σ², and w₁, w₂ = (g₀ ± g₁ + g₂) / 2 have ¾ σ²:
//! the noise of either output is σ² (e₀ + ¾ e₁ + ¾ e₂) for each row of each channel's window, where a direct
//! convolution with inputs off by e has 3 σ² e. So it is as if the direct one's inputs were off by a third of that sum.

use super::weights::{self, Input, Power, Quantized};
use super::{Quantization, estimate};
use latile_calibration::{LayerTable, Range};
use latile_runtime::format::Role;
use latile_runtime::graph::{Node, Op, winograd_filters};

/// What the input's noise may grow by, in dB, in the worst group of timesteps, for a convolution to be computed so without
/// being asked for. In photo-x4 it grows by 3.8 dB at most, and with all of its layers computed so the result is as near to
/// the float one's, and to the truth, as with none; beyond 6 dB a bit is lost.
pub const MOST_NOISE_DB: f32 = 6.0;

/// Side of the component's input at which the pixels of a layer's output are counted.
pub(super) const NOMINAL_SIDE: usize = 64;
/// Least pixels of a layer's output for it to be worth while: weights grow by a third, and where there are few pixels
/// they are most of what a layer reads. Of the published LDM-SR's U-Net the layers of 64 x 64 to 16 x 16 take 0.75 to 0.81
/// of the direct ones' time, those of 8 x 8 0.96 (benches/record).
const LEAST_PIXELS: usize = 256;
/// Side of the window.
const SIDE: usize = 3;
/// Weights of a window.
const WINDOW: usize = SIDE * SIDE;
/// Products that make two outputs.
const POINTS: usize = 4;

/// Which int8 convolutions are computed by Winograd's F(2, 3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Winograd {
    /// Those whose input's noise grows by [`MOST_NOISE_DB`] at most.
    #[default]
    Auto,
    /// None.
    Off,
    /// All that can be.
    All,
}

/// What is decided about a 3 × 3 convolution of stride 1.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// What the input's noise grows by in the worst group of timesteps, in dB, where the table knows.
    pub(super) noise_db: Option<f32>,
    /// The ranges, three for each group, or why it stays direct.
    pub(super) ranges: Option<Vec<[Range; 3]>>,
    /// Why it stays direct; empty where it does not.
    pub(super) why: Option<String>,
}

/// Decides about layer `node`, whose output has `pixels`; `None` where the algorithm is not for it.
pub(super) fn decide(
    node: &Node,
    role: Role,
    table: &LayerTable,
    how: &Quantization,
    pixels: usize,
) -> Option<Verdict> {
    let Op::Conv2d { kernel: [3, 3], stride: [1, 1], .. } = node.op else { return None };
    let direct = |noise_db, why: String| Some(Verdict { noise_db, ranges: None, why: Some(why) });
    let (Some(ranges), Some(input)) = (table.winograd(how.method), table.ranges(how.method)) else {
        return direct(None, "the calibration table has no ranges for it".to_owned());
    };
    let growth = |(w, d): (&[Range; 3], &Range)| estimate::db(input_error(w), f64::from(d.error));
    let worst = ranges.iter().zip(&input).map(growth).fold(f32::NEG_INFINITY, f32::max);
    let noise_db = Some(worst);
    if how.winograd == Winograd::Off {
        return direct(noise_db, "--winograd off asks for it".to_owned());
    }
    if let Some(glob) = how.keep_direct.iter().find(|g| g.is_of(role.name(), &node.name)) {
        return direct(noise_db, format!("--keep-direct {} asks for it", glob.text()));
    }
    if how.winograd == Winograd::Auto {
        if worst > MOST_NOISE_DB {
            return direct(
                noise_db,
                format!(
                    "its input's noise would grow by {worst:.1} dB, more than {MOST_NOISE_DB} dB"
                ),
            );
        }
        if pixels < LEAST_PIXELS {
            return direct(
                noise_db,
                format!("{pixels} pixels of output are too few to be worth more weights"),
            );
        }
    }
    Some(Verdict { noise_db, ranges: Some(ranges), why: None })
}

/// The mean squared error of a direct convolution's input that makes as much noise as inputs rounded to `ranges`.
pub(super) fn input_error(ranges: &[Range]) -> f64 {
    match ranges {
        [apart, sum, difference] => {
            let [e0, e1, e2] = [apart, sum, difference].map(|r| f64::from(r.error));
            (e0 + 0.75 * (e1 + e2)) / 3.0
        }
        _ => ranges.iter().map(|r| f64::from(r.error)).sum(),
    }
}

/// What calibration knows of the input of each point. With v and ρ a channel's variance and its correlation of
/// neighbours, ρ² that of pixels two apart, the variances are 2v (1 − ρ²) of points 0 and 3 and 2v (1 ± ρ) of 1 and 2;
/// rows above each other are as alike as those of the input. Sums have twice the mean, differences none.
fn inputs(input: &Input) -> [Input; POINTS] {
    let rho = input.neighbour();
    let apart = input.times(0.0, 2.0 * (1.0 - rho * rho));
    let sum = input.times(2.0, 2.0 * (1.0 + rho));
    let difference = input.times(0.0, 2.0 * (1.0 - rho));
    [apart.clone(), sum, difference, apart]
}

/// Replaces the weights `values`, `[n, c, 3, 3]`, by the integers of the four points, `[4 · m, c, 3, 1]` for m = n
/// rounded up to a multiple of 16.
///
/// Only sums have a mean, and m₁ is part of both outputs alike, so the bias makes up for what rounding point 1 shifts.
/// Of the mean squares, those of points 0 and 3 count half, each being in one of two outputs; what two points' errors
/// have in common is left out, their roundings being independent.
///
/// # Errors
/// As [`weights::quantize`]; the index is of the weight as it was given.
pub(super) fn quantize(values: &mut Vec<f32>, input: &Input) -> Result<Quantized, usize> {
    let row = input.channels() * WINDOW;
    let n = values.len() / row.max(1);
    let mut signal = 0.0;
    for filter in values.chunks_exact_mut(row) {
        input.divide(filter, WINDOW);
        signal += weights::form(filter, WINDOW, input, 1.0);
    }
    let m = winograd_filters(n as u32) as usize / POINTS;
    transform(values, m * input.channels());
    let mut out = Quantized::default();
    let part = m * input.channels() * SIDE;
    let mut powers = [Power::default(); POINTS];
    for (point, (rows, of)) in values.chunks_exact_mut(part).zip(inputs(input)).enumerate() {
        // Filters and channels are in the order that they had.
        let given = |i: usize| i / SIDE * WINDOW + i % SIDE * SIDE;
        let found = weights::quantize(rows, SIDE, &of).map_err(given)?;
        powers[point] = found.power;
        out.scale.extend(found.scale);
        out.sum.extend(found.sum);
        if point == 1 {
            out.bias = found.bias;
        }
    }
    out.bias.truncate(n);
    let of = |f: &dyn Fn(&Power) -> f64| {
        let [a, b, c, d] = powers.each_ref().map(f);
        [(a + d) / 2.0, b, c]
    };
    out.power = Power {
        signal,
        weights: of(&|p| p.weights).iter().sum(),
        gain: of(&|p| p.gain[0]),
        nearest: of(&|p| p.nearest).iter().sum(),
    };
    Ok(out)
}

/// Replaces windows of 3 × 3 by their columns at the four points, each point's padded with zeros to `columns`.
fn transform(values: &mut Vec<f32>, columns: usize) {
    let stored = std::mem::take(values);
    values.reserve_exact(POINTS * columns * SIDE);
    for point in 0..POINTS {
        for g in stored.as_chunks::<SIDE>().0 {
            let [a, b, c] = g.map(f64::from);
            values.push(match point {
                0 => g[0],
                1 => ((a + b + c) * 0.5) as f32,
                2 => ((a - b + c) * 0.5) as f32,
                _ => g[2],
            });
        }
        values.resize((point + 1) * columns * SIDE, 0.0);
    }
}

#[cfg(test)]
mod tests;

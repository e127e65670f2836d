//! What a layer loses, estimated from the table and the weights alone.
//!
//! In the units of [`super::weights`]: with `S`, `W` and `G` the powers of the signal, of the weights' error and
//! of white noise (`Power`), `p_g` the input's mean square in group g over that of all groups, and `n_g` the mean
//! squared error of the quantized input, which is taken as white (Widrow & Kollár 2008, chapter 1),
//!
//! ```text
//! SQNR_g = 10 · log10( S · p_g / (W · p_g + G · n_g) )
//! ```
//!
//! A layer by one of Winograd's algorithms rounds its input to several ranges, and `G · n_g` is a sum of products.
//!
//! Errors that come in with the input are not in it: that is what measuring is for.

use super::weights::Power;
use super::{Layer, LayerSummary, winograd};
use latile_calibration::table::EXACT_DB;
use latile_calibration::{LayerTable, Range};

/// A layer's estimates, in dB.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Estimate {
    /// Of the result, by group.
    all: Vec<f32>,
    /// Of the quantized input alone, by group; of several ranges, that of a direct convolution with as much noise.
    input: Vec<f32>,
    /// Of the rounded weights alone.
    weights: f32,
}

impl Estimate {
    /// The least by group.
    pub(crate) fn worst(&self) -> f32 {
        self.all.iter().copied().fold(EXACT_DB, f32::min)
    }

    /// Noise over signal, the mean of all groups.
    pub(crate) fn noise_to_signal(&self) -> f64 {
        let ratios = self.all.iter().map(|&db| libm::exp10(-f64::from(db) / 10.0));
        ratios.sum::<f64>() / self.all.len().max(1) as f64
    }

    pub(crate) fn put(self, summary: &mut LayerSummary) {
        summary.sqnr_db = self.all;
        summary.input_sqnr_db = self.input;
        summary.weight_sqnr_db = Some(self.weights);
    }
}

/// `signal / noise` in dB, at most [`EXACT_DB`]. Pure Rust's logarithm: a layer must not be float on one
/// machine and int8 on another.
pub(crate) fn db(signal: f64, noise: f64) -> f32 {
    if noise <= 0.0 || !(signal / noise).is_finite() {
        return EXACT_DB;
    }
    let most = f64::from(EXACT_DB);
    (10.0 * libm::log10(signal / noise)).clamp(-most, most) as f32
}

/// Mean square of a layer's scaled input in each group, relative to that over all groups.
pub(super) fn relative_power(table: &LayerTable) -> Vec<f64> {
    let scale = |c: usize| table.input_scale.as_ref().map_or(1.0, |s| f64::from(s[c]));
    let all: f64 = (0..table.channel_ms.len())
        .map(|c| f64::from(table.channel_ms[c]) * scale(c) * scale(c))
        .sum::<f64>()
        / table.channel_ms.len() as f64;
    let relative = |power: f32| if all > 0.0 { f64::from(power) / all } else { 1.0 };
    table.groups.iter().map(|g| relative(g.power)).collect()
}

pub(crate) fn estimate(layer: &Layer, power: &Power) -> Estimate {
    let noise = |ranges: &[Range]| -> f64 {
        ranges.iter().zip(power.gain).map(|(r, gain)| gain * f64::from(r.error)).sum()
    };
    Estimate {
        all: layer
            .relative_power
            .iter()
            .zip(layer.groups())
            .map(|(&p, r)| db(power.signal * p, power.weights * p + noise(r)))
            .collect(),
        input: layer
            .power
            .iter()
            .zip(layer.groups())
            .map(|(&p, r)| db(f64::from(p), winograd::input_error(r)))
            .collect(),
        weights: db(power.signal, power.weights),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decibels_are_bounded() {
        assert_eq!(db(100.0, 1.0), 20.0);
        assert_eq!(db(1.0, 1000.0), -30.0);
        assert_eq!((db(1.0, 0.0), db(0.0, 0.0)), (EXACT_DB, EXACT_DB));
        assert_eq!(db(0.0, 1.0), -EXACT_DB);
    }
}

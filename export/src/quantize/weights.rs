//! One layer's weights as integers.
//!
//! Lives here: the choice of a scale for each output channel, the correction of roundings within a window, the
//! correction of the bias, and the sums from which a layer's signal-to-noise ratio is estimated. Never here:
//! graphs, files. Everything is plain f32 and f64 arithmetic in one order, without fused multiply-adds and
//! without a platform's mathematical functions, so that every machine writes the same bytes.
//!
//! The model of the error. Let x be the scaled input of a layer, e = w − ŵ the error of a weight. With the bias
//! corrected for the input's mean, the output's error is Σ e·(x − E[x]). Calibration knows each channel's variance v
//! and the correlation ρ of neighbouring pixels, but nothing across channels, which are taken as
//! uncorrelated; so its mean square is Σ over channels of `v · ((1 − ρ) · Σₚ eₚ² + ρ · (Σₚ eₚ)²)`, p running over
//! the window's positions. (GPTQ, Frantar et al. 2023, minimises the same quadratic form with a measured
//! Hessian; this is that form with the few numbers that a table can hold.)

/// Largest stored weight; −128 is never stored.
const MOST: f32 = 127.0;
/// Scales that are tried: fractions of the one that clips nothing.
const CLIPS: [f32; 7] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7];
/// A row of weights whose largest is below is a row of zeros: no f16 output would show it.
const ZERO: f32 = 1e-30;
/// A weight beyond, after division by its input's scale, is refused: its square would be lost in sums.
const LARGEST: f32 = 1e15;
/// Part of a channel's mean square that is added to its variance: pictures other than the calibrated ones
/// have other means.
const RESERVE: f32 = 1.0 / 16.0;
/// Sums are kept in this many lanes, whatever the machine's registers are.
const LANES: usize = 16;

/// What calibration knows of a layer's input.
#[derive(Clone, Debug)]
pub(super) struct Input {
    /// What channel c is multiplied by before it is quantized.
    pub(super) scale: Option<Vec<f32>>,
    /// Mean of the scaled input.
    mean: Vec<f32>,
    /// Variance of the scaled input, and a reserve.
    variance: Vec<f32>,
    /// Correlation of neighbouring pixels.
    neighbour: f32,
}

impl Input {
    /// From the mean and the mean square of each channel of the real input.
    pub(super) fn new(
        scale: Option<Vec<f32>>,
        mean: &[f32],
        square: &[f32],
        neighbour: f32,
    ) -> Self {
        let factor = |c: usize| scale.as_ref().map_or(1.0, |s| s[c]);
        let moment = |c: usize| {
            let (m, ms) = (mean[c], square[c].max(0.0));
            ((ms - m * m).max(0.0) + ms * RESERVE) * factor(c) * factor(c)
        };
        let variance = (0..mean.len()).map(moment).collect();
        let mean = mean.iter().enumerate().map(|(c, &m)| m * factor(c)).collect();
        Self { scale, mean, variance, neighbour }
    }

    /// Input channels.
    pub(super) fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Correlation of neighbouring pixels.
    pub(super) fn neighbour(&self) -> f32 {
        self.neighbour
    }

    /// An input that is scaled already, with so many times the mean and the variance.
    pub(super) fn times(&self, mean: f32, variance: f32) -> Self {
        Self {
            scale: None,
            mean: self.mean.iter().map(|m| m * mean).collect(),
            variance: self.variance.iter().map(|v| v * variance).collect(),
            neighbour: self.neighbour,
        }
    }

    /// Divides a filter's weights by what their channels are multiplied by.
    pub(super) fn divide(&self, row: &mut [f32], window: usize) {
        if let Some(scale) = &self.scale {
            for (weights, &s) in row.chunks_exact_mut(window).zip(scale) {
                weights.iter_mut().for_each(|w| *w /= s);
            }
        }
    }

    /// Whether the input has a mean, so that a bias can make up for rounded weights.
    pub(super) fn has_mean(&self) -> bool {
        self.mean.iter().any(|&m| m != 0.0)
    }
}

/// What a layer's weights became; the integers themselves replace the weights. Of a layer by Winograd's algorithms there are
/// rows for each point and channel, and a bias for each channel.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Quantized {
    /// What one step of a stored weight is worth, for each row.
    pub(crate) scale: Vec<f32>,
    /// Sum of the stored weights of each row, a whole number.
    pub(crate) sum: Vec<f32>,
    /// What the bias gains: `Σ E[x] · (w − ŵ)`.
    pub(crate) bias: Vec<f32>,
    /// What the estimates need.
    pub(super) power: Power,
}

/// Mean squares of a layer's output, summed over its channels.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Power {
    /// Of what the weights make of the input.
    pub(super) signal: f64,
    /// Of the error that rounded weights make.
    pub(super) weights: f64,
    /// Σ ŵ²: what white noise of mean square 1 in the scaled input becomes; where it is rounded to several ranges,
    /// in what each of them is for.
    pub(super) gain: [f64; 9],
    /// The error that the weights would make if each were rounded to the nearest.
    pub(super) nearest: f64,
}

/// Replaces the weights `values`, `[n, c, window]`, by the integers that stand for `w / scale[c]`.
///
/// # Errors
/// The index of a weight that, divided by its input's scale, is too large to sum up, or the first of a row
/// whose bias would be.
///
/// # Panics
/// Where `values` is not a multiple of the input's channels times `window`.
pub(super) fn quantize(
    values: &mut [f32],
    window: usize,
    input: &Input,
) -> Result<Quantized, usize> {
    let channels = input.mean.len();
    let depth = channels * window;
    assert_eq!(values.len() % depth.max(1), 0, "weights of another depth");
    // Importance of each weight of a row.
    let importance: Vec<f32> =
        input.variance.iter().flat_map(|&v| std::iter::repeat_n(v, window)).collect();
    let mut out = Quantized::default();
    let mut errors = vec![0f32; depth];
    let sound = |w: &f32| w.abs() <= LARGEST;
    for (n, row) in values.chunks_exact_mut(depth).enumerate() {
        input.divide(row, window);
        if let Some(k) = row.iter().position(|w| !sound(w)) {
            return Err(n * depth + k);
        }
        let scale = choose_scale(row, &importance);
        out.power.signal += form(row, window, input, 1.0);
        let step = 1.0 / scale;
        for (w, e) in row.iter_mut().zip(&mut errors) {
            let v = *w * step;
            *w = nearest(v);
            *e = v - *w;
        }
        let unit = f64::from(scale);
        out.power.nearest += form(&errors, window, input, unit);
        if window > 1 && input.neighbour > 0.0 {
            let windows = row.chunks_exact_mut(window).zip(errors.chunks_exact_mut(window));
            windows.for_each(|(q, e)| settle(q, e, input.neighbour));
        }
        out.power.weights += form(&errors, window, input, unit);
        let mut shift = 0f64;
        for (e, &mean) in errors.chunks_exact(window).zip(&input.mean) {
            shift += f64::from(mean) * f64::from(e.iter().sum::<f32>());
        }
        let (mut sum, mut squares) = (0f64, 0f64);
        for &q in &*row {
            sum += f64::from(q);
            squares += f64::from(q * q);
        }
        out.power.gain[0] += squares * unit * unit;
        out.scale.push(scale);
        out.sum.push(sum as f32);
        let bias = (shift * unit) as f32;
        if !sound(&bias) {
            return Err(n * depth);
        }
        out.bias.push(bias);
    }
    Ok(out)
}

/// The whole number nearest to `v`, halves to even, at most [`MOST`] from zero.
fn nearest(v: f32) -> f32 {
    // Adding 1.5 · 2²³ leaves no room for a fraction: the sum is rounded as IEEE 754 has it. Unlike a call
    // of `round_ties_even` this is a vector instruction on every machine.
    const ROUND: f32 = 12_582_912.0;
    (v.clamp(-MOST, MOST) + ROUND) - ROUND
}

/// The scale of a row: of the candidates, the one with the least Σ importance · (w − ŵ)².
fn choose_scale(row: &[f32], importance: &[f32]) -> f32 {
    let most = row.iter().fold(0f32, |m, w| m.max(w.abs()));
    if most < ZERO {
        return 1.0;
    }
    let mut best = (f64::INFINITY, most / MOST);
    for clip in CLIPS {
        let scale = most * clip / MOST;
        let step = 1.0 / scale;
        let mut lanes = [0f32; LANES];
        let (weights, rest) = row.as_chunks::<LANES>();
        let (important, rest_important) = importance.as_chunks::<LANES>();
        for (w, h) in weights.iter().zip(important) {
            for i in 0..LANES {
                let v = w[i] * step;
                let e = v - nearest(v);
                lanes[i] += h[i] * (e * e);
            }
        }
        for (i, (w, h)) in rest.iter().zip(rest_important).enumerate() {
            let v = w * step;
            let e = v - nearest(v);
            lanes[i] += h * (e * e);
        }
        let error: f64 = lanes.iter().map(|&v| f64::from(v)).sum();
        let error = error * f64::from(scale) * f64::from(scale);
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

/// The mean square that the row `d` of weights, or of their errors in units of `unit`, makes of the input.
pub(super) fn form(d: &[f32], window: usize, input: &Input, unit: f64) -> f64 {
    let rho = input.neighbour;
    let mut total = 0f64;
    for (d, &v) in d.chunks_exact(window).zip(&input.variance) {
        let (mut sum, mut squares) = (0f32, 0f32);
        for &e in d {
            sum += e;
            squares += e * e;
        }
        total += f64::from(v * ((1.0 - rho) * squares + rho * (sum * sum)));
    }
    total * unit * unit
}

/// Rounds weights of a window the other way as long as that lowers the form above: neighbouring pixels are
/// alike, so what counts most is that the window's errors cancel.
fn settle(q: &mut [f32], e: &mut [f32], rho: f32) {
    let mut sum: f32 = e.iter().sum();
    for _ in 0..q.len() {
        let towards = if sum > 0.0 { 1.0 } else { -1.0 };
        let mut best: Option<(usize, f32)> = None;
        for (i, (&q, &e)) in q.iter().zip(&*e).enumerate() {
            let size = e * towards;
            if size > best.map_or(0.0, |b| b.1) && (q + towards).abs() <= MOST {
                best = Some((i, size));
            }
        }
        let Some((i, size)) = best else { return };
        // (|e| − 1)² − e² and (|Σ| − 1)² − Σ².
        let gain = (1.0 - rho) * (1.0 - 2.0 * size) + rho * (1.0 - 2.0 * sum.abs());
        if gain >= 0.0 {
            return;
        }
        q[i] += towards;
        e[i] -= towards;
        sum -= towards;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from −1 to 1 (Knuth's MMIX generator).
    fn numbers(mut seed: u64, n: usize) -> Vec<f32> {
        let mut next = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((seed >> 40) as f32) / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn flat(channels: usize, mean: f32, neighbour: f32) -> Input {
        Input::new(None, &vec![mean; channels], &vec![mean * mean + 1.0; channels], neighbour)
    }

    #[test]
    fn rounding_is_to_the_nearest_and_to_even() {
        for v in numbers(1, 4000).into_iter().map(|v| v * 200.0) {
            assert_eq!(nearest(v), v.clamp(-127.0, 127.0).round_ties_even(), "{v}");
        }
        assert_eq!([0.5, 1.5, -0.5, -2.5].map(nearest), [0.0, 2.0, 0.0, -2.0]);
    }

    #[test]
    fn a_weight_times_its_scale_is_near_what_it_was() {
        let (n, c, window) = (5, 7, 9);
        let weights = numbers(2, n * c * window);
        let mut q = weights.clone();
        let out = quantize(&mut q, window, &flat(c, 0.0, 0.0)).unwrap();
        for (row, (q, w)) in q.chunks(c * window).zip(weights.chunks(c * window)).enumerate() {
            let scale = out.scale[row];
            assert!(scale > 0.0 && q.iter().all(|q| q.abs() <= 127.0 && q.trunc() == *q));
            assert_eq!(out.sum[row], q.iter().sum::<f32>());
            let most = w.iter().fold(0f32, |m, w| m.max(w.abs()));
            for (q, w) in q.iter().zip(w) {
                let clipped = w.abs() > scale * 127.0;
                assert!((q * scale - w).abs() <= scale / 2.0 * 1.0001 || clipped, "{q} {w}");
            }
            assert!(scale * 127.0 <= most * 1.0001);
        }
    }

    #[test]
    fn one_large_weight_does_not_spoil_the_rest() {
        let mut weights: Vec<f32> = numbers(4, 20_000).iter().map(|w| w * 0.05).collect();
        weights[3] = 0.13;
        let mut q = weights;
        let out = quantize(&mut q, 1, &flat(20_000, 0.0, 0.0)).unwrap();
        assert!(out.scale[0] < 0.13 / 127.0 * 0.96, "{}", out.scale[0]);
        assert_eq!(q[3], 127.0);
    }

    #[test]
    fn rows_of_zeros_stay_zero() {
        let mut q = vec![0.0f32, -0.0, 1e-38, 1.0, 2.0, -3.0];
        let out = quantize(&mut q, 1, &flat(3, 1.0, 0.0)).unwrap();
        assert_eq!(&q[..3], [0.0; 3]);
        assert_eq!((out.scale[0], out.sum[0], out.bias[0]), (1.0, 0.0, 1e-38));
        assert_eq!(q[5], -127.0);
    }

    #[test]
    fn the_input_scale_is_divided_out() {
        let weights = numbers(3, 4 * 3);
        let scale = vec![2.0f32, 0.5, 8.0];
        let mut q = weights.clone();
        let square = [1.0, 1.0, 1.0];
        let input = Input::new(Some(scale.clone()), &[0.25; 3], &square, 0.0);
        let out = quantize(&mut q, 1, &input).unwrap();
        for (i, w) in weights.iter().enumerate() {
            let back = q[i] * out.scale[i / 3] * scale[i % 3];
            assert!((back - w).abs() <= out.scale[i / 3] * scale[i % 3] * 0.501);
        }
        // The bias makes up for the mean exactly: Σ 0.25 · (w − ŵ).
        for n in 0..4 {
            let expected: f32 = (0..3)
                .map(|c| 0.25 * (weights[n * 3 + c] - q[n * 3 + c] * out.scale[n] * scale[c]))
                .sum();
            assert!((out.bias[n] - expected).abs() < 1e-6, "{} {expected}", out.bias[n]);
        }
        assert_eq!(
            quantize(
                &mut [1.0, 1e30, 1.0],
                1,
                &Input::new(Some(vec![1.0, 1e-20, 1.0]), &[0.0; 3], &square, 0.0)
            ),
            Err(1)
        );
    }

    #[test]
    fn absurd_statistics_are_refused() {
        let absurd = Input::new(None, &[f32::MAX; 2], &[1.0; 2], 0.0);
        let mut weights = [0.0, 0.0, 1.0, 0.3];
        assert_eq!(quantize(&mut weights, 1, &absurd), Err(2));
        let vast = Input::new(None, &[0.0; 2], &[f32::MAX; 2], 0.5);
        let found = quantize(&mut [1.0, 0.3, -0.7, 0.0], 1, &vast).unwrap();
        assert!(found.scale.iter().chain(&found.bias).all(|v| v.is_finite()), "{found:?}");
    }

    /// Over maps as calibration describes them, the corrected roundings do better than the nearest ones, by
    /// about what the form says.
    #[test]
    fn settled_roundings_are_better_on_smooth_maps() {
        let (n, c, window, rho) = (8usize, 6usize, 9usize, 0.8f32);
        let weights = numbers(5, n * c * window);
        let mean = 0.7f32;
        let input = flat(c, mean, rho);
        let mut q = weights.clone();
        let out = quantize(&mut q, window, &input).unwrap();
        assert!(out.power.weights < out.power.nearest * 0.6, "{:?}", out.power);
        let measured = |q: &[f32], bias: &[f32]| {
            // x = mean + √ρ · common + √(1 − ρ) · own, of variance 1: uniform numbers have variance 1/3.
            let (mut noise, draws) = (0f64, 3000);
            let uniform = numbers(77, draws * c * (window + 1));
            for draw in uniform.chunks(c * (window + 1)) {
                for row in 0..n {
                    let mut error = -f64::from(bias[row]);
                    for ch in 0..c {
                        let u = &draw[ch * (window + 1)..];
                        for p in 0..window {
                            let k = ch * window + p;
                            let x = mean
                                + 3f32.sqrt()
                                    * (rho.sqrt() * u[window] + (1.0 - rho).sqrt() * u[p]);
                            let w = weights[row * c * window + k];
                            let w_hat = q[row * c * window + k] * out.scale[row];
                            error += f64::from(x) * (f64::from(w) - f64::from(w_hat));
                        }
                    }
                    noise += error * error;
                }
            }
            noise / draws as f64
        };
        let settled = measured(&q, &out.bias);
        let near: Vec<f32> = weights
            .chunks(c * window)
            .zip(&out.scale)
            .flat_map(|(row, &s)| row.iter().map(move |&w| nearest(w * (1.0 / s))))
            .collect();
        let near_bias: Vec<f32> = (0..n)
            .map(|row| {
                let range = row * c * window..(row + 1) * c * window;
                weights[range.clone()]
                    .iter()
                    .zip(&near[range])
                    .map(|(w, q)| mean * (w - q * out.scale[row]))
                    .sum()
            })
            .collect();
        let nearest = measured(&near, &near_bias);
        assert!(settled < nearest * 0.6, "{settled} {nearest}");
        // The reserve makes the estimate a little larger than the truth.
        let ratio = out.power.weights / settled;
        assert!((0.9..1.35).contains(&ratio), "{ratio}");
        // And without the bias, the mean shows.
        assert!(measured(&q, &vec![0.0; n]) > settled * 1.05);
    }
}

//! The definitions as plain loops: slow, obvious, and what every kernel is compared with.
//!
//! These are for tests (this crate's and others'); no session calls them.

use crate::isa::Level;
use crate::simd::{Kernel, Simd, math};
use crate::steps::attention;
use crate::steps::conv::ConvShape;
use latile_runtime::graph::{QuantRange, Winograd};

/// SiLU of a number, as it is and as bytes are made of it.
struct Silu(f32);

impl Kernel for Silu {
    type Out = [f32; 2];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [f32; 2] {
        let x = s.splat(self.0);
        [s.max_lane(math::silu(s, x)), s.max_lane(math::coarse_silu(s, x))]
    }
}

/// SiLU of one number, by the scalar path.
pub fn silu(x: f32) -> f32 {
    Level::scalar().dispatch(Silu(x))[0]
}

/// SiLU of one number of which a byte will be made, by the scalar path.
pub fn coarse_silu(x: f32) -> f32 {
    Level::scalar().dispatch(Silu(x))[1]
}

/// An input of an int8 layer, already multiplied by its channel's factor, as an integer: the nearest,
/// ties to even (0 for a NaN), counted from the zero point and saturated so that with it added it is a byte.
pub fn quantize(x: f32, range: &QuantRange) -> i32 {
    let zero = i32::from(range.zero_point);
    (x.round_ties_even() as i32).saturating_add(zero).clamp(0, 255) - zero
}

/// The weights of a convolution, `[filters, c, kh, kw]`.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a> {
    /// Numbers.
    Float(&'a [f32]),
    /// The integers of an int8 layer; see [`Int8Weights`](crate::steps::conv::Int8Weights).
    Int8 {
        /// In row-major order.
        weights: &'a [i8],
        /// Per filter.
        scale: &'a [f32],
        /// Per input channel.
        input_scale: Option<&'a [f32]>,
        /// Of the input; three where there are points.
        ranges: &'a [QuantRange],
    },
}

/// A convolution in plain loops; see [`crate::steps::conv`] for the meaning of each operand.
#[derive(Clone, Debug)]
pub struct Conv<'a> {
    /// The shape.
    pub shape: ConvShape,
    /// `[h, w, c]`, all segments concatenated.
    pub input: &'a [f32],
    /// Per channel, scale and shift where its segment has a norm.
    pub norm: &'a [Option<(f32, f32)>],
    /// Whether SiLU follows the norm.
    pub silu: bool,
    /// The weights.
    pub weights: Matrix<'a>,
    /// Per filter.
    pub bias: Option<&'a [f32]>,
    /// Per output channel.
    pub add: Option<&'a [f32]>,
    /// `[oh, ow, n]`.
    pub residual: Option<&'a [f32]>,
    /// Multiplies the result.
    pub output_scale: f32,
}

impl Conv<'_> {
    /// The output, `[oh, ow, n]`.
    pub fn run(&self) -> Vec<f32> {
        let ConvShape {
            w,
            c,
            n,
            kernel: [kh, kw],
            stride: [sy, sx],
            pads: [top, left, ..],
            upsample,
            phases,
            ..
        } = self.shape;
        // What an output has of its window's place: the place itself, or half of it and a phase.
        let parts = if phases { 2 } else { 1 };
        let phase_filters = self.shape.filters() / (parts * parts);
        let [seen_h, seen_w] = self.shape.seen();
        let [oh, ow] = self.shape.out();
        let seen: Vec<f32> = self
            .input
            .iter()
            .enumerate()
            .map(|(i, &x)| {
                let x = match self.norm[i % c] {
                    Some((scale, shift)) => x.mul_add(scale, shift),
                    None => x,
                };
                match (self.silu, self.weights) {
                    (false, _) => x,
                    (true, Matrix::Int8 { .. }) => coarse_silu(x),
                    (true, _) => silu(x),
                }
            })
            .collect();
        // An int8 layer's input, as whole numbers.
        let seen = match self.weights {
            Matrix::Int8 { input_scale, ranges, .. }
                if self.shape.winograd == Some(Winograd::Square) =>
            {
                let most = i32::from(Winograd::MOST_WORD);
                let word = |(i, x): (usize, &f32)| {
                    let x = x * factor(input_scale, &ranges[0], i % c);
                    (x.round_ties_even() as i32).clamp(-most, most) as f32
                };
                seen.iter().enumerate().map(word).collect()
            }
            Matrix::Int8 { input_scale, ranges, .. } if self.shape.winograd.is_none() => {
                let quantized = |(i, x): (usize, &f32)| {
                    quantize(x * factor(input_scale, &ranges[0], i % c), &ranges[0]) as f32
                };
                seen.iter().enumerate().map(quantized).collect()
            }
            _ => seen,
        };
        let shrink = usize::from(upsample);
        let at = |y: usize, x: usize, channel: usize| {
            // Padded coordinates.
            if y < top || x < left || y - top >= seen_h || x - left >= seen_w {
                0.0
            } else {
                seen[(((y - top) >> shrink) * w + ((x - left) >> shrink)) * c + channel]
            }
        };
        let mut out = vec![0.0; oh * ow * n];
        for y in 0..oh {
            for x in 0..ow {
                for o in 0..n {
                    let index = (y * ow + x) * n + o;
                    let add = self.add.map_or(0.0, |b| b[o]);
                    if let Some(winograd) = self.shape.winograd {
                        let bias = self.bias.map_or(0.0, |b| b[o]) + add;
                        let sum = self.of_tile(winograd, &at, [y, x], o);
                        out[index] = self.finished(sum + bias, index);
                        continue;
                    }
                    let (mut float, mut whole) = (0.0_f32, 0_i64);
                    let [py, px] = [y % parts, x % parts];
                    let filter = (py * parts + px) * phase_filters + o;
                    for ky in 0..kh {
                        for kx in 0..kw {
                            for channel in 0..c {
                                let a =
                                    at(y / parts * sy + py + ky, x / parts * sx + px + kx, channel);
                                let i = ((filter * c + channel) * kh + ky) * kw + kx;
                                match self.weights {
                                    Matrix::Float(w) => float = a.mul_add(w[i], float),
                                    Matrix::Int8 { weights: w, .. } => {
                                        whole += a as i64 * i64::from(w[i]);
                                    }
                                }
                            }
                        }
                    }
                    let sum = match self.weights {
                        Matrix::Float(_) => float,
                        Matrix::Int8 { scale, ranges, .. } => {
                            whole as f32 * (ranges[0].scale * scale[filter])
                        }
                    };
                    let bias = self.bias.map_or(0.0, |b| b[filter]) + add;
                    out[index] = self.finished(sum + bias, index);
                }
            }
        }
        out
    }

    fn finished(&self, v: f32, index: usize) -> f32 {
        // Not plus 0 where there is none: that would lose a zero's sign.
        self.residual.map_or(v, |r| v + r[index]) * self.output_scale
    }

    /// Output channel `o` of pixel `[y, x]` by one of Winograd's algorithms, before the bias; `at` gives the padded input.
    /// See [`Winograd`].
    fn of_tile(
        &self,
        winograd: Winograd,
        at: &impl Fn(usize, usize, usize) -> f32,
        [y, x]: [usize; 2],
        o: usize,
    ) -> f32 {
        let Matrix::Int8 { weights, scale, input_scale, ranges } = self.weights else {
            unreachable!("points are for int8 layers");
        };
        let c = self.shape.c;
        let [high, wide] = winograd.tile();
        let first = [y / high * high, x / wide * wide];
        let [kh, _] = self.shape.stored_kernel();
        let m = |point: usize| {
            let range = &ranges[winograd.range_of(point)];
            let filter = point * self.shape.filters() / winograd.points() + o;
            let mut sum = 0_i64;
            for channel in 0..c {
                for ky in 0..kh {
                    let pixel =
                        |dy: usize, dx: usize| at(first[0] + ky + dy, first[1] + dx, channel);
                    let q = match winograd {
                        Winograd::Rows => {
                            let d = point_of(point, |dx| pixel(0, dx));
                            quantize(d * factor(input_scale, range, channel), range)
                        }
                        Winograd::Square => {
                            // Whole numbers.
                            let column = |dx| point_of(point / 4, |dy| pixel(dy, dx));
                            let sum = point_of(point % 4, column) as i32;
                            let by = Winograd::factor(ranges[0].scale, range.scale).unwrap_or(1);
                            let zero = i32::from(range.zero_point);
                            let scaled = (sum * i32::from(by) + (1 << 14)) >> 15;
                            (scaled + zero).clamp(0, 255) - zero
                        }
                    };
                    sum += i64::from(q) * i64::from(weights[(filter * c + channel) * kh + ky]);
                }
            }
            sum as f32 * (winograd.step(ranges, point) * scale[filter])
        };
        let across = |first: usize| output_of(x % 2, |point| m(first + point));
        match winograd {
            Winograd::Rows => across(0),
            Winograd::Square => output_of(y % 2, |point| across(4 * point)),
        }
    }
}

/// What a point along an axis is made from, of what the window sees.
fn point_of(point: usize, x: impl Fn(usize) -> f32) -> f32 {
    match point {
        0 => x(0) - x(2),
        1 => x(1) + x(2),
        2 => x(2) - x(1),
        _ => x(1) - x(3),
    }
}

/// The first or the second output along an axis, of what the points are worth.
fn output_of(second: usize, m: impl Fn(usize) -> f32) -> f32 {
    if second == 0 { m(0) + (m(1) + m(2)) } else { (m(1) - m(2)) - m(3) }
}

/// What an int8 layer multiplies an input channel by before it rounds.
fn factor(input_scale: Option<&[f32]>, range: &QuantRange, channel: usize) -> f32 {
    let inverse = 1.0 / range.scale;
    input_scale.map_or(inverse, |s| s[channel] * inverse)
}

struct Exp(f32);

impl Kernel for Exp {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        s.max_lane(math::exp(s, s.splat(self.0)))
    }
}

/// e^x of one number, by the scalar path.
fn exp(x: f32) -> f32 {
    // The largest of lanes that are all NaN would be one too, but only by the order of operands.
    if x.is_nan() { x } else { Level::scalar().dispatch(Exp(x)) }
}

/// Numbers as bytes, and what one step of them is worth: a NaN where one was not finite.
fn bytes(x: &[f32]) -> (Vec<i32>, f32) {
    let largest = x.iter().fold(attention::LEAST, |m, x| if x.abs() > m { x.abs() } else { m });
    let factor = attention::LARGEST / largest;
    let damage: f32 = x.iter().map(|x| x * 0.0).sum();
    let whole = x.iter().map(|x| (x * factor).round_ties_even() as i32).collect();
    (whole, largest / attention::LARGEST + damage)
}

/// 255 * 2^x, rounded to a whole number.
fn weight(x: f32) -> f32 {
    let x = if x < attention::DEEPEST { attention::DEEPEST } else { x };
    let shifted = x + attention::ROUND;
    let r = x - (shifted - attention::ROUND);
    let p = attention::POWER.into_iter().reduce(|p, c| p.mul_add(r, c)).unwrap_or_default();
    (p * f32::from_bits(shifted.to_bits() << 23)).round_ties_even()
}

/// Attention with products of bytes, as [`AttentionPlan::int8`](attention::AttentionPlan::int8)
/// computes it: queries, keys and values are `[tokens, channels]`.
pub fn attention_int8(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    channels: usize,
    heads: usize,
    scale: f32,
) -> Vec<f32> {
    let d = channels / heads;
    let keys = k.len() / channels;
    let scale = scale * std::f32::consts::LOG2_E;
    let mut out = vec![0.0; q.len()];
    for head in 0..heads {
        let own = head * d..(head + 1) * d;
        let rows = |x: &[f32]| -> Vec<Vec<f32>> {
            x.chunks(channels).map(|row| row[own.clone()].to_vec()).collect()
        };
        let (k, v) = (rows(k), rows(v));
        let mean = |c: usize| {
            let sum = k.iter().fold(0.0, |sum, row| sum + f64::from(row[c]));
            (sum / keys as f64) as f32
        };
        let mean: Vec<f32> = (0..d).map(mean).collect();
        let k: Vec<(Vec<i32>, f32)> = k
            .iter()
            .map(|row| bytes(&row.iter().zip(&mean).map(|(x, m)| x - m).collect::<Vec<_>>()))
            .collect();
        // By block and channel, the bytes of its keys.
        let v: Vec<Vec<(Vec<i32>, f32)>> = v
            .chunks(attention::INT8_KEY_BLOCK)
            .map(|v| {
                let channel = |c: usize| bytes(&v.iter().map(|row| row[c]).collect::<Vec<_>>());
                (0..d).map(channel).collect()
            })
            .collect();
        for (query, out) in q.chunks(channels).zip(out.chunks_mut(channels)) {
            let scaled: Vec<f32> = query[own.clone()].iter().map(|x| x * scale).collect();
            let (q, worth) = bytes(&scaled);
            let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0.0_f32, vec![0.0_f32; d]);
            for (k, v) in k.chunks(attention::INT8_KEY_BLOCK).zip(&v) {
                let product = |k: &[i32]| k.iter().zip(&q).map(|(k, q)| k * q).sum::<i32>();
                let u: Vec<f32> = k.iter().map(|(k, step)| product(k) as f32 * step).collect();
                let top = u.iter().fold(f32::NEG_INFINITY, |m, &u| if u > m { u } else { m });
                let p: Vec<f32> = u.iter().map(|u| weight((u - top) * worth)).collect();
                let top = top * worth;
                let now = if top > m { top } else { m };
                let old = exp((m - now) * std::f32::consts::LN_2);
                let new = exp((top - now) * std::f32::consts::LN_2);
                m = now;
                l = l.mul_add(old, p.iter().sum::<f32>() * new);
                for (o, (v, step)) in o.iter_mut().zip(v) {
                    let sum: i32 = p.iter().zip(v).map(|(p, v)| *p as i32 * v).sum();
                    *o = o.mul_add(old, sum as f32 * (step * new));
                }
            }
            for (out, o) in out[own.clone()].iter_mut().zip(o) {
                *out = o / l;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By definition: whole numbers, so that no sum is rounded.
    #[test]
    fn four_phases_are_a_convolution_of_the_upsampled_map() {
        let mut state = 5_u32;
        for (h, w, c, n) in [(1, 1, 1, 1), (1, 4, 2, 3), (5, 3, 4, 17), (4, 6, 3, 16)] {
            let mut whole = |len: usize| -> Vec<f32> {
                let next = |_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 16) as f32 % 201.0 - 100.0
                };
                (0..len).map(next).collect()
            };
            let (input, nine, bias) = (whole(h * w * c), whole(n * c * 9), whole(n));
            let plain = ConvShape { upsample: true, ..ConvShape::same(h, w, c, n, 3) };
            let folded = ConvShape::doubling(h, w, c, n);
            let filters = folded.filters() / 4;
            let mut four = vec![0.0; 4 * filters * c * 4];
            let mut biases = vec![0.0; 4 * filters];
            for (at, weight) in nine.iter().enumerate() {
                let (row, [y, x]) = (at / 9, [at % 9 / 3, at % 3]);
                for [py, px] in [[0, 0], [0, 1], [1, 0], [1, 1]] {
                    // Row y - 1 of a window at row p of two is row (p + y - 1) / 2 of the map, rounded down.
                    let [ky, kx] =
                        [usize::div_ceil(y + py, 2) - py, usize::div_ceil(x + px, 2) - px];
                    let filter = (2 * py + px) * filters + row / c;
                    four[(filter * c + row % c) * 4 + 2 * ky + kx] += weight;
                    biases[filter] = bias[row / c];
                }
            }
            let run = |shape, weights, bias| {
                let conv = Conv {
                    shape,
                    input: &input,
                    norm: &vec![None; c],
                    silu: false,
                    weights: Matrix::Float(weights),
                    bias: Some(bias),
                    add: None,
                    residual: None,
                    output_scale: 1.0,
                };
                conv.run()
            };
            assert_eq!(plain.out(), folded.out());
            assert_eq!(run(plain, &nine, &bias), run(folded, &four, &biases), "{h} {w} {c} {n}");
            assert_eq!(9 * folded.macs(), 4 * plain.macs());
        }
    }
}

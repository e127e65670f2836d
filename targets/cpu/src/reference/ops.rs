//! The primitive operators, as their definitions read. Maps are NHWC, batch 1; weights row-major.

use crate::naive::{Conv, Matrix, quantize};
use crate::steps::conv::ConvShape;
use latile_runtime::graph::{QuantRange, Winograd};
use latile_runtime::tensor::Shape;

/// A convolution's window.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub(super) kernel: [usize; 2],
    pub(super) stride: [usize; 2],
    pub(super) top: usize,
    pub(super) left: usize,
    /// Whether it makes 2 x 2 outputs by filters of their own, the window of each a pixel further down or right.
    pub(super) phases: bool,
}

fn size(shape: Shape) -> (usize, usize, usize) {
    match shape {
        Shape::Map { h, w, c } => (h, w, c),
        Shape::Vector { len } => (1, 1, len),
    }
}

impl Window {
    /// Phases down and across, and the filters of a phase, for `n` output channels.
    fn phases(self, n: usize) -> (usize, usize) {
        if self.phases { (2, n.next_multiple_of(16)) } else { (1, n) }
    }

    /// By output in the order of a map of shape `out`, the filter that makes it.
    fn filters(self, out: Shape) -> impl Iterator<Item = usize> {
        let (oh, ow, n) = size(out);
        let (parts, each) = self.phases(n);
        let phase = move |y: usize, x: usize| (y % parts * parts + x % parts) * each;
        (0..oh * ow * n).map(move |i| phase(i / n / ow, i / n % ow) + i % n)
    }
}

/// Slides a window over `x` and adds up the products with `weight`, `[filters, c, kh, kw]`, from zero over
/// (ky, kx, c), padding's zeros included.
fn convolve<T: Copy + Default, A: Copy + Default>(
    x: &[T],
    shape: Shape,
    weight: &[T],
    window: Window,
    out: Shape,
    add_product: impl Fn(A, T, T) -> A,
) -> Vec<A> {
    let (h, w, c) = size(shape);
    let (oh, ow, n) = size(out);
    let [kh, kw] = window.kernel;
    let at = |y: usize, x_: usize, i: usize| {
        let inside =
            y >= window.top && x_ >= window.left && y - window.top < h && x_ - window.left < w;
        if inside { x[((y - window.top) * w + (x_ - window.left)) * c + i] } else { T::default() }
    };
    let (parts, each) = window.phases(n);
    let mut result = Vec::with_capacity(oh * ow * n);
    for oy in 0..oh {
        for ox in 0..ow {
            let [py, px] = [oy % parts, ox % parts];
            let [top, left] =
                [oy / parts * window.stride[0] + py, ox / parts * window.stride[1] + px];
            for o in 0..n {
                let filter = (py * parts + px) * each + o;
                let mut sum = A::default();
                for ky in 0..kh {
                    for kx in 0..kw {
                        for i in 0..c {
                            let v = at(top + ky, left + kx, i);
                            let w = weight[((filter * c + i) * kh + ky) * kw + kx];
                            sum = add_product(sum, v, w);
                        }
                    }
                }
                result.push(sum);
            }
        }
    }
    result
}

/// `weight` is `[filters, c, kh, kw]`. Every product is fused into the sum; then the bias is added.
pub(super) fn conv2d(
    x: &[f32],
    shape: Shape,
    weight: &[f32],
    bias: &[f32],
    window: Window,
    out: Shape,
) -> Vec<f32> {
    let sums = convolve(x, shape, weight, window, out, |sum, v, w| v.mul_add(w, sum));
    sums.iter().zip(window.filters(out)).map(|(sum, f)| sum + bias[f]).collect()
}

/// What makes a convolution an int8 one.
pub(super) struct Int8<'a> {
    /// Whole numbers, `[filters, c, kh, kw]`.
    pub(super) weight: &'a [f32],
    pub(super) weight_scale: &'a [f32],
    pub(super) input_scale: Option<&'a [f32]>,
    pub(super) ranges: &'a [QuantRange],
}

/// [`Quant`](latile_runtime::graph::Quant)'s formula, then the bias.
pub(super) fn conv2d_int8(
    x: &[f32],
    shape: Shape,
    layer: &Int8<'_>,
    bias: &[f32],
    window: Window,
    out: Shape,
) -> Vec<f32> {
    let c = shape.channels();
    let Int8 { weight, weight_scale, input_scale, ranges } = layer;
    let range = &ranges[0];
    let inverse = 1.0 / range.scale;
    let factor = |i: usize| input_scale.map_or(inverse, |s| s[i % c] * inverse);
    let q: Vec<i64> =
        x.iter().enumerate().map(|(i, x)| i64::from(quantize(x * factor(i), range))).collect();
    let weight: Vec<i64> = weight.iter().map(|w| *w as i64).collect();
    let sums = convolve(&q, shape, &weight, window, out, |sum: i64, q, w| sum + q * w);
    let worth = |(sum, f): (&i64, usize)| *sum as f32 * (range.scale * weight_scale[f]) + bias[f];
    sums.iter().zip(window.filters(out)).map(worth).collect()
}

/// A Winograd layer, by its definition: [`Winograd`].
pub(super) fn winograd(
    x: &[f32],
    shape: Shape,
    layer: &Int8<'_>,
    bias: &[f32],
    window: Window,
    (out, winograd): (Shape, Winograd),
) -> Vec<f32> {
    let (Shape::Map { h, w, c }, Shape::Map { h: oh, w: ow, c: n }) = (shape, out) else {
        unreachable!("a convolution is of maps")
    };
    let (top, left) = (window.top, window.left);
    let conv = Conv {
        shape: ConvShape {
            pads: [top, left, oh + 2 - h - top, ow + 2 - w - left],
            winograd: Some(winograd),
            ..ConvShape::same(h, w, c, n, 3)
        },
        input: x,
        norm: &vec![None; c],
        silu: false,
        weights: Matrix::Int8 {
            weights: &layer.weight.iter().map(|&w| w as i8).collect::<Vec<_>>(),
            scale: layer.weight_scale,
            input_scale: layer.input_scale,
            ranges: layer.ranges,
        },
        bias: Some(bias),
        add: None,
        residual: None,
        output_scale: 1.0,
    };
    conv.run()
}

/// Wu & He 2018, equations 1 and 2, in f64, rounded once.
pub(super) fn group_norm(
    x: &[f32],
    c: usize,
    groups: usize,
    eps: f32,
    weight: &[f32],
    bias: &[f32],
) -> Vec<f32> {
    let per_group = c / groups;
    let mut result = vec![0.0f32; x.len()];
    for g in 0..groups {
        let channels = g * per_group..(g + 1) * per_group;
        let members =
            || x.chunks_exact(c).flat_map(|pixel| &pixel[channels.clone()]).map(|&v| f64::from(v));
        let count = (x.len() / groups) as f64;
        let mean = members().sum::<f64>() / count;
        let variance = members().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count;
        let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
        for (from, to) in x.chunks_exact(c).zip(result.chunks_exact_mut(c)) {
            for i in channels.clone() {
                let normal = (f64::from(from[i]) - mean) * inverse;
                to[i] = (normal * f64::from(weight[i]) + f64::from(bias[i])) as f32;
            }
        }
    }
    result
}

pub(super) fn silu(x: f32) -> f32 {
    let x = f64::from(x);
    (x / (1.0 + libm::exp(-x))) as f32
}

pub(super) fn scale_shift(x: &[f32], v: &[f32]) -> Vec<f32> {
    let (scale, shift) = v.split_at(v.len() / 2);
    x.chunks_exact(scale.len())
        .flat_map(|pixel| {
            pixel.iter().zip(scale).zip(shift).map(|((x, s), t)| x.mul_add(1.0 + s, *t))
        })
        .collect()
}

/// `parts` are the maps with their channels.
pub(super) fn concat(parts: &[(&[f32], usize)], pixels: usize) -> Vec<f32> {
    (0..pixels)
        .flat_map(|p| parts.iter().flat_map(move |(x, c)| &x[p * c..(p + 1) * c]).copied())
        .collect()
}

pub(super) fn upsample2x(x: &[f32], shape: Shape) -> Vec<f32> {
    let (h, w, c) = size(shape);
    let mut result = Vec::with_capacity(4 * x.len());
    for y in 0..2 * h {
        for x_ in 0..2 * w {
            let from = ((y / 2) * w + x_ / 2) * c;
            result.extend_from_slice(&x[from..from + c]);
        }
    }
    result
}

pub(super) fn avg_pool2x(x: &[f32], shape: Shape) -> Vec<f32> {
    let (h, w, c) = size(shape);
    let mut result = Vec::with_capacity(x.len() / 4);
    for y in 0..h / 2 {
        for x_ in 0..w / 2 {
            for i in 0..c {
                let at = |dy: usize, dx: usize| x[((2 * y + dy) * w + 2 * x_ + dx) * c + i];
                result.push(((at(0, 0) + at(0, 1)) + (at(1, 0) + at(1, 1))) * 0.25);
            }
        }
    }
    result
}

/// Vaswani et al. 2017, equation 1, for each head and query, in f64.
pub(super) fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    c: usize,
    heads: usize,
    scale: f32,
) -> Vec<f32> {
    let d = c / heads;
    let mut result = vec![0.0f32; q.len()];
    for (query, out) in q.chunks_exact(c).zip(result.chunks_exact_mut(c)) {
        for head in 0..heads {
            let own = head * d..(head + 1) * d;
            let scores: Vec<f64> = k
                .chunks_exact(c)
                .map(|key| {
                    query[own.clone()]
                        .iter()
                        .zip(&key[own.clone()])
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum::<f64>()
                        * f64::from(scale)
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| libm::exp(s - top)).collect();
            let total: f64 = weights.iter().sum();
            for i in own {
                let mixed: f64 =
                    v.chunks_exact(c).zip(&weights).map(|(value, w)| f64::from(value[i]) * w).sum();
                out[i] = (mixed / total) as f32;
            }
        }
    }
    result
}

/// The nearest row of `table` (`[entries, c]`), the first of equals, for each pixel.
pub(super) fn codebook(x: &[f32], table: &[f32], c: usize) -> Vec<f32> {
    x.chunks_exact(c)
        .flat_map(|pixel| {
            let distance = |row: &[f32]| -> f64 {
                pixel.iter().zip(row).map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum()
            };
            let mut best = &table[..c];
            for row in table.chunks_exact(c) {
                if distance(row) < distance(best) {
                    best = row;
                }
            }
            best.to_vec()
        })
        .collect()
}

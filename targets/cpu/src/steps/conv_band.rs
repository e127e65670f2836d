//! The prologue of a convolution: rows of the input, normalised, activated, upsampled, padded
//! and widened to `f32`, `[band columns][c]`.

use half::f16;

use super::Source;
use super::conv::{Activation, ConvShape, Segment};
use super::element::Element;
use crate::isa::Level;
use crate::simd::{Kernel, LANES, Simd, math};

/// What the rows of a band are made from.
#[derive(Clone, Copy)]
pub(super) struct Band<'a> {
    pub(super) shape: &'a ConvShape,
    pub(super) segments: &'a [Segment<'a>],
    pub(super) activation: Activation,
    pub(super) level: Level,
}

impl Band<'_> {
    /// Writes row `v` of the padded input, columns from `x * stride` on, to `dst`, which holds
    /// a whole number of pixels.
    pub(super) fn fill_row(&self, v: usize, x: usize, dst: &mut [f32]) {
        let [seen_h, seen_w] = self.shape.seen();
        let [top, left, ..] = self.shape.pads;
        let cols = dst.len() / self.shape.c;
        if v < top || v - top >= seen_h {
            dst.fill(0.0);
            return;
        }
        // Band column j is column `first + j` of the input as seen, where that exists.
        let start = x * self.shape.stride[1];
        let from = left.saturating_sub(start).min(cols);
        let to = (seen_w + left).saturating_sub(start).min(cols).max(from);
        dst[..from * self.shape.c].fill(0.0);
        dst[to * self.shape.c..].fill(0.0);
        if from < to {
            self.level.dispatch(FillRow {
                band: self,
                y: v - top,
                x: start + from - left,
                dst: &mut dst[from * self.shape.c..to * self.shape.c],
            });
        }
    }
}

/// Fills pixels that all exist.
struct FillRow<'a> {
    band: &'a Band<'a>,
    /// Row and first column of the input as seen.
    y: usize,
    x: usize,
    dst: &'a mut [f32],
}

impl Kernel for FillRow<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let shape = self.band.shape;
        let mut first = 0;
        for segment in self.band.segments {
            let row = Row {
                y: self.y,
                x: self.x,
                first,
                shape,
                channels: segment.channels,
                norm: segment.norm,
            };
            match (segment.data, self.band.activation) {
                (Source::F32(x), Activation::None) => row.fill::<S, f32, false>(s, x, self.dst),
                (Source::F32(x), Activation::Silu) => row.fill::<S, f32, true>(s, x, self.dst),
                (Source::F16(x), Activation::None) => row.fill::<S, f16, false>(s, x, self.dst),
                (Source::F16(x), Activation::Silu) => row.fill::<S, f16, true>(s, x, self.dst),
            }
            first += segment.channels;
        }
    }
}

/// One segment's part of a row.
struct Row<'a> {
    y: usize,
    x: usize,
    /// The segment's first channel in the band.
    first: usize,
    shape: &'a ConvShape,
    channels: usize,
    norm: Option<(&'a [f32], &'a [f32])>,
}

impl Row<'_> {
    #[inline(always)]
    fn fill<S: Simd, T: Element, const SILU: bool>(&self, s: S, data: &[T], dst: &mut [f32]) {
        let shrink = usize::from(self.shape.upsample);
        let c = self.shape.c;
        let n = self.channels;
        let row = &data[(self.y >> shrink) * self.shape.w * n..];
        if shrink == 0 && n == c && self.norm.is_none() {
            // One contiguous run.
            let len = dst.len();
            convert::<S, T, SILU>(s, &row[self.x * n..self.x * n + len], dst);
            return;
        }
        let pixels = dst.len() / c;
        for i in 0..pixels {
            let x = self.x + i;
            let at = i * c + self.first;
            if shrink == 1 && i > 0 && x % 2 == 1 {
                // The right half of a doubled pixel.
                dst.copy_within(at - c..at - c + n, at);
                continue;
            }
            let from = &row[(x >> shrink) * n..][..n];
            let to = &mut dst[at..at + n];
            match self.norm {
                None => convert::<S, T, SILU>(s, from, to),
                Some((scale, shift)) => {
                    normalise::<S, T, SILU>(s, from, &scale[..n], &shift[..n], to);
                }
            }
        }
    }
}

#[inline(always)]
fn convert<S: Simd, T: Element, const SILU: bool>(s: S, from: &[T], to: &mut [f32]) {
    for (from, to) in from.chunks(LANES).zip(to.chunks_mut(LANES)) {
        let mut v = T::read(s, from);
        if SILU {
            v = math::silu(s, v);
        }
        s.store_slice(v, to);
    }
}

#[inline(always)]
fn normalise<S: Simd, T: Element, const SILU: bool>(
    s: S,
    from: &[T],
    scale: &[f32],
    shift: &[f32],
    to: &mut [f32],
) {
    let norm = scale.chunks(LANES).zip(shift.chunks(LANES));
    for ((from, to), (scale, shift)) in from.chunks(LANES).zip(to.chunks_mut(LANES)).zip(norm) {
        let mut v = s.mul_add(T::read(s, from), s.load_slice(scale), s.load_slice(shift));
        if SILU {
            v = math::silu(s, v);
        }
        s.store_slice(v, to);
    }
}

//! The prologue of a convolution: rows of the input, normalised, activated, upsampled, padded
//! and widened to `f32` or quantized to bytes, `[band columns][pitch]`.

use half::f16;

use super::Source;
use super::conv::{Activation, ConvShape, MAX_SEGMENTS, Segment};
use super::conv_rows::Window;
use super::element::Element;
use crate::isa::Level;
use crate::kernels::dot::GROUP;
use crate::simd::{Kernel, LANES, Simd, math};

/// What a band holds: one cell for each channel of a pixel.
pub(super) trait Cells: Copy + Sync {
    /// A channel of a pixel.
    type Cell: Copy;

    /// Cells from one pixel to the next, for `c` channels; what is between is not read, or
    /// multiplied by zeros.
    fn pitch(self, c: usize) -> usize;

    /// What padding holds.
    fn padding(self) -> Self::Cell;

    /// Whether every channel is stored alike, so that pixels without gaps are one run.
    const ALIKE: bool;
    /// Whether bytes are made of it, so that [`math::coarse_silu`] will do.
    const ROUNDED: bool;

    /// Stores up to sixteen channels, from number `channel` on.
    fn put<S: Simd>(self, s: S, v: S::F, channel: usize, to: &mut [Self::Cell]);
}

/// Single precision. Of `ROUNDED` ones bytes will be made.
#[derive(Clone, Copy)]
pub(super) struct Floats<const ROUNDED: bool>;

impl<const ROUNDED: bool> Cells for Floats<ROUNDED> {
    type Cell = f32;
    const ALIKE: bool = true;
    const ROUNDED: bool = ROUNDED;
    fn pitch(self, c: usize) -> usize {
        c
    }
    fn padding(self) -> f32 {
        0.0
    }
    #[inline(always)]
    fn put<S: Simd>(self, s: S, v: S::F, _: usize, to: &mut [f32]) {
        s.store_slice(v, to);
    }
}

/// Bytes: `round(v * factor[channel]) + zero`, saturated. `SIGNED` ones are less by 128, and so
/// is their `zero`.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a, const SIGNED: bool> {
    /// At least one a channel.
    pub(super) factor: &'a [f32],
    /// What 0 becomes: 0..=255, or -128..=127.
    pub(super) zero: i32,
}

impl<const SIGNED: bool> Cells for Bytes<'_, SIGNED> {
    type Cell = u8;
    const ALIKE: bool = false;
    const ROUNDED: bool = true;
    fn pitch(self, c: usize) -> usize {
        c.next_multiple_of(GROUP)
    }
    fn padding(self) -> u8 {
        self.zero.to_le_bytes()[0]
    }
    #[inline(always)]
    fn put<S: Simd>(self, s: S, v: S::F, channel: usize, to: &mut [u8]) {
        debug_assert!(channel + to.len() <= self.factor.len());
        let factor = if to.len() == LANES {
            // SAFETY: there is a factor for every channel, and so for these sixteen.
            unsafe { s.load(self.factor.as_ptr().add(channel)) }
        } else {
            s.load_slice(&self.factor[channel..])
        };
        let v = s.mul(v, factor);
        s.quantize_slice::<SIGNED>(v, self.zero, to);
    }
}

/// Words of sixteen bits: `round(v * factor[channel])`, saturated at [`Simd::MOST_WORD`].
#[derive(Clone, Copy)]
pub(super) struct Words<'a> {
    /// At least one a channel, and a whole number of sixteens.
    pub(super) factor: &'a [f32],
}

impl Cells for Words<'_> {
    type Cell = i16;
    const ALIKE: bool = false;
    const ROUNDED: bool = true;
    fn pitch(self, c: usize) -> usize {
        c
    }
    fn padding(self) -> i16 {
        0
    }
    #[inline(always)]
    fn put<S: Simd>(self, s: S, v: S::F, channel: usize, to: &mut [i16]) {
        debug_assert!(channel + to.len() <= self.factor.len());
        let factor = if to.len() == LANES {
            // SAFETY: there is a factor for every channel, and so for these sixteen.
            unsafe { s.load(self.factor.as_ptr().add(channel)) }
        } else {
            s.load_slice(&self.factor[channel..])
        };
        s.round_words_slice(s.mul(v, factor), to);
    }
}

/// How the rows of a band come about.
pub(super) trait Prologue: Copy + Sync {
    /// What a band holds.
    type Cell: Copy;

    /// Cells from one column of the band to the next, at each point, for `c` channels.
    fn pitch(self, c: usize) -> usize;

    /// Writes columns of a line of the band, to `slots`, one for each point. `room` is as much as the plan says; what it
    /// holds between lines that follow one another is the callee's.
    fn fill(self, input: Input<'_>, at: Place, slots: &mut [&mut [Self::Cell]], room: &mut [f32]);
}

/// Which part of the padded input a line of a band is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The line: a row of the padded input, or of squares a row of tiles.
    pub(super) line: usize,
    /// It begins with what window column `x` sees.
    pub(super) x: usize,
    /// Whether the call before wrote the line above it, of the same columns, with the same room.
    pub(super) follows: bool,
}

/// A column is a pixel.
impl<C: Cells> Prologue for C {
    type Cell = C::Cell;

    fn pitch(self, c: usize) -> usize {
        Cells::pitch(self, c)
    }

    fn fill(self, input: Input<'_>, at: Place, slots: &mut [&mut [C::Cell]], _: &mut [f32]) {
        Band { input, cells: self }.fill_row(at.line, at.x, slots[0]);
    }
}

/// What the rows of a band are made from.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) shape: &'a ConvShape,
    pub(super) segments: &'a [Segment<'a>],
    /// The rows that each segment holds.
    pub(super) windows: &'a [Window; MAX_SEGMENTS],
    pub(super) activation: Activation,
    pub(super) level: Level,
}

/// Rows of pixels.
#[derive(Clone, Copy)]
pub(super) struct Band<'a, C> {
    pub(super) input: Input<'a>,
    pub(super) cells: C,
}

impl<C: Cells> Band<'_, C> {
    /// Writes row `v` of the padded input, columns from `x * stride` on, to `dst`, which holds
    /// a whole number of pixels.
    pub(super) fn fill_row(&self, v: usize, x: usize, dst: &mut [C::Cell]) {
        let shape = self.input.shape;
        let [seen_h, seen_w] = shape.seen();
        let [top, left, ..] = shape.pads;
        let pitch = self.cells.pitch(shape.c);
        let padding = self.cells.padding();
        let cols = dst.len() / pitch;
        if v < top || v - top >= seen_h {
            dst.fill(padding);
            return;
        }
        // Band column j is column `first + j` of the input as seen, where that exists.
        let start = x * shape.stride[1];
        let from = left.saturating_sub(start).min(cols);
        let to = (seen_w + left).saturating_sub(start).min(cols).max(from);
        dst[..from * pitch].fill(padding);
        dst[to * pitch..].fill(padding);
        if from < to {
            self.input.level.dispatch(FillRow {
                band: self,
                y: v - top,
                x: start + from - left,
                dst: &mut dst[from * pitch..to * pitch],
            });
        }
    }
}

/// Fills pixels that all exist.
struct FillRow<'a, C: Cells> {
    band: &'a Band<'a, C>,
    /// Row and first column of the input as seen.
    y: usize,
    x: usize,
    dst: &'a mut [C::Cell],
}

impl<C: Cells> Kernel for FillRow<'_, C> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Input { shape, segments, windows, activation, .. } = self.band.input;
        let mut first = 0;
        let shrink = usize::from(shape.upsample);
        for (segment, window) in segments.iter().zip(windows) {
            let row = Row {
                y: window.row(self.y >> shrink),
                x: self.x,
                first,
                shape,
                channels: segment.channels,
                norm: segment.norm,
                cells: self.band.cells,
            };
            match (segment.data, activation) {
                (Source::F32(x), Activation::None) => row.fill::<S, f32, false>(s, x, self.dst),
                (Source::F32(x), Activation::Silu) => row.fill::<S, f32, true>(s, x, self.dst),
                (Source::F16(x), Activation::None) => row.fill::<S, f16, false>(s, x, self.dst),
                (Source::F16(x), Activation::Silu) => row.fill::<S, f16, true>(s, x, self.dst),
            }
            first += segment.channels;
        }
    }
}

/// How far ahead of a pixel its successors are asked for, in bytes: some pixels.
/// Processors foresee a run of addresses themselves, but not past a page of memory, and a row may begin a new one.
const AHEAD: usize = 2048;

/// Asks for what lies `AHEAD` of a pixel.
#[inline(always)]
fn announce<S: Simd, T: Element>(s: S, pixel: &[T]) {
    const LINE: usize = 64;
    let start = pixel.as_ptr().cast::<u8>().wrapping_add(AHEAD);
    for at in (0..size_of_val(pixel)).step_by(LINE) {
        s.prefetch(start.wrapping_add(at));
    }
}

/// One segment's part of a row.
struct Row<'a, C> {
    /// Row of the segment as it is held.
    y: usize,
    /// First column of the input as seen.
    x: usize,
    /// The segment's first channel in the band.
    first: usize,
    shape: &'a ConvShape,
    channels: usize,
    norm: Option<(&'a [f32], &'a [f32])>,
    cells: C,
}

impl<C: Cells> Row<'_, C> {
    #[inline(always)]
    fn fill<S: Simd, T: Element, const SILU: bool>(&self, s: S, data: &[T], dst: &mut [C::Cell]) {
        let shrink = usize::from(self.shape.upsample);
        let pitch = self.cells.pitch(self.shape.c);
        let n = self.channels;
        let row = &data[self.y * self.shape.w * n..];
        if C::ALIKE && shrink == 0 && n == pitch && self.norm.is_none() {
            // One contiguous run.
            let len = dst.len();
            self.convert::<S, T, SILU>(s, &row[self.x * n..self.x * n + len], dst);
            return;
        }
        let pixels = dst.len() / pitch;
        for i in 0..pixels {
            let x = self.x + i;
            let at = i * pitch + self.first;
            if shrink == 1 && i > 0 && x % 2 == 1 {
                // The right half of a doubled pixel.
                dst.copy_within(at - pitch..at - pitch + n, at);
                continue;
            }
            let from = &row[(x >> shrink) * n..][..n];
            announce(s, from);
            let to = &mut dst[at..at + n];
            match self.norm {
                None => self.convert::<S, T, SILU>(s, from, to),
                Some((scale, shift)) => {
                    self.normalise::<S, T, SILU>(s, from, &scale[..n], &shift[..n], to);
                }
            }
        }
    }

    #[inline(always)]
    fn convert<S: Simd, T: Element, const SILU: bool>(&self, s: S, from: &[T], to: &mut [C::Cell]) {
        // Whole sixteens first: the loop then has no lengths to check.
        let whole = from.len() / LANES * LANES;
        let (from, last) = from.split_at(whole);
        let (to, last_to) = to.split_at_mut(whole);
        let blocks = from.chunks_exact(LANES).zip(to.chunks_exact_mut(LANES));
        for (i, (from, to)) in blocks.enumerate() {
            self.put::<S, SILU>(s, T::read(s, from), LANES * i, to);
        }
        if !last.is_empty() {
            self.put::<S, SILU>(s, T::read(s, last), whole, last_to);
        }
    }

    #[inline(always)]
    fn normalise<S: Simd, T: Element, const SILU: bool>(
        &self,
        s: S,
        from: &[T],
        scale: &[f32],
        shift: &[f32],
        to: &mut [C::Cell],
    ) {
        // As above.
        let whole = from.len() / LANES * LANES;
        let (from, last) = from.split_at(whole);
        let (to, last_to) = to.split_at_mut(whole);
        let (scale, last_scale) = scale.split_at(whole);
        let (shift, last_shift) = shift.split_at(whole);
        let norm = scale.chunks_exact(LANES).zip(shift.chunks_exact(LANES));
        let blocks = from.chunks_exact(LANES).zip(to.chunks_exact_mut(LANES)).zip(norm);
        for (i, ((from, to), (scale, shift))) in blocks.enumerate() {
            let v = s.mul_add(T::read(s, from), s.load_slice(scale), s.load_slice(shift));
            self.put::<S, SILU>(s, v, LANES * i, to);
        }
        if !last.is_empty() {
            let (scale, shift) = (s.load_slice(last_scale), s.load_slice(last_shift));
            self.put::<S, SILU>(s, s.mul_add(T::read(s, last), scale, shift), whole, last_to);
        }
    }

    /// Stores up to sixteen channels of the segment, from its number `channel` on, activated.
    #[inline(always)]
    fn put<S: Simd, const SILU: bool>(&self, s: S, v: S::F, channel: usize, to: &mut [C::Cell]) {
        let v = match (SILU, C::ROUNDED) {
            (false, _) => v,
            (true, false) => math::silu(s, v),
            (true, true) => math::coarse_silu(s, v),
        };
        self.cells.put(s, v, self.first + channel, to);
    }
}

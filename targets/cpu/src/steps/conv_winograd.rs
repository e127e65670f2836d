//! Winograd's F(2, 3) along rows (Lavin & Gray 2016, section 4.1): what an int8 convolution does differently where two
//! neighbouring outputs come from four products in place of six.
//!
//! Lives here: the four points of each pair, made of the band's pixels and quantized, and the pair, joined from the sums
//! at its points. Between the two the points of all pairs are multiplied as pixels are, by the kernels that multiply
//! pixels; no multiplication is here. The formulas are [`Quant::winograd`](latile_runtime::graph::Quant::winograd)'s.

use latile_runtime::graph::Winograd;

use super::conv_band::{Band, Floats, Input, Place, Prologue};
use super::conv_epilogue::{Dequantize, Epilogue};
use super::conv_plan::{FINISH_PIXELS, POINT_GAP, round_up};
use super::conv_tile::TileJob;
use crate::kernels::dot::GROUP;
use crate::simd::{Kernel, LANES, Simd};

/// Points of a pair.
const POINTS: usize = Winograd::Rows.points();
/// Ranges of its points.
const RANGES: usize = Winograd::Rows.ranges();
/// Pairs whose points are made at once: few enough that their pixels stay in the first-level cache.
const PAIRS: usize = 16;
/// Pixels that so many pairs see.
pub(super) const ROOM_PIXELS: usize = 2 * PAIRS + 2;

/// A band of bytes, `[point][row][pair][channels]`: sums and differences of pixels, times `factor[range][channel]`,
/// rounded, plus `zeros[range]`, saturated. `SIGNED` ones are less by 128, and so are their `zeros`.
#[derive(Clone, Copy)]
pub(super) struct Points<'a, const SIGNED: bool> {
    /// `[range][round_up(c)]`.
    pub(super) factor: &'a [f32],
    /// What 0 becomes: 0..=255, or -128..=127.
    pub(super) zeros: [i32; Winograd::MOST_RANGES],
}

impl<const SIGNED: bool> Prologue for Points<'_, SIGNED> {
    type Cell = u8;

    fn pitch(self, c: usize) -> usize {
        c.next_multiple_of(GROUP)
    }

    fn fill(
        self,
        input: Input<'_>,
        Place { line: v, x, .. }: Place,
        slots: &mut [&mut [u8]],
        room: &mut [f32],
    ) {
        let c = input.shape.c;
        let pitch = self.pitch(c);
        let Ok(slots) = <&mut [&mut [u8]; POINTS]>::try_from(slots) else {
            unreachable!("the plan has as many points")
        };
        let band = Band { input, cells: Floats::<true> };
        let columns = slots[0].len() / pitch;
        for first in (0..columns).step_by(PAIRS) {
            let pairs = PAIRS.min(columns - first);
            // The first two pixels are the last two of the pairs before.
            let kept = if first == 0 { 0 } else { 2 };
            room.copy_within(2 * PAIRS * c..(2 * PAIRS + kept) * c, 0);
            let row = &mut room[..(2 * pairs + 2) * c];
            band.fill_row(v, x + 2 * first + kept, &mut row[kept * c..]);
            let to = slots.each_mut().map(|slot| &mut slot[first * pitch..][..pairs * pitch]);
            input.level.dispatch(Transform { points: self, c, row, to });
        }
    }
}

/// Makes the points of some pairs from the pixels that they see.
struct Transform<'a, const SIGNED: bool> {
    points: Points<'a, SIGNED>,
    c: usize,
    /// `[2 * pairs + 2][c]`
    row: &'a [f32],
    /// At each point `[pairs][c in whole groups]`.
    to: [&'a mut [u8]; POINTS],
}

impl<const SIGNED: bool> Kernel for Transform<'_, SIGNED> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let c = self.c;
        let pitch = self.points.pitch(c);
        let whole = c / LANES * LANES;
        let range = round_up(c);
        let zero = self.points.zeros;
        let zeros = [s.splat_i(zero[0]), s.splat_i(zero[1]), s.splat_i(zero[2])];
        let pairs = (self.row.len() / c - 2) / 2;
        // What the last pair writes, and what is read of the factors.
        assert!(self.to.iter().all(|to| to.len() >= pairs * pitch));
        assert!(RANGES * range <= self.points.factor.len());
        for (pair, seen) in self.row.windows(4 * c).step_by(2 * c).enumerate() {
            let first = pair * pitch;
            for channel in (0..whole).step_by(LANES) {
                // SAFETY: sixteen channels, channel + 16 <= c, of each of the four pixels that are seen, of the three
                // ranges, and of the pair at each point: as asserted.
                unsafe {
                    let factor = self.points.factor.as_ptr().add(channel);
                    let pixel = seen.as_ptr().add(channel);
                    let [a, b] = [s.load(pixel), s.load(pixel.add(c))];
                    let [d, e] = [s.load(pixel.add(2 * c)), s.load(pixel.add(3 * c))];
                    let apart = s.load(factor);
                    let sum = s.load(factor.add(range));
                    let near = s.load(factor.add(2 * range));
                    let at = first + channel;
                    let [p, q, r, t] = self.to.each_mut().map(|to| to.as_mut_ptr());
                    s.quantize::<SIGNED>(s.mul(s.sub(a, d), apart), zeros[0], p.add(at));
                    s.quantize::<SIGNED>(s.mul(s.add(b, d), sum), zeros[1], q.add(at));
                    s.quantize::<SIGNED>(s.mul(s.sub(d, b), near), zeros[2], r.add(at));
                    s.quantize::<SIGNED>(s.mul(s.sub(b, e), apart), zeros[0], t.add(at));
                }
            }
            if whole < c {
                let pixel = |i: usize| s.load_slice(&seen[i * c + whole..(i + 1) * c]);
                let [a, b, d, e] = [pixel(0), pixel(1), pixel(2), pixel(3)];
                let values = [s.sub(a, d), s.add(b, d), s.sub(d, b), s.sub(b, e)];
                for (k, v) in values.into_iter().enumerate() {
                    let range_of = Winograd::Rows.range_of(k);
                    let factor = &self.points.factor[range_of * range + whole..];
                    let to = &mut self.to[k][first + whole..][..c - whole];
                    let v = s.mul(v, s.load_slice(factor));
                    s.quantize_slice::<SIGNED>(v, zero[range_of], to);
                }
            }
        }
    }
}

impl TileJob<'_> {
    /// Asks for what [`TileJob::join`] will read and write of the next `count` windows after the first `done`: a few with
    /// each tile of sums.
    #[inline(always)]
    pub(super) fn announce<S: Simd>(
        &self,
        s: S,
        [mut done, count]: [usize; 2],
        panel: usize,
        panels: usize,
    ) {
        let width = self.x[1] - self.x[0];
        let to = (width * (self.y[1] - self.y[0])).min(done + count);
        while done < to {
            let (y, x) = (self.y[0] + done / width, self.x[0] + done % width);
            let mut patch = self.epilogue.patch([y, x], self.shape.out()[1], 1, panel, panels);
            patch.pixels = (width - done % width).min(to - done);
            self.epilogue.announce(s, &patch);
            done += patch.pixels;
        }
    }

    /// Finishes the windows of some panels, whose sums at the points lie at `acc`, `[point][y][pair][panels][16]`, with
    /// room for [`FINISH_PIXELS`] behind them.
    ///
    /// # Safety
    /// The sums and the room must be there; the job's windows must lie in the output and be the caller's alone.
    #[inline(always)]
    pub(super) unsafe fn join<S: Simd>(&self, s: S, panel: usize, panels: usize) {
        let Some(dequantize) = self.epilogue.dequantize else { return };
        let epilogue = Epilogue { dequantize: None, ..*self.epilogue };
        let [windows, pairs] = [self.x[1] - self.x[0], (self.x[1] - self.x[0]).div_ceil(2)];
        let width = self.shape.out()[1];
        let pair_len = panels * LANES;
        let point_len = (self.y[1] - self.y[0]) * pairs * pair_len + POINT_GAP;
        // SAFETY: behind the sums.
        let room = unsafe { self.acc.add(POINTS * point_len) };
        for y in self.y[0]..self.y[1] {
            let mut patch = epilogue.patch([y, self.x[0]], width, 1, panel, panels);
            let mut pair = 0;
            while pair < pairs {
                let some = (FINISH_PIXELS / 2).min(pairs - pair);
                patch.pixels = (2 * some).min(windows - 2 * pair);
                for q in 0..panels {
                    let lanes = Lanes::new(s, dequantize, self.shape.filters() / POINTS, panel + q);
                    // SAFETY: the caller's.
                    unsafe {
                        let at = ((y - self.y[0]) * pairs + pair) * pair_len + q * LANES;
                        let mut from = self.acc.add(at).cast_const();
                        let mut to = room.add(q * LANES);
                        for _ in 0..some {
                            let [first, second] = lanes.join(s, from, point_len);
                            s.store(first, to.cast());
                            s.store(second, to.add(pair_len).cast());
                            from = from.add(pair_len);
                            to = to.add(2 * pair_len);
                        }
                    }
                }
                // SAFETY: the caller's; the room has the patch.
                unsafe { epilogue.finish(s, &patch, room, self.sums) };
                patch.advance();
                pair += some;
            }
        }
    }
}

/// What the sums of one panel are worth at each point.
struct Lanes<S: Simd> {
    correction: [S::I; POINTS],
    worth: [S::F; POINTS],
}

impl<S: Simd> Lanes<S> {
    #[inline(always)]
    fn new(s: S, of: Dequantize<'_>, filters: usize, panel: usize) -> Self {
        let mut lanes = Self { correction: [s.splat_i(0); POINTS], worth: [s.splat(0.0); POINTS] };
        let mut first = panel * LANES;
        for k in 0..POINTS {
            lanes.worth[k] = s.load_slice(&of.worth[first..first + LANES]);
            // SAFETY: sixteen elements.
            lanes.correction[k] = unsafe { s.load_i(of.correction[first..first + LANES].as_ptr()) };
            first += filters;
        }
        lanes
    }

    /// The two outputs of a pair.
    ///
    /// # Safety
    /// Sixteen sums of each point from `from` on, `step` from one point's to the next's.
    #[inline(always)]
    unsafe fn join(&self, s: S, from: *const u32, step: usize) -> [S::F; 2] {
        let mut m = self.worth;
        for (k, m) in m.iter_mut().enumerate() {
            // SAFETY: the caller's.
            let sum = unsafe { s.load_i(from.add(k * step).cast()) };
            *m = s.mul(s.float_of(s.sub_i(sum, self.correction[k])), *m);
        }
        outputs(s, m)
    }
}

/// The two outputs of four points along an axis.
#[inline(always)]
pub(super) fn outputs<S: Simd>(s: S, m: [S::F; POINTS]) -> [S::F; 2] {
    [s.add(m[0], s.add(m[1], m[2])), s.sub(s.sub(m[1], m[2]), m[3])]
}

//! Winograd's F(2 x 2, 3 x 3) (Lavin & Gray 2016, section 4.1): what an int8 convolution does differently where a square of
//! four outputs comes from sixteen products in place of 36.
//!
//! Lives here: the sixteen points of each square, made of the pixels that it sees and quantized, and the square, joined from
//! the sums at its points. As with pairs ([`super::conv_winograd`]) no multiplication is here. The formulas are those of
//! [`Winograd::Square`].

use latile_runtime::graph::Winograd;

use super::conv::Int8Weights;
use super::conv_band::{Band, Input, Place, Prologue, Words};
use super::conv_epilogue::Epilogue;
use super::conv_plan::{FINISH_PIXELS, POINT_GAP};
use super::conv_tile::TileJob;
use super::conv_winograd::outputs;
use crate::kernels::dot::GROUP;
use crate::simd::{Kernel, LANES, Simd};

/// Points of a square.
const POINTS: usize = Winograd::Square.points();
/// Rows of pixels that a line of squares sees.
const SEEN: usize = 4;

/// Pixels of a row that so many squares see.
pub(super) const fn seen_pixels(squares: usize) -> usize {
    2 * squares + 2
}

/// A band of bytes, `[point][line][square][channels]`, as [`Winograd::Square`] makes them of pixels. `SIGNED` ones are less by
/// 128, and so are their zero points.
#[derive(Clone, Copy)]
pub(super) struct Squares<'a, const SIGNED: bool> {
    words: Words<'a>,
    /// By which words are multiplied, and what 0 becomes, `[range]`; of the pixels' own range neither is read.
    by: [i16; Winograd::MOST_RANGES],
    zeros: [i16; Winograd::MOST_RANGES],
}

impl<'a, const SIGNED: bool> Squares<'a, SIGNED> {
    /// Of pixels times `factor`, one for each channel; 0 becomes `zeros`.
    pub(super) fn new(
        factor: &'a [f32],
        weights: &Int8Weights<'_>,
        zeros: [i32; Winograd::MOST_RANGES],
    ) -> Self {
        let mut by = [1; Winograd::MOST_RANGES];
        for (by, range) in by.iter_mut().zip(weights.ranges) {
            // A graph that was read has only such ranges.
            *by = Winograd::factor(weights.ranges[0].scale, range.scale).unwrap_or(1);
        }
        Self { words: Words { factor }, by, zeros: zeros.map(|z| z as i16) }
    }
}

impl<const SIGNED: bool> Prologue for Squares<'_, SIGNED> {
    type Cell = u8;

    fn pitch(self, c: usize) -> usize {
        c.next_multiple_of(GROUP)
    }

    fn fill(self, input: Input<'_>, at: Place, slots: &mut [&mut [u8]], room: &mut [f32]) {
        let Ok(to) = <&mut [&mut [u8]; POINTS]>::try_from(slots) else {
            unreachable!("the plan has as many points")
        };
        let c = input.shape.c;
        let squares = to[0].len() / self.pitch(c);
        let row = seen_pixels(squares) * c;
        let room: &mut [i16] = bytemuck::cast_slice_mut(room);
        let band = Band { input, cells: self.words };
        // Row v of the padded input is at place v % 4: the last two that the line above saw are the first two of this.
        let first = 2 * at.line;
        let kept = if at.follows { 2 } else { 0 };
        for v in first + kept..first + SEEN {
            band.fill_row(v, at.x, &mut room[v % SEEN * row..][..row]);
        }
        let room = &*room;
        let rows = std::array::from_fn(|i| &room[(first + i) % SEEN * row..][..row]);
        input.level.dispatch(Transform { squares: self, c, rows, to });
    }
}

/// Makes the points of a line of squares from the pixels that they see.
struct Transform<'a, 'b, const SIGNED: bool> {
    squares: Squares<'a, SIGNED>,
    c: usize,
    /// `[2 * squares + 2][c]` each.
    rows: [&'a [i16]; SEEN],
    /// At each point `[squares][c in whole groups]`.
    to: &'a mut [&'b mut [u8]; POINTS],
}

impl<const SIGNED: bool> Kernel for Transform<'_, '_, SIGNED> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let c = self.c;
        let pitch = self.squares.pitch(c);
        let whole = c / LANES * LANES;
        let squares = self.rows[0].len() / c / 2 - 1;
        // What the last square reads and writes.
        assert!(self.rows.iter().all(|row| row.len() >= seen_pixels(squares) * c));
        assert!(self.to.iter().all(|to| to.len() >= squares * pitch));
        let mut scaling = Scaling {
            by: [s.splat_words(0); Winograd::MOST_RANGES],
            zeros: [s.splat_words(0); Winograd::MOST_RANGES],
        };
        for range in 0..Winograd::MOST_RANGES {
            scaling.by[range] = s.splat_words(self.squares.by[range]);
            scaling.zeros[range] = s.splat_words(self.squares.zeros[range]);
        }
        let to = self.to.each_mut().map(|to| to.as_mut_ptr());
        for square in 0..squares {
            let seen = self.rows.map(|row| &row[2 * square * c..][..4 * c]);
            for channel in (0..whole).step_by(LANES) {
                let at = square * pitch + channel;
                // SAFETY: sixteen channels, channel + 16 <= c, of each of the sixteen pixels that are seen, and of the square
                // at each point: as asserted.
                unsafe {
                    let pixels = seen.map(|row| row.as_ptr().add(channel));
                    scaling.points::<S, 0, SIGNED>(s, pixels, c, &to, at);
                    scaling.points::<S, 1, SIGNED>(s, pixels, c, &to, at);
                    scaling.points::<S, 2, SIGNED>(s, pixels, c, &to, at);
                    scaling.points::<S, 3, SIGNED>(s, pixels, c, &to, at);
                }
            }
            if whole < c {
                // The last channels, with zeros to make sixteen.
                let mut pixels = [[0; 4 * LANES]; SEEN];
                let mut bytes = [[0; LANES]; POINTS];
                for (pixels, row) in pixels.iter_mut().zip(seen) {
                    for x in 0..4 {
                        pixels[x * LANES..][..c - whole]
                            .copy_from_slice(&row[x * c + whole..(x + 1) * c]);
                    }
                }
                let from = pixels.each_ref().map(|row| row.as_ptr());
                let last = bytes.each_mut().map(|point| point.as_mut_ptr());
                // SAFETY: four pixels of sixteen channels a row, and sixteen bytes a point.
                unsafe {
                    scaling.points::<S, 0, SIGNED>(s, from, LANES, &last, 0);
                    scaling.points::<S, 1, SIGNED>(s, from, LANES, &last, 0);
                    scaling.points::<S, 2, SIGNED>(s, from, LANES, &last, 0);
                    scaling.points::<S, 3, SIGNED>(s, from, LANES, &last, 0);
                }
                for (to, bytes) in to.iter().zip(&bytes) {
                    let count = c - whole;
                    // SAFETY: the square's last channels: as asserted.
                    unsafe {
                        let to = to.add(square * pitch + whole);
                        to.copy_from_nonoverlapping(bytes.as_ptr(), count);
                    }
                }
            }
        }
    }
}

/// How sums of words become bytes, in all lanes, `[range]`.
struct Scaling<H> {
    by: [H; Winograd::MOST_RANGES],
    zeros: [H; Winograd::MOST_RANGES],
}

impl<H: Copy> Scaling<H> {
    /// Makes sixteen channels of the four points of row `ROW`, bytes `at` on of each point's, from pixels `c` words apart.
    ///
    /// # Safety
    /// The pixels and the bytes must be there.
    #[inline(always)]
    unsafe fn points<S: Simd<H = H>, const ROW: usize, const SIGNED: bool>(
        &self,
        s: S,
        pixels: [*const i16; SEEN],
        c: usize,
        to: &[*mut u8; POINTS],
        at: usize,
    ) {
        let [p, q] = match ROW {
            0 => [pixels[0], pixels[2]],
            1 => [pixels[1], pixels[2]],
            2 => [pixels[2], pixels[1]],
            _ => [pixels[1], pixels[3]],
        };
        // SAFETY: the caller's.
        unsafe {
            let [a, b, d, e] = [
                pair::<S, ROW>(s, p, q),
                pair::<S, ROW>(s, p.add(c), q.add(c)),
                pair::<S, ROW>(s, p.add(2 * c), q.add(2 * c)),
                pair::<S, ROW>(s, p.add(3 * c), q.add(3 * c)),
            ];
            let row = [s.sub_words(a, d), s.add_words(b, d), s.sub_words(d, b), s.sub_words(b, e)];
            for (across, sums) in row.into_iter().enumerate() {
                let point = 4 * ROW + across;
                let range = Winograd::Square.range_of(point);
                let to = to[point].add(at);
                s.scale_words::<SIGNED>(sums, self.by[range], self.zeros[range], to);
            }
        }
    }
}

/// What point `ROW` of a column is made of two pixels: their sum for point 1, else their difference.
///
/// # Safety
/// Sixteen channels from each pointer on.
#[inline(always)]
unsafe fn pair<S: Simd, const ROW: usize>(s: S, p: *const i16, q: *const i16) -> S::H {
    // SAFETY: the caller's.
    let (p, q) = unsafe { (s.load_words(p), s.load_words(q)) };
    if ROW == 1 { s.add_words(p, q) } else { s.sub_words(p, q) }
}

impl TileJob<'_> {
    /// Finishes the windows of some panels, whose sums at the points lie at `acc`, `[point][line][square][panels][16]`, with
    /// room for two rows of [`FINISH_PIXELS`] behind them.
    ///
    /// # Safety
    /// The sums and the room must be there; the job's windows must lie in the output and be the caller's alone.
    #[inline(always)]
    pub(super) unsafe fn join_squares<S: Simd>(&self, s: S, panel: usize, panels: usize) {
        let Some(dequantize) = self.epilogue.dequantize else { return };
        let epilogue = Epilogue { dequantize: None, ..*self.epilogue };
        let windows = self.x[1] - self.x[0];
        let squares = windows.div_ceil(2);
        let width = self.shape.out()[1];
        let len = panels * LANES;
        let point_len = (self.y[1] - self.y[0]).div_ceil(2) * squares * len + POINT_GAP;
        let row_len = FINISH_PIXELS * len;
        // SAFETY: behind the sums.
        let room = unsafe { self.acc.add(POINTS * point_len) };
        let mut from = self.acc.cast_const();
        for y in (self.y[0]..self.y[1]).step_by(2) {
            let mut square = 0;
            while square < squares {
                let some = (FINISH_PIXELS / 2).min(squares - square);
                for q in 0..panels {
                    let first = (panel + q) * POINTS * LANES;
                    let worth = Worth {
                        correction: &dequantize.correction[first..][..POINTS * LANES],
                        worth: &dequantize.worth[first..][..POINTS * LANES],
                    };
                    // SAFETY: the caller's.
                    unsafe {
                        let mut from = from.add(q * LANES);
                        let mut to = room.add(q * LANES);
                        for _ in 0..some {
                            let [upper, lower] = worth.join(s, from, point_len);
                            for (row, [left, right]) in [upper, lower].into_iter().enumerate() {
                                s.store(left, to.add(row * row_len).cast());
                                s.store(right, to.add(row * row_len + len).cast());
                            }
                            from = from.add(len);
                            to = to.add(2 * len);
                        }
                    }
                }
                for row in 0..2.min(self.y[1] - y) {
                    let x = self.x[0] + 2 * square;
                    let mut patch = epilogue.patch([y + row, x], width, 1, panel, panels);
                    patch.pixels = (2 * some).min(windows - 2 * square);
                    // SAFETY: the caller's; the room has the patch.
                    unsafe { epilogue.finish(s, &patch, room.add(row * row_len), self.sums) };
                }
                square += some;
                // SAFETY: as far as there are sums.
                from = unsafe { from.add(some * len) };
            }
        }
    }
}

/// What the sums of one panel are worth, `[point][16]`.
struct Worth<'a> {
    correction: &'a [i32],
    worth: &'a [f32],
}

impl Worth<'_> {
    /// The four outputs of a square.
    ///
    /// # Safety
    /// Sixteen sums of each point from `from` on, `step` from one point's to the next's.
    #[inline(always)]
    unsafe fn join<S: Simd>(&self, s: S, from: *const u32, step: usize) -> [[S::F; 2]; 2] {
        // SAFETY: the caller's.
        let rows = unsafe {
            [
                outputs(s, self.row::<S, 0>(s, from, step)),
                outputs(s, self.row::<S, 4>(s, from.add(4 * step), step)),
                outputs(s, self.row::<S, 8>(s, from.add(8 * step), step)),
                outputs(s, self.row::<S, 12>(s, from.add(12 * step), step)),
            ]
        };
        let left = outputs(s, [rows[0][0], rows[1][0], rows[2][0], rows[3][0]]);
        let right = outputs(s, [rows[0][1], rows[1][1], rows[2][1], rows[3][1]]);
        [[left[0], right[0]], [left[1], right[1]]]
    }

    /// What the sums at four points from number `FIRST` on are worth.
    ///
    /// # Safety
    /// As for [`Worth::join`].
    #[inline(always)]
    unsafe fn row<S: Simd, const FIRST: usize>(
        &self,
        s: S,
        from: *const u32,
        step: usize,
    ) -> [S::F; 4] {
        debug_assert!(self.correction.len().min(self.worth.len()) == POINTS * LANES);
        let mut points = [s.splat(0.0); 4];
        for (j, point) in points.iter_mut().enumerate() {
            // SAFETY: there are all points; the sums are the caller's.
            unsafe {
                let at = (FIRST + j) * LANES;
                let sum = s.load_i(from.add(j * step).cast());
                let sum = s.sub_i(sum, s.load_i(self.correction.as_ptr().add(at)));
                *point = s.mul(s.float_of(sum), s.load(self.worth.as_ptr().add(at)));
            }
        }
        points
    }
}

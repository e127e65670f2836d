//! How a convolution is divided into tasks and bands, and which micro-kernel it uses.

use super::StepError;
use super::conv::STEP;
use super::conv_shape::ConvShape;
use super::conv_square::seen_pixels;
use super::conv_winograd::ROOM_PIXELS;
use super::norm::SumsLayout;
use crate::isa::Level;
use crate::kernels::dot;
use crate::registry::{self, DotKernel, MatmulKernel, WeightType};
use crate::simd::LANES;
use latile_runtime::graph::Winograd;

/// How a convolution of one shape is computed on one instruction set.
///
/// The partition of the output and with it the order of all sums depend on the shape alone, and
/// on whether it is computed in int8.
#[derive(Clone, Copy, Debug)]
pub struct ConvPlan {
    pub(super) shape: ConvShape,
    pub(super) level: Level,
    pub(super) family: Family,
    pub(super) blocking: Blocking,
    /// The most output rows of one call.
    strip: usize,
}

/// The micro-kernels of a convolution. Both kinds read a band in units of four bytes, one `f32`
/// or four bytes of neighbouring channels, and make sums of four bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Family {
    /// Sums in `f32`.
    Float(&'static MatmulKernel),
    /// Exact sums in `i32`.
    Int8(&'static DotKernel),
}

impl Family {
    /// Pixels of the largest tile.
    pub(super) const fn rows(self) -> usize {
        match self {
            Family::Float(k) => k.rows,
            Family::Int8(k) => k.rows,
        }
    }

    /// Panels of the largest tile.
    pub(super) const fn panels(self) -> usize {
        match self {
            Family::Float(k) => k.panels,
            Family::Int8(k) => k.panels,
        }
    }

    /// Units of a pixel of `c` channels.
    const fn units(self, c: usize) -> usize {
        match self {
            Family::Float(_) => c,
            Family::Int8(_) => c.div_ceil(dot::GROUP),
        }
    }

    /// Bytes of the weights of one unit and sixteen output channels.
    pub(super) const fn weight_row(self) -> usize {
        match self {
            Family::Float(k) => match k.weights {
                WeightType::F32 => 64,
                WeightType::F16 => 32,
            },
            Family::Int8(_) => 64,
        }
    }

    /// Whether a stretch of the weights is widened or rearranged before its tiles.
    const fn prepares(self) -> bool {
        match self {
            Family::Float(k) => k.widen,
            Family::Int8(k) => k.arrange.is_some(),
        }
    }
}

/// The partition of one convolution; see [`ConvPlan::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocking {
    /// Whether the whole padded input is prepared first, or each task prepares a band of rows of
    /// its own.
    pub(super) whole: bool,
    /// Windows of a row that are a task's: output columns, of each phase.
    pub(super) cols: usize,
    /// Rows of windows of a task; of squares an even number, or all.
    pub(super) rows: usize,
    /// Rows of windows computed at once; divides the task's rows but for the last.
    pub(super) step: usize,
    /// Lines of the band: a ring, but where there are points not.
    pub(super) ring: usize,
    /// Columns of the band; see [`columns`].
    pub(super) band_cols: usize,
    /// Output channels of a task, a multiple of 16 but for the last; all where tasks have bands
    /// of their own.
    pub(super) channels: usize,
    /// The longest stretch of K, in units, that is summed before moving to the next tile.
    pub(super) k_block: usize,
}

/// Pixels whose sums are finished together, where K is not cut: enough that what finishing needs for each
/// panel is read once for several tiles, few enough that the sums stay in the first-level cache.
pub(super) const FINISH_PIXELS: usize = 16;
/// Units between the points of a band, and of sums: were they a power of two apart, all would share a few sets of the
/// first-level cache. A cache line, and no more than the sums of a pixel and a panel.
pub(super) const POINT_GAP: usize = LANES;
/// Bytes of a padded f32 input, and windows, up to which it is prepared whole.
const WHOLE_LIMIT: usize = 1 << 20;
const WHOLE_PIXELS: usize = 512;
/// Panels of output channels from which on there are enough tasks of [`TASK_CHANNELS`].
const WHOLE_PANELS: usize = 8;
/// Bytes of a band that a task should stay below: with a stretch of the weights it fits the
/// second-level cache of a large core.
const BAND_LIMIT: usize = 640 << 10;
/// Windows of a row for a task where channels are few.
const COLS: usize = 64;
/// Windows that share one pass over the weights.
const STEP_PIXELS: usize = 128;
/// Output channels of a task of a small map, when there are enough of them.
const TASK_CHANNELS: usize = 32;
/// Bytes of a padded int8 input up to which it is prepared whole: no row is prepared twice, and
/// it costs less memory than the tensor itself.
const INT8_WHOLE_LIMIT: usize = 4 << 20;
/// As [`STEP_PIXELS`], for int8 layers: their weights are read four times as fast.
const INT8_STEP_PIXELS: usize = 256;
/// Tasks that an int8 layer should have, so that threads end together.
const INT8_TASKS: usize = 24;

/// Columns of a band that so many windows of a row need: a column is a pixel, or where there are points those
/// of a tile of outputs.
pub(super) const fn columns(shape: &ConvShape, windows: usize) -> usize {
    if shape.winograd.is_some() {
        windows.div_ceil(2)
    } else {
        (windows - 1) * shape.stride[1] + shape.reach()[1]
    }
}

/// As many rows of windows as may be computed at once: up to `limit`, of squares an even number.
fn step_rows(shape: &ConvShape, limit: usize, rows: usize) -> usize {
    let limit = limit.clamp(1, rows);
    if shape.squares() { (limit / 2 * 2).max(2).min(rows) } else { limit }
}

impl Blocking {
    fn new(shape: &ConvShape, family: Family) -> Self {
        let [oh, ow] = shape.windows();
        let [kh, kw] = shape.reach();
        let sx = shape.stride[1];
        let lines = |rows: usize| shape.lines([0, rows])[1];
        let padded_rows = lines(oh);
        let padded_cols = columns(shape, ow);
        let pixel = 4 * family.units(shape.c) * shape.points();
        let bytes = padded_rows.saturating_mul(padded_cols).saturating_mul(pixel);
        let panels = shape.n.div_ceil(LANES);
        // Of two panels 256 KiB: the second-level cache holds them and a band.
        let k_block = 2048;
        if bytes <= WHOLE_LIMIT && oh * ow <= WHOLE_PIXELS && panels >= WHOLE_PANELS {
            let step = step_rows(shape, STEP_PIXELS / ow, oh);
            return Blocking {
                whole: true,
                cols: ow,
                rows: oh,
                step,
                ring: padded_rows,
                band_cols: padded_cols,
                channels: TASK_CHANNELS,
                k_block,
            };
        }
        let high = if shape.squares() { 1 } else { kh };
        let row_limit = (BAND_LIMIT / (pixel * high)).saturating_sub(kw) / sx;
        let limit = row_limit.clamp(16, COLS);
        let cols = ow.div_ceil(ow.div_ceil(limit));
        // Pairs are a task's own.
        let cols = if shape.winograd.is_some() { cols.next_multiple_of(2).min(ow) } else { cols };
        if matches!(family, Family::Int8(_)) && bytes <= INT8_WHOLE_LIMIT {
            let rows = step_rows(shape, INT8_STEP_PIXELS / cols, oh);
            let blocks = oh.div_ceil(rows) * ow.div_ceil(cols);
            let pairs = panels.div_ceil(2);
            let parts = INT8_TASKS.div_ceil(blocks).min(pairs.div_ceil(2));
            return Blocking {
                whole: true,
                cols,
                rows,
                step: rows,
                ring: padded_rows,
                band_cols: padded_cols,
                channels: pairs.div_ceil(parts) * 2 * LANES,
                k_block,
            };
        }
        let rows = oh.div_ceil(16).clamp(4, 16).next_multiple_of(shape.tile()[0]).min(oh);
        let band_row = pixel * columns(shape, cols);
        let pixels = match shape.winograd {
            Some(Winograd::Rows) => INT8_STEP_PIXELS,
            _ => STEP_PIXELS,
        };
        let mut step = step_rows(shape, pixels / cols, rows);
        while step > shape.tile()[0] && lines(step) * band_row > BAND_LIMIT {
            step -= shape.tile()[0];
        }
        Blocking {
            whole: false,
            cols,
            rows,
            step,
            ring: lines(step),
            band_cols: columns(shape, cols),
            channels: shape.n,
            k_block,
        }
    }
}

impl ConvPlan {
    /// Plans a convolution in floating point: chooses the micro-kernel of the level and the
    /// partition.
    ///
    /// # Errors
    /// [`StepError::Shape`] when the shape has a zero extent, a kernel larger than the padded
    /// input, or does not fit the address space, or has points.
    pub fn new(shape: ConvShape, weights: WeightType, level: Level) -> Result<Self, StepError> {
        if shape.winograd.is_some() {
            let reason = "Winograd's algorithm is for int8 layers".to_owned();
            return Err(StepError::Shape { step: STEP, reason });
        }
        Self::of(shape, Family::Float(registry::matmul(level, weights)), level)
    }

    /// Plans a convolution in int8, as [`ConvPlan::new`].
    ///
    /// # Errors
    /// As [`ConvPlan::new`], and when a sum of so many products may exceed 32 bits.
    pub fn int8(shape: ConvShape, level: Level) -> Result<Self, StepError> {
        shape.check()?;
        let products = shape.stored_kernel().iter().product::<usize>() * shape.c;
        if products > dot::MAX_PRODUCTS {
            let reason = format!(
                "an int8 sum of {products} products; {} are the most that 32 bits hold",
                dot::MAX_PRODUCTS
            );
            return Err(StepError::Shape { step: STEP, reason });
        }
        Self::of(shape, Family::Int8(registry::dot(level)), level)
    }

    fn of(shape: ConvShape, family: Family, level: Level) -> Result<Self, StepError> {
        shape.check()?;
        let strip = shape.out()[0];
        Ok(ConvPlan { shape, level, family, blocking: Blocking::new(&shape, family), strip })
    }

    /// The same convolution, computed in strips of at most `rows` output rows, rounded up to whole
    /// blocks: it then needs no more scratch than a strip does. The partition, and with it every bit of
    /// the result and its sums, stays.
    #[must_use]
    pub fn in_strips(mut self, rows: usize) -> Self {
        let height = self.shape.out()[0];
        self.strip = rows.next_multiple_of(self.block_rows()).min(height);
        if self.blocking.whole {
            let windows = self.strip >> self.shape.doubled();
            self.blocking.ring = self.shape.lines([0, windows])[1];
        }
        self
    }

    /// The most output rows of one call.
    pub const fn strip_rows(&self) -> usize {
        self.strip
    }

    /// Output rows that are summed together: strips consist of whole blocks.
    pub const fn block_rows(&self) -> usize {
        self.blocking.rows << self.shape.doubled()
    }

    /// The shape.
    pub const fn shape(&self) -> &ConvShape {
        &self.shape
    }

    /// Whether it is computed in int8.
    pub const fn is_int8(&self) -> bool {
        matches!(self.family, Family::Int8(_))
    }

    /// The micro-kernel's name, for reports.
    pub const fn kernel_name(&self) -> &'static str {
        match self.family {
            Family::Float(k) => k.name,
            Family::Int8(k) => k.name,
        }
    }

    /// The layout of the channel sums that this convolution writes.
    pub const fn sums(&self) -> SumsLayout {
        let ([oh, ow], [h, w]) = (self.shape.out(), self.shape.windows());
        let blocks = h.div_ceil(self.blocking.rows) * w.div_ceil(self.blocking.cols);
        SumsLayout { blocks, channels: self.shape.n, pixels: oh * ow }
    }

    /// `f32` elements of scratch that [`conv2d`](super::conv::conv2d) needs with a pool of
    /// `threads`.
    pub fn scratch_len(&self, threads: usize) -> usize {
        let own = self.own_len();
        let band = self.band_len();
        let bands = if self.blocking.whole { 1 } else { threads };
        self.head_len() + bands * band + threads * own
    }

    /// Units of a column of the band, at each point.
    pub(super) const fn units(&self) -> usize {
        self.family.units(self.shape.c)
    }

    /// Units of a row of the band, and of all its rows at one point.
    pub(super) const fn band_row(&self) -> [usize; 2] {
        let row = self.blocking.band_cols * self.units();
        let gap = if self.shape.points() > 1 { POINT_GAP } else { 0 };
        [row, self.blocking.ring * row + gap]
    }

    /// Units that a window, or a pair of them at one point, reads of a row of the band; they follow one another.
    pub(super) const fn run_len(&self) -> usize {
        self.shape.stored_kernel()[1] * self.units()
    }

    /// The band's column where the window of column `x` begins; of points, `x` being even, where its pair is.
    pub(super) const fn column(&self, x: usize) -> usize {
        if self.shape.winograd.is_some() { x / 2 } else { x * self.shape.stride[1] }
    }

    /// Ranges that its input is quantized by.
    pub(super) const fn ranges(&self) -> usize {
        match self.shape.winograd {
            Some(w) => w.ranges(),
            None => 1,
        }
    }

    /// Ranges that pixels, or sums of them, are scaled by in floating point: of squares that of the words alone.
    pub(super) const fn scalings(&self) -> usize {
        if self.shape.squares() { 1 } else { self.ranges() }
    }

    /// Units of what an int8 layer computes once a run: the factor of each input channel in each range, then the
    /// correction and the worth of each filter's sum.
    pub(super) const fn head_len(&self) -> usize {
        match self.family {
            Family::Float(_) => 0,
            Family::Int8(_) => {
                self.scalings() * round_up(self.shape.c) + 2 * round_up(self.shape.filters())
            }
        }
    }

    /// Units of a band.
    pub(super) const fn band_len(&self) -> usize {
        round_up(self.shape.points() * self.band_row()[1])
    }

    /// Units that a worker has of its own beside a band: sums, then prepared weights, then pixels that points are
    /// made from.
    pub(super) fn own_len(&self) -> usize {
        self.tile_len() + self.prepared_len() + self.room_len()
    }

    /// Units of the pixels that points are made from.
    pub(super) const fn room_len(&self) -> usize {
        match self.shape.winograd {
            Some(Winograd::Rows) => round_up(ROOM_PIXELS * self.shape.c),
            Some(Winograd::Square) => {
                round_up((4 * seen_pixels(self.blocking.band_cols) * self.shape.c).div_ceil(2))
            }
            None => 0,
        }
    }

    /// Sums of one worker's tile.
    pub(super) fn tile_len(&self) -> usize {
        let b = &self.blocking;
        let pixels = if self.shape.winograd.is_some() {
            // The sums of all points, and what is made of some of them.
            let [h, w] = self.shape.tile();
            self.shape.points() * (b.step.div_ceil(h) * b.cols.div_ceil(w) + 1) + h * FINISH_PIXELS
        } else if self.depth() <= b.k_block {
            FINISH_PIXELS - 1 + self.family.rows()
        } else {
            b.step * b.cols
        };
        round_up(pixels * LANES * self.family.panels())
    }

    /// Units of one worker's prepared weights.
    pub(super) fn prepared_len(&self) -> usize {
        if self.family.prepares() {
            self.depth().min(self.blocking.k_block) * LANES * self.family.panels()
        } else {
            0
        }
    }

    /// Units of a sum.
    pub(super) const fn depth(&self) -> usize {
        self.shape.stored_kernel()[0] * self.run_len()
    }

    /// Tasks that one run is divided into.
    pub const fn tasks(&self) -> usize {
        let [oh, ow] = self.shape.windows();
        let b = &self.blocking;
        oh.div_ceil(b.rows) * ow.div_ceil(b.cols) * self.shape.n.div_ceil(b.channels)
    }
}

/// Rounds up to a 64-byte cache line of `f32`.
pub(super) const fn round_up(elements: usize) -> usize {
    elements.div_ceil(LANES) * LANES
}

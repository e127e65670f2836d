//! The fused, banded convolution.
//!
//! One step reads up to four tensors concatenated along channels, applies each one's
//! GroupNorm (as a per-channel scale and shift), SiLU and nearest 2x upsampling, pads with
//! zeros, convolves, and writes
//! `(sum + (bias + add) + residual) * output_scale`, along with the channel sums that the next
//! GroupNorm needs. Every activation is read and written once: there is no im2col buffer and
//! no pass for a norm. A 3x3 convolution of an upsampled map may also come as four of 2x2, one for each
//! phase of the output ([`ConvShape::phases`]): 4/9 of the work; in int8 it may go by Winograd's algorithms
//! ([`ConvShape::winograd`]): 2/3 or 4/9 of it. A 1x1 convolution and a Linear layer
//! (`h = 1`, `w = rows`) are the same step without a halo.
//!
//! In floating point the sum over K runs in the order (ky, kx, c) with fused multiply-adds. With
//! int8 weights ([`Weights::I8`]) the input is quantized as it is read and the sum is an exact
//! integer. Either way results are the same bits on every instruction set and for any number of
//! threads; see [`naive`](crate::naive) for the definitions as plain loops.

use half::f16;
use latile_runtime::graph::{QuantRange, Winograd};

use super::conv_band::{Band, Bytes, Floats, Input, Place, Prologue};
use super::conv_epilogue::{Dequantize, Epilogue, Read, Write};
pub use super::conv_plan::ConvPlan;
use super::conv_plan::{Family, columns, round_up};
pub use super::conv_rows::{Rows, Window};
pub use super::conv_shape::{ConvShape, MAX_KERNEL_ROWS};
use super::conv_square::Squares;
use super::conv_tile::TileJob;
use super::conv_winograd::Points;
use super::{Output, SharedMut, Source, StepError, check_len};
use crate::pool::{Pool, PoolError};
use crate::registry::{self, WeightType};
use crate::simd::LANES;

pub(super) const STEP: &str = "convolution";

/// The most tensors that one convolution concatenates.
pub const MAX_SEGMENTS: usize = 4;

/// What is applied to the input after its norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// SiLU, [`crate::simd::math::silu`].
    Silu,
}

/// One of the tensors that are concatenated along channels, `[h, w, channels]`.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// The tensor.
    pub data: Source<'a>,
    /// Its channels.
    pub channels: usize,
    /// Scale and shift of each of its channels (`x * scale + shift`, fused): a folded
    /// GroupNorm, see [`group_norm_coeffs`](super::norm::group_norm_coeffs).
    pub norm: Option<(&'a [f32], &'a [f32])>,
}

/// Packed weights, `[ceil(filters / 16)][kh][kw][c][16]`, see [`ConvShape::filters`]; the file's
/// [`Packed16`](latile_runtime::graph::Layout::Packed16).
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision, widened exactly as it is used.
    F16(&'a [f16]),
    /// Integers, packed otherwise.
    I8(Int8Weights<'a>),
}

/// The weights of an int8 layer, and what its input becomes and its sums are worth; see
/// [`Quant`](latile_runtime::graph::Quant).
#[derive(Clone, Copy, Debug)]
pub struct Int8Weights<'a> {
    /// `[ceil(filters / 16)][kh][kw][ceil(c / 4)][16][4]`, the kernel being
    /// [`ConvShape::stored_kernel`]; the file's [`Packed16x4`](latile_runtime::graph::Layout::Packed16x4).
    pub packed: &'a [i8],
    /// What one step of a weight is worth, per filter.
    pub scale: &'a [f32],
    /// The sum of each filter's weights.
    pub sum: &'a [i32],
    /// What each input channel is multiplied by first.
    pub input_scale: Option<&'a [f32]>,
    /// Scale and zero point of the input; of a Winograd layer several, see
    /// [`Quant::ranges`](latile_runtime::graph::Quant::ranges).
    pub ranges: &'a [QuantRange],
}

/// What is added to the result.
#[derive(Clone, Copy, Debug, Default)]
pub enum Residual<'a> {
    /// Nothing.
    #[default]
    None,
    /// What the output tensor held before.
    InPlace,
    /// Another tensor of the output's shape.
    Of(Source<'a>),
}

/// Lines of squares that one task makes of a band that tasks share: two of the four rows that each sees it need not make
/// again.
const LINES_TOGETHER: usize = 4;

/// The operands of one convolution.
#[derive(Debug)]
pub struct ConvArgs<'a> {
    /// One to four tensors, concatenated along channels in this order.
    pub segments: &'a [Segment<'a>],
    /// Applied after the norm, before padding.
    pub activation: Activation,
    /// The packed weights.
    pub weights: Weights<'a>,
    /// Per filter.
    pub bias: Option<&'a [f32]>,
    /// A vector per output channel, such as the time embedding's projection.
    pub add: Option<&'a [f32]>,
    /// Added after bias.
    pub residual: Residual<'a>,
    /// Multiplies the result at the end; 1 for none.
    pub output_scale: f32,
    /// The output, `[oh, ow, n]`.
    pub out: Output<'a>,
    /// Partial channel sums of the output as stored, [`ConvPlan::sums`] elements.
    pub sums: Option<&'a mut [f64]>,
}

/// Runs one convolution. `scratch` needs [`ConvPlan::scratch_len`] elements (more are left
/// alone; start it on a 64-byte boundary for speed); its contents before do not matter.
///
/// # Errors
/// [`StepError::Length`] when an operand does not have the size that the shape says,
/// [`StepError::Shape`] when the segments do not add up or the weights are not of the plan's type,
/// [`StepError::Worker`] when a worker panicked.
pub fn conv2d(
    plan: &ConvPlan,
    pool: &Pool,
    args: ConvArgs<'_>,
    scratch: &mut [f32],
) -> Result<(), StepError> {
    conv2d_rows(plan, pool, args, &Rows::all(plan), scratch)
}

/// Runs a part of a convolution, as [`conv2d`] runs all of it; the result is the same, bit for bit, and
/// so are the sums once every row has been computed.
///
/// # Errors
/// As [`conv2d`], and [`StepError::Shape`] when the rows are no part of the plan's partition or not held
/// by the operands.
pub fn conv2d_rows(
    plan: &ConvPlan,
    pool: &Pool,
    args: ConvArgs<'_>,
    rows: &Rows,
    scratch: &mut [f32],
) -> Result<(), StepError> {
    check(plan, pool, &args, rows, scratch)?;
    let out = match args.out {
        Output::F32(x) => Write::F32(x.as_mut_ptr()),
        Output::F16(x) => Write::F16(x.as_mut_ptr()),
    };
    let epilogue = Epilogue {
        n: plan.shape.n,
        dequantize: None,
        bias: args.bias,
        add: args.add,
        residual: match (args.residual, out) {
            (Residual::None, _) => None,
            (Residual::InPlace, Write::F32(p)) => Some(Read::F32(p)),
            (Residual::InPlace, Write::F16(p)) => Some(Read::F16(p)),
            (Residual::Of(Source::F32(x)), _) => Some(Read::F32(x.as_ptr())),
            (Residual::Of(Source::F16(x)), _) => Some(Read::F16(x.as_ptr())),
        },
        output_scale: args.output_scale,
        out,
        out_rows: rows.out,
        residual_rows: match args.residual {
            Residual::Of(_) => rows.residual,
            Residual::None | Residual::InPlace => rows.out,
        },
    };
    let (head, rest) = scratch.split_at_mut(plan.head_len());
    let common = Run {
        plan,
        pool,
        segments: args.segments,
        rows,
        activation: args.activation,
        epilogue,
        weights: Shared(std::ptr::null()),
        sums: args.sums.map(|x| SharedMut(x.as_mut_ptr())),
        direct: None,
        scratch: SharedMut(rest.as_mut_ptr()),
    };
    let float = |weights: *const u8| {
        let direct = direct(plan, &args.segments[0], args.activation)
            .filter(|_| rows.inputs[0] == Window::WHOLE)
            .map(|x| Shared(x.as_ptr()));
        Run { weights: Shared(weights), direct, ..common }.run(Floats::<false>)
    };
    let outcome = match (args.weights, plan.family) {
        (Weights::F32(x), _) => float(x.as_ptr().cast()),
        (Weights::F16(x), _) => float(x.as_ptr().cast()),
        (Weights::I8(x), family) => {
            let signed = matches!(family, Family::Int8(kernel) if kernel.signed);
            let mut zeros = [0; Winograd::MOST_RANGES];
            for (zero, range) in zeros.iter_mut().zip(x.ranges) {
                *zero = i32::from(range.zero_point) - if signed { 128 } else { 0 };
            }
            let (factor, dequantize) = fill_head(plan, &x, zeros, head);
            let weights = Shared(x.packed.as_ptr().cast());
            let epilogue = Epilogue { dequantize: Some(dequantize), ..epilogue };
            let run = Run { weights, epilogue, ..common };
            match (plan.shape.winograd, signed) {
                (None, false) => run.run(Bytes::<false> { factor, zero: zeros[0] }),
                (None, true) => run.run(Bytes::<true> { factor, zero: zeros[0] }),
                (Some(Winograd::Rows), false) => run.run(Points::<false> { factor, zeros }),
                (Some(Winograd::Rows), true) => run.run(Points::<true> { factor, zeros }),
                (Some(Winograd::Square), false) => {
                    run.run(Squares::<false>::new(factor, &x, zeros))
                }
                (Some(Winograd::Square), true) => run.run(Squares::<true>::new(factor, &x, zeros)),
            }
        }
    };
    outcome.map_err(|source| StepError::Worker { step: STEP, source })
}

/// Computes what an int8 layer needs for each channel: the factors of its input in each range, and what its sums of
/// products with bytes of which `zeros` stand for 0 are worth.
fn fill_head<'a>(
    plan: &ConvPlan,
    weights: &Int8Weights<'_>,
    zeros: [i32; Winograd::MOST_RANGES],
    head: &'a mut [f32],
) -> (&'a [f32], Dequantize<'a>) {
    let channels = round_up(plan.shape.c);
    let (factor, rest) = head.split_at_mut(plan.scalings() * channels);
    let (correction, worth) = rest.split_at_mut(round_up(plan.shape.filters()));
    let correction: &mut [i32] = bytemuck::cast_slice_mut(correction);
    for (factor, range) in factor.chunks_exact_mut(channels).zip(weights.ranges) {
        factor.fill(1.0 / range.scale);
        for (factor, scale) in factor.iter_mut().zip(weights.input_scale.into_iter().flatten()) {
            *factor *= scale;
        }
    }
    // The filters of a point, or all.
    let filters = plan.shape.filters() / plan.shape.points();
    let winograd = plan.shape.winograd;
    let steps: [f32; Winograd::MOST_POINTS] = std::array::from_fn(|point| match winograd {
        Some(w) if point < w.points() => w.step(weights.ranges, point),
        _ => weights.ranges[0].scale,
    });
    correction.fill(0);
    worth.fill(0.0);
    for (i, (sum, scale)) in weights.sum.iter().zip(weights.scale).enumerate() {
        let (point, filter) = (i / filters, i % filters);
        // Of squares what sixteen filters need at all points lies together: it is read together.
        let at = match winograd {
            Some(Winograd::Square) => {
                (filter / LANES * plan.shape.points() + point) * LANES + filter % LANES
            }
            _ => i,
        };
        correction[at] = zeros[winograd.map_or(0, |w| w.range_of(point))].wrapping_mul(*sum);
        worth[at] = steps[point] * scale;
    }
    (factor, Dequantize { correction, worth })
}

/// A checked convolution, or a part of one.
#[derive(Clone, Copy)]
struct Run<'a> {
    plan: &'a ConvPlan,
    pool: &'a Pool,
    segments: &'a [Segment<'a>],
    rows: &'a Rows,
    activation: Activation,
    epilogue: Epilogue<'a>,
    weights: Shared<u8>,
    sums: Option<SharedMut<f64>>,
    /// The input, where it is read without a band.
    direct: Option<Shared<f32>>,
    /// Bands, sums and prepared weights.
    scratch: SharedMut<f32>,
}

impl Run<'_> {
    fn run<P: Prologue>(&self, prologue: P) -> Result<(), PoolError> {
        let (plan, shape) = (self.plan, &self.plan.shape);
        let b = &plan.blocking;
        let [oh, ow] = shape.windows();
        // Rows of windows.
        let [from, to] = self.rows.y.map(|y| y >> shape.doubled());
        let input = Input {
            shape,
            segments: self.segments,
            windows: &self.rows.inputs,
            activation: self.activation,
            level: plan.level,
        };
        let units = plan.units();
        let [band_row, band_plane] = plan.band_row();
        let band_len = plan.band_len();
        let own_len = plan.own_len();
        let bands = if b.whole { 1 } else { self.pool.threads() };
        // SAFETY: within the checked scratch; each worker has its own part.
        let own_of =
            |worker: usize| unsafe { self.scratch.get().add(bands * band_len + worker * own_len) };
        // The first `columns` of a slot of a band, at all points.
        let fill = |band: SharedMut<f32>, slot: usize, at: Place, columns: usize, worker| {
            let cells = columns * prologue.pitch(shape.c);
            // SAFETY: a slot of the checked scratch, initialised, which this task alone uses now, and room that
            // is this worker's.
            let (mut slots, room) = unsafe {
                let slot = |point: usize| {
                    // Beyond the points nothing, of a plane that is there.
                    let plane = point % shape.points() * band_plane;
                    let cells = if point < shape.points() { cells } else { 0 };
                    let start = band.get().add(plane + slot * band_row);
                    std::slice::from_raw_parts_mut(start.cast::<P::Cell>(), cells)
                };
                let room = own_of(worker).add(own_len - plan.room_len());
                (
                    std::array::from_fn::<_, { Winograd::MOST_POINTS }, _>(slot),
                    std::slice::from_raw_parts_mut(room, plan.room_len()),
                )
            };
            prologue.fill(input, at, &mut slots[..shape.points()], room);
        };
        let [first, last] = shape.lines([from, to]);
        // The line in slot 0 of a shared band.
        let first = if b.whole { first } else { 0 };
        if b.whole && self.direct.is_none() {
            // Each task writes lines of its own: there are no more of them than the band has.
            let together = if shape.squares() { LINES_TOGETHER } else { 1 };
            self.pool.run((last - first).div_ceil(together), &|i, worker| {
                for slot in i * together..(last - first).min((i + 1) * together) {
                    let at = Place { line: first + slot, x: 0, follows: slot > i * together };
                    fill(self.scratch, slot, at, b.band_cols, worker);
                }
            })?;
        }
        let panels = shape.n.div_ceil(16);
        let task_panels = b.channels.div_ceil(16);
        let parts = panels.div_ceil(task_panels);
        let col_blocks = ow.div_ceil(b.cols);
        let first_block = from / b.rows;
        let row_blocks = to.div_ceil(b.rows) - first_block;
        // Bytes of the weights of a phase, or of a point.
        let part_weights = panels * plan.depth() * plan.family.weight_row();
        let widened = matches!(plan.family, Family::Float(kernel) if kernel.widen)
            .then(|| registry::matmul(plan.level, WeightType::F32));
        self.pool.run(row_blocks * col_blocks * parts, &|task, worker| {
            let (block, part) = (task / parts, task % parts);
            let block = first_block * col_blocks + block;
            let (row_block, col_block) = (block / col_blocks, block % col_blocks);
            let y = [row_block * b.rows, oh.min((row_block + 1) * b.rows)];
            let x = [col_block * b.cols, ow.min((col_block + 1) * b.cols)];
            let own_panels = [part * task_panels, panels.min((part + 1) * task_panels)];
            let channels = own_panels.map(|p| shape.n.min(16 * p));
            let sums = self.block_sums(block, channels);
            // SAFETY: within the checked scratch; each worker has its own part.
            let (own, acc, prepared) = unsafe {
                let mine = if b.whole { 0 } else { worker };
                let own = self.scratch.get().add(mine * band_len);
                let acc = own_of(worker);
                (SharedMut(own), acc, acc.add(plan.tile_len()))
            };
            let column = plan.column(x[0]) * units;
            // SAFETY: what window x[0] sees first, in the checked input or in a shared band.
            let (source, source_row, ring) = unsafe {
                match self.direct {
                    Some(input) => (input.get().add(column), shape.w * units, usize::MAX),
                    None if b.whole => (own.get().cast_const().add(column), band_row, b.ring),
                    None => (own.get().cast_const(), band_row, b.ring),
                }
            };
            let mut base = if self.direct.is_some() { 0 } else { first };
            let mut filled = 0;
            let mut row = y[0];
            while row < y[1] {
                let end = y[1].min(row + b.step);
                if self.direct.is_none() && !b.whole {
                    // Columns that this task's windows need; the last task of a row may need fewer.
                    let used = columns(shape, x[1] - x[0]);
                    let [top, bottom] = shape.lines([row, end]);
                    if shape.winograd.is_some() {
                        if filled > top {
                            // SAFETY: this worker's band; the rows that are kept were filled a step ago.
                            unsafe { keep(plan, own.get(), top - base, filled - top) };
                        }
                        base = top;
                    }
                    let begun = filled > 0;
                    filled = filled.max(top);
                    while filled < bottom {
                        let at = Place { line: filled, x: x[0], follows: begun || filled > top };
                        fill(own, (filled - base) % b.ring, at, used, worker);
                        filled += 1;
                    }
                }
                for number in 0..shape.phase_count() {
                    let phase = [number / 2, number % 2];
                    // SAFETY: the band has a column more than the windows of one phase reach, and the
                    // checked weights have all phases.
                    let (band, weights) = unsafe {
                        let weights = self.weights.get().add(number * part_weights);
                        (source.add(phase[1] * units), weights)
                    };
                    plan.level.dispatch(TileJob {
                        shape,
                        family: plan.family,
                        epilogue: &self.epilogue.of_filters(number * panels * LANES),
                        phase,
                        band: band.cast(),
                        column: units,
                        run: plan.run_len(),
                        band_row: source_row,
                        band_plane,
                        base,
                        ring,
                        y: [row, end],
                        x,
                        panels: own_panels,
                        weights,
                        point_weights: part_weights,
                        k_block: b.k_block,
                        sums,
                        acc: acc.cast(),
                        widened,
                        prepared: prepared.cast(),
                    });
                }
                row = end;
            }
        })
    }

    /// The sums of one block, those of these channels cleared.
    fn block_sums(&self, block: usize, channels: [usize; 2]) -> Option<*mut f64> {
        let n = self.plan.shape.n;
        self.sums.map(|p| {
            // SAFETY: the block lies in the checked slice, and the channels are this task's.
            unsafe {
                let block = p.get().add(block * 2 * n);
                let count = channels[1] - channels[0];
                std::ptr::write_bytes(block.add(channels[0]), 0, count);
                std::ptr::write_bytes(block.add(n + channels[0]), 0, count);
                block
            }
        })
    }
}

/// Moves `rows` rows of a band from slot `from` on to its beginning, at all points.
///
/// # Safety
/// `band` is one of the plan's, with so many rows from that slot on.
unsafe fn keep(plan: &ConvPlan, band: *mut f32, from: usize, rows: usize) {
    let [row, plane] = plan.band_row();
    for point in 0..plan.shape.points() {
        // SAFETY: the caller's.
        unsafe {
            let start = band.add(point * plane);
            std::ptr::copy(start.add(from * row).cast_const(), start, rows * row);
        }
    }
}

/// Shows `see` what a convolution's kernel reads, before upsampling, quantization and padding: the
/// concatenated, normalised and activated input, row by row from the top, `[w, c]` each. Allocates.
///
/// # Errors
/// [`StepError`] as [`conv2d`] for segments that do not suit the shape.
pub fn observe(
    plan: &ConvPlan,
    segments: &[Segment<'_>],
    activation: Activation,
    see: &mut dyn FnMut(&[f32]),
) -> Result<(), StepError> {
    let rows = Rows::all(plan);
    check_segments(plan, segments, &rows)?;
    let shape = ConvShape::same(plan.shape.h, plan.shape.w, plan.shape.c, plan.shape.n, 1);
    let (windows, level) = (&rows.inputs, plan.level);
    let input = Input { shape: &shape, segments, windows, activation, level };
    let band = Band { input, cells: Floats::<false> };
    let mut row = vec![0.0; shape.w * shape.c];
    for y in 0..shape.h {
        band.fill_row(y, 0, &mut row);
        see(&row);
    }
    Ok(())
}

/// A pointer that tasks only read through.
#[derive(Clone, Copy)]
struct Shared<T>(*const T);

// SAFETY: made from a shared slice that outlives the run; only read.
unsafe impl<T: Sync> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer (a method, so that closures capture the wrapper and not its field).
    const fn get(self) -> *const T {
        self.0
    }
}

/// The input itself, where it needs no preparation: single precision, one segment, no norm,
/// activation, upsampling or padding.
fn direct<'a>(plan: &ConvPlan, segment: &Segment<'a>, activation: Activation) -> Option<&'a [f32]> {
    let shape = &plan.shape;
    match segment.data {
        Source::F32(x)
            if segment.channels == shape.c
                && segment.norm.is_none()
                && activation == Activation::None
                && !shape.upsample
                && shape.pads == [0; 4] =>
        {
            Some(x)
        }
        _ => None,
    }
}

/// Checks the tensors that a convolution reads.
fn check_segments(plan: &ConvPlan, segments: &[Segment<'_>], rows: &Rows) -> Result<(), StepError> {
    let shape = &plan.shape;
    let refuse = |reason: String| Err(StepError::Shape { step: STEP, reason });
    if segments.is_empty() || segments.len() > MAX_SEGMENTS {
        return refuse(format!(
            "{} input segments; 1 to {MAX_SEGMENTS} can be concatenated",
            segments.len()
        ));
    }
    let channels: usize = segments.iter().map(|s| s.channels).sum();
    if channels != shape.c || segments.iter().any(|s| s.channels == 0) {
        return refuse(format!("the segments have {channels} channels, the shape {}", shape.c));
    }
    for (i, segment) in segments.iter().enumerate() {
        rows.check_input(plan, i, segment.channels, segment.data.len())?;
        if let Some((scale, shift)) = segment.norm {
            check_len(STEP, "norm scale", scale.len(), segment.channels)?;
            check_len(STEP, "norm shift", shift.len(), segment.channels)?;
        }
    }
    Ok(())
}

/// Checks every operand's length.
fn check(
    plan: &ConvPlan,
    pool: &Pool,
    args: &ConvArgs<'_>,
    rows: &Rows,
    scratch: &[f32],
) -> Result<(), StepError> {
    let shape = &plan.shape;
    let refuse = |reason: String| Err(StepError::Shape { step: STEP, reason });
    rows.check_part(plan)?;
    check_segments(plan, args.segments, rows)?;
    let packed = shape.filters().div_ceil(16) * plan.depth() * 16;
    match (args.weights, plan.family) {
        (Weights::F32(w), Family::Float(k)) if k.weights == WeightType::F32 => {
            check_len(STEP, "weights", w.len(), packed)?;
        }
        (Weights::F16(w), Family::Float(k)) if k.weights == WeightType::F16 => {
            check_len(STEP, "weights", w.len(), packed)?;
        }
        (Weights::I8(w), Family::Int8(_)) => {
            check_len(STEP, "weights", w.packed.len(), 4 * packed)?;
            check_len(STEP, "weight scale", w.scale.len(), shape.filters())?;
            check_len(STEP, "weight sum", w.sum.len(), shape.filters())?;
            check_len(STEP, "ranges", w.ranges.len(), plan.ranges())?;
            if let Some(scale) = w.input_scale {
                check_len(STEP, "input scale", scale.len(), shape.c)?;
            }
        }
        _ => return refuse(format!("weights of a type that {} does not read", plan.kernel_name())),
    }
    if let Some(bias) = args.bias {
        check_len(STEP, "bias", bias.len(), shape.biases())?;
    }
    if let Some(add) = args.add {
        check_len(STEP, "add", add.len(), shape.n)?;
    }
    let residual = match args.residual {
        Residual::Of(residual) => Some(residual.len()),
        Residual::None | Residual::InPlace => None,
    };
    rows.check_outputs(plan, args.out.len(), residual)?;
    if let Some(sums) = &args.sums {
        check_len(STEP, "sums", sums.len(), plan.sums().len())?;
    }
    let needed = plan.scratch_len(pool.threads());
    if scratch.len() < needed {
        return Err(StepError::Length {
            step: STEP,
            operand: "scratch",
            expected: needed,
            found: scratch.len(),
        });
    }
    Ok(())
}

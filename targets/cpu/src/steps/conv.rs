//! The fused, banded convolution.
//!
//! One step reads up to four tensors concatenated along channels, applies each one's
//! GroupNorm (as a per-channel scale and shift), SiLU and nearest 2x upsampling, pads with
//! zeros, convolves, and writes
//! `(sum + (bias + add) + residual) * output_scale`, along with the channel sums that the next
//! GroupNorm needs. Every activation is read and written once: there is no im2col buffer and
//! no pass for a norm. A 1x1 convolution and a Linear layer (`h = 1`, `w = rows`) are the same
//! step without a halo.
//!
//! The sum over K runs in the order (ky, kx, c) with fused multiply-adds, so results are the
//! same bits on every instruction set and for any number of threads; see
//! [`naive`](crate::naive) for the definition as plain loops.

use half::f16;

use super::conv_band::Band;
use super::conv_tile::{Epilogue, Read, TileJob, Write};
use super::norm::SumsLayout;
use super::{Output, SharedMut, Source, StepError, check_len};
use crate::isa::Level;
use crate::pool::Pool;
use crate::registry::{self, MatmulKernel, WeightType};

const STEP: &str = "convolution";

/// The most tensors that one convolution concatenates.
pub const MAX_SEGMENTS: usize = 4;

/// The most rows of a kernel.
pub const MAX_KERNEL_ROWS: usize = 16;

/// The shape of a convolution; see [`ConvPlan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Input height, before upsampling.
    pub h: usize,
    /// Input width, before upsampling.
    pub w: usize,
    /// Input channels, of all segments together.
    pub c: usize,
    /// Output channels.
    pub n: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Zeros above, left, below and right; inserted after norm, activation and upsampling.
    pub pads: [usize; 4],
    /// Whether each input pixel is read as a 2x2 block of equal pixels.
    pub upsample: bool,
}

impl ConvShape {
    /// A Linear layer over `rows` vectors of `c` features.
    pub const fn linear(rows: usize, c: usize, n: usize) -> Self {
        ConvShape {
            h: 1,
            w: rows,
            c,
            n,
            kernel: [1, 1],
            stride: [1, 1],
            pads: [0; 4],
            upsample: false,
        }
    }

    /// A `k`x`k` convolution of stride 1 that keeps the size (`k` odd).
    pub const fn same(h: usize, w: usize, c: usize, n: usize, k: usize) -> Self {
        ConvShape { h, w, c, n, kernel: [k, k], stride: [1, 1], pads: [k / 2; 4], upsample: false }
    }

    /// Height and width of the input as the kernel sees it, without padding.
    pub const fn seen(&self) -> [usize; 2] {
        if self.upsample { [2 * self.h, 2 * self.w] } else { [self.h, self.w] }
    }

    /// Output height and width.
    pub const fn out(&self) -> [usize; 2] {
        let [h, w] = self.seen();
        [
            (h + self.pads[0] + self.pads[2] - self.kernel[0]) / self.stride[0] + 1,
            (w + self.pads[1] + self.pads[3] - self.kernel[1]) / self.stride[1] + 1,
        ]
    }

    /// Elements of the output.
    pub const fn out_len(&self) -> usize {
        let [h, w] = self.out();
        h * w * self.n
    }

    /// Multiply-adds.
    pub const fn macs(&self) -> u64 {
        self.out_len() as u64 * (self.kernel[0] * self.kernel[1] * self.c) as u64
    }

    /// Elements of the packed weight: `[ceil(n / 16)][kh][kw][c][16]`.
    pub const fn packed_len(&self) -> usize {
        self.n.div_ceil(16) * self.kernel[0] * self.kernel[1] * self.c * 16
    }

    fn check(&self) -> Result<(), StepError> {
        let refuse = |reason: String| Err(StepError::Shape { step: STEP, reason });
        let sides = [
            self.h,
            self.w,
            self.c,
            self.n,
            self.kernel[0],
            self.kernel[1],
            self.stride[0],
            self.stride[1],
        ];
        if sides.contains(&0) {
            return refuse(format!("{self:?} has a zero extent"));
        }
        // Far above any picture, and small enough that the products below stay in usize.
        const SIDE: usize = 1 << 20;
        if sides.iter().chain(&self.pads).any(|&x| x > SIDE) {
            return refuse(format!("{self:?} has an extent over {SIDE}"));
        }
        if self.kernel[0] > MAX_KERNEL_ROWS {
            return refuse(format!(
                "a kernel of {} rows; {MAX_KERNEL_ROWS} are the most",
                self.kernel[0]
            ));
        }
        let [h, w] = self.seen();
        if h + self.pads[0] + self.pads[2] < self.kernel[0]
            || w + self.pads[1] + self.pads[3] < self.kernel[1]
        {
            return refuse(format!(
                "a kernel of {}x{} does not fit the padded input of {}x{}",
                self.kernel[0],
                self.kernel[1],
                h + self.pads[0] + self.pads[2],
                w + self.pads[1] + self.pads[3],
            ));
        }
        // 16 TiB: sums of a few such products stay far below isize::MAX.
        let fits = |xs: &[usize]| {
            let bytes = xs.iter().try_fold(4_usize, |a, &x| a.checked_mul(x));
            bytes.is_some_and(|b| b <= 1 << 44)
        };
        let [oh, ow] = self.out();
        let k = [self.kernel[0], self.kernel[1], self.c, self.n + 15];
        let padded = [h + self.pads[0] + self.pads[2], w + self.pads[1] + self.pads[3], self.c];
        if !fits(&padded) || !fits(&[oh, ow, self.n]) || !fits(&k) {
            return refuse(format!("{self:?} does not fit the address space"));
        }
        Ok(())
    }
}

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

/// Packed weights, `[ceil(n / 16)][kh][kw][c][16]`; the file's
/// [`Packed16`](latile_runtime::graph::Layout::Packed16).
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision, widened exactly as it is used.
    F16(&'a [f16]),
}

impl Weights<'_> {
    /// The element type.
    pub const fn dtype(&self) -> WeightType {
        match self {
            Weights::F32(_) => WeightType::F32,
            Weights::F16(_) => WeightType::F16,
        }
    }

    const fn len(&self) -> usize {
        match self {
            Weights::F32(x) => x.len(),
            Weights::F16(x) => x.len(),
        }
    }
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

/// The operands of one convolution.
#[derive(Debug)]
pub struct ConvArgs<'a> {
    /// One to four tensors, concatenated along channels in this order.
    pub segments: &'a [Segment<'a>],
    /// Applied after the norm, before padding.
    pub activation: Activation,
    /// The packed weights.
    pub weights: Weights<'a>,
    /// Per output channel.
    pub bias: Option<&'a [f32]>,
    /// A second vector per output channel, such as the time embedding's projection.
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

/// How a convolution of one shape is computed on one instruction set.
///
/// The partition of the output and with it the order of all sums depend on the shape alone.
#[derive(Clone, Copy, Debug)]
pub struct ConvPlan {
    shape: ConvShape,
    level: Level,
    kernel: &'static MatmulKernel,
    pub(super) blocking: Blocking,
}

/// The partition of one convolution; see [`ConvPlan::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocking {
    /// Whether the whole padded input is prepared first and tasks divide the output channels
    /// (small maps with large weights), or each task prepares a band of rows of its own.
    pub(super) whole: bool,
    /// Output columns of a task.
    pub(super) cols: usize,
    /// Output rows of a task.
    pub(super) rows: usize,
    /// Output rows computed at once; divides the task's rows but for the last.
    pub(super) step: usize,
    /// Rows of the band, a ring.
    pub(super) ring: usize,
    /// Columns of the band.
    pub(super) band_cols: usize,
    /// Output channels of a task, a multiple of 16 but for the last.
    pub(super) channels: usize,
    /// The longest stretch of K that is summed before moving to the next tile.
    pub(super) k_block: usize,
}

/// Bytes of a padded f32 input, and pixels of the output, up to which it is prepared whole.
const WHOLE_LIMIT: usize = 1 << 20;
const WHOLE_PIXELS: usize = 512;
/// Panels of output channels from which on there are enough tasks of [`TASK_CHANNELS`].
const WHOLE_PANELS: usize = 8;
/// Bytes of a band that a task should stay below: with a stretch of the weights it fits the
/// second-level cache of a large core.
const BAND_LIMIT: usize = 640 << 10;
/// Output columns of a task where channels are few.
const COLS: usize = 64;
/// Pixels that share one pass over the weights.
const STEP_PIXELS: usize = 128;
/// Output channels of a task of a small map, when there are enough of them.
const TASK_CHANNELS: usize = 32;

impl Blocking {
    fn new(shape: &ConvShape) -> Self {
        let [oh, ow] = shape.out();
        let [kh, kw] = shape.kernel;
        let [sy, sx] = shape.stride;
        let padded_rows = (oh - 1) * sy + kh;
        let padded_cols = (ow - 1) * sx + kw;
        let bytes = padded_rows.saturating_mul(padded_cols).saturating_mul(4 * shape.c);
        let panels = shape.n.div_ceil(16);
        // Of two panels 256 KiB: the second-level cache holds them and a band.
        let k_block = 2048;
        if bytes <= WHOLE_LIMIT && oh * ow <= WHOLE_PIXELS && panels >= WHOLE_PANELS {
            let step = (STEP_PIXELS / ow).clamp(1, oh);
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
        let row_limit = (BAND_LIMIT / (4 * shape.c * kh)).saturating_sub(kw) / sx;
        let limit = row_limit.clamp(16, COLS);
        let cols = ow.div_ceil(ow.div_ceil(limit));
        let rows = oh.div_ceil(16).clamp(4, 16).min(oh);
        let pixel_bytes = 4 * shape.c * ((cols - 1) * sx + kw);
        let mut step = (STEP_PIXELS / cols).clamp(1, rows);
        while step > 1 && ((step - 1) * sy + kh) * pixel_bytes > BAND_LIMIT {
            step -= 1;
        }
        Blocking {
            whole: false,
            cols,
            rows,
            step,
            ring: (step - 1) * sy + kh,
            band_cols: (cols - 1) * sx + kw,
            channels: shape.n,
            k_block,
        }
    }
}

impl ConvPlan {
    /// Plans a convolution: chooses the micro-kernel of the level and the partition.
    ///
    /// # Errors
    /// [`StepError::Shape`] when the shape has a zero extent, a kernel larger than the padded
    /// input, or does not fit the address space.
    pub fn new(shape: ConvShape, weights: WeightType, level: Level) -> Result<Self, StepError> {
        shape.check()?;
        Ok(ConvPlan {
            shape,
            level,
            kernel: registry::matmul(level, weights),
            blocking: Blocking::new(&shape),
        })
    }

    /// The shape.
    pub const fn shape(&self) -> &ConvShape {
        &self.shape
    }

    /// The micro-kernel's name, for reports.
    pub const fn kernel_name(&self) -> &'static str {
        self.kernel.name
    }

    /// The layout of the channel sums that this convolution writes.
    pub const fn sums(&self) -> SumsLayout {
        let [oh, ow] = self.shape.out();
        let blocks = oh.div_ceil(self.blocking.rows) * ow.div_ceil(self.blocking.cols);
        SumsLayout { blocks, channels: self.shape.n, pixels: oh * ow }
    }

    /// `f32` elements of scratch that [`conv2d`] needs with a pool of `threads`.
    pub fn scratch_len(&self, threads: usize) -> usize {
        let b = &self.blocking;
        let band = round_up(b.ring * b.band_cols * self.shape.c);
        let own = self.tile_len() + self.widened_len();
        if b.whole { band + threads * own } else { threads * (band + own) }
    }

    /// Elements of one worker's accumulator tile.
    fn tile_len(&self) -> usize {
        let b = &self.blocking;
        round_up(b.step * b.cols * 16 * self.kernel.panels)
    }

    /// Elements of one worker's widened weights.
    fn widened_len(&self) -> usize {
        let depth = self.shape.kernel[0] * self.shape.kernel[1] * self.shape.c;
        if self.kernel.widen {
            depth.min(self.blocking.k_block) * 16 * self.kernel.panels
        } else {
            0
        }
    }

    /// Tasks that one run is divided into.
    pub const fn tasks(&self) -> usize {
        let [oh, ow] = self.shape.out();
        let b = &self.blocking;
        oh.div_ceil(b.rows) * ow.div_ceil(b.cols) * self.shape.n.div_ceil(b.channels)
    }
}

/// Rounds up to a 64-byte cache line of `f32`.
const fn round_up(elements: usize) -> usize {
    elements.div_ceil(16) * 16
}

/// Runs one convolution. `scratch` needs [`ConvPlan::scratch_len`] elements (more are left
/// alone; start it on a 64-byte boundary for speed); its contents before do not matter.
///
/// # Errors
/// [`StepError::Length`] when an operand does not have the size that the shape says,
/// [`StepError::Shape`] when the segments do not add up, [`StepError::Worker`] when a worker
/// panicked.
pub fn conv2d(
    plan: &ConvPlan,
    pool: &Pool,
    args: ConvArgs<'_>,
    scratch: &mut [f32],
) -> Result<(), StepError> {
    check(plan, pool, &args, scratch)?;
    let shape = &plan.shape;
    let b = &plan.blocking;
    let [oh, ow] = shape.out();
    let band =
        Band { shape, segments: args.segments, activation: args.activation, level: plan.level };
    let out = match args.out {
        Output::F32(x) => Write::F32(x.as_mut_ptr()),
        Output::F16(x) => Write::F16(x.as_mut_ptr()),
    };
    let epilogue = Epilogue {
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
    };
    let (weights, weight_size) = match args.weights {
        Weights::F32(x) => (Shared(x.as_ptr().cast::<u8>()), 4),
        Weights::F16(x) => (Shared(x.as_ptr().cast::<u8>()), 2),
    };
    let sums = args.sums.map(|x| SharedMut(x.as_mut_ptr()));
    let direct = direct(plan, &args.segments[0], args.activation).map(|x| Shared(x.as_ptr()));
    let band_len = round_up(b.ring * b.band_cols * shape.c);
    let tile_len = plan.tile_len();
    // What a worker has of its own beside a band: accumulators, then widened weights.
    let own_len = tile_len + plan.widened_len();
    let widened = plan.kernel.widen.then(|| registry::matmul(plan.level, WeightType::F32));
    let scratch = SharedMut(scratch.as_mut_ptr());
    let band_row = b.band_cols * shape.c;
    let col_blocks = ow.div_ceil(b.cols);
    let row_blocks = oh.div_ceil(b.rows);

    // One task's part of the output, once its panels and the place of its band are known.
    let job = |y: [usize; 2], x: [usize; 2], panels: [usize; 2], acc: *mut f32| TileJob {
        shape,
        kernel: plan.kernel,
        epilogue: &epilogue,
        band: std::ptr::null(),
        band_row,
        ring: b.ring,
        y,
        x,
        panels,
        weights: weights.get(),
        weight_size,
        k_block: b.k_block,
        sums: None,
        acc,
        // SAFETY: the widened weights follow the accumulators in the checked scratch.
        widened: widened.map(|kernel| (kernel, unsafe { acc.add(tile_len) })),
    };
    // The sums of one block, cleared where a task begins it.
    let block_sums = |block: usize, channels: [usize; 2]| {
        sums.map(|p| {
            // SAFETY: the block lies in the checked slice, and the channels are this task's.
            unsafe {
                let block = p.get().add(block * 2 * shape.n);
                let count = channels[1] - channels[0];
                std::ptr::write_bytes(block.add(channels[0]), 0, count);
                std::ptr::write_bytes(block.add(shape.n + channels[0]), 0, count);
                block
            }
        })
    };
    let panels = shape.n.div_ceil(16);

    let outcome = if b.whole {
        let filled = match direct {
            Some(_) => Ok(()),
            None => pool.run(b.ring, &|v, _| {
                // SAFETY: each task writes a row of its own.
                let row = unsafe {
                    std::slice::from_raw_parts_mut(scratch.get().add(v * band_row), band_row)
                };
                band.fill_row(v, 0, row);
            }),
        };
        let task_panels = b.channels / 16;
        filled.and_then(|()| {
            pool.run(panels.div_ceil(task_panels), &|task, worker| {
                let from = task * task_panels;
                let to = panels.min(from + task_panels);
                let block = block_sums(0, [16 * from, shape.n.min(16 * to)]);
                // SAFETY: within the checked scratch; each worker has its own tile.
                let acc = unsafe { scratch.get().add(band_len + worker * own_len) };
                let mut y = 0;
                while y < oh {
                    let end = oh.min(y + b.step);
                    plan.level.dispatch(TileJob {
                        band: direct.map_or(scratch.get().cast_const(), Shared::get),
                        sums: block,
                        ..job([y, end], [0, ow], [from, to], acc)
                    });
                    y = end;
                }
            })
        })
    } else {
        pool.run(row_blocks * col_blocks, &|task, worker| {
            let y = [task / col_blocks * b.rows, oh.min((task / col_blocks + 1) * b.rows)];
            let x = [task % col_blocks * b.cols, ow.min((task % col_blocks + 1) * b.cols)];
            let block = block_sums(task, [0, shape.n]);
            // SAFETY: within the checked scratch; each worker has its own part.
            let own = unsafe { scratch.get().add(worker * (band_len + own_len)) };
            // SAFETY: as above.
            let acc = unsafe { own.add(band_len) };
            // Columns that this task's pixels need; the last task of a row may need fewer.
            let used = (x[1] - x[0] - 1) * shape.stride[1] + shape.kernel[1];
            let mut filled = y[0] * shape.stride[0];
            let mut row = y[0];
            while row < y[1] {
                let end = y[1].min(row + b.step);
                let common = job([row, end], x, [0, panels], acc);
                if let Some(input) = direct {
                    plan.level.dispatch(TileJob {
                        // SAFETY: a pixel of the checked input.
                        band: unsafe { input.get().add(x[0] * shape.stride[1] * shape.c) },
                        band_row: shape.w * shape.c,
                        ring: usize::MAX,
                        sums: block,
                        ..common
                    });
                } else {
                    let needed = (end - 1) * shape.stride[0] + shape.kernel[0];
                    filled = filled.max(row * shape.stride[0]);
                    while filled < needed {
                        // SAFETY: a slot of this worker's band, `used <= band_cols`.
                        let slot = unsafe {
                            std::slice::from_raw_parts_mut(
                                own.add(filled % b.ring * band_row),
                                used * shape.c,
                            )
                        };
                        band.fill_row(filled, x[0], slot);
                        filled += 1;
                    }
                    plan.level.dispatch(TileJob { band: own, sums: block, ..common });
                }
                row = end;
            }
        })
    };
    outcome.map_err(|source| StepError::Worker { step: STEP, source })
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

/// Checks every operand's length.
fn check(
    plan: &ConvPlan,
    pool: &Pool,
    args: &ConvArgs<'_>,
    scratch: &[f32],
) -> Result<(), StepError> {
    let shape = &plan.shape;
    let refuse = |reason: String| Err(StepError::Shape { step: STEP, reason });
    if args.segments.is_empty() || args.segments.len() > MAX_SEGMENTS {
        return refuse(format!(
            "{} input segments; 1 to {MAX_SEGMENTS} can be concatenated",
            args.segments.len()
        ));
    }
    let channels: usize = args.segments.iter().map(|s| s.channels).sum();
    if channels != shape.c || args.segments.iter().any(|s| s.channels == 0) {
        return refuse(format!("the segments have {channels} channels, the shape {}", shape.c));
    }
    for segment in args.segments {
        let expected = shape.h * shape.w * segment.channels;
        check_len(STEP, "input", segment.data.len(), expected)?;
        if let Some((scale, shift)) = segment.norm {
            check_len(STEP, "norm scale", scale.len(), segment.channels)?;
            check_len(STEP, "norm shift", shift.len(), segment.channels)?;
        }
    }
    if args.weights.dtype() != plan.kernel.weights {
        return refuse(format!(
            "weights of {:?}, but the plan is for {:?}",
            args.weights.dtype(),
            plan.kernel.weights
        ));
    }
    check_len(STEP, "weights", args.weights.len(), shape.packed_len())?;
    if let Some(bias) = args.bias {
        check_len(STEP, "bias", bias.len(), shape.n)?;
    }
    if let Some(add) = args.add {
        check_len(STEP, "add", add.len(), shape.n)?;
    }
    if let Residual::Of(residual) = args.residual {
        check_len(STEP, "residual", residual.len(), shape.out_len())?;
    }
    check_len(STEP, "output", args.out.len(), shape.out_len())?;
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

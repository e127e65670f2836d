//! GroupNorm as per-channel coefficients, and the channel sums that they come from.
//!
//! A GroupNorm is never a pass of its own: the step that produces a tensor leaves partial sums
//! of each channel, [`group_norm_coeffs`] folds them into one scale and one shift per channel,
//! and the consuming convolution applies those as it reads. Sums are in double precision and
//! added in an order that depends on the shape alone.

use super::element::Element;
use super::{SharedMut, Source, StepError, check_len};
use crate::isa::Level;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};

const SUMS: &str = "channel sums";
const NORM: &str = "group norm";

/// The layout of partial channel sums: `[blocks][2][channels]`, sums then sums of squares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumsLayout {
    /// Parts of the tensor that were summed apart.
    pub blocks: usize,
    /// Channels.
    pub channels: usize,
    /// Pixels of the whole tensor.
    pub pixels: usize,
}

/// Pixels of one block in [`channel_sums`].
pub(super) const BLOCK_PIXELS: usize = 1024;

impl SumsLayout {
    /// The layout that [`channel_sums`] writes for a tensor `[pixels, channels]`.
    pub const fn of_tensor(pixels: usize, channels: usize) -> Self {
        SumsLayout { blocks: pixels.div_ceil(BLOCK_PIXELS), channels, pixels }
    }

    /// `f64` elements.
    #[allow(clippy::len_without_is_empty)] // a layout is never empty
    pub const fn len(&self) -> usize {
        self.blocks * 2 * self.channels
    }
}

/// Partial sums of one tensor, as a producer left them.
#[derive(Clone, Copy, Debug)]
pub struct ChannelSums<'a> {
    /// Their layout.
    pub layout: SumsLayout,
    /// [`SumsLayout::len`] elements.
    pub sums: &'a [f64],
}

/// The operands of [`group_norm_coeffs`].
#[derive(Clone, Copy, Debug)]
pub struct GroupNormArgs<'a> {
    /// Sums of the tensors that are concatenated along channels; groups may span them.
    pub segments: &'a [ChannelSums<'a>],
    /// Groups; divides the channels of all segments together.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// The norm's weight, per channel.
    pub gamma: &'a [f32],
    /// The norm's bias, per channel.
    pub beta: &'a [f32],
    /// Scale and shift of a time embedding: the norm's result is multiplied by `1 + scale`
    /// and `shift` is added.
    pub modulation: Option<(&'a [f32], &'a [f32])>,
}

/// Folds GroupNorm (Wu and He 2018, eq. 1, 2 and 6) into `x * scale[c] + shift[c]`.
///
/// `scratch` needs two elements per channel. Everything is computed in double precision and
/// rounded once.
///
/// # Errors
/// [`StepError::Length`] when a slice has the wrong length; [`StepError::Shape`] when groups
/// do not divide the channels or the segments differ in pixels.
pub fn group_norm_coeffs(
    args: &GroupNormArgs<'_>,
    scale: &mut [f32],
    shift: &mut [f32],
    scratch: &mut [f64],
) -> Result<(), StepError> {
    group_norm_moments(args, scratch)?;
    fold_moments(args, &scratch[..2 * args.groups], scale, shift)
}

/// The groups' means, then their mean squares, at the start of `scratch`, which needs two elements per
/// channel.
///
/// # Errors
/// As [`group_norm_coeffs`].
pub fn group_norm_moments(args: &GroupNormArgs<'_>, scratch: &mut [f64]) -> Result<(), StepError> {
    let channels: usize = args.segments.iter().map(|s| s.layout.channels).sum();
    let pixels = args.segments.first().map_or(0, |s| s.layout.pixels);
    if args.groups == 0 || channels == 0 || !channels.is_multiple_of(args.groups) {
        return Err(StepError::Shape {
            step: NORM,
            reason: format!("{} groups do not divide {channels} channels", args.groups),
        });
    }
    if args.segments.iter().any(|s| s.layout.pixels != pixels) {
        return Err(StepError::Shape {
            step: NORM,
            reason: "the segments differ in pixels".to_owned(),
        });
    }
    check_len(NORM, "scratch", scratch.len(), 2 * channels)?;
    let (sums, squares) = scratch.split_at_mut(channels);
    sums.fill(0.0);
    squares.fill(0.0);
    let mut first = 0;
    for segment in args.segments {
        check_len(NORM, "sums", segment.sums.len(), segment.layout.len())?;
        let n = segment.layout.channels;
        for block in segment.sums.chunks_exact(2 * n) {
            let (block_sums, block_squares) = block.split_at(n);
            for (total, x) in sums[first..first + n].iter_mut().zip(block_sums) {
                *total += x;
            }
            for (total, x) in squares[first..first + n].iter_mut().zip(block_squares) {
                *total += x;
            }
        }
        first += n;
    }
    let width = channels / args.groups;
    let count = (pixels * width) as f64;
    for group in 0..args.groups {
        let range = group * width..(group + 1) * width;
        let mean = sums[range.clone()].iter().sum::<f64>() / count;
        let square = squares[range].iter().sum::<f64>() / count;
        // No sum that is still needed stands there: a group has a channel at least.
        sums[group] = mean;
        squares[group] = square;
    }
    for group in 0..args.groups {
        scratch[args.groups + group] = scratch[channels + group];
    }
    Ok(())
}

/// Scale and shift of each channel from the groups' moments: all means, then all mean squares.
///
/// # Errors
/// As [`group_norm_coeffs`].
pub fn fold_moments(
    args: &GroupNormArgs<'_>,
    moments: &[f64],
    scale: &mut [f32],
    shift: &mut [f32],
) -> Result<(), StepError> {
    let channels = args.gamma.len();
    if args.groups == 0 || !channels.is_multiple_of(args.groups) {
        return Err(StepError::Shape {
            step: NORM,
            reason: format!("{} groups do not divide {channels} channels", args.groups),
        });
    }
    check_len(NORM, "moments", moments.len(), 2 * args.groups)?;
    check_len(NORM, "beta", args.beta.len(), channels)?;
    check_len(NORM, "scale", scale.len(), channels)?;
    check_len(NORM, "shift", shift.len(), channels)?;
    if let Some((s, b)) = args.modulation {
        check_len(NORM, "modulation scale", s.len(), channels)?;
        check_len(NORM, "modulation shift", b.len(), channels)?;
    }
    let width = channels / args.groups;
    let (means, squares) = moments.split_at(args.groups);
    for (group, (&mean, &square)) in means.iter().zip(squares).enumerate() {
        let range = group * width..(group + 1) * width;
        // Rounding can leave a constant group's variance a little below zero; a NaN stays.
        let variance = square - mean * mean;
        let variance = if variance < 0.0 { 0.0 } else { variance };
        let inverse = 1.0 / (variance + args.eps).sqrt();
        for c in range {
            let mut a = f64::from(args.gamma[c]) * inverse;
            let mut b = f64::from(args.beta[c]) - mean * a;
            if let Some((by, to)) = args.modulation {
                let by = 1.0 + f64::from(by[c]);
                a *= by;
                b = b * by + f64::from(to[c]);
            }
            scale[c] = a as f32;
            shift[c] = b as f32;
        }
    }
    Ok(())
}

/// Sums of each channel of a tensor `[pixels, channels]` whose producer left none.
///
/// # Errors
/// [`StepError::Length`] when `sums` is not [`SumsLayout::of_tensor`]'s or the tensor is not a
/// whole number of pixels; [`StepError::Worker`] when a worker panicked.
pub fn channel_sums(
    level: Level,
    pool: &Pool,
    tensor: Source<'_>,
    channels: usize,
    sums: &mut [f64],
) -> Result<(), StepError> {
    if channels == 0 || !tensor.len().is_multiple_of(channels) {
        return Err(StepError::Shape {
            step: SUMS,
            reason: format!(
                "a tensor of {} elements is not a whole number of pixels of {channels} channels",
                tensor.len()
            ),
        });
    }
    let pixels = tensor.len() / channels;
    let layout = SumsLayout::of_tensor(pixels, channels);
    check_len(SUMS, "sums", sums.len(), layout.len())?;
    let sums = SharedMut(sums.as_mut_ptr());
    pool.run(layout.blocks, &|block, _| {
        let first = block * BLOCK_PIXELS * channels;
        let last = (first + BLOCK_PIXELS * channels).min(tensor.len());
        // SAFETY: block < blocks, and each task writes its own block of 2 * channels.
        let out = unsafe {
            std::slice::from_raw_parts_mut(sums.get().add(block * 2 * channels), 2 * channels)
        };
        match tensor {
            Source::F32(x) => level.dispatch(SumBlock { x: &x[first..last], channels, out }),
            Source::F16(x) => level.dispatch(SumBlock { x: &x[first..last], channels, out }),
        }
    })
    .map_err(|source| StepError::Worker { step: SUMS, source })
}

struct SumBlock<'a, T> {
    x: &'a [T],
    channels: usize,
    out: &'a mut [f64],
}

impl<T: Element> Kernel for SumBlock<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (sums, squares) = self.out.split_at_mut(self.channels);
        let mut c = 0;
        while c < self.channels {
            let n = (self.channels - c).min(LANES);
            let mut sum = s.zero_d();
            let mut square = s.zero_d();
            let mut at = c;
            while at < self.x.len() {
                let v = T::read(s, &self.x[at..at + n]);
                sum = s.add_d(sum, v);
                square = s.add_square_d(square, v);
                at += self.channels;
            }
            let mut lanes = [0.0; LANES];
            // SAFETY: `lanes` holds 16.
            unsafe { s.store_d(sum, lanes.as_mut_ptr()) };
            sums[c..c + n].copy_from_slice(&lanes[..n]);
            // SAFETY: `lanes` holds 16.
            unsafe { s.store_d(square, lanes.as_mut_ptr()) };
            squares[c..c + n].copy_from_slice(&lanes[..n]);
            c += n;
        }
    }
}

//! One pass over maps, for what no convolution could take along.
//!
//! Up to four tensors are concatenated along channels, each with its own scale and shift per
//! channel, then activated, upsampled and added to a residual; channel sums of the result are
//! left for the next GroupNorm. That covers copies, Concat, Add, AddChannel, ScaleShift,
//! Affine, SiLU, Upsample and a GroupNorm whose consumer is not a convolution. For one element:
//!
//! ```text
//! y = x, or fused x * scale[c] + shift[c]
//! y = silu(y) where asked
//! y = y + residual where asked
//! ```
//!
//! Sums are those of [`channel_sums`](super::norm::channel_sums) over the result as stored,
//! bit for bit.

use super::conv::{Activation, MAX_SEGMENTS, Residual, Segment};
use super::element::{Pointer, SharedOut};
use super::norm::{BLOCK_PIXELS, SumsLayout};
use super::{Output, SharedMut, StepError, check_len};
use crate::isa::Level;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd, math};

const STEP: &str = "elementwise";

/// Elements of a task that leaves no sums.
const TASK_ELEMENTS: usize = 1 << 14;

/// Elements that are written before they are read again for their sums: they are still in the
/// first-level cache.
const SUM_ELEMENTS: usize = 1 << 12;

/// The shape of an elementwise pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElementwiseShape {
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Channels of all segments together, and of the output.
    pub c: usize,
    /// Whether the output has twice the height and width, each input pixel read as a 2x2 block.
    pub upsample: bool,
}

impl ElementwiseShape {
    /// Pixels of the output.
    pub const fn pixels(&self) -> usize {
        self.h * self.w * if self.upsample { 4 } else { 1 }
    }

    /// The layout of the channel sums of the output.
    pub const fn sums(&self) -> SumsLayout {
        SumsLayout::of_tensor(self.pixels(), self.c)
    }
}

/// What an elementwise pass reads.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// One to four tensors, concatenated along channels in this order.
    Segments(&'a [Segment<'a>]),
    /// What the output held before; not with upsampling.
    InPlace {
        /// Scale and shift of each channel.
        norm: Option<(&'a [f32], &'a [f32])>,
    },
}

/// The operands of one elementwise pass.
#[derive(Debug)]
pub struct ElementwiseArgs<'a> {
    /// The tensors read.
    pub input: Input<'a>,
    /// Applied after scale and shift.
    pub activation: Activation,
    /// Added at the end, of the output's shape.
    pub residual: Residual<'a>,
    /// The output.
    pub out: Output<'a>,
    /// Partial channel sums of the output as stored, [`ElementwiseShape::sums`].
    pub sums: Option<&'a mut [f64]>,
}

/// Runs one elementwise pass.
///
/// # Errors
/// [`StepError::Length`] when an operand does not have the size that the shape says,
/// [`StepError::Shape`] when an extent is zero, the segments do not add up or an in-place pass
/// would upsample, [`StepError::Worker`] when a worker panicked.
pub fn elementwise(
    level: Level,
    pool: &Pool,
    shape: &ElementwiseShape,
    mut args: ElementwiseArgs<'_>,
) -> Result<(), StepError> {
    check(shape, &args)?;
    let out = SharedOut::new(&mut args.out);
    let mut parts = [Part::NONE; MAX_SEGMENTS];
    let count = match args.input {
        Input::Segments(segments) => {
            for (part, segment) in parts.iter_mut().zip(segments) {
                *part = Part {
                    data: Pointer::of(segment.data),
                    channels: segment.channels,
                    norm: segment.norm,
                };
            }
            segments.len()
        }
        Input::InPlace { norm } => {
            parts[0] = Part { data: out.pointer(), channels: shape.c, norm };
            1
        }
    };
    let residual = match args.residual {
        Residual::None => None,
        Residual::InPlace => Some(out.pointer()),
        Residual::Of(source) => Some(Pointer::of(source)),
    };
    let pixels = shape.pixels();
    let (tasks, block) = match &args.sums {
        Some(_) => (shape.sums().blocks, BLOCK_PIXELS),
        None => {
            let block = (TASK_ELEMENTS / shape.c).max(1);
            (pixels.div_ceil(block), block)
        }
    };
    let sums = args.sums.as_mut().map(|x| SharedMut(x.as_mut_ptr()));
    pool.run(tasks, &|task, _| {
        let first = task * block;
        let last = (first + block).min(pixels);
        // SAFETY: there are `blocks` tasks, and each has 2 * c elements of its own.
        let sums = sums.map(|p| unsafe {
            std::slice::from_raw_parts_mut(p.get().add(task * 2 * shape.c), 2 * shape.c)
        });
        level.dispatch(Task {
            parts: &parts[..count],
            silu: args.activation == Activation::Silu,
            residual,
            out,
            shape: *shape,
            first,
            last,
            sums,
        });
    })
    .map_err(|source| StepError::Worker { step: STEP, source })
}

fn check(shape: &ElementwiseShape, args: &ElementwiseArgs<'_>) -> Result<(), StepError> {
    let refuse = |reason: String| Err(StepError::Shape { step: STEP, reason });
    let ElementwiseShape { h, w, c, upsample } = *shape;
    if [h, w, c].contains(&0) {
        return refuse(format!("{shape:?} has a zero extent"));
    }
    let elements = [h, w, c].iter().try_fold(64_usize, |a, &x| a.checked_mul(x));
    if elements.is_none() {
        return refuse(format!("{shape:?} does not fit the address space"));
    }
    let check_norm = |norm: Option<(&[f32], &[f32])>, channels| {
        if let Some((scale, shift)) = norm {
            check_len(STEP, "scale", scale.len(), channels)?;
            check_len(STEP, "shift", shift.len(), channels)?;
        }
        Ok(())
    };
    match args.input {
        Input::Segments(segments) => {
            if segments.is_empty() || segments.len() > MAX_SEGMENTS {
                return refuse(format!(
                    "{} segments; there may be 1 to {MAX_SEGMENTS}",
                    segments.len()
                ));
            }
            let sum = segments.iter().fold(0_usize, |sum, s| sum.saturating_add(s.channels));
            if sum != c {
                return refuse(format!("segments of {sum} channels in a shape of {c}"));
            }
            for segment in segments {
                let expected = h * w * segment.channels;
                check_len(STEP, "input", segment.data.len(), expected)?;
                check_norm(segment.norm, segment.channels)?;
            }
        }
        Input::InPlace { norm } => {
            if upsample {
                return refuse("upsampling cannot be done in place".to_owned());
            }
            check_norm(norm, c)?;
        }
    }
    let elements = shape.pixels() * c;
    check_len(STEP, "output", args.out.len(), elements)?;
    if let Residual::Of(source) = args.residual {
        check_len(STEP, "residual", source.len(), elements)?;
    }
    if let Some(sums) = &args.sums {
        check_len(STEP, "sums", sums.len(), shape.sums().len())?;
    }
    Ok(())
}

/// A checked segment.
#[derive(Clone, Copy, Debug)]
struct Part<'a> {
    data: Pointer,
    channels: usize,
    norm: Option<(&'a [f32], &'a [f32])>,
}

impl Part<'_> {
    const NONE: Self = Part { data: Pointer::F32(std::ptr::null()), channels: 0, norm: None };
}

/// Output pixels `first..last`; the operands were checked.
struct Task<'a> {
    parts: &'a [Part<'a>],
    silu: bool,
    residual: Option<Pointer>,
    out: SharedOut,
    shape: ElementwiseShape,
    first: usize,
    last: usize,
    sums: Option<&'a mut [f64]>,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let c = self.shape.c;
        if let Some(sums) = &mut self.sums {
            sums.fill(0.0);
        }
        let step = (SUM_ELEMENTS / c).max(1);
        let mut first = self.first;
        while first < self.last {
            let last = (first + step).min(self.last);
            for pixel in first..last {
                let from = if self.shape.upsample {
                    let (y, x) = (pixel / (2 * self.shape.w), pixel % (2 * self.shape.w));
                    y / 2 * self.shape.w + x / 2
                } else {
                    pixel
                };
                let mut at = pixel * c;
                for part in self.parts {
                    self.stretch(s, part, from * part.channels, at);
                    at += part.channels;
                }
            }
            if let Some(sums) = &mut self.sums {
                add_sums(s, self.out.pointer(), c, first, last, sums);
            }
            first = last;
        }
    }
}

impl Task<'_> {
    /// One segment of one pixel, from its element `from` to the output's element `to`.
    #[inline(always)]
    fn stretch<S: Simd>(&self, s: S, part: &Part<'_>, from: usize, to: usize) {
        let mut c = 0;
        while c < part.channels {
            let n = (part.channels - c).min(LANES);
            // SAFETY: the segment, the residual and the output hold this pixel's channels, and
            // no other task has this pixel.
            unsafe {
                let mut v = part.data.read(s, from + c, n);
                if let Some((scale, shift)) = part.norm {
                    v = s.mul_add(v, s.load_slice(&scale[c..]), s.load_slice(&shift[c..]));
                }
                if self.silu {
                    v = math::silu(s, v);
                }
                if let Some(residual) = self.residual {
                    v = s.add(v, residual.read(s, to + c, n));
                }
                self.out.write(s, v, to + c, n);
            }
            c += n;
        }
    }
}

/// Adds pixels `first..last` of a tensor of `c` channels to its partial sums, pixel by pixel.
#[inline(always)]
fn add_sums<S: Simd>(
    s: S,
    tensor: Pointer,
    channels: usize,
    first: usize,
    last: usize,
    sums: &mut [f64],
) {
    let mut c = 0;
    while c < channels {
        let n = (channels - c).min(LANES);
        let (mut sum, mut square) = ([0.0; LANES], [0.0; LANES]);
        sum[..n].copy_from_slice(&sums[c..c + n]);
        square[..n].copy_from_slice(&sums[channels + c..channels + c + n]);
        // SAFETY: the arrays hold 16 elements; the caller's pixels lie in the tensor.
        unsafe {
            let mut sum_d = s.load_d(sum.as_ptr());
            let mut square_d = s.load_d(square.as_ptr());
            for pixel in first..last {
                let v = tensor.read(s, pixel * channels + c, n);
                sum_d = s.add_d(sum_d, v);
                square_d = s.add_square_d(square_d, v);
            }
            s.store_d(sum_d, sum.as_mut_ptr());
            s.store_d(square_d, square.as_mut_ptr());
        }
        sums[c..c + n].copy_from_slice(&sum[..n]);
        sums[channels + c..channels + c + n].copy_from_slice(&square[..n]);
        c += n;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Source;
    use super::super::element::testing::{Tensor, assert_bits, random};
    use super::super::norm::channel_sums;
    use super::*;
    use crate::simd::Scalar;

    fn silu(x: f32) -> f32 {
        math::silu(Scalar::new(), [x; LANES])[0]
    }

    /// Tensors of these channels, with or without scale and shift.
    struct Case {
        h: usize,
        w: usize,
        parts: &'static [(usize, bool)],
        silu: bool,
        upsample: bool,
        residual: bool,
    }

    impl Case {
        fn channels(&self) -> usize {
            self.parts.iter().map(|p| p.0).sum()
        }

        /// The definition, as plain loops.
        fn expected(
            &self,
            parts: &[Tensor],
            coeffs: &[(Vec<f32>, Vec<f32>)],
            residual: &[f32],
        ) -> Vec<f32> {
            let k = if self.upsample { 2 } else { 1 };
            let parts: Vec<Vec<f32>> = parts.iter().map(Tensor::widened).collect();
            let mut out = Vec::new();
            for y in 0..k * self.h {
                for x in 0..k * self.w {
                    for (i, &(channels, norm)) in self.parts.iter().enumerate() {
                        for c in 0..channels {
                            let mut v = parts[i][(y / k * self.w + x / k) * channels + c];
                            if norm {
                                v = v.mul_add(coeffs[i].0[c], coeffs[i].1[c]);
                            }
                            if self.silu {
                                v = silu(v);
                            }
                            if self.residual {
                                v += residual[out.len()];
                            }
                            out.push(v);
                        }
                    }
                }
            }
            out
        }
    }

    fn cases() -> Vec<Case> {
        let lists: [&'static [(usize, bool)]; 6] = [
            &[(1, false)],
            &[(15, true)],
            &[(16, false), (17, true)],
            &[(32, true), (3, true), (40, false)],
            &[(5, true), (16, true), (1, false), (31, true)],
            &[(320, true)],
        ];
        let mut cases = Vec::new();
        for (i, parts) in lists.into_iter().enumerate() {
            for bits in 0..8 {
                cases.push(Case {
                    h: [1, 7, 33][(i + bits) % 3],
                    w: [5, 40, 1][bits % 3],
                    parts,
                    silu: bits & 1 != 0,
                    upsample: bits & 2 != 0,
                    residual: bits & 4 != 0,
                });
            }
        }
        cases
    }

    #[test]
    fn same_bits_as_plain_loops_everywhere() {
        let pools: Vec<Pool> = (1..=4).map(|threads| Pool::new(threads).unwrap()).collect();
        for (number, case) in cases().iter().enumerate() {
            let shape = ElementwiseShape {
                h: case.h,
                w: case.w,
                c: case.channels(),
                upsample: case.upsample,
            };
            for half in [false, true] {
                let tensors: Vec<Tensor> = case
                    .parts
                    .iter()
                    .enumerate()
                    // Segments may differ in storage.
                    .map(|(i, p)| {
                        let x = random(case.h * case.w * p.0, i as u64);
                        Tensor::new(&x, half ^ (i % 2 == 1))
                    })
                    .collect();
                let coeffs: Vec<(Vec<f32>, Vec<f32>)> =
                    case.parts.iter().map(|p| (random(p.0, 10), random(p.0, 11))).collect();
                let segments: Vec<Segment<'_>> = (0..tensors.len())
                    .map(|i| Segment {
                        data: tensors[i].source(),
                        channels: case.parts[i].0,
                        norm: case.parts[i].1.then_some((&*coeffs[i].0, &*coeffs[i].1)),
                    })
                    .collect();
                let elements = shape.pixels() * shape.c;
                let residual = Tensor::new(&random(elements, 20), half);
                let expected = case.expected(&tensors, &coeffs, &residual.widened());
                let expected = Tensor::new(&expected, half).widened();
                let mut sums = vec![f64::NAN; shape.sums().len()];
                let mut sums_expected = sums.clone();
                for level in Level::float_levels() {
                    for pool in &pools {
                        let threads = pool.threads();
                        let what = format!("case {number} half {half} {} x{threads}", level.isa());
                        // The residual in the output itself, or apart, or no sums.
                        for variant in 0..3 {
                            let mut out = if variant == 0 {
                                residual.clone()
                            } else {
                                Tensor::new(&vec![f32::NAN; elements], half)
                            };
                            let args = ElementwiseArgs {
                                input: Input::Segments(&segments),
                                activation: if case.silu {
                                    Activation::Silu
                                } else {
                                    Activation::None
                                },
                                residual: match (case.residual, variant) {
                                    (false, _) => Residual::None,
                                    (true, 0) => Residual::InPlace,
                                    (true, _) => Residual::Of(residual.source()),
                                },
                                out: out.output(),
                                sums: (variant < 2).then_some(&mut sums),
                            };
                            elementwise(level, pool, &shape, args).unwrap();
                            assert_bits(&out.widened(), &expected, &what);
                            if variant < 2 {
                                let out = out.source();
                                channel_sums(level, pool, out, shape.c, &mut sums_expected)
                                    .unwrap();
                                assert_eq!(sums, sums_expected, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn sums_of_several_blocks() {
        let shape = ElementwiseShape { h: 50, w: 61, c: 19, upsample: false };
        let x = random(50 * 61 * 19, 3);
        let pool = Pool::new(2).unwrap();
        let mut expected = vec![0.0; shape.sums().len()];
        channel_sums(Level::best(), &pool, Source::F32(&x), 19, &mut expected).unwrap();
        assert!(shape.sums().blocks > 2);
        let mut out = vec![0.0; x.len()];
        let mut sums = vec![f64::NAN; expected.len()];
        let args = ElementwiseArgs {
            input: Input::Segments(&[Segment { data: Source::F32(&x), channels: 19, norm: None }]),
            activation: Activation::None,
            residual: Residual::None,
            out: Output::F32(&mut out),
            sums: Some(&mut sums),
        };
        elementwise(Level::best(), &pool, &shape, args).unwrap();
        assert_eq!(sums, expected);
        assert_eq!(out, x);
    }

    #[test]
    fn in_place() {
        let shape = ElementwiseShape { h: 9, w: 31, c: 37, upsample: false };
        let (scale, shift) = (random(37, 1), random(37, 2));
        for half in [false, true] {
            let x = Tensor::new(&random(9 * 31 * 37, 3), half);
            let expected: Vec<f32> = x
                .widened()
                .iter()
                .enumerate()
                .map(|(i, x)| silu(x.mul_add(scale[i % 37], shift[i % 37])) + x)
                .collect();
            for level in Level::float_levels() {
                let mut out = x.clone();
                let args = ElementwiseArgs {
                    input: Input::InPlace { norm: Some((&scale, &shift)) },
                    activation: Activation::Silu,
                    residual: Residual::InPlace,
                    out: out.output(),
                    sums: None,
                };
                elementwise(level, &Pool::new(3).unwrap(), &shape, args).unwrap();
                assert_bits(
                    &out.widened(),
                    &Tensor::new(&expected, half).widened(),
                    level.isa().name(),
                );
            }
        }
    }

    #[test]
    fn wrong_operands_are_refused() {
        let x = [0.0; 24];
        let coeffs = [0.0; 5];
        let run =
            |h, c, upsample, channels, norm: usize, residual: usize, out: usize, sums: usize| {
                let segment = Segment {
                    data: Source::F32(&x),
                    channels,
                    norm: Some((&coeffs[..norm], &coeffs[..norm])),
                };
                let shape = ElementwiseShape { h, w: 3, c, upsample };
                elementwise(
                    Level::best(),
                    &Pool::new(1).unwrap(),
                    &shape,
                    ElementwiseArgs {
                        input: Input::Segments(&[segment]),
                        activation: Activation::None,
                        residual: Residual::Of(Source::F32(&vec![0.0; residual])),
                        out: Output::F32(&mut vec![0.0; out]),
                        sums: Some(&mut vec![0.0; sums]),
                    },
                )
            };
        run(2, 4, false, 4, 4, 24, 24, 8).unwrap();
        run(2, 4, true, 4, 4, 96, 96, 8).unwrap();
        for (error, says) in [
            (run(0, 4, false, 4, 4, 24, 24, 8), "zero"),
            (run(usize::MAX / 9, 4, false, 4, 4, 24, 24, 8), "address space"),
            (run(2, 4, false, 3, 4, 24, 24, 8), "3 channels"),
            (run(3, 4, false, 4, 4, 36, 36, 8), "input"),
            (run(2, 4, false, 4, 5, 24, 24, 8), "scale"),
            (run(2, 4, false, 4, 4, 23, 24, 8), "residual"),
            (run(2, 4, false, 4, 4, 24, 25, 8), "output"),
            (run(2, 4, false, 4, 4, 24, 24, 9), "sums"),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let error = elementwise(
            Level::best(),
            &Pool::new(1).unwrap(),
            &ElementwiseShape { h: 1, w: 1, c: 1, upsample: true },
            ElementwiseArgs {
                input: Input::InPlace { norm: None },
                activation: Activation::None,
                residual: Residual::None,
                out: Output::F32(&mut [0.0; 4]),
                sums: None,
            },
        );
        assert!(error.unwrap_err().to_string().contains("in place"));
    }
}

//! Steps on vectors: linear layers of one row, SiLU, and scaling.
//!
//! Time embeddings and their projections live here; they are `f32` always. Layers over the
//! pixels of a map are convolutions of 1x1 and not here.

use half::f16;

use super::conv::{Activation, Weights};
use super::{SharedMut, StepError, check_len};
use crate::isa::Level;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd, math};

const LINEAR: &str = "linear";
const SILU: &str = "silu of a vector";
const AFFINE: &str = "affine of a vector";

/// Panels of sixteen outputs in a task: as many independent sums hide the latency of one.
const TASK_PANELS: usize = 4;

/// The operands of one linear layer on a vector.
#[derive(Debug)]
pub struct LinearArgs<'a> {
    /// Packed weights `[ceil(n / 16)][c][16]`; the file's
    /// [`Packed16`](latile_runtime::graph::Layout::Packed16).
    pub weights: Weights<'a>,
    /// Per output.
    pub bias: Option<&'a [f32]>,
    /// Applied to the input.
    pub activation: Activation,
    /// The input, `c` elements.
    pub x: &'a [f32],
    /// The output, `n` elements.
    pub out: &'a mut [f32],
}

/// `f32` elements of scratch that [`linear`] needs for an input of `c`: where the activated
/// input is kept.
pub const fn linear_scratch_len(c: usize, activation: Activation) -> usize {
    match activation {
        Activation::None => 0,
        Activation::Silu => c,
    }
}

/// Runs one linear layer on a vector: `out[i] = (sum over k, from 0, of w[i][k] * f(x[k])) +
/// bias[i]`, every multiply-add fused, in the order of k.
///
/// # Errors
/// [`StepError::Length`] when an operand has another length than input and output say, or
/// `scratch` has fewer than [`linear_scratch_len`]; [`StepError::Shape`] when input or output
/// is empty; [`StepError::Worker`] when a worker panicked.
pub fn linear(
    level: Level,
    pool: &Pool,
    args: LinearArgs<'_>,
    scratch: &mut [f32],
) -> Result<(), StepError> {
    let (c, n) = (args.x.len(), args.out.len());
    if c == 0 || n == 0 {
        return Err(StepError::Shape {
            step: LINEAR,
            reason: format!("a layer from {c} to {n} elements is empty"),
        });
    }
    let panels = n.div_ceil(LANES);
    let found = match args.weights {
        Weights::F32(w) => w.len(),
        Weights::F16(w) => w.len(),
        Weights::I8(_) => {
            let reason = "int8 weights; layers on vectors are in floating point".to_owned();
            return Err(StepError::Shape { step: LINEAR, reason });
        }
    };
    check_len(LINEAR, "weights", found, (panels * LANES).saturating_mul(c))?;
    if let Some(bias) = args.bias {
        check_len(LINEAR, "bias", bias.len(), n)?;
    }
    let needed = linear_scratch_len(c, args.activation);
    if scratch.len() < needed {
        check_len(LINEAR, "scratch", scratch.len(), needed)?;
    }
    let x = match args.activation {
        Activation::None => args.x,
        Activation::Silu => {
            let active = &mut scratch[..c];
            silu(level, args.x, active)?;
            active
        }
    };
    let out = SharedMut(args.out.as_mut_ptr());
    pool.run(panels.div_ceil(TASK_PANELS), &|task, _| {
        let first = task * TASK_PANELS;
        let last = (first + TASK_PANELS).min(panels);
        let outputs = first * LANES..(last * LANES).min(n);
        // SAFETY: the range lies in the output, and tasks have disjoint ones.
        let out =
            unsafe { std::slice::from_raw_parts_mut(out.get().add(outputs.start), outputs.len()) };
        let weights = first * LANES * c..last * LANES * c;
        let bias = args.bias.map(|b| &b[outputs]);
        match args.weights {
            Weights::F32(w) => level.dispatch(Rows { weights: &w[weights], bias, x, out }),
            Weights::F16(w) => level.dispatch(Rows { weights: &w[weights], bias, x, out }),
            Weights::I8(_) => unreachable!("refused above"),
        }
    })
    .map_err(|source| StepError::Worker { step: LINEAR, source })
}

/// A packed weight's element.
trait Weight: Copy {
    /// Sixteen, widened exactly.
    fn read<S: Simd>(s: S, w: &[Self]) -> S::F;
}

impl Weight for f32 {
    #[inline(always)]
    fn read<S: Simd>(s: S, w: &[f32]) -> S::F {
        s.load_slice(w)
    }
}

impl Weight for f16 {
    #[inline(always)]
    fn read<S: Simd>(s: S, w: &[f16]) -> S::F {
        s.load_f16_slice(w)
    }
}

/// Up to [`TASK_PANELS`] panels and their outputs.
struct Rows<'a, T> {
    weights: &'a [T],
    bias: Option<&'a [f32]>,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl<T: Weight> Kernel for Rows<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let panel = self.x.len() * LANES;
        if self.weights.len() == TASK_PANELS * panel {
            self.panels::<S, TASK_PANELS>(s, 0);
        } else {
            let panels = self.weights.len() / panel;
            let mut this = self;
            for i in 0..panels {
                this = this.panels::<S, 1>(s, i);
            }
        }
    }
}

impl<T: Weight> Rows<'_, T> {
    /// `N` panels from panel `first`.
    #[inline(always)]
    fn panels<S: Simd, const N: usize>(self, s: S, first: usize) -> Self {
        let panel = self.x.len() * LANES;
        let mut rows: [_; N] = std::array::from_fn(|i| {
            self.weights[(first + i) * panel..(first + i + 1) * panel].chunks_exact(LANES)
        });
        let mut sums = [s.splat(0.0); N];
        for &x in self.x {
            let x = s.splat(x);
            for (sum, rows) in sums.iter_mut().zip(&mut rows) {
                if let Some(w) = rows.next() {
                    *sum = s.mul_add(T::read(s, w), x, *sum);
                }
            }
        }
        for (i, &sum) in sums.iter().enumerate() {
            let at = (first + i) * LANES;
            let mut sum = sum;
            if let Some(bias) = self.bias {
                sum = s.add(sum, s.load_slice(&bias[at..]));
            }
            s.store_slice(sum, &mut self.out[at..]);
        }
        self
    }
}

/// `out = silu(x)`, element by element ([`math::silu`]).
///
/// # Errors
/// [`StepError::Length`] when the lengths differ.
pub fn silu(level: Level, x: &[f32], out: &mut [f32]) -> Result<(), StepError> {
    check_len(SILU, "output", out.len(), x.len())?;
    out.copy_from_slice(x);
    silu_in_place(level, out);
    Ok(())
}

/// `x = silu(x)`, element by element.
pub fn silu_in_place(level: Level, x: &mut [f32]) {
    level.dispatch(Silu(x));
}

struct Silu<'a>(&'a mut [f32]);

impl Kernel for Silu<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.0.chunks_mut(LANES) {
            let v = s.load_slice(x);
            s.store_slice(math::silu(s, v), x);
        }
    }
}

/// `out = x * mul + add`, fused, element by element.
///
/// # Errors
/// [`StepError::Length`] when the lengths differ.
pub fn affine(
    level: Level,
    x: &[f32],
    mul: f32,
    add: f32,
    out: &mut [f32],
) -> Result<(), StepError> {
    check_len(AFFINE, "output", out.len(), x.len())?;
    out.copy_from_slice(x);
    affine_in_place(level, out, mul, add);
    Ok(())
}

/// `x = x * mul + add`, fused, element by element.
pub fn affine_in_place(level: Level, x: &mut [f32], mul: f32, add: f32) {
    level.dispatch(Affine { x, mul, add });
}

struct Affine<'a> {
    x: &'a mut [f32],
    mul: f32,
    add: f32,
}

impl Kernel for Affine<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (mul, add) = (s.splat(self.mul), s.splat(self.add));
        for x in self.x.chunks_mut(LANES) {
            let v = s.load_slice(x);
            s.store_slice(s.mul_add(v, mul, add), x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::testing::{assert_bits, halves, random, widened};
    use super::*;
    use crate::simd::Scalar;

    fn silu_of(x: f32) -> f32 {
        math::silu(Scalar::new(), [x; LANES])[0]
    }

    /// `w` is `[n, c]`.
    fn packed(w: &[f32], n: usize, c: usize) -> Vec<f32> {
        let mut out = vec![0.0; n.div_ceil(16) * 16 * c];
        for i in 0..n {
            for k in 0..c {
                out[(i / 16 * c + k) * 16 + i % 16] = w[i * c + k];
            }
        }
        out
    }

    #[test]
    fn linear_has_the_bits_of_plain_loops() {
        for (n, c) in [(1, 1), (15, 7), (16, 16), (17, 33), (63, 5), (64, 40), (65, 40), (200, 129)]
        {
            let x: Vec<f32> = random(c, 1).iter().map(|x| 4.0 * x).collect();
            let bias = random(n, 2);
            let half_weights = halves(&random(n * c, 3));
            for (half, biased, active) in [
                (false, false, false),
                (false, true, true),
                (true, true, false),
                (true, false, true),
            ] {
                let w = if half { widened(&half_weights) } else { random(n * c, 3) };
                let expected: Vec<f32> = (0..n)
                    .map(|i| {
                        let sum = (0..c).fold(0.0, |sum: f32, k| {
                            let x = if active { silu_of(x[k]) } else { x[k] };
                            w[i * c + k].mul_add(x, sum)
                        });
                        if biased { sum + bias[i] } else { sum }
                    })
                    .collect();
                let w = packed(&w, n, c);
                let w_half = halves(&w);
                let activation = if active { Activation::Silu } else { Activation::None };
                let mut scratch = vec![f32::NAN; linear_scratch_len(c, activation)];
                for level in Level::float_levels() {
                    for threads in 1..=4 {
                        let mut out = vec![f32::NAN; n];
                        let args = LinearArgs {
                            weights: if half { Weights::F16(&w_half) } else { Weights::F32(&w) },
                            bias: biased.then_some(&bias),
                            activation,
                            x: &x,
                            out: &mut out,
                        };
                        linear(level, &Pool::new(threads).unwrap(), args, &mut scratch).unwrap();
                        let what = format!("{n}x{c} half {half} {} x{threads}", level.isa());
                        assert_bits(&out, &expected, &what);
                    }
                }
            }
        }
    }

    #[test]
    fn silu_and_affine_have_the_bits_of_plain_loops() {
        for n in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = random(n, n as u64).iter().map(|x| 20.0 * x).collect();
            let active: Vec<f32> = x.iter().map(|&x| silu_of(x)).collect();
            let scaled: Vec<f32> = x.iter().map(|x| x.mul_add(0.3, -1.7)).collect();
            for level in Level::float_levels() {
                let mut out = vec![f32::NAN; n];
                silu(level, &x, &mut out).unwrap();
                assert_bits(&out, &active, level.isa().name());
                affine(level, &x, 0.3, -1.7, &mut out).unwrap();
                assert_bits(&out, &scaled, level.isa().name());
            }
        }
    }

    #[test]
    fn wrong_operands_are_refused() {
        let (level, pool) = (Level::best(), Pool::new(1).unwrap());
        let run = |weights: usize, bias: usize, c: usize, n: usize, scratch: usize| {
            let args = LinearArgs {
                weights: Weights::F32(&vec![0.0; weights]),
                bias: Some(&vec![0.0; bias]),
                activation: Activation::Silu,
                x: &vec![0.0; c],
                out: &mut vec![0.0; n],
            };
            linear(level, &pool, args, &mut vec![0.0; scratch])
        };
        run(2 * 16 * 3, 17, 3, 17, 3).unwrap();
        for (error, says) in [
            (run(0, 17, 0, 17, 3), "empty"),
            (run(0, 0, 3, 0, 3), "empty"),
            (run(16 * 3, 17, 3, 17, 3), "weights"),
            (run(2 * 16 * 3, 16, 3, 17, 3), "bias"),
            (run(2 * 16 * 3, 17, 3, 17, 2), "scratch"),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(silu(level, &[0.0; 3], &mut [0.0; 2]).is_err());
        assert!(affine(level, &[0.0; 3], 1.0, 0.0, &mut [0.0; 4]).is_err());
    }
}

//! What a matrix micro-kernel computes, and the portable one.
//!
//! For `rows` pixels p and one or two panels of sixteen channels j,
//!
//! ```text
//! c[p][j] = (accumulate ? c[p][j] : 0) + Σ_run Σ_{k < run_len} a[p * a_stride + run + k] * b[panel][k'][j]
//! ```
//!
//! with k' counting over all runs, every product fused into the sum, in that order: the result
//! is the same bits in every kernel, and for any cut of the sum into several calls. For a
//! convolution a run is one kernel row, `kw * C` consecutive numbers of an NHWC band.

use half::f16;

use super::Operands;

/// Pixels of `f32`; panels `[k][16]` of the kernel's weight type, by their bytes.
pub type Tile = Operands<f32, u8, f32>;

/// A micro-kernel for a certain number of pixels and panels.
///
/// # Safety
/// The instruction set must be supported; every address that the formula of this module
/// reaches must be readable (`a`, `runs`, `b`) or writable (`c`).
pub type TileFn = unsafe fn(&Tile);

/// A weight element that the portable kernel widens.
trait Weight: Copy {
    fn widen(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Weight for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32_const()
    }
}

/// The portable micro-kernel: `ROWS` pixels, one panel.
unsafe fn scalar<B: Weight, const ROWS: usize>(t: &Tile) {
    // SAFETY: all addresses are those of the formula, which the caller vouches for.
    unsafe {
        let mut acc = [[0.0_f32; 16]; ROWS];
        if t.accumulate != 0 {
            for (p, row) in acc.iter_mut().enumerate() {
                *row = t.c.byte_add(p * t.c_stride).cast::<[f32; 16]>().read_unaligned();
            }
        }
        let mut b = t.b.cast::<[B; 16]>();
        for run in 0..t.n_runs {
            let a = t.a.byte_offset(*t.runs.add(run));
            for k in 0..t.run_len {
                let w = b.read_unaligned().map(Weight::widen);
                b = b.add(1);
                for (p, row) in acc.iter_mut().enumerate() {
                    let x = *a.byte_add(p * t.a_stride).add(k);
                    for (sum, w) in row.iter_mut().zip(w) {
                        *sum = x.mul_add(w, *sum);
                    }
                }
            }
        }
        for (p, row) in acc.iter().enumerate() {
            t.c.byte_add(p * t.c_stride).cast::<[f32; 16]>().write_unaligned(*row);
        }
    }
}

/// Pixels of the portable kernel.
pub(crate) const SCALAR_ROWS: usize = 4;
pub(crate) static SCALAR_F32: [&[TileFn]; 1] =
    [&[scalar::<f32, 1>, scalar::<f32, 2>, scalar::<f32, 3>, scalar::<f32, 4>]];
pub(crate) static SCALAR_F16: [&[TileFn]; 1] =
    [&[scalar::<f16, 1>, scalar::<f16, 2>, scalar::<f16, 3>, scalar::<f16, 4>]];

//! What an integer matrix micro-kernel computes, and the portable one.
//!
//! For `rows` pixels p and one or two panels of sixteen channels j,
//!
//! ```text
//! c[p][j] = (accumulate ? c[p][j] : 0)
//!         + Σ_run Σ_{g < run_len} Σ_{i < 4} a[p * a_stride + run + 4 * g + i] * b[panel][g'][j][i]
//! ```
//!
//! with g' counting over all runs: the weights of four channels of the input, a *group*, stand
//! together, as instructions that multiply bytes want them. Sums wrap in `i32` and are exact up
//! to [`MAX_PRODUCTS`] products, so their order does not matter and every kernel gives the same
//! integers.
//!
//! The bytes of `a` are a quantized activation q in 0..=255, or, for kernels whose
//! instructions want two signed operands ([`DotKernel::signed`]), q - 128 in -128..=127; then
//! the sum is short by 128 * Σ b, which the caller adds back from the sums of the weights.
//! Weights are in -127..=127: never -128, whose negation is no byte.
//!
//! [`DotKernel::signed`]: crate::registry::DotKernel::signed

use super::Operands;

/// Products that an `i32` holds whatever their operands are: 2^31 / (255 * 127), rounded down.
pub const MAX_PRODUCTS: usize = (1 << 31) / (255 * 127);

/// Input channels whose weights stand together.
pub const GROUP: usize = 4;

/// Pixels of bytes, `i8` ones for signed kernels; panels `[k / 4][16][4]`; runs in groups.
pub type DotTile = Operands<u8, i8, i32>;

/// A micro-kernel for a certain number of pixels and panels.
///
/// # Safety
/// The instruction set must be supported; every address that the formula of this module
/// reaches must be readable (`a`, `runs`, `b`) or writable (`c`). None need be aligned beyond
/// its type.
pub type DotFn = unsafe fn(&DotTile);

/// Rearranges a stretch of one panel's weights, `[n_runs][run_len][16][4]`, into the order
/// that a family of tiles reads: `(from, to, n_runs, run_len)`. The size stays the same, and a
/// run's weights stay within the run.
///
/// # Safety
/// The instruction set must be supported; `from` and `to` hold `n_runs * run_len * 64` bytes
/// and do not overlap.
pub type ArrangeFn = unsafe fn(*const i8, *mut i8, usize, usize);

/// The portable micro-kernel: `ROWS` pixels, one panel, unsigned activations.
unsafe fn scalar<const ROWS: usize>(t: &DotTile) {
    // SAFETY: all addresses are those of the formula, which the caller vouches for.
    unsafe {
        let mut acc = [[0_i32; 16]; ROWS];
        if t.accumulate != 0 {
            for (p, row) in acc.iter_mut().enumerate() {
                *row = t.c.byte_add(p * t.c_stride).cast::<[i32; 16]>().read_unaligned();
            }
        }
        let mut b = t.b.cast::<[[i8; GROUP]; 16]>();
        for run in 0..t.n_runs {
            let a = t.a.offset(*t.runs.add(run));
            for g in 0..t.run_len {
                let w = b.read();
                b = b.add(1);
                for (p, row) in acc.iter_mut().enumerate() {
                    let x = a.add(p * t.a_stride).cast::<[u8; GROUP]>().add(g).read();
                    for (sum, w) in row.iter_mut().zip(w) {
                        for (x, w) in x.into_iter().zip(w) {
                            *sum = sum.wrapping_add(i32::from(x) * i32::from(w));
                        }
                    }
                }
            }
        }
        for (p, row) in acc.iter().enumerate() {
            t.c.byte_add(p * t.c_stride).cast::<[i32; 16]>().write_unaligned(*row);
        }
    }
}

/// Pixels of the portable kernel.
pub(crate) const SCALAR_ROWS: usize = 4;
pub(crate) static SCALAR: [&[DotFn]; 1] = [&[scalar::<1>, scalar::<2>, scalar::<3>, scalar::<4>]];

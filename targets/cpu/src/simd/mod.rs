//! One vector of sixteen `f32` lanes, on every instruction set.
//!
//! A kernel is written once, generically over [`Simd`], as a [`Kernel`]; [`Level::dispatch`]
//! runs it with the right target features. The lanes and every operation are the same on all
//! instruction sets (fused multiply-add, IEEE division, round-to-nearest-even conversions, one
//! fixed reduction tree), so results are the same bit for bit. The one exception is the sign
//! and payload of a NaN, which processors choose for themselves.
//!
//! Nothing here knows of tensors, shapes or models.
//!
//! ```
//! use latile_cpu::isa::Level;
//! use latile_cpu::simd::{Kernel, Simd};
//!
//! struct Double<'a>(&'a mut [f32]);
//! impl Kernel for Double<'_> {
//!     type Out = ();
//!     #[inline(always)] // so that the instruction set's features reach the body
//!     fn run<S: Simd>(self, s: S) {
//!         for block in self.0.chunks_mut(16) {
//!             let x = s.load_slice(block);
//!             s.store_slice(s.add(x, x), block);
//!         }
//!     }
//! }
//! let mut x = vec![1.5; 21];
//! Level::best().dispatch(Double(&mut x));
//! assert!(x.iter().all(|&v| v == 3.0));
//! ```
//!
//! [`Level::dispatch`]: crate::isa::Level::dispatch

use half::f16;
use latile_runtime::graph::Winograd;

use crate::isa::Isa;

pub mod math;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use scalar::Scalar;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// A computation written once for every instruction set.
pub trait Kernel {
    /// What the computation returns.
    type Out;

    /// Runs it. Implementations, and the generic functions they call, must be
    /// `#[inline(always)]`: only what is inlined into [`Simd::vectorize`] is compiled with the
    /// instruction set's features, and what is not is still right but very slow. Closures that
    /// call vector operations are not guaranteed to be inlined: use loops and functions.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// Operations on sixteen `f32` lanes. A value of an implementing type is a token that exists
/// only where the instruction set is supported.
///
/// Partial operations touch exactly `n` elements of memory, `n <= 16`; the lanes they do not
/// load are zero.
pub trait Simd: Copy + std::fmt::Debug + Send + Sync + 'static {
    /// Sixteen `f32`.
    type F: Copy;
    /// Sixteen `i32`.
    type I: Copy;
    /// Sixteen `i16`.
    type H: Copy;
    /// Sixteen `f64`.
    type D: Copy;

    /// What [`Simd::round_words`] saturates at: sums and differences of four such fit an `i16`.
    const MOST_WORD: i16 = Winograd::MOST_WORD;

    /// The instruction set: always a float base ([`Isa::float_base`]).
    const ISA: Isa;

    /// Runs a kernel with this instruction set's target features enabled.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Out;

    // Memory.

    /// Sixteen `f32` from `p`, with no alignment asked.
    ///
    /// # Safety
    /// `p` must be readable for 16 elements.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// Sixteen `f32` to `p`.
    ///
    /// # Safety
    /// `p` must be writable for 16 elements.
    unsafe fn store(self, v: Self::F, p: *mut f32);
    /// The first `n` of sixteen lanes from `p`, the others zero.
    ///
    /// # Safety
    /// `p` must be readable for `n` elements and `n <= 16`.
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::F;
    /// The first `n` lanes to `p`.
    ///
    /// # Safety
    /// `p` must be writable for `n` elements and `n <= 16`.
    unsafe fn store_n(self, v: Self::F, p: *mut f32, n: usize);
    /// Sixteen `f16` from `p`, widened exactly.
    ///
    /// # Safety
    /// `p` must be readable for 16 elements.
    unsafe fn load_f16(self, p: *const f16) -> Self::F;
    /// Sixteen `f16` to `p`, rounded to nearest even; out of range becomes infinite.
    ///
    /// # Safety
    /// `p` must be writable for 16 elements.
    unsafe fn store_f16(self, v: Self::F, p: *mut f16);
    /// The first `n` of sixteen lanes from `f16`s at `p`, the others zero.
    ///
    /// # Safety
    /// `p` must be readable for `n` elements and `n <= 16`.
    #[inline(always)]
    unsafe fn load_f16_n(self, p: *const f16, n: usize) -> Self::F {
        debug_assert!(n <= LANES);
        let mut block = [f16::ZERO; LANES];
        // SAFETY: the caller vouches for n elements at p; block holds 16.
        unsafe {
            std::ptr::copy_nonoverlapping(p, block.as_mut_ptr(), n);
            self.load_f16(block.as_ptr())
        }
    }
    /// The first `n` lanes to `p`, as [`Simd::store_f16`] rounds.
    ///
    /// # Safety
    /// `p` must be writable for `n` elements and `n <= 16`.
    #[inline(always)]
    unsafe fn store_f16_n(self, v: Self::F, p: *mut f16, n: usize) {
        debug_assert!(n <= LANES);
        let mut block = [f16::ZERO; LANES];
        // SAFETY: block holds 16; the caller vouches for n elements at p.
        unsafe {
            self.store_f16(v, block.as_mut_ptr());
            std::ptr::copy_nonoverlapping(block.as_ptr(), p, n);
        }
    }

    /// The first `min(16, len)` elements of a slice, the other lanes zero.
    #[inline(always)]
    fn load_slice(self, x: &[f32]) -> Self::F {
        // SAFETY: each branch reads no more elements than the slice has.
        unsafe {
            if x.len() >= LANES { self.load(x.as_ptr()) } else { self.load_n(x.as_ptr(), x.len()) }
        }
    }
    /// The first `min(16, len)` lanes to a slice.
    #[inline(always)]
    fn store_slice(self, v: Self::F, x: &mut [f32]) {
        // SAFETY: each branch writes no more elements than the slice has.
        unsafe {
            if x.len() >= LANES {
                self.store(v, x.as_mut_ptr());
            } else {
                self.store_n(v, x.as_mut_ptr(), x.len());
            }
        }
    }
    /// As [`Simd::load_slice`], from half precision.
    #[inline(always)]
    fn load_f16_slice(self, x: &[f16]) -> Self::F {
        // SAFETY: each branch reads no more elements than the slice has.
        unsafe {
            if x.len() >= LANES {
                self.load_f16(x.as_ptr())
            } else {
                self.load_f16_n(x.as_ptr(), x.len())
            }
        }
    }
    /// As [`Simd::store_slice`], to half precision.
    #[inline(always)]
    fn store_f16_slice(self, v: Self::F, x: &mut [f16]) {
        // SAFETY: each branch writes no more elements than the slice has.
        unsafe {
            if x.len() >= LANES {
                self.store_f16(v, x.as_mut_ptr());
            } else {
                self.store_f16_n(v, x.as_mut_ptr(), x.len());
            }
        }
    }

    /// Asks for the cache line at `p`, any address, ahead of its use.
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        let _ = p;
    }

    // Arithmetic.

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`, correctly rounded.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c` with one rounding.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a * b` with one rounding.
    fn neg_mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` when either is NaN or both are zeros.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` when either is NaN or both are zeros.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger of `x` and `limit`, which is neither a NaN nor a zero; NaN for a NaN.
    #[inline(always)]
    fn at_least(self, x: Self::F, limit: Self::F) -> Self::F {
        self.max(limit, x)
    }
    /// The smaller of `x` and `limit`, which is neither a NaN nor a zero; NaN for a NaN.
    #[inline(always)]
    fn at_most(self, x: Self::F, limit: Self::F) -> Self::F {
        self.min(limit, x)
    }
    /// Per lane `if a > b { x } else { y }`; a NaN compares false.
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// The largest integer not above.
    fn floor(self, a: Self::F) -> Self::F;
    /// The nearest integer, ties to even.
    fn round_even(self, a: Self::F) -> Self::F;
    /// The correctly rounded square root.
    fn sqrt(self, a: Self::F) -> Self::F;

    /// All lanes in one: pairs 8 apart, then 4, 2 and 1.
    fn sum(self, a: Self::F) -> f32;
    /// The largest lane, by the same tree as [`Simd::sum`] and [`Simd::max`] of (lower, upper).
    fn max_lane(self, a: Self::F) -> f32;

    // Quantized integers.

    /// Sixteen bytes to `p`: each lane rounded to the nearest integer (ties to even; a NaN counts as 0),
    /// plus `zero`, saturated to `u8`, or to `i8` where `SIGNED`.
    ///
    /// # Safety
    /// `p` must be writable for 16 bytes. The lanes of `zero` must be of the type saturated to; else
    /// nothing is promised of the bytes.
    unsafe fn quantize<const SIGNED: bool>(self, v: Self::F, zero: Self::I, p: *mut u8);
    /// The first `min(16, len)` lanes to a slice, as [`Simd::quantize`].
    #[inline(always)]
    fn quantize_slice<const SIGNED: bool>(self, v: Self::F, zero: i32, x: &mut [u8]) {
        debug_assert!(if SIGNED { -128..=127 } else { 0..=255 }.contains(&zero));
        let zero = self.splat_i(zero);
        // SAFETY: each branch writes no more bytes than the slice or the block has.
        unsafe {
            if x.len() >= LANES {
                self.quantize::<SIGNED>(v, zero, x.as_mut_ptr());
            } else {
                let mut block = [0; LANES];
                self.quantize::<SIGNED>(v, zero, block.as_mut_ptr());
                x.copy_from_slice(&block[..x.len()]);
            }
        }
    }
    /// Sixteen `i16` to `p`: each lane rounded to the nearest integer (ties to even; a NaN counts as 0), and to no more than
    /// [`MOST_WORD`](Self::MOST_WORD) either way.
    ///
    /// # Safety
    /// `p` must be writable for 16 elements.
    unsafe fn round_words(self, v: Self::F, p: *mut i16);
    /// The first `min(16, len)` lanes to a slice, as [`Simd::round_words`].
    #[inline(always)]
    fn round_words_slice(self, v: Self::F, x: &mut [i16]) {
        // SAFETY: each branch writes no more than the slice or the block has.
        unsafe {
            if x.len() >= LANES {
                self.round_words(v, x.as_mut_ptr());
            } else {
                let mut block = [0; LANES];
                self.round_words(v, block.as_mut_ptr());
                x.copy_from_slice(&block[..x.len()]);
            }
        }
    }
    /// Sixteen bytes to `p`: `(a * by + 2^14) >> 15`, plus `zero`, saturated to `u8`, or to `i8` where `SIGNED`. The lanes of
    /// `by` must be positive; else nothing is promised of the bytes.
    ///
    /// # Safety
    /// `p` must be writable for 16 bytes.
    unsafe fn scale_words<const SIGNED: bool>(
        self,
        a: Self::H,
        by: Self::H,
        zero: Self::H,
        p: *mut u8,
    );
    /// Sixteen `i16` from `p`.
    ///
    /// # Safety
    /// `p` must be readable for 16 elements.
    unsafe fn load_words(self, p: *const i16) -> Self::H;
    /// Every lane `x`.
    fn splat_words(self, x: i16) -> Self::H;
    /// `a + b`, wrapping.
    fn add_words(self, a: Self::H, b: Self::H) -> Self::H;
    /// `a - b`, wrapping.
    fn sub_words(self, a: Self::H, b: Self::H) -> Self::H;

    /// Sixteen `i32` from `p`.
    ///
    /// # Safety
    /// `p` must be readable for 16 elements.
    unsafe fn load_i(self, p: *const i32) -> Self::I;
    /// The nearest numbers, ties to even.
    fn float_of(self, a: Self::I) -> Self::F;

    // Integers.

    /// The lanes' bits.
    fn to_bits(self, a: Self::F) -> Self::I;
    /// The lanes of those bits.
    #[allow(clippy::wrong_self_convention)] // self is the token, as everywhere here
    fn from_bits(self, a: Self::I) -> Self::F;
    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// Wrapping sum.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Wrapping difference.
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shift left, `N < 32`.
    fn shl_i<const N: u32>(self, a: Self::I) -> Self::I;
    /// Arithmetic shift right, `0 < N < 32`.
    fn shr_i<const N: u32>(self, a: Self::I) -> Self::I;

    // Sums in double precision.

    /// Sixteen zeros.
    fn zero_d(self) -> Self::D;
    /// Sixteen `f64` from `p`.
    ///
    /// # Safety
    /// `p` must be readable for 16 elements.
    unsafe fn load_d(self, p: *const f64) -> Self::D;
    /// Sixteen `f64` to `p`.
    ///
    /// # Safety
    /// `p` must be writable for 16 elements.
    unsafe fn store_d(self, v: Self::D, p: *mut f64);
    /// `acc + x`, lane by lane.
    fn add_d(self, acc: Self::D, x: Self::F) -> Self::D;
    /// `acc + x * x`, lane by lane (exact square, so fused or not is the same).
    fn add_square_d(self, acc: Self::D, x: Self::F) -> Self::D;
    /// All lanes in one, by the tree of [`Simd::sum`].
    fn sum_d(self, a: Self::D) -> f64 {
        let mut v = [0.0_f64; LANES];
        // SAFETY: v holds 16 elements.
        unsafe { self.store_d(a, v.as_mut_ptr()) };
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                v[i] += v[i + width];
            }
            width /= 2;
        }
        v[0]
    }
}

#[cfg(test)]
mod tests;

//! The reference: sixteen lanes in an array, in portable Rust.

use half::f16;

use super::{Kernel, LANES, Simd};
use crate::isa::Isa;

/// The token of portable Rust.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scalar(());

impl Scalar {
    /// Always there.
    pub const fn new() -> Self {
        Scalar(())
    }
}

type F = [f32; LANES];

#[inline(always)]
fn map2(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn tree(mut v: F, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] = f(v[i], v[i + width]);
        }
        width /= 2;
    }
    v[0]
}

fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

impl Simd for Scalar {
    type F = F;
    type I = [i32; LANES];
    type H = [i16; LANES];
    type D = [f64; LANES];

    const ISA: Isa = Isa::Scalar;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.run(self)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        // SAFETY: the caller vouches for 16 elements; arrays of f32 have its alignment.
        unsafe { p.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, v: F, p: *mut f32) {
        // SAFETY: the caller vouches for 16 elements.
        unsafe { p.cast::<F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> F {
        debug_assert!(n <= LANES);
        let mut v = [0.0; LANES];
        // SAFETY: the caller vouches for n elements at p; v holds 16.
        unsafe { std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), n) };
        v
    }
    #[inline(always)]
    unsafe fn store_n(self, v: F, p: *mut f32, n: usize) {
        debug_assert!(n <= LANES);
        // SAFETY: the caller vouches for n elements at p; v holds 16.
        unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), p, n) };
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> F {
        // SAFETY: the caller vouches for 16 elements.
        let h = unsafe { p.cast::<[f16; LANES]>().read_unaligned() };
        std::array::from_fn(|i| h[i].to_f32_const())
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F, p: *mut f16) {
        let h: [f16; LANES] = std::array::from_fn(|i| f16::from_f32_const(v[i]));
        // SAFETY: the caller vouches for 16 elements.
        unsafe { p.cast::<[f16; LANES]>().write_unaligned(h) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| (-a[i]).mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        map2(a, b, larger)
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn select_gt(self, a: F, b: F, x: F, y: F) -> F {
        std::array::from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn floor(self, a: F) -> F {
        a.map(f32::floor)
    }
    #[inline(always)]
    fn round_even(self, a: F) -> F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn sqrt(self, a: F) -> F {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        tree(a, |a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        tree(a, larger)
    }

    #[inline(always)]
    unsafe fn quantize<const SIGNED: bool>(self, v: F, zero: Self::I, p: *mut u8) {
        let bytes: [u8; LANES] = std::array::from_fn(|i| {
            // Saturates, and makes 0 of a NaN.
            let q = (v[i].round_ties_even() as i32).saturating_add(zero[i]);
            if SIGNED { (q.clamp(-128, 127) as i8).cast_unsigned() } else { q.clamp(0, 255) as u8 }
        });
        // SAFETY: the caller vouches for 16 bytes.
        unsafe { p.cast::<[u8; LANES]>().write(bytes) }
    }
    #[inline(always)]
    unsafe fn round_words(self, v: F, p: *mut i16) {
        // As in `quantize`.
        let words =
            v.map(|x| (x.round_ties_even() as i16).clamp(-Self::MOST_WORD, Self::MOST_WORD));
        // SAFETY: the caller vouches for 16 elements.
        unsafe { p.cast::<Self::H>().write_unaligned(words) }
    }
    #[inline(always)]
    unsafe fn scale_words<const SIGNED: bool>(
        self,
        a: Self::H,
        by: Self::H,
        zero: Self::H,
        p: *mut u8,
    ) {
        let bytes: [u8; LANES] = std::array::from_fn(|i| {
            let scaled = (i32::from(a[i]) * i32::from(by[i]) + (1 << 14)) >> 15;
            let q = scaled + i32::from(zero[i]);
            if SIGNED { (q.clamp(-128, 127) as i8).cast_unsigned() } else { q.clamp(0, 255) as u8 }
        });
        // SAFETY: the caller vouches for 16 bytes.
        unsafe { p.cast::<[u8; LANES]>().write(bytes) }
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const i16) -> Self::H {
        // SAFETY: the caller vouches for 16 elements.
        unsafe { p.cast::<Self::H>().read_unaligned() }
    }
    #[inline(always)]
    fn splat_words(self, x: i16) -> Self::H {
        [x; LANES]
    }
    #[inline(always)]
    fn add_words(self, a: Self::H, b: Self::H) -> Self::H {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn sub_words(self, a: Self::H, b: Self::H) -> Self::H {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> Self::I {
        // SAFETY: the caller vouches for 16 elements.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    fn float_of(self, a: Self::I) -> F {
        a.map(|x| x as f32)
    }

    #[inline(always)]
    fn to_bits(self, a: F) -> Self::I {
        a.map(|x| x.to_bits().cast_signed())
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I) -> F {
        a.map(|x| f32::from_bits(x.cast_unsigned()))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    fn shl_i<const N: u32>(self, a: Self::I) -> Self::I {
        a.map(|x| x << N)
    }
    #[inline(always)]
    fn shr_i<const N: u32>(self, a: Self::I) -> Self::I {
        a.map(|x| x >> N)
    }

    #[inline(always)]
    fn zero_d(self) -> Self::D {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn load_d(self, p: *const f64) -> Self::D {
        // SAFETY: the caller vouches for 16 elements.
        unsafe { p.cast::<Self::D>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_d(self, v: Self::D, p: *mut f64) {
        // SAFETY: the caller vouches for 16 elements.
        unsafe { p.cast::<Self::D>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add_d(self, acc: Self::D, x: F) -> Self::D {
        std::array::from_fn(|i| acc[i] + f64::from(x[i]))
    }
    #[inline(always)]
    fn add_square_d(self, acc: Self::D, x: F) -> Self::D {
        std::array::from_fn(|i| acc[i] + f64::from(x[i]) * f64::from(x[i]))
    }
}

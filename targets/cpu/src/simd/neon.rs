//! Sixteen lanes in four 128-bit registers.
//!
//! Half-precision conversions are written as one-instruction assembly: they belong to the
//! base Advanced SIMD instruction set, while their intrinsics need a type that is not stable.

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::{Kernel, LANES, Simd};
use crate::isa::Isa;

/// The token of Advanced SIMD.
#[derive(Clone, Copy, Debug)]
pub struct Neon(());

impl Neon {
    /// The token, where the processor supports it (every 64-bit Arm application core does).
    pub fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }
}

/// Calls intrinsics: the token `self` proves their features.
macro_rules! op {
    ($e:expr) => {{
        // SAFETY: a token exists only where the feature was detected; pointers, where there
        // are any, are vouched for by this method's caller.
        unsafe { $e }
    }};
}

type F = [float32x4_t; 4];
type I = [int32x4_t; 4];
type D = [float64x2_t; 8];
type H = [int16x8_t; 2];

#[inline(always)]
fn each(f: impl Fn(usize) -> float32x4_t) -> F {
    [f(0), f(1), f(2), f(3)]
}
#[inline(always)]
fn each_i(f: impl Fn(usize) -> int32x4_t) -> I {
    [f(0), f(1), f(2), f(3)]
}

#[inline(always)]
fn max4(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    op!(vbslq_f32(vcgtq_f32(a, b), a, b))
}

/// Widens the lower four `f16`s.
#[inline(always)]
fn widen_low(h: uint16x8_t) -> float32x4_t {
    let r: float32x4_t;
    // SAFETY: one base Advanced SIMD instruction on registers.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) r, in(vreg) h,
            options(pure, nomem, nostack, preserves_flags));
    }
    r
}

/// Widens the upper four `f16`s.
#[inline(always)]
fn widen_high(h: uint16x8_t) -> float32x4_t {
    let r: float32x4_t;
    // SAFETY: one base Advanced SIMD instruction on registers.
    unsafe {
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", lateout(vreg) r, in(vreg) h,
            options(pure, nomem, nostack, preserves_flags));
    }
    r
}

/// Narrows eight `f32`s, rounding to nearest even.
#[inline(always)]
fn narrow(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    let r: uint16x8_t;
    // SAFETY: two base Advanced SIMD instructions on registers; `r` is written before `high`
    // is read, hence `out` and not `lateout`.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", "fcvtn2 {0:v}.8h, {2:v}.4s",
            out(vreg) r, in(vreg) low, in(vreg) high,
            options(pure, nomem, nostack, preserves_flags));
    }
    r
}

impl Simd for Neon {
    type F = F;
    type I = I;
    type H = H;
    type D = D;

    const ISA: Isa = Isa::Neon;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.run(self)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        each(|i| op!(vld1q_f32(p.add(4 * i))))
    }
    #[inline(always)]
    unsafe fn store(self, v: F, p: *mut f32) {
        for (i, q) in v.into_iter().enumerate() {
            op!(vst1q_f32(p.add(4 * i), q));
        }
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> F {
        debug_assert!(n <= LANES);
        let mut block = [0.0_f32; LANES];
        op!({
            std::ptr::copy_nonoverlapping(p, block.as_mut_ptr(), n);
            self.load(block.as_ptr())
        })
    }
    #[inline(always)]
    unsafe fn store_n(self, v: F, p: *mut f32, n: usize) {
        debug_assert!(n <= LANES);
        let mut block = [0.0_f32; LANES];
        op!({
            self.store(v, block.as_mut_ptr());
            std::ptr::copy_nonoverlapping(block.as_ptr(), p, n);
        })
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> F {
        let (a, b) = op!((vld1q_u16(p.cast()), vld1q_u16(p.add(8).cast())));
        [widen_low(a), widen_high(a), widen_low(b), widen_high(b)]
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F, p: *mut f16) {
        op!({
            vst1q_u16(p.cast(), narrow(v[0], v[1]));
            vst1q_u16(p.add(8).cast(), narrow(v[2], v[3]));
        })
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a hint, which no address makes fail.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [op!(vdupq_n_f32(x)); 4]
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        each(|i| op!(vaddq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        each(|i| op!(vsubq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        each(|i| op!(vmulq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        each(|i| op!(vdivq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        each(|i| op!(vfmaq_f32(c[i], a[i], b[i])))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: F, b: F, c: F) -> F {
        each(|i| op!(vfmsq_f32(c[i], a[i], b[i])))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        each(|i| max4(a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        each(|i| op!(vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i])))
    }
    #[inline(always)]
    fn at_least(self, x: F, limit: F) -> F {
        each(|i| op!(vmaxq_f32(x[i], limit[i])))
    }
    #[inline(always)]
    fn at_most(self, x: F, limit: F) -> F {
        each(|i| op!(vminq_f32(x[i], limit[i])))
    }
    #[inline(always)]
    fn select_gt(self, a: F, b: F, x: F, y: F) -> F {
        each(|i| op!(vbslq_f32(vcgtq_f32(a[i], b[i]), x[i], y[i])))
    }
    #[inline(always)]
    fn floor(self, a: F) -> F {
        each(|i| op!(vrndmq_f32(a[i])))
    }
    #[inline(always)]
    fn round_even(self, a: F) -> F {
        each(|i| op!(vrndnq_f32(a[i])))
    }
    #[inline(always)]
    fn sqrt(self, a: F) -> F {
        each(|i| op!(vsqrtq_f32(a[i])))
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        op!({
            let c = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
            vget_lane_f32::<0>(d) + vget_lane_f32::<1>(d)
        })
    }
    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        op!({
            let c = max4(max4(a[0], a[2]), max4(a[1], a[3]));
            let (low, high) = (vget_low_f32(c), vget_high_f32(c));
            let d = vbsl_f32(vcgt_f32(low, high), low, high);
            let (x, y) = (vget_lane_f32::<0>(d), vget_lane_f32::<1>(d));
            if x > y { x } else { y }
        })
    }

    #[inline(always)]
    unsafe fn quantize<const SIGNED: bool>(self, v: F, zero: I, p: *mut u8) {
        // The conversion saturates and makes 0 of a NaN; so do the narrowing to 16 bits, where
        // the zero point is added, and the sum: what is out of their range is out of a byte's.
        let q = each_i(|i| op!(vcvtnq_s32_f32(v[i])));
        op!({
            let words = |x: I, i: usize| vqmovn_high_s32(vqmovn_s32(x[i]), x[i + 1]);
            let low = vqaddq_s16(words(q, 0), words(zero, 0));
            let high = vqaddq_s16(words(q, 2), words(zero, 2));
            if SIGNED {
                vst1q_s8(p.cast(), vqmovn_high_s16(vqmovn_s16(low), high));
            } else {
                vst1q_u8(p, vqmovun_high_s16(vqmovun_s16(low), high));
            }
        })
    }
    #[inline(always)]
    unsafe fn round_words(self, v: F, p: *mut i16) {
        // As in `quantize`, the conversions saturate and make 0 of a NaN.
        let q = each_i(|i| op!(vcvtnq_s32_f32(v[i])));
        op!({
            let most = vdupq_n_s16(Self::MOST_WORD);
            let least = vdupq_n_s16(-Self::MOST_WORD);
            let low = vqmovn_high_s32(vqmovn_s32(q[0]), q[1]);
            let high = vqmovn_high_s32(vqmovn_s32(q[2]), q[3]);
            vst1q_s16(p, vmaxq_s16(vminq_s16(low, most), least));
            vst1q_s16(p.add(8), vmaxq_s16(vminq_s16(high, most), least));
        })
    }
    #[inline(always)]
    unsafe fn scale_words<const SIGNED: bool>(self, a: H, by: H, zero: H, p: *mut u8) {
        op!({
            let low = vqaddq_s16(vqrdmulhq_s16(a[0], by[0]), zero[0]);
            let high = vqaddq_s16(vqrdmulhq_s16(a[1], by[1]), zero[1]);
            if SIGNED {
                vst1q_s8(p.cast(), vqmovn_high_s16(vqmovn_s16(low), high));
            } else {
                vst1q_u8(p, vqmovun_high_s16(vqmovun_s16(low), high));
            }
        })
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const i16) -> H {
        op!([vld1q_s16(p), vld1q_s16(p.add(8))])
    }
    #[inline(always)]
    fn splat_words(self, x: i16) -> H {
        op!([vdupq_n_s16(x); 2])
    }
    #[inline(always)]
    fn add_words(self, a: H, b: H) -> H {
        op!([vaddq_s16(a[0], b[0]), vaddq_s16(a[1], b[1])])
    }
    #[inline(always)]
    fn sub_words(self, a: H, b: H) -> H {
        op!([vsubq_s16(a[0], b[0]), vsubq_s16(a[1], b[1])])
    }

    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> I {
        each_i(|i| op!(vld1q_s32(p.add(4 * i))))
    }
    #[inline(always)]
    fn float_of(self, a: I) -> F {
        each(|i| op!(vcvtq_f32_s32(a[i])))
    }

    #[inline(always)]
    fn to_bits(self, a: F) -> I {
        each_i(|i| op!(vreinterpretq_s32_f32(a[i])))
    }
    #[inline(always)]
    fn from_bits(self, a: I) -> F {
        each(|i| op!(vreinterpretq_f32_s32(a[i])))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        [op!(vdupq_n_s32(x)); 4]
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        each_i(|i| op!(vaddq_s32(a[i], b[i])))
    }
    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        each_i(|i| op!(vsubq_s32(a[i], b[i])))
    }
    #[inline(always)]
    fn shl_i<const N: u32>(self, a: I) -> I {
        let n = op!(vdupq_n_s32(N as i32));
        each_i(|i| op!(vshlq_s32(a[i], n)))
    }
    #[inline(always)]
    fn shr_i<const N: u32>(self, a: I) -> I {
        // A shift left by a negative count is an arithmetic shift right.
        let n = op!(vdupq_n_s32(-(N as i32)));
        each_i(|i| op!(vshlq_s32(a[i], n)))
    }

    #[inline(always)]
    fn zero_d(self) -> D {
        [op!(vdupq_n_f64(0.0)); 8]
    }
    #[inline(always)]
    unsafe fn load_d(self, p: *const f64) -> D {
        std::array::from_fn(|i| op!(vld1q_f64(p.add(2 * i))))
    }
    #[inline(always)]
    unsafe fn store_d(self, v: D, p: *mut f64) {
        for (i, q) in v.into_iter().enumerate() {
            op!(vst1q_f64(p.add(2 * i), q));
        }
    }
    #[inline(always)]
    fn add_d(self, mut acc: D, x: F) -> D {
        for i in 0..4 {
            op!({
                acc[2 * i] = vaddq_f64(acc[2 * i], vcvt_f64_f32(vget_low_f32(x[i])));
                acc[2 * i + 1] = vaddq_f64(acc[2 * i + 1], vcvt_high_f64_f32(x[i]));
            });
        }
        acc
    }
    #[inline(always)]
    fn add_square_d(self, mut acc: D, x: F) -> D {
        for i in 0..4 {
            op!({
                let (low, high) = (vcvt_f64_f32(vget_low_f32(x[i])), vcvt_high_f64_f32(x[i]));
                acc[2 * i] = vfmaq_f64(acc[2 * i], low, low);
                acc[2 * i + 1] = vfmaq_f64(acc[2 * i + 1], high, high);
            });
        }
        acc
    }
}

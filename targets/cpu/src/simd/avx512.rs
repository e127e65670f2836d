//! Sixteen lanes in one 512-bit register.
//!
//! Every method is `#[inline(always)]` and reaches the intrinsics through `unsafe`: the token
//! proves that the processor has the features.

use std::arch::asm;
use std::arch::x86_64::*;

use half::f16;

use super::avx2::words_of_256_bits;
use super::{Kernel, Simd};
use crate::isa::Isa;

/// The token of AVX-512 F, BW, DQ and VL (with AVX2, FMA and F16C).
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Avx512 {
    /// The token, where the processor and the operating system support it.
    pub fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx512(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn enabled<K: Kernel>(s: Avx512, kernel: K) -> K::Out {
    kernel.run(s)
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1_u32 << n) - 1) as __mmask16
}

/// Calls one intrinsic: the token `self` proves its features.
macro_rules! op {
    ($e:expr) => {{
        // SAFETY: a token exists only where the features were detected; pointers, where there
        // are any, are vouched for by this method's caller.
        unsafe { $e }
    }};
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type H = __m256i;
    type D = (__m512d, __m512d);

    const ISA: Isa = Isa::Avx512;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Out {
        op!(enabled(self, kernel))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        op!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, v: __m512, p: *mut f32) {
        op!(_mm512_storeu_ps(p, v))
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> __m512 {
        op!(_mm512_maskz_loadu_ps(mask(n), p))
    }
    #[inline(always)]
    unsafe fn store_n(self, v: __m512, p: *mut f32, n: usize) {
        op!(_mm512_mask_storeu_ps(p, mask(n), v))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        op!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: __m512, p: *mut f16) {
        op!(_mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)))
    }
    #[inline(always)]
    unsafe fn load_f16_n(self, p: *const f16, n: usize) -> __m512 {
        op!(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p.cast())))
    }
    #[inline(always)]
    unsafe fn store_f16_n(self, v: __m512, p: *mut f16, n: usize) {
        op!(_mm256_mask_storeu_epi16(
            p.cast(),
            mask(n),
            _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)
        ))
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn select_gt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn floor(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn round_even(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        op!(_mm512_sqrt_ps(a))
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        op!({
            let b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_add_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        op!({
            let b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_max_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        })
    }

    #[inline(always)]
    unsafe fn quantize<const SIGNED: bool>(self, v: __m512, zero: __m512i, p: *mut u8) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        op!({
            // The constants come first: a NaN passes, and is then masked out.
            let mut v = _mm512_min_ps(_mm512_set1_ps(1024.0), v);
            if SIGNED {
                // Else what is too small for an i32 becomes the smallest one, and stays below 0.
                v = _mm512_max_ps(_mm512_set1_ps(-1024.0), v);
            }
            let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(v, v);
            let q = _mm512_add_epi32(_mm512_maskz_cvt_roundps_epi32::<NEAREST>(number, v), zero);
            _mm_storeu_si128(p.cast(), saturate::<SIGNED>(q));
        })
    }
    #[inline(always)]
    unsafe fn round_words(self, v: __m512, p: *mut i16) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        let most = f32::from(Self::MOST_WORD);
        op!({
            // As in `quantize`.
            let v = _mm512_min_ps(_mm512_set1_ps(most), v);
            let v = _mm512_max_ps(_mm512_set1_ps(-most), v);
            let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(v, v);
            let q = _mm512_maskz_cvt_roundps_epi32::<NEAREST>(number, v);
            _mm256_storeu_si256(p.cast(), narrow(q));
        })
    }
    words_of_256_bits!();

    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> __m512i {
        op!(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    fn float_of(self, a: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(a))
    }

    #[inline(always)]
    fn to_bits(self, a: __m512) -> __m512i {
        op!(_mm512_castps_si512(a))
    }
    #[inline(always)]
    fn from_bits(self, a: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        op!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn shl_i<const N: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_slli_epi32::<N>(a))
    }
    #[inline(always)]
    fn shr_i<const N: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_srai_epi32::<N>(a))
    }

    #[inline(always)]
    fn zero_d(self) -> Self::D {
        op!((_mm512_setzero_pd(), _mm512_setzero_pd()))
    }
    #[inline(always)]
    unsafe fn load_d(self, p: *const f64) -> Self::D {
        op!((_mm512_loadu_pd(p), _mm512_loadu_pd(p.add(8))))
    }
    #[inline(always)]
    unsafe fn store_d(self, v: Self::D, p: *mut f64) {
        op!({
            _mm512_storeu_pd(p, v.0);
            _mm512_storeu_pd(p.add(8), v.1);
        })
    }
    #[inline(always)]
    fn add_d(self, acc: Self::D, x: __m512) -> Self::D {
        op!({
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(x));
            (_mm512_add_pd(acc.0, low), _mm512_add_pd(acc.1, high))
        })
    }
    #[inline(always)]
    fn add_square_d(self, acc: Self::D, x: __m512) -> Self::D {
        op!({
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(x));
            (_mm512_fmadd_pd(low, low, acc.0), _mm512_fmadd_pd(high, high, acc.1))
        })
    }
}

/// Sixteen integers that fit 16 bits.
#[inline(always)]
fn narrow(q: __m512i) -> __m256i {
    op!({
        // Packs within halves of 128 bits: 0..4 and 8..12, then 4..8 and 12..16.
        let high = _mm512_extracti64x4_epi64::<1>(q);
        let words = _mm256_packs_epi32(_mm512_castsi512_si256(q), high);
        _mm256_permute4x64_epi64::<0b1101_1000>(words)
    })
}

/// Sixteen integers as bytes, saturated.
#[inline(always)]
fn saturate<const SIGNED: bool>(q: __m512i) -> __m128i {
    let mut bytes = op!(if SIGNED {
        _mm512_cvtsepi32_epi8(q)
    } else {
        // The instruction takes its input as unsigned.
        _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512()))
    });
    // Else compilers make of it and a store the instruction that narrows to memory, which takes many times as long.
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} */", inout(xmm_reg) bytes, options(pure, nomem, nostack, preserves_flags));
    }
    bytes
}

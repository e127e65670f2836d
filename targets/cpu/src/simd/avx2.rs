//! Sixteen lanes in two 256-bit registers.
//!
//! Every method is `#[inline(always)]` and reaches the intrinsics through `unsafe`: the token
//! proves that the processor has the features.

use std::arch::x86_64::*;

use half::f16;

use super::{Kernel, LANES, Simd};
use crate::isa::Isa;

/// The token of AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The token, where the processor and the operating system support it.
    pub fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx2(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enabled<K: Kernel>(s: Avx2, kernel: K) -> K::Out {
    kernel.run(s)
}

/// Calls intrinsics: the token `self` proves their features.
macro_rules! op {
    ($e:expr) => {{
        // SAFETY: a token exists only where the features were detected; pointers, where there
        // are any, are vouched for by this method's caller.
        unsafe { $e }
    }};
}

/// Lane masks for the first `n` of 16 lanes.
#[inline(always)]
fn masks(n: usize) -> (__m256i, __m256i) {
    debug_assert!(n <= LANES);
    op!({
        let n = _mm256_set1_epi32(n as i32);
        (
            _mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)),
        )
    })
}

/// What [`Simd`] does with sixteen `i16` in one register of 256 bits, for both instruction sets that have those.
macro_rules! words_of_256_bits {
    () => {
        #[inline(always)]
        unsafe fn scale_words<const SIGNED: bool>(
            self,
            a: __m256i,
            by: __m256i,
            zero: __m256i,
            p: *mut u8,
        ) {
            op!({
                let words = _mm256_adds_epi16(_mm256_mulhrs_epi16(a, by), zero);
                let low = _mm256_castsi256_si128(words);
                let high = _mm256_extracti128_si256::<1>(words);
                let bytes =
                    if SIGNED { _mm_packs_epi16(low, high) } else { _mm_packus_epi16(low, high) };
                _mm_storeu_si128(p.cast(), bytes);
            })
        }
        #[inline(always)]
        unsafe fn load_words(self, p: *const i16) -> __m256i {
            op!(_mm256_loadu_si256(p.cast()))
        }
        #[inline(always)]
        fn splat_words(self, x: i16) -> __m256i {
            op!(_mm256_set1_epi16(x))
        }
        #[inline(always)]
        fn add_words(self, a: __m256i, b: __m256i) -> __m256i {
            op!(_mm256_add_epi16(a, b))
        }
        #[inline(always)]
        fn sub_words(self, a: __m256i, b: __m256i) -> __m256i {
            op!(_mm256_sub_epi16(a, b))
        }
    };
}
pub(super) use words_of_256_bits;

type F = (__m256, __m256);
type I = (__m256i, __m256i);

impl Simd for Avx2 {
    type F = F;
    type I = I;
    type H = __m256i;
    type D = (__m256d, __m256d, __m256d, __m256d);

    const ISA: Isa = Isa::Avx2;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Out {
        op!(enabled(self, kernel))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        op!((_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))))
    }
    #[inline(always)]
    unsafe fn store(self, v: F, p: *mut f32) {
        op!({
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        })
    }
    #[inline(always)]
    unsafe fn load_n(self, p: *const f32, n: usize) -> F {
        let m = masks(n);
        // The upper half's address may lie past the object: wrapping_add, and a zero mask
        // touches no memory.
        op!((_mm256_maskload_ps(p, m.0), _mm256_maskload_ps(p.wrapping_add(8), m.1)))
    }
    #[inline(always)]
    unsafe fn store_n(self, v: F, p: *mut f32, n: usize) {
        let m = masks(n);
        op!({
            _mm256_maskstore_ps(p, m.0, v.0);
            _mm256_maskstore_ps(p.wrapping_add(8), m.1, v.1);
        })
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> F {
        op!((
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))
        ))
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F, p: *mut f16) {
        op!({
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1);
            _mm_storeu_si128(p.cast(), low);
            _mm_storeu_si128(p.add(8).cast(), high);
        })
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        op!((_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        op!((_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        op!((_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        op!((_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        op!((_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        op!((_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: F, b: F, c: F) -> F {
        op!((_mm256_fnmadd_ps(a.0, b.0, c.0), _mm256_fnmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        op!((_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        op!((_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn select_gt(self, a: F, b: F, x: F, y: F) -> F {
        op!((
            _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_GT_OQ>(a.0, b.0)),
            _mm256_blendv_ps(y.1, x.1, _mm256_cmp_ps::<_CMP_GT_OQ>(a.1, b.1))
        ))
    }
    #[inline(always)]
    fn floor(self, a: F) -> F {
        op!((_mm256_floor_ps(a.0), _mm256_floor_ps(a.1)))
    }
    #[inline(always)]
    fn round_even(self, a: F) -> F {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        op!((_mm256_round_ps::<MODE>(a.0), _mm256_round_ps::<MODE>(a.1)))
    }
    #[inline(always)]
    fn sqrt(self, a: F) -> F {
        op!((_mm256_sqrt_ps(a.0), _mm256_sqrt_ps(a.1)))
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        op!({
            let b = _mm256_add_ps(a.0, a.1);
            let c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_add_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        op!({
            let b = _mm256_max_ps(a.0, a.1);
            let c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_max_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        })
    }

    #[inline(always)]
    unsafe fn quantize<const SIGNED: bool>(self, v: F, zero: I, p: *mut u8) {
        op!({
            let low = _mm256_add_epi32(nearest::<SIGNED>(v.0), zero.0);
            let high = _mm256_add_epi32(nearest::<SIGNED>(v.1), zero.1);
            _mm_storeu_si128(p.cast(), saturate::<SIGNED>(low, high));
        })
    }
    #[inline(always)]
    unsafe fn round_words(self, v: F, p: *mut i16) {
        let (low, high) = (words(v.0), words(v.1));
        op!({
            // Packs within halves of 128 bits, as in `saturate`.
            let words = _mm256_packs_epi32(low, high);
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b1101_1000>(words));
        })
    }
    words_of_256_bits!();

    #[inline(always)]
    unsafe fn load_i(self, p: *const i32) -> I {
        op!((_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())))
    }
    #[inline(always)]
    fn float_of(self, a: I) -> F {
        op!((_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1)))
    }

    #[inline(always)]
    fn to_bits(self, a: F) -> I {
        op!((_mm256_castps_si256(a.0), _mm256_castps_si256(a.1)))
    }
    #[inline(always)]
    fn from_bits(self, a: I) -> F {
        op!((_mm256_castsi256_ps(a.0), _mm256_castsi256_ps(a.1)))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        op!((_mm256_set1_epi32(x), _mm256_set1_epi32(x)))
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        op!((_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)))
    }
    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        op!((_mm256_sub_epi32(a.0, b.0), _mm256_sub_epi32(a.1, b.1)))
    }
    #[inline(always)]
    fn shl_i<const N: u32>(self, a: I) -> I {
        op!({
            let n = _mm_cvtsi32_si128(N as i32);
            (_mm256_sll_epi32(a.0, n), _mm256_sll_epi32(a.1, n))
        })
    }
    #[inline(always)]
    fn shr_i<const N: u32>(self, a: I) -> I {
        op!({
            let n = _mm_cvtsi32_si128(N as i32);
            (_mm256_sra_epi32(a.0, n), _mm256_sra_epi32(a.1, n))
        })
    }

    #[inline(always)]
    fn zero_d(self) -> Self::D {
        let z = op!(_mm256_setzero_pd());
        (z, z, z, z)
    }
    #[inline(always)]
    unsafe fn load_d(self, p: *const f64) -> Self::D {
        op!((
            _mm256_loadu_pd(p),
            _mm256_loadu_pd(p.add(4)),
            _mm256_loadu_pd(p.add(8)),
            _mm256_loadu_pd(p.add(12))
        ))
    }
    #[inline(always)]
    unsafe fn store_d(self, v: Self::D, p: *mut f64) {
        op!({
            _mm256_storeu_pd(p, v.0);
            _mm256_storeu_pd(p.add(4), v.1);
            _mm256_storeu_pd(p.add(8), v.2);
            _mm256_storeu_pd(p.add(12), v.3);
        })
    }
    #[inline(always)]
    fn add_d(self, acc: Self::D, x: F) -> Self::D {
        let w = widen(x);
        op!((
            _mm256_add_pd(acc.0, w.0),
            _mm256_add_pd(acc.1, w.1),
            _mm256_add_pd(acc.2, w.2),
            _mm256_add_pd(acc.3, w.3)
        ))
    }
    #[inline(always)]
    fn add_square_d(self, acc: Self::D, x: F) -> Self::D {
        let w = widen(x);
        op!((
            _mm256_fmadd_pd(w.0, w.0, acc.0),
            _mm256_fmadd_pd(w.1, w.1, acc.1),
            _mm256_fmadd_pd(w.2, w.2, acc.2),
            _mm256_fmadd_pd(w.3, w.3, acc.3)
        ))
    }
}

/// The nearest integers, ties to even, 0 for a NaN; from -1024 (where `SIGNED`) to 1024.
#[inline(always)]
fn nearest<const SIGNED: bool>(v: __m256) -> __m256i {
    op!({
        // The constants come first: a NaN passes, and is then masked out.
        let mut v = _mm256_min_ps(_mm256_set1_ps(1024.0), v);
        if SIGNED {
            // Else what is too small for an i32 becomes the smallest one, and stays below 0.
            v = _mm256_max_ps(_mm256_set1_ps(-1024.0), v);
        }
        let number = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_ORD_Q>(v, v));
        _mm256_and_si256(_mm256_cvtps_epi32(v), number)
    })
}

/// The nearest integers, 0 for a NaN, and no more than [`Simd::MOST_WORD`] either way.
#[inline(always)]
fn words(v: __m256) -> __m256i {
    let most = f32::from(Avx2::MOST_WORD);
    op!({
        // As in `nearest`.
        let v = _mm256_min_ps(_mm256_set1_ps(most), v);
        let v = _mm256_max_ps(_mm256_set1_ps(-most), v);
        let number = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_ORD_Q>(v, v));
        _mm256_and_si256(_mm256_cvtps_epi32(v), number)
    })
}

/// Sixteen integers as the nearest `u8`, or `i8` where `SIGNED`.
#[inline(always)]
fn saturate<const SIGNED: bool>(low: __m256i, high: __m256i) -> __m128i {
    op!({
        // Packs within halves of 128 bits: 0..4 and 8..12, then 4..8 and 12..16.
        let words = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packs_epi32(low, high));
        let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        if SIGNED { _mm_packs_epi16(low, high) } else { _mm_packus_epi16(low, high) }
    })
}

#[inline(always)]
fn widen(x: F) -> (__m256d, __m256d, __m256d, __m256d) {
    op!((
        _mm256_cvtps_pd(_mm256_castps256_ps128(x.0)),
        _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x.0)),
        _mm256_cvtps_pd(_mm256_castps256_ps128(x.1)),
        _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x.1))
    ))
}

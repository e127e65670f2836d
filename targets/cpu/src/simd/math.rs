//! Elementwise functions over [`Simd`]: the same bits on every instruction set.

use super::Simd;

/// log2(e).
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// The upper part of ln 2: its low bits are zero, so a product with a small integer is exact.
const LN2_HIGH: f32 = 0.693_359_4;
/// ln 2 less [`LN2_HIGH`].
const LN2_LOW: f32 = -2.121_944_4e-4;
/// 1.5 · 2²³: adding it to a small number leaves that number, rounded to nearest even, in the
/// low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// e^x, within 1 unit in the last place (0.9 measured).
///
/// `-inf` and everything below about -104 give 0, everything above 88.7228 `+inf`; results
/// below 2⁻¹²⁶ are rounded to subnormals; NaN stays NaN. x = n ln 2 + r with |r| ≤ ln 2 / 2,
/// e^r by a polynomial of degree 7 (its Taylor coefficients, evaluated with fused
/// multiply-adds), and the scaling by 2ⁿ in two exact steps but for the last rounding.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.at_least(x, s.splat(-105.0));
    let x = s.at_most(x, s.splat(89.0));
    let shifted = s.mul_add(x, s.splat(LOG2_E), s.splat(ROUND));
    let n = s.sub(shifted, s.splat(ROUND));
    let r = s.neg_mul_add(n, s.splat(LN2_HIGH), x);
    let r = s.neg_mul_add(n, s.splat(LN2_LOW), r);
    let mut p = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.mul_add(p, r, s.splat(c));
    }
    let n = s.sub_i(s.to_bits(shifted), s.splat_i(ROUND.to_bits().cast_signed()));
    let half = s.shr_i::<1>(n);
    let rest = s.sub_i(n, half);
    let p = s.mul(p, power_of_two(s, half));
    s.mul(p, power_of_two(s, rest))
}

/// 2ⁿ for -126 ≤ n ≤ 127.
#[inline(always)]
fn power_of_two<S: Simd>(s: S, n: S::I) -> S::F {
    s.from_bits(s.shl_i::<23>(s.add_i(n, s.splat_i(127))))
}

/// SiLU, x · σ(x), as x / (1 + e⁻ˣ) (Elfwing et al. 2017), within 2.5 units in the last place.
///
/// `+inf` gives `+inf`; `-inf` and everything below about -88.7 give -0, where the true value
/// is above -2.7e-37; NaN stays NaN.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    // Below, e⁻ˣ is infinite and the result -0; above, 1 + e⁻ˣ is 1.
    let x = s.at_least(x, s.splat(-89.0));
    let y = s.at_most(x, s.splat(86.0));
    // As in `exp`, but of -y without negating it: n and r have the other sign, and with them
    // every second coefficient; and of twice the size, to be scaled by half of 2ⁿ, which is a
    // normal number for every n that is left. Its exponent is in the low bits of `shifted`.
    let shifted = s.mul_add(y, s.splat(-LOG2_E), s.splat(ROUND + 126.0));
    let n = s.sub(shifted, s.splat(ROUND + 126.0));
    let r = s.mul_add(n, s.splat(LN2_HIGH), y);
    let r = s.mul_add(n, s.splat(LN2_LOW), r);
    let mut p = s.splat(-2.0 / 5040.0);
    for c in [2.0 / 720.0, -2.0 / 120.0, 2.0 / 24.0, -2.0 / 6.0, 1.0, -2.0, 2.0] {
        p = s.mul_add(p, r, s.splat(c));
    }
    let e = s.mul(p, s.from_bits(s.shl_i::<23>(s.to_bits(shifted))));
    s.div(x, s.add(s.splat(1.0), e))
}

/// SiLU for what will be rounded to a byte: within 5 · 10⁻⁶ of its value, and without a division.
///
/// Below -60 it is what -60 gives, -5 · 10⁻²⁵; `+inf` gives `+inf`; NaN stays NaN. With d = 1 + e⁻ˣ times `GAIN`, the
/// difference of the bits of 2¹²⁷ and of d is a number between 1 and 1.125 times 1 / d, since a float's bits are nearly
/// its logarithm. Two of Newton's steps, y ← y (a - d y), with an `a` that balances what error is left, make `GAIN` / d of it.
#[inline(always)]
pub fn coarse_silu<S: Simd>(s: S, x: S::F) -> S::F {
    const GAIN: f32 = 1.270_021;
    // 2ᶠ for |f| ≤ 1/2, within 2.6 · 10⁻⁶ of its value: a minimax polynomial, the highest power first.
    const POWER: [f32; 5] = [9.570_097e-3, 5.591_786e-2, 0.240_247_44, 0.693_121_8, 0.999_999_3];
    const POWER_OF_127: i32 = 0x7f00_0000;
    let x = s.at_least(x, s.splat(-60.0));
    let y = s.at_most(x, s.splat(86.0));
    // e⁻ʸ = 2ⁿ · 2ᶠ; n is in the low bits of `shifted`.
    let shifted = s.mul_add(y, s.splat(-LOG2_E), s.splat(ROUND));
    let f = s.mul_add(y, s.splat(-LOG2_E), s.sub(s.splat(ROUND), shifted));
    let mut p = s.splat(GAIN * POWER[0]);
    for c in &POWER[1..] {
        p = s.mul_add(p, f, s.splat(GAIN * c));
    }
    let e = s.from_bits(s.add_i(s.to_bits(p), s.shl_i::<23>(s.to_bits(shifted))));
    let d = s.add(e, s.splat(GAIN));
    let mut y = s.from_bits(s.sub_i(s.splat_i(POWER_OF_127), s.to_bits(d)));
    for a in [2.125, 2.253_906] {
        y = s.mul(y, s.neg_mul_add(d, y, s.splat(a)));
    }
    s.mul(x, y)
}

/// σ(x) = 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(s.splat(1.0), s.add(s.splat(1.0), e))
}

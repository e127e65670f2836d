//! Every operation on every instruction set against plain Rust, bit for bit.

use half::f16;

use super::{Kernel, LANES, Simd, math};
use crate::isa::Level;

/// Equal bits, or both NaN.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn values(seed: u32) -> [f32; LANES] {
    const SPECIAL: [f32; 12] = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-45,
        2.5,
        -3.5,
    ];
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        if state.is_multiple_of(3) {
            SPECIAL[(state >> 8) as usize % SPECIAL.len()]
        } else {
            f32::from_bits((state & 0x8fff_ffff) | 0x3800_0000)
        }
    })
}

struct Ops {
    a: [f32; LANES],
    b: [f32; LANES],
    c: [f32; LANES],
}

/// Names and results of each operation.
type Results = Vec<(&'static str, [f32; LANES])>;

impl Kernel for Ops {
    type Out = Results;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Results {
        let mut out = Vec::new();
        let a = s.load_slice(&self.a);
        let b = s.load_slice(&self.b);
        let c = s.load_slice(&self.c);
        let mut put = |name, v: S::F| {
            let mut x = [0.0; LANES];
            s.store_slice(v, &mut x);
            out.push((name, x));
        };
        put("add", s.add(a, b));
        put("sub", s.sub(a, b));
        put("mul", s.mul(a, b));
        put("div", s.div(a, b));
        put("mul_add", s.mul_add(a, b, c));
        put("neg_mul_add", s.neg_mul_add(a, b, c));
        put("max", s.max(a, b));
        put("min", s.min(a, b));
        put("at_least", s.at_least(a, s.splat(-0.5)));
        put("at_most", s.at_most(a, s.splat(2.5)));
        put("select_gt", s.select_gt(a, b, b, c));
        put("floor", s.floor(a));
        put("round_even", s.round_even(a));
        put("sqrt", s.sqrt(a));
        put("splat", s.splat(self.a[3]));
        put("exp", math::exp(s, a));
        put("silu", math::silu(s, a));
        put("coarse_silu", math::coarse_silu(s, a));
        put("sigmoid", math::sigmoid(s, a));
        let i = s.to_bits(a);
        let j = s.to_bits(b);
        put("add_i", s.from_bits(s.add_i(i, s.splat_i(77))));
        put("sub_i", s.from_bits(s.sub_i(i, j)));
        put("shl_i", s.from_bits(s.shl_i::<3>(i)));
        put("shr_i", s.from_bits(s.shr_i::<3>(i)));
        put("sum", s.splat(s.sum(a)));
        put("max_lane", s.splat(s.max_lane(a)));
        let d = s.add_square_d(s.add_d(s.zero_d(), a), b);
        let mut w = [0.0_f64; LANES];
        // SAFETY: w holds 16 elements.
        let d = unsafe {
            s.store_d(d, w.as_mut_ptr());
            s.load_d(w.as_ptr())
        };
        put("d low", s.load_slice(&w.map(|x| x as f32)));
        put("sum_d", s.splat(s.sum_d(d) as f32));
        out
    }
}

/// What plain Rust gives for the operations that it has.
fn expected(o: &Ops, name: &str) -> Option<[f32; LANES]> {
    let f = |g: &dyn Fn(usize) -> f32| Some(std::array::from_fn(g));
    let (a, b, c) = (&o.a, &o.b, &o.c);
    match name {
        "add" => f(&|i| a[i] + b[i]),
        "sub" => f(&|i| a[i] - b[i]),
        "mul" => f(&|i| a[i] * b[i]),
        "div" => f(&|i| a[i] / b[i]),
        "mul_add" => f(&|i| a[i].mul_add(b[i], c[i])),
        "neg_mul_add" => f(&|i| (-a[i]).mul_add(b[i], c[i])),
        "max" => f(&|i| if a[i] > b[i] { a[i] } else { b[i] }),
        "min" => f(&|i| if a[i] < b[i] { a[i] } else { b[i] }),
        "at_least" => f(&|i| if a[i] < -0.5 { -0.5 } else { a[i] }),
        "at_most" => f(&|i| if a[i] > 2.5 { 2.5 } else { a[i] }),
        "select_gt" => f(&|i| if a[i] > b[i] { b[i] } else { c[i] }),
        "floor" => f(&|i| a[i].floor()),
        "round_even" => f(&|i| a[i].round_ties_even()),
        "sqrt" => f(&|i| a[i].sqrt()),
        "splat" => f(&|_| a[3]),
        "d low" => f(&|i| (f64::from(a[i]) + f64::from(b[i]) * f64::from(b[i])) as f32),
        _ => None,
    }
}

#[test]
fn operations_agree_on_every_instruction_set() {
    for seed in 0..400 {
        let make = || Ops { a: values(3 * seed), b: values(3 * seed + 1), c: values(3 * seed + 2) };
        let reference = Level::scalar().dispatch(make());
        for (name, got) in &reference {
            if let Some(want) = expected(&make(), name) {
                for i in 0..LANES {
                    assert!(
                        same(got[i], want[i]),
                        "scalar {name} lane {i}: {} is not {}",
                        got[i],
                        want[i]
                    );
                }
            }
        }
        for level in Level::float_levels() {
            for ((name, got), (_, want)) in level.dispatch(make()).iter().zip(&reference) {
                for i in 0..LANES {
                    assert!(
                        same(got[i], want[i]),
                        "{} {name} lane {i}: {:?} is not {:?}",
                        level.isa(),
                        got[i],
                        want[i]
                    );
                }
            }
        }
    }
}

struct Halves<'a> {
    x: &'a [f32],
    n: usize,
}

impl Kernel for Halves<'_> {
    type Out = (Vec<u16>, Vec<f32>, Vec<f32>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let mut halves = [f16::from_bits(0x1234); LANES + 1];
        let mut floats = [7.0; LANES + 1];
        let mut whole = [9.0; LANES + 1];
        let v = s.load_slice(&self.x[..self.n]);
        s.store_slice(v, &mut whole);
        s.store_f16_slice(v, &mut halves[..self.n]);
        let back = s.load_f16_slice(&halves[..self.n]);
        s.store_slice(back, &mut floats[..self.n]);
        let bits = halves.iter().map(|h| h.to_bits()).collect();
        (bits, floats.to_vec(), whole.to_vec())
    }
}

#[test]
fn partial_and_half_precision_memory() {
    for seed in 0..60 {
        let x: Vec<f32> = values(seed)
            .iter()
            .enumerate()
            .map(|(i, v)| {
                if seed % 2 == 0 && v.is_finite() {
                    // Halfway cases, subnormal halves and the edge of the range.
                    [2049.0, 2051.0, 65504.0, 65519.9, 65520.0, 6e-8, 3e-8, 1e-5][i % 8]
                        * v.signum()
                } else {
                    *v
                }
            })
            .collect();
        for n in 0..=LANES {
            for level in Level::float_levels() {
                let (bits, floats, whole) = level.dispatch(Halves { x: &x, n });
                for i in 0..LANES {
                    let want = f16::from_f32_const(x[i]);
                    if i < n {
                        let got = f16::from_bits(bits[i]);
                        assert!(
                            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                            "{} {:?}: {bits:?}",
                            level.isa(),
                            x[i]
                        );
                        assert!(same(floats[i], want.to_f32()));
                        assert!(same(whole[i], x[i]));
                    } else {
                        assert_eq!(bits[i], 0x1234, "{} wrote past {n}", level.isa());
                        assert_eq!(floats[i], 7.0, "{} wrote past {n}", level.isa());
                        assert_eq!(whole[i], 0.0, "{} lane {i} of {n}", level.isa());
                    }
                }
                assert_eq!(bits[LANES], 0x1234);
                assert_eq!(whole[LANES], 9.0);
            }
        }
    }
}

struct Words {
    x: [f32; LANES],
    by: i16,
    zero: i16,
    n: usize,
}

impl Kernel for Words {
    type Out = ([i16; LANES + 1], [u8; LANES], [u8; LANES]);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let mut words = [77; LANES + 1];
        s.round_words_slice(s.load_slice(&self.x), &mut words[..self.n]);
        let (mut unsigned, mut signed) = ([0; LANES], [0; LANES]);
        // SAFETY: sixteen words and bytes each.
        unsafe {
            let a = s.load_words(words.as_ptr());
            // Four of the largest words fit.
            let two = s.add_words(a, a);
            let four = s.sub_words(two, s.sub_words(s.splat_words(0), two));
            let (by, zero) = (s.splat_words(self.by), s.splat_words(self.zero));
            s.scale_words::<false>(four, by, zero, unsigned.as_mut_ptr());
            let zero = s.sub_words(zero, s.splat_words(128));
            s.scale_words::<true>(four, by, zero, signed.as_mut_ptr());
        }
        (words, unsigned, signed)
    }
}

#[test]
fn words_round_to_even_and_become_the_same_bytes_everywhere() {
    let special = [
        0.0,
        -0.0,
        0.5,
        1.5,
        -0.5,
        -2.5,
        8190.5,
        8191.5,
        -8191.4,
        -8192.0,
        3e9,
        -3e9,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    let spread: [f32; LANES] = std::array::from_fn(|i| (i as f32 - 7.3) * 61.7);
    for x in [special, spread] {
        for by in [1, 2, 97, 2048, 16384, 32767] {
            for zero in [0, 1, 128, 255] {
                for n in [1, 7, 15, 16] {
                    let words: Vec<i16> = x[..n]
                        .iter()
                        .map(|x| (x.round_ties_even() as i32).clamp(-8191, 8191) as i16)
                        .collect();
                    for level in Level::available() {
                        let (found, unsigned, signed) = level.dispatch(Words { x, by, zero, n });
                        assert_eq!(found[..n], words, "{}", level.isa());
                        assert_eq!(
                            found[n..],
                            [77; LANES + 1][n..],
                            "{} wrote past {n}",
                            level.isa()
                        );
                        for i in 0..LANES {
                            let scaled =
                                (4 * i32::from(found[i]) * i32::from(by) + (1 << 14)) >> 15;
                            let byte = (scaled + i32::from(zero)).clamp(0, 255);
                            assert_eq!(i32::from(unsigned[i]), byte, "{} lane {i}", level.isa());
                            let less = i32::from(signed[i].cast_signed());
                            assert_eq!(less, byte - 128, "{} lane {i}", level.isa());
                        }
                    }
                }
            }
        }
    }
}

struct Quantize {
    x: [f32; LANES],
    zero: i32,
    n: usize,
}

impl Kernel for Quantize {
    type Out = ([u8; LANES + 1], [u8; LANES + 1]);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let mut out = ([77; LANES + 1], [77; LANES + 1]);
        let v = s.load_slice(&self.x);
        s.quantize_slice::<false>(v, self.zero, &mut out.0[..self.n]);
        s.quantize_slice::<true>(v, self.zero - 128, &mut out.1[..self.n]);
        out
    }
}

#[test]
fn quantizing_rounds_to_even_and_saturates_everywhere() {
    let special = [
        0.0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        0.49999997,
        254.5,
        255.5,
        256.0,
        -127.5,
        -128.5,
        1e9,
        -1e9,
        2147483520.0,
        2147483648.0,
        -2147483648.0,
        -2147483904.0,
        4294967296.0,
        1e30,
        -1e30,
        f32::MAX,
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -f32::NAN,
        1e-45,
        8388609.0,
        16777217.0,
    ];
    let mut cases: Vec<[f32; LANES]> =
        special.chunks(LANES).map(|c| c.try_into().unwrap()).collect();
    cases.extend((0..400).map(|seed| {
        let mut x = values(seed);
        for (i, v) in x.iter_mut().enumerate() {
            if v.is_finite() && i % 4 != 0 {
                // Around the range, many of them halves.
                *v = (*v * 1000.0).rem_euclid(300.0).mul_add(2.0, -300.0).round() / 2.0;
            }
        }
        x
    }));
    for (i, x) in cases.into_iter().enumerate() {
        for zero in [0, 1, 127, 128, 254, 255] {
            let n = if i % 3 == 0 { i % (LANES + 1) } else { LANES };
            for level in Level::float_levels() {
                let (unsigned, signed) = level.dispatch(Quantize { x, zero, n });
                for lane in 0..=LANES {
                    if lane >= n {
                        assert_eq!((unsigned[lane], signed[lane]), (77, 77), "wrote past {n}");
                        continue;
                    }
                    // In double precision everything is exact; a NaN counts as 0.
                    let v = f64::from(x[lane]);
                    let v = if v.is_nan() { 0.0 } else { v.round_ties_even() };
                    let want = (v + f64::from(zero)).clamp(0.0, 255.0) as u8;
                    let what = format!("{} {} + {zero}", level.isa(), x[lane]);
                    assert_eq!(unsigned[lane], want, "{what}");
                    assert_eq!(signed[lane], want.wrapping_sub(128), "{what}, signed");
                }
            }
        }
    }
}

struct FloatOf([i32; LANES]);

impl Kernel for FloatOf {
    type Out = [f32; LANES];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let mut out = [0.0; LANES];
        // SAFETY: the array holds 16 elements.
        let v = unsafe { s.load_i(self.0.as_ptr()) };
        s.store_slice(s.float_of(v), &mut out);
        out
    }
}

#[test]
fn integers_become_the_nearest_floats() {
    let x = [
        0,
        1,
        -1,
        i32::MAX,
        i32::MIN,
        16_777_217,
        16_777_219,
        -16_777_217,
        33_554_434,
        33_554_438,
        123_456_789,
        -987_654_321,
        2_147_483_584,
        2_147_483_583,
        255,
        -128,
    ];
    for level in Level::float_levels() {
        let got = level.dispatch(FloatOf(x));
        for (got, x) in got.iter().zip(x) {
            assert_eq!(got.to_bits(), (x as f32).to_bits(), "{} {x}", level.isa());
        }
    }
}

struct Exp([f32; LANES]);

impl Kernel for Exp {
    type Out = [[f32; LANES]; 3];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let mut out = [[0.0; LANES]; 3];
        let x = s.load_slice(&self.0);
        s.store_slice(math::exp(s, x), &mut out[0]);
        s.store_slice(math::silu(s, x), &mut out[1]);
        s.store_slice(math::coarse_silu(s, x), &mut out[2]);
        out
    }
}

/// The error in units in the last place of the exact result.
fn ulps(got: f32, want: f64) -> f64 {
    let near = (want as f32).abs().max(f32::MIN_POSITIVE);
    let unit = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
    (f64::from(got) - want).abs() / unit
}

#[test]
fn exp_and_silu_keep_their_declared_error() {
    let level = Level::best();
    let (mut worst_exp, mut worst_silu, mut worst_coarse) = (0.0_f64, 0.0_f64, 0.0_f64);
    let mut x = -104.0_f32;
    // About two million points, denser near zero as floats are.
    let mut i = 0_u32;
    while x < 88.7 {
        let mut xs = [0.0; LANES];
        for v in &mut xs {
            *v = x;
            i = i.wrapping_add(1);
            x += 9.1e-5 + f32::from((i % 7) as u8) * 1e-6;
        }
        let [e, silu, coarse] = level.dispatch(Exp(xs));
        for k in 0..LANES {
            let exact = f64::from(xs[k]);
            worst_exp = worst_exp.max(ulps(e[k], exact.exp()));
            let wanted = exact / (1.0 + (-exact).exp());
            if exact > -87.0 {
                worst_silu = worst_silu.max(ulps(silu[k], wanted));
            }
            if exact > -60.0 && exact != 0.0 {
                worst_coarse = worst_coarse.max((f64::from(coarse[k]) / wanted - 1.0).abs());
            }
        }
    }
    println!("exp {worst_exp} ULP, silu {worst_silu} ULP, coarse silu {worst_coarse}");
    assert!(worst_exp <= 1.0, "exp is off by {worst_exp} ULP");
    assert!(worst_silu <= 2.5, "silu is off by {worst_silu} ULP");
    assert!(worst_coarse <= 5e-6, "the coarse silu is off by {worst_coarse} of its value");
}

struct Silu([f32; LANES]);

impl Kernel for Silu {
    type Out = ([f32; LANES], [f32; LANES]);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let mut out = ([0.0; LANES], [0.0; LANES]);
        let x = s.load_slice(&self.0);
        s.store_slice(math::silu(s, x), &mut out.0);
        // Its definition, by way of the general exponential.
        let x = s.at_least(x, s.splat(f32::MIN));
        let e = math::exp(s, s.sub(s.splat(0.0), x));
        s.store_slice(s.div(x, s.add(s.splat(1.0), e)), &mut out.1);
        out
    }
}

#[test]
fn silu_is_its_definition_to_the_bit() {
    for level in Level::float_levels() {
        // Every 4099th float, of both signs: all exponents, the infinities' neighbours and NaNs.
        let mut bits = 0_u32;
        while bits < u32::MAX - 4099 * LANES as u32 {
            let x = std::array::from_fn(|i| f32::from_bits(bits + 4099 * i as u32));
            bits += 4099 * LANES as u32;
            let (got, want) = level.dispatch(Silu(x));
            for i in 0..LANES {
                let same =
                    got[i].to_bits() == want[i].to_bits() || got[i].is_nan() && want[i].is_nan();
                assert!(same, "{} silu({:e}): {:e}, not {:e}", level.isa(), x[i], got[i], want[i]);
            }
        }
    }
}

#[test]
fn exp_and_silu_at_the_edges() {
    for level in Level::float_levels() {
        let inf = f32::INFINITY;
        let [e, silu, coarse] = level.dispatch(Exp([
            0.0,
            -0.0,
            inf,
            -inf,
            f32::NAN,
            88.72,
            88.73,
            -103.0,
            -104.5,
            1e30,
            -1e30,
            -88.0,
            -100.0,
            1e-40,
            20.0,
            f32::MIN,
        ]));
        assert_eq!(e[0], 1.0);
        assert_eq!(e[1], 1.0);
        assert_eq!(e[2], inf);
        assert_eq!(e[3], 0.0);
        assert!(e[4].is_nan());
        assert!(e[5].is_finite() && e[6] == inf);
        assert!(e[7] > 0.0 && e[8] == 0.0);
        assert_eq!(e[9], inf);
        assert_eq!(e[10], 0.0);
        assert_eq!(silu[0], 0.0);
        assert_eq!(silu[2], inf);
        assert_eq!(silu[3].to_bits(), (-0.0_f32).to_bits());
        assert!(silu[4].is_nan());
        assert_eq!(silu[9], 1e30);
        assert_eq!(silu[10].to_bits(), (-0.0_f32).to_bits());
        assert_eq!(silu[15].to_bits(), (-0.0_f32).to_bits());
        assert!(silu[11] < 0.0 && silu[12] == 0.0);
        assert_eq!(coarse[0], 0.0);
        assert_eq!(coarse[2], inf);
        assert!(coarse[4].is_nan());
        assert!((coarse[9] / 1e30 - 1.0).abs() < 5e-6);
        for i in [3, 7, 8, 10, 11, 12, 15] {
            assert!((-1e-24..0.0).contains(&coarse[i]), "{:e}", coarse[i]);
        }
    }
}

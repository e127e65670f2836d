//! The choice of ranges, on distributions whose answers are known.

use super::*;

/// A histogram of `n` values that `draw` makes of evenly spaced shares 0 to 1.
fn of(n: usize, draw: impl Fn(f64) -> f64) -> (Histogram, Vec<f64>) {
    let values: Vec<f64> = (0..n).map(|i| draw((i as f64 + 0.5) / n as f64)).collect();
    let lo = values.iter().copied().fold(f64::INFINITY, f64::min);
    let hi = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut h = Histogram::new(lo as f32, hi as f32);
    for v in &values {
        h.add(((v - h.lo()) * h.per_unit()).max(0.0) as usize, 1);
    }
    (h, values)
}

/// A logistic distribution (tails like exp(−|x|)) through SiLU, as convolutions read it.
fn silu(u: f64) -> f64 {
    let x = 1.2 * (u / (1.0 - u)).ln();
    x / (1.0 + (-x).exp())
}

fn quantize(x: f64, (s, z): (f32, u8)) -> f64 {
    let q = (x / f64::from(s)).round_ties_even() + f64::from(z);
    (q.clamp(0.0, 255.0) - f64::from(z)) * f64::from(s)
}

fn mse(values: &[f64], range: (f32, u8)) -> f64 {
    values.iter().map(|&x| (x - quantize(x, range)).powi(2)).sum::<f64>() / values.len() as f64
}

#[test]
fn zero_is_a_level_of_every_range() {
    for (lo, hi) in
        [(-0.278, 5.0), (0.0, 3.0), (-7.0, 0.0), (-1e-3, 900.0), (-1.0, 1.0), (0.5, 2.0)]
    {
        let (scale, zero) = cover(lo, hi).unwrap();
        assert!(scale.is_normal() && scale > 0.0);
        // What the kernel computes for 0: round(0 · 1/scale) + zero point, which dequantizes to 0.
        assert_eq!(
            (0.0f32 * (1.0 / scale)).round_ties_even() as i32 + i32::from(zero),
            i32::from(zero)
        );
        let (least, most) =
            (-f64::from(zero) * f64::from(scale), f64::from(255 - zero) * f64::from(scale));
        let half = f64::from(scale) / 2.0 * 1.0001;
        assert!(
            least <= f64::min(lo, 0.0) + half && most >= hi - half,
            "{lo} {hi}: {least} {most}"
        );
    }
    assert_eq!(cover(0.0, 2.55).unwrap().1, 0, "nothing below 0: the whole range is above");
    assert_eq!(cover(-2.55, 0.0).unwrap().1, 255);
}

#[test]
fn a_point_has_no_range() {
    assert_eq!(cover(0.0, 0.0), None);
    assert_eq!(cover(0.0, 1e-35), None);
    assert_eq!(cover(f64::NEG_INFINITY, 1.0), None);
    let mut zero = Histogram::new(0.0, 0.0);
    zero.add(0, 100);
    assert_eq!(ranges(&zero, 99.99, least_error(&zero)), None);
    // A constant other than 0 is no point: 0 and the constant are both in its range.
    let mut five = Histogram::new(5.0, 5.0);
    five.add(BINS - 1, 100);
    let r = ranges(&five, 99.99, least_error(&five)).unwrap();
    for method in Method::ALL {
        let r = r.by(method);
        assert!((quantize(5.0, (r.scale, r.zero_point)) - 5.0).abs() < 0.02, "{method}: {r:?}");
    }
}

#[test]
fn the_error_is_that_of_the_values() {
    let (h, values) = of(200_000, silu);
    for (lo, hi) in [(h.lo(), h.hi()), (-0.278, 4.0), (-0.1, 2.0), (-0.278, 30.0)] {
        let range = cover(lo, hi).unwrap();
        let (found, expected) = (h.error(range.0, range.1), mse(&values, range));
        assert!((found / expected - 1.0).abs() < 0.03, "{lo} {hi}: {found} {expected}");
    }
    // Values spread evenly have the textbook's error: s² / 12.
    let (even, _) = of(400_000, |u| u * 2.0 - 0.5);
    let (s, z) = cover(even.lo(), even.hi()).unwrap();
    let textbook = f64::from(s) * f64::from(s) / 12.0;
    assert!((even.error(s, z) / textbook - 1.0).abs() < 0.01);
}

#[test]
fn the_least_squares_range_is_the_least_of_all() {
    let laplace = |u: f64| if u < 0.5 { (2.0 * u).ln() } else { -(2.0 * (1.0 - u)).ln() };
    let spiky = |u: f64| if u > 0.9999 { 400.0 } else { u - 0.5 };
    for (name, draw) in [
        ("silu", &silu as &dyn Fn(f64) -> f64),
        ("laplace", &laplace),
        ("spiky", &spiky),
        ("even", &|u| u),
        ("negative", &|u: f64| -(-(1.0 - u).ln()).sqrt()),
    ] {
        let (h, values) = of(60_000, draw);
        let found = ranges(&h, 99.99, least_error(&h)).unwrap();
        let chosen = mse(&values, (found.mse.scale, found.mse.zero_point));
        // Every range on a grid of both ends, measured on the values themselves.
        let mut least = f64::INFINITY;
        for i in 0..=24 {
            for j in 0..=120 {
                let (lo, hi) = (h.lo() * f64::from(i) / 24.0, h.hi() * f64::from(j) / 120.0);
                if let Some((s, z)) = cover(lo, hi) {
                    least = least.min(h.error(s, z));
                }
            }
        }
        assert!(chosen <= least * 1.03 + 1e-12, "{name}: {chosen}, brute force finds {least}");
        for method in Method::ALL {
            assert!(f64::from(found.by(method).error) >= f64::from(found.mse.error) * 0.999);
        }
    }
}

#[test]
fn a_percentile_leaves_out_just_the_tails() {
    let (h, values) = of(100_000, |u| (u - 0.3) * 10.0);
    let r = ranges(&h, 99.0, least_error(&h)).unwrap().percentile;
    let (least, most) = (
        -f64::from(r.zero_point) * f64::from(r.scale),
        f64::from(255 - r.zero_point) * f64::from(r.scale),
    );
    let outside = values.iter().filter(|&&v| v < least || v > most).count();
    assert!((700..=1300).contains(&outside), "{outside} of 100000 outside {least}..{most}");
    let all = ranges(&h, 100.0, least_error(&h)).unwrap();
    assert_eq!(all.percentile, all.minmax);
    // One value in a million is not 0: its percentile is no range, its extent is.
    let (rare, _) = of(1_000_000, |u| if u > 0.999_999 { 3.0 } else { 0.0 });
    assert!(ranges(&rare, 99.99, least_error(&rare)).unwrap().percentile.scale > 0.0);
}

#[test]
fn entropy_cuts_lone_outliers_and_keeps_a_full_range() {
    let (h, _) = of(200_000, |u| if u > 0.99999 { 60.0 } else { silu(u) });
    let r = ranges(&h, 99.99, least_error(&h)).unwrap().entropy;
    let extent = f64::from(r.scale) * 255.0;
    assert!((7.0..30.0).contains(&extent), "{extent}: all but two values are below 14");
    let (even, _) = of(200_000, |u| u);
    let r = ranges(&even, 99.99, least_error(&even)).unwrap().entropy;
    assert!(f64::from(r.scale) * 255.0 > 0.95, "{r:?}");
}

/// What is skipped by the bound is skipped rightly.
#[test]
fn clipping_alone_is_never_more_than_the_error() {
    let mut state = 9u64;
    let mut next = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    for (lo, hi) in [(-0.3f32, 9.0f32), (-5.0, 4.0), (0.0, 1e-3), (-2e6, 0.0)] {
        let mut h = Histogram::new(lo, hi);
        for _ in 0..3000 {
            let at = next() * next() * next();
            h.add((at * BINS as f64) as usize, 1 + (next() * 50.0) as u64);
        }
        let tails = Tails::new(&h);
        let mut clipped = 0;
        for _ in 0..200 {
            let Some((s, z)) = cover(f64::from(lo) * next(), f64::from(hi) * next()) else {
                continue;
            };
            let (bound, error) = (tails.clipping(s, z), h.error(s, z));
            assert!(bound <= error * 1.0001, "{bound} {error}");
            clipped += usize::from(bound > error * 0.5);
        }
        assert!(clipped > 20, "the bound is of use: {clipped}");
    }
}

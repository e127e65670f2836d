//! Observers against the definitions, at channel counts around the lanes.

use super::pairs::{Extremes, Pairs, SQUARE_KINDS, Squares};
use super::*;

fn map(pixels: usize, channels: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..pixels * channels)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * (1.0 + (i % channels) as f32) - 0.7
        })
        .collect()
}

/// The moments of a map whose rows are `w` pixels.
fn moments(map: &[f32], channels: usize, w: usize) -> Result<Moments, f32> {
    let mut m = Moments::new(channels);
    map.chunks(w * channels).try_for_each(|row| m.add(row))?;
    Ok(m)
}

#[test]
fn moments_are_those_of_the_definition() {
    for channels in [1, 3, 15, 16, 17, 40] {
        let (h, w) = (7, 9);
        let map = map(h * w, channels, 5);
        let m = moments(&map, channels, w).unwrap();
        assert_eq!(m.pixels, 63);
        let at = |y: usize, x: usize, c: usize| f64::from(map[(y * w + x) * channels + c]);
        let (mut covariance, mut variance) = (0.0, 0.0);
        for c in 0..channels {
            let all: Vec<f64> = (0..h * w).map(|p| f64::from(map[p * channels + c])).collect();
            let mean = all.iter().sum::<f64>() / 63.0;
            let square = all.iter().map(|v| v * v).sum::<f64>() / 63.0;
            assert!((m.mean(c) - mean).abs() < 1e-5 * (1.0 + mean.abs()), "{channels} {c}");
            assert!((m.mean_square(c) - square).abs() < 1e-5 * (1.0 + square), "{channels} {c}");
            let lo = all.iter().copied().fold(f64::INFINITY, f64::min);
            let hi = all.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!((f64::from(m.min[c]), f64::from(m.max[c])), (lo, hi));
            assert_eq!(f64::from(m.largest(c)), lo.abs().max(hi.abs()));
            let pairs = (0..h).flat_map(|y| (0..w - 1).map(move |x| (y, x)));
            covariance += pairs.map(|(y, x)| at(y, x, c) * at(y, x + 1, c)).sum::<f64>()
                / (h * (w - 1)) as f64
                - mean * mean;
            variance += square - mean * mean;
        }
        let expected = (covariance / variance).clamp(0.0, 1.0);
        assert!((m.neighbour() - expected).abs() < 1e-4, "{channels}");
    }
}

#[test]
fn a_smooth_map_is_correlated_and_noise_is_not() {
    let smooth: Vec<f32> = (0..64 * 64).map(|i| ((i % 64) as f32 * 0.1).sin()).collect();
    let m = moments(&smooth, 1, 64).unwrap();
    assert!(m.neighbour() > 0.98, "{}", m.neighbour());
    let m = moments(&map(4096, 4, 9), 4, 64).unwrap();
    assert!(m.neighbour() < 0.05, "{}", m.neighbour());
    let one = moments(&map(5, 2, 1), 2, 1).unwrap();
    assert_eq!(one.neighbour(), 0.0, "no pixel has a neighbour");
}

#[test]
fn a_value_that_no_range_can_hold_is_returned() {
    for channels in [3, 16, 20] {
        for place in [0, 1, 17 * channels, 40 * channels - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e20, -3e38] {
                let mut map = map(40, channels, 2);
                map[place] = bad;
                let found = moments(&map, channels, 8).unwrap_err();
                assert_eq!(found.to_bits(), bad.to_bits(), "{channels} {place}");
            }
        }
    }
}

#[test]
fn every_value_lands_in_its_bin() {
    for channels in [1, 5, 16, 33] {
        let map = map(200, channels, 77);
        let m = moments(&map, channels, 10).unwrap();
        let scale: Vec<f32> = (0..channels).map(|c| 1.0 / (1.0 + c as f32)).collect();
        for e in [None, Some(&scale[..])] {
            let mut s = Spread::new(&m, e);
            let mut counts = Counts::default();
            map.chunks(10 * channels).for_each(|row| s.add(row, &mut counts));
            let h = s.finish();
            assert_eq!(h.samples(), map.len() as u64);
            let mut expected = Histogram::new(h.lo() as f32, h.hi() as f32);
            for (i, &x) in map.iter().enumerate() {
                let v = f64::from(x) * f64::from(e.map_or(1.0, |e| e[i % channels]));
                expected.add(((v - h.lo()) * h.per_unit()).max(0.0) as usize, 1);
            }
            // A value within a rounding of a bin's edge may lie on its other side.
            let (a, b) = (h.error(0.01, 80), expected.error(0.01, 80));
            assert!((a / b - 1.0).abs() < 1e-3, "{a} {b}");
        }
    }
}

#[test]
fn parts_add_up_to_the_whole() {
    let channels = 19;
    let (a, b) = (map(64, channels, 1), map(32, channels, 2));
    let mut first = moments(&a, channels, 8).unwrap();
    let second = moments(&b, channels, 8).unwrap();
    let both = moments(&[a, b].concat(), channels, 8).unwrap();
    first.merge(&second);
    assert_eq!((first.pixels, first.pairs), (96, 84));
    assert_eq!((&first.min, &first.max), (&both.min, &both.max));
    for c in 0..channels {
        assert!((first.mean(c) - both.mean(c)).abs() < 1e-12);
    }
}

#[test]
fn pairs_are_those_of_the_definition() {
    for (w, pad) in [(8, [1, 1]), (7, [1, 1]), (6, [0, 0]), (5, [0, 2]), (4, [2, 1]), (1, [1, 1])] {
        let channels = 5;
        let row = map(w, channels, 3);
        let [left, right] = pad;
        let x = |i: usize, c: usize| match i.checked_sub(left) {
            Some(i) if i < w => row[i * channels + c],
            _ => 0.0,
        };
        // Every output but the second of a last pair that has only one.
        let outputs = w + left + right - 2;
        let (mut apart, mut sums, mut differences) = (Vec::new(), Vec::new(), Vec::new());
        for o in 0..outputs {
            apart.extend((0..channels).map(|c| x(o, c) - x(o + 2, c)));
            if o % 2 == 0 {
                sums.extend((0..channels).map(|c| x(o + 1, c) + x(o + 2, c)));
                differences.extend((0..channels).map(|c| x(o + 2, c) - x(o + 1, c)));
            }
        }
        let mut pairs = Pairs::default();
        pairs.of(&map(20, channels, 4), channels, [1, 1]);
        let found = pairs.of(&row, channels, pad);
        assert_eq!(found, &[apart, sums, differences], "{w} {pad:?}");
    }
}

/// Maps one after the other, row by row, against sums over each map.
#[test]
fn squares_are_those_of_the_definition() {
    let channels = 3;
    let mut squares = Squares::default();
    for (h, w, pad) in
        [(8, 6, [1, 1, 1, 1]), (7, 5, [1, 1, 1, 1]), (4, 4, [0, 0, 0, 0]), (5, 3, [2, 1, 0, 2])]
    {
        let [top, left, bottom, right] = pad;
        let map = map(h * w, channels, 5);
        let x = |y: usize, x: usize, c: usize| match (y.checked_sub(top), x.checked_sub(left)) {
            (Some(y), Some(x)) if y < h && x < w => map[(y * w + x) * channels + c],
            _ => 0.0,
        };
        // Along an axis: two apart from every output, sums and differences from every other one.
        let along = |kind: usize, at: usize, x: &dyn Fn(usize) -> f32| match kind {
            0 => Some(x(at) - x(at + 2)),
            _ if at % 2 == 1 => None,
            1 => Some(x(at + 1) + x(at + 2)),
            _ => Some(x(at + 2) - x(at + 1)),
        };
        let mut want = vec![Vec::new(); SQUARE_KINDS];
        for (kind, want) in want.iter_mut().enumerate() {
            for y in 0..h + top + bottom - 2 {
                for at in 0..w + left + right - 2 {
                    for c in 0..channels {
                        let column = |at: usize| along(kind / 3, y, &|y| x(y, at, c));
                        if column(at).is_some() {
                            want.extend(along(kind % 3, at, &|at| column(at).unwrap()));
                        }
                    }
                }
            }
        }
        let mut found = vec![Vec::new(); SQUARE_KINDS];
        let mut pairs = Pairs::default();
        squares.begin(top);
        assert!(!squares.has_rows());
        for row in map.chunks(w * channels) {
            let row = pairs.of(row, channels, [left, right]);
            squares.add(row, &mut |kind, row| found[kind].extend_from_slice(row));
        }
        assert!(squares.has_rows());
        squares.end(bottom, &mut |kind, row| found[kind].extend_from_slice(row));
        for (kind, (found, want)) in found.iter().zip(&want).enumerate() {
            assert_eq!(found.len(), want.len(), "kind {kind} of {h} x {w}");
            let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
            assert!(found.iter().zip(want).all(close), "kind {kind} of {h} x {w}, {pad:?}");
        }
    }
}

#[test]
fn extremes_hold_zero_and_every_pixel() {
    for channels in [1, 3, 16, 19] {
        let map = map(30, channels, 8);
        let mut e = Extremes::new(channels);
        map.chunks(10 * channels).for_each(|part| e.add(part));
        for c in 0..channels {
            let all = || map.iter().skip(c).step_by(channels).copied();
            assert_eq!(e.min[c], all().fold(0f32, f32::min));
            assert_eq!(e.max[c], all().fold(0f32, f32::max));
        }
    }
}

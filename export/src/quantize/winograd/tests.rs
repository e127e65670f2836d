//! Winograd's weights against the direct convolution, and what is promised of their noise against what is measured.

use super::*;
use crate::Glob;
use latile_calibration::table::{Datum, ModelId, Sampling, VERSION};
use latile_calibration::{GroupTable, Method, Ranges, SquareRanges, Table, WinogradRanges};
use latile_runtime::graph::{Pad, ValueId, WeightId};

/// Numbers from −1 to 1 (Knuth's MMIX generator).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / f64::from(1u32 << 23) - 1.0
    }

    /// Of variance 1.
    fn unit(&mut self) -> f64 {
        self.next() * 3f64.sqrt()
    }

    fn vector(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32).collect()
    }
}

/// What each point multiplies, of the four pixels that two outputs see.
fn points(x: [f64; 4]) -> [f64; 4] {
    [x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]]
}

fn outputs(m: [f64; 4]) -> [f64; 2] {
    [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
}

/// Points of rows.
const POINTS: usize = Algorithm::Rows.points();

#[test]
fn four_products_make_the_two_outputs_of_six() {
    let (n, c, m) = (5, 3, 16);
    let weights = Numbers(1).vector(n * c * WINDOW);
    let mut transformed = weights.clone();
    transform(Algorithm::Rows, &mut transformed, m * c);
    assert_eq!(transformed.len(), POINTS * m * c * SIDE);
    let filter = |point: usize, o: usize| &transformed[(point * m + o) * c * SIDE..][..c * SIDE];
    assert!((0..POINTS).all(|k| (n..m).all(|o| filter(k, o).iter().all(|&w| w == 0.0))));
    let mut numbers = Numbers(2);
    for o in 0..n {
        let (mut direct, mut products) = ([0.0; 2], [0.0; 4]);
        for i in 0..c * SIDE {
            let x = [(); 4].map(|()| numbers.next());
            let g = &weights[o * c * WINDOW + i * SIDE..][..SIDE];
            for (shift, y) in direct.iter_mut().enumerate() {
                *y += (0..SIDE).map(|k| f64::from(g[k]) * x[k + shift]).sum::<f64>();
            }
            let seen = points(x);
            for (k, product) in products.iter_mut().enumerate() {
                *product += f64::from(filter(k, o)[i]) * seen[k];
            }
        }
        for (a, b) in outputs(products).iter().zip(direct) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
}

/// The sixteen points of what a square sees, and its four outputs from sixteen products, rows first.
fn square_points(x: [[f64; 4]; 4]) -> [[f64; 4]; 4] {
    let columns = [0, 1, 2, 3].map(|i| points(x.map(|row| row[i])));
    [0, 1, 2, 3].map(|k| points(columns.map(|column| column[k])))
}

fn square_outputs(m: [[f64; 4]; 4]) -> [[f64; 2]; 2] {
    let rows = m.map(outputs);
    let [left, right] = [0, 1].map(|i| outputs(rows.map(|row| row[i])));
    [[left[0], right[0]], [left[1], right[1]]]
}

#[test]
fn sixteen_products_make_the_four_outputs_of_thirty_six() {
    let (n, c, m) = (3, 2, 16);
    let weights = Numbers(3).vector(n * c * WINDOW);
    let mut transformed = weights.clone();
    transform(Algorithm::Square, &mut transformed, m * c);
    assert_eq!(transformed.len(), 16 * m * c);
    let mut numbers = Numbers(4);
    for o in 0..n {
        let (mut direct, mut products) = ([[0.0; 2]; 2], [[0.0; 4]; 4]);
        for i in 0..c {
            let x = [(); 4].map(|()| [(); 4].map(|()| numbers.next()));
            let g = &weights[(o * c + i) * WINDOW..][..WINDOW];
            for (down, row) in direct.iter_mut().enumerate() {
                for (across, y) in row.iter_mut().enumerate() {
                    *y += (0..WINDOW)
                        .map(|k| f64::from(g[k]) * x[down + k / 3][across + k % 3])
                        .sum::<f64>();
                }
            }
            for (k, seen) in square_points(x).as_flattened().iter().enumerate() {
                products[k / 4][k % 4] += f64::from(transformed[(k * m + o) * c + i]) * seen;
            }
        }
        for (a, b) in square_outputs(products).as_flattened().iter().zip(direct.as_flattened()) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
}

/// What F(2 × 2, 3 × 3) promises of its noise, against what white pixels make of it.
#[test]
fn the_promised_noise_of_squares_is_the_measured_one() {
    let (n, c, m, mean) = (4, 6, 16, 0.6);
    let square = vec![(mean * mean + 1.0) as f32; c];
    let input = Input::new(None, &vec![mean as f32; c], &square, 0.0);
    let weights = Numbers(15).vector(n * c * WINDOW);
    let mut stored = weights.clone();
    let q = quantize(Algorithm::Square, &mut stored, &input).unwrap();
    assert_eq!((q.scale.len(), q.sum.len(), q.bias.len(), stored.len()), (256, 256, n, 256 * c));
    let steps: [f64; WINDOW] = [0.11, 0.15, 0.06, 0.13, 0.2, 0.1, 0.07, 0.1, 0.05];
    let measured = |round: bool| {
        let (mut numbers, mut noise, draws) = (Numbers(99), 0.0, 3000);
        for _ in 0..draws {
            let seen: Vec<[[f64; 4]; 4]> =
                (0..c).map(|_| [(); 4].map(|()| [(); 4].map(|()| mean + numbers.unit()))).collect();
            for o in 0..n {
                let mut products = [[0.0; 4]; 4];
                let mut direct = [[0.0; 2]; 2];
                for (i, x) in seen.iter().enumerate() {
                    let g = &weights[(o * c + i) * WINDOW..][..WINDOW];
                    for (at, y) in direct.as_flattened_mut().iter_mut().enumerate() {
                        *y += (0..WINDOW)
                            .map(|k| f64::from(g[k]) * x[at / 2 + k / 3][at % 2 + k % 3])
                            .sum::<f64>();
                    }
                    for (k, d) in square_points(*x).as_flattened().iter().enumerate() {
                        let step = steps[kind_of(Algorithm::Square, k).0];
                        let d = if round { (d / step).round_ties_even() * step } else { *d };
                        let row = k * m + o;
                        let w = f64::from(stored[row * c + i]) * f64::from(q.scale[row]);
                        products[k / 4][k % 4] += w * d;
                    }
                }
                let made = square_outputs(products);
                for (a, b) in made.as_flattened().iter().zip(direct.as_flattened()) {
                    noise += (a + f64::from(q.bias[o]) - b).powi(2) / 4.0;
                }
            }
        }
        noise / f64::from(draws)
    };
    let rounded = measured(false);
    let ratio = q.power.weights / rounded;
    assert!((0.85..1.5).contains(&ratio), "{ratio}");
    let errors = steps.map(|s| s * s / 12.0);
    let promised: f64 = q.power.gain.iter().zip(errors).map(|(g, e)| g * e).sum();
    let found = measured(true) - rounded;
    assert!((0.85..1.15).contains(&(promised / found)), "{promised} {found}");
    let white: f64 = weights.iter().map(|&w| f64::from(w).powi(2)).sum();
    let equal = input_error(&errors.map(range)) * white;
    assert!((0.8..1.25).contains(&(equal / promised)), "{equal} {promised}");
}

/// Inputs as calibration describes them: of variance 1 and mean `mean`, rows with the correlation ρ between each two
/// of them, and ρ to the distance along each.
fn windows(numbers: &mut Numbers, c: usize, mean: f64, rho: f64) -> Vec<[f64; 4]> {
    let mut row = || {
        let mut x = [numbers.unit(); 4];
        for i in 1..4 {
            x[i] = rho * x[i - 1] + (1.0 - rho * rho).sqrt() * numbers.unit();
        }
        x
    };
    let mut all = Vec::new();
    for _ in 0..c {
        let common = row();
        for _ in 0..SIDE {
            let own = row();
            let mix = |i: usize| mean + rho.sqrt() * common[i] + (1.0 - rho).sqrt() * own[i];
            all.push([0, 1, 2, 3].map(mix));
        }
    }
    all
}

/// The mean square of both outputs' errors, all channels together, where each point's input is rounded to `steps`.
fn measured(
    weights: &[f32],
    stored: &[f32],
    q: &Quantized,
    steps: Option<[f64; 4]>,
    (c, mean, rho): (usize, f64, f64),
) -> f64 {
    let n = weights.len() / (c * WINDOW);
    let m = n.next_multiple_of(16);
    let (mut numbers, mut noise, draws) = (Numbers(77), 0.0, 4000);
    for _ in 0..draws {
        let windows = windows(&mut numbers, c, mean, rho);
        for o in 0..n {
            let (mut direct, mut products) = ([0.0; 2], [0.0; 4]);
            for (i, x) in windows.iter().enumerate() {
                let g = &weights[o * c * WINDOW + i * SIDE..][..SIDE];
                for (shift, y) in direct.iter_mut().enumerate() {
                    *y += (0..SIDE).map(|k| f64::from(g[k]) * x[k + shift]).sum::<f64>();
                }
                for (k, seen) in points(*x).into_iter().enumerate() {
                    let row = k * m + o;
                    let w = f64::from(stored[row * c * SIDE + i]) * f64::from(q.scale[row]);
                    let round = |step: f64| (seen / step).round_ties_even() * step;
                    products[k] += w * steps.map_or(seen, |s| round(s[k]));
                }
            }
            for (a, b) in outputs(products).iter().zip(direct) {
                noise += (a + f64::from(q.bias[o]) - b).powi(2) / 2.0;
            }
        }
    }
    noise / f64::from(draws)
}

#[test]
fn the_promised_noise_is_the_measured_one() {
    let (n, c) = (6, 5);
    for (mean, rho) in [(0.7, 0.8), (0.4, 0.3)] {
        let given = (c, mean, rho);
        let square = vec![(mean * mean + 1.0) as f32; c];
        let input = Input::new(None, &vec![mean as f32; c], &square, rho as f32);
        let weights = Numbers(5).vector(n * c * WINDOW);
        let mut stored = weights.clone();
        let q = quantize(Algorithm::Rows, &mut stored, &input).unwrap();
        let (rows, depth) = (4 * 16, c * SIDE);
        assert_eq!((q.scale.len(), q.sum.len(), q.bias.len()), (rows, rows, n));
        assert_eq!(stored.len(), rows * depth);
        for (i, row) in stored.chunks(depth).enumerate() {
            assert_eq!(row.iter().sum::<f32>(), q.sum[i]);
            assert!(row.iter().all(|w| w.abs() <= 127.0 && w.trunc() == *w));
            assert!(i % 16 < n || (q.scale[i], q.sum[i]) == (1.0, 0.0), "{i}");
        }
        // The reserve for other means makes the promise a little larger than the truth.
        let rounded = measured(&weights, &stored, &q, None, given);
        let ratio = q.power.weights / rounded;
        assert!((0.85..1.5).contains(&ratio), "{ratio} at {given:?}");
        assert!(q.power.weights < q.power.nearest);
        // Without the bias, the mean shows in both outputs.
        let shifted = Quantized { bias: vec![0.0; n], ..q.clone() };
        assert!(measured(&weights, &stored, &shifted, None, given) > rounded * 1.05);
        // Rounded inputs: each point's error is even within a step.
        let steps = [0.11, 0.15, 0.06, 0.11];
        let [e0, e1, e2] = [steps[0], steps[1], steps[2]].map(|s| s * s / 12.0);
        let promised = q.power.gain[0] * e0 + q.power.gain[1] * e1 + q.power.gain[2] * e2;
        let found = measured(&weights, &stored, &q, Some(steps), given) - rounded;
        assert!((0.85..1.15).contains(&(promised / found)), "{promised} {found} at {given:?}");
        // Weights as even as these have what the choice takes them to have.
        let white: f64 = weights.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
        let equal = input_error(&[e0, e1, e2].map(range)) * white;
        assert!((0.8..1.25).contains(&(equal / promised)), "{equal} {promised}");
    }
}

#[test]
fn the_input_scale_is_divided_out_first() {
    let (n, c) = (3, 2);
    let weights = Numbers(9).vector(n * c * WINDOW);
    let scale = vec![4.0f32, 0.125];
    let input = Input::new(Some(scale.clone()), &[0.5; 2], &[1.0; 2], 0.2);
    let (mut stored, mut plain) = (weights.clone(), weights.clone());
    let q = quantize(Algorithm::Rows, &mut stored, &input).unwrap();
    transform(Algorithm::Rows, &mut plain, 16 * c);
    for (row, (q_row, w_row)) in stored.chunks(c * SIDE).zip(plain.chunks(c * SIDE)).enumerate() {
        for (i, (q_w, w)) in q_row.iter().zip(w_row).enumerate() {
            let step = q.scale[row] * scale[i / SIDE];
            // Settled roundings are off by less than a step.
            assert!((q_w * step - w).abs() < step || q_w.abs() == 127.0, "{row} {i}");
        }
    }
    let tiny = Input::new(Some(vec![1.0, 1e-20]), &[0.0; 2], &[1.0; 2], 0.0);
    let mut bad = vec![0.0f32; n * c * WINDOW];
    bad[c * WINDOW + WINDOW + 4] = 1.0;
    // Named by its row of the window.
    assert_eq!(quantize(Algorithm::Rows, &mut bad, &tiny), Err(c * WINDOW + WINDOW + 3));
}

fn range(error: f64) -> Range {
    Range { scale: 0.1, zero_point: 7, error: error as f32 }
}

fn all(error: f64) -> Ranges {
    let range = range(error);
    Ranges { minmax: range, percentile: range, mse: range, entropy: range }
}

/// A layer with errors of its input in two groups, and of what Winograd's algorithm reads.
fn layer(errors: [[f64; 4]; 2]) -> LayerTable {
    let group = |[direct, apart, sum, difference]: [f64; 4]| GroupTable {
        samples: 9,
        min: -1.0,
        max: 1.0,
        power: 1.0,
        ranges: Some(all(direct)),
        winograd: Some(WinogradRanges {
            apart: all(apart),
            sum: all(sum),
            difference: all(difference),
        }),
        squares: None,
    };
    LayerTable {
        name: "mid.conv".into(),
        channels: 1,
        segments: vec![1],
        neighbour: 0.5,
        channel_max: vec![1.0],
        channel_mean: vec![0.0],
        channel_ms: vec![1.0],
        input_scale: None,
        loss: None,
        groups: errors.map(group).to_vec(),
    }
}

#[test]
fn the_worst_group_decides() {
    let conv = |kernel, stride| Node {
        name: "mid.conv".into(),
        op: Op::Conv2d {
            weight: WeightId(0),
            bias: None,
            kernel,
            stride,
            pad: Pad::all(1),
            quant: None,
        },
        inputs: vec![ValueId(0)],
        output: ValueId(1),
    };
    let table = Table {
        version: VERSION,
        model: ModelId { name: "m".into(), source_hash: "h".into() },
        data: vec![Datum { name: "a".into(), blake3: "b".into(), size: [1, 1] }],
        skipped: Vec::new(),
        sampling: Sampling {
            timesteps: Vec::new(),
            spacing: None,
            eta: 0.0,
            seed: 0,
            size: 64,
            percentile: 99.0,
        },
        components: Vec::new(),
    };
    let how = |winograd, keep: &str| Quantization {
        table: table.clone(),
        method: Method::Mse,
        keep_f16: Vec::new(),
        mixed: None,
        winograd,
        keep_direct: vec![Glob::new(keep)],
    };
    let node = conv([3, 3], [1, 1]);
    let decide = |layer: &LayerTable, winograd, keep| {
        decide(&node, Role::Unet, layer, &how(winograd, keep), ([96; 2], 1024)).unwrap()
    };
    // (3 + ¾ · 8 + ¾ · 4) / 3 = 4: 6.02 dB; the other group has 0 dB.
    let noisy = layer([[1.0, 1.5, 1.0, 1.0], [1.0, 3.0, 8.0, 4.0]]);
    let quiet = layer([[1.0, 1.5, 1.0, 1.0], [10.0, 19.5, 40.0, 13.0]]);
    let found = decide(&noisy, Winograd::Auto, "none");
    assert!((found.noise_db.unwrap() - 6.0206).abs() < 1e-3, "{found:?}");
    assert!(found.ways.is_empty() && found.why.unwrap().contains("6.0 dB"));
    let found = decide(&quiet, Winograd::Auto, "none");
    assert!(found.why.is_none() && found.noise_db.unwrap() < MOST_NOISE_DB, "{found:?}");
    assert_eq!(found.ways.len(), 1);
    assert_eq!(found.ways[0].ranges[3..], [19.5, 40.0, 13.0].map(range));
    assert!(!decide(&noisy, Winograd::All, "none").ways.is_empty());
    let why = |layer, winograd, keep| decide(layer, winograd, keep).why.unwrap();
    assert!(why(&quiet, Winograd::Off, "none").contains("--winograd off"));
    assert!(why(&quiet, Winograd::All, "unet.mid.*").contains("--keep-direct unet.mid.*"));
    let taken = |winograd, pixels| {
        let how = how(winograd, "none");
        !super::decide(&node, Role::Unet, &quiet, &how, ([96; 2], pixels)).unwrap().ways.is_empty()
    };
    assert!(taken(Winograd::All, 255) && !taken(Winograd::Auto, 255), "255 pixels are few");
    assert!(taken(Winograd::Auto, 256), "256 are not");
    // Squares come first where they are quiet, with words that suit all their bytes.
    let mut both = quiet.clone();
    for (group, error) in both.groups.iter_mut().zip([1.0, 10.0]) {
        group.squares = Some(SquareRanges([all(5.0 * error); 9]));
    }
    let ways = |layer: &LayerTable, winograd| -> Vec<Algorithm> {
        decide(layer, winograd, "none").ways.iter().map(|w| w.by).collect()
    };
    assert_eq!(ways(&both, Winograd::Auto), [Algorithm::Square, Algorithm::Rows]);
    assert_eq!(ways(&both, Winograd::Rows), [Algorithm::Rows]);
    let way = decide(&both, Winograd::Auto, "none").ways.remove(0);
    // (1 + ¾ + ¾)² / 9 · 5 = 3.47: 5.4 dB; words add 0.00625² / 3.
    assert!((way.noise_db - 5.406).abs() < 0.01, "{}", way.noise_db);
    assert_eq!(way.words, [0.1 / 16.0; 2]);
    let stored = way.stored();
    assert_eq!(stored.len(), 2 * Algorithm::Square.ranges());
    assert_eq!(stored[10], QuantRange { scale: 0.1 / 16.0, zero_point: 0 });
    assert_eq!(stored[11], range(0.0).quant());
    let narrow = |winograd| -> Vec<Algorithm> {
        let how = how(winograd, "none");
        let verdict = super::decide(&node, Role::Unet, &both, &how, ([64, 160], 1024)).unwrap();
        verdict.ways.iter().map(|w| w.by).collect()
    };
    assert_eq!(narrow(Winograd::Auto), [Algorithm::Rows], "64 and 160 channels are few");
    assert_eq!(narrow(Winograd::All), [Algorithm::Square, Algorithm::Rows]);
    both.groups[1].squares = Some(SquareRanges([all(200.0); 9]));
    assert_eq!(ways(&both, Winograd::Auto), [Algorithm::Rows], "13 dB");
    assert_eq!(ways(&both, Winograd::All), [Algorithm::Square, Algorithm::Rows]);
    // An input so much larger than the smallest step that no words hold both.
    both.groups[0].max = 1000.0;
    assert_eq!(ways(&both, Winograd::All), [Algorithm::Rows]);
    let mut old = quiet.clone();
    old.groups[1].winograd = None;
    assert!(why(&old, Winograd::All, "none").contains("no ranges"));
    for (kernel, stride) in [([1, 1], [1, 1]), ([3, 3], [2, 2]), ([3, 1], [1, 1])] {
        let node = conv(kernel, stride);
        let how = how(Winograd::All, "none");
        assert!(super::decide(&node, Role::Unet, &quiet, &how, ([96; 2], 64)).is_none());
    }
}

//! Consistency with the input, against Pillow's resampling and against its definition.

use crate::fake::{Fake, Shaped};
use crate::oracle::{fixture, safetensors};
use latile_runtime::pipeline::consistency::ROUNDS;
use latile_runtime::pipeline::{Consistency, Generator, Options};
use proptest::prelude::*;

/// `hr` after all rounds, through the streaming code.
fn streamed(
    hr: &[f32],
    lr: &[f32],
    size: [usize; 2],
    factor: usize,
    strength: f32,
    times: usize,
) -> Vec<f32> {
    let (line, small) = (size[1] * factor * 3, size[1] * 3);
    let mut c = Consistency::new(size, factor, strength).unwrap();
    let mut out = Vec::new();
    for _ in 0..times {
        out.clear();
        for (y, row) in hr.chunks_exact(line).enumerate() {
            c.push(
                y,
                row,
                &|i, to| to.copy_from_slice(&lr[i * small..][..small]),
                &mut |at, row| {
                    assert_eq!(at * line, out.len(), "rows leave in order");
                    out.extend_from_slice(row);
                },
            );
        }
        assert_eq!(out.len(), hr.len(), "with the last row all have left");
    }
    out
}

fn keys(x: f64) -> f64 {
    match x.abs() {
        x if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
        x if x < 2.0 => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
        _ => 0.0,
    }
}

/// The weight of every input for every output of one axis.
fn matrix(inputs: usize, outputs: usize) -> Vec<Vec<f64>> {
    let scale = inputs as f64 / outputs as f64;
    let stretch = scale.max(1.0);
    let row = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let raw: Vec<f64> =
            (0..inputs).map(|x| keys((x as f64 + 0.5 - centre) / stretch)).collect();
        let sum: f64 = raw.iter().sum();
        raw.iter().map(|v| v / sum).collect()
    };
    (0..outputs).map(row).collect()
}

/// The definition: whole matrices, f64.
fn resample(from: &[f64], [h, w]: [usize; 2], to: [usize; 2]) -> Vec<f64> {
    let (rows, cols) = (matrix(h, to[0]), matrix(w, to[1]));
    let mut out = vec![0.0; to[0] * to[1] * 3];
    let mut mid = vec![0.0; h * to[1] * 3];
    for (i, v) in mid.iter_mut().enumerate() {
        let (y, x, c) = (i / 3 / to[1], i / 3 % to[1], i % 3);
        *v = (0..w).map(|k| cols[x][k] * from[(y * w + k) * 3 + c]).sum();
    }
    for (i, v) in out.iter_mut().enumerate() {
        let (y, rest) = (i / (3 * to[1]), i % (3 * to[1]));
        *v = (0..h).map(|k| rows[y][k] * mid[k * to[1] * 3 + rest]).sum();
    }
    out
}

fn defined(hr: &[f32], lr: &[f32], size: [usize; 2], factor: usize, strength: f32) -> Vec<f64> {
    let large = size.map(|s| s * factor);
    let mut x: Vec<f64> = hr.iter().map(|&v| v.into()).collect();
    for _ in 0..ROUNDS {
        let reduced = resample(&x, large, size);
        let lacking: Vec<f64> = lr.iter().zip(reduced).map(|(&l, r)| f64::from(l) - r).collect();
        for (x, e) in x.iter_mut().zip(resample(&lacking, size, large)) {
            *x += f64::from(strength) * e;
        }
    }
    x
}

fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut g = Generator::new(seed);
    (0..len).map(|_| g.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
}

#[test]
fn it_is_what_pillow_makes() {
    let tensors = safetensors(&fixture("consistency.safetensors"));
    let names: Vec<&str> = tensors.keys().filter_map(|k| k.strip_suffix(".lr")).collect();
    assert_eq!(names.len(), 8);
    for name in names {
        let get = |what: &str| &tensors[&format!("{name}.{what}")];
        let [h, w, 3] = get("lr").shape[..] else { panic!("{name}") };
        let factor = get("hr").shape[0] / h;
        let (lr, hr) = (get("lr").f32(), get("hr").f32());
        let found = streamed(&hr, &lr, [h, w], factor, get("strength").f32()[0], 1);
        for (i, (a, b)) in found.iter().zip(get("result").f32()).enumerate() {
            assert!((a - b).abs() <= 1e-5, "{name}: element {i} is {a}, Pillow has {b}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn it_is_what_it_is_defined_as(
        h in 1usize..14, w in 1usize..14, power in 0u32..4, strength in 0f32..=1.0, seed: u64,
    ) {
        let factor = 1 << power;
        let (hr, lr) = (noise(h * w * factor * factor * 3, seed), noise(h * w * 3, seed ^ 1));
        // Twice through the same: nothing is left from the first picture.
        let found = streamed(&hr, &lr, [h, w], factor, strength, 2);
        for (i, (a, b)) in found.iter().zip(defined(&hr, &lr, [h, w], factor, strength)).enumerate() {
            prop_assert!((f64::from(*a) - b).abs() < 1e-5, "{}: {} {}", i, a, b);
        }
    }
}

/// The same bits on every machine: this hash was recorded once, on x86-64.
#[test]
fn bits_do_not_depend_on_the_machine() {
    let (size, factor) = ([11, 17], 4);
    let (hr, lr) = (noise(44 * 68 * 3, 5), noise(11 * 17 * 3, 6));
    let found = streamed(&hr, &lr, size, factor, 0.9, 1);
    let hash = found.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, v| {
        (h ^ u64::from(v.to_bits())).wrapping_mul(0x0000_0100_0000_01b3)
    });
    assert_eq!(hash, 0x64c1_b37a_afb9_aec3, "{hash:#018x}");
}

/// The RMS of what a result lacks of its input, in 1/255 of the range.
fn lacking(x: &[f32], lr: &[f32], size: [usize; 2], factor: usize) -> f64 {
    let wide: Vec<f64> = x.iter().map(|&v| v.into()).collect();
    let reduced = resample(&wide, size.map(|s| s * factor), size);
    let sum: f64 = reduced.iter().zip(lr).map(|(r, &l)| (r - f64::from(l)).powi(2)).sum();
    (sum / lr.len() as f64).sqrt() * 127.5
}

/// A run through the pipeline: only the input's part of the picture changes, tiles or not.
#[test]
fn a_run_gives_its_input_back() {
    let size = [24, 20];
    let mut rgb = vec![0u8; 24 * 20 * 3];
    for (i, v) in rgb.iter_mut().enumerate() {
        let (y, x, c) = ((i / 60) as f32, (i / 3 % 20) as f32, i % 3);
        *v = (120.0 + 60.0 * (0.5 * x + c as f32).sin() + 50.0 * (0.3 * y).cos()) as u8;
    }
    let lr: Vec<f32> = rgb.iter().map(|&b| 2.0 * (f32::from(b) / 255.0) - 1.0).collect();
    for (tile, overlap) in [(None, None), (Some(8), Some(4))] {
        let run = |consistency: Option<f32>, default: f32| {
            let shaped = Shaped { consistency: default, ..Shaped::default() };
            let options = Options { consistency, tile, overlap, ..Options::default() };
            crate::flow::floats(&Fake::pointwise(), &shaped, &rgb, size, &options)
        };
        let raw = run(None, 0.0);
        assert_eq!(run(Some(0.0), 1.0), raw, "0 leaves every bit alone");
        let strict = run(None, 1.0);
        assert_eq!(run(Some(1.0), 0.0), strict, "the model's default is an option like any other");
        let half = run(Some(0.5), 1.0);
        for (strength, found) in [(1.0, &strict), (0.5, &half)] {
            let wanted = defined(&raw, &lr, size, 4, strength);
            for (a, b) in found.iter().zip(wanted) {
                assert!((f64::from(*a) - b).abs() < 1e-5, "{strength}: {a} {b}");
            }
        }
        let [none, half, full] = [&raw, &half, &strict].map(|x| lacking(x, &lr, size, 4));
        // These networks make noise, the hardest case: it lacks the input at every frequency alike.
        assert!(half < 0.45 * none && full < 0.16 * none, "{none} {half} {full}");
    }
}

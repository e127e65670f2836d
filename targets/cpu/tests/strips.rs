//! A convolution in strips, from and to rings of lines, against the same convolution at once: equal to the
//! bit, sums included, on every instruction set.
#![allow(clippy::unwrap_used)]

mod common;

use common::Random;
use half::f16;
use latile_cpu::isa::Level;
use latile_cpu::pool::Pool;
use latile_cpu::registry::WeightType;
use latile_cpu::steps::conv::{
    Activation, ConvArgs, ConvPlan, ConvShape, Int8Weights, MAX_SEGMENTS, Residual, Rows, Segment,
    Weights, Window, conv2d, conv2d_rows,
};
use latile_cpu::steps::{Output, Source};
use latile_runtime::graph::{QuantRange, Winograd};

struct Case {
    shape: ConvShape,
    int8: bool,
    /// Rows of a strip, to be rounded up to blocks.
    strip: usize,
    residual: Option<bool>,
    in_ring: bool,
    out_ring: bool,
    silu: bool,
}

fn halves(rng: &mut Random, n: usize) -> Vec<f16> {
    (0..n).map(|_| f16::from_f32(rng.unit())).collect()
}

/// Copies row `y` of `map` into its place in `held`.
fn put(held: &mut [f16], map: &[f16], y: usize, ring: usize, row: usize) {
    held[y % ring * row..][..row].copy_from_slice(&map[y * row..][..row]);
}

fn check(case: &Case, rng: &mut Random) {
    let shape = case.shape;
    let [oh, ow] = shape.out();
    let first = shape.c / 2;
    let channels = [first, shape.c - first];
    let inputs: Vec<Vec<f16>> =
        channels.iter().map(|c| halves(rng, shape.h * shape.w * c)).collect();
    let norm: Vec<(Vec<f32>, Vec<f32>)> = channels
        .iter()
        .map(|&c| ((0..c).map(|_| rng.unit()).collect(), (0..c).map(|_| rng.unit()).collect()))
        .collect();
    let groups = shape.filters().div_ceil(16) * shape.stored_kernel().iter().product::<usize>();
    let float: Vec<f16> = halves(rng, groups * shape.c * 16);
    let bytes: Vec<i8> =
        (0..groups * shape.c.div_ceil(4) * 64).map(|_| (127.0 * rng.unit()) as i8).collect();
    let scale: Vec<f32> = (0..shape.filters()).map(|_| 0.001 + 0.001 * rng.unit().abs()).collect();
    let sum: Vec<i32> = (0..shape.filters()).map(|_| (900.0 * rng.unit()) as i32).collect();
    let other = halves(rng, shape.out_len());
    let bias: Vec<f32> = (0..shape.biases()).map(|_| rng.unit()).collect();
    let mut ranges = [QuantRange { scale: 0.01, zero_point: 77 }; Winograd::MOST_RANGES];
    if shape.winograd == Some(Winograd::Square) {
        ranges[0] = QuantRange { scale: 0.001, zero_point: 0 };
    }
    let weights = if case.int8 {
        Weights::I8(Int8Weights {
            packed: &bytes,
            scale: &scale,
            sum: &sum,
            input_scale: None,
            ranges: &ranges[..shape.winograd.map_or(1, Winograd::ranges)],
        })
    } else {
        Weights::F16(&float)
    };
    for level in Level::available() {
        let plan = if case.int8 {
            ConvPlan::int8(shape, level).unwrap()
        } else {
            ConvPlan::new(shape, WeightType::F16, level).unwrap()
        };
        for threads in [if case.silu { 1 } else { 3 }] {
            let pool = Pool::new(threads).unwrap();
            let run = |plan: &ConvPlan,
                       data: &[Vec<f16>],
                       rows: Option<&Rows>,
                       residual: Option<&[f16]>,
                       out: &mut [f16],
                       sums: &mut [f64]| {
                let segments: Vec<Segment<'_>> = (0..2)
                    .map(|i| Segment {
                        data: Source::F16(&data[i]),
                        channels: channels[i],
                        norm: Some((&norm[i].0, &norm[i].1)),
                    })
                    .collect();
                let args = ConvArgs {
                    segments: &segments,
                    activation: if case.silu { Activation::Silu } else { Activation::None },
                    weights,
                    bias: Some(&bias),
                    add: None,
                    residual: match (case.residual, residual) {
                        (Some(false), Some(r)) => Residual::Of(Source::F16(r)),
                        (Some(true), _) => Residual::InPlace,
                        _ => Residual::None,
                    },
                    output_scale: 1.0,
                    out: Output::F16(out),
                    sums: Some(sums),
                };
                let mut scratch = vec![f32::NAN; plan.scratch_len(pool.threads())];
                match rows {
                    None => conv2d(plan, &pool, args, &mut scratch).unwrap(),
                    Some(rows) => conv2d_rows(plan, &pool, args, rows, &mut scratch).unwrap(),
                }
            };
            let mut want = if case.residual == Some(true) {
                other.clone()
            } else {
                vec![f16::NAN; other.len()]
            };
            let mut want_sums = vec![f64::NAN; plan.sums().len()];
            run(&plan, &inputs, None, Some(&other), &mut want, &mut want_sums);

            let strips = plan.in_strips(case.strip);
            let row = ow * shape.n;
            // Exactly as many lines as the strip that needs most of them.
            let starts: Vec<usize> = (0..oh).step_by(strips.strip_rows()).collect();
            let part = |y: usize| [y, oh.min(y + strips.strip_rows())];
            let needed = |y: usize| shape.input_rows(part(y));
            let lines = starts.iter().map(|&y| needed(y)[1] - needed(y)[0]).max().unwrap();
            let out_lines = strips.strip_rows();
            let mut held: Vec<Vec<f16>> =
                channels.iter().map(|c| vec![f16::NAN; lines * shape.w * c]).collect();
            let mut got = want.clone();
            got.fill(f16::NAN);
            let mut sums = vec![f64::NAN; strips.sums().len()];
            let (out_window, out_rows) = if case.out_ring {
                (Window::ring(out_lines), out_lines)
            } else {
                (Window::WHOLE, oh)
            };
            let mut out = vec![f16::NAN; out_rows * row];
            let mut filled = 0;
            for &y in &starts {
                let [from, to] = needed(y);
                filled = filled.max(from);
                while filled < to {
                    for (i, c) in channels.iter().enumerate() {
                        put(&mut held[i], &inputs[i], filled, lines, shape.w * c);
                    }
                    filled += 1;
                }
                let [first, last] = part(y);
                for y in first..last {
                    put(&mut out, &other, y, out_rows, row);
                }
                let window = if case.in_ring { Window::ring(lines) } else { Window::WHOLE };
                let rows = Rows {
                    y: part(y),
                    inputs: [window; MAX_SEGMENTS],
                    out: out_window,
                    residual: Window::from(first),
                };
                let data = if case.in_ring { &held } else { &inputs };
                run(&strips, data, Some(&rows), Some(&other[first * row..]), &mut out, &mut sums);
                for y in first..last {
                    got[y * row..][..row].copy_from_slice(&out[y % out_rows * row..][..row]);
                }
            }
            let bits = |x: &[f16]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{shape:?} {} {threads}", plan.kernel_name());
            let bits = |x: &[f64]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&sums), bits(&want_sums), "{shape:?} {} {threads}", plan.kernel_name());
        }
    }
}

#[test]
fn strips_give_the_bits_of_the_whole() {
    let mut rng = Random(11);
    let same = |h, w, c, n, k| ConvShape::same(h, w, c, n, k);
    let shapes = [
        same(40, 21, 6, 18, 3),
        ConvShape { upsample: true, ..same(19, 12, 5, 16, 3) },
        ConvShape::doubling(19, 12, 5, 18),
        ConvShape::doubling(33, 66, 36, 24),
        ConvShape { stride: [2, 2], pads: [0, 0, 1, 1], ..same(45, 17, 7, 9, 3) },
        same(64, 9, 20, 33, 1),
        same(33, 66, 36, 24, 3),
        ConvShape { pads: [2, 2, 2, 2], ..same(37, 8, 3, 5, 5) },
        ConvShape { winograd: Some(Winograd::Rows), ..same(40, 21, 6, 18, 3) },
        ConvShape { winograd: Some(Winograd::Rows), ..same(33, 66, 36, 24, 3) },
        ConvShape { winograd: Some(Winograd::Square), ..same(40, 21, 6, 18, 3) },
        ConvShape { winograd: Some(Winograd::Square), ..same(33, 66, 36, 24, 3) },
        ConvShape { winograd: Some(Winograd::Square), ..same(71, 130, 36, 24, 3) },
    ];
    for shape in shapes {
        for int8 in [false, true] {
            if shape.winograd.is_some() && !int8 {
                continue;
            }
            for (i, strip) in [1, 7, 33].into_iter().enumerate() {
                let case = Case {
                    shape,
                    int8,
                    strip,
                    residual: [None, Some(false), Some(true)][i % 3],
                    in_ring: i != 1,
                    out_ring: i % 2 == 0,
                    silu: i < 2,
                };
                check(&case, &mut rng);
            }
        }
    }
}

#[test]
fn rows_that_are_no_part_are_refused() {
    let shape = ConvShape::same(40, 8, 4, 4, 3);
    let plan = ConvPlan::new(shape, WeightType::F32, Level::best()).unwrap().in_strips(8);
    let block = plan.block_rows();
    assert!(block > 1 && plan.strip_rows() < 40);
    let (input, weights) = (vec![0.0; 40 * 8 * 4], vec![0.0; shape.packed_len()]);
    let pool = Pool::new(1).unwrap();
    let run = |rows: Rows, input: &[f32]| {
        let segments = [Segment { data: Source::F32(input), channels: 4, norm: None }];
        let mut out = vec![0.0; 40 * 8 * 4];
        let args = ConvArgs {
            segments: &segments,
            activation: Activation::None,
            weights: Weights::F32(&weights),
            bias: None,
            add: None,
            residual: Residual::None,
            output_scale: 1.0,
            out: Output::F32(&mut out),
            sums: None,
        };
        conv2d_rows(&plan, &pool, args, &rows, &mut vec![0.0; plan.scratch_len(1)])
    };
    let part = |y| Rows { y, ..Rows::all(&plan) };
    assert!(run(part([0, block]), &input).is_ok());
    for y in [[1, 1 + block], [0, block + 1], [0, 0], [block, 0], [36, 44], [0, 40]] {
        assert!(run(part(y), &input).is_err(), "{y:?}");
    }
    let short = |window| Rows { inputs: [window; MAX_SEGMENTS], ..part([block, 2 * block]) };
    assert!(run(short(Window::from(block)), &input).is_err(), "the row above is missing");
    assert!(run(short(Window::from(block - 1)), &input[..block * 32]).is_err());
    assert!(run(short(Window::ring(block)), &input[..block * 32]).is_err());
    assert!(run(short(Window::ring(block + 2)), &input[..(block + 2) * 32]).is_ok());
}

//! The fused convolution against plain loops, bit for bit, on every instruction set and for
//! one to four threads.
// Size: one table of cases, and one check, for every kind of convolution.

#![allow(clippy::unwrap_used)]

use half::f16;
use latile_cpu::isa::{Isa, Level};
use latile_cpu::naive;
use latile_cpu::pool::Pool;
use latile_cpu::registry::WeightType;
use latile_cpu::steps::conv::{
    Activation, ConvArgs, ConvPlan, ConvShape, Int8Weights, Residual, Segment, Weights, conv2d,
};
use latile_cpu::steps::norm::{
    ChannelSums, GroupNormArgs, SumsLayout, channel_sums, group_norm_coeffs,
};
use latile_cpu::steps::{Output, Source, StepError};
use latile_runtime::graph::{QuantRange, Winograd};

/// `[filters, c, kh, kw]` as `[ceil(filters / 16)][kh][kw][ceil(c / group)][16][group]`, by the definition.
fn packed<T: Copy + Default>(weights: &[T], group: usize, shape: &ConvShape) -> Vec<T> {
    let window: usize = shape.stored_kernel().iter().product();
    let groups = shape.c.div_ceil(group);
    let mut packed =
        vec![T::default(); shape.filters().div_ceil(16) * window * groups * 16 * group];
    for n in 0..shape.filters() {
        for c in 0..shape.c {
            for tap in 0..window {
                let row = (n / 16 * window + tap) * groups + c / group;
                packed[(row * 16 + n % 16) * group + c % group] =
                    weights[(n * shape.c + c) * window + tap];
            }
        }
    }
    packed
}

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    fn vec(&mut self, n: usize, by: f32) -> Vec<f32> {
        (0..n).map(|_| self.next() * by).collect()
    }
    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    InPlace,
    Other,
}

/// One case: a shape and what is fused to it.
#[derive(Clone, Debug)]
struct Case {
    shape: ConvShape,
    segments: Vec<usize>,
    norm: bool,
    silu: bool,
    half_in: bool,
    half_weights: bool,
    /// Int8 weights; `Some(true)` with a factor for each input channel.
    int8: Option<bool>,
    half_out: bool,
    bias: bool,
    add: bool,
    residual: Kind,
    scale: f32,
    huge: bool,
}

impl Case {
    fn plain(shape: ConvShape) -> Self {
        Case {
            shape,
            segments: vec![shape.c],
            norm: false,
            silu: false,
            half_in: false,
            half_weights: false,
            int8: None,
            half_out: false,
            bias: false,
            add: false,
            residual: Kind::None,
            scale: 1.0,
            huge: false,
        }
    }

    fn fused(shape: ConvShape) -> Self {
        Case {
            norm: true,
            silu: true,
            bias: true,
            add: true,
            residual: Kind::Other,
            ..Case::plain(shape)
        }
    }
}

fn halve(x: &[f32]) -> Vec<f16> {
    x.iter().map(|&x| f16::from_f32_const(x)).collect()
}

fn widen(x: &[f16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32_const()).collect()
}

fn equal(got: f32, want: f32) -> bool {
    got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan())
}

/// Runs a case in floating point on some levels, and in int8 on those and on all that add integer dot
/// products to them.
fn check(case: &Case, levels: &[Level], pools: &[Pool]) {
    check_one(case, levels, pools);
    let based = |l: &Level| levels.iter().any(|base| base.isa() == l.isa().float_base());
    let levels: Vec<Level> = Level::available().into_iter().filter(based).collect();
    let scaled = !case.shape.macs().is_multiple_of(3);
    let int8 = Case { int8: Some(scaled), ..case.clone() };
    check_one(&int8, &levels, pools);
    let ConvShape { kernel, stride, phases, .. } = case.shape;
    if kernel == [3, 3] && stride == [1, 1] && !phases {
        for winograd in [Winograd::Rows, Winograd::Square] {
            let shape = ConvShape { winograd: Some(winograd), ..case.shape };
            check_one(&Case { shape, ..int8.clone() }, &levels, pools);
        }
    }
}

/// Runs a case and compares output and sums with plain loops.
fn check_one(case: &Case, levels: &[Level], pools: &[Pool]) {
    let shape = case.shape;
    let mut random = Random(0x00c0_ffee + shape.macs());
    let by = if case.huge { 3e38 } else { 1.0 };
    let mut parts: Vec<Vec<f32>> =
        case.segments.iter().map(|&c| random.vec(shape.h * shape.w * c, by)).collect();
    if case.huge {
        parts[0][0] = f32::INFINITY;
        let last = parts[0].len() - 1;
        parts[0][last] = f32::NEG_INFINITY;
        parts[0][1] = f32::NAN;
    }
    let halves: Vec<Vec<f16>> = parts.iter().map(|p| halve(p)).collect();
    if case.half_in {
        parts = halves.iter().map(|p| widen(p)).collect();
    }
    let mut input = Vec::with_capacity(shape.h * shape.w * shape.c);
    for pixel in 0..shape.h * shape.w {
        for (part, &c) in parts.iter().zip(&case.segments) {
            input.extend_from_slice(&part[pixel * c..][..c]);
        }
    }
    // Every second segment has no norm, so that both kinds meet in one convolution.
    let norms: Vec<Option<(Vec<f32>, Vec<f32>)>> = case
        .segments
        .iter()
        .enumerate()
        .map(|(i, &c)| (case.norm && i % 2 == 0).then(|| (random.vec(c, 1.5), random.vec(c, 1.0))))
        .collect();
    let mut norm = Vec::new();
    for (n, &c) in norms.iter().zip(&case.segments) {
        for i in 0..c {
            norm.push(n.as_ref().map(|(scale, shift)| (scale[i], shift[i])));
        }
    }
    let [kh, kw] = shape.stored_kernel();
    let mut weights = random.vec(shape.filters() * shape.c * kh * kw, 0.5);
    if case.half_weights {
        weights = widen(&halve(&weights));
    }
    let packed_float = packed(&weights, 1, &shape);
    let packed_half = halve(&packed_float);
    let integers: Vec<i8> = (0..weights.len())
        .map(|_| {
            [127, -127, 0, (random.bits() % 255) as i8].map(|w: i8| w.max(-127))[random.below(4)]
        })
        .collect();
    let packed_integers = packed(&integers, 4, &shape);
    let sums_of_weights: Vec<i32> = integers
        .chunks(shape.c * kh * kw)
        .map(|row| row.iter().map(|&w| i32::from(w)).sum())
        .collect();
    let worth: Vec<f32> =
        random.vec(shape.filters(), 0.001).iter().map(|x| x.abs() + 1e-4).collect();
    let factors: Vec<f32> = random.vec(shape.c, 0.5).iter().map(|x| x + 1.0).collect();
    let mut ranges = [(); Winograd::MOST_RANGES].map(|()| QuantRange {
        scale: 0.01 + 0.005 * random.next(),
        zero_point: [0, 255, 128, 40, 201][random.below(5)],
    });
    if shape.winograd == Some(Winograd::Square) {
        // Words: fine ones, and some that saturate.
        ranges[0].scale = [3e-4, 1e-3, 2e-5][random.below(3)];
    }
    let ranges = &ranges[..shape.winograd.map_or(1, Winograd::ranges)];
    let int8 = Int8Weights {
        packed: &packed_integers,
        scale: &worth,
        sum: &sums_of_weights,
        input_scale: case.int8.is_some_and(|scaled| scaled).then_some(&factors),
        ranges,
    };
    let bias = random.vec(shape.biases(), 1.0);
    let add = random.vec(shape.n, 1.0);
    let mut residual = random.vec(shape.out_len(), by);
    let residual_half = halve(&residual);
    let half_residual = match case.residual {
        Kind::InPlace => case.half_out,
        _ => case.half_in,
    };
    if half_residual {
        residual = widen(&residual_half);
    }
    let mut want = naive::Conv {
        shape,
        input: &input,
        norm: &norm,
        silu: case.silu,
        weights: match case.int8 {
            None => naive::Matrix::Float(&weights),
            Some(_) => naive::Matrix::Int8 {
                weights: &integers,
                scale: &worth,
                input_scale: int8.input_scale,
                ranges,
            },
        },
        bias: case.bias.then_some(&bias),
        add: case.add.then_some(&add),
        residual: (case.residual != Kind::None).then_some(&residual),
        output_scale: case.scale,
    }
    .run();
    if case.half_out {
        want = widen(&halve(&want));
    }

    let segments: Vec<Segment<'_>> = (0..parts.len())
        .map(|i| Segment {
            data: if case.half_in { Source::F16(&halves[i]) } else { Source::F32(&parts[i]) },
            channels: case.segments[i],
            norm: norms[i].as_ref().map(|(a, b)| (&a[..], &b[..])),
        })
        .collect();
    let mut all_sums: Option<Vec<f64>> = None;
    for level in levels {
        let kind = if case.half_weights { WeightType::F16 } else { WeightType::F32 };
        let plan = match case.int8 {
            None => ConvPlan::new(shape, kind, *level).unwrap(),
            Some(_) => ConvPlan::int8(shape, *level).unwrap(),
        };
        for pool in pools {
            let mut scratch = vec![f32::NAN; plan.scratch_len(pool.threads())];
            let mut sums = vec![f64::NAN; plan.sums().len()];
            let mut out = vec![f32::NAN; shape.out_len()];
            let mut out_half = vec![f16::NAN; shape.out_len()];
            if case.residual == Kind::InPlace {
                out.copy_from_slice(&residual);
                out_half.copy_from_slice(&residual_half);
            }
            conv2d(
                &plan,
                pool,
                ConvArgs {
                    segments: &segments,
                    activation: if case.silu { Activation::Silu } else { Activation::None },
                    weights: match case.int8 {
                        Some(_) => Weights::I8(int8),
                        None if case.half_weights => Weights::F16(&packed_half),
                        None => Weights::F32(&packed_float),
                    },
                    bias: case.bias.then_some(&bias),
                    add: case.add.then_some(&add),
                    residual: match case.residual {
                        Kind::None => Residual::None,
                        Kind::InPlace => Residual::InPlace,
                        Kind::Other if half_residual => Residual::Of(Source::F16(&residual_half)),
                        Kind::Other => Residual::Of(Source::F32(&residual)),
                    },
                    output_scale: case.scale,
                    out: if case.half_out {
                        Output::F16(&mut out_half)
                    } else {
                        Output::F32(&mut out)
                    },
                    sums: Some(&mut sums),
                },
                &mut scratch,
            )
            .unwrap();
            if case.half_out {
                out = widen(&out_half);
            }
            for (i, (&got, &want)) in out.iter().zip(&want).enumerate() {
                assert!(
                    equal(got, want),
                    "{} with {} threads, {case:?}: pixel {} channel {}: {got} is not {want}",
                    plan.kernel_name(),
                    pool.threads(),
                    i / shape.n,
                    i % shape.n
                );
            }
            if case.huge {
                continue;
            }
            // The same sums everywhere, and right.
            let expected = all_sums.get_or_insert_with(|| sums.clone());
            assert!(
                sums.iter().zip(expected.iter()).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{} {} threads: sums differ, {case:?}",
                level.isa(),
                pool.threads()
            );
            for c in 0..shape.n {
                let (mut sum, mut square) = (0.0, 0.0);
                for block in sums.chunks(2 * shape.n) {
                    sum += block[c];
                    square += block[shape.n + c];
                }
                let values = || out.iter().skip(c).step_by(shape.n).map(|&x| f64::from(x));
                let exact = values().sum::<f64>();
                let size = values().map(f64::abs).sum::<f64>() + 1.0;
                assert!((sum - exact).abs() < 1e-12 * size, "sum of channel {c}: {case:?}");
                let exact = values().map(|x| x * x).sum::<f64>();
                assert!((square - exact).abs() < 1e-12 * (exact + 1.0), "square: {case:?}");
            }
        }
    }
}

fn pools() -> Vec<Pool> {
    (1..=4).map(|n| Pool::new(n).unwrap()).collect()
}

#[test]
fn linear_layers_around_the_tile_sizes() {
    let pools = pools();
    let levels = Level::float_levels();
    for rows in (1..=16).chain([27, 28, 29, 63, 64, 65, 130]) {
        for (c, n) in [(1, 1), (5, 17), (16, 16), (7, 33), (33, 48)] {
            check(&Case::plain(ConvShape::linear(rows, c, n)), &levels, &pools[1..2]);
        }
    }
    for case in [
        Case { half_weights: true, ..Case::fused(ConvShape::linear(1, 40, 200)) },
        Case {
            half_in: true,
            half_out: true,
            residual: Kind::InPlace,
            ..Case::fused(ConvShape::linear(70, 24, 40))
        },
    ] {
        check(&case, &levels, &pools);
    }
}

#[test]
fn three_by_three_with_every_fusion() {
    let levels = Level::float_levels();
    let pools = pools();
    for (h, w, c, n) in [
        (1, 1, 1, 1),
        (2, 3, 3, 5),
        (5, 4, 6, 15),
        (8, 8, 15, 17),
        (7, 13, 17, 16),
        (9, 14, 16, 33),
        (6, 15, 5, 31),
        (10, 28, 8, 32),
        (4, 67, 4, 18),
    ] {
        let shape = ConvShape::same(h, w, c, n, 3);
        check(&Case::plain(shape), &levels, &pools[..2]);
        check(&Case::fused(shape), &levels, &pools);
        check(
            &Case {
                half_in: true,
                half_weights: true,
                half_out: true,
                residual: Kind::InPlace,
                scale: 0.70710677,
                ..Case::fused(shape)
            },
            &levels,
            &pools[1..3],
        );
    }
}

#[test]
fn odd_kernels_strides_pads_and_upsampling() {
    let levels = Level::float_levels();
    let pools = pools();
    let base = ConvShape::same(9, 11, 5, 19, 3);
    let shapes = [
        ConvShape { stride: [2, 2], ..base },
        ConvShape { stride: [2, 2], pads: [0, 0, 1, 1], h: 8, w: 12, ..base },
        ConvShape { stride: [1, 3], pads: [0, 2, 3, 1], ..base },
        ConvShape { upsample: true, ..base },
        ConvShape { upsample: true, pads: [0, 0, 0, 0], ..base },
        ConvShape { upsample: true, kernel: [1, 1], pads: [0; 4], ..base },
        ConvShape { upsample: true, stride: [2, 1], kernel: [2, 4], ..base },
        ConvShape { kernel: [5, 1], pads: [2, 0, 2, 0], ..base },
        ConvShape { kernel: [1, 7], pads: [0, 3, 0, 3], ..base },
        ConvShape { kernel: [16, 2], pads: [8, 1, 8, 0], ..base },
        ConvShape { kernel: [1, 1], pads: [1, 2, 3, 4], ..base },
        ConvShape { kernel: [1, 1], pads: [0; 4], stride: [2, 2], ..base },
        // Pads wider than the kernel: whole tiles of zeros.
        ConvShape { pads: [5, 6, 7, 20], ..base },
    ];
    for shape in shapes {
        check(&Case::plain(shape), &levels, &pools[..1]);
        check(&Case::fused(shape), &levels, &pools[2..3]);
    }
}

#[test]
fn four_phases_with_every_fusion() {
    let levels = Level::float_levels();
    let pools = pools();
    for (h, w, c, n) in [
        (1, 1, 1, 1),
        (2, 3, 3, 5),
        (5, 4, 6, 15),
        (8, 8, 15, 17),
        (7, 13, 17, 16),
        (9, 14, 16, 33),
        (6, 15, 5, 31),
        (10, 28, 8, 32),
        (3, 29, 4, 18),
        (4, 67, 4, 18),
    ] {
        let shape = ConvShape::doubling(h, w, c, n);
        check(&Case::plain(shape), &levels, &pools[..2]);
        check(&Case::fused(shape), &levels, &pools);
        check(
            &Case {
                half_in: true,
                half_weights: true,
                half_out: true,
                residual: Kind::InPlace,
                scale: 0.70710677,
                ..Case::fused(shape)
            },
            &levels,
            &pools[1..3],
        );
    }
    // Whatever the kernel and the pads, of a map that is upsampled before too, or read as it lies.
    let base = ConvShape::doubling(6, 9, 5, 19);
    for shape in [
        ConvShape { upsample: true, ..base },
        ConvShape { kernel: [3, 1], pads: [2, 0, 1, 0], ..base },
        ConvShape { kernel: [1, 4], pads: [0, 5, 3, 1], ..base },
        ConvShape { pads: [0; 4], ..base },
    ] {
        check(&Case::plain(shape), &levels, &pools[..1]);
        check(&Case::fused(shape), &levels, &pools[2..3]);
    }
}

#[test]
fn concatenated_segments() {
    let levels = Level::float_levels();
    let pools = pools();
    for segments in [vec![3, 2], vec![16, 16], vec![17, 5, 1], vec![1, 33, 2, 8]] {
        let c = segments.iter().sum();
        for shape in [
            ConvShape::same(6, 9, c, 20, 3),
            ConvShape { upsample: true, ..ConvShape::same(6, 9, c, 20, 3) },
            ConvShape::doubling(6, 9, c, 20),
        ] {
            for half in [false, true] {
                check(
                    &Case { segments: segments.clone(), half_in: half, ..Case::fused(shape) },
                    &levels,
                    &pools[1..2],
                );
            }
        }
    }
}

#[test]
fn every_way_to_divide_the_work() {
    let levels: Vec<Level> = Level::float_levels()
        .into_iter()
        .filter(|l| l.isa() != Isa::Scalar)
        .chain([Level::best()])
        .collect();
    let pools = pools();
    for shape in [
        // Prepared whole, divided by channels.
        ConvShape::same(8, 8, 24, 150, 3),
        ConvShape::same(3, 2, 40, 129, 3),
        // Bands: several row and column blocks, ragged ones too.
        ConvShape::same(37, 70, 3, 3, 3),
        ConvShape::same(18, 65, 6, 16, 3),
        ConvShape { stride: [2, 2], ..ConvShape::same(41, 150, 4, 17, 3) },
        ConvShape { upsample: true, ..ConvShape::same(20, 40, 4, 17, 3) },
        ConvShape::doubling(8, 8, 24, 150),
        ConvShape::doubling(3, 2, 40, 129),
        ConvShape::doubling(37, 70, 3, 3),
        ConvShape::doubling(20, 130, 4, 17),
        ConvShape::doubling(5, 6, 700, 20),
        // K longer than one stretch: several runs a stretch, one, and a part of one.
        ConvShape::same(5, 6, 300, 20, 3),
        ConvShape::same(4, 5, 700, 18, 3),
        ConvShape::linear(20, 4101, 20),
        ConvShape::linear(3, 4101, 140),
        // Many channels narrow the band.
        ConvShape::same(3, 40, 1500, 2, 3),
    ] {
        check(&Case::fused(shape), &levels, &pools);
        check(
            &Case { half_weights: true, half_in: true, ..Case::plain(shape) },
            &levels,
            &pools[..2],
        );
    }
}

#[test]
fn huge_and_infinite_inputs() {
    let levels = Level::float_levels();
    let pools = pools();
    for half_out in [false, true] {
        for silu in [false, true] {
            check(
                &Case {
                    huge: true,
                    silu,
                    half_out,
                    bias: true,
                    residual: Kind::Other,
                    ..Case::plain(ConvShape::same(7, 15, 6, 17, 3))
                },
                &levels,
                &pools[..2],
            );
        }
    }
}

#[test]
fn random_shapes() {
    let levels: Vec<Level> = Level::float_levels().into_iter().rev().take(2).collect();
    let pools = pools();
    let mut random = Random(77);
    for _ in 0..60 {
        let kernel = [1 + random.below(4), 1 + random.below(4)];
        let c = 1 + random.below(36);
        let shape = ConvShape {
            h: 4 + random.below(14),
            w: 4 + random.below(30),
            c,
            n: 1 + random.below(50),
            kernel,
            stride: [1 + random.below(2), 1 + random.below(2)],
            pads: [random.below(3), random.below(3), random.below(3), random.below(3)],
            upsample: random.below(3) == 0,
            phases: false,
            winograd: None,
        };
        let shape = match random.below(4) {
            0 => ConvShape { kernel: [2, 2], stride: [1, 1], pads: [1; 4], phases: true, ..shape },
            // Winograd's in int8.
            1 => ConvShape { kernel: [3, 3], stride: [1, 1], ..shape },
            _ => shape,
        };
        let split = random.below(c);
        let case = Case {
            segments: if split == 0 { vec![c] } else { vec![split, c - split] },
            norm: random.below(2) == 0,
            silu: random.below(2) == 0,
            half_in: random.below(2) == 0,
            half_weights: random.below(2) == 0,
            half_out: random.below(2) == 0,
            bias: random.below(2) == 0,
            add: random.below(2) == 0,
            residual: [Kind::None, Kind::InPlace, Kind::Other][random.below(3)],
            scale: [1.0, 0.5, 0.70710677][random.below(3)],
            ..Case::plain(shape)
        };
        let threads = random.below(4);
        check(&case, &levels, &pools[threads..=threads]);
    }
}

#[test]
fn wrong_operands_are_refused() {
    let level = Level::best();
    let pool = Pool::new(1).unwrap();
    let deep = ConvShape::same(4, 4, 8000, 4, 3);
    let message = ConvPlan::int8(deep, level).unwrap_err().to_string();
    assert!(message.contains("72000 products"), "{message}");
    let zero = ConvShape::same(0, 4, 4, 4, 3);
    assert!(matches!(ConvPlan::new(zero, WeightType::F32, level), Err(StepError::Shape { .. })));
    let large = ConvShape { kernel: [9, 9], pads: [0; 4], ..ConvShape::same(4, 4, 4, 4, 3) };
    assert!(ConvPlan::new(large, WeightType::F32, level).is_err());
    let rows = ConvShape { kernel: [17, 1], pads: [8; 4], ..ConvShape::same(4, 4, 4, 4, 3) };
    assert!(ConvPlan::new(rows, WeightType::F32, level).is_err());
    for winograd in [Winograd::Rows, Winograd::Square] {
        let tiles = ConvShape { winograd: Some(winograd), ..ConvShape::same(4, 4, 4, 4, 3) };
        assert!(ConvPlan::new(tiles, WeightType::F16, level).is_err(), "points are for int8");
        assert!(ConvPlan::int8(tiles, level).is_ok());
        assert!(ConvPlan::int8(ConvShape { stride: [1, 2], ..tiles }, level).is_err());
        assert!(ConvPlan::int8(ConvShape { kernel: [5, 3], ..tiles }, level).is_err());
    }
    let strided = ConvShape { stride: [2, 2], ..ConvShape::doubling(4, 4, 4, 4) };
    assert!(ConvPlan::new(strided, WeightType::F32, level).is_err());
    let narrow = ConvShape { pads: [0; 4], ..ConvShape::doubling(2, 4, 4, 4) };
    assert!(ConvPlan::new(narrow, WeightType::F32, level).is_err());
    let overflow = ConvShape::same(1 << 20, 1 << 20, 1 << 20, 1 << 20, 3);
    assert!(ConvPlan::new(overflow, WeightType::F32, level).is_err());

    let shape = ConvShape::same(4, 4, 4, 4, 3);
    let plan = ConvPlan::new(shape, WeightType::F32, level).unwrap();
    let input = vec![0.0; 64];
    let weights = vec![0.0; shape.packed_len()];
    let mut scratch = vec![0.0; plan.scratch_len(1)];
    let run = |input: &[f32], weights: &[f32], bias: &[f32], out: usize, scratch: &mut [f32]| {
        conv2d(
            &plan,
            &pool,
            ConvArgs {
                segments: &[Segment { data: Source::F32(input), channels: 4, norm: None }],
                activation: Activation::None,
                weights: Weights::F32(weights),
                bias: Some(bias),
                add: None,
                residual: Residual::None,
                output_scale: 1.0,
                out: Output::F32(&mut vec![0.0; out]),
                sums: None,
            },
            scratch,
        )
    };
    assert_eq!(run(&input, &weights, &[0.0; 4], 64, &mut scratch), Ok(()));
    let named = |result: Result<(), StepError>, name: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    };
    named(run(&input[1..], &weights, &[0.0; 4], 64, &mut scratch), "input");
    named(run(&input, &weights[1..], &[0.0; 4], 64, &mut scratch), "weights");
    named(run(&input, &weights, &[0.0; 3], 64, &mut scratch), "bias");
    named(run(&input, &weights, &[0.0; 4], 65, &mut scratch), "output");
    named(run(&input, &weights, &[0.0; 4], 64, &mut scratch[1..]), "scratch");

    let plan = ConvPlan::int8(shape, level).unwrap();
    let mut scratch = vec![0.0; plan.scratch_len(1)];
    let mut int8 = |weights: Weights<'_>| {
        let args = ConvArgs {
            segments: &[Segment { data: Source::F32(&input), channels: 4, norm: None }],
            activation: Activation::None,
            weights,
            bias: None,
            add: None,
            residual: Residual::None,
            output_scale: 1.0,
            out: Output::F32(&mut [0.0; 64]),
            sums: None,
        };
        conv2d(&plan, &pool, args, &mut scratch)
    };
    let good = Int8Weights {
        packed: &[1; 16 * 9 * 4],
        scale: &[1.0; 4],
        sum: &[36; 4],
        input_scale: Some(&[1.0; 4]),
        ranges: &[QuantRange { scale: 1.0, zero_point: 7 }],
    };
    assert_eq!(int8(Weights::I8(good)), Ok(()));
    named(int8(Weights::F32(&weights)), plan.kernel_name());
    named(int8(Weights::I8(Int8Weights { packed: &[1; 7], ..good })), "weights");
    named(int8(Weights::I8(Int8Weights { scale: &[1.0; 5], ..good })), "weight scale");
    named(int8(Weights::I8(Int8Weights { sum: &[36; 3], ..good })), "weight sum");
    named(int8(Weights::I8(Int8Weights { input_scale: Some(&[]), ..good })), "input scale");
    named(int8(Weights::I8(Int8Weights { ranges: &[], ..good })), "ranges");
}

#[test]
fn group_norm_over_a_boundary() {
    // Two segments of 5 and 7 channels, 3 groups of 4: the second group spans both.
    let mut random = Random(5);
    let pixels = 3000;
    let a: Vec<f32> = random.vec(pixels * 5, 2.0).iter().map(|x| x + 0.7).collect();
    let b = random.vec(pixels * 7, 0.3);
    let level = Level::best();
    let layouts = [SumsLayout::of_tensor(pixels, 5), SumsLayout::of_tensor(pixels, 7)];
    let mut sums = layouts.map(|l| vec![f64::NAN; l.len()]);
    for threads in [1, 3] {
        let pool = Pool::new(threads).unwrap();
        let before = sums.clone();
        channel_sums(level, &pool, Source::F32(&a), 5, &mut sums[0]).unwrap();
        channel_sums(level, &pool, Source::F32(&b), 7, &mut sums[1]).unwrap();
        if threads > 1 {
            assert_eq!(before, sums);
        }
    }
    for other in Level::float_levels() {
        let pool = Pool::new(2).unwrap();
        let mut again = vec![0.0; layouts[1].len()];
        channel_sums(other, &pool, Source::F32(&b), 7, &mut again).unwrap();
        assert_eq!(again, sums[1], "{}", other.isa());
    }
    let gamma = random.vec(12, 1.0);
    let beta = random.vec(12, 1.0);
    let (by, to) = (random.vec(12, 1.0), random.vec(12, 1.0));
    let segments = [
        ChannelSums { layout: layouts[0], sums: &sums[0] },
        ChannelSums { layout: layouts[1], sums: &sums[1] },
    ];
    let at = |p: usize, c: usize| f64::from(if c < 5 { a[p * 5 + c] } else { b[p * 7 + c - 5] });
    for modulated in [false, true] {
        let (mut scale, mut shift) = (vec![0.0; 12], vec![0.0; 12]);
        group_norm_coeffs(
            &GroupNormArgs {
                segments: &segments,
                groups: 3,
                eps: 1e-5,
                gamma: &gamma,
                beta: &beta,
                modulation: modulated.then_some((&by[..], &to[..])),
            },
            &mut scale,
            &mut shift,
            &mut [0.0; 24],
        )
        .unwrap();
        for c in 0..12 {
            let group = c / 4 * 4..c / 4 * 4 + 4;
            let all = || (0..pixels).flat_map(|p| group.clone().map(move |c| at(p, c)));
            let count = (4 * pixels) as f64;
            let mean = all().sum::<f64>() / count;
            let variance = all().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
            let mut want = (at(17, c) - mean) / (variance + 1e-5).sqrt() * f64::from(gamma[c])
                + f64::from(beta[c]);
            if modulated {
                want = want * (1.0 + f64::from(by[c])) + f64::from(to[c]);
            }
            let got = at(17, c) * f64::from(scale[c]) + f64::from(shift[c]);
            assert!((got - want).abs() < 1e-6, "channel {c}: {got} is not {want}");
        }
    }
}

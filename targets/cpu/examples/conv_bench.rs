//! Times the fused convolution over the shapes of the published LDM-SR.
//!
//! `conv_bench [--threads N] [--f16 | --int8] [--fused] [--seconds S] [--repeat N] [FILTER]` prints
//! one line a shape: name, GMAC, best and median GMAC/s, and GMAC per second of processor time (on
//! a busy machine the only number that means much, and only for one thread). `--int8` has
//! activations in f16. `--fused` adds GroupNorm, SiLU, residual and sums; `--repeat` runs each
//! shape exactly so often (to count instructions, by the difference between two counts); FILTER
//! is a part of a name.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::time::{Duration, Instant};

use half::f16;
use latile_cpu::isa::Level;
use latile_cpu::kernels::Operands;
use latile_cpu::kernels::dot::DotTile;
use latile_cpu::kernels::matmul::Tile;
use latile_cpu::peak::processor_time;
use latile_cpu::pool::Pool;
use latile_cpu::registry::{self, WeightType};
use latile_cpu::steps::conv::{
    Activation, ConvArgs, ConvPlan, ConvShape, Int8Weights, Residual, Segment, Weights, conv2d,
};
use latile_cpu::steps::{Output, Source};
use latile_runtime::graph::{QuantRange, Winograd};

/// A square map, kernel `k`.
const fn square(side: usize, c: usize, n: usize, k: usize) -> ConvShape {
    ConvShape::same(side, side, c, n, k)
}

/// Each pixel read as 2x2.
const fn up(side: usize, c: usize) -> ConvShape {
    ConvShape { upsample: true, ..square(side, c, c, 3) }
}

/// The same in four phases.
const fn phases(side: usize, c: usize) -> ConvShape {
    ConvShape::doubling(side, side, c, c)
}

/// By Winograd's F(2, 3), in int8 alone.
const fn pairs(side: usize, c: usize, n: usize) -> ConvShape {
    ConvShape { winograd: Some(Winograd::Rows), ..square(side, c, n, 3) }
}

/// By F(2 x 2, 3 x 3), as well.
const fn squares(side: usize, c: usize, n: usize) -> ConvShape {
    ConvShape { winograd: Some(Winograd::Square), ..square(side, c, n, 3) }
}

const SHAPES: &[(&str, ConvShape)] = &[
    ("decoder 256x256 128-128", square(256, 128, 128, 3)),
    ("decoder 256x256 128-128 pairs", pairs(256, 128, 128)),
    ("decoder 256x256 128-128 squares", squares(256, 128, 128)),
    ("decoder 256x256 256-128", square(256, 256, 128, 3)),
    ("decoder 256x256 256-256", square(256, 256, 256, 3)),
    ("decoder 128x128 256-256", square(128, 256, 256, 3)),
    ("decoder 128x128 256-256 pairs", pairs(128, 256, 256)),
    ("decoder 128x128 256-256 squares", squares(128, 256, 256)),
    ("decoder 128x128 512-512", square(128, 512, 512, 3)),
    ("decoder 64x64 512-512", square(64, 512, 512, 3)),
    ("decoder 64x64 512-512 pairs", pairs(64, 512, 512)),
    ("decoder 64x64 512-512 squares", squares(64, 512, 512)),
    ("decoder 256x256 128-3", square(256, 128, 3, 3)),
    ("unet 64x64 160-160", square(64, 160, 160, 3)),
    ("unet 64x64 160-160 pairs", pairs(64, 160, 160)),
    ("unet 64x64 160-160 squares", squares(64, 160, 160)),
    ("unet 64x64 480-160", square(64, 480, 160, 3)),
    ("unet 64x64 320-320", square(64, 320, 320, 3)),
    ("unet 64x64 320-320 pairs", pairs(64, 320, 320)),
    ("unet 64x64 320-320 squares", squares(64, 320, 320)),
    ("unet 32x32 320-320", square(32, 320, 320, 3)),
    ("unet 32x32 320-320 pairs", pairs(32, 320, 320)),
    ("unet 32x32 320-320 squares", squares(32, 320, 320)),
    ("unet 32x32 640-320", square(32, 640, 320, 3)),
    ("unet 16x16 320-320", square(16, 320, 320, 3)),
    ("unet 16x16 320-320 pairs", pairs(16, 320, 320)),
    ("unet 16x16 320-320 squares", squares(16, 320, 320)),
    ("unet 16x16 960-320", square(16, 960, 320, 3)),
    ("unet 8x8 640-640", square(8, 640, 640, 3)),
    ("unet 8x8 640-640 pairs", pairs(8, 640, 640)),
    ("unet 8x8 640-640 squares", squares(8, 640, 640)),
    ("unet 8x8 1280-640", square(8, 1280, 640, 3)),
    ("photo-x4 128x128 64-64 pairs", pairs(128, 64, 64)),
    ("photo-x4 128x128 64-64 squares", squares(128, 64, 64)),
    ("photo-x4 64x64 96-96 pairs", pairs(64, 96, 96)),
    ("photo-x4 64x64 96-96 squares", squares(64, 96, 96)),
    ("photo-x4 32x32 128-128 pairs", pairs(32, 128, 128)),
    ("photo-x4 32x32 128-128 squares", squares(32, 128, 128)),
    ("photo-x4 32x32 256-128 pairs", pairs(32, 256, 128)),
    ("photo-x4 32x32 256-128 squares", squares(32, 256, 128)),
    ("decoder 64x64 512-512 up", up(64, 512)),
    ("decoder 64x64 512-512 phases", phases(64, 512)),
    ("decoder 128x128 256-256 up", up(128, 256)),
    ("decoder 128x128 256-256 phases", phases(128, 256)),
    ("unet 8x8 640-640 up", up(8, 640)),
    ("unet 8x8 640-640 phases", phases(8, 640)),
    ("unet 32x32 320-320 up", up(32, 320)),
    ("unet 32x32 320-320 phases", phases(32, 320)),
    ("unet 64x64 320-160 1x1", square(64, 320, 160, 1)),
    ("unet 64x64 160-480 1x1", square(64, 160, 480, 1)),
];

/// The element type of the weights; activations are in f16 but for `F32`.
#[derive(Clone, Copy, PartialEq)]
enum Precision {
    F32,
    F16,
    Int8,
}

/// GMAC/s of the micro-kernel on data that stays in the first-level cache, one thread, and its name.
fn peak(level: Level, precision: Precision) -> (f64, &'static str) {
    match precision {
        Precision::Int8 => {
            let kernel = registry::dot(level);
            let tile = kernel.tiles[kernel.panels - 1][kernel.rows - 1];
            // SAFETY: `in_cache` gives operands of that tile's extent; the level is supported.
            let run = |o: &DotTile| unsafe { tile(o) };
            (in_cache(kernel.rows, kernel.panels, 4, run), kernel.name)
        }
        _ => {
            let kernel = registry::matmul(level, weight_type(precision));
            let tile = kernel.tiles[kernel.panels - 1][kernel.rows - 1];
            // SAFETY: as above; weights of either type fit where those of four bytes do.
            let run = |o: &Tile| unsafe { tile(o) };
            (in_cache(kernel.rows, kernel.panels, 1, run), kernel.name)
        }
    }
}

/// GMAC/s of `run` on zeros, `group` products of a number of four bytes.
fn in_cache<A, B, C>(
    rows: usize,
    panels: usize,
    group: usize,
    run: impl Fn(&Operands<A, B, C>),
) -> f64 {
    const UNITS: usize = 128;
    // Zero is zero in every type, and none is larger than a u32 for each unit.
    let a = vec![0_u32; rows * UNITS];
    let b = vec![0_u32; 16 * panels * UNITS];
    let mut c = vec![0_u32; rows * 16 * panels];
    let runs = [0_isize];
    let operands = Operands {
        a: a.as_ptr().cast(),
        a_stride: 4 * UNITS,
        runs: runs.as_ptr(),
        n_runs: 1,
        run_len: UNITS,
        b: b.as_ptr().cast(),
        panel_stride: 64 * UNITS,
        c: c.as_mut_ptr().cast(),
        c_stride: 64 * panels,
        accumulate: 0,
    };
    let mut best = f64::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        for _ in 0..2000 {
            run(&operands);
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    (2000 * rows * 16 * panels * UNITS * group) as f64 / best / 1e9
}

const fn weight_type(precision: Precision) -> WeightType {
    match precision {
        Precision::F32 => WeightType::F32,
        Precision::F16 | Precision::Int8 => WeightType::F16,
    }
}

fn main() {
    let (mut threads, mut fused, mut repeat, mut seconds) = (2, false, 0, 0.3);
    let mut precision = Precision::F32;
    let mut filter = String::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => threads = args.next().and_then(|x| x.parse().ok()).unwrap_or(2),
            "--seconds" => seconds = args.next().and_then(|x| x.parse().ok()).unwrap_or(0.3),
            "--f16" => precision = Precision::F16,
            "--int8" => precision = Precision::Int8,
            "--fused" => fused = true,
            "--repeat" => repeat = args.next().and_then(|x| x.parse().ok()).unwrap_or(1),
            _ => filter = arg,
        }
    }
    let level = match Level::from_env() {
        Ok(level) => level,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    let half = precision != Precision::F32;
    let pool = Pool::new(threads).expect("threads");
    if repeat == 0 {
        let (rate, name) = peak(level, precision);
        println!(
            "{name} threads {threads} fused {fused}; micro-kernel in cache, a thread: {rate:.1} GMAC/s"
        );
    }
    let known = |s: &&(&str, ConvShape)| precision == Precision::Int8 || s.1.winograd.is_none();
    for &(name, shape) in SHAPES.iter().filter(|s| s.0.contains(&filter)).filter(known) {
        let ConvShape { c, h, w, .. } = shape;
        let filters = shape.filters();
        let plan = match precision {
            Precision::Int8 => ConvPlan::int8(shape, level),
            _ => ConvPlan::new(shape, weight_type(precision), level),
        }
        .expect("a good shape");
        let input: Vec<f32> = (0..h * w * c).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect();
        let halve = |x: &[f32]| -> Vec<f16> {
            x.iter().take(if half { x.len() } else { 0 }).map(|&x| f16::from_f32(x)).collect()
        };
        let input_half = halve(&input);
        let weights: Vec<f32> =
            (0..shape.packed_len()).map(|i| (i % 13) as f32 * 0.01 - 0.06).collect();
        let weights_half = halve(&weights);
        let packed: Vec<i8> = (0..ConvShape { c: c.next_multiple_of(4), ..shape }.packed_len())
            .map(|i| (i % 251) as i8 % 127)
            .collect();
        let (weight_scale, weight_sum) = (vec![1e-3; filters], vec![0; filters]);
        let mut ranges = [QuantRange { scale: 0.01, zero_point: 30 }; Winograd::MOST_RANGES];
        if shape.winograd == Some(Winograd::Square) {
            ranges[0] = QuantRange { scale: 0.001, zero_point: 0 };
        }
        let int8 = Int8Weights {
            packed: &packed,
            scale: &weight_scale,
            sum: &weight_sum,
            input_scale: None,
            ranges: &ranges[..shape.winograd.map_or(1, Winograd::ranges)],
        };
        let (scale, shift) = (vec![0.9; c], vec![0.1; c]);
        let bias = vec![0.5; shape.biases()];
        let mut out = vec![0.0_f32; shape.out_len()];
        let mut out_half = vec![f16::ZERO; shape.out_len()];
        let mut sums = vec![0.0; plan.sums().len()];
        let mut scratch = vec![0.0; plan.scratch_len(threads)];
        let mut times = Vec::new();
        let begin = Instant::now();
        let mut cpu: Option<Duration> = None;
        loop {
            let before = processor_time();
            let start = Instant::now();
            conv2d(
                &plan,
                &pool,
                ConvArgs {
                    segments: &[Segment {
                        data: if half { Source::F16(&input_half) } else { Source::F32(&input) },
                        channels: c,
                        norm: fused.then_some((&scale, &shift)),
                    }],
                    activation: if fused { Activation::Silu } else { Activation::None },
                    weights: match precision {
                        Precision::F32 => Weights::F32(&weights),
                        Precision::F16 => Weights::F16(&weights_half),
                        Precision::Int8 => Weights::I8(int8),
                    },
                    bias: Some(&bias),
                    add: None,
                    residual: if fused { Residual::InPlace } else { Residual::None },
                    output_scale: if fused { 0.5 } else { 1.0 },
                    out: if half { Output::F16(&mut out_half) } else { Output::F32(&mut out) },
                    sums: fused.then_some(&mut sums),
                },
                &mut scratch,
            )
            .expect("good operands");
            times.push(start.elapsed().as_secs_f64());
            let used = processor_time().zip(before).map(|(now, before)| now - before);
            cpu = used.map(|used| cpu.map_or(used, |least| least.min(used)));
            let enough = times.len() > 2 && begin.elapsed().as_secs_f64() > seconds;
            if times.len() == repeat || (repeat == 0 && enough) {
                break;
            }
        }
        times.sort_by(f64::total_cmp);
        let gmac = shape.macs() as f64 / 1e9;
        println!(
            "{name:30} {gmac:8.3} GMAC  best {:7.1}  median {:7.1}  best by cpu time {} GMAC/s",
            gmac / times[0],
            gmac / times[times.len() / 2],
            cpu.map_or("-".to_owned(), |cpu| format!("{:7.1}", gmac / cpu.as_secs_f64()))
        );
    }
}

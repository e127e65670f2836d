//! Times the fused convolution with every micro-kernel in the registry that this machine can run, over
//! the shapes of `shapes/conv.txt`. Throughput is in multiply-accumulates ("elements") per second.
//!
//!     cargo bench -p latile-benches -- avx512/f32        # a part
//!     LATILE_BENCH_THREADS=2 cargo bench -p latile-benches
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use latile_cpu::isa::{Isa, Level};
use latile_cpu::pool::Pool;
use latile_cpu::registry::{MATMUL, WeightType};
use latile_cpu::steps::conv::{Activation, ConvArgs, ConvPlan, Residual, Segment, Weights, conv2d};
use latile_cpu::steps::{Output, Source};
use std::time::Duration;

fn conv(criterion: &mut Criterion) {
    let threads =
        std::env::var("LATILE_BENCH_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(1);
    let pool = Pool::new(threads).unwrap();
    for row in MATMUL {
        // The scalar reference is there to be compared with, not to be timed.
        let Some(level) = Level::new(row.isa).filter(|_| row.isa != Isa::Scalar) else { continue };
        let mut group = criterion.benchmark_group(row.name);
        group.sample_size(10).warm_up_time(Duration::from_millis(300));
        group.measurement_time(Duration::from_secs(1));
        for (name, shape) in latile_benches::conv_shapes().unwrap() {
            let plan = ConvPlan::new(shape, row.weights, level).unwrap();
            let x: Vec<f32> =
                (0..shape.h * shape.w * shape.c).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
            let weights: Vec<f32> =
                (0..shape.packed_len()).map(|i| (i % 241) as f32 / 120.0 - 1.0).collect();
            let halves: Vec<half::f16> = weights.iter().map(|&w| half::f16::from_f32(w)).collect();
            let weights = match row.weights {
                WeightType::F32 => Weights::F32(&weights),
                WeightType::F16 => Weights::F16(&halves),
            };
            let mut out = vec![0f32; shape.out_len()];
            let mut scratch = vec![0f32; plan.scratch_len(threads)];
            let (scale, shift) = (vec![0.5f32; shape.c], vec![0.1f32; shape.c]);
            let segments = [Segment {
                data: Source::F32(&x),
                channels: shape.c,
                norm: Some((&scale, &shift)),
            }];
            group.throughput(Throughput::Elements(shape.macs()));
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| {
                    let args = ConvArgs {
                        segments: &segments,
                        activation: Activation::Silu,
                        weights,
                        bias: None,
                        add: None,
                        residual: Residual::None,
                        output_scale: 1.0,
                        out: Output::F32(&mut out),
                        sums: None,
                    };
                    conv2d(&plan, &pool, args, &mut scratch).unwrap();
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, conv);
criterion_main!(benches);

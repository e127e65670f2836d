//! Times the fused convolution with every micro-kernel in the registry that this machine can run, over
//! the shapes of `shapes/conv.txt`. Throughput is in multiply-accumulates ("elements") per second.
//!
//!     cargo bench -p latile-benches --bench conv -- u8i8-avx512vnni    # a part
//!     LATILE_BENCH_THREADS=2 cargo bench -p latile-benches --bench conv
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use latile_benches::case::{ConvCase, Numbers};
use latile_cpu::isa::{Isa, Level};
use latile_cpu::pool::Pool;
use std::time::Duration;

fn conv(criterion: &mut Criterion) {
    let threads = latile_benches::threads();
    let pool = Pool::new(threads).unwrap();
    // The scalar reference is there to be compared with, not to be timed.
    for level in Level::available().into_iter().filter(|level| level.isa() != Isa::Scalar) {
        for numbers in Numbers::ALL.into_iter().filter(|n| n.has_own_kernels(level)) {
            for (name, shape) in latile_benches::conv_shapes().unwrap() {
                let mut case = ConvCase::new(shape, numbers, level, threads).unwrap();
                let mut group = criterion.benchmark_group(case.kernel_name());
                group.sample_size(10).warm_up_time(Duration::from_millis(300));
                group.measurement_time(Duration::from_secs(1));
                group.throughput(Throughput::Elements(case.macs()));
                group.bench_function(BenchmarkId::from_parameter(name), |b| {
                    b.iter(|| case.run(&pool).unwrap());
                });
                group.finish();
            }
        }
    }
}

criterion_group!(benches, conv);
criterion_main!(benches);

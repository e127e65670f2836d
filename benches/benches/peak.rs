//! How much of the machine's own integer dot product peak the fused int8 convolution reaches: a loop
//! on registers alone, and the convolutions of `shapes/conv.txt` in int8 and in f32, in turn, best of
//! many runs. Rates are a second of processor time, so a busy machine shows what a quiet one would;
//! with several threads they are a thread's, and `wall` is what all together reach by the clock.
//!
//!     cargo bench -p latile-benches --bench peak                       # all shapes
//!     cargo bench -p latile-benches --bench peak -- 64-320-320         # those whose name has it
//!     LATILE_BENCH_THREADS=2 LATILE_ISA=avxvnni cargo bench -p latile-benches --bench peak
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use latile_benches::case::{ConvCase, Numbers};
use latile_cpu::isa::Level;
use latile_cpu::peak::{dot_products, processor_time};
use latile_cpu::pool::Pool;
use std::time::{Duration, Instant};

/// Rounds of peak, int8 and f32.
const ROUNDS: usize = 9;
/// For the peak in each round.
const PEAK_TIME: Duration = Duration::from_millis(20);
/// For each convolution in each round, at least.
const CONV_TIME: Duration = Duration::from_millis(60);

/// Multiply-accumulates of the best run within [`CONV_TIME`]: a second of processor time, and a
/// second by the clock.
fn rates(case: &mut ConvCase, pool: &Pool) -> [f64; 2] {
    let (mut best, begin) = ([0.0_f64; 2], Instant::now());
    let macs = case.macs() as f64;
    while begin.elapsed() < CONV_TIME {
        let (start, used) = (Instant::now(), processor_time());
        case.run(pool).unwrap();
        let wall = macs / start.elapsed().as_secs_f64();
        let used = processor_time().zip(used).map(|(now, used)| now - used);
        let own = used.map_or(wall, |used| macs / used.as_secs_f64());
        best = [best[0].max(own), best[1].max(wall)];
    }
    best
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let threads = latile_benches::threads();
    let pool = Pool::new(threads).unwrap();
    let level = Level::from_env().unwrap();
    println!("{}, {threads} threads, GMAC/s", level.isa());
    println!(
        "{:20} {:>7} {:>7} {:>7} {:>7} {:>9} {:>7} {:>7}",
        "shape", "peak", "int8", "share", "f32", "int8/f32", "wall", "f32"
    );
    for (name, shape) in latile_benches::conv_shapes().unwrap() {
        if !name.contains(&filter) {
            continue;
        }
        let mut cases = [Numbers::Int8, Numbers::F32]
            .map(|numbers| ConvCase::new(shape, numbers, level, threads).unwrap());
        let (mut best, mut peak) = ([[0.0_f64; 2]; 2], None);
        for _ in 0..ROUNDS {
            for (best, case) in best.iter_mut().zip(&mut cases) {
                let [own, wall] = rates(case, &pool);
                *best = [best[0].max(own / 1e9), best[1].max(wall / 1e9)];
            }
            let now = dot_products(level, PEAK_TIME).map(|now| now / 1e9);
            peak = now.map(|now| peak.map_or(now, |peak: f64| peak.max(now)));
        }
        let [[int8, int8_wall], [f32, f32_wall]] = best;
        let (most, share) = match peak {
            Some(peak) => (format!("{peak:.1}"), format!("{:.1}%", 100.0 * int8 / peak)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        println!(
            "{name:20} {most:>7} {int8:7.1} {share:>7} {f32:7.1} {:9.2} {int8_wall:7.1} {f32_wall:7.1}",
            int8 / f32
        );
    }
}

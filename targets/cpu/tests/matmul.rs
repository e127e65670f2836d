//! Every row of the kernel registry against the formula, bit for bit: all tile sizes, one and
//! several runs, depths around the unrolling, split sums, and no byte written outside.

#![allow(clippy::unwrap_used)]

use half::f16;
use latile_cpu::isa::Level;
use latile_cpu::kernels::matmul::Tile;
use latile_cpu::registry::{MATMUL, MatmulKernel, WeightType};

struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn check(kernel: &MatmulKernel, rows: usize, panels: usize, n_runs: usize, run_len: usize) {
    let what = format!("{} {rows}x{panels} {n_runs} runs of {run_len}", kernel.name);
    let mut random = Random(0x5eed + (rows * 1000 + n_runs * 100 + run_len) as u64);
    let stride = run_len + 3; // pixels overlap no one, and are not aligned
    let run_step = stride * rows + 5;
    let a: Vec<f32> = (0..run_step * n_runs).map(|_| random.next()).collect();
    // Runs out of order.
    let runs: Vec<isize> =
        (0..n_runs).map(|r| (4 * ((r + 1) % n_runs) * run_step) as isize).collect();
    let depth = n_runs * run_len;
    let gap = 2; // k between the panels
    let b: Vec<f16> =
        (0..(depth + gap) * 16 * panels).map(|_| f16::from_f32(random.next())).collect();
    let wide: Vec<f32> = b.iter().map(|x| x.to_f32()).collect();
    let (pointer, size) = match kernel.weights {
        WeightType::F32 => (wide.as_ptr().cast::<u8>(), 4),
        WeightType::F16 => (b.as_ptr().cast::<u8>(), 2),
    };
    let c_stride = 16 * panels + 7;
    for accumulate in [false, true] {
        let before: Vec<f32> = (0..c_stride * rows).map(|_| random.next()).collect();
        let mut want = before.clone();
        for p in 0..rows {
            for j in 0..16 * panels {
                let mut sum = if accumulate { before[p * c_stride + j] } else { 0.0 };
                let mut k = 0;
                for run in &runs {
                    for i in 0..run_len {
                        let x = a[p * stride + *run as usize / 4 + i];
                        let w = wide[(j / 16) * (depth + gap) * 16 + k * 16 + j % 16];
                        sum = x.mul_add(w, sum);
                        k += 1;
                    }
                }
                want[p * c_stride + j] = sum;
            }
        }
        let mut c = before.clone();
        let tile = Tile {
            a: a.as_ptr(),
            a_stride: 4 * stride,
            runs: runs.as_ptr(),
            n_runs,
            run_len,
            b: pointer,
            panel_stride: (depth + gap) * 16 * size,
            c: c.as_mut_ptr(),
            c_stride: 4 * c_stride,
            accumulate: usize::from(accumulate),
        };
        // SAFETY: the slices above are as large as the formula reaches; the instruction set
        // is supported, or the row would not have been chosen.
        unsafe { kernel.tiles[panels - 1][rows - 1](&tile) };
        for (i, (got, want)) in c.iter().zip(&want).enumerate() {
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{what}, accumulate {accumulate}, pixel {} column {}: {got} is not {want}",
                i / c_stride,
                i % c_stride
            );
        }
    }
}

#[test]
fn every_kernel_matches_the_formula() {
    let supported: Vec<_> = Level::float_levels().iter().map(|l| l.isa()).collect();
    let mut rows_checked = 0;
    for kernel in MATMUL.iter().filter(|k| supported.contains(&k.isa)) {
        for panels in 1..=kernel.panels {
            for rows in 1..=kernel.rows {
                for (n_runs, run_len) in
                    [(1, 1), (1, 3), (1, 4), (2, 5), (3, 7), (3, 8), (1, 33), (9, 2), (0, 4)]
                {
                    if n_runs > 0 {
                        check(kernel, rows, panels, n_runs, run_len);
                    }
                }
            }
        }
        rows_checked += 1;
    }
    assert_eq!(rows_checked, 2 * supported.len());
}

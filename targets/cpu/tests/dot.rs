//! Every integer matrix micro-kernel of the registry against its formula, integer for integer:
//! all tile shapes, several runs, run lengths around the unrolling, strides, addresses that are
//! not aligned, accumulation, and the largest products.

use latile_cpu::isa::Level;
use latile_cpu::kernels::dot::{DotTile, GROUP, MAX_PRODUCTS};
use latile_cpu::registry::{DOT, DotKernel, dot};

/// xorshift64*: the same bytes on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }
}

/// What the operands hold.
#[derive(Clone, Copy, Debug)]
enum Data {
    /// Every byte that there can be.
    Random,
    /// Activations 0 and 255, weights -127 and 127.
    Extreme,
    /// All activations this, all weights that.
    Constant(u8, i8),
}

impl Data {
    fn activation(self, random: &mut Random) -> u8 {
        match self {
            Data::Random => random.next() as u8,
            Data::Extreme => [0, 255][random.next() as usize % 2],
            Data::Constant(q, _) => q,
        }
    }

    fn weight(self, random: &mut Random) -> i8 {
        match self {
            Data::Random => ((random.next() % 255) as i16 - 127) as i8,
            Data::Extreme => [-127, 127][random.next() as usize % 2],
            Data::Constant(_, w) => w,
        }
    }
}

/// One shape of the sum.
#[derive(Clone, Copy, Debug)]
struct Case {
    n_runs: usize,
    /// Groups.
    run_len: usize,
    data: Data,
    /// Bytes by which the activations' address and stride miss being aligned.
    askew: usize,
}

fn check(kernel: &DotKernel, rows: usize, panels: usize, case: Case) {
    let Case { n_runs, run_len, data, askew } = case;
    let what = format!("{} {rows}x{panels} {case:?}", kernel.name);
    let seed = rows * 1_000_003 + panels * 10_007 + n_runs * 101 + run_len;
    let mut random = Random(0x5eed + seed as u64);
    let run_bytes = GROUP * run_len;
    let stride = run_bytes + 4 + askew;
    let run_step = stride * rows + 12 + askew;
    let activations: Vec<u8> =
        (0..askew + run_step * n_runs).map(|_| data.activation(&mut random)).collect();
    // The bytes that the kernel is given: q, or q - 128.
    let a: Vec<u8> =
        activations.iter().map(|q| if kernel.signed { q.wrapping_sub(128) } else { *q }).collect();
    let zero = if kernel.signed { 128 } else { 0 };
    // Runs out of order.
    let runs: Vec<isize> =
        (0..n_runs).map(|r| (((r + 1) % n_runs) * run_step + askew) as isize).collect();
    let depth = n_runs * run_len;
    let panel_stride = (depth + 2) * 16 * GROUP; // groups between the panels
    let b: Vec<i8> = (0..askew + panel_stride * panels).map(|_| data.weight(&mut random)).collect();
    // Numbers before, between and after the accumulators, which must stay.
    let (c_start, c_stride) = (5, 16 * panels + 7);
    // What a family wants rearranged.
    let mut given = b.clone();
    if let Some(arrange) = kernel.arrange {
        for panel in 0..panels {
            let at = askew + panel * panel_stride;
            let (from, to) = (b[at..].as_ptr(), given[at..].as_mut_ptr());
            // SAFETY: both hold a panel from there; the instruction set is supported.
            unsafe { arrange(from, to, n_runs, run_len) };
        }
    }
    for accumulate in [false, true] {
        // All of i32: sums wrap.
        let before: Vec<i32> =
            (0..c_start + c_stride * rows).map(|_| random.next() as i32).collect();
        let mut want = before.clone();
        for p in 0..rows {
            for j in 0..16 * panels {
                let at = c_start + p * c_stride + j;
                let mut sum = if accumulate { before[at] } else { 0 };
                for (r, run) in runs.iter().enumerate() {
                    for k in 0..run_bytes {
                        let q = activations[p * stride + *run as usize + k];
                        let group = r * run_len + k / GROUP;
                        let panel = askew + (j / 16) * panel_stride;
                        let w = b[panel + (group * 16 + j % 16) * GROUP + k % GROUP];
                        sum = sum.wrapping_add((i32::from(q) - zero) * i32::from(w));
                    }
                }
                want[at] = sum;
            }
        }
        let mut c = before.clone();
        let tile = DotTile {
            a: a.as_ptr(),
            a_stride: stride,
            runs: runs.as_ptr(),
            n_runs,
            run_len,
            b: given[askew..].as_ptr(),
            panel_stride,
            c: c[c_start..].as_mut_ptr(),
            c_stride: 4 * c_stride,
            accumulate: usize::from(accumulate),
        };
        // SAFETY: the slices above are as large as the formula reaches; the instruction set
        // is supported, or the row would not have been chosen.
        unsafe { kernel.tiles[panels - 1][rows - 1](&tile) };
        for (i, (got, want)) in c.iter().zip(&want).enumerate() {
            assert_eq!(got, want, "{what}, accumulate {accumulate}, number {i} from {c_start}");
        }
    }
}

/// Every tile of every kernel that this machine has.
fn check_all(cases: &[Case]) {
    let kernels: Vec<_> = Level::available().into_iter().map(dot).collect();
    for kernel in &kernels {
        for panels in 1..=kernel.panels {
            for rows in 1..=kernel.rows {
                for case in cases {
                    check(kernel, rows, panels, *case);
                }
            }
        }
    }
    // A row that no level chooses could not be tested.
    let supported = DOT.iter().filter(|k| Level::new(k.isa).is_some()).count();
    assert_eq!(kernels.len(), supported);
}

#[test]
fn every_kernel_matches_the_formula() {
    let mut cases = Vec::new();
    for data in [Data::Random, Data::Extreme] {
        for run_len in (1..=9).chain([11, 12, 16, 17, 33]) {
            for n_runs in [1, 2, 3, 9] {
                // Aligned and not, in turn.
                cases.push(Case { n_runs, run_len, data, askew: (run_len + n_runs) % 4 });
            }
        }
    }
    check_all(&cases);
}

#[test]
fn the_largest_sums_are_exact() {
    // As long as a 3x3 convolution of 640 channels, every product as large as it can be: also
    // where the kernel sees -128 for 0 and 127 for 255.
    let cases = [(255, 127), (255, -127), (0, 127), (0, -127)].map(|(q, w)| {
        let data = Data::Constant(q, w);
        Case { n_runs: 3, run_len: 480, data, askew: 1 }
    });
    const { assert!(3 * 480 * GROUP < MAX_PRODUCTS) };
    check_all(&cases);
}

//! Times the integer micro-kernels alone, on operands that stay in cache, one thread.
//!
//! `dot_bench [--runs N] [--groups N] [--repeat N] [FILTER]` prints one line for each row of the
//! registry that this machine (or `LATILE_ISA`) has: name, tile, GMAC/s, and its share of the
//! most that registers alone reach where there is a dot product instruction. `--runs` and
//! `--groups` shape the sum (1 run of 96 groups of four channels by default: a 3x3 convolution
//! of 320 is 3 runs of 240, whose weights come from the second cache); `--repeat` calls each tile
//! exactly so often (to count instructions, by the difference between two counts) and prints
//! the multiply-accumulates of one call; FILTER is a part of a name.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::time::{Duration, Instant};

use latile_cpu::isa::{ISA_VARIABLE, Level};
use latile_cpu::kernels::dot::{DotTile, GROUP};
use latile_cpu::{peak, registry};

fn main() {
    let (mut n_runs, mut run_len, mut repeat) = (1, 96, 0_u64);
    let mut filter = String::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || {
            args.next().and_then(|x| x.parse::<usize>().ok()).filter(|n| *n > 0).unwrap_or_else(
                || {
                    eprintln!("{arg} needs a number above 0");
                    std::process::exit(2);
                },
            )
        };
        match arg.as_str() {
            "--runs" => n_runs = number(),
            "--groups" => run_len = number(),
            "--repeat" => repeat = number() as u64,
            _ => filter = arg,
        }
    }
    let levels = match std::env::var_os(ISA_VARIABLE) {
        None => Level::available(),
        Some(_) => vec![Level::from_env().unwrap_or_else(|error| {
            eprintln!("{error}");
            std::process::exit(2);
        })],
    };
    for level in levels {
        let kernel = registry::dot(level);
        if !kernel.name.contains(&filter) {
            continue;
        }
        let (rows, panels) = (kernel.rows, kernel.panels);
        let depth = n_runs * run_len;
        let a: Vec<u8> = (0..rows * depth * GROUP).map(|i| (i % 251) as u8).collect();
        let b: Vec<i8> = (0..panels * depth * 16 * GROUP).map(|i| (i % 127) as i8).collect();
        let panel_stride = depth * 16 * GROUP;
        let mut arranged = b.clone();
        if let Some(arrange) = kernel.arrange {
            for panel in 0..panels {
                let at = panel * panel_stride;
                // SAFETY: both hold a panel from there; the level is supported.
                unsafe {
                    arrange(b[at..].as_ptr(), arranged[at..].as_mut_ptr(), n_runs, run_len);
                }
            }
        }
        let runs: Vec<isize> = (0..n_runs).map(|r| (r * run_len * GROUP) as isize).collect();
        let mut c = vec![0_i32; rows * 16 * panels];
        let tile = DotTile {
            a: a.as_ptr(),
            a_stride: depth * GROUP,
            runs: runs.as_ptr(),
            n_runs,
            run_len,
            b: arranged.as_ptr(),
            panel_stride,
            c: c.as_mut_ptr(),
            c_stride: 64 * panels,
            accumulate: 0,
        };
        let call = || {
            // SAFETY: the vectors above are as large as the tile says; the level is supported.
            unsafe { kernel.tiles[panels - 1][rows - 1](&tile) };
        };
        let macs = rows * 16 * panels * depth * GROUP;
        let shape = format!(
            "{:24} {rows:2} pixels x {panels} panels, {n_runs} x {run_len} groups",
            kernel.name
        );
        if repeat > 0 {
            (0..repeat).for_each(|_| call());
            println!("{shape}  {macs} MAC a call");
            continue;
        }
        // The best of many short stretches: on a shared machine, the least disturbed.
        let calls = (4_000_000 / macs).max(1);
        let (mut best, mut most) = (0.0_f64, None::<f64>);
        // Kernel and peak in turn, so that both see the same machine.
        for _ in 0..10 {
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(40) {
                let start = Instant::now();
                (0..calls).for_each(|_| call());
                best = best.max((calls * macs) as f64 / start.elapsed().as_secs_f64());
            }
            let now = peak::dot_products(level, Duration::from_millis(10));
            most = now.map(|now| most.map_or(now, |most| most.max(now)));
        }
        let share = most.map_or(String::new(), |most| {
            format!("  {:5.1} % of {:.1}", 100.0 * best / most, most / 1e9)
        });
        println!("{shape}  {:8.1} GMAC/s{share}", best / 1e9);
    }
}

//! Arm with FEAT_I8MM: up to 4 pixels by one panel, in assembly.
//!
//! `smmla` multiplies two pixels by two output channels over two groups. Both operands want the
//! two groups side by side: A's pixels are loaded and zipped in pairs, B is arranged so once for
//! many tiles ([`arrange`]). A step of eight groups is one load of two registers for each pixel,
//! four zips for each two, two loads of four registers of B for each two groups, and 64 products
//! of 32 bytes. 16 accumulators, 8 registers of A and 8 of B are all 32 registers.
//!
//! Registers, beside the frame's: x5-x8 pixels, v0-v15 accumulators, v16-v23 A (v24 while it is
//! zipped), v24-v31 B.

use std::arch::aarch64::{int32x4x4_t, vld1q_s32_x4, vst1q_s32_x4, vzip1q_s32, vzip2q_s32};
use std::arch::asm;

use super::dot::{DotFn, DotTile};
use super::frame_neon::{neon_store, neon_sums, neon_tile, neon_zero};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 4;

/// Rearranges weights from `[run][run_len][16][4]` to what the tiles read: of every run, each
/// two groups together as `[16][2][4]`, and an odd last group as it was.
///
/// # Safety
/// Both must hold `n_runs * run_len * 64` bytes, `to` writable, and not overlap.
#[target_feature(enable = "neon")]
pub(crate) unsafe fn arrange(from: *const i8, to: *mut i8, n_runs: usize, run_len: usize) {
    let (mut from, mut to) = (from.cast::<i32>(), to.cast::<i32>());
    for _ in 0..n_runs {
        // SAFETY: each run advances both by its own length, within what the caller vouches for.
        unsafe {
            for _ in 0..run_len / 2 {
                let (x, y) = (vld1q_s32_x4(from), vld1q_s32_x4(from.add(16)));
                let low = int32x4x4_t(
                    vzip1q_s32(x.0, y.0),
                    vzip2q_s32(x.0, y.0),
                    vzip1q_s32(x.1, y.1),
                    vzip2q_s32(x.1, y.1),
                );
                let high = int32x4x4_t(
                    vzip1q_s32(x.2, y.2),
                    vzip2q_s32(x.2, y.2),
                    vzip1q_s32(x.3, y.3),
                    vzip2q_s32(x.3, y.3),
                );
                vst1q_s32_x4(to, low);
                vst1q_s32_x4(to.add(16), high);
                (from, to) = (from.add(32), to.add(32));
            }
            if run_len % 2 == 1 {
                vst1q_s32_x4(to, vld1q_s32_x4(from));
                (from, to) = (from.add(16), to.add(16));
            }
        }
    }
}

/// The second pixel of a pair: the next one, or the first again where there is none.
macro_rules! second {
    (both, $x0:literal, $x1:literal) => {
        concat!("add x", $x1, ", x", $x0, ", x1\n")
    };
    (one, $x0:literal, $x1:literal) => {
        concat!("mov x", $x1, ", x", $x0, "\n")
    };
}

/// Four registers of B with two groups of every pair of pixels: `$a` is the pair's register of
/// A, then come its accumulators of those channels.
macro_rules! products {
    ($b0:literal $b1:literal $b2:literal $b3:literal; $(($a:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal))*) => {
        concat!(
            $("smmla v", $c0, ".4s, v", $a, ".16b, v", $b0, ".16b\n",
            "smmla v", $c1, ".4s, v", $a, ".16b, v", $b1, ".16b\n",
            "smmla v", $c2, ".4s, v", $a, ".16b, v", $b2, ".16b\n",
            "smmla v", $c3, ".4s, v", $a, ".16b, v", $b3, ".16b\n",)*
        )
    };
}

/// The next four registers of B, into one of two places.
macro_rules! b_load {
    (even) => {
        "ld1 {{v24.16b-v27.16b}}, [x2], #64\n"
    };
    (odd) => {
        "ld1 {{v28.16b-v31.16b}}, [x2], #64\n"
    };
}

/// One pixel of a pair as `[16]`, stored: `$zip` is 1 for the first, 2 for the second.
macro_rules! finish {
    (both, $($c:literal)*) => {
        concat!(finish!(@ "1", $($c)*), finish!(@ "2", $($c)*))
    };
    (one, $($c:literal)*) => {
        finish!(@ "1", $($c)*)
    };
    (@ $zip:literal, $c0:literal $c1:literal $c2:literal $c3:literal
        $c4:literal $c5:literal $c6:literal $c7:literal) => {
        concat!(
            "zip", $zip, " v16.2d, v", $c0, ".2d, v", $c1, ".2d\n",
            "zip", $zip, " v17.2d, v", $c2, ".2d, v", $c3, ".2d\n",
            "zip", $zip, " v18.2d, v", $c4, ".2d, v", $c5, ".2d\n",
            "zip", $zip, " v19.2d, v", $c6, ".2d, v", $c7, ".2d\n",
            neon_store!(),
        )
    };
}

/// One micro-kernel. A pair of pixels: how many there are, its pointers and the one before
/// them, the five registers that A is loaded and zipped in, its accumulators.
macro_rules! tile {
    ($name:ident, $(($count:tt, $x0:literal, $x1:literal, $prev:literal,
        $t:literal, $a0:literal, $a1:literal, $b0:literal, $b1:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal,
        $c4:literal, $c5:literal, $c6:literal, $c7:literal))*) => {
        neon_tile!(
            $name,
            "neon,i8mm",
            DotTile,
            "8",
            start: concat!($(neon_zero!($c0 $c1 $c2 $c3 $c4 $c5 $c6 $c7),)*),
            pixels: concat!(
                $("add x", $x0, ", x", $prev, ", x1\n",
                second!($count, $x0, $x1),)*
            ),
            main: concat!(
                // Two registers of each of two pixels become four of both: t, a0, b0, a1 in
                // the order of K.
                $("ld1 {{v", $a0, ".16b, v", $a1, ".16b}}, [x", $x0, "], #32\n",
                "ld1 {{v", $b0, ".16b, v", $b1, ".16b}}, [x", $x1, "], #32\n",
                "zip1 v", $t, ".2d, v", $a0, ".2d, v", $b0, ".2d\n",
                "zip2 v", $a0, ".2d, v", $a0, ".2d, v", $b0, ".2d\n",
                "zip1 v", $b0, ".2d, v", $a1, ".2d, v", $b1, ".2d\n",
                "zip2 v", $a1, ".2d, v", $a1, ".2d, v", $b1, ".2d\n",)*
                b_load!(even),
                b_load!(odd),
                products!("24" "25" "26" "27"; $(($t, $c0, $c1, $c2, $c3))*),
                b_load!(even),
                products!("28" "29" "30" "31"; $(($t, $c4, $c5, $c6, $c7))*),
                b_load!(odd),
                products!("24" "25" "26" "27"; $(($a0, $c0, $c1, $c2, $c3))*),
                b_load!(even),
                products!("28" "29" "30" "31"; $(($a0, $c4, $c5, $c6, $c7))*),
                b_load!(odd),
                products!("24" "25" "26" "27"; $(($b0, $c0, $c1, $c2, $c3))*),
                b_load!(even),
                products!("28" "29" "30" "31"; $(($b0, $c4, $c5, $c6, $c7))*),
                b_load!(odd),
                products!("24" "25" "26" "27"; $(($a1, $c0, $c1, $c2, $c3))*),
                products!("28" "29" "30" "31"; $(($a1, $c4, $c5, $c6, $c7))*),
            ),
            rest: concat!(
                "subs x11, x11, #2\n",
                "b.lo 35f\n",
                "34:\n",
                b_load!(even),
                $("ldr d", $t, ", [x", $x0, "], #8\n",
                "ld1 {{v", $t, ".d}}[1], [x", $x1, "], #8\n",)*
                b_load!(odd),
                products!("24" "25" "26" "27"; $(($t, $c0, $c1, $c2, $c3))*),
                "subs x11, x11, #2\n",
                products!("28" "29" "30" "31"; $(($t, $c4, $c5, $c6, $c7))*),
                "b.hs 34b\n",
                "35:\n",
                "tbz x11, #0, 38f\n",
                // The odd last group, with zeros beside it.
                b_load!(even),
                "movi v23.2d, #0\n",
                $("ldr s", $t, ", [x", $x0, "], #4\n",
                "ld1 {{v", $t, ".s}}[2], [x", $x1, "], #4\n",)*
                "zip1 v28.4s, v24.4s, v23.4s\n",
                "zip2 v29.4s, v24.4s, v23.4s\n",
                "zip1 v30.4s, v25.4s, v23.4s\n",
                "zip2 v31.4s, v25.4s, v23.4s\n",
                products!("28" "29" "30" "31"; $(($t, $c0, $c1, $c2, $c3))*),
                "zip1 v28.4s, v26.4s, v23.4s\n",
                "zip2 v29.4s, v26.4s, v23.4s\n",
                "zip1 v30.4s, v27.4s, v23.4s\n",
                "zip2 v31.4s, v27.4s, v23.4s\n",
                products!("28" "29" "30" "31"; $(($t, $c4, $c5, $c6, $c7))*),
            ),
            end: concat!(
                neon_sums!(),
                $(finish!($count, $c0 $c1 $c2 $c3 $c4 $c5 $c6 $c7),)*
            ),
        );
    };
}

/// One or two pairs of pixels; the last may have only one.
macro_rules! tiles {
    ($name:ident, $count:tt) => {
        tile!(
            $name,
            (
                $count, "5", "6", "14", "20", "16", "17", "18", "19", "0", "1", "2", "3", "4", "5",
                "6", "7"
            )
        );
    };
    ($name:ident, both, $count:tt) => {
        tile!(
            $name,
            (
                both, "5", "6", "14", "20", "16", "17", "18", "19", "0", "1", "2", "3", "4", "5",
                "6", "7"
            )(
                $count, "7", "8", "6", "19", "21", "22", "23", "24", "8", "9", "10", "11", "12",
                "13", "14", "15"
            )
        );
    };
}

tiles!(t1, one);
tiles!(t2, both);
tiles!(t3, both, one);
tiles!(t4, both, both);

pub(crate) static TILES: [&[DotFn]; 1] = [&[t1, t2, t3, t4]];

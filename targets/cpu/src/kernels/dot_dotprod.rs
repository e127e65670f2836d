//! Arm with FEAT_DotProd: up to 4 pixels by one panel, in assembly.
//!
//! `sdot` by element multiplies a group of one pixel with the same group of four output
//! channels: four of them are a panel. A step of eight groups is one load of two registers of A
//! for each pixel, eight loads of a whole row of B, and 128 products of 16 bytes: 16
//! accumulators, 8 registers of A and two rows of B, of which one is loaded while the other is
//! used, are all 32 registers. More pixels would leave no room for whole rows of B, and cost
//! more instructions than they save.
//!
//! Registers, beside the frame's: x5-x8 pixels, v0-v15 accumulators, v16-v23 A, v24-v31 B.

use std::arch::asm;

use super::dot::{DotFn, DotTile};
use super::frame_neon::{neon_end, neon_start, neon_tile};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 4;

/// The next row of B, a group of all sixteen channels, into one of two places.
macro_rules! b_load {
    (even) => {
        "ld1 {{v24.16b-v27.16b}}, [x2], #64\n"
    };
    (odd) => {
        "ld1 {{v28.16b-v31.16b}}, [x2], #64\n"
    };
}

/// One group of one pixel.
macro_rules! dot {
    (even, $a:literal, $lane:literal, $($c:literal)*) => {
        dot!(@ $a, $lane, $($c)*, "24" "25" "26" "27")
    };
    (odd, $a:literal, $lane:literal, $($c:literal)*) => {
        dot!(@ $a, $lane, $($c)*, "28" "29" "30" "31")
    };
    (@ $a:literal, $lane:literal, $($c:literal)*, $($b:literal)*) => {
        concat!($("sdot v", $c, ".4s, v", $b, ".16b, v", $a, ".4b[", $lane, "]\n",)*)
    };
}

/// One micro-kernel.
macro_rules! tile {
    ($name:ident, $(($x:literal, $prev:literal, $a0:literal, $a1:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal))*) => {
        neon_tile!(
            $name,
            "neon,dotprod",
            DotTile,
            "8",
            start: neon_start!($(($c0 $c1 $c2 $c3))*),
            pixels: concat!($("add x", $x, ", x", $prev, ", x1\n",)*),
            main: concat!(
                b_load!(even),
                $("ld1 {{v", $a0, ".16b-v", $a1, ".16b}}, [x", $x, "], #32\n",)*
                b_load!(odd),
                $(dot!(even, $a0, "0", $c0 $c1 $c2 $c3),)*
                b_load!(even),
                $(dot!(odd, $a0, "1", $c0 $c1 $c2 $c3),)*
                b_load!(odd),
                $(dot!(even, $a0, "2", $c0 $c1 $c2 $c3),)*
                b_load!(even),
                $(dot!(odd, $a0, "3", $c0 $c1 $c2 $c3),)*
                b_load!(odd),
                $(dot!(even, $a1, "0", $c0 $c1 $c2 $c3),)*
                b_load!(even),
                $(dot!(odd, $a1, "1", $c0 $c1 $c2 $c3),)*
                b_load!(odd),
                $(dot!(even, $a1, "2", $c0 $c1 $c2 $c3),)*
                $(dot!(odd, $a1, "3", $c0 $c1 $c2 $c3),)*
            ),
            rest: concat!(
                "34:\n",
                b_load!(even),
                $("ldr s", $a0, ", [x", $x, "], #4\n",)*
                "subs x11, x11, #1\n",
                $(dot!(even, $a0, "0", $c0 $c1 $c2 $c3),)*
                "b.ne 34b",
            ),
            end: neon_end!($(($c0 $c3))*),
        );
    };
}

/// All tiles: each has the pixels of the one before it and one more.
macro_rules! family {
    ([$($done:tt)*]) => {};
    ([$($done:tt)*] ($name:ident $($pixel:literal)*) $($rest:tt)*) => {
        tile!($name, $($done)* ($($pixel),*));
        family!([$($done)* ($($pixel),*)] $($rest)*);
    };
}

family!([]
    (t1 "5" "14" "16" "17" "0" "1" "2" "3")
    (t2 "6" "5" "18" "19" "4" "5" "6" "7")
    (t3 "7" "6" "20" "21" "8" "9" "10" "11")
    (t4 "8" "7" "22" "23" "12" "13" "14" "15"));

pub(crate) static TILES: [&[DotFn]; 1] = [&[t1, t2, t3, t4]];

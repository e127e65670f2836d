//! NEON: up to 6 pixels by one panel, in assembly.
//!
//! 24 accumulators, one register of four channels of A for each pixel and two of B use all 32
//! registers: a step of four channels is 6 loads of A, 8 of B and 96 multiply-adds by lane.
//!
//! Registers, beside the frame's: x5-x10 pixels, v0-v23 accumulators, v24-v29 A, v30 and v31 B.

use std::arch::asm;

use super::frame_neon::{neon_end, neon_start, neon_tile};
use super::matmul::{Tile, TileFn};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 6;

/// Half of one k of the panel (eight channels) into v30 and v31; `first` advances B by the
/// whole block and the others look back.
macro_rules! b_load {
    (f32, first) => {
        "ldp q30, q31, [x2], #256\n"
    };
    (f32, $back:literal) => {
        concat!("ldp q30, q31, [x2, #-32*", $back, "]\n")
    };
    (f16, first) => {
        "ldr q30, [x2], #128\nfcvtl2 v31.4s, v30.8h\nfcvtl v30.4s, v30.4h\n"
    };
    (f16, $back:literal) => {
        concat!("ldur q30, [x2, #-16*", $back, "]\nfcvtl2 v31.4s, v30.8h\nfcvtl v30.4s, v30.4h\n")
    };
    (f32, one) => {
        "ldp q30, q31, [x2], #32\n"
    };
    (f16, one) => {
        "ldr q30, [x2], #16\nfcvtl2 v31.4s, v30.8h\nfcvtl v30.4s, v30.4h\n"
    };
}

/// Eight channels of one pixel.
macro_rules! fma {
    ($a:literal, $c0:literal, $c1:literal, $lane:literal) => {
        concat!(
            "fmla v",
            $c0,
            ".4s, v30.4s, v",
            $a,
            ".s[",
            $lane,
            "]\n",
            "fmla v",
            $c1,
            ".4s, v31.4s, v",
            $a,
            ".s[",
            $lane,
            "]\n"
        )
    };
}

/// One micro-kernel.
macro_rules! tile {
    ($name:ident, $t:tt, $(($x:literal, $prev:literal, $a:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal))*) => {
        neon_tile!(
            $name,
            "neon",
            Tile,
            "4",
            start: neon_start!($(($c0 $c1 $c2 $c3))*),
            pixels: concat!($("add x", $x, ", x", $prev, ", x1\n",)*),
            main: concat!(
                b_load!($t, first),
                $("ldr q", $a, ", [x", $x, "], #16\n", fma!($a, $c0, $c1, "0"),)*
                b_load!($t, "7"),
                $(fma!($a, $c2, $c3, "0"),)*
                b_load!($t, "6"),
                $(fma!($a, $c0, $c1, "1"),)*
                b_load!($t, "5"),
                $(fma!($a, $c2, $c3, "1"),)*
                b_load!($t, "4"),
                $(fma!($a, $c0, $c1, "2"),)*
                b_load!($t, "3"),
                $(fma!($a, $c2, $c3, "2"),)*
                b_load!($t, "2"),
                $(fma!($a, $c0, $c1, "3"),)*
                b_load!($t, "1"),
                $(fma!($a, $c2, $c3, "3"),)*
            ),
            rest: concat!(
                "34:\n",
                $("ldr s", $a, ", [x", $x, "], #4\n",)*
                b_load!($t, one),
                $(fma!($a, $c0, $c1, "0"),)*
                b_load!($t, one),
                $(fma!($a, $c2, $c3, "0"),)*
                "subs x11, x11, #1\n",
                "b.ne 34b",
            ),
            end: neon_end!($(($c0 $c3))*),
        );
    };
}

/// All tiles of one element type.
macro_rules! family {
    ($module:ident, $t:tt) => {
        mod $module {
            use super::*;
            family!(@grow $t, []
                (t1 "5" "14" "24" "0" "1" "2" "3")
                (t2 "6" "5" "25" "4" "5" "6" "7")
                (t3 "7" "6" "26" "8" "9" "10" "11")
                (t4 "8" "7" "27" "12" "13" "14" "15")
                (t5 "9" "8" "28" "16" "17" "18" "19")
                (t6 "10" "9" "29" "20" "21" "22" "23"));
            pub(super) static TABLE: [TileFn; ROWS] = [t1, t2, t3, t4, t5, t6];
        }
    };
    (@grow $t:tt, [$($done:tt)*]) => {};
    (@grow $t:tt, [$($done:tt)*]
        ($name:ident $x:literal $prev:literal $a:literal
            $c0:literal $c1:literal $c2:literal $c3:literal) $($rest:tt)*) => {
        tile!($name, $t, $($done)* ($x, $prev, $a, $c0, $c1, $c2, $c3));
        family!(@grow $t, [$($done)* ($x, $prev, $a, $c0, $c1, $c2, $c3)] $($rest)*);
    };
}

family!(tiles_f32, f32);
family!(tiles_f16, f16);

pub(crate) static F32: [&[TileFn]; 1] = [&tiles_f32::TABLE];
pub(crate) static F16: [&[TileFn]; 1] = [&tiles_f16::TABLE];

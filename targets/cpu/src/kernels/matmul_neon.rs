//! NEON: up to 6 pixels by one panel, in assembly.
//!
//! 24 accumulators, one register of four channels of A for each pixel and two of B use all 32
//! registers: a step of four channels is 6 loads of A, 8 of B and 96 multiply-adds by lane.
//!
//! Registers: x0 tile, x1 stride, x2 B, x3 next run, x4 runs left, x5-x10 pixels, x11 k left,
//! x12 and x14 scratch, x13 accumulator stride; v0-v23 accumulators, v24-v29 A, v30 and v31 B.

use std::arch::asm;

use super::matmul::{Tile, TileFn};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 6;

/// Half of one k of the panel (eight channels) into v30 and v31; `first` advances B by the
/// whole block and the others look back.
macro_rules! b_load {
    (f32, first) => {
        "ldp q30, q31, [x2], #256"
    };
    (f32, $back:literal) => {
        concat!("ldp q30, q31, [x2, #-32*", $back, "]")
    };
    (f16, first) => {
        "ldr q30, [x2], #128\nfcvtl2 v31.4s, v30.8h\nfcvtl v30.4s, v30.4h"
    };
    (f16, $back:literal) => {
        concat!("ldur q30, [x2, #-16*", $back, "]\nfcvtl2 v31.4s, v30.8h\nfcvtl v30.4s, v30.4h")
    };
    (f32, one) => {
        "ldp q30, q31, [x2], #32"
    };
    (f16, one) => {
        "ldr q30, [x2], #16\nfcvtl2 v31.4s, v30.8h\nfcvtl v30.4s, v30.4h"
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
            "]"
        )
    };
}

/// One micro-kernel.
macro_rules! tile {
    ($name:ident, $t:tt, $(($x:literal, $prev:literal, $a:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal))*) => {
        #[target_feature(enable = "neon")]
        unsafe fn $name(t: &Tile) {
            // SAFETY: reads and writes exactly the addresses of the formula in
            // `super::matmul`, which the caller vouches for; all registers are declared.
            unsafe {
                asm!(
                    "ldr x1, [x0, #8]",
                    "ldp x3, x4, [x0, #16]",
                    "ldr x2, [x0, #40]",
                    "ldr x12, [x0, #72]",
                    "cbnz x12, 20f",
                    $(concat!(
                        "movi v", $c0, ".2d, #0\n", "movi v", $c1, ".2d, #0\n",
                        "movi v", $c2, ".2d, #0\n", "movi v", $c3, ".2d, #0"),)*
                    "b 30f",
                    "20:",
                    "ldp x12, x13, [x0, #56]",
                    $(concat!(
                        "ldp q", $c0, ", q", $c1, ", [x12]\n",
                        "ldp q", $c2, ", q", $c3, ", [x12, #32]\n",
                        "add x12, x12, x13"),)*
                    "30:",
                    "cbz x4, 39f",
                    "31:",
                    "ldr x12, [x0]",
                    "ldr x11, [x3], #8",
                    "add x14, x12, x11",
                    "sub x14, x14, x1",
                    "ldr x11, [x0, #32]",
                    $(concat!("add x", $x, ", x", $prev, ", x1"),)*
                    "subs x11, x11, #4",
                    "b.lo 33f",
                    "32:",
                    b_load!($t, first),
                    $(concat!("ldr q", $a, ", [x", $x, "], #16"), fma!($a, $c0, $c1, "0"),)*
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
                    "subs x11, x11, #4",
                    "b.hs 32b",
                    "33:",
                    "adds x11, x11, #4",
                    "b.eq 35f",
                    "34:",
                    $(concat!("ldr s", $a, ", [x", $x, "], #4"),)*
                    b_load!($t, one),
                    $(fma!($a, $c0, $c1, "0"),)*
                    b_load!($t, one),
                    $(fma!($a, $c2, $c3, "0"),)*
                    "subs x11, x11, #1",
                    "b.ne 34b",
                    "35:",
                    "subs x4, x4, #1",
                    "b.ne 31b",
                    "39:",
                    "ldp x12, x13, [x0, #56]",
                    $(concat!(
                        "stp q", $c0, ", q", $c1, ", [x12]\n",
                        "stp q", $c2, ", q", $c3, ", [x12, #32]\n",
                        "add x12, x12, x13"),)*
                    in("x0") t,
                    out("x1") _, out("x2") _, out("x3") _, out("x4") _, out("x5") _,
                    out("x6") _, out("x7") _, out("x8") _, out("x9") _, out("x10") _,
                    out("x11") _, out("x12") _, out("x13") _, out("x14") _,
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _,
                    out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v8") _, out("v9") _, out("v10") _, out("v11") _,
                    out("v12") _, out("v13") _, out("v14") _, out("v15") _,
                    out("v16") _, out("v17") _, out("v18") _, out("v19") _,
                    out("v20") _, out("v21") _, out("v22") _, out("v23") _,
                    out("v24") _, out("v25") _, out("v26") _, out("v27") _,
                    out("v28") _, out("v29") _, out("v30") _, out("v31") _,
                    options(nostack),
                );
            }
        }
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

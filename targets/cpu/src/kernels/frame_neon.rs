//! The frame of the 64-bit Arm micro-kernels: all of them but the multiplication itself.
//!
//! Registers: x0 operands, x1 stride, x2 B, x3 next run, x4 runs left, x5-x10 pixels, x11 steps
//! left, x12-x14 scratch; the vectors are the kernel's.

/// The micro-kernel `$name` on operands `$operands`, from the assembly of its parts:
/// - `start`: accumulators from zero, or from what they hold; x12 and x13 are free;
/// - `pixels`: x5 and on from the previous pixel (x14 is the one before the first), x1 apart;
/// - `main`: `$step` steps of every pixel, each pointer and x2 advanced past them;
/// - `rest`: the x11 steps that are left, 1 to `$step - 1`;
/// - `end`: accumulators stored; every scratch register is free.
///
/// Labels 31 to 33 and 38 to 39 are the frame's, 20, 21 and 40 those of the parts below.
macro_rules! neon_tile {
    ($name:ident, $features:literal, $operands:ty, $step:literal,
        start: $start:expr, pixels: $pixels:expr, main: $main:expr, rest: $rest:expr,
        end: $end:expr $(,)?) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(t: &$operands) {
            // SAFETY: reads and writes exactly the addresses of the operands' formula, which
            // the caller vouches for; all registers are declared.
            unsafe {
                asm!(
                    "ldr x1, [x0, #8]",
                    "ldp x3, x4, [x0, #16]",
                    "ldr x2, [x0, #40]",
                    $start,
                    "cbz x4, 39f",
                    "31:",
                    "ldr x12, [x0]",
                    "ldr x11, [x3], #8",
                    "add x14, x12, x11",
                    "sub x14, x14, x1",
                    "ldr x11, [x0, #32]",
                    $pixels,
                    concat!("subs x11, x11, #", $step),
                    "b.lo 33f",
                    "32:",
                    $main,
                    concat!("subs x11, x11, #", $step),
                    "b.hs 32b",
                    "33:",
                    concat!("adds x11, x11, #", $step),
                    "b.eq 38f",
                    $rest,
                    "38:",
                    "subs x4, x4, #1",
                    "b.ne 31b",
                    "39:",
                    $end,
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

/// Four accumulators of each pixel from zero, or from the accumulators' tile where
/// `accumulate` is set.
macro_rules! neon_start {
    ($(($c0:literal $c1:literal $c2:literal $c3:literal))*) => {
        concat!(
            "ldr x12, [x0, #72]\n",
            "cbnz x12, 20f\n",
            $("movi v", $c0, ".2d, #0\n", "movi v", $c1, ".2d, #0\n",
            "movi v", $c2, ".2d, #0\n", "movi v", $c3, ".2d, #0\n",)*
            "b 21f\n",
            "20:\n",
            "ldp x12, x13, [x0, #56]\n",
            $("ld1 {{v", $c0, ".4s-v", $c3, ".4s}}, [x12], x13\n",)*
            "21:\n",
        )
    };
}

/// Four accumulators of each pixel to the accumulators' tile.
macro_rules! neon_end {
    ($(($c0:literal $c3:literal))*) => {
        concat!(
            "ldp x12, x13, [x0, #56]\n",
            $("st1 {{v", $c0, ".4s-v", $c3, ".4s}}, [x12], x13\n",)*
        )
    };
}

/// v16-v19, one pixel's sums, to the accumulators' tile at x12, and past it: added to what is
/// there where x11 is not zero. v20-v23 are scratch.
macro_rules! neon_store {
    () => {
        concat!(
            "cbz x11, 40f\n",
            "ld1 {{v20.4s-v23.4s}}, [x12]\n",
            "add v16.4s, v16.4s, v20.4s\n",
            "add v17.4s, v17.4s, v21.4s\n",
            "add v18.4s, v18.4s, v22.4s\n",
            "add v19.4s, v19.4s, v23.4s\n",
            "40:\n",
            "st1 {{v16.4s-v19.4s}}, [x12], x13\n",
        )
    };
}

/// Accumulators from zero.
macro_rules! neon_zero {
    ($($c:literal)*) => {
        concat!($("movi v", $c, ".2d, #0\n",)*)
    };
}

/// x12 and x13 the accumulators' tile and its stride, x11 whether to add to it.
macro_rules! neon_sums {
    () => {
        "ldp x12, x13, [x0, #56]\nldr x11, [x0, #72]\n"
    };
}

pub(crate) use {neon_end, neon_start, neon_store, neon_sums, neon_tile, neon_zero};

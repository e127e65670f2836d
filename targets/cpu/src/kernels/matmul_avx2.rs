//! AVX2 and FMA: up to 6 pixels by one panel, in assembly.
//!
//! 12 accumulators, two registers of B and two of broadcast A use all 16 registers.
//!
//! Registers: rdi tile, rsi stride, rdx 3 * stride, r8 and r9 bases of four pixels, rax B,
//! r12 k left, r13 next run, r14 runs left, r15 scratch.

use std::arch::asm;

use super::matmul::{Tile, TileFn};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 6;

/// One k of the panel into ymm12 and ymm13, by element type.
macro_rules! b_load {
    (f32, $k:literal) => {
        concat!(
            "vmovups ymm12, ymmword ptr [rax + 64*",
            $k,
            "]\n",
            "vmovups ymm13, ymmword ptr [rax + 64*",
            $k,
            " + 32]"
        )
    };
    (f16, $k:literal) => {
        concat!(
            "vcvtph2ps ymm12, xmmword ptr [rax + 32*",
            $k,
            "]\n",
            "vcvtph2ps ymm13, xmmword ptr [rax + 32*",
            $k,
            " + 16]"
        )
    };
}

/// Bytes of `$k` elements of the panel.
macro_rules! b_step {
    (f32, $k:literal) => {
        concat!("add rax, 64*", $k)
    };
    (f16, $k:literal) => {
        concat!("add rax, 32*", $k)
    };
}

/// One pixel, one k.
macro_rules! pixel {
    ($addr:literal, $r:literal, $c0:literal, $c1:literal, $k:literal) => {
        concat!(
            "vbroadcastss ymm",
            $r,
            ", dword ptr [",
            $addr,
            " + 4*",
            $k,
            "]\n",
            "vfmadd231ps ymm",
            $c0,
            ", ymm12, ymm",
            $r,
            "\n",
            "vfmadd231ps ymm",
            $c1,
            ", ymm13, ymm",
            $r
        )
    };
}

/// One micro-kernel.
macro_rules! tile {
    ($name:ident, $t:tt, $(($addr:literal, $r:literal, $c0:literal, $c1:literal))*) => {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name(t: &Tile) {
            // SAFETY: reads and writes exactly the addresses of the formula in
            // `super::matmul`, which the caller vouches for; all registers are declared.
            unsafe {
                asm!(
                    "mov rsi, [rdi + 8]",
                    "lea rdx, [rsi + 2*rsi]",
                    "mov rax, [rdi + 40]",
                    "mov r13, [rdi + 16]",
                    "mov r14, [rdi + 24]",
                    "cmp qword ptr [rdi + 72], 0",
                    "jne 20f",
                    $(concat!(
                        "vxorps ymm", $c0, ", ymm", $c0, ", ymm", $c0, "\n",
                        "vxorps ymm", $c1, ", ymm", $c1, ", ymm", $c1),)*
                    "jmp 30f",
                    "20:",
                    "mov r8, [rdi + 56]",
                    "mov r15, [rdi + 64]",
                    $(concat!(
                        "vmovups ymm", $c0, ", ymmword ptr [r8]\n",
                        "vmovups ymm", $c1, ", ymmword ptr [r8 + 32]\n",
                        "add r8, r15"),)*
                    "30:",
                    "test r14, r14",
                    "jz 39f",
                    ".p2align 4",
                    "31:",
                    "mov r8, [rdi]",
                    "add r8, [r13]",
                    "add r13, 8",
                    "lea r9, [r8 + 4*rsi]",
                    "mov r12, [rdi + 32]",
                    "sub r12, 4",
                    "jb 33f",
                    ".p2align 5",
                    "32:",
                    b_load!($t, "0"),
                    $(pixel!($addr, $r, $c0, $c1, "0"),)*
                    b_load!($t, "1"),
                    $(pixel!($addr, $r, $c0, $c1, "1"),)*
                    b_load!($t, "2"),
                    $(pixel!($addr, $r, $c0, $c1, "2"),)*
                    b_load!($t, "3"),
                    $(pixel!($addr, $r, $c0, $c1, "3"),)*
                    "add r8, 16",
                    "add r9, 16",
                    b_step!($t, "4"),
                    "sub r12, 4",
                    "jae 32b",
                    "33:",
                    "add r12, 4",
                    "jz 35f",
                    "34:",
                    b_load!($t, "0"),
                    $(pixel!($addr, $r, $c0, $c1, "0"),)*
                    "add r8, 4",
                    "add r9, 4",
                    b_step!($t, "1"),
                    "dec r12",
                    "jnz 34b",
                    "35:",
                    "dec r14",
                    "jnz 31b",
                    "39:",
                    "mov r8, [rdi + 56]",
                    "mov r15, [rdi + 64]",
                    $(concat!(
                        "vmovups ymmword ptr [r8], ymm", $c0, "\n",
                        "vmovups ymmword ptr [r8 + 32], ymm", $c1, "\n",
                        "add r8, r15"),)*
                    in("rdi") t,
                    out("rax") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _,
                    out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                    out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                    out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
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
                (t1 "r8" "14" "0" "1")
                (t2 "r8 + rsi" "15" "2" "3")
                (t3 "r8 + 2*rsi" "14" "4" "5")
                (t4 "r8 + rdx" "15" "6" "7")
                (t5 "r9" "14" "8" "9")
                (t6 "r9 + rsi" "15" "10" "11"));
            pub(super) static TABLE: [TileFn; ROWS] = [t1, t2, t3, t4, t5, t6];
        }
    };
    (@grow $t:tt, [$($done:tt)*]) => {};
    (@grow $t:tt, [$($done:tt)*]
        ($name:ident $addr:literal $r:literal $c0:literal $c1:literal) $($rest:tt)*) => {
        tile!($name, $t, $($done)* ($addr, $r, $c0, $c1));
        family!(@grow $t, [$($done)* ($addr, $r, $c0, $c1)] $($rest)*);
    };
}

family!(tiles_f32, f32);
family!(tiles_f16, f16);

pub(crate) static F32: [&[TileFn]; 1] = [&tiles_f32::TABLE];
pub(crate) static F16: [&[TileFn]; 1] = [&tiles_f16::TABLE];

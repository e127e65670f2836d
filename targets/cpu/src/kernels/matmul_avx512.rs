//! AVX-512: up to 14 pixels by one or two panels, in assembly.
//!
//! 28 accumulators, two registers of B and two of broadcast A use all 32 registers, which
//! compilers do not manage without spilling. Pixels are addressed in fours from one base
//! register each (`base + {0, 1, 2, 3} * stride`), so 14 of them take six.
//!
//! Registers: rdi tile, rsi stride, rdx 3 * stride, r8-r11 bases of four pixels, rax B,
//! rcx panel stride, r12 k left, r13 next run, r14 runs left, r15 scratch.

use std::arch::asm;

use super::matmul::{Tile, TileFn};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 14;

/// One k of one panel into zmm28, by element type.
macro_rules! b_one {
    (f32, $k:literal) => {
        concat!("vmovups zmm28, zmmword ptr [rax + 64*", $k, "]")
    };
    (f16, $k:literal) => {
        concat!("vcvtph2ps zmm28, ymmword ptr [rax + 32*", $k, "]")
    };
}

/// One k of the second panel into zmm29.
macro_rules! b_two {
    (f32, $k:literal) => {
        concat!("vmovups zmm29, zmmword ptr [rax + rcx + 64*", $k, "]")
    };
    (f16, $k:literal) => {
        concat!("vcvtph2ps zmm29, ymmword ptr [rax + rcx + 32*", $k, "]")
    };
}

/// Bytes of `$k` elements of a panel.
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
    (two, $addr:literal, $r:literal, $c0:literal, $c1:literal, $k:literal) => {
        concat!(
            "vbroadcastss zmm",
            $r,
            ", dword ptr [",
            $addr,
            " + 4*",
            $k,
            "]\n",
            "vfmadd231ps zmm",
            $c0,
            ", zmm28, zmm",
            $r,
            "\n",
            "vfmadd231ps zmm",
            $c1,
            ", zmm29, zmm",
            $r
        )
    };
    (one, $addr:literal, $r:literal, $c0:literal, $c1:literal, $k:literal) => {
        concat!("vfmadd231ps zmm", $c0, ", zmm28, dword ptr [", $addr, " + 4*", $k, "]{{1to16}}")
    };
}

macro_rules! clear {
    (two, $c0:literal, $c1:literal) => {
        concat!(
            "vpxord zmm",
            $c0,
            ", zmm",
            $c0,
            ", zmm",
            $c0,
            "\n",
            "vpxord zmm",
            $c1,
            ", zmm",
            $c1,
            ", zmm",
            $c1
        )
    };
    (one, $c0:literal, $c1:literal) => {
        concat!("vpxord zmm", $c0, ", zmm", $c0, ", zmm", $c0)
    };
}

macro_rules! load {
    (two, $c0:literal, $c1:literal) => {
        concat!(
            "vmovups zmm",
            $c0,
            ", zmmword ptr [r8]\n",
            "vmovups zmm",
            $c1,
            ", zmmword ptr [r8 + 64]\n",
            "add r8, r15"
        )
    };
    (one, $c0:literal, $c1:literal) => {
        concat!("vmovups zmm", $c0, ", zmmword ptr [r8]\n", "add r8, r15")
    };
}

macro_rules! store {
    (two, $c0:literal, $c1:literal) => {
        concat!(
            "vmovups zmmword ptr [r8], zmm",
            $c0,
            "\n",
            "vmovups zmmword ptr [r8 + 64], zmm",
            $c1,
            "\n",
            "add r8, r15"
        )
    };
    (one, $c0:literal, $c1:literal) => {
        concat!("vmovups zmmword ptr [r8], zmm", $c0, "\n", "add r8, r15")
    };
}

macro_rules! second {
    (two, $t:tt, $k:literal) => {
        b_two!($t, $k)
    };
    (one, $t:tt, $k:literal) => {
        ""
    };
}

/// One micro-kernel.
macro_rules! tile {
    ($name:ident, $panels:tt, $t:tt, $(($addr:literal, $r:literal, $c0:literal, $c1:literal))*) => {
        #[target_feature(enable = "avx512f")]
        unsafe fn $name(t: &Tile) {
            // SAFETY: reads and writes exactly the addresses of the formula in
            // `super::matmul`, which the caller vouches for; all registers are declared.
            unsafe {
                asm!(
                    "mov rsi, [rdi + 8]",
                    "lea rdx, [rsi + 2*rsi]",
                    "mov rax, [rdi + 40]",
                    "mov rcx, [rdi + 48]",
                    "mov r13, [rdi + 16]",
                    "mov r14, [rdi + 24]",
                    "cmp qword ptr [rdi + 72], 0",
                    "jne 20f",
                    $(clear!($panels, $c0, $c1),)*
                    "jmp 30f",
                    "20:",
                    "mov r8, [rdi + 56]",
                    "mov r15, [rdi + 64]",
                    $(load!($panels, $c0, $c1),)*
                    "30:",
                    "test r14, r14",
                    "jz 39f",
                    ".p2align 4",
                    "31:",
                    "mov r8, [rdi]",
                    "add r8, [r13]",
                    "add r13, 8",
                    "lea r9, [r8 + 4*rsi]",
                    "lea r10, [r9 + 4*rsi]",
                    "lea r11, [r10 + 4*rsi]",
                    "mov r12, [rdi + 32]",
                    "sub r12, 4",
                    "jb 33f",
                    ".p2align 5",
                    "32:",
                    b_one!($t, "0"), second!($panels, $t, "0"),
                    $(pixel!($panels, $addr, $r, $c0, $c1, "0"),)*
                    b_one!($t, "1"), second!($panels, $t, "1"),
                    $(pixel!($panels, $addr, $r, $c0, $c1, "1"),)*
                    b_one!($t, "2"), second!($panels, $t, "2"),
                    $(pixel!($panels, $addr, $r, $c0, $c1, "2"),)*
                    b_one!($t, "3"), second!($panels, $t, "3"),
                    $(pixel!($panels, $addr, $r, $c0, $c1, "3"),)*
                    "add r8, 16",
                    "add r9, 16",
                    "add r10, 16",
                    "add r11, 16",
                    b_step!($t, "4"),
                    "sub r12, 4",
                    "jae 32b",
                    "33:",
                    "add r12, 4",
                    "jz 35f",
                    "34:",
                    b_one!($t, "0"), second!($panels, $t, "0"),
                    $(pixel!($panels, $addr, $r, $c0, $c1, "0"),)*
                    "add r8, 4",
                    "add r9, 4",
                    "add r10, 4",
                    "add r11, 4",
                    b_step!($t, "1"),
                    "dec r12",
                    "jnz 34b",
                    "35:",
                    "dec r14",
                    "jnz 31b",
                    "39:",
                    "mov r8, [rdi + 56]",
                    "mov r15, [rdi + 64]",
                    $(store!($panels, $c0, $c1),)*
                    in("rdi") t,
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                    out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                    out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                    out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                    out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                    out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                    options(nostack),
                );
            }
        }
    };
}

/// All tiles of one element type and number of panels.
macro_rules! family {
    ($module:ident, $panels:tt, $t:tt) => {
        mod $module {
            use super::*;
            family!(@grow $panels, $t, []
                (t1 "r8" "30" "0" "1")
                (t2 "r8 + rsi" "31" "2" "3")
                (t3 "r8 + 2*rsi" "30" "4" "5")
                (t4 "r8 + rdx" "31" "6" "7")
                (t5 "r9" "30" "8" "9")
                (t6 "r9 + rsi" "31" "10" "11")
                (t7 "r9 + 2*rsi" "30" "12" "13")
                (t8 "r9 + rdx" "31" "14" "15")
                (t9 "r10" "30" "16" "17")
                (t10 "r10 + rsi" "31" "18" "19")
                (t11 "r10 + 2*rsi" "30" "20" "21")
                (t12 "r10 + rdx" "31" "22" "23")
                (t13 "r11" "30" "24" "25")
                (t14 "r11 + rsi" "31" "26" "27"));
            pub(super) static TABLE: [TileFn; ROWS] =
                [t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14];
        }
    };
    (@grow $panels:tt, $t:tt, [$($done:tt)*]) => {};
    (@grow $panels:tt, $t:tt, [$($done:tt)*]
        ($name:ident $addr:literal $r:literal $c0:literal $c1:literal) $($rest:tt)*) => {
        tile!($name, $panels, $t, $($done)* ($addr, $r, $c0, $c1));
        family!(@grow $panels, $t, [$($done)* ($addr, $r, $c0, $c1)] $($rest)*);
    };
}

family!(one_f32, one, f32);
family!(two_f32, two, f32);
family!(one_f16, one, f16);
family!(two_f16, two, f16);

pub(crate) static F32: [&[TileFn]; 2] = [&one_f32::TABLE, &two_f32::TABLE];
pub(crate) static F16: [&[TileFn]; 2] = [&one_f16::TABLE, &two_f16::TABLE];

//! The frame of the AVX-512 micro-kernels: all of them but the multiplication itself.
//!
//! The accumulators of up to 14 pixels by one or two panels start from zero or from memory,
//! the loops walk the runs, four steps of k at a time, and the accumulators go back to memory.
//! What a step of k does with weights and pixels is a macro of each kernel's: compilers do not
//! keep this many registers without spilling, hence assembly. Pixels are addressed in fours
//! from one base register each (`base + {0, 1, 2, 3} * stride`), so 14 of them take four.
//!
//! Registers: rdi operands, rsi stride, rdx 3 * stride, r8-r11 bases of four pixels, rax B,
//! rcx panel stride, r12 steps left, r13 next run, r14 runs left, r15 scratch; accumulators of
//! pixel p and panel q in zmm(2 p + q); the rest is the kernel's.

/// A module with `TABLE`, the micro-kernels of 1 to `$rows` pixels by `$panels` (`one` or
/// `two`) panels on operands `$operands`.
///
/// `$ops!` gives the assembly of one kernel, `$t` tells it which:
/// - `$ops!(setup $t)`: constants in registers, once;
/// - `$ops!(weights $panels $t k)`: the panels of step `k` from the current one;
/// - `$ops!(pixel $panels $t addr r c0 c1 k)`: step `k` of the pixel at `addr`, summed in zmm
///   `c0` and `c1`; zmm `r` is free, and another one than the previous pixel's;
/// - `$ops!(advance $t n)`: rax past `n` steps.
macro_rules! avx512_tiles {
    ($module:ident, $features:literal, $operands:ty, $rows:tt, $panels:tt, $ops:ident, $t:tt) => {
        mod $module {
            use super::*;
            avx512_tiles!(@rows $rows ($features, $operands, $panels, $ops, $t));
        }
    };
    (@rows 14 $kernel:tt) => {
        avx512_tiles!(@grow $kernel []
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
        avx512_tiles!(@table $kernel 14
            [t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14]);
    };
    (@rows 12 $kernel:tt) => {
        avx512_tiles!(@grow $kernel []
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
            (t12 "r10 + rdx" "31" "22" "23"));
        avx512_tiles!(@table $kernel 12 [t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12]);
    };
    (@table ($features:literal, $operands:ty, $panels:tt, $ops:ident, $t:tt) $n:tt $list:expr) => {
        pub(super) static TABLE: [unsafe fn(&$operands); $n] = $list;
    };
    (@grow $kernel:tt [$($done:tt)*]) => {};
    (@grow $kernel:tt [$($done:tt)*]
        ($name:ident $addr:literal $r:literal $c0:literal $c1:literal) $($rest:tt)*) => {
        avx512_tiles!(@tile $kernel $name $($done)* ($addr, $r, $c0, $c1));
        avx512_tiles!(@grow $kernel [$($done)* ($addr, $r, $c0, $c1)] $($rest)*);
    };
    (@clear two $c0:literal $c1:literal) => {
        concat!(
            "vpxord zmm", $c0, ", zmm", $c0, ", zmm", $c0, "\n",
            "vpxord zmm", $c1, ", zmm", $c1, ", zmm", $c1)
    };
    (@clear one $c0:literal $c1:literal) => {
        concat!("vpxord zmm", $c0, ", zmm", $c0, ", zmm", $c0)
    };
    (@load two $c0:literal $c1:literal) => {
        concat!(
            "vmovups zmm", $c0, ", zmmword ptr [r8]\n",
            "vmovups zmm", $c1, ", zmmword ptr [r8 + 64]\n",
            "add r8, r15")
    };
    (@load one $c0:literal $c1:literal) => {
        concat!("vmovups zmm", $c0, ", zmmword ptr [r8]\n", "add r8, r15")
    };
    (@store two $c0:literal $c1:literal) => {
        concat!(
            "vmovups zmmword ptr [r8], zmm", $c0, "\n",
            "vmovups zmmword ptr [r8 + 64], zmm", $c1, "\n",
            "add r8, r15")
    };
    (@store one $c0:literal $c1:literal) => {
        concat!("vmovups zmmword ptr [r8], zmm", $c0, "\n", "add r8, r15")
    };
    (@tile ($features:literal, $operands:ty, $panels:tt, $ops:ident, $t:tt) $name:ident
        $(($addr:literal, $r:literal, $c0:literal, $c1:literal))*) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(t: &$operands) {
            // SAFETY: reads and writes exactly the addresses of the operands' formula, which
            // the caller vouches for; all registers are declared.
            unsafe {
                asm!(
                    "mov rsi, [rdi + 8]",
                    "lea rdx, [rsi + 2*rsi]",
                    "mov rax, [rdi + 40]",
                    "mov rcx, [rdi + 48]",
                    "mov r13, [rdi + 16]",
                    "mov r14, [rdi + 24]",
                    $ops!(setup $t),
                    "cmp qword ptr [rdi + 72], 0",
                    "jne 20f",
                    $(avx512_tiles!(@clear $panels $c0 $c1),)*
                    "jmp 30f",
                    "20:",
                    "mov r8, [rdi + 56]",
                    "mov r15, [rdi + 64]",
                    $(avx512_tiles!(@load $panels $c0 $c1),)*
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
                    $ops!(weights $panels $t "0"),
                    $($ops!(pixel $panels $t $addr $r $c0 $c1 "0"),)*
                    $ops!(weights $panels $t "1"),
                    $($ops!(pixel $panels $t $addr $r $c0 $c1 "1"),)*
                    $ops!(weights $panels $t "2"),
                    $($ops!(pixel $panels $t $addr $r $c0 $c1 "2"),)*
                    $ops!(weights $panels $t "3"),
                    $($ops!(pixel $panels $t $addr $r $c0 $c1 "3"),)*
                    "add r8, 16",
                    "add r9, 16",
                    "add r10, 16",
                    "add r11, 16",
                    $ops!(advance $t "4"),
                    "sub r12, 4",
                    "jae 32b",
                    "33:",
                    "add r12, 4",
                    "jz 35f",
                    "34:",
                    $ops!(weights $panels $t "0"),
                    $($ops!(pixel $panels $t $addr $r $c0 $c1 "0"),)*
                    "add r8, 4",
                    "add r9, 4",
                    "add r10, 4",
                    "add r11, 4",
                    $ops!(advance $t "1"),
                    "dec r12",
                    "jnz 34b",
                    "35:",
                    "dec r14",
                    "jnz 31b",
                    "39:",
                    "mov r8, [rdi + 56]",
                    "mov r15, [rdi + 64]",
                    $(avx512_tiles!(@store $panels $c0 $c1),)*
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

pub(crate) use avx512_tiles;

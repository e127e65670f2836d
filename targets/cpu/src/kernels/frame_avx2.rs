//! The frame of the AVX2 micro-kernels: all of them but the multiplication itself.
//!
//! As the frame of the AVX-512 ones, with up to 6 pixels by one panel, whose sixteen channels
//! take two registers.
//!
//! Registers: rdi operands, rsi stride, rdx 3 * stride, r8 and r9 bases of four pixels, rax B,
//! r12 steps left, r13 next run, r14 runs left, r15 scratch; accumulators of pixel p in
//! ymm(2 p) and ymm(2 p + 1); the rest is the kernel's.

/// A module with `TABLE`, the micro-kernels of 1 to `$rows` pixels on operands `$operands`.
///
/// `$ops!` gives the assembly of one kernel, `$t` tells it which:
/// - `$ops!(setup $t)`: constants in registers, once;
/// - `$ops!(weights $t k)`: the panel of step `k` from the current one;
/// - `$ops!(pixel $t addr r c0 c1 k)`: step `k` of the pixel at `addr`, summed in ymm `c0` and
///   `c1`; ymm `r` is free, and another one than the previous pixel's;
/// - `$ops!(advance $t n)`: rax past `n` steps.
macro_rules! avx2_tiles {
    ($module:ident, $features:literal, $operands:ty, $rows:tt, $ops:ident, $t:tt) => {
        mod $module {
            use super::*;
            avx2_tiles!(@rows $rows ($features, $operands, $ops, $t));
        }
    };
    (@rows 6 $kernel:tt) => {
        avx2_tiles!(@grow $kernel []
            (t1 "r8" "14" "0" "1")
            (t2 "r8 + rsi" "15" "2" "3")
            (t3 "r8 + 2*rsi" "14" "4" "5")
            (t4 "r8 + rdx" "15" "6" "7")
            (t5 "r9" "14" "8" "9")
            (t6 "r9 + rsi" "15" "10" "11"));
        avx2_tiles!(@table $kernel 6 [t1, t2, t3, t4, t5, t6]);
    };
    (@rows 4 $kernel:tt) => {
        avx2_tiles!(@grow $kernel []
            (t1 "r8" "14" "0" "1")
            (t2 "r8 + rsi" "15" "2" "3")
            (t3 "r8 + 2*rsi" "14" "4" "5")
            (t4 "r8 + rdx" "15" "6" "7"));
        avx2_tiles!(@table $kernel 4 [t1, t2, t3, t4]);
    };
    (@table ($features:literal, $operands:ty, $ops:ident, $t:tt) $n:tt $list:expr) => {
        pub(super) static TABLE: [unsafe fn(&$operands); $n] = $list;
    };
    (@grow $kernel:tt [$($done:tt)*]) => {};
    (@grow $kernel:tt [$($done:tt)*]
        ($name:ident $addr:literal $r:literal $c0:literal $c1:literal) $($rest:tt)*) => {
        avx2_tiles!(@tile $kernel $name $($done)* ($addr, $r, $c0, $c1));
        avx2_tiles!(@grow $kernel [$($done)* ($addr, $r, $c0, $c1)] $($rest)*);
    };
    (@tile ($features:literal, $operands:ty, $ops:ident, $t:tt) $name:ident
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
                    "mov r13, [rdi + 16]",
                    "mov r14, [rdi + 24]",
                    $ops!(setup $t),
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
                    $ops!(weights $t "0"),
                    $($ops!(pixel $t $addr $r $c0 $c1 "0"),)*
                    $ops!(weights $t "1"),
                    $($ops!(pixel $t $addr $r $c0 $c1 "1"),)*
                    $ops!(weights $t "2"),
                    $($ops!(pixel $t $addr $r $c0 $c1 "2"),)*
                    $ops!(weights $t "3"),
                    $($ops!(pixel $t $addr $r $c0 $c1 "3"),)*
                    "add r8, 16",
                    "add r9, 16",
                    $ops!(advance $t "4"),
                    "sub r12, 4",
                    "jae 32b",
                    "33:",
                    "add r12, 4",
                    "jz 35f",
                    "34:",
                    $ops!(weights $t "0"),
                    $($ops!(pixel $t $addr $r $c0 $c1 "0"),)*
                    "add r8, 4",
                    "add r9, 4",
                    $ops!(advance $t "1"),
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

pub(crate) use avx2_tiles;

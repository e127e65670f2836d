//! What this machine's integer dot products can do at most: loops on registers alone, with no
//! memory to wait for and enough sums not to wait for each other.
//!
//! And the clock for it: on a machine that others use too, only processor time means much.
//!
//! For benchmarks, as what kernels are measured by; no session calls it.

use std::time::{Duration, Instant};

use crate::isa::{Isa, Level};

/// The most multiply-accumulates a second that one thread reached in `time`, by the level's
/// instruction for four products of bytes a lane; `None` where latile uses no such instruction
/// or has no loop for it: on x86-64, all but `avxvnni` and `avx512vnni`.
pub fn dot_products(level: Level, time: Duration) -> Option<f64> {
    let run = of(level.isa())?;
    let (mut best, begin) = (0.0_f64, Instant::now());
    while begin.elapsed() < time {
        let start = Instant::now();
        // SAFETY: the level exists only where its instructions do.
        let products = unsafe { run(STRETCH) };
        best = best.max(products as f64 / start.elapsed().as_secs_f64());
    }
    Some(best)
}

/// Processor time of this process so far, of all its threads; `None` where the system's is not
/// known.
pub fn processor_time() -> Option<Duration> {
    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    {
        #[repr(C)]
        struct Timespec {
            seconds: i64,
            nanoseconds: i64,
        }
        unsafe extern "C" {
            fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
        }
        const PROCESS_CPUTIME: i32 = 2;
        let mut time = Timespec { seconds: 0, nanoseconds: 0 };
        // SAFETY: the C library's function, with the layout of 64-bit Linux.
        if unsafe { clock_gettime(PROCESS_CPUTIME, &mut time) } == 0 {
            return Some(Duration::new(time.seconds as u64, time.nanoseconds as u32));
        }
    }
    None
}

/// Turns of a loop: tens of microseconds, so that the best of many is one that nothing
/// interrupted.
const STRETCH: u32 = 1 << 14;

/// Turns a loop so many times, less than 2^28, and tells how many products it summed.
type Loop = unsafe fn(u32) -> u64;

fn of(isa: Isa) -> Option<Loop> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => Some(x86_64::avxvnni),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => Some(x86_64::avx512vnni),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;

    /// A loop of 14 sums in registers of `$bytes` bytes, called `$r`. Every product is 1 by 1,
    /// so that the sums count them.
    macro_rules! dot_loop {
        ($name:ident, $features:literal, $r:literal, $bytes:literal, $dot:literal) => {
            dot_loop!(@body $name, $features, $r, $bytes, $dot,
                "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13");
        };
        (@body $name:ident, $features:literal, $r:literal, $bytes:literal, $dot:literal,
            $($i:literal)*) => {
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(turns: u32) -> u64 {
                let ones = [1_u8; $bytes];
                let mut sums = [[0_i32; $bytes / 4]; 14];
                // SAFETY: reads `ones` and writes `sums`, a register each row; all registers
                // are declared.
                unsafe {
                    asm!(
                        concat!("vmovups ", $r, "14, [{ones}]"),
                        concat!("vmovups ", $r, "15, [{ones}]"),
                        $(concat!("vpxor xmm", $i, ", xmm", $i, ", xmm", $i),)*
                        ".p2align 5",
                        "2:",
                        $(concat!($dot, " ", $r, $i, ", ", $r, "14, ", $r, "15"),)*
                        "dec {turns:e}",
                        "jnz 2b",
                        $(concat!("vmovups [{sums} + ", $bytes, "*", $i, "], ", $r, $i),)*
                        ones = in(reg) ones.as_ptr(),
                        sums = in(reg) sums.as_mut_ptr(),
                        turns = inout(reg) turns.max(1) => _,
                        out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                        out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                        out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                        out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                        options(nostack),
                    );
                }
                sums.iter().flatten().map(|&sum| sum as u64).sum()
            }
        };
    }

    dot_loop!(avxvnni, "avx2,avxvnni", "ymm", 32, "{{vex}} vpdpbusd");
    dot_loop!(avx512vnni, "avx512f,avx512vnni", "zmm", 64, "vpdpbusd");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_passes() {
        if let Some(before) = processor_time() {
            let mut x = 1.0_f64;
            while processor_time().is_some_and(|now| now == before) {
                x = std::hint::black_box(x * 1.5);
            }
            assert!(processor_time().is_some_and(|now| now > before));
        }
    }

    #[test]
    fn loops_do_what_is_counted() {
        for level in Level::available() {
            let Some(run) = of(level.isa()) else {
                assert!(dot_products(level, Duration::ZERO).is_none());
                continue;
            };
            // SAFETY: the level exists only where its instructions do.
            let (once, often) = unsafe { (run(1), run(1000)) };
            assert!(once > 0 && once % (14 * 4) == 0);
            assert_eq!(often, 1000 * once);
            assert!(dot_products(level, Duration::from_millis(2)).is_some_and(|x| x > 1e6));
        }
    }
}

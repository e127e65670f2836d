//! The matrix micro-kernels, one family per instruction set.
//!
//! A micro-kernel multiplies a few pixels by one or two panels of sixteen output channels and
//! knows nothing of convolutions, threads or storage. Their list is in [`crate::registry`].

pub mod dot;
pub mod matmul;

#[cfg(target_arch = "x86_64")]
pub(crate) mod dot_avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod dot_avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod dot_dotprod;
#[cfg(target_arch = "aarch64")]
pub(crate) mod dot_i8mm;
#[cfg(target_arch = "aarch64")]
pub(crate) mod dot_neon;
#[cfg(target_arch = "x86_64")]
mod frame_avx2;
#[cfg(target_arch = "x86_64")]
mod frame_avx512;
#[cfg(target_arch = "aarch64")]
mod frame_neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod matmul_avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod matmul_avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod matmul_neon;

/// The operands of one micro-kernel call, as the formulas of [`matmul`] and [`dot`] name them.
/// Strides and offsets are in bytes. Assembly reads the fields by their places.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Operands<A, B, C> {
    /// The first pixel's numbers.
    pub a: *const A,
    /// From one pixel to the next.
    pub a_stride: usize,
    /// Offset of each run from a pixel's start.
    pub runs: *const isize,
    /// Runs.
    pub n_runs: usize,
    /// Steps of each run: numbers, or groups of bytes.
    pub run_len: usize,
    /// The first panel, sixteen channels for every step, at its first step.
    pub b: *const B,
    /// From the first panel to the second.
    pub panel_stride: usize,
    /// The accumulators' tile: 16 numbers for each panel, side by side.
    pub c: *mut C,
    /// From one pixel's accumulators to the next's.
    pub c_stride: usize,
    /// 0: start from zero; 1: start from what `c` holds.
    pub accumulate: usize,
}

//! The matrix micro-kernels, one family per instruction set.
//!
//! A micro-kernel multiplies a few pixels by one or two panels of sixteen output channels and
//! knows nothing of convolutions, threads or storage. Their list is in [`crate::registry`].

pub mod matmul;

#[cfg(target_arch = "x86_64")]
pub(crate) mod matmul_avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod matmul_avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod matmul_neon;

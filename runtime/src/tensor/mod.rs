//! Element types, value shapes and the arena.
//!
//! Feature maps are NHWC with batch 1, so a map is `h × w × c` with channels innermost. Nothing here
//! computes; kernels live in the targets.

mod arena;
mod dtype;
mod shape;

pub use arena::{Arena, ArenaError};
pub use dtype::DType;
pub use shape::Shape;

/// Bytes to which buffers in the arena and weights in a file are aligned: a cache line, and the widest
/// vector register of any target.
pub const ALIGN: usize = 64;

/// Rounds `bytes` up to a multiple of `align` (a power of two); `None` where that overflows.
#[must_use]
pub fn align_up(bytes: usize, align: usize) -> Option<usize> {
    debug_assert!(align.is_power_of_two());
    Some(bytes.checked_add(align - 1)? & !(align - 1))
}

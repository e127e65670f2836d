//! From the primitive graph to the fused steps of a session.
//!
//! Lives here: which operators become one step (`fuse`), the steps with their buffers (`program`,
//! `build`) and how they are run (`execute`). Lowering happens once, in `prepare`; it
//! decides every buffer's place in the arena with `runtime`'s planner, so that a run allocates nothing.
//! Never here: kernels, threads, files.
//!
//! What is fused:
//! - `Concat` is never materialised for a convolution: its parts are the convolution's segments.
//! - `GroupNorm`, `ScaleShift` after it, `Silu` and `Upsample2x` before a convolution are applied as it reads;
//!   the norm's coefficients come from sums that the producer of the tensor left.
//! - bias, `AddChannel`, `Add` and `Affine` without addend after a convolution are applied as it writes,
//!   `Add` in place where its other operand dies there.
//! - A `Linear` over a map is a 1 x 1 convolution.
//!
//! Everything else is a step of its own. A value that is stored is stored once, in the file's precision.

mod build;
mod execute;
mod fuse;
mod program;
#[cfg(test)]
mod tests;
mod weights;

pub(crate) use build::lower;
pub(crate) use program::Program;

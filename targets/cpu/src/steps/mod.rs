//! The fused steps that a session runs, and the operands they share.
//!
//! A step takes views of memory that a session planned, checks their sizes, and allocates
//! nothing. Graphs, lowering and memory planning are not here.

use half::f16;

pub mod attention;
pub mod codebook;
pub mod conv;
mod conv_band;
mod conv_epilogue;
mod conv_plan;
mod conv_rows;
mod conv_shape;
mod conv_square;
mod conv_tile;
mod conv_winograd;
mod element;
pub mod elementwise;
pub mod norm;
pub mod pool2x;
pub mod ports;
pub mod vector;

/// A tensor to read: NHWC, batch 1, contiguous.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
}

impl Source<'_> {
    /// Elements.
    pub const fn len(&self) -> usize {
        match self {
            Source::F32(x) => x.len(),
            Source::F16(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tensor to write: NHWC, batch 1, contiguous.
#[derive(Debug)]
pub enum Output<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half precision, rounded to nearest even.
    F16(&'a mut [f16]),
}

impl Output<'_> {
    /// Elements.
    pub const fn len(&self) -> usize {
        match self {
            Output::F32(x) => x.len(),
            Output::F16(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why a step refused its operands. A session that lowers a checked graph never sees one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// An operand has another number of elements than the shape says.
    #[error("{step}: {operand} has {found} elements, but the shape needs {expected}")]
    Length {
        /// The step.
        step: &'static str,
        /// Which operand.
        operand: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// The shape cannot be computed.
    #[error("{step}: {reason}")]
    Shape {
        /// The step.
        step: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A worker panicked: a bug in a kernel, not in the operands.
    #[error("{step}: {source}")]
    Worker {
        /// The step.
        step: &'static str,
        /// The pool's account.
        source: crate::pool::PoolError,
    },
}

/// Checks one operand's length.
pub(crate) const fn check_len(
    step: &'static str,
    operand: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), StepError> {
    if found == expected {
        Ok(())
    } else {
        Err(StepError::Length { step, operand, expected, found })
    }
}

/// A mutable pointer that tasks share because each writes a part of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedMut<T>(pub(crate) *mut T);

// SAFETY: every user of the pointer documents why its writes are disjoint.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// The pointer (a method, so that closures capture the wrapper and not its field).
    pub(crate) const fn get(self) -> *mut T {
        self.0
    }
}

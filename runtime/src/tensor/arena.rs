//! One aligned block of memory that holds every activation of a session.
//!
//! `unsafe` is here because a `Vec<u8>` cannot promise [`ALIGN`]-byte alignment, and because an arena
//! that cannot be had must be an error, not an abort.
#![allow(unsafe_code)]

use super::ALIGN;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Why an arena could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The operating system refused the memory.
    #[error(
        "could not reserve {bytes} bytes for activations; use a smaller tile, or free memory and try again"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
}

/// A zeroed, 64-byte aligned block whose size never changes.
#[derive(Debug)]
pub struct Arena {
    ptr: NonNull<u8>,
    layout: Option<Layout>,
}

// SAFETY: the arena owns its block exclusively, as a `Box<[u8]>` does; access follows `&`/`&mut`.
unsafe impl Send for Arena {}
// SAFETY: `&Arena` gives only shared access to plain bytes.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `bytes` bytes, zeroed.
    ///
    /// # Errors
    /// [`ArenaError::OutOfMemory`] where the system refuses.
    pub fn new(bytes: usize) -> Result<Self, ArenaError> {
        if bytes == 0 {
            return Ok(Self { ptr: NonNull::<Aligned>::dangling().cast(), layout: None });
        }
        let layout =
            Layout::from_size_align(bytes, ALIGN).map_err(|_| ArenaError::OutOfMemory { bytes })?;
        // SAFETY: the layout has a size above zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).ok_or(ArenaError::OutOfMemory { bytes })?;
        Ok(Self { ptr, layout: Some(layout) })
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layout.map_or(0, |l| l.size())
    }

    /// The block.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `bytes()` initialised (zeroed) bytes for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.bytes()) }
    }

    /// The block, mutably. Its start is 64-byte aligned.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.bytes()) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if let Some(layout) = self.layout {
            // SAFETY: allocated in `new` with this very layout, and freed only here.
            unsafe { dealloc(self.ptr.as_ptr(), layout) };
        }
    }
}

/// Gives the dangling pointer of an empty arena its alignment.
#[repr(align(64))]
struct Aligned;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arena_is_aligned_zeroed_and_exact() {
        for bytes in [0, 1, 63, 64, 65, 4097] {
            let mut a = Arena::new(bytes).unwrap();
            assert_eq!(a.bytes(), bytes);
            assert_eq!(a.as_slice().as_ptr() as usize % ALIGN, 0);
            assert!(a.as_slice().iter().all(|&b| b == 0));
            a.as_mut_slice().fill(7);
            assert!(a.as_slice().iter().all(|&b| b == 7));
        }
    }

    #[test]
    fn an_impossible_arena_is_an_error() {
        assert!(matches!(Arena::new(usize::MAX - 4096), Err(ArenaError::OutOfMemory { .. })));
        assert!(matches!(Arena::new(1 << 60), Err(ArenaError::OutOfMemory { .. })));
    }
}

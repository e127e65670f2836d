//! A model's bytes, mapped from a file or built into the program.
//!
//! `unsafe` is here because mapping a file is: see [`Bytes::map`].
#![allow(unsafe_code)]

use std::fs::File;

/// The bytes of a model.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    /// Maps `file` read-only.
    pub(super) fn map(file: &File) -> std::io::Result<Self> {
        // SAFETY: the map is read-only and private to this process. The one thing Rust cannot exclude is
        // another process that shortens the file in place, which makes a read of the lost pages SIGBUS;
        // replacing a model by rename, as the writer does, is safe. README and docs/format.md say so.
        Ok(Self::Mapped(unsafe { memmap2::MmapOptions::new().map(file)? }))
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

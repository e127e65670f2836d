//! A model's bytes: mapped from a file, read from one piece by piece, or built into the program.
//!
//! `unsafe` is here because mapping a file is, and so is giving mapped pages back: see [`Bytes::map`] and
//! [`Bytes::release`].
#![allow(unsafe_code)]

use memmap2::{Mmap, MmapMut, MmapOptions};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Pages come and go in blocks of the file of this size and alignment, at most: with a page that is
/// missed, Linux maps what lies around it in the system's cache, 64 KiB or, where the cache holds the file
/// in huge pages, one of those.
pub(super) const BLOCK: usize = 2 << 20;

/// What is asked of the system's readahead at once: more than its window it cuts off.
const READAHEAD: usize = 128 << 10;

/// Where the system gives pages of a mapped file back when told to. Elsewhere the same advice is a hint.
const GIVES_BACK: bool = cfg!(any(target_os = "linux", target_os = "android"));

/// The bytes of a model.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(Mmap),
    /// A file that is not mapped, and its length when it was opened.
    File(Mutex<File>, u64),
    Static(&'static [u8]),
}

impl Bytes {
    /// Maps `file` read-only.
    pub(super) fn map(file: &File) -> io::Result<Self> {
        // SAFETY: the map is read-only and private to this process. The one thing Rust cannot exclude is
        // another process that shortens the file in place, which makes a read of the lost pages SIGBUS;
        // replacing a model by rename, as the writer does, is safe; docs/format.md says so.
        Ok(Self::Mapped(unsafe { MmapOptions::new().map(file)? }))
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Mapped(map) => map.len() as u64,
            Self::File(_, len) => *len,
            Self::Static(bytes) => bytes.len() as u64,
        }
    }

    /// All of them, where they are in memory.
    pub(super) fn as_slice(&self) -> Option<&[u8]> {
        match self {
            Self::Mapped(map) => Some(map),
            Self::File(..) => None,
            Self::Static(bytes) => Some(bytes),
        }
    }

    /// Copies the bytes from `at` on into `out`.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let short = || {
            let why = "it became shorter while it was open; copy it again";
            io::Error::new(io::ErrorKind::UnexpectedEof, why)
        };
        match self {
            Self::File(file, _) => {
                // A reader that panicked left nothing but the position behind, which is set here.
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(at))?;
                file.read_exact(out).map_err(|e| match e.kind() {
                    io::ErrorKind::UnexpectedEof => short(),
                    _ => e,
                })
            }
            Self::Mapped(_) | Self::Static(_) => {
                let all = self.as_slice().unwrap_or_default();
                let from = usize::try_from(at).ok().and_then(|at| all.get(at..)?.get(..out.len()));
                out.copy_from_slice(from.ok_or_else(short)?);
                Ok(())
            }
        }
    }

    /// Whether [`release`](Self::release) does anything.
    pub(super) const fn can_release(&self) -> bool {
        matches!(self, Self::Mapped(_)) && GIVES_BACK
    }

    /// Asks the system to read `range` into its cache, where it is mapped from a file; returns without
    /// waiting. Maps nothing, so that the resident set stays as it is.
    pub(super) fn prefetch(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            let mut at = range.start;
            while at < range.end.min(map.len()) {
                let len = READAHEAD.min(range.end.min(map.len()) - at);
                // Advice: where it is not taken, pages are read when they are touched.
                if map.advise_range(memmap2::Advice::WillNeed, at, len).is_err() {
                    return;
                }
                at += len;
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Gives the memory of `range`, outwards to whole [`BLOCK`]s, back to the system where it is mapped
    /// from a file; the bytes are read again when they are next touched.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            let range = blocks(range, map.len());
            if range.is_empty() {
                return;
            }
            // SAFETY: a map of a file, shared and never written through, so that a page that is dropped
            // is read again from the file with the same bytes. The range lies within the map and begins
            // at a multiple of BLOCK, and so of the page size, from its start.
            let given = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            };
            // Locked memory, for example: then it stays, and the run is right all the same.
            if let Err(e) = given {
                log::debug!("{} bytes of weights could not be given back: {e}", range.len());
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// `range` outwards to whole [`BLOCK`]s of a file of `len` bytes.
pub(super) fn blocks(range: Range<usize>, len: usize) -> Range<usize> {
    let end = range.end.min(len).next_multiple_of(BLOCK).min(len);
    range.start / BLOCK * BLOCK..end
}

/// `len` bytes of zeros that take memory only where they are written, and give it back at once when they
/// are dropped; page-aligned.
pub(super) fn zeros(len: usize) -> io::Result<MmapMut> {
    // A map cannot be empty.
    MmapMut::map_anon(len.max(1))
}

//! The fixed 64-byte header and the file's outline.
//!
//! | bytes | type | what |
//! |---|---|---|
//! | 0..8 | bytes | [`MAGIC`] |
//! | 8..12 | u32 | version, [`OLDEST`] to [`VERSION`] |
//! | 12..16 | u32 | flags, zero |
//! | 16..24 | u64 | length of the file |
//! | 24..32 | u64 | offset of the weights, [`PAGE`] |
//! | 32..40 | u64 | length of the weights, a multiple of 64 |
//! | 40..48 | u64 | offset of the manifest: where the weights end |
//! | 48..56 | u64 | length of the manifest: to the end of the file |
//! | 56..60 | u32 | CRC-32C of the manifest |
//! | 60..64 | u32 | CRC-32C of bytes 0..60 |
//!
//! Numbers are little-endian. Bytes 64..[`PAGE`] are zero.

/// First eight bytes. The high bit and the newline show a file that was mangled as text.
pub const MAGIC: [u8; 8] = *b"\x89LATILE\n";
/// The newest version that this build reads. A file is written in the oldest one that can hold it:
/// [`Manifest::version`](super::Manifest::version).
pub const VERSION: u32 = 5;
/// The oldest version that this build reads.
pub const OLDEST: u32 = 2;
/// Where weights begin, and the alignment of every weight of at least this size.
pub const PAGE: u64 = 4096;
/// Bytes of the header proper.
pub const HEADER_LEN: usize = 64;
/// The longest manifest that is accepted.
pub const MAX_MANIFEST: u64 = 16 << 20;

/// The header's fields that vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The format's version, [`OLDEST`] to [`VERSION`].
    pub version: u32,
    /// Length of the weights in bytes.
    pub weights_len: u64,
    /// Length of the manifest in bytes.
    pub manifest_len: u64,
    /// CRC-32C of the manifest.
    pub manifest_crc: u32,
}

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Shorter than any model.
    #[error(
        "it is {len} bytes long, shorter than a model's header; it was cut off or is not a model"
    )]
    TooShort {
        /// Bytes there are.
        len: u64,
    },
    /// Another kind of file.
    #[error("it does not begin as a .latile file; export one with `latile export`")]
    NotLatile,
    /// Made by another version.
    #[error(
        "it is of format version {found}, this build reads {OLDEST} to {VERSION}; export the model again or update latile"
    )]
    Version {
        /// Version found.
        found: u32,
    },
    /// The header's own checksum fails.
    #[error(
        "its header is damaged (checksum {found:08x}, expected {expected:08x}); copy the file again"
    )]
    Checksum {
        /// Checksum stored.
        expected: u32,
        /// Checksum computed.
        found: u32,
    },
    /// Offsets and lengths do not join up.
    #[error("its header is inconsistent: {why}")]
    Layout {
        /// Which field, and what was expected.
        why: String,
    },
    /// The file was cut off, or something was appended.
    #[error(
        "it is {found} bytes long, its header says {expected}; it was cut off or appended to, copy it again"
    )]
    Length {
        /// Length in the header.
        expected: u64,
        /// Length of the file.
        found: u64,
    },
}

impl Header {
    /// Offset of the manifest, which is where the weights end.
    #[must_use]
    pub const fn manifest_offset(&self) -> u64 {
        PAGE + self.weights_len
    }

    /// The header's 64 bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut b = [0u8; HEADER_LEN];
        b[0..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&self.version.to_le_bytes());
        b[16..24].copy_from_slice(&(self.manifest_offset() + self.manifest_len).to_le_bytes());
        b[24..32].copy_from_slice(&PAGE.to_le_bytes());
        b[32..40].copy_from_slice(&self.weights_len.to_le_bytes());
        b[40..48].copy_from_slice(&self.manifest_offset().to_le_bytes());
        b[48..56].copy_from_slice(&self.manifest_len.to_le_bytes());
        b[56..60].copy_from_slice(&self.manifest_crc.to_le_bytes());
        let crc = crc32c::crc32c(&b[..60]);
        b[60..64].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Reads the header from the first [`PAGE`] bytes (or all, where there are fewer) of a file of `len`
    /// bytes.
    ///
    /// # Errors
    /// [`HeaderError`], the first thing that is wrong.
    pub fn parse(file: &[u8], len: u64) -> Result<Self, HeaderError> {
        if file.len() >= MAGIC.len() && file[..8] != MAGIC {
            return Err(HeaderError::NotLatile);
        }
        if len < PAGE || (file.len() as u64) < PAGE {
            return Err(HeaderError::TooShort { len });
        }
        let u32_at =
            |at: usize| u32::from_le_bytes([file[at], file[at + 1], file[at + 2], file[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let version = u32_at(8);
        let (expected, found) = (u32_at(60), crc32c::crc32c(&file[..60]));
        if expected != found {
            return Err(HeaderError::Checksum { expected, found });
        }
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(HeaderError::Version { found: version });
        }
        let layout = |why: String| Err(HeaderError::Layout { why });
        if u32_at(12) != 0 {
            return layout(format!("flags are {:#x}, expected 0", u32_at(12)));
        }
        let (file_len, weights_at, weights_len) = (u64_at(16), u64_at(24), u64_at(32));
        let (manifest_at, manifest_len) = (u64_at(40), u64_at(48));
        if file_len != len {
            return Err(HeaderError::Length { expected: file_len, found: len });
        }
        if weights_at != PAGE || weights_len % 64 != 0 {
            return layout(format!("weights at {weights_at}, {weights_len} bytes"));
        }
        if PAGE.checked_add(weights_len) != Some(manifest_at)
            || manifest_at.checked_add(manifest_len) != Some(file_len)
        {
            return layout("weights and manifest do not fill the file".to_owned());
        }
        if manifest_len == 0 || manifest_len > MAX_MANIFEST {
            return layout(format!("a manifest of {manifest_len} bytes"));
        }
        if file[HEADER_LEN..PAGE as usize].iter().any(|&b| b != 0) {
            return layout("bytes 64..4096 are not zero".to_owned());
        }
        Ok(Self { version, weights_len, manifest_len, manifest_crc: u32_at(56) })
    }
}

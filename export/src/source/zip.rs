//! Just enough of the zip format to find the stored (uncompressed) entries of a torch file.
//! Format: PKWARE APPNOTE 6.3.9, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14–4.3.16 (ends).

use super::file::RandomFile;
use super::{SourceError, SourceErrorKind};
use std::collections::BTreeMap;

/// A torch file has one entry a storage; no model has this many.
const MAX_ENTRIES: u64 = 1 << 20;
/// The central directory is read whole.
const MAX_DIRECTORY: u64 = 256 << 20;
const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const END64_LOCATOR: u32 = 0x0706_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// Where an entry's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZipEntry {
    local_header: u64,
    /// Bytes of the entry.
    pub(crate) size: u64,
    stored: bool,
}

#[cfg(test)]
impl ZipEntry {
    pub(crate) fn stored_for_tests(size: u64) -> Self {
        Self { local_header: 0, size, stored: true }
    }
}

/// The entries of a zip file by name.
pub(crate) type Directory = BTreeMap<String, ZipEntry>;

fn u16_at(b: &[u8], at: usize) -> u64 {
    u64::from(u16::from_le_bytes([b[at], b[at + 1]]))
}

fn u32_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u32_at(b, at) | u32_at(b, at + 4) << 32
}

fn bad(file: &RandomFile, why: impl Into<String>) -> SourceError {
    file.error(SourceErrorKind::Zip { why: why.into() })
}

/// Reads the central directory.
pub(crate) fn directory(file: &RandomFile) -> Result<Directory, SourceError> {
    let (entries, size, offset) = end_record(file)?;
    if entries > MAX_ENTRIES || size > MAX_DIRECTORY {
        return Err(bad(file, format!("a directory of {entries} entries in {size} bytes")));
    }
    if offset.checked_add(size).is_none_or(|end| end > file.len()) {
        return Err(bad(file, "its directory would lie outside the file"));
    }
    let mut bytes = vec![0u8; size as usize];
    file.read_at(offset, &mut bytes)?;
    let mut out = Directory::new();
    let mut rest = &bytes[..];
    for _ in 0..entries {
        if rest.len() < 46 || u32_at(rest, 0) != u64::from(CENTRAL) {
            return Err(bad(file, "a directory entry is damaged"));
        }
        let (name, extra, comment) = (u16_at(rest, 28), u16_at(rest, 30), u16_at(rest, 32));
        let total = (46 + name + extra + comment) as usize;
        if rest.len() < total {
            return Err(bad(file, "a directory entry is cut off"));
        }
        let text = std::str::from_utf8(&rest[46..46 + name as usize])
            .map_err(|_| bad(file, "an entry's name is not UTF-8"))?;
        let encrypted = u16_at(rest, 8) & 1 != 0;
        let stored = u16_at(rest, 10) == 0 && !encrypted;
        let (mut packed, mut size) = (u32_at(rest, 20), u32_at(rest, 24));
        let mut local_header = u32_at(rest, 42);
        let mut wide = zip64_field(&rest[46 + name as usize..total - comment as usize]);
        // The 64-bit values stand in this order, each only where the 32-bit field is full.
        for field in [&mut size, &mut packed, &mut local_header] {
            if *field == 0xffff_ffff {
                let Some((value, next)) = wide.split_first_chunk::<8>() else {
                    return Err(bad(file, format!("{text} lacks its 64-bit size")));
                };
                *field = u64::from_le_bytes(*value);
                wide = next;
            }
        }
        if stored && packed != size {
            return Err(bad(file, format!("{text} is stored in {packed} bytes but holds {size}")));
        }
        let entry = ZipEntry { local_header, size, stored };
        if out.insert(text.to_owned(), entry).is_some() {
            return Err(bad(file, format!("{text} stands twice")));
        }
        rest = &rest[total..];
    }
    Ok(out)
}

/// The payload of the zip64 extra field (id 1), empty where there is none.
fn zip64_field(mut extra: &[u8]) -> &[u8] {
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0), u16_at(extra, 2) as usize);
        if extra.len() < 4 + len {
            break;
        }
        if id == 1 {
            return &extra[4..4 + len];
        }
        extra = &extra[4 + len..];
    }
    &[]
}

/// Entries, size and offset of the central directory.
fn end_record(file: &RandomFile) -> Result<(u64, u64, u64), SourceError> {
    // The end record is 22 bytes and a comment of at most 65,535.
    let window = file.len().min(22 + 65_535);
    let start = file.len() - window;
    let mut tail = vec![0u8; window as usize];
    file.read_at(start, &mut tail)?;
    let found = (0..tail.len().saturating_sub(21)).rev().find(|&i| {
        u32_at(&tail, i) == u64::from(END) && i as u64 + 22 + u16_at(&tail, i + 20) == window
    });
    let Some(at) = found else {
        return Err(file.error(SourceErrorKind::Truncated {
            what: "its zip directory, which stands at the end,".to_owned(),
            needs: file.len() + 22,
            has: file.len(),
        }));
    };
    let end = &tail[at..];
    let short = (u16_at(end, 10), u32_at(end, 12), u32_at(end, 16));
    let end_at = start + at as u64;
    if end_at < 20 {
        return Ok(short);
    }
    let mut locator = [0u8; 20];
    file.read_at(end_at - 20, &mut locator)?;
    if u32_at(&locator, 0) != u64::from(END64_LOCATOR) {
        return Ok(short);
    }
    let at64 = u64_at(&locator, 8);
    if at64.checked_add(56).is_none_or(|e| e > file.len()) {
        return Err(bad(file, "its 64-bit end record would lie outside the file"));
    }
    let mut end64 = [0u8; 56];
    file.read_at(at64, &mut end64)?;
    if u32_at(&end64, 0) != u64::from(END64) {
        return Err(bad(file, "its 64-bit end record is damaged"));
    }
    Ok((u64_at(&end64, 32), u64_at(&end64, 40), u64_at(&end64, 48)))
}

/// Where an entry's bytes begin; checks that all of them lie in the file.
pub(crate) fn data_offset(
    file: &RandomFile,
    name: &str,
    entry: ZipEntry,
) -> Result<u64, SourceError> {
    if !entry.stored {
        return Err(bad(
            file,
            format!("{name} is compressed or encrypted, which torch never does"),
        ));
    }
    let mut local = [0u8; 30];
    if entry.local_header.checked_add(30).is_none_or(|e| e > file.len()) {
        return Err(bad(file, format!("{name} would lie outside the file")));
    }
    file.read_at(entry.local_header, &mut local)?;
    if u32_at(&local, 0) != u64::from(LOCAL) {
        return Err(bad(file, format!("{name} has no local header")));
    }
    let offset = entry.local_header + 30 + u16_at(&local, 26) + u16_at(&local, 28);
    match offset.checked_add(entry.size) {
        Some(end) if end <= file.len() => Ok(offset),
        end => Err(file.error(SourceErrorKind::Truncated {
            what: name.to_owned(),
            needs: end.unwrap_or(u64::MAX),
            has: file.len(),
        })),
    }
}

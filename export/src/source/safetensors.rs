//! Safetensors: an 8-byte length, a JSON header of that length, then the tensors' bytes.
//! Format: <https://github.com/huggingface/safetensors#format>.
//!
//! The header is read here because the `safetensors` crate wants the whole file as one slice, which means a
//! memory map and its `unsafe`; positioned reads need neither, and the messages can name what is cut off.

use super::file::RandomFile;
use super::{SourceDtype, SourceError, SourceErrorKind, TensorInfo, WeightSource};
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// Types that the format has and weights have not.
const KNOWN: [&str; 21] = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "I32",
    "U32",
    "C64",
    "I64",
    "U64",
    "U4",
    "I4",
    "C128",
];

/// A safetensors file.
#[derive(Debug)]
pub struct SafetensorsSource {
    file: RandomFile,
    tensors: BTreeMap<String, (TensorInfo, u64)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header as a list, so that a name that stands twice is seen and refused.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Header;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map from tensor names to their records")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut out = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        out.push((name, map.next_value()?));
                    }
                }
                Ok(Header(out))
            }
        }
        d.deserialize_map(V)
    }
}

impl SafetensorsSource {
    /// Opens a safetensors file and checks its header against the file's length.
    ///
    /// # Errors
    /// [`SourceError`] where the file cannot be read, is cut off, or is not safetensors.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        Self::new(RandomFile::open(path)?)
    }

    pub(super) fn new(file: RandomFile) -> Result<Self, SourceError> {
        let truncated = |what: &str, needs: u64| {
            let (what, has) = (what.to_owned(), file.len());
            file.error(SourceErrorKind::Truncated { what, needs, has })
        };
        let not = |why: String| file.error(SourceErrorKind::NotSafetensors { why });
        let damaged = |why: String| file.error(SourceErrorKind::Header { why });
        if file.len() < 8 {
            return Err(truncated("its header", 8));
        }
        let mut prefix = [0u8; 8];
        file.read_at(0, &mut prefix)?;
        let len = u64::from_le_bytes(prefix);
        if !(2..=MAX_HEADER).contains(&len) {
            return Err(not(format!("its first eight bytes would mean a header of {len} bytes")));
        }
        let mut first = [0u8; 1];
        if file.len() > 8 {
            file.read_at(8, &mut first)?;
        }
        if first[0] != b'{' {
            return Err(not("its header does not begin with a brace".into()));
        }
        if file.len() < 8 + len {
            return Err(truncated("its header", 8 + len));
        }
        let mut text = vec![0u8; len as usize];
        file.read_at(8, &mut text)?;
        let Header(entries) =
            serde_json::from_slice(&text).map_err(|e| damaged(format!("its JSON: {e}")))?;
        let base = 8 + len;
        let mut tensors = BTreeMap::new();
        let mut end = base;
        let mut ranges = Vec::with_capacity(entries.len());
        for (name, entry) in entries {
            let dtype = match entry.dtype.as_str() {
                "F64" => SourceDtype::F64,
                "F32" => SourceDtype::F32,
                "F16" => SourceDtype::F16,
                "BF16" => SourceDtype::BF16,
                other if KNOWN.contains(&other) => SourceDtype::Other(other.to_owned()),
                other => {
                    return Err(damaged(format!("{name} has the unknown type {other:?}")));
                }
            };
            let shape: Option<Vec<usize>> =
                entry.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
            let (start, stop) = entry.data_offsets;
            let shape = shape.ok_or_else(|| damaged(format!("{name} has an impossible shape")))?;
            let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let bytes = match (elements, dtype.size()) {
                (Some(n), Some(size)) => n.checked_mul(size).map(|b| b as u64),
                (Some(_), None) => stop.checked_sub(start),
                (None, _) => None,
            };
            if bytes.is_none() || stop.checked_sub(start) != bytes {
                return Err(damaged(format!(
                    "{name} of shape {shape:?} and type {dtype} does not fill bytes {start} to {stop}"
                )));
            }
            let stop = base
                .checked_add(stop)
                .ok_or_else(|| damaged(format!("{name} would end beyond any file")))?;
            end = end.max(stop);
            ranges.push((base + start, stop));
            let known = (TensorInfo { shape, dtype }, base + start);
            if tensors.insert(name.clone(), known).is_some() {
                return Err(damaged(format!("{name} stands twice")));
            }
        }
        if end > file.len() {
            return Err(truncated("its last tensor", end));
        }
        // Every byte belongs to exactly one tensor: the format says so, and a file that hides bytes or shares
        // them is not what it seems.
        ranges.sort_unstable();
        let mut at = base;
        for (start, stop) in ranges {
            if start != at {
                let what = if start < at { "overlap" } else { "leave bytes unclaimed" };
                return Err(damaged(format!("its tensors {what} at byte {at}")));
            }
            at = stop;
        }
        if at != file.len() {
            return Err(damaged(format!("it has {} bytes that no tensor claims", file.len() - at)));
        }
        Ok(Self { file, tensors })
    }
}

impl WeightSource for SafetensorsSource {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.file.path().to_owned()]
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn read_f32(&self, name: &str, out: &mut Vec<f32>) -> Result<(), SourceError> {
        let Some((info, offset)) = self.tensors.get(name) else {
            return Err(self.file.error(SourceErrorKind::NoSuchTensor { name: name.to_owned() }));
        };
        // The product was checked when the header was read.
        let count = info.shape.iter().product();
        self.file.read_elements(name, &info.dtype, *offset, count, out)
    }
}

//! Positioned reads and the conversion of stored elements to f32.

use super::{SourceDtype, SourceError, SourceErrorKind};
use half::{bf16, f16};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Elements that are not f32 are converted through a buffer of this many bytes.
const CHUNK: usize = 64 * 1024;

/// An open file that is read at given positions.
#[derive(Debug)]
pub(crate) struct RandomFile {
    file: Mutex<File>,
    len: u64,
    path: PathBuf,
}

impl RandomFile {
    pub(crate) fn open(path: &Path) -> Result<Self, SourceError> {
        let io = |action, error| SourceError::new(path, SourceErrorKind::Io { action, error });
        let file = File::open(path).map_err(|e| io("open", e))?;
        let meta = file.metadata().map_err(|e| io("read", e))?;
        if !meta.is_file() {
            return Err(io("read", std::io::Error::other("not a regular file")));
        }
        Ok(Self { file: Mutex::new(file), len: meta.len(), path: path.to_owned() })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn error(&self, kind: SourceErrorKind) -> SourceError {
        SourceError::new(&self.path, kind)
    }

    /// Fills `out` from `offset` on.
    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        // The position is set before every read, so a poisoned lock leaves nothing half done.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(out));
        read.map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                let needs = offset.saturating_add(out.len() as u64);
                self.error(SourceErrorKind::Truncated {
                    what: "a read".into(),
                    needs,
                    has: self.len,
                })
            } else {
                self.error(SourceErrorKind::Io { action: "read", error })
            }
        })
    }

    /// Replaces `out` by `count` elements of type `dtype` stored little-endian from `offset` on.
    ///
    /// The caller has checked that the range lies in the file, so `count` is bounded by its length.
    pub(crate) fn read_elements(
        &self,
        name: &str,
        dtype: &SourceDtype,
        offset: u64,
        count: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), SourceError> {
        let Some(size) = dtype.size() else {
            let (name, dtype) = (name.to_owned(), dtype.to_string());
            return Err(self.error(SourceErrorKind::Dtype { name, dtype }));
        };
        out.clear();
        out.resize(count, 0.0);
        if *dtype == SourceDtype::F32 && cfg!(target_endian = "little") {
            return self.read_at(offset, bytemuck::cast_slice_mut(out));
        }
        let mut chunk = vec![0u8; CHUNK.min(count * size)];
        let mut at = offset;
        for part in out.chunks_mut(CHUNK / size) {
            let bytes = &mut chunk[..part.len() * size];
            self.read_at(at, bytes)?;
            at += bytes.len() as u64;
            convert(dtype, bytes, part);
        }
        Ok(())
    }
}

/// Converts little-endian elements; `bytes` holds exactly `out.len()` of them.
fn convert(dtype: &SourceDtype, bytes: &[u8], out: &mut [f32]) {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
        let (elements, _) = bytes.as_chunks::<N>();
        for (o, e) in out.iter_mut().zip(elements) {
            *o = f(*e);
        }
    }
    match dtype {
        SourceDtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        SourceDtype::F32 => each(bytes, out, f32::from_le_bytes),
        SourceDtype::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        SourceDtype::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        SourceDtype::Other(_) => {}
    }
}

//! Zip-format torch files (`.bin`, `.ckpt`, `.pt` since torch 1.6): a pickle that describes tensors, and one
//! stored zip entry a storage.

use super::file::RandomFile;
use super::pickle::{self, PickleErrorKind, TensorRecord};
use super::zip::{self, ZipEntry};
use super::{SourceError, SourceErrorKind, TensorInfo, WeightSource};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The pickle is read whole; a training checkpoint's is under a megabyte.
const MAX_PICKLE: u64 = 64 << 20;

/// A zip-format torch file.
#[derive(Debug)]
pub struct TorchSource {
    file: RandomFile,
    tensors: BTreeMap<String, Located>,
}

#[derive(Debug)]
struct Located {
    info: TensorInfo,
    stride: Vec<usize>,
    /// First element of the view in the storage.
    first: usize,
    /// Elements from the first to the last of the view, both included.
    span: usize,
    /// The storage's entry; its place in the file is found when it is read.
    entry: (String, ZipEntry),
}

impl TorchSource {
    /// Opens a torch file and finds its tensors; nothing in it is executed.
    ///
    /// # Errors
    /// [`SourceError`] where the file cannot be read, is damaged, or its pickle is refused.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        Self::new(RandomFile::open(path)?)
    }

    pub(super) fn new(file: RandomFile) -> Result<Self, SourceError> {
        let directory = zip::directory(&file)?;
        let zip_error = |why: String| file.error(SourceErrorKind::Zip { why });
        let mut pickles = directory.keys().filter(|n| n.ends_with("/data.pkl") || *n == "data.pkl");
        let name = pickles
            .next()
            .ok_or_else(|| {
                zip_error("it holds no data.pkl, so torch.save did not write it".into())
            })?
            .clone();
        if pickles.next().is_some() {
            return Err(zip_error("it holds more than one data.pkl".into()));
        }
        let root = name.trim_end_matches("data.pkl").to_owned();
        let entry = directory[&name];
        if entry.size > MAX_PICKLE {
            return Err(zip_error(format!("its pickle has {} bytes", entry.size)));
        }
        let offset = zip::data_offset(&file, &name, entry)?;
        if let Some(&order) = directory.get(&format!("{root}byteorder")) {
            let mut text = [0u8; 6];
            let at = zip::data_offset(&file, "byteorder", order)?;
            if order.size != 6 || file.read_at(at, &mut text).is_err() || &text != b"little" {
                return Err(zip_error("its tensors are not little-endian".into()));
            }
        }
        let mut bytes = vec![0u8; entry.size as usize];
        file.read_at(offset, &mut bytes)?;
        let records = pickle::read_tensors(&bytes).map_err(|e| {
            file.error(match e.kind {
                PickleErrorKind::Global(global) => {
                    SourceErrorKind::HostilePickle { global, offset: e.offset, entry: name.clone() }
                }
                PickleErrorKind::Malformed(why) => {
                    SourceErrorKind::Pickle { entry: name.clone(), offset: e.offset, why }
                }
            })
        })?;
        let mut tensors = BTreeMap::new();
        for (tensor, record) in records {
            let key = format!("{root}data/{}", record.storage);
            let located = match directory.get(&key) {
                None => Err(format!("its storage {key} is missing")),
                Some(&entry) => locate(&record, key, entry),
            };
            match located {
                Ok(located) => tensors.insert(tensor, located),
                Err(why) => return Err(file.error(SourceErrorKind::Tensor { name: tensor, why })),
            };
        }
        Ok(Self { file, tensors })
    }
}

/// Checks that a record's view lies in its storage.
fn locate(record: &TensorRecord, key: String, entry: ZipEntry) -> Result<Located, String> {
    let size = record.dtype.size().unwrap_or(1) as u64;
    let held = entry.size / size;
    let narrow = |v: u64| usize::try_from(v).map_err(|_| format!("a size of {v}"));
    let shape: Vec<usize> = record.shape.iter().map(|&d| narrow(d)).collect::<Result<_, _>>()?;
    let stride: Vec<usize> = record.stride.iter().map(|&d| narrow(d)).collect::<Result<_, _>>()?;
    let elements = record.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let elements = elements.ok_or("its shape overflows")?;
    let span = if elements == 0 {
        0
    } else {
        let last = record
            .shape
            .iter()
            .zip(&record.stride)
            .try_fold(0u64, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?));
        last.and_then(|l| l.checked_add(1)).ok_or("its strides overflow")?
    };
    let end = record.offset.checked_add(span).ok_or("its offset overflows")?;
    if record.storage_elements > held || end > record.storage_elements {
        return Err(format!(
            "elements {} to {end} of a storage that holds {}",
            record.offset,
            held.min(record.storage_elements)
        ));
    }
    // A view that repeats elements (stride 0) could ask for more memory than the file has bytes.
    if elements > record.storage_elements {
        return Err(format!("{elements} elements from a storage of {}", record.storage_elements));
    }
    Ok(Located {
        info: TensorInfo { shape, dtype: record.dtype.clone() },
        stride,
        first: narrow(record.offset)?,
        span: narrow(span)?,
        entry: (key, entry),
    })
}

impl WeightSource for TorchSource {
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
        self.tensors.get(name).map(|t| &t.info)
    }

    fn read_f32(&self, name: &str, out: &mut Vec<f32>) -> Result<(), SourceError> {
        let Some(t) = self.tensors.get(name) else {
            return Err(self.file.error(SourceErrorKind::NoSuchTensor { name: name.to_owned() }));
        };
        let storage = zip::data_offset(&self.file, &t.entry.0, t.entry.1)?;
        let size = t.info.dtype.size().unwrap_or(1) as u64;
        let start = storage + t.first as u64 * size;
        self.file.read_elements(name, &t.info.dtype, start, t.span, out)?;
        if !contiguous(&t.info.shape, &t.stride) {
            *out = gather(out, &t.info.shape, &t.stride);
        }
        Ok(())
    }
}

/// Whether row-major order is the order in the storage.
fn contiguous(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1usize;
    for (&d, &s) in shape.iter().zip(stride).rev() {
        if d != 1 && s != expected {
            return d == 0 || shape.contains(&0);
        }
        expected = expected.saturating_mul(d);
    }
    true
}

/// The elements of a strided view in row-major order.
fn gather(span: &[f32], shape: &[usize], stride: &[usize]) -> Vec<f32> {
    let count: usize = shape.iter().product();
    let mut out = Vec::with_capacity(count);
    let mut index = vec![0usize; shape.len()];
    let mut at = 0usize;
    for _ in 0..count {
        out.push(span[at]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += stride[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= shape[axis] * stride[axis];
            index[axis] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::SourceDtype;
    use super::*;

    #[test]
    fn gather_follows_strides() {
        let span: Vec<f32> = (0..6).map(|v| v as f32).collect();
        // The transpose of a 2x3 matrix.
        assert!(!contiguous(&[3, 2], &[1, 3]));
        assert_eq!(gather(&span, &[3, 2], &[1, 3]), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert!(contiguous(&[1, 6], &[99, 1]));
    }

    #[test]
    fn views_outside_their_storage_are_refused() {
        let record = |offset, shape: &[u64], stride: &[u64]| TensorRecord {
            storage: "0".into(),
            dtype: SourceDtype::F32,
            storage_elements: 6,
            offset,
            shape: shape.to_vec(),
            stride: stride.to_vec(),
        };
        let entry = ZipEntry::stored_for_tests(24);
        let ok = |r: &TensorRecord| locate(r, "data/0".into(), entry).is_ok();
        assert!(ok(&record(0, &[2, 3], &[3, 1])));
        assert!(ok(&record(6, &[0], &[1])));
        assert!(!ok(&record(1, &[2, 3], &[3, 1])));
        assert!(!ok(&record(0, &[7], &[0])));
        assert!(!ok(&record(u64::MAX, &[1], &[1])));
        assert!(!ok(&record(0, &[u64::MAX, 3], &[0, 0])));
        assert!(!ok(&record(0, &[2], &[u64::MAX])));
    }
}

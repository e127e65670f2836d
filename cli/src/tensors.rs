//! Tensors in and out of safetensors files, and between NCHW, as the files hold them, and NHWC.

use crate::exit::FileError;
use anyhow::{Context, anyhow, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// The largest file that is read.
const MAX_FILE: u64 = 1 << 32;

/// A tensor of floats.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    /// Its shape, as in the file.
    pub(crate) shape: Vec<usize>,
    /// Its elements, row-major.
    pub(crate) data: Vec<f32>,
}

/// The tensors of the safetensors file at `path`, by name.
///
/// Elements are f32; i64 and i32 scalars, as timesteps are, are converted.
///
/// # Errors
/// [`FileError`] where it cannot be read; else where it is no safetensors file or has other elements.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<(String, Tensor)>> {
    let io = |source| FileError { action: "read", path: path.to_owned(), source };
    let meta = path.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(io(std::io::Error::other("it is not a regular file")).into());
    }
    if meta.len() > MAX_FILE {
        bail!(
            "{} has {} bytes, more than the {MAX_FILE} that are read",
            path.display(),
            meta.len()
        );
    }
    let bytes = std::fs::read(path).map_err(io)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| {
        anyhow!(
            "{} is not a safetensors file ({e}); write one with safetensors' save_file",
            path.display()
        )
    })?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let tensor = floats(&view).with_context(|| {
            format!("{}: tensor {}", path.display(), crate::console::plain(&name))
        })?;
        tensors.push((name, tensor));
    }
    Ok(tensors)
}

fn floats(view: &TensorView<'_>) -> anyhow::Result<Tensor> {
    let bytes = view.data();
    let data = match view.dtype() {
        Dtype::F32 => chunks(bytes, f32::from_le_bytes),
        Dtype::I64 if bytes.len() == 8 => chunks(bytes, |b| i64::from_le_bytes(b) as f32),
        Dtype::I32 if bytes.len() == 4 => chunks(bytes, |b| i32::from_le_bytes(b) as f32),
        other => bail!("holds {other:?}; save it as float32"),
    };
    Ok(Tensor { shape: view.shape().to_vec(), data })
}

fn chunks<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|&b| number(b)).collect()
}

/// Writes `tensors` to `file`, which will be `path`.
///
/// # Errors
/// [`FileError`].
pub(crate) fn write(
    tensors: &[(String, Tensor)],
    file: &mut File,
    path: &Path,
) -> anyhow::Result<()> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, t)| t.data.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, t), b)| Ok((name.as_str(), TensorView::new(Dtype::F32, t.shape.clone(), b)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let all = safetensors::serialize(views, None)?;
    file.write_all(&all).map_err(|source| FileError {
        action: "write",
        path: path.to_owned(),
        source,
    })?;
    Ok(())
}

/// `c` planes of `h × w` as `h × w` pixels of `c`.
pub(crate) fn to_nhwc(nchw: &[f32], c: usize) -> Vec<f32> {
    transpose(nchw, c, nchw.len() / c.max(1))
}

/// `h × w` pixels of `c` as `c` planes.
pub(crate) fn to_nchw(nhwc: &[f32], c: usize) -> Vec<f32> {
    transpose(nhwc, nhwc.len() / c.max(1), c)
}

fn transpose(from: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut to = Vec::with_capacity(from.len());
    for x in 0..columns {
        to.extend((0..rows).map(|y| from[y * columns + x]));
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_move_to_the_end_and_back() {
        let nchw: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let nhwc = to_nhwc(&nchw, 3);
        assert_eq!(nhwc[..6], [0.0, 4.0, 8.0, 1.0, 5.0, 9.0]);
        assert_eq!(to_nchw(&nhwc, 3), nchw);
    }

    #[test]
    fn tensors_survive_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let tensor = Tensor { shape: vec![1, 2], data: vec![0.5, -3.0] };
        let all = vec![("sample".to_owned(), tensor)];
        write(&all, &mut File::create(&path).unwrap(), &path).unwrap();
        assert_eq!(read(&path).unwrap(), all);
        std::fs::write(&path, b"short").unwrap();
        let err = crate::exit::message(&read(&path).unwrap_err());
        assert!(err.contains("t.safetensors is not a safetensors file"), "{err}");
    }
}

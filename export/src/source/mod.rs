//! Weight files, read tensor by tensor.
//!
//! Lives here: safetensors and zip-format torch files behind one trait, [`WeightSource`], and the restricted
//! pickle reader that finds tensors in a torch file without executing anything. Files are read at given
//! positions rather than mapped: a file that shrinks under us is then an error instead of a signal, and
//! anonymous memory holds one tensor at a time. Never here: what a tensor means; names are plain text.

mod error;
mod file;
pub mod pickle;
mod safetensors;
mod sharded;
mod torch;
mod zip;

pub use error::{SourceError, SourceErrorKind};
pub use safetensors::SafetensorsSource;
pub use sharded::ShardedSource;
pub use torch::TorchSource;

use file::RandomFile;
use std::path::{Path, PathBuf};

/// Element type of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceDtype {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// Anything else; such a tensor can be listed but not read.
    Other(String),
}

impl SourceDtype {
    /// Bytes an element takes, where the type can be read.
    #[must_use]
    pub fn size(&self) -> Option<usize> {
        match self {
            Self::F64 => Some(8),
            Self::F32 => Some(4),
            Self::F16 | Self::BF16 => Some(2),
            Self::Other(_) => None,
        }
    }
}

impl std::fmt::Display for SourceDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Other(name) => name,
        })
    }
}

/// What a source knows of a tensor before reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Logical shape, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Element type as stored.
    pub dtype: SourceDtype,
}

/// A file, or a set of files, of named tensors.
pub trait WeightSource: Send + Sync {
    /// What the source is called in messages.
    fn path(&self) -> &Path;

    /// The files that make it up, in the order in which their bytes are hashed.
    fn files(&self) -> Vec<PathBuf>;

    /// Every tensor's name, sorted.
    fn names(&self) -> Vec<&str>;

    /// Shape and type of a tensor, `None` where there is none of that name.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// Replaces `out` by the tensor's elements in row-major order, converted to f32.
    ///
    /// # Errors
    /// [`SourceError`] where there is no such tensor, its type is not a float, or the file cannot be read.
    fn read_f32(&self, name: &str, out: &mut Vec<f32>) -> Result<(), SourceError>;

    /// Gives back memory held for reading; called when a component is complete.
    fn release(&self) {}
}

/// Opens a weight file, telling its format by its first bytes, not by its name.
///
/// # Errors
/// [`SourceError`] where the file cannot be read or is neither safetensors nor a zip-format torch file.
pub fn open(path: &Path) -> Result<Box<dyn WeightSource>, SourceError> {
    let file = RandomFile::open(path)?;
    let mut magic = [0u8; 4];
    if file.len() < 8 {
        return Err(file.error(SourceErrorKind::Truncated {
            what: "its header".to_owned(),
            needs: 8,
            has: file.len(),
        }));
    }
    file.read_at(0, &mut magic)?;
    if &magic == b"PK\x03\x04" {
        return Ok(Box::new(TorchSource::new(file)?));
    }
    if magic[0] == 0x80 && magic[1] <= 5 && magic[2] != 0 {
        // A safetensors header this long (over 128 bytes, its length's second byte small) can look alike:
        // safetensors puts `{` at byte 8, a pickle does not.
        let mut byte = [0u8; 1];
        file.read_at(8, &mut byte).ok();
        if byte[0] != b'{' {
            return Err(file.error(SourceErrorKind::LegacyTorch));
        }
    }
    Ok(Box::new(SafetensorsSource::new(file)?))
}

#[cfg(test)]
mod tests;

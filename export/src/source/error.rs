//! What can be wrong with a weight file.

use std::path::{Path, PathBuf};

/// A weight file that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct SourceError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub kind: SourceErrorKind,
}

impl SourceError {
    pub(crate) fn new(path: &Path, kind: SourceErrorKind) -> Self {
        Self { path: path.to_owned(), kind }
    }
}

/// What is wrong with a weight file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceErrorKind {
    /// The operating system refused.
    #[error("cannot {action}: {error}")]
    Io {
        /// `open`, `read`.
        action: &'static str,
        /// The system's reason.
        #[source]
        error: std::io::Error,
    },
    /// The file ends before what it announces.
    #[error(
        "truncated: {what} needs {needs} bytes, the file has {has}; the download or copy is incomplete, fetch the file again"
    )]
    Truncated {
        /// The part that is cut off.
        what: String,
        /// The size the file would need.
        needs: u64,
        /// The size it has.
        has: u64,
    },
    /// Neither a safetensors header nor a torch file.
    #[error(
        "not a safetensors file ({why}), nor a zip-format torch file; give a .safetensors, .bin or .ckpt file of weights"
    )]
    NotSafetensors {
        /// What the header has instead.
        why: String,
    },
    /// A safetensors header that contradicts itself.
    #[error("damaged safetensors header: {why}; fetch the file again")]
    Header {
        /// What is contradictory.
        why: String,
    },
    /// A torch file from before torch 1.6.
    #[error(
        "a torch file in the format from before torch 1.6, whose tensors cannot be found without executing it; save it again with a newer torch, or as safetensors"
    )]
    LegacyTorch,
    /// A zip that is not one torch writes, or is damaged.
    #[error(
        "damaged or unexpected zip structure: {why}; fetch the file again, or convert it to safetensors"
    )]
    Zip {
        /// What is wrong.
        why: String,
    },
    /// A pickle that names something a weight file has no business naming.
    #[error(
        "hostile or unknown pickle: it asks for {global} at byte {offset} of {entry}; nothing was executed and the file is refused; if you trust its author, convert it to safetensors elsewhere"
    )]
    HostilePickle {
        /// The global, `module.name`.
        global: String,
        /// Where in the pickle.
        offset: usize,
        /// The pickle's name in the archive.
        entry: String,
    },
    /// A pickle that is damaged or beyond the reader's limits.
    #[error(
        "cannot read {entry} at byte {offset}: {why}; the file is damaged or was not written by torch.save"
    )]
    Pickle {
        /// The pickle's name in the archive.
        entry: String,
        /// Where in the pickle.
        offset: usize,
        /// What is wrong.
        why: String,
    },
    /// A tensor record that points outside its storage.
    #[error("tensor {name}: {why}; the file is damaged or made to mislead")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// No tensor of that name.
    #[error("holds no tensor {name}")]
    NoSuchTensor {
        /// The name asked for.
        name: String,
    },
    /// A tensor whose elements are not floats.
    #[error("tensor {name} holds {dtype}; weights must be f64, f32, f16 or bf16")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: String,
    },
    /// An index of shards that cannot be followed.
    #[error("damaged shard index: {why}")]
    Index {
        /// What is wrong.
        why: String,
    },
}

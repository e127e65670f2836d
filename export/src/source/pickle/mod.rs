//! A reader for the pickles inside torch files that executes nothing.
//!
//! A pickle is a program for a stack machine whose `REDUCE`, `BUILD`, `INST`, `OBJ` and `NEWOBJ` instructions
//! call whatever Python object the program names. This machine has values but no calls. What a global
//! *means* is decided by [`globals`]:
//!
//! * the handful that make up tensors (`_rebuild_tensor_v2`, `OrderedDict`, the storage types, …) are
//!   understood and become tensor records;
//! * classes that honest training checkpoints carry beside their weights (Lightning's callbacks, optimizer
//!   state, numpy scalars, paths) become opaque values: their arguments are dropped and nothing is built;
//! * everything else refuses the file by the global's name. Nothing would have been executed either way;
//!   refusing tells the owner that the file is not what it seems.
//!
//! Sizes are bounded: the pickle, its instructions and, through them, every list and string. The machine does
//! not recurse, so depth costs nothing.

pub mod globals;
mod machine;

use super::SourceDtype;

/// A tensor as a pickle describes it: a strided view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRecord {
    /// The storage's name in the archive's `data` folder.
    pub storage: String,
    /// Element type of the storage.
    pub dtype: SourceDtype,
    /// Elements in the storage.
    pub storage_elements: u64,
    /// First element of the view.
    pub offset: u64,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Distance between neighbours along each axis, in elements.
    pub stride: Vec<u64>,
}

/// Why a pickle was not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PickleError {
    /// Byte of the instruction.
    pub offset: usize,
    /// What is wrong there.
    pub kind: PickleErrorKind,
}

/// What is wrong with a pickle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PickleErrorKind {
    /// It names a global that no checkpoint needs.
    Global(String),
    /// It is damaged, uses an instruction that torch never writes, or is beyond the limits.
    Malformed(String),
}

/// Instructions beyond which a pickle is refused; a 1 GB training checkpoint has under a million.
pub const MAX_INSTRUCTIONS: usize = 16 << 20;

/// Reads a pickle and returns the tensors of its state dict by name, in the order they stand.
///
/// The state dict is the value under `state_dict` where the top-level dict has one (Lightning's layout), else
/// the top-level dict itself. Entries that are not tensors are left out.
///
/// # Errors
/// [`PickleError`] where the pickle is malformed, too long, or names a global that is refused.
pub fn read_tensors(pickle: &[u8]) -> Result<Vec<(String, TensorRecord)>, PickleError> {
    machine::Machine::new(pickle).run()
}

#[cfg(test)]
mod tests;

//! Outputs: refused before the work where they cannot be written, whole or absent after it.

use crate::exit::FileError;
use latile_runtime::persist::{Output, PersistError};
use std::path::Path;

/// Checks that `path` can be written: it is absent or may be replaced, is no device, and its folder takes
/// files. Nothing is left there.
///
/// # Errors
/// [`PersistError`], [`FileError`].
pub(crate) fn check(path: &Path, overwrite: bool) -> anyhow::Result<()> {
    if let Ok(meta) = path.metadata()
        && !meta.is_file()
        && !meta.is_dir()
    {
        // A rename would put a file in a device's place.
        return Err(FileError {
            action: "write",
            path: path.to_owned(),
            source: std::io::Error::other("it is not a regular file"),
        }
        .into());
    }
    drop(Output::create(path, overwrite)?);
    Ok(())
}

/// Writes `path` through `fill`.
///
/// # Errors
/// What `fill` says, or [`PersistError`]; then nothing is left there.
pub(crate) fn write(
    path: &Path,
    overwrite: bool,
    fill: impl FnOnce(&mut std::fs::File) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut output: Output = Output::create(path, overwrite)?;
    fill(output.file())?;
    output.commit().map_err(PersistError::into)
}

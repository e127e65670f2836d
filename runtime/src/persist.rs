//! Files that are whole or absent: written to a temporary neighbour, synced, then renamed.
//!
//! Every output of latile goes through here, so that a full disk, a power cut or Ctrl-C leaves either the
//! old file or the new one, never half of one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Why an output could not be written.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The output exists and may not be replaced.
    #[error("{} exists already; pass --overwrite to replace it, or name another output", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The folder, disk or permissions do not allow it.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The output.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// An output under way. Dropped without [`Output::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Output {
    temp: NamedTempFile,
    path: PathBuf,
    overwrite: bool,
}

impl Output {
    /// Begins an output that will be `path`. Its folder must exist and be writable.
    ///
    /// # Errors
    /// [`PersistError::Exists`] at once where `path` exists and `overwrite` is false, so that no work is
    /// done in vain; [`PersistError::Io`] where a temporary file cannot be made beside it.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self, PersistError> {
        let io = |source| PersistError::Io { path: path.to_owned(), source };
        if path.is_dir() {
            return Err(io(io::Error::other("it is a folder")));
        }
        if !overwrite && path.symlink_metadata().is_ok() {
            return Err(PersistError::Exists { path: path.to_owned() });
        }
        let folder = folder(path);
        if !folder.is_dir() {
            let why = format!("the folder {} does not exist; create it first", folder.display());
            return Err(io(io::Error::new(io::ErrorKind::NotFound, why)));
        }
        let name = path.file_name().ok_or_else(|| io(io::Error::other("it names no file")))?;
        let mut builder = tempfile::Builder::new();
        let prefix = prefix(name);
        builder.prefix(&prefix).suffix(SUFFIX);
        // Temporary files are private by default; an output gets what the user's umask says.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let temp = builder.tempfile_in(folder).map_err(io)?;
        Ok(Self { temp, path: path.to_owned(), overwrite })
    }

    /// The file to write to.
    pub fn file(&mut self) -> &mut File {
        self.temp.as_file_mut()
    }

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// [`PersistError`]; the temporary file is then gone.
    pub fn commit(self) -> Result<(), PersistError> {
        let Self { temp, path, overwrite } = self;
        let io = |source| PersistError::Io { path: path.clone(), source };
        temp.as_file().sync_all().map_err(io)?;
        if overwrite {
            temp.persist(&path).map_err(|e| io(e.error))?;
        } else {
            temp.persist_noclobber(&path).map_err(|e| match e.error.kind() {
                io::ErrorKind::AlreadyExists => PersistError::Exists { path: path.clone() },
                _ => io(e.error),
            })?;
        }
        // The rename itself is durable only once the folder is; some file systems refuse to sync one,
        // and then the file is still whole.
        if let Ok(dir) = File::open(folder(&path)) {
            let _ = dir.sync_all();
        }
        Ok(())
    }
}

/// Removes the temporary neighbours of `path` that a process killed while writing it has left. Not while
/// another process may be writing the same output.
pub fn sweep(path: &Path) {
    let Some(name) = path.file_name() else { return };
    let prefix = prefix(name);
    // A folder that cannot be read is left for the output itself to complain of.
    for entry in std::fs::read_dir(folder(path)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let middle = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(SUFFIX));
        if middle.is_some_and(|m| !m.is_empty() && m.bytes().all(|b| b.is_ascii_alphanumeric())) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// How the name of a temporary neighbour ends.
const SUFFIX: &str = ".part";

/// How the name of a temporary neighbour of `name` begins.
fn prefix(name: &std::ffi::OsStr) -> String {
    format!(".{}.", name.to_string_lossy())
}

/// The folder that `path` is in.
#[must_use]
pub fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_output_appears_only_when_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let mut out = Output::create(&path, false).unwrap();
        out.file().write_all(b"half").unwrap();
        assert!(!path.exists());
        drop(out);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

        let mut out = Output::create(&path, false).unwrap();
        out.file().write_all(b"whole").unwrap();
        out.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert!(matches!(Output::create(&path, false), Err(PersistError::Exists { .. })));

        let mut out = Output::create(&path, true).unwrap();
        out.file().write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        out.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_are_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        for name in
            ["run", ".run.Ab1.part", ".run..part", ".run.a.b.part", ".runs.Ab1.part", "x.part"]
        {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        sweep(&path);
        assert!(!dir.path().join(".run.Ab1.part").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
        // What is written now has such a name.
        std::mem::forget(Output::create(&path, true).unwrap());
        sweep(&path);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let err = Output::create(Path::new("/no/such/folder/x.png"), false).unwrap_err();
        assert!(err.to_string().contains("/no/such/folder/x.png"), "{err}");
        assert!(err.to_string().contains("create it first"), "{err}");
    }
}

//! Exit codes, and the one place where an error becomes a code and a message.
//!
//! Lives here: [`Exit`], the few errors that only the command has, and [`classify`], which walks an error's
//! causes to the first that has a code. Never here: printing, except the message's wording.

use crate::picture::PictureError;
use latile_cpu::session::CpuError;
use latile_runtime::backend::PrepareError;
use latile_runtime::format::ModelError;
use latile_runtime::persist::PersistError;
use latile_runtime::pipeline::{PipelineError, ResumeError};
use latile_runtime::tensor::ArenaError;

/// What the process tells its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// The work is done and its output is in place.
    Done = 0,
    /// Something failed that has no code of its own.
    Failure = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A picture is damaged, too large, or not a picture.
    Image = 3,
    /// A model or checkpoint is damaged, unsupported, or not one.
    Model = 4,
    /// The memory at hand, or what `--memory` allows, does not suffice.
    Budget = 5,
    /// A file cannot be read or written, or is there already.
    Io = 6,
    /// `compare` measured less than was asked for.
    Quality = 7,
    /// A resume file is of another run, damaged, or not one.
    Resume = 8,
    /// Ctrl-C; nothing was left behind, or of a stream of frames whole ones only.
    Interrupted = 130,
    /// The reader of a stream of frames has gone: 128 + SIGPIPE, as a shell reports other programs.
    PipeClosed = 141,
}

/// Wrong arguments that the parser alone cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub(crate) struct FileError {
    /// `read`, `write`.
    pub(crate) action: &'static str,
    /// The file.
    pub(crate) path: std::path::PathBuf,
    /// What the system said.
    pub(crate) source: std::io::Error,
}

/// The user pressed Ctrl-C, or the system asked the process to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; no output was written")]
pub(crate) struct Interrupted;

/// As [`Interrupted`], where something remains; the text says what.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; {0}")]
pub(crate) struct Stopped(pub(crate) String);

/// Whoever read the output has closed it.
#[derive(Debug, thiserror::Error)]
#[error("the output was closed by its reader")]
pub(crate) struct PipeClosed;

/// `compare` measured less than was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct QualityError(pub(crate) String);

/// The code for `error`: that of its first cause that has one.
pub(crate) fn classify(error: &anyhow::Error) -> Exit {
    error.chain().find_map(code).unwrap_or(Exit::Failure)
}

fn code(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if cause.is::<UsageError>() {
        return Some(Exit::Usage);
    }
    if cause.is::<Interrupted>() || cause.is::<Stopped>() {
        return Some(Exit::Interrupted);
    }
    if cause.is::<PipeClosed>() {
        return Some(Exit::PipeClosed);
    }
    if cause.is::<QualityError>() {
        return Some(Exit::Quality);
    }
    if let Some(e) = cause.downcast_ref::<PictureError>() {
        return Some(match e {
            PictureError::Io { .. } => Exit::Io,
            PictureError::Refused { .. } => Exit::Image,
            PictureError::Memory { .. } => Exit::Budget,
        });
    }
    if let Some(e) = cause.downcast_ref::<ModelError>() {
        return Some(model(e));
    }
    if let Some(e) = cause.downcast_ref::<PrepareError>() {
        return prepare(e);
    }
    if let Some(e) = cause.downcast_ref::<PipelineError>() {
        return pipeline(e);
    }
    if let Some(e) = cause.downcast_ref::<ResumeError>() {
        return Some(resume(e));
    }
    if let Some(e) = cause.downcast_ref::<CpuError>() {
        return match e {
            CpuError::Isa(_) => Some(Exit::Usage),
            CpuError::Pool(_) => None,
        };
    }
    #[cfg(feature = "export")]
    if let Some(e) = cause.downcast_ref::<latile_calibration::CalibrationError>() {
        return calibration(e);
    }
    #[cfg(feature = "export")]
    if let Some(e) = cause.downcast_ref::<latile_calibration::TableError>() {
        return Some(table(e));
    }
    #[cfg(feature = "export")]
    if let Some(e) = cause.downcast_ref::<latile_export::ExportError>() {
        return Some(export(e));
    }
    if cause.is::<ArenaError>() {
        return Some(Exit::Budget);
    }
    if cause.is::<PersistError>() || cause.is::<FileError>() || cause.is::<std::io::Error>() {
        return Some(Exit::Io);
    }
    None
}

fn model(e: &ModelError) -> Exit {
    match e {
        ModelError::Io { .. } => Exit::Io,
        ModelError::Memory { .. } => Exit::Budget,
        _ => Exit::Model,
    }
}

/// [`PrepareError`] passes its inner errors through, so that they are no causes of it.
fn prepare(e: &PrepareError) -> Option<Exit> {
    match e {
        PrepareError::Model(e) => Some(model(e)),
        PrepareError::Arena(_) | PrepareError::NoRoom { .. } => Some(Exit::Budget),
        PrepareError::Unsupported { .. } => Some(Exit::Model),
        PrepareError::Shape(_) | PrepareError::Unavailable { .. } => None,
    }
}

/// [`PipelineError`] too passes some of its inner errors through; sessions' errors are its causes.
fn pipeline(e: &PipelineError) -> Option<Exit> {
    match e {
        PipelineError::Model(e) => Some(model(e)),
        PipelineError::Unsuited { .. } | PipelineError::Shape { .. } => Some(Exit::Model),
        PipelineError::Schedule(_)
        | PipelineError::Consistency { .. }
        | PipelineError::Tiles(_)
        | PipelineError::OneTile
        | PipelineError::Noise(_) => Some(Exit::Usage),
        PipelineError::Picture(_) => Some(Exit::Image),
        PipelineError::OutOfMemory { .. } | PipelineError::Budget { .. } => Some(Exit::Budget),
        PipelineError::Scratch { .. } => Some(Exit::Io),
        PipelineError::Cancelled => Some(Exit::Interrupted),
        PipelineError::Resume(e) => Some(resume(e)),
        PipelineError::Prepare { .. }
        | PipelineError::Run { .. }
        | PipelineError::NonFinite { .. }
        | PipelineError::Constant { .. } => None,
    }
}

/// A resume file's errors: the system's, or the file's own.
fn resume(e: &ResumeError) -> Exit {
    match e {
        ResumeError::Io { .. } | ResumeError::Persist(_) => Exit::Io,
        ResumeError::NotOne { .. }
        | ResumeError::Version { .. }
        | ResumeError::Damaged { .. }
        | ResumeError::Other { .. } => Exit::Resume,
    }
}

/// An importer's errors: what is wrong with a checkpoint, unless the system would not let it be read.
#[cfg(feature = "export")]
fn export(e: &latile_export::ExportError) -> Exit {
    use latile_export::ExportError;
    use latile_export::source::SourceErrorKind;
    use latile_runtime::format::WriteError;
    match e {
        ExportError::Source(e) if matches!(e.kind, SourceErrorKind::Io { .. }) => Exit::Io,
        ExportError::Checkpoint { .. } | ExportError::Persist(_) => Exit::Io,
        ExportError::Write { error: WriteError::Io(_), .. } => Exit::Io,
        ExportError::Write { .. } | ExportError::Trial { .. } => Exit::Failure,
        ExportError::Table(e) => table(e),
        ExportError::NoCalibration
        | ExportError::NotQuantized
        | ExportError::NoSuchLayer { .. } => Exit::Usage,
        ExportError::Cancelled => Exit::Interrupted,
        _ => Exit::Model,
    }
}

/// A calibration's errors: the model's, the pictures', or the pipeline's.
#[cfg(feature = "export")]
fn calibration(e: &latile_calibration::CalibrationError) -> Option<Exit> {
    use latile_calibration::CalibrationError as E;
    match e {
        E::Model(e) => Some(model(e)),
        E::Unsuited { .. } | E::Activation { .. } => Some(Exit::Model),
        E::Option(_) => Some(Exit::Usage),
        E::Folder { .. } => Some(Exit::Io),
        E::NoPictures { .. } => Some(Exit::Image),
        E::Plan(e) | E::Pipeline { source: e, .. } => pipeline(e),
        E::Cancelled => Some(Exit::Interrupted),
    }
}

/// A calibration table is as good as the model it is of, or a file that cannot be read.
#[cfg(feature = "export")]
fn table(e: &latile_calibration::TableError) -> Exit {
    use latile_calibration::TableError;
    match e {
        TableError::Io { .. } | TableError::Persist(_) => Exit::Io,
        _ => Exit::Model,
    }
}

/// The message for `error`: what it says, and those of its causes that it does not already say.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_code_is_found_behind_context() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let e = Err::<(), _>(full).context("while writing").unwrap_err();
        assert_eq!(classify(&e), Exit::Io);
        let e = Err::<(), _>(Interrupted).context("x").unwrap_err();
        assert_eq!(classify(&e), Exit::Interrupted);
        assert_eq!(classify(&anyhow::anyhow!("?")), Exit::Failure);
        let e = PrepareError::Arena(ArenaError::OutOfMemory { bytes: 1 });
        assert_eq!(classify(&e.into()), Exit::Budget);
    }

    #[test]
    fn a_cause_is_said_once() {
        let e = ModelError::Io { path: "m.latile".into(), source: std::io::Error::other("gone") };
        let e = anyhow::Error::from(e).context("cannot upscale");
        assert_eq!(message(&e), "cannot upscale: cannot read model m.latile: gone");
    }
}

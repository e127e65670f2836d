//! The model inside the program, and the choice between it and a file.

use crate::exit::UsageError;
use latile_runtime::format::{Held, Model};
use std::path::Path;

/// Bytes at the alignment that a model's weights need where they lie.
#[cfg(feature = "bundled")]
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[cfg(feature = "bundled")]
static PHOTO_X4: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/photo-x4.latile")));

/// The model at `path`, or the bundled one; a file is held as `held` says, mapped by default.
///
/// # Errors
/// A usage error where no path is given and the program carries no model or is asked how to hold its
/// file; else as [`Model::open_held`].
pub(crate) fn open(path: Option<&Path>, held: Option<Held>) -> anyhow::Result<Model> {
    match (path, held) {
        (Some(path), held) => Ok(Model::open_held(path, held.unwrap_or_default())?),
        (None, None) => bundled(),
        (None, Some(_)) => Err(UsageError(
            "--weights says how a model's file is held, and the bundled model is part of the program; name a file with --model, or leave --weights out"
                .to_owned(),
        )
        .into()),
    }
}

#[cfg(feature = "bundled")]
fn bundled() -> anyhow::Result<Model> {
    Ok(Model::from_static("photo-x4", &PHOTO_X4.0)?)
}

#[cfg(not(feature = "bundled"))]
fn bundled() -> anyhow::Result<Model> {
    Err(UsageError(
        "this program was built without a model of its own; name one with --model FILE.latile"
            .to_owned(),
    )
    .into())
}

//! The model inside the program, and the choice between it and a file.

use latile_runtime::format::Model;
use std::path::Path;

/// Bytes at the alignment that a model's weights need where they lie.
#[cfg(feature = "bundled")]
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[cfg(feature = "bundled")]
static PHOTO_X4: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/photo-x4.latile")));

/// The model at `path`, or the bundled one.
///
/// # Errors
/// A usage error where no path is given and the program carries no model; else as [`Model::open`].
pub(crate) fn open(path: Option<&Path>) -> anyhow::Result<Model> {
    match path {
        Some(path) => Ok(Model::open(path)?),
        None => bundled(),
    }
}

#[cfg(feature = "bundled")]
fn bundled() -> anyhow::Result<Model> {
    Ok(Model::from_static("photo-x4", &PHOTO_X4.0)?)
}

#[cfg(not(feature = "bundled"))]
fn bundled() -> anyhow::Result<Model> {
    Err(crate::exit::UsageError(
        "this program was built without a model of its own; name one with --model FILE.latile"
            .to_owned(),
    )
    .into())
}

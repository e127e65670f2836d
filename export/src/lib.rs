//! Turns a trained latent diffusion checkpoint into one `.latile` file.
//!
//! Lives here: weight sources ([`source`]), the configs of diffusers folders ([`diffusers`]) and the key layout
//! of CompVis checkpoints ([`compvis`]), both resolved to one description of the networks ([`arch`]), the graph
//! builder that turns that description into primitive operators ([`build`]), the step from float to int8
//! ([`quantize`]) and what each layer adds to the result by it ([`sensitivity`]) and each level to
//! the picture ([`levels`]), its quality report ([`report`]), and
//! the streaming writer behind [`export`]. Upsampling is folded into the convolution after it (`phases`). ONNX graphs
//! come in through `onnx` where that feature is on.
//!
//! Never here: kernels, samplers, pictures. No checkpoint is ever executed: pickles are read by a machine
//! without calls ([`source::pickle`]).
#![forbid(unsafe_code)]

pub mod arch;
pub mod build;
pub mod compvis;
pub mod diffusers;
mod error;
pub mod levels;
mod model;
#[cfg(feature = "onnx")]
pub mod onnx;
mod pack;
mod phases;
pub mod quantize;
pub mod report;
pub mod sensitivity;
pub mod source;
mod tensors;
mod write;

pub use error::ExportError;
pub use quantize::{AttentionSummary, Glob, LayerSummary, Mixed, Quantization, Winograd};
pub use write::{ComponentSummary, PartBytes, Progress, Summary};

use compvis::{Ema, Hints};
use latile_runtime::format::Precision;
use model::Model;
use std::ops::ControlFlow;
use std::path::Path;

/// How a checkpoint is exported.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportOptions {
    /// How weights and activations are stored.
    pub precision: Precision,
    /// Whether an existing output may be replaced.
    pub overwrite: bool,
    /// Whether the autoencoder's encoder is kept; super-resolution does not need it.
    pub encoder: bool,
    /// The model's name; by default the checkpoint's.
    pub name: Option<String>,
    /// Its licence; by default what the checkpoint's model card says.
    pub license: Option<String>,
    /// DDIM steps by default.
    pub steps: Option<u32>,
    /// DDIM's eta by default.
    pub eta: Option<f32>,
    /// How much the result is held to the input by default, 0 to 1.
    pub consistency: Option<f32>,
    /// How the model is quantized, for the precisions that have int8 layers and only those.
    pub quantization: Option<Quantization>,
    /// Which U-Net weights of a CompVis checkpoint.
    pub ema: Ema,
    /// What a CompVis checkpoint's shapes do not tell.
    pub hints: Hints,
}

/// Exports `checkpoint`, a diffusers folder or a CompVis checkpoint file, to the `.latile` file `output`.
///
/// Weights stream: beside the largest tensor twice (as read, and as transformed or packed), little is held in memory. `progress`
/// is called after every tensor, and every megabyte of hashing; it stops the export by [`ControlFlow::Break`].
/// The output appears whole or not at all.
///
/// # Errors
/// [`ExportError`]: the checkpoint cannot be read or is not supported, or the output cannot be written.
pub fn export(
    checkpoint: &Path,
    output: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Summary, ExportError> {
    let model = Model::open(checkpoint, options)?;
    write::write(model, output, &stem(checkpoint), options, progress)
}

/// A model's name by its path: the folder's name, or the file's without its extension.
fn stem(path: &Path) -> String {
    // `.` and `..` have a name only once resolved.
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    name.map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
}

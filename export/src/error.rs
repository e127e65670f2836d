//! Why a model could not be exported.

use crate::arch::ArchError;
use crate::diffusers::ConfigError;
use crate::source::SourceError;
use latile_calibration::TableError;
use latile_runtime::format::WriteError;
use latile_runtime::persist::PersistError;
use std::path::PathBuf;

/// Why a model could not be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A weight file cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A config of a diffusers folder cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The checkpoint is neither a file nor a folder that can be read.
    #[error("cannot read {}: {error}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: std::io::Error,
    },
    /// A component's folder holds no weights.
    #[error("{} holds no weights; expected one of {wanted}", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// File names that would do.
        wanted: String,
    },
    /// A tensor that a network needs is absent.
    #[error(
        "{}: tensor {name} is missing; {wanted_for} needs it with shape {shape:?}; the file is incomplete or does not fit its config",
        path.display()
    )]
    MissingTensor {
        /// The weight file.
        path: PathBuf,
        /// The tensor, under its name in the file's layout.
        name: String,
        /// The component and layer.
        wanted_for: String,
        /// The shape it should have.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the network needs.
    #[error(
        "{}: tensor {name} has shape {found:?}, expected {expected:?} for {wanted_for}; the file does not fit its config",
        path.display()
    )]
    WrongShape {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The component and layer.
        wanted_for: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A weight that is not a number, or infinite.
    #[error(
        "{}: tensor {name} holds {value} at element {index}; the checkpoint is broken, or its training diverged",
        path.display()
    )]
    NotFinite {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
        /// Which element.
        index: usize,
    },
    /// A weight beyond what f16 can hold.
    #[error(
        "{}: tensor {name} holds {value} at element {index}, beyond f16's ±65504; export with --precision f32",
        path.display()
    )]
    F16Overflow {
        /// The weight file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The weight.
        value: f32,
        /// Which element.
        index: usize,
    },
    /// A description that cannot be built.
    #[error("{}: {error}", path.display())]
    Arch {
        /// The config or checkpoint it comes from.
        path: PathBuf,
        /// What does not fit.
        #[source]
        error: ArchError,
    },
    /// A file whose tensors are not those of a latent diffusion model, or of one that is not supported.
    #[error("{}: {why}", path.display())]
    Layout {
        /// The checkpoint.
        path: PathBuf,
        /// What was found, and what is supported.
        why: String,
    },
    /// EMA weights were asked for and are not (all) there.
    #[error("{}: {why}; export with --ema no to use the plain weights", path.display())]
    NoEma {
        /// The checkpoint.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// An ONNX graph that cannot be turned into a component.
    #[error("{}: {why}", path.display())]
    Onnx {
        /// The ONNX file.
        path: PathBuf,
        /// What was found, where, and what is supported.
        why: String,
    },
    /// An int8 model without calibration: ranges are never guessed.
    #[error(
        "an int8 model needs activation ranges, which are measured and never guessed; give a folder of pictures or a calibration table"
    )]
    NoCalibration,
    /// A calibration for a model without int8 layers.
    #[error("an f32 or f16 model has no int8 layers, so a calibration has no use for it")]
    NotQuantized,
    /// A calibration table that cannot be used for this model.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A trial model could not be made or run.
    #[error("cannot measure what {role} layer {layer} adds to the result: {why}")]
    Trial {
        /// The network.
        role: latile_runtime::format::Role,
        /// The layer.
        layer: String,
        /// What stopped it.
        why: String,
    },
    /// A layer that cannot be quantized.
    #[error("{layer} cannot be quantized: {why}")]
    Quantize {
        /// The layer.
        layer: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// A pattern of layers to keep that no layer fits.
    #[error("no layer fits {option} {glob}; `latile inspect` lists a model's layers")]
    NoSuchLayer {
        /// The option that was given.
        option: &'static str,
        /// The pattern.
        glob: String,
    },
    /// The output cannot be written or may not be replaced.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// The output's disk refused, or what was written contradicts its own description.
    #[error("{}: {error}", path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// What happened.
        #[source]
        error: WriteError,
    },
    /// The caller asked to stop; nothing was left behind.
    #[error("interrupted; nothing was written")]
    Cancelled,
}

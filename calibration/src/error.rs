//! Why there is no table.

use latile_runtime::format::{ModelError, Role};
use latile_runtime::pipeline::PipelineError;
use std::path::PathBuf;

/// Why a model could not be calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The model's bytes are damaged.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model is sound, but not one that can be calibrated.
    #[error("model {model} cannot be calibrated: {why}")]
    Unsuited {
        /// The model.
        model: String,
        /// What does not fit.
        why: String,
    },
    /// An option is out of range.
    #[error("{0}")]
    Option(String),
    /// The folder of pictures cannot be read.
    #[error("cannot read the calibration folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is nothing to calibrate with.
    #[error(
        "no data, no int8: the calibration folder {} is refused: {why}; give it a few photographs of the kind the model is meant for",
        folder.display()
    )]
    NoPictures {
        /// The folder.
        folder: PathBuf,
        /// Why nothing in it can be used.
        why: String,
    },
    /// A layer's input is NaN, infinite, or beyond all use.
    #[error(
        "{role} layer {layer} reads {value}{place}, on picture {picture}: no range can hold that; what comes before the layer is damaged, or does not suit the model's own schedule"
    )]
    Activation {
        /// The network.
        role: Role,
        /// The layer that reads it; one before it made it.
        layer: String,
        /// ` at timestep t`, where there is a timestep.
        place: String,
        /// The picture's name.
        picture: String,
        /// The value.
        value: f32,
    },
    /// The run cannot be planned with these options.
    #[error(transparent)]
    Plan(PipelineError),
    /// A run failed.
    #[error("picture {picture}: {source}")]
    Pipeline {
        /// The picture's name.
        picture: String,
        /// Why.
        source: PipelineError,
    },
    /// The progress callback asked to stop.
    #[error("stopped before the table was complete")]
    Cancelled,
}

//! The manifest's types: everything about a model but its weights' bytes. It is stored as JSON with
//! exactly these fields; unknown ones are refused.

use super::header::OLDEST;
use crate::graph::{Graph, Op, Winograd};
use serde::{Deserialize, Serialize};

/// A model's description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Where it comes from.
    pub metadata: Metadata,
    /// How weights and stored activations are kept.
    pub precision: Precision,
    /// What the components together do.
    pub task: Task,
    /// The autoencoder's latent space.
    pub latent: Option<LatentSpec>,
    /// The diffusion process the U-Net was trained on.
    pub scheduler: Option<SchedulerSpec>,
    /// How it is sampled when the user does not say.
    pub defaults: Defaults,
    /// The networks.
    pub components: Vec<ComponentSpec>,
}

impl Manifest {
    /// The oldest version of the format that has all it needs.
    #[must_use]
    pub fn version(&self) -> u32 {
        let nodes = self.components.iter().flat_map(|c| &c.graph.nodes);
        let needs = |op: &Op| match op {
            Op::UpConv2x { .. } => 3,
            _ => match op.quant().and_then(|q| q.winograd) {
                Some(Winograd::Square) => 5,
                Some(Winograd::Rows) => 4,
                None => OLDEST,
            },
        };
        nodes.map(|n| needs(&n.op)).max().unwrap_or(OLDEST)
    }
}

/// Where a model comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The model's name.
    pub name: String,
    /// Its licence, as an SPDX expression where one is known; empty where not.
    pub license: String,
    /// What it was imported from: `diffusers`, `compvis`, `onnx`.
    pub source: String,
    /// BLAKE3 of the source weights' bytes, hexadecimal.
    pub source_hash: String,
    /// The program that wrote the file.
    pub producer: String,
}

/// How numbers are stored. Arithmetic is f32 in either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Weights and activations in f32.
    F32,
    /// Weights and activations in f16.
    F16,
    /// Weights of convolutions and linear layers, and what they read, in int8 wherever an int8 layer is
    /// possible; all else, and the activations stored between steps, in f16.
    Int8,
    /// As [`Precision::Int8`], with the layers that lose most by it left in f16.
    Mixed,
}

impl Precision {
    /// The element type of stored activations and of packed weights that are not int8.
    #[must_use]
    pub const fn dtype(self) -> crate::tensor::DType {
        match self {
            Self::F32 => crate::tensor::DType::F32,
            Self::F16 | Self::Int8 | Self::Mixed => crate::tensor::DType::F16,
        }
    }
}

/// What the components together do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// The U-Net denoises a latent concatenated with a low-resolution picture on the latent's own grid;
    /// the decoder's result is `factor` times as large.
    SuperResolution,
    /// Components that are run one by one.
    Components,
}

/// The latent space.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentSpec {
    /// Channels of a latent.
    pub channels: u32,
    /// Picture pixels a latent pixel stands for, in each direction.
    pub factor: u32,
    /// The decoder takes `latent / scale + shift` (diffusers' `scaling_factor`).
    pub scale: f32,
    /// See `scale` (diffusers' `shift_factor`).
    pub shift: f32,
}

/// The diffusion process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchedulerSpec {
    /// Timesteps of training, usually 1000.
    pub train_timesteps: u32,
    /// The noise schedule.
    pub betas: BetaSchedule,
    /// What the U-Net predicts.
    pub prediction: Prediction,
    /// How a few timesteps are chosen among the many.
    pub spacing: Spacing,
    /// Added to timesteps under [`Spacing::Leading`].
    pub steps_offset: u32,
    /// Whether the step after the last has ᾱ = 1, else ᾱ of timestep 0.
    pub set_alpha_to_one: bool,
    /// The predicted clean latent is clipped to ± this.
    pub clip_sample: Option<f32>,
    /// Betas are rescaled so that the last timestep has no signal (Lin et al. 2023, algorithm 1).
    pub zero_terminal_snr: bool,
}

/// A noise schedule from `start` to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum BetaSchedule {
    /// Betas evenly spaced.
    Linear {
        /// First beta.
        start: f64,
        /// Last beta.
        end: f64,
    },
    /// Square roots of betas evenly spaced (LDM's own).
    ScaledLinear {
        /// First beta.
        start: f64,
        /// Last beta.
        end: f64,
    },
}

/// What the U-Net predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise (Ho et al. 2020).
    Epsilon,
    /// `√ᾱ ε − √(1−ᾱ) x₀` (Salimans & Ho 2022).
    V,
    /// The clean latent.
    Sample,
}

/// How `S` timesteps are chosen among `T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spacing {
    /// `range(0, T, T // S) + 1`: an S that does not divide T gives a step more (LDM, `make_ddim_timesteps`).
    Compvis,
    /// `range(S) · (T // S) + offset` (Lin et al. 2023, table 2).
    Leading,
    /// `round(range(T, 0, −T / S)) − 1`.
    Trailing,
    /// `round(linspace(0, T − 1, S))`.
    Linspace,
}

/// How the model is sampled when the user does not say.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// DDIM steps.
    pub steps: u32,
    /// DDIM's eta: 0 is deterministic, 1 is ancestral.
    pub eta: f32,
    /// How far a super-resolution result is made consistent with its input (back-projection): 0 not at
    /// all, 1 fully.
    pub consistency: f32,
}

/// A component's part in the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Picture to latent.
    Encoder,
    /// Latent to picture.
    Decoder,
    /// Noisy latent to prediction.
    Unet,
}

impl Role {
    /// The name used in manifests and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
            Self::Unet => "unet",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComponentSpec {
    /// Its part.
    pub role: Role,
    /// Map inputs must have sides that are multiples of this.
    pub multiple: u32,
    /// For a U-Net: how a timestep becomes its `time_proj` input.
    pub timestep: Option<TimestepProjection>,
    /// Groups of timesteps with activation ranges of their own: group `i` holds the timesteps from the
    /// bound before it (0 for the first) up to but without bound `i`. Empty where there are no groups.
    pub timestep_groups: Vec<u32>,
    /// The operators.
    pub graph: Graph,
    /// Where each of `graph.weights` lies, in the same order.
    pub places: Vec<WeightPlace>,
}

impl ComponentSpec {
    /// The group that holds timestep `t`, an index into each int8 layer's ranges; the last one for
    /// timesteps beyond all bounds, 0 where there are no groups.
    #[must_use]
    pub fn timestep_group(&self, t: f32) -> usize {
        let last = self.timestep_groups.len().saturating_sub(1);
        self.timestep_groups.iter().position(|&bound| t < bound as f32).unwrap_or(last)
    }

    /// Where its weights lie, as offsets from the start of the weights. The reader has checked that they
    /// follow one another.
    pub(super) fn extent(&self) -> std::ops::Range<u64> {
        match (self.places.first(), self.places.last()) {
            (Some(first), Some(last)) => first.offset..last.offset + last.extent,
            _ => 0..0,
        }
    }

    /// Bytes of its weights, padding included.
    pub(super) fn extent_len(&self) -> usize {
        let extent = self.extent();
        (extent.end - extent.start) as usize
    }
}

/// Where a weight lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightPlace {
    /// Offset from the start of the weights.
    pub offset: u64,
    /// Bytes to the next weight, padding included; a multiple of 64.
    pub extent: u64,
    /// CRC-32C of those bytes.
    pub crc32c: u32,
}

/// The sinusoidal projection of a timestep (Vaswani et al. 2017, section 3.5; diffusers'
/// `get_timestep_embedding`): `half = dim / 2` frequencies `10000^(−i / (half − freq_shift))`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimestepProjection {
    /// Length of `time_proj`, even.
    pub dim: u32,
    /// Cosines first (LDM), else sines first.
    pub flip_sin_to_cos: bool,
    /// Subtracted from `half` in the exponent's denominator.
    pub freq_shift: f32,
}

impl TimestepProjection {
    /// Writes the projection of timestep `t` to `out`, `dim` elements.
    ///
    /// Computed in f32 as the networks were trained with it.
    ///
    /// # Panics
    /// Where `out` is not `dim` long.
    pub fn project(&self, t: f32, out: &mut [f32]) {
        assert_eq!(out.len(), self.dim as usize, "time_proj has another length");
        let half = out.len() / 2;
        let (first, second) = out.split_at_mut(half);
        let (sin, cos) = if self.flip_sin_to_cos { (second, first) } else { (first, second) };
        let ln_max_period = 9.210_340_5_f32;
        for i in 0..half {
            let exponent = -ln_max_period * i as f32 / (half as f32 - self.freq_shift);
            let arg = t * libm::expf(exponent);
            sin[i] = libm::sinf(arg);
            cos[i] = libm::cosf(arg);
        }
    }
}

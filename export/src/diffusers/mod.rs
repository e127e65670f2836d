//! Diffusers folders: `model_index.json`, a folder for the U-Net, one for the autoencoder, one for the scheduler.
//!
//! Lives here: the configs' meaning, option by option, and where weights lie in a folder. Every option either
//! changes the description of the networks, is known to be without effect on a prediction, or is refused by
//! name: nothing is ignored in silence. Never here: graphs. Semantics follow diffusers 0.42
//! (`models/unets/unet_2d.py`, `models/autoencoders/`, `schedulers/scheduling_ddim.py`).

mod autoencoder;
mod options;
mod scheduler;
mod unet;

pub use autoencoder::{AutoencoderConfig, read_autoencoder};
pub use options::ConfigError;
pub(crate) use scheduler::recognise_betas;
pub use scheduler::{SchedulerConfig, read_scheduler};
pub use unet::read_unet;

use crate::ExportError;
use crate::arch::{Bottleneck, UnetArch};
use crate::source::{self, ShardedSource, WeightSource};
use options::Options;
use std::path::{Path, PathBuf};

/// A diffusers folder, its configs read and its weight files opened.
pub struct DiffusersFolder {
    /// The pipeline class named in `model_index.json`.
    pub class: String,
    /// The U-Net and its weights.
    pub unet: (UnetArch, Box<dyn WeightSource>),
    /// The autoencoder and its weights.
    pub autoencoder: (AutoencoderConfig, Box<dyn WeightSource>),
    /// Whether latents are scaled for the decoder: LDMSuperResolutionPipeline never scales those of a VQModel,
    /// whose config has a default all the same.
    pub scaled_latents: bool,
    /// The noise schedule.
    pub scheduler: SchedulerConfig,
    /// The licence its model card states.
    pub license: Option<String>,
}

/// Pipelines whose networks these are.
const PIPELINES: &str = "\"LDMSuperResolutionPipeline\", \"LDMPipeline\"";
/// File names of weights, in the order in which they are preferred.
const WEIGHTS: [&str; 6] = [
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
];

impl DiffusersFolder {
    /// Reads a folder's configs and opens its weights.
    ///
    /// # Errors
    /// [`ExportError`] naming the file and what is wrong with it.
    pub fn open(folder: &Path) -> Result<Self, ExportError> {
        let index = Options::read(&folder.join("model_index.json"))?;
        let class = index.required("_class_name", index.text("_class_name")?)?.to_owned();
        if !matches!(class.as_str(), "LDMSuperResolutionPipeline" | "LDMPipeline") {
            return Err(index.unsupported("_class_name", PIPELINES).into());
        }
        for (key, classes) in [("unet", "UNet2DModel"), ("scheduler", "")] {
            let parts = index.required(key, index.texts(key)?)?;
            if !classes.is_empty() && parts.get(1).map(String::as_str) != Some(classes) {
                return Err(index
                    .unsupported(key, format!("[\"diffusers\", \"{classes}\"]"))
                    .into());
            }
        }
        let key = match (index.get("vqvae"), index.get("vae")) {
            (Some(_), None) => "vqvae",
            (None, Some(_)) => "vae",
            _ => return Err(index.unsupported("vqvae", "one of vqvae and vae").into()),
        };
        index.finish(&[])?;
        let unet = read_unet(&folder.join("unet/config.json"))?;
        let autoencoder = read_autoencoder(&folder.join(key).join("config.json"))?;
        let scheduler = read_scheduler(&folder.join("scheduler/scheduler_config.json"))?;
        Ok(Self {
            scaled_latents: class != "LDMSuperResolutionPipeline"
                || matches!(autoencoder.arch.bottleneck, Bottleneck::Kl { .. }),
            class,
            unet: (unet, open_weights(&folder.join("unet"))?),
            autoencoder: (autoencoder, open_weights(&folder.join(key))?),
            scheduler,
            license: card_license(&folder.join("README.md")),
        })
    }
}

/// Opens the weights of one component's folder.
fn open_weights(folder: &Path) -> Result<Box<dyn WeightSource>, ExportError> {
    let Some(name) = WEIGHTS.iter().find(|n| folder.join(n).is_file()) else {
        return Err(ExportError::NoWeights {
            folder: PathBuf::from(folder),
            wanted: WEIGHTS[..4].join(", "),
        });
    };
    let path = folder.join(name);
    Ok(if name.ends_with(".json") {
        Box::new(ShardedSource::open(&path)?)
    } else {
        source::open(&path)?
    })
}

/// The former name of an attention tensor (diffusers before 0.12), where `name` is one.
pub(crate) fn former_name(name: &str) -> Option<String> {
    let (block, tensor) = name.split_once(".attentions.")?;
    let (index, tensor) = tensor.split_once('.')?;
    let (layer, kind) = tensor.rsplit_once('.')?;
    let former = match layer {
        "to_q" => "query",
        "to_k" => "key",
        "to_v" => "value",
        "to_out.0" => "proj_attn",
        _ => return None,
    };
    Some(format!("{block}.attentions.{index}.{former}.{kind}"))
}

/// The `license:` of a model card's front matter.
fn card_license(readme: &Path) -> Option<String> {
    let text = std::fs::read_to_string(readme).ok()?;
    let front = text.strip_prefix("---\n")?.split("\n---").next()?;
    let line = front.lines().find_map(|l| l.strip_prefix("license:"))?;
    let license = line.trim().trim_matches(['"', '\'']);
    (!license.is_empty() && license.len() < 100).then(|| license.to_owned())
}

/// Refuses activations other than SiLU.
fn activation(o: &Options) -> Result<(), ConfigError> {
    match o.text("act_fn")?.unwrap_or("silu").to_lowercase().as_str() {
        "silu" | "swish" => Ok(()),
        _ => Err(o.unsupported("act_fn", "\"silu\", \"swish\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn former_names() {
        assert_eq!(
            former_name("mid_block.attentions.0.to_out.0.weight").as_deref(),
            Some("mid_block.attentions.0.proj_attn.weight")
        );
        assert_eq!(
            former_name("down_blocks.1.attentions.12.to_q.bias").as_deref(),
            Some("down_blocks.1.attentions.12.query.bias")
        );
        assert_eq!(former_name("mid_block.attentions.0.group_norm.weight"), None);
        assert_eq!(former_name("conv_in.weight"), None);
    }
}

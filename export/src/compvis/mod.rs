//! Checkpoints in CompVis' layout: one file with the U-Net under `model.diffusion_model.`, the autoencoder under
//! `first_stage_model.`, and the noise schedule as buffers.
//!
//! Lives here: the networks' descriptions inferred from names and shapes (`infer`), the names of their tensors
//! (`names`), and what a config beside the checkpoint may add ([`Hints`]). Shapes do not tell how many heads
//! attention has, so that comes from the config, from a table of the published models, or from the caller. Never
//! here: graphs. Layout: `ldm/modules/diffusionmodules/openaimodel.py` and `model.py` of
//! <https://github.com/CompVis/latent-diffusion>.

mod hints;
mod infer;
mod names;
mod published;

pub use hints::{Heads, Hints};

use crate::ExportError;
use crate::arch::{AutoencoderArch, UnetArch};
use crate::diffusers::recognise_betas;
use crate::source::WeightSource;
use crate::tensors::Part;
use latile_runtime::format::{BetaSchedule, Prediction, SchedulerSpec, Spacing};
use std::collections::BTreeMap;
use std::path::Path;

/// Which of two sets of U-Net weights a checkpoint's user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ema {
    /// The exponential moving average where it is complete, as CompVis' own sampling does; else the plain ones.
    #[default]
    Auto,
    /// The exponential moving average; an error where it is not complete.
    Yes,
    /// The plain weights.
    No,
}

/// Where a weight of the graph lies: the tensor's name and the part of it.
pub(crate) type NameMap = BTreeMap<String, (String, Part)>;

/// A CompVis checkpoint, understood.
pub(crate) struct CompvisCheckpoint {
    pub(crate) unet: Option<(UnetArch, NameMap)>,
    pub(crate) autoencoder: (AutoencoderArch, NameMap),
    pub(crate) scheduler: Option<SchedulerSpec>,
    /// The latent's scale factor; 1 where the model was trained without.
    pub(crate) scale: f32,
    /// What was assumed.
    pub(crate) notes: Vec<String>,
}

pub(crate) const UNET: &str = "model.diffusion_model.";
const FIRST_STAGE: &str = "first_stage_model.";

impl CompvisCheckpoint {
    pub(crate) fn read(
        source: &dyn WeightSource,
        hints: &Hints,
        ema: Ema,
    ) -> Result<Self, ExportError> {
        let layout = |why: String| ExportError::Layout { path: source.path().to_owned(), why };
        let names = source.names();
        let has = |prefix: &str| names.iter().any(|n| n.starts_with(prefix));
        let stage = if has("first_stage_model.decoder.") {
            FIRST_STAGE
        } else if has("decoder.up.") {
            ""
        } else {
            let first: Vec<&str> = names.iter().take(3).copied().collect();
            return Err(layout(format!(
                "its tensors ({}, …) are not a latent diffusion model's; expected model.diffusion_model.… and \
                 first_stage_model.… (a CompVis checkpoint), or give a diffusers folder",
                first.join(", ")
            )));
        };
        let mut notes = Vec::new();
        let autoencoder = infer::autoencoder(source, stage, hints)?;
        let autoencoder_names = names::autoencoder(&autoencoder, stage, source);
        let unet = if has(UNET) {
            let arch = infer::unet(source, hints, &mut notes)?;
            let mut map = names::unet(&arch);
            if use_ema(source, ema, &mut notes)? {
                for (name, _) in map.values_mut() {
                    *name = ema_name(name);
                }
            }
            Some((arch, map))
        } else {
            notes.push("the checkpoint holds an autoencoder alone".to_owned());
            None
        };
        let scheduler = match &unet {
            Some((arch, _)) => Some(scheduler(source, hints, arch, &mut notes)?),
            None => None,
        };
        let scale = match (hints.scale_factor, scalar(source, "scale_factor")?) {
            (_, Some(buffer)) => buffer,
            (Some(hint), None) => hint,
            (None, None) => 1.0,
        };
        if !(scale.is_finite() && scale > 0.0) {
            return Err(layout(format!(
                "its latent scale_factor is {scale}, expected a number above zero"
            )));
        }
        Ok(Self { unet, autoencoder: (autoencoder, autoencoder_names), scheduler, scale, notes })
    }
}

/// LitEma's name of a U-Net tensor: the module's dots fall away.
fn ema_name(name: &str) -> String {
    let inner = name.strip_prefix("model.").unwrap_or(name);
    format!("model_ema.{}", inner.replace('.', ""))
}

/// Whether to use the averaged weights.
fn use_ema(
    source: &dyn WeightSource,
    ema: Ema,
    notes: &mut Vec<String>,
) -> Result<bool, ExportError> {
    let names = source.names();
    let any = names.iter().any(|n| n.starts_with("model_ema.diffusion_model"));
    let missing = names
        .iter()
        .filter(|n| n.starts_with(UNET))
        .find(|n| source.info(&ema_name(n)).map(|i| &i.shape) != source.info(n).map(|i| &i.shape));
    match (ema, any, missing) {
        (Ema::No, false, _) => Ok(false),
        (Ema::No, true, _) => {
            notes.push("the plain U-Net weights are used, as asked; the checkpoint has averaged (EMA) ones too".into());
            Ok(false)
        }
        (Ema::Auto, false, _) => Ok(false),
        (Ema::Auto | Ema::Yes, true, None) => {
            notes.push(
                "the averaged (EMA) U-Net weights are used; --ema no uses the plain ones".into(),
            );
            Ok(true)
        }
        (Ema::Auto, true, Some(name)) => {
            notes.push(format!(
                "the averaged (EMA) weights lack {name}, so the plain U-Net weights are used"
            ));
            Ok(false)
        }
        (Ema::Yes, _, missing) => Err(ExportError::NoEma {
            path: source.path().to_owned(),
            why: match missing {
                Some(name) => format!("its averaged (EMA) weights lack {name}"),
                None => "it holds no averaged (EMA) weights".to_owned(),
            },
        }),
    }
}

/// A one-element buffer.
fn scalar(source: &dyn WeightSource, name: &str) -> Result<Option<f32>, ExportError> {
    match source.info(name) {
        Some(info) if info.shape.iter().all(|&d| d == 1) => {
            let mut out = Vec::new();
            source.read_f32(name, &mut out)?;
            Ok(out.first().copied())
        }
        _ => Ok(None),
    }
}

/// The shortest decimal that is this f32: buffers are f32 roundings of the config's decimals.
fn decimal(v: f64) -> f64 {
    (v as f32).to_string().parse().unwrap_or(v)
}

fn scheduler(
    source: &dyn WeightSource,
    hints: &Hints,
    arch: &UnetArch,
    notes: &mut Vec<String>,
) -> Result<SchedulerSpec, ExportError> {
    let last = arch.down.last().map_or(0, |l| l.channels);
    let published = published::find((arch.in_channels, arch.down[0].channels, last));

    let layout =
        |why: &str| ExportError::Layout { path: source.path().to_owned(), why: why.to_owned() };
    let (train_timesteps, betas) = match (source.info("betas"), hints.betas) {
        (Some(info), _) if info.shape.len() == 1 && (2..=100_000).contains(&info.shape[0]) => {
            let mut values = Vec::new();
            source.read_f32("betas", &mut values)?;
            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            let betas = match recognise_betas(&values) {
                Some(BetaSchedule::Linear { start, end }) => {
                    BetaSchedule::Linear { start: decimal(start), end: decimal(end) }
                }
                Some(BetaSchedule::ScaledLinear { start, end }) => {
                    BetaSchedule::ScaledLinear { start: decimal(start), end: decimal(end) }
                }
                None => {
                    return Err(layout(
                        "its betas buffer follows neither a linear nor a scaled linear schedule",
                    ));
                }
            };
            (values.len() as u32, betas)
        }
        (Some(_), _) => {
            return Err(layout("its betas buffer is not a list of 2 to 100000 numbers"));
        }
        (None, Some((start, end))) => {
            (hints.timesteps.unwrap_or(1000), BetaSchedule::ScaledLinear { start, end })
        }
        (None, None) => match published {
            Some(p) => {
                notes.push(format!("the checkpoint holds no betas; those of {} are used", p.name));
                let (start, end) = p.betas;
                (1000, BetaSchedule::ScaledLinear { start, end })
            }
            None => {
                return Err(layout(
                    "it holds no betas buffer, so its noise schedule is unknown; put the model's config \
                     (linear_start, linear_end) beside it as a .yaml file of the same name",
                ));
            }
        },
    };
    Ok(SchedulerSpec {
        train_timesteps,
        betas,
        prediction: hints.prediction.unwrap_or(Prediction::Epsilon),
        spacing: Spacing::Compvis,
        // Of use only where leading spacing is asked for; CompVis' own timesteps begin at 1 as well.
        steps_offset: 1,
        set_alpha_to_one: false,
        clip_sample: None,
        zero_terminal_snr: false,
    })
}

/// Tensors under the networks' prefixes that nothing used: the description inferred would be wrong.
pub(crate) fn unused<'a>(
    source: &'a dyn WeightSource,
    checkpoint: &CompvisCheckpoint,
) -> Option<&'a str> {
    let used: std::collections::BTreeSet<&str> = checkpoint
        .unet
        .iter()
        .flat_map(|(_, map)| map.values())
        .chain(checkpoint.autoencoder.1.values())
        .map(|(name, _)| name.as_str())
        .collect();
    let ema = used.iter().any(|n| n.starts_with("model_ema."));
    let ours = |n: &str| {
        let stage = n.strip_prefix(FIRST_STAGE).unwrap_or(n);
        let halves = ["encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."];
        n.starts_with(UNET) || halves.iter().any(|h| stage.starts_with(h))
    };
    source.names().into_iter().find(|n| {
        let name = if ema && n.starts_with(UNET) { ema_name(n) } else { (*n).to_owned() };
        ours(n) && !used.contains(name.as_str())
    })
}

/// Reads hints from a config beside the checkpoint, where there is one.
pub(crate) fn config_beside(checkpoint: &Path) -> Option<std::path::PathBuf> {
    let folder = checkpoint.parent()?;
    let own = checkpoint.with_extension("yaml");
    [own, folder.join("config.yaml"), folder.join("project.yaml")].into_iter().find(|p| p.is_file())
}

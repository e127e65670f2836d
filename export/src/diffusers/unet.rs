//! `unet/config.json` of a `UNet2DModel`.

use super::options::{ConfigError, Options};
use crate::arch::{Attention, DownPad, Level, Middle, Norm, Resample, TimeMix, UnetArch};
use latile_runtime::format::TimestepProjection;
use serde_json::json;
use std::path::Path;

/// Keys that do not change what the network computes: training and bookkeeping.
const HARMLESS: [&str; 11] = [
    "sample_size",
    "dropout",
    "num_train_timesteps",
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
    "torch_dtype",
];

/// Reads the description of a U-Net.
///
/// # Errors
/// [`ConfigError`] naming the file, the key and what would be supported.
pub fn read_unet(path: &Path) -> Result<UnetArch, ConfigError> {
    let o = Options::read(path)?;
    match o.text("_class_name")? {
        Some("UNet2DModel") | None => {}
        Some(_) => {
            return Err(o.unsupported(
                "_class_name",
                "\"UNet2DModel\" (a U-Net without text or class conditioning)",
            ));
        }
    }
    o.only("time_embedding_type", &[json!("positional")])?;
    o.only("class_embed_type", &[])?;
    o.only("num_class_embeds", &[])?;
    super::activation(&o)?;
    let channels = o.required("block_out_channels", o.u32s("block_out_channels")?)?;
    let Some((&first, &last)) = channels.first().zip(channels.last()) else {
        return Err(o.unsupported("block_out_channels", "at least one level"));
    };
    let groups = match o.u32("norm_num_groups")? {
        None if o.has("norm_num_groups") => {
            return Err(o.unsupported("norm_num_groups", "a whole number"));
        }
        groups => groups.unwrap_or(32),
    };
    let norm = Norm { groups, eps: o.f64("norm_eps")?.unwrap_or(1e-5) as f32 };
    let layers = o.u32("layers_per_block")?.unwrap_or(2);
    let head_dim = match o.u32("attention_head_dim")? {
        None if o.has("attention_head_dim") => None,
        dim => Some(dim.unwrap_or(8)),
    };
    let attention = |channels: u32, norm: Option<Norm>| {
        let head_dim = head_dim.unwrap_or(channels);
        // A head wider than the map leaves no head; the check of the description refuses it by name.
        let heads = channels.checked_div(head_dim).unwrap_or(0);
        Attention { heads, head_dim, norm }
    };
    let time_mix = match o.text("resnet_time_scale_shift")?.unwrap_or("default") {
        "default" => TimeMix::Add,
        "scale_shift" => TimeMix::ScaleShift,
        _ => return Err(o.unsupported("resnet_time_scale_shift", "\"default\", \"scale_shift\"")),
    };
    let resample = |key: &str| match o.text(key)?.unwrap_or("conv") {
        "conv" => Ok(Resample::Conv),
        "resnet" => Ok(Resample::Resnet),
        _ => Err(o.unsupported(key, "\"conv\", \"resnet\"")),
    };
    let (down_type, up_type) = (resample("downsample_type")?, resample("upsample_type")?);
    let down_pad = match o.u32("downsample_padding")?.unwrap_or(1) {
        0 => DownPad::End,
        1 => DownPad::Symmetric,
        _ => return Err(o.unsupported("downsample_padding", "0, 1")),
    };
    let blocks = |key: &str, default: [&str; 4]| -> Result<Vec<String>, ConfigError> {
        let types = o.texts(key)?.unwrap_or_else(|| default.map(str::to_owned).to_vec());
        if types.len() == channels.len() {
            Ok(types)
        } else {
            Err(o.unsupported(
                key,
                format!("one entry for each of the {} block_out_channels", channels.len()),
            ))
        }
    };
    // diffusers' defaults.
    let attn_down = ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"];
    let attn_up = ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"];
    let mut down = Vec::new();
    for (i, name) in blocks("down_block_types", attn_down)?.iter().enumerate() {
        let (with_attention, how) = match name.strip_prefix("UNetRes").unwrap_or(name) {
            "DownBlock2D" => (false, Resample::Conv),
            "AttnDownBlock2D" => (true, down_type),
            "ResnetDownsampleBlock2D" => (false, Resample::Resnet),
            _ => {
                let known = "\"DownBlock2D\", \"AttnDownBlock2D\", \"ResnetDownsampleBlock2D\"";
                return Err(o.unsupported("down_block_types", known));
            }
        };
        down.push(Level {
            channels: channels[i],
            layers,
            attention: with_attention.then(|| attention(channels[i], Some(norm))),
            resample: (i + 1 < channels.len()).then_some(how),
        });
    }
    let mut up = Vec::new();
    for (i, name) in blocks("up_block_types", attn_up)?.iter().enumerate() {
        let (with_attention, how) = match name.strip_prefix("UNetRes").unwrap_or(name) {
            "UpBlock2D" => (false, Resample::Conv),
            "AttnUpBlock2D" => (true, up_type),
            "ResnetUpsampleBlock2D" => (false, Resample::Resnet),
            _ => {
                let known = "\"UpBlock2D\", \"AttnUpBlock2D\", \"ResnetUpsampleBlock2D\"";
                return Err(o.unsupported("up_block_types", known));
            }
        };
        let channels_here = channels[channels.len() - 1 - i];
        up.push(Level {
            channels: channels_here,
            layers: layers.saturating_add(1),
            attention: with_attention.then(|| attention(channels_here, Some(norm))),
            resample: (i + 1 < channels.len()).then_some(how),
        });
    }
    let with_middle = match o.text("mid_block_type")? {
        Some("UNetMidBlock2D") => true,
        None => !o.has("mid_block_type"),
        Some(_) => return Err(o.unsupported("mid_block_type", "\"UNetMidBlock2D\", null")),
    };
    let attn_groups = o.u32("attn_norm_num_groups")?;
    let add_attention = o.bool("add_attention")?.unwrap_or(true);
    let divisor = o.f64("mid_block_scale_factor")?.unwrap_or(1.0) as f32;
    // The middle attention has its own rule: no norm under scale_shift unless it is asked for.
    let middle_norm = match (attn_groups, time_mix) {
        (Some(groups), _) => Some(Norm { groups, eps: norm.eps }),
        (None, TimeMix::Add) => Some(norm),
        (None, TimeMix::ScaleShift) => None,
    };
    let arch = UnetArch {
        in_channels: o.u32("in_channels")?.unwrap_or(3),
        out_channels: o.u32("out_channels")?.unwrap_or(3),
        center_input: o.bool("center_input_sample")?.unwrap_or(false),
        time: TimestepProjection {
            dim: first,
            flip_sin_to_cos: o.bool("flip_sin_to_cos")?.unwrap_or(true),
            freq_shift: o.f64("freq_shift")?.unwrap_or(0.0) as f32,
        },
        // Zero means unset, as Python's `or` has it.
        time_embed_dim: o
            .u32("time_embedding_dim")?
            .filter(|&d| d > 0)
            .unwrap_or(first.saturating_mul(4)),
        norm,
        time_mix,
        down_pad,
        down,
        middle: with_middle.then(|| Middle {
            attention: add_attention.then(|| attention(last, middle_norm)),
            divisor,
        }),
        up,
    };
    o.finish(&HARMLESS)?;
    Ok(arch)
}

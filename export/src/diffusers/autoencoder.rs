//! `vqvae/config.json` of a `VQModel`, `vae/config.json` of an `AutoencoderKL`.

use super::options::{ConfigError, Options};
use crate::arch::{Attention, AutoencoderArch, Bottleneck, Level, Norm, Resample};
use serde_json::json;
use std::path::Path;

const HARMLESS: [&str; 4] = ["sample_size", "force_upcast", "dropout", "torch_dtype"];

/// An autoencoder and how its latents are scaled.
#[derive(Clone, Debug, PartialEq)]
pub struct AutoencoderConfig {
    /// The network.
    pub arch: AutoencoderArch,
    /// `scaling_factor`.
    pub scale: f32,
    /// `shift_factor`.
    pub shift: f32,
}

/// Reads the description of an autoencoder.
///
/// # Errors
/// [`ConfigError`] naming the file, the key and what would be supported.
pub fn read_autoencoder(path: &Path) -> Result<AutoencoderConfig, ConfigError> {
    let o = Options::read(path)?;
    let vq = match o.required("_class_name", o.text("_class_name")?)? {
        "VQModel" => true,
        "AutoencoderKL" => false,
        _ => return Err(o.unsupported("_class_name", "\"VQModel\", \"AutoencoderKL\"")),
    };
    super::activation(&o)?;
    o.only("norm_type", &[json!("group")])?;
    o.only("latents_mean", &[])?;
    o.only("latents_std", &[])?;
    // Written by hand in some configs; the classes imply it.
    o.only("double_z", &[json!(!vq)])?;
    let channels = o.u32s("block_out_channels")?.unwrap_or_else(|| vec![64]);
    if channels.is_empty() {
        return Err(o.unsupported("block_out_channels", "at least one level"));
    }
    let layers = o.u32("layers_per_block")?.unwrap_or(1);
    // Autoencoders have this eps whatever their config says.
    let norm = Norm { groups: o.u32("norm_num_groups")?.unwrap_or(32), eps: 1e-6 };
    let level = |i: usize, channels_here: u32, layers: u32, attention: bool| Level {
        channels: channels_here,
        layers,
        attention: attention.then_some(Attention {
            heads: 1,
            head_dim: channels_here,
            norm: Some(norm),
        }),
        resample: (i + 1 < channels.len()).then_some(Resample::Conv),
    };
    let blocks = |key: &str, plain: &str, attn: &str| -> Result<Vec<bool>, ConfigError> {
        let types = o.texts(key)?.unwrap_or_else(|| vec![plain.to_owned()]);
        if types.len() != channels.len() {
            return Err(o.unsupported(
                key,
                format!("one entry for each of the {} block_out_channels", channels.len()),
            ));
        }
        types
            .iter()
            .map(|t| match t.strip_prefix("UNetRes").unwrap_or(t) {
                t if t == plain => Ok(false),
                t if t == attn => Ok(true),
                _ => Err(o.unsupported(key, format!("\"{plain}\", \"{attn}\""))),
            })
            .collect()
    };
    let down = blocks("down_block_types", "DownEncoderBlock2D", "AttnDownEncoderBlock2D")?;
    let up = blocks("up_block_types", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")?;
    let latent_channels = o.u32("latent_channels")?.unwrap_or(if vq { 3 } else { 4 });
    let bottleneck = if vq {
        // Decoding latents looks them up whatever this says; it is about decoding indices.
        o.bool("lookup_from_codebook")?;
        Bottleneck::Vq {
            entries: o.u32("num_vq_embeddings")?.unwrap_or(256),
            dim: o.u32("vq_embed_dim")?.unwrap_or(latent_channels),
        }
    } else {
        Bottleneck::Kl {
            quant_conv: o.bool("use_quant_conv")?.unwrap_or(true),
            post_quant_conv: o.bool("use_post_quant_conv")?.unwrap_or(true),
        }
    };
    let scale = o.f64("scaling_factor")?.unwrap_or(0.18215) as f32;
    if !(scale.is_finite() && scale > 0.0) {
        return Err(o.unsupported("scaling_factor", "a number above zero"));
    }
    let shift = o.f64("shift_factor")?.unwrap_or(0.0) as f32;
    let arch = AutoencoderArch {
        in_channels: o.u32("in_channels")?.unwrap_or(3),
        out_channels: o.u32("out_channels")?.unwrap_or(3),
        latent_channels,
        bottleneck,
        norm,
        down: down.iter().enumerate().map(|(i, &a)| level(i, channels[i], layers, a)).collect(),
        up: up
            .iter()
            .enumerate()
            .map(|(i, &a)| level(i, channels[channels.len() - 1 - i], layers.saturating_add(1), a))
            .collect(),
        middle_attention: o.bool("mid_block_add_attention")?.unwrap_or(true),
    };
    o.finish(&HARMLESS)?;
    Ok(AutoencoderConfig { arch, scale, shift })
}

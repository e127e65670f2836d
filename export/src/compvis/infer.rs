//! The networks' descriptions from tensor names and shapes.

use super::hints::{Heads, Hints};
use super::{UNET, published};
use crate::ExportError;
use crate::arch::{
    Attention, AutoencoderArch, Bottleneck, DownPad, Level, Middle, Norm, Resample, TimeMix,
    UnetArch,
};
use crate::source::WeightSource;
use latile_runtime::format::TimestepProjection;

/// Blocks beyond this are not looked for.
const MAX_BLOCKS: usize = 512;

/// Looks tensors up by name under one prefix.
struct Under<'a> {
    source: &'a dyn WeightSource,
    prefix: &'a str,
    component: &'static str,
}

impl Under<'_> {
    fn fail<T>(&self, why: impl Into<String>) -> Result<T, ExportError> {
        let why = format!("{}: {}", self.component, why.into());
        Err(ExportError::Layout { path: self.source.path().to_owned(), why })
    }

    fn has(&self, name: &str) -> bool {
        self.source.info(&format!("{}{name}", self.prefix)).is_some()
    }

    /// Axis `axis` of a tensor, which must have at least `axes` of them.
    fn dim(&self, name: &str, axes: usize, axis: usize) -> Result<u32, ExportError> {
        let full = format!("{}{name}", self.prefix);
        let Some(info) = self.source.info(&full) else {
            return Err(ExportError::MissingTensor {
                path: self.source.path().to_owned(),
                name: full,
                wanted_for: format!("the {}", self.component),
                shape: vec![0; axes],
            });
        };
        match info.shape.get(axis).map(|&d| u32::try_from(d)) {
            Some(Ok(d)) if info.shape.len() >= axes => Ok(d),
            _ => self.fail(format!("{full} has shape {:?}, expected {axes} axes", info.shape)),
        }
    }

    /// Whether attention stands in all of `names` or none; a mixture is refused.
    fn all_or_none(&self, names: &[String]) -> Result<bool, ExportError> {
        let count = names.iter().filter(|n| self.has(n)).count();
        if count != 0 && count != names.len() {
            return self
                .fail(format!("attention in some blocks of a level only ({})", names.join(", ")));
        }
        Ok(count > 0)
    }
}

pub(super) fn unet(
    source: &dyn WeightSource,
    hints: &Hints,
    notes: &mut Vec<String>,
) -> Result<UnetArch, ExportError> {
    let u = Under { source, prefix: UNET, component: "U-Net" };
    for (name, what) in [
        ("label_emb.weight", "class conditioning by an embedding table"),
        ("label_emb.0.0.weight", "conditioning by a vector"),
    ] {
        if u.has(name) {
            return u.fail(format!("it has {what} ({UNET}{name}), which is not supported"));
        }
    }
    if let Some(n) = source.names().iter().find(|n| {
        n.starts_with(UNET) && (n.contains(".transformer_blocks.") || n.contains(".proj_in."))
    }) {
        return u.fail(format!(
            "it has cross-attention ({n}), which is not supported; U-Nets conditioned by concatenation are"
        ));
    }
    let in_channels = u.dim("input_blocks.0.0.weight", 4, 1)?;
    let model_channels = u.dim("input_blocks.0.0.weight", 4, 0)?;
    let out_channels = u.dim("out.2.weight", 4, 0)?;
    let time_embed_dim = u.dim("time_embed.0.weight", 2, 0)?;
    let time_dim = u.dim("time_embed.0.weight", 2, 1)?;

    // Output blocks tell the levels: the last block of each but the final level ends in an upsampler.
    let residual = |name: &str| format!("{name}.in_layers.2.weight");
    let blocks =
        (0..MAX_BLOCKS).take_while(|i| u.has(&residual(&format!("output_blocks.{i}.0")))).count();
    let upsampler = |block: usize| {
        [1, 2].iter().find_map(|m| {
            let name = format!("output_blocks.{block}.{m}");
            if u.has(&format!("{name}.conv.weight")) {
                Some(Resample::Conv)
            } else if u.has(&residual(&name)) {
                Some(Resample::Resnet)
            } else {
                None
            }
        })
    };
    let ends: Vec<usize> = (0..blocks).filter(|&b| upsampler(b).is_some()).collect();
    let per_level = ends.first().map_or(blocks, |&b| b + 1);
    let regular = per_level >= 2
        && blocks.is_multiple_of(per_level)
        && ends.len() == blocks / per_level - 1
        && ends.iter().enumerate().all(|(i, &b)| b + 1 == (i + 1) * per_level);
    if !regular {
        return u
            .fail(format!("{blocks} output blocks with upsamplers in {ends:?} are not a U-Net's"));
    }
    let levels = blocks / per_level;
    let layers = (per_level - 1) as u32;
    let mix = |name: &str, n: u32| -> Result<TimeMix, ExportError> {
        let rows = u.dim(&format!("{name}.emb_layers.1.weight"), 2, 0)?;
        if rows == n {
            Ok(TimeMix::Add)
        } else if u64::from(rows) == 2 * u64::from(n) {
            Ok(TimeMix::ScaleShift)
        } else {
            u.fail(format!("{name}.emb_layers.1 has {rows} rows for {n} channels"))
        }
    };
    let time_mix = mix("input_blocks.1.0", u.dim(&residual("input_blocks.1.0"), 4, 0)?)?;
    let norm = Norm { groups: hints.norm_groups.unwrap_or(32), eps: 1e-5 };
    let bottom = u.dim(&residual("middle_block.0"), 4, 0)?;
    let heads = match hints.heads {
        Some(heads) => heads,
        None => match published::find((in_channels, model_channels, bottom)) {
            Some(p) => {
                notes.push(format!(
                    "attention heads are not recorded in the checkpoint; those of {} are used",
                    p.name
                ));
                p.heads
            }
            None => {
                notes.push(
                    "attention heads are not recorded in the checkpoint; heads of 32 channels are assumed; \
                     a config beside it (num_head_channels, num_heads) decides"
                        .to_owned(),
                );
                Heads::Width(32)
            }
        },
    };
    let attention = |place: &str, channels: u32| -> Result<Attention, ExportError> {
        let rows = u.dim(&format!("{place}.qkv.weight"), 2, 0)?;
        if u64::from(rows) != 3 * u64::from(channels) {
            return u.fail(format!("{place}.qkv has {rows} rows for {channels} channels"));
        }
        let (heads, head_dim) = match heads {
            Heads::Width(w) => (channels.checked_div(w).unwrap_or(0), w),
            Heads::Count(c) => (c, channels.checked_div(c).unwrap_or(0)),
        };
        if heads == 0 || head_dim == 0 || heads.checked_mul(head_dim) != Some(channels) {
            return u.fail(format!(
                "{place}: {channels} channels do not divide into heads of {heads:?} times {head_dim}; \
                 put the model's config (num_head_channels or num_heads) beside the checkpoint"
            ));
        }
        Ok(Attention { heads, head_dim, norm: Some(norm) })
    };

    let mut down = Vec::new();
    for level in 0..levels {
        let first = 1 + level * per_level;
        let range: Vec<usize> = (first..first + layers as usize).collect();
        let channels = u.dim(&residual(&format!("input_blocks.{first}.0")), 4, 0)?;
        let qkv: Vec<String> =
            range.iter().map(|b| format!("input_blocks.{b}.1.qkv.weight")).collect();
        let with = u.all_or_none(&qkv)?;
        let resampler = format!("input_blocks.{}.0", first + layers as usize);
        let resample = if level + 1 == levels {
            None
        } else if u.has(&format!("{resampler}.op.weight")) {
            Some(Resample::Conv)
        } else if u.has(&residual(&resampler)) {
            Some(Resample::Resnet)
        } else {
            return u.fail(format!("{UNET}{resampler} is not a downsampler"));
        };
        down.push(Level {
            channels,
            layers,
            attention: with
                .then(|| attention(&format!("input_blocks.{first}.1"), channels))
                .transpose()?,
            resample,
        });
    }
    let mut up = Vec::new();
    for level in 0..levels {
        let first = level * per_level;
        let channels = u.dim(&residual(&format!("output_blocks.{first}.0")), 4, 0)?;
        let qkv: Vec<String> =
            (first..first + per_level).map(|b| format!("output_blocks.{b}.1.qkv.weight")).collect();
        let with = u.all_or_none(&qkv)?;
        up.push(Level {
            channels,
            layers: layers + 1,
            attention: with
                .then(|| attention(&format!("output_blocks.{first}.1"), channels))
                .transpose()?,
            resample: upsampler(first + per_level - 1),
        });
    }
    let middle = u.has("middle_block.1.qkv.weight");
    let middle = middle.then(|| attention("middle_block.1", bottom)).transpose()?;
    let arch = UnetArch {
        in_channels,
        out_channels,
        center_input: false,
        time: TimestepProjection { dim: time_dim, flip_sin_to_cos: true, freq_shift: 0.0 },
        time_embed_dim,
        norm,
        time_mix,
        down_pad: DownPad::Symmetric,
        down,
        middle: Some(Middle { attention: middle, divisor: 1.0 }),
        up,
    };
    arch.check().map_err(|error| ExportError::Arch { path: source.path().to_owned(), error })?;
    Ok(arch)
}

pub(super) fn autoencoder(
    source: &dyn WeightSource,
    prefix: &str,
    hints: &Hints,
) -> Result<AutoencoderArch, ExportError> {
    let a = Under { source, prefix, component: "autoencoder" };
    let norm = Norm { groups: hints.norm_groups.unwrap_or(32), eps: 1e-6 };
    let levels = |half: &str, resampler: &str| -> Result<Vec<Level>, ExportError> {
        let block = |i: usize, j: usize| format!("{half}.{i}.block.{j}.conv1.weight");
        let count = (0..MAX_BLOCKS).take_while(|&i| a.has(&block(i, 0))).count();
        let mut out = Vec::new();
        for i in 0..count {
            let layers = (0..MAX_BLOCKS).take_while(|&j| a.has(&block(i, j))).count();
            let channels = a.dim(&block(i, 0), 4, 0)?;
            let q: Vec<String> =
                (0..layers).map(|j| format!("{half}.{i}.attn.{j}.q.weight")).collect();
            let attention = a.all_or_none(&q)?.then_some(Attention {
                heads: 1,
                head_dim: channels,
                norm: Some(norm),
            });
            let resample =
                a.has(&format!("{half}.{i}.{resampler}.conv.weight")).then_some(Resample::Conv);
            out.push(Level { channels, layers: layers as u32, attention, resample });
        }
        Ok(out)
    };
    let down = levels("encoder.down", "downsample")?;
    let mut up = levels("decoder.up", "upsample")?;
    up.reverse();
    let latent_channels = a.dim("decoder.conv_in.weight", 4, 1)?;
    let encoded = a.dim("encoder.conv_out.weight", 4, 0)?;
    let bottleneck = if a.has("quantize.embedding.weight") {
        if encoded != latent_channels {
            return a.fail(format!(
                "the encoder gives {encoded} channels, the decoder takes {latent_channels}"
            ));
        }
        Bottleneck::Vq {
            entries: a.dim("quantize.embedding.weight", 2, 0)?,
            dim: a.dim("quantize.embedding.weight", 2, 1)?,
        }
    } else if source.names().iter().any(|n| n.starts_with(&format!("{prefix}quantize."))) {
        return a.fail("its quantizer is not a plain codebook (quantize.embedding.weight), which is all that is supported");
    } else {
        if u64::from(encoded) != 2 * u64::from(latent_channels) {
            return a.fail(format!(
                "the encoder gives {encoded} channels, expected twice the latent's {latent_channels}"
            ));
        }
        let (quant_conv, post_quant_conv) =
            (a.has("quant_conv.weight"), a.has("post_quant_conv.weight"));
        if post_quant_conv && a.dim("post_quant_conv.weight", 4, 1)? != latent_channels {
            return a.fail(
                "an embedding width other than the latent's channels is not supported for KL",
            );
        }
        Bottleneck::Kl { quant_conv, post_quant_conv }
    };
    let arch = AutoencoderArch {
        in_channels: a.dim("encoder.conv_in.weight", 4, 1)?,
        out_channels: a.dim("decoder.conv_out.weight", 4, 0)?,
        latent_channels,
        bottleneck,
        norm,
        down,
        up,
        middle_attention: a.all_or_none(&[
            "encoder.mid.attn_1.q.weight".into(),
            "decoder.mid.attn_1.q.weight".into(),
        ])?,
    };
    arch.check().map_err(|error| ExportError::Arch { path: source.path().to_owned(), error })?;
    Ok(arch)
}

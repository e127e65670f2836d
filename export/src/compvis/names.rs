//! CompVis' names of the graph's weights.

use super::{NameMap, UNET};
use crate::arch::{Attention, AutoencoderArch, Bottleneck, Level, Resample, UnetArch};
use crate::source::WeightSource;
use crate::tensors::Part;

/// Collects pairs of diffusers' and CompVis' names.
struct Pairs {
    map: NameMap,
}

impl Pairs {
    /// A layer's weight and bias.
    fn layer(&mut self, ours: &str, theirs: &str) {
        self.part(ours, theirs, &Part::Whole);
    }

    fn part(&mut self, ours: &str, theirs: &str, part: &Part) {
        for kind in ["weight", "bias"] {
            self.map.insert(format!("{ours}.{kind}"), (format!("{theirs}.{kind}"), part.clone()));
        }
    }

    fn layers(&mut self, ours: &str, theirs: &str, pairs: &[(&str, &str)]) {
        for (a, b) in pairs {
            self.layer(&format!("{ours}.{a}"), &format!("{theirs}.{b}"));
        }
    }
}

/// Names of the U-Net's weights.
pub(super) fn unet(arch: &UnetArch) -> NameMap {
    let mut p = Pairs { map: NameMap::new() };
    let residual = |p: &mut Pairs, ours: &str, theirs: &str| {
        p.layers(
            ours,
            &format!("{UNET}{theirs}"),
            &[
                ("norm1", "in_layers.0"),
                ("conv1", "in_layers.2"),
                ("time_emb_proj", "emb_layers.1"),
                ("norm2", "out_layers.0"),
                ("conv2", "out_layers.3"),
                ("conv_shortcut", "skip_connection"),
            ],
        );
    };
    let attention = |p: &mut Pairs, ours: &str, theirs: &str, a: Attention| {
        let theirs = format!("{UNET}{theirs}");
        p.layers(ours, &theirs, &[("group_norm", "norm"), ("to_out.0", "proj_out")]);
        for (which, name) in ["to_q", "to_k", "to_v"].into_iter().enumerate() {
            let part = Part::Fused { which, heads: a.heads as usize };
            p.part(&format!("{ours}.{name}"), &format!("{theirs}.qkv"), &part);
        }
    };
    let top = |p: &mut Pairs, ours: &str, theirs: &str| p.layer(ours, &format!("{UNET}{theirs}"));
    top(&mut p, "time_embedding.linear_1", "time_embed.0");
    top(&mut p, "time_embedding.linear_2", "time_embed.2");
    top(&mut p, "conv_in", "input_blocks.0.0");
    top(&mut p, "conv_norm_out", "out.0");
    top(&mut p, "conv_out", "out.2");

    let mut block = 1;
    for (i, level) in arch.down.iter().enumerate() {
        for j in 0..level.layers {
            residual(
                &mut p,
                &format!("down_blocks.{i}.resnets.{j}"),
                &format!("input_blocks.{block}.0"),
            );
            if let Some(a) = level.attention {
                let ours = format!("down_blocks.{i}.attentions.{j}");
                attention(&mut p, &ours, &format!("input_blocks.{block}.1"), a);
            }
            block += 1;
        }
        let ours = format!("down_blocks.{i}.downsamplers.0");
        match level.resample {
            Some(Resample::Conv) => {
                top(&mut p, &format!("{ours}.conv"), &format!("input_blocks.{block}.0.op"));
            }
            Some(Resample::Resnet) => residual(&mut p, &ours, &format!("input_blocks.{block}.0")),
            None => continue,
        }
        block += 1;
    }
    residual(&mut p, "mid_block.resnets.0", "middle_block.0");
    if let Some(a) = arch.middle.and_then(|m| m.attention) {
        attention(&mut p, "mid_block.attentions.0", "middle_block.1", a);
    }
    residual(&mut p, "mid_block.resnets.1", "middle_block.2");
    let mut block = 0;
    for (i, level) in arch.up.iter().enumerate() {
        for j in 0..level.layers {
            residual(
                &mut p,
                &format!("up_blocks.{i}.resnets.{j}"),
                &format!("output_blocks.{block}.0"),
            );
            if let Some(a) = level.attention {
                let ours = format!("up_blocks.{i}.attentions.{j}");
                attention(&mut p, &ours, &format!("output_blocks.{block}.1"), a);
            }
            block += 1;
        }
        // The upsampler is the last module of the level's last block.
        let module = 1 + usize::from(level.attention.is_some());
        let theirs = format!("output_blocks.{}.{module}", block - 1);
        let ours = format!("up_blocks.{i}.upsamplers.0");
        match level.resample {
            Some(Resample::Conv) => top(&mut p, &format!("{ours}.conv"), &format!("{theirs}.conv")),
            Some(Resample::Resnet) => residual(&mut p, &ours, &theirs),
            None => {}
        }
    }
    p.map
}

/// Names of the autoencoder's weights under `prefix`.
pub(super) fn autoencoder(
    arch: &AutoencoderArch,
    prefix: &str,
    source: &dyn WeightSource,
) -> NameMap {
    let mut p = Pairs { map: NameMap::new() };
    let residual = |p: &mut Pairs, ours: &str, theirs: &str| {
        let theirs = format!("{prefix}{theirs}");
        // `use_conv_shortcut` gives the shortcut another name.
        let shortcut = format!("{theirs}.conv_shortcut.weight");
        let shortcut =
            if source.info(&shortcut).is_some() { "conv_shortcut" } else { "nin_shortcut" };
        p.layers(
            ours,
            &theirs,
            &[
                ("norm1", "norm1"),
                ("conv1", "conv1"),
                ("norm2", "norm2"),
                ("conv2", "conv2"),
                ("conv_shortcut", shortcut),
            ],
        );
    };
    let attention = |p: &mut Pairs, ours: &str, theirs: &str| {
        p.layers(
            ours,
            &format!("{prefix}{theirs}"),
            &[
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ],
        );
    };
    let top = |p: &mut Pairs, ours: &str, theirs: &str| p.layer(ours, &format!("{prefix}{theirs}"));
    let level = |p: &mut Pairs, ours: &str, theirs: &str, level: &Level| {
        for j in 0..level.layers {
            residual(p, &format!("{ours}.resnets.{j}"), &format!("{theirs}.block.{j}"));
            if level.attention.is_some() {
                attention(p, &format!("{ours}.attentions.{j}"), &format!("{theirs}.attn.{j}"));
            }
        }
    };
    for half in ["encoder", "decoder"] {
        top(&mut p, &format!("{half}.conv_in"), &format!("{half}.conv_in"));
        top(&mut p, &format!("{half}.conv_norm_out"), &format!("{half}.norm_out"));
        top(&mut p, &format!("{half}.conv_out"), &format!("{half}.conv_out"));
        residual(&mut p, &format!("{half}.mid_block.resnets.0"), &format!("{half}.mid.block_1"));
        residual(&mut p, &format!("{half}.mid_block.resnets.1"), &format!("{half}.mid.block_2"));
        if arch.middle_attention {
            attention(
                &mut p,
                &format!("{half}.mid_block.attentions.0"),
                &format!("{half}.mid.attn_1"),
            );
        }
    }
    for (i, l) in arch.down.iter().enumerate() {
        let (ours, theirs) = (format!("encoder.down_blocks.{i}"), format!("encoder.down.{i}"));
        level(&mut p, &ours, &theirs, l);
        if l.resample.is_some() {
            top(
                &mut p,
                &format!("{ours}.downsamplers.0.conv"),
                &format!("{theirs}.downsample.conv"),
            );
        }
    }
    for (i, l) in arch.up.iter().enumerate() {
        // CompVis numbers decoder levels by resolution, diffusers in execution order.
        let ours = format!("decoder.up_blocks.{i}");
        let theirs = format!("decoder.up.{}", arch.up.len() - 1 - i);
        level(&mut p, &ours, &theirs, l);
        if l.resample.is_some() {
            top(&mut p, &format!("{ours}.upsamplers.0.conv"), &format!("{theirs}.upsample.conv"));
        }
    }
    top(&mut p, "quant_conv", "quant_conv");
    top(&mut p, "post_quant_conv", "post_quant_conv");
    if let Bottleneck::Vq { .. } = arch.bottleneck {
        top(&mut p, "quantize.embedding", "quantize.embedding");
    }
    p.map
}

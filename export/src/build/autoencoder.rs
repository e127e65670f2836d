//! The autoencoder's halves.

use super::Builder;
use super::blocks::Residual;
use crate::arch::{Attention, AutoencoderArch, Bottleneck, DownPad, Level};
use latile_runtime::graph::{Graph, ValueId, ValueKind};
use latile_runtime::tensor::DType;

fn level(b: &mut Builder, block: &str, mut x: ValueId, level: &Level, r: Residual) -> ValueId {
    for j in 0..level.layers {
        x = b.residual(&format!("{block}.resnets.{j}"), x, level.channels, r);
        if let Some(a) = level.attention {
            x = b.attention(&format!("{block}.attentions.{j}"), x, a, 1.0);
        }
    }
    x
}

fn middle(b: &mut Builder, half: &str, x: ValueId, arch: &AutoencoderArch, r: Residual) -> ValueId {
    let n = b.channels(x);
    let mut x = b.residual(&format!("{half}.mid_block.resnets.0"), x, n, r);
    if arch.middle_attention {
        let a = Attention { heads: 1, head_dim: n, norm: Some(arch.norm) };
        x = b.attention(&format!("{half}.mid_block.attentions.0"), x, a, 1.0);
    }
    b.residual(&format!("{half}.mid_block.resnets.1"), x, n, r)
}

fn head(b: &mut Builder, half: &str, x: ValueId, arch: &AutoencoderArch, n: u32) -> ValueId {
    let x = b.norm(&format!("{half}.conv_norm_out"), x, arch.norm);
    let x = b.silu(&format!("{half}.conv_act"), x);
    b.conv3(&format!("{half}.conv_out"), x, n)
}

fn plain(arch: &AutoencoderArch) -> Residual {
    Residual { norm: arch.norm, time: None, resize: None, divisor: 1.0 }
}

/// The encoder: input `sample`, a picture in [-1, 1]; output `latents` before quantisation (VQ), or `moments`,
/// means then log-variances (KL).
///
/// The description must have passed [`AutoencoderArch::check`].
#[must_use]
pub fn encoder(arch: &AutoencoderArch, packed: DType) -> Graph {
    let mut b = Builder::new(packed);
    let r = plain(arch);
    let x = b.input("sample", ValueKind::Map(arch.in_channels));
    let mut x = b.conv3("encoder.conv_in", x, arch.down[0].channels);
    for (i, l) in arch.down.iter().enumerate() {
        let block = format!("encoder.down_blocks.{i}");
        x = level(&mut b, &block, x, l, r);
        if l.resample.is_some() {
            x = b.downsample(&format!("{block}.downsamplers.0"), x, DownPad::End);
        }
    }
    x = middle(&mut b, "encoder", x, arch, r);
    match arch.bottleneck {
        Bottleneck::Vq { dim, .. } => {
            let x = head(&mut b, "encoder", x, arch, arch.latent_channels);
            let x = b.conv1("quant_conv", x, dim);
            b.finish("latents", x)
        }
        Bottleneck::Kl { quant_conv, .. } => {
            let n = 2 * arch.latent_channels;
            let mut x = head(&mut b, "encoder", x, arch, n);
            if quant_conv {
                x = b.conv1("quant_conv", x, n);
            }
            b.finish("moments", x)
        }
    }
}

/// The decoder: input `latents`, for VQ anything near the codebook, looked up first; output `sample`.
///
/// The description must have passed [`AutoencoderArch::check`].
#[must_use]
pub fn decoder(arch: &AutoencoderArch, packed: DType) -> Graph {
    let mut b = Builder::new(packed);
    let r = plain(arch);
    let mut x = b.input("latents", ValueKind::Map(arch.latent_dim()));
    let post_quant_conv = match arch.bottleneck {
        Bottleneck::Vq { entries, .. } => {
            x = b.codebook("quantize.embedding", x, entries);
            true
        }
        Bottleneck::Kl { post_quant_conv, .. } => post_quant_conv,
    };
    if post_quant_conv {
        x = b.conv1("post_quant_conv", x, arch.latent_channels);
    }
    x = b.conv3("decoder.conv_in", x, arch.up[0].channels);
    x = middle(&mut b, "decoder", x, arch, r);
    for (i, l) in arch.up.iter().enumerate() {
        let block = format!("decoder.up_blocks.{i}");
        x = level(&mut b, &block, x, l, r);
        if l.resample.is_some() {
            x = b.upsample(&format!("{block}.upsamplers.0"), x);
        }
    }
    let x = head(&mut b, "decoder", x, arch, arch.out_channels);
    b.finish("sample", x)
}

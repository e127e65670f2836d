//! The U-Net.

use super::Builder;
use super::blocks::{Residual, Resize};
use crate::arch::{Resample, UnetArch};
use latile_runtime::graph::{Graph, Op, ValueKind};
use latile_runtime::tensor::DType;

/// The graph of a U-Net: inputs `sample` and `time_proj`, output `sample`. Weights of convolutions and linear
/// layers are stored as `packed`.
///
/// The description must have passed [`UnetArch::check`].
#[must_use]
pub fn unet(arch: &UnetArch, packed: DType) -> Graph {
    let mut b = Builder::new(packed);
    let sample = b.input("sample", ValueKind::Map(arch.in_channels));
    let time = b.input("time_proj", ValueKind::Vector(arch.time.dim));
    let h = b.linear("time_embedding.linear_1", time, arch.time_embed_dim);
    let h = b.silu("time_embedding.act", h);
    let h = b.linear("time_embedding.linear_2", h, arch.time_embed_dim);
    // Every block activates the embedding before its own projection: once is enough.
    let time = b.silu("time_embedding.silu", h);
    let plain =
        Residual { norm: arch.norm, time: Some((time, arch.time_mix)), resize: None, divisor: 1.0 };

    let x = if arch.center_input {
        let op = Op::Affine { mul: 2.0, add: -1.0 };
        b.node("center_input_sample", op, &[sample], ValueKind::Map(arch.in_channels))
    } else {
        sample
    };
    let mut x = b.conv3("conv_in", x, arch.down[0].channels);
    let mut skips = vec![x];
    for (i, level) in arch.down.iter().enumerate() {
        let block = format!("down_blocks.{i}");
        for j in 0..level.layers {
            x = b.residual(&format!("{block}.resnets.{j}"), x, level.channels, plain);
            if let Some(a) = level.attention {
                x = b.attention(&format!("{block}.attentions.{j}"), x, a, 1.0);
            }
            skips.push(x);
        }
        let name = format!("{block}.downsamplers.0");
        match level.resample {
            Some(Resample::Conv) => x = b.downsample(&name, x, arch.down_pad),
            Some(Resample::Resnet) => {
                let r = Residual { resize: Some(Resize::Down), ..plain };
                x = b.residual(&name, x, level.channels, r);
            }
            None => continue,
        }
        skips.push(x);
    }
    if let Some(middle) = arch.middle {
        let r = Residual { divisor: middle.divisor, ..plain };
        let n = b.channels(x);
        x = b.residual("mid_block.resnets.0", x, n, r);
        if let Some(a) = middle.attention {
            x = b.attention("mid_block.attentions.0", x, a, middle.divisor);
        }
        x = b.residual("mid_block.resnets.1", x, n, r);
    }
    for (i, level) in arch.up.iter().enumerate() {
        let block = format!("up_blocks.{i}");
        for j in 0..level.layers {
            let name = format!("{block}.resnets.{j}");
            if let Some(skip) = skips.pop() {
                let kind = ValueKind::Map(b.channels(x) + b.channels(skip));
                x = b.node(&format!("{name}.concat"), Op::Concat, &[x, skip], kind);
            }
            x = b.residual(&name, x, level.channels, plain);
            if let Some(a) = level.attention {
                x = b.attention(&format!("{block}.attentions.{j}"), x, a, 1.0);
            }
        }
        let name = format!("{block}.upsamplers.0");
        match level.resample {
            Some(Resample::Conv) => x = b.upsample(&name, x),
            Some(Resample::Resnet) => {
                let r = Residual { resize: Some(Resize::Up), ..plain };
                x = b.residual(&name, x, level.channels, r);
            }
            None => {}
        }
    }
    let x = b.norm("conv_norm_out", x, arch.norm);
    let x = b.silu("conv_act", x);
    let x = b.conv3("conv_out", x, arch.out_channels);
    b.finish("sample", x)
}

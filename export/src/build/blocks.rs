//! The blocks that U-Nets and autoencoders share.

use super::Builder;
use crate::arch::{Attention, DownPad, Norm, TimeMix};
use latile_runtime::graph::{Op, Pad, ValueId, ValueKind};

/// What a residual block does beside its two convolutions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Residual {
    pub(super) norm: Norm,
    /// The activated time embedding and how it is used.
    pub(super) time: Option<(ValueId, TimeMix)>,
    pub(super) resize: Option<Resize>,
    pub(super) divisor: f32,
}

/// A change of size inside a residual block.
#[derive(Clone, Copy, Debug)]
pub(super) enum Resize {
    Up,
    Down,
}

impl Builder {
    /// norm, SiLU, (resize,) conv, time embedding, norm, SiLU, conv, and the sum with the (resized, projected)
    /// input (He et al. 2016, pre-activation; diffusers' `ResnetBlock2D`).
    pub(super) fn residual(&mut self, name: &str, x: ValueId, n: u32, r: Residual) -> ValueId {
        let h = self.norm(&format!("{name}.norm1"), x, r.norm);
        let mut h = self.silu(&format!("{name}.norm1.silu"), h);
        let mut skip = x;
        if let Some(resize) = r.resize {
            h = self.resize(&format!("{name}.resize"), h, resize);
            skip = self.resize(&format!("{name}.shortcut.resize"), skip, resize);
        }
        let mut h = self.conv3(&format!("{name}.conv1"), h, n);
        // The shortcut comes early, so that the block's input can be forgotten.
        if self.channels(skip) != n {
            skip = self.conv1(&format!("{name}.conv_shortcut"), skip, n);
        }
        let projection = format!("{name}.time_emb_proj");
        match r.time {
            Some((embedding, TimeMix::Add)) => {
                let v = self.linear(&projection, embedding, n);
                h = self.node(
                    &format!("{projection}.add"),
                    Op::AddChannel,
                    &[h, v],
                    ValueKind::Map(n),
                );
                h = self.norm(&format!("{name}.norm2"), h, r.norm);
            }
            Some((embedding, TimeMix::ScaleShift)) => {
                let v = self.linear(&projection, embedding, 2 * n);
                h = self.norm(&format!("{name}.norm2"), h, r.norm);
                let op = Op::ScaleShift;
                h = self.node(&format!("{projection}.scale_shift"), op, &[h, v], ValueKind::Map(n));
            }
            None => h = self.norm(&format!("{name}.norm2"), h, r.norm),
        }
        let h = self.silu(&format!("{name}.norm2.silu"), h);
        let h = self.conv3(&format!("{name}.conv2"), h, n);
        let sum = self.add(&format!("{name}.add"), skip, h);
        self.divide(&format!("{name}.divide"), sum, r.divisor)
    }

    fn resize(&mut self, name: &str, x: ValueId, resize: Resize) -> ValueId {
        let op = match resize {
            Resize::Up => Op::Upsample2x,
            Resize::Down => Op::AvgPool2x,
        };
        self.node(name, op, &[x], self.kind(x))
    }

    /// norm, projections, softmax(q · kᵀ / √d) · v, projection, and the sum with the input (diffusers'
    /// `Attention` with `residual_connection`).
    pub(super) fn attention(
        &mut self,
        name: &str,
        x: ValueId,
        a: Attention,
        divisor: f32,
    ) -> ValueId {
        let c = self.channels(x);
        let inner = a.heads * a.head_dim;
        let h = match a.norm {
            Some(norm) => self.norm(&format!("{name}.group_norm"), x, norm),
            None => x,
        };
        let q = self.linear(&format!("{name}.to_q"), h, inner);
        let k = self.linear(&format!("{name}.to_k"), h, inner);
        let v = self.linear(&format!("{name}.to_v"), h, inner);
        let scale = 1.0 / (a.head_dim as f32).sqrt();
        let op = Op::Attention { heads: a.heads, scale, int8: false };
        let h = self.node(name, op, &[q, k, v], ValueKind::Map(inner));
        let h = self.linear(&format!("{name}.to_out.0"), h, c);
        let sum = self.add(&format!("{name}.add"), x, h);
        self.divide(&format!("{name}.divide"), sum, divisor)
    }

    /// Half the size by a 3 × 3 convolution of stride 2.
    pub(super) fn downsample(&mut self, name: &str, x: ValueId, pad: DownPad) -> ValueId {
        let pad = match pad {
            DownPad::Symmetric => Pad::all(1),
            DownPad::End => Pad { top: 0, left: 0, bottom: 1, right: 1 },
        };
        self.conv(&format!("{name}.conv"), x, self.channels(x), 3, 2, pad)
    }

    /// Twice the size, nearest neighbour, then a 3 × 3 convolution.
    pub(super) fn upsample(&mut self, name: &str, x: ValueId) -> ValueId {
        let up = self.node(name, Op::Upsample2x, &[x], self.kind(x));
        self.conv3(&format!("{name}.conv"), up, self.channels(x))
    }
}

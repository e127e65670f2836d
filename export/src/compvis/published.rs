//! The published models without cross-attention, for what their checkpoints may not tell.
//! Source: the `configs/` and `models/` folders of <https://github.com/CompVis/latent-diffusion>.

use super::Heads;

/// A published U-Net: recognised by its channels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Published {
    /// What it is called.
    pub(super) name: &'static str,
    /// Input channels, channels of the first and of the last level.
    channels: (u32, u32, u32),
    /// Heads of its attention.
    pub(super) heads: Heads,
    /// `linear_start` and `linear_end`.
    pub(super) betas: (f64, f64),
}

const PUBLISHED: [Published; 5] = [
    Published {
        name: "ldm-super-resolution-4x (bsr_sr)",
        channels: (6, 160, 640),
        heads: Heads::Width(32),
        betas: (0.0015, 0.0155),
    },
    Published {
        name: "celebahq, ffhq, lsun_bedrooms",
        channels: (3, 224, 896),
        heads: Heads::Width(32),
        betas: (0.0015, 0.0195),
    },
    Published {
        name: "inpainting_big",
        channels: (7, 256, 1024),
        heads: Heads::Count(8),
        betas: (0.0015, 0.0205),
    },
    Published {
        name: "semantic_synthesis256",
        channels: (6, 128, 1024),
        heads: Heads::Count(8),
        betas: (0.0015, 0.0205),
    },
    Published {
        name: "lsun_churches256",
        channels: (4, 192, 768),
        heads: Heads::Count(8),
        betas: (0.0015, 0.0155),
    },
];

/// The published model with these input channels and channels of the first and last level.
pub(super) fn find(channels: (u32, u32, u32)) -> Option<&'static Published> {
    PUBLISHED.iter().find(|p| p.channels == channels)
}

//! What the networks are, whatever layout their checkpoint has.
//!
//! Lives here: [`UnetArch`] and [`AutoencoderArch`], plain descriptions with the field's terms, and the checks
//! that one is sound. Every importer resolves its source to these, and [`crate::build`] turns them into graphs;
//! so two layouts of the same weights give the same file. Never here: tensor names of a layout, files.

use latile_runtime::format::TimestepProjection;

/// A description that cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {why}")]
pub struct ArchError {
    /// The block, in diffusers' naming.
    pub place: String,
    /// What does not fit.
    pub why: String,
}

/// Levels, layers and channels beyond these are refused before anything is computed from them.
const MAX_LEVELS: usize = 16;
const MAX_LAYERS: u32 = 64;
const MAX_CHANNELS: u32 = 1 << 16;

/// Group normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Groups; divides the channels of every map it normalises.
    pub groups: u32,
    /// Added to the variance.
    pub eps: f32,
}

/// Self-attention over all pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Number of heads.
    pub heads: u32,
    /// Channels of a head; scores are divided by its square root. `heads · head_dim` may be less than the
    /// map's channels.
    pub head_dim: u32,
    /// Normalisation before the projections, where there is one.
    pub norm: Option<Norm>,
}

/// How a level changes resolution at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resample {
    /// Down: a 3 × 3 convolution of stride 2. Up: nearest neighbour, then a 3 × 3 convolution.
    Conv,
    /// A residual block that averages 2 × 2 pixels or repeats them inside (`resblock_updown`).
    Resnet,
}

/// Where the stride-2 convolution's zeros go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DownPad {
    /// One on each side.
    Symmetric,
    /// One below and one to the right (the autoencoders' way, diffusers' `downsample_padding` 0).
    End,
}

/// Residual blocks of one resolution, in execution order.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Channels of every block's output.
    pub channels: u32,
    /// Residual blocks.
    pub layers: u32,
    /// Attention after each of them.
    pub attention: Option<Attention>,
    /// The way to the next level.
    pub resample: Option<Resample>,
}

/// How a block uses the time embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeMix {
    /// Added per channel before the second norm.
    Add,
    /// Scale and shift after the second norm (`use_scale_shift_norm`; Dhariwal & Nichol 2021, section 3, AdaGN).
    ScaleShift,
}

/// The blocks at the lowest resolution: residual, attention, residual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Middle {
    /// The attention between the residual blocks.
    pub attention: Option<Attention>,
    /// Every sum in it is divided by this (`mid_block_scale_factor`).
    pub divisor: f32,
}

/// A U-Net without cross-attention: diffusers' `UNet2DModel`, CompVis' `UNetModel` without a context.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetArch {
    /// Channels of the input: the latent's and those concatenated with it.
    pub in_channels: u32,
    /// Channels of the prediction.
    pub out_channels: u32,
    /// Whether the input is mapped by 2x − 1 first.
    pub center_input: bool,
    /// How a timestep becomes a vector.
    pub time: TimestepProjection,
    /// Length of the time embedding.
    pub time_embed_dim: u32,
    /// Every norm but the middle attention's.
    pub norm: Norm,
    /// How blocks use the time embedding.
    pub time_mix: TimeMix,
    /// Zeros of the downsampling convolutions.
    pub down_pad: DownPad,
    /// From the highest resolution to the lowest.
    pub down: Vec<Level>,
    /// The lowest resolution's middle.
    pub middle: Option<Middle>,
    /// From the lowest resolution to the highest; a level has a layer more than its counterpart in `down`.
    pub up: Vec<Level>,
}

/// What lies between an autoencoder's halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bottleneck {
    /// A codebook of `entries` vectors of `dim` elements (VQ-VAE), with 1 × 1 convolutions on both sides.
    Vq {
        /// Vectors in the codebook.
        entries: u32,
        /// Their length: the latent's channels.
        dim: u32,
    },
    /// Mean and log-variance (KL), with 1 × 1 convolutions where the flags say.
    Kl {
        /// A convolution after the encoder.
        quant_conv: bool,
        /// A convolution before the decoder.
        post_quant_conv: bool,
    },
}

/// An autoencoder: diffusers' `VQModel` and `AutoencoderKL`, CompVis' `VQModelInterface` and `AutoencoderKL`.
#[derive(Clone, Debug, PartialEq)]
pub struct AutoencoderArch {
    /// Channels of a picture going in.
    pub in_channels: u32,
    /// Channels of a picture coming out.
    pub out_channels: u32,
    /// Channels between the halves (`z_channels`).
    pub latent_channels: u32,
    /// What lies there.
    pub bottleneck: Bottleneck,
    /// Every norm.
    pub norm: Norm,
    /// Encoder levels, from the picture's resolution to the latent's.
    pub down: Vec<Level>,
    /// Decoder levels, from the latent's resolution to the picture's.
    pub up: Vec<Level>,
    /// Whether the middle has attention: one head over all channels.
    pub middle_attention: bool,
}

impl AutoencoderArch {
    /// Channels of a latent as the U-Net sees it.
    #[must_use]
    pub fn latent_dim(&self) -> u32 {
        match self.bottleneck {
            Bottleneck::Vq { dim, .. } => dim,
            Bottleneck::Kl { .. } => self.latent_channels,
        }
    }

    /// Picture pixels a latent pixel stands for, in each direction.
    #[must_use]
    pub fn factor(&self) -> u32 {
        1 << self.up.iter().filter(|l| l.resample.is_some()).count()
    }

    /// A picture going in should have sides that are multiples of this: each downsampling rounds odd ones.
    #[must_use]
    pub fn multiple(&self) -> u32 {
        1 << self.down.iter().filter(|l| l.resample.is_some()).count()
    }

    /// Checks sizes, and that groups divide channels.
    ///
    /// # Errors
    /// [`ArchError`] naming the first block that does not fit.
    pub fn check(&self) -> Result<(), ArchError> {
        channels("encoder.conv_in", self.in_channels)?;
        channels("decoder.conv_out", self.out_channels)?;
        channels("latent", self.latent_channels)?;
        if let Bottleneck::Vq { entries, dim } = self.bottleneck {
            channels("quantize.embedding", dim)?;
            // A pixel's nearest entry is searched for over the whole table.
            if entries == 0 || entries > 1 << 20 {
                return Err(error("quantize.embedding", format!("{entries} entries")));
            }
        }
        levels("encoder.down_blocks", &self.down)?;
        levels("decoder.up_blocks", &self.up)?;
        for (place, levels) in
            [("encoder.down_blocks", &self.down), ("decoder.up_blocks", &self.up)]
        {
            for (i, level) in levels.iter().enumerate() {
                groups(&format!("{place}.{i}"), self.norm, level.channels)?;
            }
        }
        if self.down.last().map(|l| l.channels) != self.up.first().map(|l| l.channels) {
            return Err(error(
                "decoder.up_blocks.0",
                "its channels differ from the encoder's last level",
            ));
        }
        Ok(())
    }
}

impl UnetArch {
    /// The skip connections' channels, in the order in which they are pushed.
    #[must_use]
    pub fn skips(&self) -> Vec<u32> {
        let mut out = vec![self.down.first().map_or(0, |l| l.channels)];
        for level in &self.down {
            let count = level.layers + u32::from(level.resample.is_some());
            out.extend(std::iter::repeat_n(level.channels, count as usize));
        }
        out
    }

    /// Map inputs must have sides that are multiples of this, or skips would not fit.
    #[must_use]
    pub fn multiple(&self) -> u32 {
        1 << self.down.iter().filter(|l| l.resample.is_some()).count()
    }

    /// Checks sizes, that groups divide channels, and that both sides of the U fit.
    ///
    /// # Errors
    /// [`ArchError`] naming the first block that does not fit.
    pub fn check(&self) -> Result<(), ArchError> {
        channels("conv_in", self.in_channels)?;
        channels("conv_out", self.out_channels)?;
        channels("time_proj", self.time.dim)?;
        channels("time_embedding", self.time_embed_dim)?;
        if !self.time.dim.is_multiple_of(2) {
            return Err(error("time_proj", format!("an odd length of {}", self.time.dim)));
        }
        if self.time.freq_shift >= (self.time.dim / 2) as f32 {
            return Err(error("time_proj", format!("freq_shift {}", self.time.freq_shift)));
        }
        levels("down_blocks", &self.down)?;
        levels("up_blocks", &self.up)?;
        let resampling = |levels: &[Level]| levels.iter().filter(|l| l.resample.is_some()).count();
        if resampling(&self.down) != resampling(&self.up) {
            return Err(error(
                "up_blocks",
                "they upsample another number of times than the down blocks",
            ));
        }
        let mut current = self.down[0].channels;
        for (i, level) in self.down.iter().enumerate() {
            for layer in 0..level.layers {
                let place = format!("down_blocks.{i}.resnets.{layer}");
                groups(&place, self.norm, current)?;
                current = level.channels;
                groups(&place, self.norm, current)?;
            }
            heads(&format!("down_blocks.{i}.attentions"), level)?;
        }
        if let Some(middle) = self.middle {
            groups("mid_block", self.norm, current)?;
            if !(middle.divisor.is_finite() && middle.divisor > 0.0) {
                return Err(error("mid_block", format!("a scale factor of {}", middle.divisor)));
            }
            if let Some(Attention { norm: Some(norm), .. }) = middle.attention {
                groups("mid_block.attentions.0", norm, current)?;
            }
        }
        let mut skips = self.skips();
        for (i, level) in self.up.iter().enumerate() {
            for layer in 0..level.layers {
                let place = format!("up_blocks.{i}.resnets.{layer}");
                let Some(skip) = skips.pop() else {
                    return Err(error(&place, "there is no skip connection left for it"));
                };
                groups(&place, self.norm, current + skip)?;
                current = level.channels;
                groups(&place, self.norm, current)?;
            }
            heads(&format!("up_blocks.{i}.attentions"), level)?;
        }
        if !skips.is_empty() {
            return Err(error(
                "up_blocks",
                format!("they leave {} skip connections unused", skips.len()),
            ));
        }
        Ok(())
    }
}

fn error(place: &str, why: impl Into<String>) -> ArchError {
    ArchError { place: place.to_owned(), why: why.into() }
}

fn channels(place: &str, n: u32) -> Result<(), ArchError> {
    if (1..=MAX_CHANNELS).contains(&n) {
        Ok(())
    } else {
        Err(error(place, format!("{n} channels; 1 to {MAX_CHANNELS} are supported")))
    }
}

fn groups(place: &str, norm: Norm, channels: u32) -> Result<(), ArchError> {
    if !(norm.eps.is_finite() && norm.eps > 0.0) {
        return Err(error(place, format!("a norm with eps {}", norm.eps)));
    }
    if norm.groups > 0 && channels.is_multiple_of(norm.groups) {
        Ok(())
    } else {
        Err(error(place, format!("{} groups do not divide {channels} channels", norm.groups)))
    }
}

fn heads(place: &str, level: &Level) -> Result<(), ArchError> {
    match level.attention {
        Some(a) if a.heads == 0 || a.head_dim == 0 || a.heads > level.channels / a.head_dim => {
            let why = format!("{} heads of {} in {} channels", a.heads, a.head_dim, level.channels);
            Err(error(place, why))
        }
        _ => Ok(()),
    }
}

fn levels(place: &str, levels: &[Level]) -> Result<(), ArchError> {
    if levels.is_empty() || levels.len() > MAX_LEVELS {
        return Err(error(
            place,
            format!("{} levels; 1 to {MAX_LEVELS} are supported", levels.len()),
        ));
    }
    for (i, level) in levels.iter().enumerate() {
        let place = format!("{place}.{i}");
        channels(&place, level.channels)?;
        if level.layers == 0 || level.layers > MAX_LAYERS {
            return Err(error(
                &place,
                format!("{} layers; 1 to {MAX_LAYERS} are supported", level.layers),
            ));
        }
    }
    Ok(())
}

//! What a picture, its result and their files take in memory, for plans.
//!
//! Bounds: what an encoder holds depends on the pixels, so it is counted as for pixels that do not compress.

use super::{Encoding, Picture, Samples};
use latile_runtime::pipeline::Caller;

/// What a picture is, as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    /// Samples of 16 bits.
    pub(crate) deep: bool,
    /// It has an opacity channel.
    pub(crate) opacity: bool,
}

impl Picture {
    /// What it is.
    pub(crate) fn kind(&self) -> Kind {
        let deep = matches!(self.rgb, Samples::Sixteen(_));
        Kind { deep, opacity: self.opacity.is_some() }
    }

    /// Bytes of its samples and its profile.
    pub(crate) fn bytes(&self) -> usize {
        let opacity = self.opacity.as_ref().map_or(0, Samples::bytes);
        self.rgb.bytes() + opacity + self.icc.as_ref().map_or(0, Vec::len)
    }
}

impl Samples {
    /// Bytes of all samples.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Eight(v) => v.len(),
            Self::Sixteen(v) => 2 * v.len(),
        }
    }
}

/// Buffers for a picture of `kind` with `input` pixels whose result has `output`, written as `encoding`.
///
/// Holds for what `upscale` does: the picture stands throughout, 16-bit samples as floats beside it; the
/// result is collected as samples; then opacity is enlarged, and the file made.
pub(crate) fn caller(kind: Kind, input: usize, output: usize, encoding: Encoding) -> Caller {
    let wide = |deep: bool| if deep { 2 } else { 1 };
    let depth = wide(kind.deep);
    let png_deep = kind.deep && encoding == Encoding::Png;
    let result = 3 * wide(png_deep);
    let mut per_input = 3 * depth + if kind.opacity { depth } else { 0 };
    if kind.deep {
        per_input += 3 * size_of::<f32>();
    }
    // The opacity channel enlarged, after an intermediate of as many rows as the result, four floats a pixel.
    let (opacity, resizing) = match kind.opacity {
        true => (depth, 16 * (output as f64 * input as f64).sqrt() as usize),
        false => (0, 0),
    };
    let channels = if kind.opacity { 4 } else { 3 };
    let encoder = match encoding {
        // The compressed picture stands whole, and beside it the samples in the file's order and byte order.
        Encoding::Png => channels * wide(png_deep) * if png_deep { 3 } else { 1 },
        // Rows at a time; samples of 16 bits are rounded first.
        Encoding::Jpeg { .. } => if kind.deep { 3 } else { 0 },
        // Samples in the encoder's own order, and the file whole.
        Encoding::WebP => 3 * channels,
    };
    let joined = if kind.opacity { channels * wide(png_deep) } else { 0 };
    let pixels = |n: usize, each: usize| n.saturating_mul(each);
    Caller {
        input: pixels(input, per_input),
        result: pixels(output, result),
        finish: pixels(output, opacity).saturating_add(resizing.max(pixels(output, encoder + joined))),
    }
}

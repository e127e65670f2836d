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
    let depth = if kind.deep { 2 } else { 1 };
    // Only PNG keeps 16 bits.
    let out_depth = if encoding == Encoding::Png { depth } else { 1 };
    let as_floats = if kind.deep { 3 * size_of::<f32>() } else { 0 };
    let per_input = 3 * depth + as_floats + if kind.opacity { depth } else { 0 };
    // The opacity channel enlarged, after an intermediate of as many rows as the result, four floats a pixel.
    let (opacity, resizing) = match kind.opacity {
        true => (depth, 16 * (output as f64 * input as f64).sqrt() as usize),
        false => (0, 0),
    };
    let channels = if kind.opacity { 4 } else { 3 };
    let encoder = match encoding {
        // The compressed picture stands whole, and 16-bit samples twice more, as bytes in two orders.
        Encoding::Png => channels * out_depth * if kind.deep { 3 } else { 1 },
        // A few rows.
        Encoding::Jpeg { .. } => 0,
        // The compressed picture stands whole, and the samples as the encoder transforms them.
        Encoding::WebP => 4 + channels,
    };
    let joined = if kind.opacity { channels * out_depth } else { 0 };
    let pixels = |n: usize, each: usize| n.saturating_mul(each);
    Caller {
        input: pixels(input, per_input),
        result: pixels(output, 3 * out_depth),
        finish: pixels(output, opacity)
            .saturating_add(resizing.max(pixels(output, encoder + joined))),
    }
}

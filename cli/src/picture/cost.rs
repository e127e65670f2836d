//! What a picture, its result and their files take in memory, for plans.
//!
//! Bounds: what an encoder holds depends on the pixels, so it is counted as for pixels that do not compress.

use super::opacity::Enlarger;
use super::{Encoding, Form, Picture, Samples};
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

/// Buffers for a picture of `kind`, of `from` (width, height), whose result has `form` and is written as
/// `encoding`.
///
/// Holds for what `upscale` does: the picture stands throughout; rows of the result, and of its opacity, go
/// to the encoder as they are made.
pub(crate) fn caller(kind: Kind, from: (u32, u32), form: &Form, encoding: Encoding) -> Caller {
    let depth = if kind.deep { 2 } else { 1 };
    let each = 3 * depth + if kind.opacity { depth } else { 0 };
    let [rows, finish] = encoding.bytes(form);
    let opacity = match kind.opacity {
        true => Enlarger::bytes(from, (form.width, form.height)),
        false => 0,
    };
    Caller {
        input: (from.0 as usize).saturating_mul(from.1 as usize).saturating_mul(each),
        result: rows.saturating_add(opacity),
        finish,
    }
}

//! The primitive operators.

use super::WeightId;
use serde::{Deserialize, Serialize};

/// Zeros added around a map before a convolution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pad {
    /// Rows above.
    pub top: u32,
    /// Columns to the left.
    pub left: u32,
    /// Rows below.
    pub bottom: u32,
    /// Columns to the right.
    pub right: u32,
}

impl Pad {
    /// The same on all four sides.
    #[must_use]
    pub const fn all(n: u32) -> Self {
        Self { top: n, left: n, bottom: n, right: n }
    }
}

/// How an int8 layer's input becomes integers in one group of timesteps:
/// `q = clamp(round(x · input_scale[c] / scale) + zero_point, 0, 255)`, halves rounded to even.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantRange {
    /// What one step of `q` is worth; finite and positive.
    pub scale: f32,
    /// The `q` of 0, so that padding is exact.
    pub zero_point: u8,
}

/// What makes a convolution or linear layer an int8 one. Its result, before the bias, is
/// `(Σ q·w − zero_point · weight_sum[n]) · (scale · weight_scale[n])`: an i32 sum, exact and therefore
/// the same in any order, then two f32 roundings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quant {
    /// One for each of the component's groups of timesteps; one where it has none. Where `winograd`, several for each:
    /// see [`Winograd::ranges`].
    pub ranges: Vec<QuantRange>,
    /// `[n]`, f32, plain: what one step of a stored weight is worth. One for each row of the weight.
    pub weight_scale: WeightId,
    /// `[n]`, i32, plain: the sum of the stored weights of each row of the weight.
    pub weight_sum: WeightId,
    /// `[c]`, f32, plain: inputs are multiplied by it before they are quantized, and the weights were
    /// divided by it. It gives channels, and concatenated inputs, a scale of their own.
    pub input_scale: Option<WeightId>,
    /// The algorithm of Winograd's by which a 3 × 3 convolution of stride 1 is computed; none where directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub winograd: Option<Winograd>,
}

/// Winograd's minimal filtering (Lavin & Gray 2016, section 4.1): neighbouring outputs of a 3 × 3 convolution from fewer
/// products than they have terms.
///
/// Along one axis, x being what the window sees, scaled, of which output 2t sees x\[2t\] first, and g the window, two
/// neighbouring outputs are made at four *points*:
///
/// ```text
/// d₀ = x[2t] − x[2t + 2]        w₀ = g₀
/// d₁ = x[2t + 1] + x[2t + 2]    w₁ = (g₀ + g₁ + g₂) / 2
/// d₂ = x[2t + 2] − x[2t + 1]    w₂ = (g₀ − g₁ + g₂) / 2
/// d₃ = x[2t + 1] − x[2t + 3]    w₃ = g₂
/// y[2t] = m₀ + (m₁ + m₂)        y[2t + 1] = (m₁ − m₂) − m₃
/// ```
///
/// mₖ being what [`Quant`] says of qₖ, which is dₖ quantized, and the rows of point k of the weight, summed over all that is
/// not along the axis. The differences of points 0 and 3 have one range, so that there are three *kinds* of points:
/// pixels two apart (0 and 3), sums (1), differences of neighbours (2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "StoredWinograd", try_from = "StoredWinograd")]
pub enum Winograd {
    /// F(2, 3) along rows: a pair of outputs from four products of a row of the window in place of six.
    Rows,
    /// F(2 × 2, 3 × 3): a square of outputs from 16 products in place of 36. Point 4 i + j is point i down and then point j
    /// across; outputs are made across first, then down. An output row is the upper one of its square where its number is
    /// even.
    ///
    /// Pixels become words first, p = round(x · (input_scale\[c\] · (1 / u))), at most [`Winograd::MOST_WORD`] either way, u
    /// being the scale of range 0; d is made of those, exactly, and q is ((d · f + 2¹⁴) >> 15) + zero_point, saturated, where
    /// f is [`Winograd::factor`]. What one step of it is worth is [`Winograd::step`], not the range's scale.
    Square,
}

/// As it stands in a file: `true` for rows, of which there alone were some before version 5.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(untagged)]
enum StoredWinograd {
    Rows(bool),
    Named(NamedWinograd),
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum NamedWinograd {
    Square,
}

impl From<Winograd> for StoredWinograd {
    fn from(winograd: Winograd) -> Self {
        match winograd {
            Winograd::Rows => StoredWinograd::Rows(true),
            Winograd::Square => StoredWinograd::Named(NamedWinograd::Square),
        }
    }
}

impl TryFrom<StoredWinograd> for Winograd {
    type Error = &'static str;

    fn try_from(stored: StoredWinograd) -> Result<Self, Self::Error> {
        match stored {
            StoredWinograd::Rows(true) => Ok(Winograd::Rows),
            StoredWinograd::Rows(false) => Err("winograd is left out where there is none"),
            StoredWinograd::Named(NamedWinograd::Square) => Ok(Winograd::Square),
        }
    }
}

impl Winograd {
    /// The most points and ranges that there are.
    pub const MOST_POINTS: usize = Winograd::Square.points();
    /// As above.
    pub const MOST_RANGES: usize = Winograd::Square.ranges();
    /// The largest word that a pixel becomes for [`Winograd::Square`]: four fit 16 bits.
    pub const MOST_WORD: i16 = i16::MAX / 4;
    /// The kind of each point along an axis.
    pub const KIND: [usize; 4] = [0, 1, 2, 0];

    /// `rows` or `square`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Winograd::Rows => "rows",
            Winograd::Square => "square",
        }
    }

    /// As the literature calls it.
    #[must_use]
    pub const fn formula(self) -> &'static str {
        match self {
            Winograd::Rows => "F(2, 3)",
            Winograd::Square => "F(2 x 2, 3 x 3)",
        }
    }

    /// Products that make the outputs of one tile.
    #[must_use]
    pub const fn points(self) -> usize {
        match self {
            Winograd::Rows => 4,
            Winograd::Square => 16,
        }
    }

    /// Ranges for each group of timesteps: one for each kind of point. Of squares number 0 is the pixels', whose zero point
    /// is 0, and kind i down and j across has number 1 + 3 i + j.
    #[must_use]
    pub const fn ranges(self) -> usize {
        match self {
            Winograd::Rows => 3,
            Winograd::Square => 10,
        }
    }

    /// The range of `point`.
    #[must_use]
    pub const fn range_of(self, point: usize) -> usize {
        match self {
            Winograd::Rows => Self::KIND[point],
            Winograd::Square => 1 + 3 * Self::KIND[point / 4] + Self::KIND[point % 4],
        }
    }

    /// What a sum of words is multiplied by, in units of 2⁻¹⁵, to become bytes of a range of scale `scale`, the scale of words
    /// being `word`: their ratio, to the nearest. None where that is not 1 to 32767.
    #[must_use]
    pub fn factor(word: f32, scale: f32) -> Option<i16> {
        let factor = (32768.0 * f64::from(word) / f64::from(scale)).round();
        (1.0..=32767.0).contains(&factor).then_some(factor as i16)
    }

    /// What one step of the bytes at `point` is worth, by a group's ranges: the range's scale, but of squares the words' over
    /// the factor.
    #[must_use]
    pub fn step(self, ranges: &[QuantRange], point: usize) -> f32 {
        let scale = ranges[self.range_of(point)].scale;
        match self {
            Winograd::Rows => scale,
            Winograd::Square => {
                let word = ranges[0].scale;
                Self::factor(word, scale).map_or(scale, |f| word * (32768.0 / f32::from(f)))
            }
        }
    }

    /// Height and width of a tile of outputs.
    #[must_use]
    pub const fn tile(self) -> [usize; 2] {
        match self {
            Winograd::Rows => [1, 2],
            Winograd::Square => [2, 2],
        }
    }

    /// Height and width of the window at each point.
    #[must_use]
    pub const fn kernel(self) -> [u32; 2] {
        match self {
            Winograd::Rows => [3, 1],
            Winograd::Square => [1, 1],
        }
    }

    /// Rows of the weight of a layer with `n` output channels: for each point one for every channel, rounded up to
    /// whole panels of sixteen.
    #[must_use]
    pub const fn filters(self, n: u32) -> u32 {
        n.next_multiple_of(16).saturating_mul(self.points() as u32)
    }
}

impl Quant {
    /// Ranges for each group of timesteps.
    #[must_use]
    pub const fn ranges_per_group(&self) -> usize {
        match self.winograd {
            Some(w) => w.ranges(),
            None => 1,
        }
    }
}

/// A layer's weight, its bias, and what makes it int8.
pub type Matrix<'a> = (WeightId, Option<WeightId>, Option<&'a Quant>);
/// As [`Matrix`], to be changed.
pub type MatrixMut<'a> = (&'a mut WeightId, &'a mut Option<WeightId>, &'a mut Option<Quant>);

/// Filters of an [`Op::UpConv2x`] with `n` output channels: in each of four phases one for every channel, rounded up
/// to whole panels of sixteen.
#[must_use]
pub const fn up_filters(n: u32) -> u32 {
    n.next_multiple_of(16).saturating_mul(4)
}

/// What is left out of a file.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

/// A primitive operator. Operands are listed in the order of `Node::inputs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// `map → map`. Cross-correlation, dilation 1, one group.
    Conv2d {
        /// `[n, c, kh, kw]`, [`super::Layout::Packed16`], or [`super::Layout::Packed16x4`] where `quant` is given.
        /// Of a Winograd layer `[points · m, c, …]`, m being n rounded up to a multiple of 16; see [`Winograd::filters`] and
        /// [`Winograd::kernel`]. Row `point · m + o` makes output channel o at a point; those beyond n make nothing.
        weight: WeightId,
        /// `[n]`, f32, plain.
        bias: Option<WeightId>,
        /// `[kh, kw]`.
        kernel: [u32; 2],
        /// `[vertical, horizontal]`.
        stride: [u32; 2],
        /// Zero padding.
        pad: Pad,
        /// Makes it an int8 convolution.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        quant: Option<Quant>,
    },
    /// `map → map` of twice the height and width: nearest-neighbour upsampling and a 3 × 3 convolution that keeps the
    /// size, in one. Of the 3 × 3 pixels that a window sees of an upsampled map at most 2 × 2 differ, so each pixel of
    /// the input becomes 2 × 2 outputs, each by 2 × 2 weights of its own: output `(2y + py, 2x + px)`, of phase
    /// `2 · py + px`, is `Σ w[ky, kx] · input[y + py + ky − 1, x + px + kx − 1]`, the input being 0 outside.
    UpConv2x {
        /// `[4 · m, c, 2, 2]`, m being the output channels n rounded up to a multiple of 16; see [`up_filters`].
        /// Filter `phase · m + o` makes output channel o of a phase; those beyond n make nothing.
        /// [`super::Layout::Packed16`], or [`super::Layout::Packed16x4`] where `quant` is given.
        weight: WeightId,
        /// `[4 · m]`, f32, plain: for each filter.
        bias: Option<WeightId>,
        /// Makes it an int8 layer; `n` is then the number of filters.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        quant: Option<Quant>,
    },
    /// `map → map` over the channels of each pixel, or `vector → vector`.
    Linear {
        /// `[n, c]`, [`super::Layout::Packed16`], or [`super::Layout::Packed16x4`] where `quant` is given.
        weight: WeightId,
        /// `[n]`, f32, plain.
        bias: Option<WeightId>,
        /// Makes it an int8 layer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        quant: Option<Quant>,
    },
    /// `map → map`. Normalises each group of neighbouring channels over all pixels with the biased
    /// variance, then scales and shifts per channel (Wu & He 2018, eq. 1 and 2).
    GroupNorm {
        /// Number of groups; divides the channels.
        groups: u32,
        /// Added to the variance.
        eps: f32,
        /// `[c]`, f32, plain.
        weight: WeightId,
        /// `[c]`, f32, plain.
        bias: WeightId,
    },
    /// `map → map` or `vector → vector`: `x · sigmoid(x)`.
    Silu,
    /// `map, map → map`, element by element.
    Add,
    /// `map, vector → map`: adds the vector to every pixel.
    AddChannel,
    /// `map, vector of 2c → map`: `x · (1 + v[..c]) + v[c..]` at every pixel.
    ScaleShift,
    /// `map, map, … → map`: channels one after the other.
    Concat,
    /// `map → map` of twice the height and width, nearest neighbour.
    Upsample2x,
    /// `map → map` of half the height and width (rounded down), the mean of 2 × 2 pixels.
    AvgPool2x,
    /// `map q, map k, map v → map`: softmax(q · kᵀ · scale) · v over all pixels, for each head
    /// (Vaswani et al. 2017, eq. 1). Head `i` owns channels `i·d .. (i+1)·d`.
    Attention {
        /// Number of heads; divides the channels.
        heads: u32,
        /// Multiplies the scores, usually 1/√d.
        scale: f32,
        /// Both products are of bytes, with scales found as they are computed; a target that does not
        /// know how may compute it as a float one.
        #[serde(default, skip_serializing_if = "is_false")]
        int8: bool,
    },
    /// `map → map`: every pixel replaced by the nearest row of the table in Euclidean distance, the first
    /// of equals (van den Oord et al. 2017, eq. 1).
    Codebook {
        /// `[entries, c]`, f32, plain.
        table: WeightId,
    },
    /// `map → map` or `vector → vector`: `x · mul + add`.
    Affine {
        /// Multiplier.
        mul: f32,
        /// Addend.
        add: f32,
    },
}

impl Op {
    /// A short name for reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Conv2d { .. } => "conv2d",
            Self::UpConv2x { .. } => "up_conv2x",
            Self::Linear { .. } => "linear",
            Self::GroupNorm { .. } => "group_norm",
            Self::Silu => "silu",
            Self::Add => "add",
            Self::AddChannel => "add_channel",
            Self::ScaleShift => "scale_shift",
            Self::Concat => "concat",
            Self::Upsample2x => "upsample2x",
            Self::AvgPool2x => "avg_pool2x",
            Self::Attention { .. } => "attention",
            Self::Codebook { .. } => "codebook",
            Self::Affine { .. } => "affine",
        }
    }

    /// The parts of a convolution or linear layer.
    #[must_use]
    pub const fn matrix(&self) -> Option<Matrix<'_>> {
        match self {
            Self::Conv2d { weight, bias, quant, .. }
            | Self::UpConv2x { weight, bias, quant }
            | Self::Linear { weight, bias, quant } => Some((*weight, *bias, quant.as_ref())),
            _ => None,
        }
    }

    /// As [`Op::matrix`], to be changed.
    #[must_use]
    pub const fn matrix_mut(&mut self) -> Option<MatrixMut<'_>> {
        match self {
            Self::Conv2d { weight, bias, quant, .. }
            | Self::UpConv2x { weight, bias, quant }
            | Self::Linear { weight, bias, quant } => Some((weight, bias, quant)),
            _ => None,
        }
    }

    /// What makes it an int8 layer, where it is one.
    #[must_use]
    pub const fn quant(&self) -> Option<&Quant> {
        match self.matrix() {
            Some((_, _, quant)) => quant,
            None => None,
        }
    }

    /// The weights it reads.
    #[must_use]
    pub fn weights(&self) -> Vec<WeightId> {
        if let Some((weight, bias, quant)) = self.matrix() {
            let mut all = vec![weight];
            all.extend(bias);
            if let Some(q) = quant {
                all.extend([q.weight_scale, q.weight_sum]);
                all.extend(q.input_scale);
            }
            return all;
        }
        match self {
            Self::GroupNorm { weight, bias, .. } => vec![*weight, *bias],
            Self::Codebook { table } => vec![*table],
            _ => Vec::new(),
        }
    }
}

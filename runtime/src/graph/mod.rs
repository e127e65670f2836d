//! A component as a list of primitive operators in execution order.
//!
//! Lives here: the operators ([`Op`]), their validation, shape inference, multiply-accumulate counts,
//! and the arena plan ([`plan_arena`]). The graph says *what* is computed; how operators are fused and run
//! is each target's business. Never here: kernels, weights' bytes, files.

mod arena_plan;
mod infer;
mod op;
mod validate;

pub use arena_plan::{ArenaPlan, Lifetime, Overlay, plan_arena};
pub use infer::ShapeError;
pub use op::{Matrix, MatrixMut, Op, Pad, Quant, QuantRange, Winograd, up_filters};
pub use validate::{GraphError, MAX_GROUPS, MAX_NODES};

use crate::tensor::DType;
use serde::{Deserialize, Serialize};

/// Names a value: an index into [`Graph::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ValueId(pub u32);

/// Names a weight: an index into [`Graph::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WeightId(pub u32);

impl ValueId {
    /// As an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl WeightId {
    /// As an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a value is, before a picture size is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueKind {
    /// A feature map with this many channels; its height and width follow from the picture.
    Map(u32),
    /// A vector of this many elements.
    Vector(u32),
}

impl ValueKind {
    /// Channels of a map, elements of a vector.
    #[must_use]
    pub const fn channels(self) -> u32 {
        match self {
            Self::Map(c) | Self::Vector(c) => c,
        }
    }
}

/// A value that enters or leaves the graph, with the name users know it by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// `sample`, `time_proj`, `latents`, `moments`: diffusers' names where it has one.
    pub name: String,
    /// The value.
    pub value: ValueId,
}

/// One operator with its operands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The layer's name in the checkpoint it came from; reports and errors use it.
    pub name: String,
    /// What it does.
    pub op: Op,
    /// Its operands, in the order [`Op`] documents.
    pub inputs: Vec<ValueId>,
    /// Its result.
    pub output: ValueId,
}

/// How a weight's bytes lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Row-major, as the shape says.
    Plain,
    /// A `[n, c, kh, kw]` convolution or `[n, c]` linear weight as
    /// `[ceil(n / 16)][kh][kw][c][16]`: sixteen output channels innermost, missing ones zero.
    Packed16,
    /// The same as `[ceil(n / 16)][kh][kw][ceil(c / 4)][16][4]`, int8: of sixteen output channels four
    /// consecutive input channels each, so that a row of 64 bytes is what a dot-product instruction
    /// takes. Missing channels of either kind are zero.
    Packed16x4,
}

/// A weight as the graph knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightSpec {
    /// The tensor's name, in diffusers' naming.
    pub name: String,
    /// Its logical shape: `[n, c, kh, kw]`, `[n, c]` or `[n]`, before packing.
    pub shape: Vec<u32>,
    /// Element type as stored.
    pub dtype: DType,
    /// How it lies.
    pub layout: Layout,
}

impl WeightSpec {
    /// Elements as stored, padding of the packed layouts included; `None` where that overflows.
    #[must_use]
    pub fn stored_elements(&self) -> Option<usize> {
        let mut dims = self.shape.iter().map(|&d| d as usize);
        match self.layout {
            Layout::Plain => dims.try_fold(1usize, usize::checked_mul),
            Layout::Packed16 => {
                let n = dims.next()?.div_ceil(16).checked_mul(16)?;
                dims.try_fold(n, usize::checked_mul)
            }
            Layout::Packed16x4 => {
                let n = dims.next()?.div_ceil(16).checked_mul(16)?;
                let c = dims.next()?.div_ceil(4).checked_mul(4)?;
                dims.try_fold(n.checked_mul(c)?, usize::checked_mul)
            }
        }
    }

    /// Bytes as stored, without alignment; `None` where that overflows.
    #[must_use]
    pub fn stored_bytes(&self) -> Option<usize> {
        self.stored_elements()?.checked_mul(self.dtype.size())
    }
}

/// A component: operators in execution order, each value defined once and before it is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// Values that enter.
    pub inputs: Vec<Port>,
    /// Values that leave.
    pub outputs: Vec<Port>,
    /// Every value's kind.
    pub values: Vec<ValueKind>,
    /// Every weight's description, in the order in which they lie in the file.
    pub weights: Vec<WeightSpec>,
    /// The operators, in execution order.
    pub nodes: Vec<Node>,
}

impl Graph {
    /// The kind of `value`. Panics where the id is not of this graph, which [`Graph::validate`] excludes.
    #[must_use]
    pub fn kind(&self, value: ValueId) -> ValueKind {
        self.values[value.index()]
    }

    /// The first int8 layer that does not have `groups` activation ranges.
    #[must_use]
    pub fn layer_without_groups(&self, groups: usize) -> Option<&str> {
        let wrong =
            |op: &Op| op.quant().is_some_and(|q| q.ranges.len() != groups * q.ranges_per_group());
        self.nodes.iter().find(|n| wrong(&n.op)).map(|n| n.name.as_str())
    }

    /// The description of `weight`. Panics where the id is not of this graph, which [`Graph::validate`] excludes.
    #[must_use]
    pub fn weight(&self, weight: WeightId) -> &WeightSpec {
        &self.weights[weight.index()]
    }
}

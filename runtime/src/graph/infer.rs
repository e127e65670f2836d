//! Shapes and costs of a graph at a given picture size.

use super::{Graph, Node, Op, Quant, ValueKind, WeightId};
use crate::tensor::Shape;

/// Why a graph cannot run at a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A map would have no rows or no columns.
    #[error("{node}: a map of {h}x{w} is too small for this layer; use a larger picture or tile")]
    TooSmall {
        /// Layer name.
        node: String,
        /// Rows.
        h: usize,
        /// Columns.
        w: usize,
    },
    /// Two maps that must agree do not.
    #[error(
        "{node}: its inputs are {left} and {right}, which cannot be joined; the picture's sides must be multiples of the model's downsampling"
    )]
    Mismatch {
        /// Layer name.
        node: String,
        /// First operand's shape.
        left: Shape,
        /// The other operand's shape.
        right: Shape,
    },
    /// A size beyond what can be addressed.
    #[error("{node}: its output would not fit in memory; use a smaller tile")]
    TooLarge {
        /// Layer name.
        node: String,
    },
    /// The caller gave another number of map sizes than the graph has map inputs.
    #[error("the graph has {expected} map inputs, {found} sizes were given")]
    WrongInputs {
        /// Map inputs of the graph.
        expected: usize,
        /// Sizes given.
        found: usize,
    },
}

impl Graph {
    /// The shape of every value, given `(height, width)` of each map input in order.
    ///
    /// The graph must have passed [`Graph::validate`].
    ///
    /// # Errors
    /// [`ShapeError`] where the sizes do not suit the graph.
    pub fn infer(&self, map_sizes: &[(usize, usize)]) -> Result<Vec<Shape>, ShapeError> {
        let mut shapes: Vec<Shape> = self
            .values
            .iter()
            .map(|k| match *k {
                ValueKind::Map(c) => Shape::Map { h: 0, w: 0, c: c as usize },
                ValueKind::Vector(len) => Shape::Vector { len: len as usize },
            })
            .collect();
        let maps: Vec<_> = self
            .inputs
            .iter()
            .filter(|p| matches!(self.kind(p.value), ValueKind::Map(_)))
            .collect();
        if maps.len() != map_sizes.len() {
            return Err(ShapeError::WrongInputs { expected: maps.len(), found: map_sizes.len() });
        }
        for (port, &(h, w)) in maps.iter().zip(map_sizes) {
            let c = self.kind(port.value).channels() as usize;
            shapes[port.value.index()] = checked(&port.name, h, w, c)?;
        }
        for node in &self.nodes {
            let (h, w) = output_size(node, &shapes)?;
            if let ValueKind::Map(c) = self.kind(node.output) {
                shapes[node.output.index()] = checked(&node.name, h, w, c as usize)?;
            }
        }
        Ok(shapes)
    }

    /// Multiply-accumulates of one run at the given shapes: convolutions, linear layers and attention
    /// products; element-wise work and the codebook search are not counted.
    #[must_use]
    pub fn macs(&self, shapes: &[Shape]) -> u64 {
        self.nodes.iter().map(|n| self.node_macs(n, shapes)).sum()
    }

    /// Multiply-accumulates of one node; see [`Graph::macs`].
    #[must_use]
    pub fn node_macs(&self, node: &Node, shapes: &[Shape]) -> u64 {
        let out = shapes[node.output.index()];
        let per_channel = |weight: &WeightId| -> u64 {
            self.weight(*weight).shape[1..].iter().map(|&d| u64::from(d)).product()
        };
        match &node.op {
            // All points of a tile make its pixels.
            Op::Conv2d { weight, quant: Some(Quant { winograd: Some(w), .. }), .. } => {
                let [h, across] = w.tile();
                let each = (w.points() / (h * across)) as u64;
                each * per_channel(weight) * out.channels() as u64 * out.pixels() as u64
            }
            Op::Conv2d { weight, .. } | Op::Linear { weight, .. } => {
                let per_pixel: u64 =
                    self.weight(*weight).shape.iter().map(|&d| u64::from(d)).product();
                per_pixel * out.pixels() as u64
            }
            // The filters that make a pixel, not those of all phases or those that fill a panel.
            Op::UpConv2x { weight, .. } => {
                per_channel(weight) * out.channels() as u64 * out.pixels() as u64
            }
            Op::Attention { .. } => {
                let keys = shapes[node.inputs[1].index()].pixels() as u64;
                2 * out.pixels() as u64 * keys * out.channels() as u64
            }
            _ => 0,
        }
    }
}

fn checked(name: &str, h: usize, w: usize, c: usize) -> Result<Shape, ShapeError> {
    if h == 0 || w == 0 {
        return Err(ShapeError::TooSmall { node: name.to_owned(), h, w });
    }
    let shape = Shape::Map { h, w, c };
    // Eight bytes an element leaves room for any element type and for f64 partial sums.
    let fits =
        shape.elements().and_then(|n| n.checked_mul(8)).is_some_and(|b| b <= isize::MAX as usize);
    if fits { Ok(shape) } else { Err(ShapeError::TooLarge { node: name.to_owned() }) }
}

fn map_size(shape: Shape) -> (usize, usize) {
    match shape {
        Shape::Map { h, w, .. } => (h, w),
        Shape::Vector { .. } => (1, 1),
    }
}

fn output_size(node: &Node, shapes: &[Shape]) -> Result<(usize, usize), ShapeError> {
    let operand = |i: usize| shapes[node.inputs[i].index()];
    let same = |a: Shape, b: Shape| -> Result<(), ShapeError> {
        if map_size(a) == map_size(b) {
            Ok(())
        } else {
            Err(ShapeError::Mismatch { node: node.name.clone(), left: a, right: b })
        }
    };
    let (h, w) = map_size(operand(0));
    Ok(match &node.op {
        Op::Conv2d { kernel, stride, pad, .. } => {
            let side = |n: usize, before: u32, after: u32, k: u32, s: u32| {
                let padded = n.saturating_add(before as usize).saturating_add(after as usize);
                padded.checked_sub(k as usize).map_or(0, |rest| rest / s as usize + 1)
            };
            (
                side(h, pad.top, pad.bottom, kernel[0], stride[0]),
                side(w, pad.left, pad.right, kernel[1], stride[1]),
            )
        }
        Op::Add | Op::Concat => {
            for i in 1..node.inputs.len() {
                same(operand(0), operand(i))?;
            }
            (h, w)
        }
        Op::Attention { .. } => {
            same(operand(1), operand(2))?;
            (h, w)
        }
        Op::Upsample2x | Op::UpConv2x { .. } => (h.saturating_mul(2), w.saturating_mul(2)),
        Op::AvgPool2x => (h / 2, w / 2),
        Op::Linear { .. }
        | Op::GroupNorm { .. }
        | Op::Silu
        | Op::AddChannel
        | Op::ScaleShift
        | Op::Codebook { .. }
        | Op::Affine { .. } => (h, w),
    })
}

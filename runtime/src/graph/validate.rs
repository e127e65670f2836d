//! Checks that make a graph from a file safe to run: every id in range, every value defined once and
//! before use, every weight of the shape its operator needs.

use super::{
    Graph, Layout, Node, Op, Quant, QuantRange, ValueId, ValueKind, WeightId, Winograd, up_filters,
};
use crate::tensor::DType;

/// More nodes than any latent diffusion model has; a graph beyond is refused.
pub const MAX_NODES: usize = 100_000;
/// The largest channel count, vector length or kernel side that is accepted.
const MAX_DIM: u32 = 1 << 20;
const MAX_KERNEL: u32 = 64;
/// Most products in an int8 layer's sum: 65536 · 255 · 128 is just below 2³¹.
const MAX_DEPTH: u64 = 65_536;
/// Most groups of timesteps that a layer has activation ranges for.
pub const MAX_GROUPS: usize = 64;

/// Why a graph is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// Too many nodes, values or weights.
    #[error("the graph has {found} {what}; at most {MAX_NODES} are accepted")]
    TooMany {
        /// `nodes`, `values` or `weights`.
        what: &'static str,
        /// How many there are.
        found: usize,
    },
    /// A node, port or weight is not what its operator needs.
    #[error("{place}: {why}")]
    Invalid {
        /// The layer, port or weight.
        place: String,
        /// What is wrong and what was expected.
        why: String,
    },
}

fn invalid<T>(place: &str, why: impl Into<String>) -> Result<T, GraphError> {
    Err(GraphError::Invalid { place: place.to_owned(), why: why.into() })
}

fn too_deep(depth: u64) -> String {
    format!("an int8 sum over {depth} products; at most {MAX_DEPTH} are exact")
}

impl Graph {
    /// Checks the whole graph; afterwards the other methods cannot panic.
    ///
    /// # Errors
    /// [`GraphError`] naming the first thing that is wrong.
    pub fn validate(&self) -> Result<(), GraphError> {
        for (what, found) in [
            ("nodes", self.nodes.len()),
            ("values", self.values.len()),
            ("weights", self.weights.len()),
        ] {
            if found > MAX_NODES {
                return Err(GraphError::TooMany { what, found });
            }
        }
        for (i, kind) in self.values.iter().enumerate() {
            if kind.channels() == 0 || kind.channels() > MAX_DIM {
                return invalid(&format!("value {i}"), format!("{} channels", kind.channels()));
            }
        }
        for w in &self.weights {
            if w.shape.is_empty()
                || w.shape.len() > 4
                || w.shape.iter().any(|&d| d == 0 || d > MAX_DIM)
            {
                return invalid(&w.name, format!("a weight of shape {:?}", w.shape));
            }
            if w.stored_bytes().is_none() {
                return invalid(&w.name, "its size overflows");
            }
        }
        let mut defined = vec![false; self.values.len()];
        if self.inputs.is_empty() || self.outputs.is_empty() {
            return invalid("graph", "it needs at least one input and one output");
        }
        for port in &self.inputs {
            self.define(&port.name, port.value, &mut defined)?;
        }
        for node in &self.nodes {
            for &v in &node.inputs {
                if !defined.get(v.index()).copied().unwrap_or(false) {
                    return invalid(
                        &node.name,
                        format!("value {} is used before it is defined", v.0),
                    );
                }
            }
            self.check_node(node)?;
            self.define(&node.name, node.output, &mut defined)?;
        }
        for port in &self.outputs {
            if !defined.get(port.value.index()).copied().unwrap_or(false) {
                return invalid(
                    &port.name,
                    format!("output value {} is never defined", port.value.0),
                );
            }
        }
        Ok(())
    }

    fn define(&self, place: &str, value: ValueId, defined: &mut [bool]) -> Result<(), GraphError> {
        match defined.get_mut(value.index()) {
            None => invalid(place, format!("value {} does not exist", value.0)),
            Some(true) => invalid(place, format!("value {} is defined twice", value.0)),
            Some(slot) => {
                *slot = true;
                Ok(())
            }
        }
    }

    fn check_node(&self, node: &Node) -> Result<(), GraphError> {
        let place = node.name.as_str();
        let expected = match node.op {
            Op::Add | Op::AddChannel | Op::ScaleShift => 2..=2,
            Op::Attention { .. } => 3..=3,
            Op::Concat => 2..=4,
            _ => 1..=1,
        };
        if !expected.contains(&node.inputs.len()) {
            return invalid(place, format!("{} inputs, expected {expected:?}", node.inputs.len()));
        }
        let Some(&out) = self.values.get(node.output.index()) else {
            return invalid(place, format!("value {} does not exist", node.output.0));
        };
        let input = |i: usize| self.kind(node.inputs[i]);
        let first = input(0);
        let map = |kind: ValueKind| matches!(kind, ValueKind::Map(_));
        let want = |what: &str, found: ValueKind, expected: ValueKind| {
            if found == expected {
                Ok(())
            } else {
                invalid(place, format!("its {what} is {found:?}, expected {expected:?}"))
            }
        };
        let maps_only = || {
            if map(first) { Ok(()) } else { invalid(place, "its first input must be a map") }
        };
        match &node.op {
            Op::Conv2d { weight, bias, kernel, stride, pad, quant } => {
                maps_only()?;
                let n = out.channels();
                want("output", out, ValueKind::Map(n))?;
                let bad_side = |v: u32| v == 0 || v > MAX_KERNEL;
                let pads = [pad.top, pad.left, pad.bottom, pad.right];
                if kernel.iter().chain(stride).any(|&v| bad_side(v))
                    || pads.iter().any(|&p| p > MAX_KERNEL)
                {
                    return invalid(
                        place,
                        format!("kernel {kernel:?}, stride {stride:?}, pad {pad:?}"),
                    );
                }
                // A band reads `pad` rows of zeros and at least one real row; a pad as wide as the
                // kernel would make windows that see no pixel.
                if pad.top.max(pad.bottom) >= kernel[0].max(2)
                    || pad.left.max(pad.right) >= kernel[1].max(2)
                {
                    return invalid(
                        place,
                        format!("pad {pad:?} is as wide as its kernel {kernel:?}"),
                    );
                }
                let shape = match quant.as_ref().and_then(|q| q.winograd) {
                    Some(winograd) => {
                        if (*kernel, *stride) != ([3, 3], [1, 1]) {
                            let why =
                                "Winograd's algorithms are for kernels of 3 × 3 and strides of 1";
                            return invalid(place, format!("{why}, not {kernel:?} and {stride:?}"));
                        }
                        let [h, w] = winograd.kernel();
                        [winograd.filters(n), first.channels(), h, w]
                    }
                    None => [n, first.channels(), kernel[0], kernel[1]],
                };
                self.check_matrix(place, *weight, &shape, quant.as_ref())?;
                self.check_bias(place, *bias, n)
            }
            Op::UpConv2x { weight, bias, quant } => {
                maps_only()?;
                let n = out.channels();
                want("output", out, ValueKind::Map(n))?;
                let filters = up_filters(n);
                let shape = [filters, first.channels(), 2, 2];
                self.check_matrix(place, *weight, &shape, quant.as_ref())?;
                self.check_bias(place, *bias, filters)
            }
            Op::Linear { weight, bias, quant } => {
                let n = out.channels();
                want(
                    "output",
                    out,
                    if map(first) { ValueKind::Map(n) } else { ValueKind::Vector(n) },
                )?;
                if quant.is_some() && !map(first) {
                    return invalid(place, "an int8 linear layer takes a map, this one a vector");
                }
                self.check_matrix(place, *weight, &[n, first.channels()], quant.as_ref())?;
                self.check_bias(place, *bias, n)
            }
            Op::GroupNorm { groups, eps, weight, bias } => {
                maps_only()?;
                want("output", out, first)?;
                if *groups == 0 || !first.channels().is_multiple_of(*groups) {
                    return invalid(
                        place,
                        format!("{groups} groups do not divide {} channels", first.channels()),
                    );
                }
                if !eps.is_finite() || *eps < 0.0 {
                    return invalid(place, format!("eps {eps}"));
                }
                self.check_weight(place, *weight, &[first.channels()], Layout::Plain)?;
                self.check_weight(place, *bias, &[first.channels()], Layout::Plain)
            }
            Op::Silu => want("output", out, first),
            Op::Affine { mul, add } => {
                if !mul.is_finite() || !add.is_finite() {
                    return invalid(place, format!("x * {mul} + {add}"));
                }
                want("output", out, first)
            }
            Op::Upsample2x | Op::AvgPool2x => {
                maps_only()?;
                want("output", out, first)
            }
            Op::Add => {
                maps_only()?;
                want("second input", input(1), first)?;
                want("output", out, first)
            }
            Op::AddChannel | Op::ScaleShift => {
                maps_only()?;
                let parts = if node.op == Op::AddChannel { 1 } else { 2 };
                want(
                    "second input",
                    input(1),
                    ValueKind::Vector(first.channels().saturating_mul(parts)),
                )?;
                want("output", out, first)
            }
            Op::Concat => {
                let mut total = 0u32;
                for i in 0..node.inputs.len() {
                    let ValueKind::Map(c) = input(i) else {
                        return invalid(place, "only maps can be concatenated");
                    };
                    total = total.saturating_add(c);
                }
                want("output", out, ValueKind::Map(total))
            }
            Op::Attention { heads, scale, int8 } => {
                maps_only()?;
                if *heads == 0 || !first.channels().is_multiple_of(*heads) {
                    return invalid(
                        place,
                        format!("{heads} heads do not divide {} channels", first.channels()),
                    );
                }
                if !scale.is_finite() {
                    return invalid(place, format!("scale {scale}"));
                }
                let depth = u64::from(first.channels() / *heads);
                if *int8 && depth > MAX_DEPTH {
                    return invalid(place, too_deep(depth));
                }
                want("keys", input(1), first)?;
                want("values", input(2), first)?;
                want("output", out, first)
            }
            Op::Codebook { table } => {
                maps_only()?;
                want("output", out, first)?;
                let entries = self.weights.get(table.index()).map_or(0, |w| w.shape[0]);
                self.check_weight(place, *table, &[entries, first.channels()], Layout::Plain)
            }
        }
    }

    /// A weight `[n, c, …]` that products are formed with, and what makes it int8.
    fn check_matrix(
        &self,
        place: &str,
        id: WeightId,
        shape: &[u32],
        quant: Option<&Quant>,
    ) -> Result<(), GraphError> {
        let Some(q) = quant else {
            return self.check_stored(
                place,
                id,
                shape,
                Layout::Packed16,
                &[DType::F32, DType::F16],
            );
        };
        if q.winograd.is_some_and(|w| shape.get(2..) != Some(&w.kernel())) {
            return invalid(place, "only a convolution can be a Winograd layer");
        }
        self.check_stored(place, id, shape, Layout::Packed16x4, &[DType::I8])?;
        let plain = Layout::Plain;
        self.check_stored(place, q.weight_scale, &shape[..1], plain, &[DType::F32])?;
        self.check_stored(place, q.weight_sum, &shape[..1], plain, &[DType::I32])?;
        if let Some(scale) = q.input_scale {
            self.check_stored(place, scale, &shape[1..2], plain, &[DType::F32])?;
        }
        // Sums of K products of at most 255 · 128 must stay in 32 bits.
        let depth = shape[1..].iter().fold(1u64, |a, &b| a.saturating_mul(u64::from(b)));
        if depth > MAX_DEPTH {
            return invalid(place, too_deep(depth));
        }
        let each = q.ranges_per_group();
        if q.ranges.is_empty() || q.ranges.len() > MAX_GROUPS * each || q.ranges.len() % each != 0 {
            let (found, most) = (q.ranges.len(), MAX_GROUPS * each);
            return invalid(
                place,
                format!("{found} activation ranges; {each} to {most} are accepted, {each} a group"),
            );
        }
        for r in &q.ranges {
            if !r.scale.is_normal() || r.scale < 0.0 {
                return invalid(place, format!("an activation scale of {}", r.scale));
            }
        }
        if q.winograd == Some(Winograd::Square) {
            for group in q.ranges.chunks_exact(each) {
                let word = group[0];
                if word.zero_point != 0 {
                    return invalid(
                        place,
                        format!("words whose zero point is {}", word.zero_point),
                    );
                }
                let scale = |r: &QuantRange| Winograd::factor(word.scale, r.scale).is_none();
                if let Some(r) = group[1..].iter().find(|r| scale(r)) {
                    let why = format!("of words of scale {} no bytes of {}", word.scale, r.scale);
                    return invalid(place, format!("{why} can be made: they are too far apart"));
                }
            }
        }
        Ok(())
    }

    fn check_weight(
        &self,
        place: &str,
        id: WeightId,
        shape: &[u32],
        layout: Layout,
    ) -> Result<(), GraphError> {
        self.check_stored(place, id, shape, layout, &[DType::F32])
    }

    fn check_stored(
        &self,
        place: &str,
        id: WeightId,
        shape: &[u32],
        layout: Layout,
        dtypes: &[DType],
    ) -> Result<(), GraphError> {
        let Some(w) = self.weights.get(id.index()) else {
            return invalid(place, format!("weight {} does not exist", id.0));
        };
        if w.shape != shape {
            return invalid(
                place,
                format!("{} has shape {:?}, expected {shape:?}", w.name, w.shape),
            );
        }
        if w.layout != layout {
            return invalid(
                place,
                format!("{} lies as {:?}, expected {layout:?}", w.name, w.layout),
            );
        }
        if !dtypes.contains(&w.dtype) {
            let names: Vec<_> = dtypes.iter().map(|d| d.name()).collect();
            return invalid(
                place,
                format!("{} is {}, expected {}", w.name, w.dtype, names.join(" or ")),
            );
        }
        Ok(())
    }

    fn check_bias(&self, place: &str, bias: Option<WeightId>, n: u32) -> Result<(), GraphError> {
        bias.map_or(Ok(()), |b| self.check_weight(place, b, &[n], Layout::Plain))
    }
}

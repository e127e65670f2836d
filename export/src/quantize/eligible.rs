//! Which layers of a component can be int8.
//!
//! Lives here: the rules that follow from the graph alone. What the table and the user say comes after, in the
//! parent module.

use crate::ExportError;
use crate::model::Component;
use latile_runtime::graph::{Graph, Node, Op, Port, ValueKind, WeightId};
use latile_runtime::tensor::Shape;
use std::collections::BTreeMap;

/// Most products in an int8 layer's sum that stay exact in 32 bits (docs/format.md).
const MAX_DEPTH: u64 = 65_536;

/// A layer that products with weights are formed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Matrix {
    /// Its weight.
    pub(super) weight: WeightId,
    /// Its bias.
    pub(super) bias: Option<WeightId>,
    /// Rows of the weight: output channels, or filters where the operator has several for each
    /// ([`up_filters`](latile_runtime::graph::up_filters)).
    pub(super) outputs: usize,
    /// Input channels.
    pub(super) inputs: usize,
    /// Positions of its window.
    pub(super) window: usize,
}

/// The matrix of a convolution, or of a linear layer over a map.
pub(super) fn matrix(graph: &Graph, node: &Node) -> Option<Matrix> {
    let (weight, bias, _) = node.op.matrix()?;
    if !matches!(graph.kind(node.output), ValueKind::Map(_)) {
        return None;
    }
    let shape: Vec<usize> = graph.weight(weight).shape.iter().map(|&d| d as usize).collect();
    let (outputs, inputs) = (shape[0], shape[1]);
    Some(Matrix { weight, bias, outputs, inputs, window: shape[2..].iter().product() })
}

/// The shapes of a component's values where its input maps are squares of `side`.
///
/// # Errors
/// A graph whose shapes cannot be told.
pub(super) fn shapes(component: &Component, side: usize) -> Result<Vec<Shape>, ExportError> {
    let graph = &component.graph;
    let maps = |p: &&Port| matches!(graph.kind(p.value), ValueKind::Map(_));
    let maps = graph.inputs.iter().filter(maps).count();
    graph.infer(&vec![(side, side); maps]).map_err(|e| ExportError::Quantize {
        layer: component.role.name().to_owned(),
        why: e.to_string(),
    })
}

/// Why the graph forbids a layer to be int8, by the index of its node; layers without a reason can be.
pub(super) fn refused(graph: &Graph) -> BTreeMap<usize, &'static str> {
    let (first, last) = ends(graph);
    let mut readers: BTreeMap<WeightId, usize> = BTreeMap::new();
    for id in graph.nodes.iter().flat_map(|n| n.op.weights()) {
        *readers.entry(id).or_default() += 1;
    }
    let mut out = BTreeMap::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let Some(m) = matrix(graph, node) else { continue };
        let shared = |id: WeightId| readers.get(&id).is_some_and(|&n| n > 1);
        if first[i] {
            out.insert(i, "it reads the component's input");
        } else if last[i] {
            out.insert(i, "it makes the component's output");
        } else if (m.inputs as u64).saturating_mul(m.window as u64) > MAX_DEPTH {
            out.insert(i, "its sums are too long for 32 bits");
        } else if shared(m.weight) || m.bias.is_some_and(shared) {
            out.insert(i, "it shares its weights with another layer");
        }
    }
    out
}

/// For each node whether it is a first layer, all it reads being a linear function of the component's inputs (a
/// codebook's lookup counts as one), and whether it is a last one, the component's outputs being a
/// linear function of its result and nothing else reading that. There every error shows, and the integers
/// would save next to nothing: such layers are thin.
fn ends(graph: &Graph) -> (Vec<bool>, Vec<bool>) {
    let linear = |op: &Op| {
        !matches!(
            op,
            Op::GroupNorm { .. }
                | Op::Silu
                | Op::Attention { .. }
                | Op::ScaleShift
                | Op::AddChannel
        )
    };
    let mut from_input = vec![false; graph.values.len()];
    graph.inputs.iter().for_each(|p| from_input[p.value.index()] = true);
    let mut first = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let raw = node.inputs.iter().all(|v| from_input[v.index()]);
        from_input[node.output.index()] = raw && linear(&node.op);
        first.push(raw);
    }
    // A value is final where each of its readers passes it on to the output linearly.
    let mut is_final = vec![true; graph.values.len()];
    let mut read = vec![false; graph.values.len()];
    graph.outputs.iter().for_each(|p| read[p.value.index()] = true);
    let mut last = vec![false; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate().rev() {
        let out = node.output.index();
        last[i] = read[out] && is_final[out];
        for v in &node.inputs {
            is_final[v.index()] &= last[i] && linear(&node.op);
            read[v.index()] = true;
        }
    }
    (first, last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{AutoencoderArch, UnetArch};
    use crate::diffusers::DiffusersFolder;
    use latile_runtime::tensor::DType;
    use std::path::Path;

    fn folder(name: &str) -> (UnetArch, AutoencoderArch) {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name);
        let folder = DiffusersFolder::open(&path).unwrap();
        (folder.unet.0, folder.autoencoder.0.arch)
    }

    fn kept(graph: &Graph) -> Vec<(&str, &'static str)> {
        refused(graph).into_iter().map(|(i, why)| (graph.nodes[i].name.as_str(), why)).collect()
    }

    #[test]
    fn the_ends_of_each_component_stay_float() {
        let (reads, makes) = ("it reads the component's input", "it makes the component's output");
        let (unet, autoencoder) = folder("sr");
        assert_eq!(
            kept(&crate::build::unet(&unet, DType::F16)),
            [("conv_in", reads), ("conv_out", makes)]
        );
        assert_eq!(
            kept(&crate::build::decoder(&autoencoder, DType::F16)),
            [("post_quant_conv", reads), ("decoder.conv_in", reads), ("decoder.conv_out", makes)]
        );
        assert_eq!(
            kept(&crate::build::encoder(&autoencoder, DType::F16)),
            [("encoder.conv_in", reads), ("encoder.conv_out", makes), ("quant_conv", makes)]
        );
    }

    #[test]
    fn vectors_and_shared_or_deep_weights_are_not_for_int8() {
        let (unet, _) = folder("sr");
        let mut graph = crate::build::unet(&unet, DType::F16);
        let of = |graph: &Graph, name: &str| {
            let node = graph.nodes.iter().find(|n| n.name == name).unwrap();
            matrix(graph, node)
        };
        assert_eq!(of(&graph, "time_embedding.linear_1"), None);
        let conv1 = of(&graph, "down_blocks.0.resnets.0.conv1").unwrap();
        assert_eq!((conv1.outputs, conv1.inputs, conv1.window), (8, 8, 9));
        for node in &mut graph.nodes {
            if node.name == "down_blocks.0.resnets.1.conv1"
                && let Op::Conv2d { weight, .. } = &mut node.op
            {
                *weight = conv1.weight;
            }
        }
        let shared = "it shares its weights with another layer";
        let found = kept(&graph);
        assert!(found.contains(&("down_blocks.0.resnets.0.conv1", shared)), "{found:?}");
        assert!(found.contains(&("down_blocks.0.resnets.1.conv1", shared)), "{found:?}");
        let i = conv1.weight.index();
        graph.weights[i].shape = vec![8, 7282, 3, 3];
        assert!(
            kept(&graph)
                .contains(&("down_blocks.0.resnets.0.conv1", "its sums are too long for 32 bits"))
        );
    }
}

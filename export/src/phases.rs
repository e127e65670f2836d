//! Nearest-neighbour upsampling and the 3 × 3 convolution after it, in one operator of 4/9 of the work.
//!
//! Lives here: the pass over a built graph that finds such pairs and makes them [`Op::UpConv2x`], and what then becomes
//! of their weights. Never here: which importer a graph comes from, or how weights are packed.
//!
//! Upsampled by two, row r of a map is row ⌊r / 2⌋. The window around output row 2y + p has rows 2y + p − 1 to
//! 2y + p + 1, which are rows y − 1, y, y of the map for p = 0 and y, y, y + 1 for p = 1, padding included: two
//! different rows each. A convolution being linear, weights that meet the same row are added up (in f64, before anything
//! is rounded), so that of w₀ w₁ w₂ remain w₀, w₁ + w₂ for even rows and w₀ + w₁, w₂ for odd ones; columns likewise.

use crate::model::Component;
use crate::tensors::Part;
use latile_runtime::graph::{Graph, Op, Pad, ValueId, WeightId, up_filters};
use std::collections::BTreeMap;

/// Side of the window that is folded.
const SIDE: usize = 3;
/// Side of a phase's window.
const FOLDED: usize = 2;

/// Folds every upsampling by two into the 3 × 3 convolutions that read it.
pub(crate) fn fold(component: &mut Component) {
    let graph = &mut component.graph;
    let mut readers: BTreeMap<WeightId, usize> = BTreeMap::new();
    for id in graph.nodes.iter().flat_map(|n| n.op.weights()) {
        *readers.entry(id).or_default() += 1;
    }
    // The map before each upsampled one.
    let small: BTreeMap<ValueId, ValueId> = graph
        .nodes
        .iter()
        .filter(|n| n.op == Op::Upsample2x)
        .map(|n| (n.output, n.inputs[0]))
        .collect();
    for node in &mut graph.nodes {
        let Op::Conv2d { weight, bias, kernel, stride, pad, quant: None } = node.op else {
            continue;
        };
        let Some(&input) = small.get(&node.inputs[0]) else { continue };
        let own = |id: WeightId| {
            readers.get(&id) == Some(&1) && component.recipes[id.index()].part == Part::Whole
        };
        if kernel != [SIDE as u32; 2]
            || stride != [1, 1]
            || pad != Pad::all(1)
            || !own(weight)
            || !bias.is_none_or(own)
        {
            continue;
        }
        let spec = &mut graph.weights[weight.index()];
        let filters = up_filters(spec.shape[0]);
        spec.shape = vec![filters, spec.shape[1], FOLDED as u32, FOLDED as u32];
        component.recipes[weight.index()].part = Part::Folded;
        if let Some(bias) = bias {
            graph.weights[bias.index()].shape = vec![filters];
            component.recipes[bias.index()].part = Part::Repeated;
        }
        node.op = Op::UpConv2x { weight, bias, quant: None };
        node.inputs[0] = input;
    }
    drop_unread(graph);
}

/// Takes upsampling that nothing reads any more out of the graph, and its results out of the list of values.
fn drop_unread(graph: &mut Graph) {
    let mut read = vec![false; graph.values.len()];
    graph.outputs.iter().for_each(|p| read[p.value.index()] = true);
    for node in graph.nodes.iter().rev() {
        if node.op != Op::Upsample2x || read[node.output.index()] {
            node.inputs.iter().for_each(|v| read[v.index()] = true);
        }
    }
    let gone: Vec<ValueId> = graph
        .nodes
        .iter()
        .filter(|n| n.op == Op::Upsample2x && !read[n.output.index()])
        .map(|n| n.output)
        .collect();
    graph.nodes.retain(|n| !gone.contains(&n.output));
    let moved = |v: &mut ValueId| v.0 -= gone.iter().filter(|g| **g < *v).count() as u32;
    for node in &mut graph.nodes {
        node.inputs.iter_mut().for_each(moved);
        moved(&mut node.output);
    }
    graph.inputs.iter_mut().chain(&mut graph.outputs).for_each(|p| moved(&mut p.value));
    let mut index = 0;
    graph.values.retain(|_| {
        index += 1;
        !gone.contains(&ValueId(index - 1))
    });
}

/// Replaces the weights `[n, c, 3, 3]` by those of the four phases, `[4 · m, c, 2, 2]` for m = n rounded up to a
/// multiple of 16; filters beyond n are zero.
pub(crate) fn weights(values: &mut Vec<f32>, channels: usize) {
    let stored = std::mem::take(values);
    let row = channels * SIDE * SIDE;
    let n = stored.len() / row.max(1);
    let filters = up_filters(n as u32) as usize / 4;
    values.reserve_exact(4 * filters * channels * FOLDED * FOLDED);
    for [py, px] in [[0, 0], [0, 1], [1, 0], [1, 1]] {
        for window in stored.chunks_exact(SIDE * SIDE) {
            for [ky, kx] in [[0, 0], [0, 1], [1, 0], [1, 1]] {
                let mut sum = 0f64;
                for y in met(py, ky) {
                    for x in met(px, kx) {
                        sum += f64::from(window[y * SIDE + x]);
                    }
                }
                values.push(sum as f32);
            }
        }
        values.resize(values.len() + (filters - n) * channels * FOLDED * FOLDED, 0.0);
    }
}

/// The rows (or columns) of the 3 × 3 window that meet row `k` of the 2 × 2 one of phase `p`.
const fn met(p: usize, k: usize) -> std::ops::Range<usize> {
    match (p, k) {
        (0, 0) => 0..1,
        (0, _) => 1..3,
        (_, 0) => 0..2,
        _ => 2..3,
    }
}

/// Replaces a bias `[n]` by that of the four phases.
pub(crate) fn biases(values: &mut Vec<f32>) {
    let stored = std::mem::take(values);
    let filters = up_filters(stored.len() as u32) as usize / 4;
    for phase in 1..=4 {
        values.extend_from_slice(&stored);
        values.resize(phase * filters, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::Recipe;
    use latile_runtime::format::Role;
    use latile_runtime::graph::{Layout, Node, Port, ValueKind, WeightSpec};
    use latile_runtime::tensor::DType;

    /// A component of 3 × 3 convolutions 5 → 5 (weight 2i, bias 2i + 1) and upsamplings: operators with their input
    /// and output values.
    fn component(nodes: &[(Op, u32, u32)], output: u32, layers: usize) -> Component {
        let spec = |name: String, shape: &[u32], layout| WeightSpec {
            name,
            shape: shape.to_vec(),
            dtype: DType::F32,
            layout,
        };
        let weights: Vec<WeightSpec> = (0..layers)
            .flat_map(|i| {
                [
                    spec(format!("{i}.weight"), &[5, 5, 3, 3], Layout::Packed16),
                    spec(format!("{i}.bias"), &[5], Layout::Plain),
                ]
            })
            .collect();
        let recipe =
            |w: &WeightSpec| Recipe { source: 0, tensor: w.name.clone(), part: Part::Whole };
        let recipes = weights.iter().map(recipe).collect();
        let port = |v| vec![Port { name: "x".into(), value: ValueId(v) }];
        let count = nodes.iter().map(|n| n.2).max().unwrap_or(0) as usize + 1;
        let nodes = nodes.iter().enumerate().map(|(i, (op, from, to))| Node {
            name: format!("node {i}"),
            op: op.clone(),
            inputs: vec![ValueId(*from)],
            output: ValueId(*to),
        });
        let graph = Graph {
            inputs: port(0),
            outputs: port(output),
            values: vec![ValueKind::Map(5); count],
            weights,
            nodes: nodes.collect(),
        };
        graph.validate().unwrap();
        Component { role: Role::Decoder, multiple: 1, timestep: None, graph, recipes }
    }

    fn conv(layer: u32) -> Op {
        Op::Conv2d {
            weight: WeightId(2 * layer),
            bias: Some(WeightId(2 * layer + 1)),
            kernel: [3, 3],
            stride: [1, 1],
            pad: Pad::all(1),
            quant: None,
        }
    }

    fn names(c: &Component) -> Vec<&'static str> {
        c.graph.validate().unwrap();
        c.graph.nodes.iter().map(|n| n.op.name()).collect()
    }

    #[test]
    fn a_pair_becomes_one_operator_and_its_value_goes() {
        let chain = [
            (conv(0), 0, 1),
            (Op::Upsample2x, 1, 2),
            (conv(1), 2, 3),
            (Op::Silu, 3, 4),
            (Op::Upsample2x, 4, 5),
            (conv(2), 5, 6),
        ];
        let mut c = component(&chain, 6, 3);
        let before = c.graph.infer(&[(4, 7)]).unwrap();
        fold(&mut c);
        assert_eq!(names(&c), ["conv2d", "up_conv2x", "silu", "up_conv2x"]);
        assert_eq!(c.graph.values.len(), 5);
        assert_eq!(c.graph.outputs[0].value, ValueId(4));
        assert_eq!(c.graph.infer(&[(4, 7)]).unwrap()[4], before[6]);
        assert_eq!(c.graph.weights[2].shape, [64, 5, 2, 2]);
        assert_eq!(c.graph.weights[3].shape, [64]);
        let parts: Vec<_> = c.recipes.iter().map(|r| r.part.clone()).collect();
        let (f, r) = (Part::Folded, Part::Repeated);
        assert_eq!(parts, [Part::Whole, Part::Whole, f.clone(), r.clone(), f, r]);
        let again = c.graph.clone();
        fold(&mut c);
        assert_eq!(c.graph, again);
    }

    #[test]
    fn what_others_read_stays() {
        // Two convolutions and SiLU read one upsampled map; the second's weight is another's too.
        let up = (Op::Upsample2x, 0, 1);
        let nodes =
            [up.clone(), (conv(0), 1, 2), (conv(1), 1, 3), (Op::Silu, 1, 4), (conv(1), 4, 5)];
        let mut c = component(&nodes, 5, 2);
        fold(&mut c);
        assert_eq!(names(&c), ["upsample2x", "up_conv2x", "conv2d", "silu", "conv2d"]);
        assert_eq!(c.graph.nodes[1].inputs, [ValueId(0)]);
        // An output of the graph.
        let mut c = component(&[up.clone(), (conv(0), 1, 2)], 1, 1);
        fold(&mut c);
        assert_eq!(names(&c), ["upsample2x", "up_conv2x"]);
        // Other windows.
        let other = |change: &dyn Fn(&mut [u32; 2], &mut Pad)| {
            let mut op = conv(0);
            if let Op::Conv2d { stride, pad, .. } = &mut op {
                change(stride, pad);
            }
            let mut c = component(&[up.clone(), (op, 1, 2)], 2, 1);
            let before = c.graph.clone();
            fold(&mut c);
            c.graph == before
        };
        assert!(other(&|stride, _| *stride = [2, 1]));
        assert!(other(&|_, pad| pad.left = 0));
        assert!(!other(&|_, _| ()));
    }

    #[test]
    fn weights_that_meet_the_same_pixel_are_added() {
        // Two output channels of three input channels; sums of powers of two show what is in them.
        let mut values: Vec<f32> = (0..6 * 9).map(|i| f32::exp2((i % 9) as f32)).collect();
        values.iter_mut().skip(27).for_each(|v| *v *= 1000.0);
        weights(&mut values, 3);
        assert_eq!(values.len(), 64 * 3 * 4);
        let filter = |phase: usize, o: usize| &values[(phase * 16 + o) * 12..][..12];
        // Bits of a window: 1 2 4 / 8 16 32 / 64 128 256.
        let phases = [
            [1.0, 6.0, 8.0 + 64.0, 16.0 + 32.0 + 128.0 + 256.0],
            [3.0, 4.0, 8.0 + 16.0 + 64.0 + 128.0, 32.0 + 256.0],
            [1.0 + 8.0, 2.0 + 4.0 + 16.0 + 32.0, 64.0, 128.0 + 256.0],
            [1.0 + 2.0 + 8.0 + 16.0, 4.0 + 32.0, 64.0 + 128.0, 256.0],
        ];
        for (phase, expected) in phases.iter().enumerate() {
            for c in 0..3 {
                assert_eq!(filter(phase, 0)[4 * c..][..4], *expected);
                assert_eq!(filter(phase, 1)[4 * c..][..4], expected.map(|v| v * 1000.0));
            }
            assert!((2..16).all(|o| filter(phase, o).iter().all(|&v| v == 0.0)));
        }
        let mut bias = vec![1.0, 2.0];
        biases(&mut bias);
        assert_eq!(bias.len(), 64);
        assert!(bias.chunks(16).all(|b| b[..2] == [1.0, 2.0] && b[2..] == [0.0; 14]));
        // Summed before they are rounded.
        let mut fine = vec![0.0; 16 * 9];
        (fine[1], fine[2]) = (1.0, f32::EPSILON / 4.0);
        (fine[4], fine[5]) = (-1.0, 0.0);
        weights(&mut fine, 1);
        assert_eq!(fine[2 * 16 * 4 + 1], f32::EPSILON / 4.0);
    }
}

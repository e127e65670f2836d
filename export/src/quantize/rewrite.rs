//! A component's graph with int8 layers in it, and what each of its weights is made of.

use super::weights::Quantized;
use super::{AttentionSummary, Layer, LayerSummary, estimate};
use crate::model::Component;
use crate::tensors::Recipe;
use latile_runtime::format::{Role, TimestepProjection};
use latile_runtime::graph::{Graph, Layout, Op, Quant, WeightId, WeightSpec};
use latile_runtime::tensor::DType;
use std::collections::BTreeMap;

/// What a weight of the file is.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    /// A tensor of the checkpoint.
    Tensor(Recipe),
    /// The integers of int8 layer `.0`: the first of its parts.
    Weight(usize),
    /// What one step of them is worth.
    Scale,
    /// Their sums.
    Sum,
    /// What its input is multiplied by.
    InputScale,
    /// Its bias, corrected: the checkpoint's, or none.
    Bias(Option<Recipe>),
}

/// A component as it will be written.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) role: Role,
    pub(crate) multiple: u32,
    pub(crate) timestep: Option<TimestepProjection>,
    pub(crate) timestep_groups: Vec<u32>,
    pub(crate) graph: Graph,
    /// One for each of `graph.weights`.
    pub(crate) items: Vec<Item>,
    layers: Vec<Layer>,
    /// All layers with a matrix, where the model is quantized.
    pub(crate) summaries: Vec<LayerSummary>,
    /// Its attentions, where the model is quantized.
    pub(crate) attentions: Vec<AttentionSummary>,
}

impl Planned {
    /// As the component is.
    pub(crate) fn float(c: Component, summaries: Vec<LayerSummary>) -> Self {
        Self {
            role: c.role,
            multiple: c.multiple,
            timestep: c.timestep,
            timestep_groups: Vec::new(),
            graph: c.graph,
            items: c.recipes.into_iter().map(Item::Tensor).collect(),
            layers: Vec::new(),
            summaries,
            attentions: Vec::new(),
        }
    }

    /// The layer of [`Item::Weight`].
    pub(crate) fn layer(&self, index: usize) -> &Layer {
        &self.layers[index]
    }

    /// Records what layer `index` loses.
    pub(crate) fn examined(&mut self, index: usize, quantized: &Quantized) {
        let layer = &self.layers[index];
        if let Some(s) = self.summaries.iter_mut().find(|s| s.layer == layer.name) {
            estimate::estimate(layer, &quantized.power).put(s);
        }
    }
}

/// Makes `layers` of component `c` int8. The parts of a layer follow its weight, the bias last, so that they can
/// be written as they are found.
pub(super) fn rewrite(
    c: Component,
    layers: Vec<Layer>,
    groups: Vec<u32>,
    summaries: Vec<LayerSummary>,
) -> Planned {
    if layers.is_empty() {
        return Planned::float(c, summaries);
    }
    let Component { role, multiple, timestep, mut graph, recipes } = c;
    let by_weight: BTreeMap<WeightId, usize> =
        layers.iter().enumerate().map(|(i, l)| (l.matrix.weight, i)).collect();
    let moved: Vec<WeightId> = layers.iter().filter_map(|l| l.matrix.bias).collect();
    let mut list = List::default();
    let mut place: BTreeMap<WeightId, WeightId> = BTreeMap::new();
    let mut parts: Vec<Option<Parts>> = vec![None; layers.len()];
    for (i, (spec, recipe)) in graph.weights.iter().zip(&recipes).enumerate() {
        let old = WeightId(i as u32);
        if moved.contains(&old) {
            continue;
        }
        let Some(&index) = by_weight.get(&old) else {
            place.insert(old, list.push(spec.clone(), Item::Tensor(recipe.clone())));
            continue;
        };
        let layer = &layers[index];
        let plain = |part: &str, len: usize, dtype| WeightSpec {
            name: format!("{}.{part}", layer.name),
            shape: vec![len as u32],
            dtype,
            layout: Layout::Plain,
        };
        let (n, channels) = (layer.matrix.outputs, layer.matrix.inputs);
        let shape = layer.shape();
        let rows = shape[0] as usize;
        let (dtype, layout) = (DType::I8, Layout::Packed16x4);
        let integers = WeightSpec { shape, dtype, layout, ..spec.clone() };
        place.insert(old, list.push(integers, Item::Weight(index)));
        let weight_scale = list.push(plain("weight_scale", rows, DType::F32), Item::Scale);
        let weight_sum = list.push(plain("weight_sum", rows, DType::I32), Item::Sum);
        let input_scale = layer
            .input
            .scale
            .is_some()
            .then(|| list.push(plain("input_scale", channels, DType::F32), Item::InputScale));
        let bias = match layer.matrix.bias {
            Some(id) => {
                let (spec, recipe) = (&graph.weights[id.index()], &recipes[id.index()]);
                Some(list.push(spec.clone(), Item::Bias(Some(recipe.clone()))))
            }
            None if layer.input.has_mean() => {
                Some(list.push(plain("bias", n, DType::F32), Item::Bias(None)))
            }
            None => None,
        };
        parts[index] = Some(Parts { weight_scale, weight_sum, input_scale, bias });
    }
    // Invariant: every weight is either in its place or the bias of a layer, whose weight is.
    let new = |id: WeightId| place[&id];
    let by_node: BTreeMap<usize, usize> =
        layers.iter().enumerate().map(|(i, l)| (l.node, i)).collect();
    for (i, node) in graph.nodes.iter_mut().enumerate() {
        if let Some(&index) = by_node.get(&i)
            && let Some(p) = parts[index]
            && let Some((weight, bias, quant)) = node.op.matrix_mut()
        {
            *weight = new(*weight);
            *bias = p.bias;
            *quant = Some(Quant {
                ranges: layers[index].stored_ranges(),
                weight_scale: p.weight_scale,
                weight_sum: p.weight_sum,
                input_scale: p.input_scale,
                winograd: layers[index].winograd(),
            });
        } else {
            renumber(&mut node.op, new);
        }
    }
    graph.weights = list.specs;
    Planned {
        role,
        multiple,
        timestep,
        timestep_groups: groups,
        graph,
        items: list.items,
        layers,
        summaries,
        attentions: Vec::new(),
    }
}

/// Where the parts of an int8 layer are.
#[derive(Clone, Copy)]
struct Parts {
    weight_scale: WeightId,
    weight_sum: WeightId,
    input_scale: Option<WeightId>,
    bias: Option<WeightId>,
}

/// Weights in the order of the file.
#[derive(Default)]
struct List {
    specs: Vec<WeightSpec>,
    items: Vec<Item>,
}

impl List {
    fn push(&mut self, spec: WeightSpec, item: Item) -> WeightId {
        // At most six times the weights of a graph, of which `validate` accepts 100,000.
        let id = WeightId(self.specs.len() as u32);
        self.specs.push(spec);
        self.items.push(item);
        id
    }
}

/// Gives the weights that `op` reads their new numbers.
fn renumber(op: &mut Op, new: impl Fn(WeightId) -> WeightId) {
    if let Some((weight, bias, _)) = op.matrix_mut() {
        *weight = new(*weight);
        *bias = bias.map(new);
        return;
    }
    match op {
        Op::GroupNorm { weight, bias, .. } => {
            *weight = new(*weight);
            *bias = new(*bias);
        }
        Op::Codebook { table } => *table = new(*table),
        Op::Conv2d { .. }
        | Op::UpConv2x { .. }
        | Op::Linear { .. }
        | Op::Silu
        | Op::Add
        | Op::AddChannel
        | Op::ScaleShift
        | Op::Concat
        | Op::Upsample2x
        | Op::AvgPool2x
        | Op::Attention { .. }
        | Op::Affine { .. } => {}
    }
}

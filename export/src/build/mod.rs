//! From a description of the networks to primitive operators.
//!
//! Lives here: one graph builder a network, over shared blocks. Nodes stand in execution order, weights in the
//! order in which nodes first read them, under diffusers' names: the same description always gives the same
//! graph. Never here: where weights come from, or how operators are fused.

mod autoencoder;
mod blocks;
mod unet;

pub use autoencoder::{decoder, encoder};
pub use unet::unet;

use latile_runtime::graph::{
    Graph, Layout, Node, Op, Pad, Port, ValueId, ValueKind, WeightId, WeightSpec,
};
use latile_runtime::tensor::DType;

/// Collects nodes, values and weights.
#[derive(Debug)]
pub(crate) struct Builder {
    graph: Graph,
    /// Element type of packed weights.
    packed: DType,
}

impl Builder {
    pub(crate) fn new(packed: DType) -> Self {
        let graph = Graph {
            inputs: Vec::new(),
            outputs: Vec::new(),
            values: Vec::new(),
            weights: Vec::new(),
            nodes: Vec::new(),
        };
        Self { graph, packed }
    }

    pub(crate) fn input(&mut self, name: &str, kind: ValueKind) -> ValueId {
        let value = self.value(kind);
        self.graph.inputs.push(Port { name: name.to_owned(), value });
        value
    }

    pub(crate) fn finish(mut self, name: &str, value: ValueId) -> Graph {
        self.graph.outputs.push(Port { name: name.to_owned(), value });
        self.graph
    }

    fn value(&mut self, kind: ValueKind) -> ValueId {
        // Graphs have thousands of values at most: levels and layers are bounded.
        let id = ValueId(self.graph.values.len() as u32);
        self.graph.values.push(kind);
        id
    }

    pub(crate) fn kind(&self, value: ValueId) -> ValueKind {
        self.graph.kind(value)
    }

    /// Channels of a map or elements of a vector.
    pub(crate) fn channels(&self, value: ValueId) -> u32 {
        self.graph.kind(value).channels()
    }

    pub(crate) fn weight(&mut self, name: String, shape: &[u32], layout: Layout) -> WeightId {
        let id = WeightId(self.graph.weights.len() as u32);
        let dtype = match layout {
            Layout::Packed16 => self.packed,
            Layout::Plain => DType::F32,
            Layout::Packed16x4 => DType::I8,
        };
        self.graph.weights.push(WeightSpec { name, shape: shape.to_vec(), dtype, layout });
        id
    }

    /// Adds a node whose output has the given kind.
    pub(crate) fn node(
        &mut self,
        name: &str,
        op: Op,
        inputs: &[ValueId],
        kind: ValueKind,
    ) -> ValueId {
        let output = self.value(kind);
        self.graph.nodes.push(Node { name: name.to_owned(), op, inputs: inputs.to_vec(), output });
        output
    }

    /// A convolution with a bias, `kernel` by `kernel`.
    pub(crate) fn conv(
        &mut self,
        name: &str,
        x: ValueId,
        n: u32,
        kernel: u32,
        stride: u32,
        pad: Pad,
    ) -> ValueId {
        let shape = [n, self.channels(x), kernel, kernel];
        let weight = self.weight(format!("{name}.weight"), &shape, Layout::Packed16);
        let bias = Some(self.weight(format!("{name}.bias"), &[n], Layout::Plain));
        let op =
            Op::Conv2d { weight, bias, kernel: [kernel; 2], stride: [stride; 2], pad, quant: None };
        self.node(name, op, &[x], ValueKind::Map(n))
    }

    /// A 3 × 3 convolution that keeps the map's size.
    pub(crate) fn conv3(&mut self, name: &str, x: ValueId, n: u32) -> ValueId {
        self.conv(name, x, n, 3, 1, Pad::all(1))
    }

    /// A 1 × 1 convolution.
    pub(crate) fn conv1(&mut self, name: &str, x: ValueId, n: u32) -> ValueId {
        self.conv(name, x, n, 1, 1, Pad::all(0))
    }

    pub(crate) fn linear(&mut self, name: &str, x: ValueId, n: u32) -> ValueId {
        let shape = [n, self.channels(x)];
        let weight = self.weight(format!("{name}.weight"), &shape, Layout::Packed16);
        let bias = Some(self.weight(format!("{name}.bias"), &[n], Layout::Plain));
        let kind = match self.kind(x) {
            ValueKind::Map(_) => ValueKind::Map(n),
            ValueKind::Vector(_) => ValueKind::Vector(n),
        };
        self.node(name, Op::Linear { weight, bias, quant: None }, &[x], kind)
    }

    pub(crate) fn norm(&mut self, name: &str, x: ValueId, norm: crate::arch::Norm) -> ValueId {
        let c = self.channels(x);
        let weight = self.weight(format!("{name}.weight"), &[c], Layout::Plain);
        let bias = self.weight(format!("{name}.bias"), &[c], Layout::Plain);
        let op = Op::GroupNorm { groups: norm.groups, eps: norm.eps, weight, bias };
        self.node(name, op, &[x], ValueKind::Map(c))
    }

    pub(crate) fn silu(&mut self, name: &str, x: ValueId) -> ValueId {
        self.node(name, Op::Silu, &[x], self.kind(x))
    }

    pub(crate) fn add(&mut self, name: &str, a: ValueId, b: ValueId) -> ValueId {
        self.node(name, Op::Add, &[a, b], self.kind(a))
    }

    /// Divides by `divisor`, unless that is one.
    pub(crate) fn divide(&mut self, name: &str, x: ValueId, divisor: f32) -> ValueId {
        if divisor == 1.0 {
            return x;
        }
        self.node(name, Op::Affine { mul: 1.0 / divisor, add: 0.0 }, &[x], self.kind(x))
    }

    pub(crate) fn codebook(&mut self, name: &str, x: ValueId, entries: u32) -> ValueId {
        let table =
            self.weight(format!("{name}.weight"), &[entries, self.channels(x)], Layout::Plain);
        self.node(name, Op::Codebook { table }, &[x], self.kind(x))
    }
}

//! Small networks with random weights, built in memory, written by the runtime's own writer.
#![allow(dead_code, clippy::unwrap_used)]

use half::f16;
use latile_runtime::format::{Defaults, Manifest, Metadata, Model, Precision, Role, Task, Writer};
use latile_runtime::graph::{
    Graph, Layout, Node, Op, Pad, Port, ValueId, ValueKind, WeightId, WeightSpec,
};
use latile_runtime::tensor::DType;
use std::io::{Cursor, Write};

/// splitmix64: the same numbers on every machine.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        ((self.bits() >> 40) as f32 + 0.5) / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub(crate) fn vector(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}

/// A network under construction.
pub(crate) struct Net {
    pub(crate) graph: Graph,
    weights: Vec<Vec<u8>>,
    pub(crate) random: Random,
    dtype: DType,
}

impl Net {
    pub(crate) fn new(dtype: DType, seed: u64) -> Self {
        Self {
            graph: Graph {
                inputs: Vec::new(),
                outputs: Vec::new(),
                values: Vec::new(),
                weights: Vec::new(),
                nodes: Vec::new(),
            },
            weights: Vec::new(),
            random: Random(seed),
            dtype,
        }
    }

    fn value(&mut self, kind: ValueKind) -> ValueId {
        self.graph.values.push(kind);
        ValueId(self.graph.values.len() as u32 - 1)
    }

    fn input(&mut self, name: &str, kind: ValueKind) -> ValueId {
        let value = self.value(kind);
        let name = name.to_owned();
        self.graph.inputs.push(Port { name, value });
        value
    }

    pub(crate) fn map(&mut self, name: &str, c: u32) -> ValueId {
        self.input(name, ValueKind::Map(c))
    }

    pub(crate) fn vector(&mut self, name: &str, len: u32) -> ValueId {
        self.input(name, ValueKind::Vector(len))
    }

    pub(crate) fn output(&mut self, name: &str, value: ValueId) {
        let name = name.to_owned();
        self.graph.outputs.push(Port { name, value });
    }

    pub(crate) fn channels(&self, v: ValueId) -> u32 {
        self.graph.kind(v).channels()
    }

    fn node(&mut self, op: Op, inputs: &[ValueId], kind: ValueKind) -> ValueId {
        let output = self.value(kind);
        self.graph.nodes.push(Node {
            name: format!("{}.{}", op.name(), self.graph.nodes.len()),
            op,
            inputs: inputs.to_vec(),
            output,
        });
        output
    }

    fn weight(&mut self, shape: &[u32], layout: Layout, values: &[f32]) -> WeightId {
        let dtype = if layout == Layout::Packed16 { self.dtype } else { DType::F32 };
        let spec = WeightSpec {
            name: format!("w{}", self.graph.weights.len()),
            shape: shape.to_vec(),
            dtype,
            layout,
        };
        let stored = if layout == Layout::Packed16 {
            let dim = |i: usize| shape.get(i).map_or(1, |&d| d as usize);
            let (n, c, taps) = (dim(0), dim(1), dim(2) * dim(3));
            let mut packed = vec![0.0; n.div_ceil(16) * 16 * c * taps];
            for o in 0..n {
                for i in 0..c {
                    for t in 0..taps {
                        packed[((o / 16 * taps + t) * c + i) * 16 + o % 16] =
                            values[(o * c + i) * taps + t];
                    }
                }
            }
            packed
        } else {
            values.to_vec()
        };
        self.weights.push(match dtype {
            DType::F32 => stored.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => stored.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        });
        self.graph.weights.push(spec);
        WeightId(self.graph.weights.len() as u32 - 1)
    }

    fn random_weight(&mut self, shape: &[u32], layout: Layout) -> WeightId {
        let total: u32 = shape.iter().product();
        let fan_in: u32 = shape[1..].iter().product();
        let scale = (3.0 / fan_in as f32).sqrt();
        let values = self.random.vector(total as usize, scale);
        self.weight(shape, layout, &values)
    }

    fn plain(&mut self, n: u32, centre: f32, scale: f32) -> WeightId {
        let mut values = self.random.vector(n as usize, scale);
        for v in &mut values {
            *v += centre;
        }
        self.weight(&[n], Layout::Plain, &values)
    }

    /// A square window.
    pub(crate) fn conv(&mut self, x: ValueId, n: u32, k: u32, stride: u32, pad: Pad) -> ValueId {
        let c = self.channels(x);
        let weight = self.random_weight(&[n, c, k, k], Layout::Packed16);
        let bias = Some(self.plain(n, 0.0, 0.3));
        let op = Op::Conv2d { weight, bias, kernel: [k, k], stride: [stride, stride], pad, quant: None };
        self.node(op, &[x], ValueKind::Map(n))
    }

    pub(crate) fn conv3(&mut self, x: ValueId, n: u32) -> ValueId {
        self.conv(x, n, 3, 1, Pad::all(1))
    }

    pub(crate) fn conv1(&mut self, x: ValueId, n: u32) -> ValueId {
        self.conv(x, n, 1, 1, Pad::default())
    }

    pub(crate) fn linear(&mut self, x: ValueId, n: u32, biased: bool) -> ValueId {
        let c = self.channels(x);
        let weight = self.random_weight(&[n, c], Layout::Packed16);
        let bias = biased.then(|| self.plain(n, 0.0, 0.3));
        let kind = match self.graph.kind(x) {
            ValueKind::Map(_) => ValueKind::Map(n),
            ValueKind::Vector(_) => ValueKind::Vector(n),
        };
        self.node(Op::Linear { weight, bias }, &[x], kind)
    }

    pub(crate) fn group_norm(&mut self, x: ValueId, groups: u32) -> ValueId {
        let c = self.channels(x);
        let weight = self.plain(c, 1.0, 0.3);
        let bias = self.plain(c, 0.0, 0.3);
        let op = Op::GroupNorm { groups, eps: 1e-5, weight, bias };
        self.node(op, &[x], ValueKind::Map(c))
    }

    fn same(&mut self, op: Op, inputs: &[ValueId]) -> ValueId {
        let kind = self.graph.kind(inputs[0]);
        self.node(op, inputs, kind)
    }

    pub(crate) fn silu(&mut self, x: ValueId) -> ValueId {
        self.same(Op::Silu, &[x])
    }

    pub(crate) fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.same(Op::Add, &[a, b])
    }

    pub(crate) fn add_channel(&mut self, x: ValueId, v: ValueId) -> ValueId {
        self.same(Op::AddChannel, &[x, v])
    }

    pub(crate) fn scale_shift(&mut self, x: ValueId, v: ValueId) -> ValueId {
        self.same(Op::ScaleShift, &[x, v])
    }

    pub(crate) fn affine(&mut self, x: ValueId, mul: f32, add: f32) -> ValueId {
        self.same(Op::Affine { mul, add }, &[x])
    }

    pub(crate) fn upsample(&mut self, x: ValueId) -> ValueId {
        self.same(Op::Upsample2x, &[x])
    }

    pub(crate) fn avg_pool(&mut self, x: ValueId) -> ValueId {
        self.same(Op::AvgPool2x, &[x])
    }

    pub(crate) fn concat(&mut self, parts: &[ValueId]) -> ValueId {
        let c = parts.iter().map(|&v| self.channels(v)).sum();
        self.node(Op::Concat, parts, ValueKind::Map(c))
    }

    pub(crate) fn attention(&mut self, q: ValueId, k: ValueId, v: ValueId, heads: u32) -> ValueId {
        let d = self.channels(q) / heads;
        let scale = 1.0 / (d as f32).sqrt();
        self.same(Op::Attention { heads, scale }, &[q, k, v])
    }

    pub(crate) fn codebook(&mut self, x: ValueId, entries: u32) -> ValueId {
        let c = self.channels(x);
        let values = self.random.vector((entries * c) as usize, 1.0);
        let table = self.weight(&[entries, c], Layout::Plain, &values);
        self.same(Op::Codebook { table }, &[x])
    }

    /// diffusers' ResnetBlock2D: norm, SiLU, conv, time, norm, SiLU, conv, shortcut, sum, scale.
    pub(crate) fn resnet(
        &mut self,
        x: ValueId,
        n: u32,
        groups: u32,
        time: Option<ValueId>,
    ) -> ValueId {
        let h = self.group_norm(x, groups);
        let h = self.silu(h);
        let mut h = self.conv3(h, n);
        if let Some(time) = time {
            let t = self.silu(time);
            let t = self.linear(t, n, true);
            h = self.add_channel(h, t);
        }
        let h = self.group_norm(h, groups);
        let h = self.silu(h);
        let h = self.conv3(h, n);
        let skip = if self.channels(x) == n { x } else { self.conv1(x, n) };
        self.add(skip, h)
    }

    /// diffusers' Attention with GroupNorm and residual.
    pub(crate) fn attention_block(&mut self, x: ValueId, groups: u32, heads: u32) -> ValueId {
        let c = self.channels(x);
        let h = self.group_norm(x, groups);
        let q = self.linear(h, c, true);
        let k = self.linear(h, c, true);
        let v = self.linear(h, c, true);
        let h = self.attention(q, k, v, heads);
        let h = self.linear(h, c, true);
        self.add(h, x)
    }

    /// The network as component `decoder` of a mapped model.
    pub(crate) fn model(&self) -> Model {
        let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
        writer.begin(Role::Decoder, 1, None, &[], self.graph.clone()).unwrap();
        for bytes in &self.weights {
            writer.weight(bytes).unwrap();
        }
        let manifest = Manifest {
            metadata: Metadata::default(),
            precision: match self.dtype {
                DType::F32 => Precision::F32,
                DType::F16 => Precision::F16,
            },
            task: Task::Components,
            latent: None,
            scheduler: None,
            defaults: Defaults { steps: 1, eta: 0.0, consistency: 0.0 },
            components: Vec::new(),
        };
        let bytes = writer.finish(manifest).unwrap().into_inner();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file.flush().unwrap();
        // The map outlives the file's name.
        Model::open(file.path()).unwrap()
    }
}

/// One of everything.
pub(crate) fn one_of_everything(dtype: DType) -> Net {
    let mut net = Net::new(dtype, 3);
    let x = net.map("x", 8);
    let t = net.vector("t", 6);
    let q = net.codebook(x, 20);
    let h = net.conv3(q, 16);
    let h = net.resnet(h, 16, 4, Some(t));
    let h = net.attention_block(h, 4, 2);
    let s = net.silu(h);
    let s = net.silu(s);
    let d = net.avg_pool(s);
    let d = net.resnet(d, 24, 4, Some(t));
    let u = net.upsample(d);
    let u = net.conv3(u, 16);
    let c = net.concat(&[u, h]);
    let y = net.resnet(c, 8, 4, Some(t));
    let v = net.silu(t);
    let v = net.affine(v, 2.0, 0.5);
    let v = net.linear(v, 16, true);
    let y = net.scale_shift(y, v);
    let y = net.affine(y, 0.5, 0.25);
    net.output("y", y);
    net.output("v", v);
    net
}

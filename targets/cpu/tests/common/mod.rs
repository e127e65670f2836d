//! Small networks with random weights, built in memory, written by the runtime's own writer.
#![allow(dead_code, clippy::unwrap_used)]

use half::f16;
use latile_runtime::format::{
    Defaults, Manifest, Metadata, Model, Precision, Role, Task, TimestepProjection, Writer,
};
use latile_runtime::graph::{
    Graph, Layout, Node, Op, Pad, Port, Quant, QuantRange, ValueId, ValueKind, WeightId,
    WeightSpec, Winograd, up_filters,
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

/// `[n, c, …]` as `[ceil(n / 16)][…][ceil(c / group)][16][group]`, by the definition.
fn pack<T: Copy + Default>(shape: &[u32], group: usize, values: &[T]) -> Vec<T> {
    let dim = |i: usize| shape.get(i).map_or(1, |&d| d as usize);
    let (n, c, taps) = (dim(0), dim(1), dim(2) * dim(3));
    let groups = c.div_ceil(group);
    let mut packed = vec![T::default(); n.div_ceil(16) * taps * groups * 16 * group];
    for o in 0..n {
        for i in 0..c {
            for t in 0..taps {
                let row = (o / 16 * taps + t) * groups + i / group;
                packed[(row * 16 + o % 16) * group + i % group] = values[(o * c + i) * taps + t];
            }
        }
    }
    packed
}

/// A network under construction.
pub(crate) struct Net {
    pub(crate) graph: Graph,
    weights: Vec<Vec<u8>>,
    pub(crate) random: Random,
    dtype: DType,
    /// Bounds of timestep groups; where there are any, an input `time_proj` must be too.
    pub(crate) timestep_groups: Vec<u32>,
    /// Makes the convolutions, linear layers over maps and attentions to come int8 ones, with a factor for each input
    /// channel where it is `Some(true)`.
    pub(crate) int8: Option<bool>,
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
            timestep_groups: Vec::new(),
            int8: None,
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

    fn stored(&mut self, shape: &[u32], dtype: DType, layout: Layout, bytes: Vec<u8>) -> WeightId {
        let name = format!("w{}", self.graph.weights.len());
        self.graph.weights.push(WeightSpec { name, shape: shape.to_vec(), dtype, layout });
        self.weights.push(bytes);
        WeightId(self.graph.weights.len() as u32 - 1)
    }

    fn weight(&mut self, shape: &[u32], layout: Layout, values: &[f32]) -> WeightId {
        let dtype = if layout == Layout::Packed16 { self.dtype } else { DType::F32 };
        let stored =
            if layout == Layout::Packed16 { pack(shape, 1, values) } else { values.to_vec() };
        let bytes = if dtype == DType::F16 {
            stored.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
        } else {
            stored.iter().flat_map(|v| v.to_le_bytes()).collect()
        };
        self.stored(shape, dtype, layout, bytes)
    }

    /// An int8 weight over the whole range of its values, and ranges that clip some of the inputs.
    fn quantized(&mut self, shape: &[u32], scaled: bool) -> (WeightId, Quant) {
        let (n, c) = (shape[0] as usize, shape[1] as usize);
        let depth: u32 = shape[1..].iter().product();
        let values: Vec<i8> = (0..n * depth as usize)
            .map(|_| match self.random.below(20) {
                0 => 127,
                1 => -127,
                _ => (self.random.unit() * 127.0).round() as i8,
            })
            .collect();
        let sums = values.chunks(depth as usize).map(|row| row.iter().map(|&v| i32::from(v)).sum());
        let sums: Vec<i32> = sums.collect();
        let packed: Vec<u8> =
            pack(shape, 4, &values).iter().map(|v: &i8| v.cast_unsigned()).collect();
        let weight = self.stored(shape, DType::I8, Layout::Packed16x4, packed);
        let bytes = sums.iter().flat_map(|v| v.to_le_bytes()).collect();
        let weight_sum = self.stored(&shape[..1], DType::I32, Layout::Plain, bytes);
        let worth = (3.0 / depth as f32).sqrt() / 127.0;
        let scales: Vec<f32> = (0..n).map(|_| worth * (1.0 + 0.5 * self.random.unit())).collect();
        let weight_scale = self.weight(&shape[..1], Layout::Plain, &scales);
        let input_scale = scaled.then(|| {
            let factors: Vec<f32> = (0..c).map(|_| 1.0 + 0.7 * self.random.unit()).collect();
            self.weight(&shape[1..2], Layout::Plain, &factors)
        });
        let ranges = (0..self.timestep_groups.len().max(1))
            .map(|_| QuantRange {
                scale: 0.015 * (1.0 + 0.6 * self.random.unit()),
                zero_point: [0, 20, 128, 255, 97][self.random.below(5)],
            })
            .collect();
        (weight, Quant { ranges, weight_scale, weight_sum, input_scale, winograd: None })
    }

    /// The weight of an int8 3x3 convolution by one of Winograd's algorithms.
    fn winograd(&mut self, n: u32, c: u32) -> (WeightId, Option<Quant>) {
        let winograd = if n.is_multiple_of(4) { Winograd::Square } else { Winograd::Rows };
        let scaled = self.int8.is_some_and(|scaled| scaled);
        let (weight, mut quant) = {
            let [h, w] = winograd.kernel();
            self.quantized(&[winograd.filters(n), c, h, w], scaled)
        };
        let ranges = quant.ranges.iter().flat_map(|&r| {
            let wide = QuantRange { scale: 2.0 * r.scale, zero_point: r.zero_point };
            let kinds =
                [QuantRange { zero_point: 128, ..wide }, wide, QuantRange { zero_point: 127, ..r }];
            let number = |i: usize| match winograd {
                Winograd::Rows => kinds[i],
                Winograd::Square if i == 0 => QuantRange { scale: r.scale / 16.0, zero_point: 0 },
                Winograd::Square => {
                    let kind = kinds[(i - 1) % 3];
                    QuantRange { scale: (1.0 + ((i - 1) / 3) as f32 / 2.0) * kind.scale, ..kind }
                }
            };
            (0..winograd.ranges()).map(number).collect::<Vec<_>>()
        });
        quant.ranges = ranges.collect();
        quant.winograd = Some(winograd);
        (weight, Some(quant))
    }

    /// The weight of a layer that reads `x`, int8 where that is asked for and possible.
    fn matrix(&mut self, x: ValueId, shape: &[u32]) -> (WeightId, Option<Quant>) {
        match (self.int8, self.graph.kind(x)) {
            (Some(scaled), ValueKind::Map(_)) => {
                let (weight, quant) = self.quantized(shape, scaled);
                (weight, Some(quant))
            }
            _ => (self.random_weight(shape, Layout::Packed16), None),
        }
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
        let (weight, quant) =
            if self.int8.is_some() && (k, stride) == (3, 1) && !n.is_multiple_of(3) {
                self.winograd(n, c)
            } else {
                self.matrix(x, &[n, c, k, k])
            };
        let bias = Some(self.plain(n, 0.0, 0.3));
        let op = Op::Conv2d { weight, bias, kernel: [k, k], stride: [stride, stride], pad, quant };
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
        let (weight, quant) = self.matrix(x, &[n, c]);
        let bias = biased.then(|| self.plain(n, 0.0, 0.3));
        let kind = match self.graph.kind(x) {
            ValueKind::Map(_) => ValueKind::Map(n),
            ValueKind::Vector(_) => ValueKind::Vector(n),
        };
        self.node(Op::Linear { weight, bias, quant }, &[x], kind)
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

    /// A 3x3 convolution of the upsampled map, in one.
    pub(crate) fn up_conv(&mut self, x: ValueId, n: u32) -> ValueId {
        let filters = up_filters(n);
        let (weight, quant) = self.matrix(x, &[filters, self.channels(x), 2, 2]);
        let bias = Some(self.plain(filters, 0.0, 0.3));
        self.node(Op::UpConv2x { weight, bias, quant }, &[x], ValueKind::Map(n))
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
        self.same(Op::Attention { heads, scale, int8: self.int8.is_some() }, &[q, k, v])
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
        // The map outlives the file's name.
        Model::open(self.file().path()).unwrap()
    }

    /// The network as component `decoder` of a model's file.
    pub(crate) fn file(&self) -> tempfile::NamedTempFile {
        let defaults = Defaults { steps: 1, eta: 0.0, consistency: 0.0 };
        self.written(&[(Role::Decoder, self)], |precision| Manifest {
            metadata: Metadata::default(),
            precision,
            task: Task::Components,
            latent: None,
            scheduler: None,
            defaults,
            components: Vec::new(),
        })
    }

    /// A mapped model with these components, its precision being this network's.
    pub(crate) fn mapped(
        &self,
        components: &[(Role, &Self)],
        manifest: impl FnOnce(Precision) -> Manifest,
    ) -> Model {
        Model::open(self.written(components, manifest).path()).unwrap()
    }

    fn written(
        &self,
        components: &[(Role, &Self)],
        manifest: impl FnOnce(Precision) -> Manifest,
    ) -> tempfile::NamedTempFile {
        let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
        for (role, net) in components {
            let port = net.graph.inputs.iter().find(|p| p.name == "time_proj");
            let timestep = port.map(|p| TimestepProjection {
                dim: net.channels(p.value),
                flip_sin_to_cos: true,
                freq_shift: 0.0,
            });
            let groups = &net.timestep_groups;
            writer.begin(*role, 1, timestep, groups, net.graph.clone()).unwrap();
            for bytes in &net.weights {
                writer.weight(bytes).unwrap();
            }
        }
        let precision = if self.dtype == DType::F16 { Precision::F16 } else { Precision::F32 };
        let bytes = writer.finish(manifest(precision)).unwrap().into_inner();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file.flush().unwrap();
        file
    }
}

/// One of everything, with int8 layers where asked for; see [`Net::int8`].
pub(crate) fn one_of_everything(dtype: DType, int8: Option<bool>) -> Net {
    let mut net = Net::new(dtype, 3);
    net.int8 = int8;
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
    let z = net.group_norm(y, 4);
    let z = net.silu(z);
    let z = net.up_conv(z, 12);
    net.output("y", y);
    net.output("v", v);
    net.output("z", z);
    net
}

//! Gives a recognised graph the native importer's form: its order of operators and its names.
//!
//! Exporters keep the names of most parameters. From those the network's description is guessed, as a checkpoint's
//! would be; the native builder makes its graph; and where that has the very structure that was recognised, operator
//! by operator from the output back, it takes the recognised graph's place. Names only guide the guess: which weight
//! goes where follows from the structure. Where the two differ the recognised graph stands, which computes the same.

use crate::arch::{
    Attention, AutoencoderArch, Bottleneck, DownPad, Level, Middle, Norm, Resample, TimeMix,
    UnetArch,
};
use crate::build;
use latile_runtime::format::{Role, TimestepProjection};
use latile_runtime::graph::{Graph, Layout, Node, Op, Pad, ValueId};
use latile_runtime::tensor::DType;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};

/// The native graph of the same network, and for each of its weights the recognised one's.
pub(super) fn canonical(
    role: Role,
    graph: &Graph,
    time: Option<TimestepProjection>,
    packed: DType,
) -> Option<(Graph, Vec<usize>)> {
    let g = Named::new(role, graph);
    let native = match role {
        Role::Unet => {
            let arch = g.unet(time?)?;
            arch.check().ok()?;
            build::unet(&arch, packed)
        }
        Role::Decoder | Role::Encoder => {
            let arch = g.autoencoder(role)?;
            arch.check().ok()?;
            if role == Role::Decoder {
                build::decoder(&arch, packed)
            } else {
                build::encoder(&arch, packed)
            }
        }
    };
    let map = same_structure(&native, graph)?;
    Some((native, map))
}

/// A graph whose layers can be found by their names in the checkpoint.
struct Named<'g> {
    graph: &'g Graph,
    /// Nodes with a matrix or kernel, by diffusers' name of the layer.
    layers: BTreeMap<String, usize>,
    producer: HashMap<ValueId, usize>,
}

/// The part of a parameter's name that is the network's own, without what the exporter's wrapper put before.
fn own_name(role: Role, name: &str) -> Option<&str> {
    let roots: &[&str] = match role {
        Role::Unet => {
            &["conv_in", "conv_out", "time_embedding.", "down_blocks.", "mid_block.", "up_blocks."]
        }
        Role::Decoder => &["decoder.", "post_quant_conv", "quantize."],
        Role::Encoder => &["encoder.", "quant_conv"],
    };
    let starts = |root: &&str| {
        name.rmatch_indices(*root)
            .map(|(at, _)| at)
            .find(|&at| at == 0 || name.as_bytes()[at - 1] == b'.')
    };
    let at = match role {
        Role::Unet => roots.iter().filter_map(starts).min()?,
        _ => roots.iter().filter_map(starts).max()?,
    };
    Some(&name[at..])
}

impl<'g> Named<'g> {
    fn new(role: Role, graph: &'g Graph) -> Self {
        let mut layers = BTreeMap::new();
        let mut producer = HashMap::new();
        for (i, n) in graph.nodes.iter().enumerate() {
            producer.insert(n.output, i);
            if let Op::Conv2d { weight, .. }
            | Op::Linear { weight, .. }
            | Op::Codebook { table: weight } = n.op
            {
                let name = graph.weight(weight).name.trim_end_matches(".weight");
                if let Some(name) = own_name(role, name) {
                    layers.entry(name.to_owned()).or_insert(i);
                }
            }
        }
        Self { graph, layers, producer }
    }

    fn has(&self, name: &str) -> bool {
        self.layers.contains_key(name)
    }

    fn layer(&self, name: &str) -> Option<&'g Node> {
        self.layers.get(name).map(|&i| &self.graph.nodes[i])
    }

    /// Output channels of a layer.
    fn channels(&self, name: &str) -> Option<u32> {
        Some(self.graph.kind(self.layer(name)?.output).channels())
    }

    fn inputs(&self, name: &str) -> Option<u32> {
        Some(self.graph.kind(*self.layer(name)?.inputs.first()?).channels())
    }

    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..256).take_while(|&i| self.has(&name(i))).count()
    }

    fn first_norm(&self) -> Option<Norm> {
        self.graph.nodes.iter().find_map(|n| match n.op {
            Op::GroupNorm { groups, eps, .. } => Some(Norm { groups, eps }),
            _ => None,
        })
    }

    /// The attention whose query projection is `name`.
    fn attention(&self, name: &str) -> Option<Attention> {
        let q = self.layer(name)?;
        let heads = self.graph.nodes.iter().find_map(|n| match n.op {
            Op::Attention { heads, .. } if n.inputs.first() == Some(&q.output) => Some(heads),
            _ => None,
        })?;
        let norm =
            self.producer.get(q.inputs.first()?).and_then(|&i| match self.graph.nodes[i].op {
                Op::GroupNorm { groups, eps, .. } => Some(Norm { groups, eps }),
                _ => None,
            });
        let head_dim = self.graph.kind(q.output).channels().checked_div(heads)?;
        Some(Attention { heads, head_dim, norm })
    }

    fn level(&self, block: &str, resampler: &str) -> Option<Level> {
        let layers = self.count(|j| format!("{block}.resnets.{j}.conv1"));
        let resample = if self.has(&format!("{block}.{resampler}.0.conv")) {
            Some(Resample::Conv)
        } else {
            self.has(&format!("{block}.{resampler}.0.conv1")).then_some(Resample::Resnet)
        };
        Some(Level {
            channels: self.channels(&format!("{block}.resnets.0.conv1"))?,
            layers: layers as u32,
            attention: self.attention(&format!("{block}.attentions.0.to_q")),
            resample,
        })
    }

    fn levels(&self, blocks: &str, resampler: &str) -> Option<Vec<Level>> {
        let count = self.count(|i| format!("{blocks}.{i}.resnets.0.conv1"));
        (0..count).map(|i| self.level(&format!("{blocks}.{i}"), resampler)).collect()
    }

    /// What the sums of the middle are divided by.
    fn divisor(&self) -> Option<f32> {
        let reader = |value: ValueId| self.graph.nodes.iter().find(|n| n.inputs.contains(&value));
        let conv = self.layer("mid_block.resnets.0.conv2")?;
        let sum = reader(conv.output)?;
        match reader(sum.output)?.op {
            Op::Affine { mul, add: 0.0 } => {
                let d = 1.0 / mul;
                [d, d.next_up(), d.next_down()].into_iter().find(|d| 1.0 / d == mul)
            }
            _ => Some(1.0),
        }
    }

    fn unet(&self, time: TimestepProjection) -> Option<UnetArch> {
        let down = self.levels("down_blocks", "downsamplers")?;
        let up = self.levels("up_blocks", "upsamplers")?;
        let conv_in = self.layer("conv_in")?;
        let centred = self.producer.get(conv_in.inputs.first()?);
        let center_input =
            centred.is_some_and(|&i| self.graph.nodes[i].op == Op::Affine { mul: 2.0, add: -1.0 });
        let first = down.first()?;
        let rows = self.channels("down_blocks.0.resnets.0.time_emb_proj")?;
        let time_mix = if rows == first.channels { TimeMix::Add } else { TimeMix::ScaleShift };
        let down_pad = match self.layer("down_blocks.0.downsamplers.0.conv").map(|n| &n.op) {
            Some(Op::Conv2d { pad, .. }) if *pad != Pad::all(1) => DownPad::End,
            _ => DownPad::Symmetric,
        };
        let middle = self.has("mid_block.resnets.0.conv1").then(|| {
            let attention = self.attention("mid_block.attentions.0.to_q");
            self.divisor().map(|divisor| Middle { attention, divisor })
        });
        Some(UnetArch {
            in_channels: self.inputs("conv_in")?,
            out_channels: self.channels("conv_out")?,
            center_input,
            time,
            time_embed_dim: self.channels("time_embedding.linear_1")?,
            norm: self.first_norm()?,
            time_mix,
            down_pad,
            down,
            middle: match middle {
                None => None,
                Some(middle) => Some(middle?),
            },
            up,
        })
    }

    fn autoencoder(&self, role: Role) -> Option<AutoencoderArch> {
        let half = role.name();
        let (down, up) = if role == Role::Decoder {
            let up = self.levels("decoder.up_blocks", "upsamplers")?;
            (up.iter().rev().cloned().collect(), up)
        } else {
            let down = self.levels("encoder.down_blocks", "downsamplers")?;
            let up = down.iter().rev().cloned().collect();
            (down, up)
        };
        let (in_channels, out_channels, latent_channels, bottleneck) = if role == Role::Decoder {
            let latent = self.inputs("decoder.conv_in")?;
            let table = self.graph.nodes.iter().find_map(|n| match n.op {
                Op::Codebook { table } => Some(&self.graph.weight(table).shape),
                _ => None,
            });
            let bottleneck = match table {
                Some(shape) => Bottleneck::Vq { entries: *shape.first()?, dim: *shape.get(1)? },
                None => Bottleneck::Kl {
                    quant_conv: false,
                    post_quant_conv: self.has("post_quant_conv"),
                },
            };
            (3, self.channels("decoder.conv_out")?, latent, bottleneck)
        } else {
            let head = self.channels("encoder.conv_out")?;
            let quantized = self.channels("quant_conv");
            // Moments come out under their own name; a VQ encoder always has the convolution.
            let moments = self.graph.outputs.first()?.name == "moments";
            let bottleneck = match quantized {
                Some(dim) if !moments => Bottleneck::Vq { entries: 1, dim },
                quantized => {
                    Bottleneck::Kl { quant_conv: quantized.is_some(), post_quant_conv: false }
                }
            };
            let latent = if matches!(bottleneck, Bottleneck::Vq { .. }) { head } else { head / 2 };
            (self.inputs("encoder.conv_in")?, 3, latent, bottleneck)
        };
        Some(AutoencoderArch {
            in_channels,
            out_channels,
            latent_channels,
            bottleneck,
            norm: self.first_norm()?,
            down,
            up,
            middle_attention: self.has(&format!("{half}.mid_block.attentions.0.to_q")),
        })
    }
}

/// An operator without the identity of its weights: what must agree for two nodes to be the same.
fn signature(g: &Graph, op: &Op) -> String {
    let shapes: Vec<(&[u32], Layout)> =
        op.weights().iter().map(|&w| (&g.weight(w).shape[..], g.weight(w).layout)).collect();
    let rest = match op {
        Op::Conv2d { bias, kernel, stride, pad, .. } => {
            format!("{} {kernel:?} {stride:?} {pad:?}", bias.is_some())
        }
        Op::Linear { bias, .. } => format!("{}", bias.is_some()),
        Op::GroupNorm { groups, eps, .. } => format!("{groups} {}", eps.to_bits()),
        Op::Attention { heads, scale, .. } => format!("{heads} {}", scale.to_bits()),
        Op::Affine { mul, add } => format!("{} {}", mul.to_bits(), add.to_bits()),
        _ => String::new(),
    };
    format!("{} {rest} {shapes:?}", op.name())
}

/// A hash of all that leads to each value.
fn hashes(g: &Graph) -> HashMap<ValueId, u64> {
    let mut out = HashMap::new();
    let finish = |h: DefaultHasher| h.finish();
    for port in &g.inputs {
        let mut h = DefaultHasher::new();
        (&port.name, g.kind(port.value)).hash(&mut h);
        out.insert(port.value, finish(h));
    }
    for n in &g.nodes {
        let mut h = DefaultHasher::new();
        signature(g, &n.op).hash(&mut h);
        let mut inputs: Vec<u64> =
            n.inputs.iter().map(|v| out.get(v).copied().unwrap_or(0)).collect();
        if n.op == Op::Add {
            inputs.sort_unstable();
        }
        inputs.hash(&mut h);
        out.insert(n.output, finish(h));
    }
    out
}

/// For each weight of `a` the weight of `b` in its place, where both graphs compute the same from the same inputs.
fn same_structure(a: &Graph, b: &Graph) -> Option<Vec<usize>> {
    let (ha, hb) = (hashes(a), hashes(b));
    let producers = |g: &Graph| -> HashMap<ValueId, usize> {
        g.nodes.iter().enumerate().map(|(i, n)| (n.output, i)).collect()
    };
    let (pa, pb) = (producers(a), producers(b));
    let mut map: Vec<Option<usize>> = vec![None; a.weights.len()];
    let mut pairs: HashMap<ValueId, ValueId> = HashMap::new();
    let (oa, ob) = (a.outputs.first()?, b.outputs.first()?);
    let mut todo = vec![(oa.value, ob.value)];
    while let Some((va, vb)) = todo.pop() {
        if ha.get(&va) != hb.get(&vb) {
            return None;
        }
        match pairs.insert(va, vb) {
            Some(seen) if seen != vb => return None,
            Some(_) => continue,
            None => {}
        }
        let (na, nb) = match (pa.get(&va), pb.get(&vb)) {
            (Some(&i), Some(&j)) => (&a.nodes[i], &b.nodes[j]),
            (None, None) => {
                let name = |g: &Graph, v: ValueId| {
                    g.inputs.iter().find(|p| p.value == v).map(|p| p.name.clone())
                };
                if name(a, va).is_none() || name(a, va) != name(b, vb) {
                    return None;
                }
                continue;
            }
            _ => return None,
        };
        if signature(a, &na.op) != signature(b, &nb.op) || na.inputs.len() != nb.inputs.len() {
            return None;
        }
        for (wa, wb) in na.op.weights().into_iter().zip(nb.op.weights()) {
            if map[wa.index()].replace(wb.index()).is_some_and(|seen| seen != wb.index()) {
                return None;
            }
        }
        let mut theirs = nb.inputs.clone();
        if na.op == Op::Add && ha.get(&na.inputs[0]) != hb.get(&theirs[0]) {
            theirs.swap(0, 1);
        }
        todo.extend(na.inputs.iter().copied().zip(theirs));
    }
    map.into_iter().collect()
}

//! A plain interpreter of `.latile` components in f64, written from the operators' definitions alone: slow, and
//! independent of every kernel and of the importer.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use half::f16;
use latile_runtime::format::{LoadedComponent, Model, Role};
use latile_runtime::graph::{Op, Quant, QuantRange, ValueId, ValueKind, WeightId, Winograd};
use latile_runtime::tensor::DType;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Pixels by channels; a vector is one pixel.
#[derive(Clone, Debug)]
pub struct Map {
    pub h: usize,
    pub w: usize,
    pub c: usize,
    pub data: Vec<f64>,
}

impl Map {
    pub fn zeros(h: usize, w: usize, c: usize) -> Self {
        Self { h, w, c, data: vec![0.0; h * w * c] }
    }

    fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { data: self.data.iter().map(|&v| f(v)).collect(), ..*self }
    }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// A tensor file's contents: f32 as f64, integers too, NCHW turned to NHWC.
pub fn read_maps(path: &Path) -> BTreeMap<String, Map> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut out = BTreeMap::new();
    for (name, t) in file.iter() {
        let flat: Vec<f64> = match t.dtype() {
            Dtype::F32 => t
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect(),
            Dtype::I64 => {
                t.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect()
            }
            other => panic!("{name} is {other:?}"),
        };
        let map = match *t.shape() {
            [1, c, h, w] => {
                let mut m = Map::zeros(h, w, c);
                for (i, &v) in flat.iter().enumerate() {
                    let (ch, p) = (i / (h * w), i % (h * w));
                    m.data[p * c + ch] = v;
                }
                m
            }
            _ => Map { h: 1, w: 1, c: flat.len(), data: flat },
        };
        out.insert(name.to_owned(), map);
    }
    out
}

/// The largest difference, relative to the expected range.
pub fn error(found: &Map, expected: &Map) -> f64 {
    assert_eq!((found.h, found.w, found.c), (expected.h, expected.w, expected.c));
    let (lo, hi) =
        expected.data.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
    let worst =
        found.data.iter().zip(&expected.data).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    worst / (hi - lo)
}

struct Weights<'m> {
    component: LoadedComponent<'m>,
    /// The group of timesteps whose ranges int8 layers use.
    group: usize,
}

impl Weights<'_> {
    fn flat(&self, id: WeightId) -> Vec<f64> {
        let bytes = self.component.weight(id);
        match self.component.spec().graph.weight(id).dtype {
            DType::F32 => {
                bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
            }
            DType::F16 => {
                bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect()
            }
            DType::I8 => bytes.iter().map(|&b| f64::from(b as i8)).collect(),
            DType::I32 => {
                bytes.as_chunks::<4>().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect()
            }
        }
    }

    fn bias(&self, id: Option<WeightId>, n: usize) -> Vec<f64> {
        id.map_or_else(|| vec![0.0; n], |id| self.flat(id))
    }
}

/// Runs a component on named inputs and returns its only output.
pub fn run(model: &Model, role: Role, inputs: &[(&str, Map)]) -> Map {
    run_observed(model, role, 0, inputs, &mut |_, _| {})
}

/// As [`run`], with the ranges of a group of timesteps; shows what each layer with a matrix over a map reads.
pub fn run_observed(
    model: &Model,
    role: Role,
    group: usize,
    inputs: &[(&str, Map)],
    observe: &mut dyn FnMut(&str, &Map),
) -> Map {
    let w = Weights { component: model.load(role).unwrap(), group };
    let graph = &w.component.spec().graph;
    let mut values: Vec<Option<Map>> = vec![None; graph.values.len()];
    for port in &graph.inputs {
        let (_, map) = inputs.iter().find(|(n, _)| *n == port.name).unwrap();
        assert_eq!(map.c as u32, graph.kind(port.value).channels());
        values[port.value.index()] = Some(map.clone());
    }
    for node in &graph.nodes {
        let x = |i: usize| values[node.inputs[i].index()].as_ref().unwrap();
        if node.op.matrix().is_some() && matches!(graph.kind(node.inputs[0]), ValueKind::Map(_)) {
            observe(&node.name, x(0));
        }
        let n = graph.kind(node.output).channels();
        let out = step(&w, &node.op, &x, &node.inputs, n as usize);
        assert_eq!(out.c as u32, n, "{}", node.name);
        values[node.output.index()] = Some(out);
    }
    assert_eq!(graph.outputs.len(), 1);
    values[graph.outputs[0].value.index()].take().unwrap()
}

fn step<'v>(
    w: &Weights<'_>,
    op: &Op,
    x: &dyn Fn(usize) -> &'v Map,
    inputs: &[ValueId],
    n: usize,
) -> Map {
    match *op {
        Op::Conv2d { weight, bias, pad, quant: Some(ref q), .. } if q.winograd.is_some() => {
            winograd(
                w,
                x(0),
                (weight, w.bias(bias, n)),
                [pad.top, pad.left, pad.bottom, pad.right],
                q,
            )
        }
        Op::Conv2d { weight, bias, kernel, stride, pad, ref quant } => {
            let [kh, kw] = kernel.map(|v| v as usize);
            let [sh, sw] = stride.map(|v| v as usize);
            conv(
                w,
                x(0),
                weight,
                bias,
                (kh, kw),
                (sh, sw),
                [pad.top, pad.left, pad.bottom, pad.right],
                quant.as_ref(),
            )
        }
        Op::UpConv2x { weight, bias, ref quant } => {
            // All filters at all places; each output has one of them.
            let all = conv(w, x(0), weight, bias, (2, 2), (1, 1), [1; 4], quant.as_ref());
            let mut out = Map::zeros(2 * all.h - 2, 2 * all.w - 2, n);
            for i in 0..out.data.len() {
                let (y, x, o) = (i / n / out.w, i / n % out.w, i % n);
                let (place, phase) = ([y.div_ceil(2), x.div_ceil(2)], y % 2 * 2 + x % 2);
                let filter = phase * all.c / 4 + o;
                out.data[i] = all.data[(place[0] * all.w + place[1]) * all.c + filter];
            }
            out
        }
        Op::Linear { weight, bias, ref quant } => {
            conv(w, x(0), weight, bias, (1, 1), (1, 1), [0; 4], quant.as_ref())
        }
        Op::GroupNorm { groups, eps, weight, bias } => {
            let (x, scale, shift) = (x(0), w.flat(weight), w.flat(bias));
            let size = x.c / groups as usize;
            let mut out = x.clone();
            for g in 0..groups as usize {
                let member = |i: usize| i % x.c / size == g;
                let n = (x.h * x.w * size) as f64;
                let of = |f: &dyn Fn(f64) -> f64| {
                    x.data
                        .iter()
                        .enumerate()
                        .filter(|(i, _)| member(*i))
                        .map(|(_, &v)| f(v))
                        .sum::<f64>()
                        / n
                };
                let mean = of(&|v| v);
                let var = of(&|v| (v - mean).powi(2));
                for (i, v) in out.data.iter_mut().enumerate().filter(|(i, _)| member(*i)) {
                    let c = i % x.c;
                    *v = (*v - mean) / (var + f64::from(eps)).sqrt() * scale[c] + shift[c];
                }
            }
            out
        }
        Op::Silu => x(0).map(|v| v / (1.0 + (-v).exp())),
        Op::Affine { mul, add } => x(0).map(|v| v * f64::from(mul) + f64::from(add)),
        Op::Add => {
            let (a, b) = (x(0), x(1));
            Map { data: a.data.iter().zip(&b.data).map(|(a, b)| a + b).collect(), ..*a }
        }
        Op::AddChannel => {
            let (a, v) = (x(0), x(1));
            let data = a.data.iter().enumerate().map(|(i, &e)| e + v.data[i % a.c]).collect();
            Map { data, ..*a }
        }
        Op::ScaleShift => {
            let (a, v) = (x(0), x(1));
            let at = |i: usize, e: f64| e * (1.0 + v.data[i % a.c]) + v.data[a.c + i % a.c];
            Map { data: a.data.iter().enumerate().map(|(i, &e)| at(i, e)).collect(), ..*a }
        }
        Op::Concat => {
            let parts: Vec<&Map> = (0..inputs.len()).map(x).collect();
            let c = parts.iter().map(|p| p.c).sum();
            let mut out = Map::zeros(parts[0].h, parts[0].w, c);
            out.data.clear();
            for p in 0..parts[0].h * parts[0].w {
                for m in &parts {
                    out.data.extend(&m.data[p * m.c..(p + 1) * m.c]);
                }
            }
            out
        }
        Op::Upsample2x => {
            let x = x(0);
            let mut out = Map::zeros(2 * x.h, 2 * x.w, x.c);
            for i in 0..out.data.len() {
                let (p, c) = (i / x.c, i % x.c);
                let (row, col) = (p / (2 * x.w) / 2, p % (2 * x.w) / 2);
                out.data[i] = x.data[(row * x.w + col) * x.c + c];
            }
            out
        }
        Op::AvgPool2x => {
            let x = x(0);
            let (h, w) = (x.h / 2, x.w / 2);
            let mut out = Map::zeros(h, w, x.c);
            for i in 0..out.data.len() {
                let (p, c) = (i / x.c, i % x.c);
                let at = |dy: usize, dx: usize| {
                    x.data[((p / w * 2 + dy) * x.w + p % w * 2 + dx) * x.c + c]
                };
                out.data[i] = (at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)) / 4.0;
            }
            out
        }
        Op::Attention { heads, scale, .. } => {
            attention(x(0), x(1), x(2), heads as usize, f64::from(scale))
        }
        Op::Codebook { table } => {
            let (x, table) = (x(0), w.flat(table));
            let mut out = x.clone();
            for pixel in out.data.chunks_mut(x.c) {
                let distance = |row: &[f64]| {
                    row.iter().zip(&*pixel).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
                };
                let mut best = (f64::MAX, 0);
                for (i, row) in table.chunks(x.c).enumerate() {
                    if distance(row) < best.0 {
                        best = (distance(row), i);
                    }
                }
                pixel.copy_from_slice(&table[best.1 * x.c..(best.1 + 1) * x.c]);
            }
            out
        }
    }
}

/// A convolution as docs/format.md defines it, float or int8.
#[allow(clippy::too_many_arguments)]
fn conv(
    w: &Weights<'_>,
    x: &Map,
    weight: WeightId,
    bias: Option<WeightId>,
    (kh, kw): (usize, usize),
    (sh, sw): (usize, usize),
    pad: [u32; 4],
    quant: Option<&Quant>,
) -> Map {
    let n = w.component.spec().graph.weight(weight).shape[0] as usize;
    let (packed, bias) = (w.flat(weight), w.bias(bias, n));
    let [top, left, bottom, right] = pad.map(|v| v as usize);
    let (h, width) = ((x.h + top + bottom - kh) / sh + 1, (x.w + left + right - kw) / sw + 1);
    let range = quant.map(|q| q.ranges[w.group.min(q.ranges.len() - 1)]);
    let zero = range.map_or(0.0, |r| f64::from(r.zero_point));
    let x = &match (quant, range) {
        (Some(q), Some(r)) => {
            let ones = vec![1.0; x.c];
            let scale = q.input_scale.map_or(ones, |id| w.flat(id));
            let multiplier: Vec<f32> = scale.iter().map(|&s| s as f32 * (1.0 / r.scale)).collect();
            let byte = |(i, &v): (usize, &f64)| {
                let scaled = (v as f32 * multiplier[i % x.c]).round_ties_even();
                (f64::from(scaled) + zero).clamp(0.0, 255.0)
            };
            Map { data: x.data.iter().enumerate().map(byte).collect(), ..*x }
        }
        _ => x.clone(),
    };
    let at = |o: usize, ky: usize, kx: usize, c: usize| {
        let position = (o / 16 * kh + ky) * kw + kx;
        match quant {
            None => (position * x.c + c) * 16 + o % 16,
            Some(_) => ((position * x.c.div_ceil(4) + c / 4) * 16 + o % 16) * 4 + c % 4,
        }
    };
    let mut out = Map::zeros(h, width, n);
    for oy in 0..h {
        for ox in 0..width {
            for o in 0..n {
                let mut sum = 0.0;
                for ky in 0..kh {
                    for kx in 0..kw {
                        let y = (oy * sh + ky).checked_sub(top).filter(|&y| y < x.h);
                        let xx = (ox * sw + kx).checked_sub(left).filter(|&xx| xx < x.w);
                        for c in 0..x.c {
                            let value = match (y, xx) {
                                (Some(y), Some(xx)) => x.data[(y * x.w + xx) * x.c + c],
                                _ => zero,
                            };
                            sum += packed[at(o, ky, kx, c)] * value;
                        }
                    }
                }
                out.data[(oy * width + ox) * n + o] = sum;
            }
        }
    }
    if let (Some(q), Some(r)) = (quant, range) {
        let (scale, total) = (w.flat(q.weight_scale), w.flat(q.weight_sum));
        for (i, v) in out.data.iter_mut().enumerate() {
            let o = i % n;
            let combined = r.scale * scale[o] as f32;
            *v = f64::from((*v - zero * total[o]) as f32 * combined);
        }
    }
    out.data.iter_mut().enumerate().for_each(|(i, v)| *v += bias[i % n]);
    out
}

/// An int8 convolution by one of Winograd's algorithms, as docs/format.md defines it.
fn winograd(
    w: &Weights<'_>,
    x: &Map,
    (weight, bias): (WeightId, Vec<f64>),
    pad: [u32; 4],
    q: &Quant,
) -> Map {
    let square = q.winograd == Some(Winograd::Square);
    let (points, each, rows, high) = if square { (16, 10, 1, 2) } else { (4, 3, 3, 1) };
    let n = bias.len();
    let m = w.component.spec().graph.weight(weight).shape[0] as usize / points;
    let packed = w.flat(weight);
    let (scale, total) = (w.flat(q.weight_scale), w.flat(q.weight_sum));
    let input_scale = q.input_scale.map_or(vec![1.0; x.c], |id| w.flat(id));
    let group = w.group.min(q.ranges.len() / each - 1);
    let ranges = &q.ranges[each * group..][..each];
    let factor =
        |r: &QuantRange| (32768.0 * f64::from(ranges[0].scale) / f64::from(r.scale)).round();
    // Of each point: its range, and what one step is worth.
    let range = |k: usize| {
        if square { ranges[1 + 3 * (k / 4 % 3) + k % 4 % 3] } else { ranges[k % 3] }
    };
    let worth = |k: usize| {
        let r = range(k);
        if square { ranges[0].scale * (32768.0 / factor(&r) as f32) } else { r.scale }
    };
    let [top, left, bottom, right] = pad.map(|v| v as usize);
    let mut out = Map::zeros(x.h + top + bottom - 2, x.w + left + right - 2, n);
    let pixel = |y: usize, at: usize, c: usize| {
        let (y, at) = (y.checked_sub(top), at.checked_sub(left));
        match (y.filter(|&y| y < x.h), at.filter(|&at| at < x.w)) {
            (Some(y), Some(at)) => x.data[(y * x.w + at) * x.c + c] as f32,
            _ => 0.0,
        }
    };
    let four = |v: [f32; 4]| [v[0] - v[2], v[1] + v[2], v[2] - v[1], v[1] - v[3]];
    let two = |m: [f32; 4]| [m[0] + (m[1] + m[2]), (m[1] - m[2]) - m[3]];
    for oy in (0..out.h).step_by(high) {
        for ox in (0..out.w).step_by(2) {
            let mut sums = vec![[0f64; 16]; n];
            for ky in 0..rows {
                for c in 0..x.c {
                    let bytes: Vec<f64> = if square {
                        let word = |v: f32| {
                            let by = input_scale[c] as f32 * (1.0 / ranges[0].scale);
                            (v * by).round_ties_even().clamp(-8191.0, 8191.0)
                        };
                        let columns = [0, 1, 2, 3]
                            .map(|i| four([0, 1, 2, 3].map(|j| word(pixel(oy + j, ox + i, c)))));
                        let seen = (0..4).flat_map(|k| four(columns.map(|column| column[k])));
                        let byte = |(k, d): (usize, f32)| {
                            let r = range(k);
                            let scaled = ((d as i64 * factor(&r) as i64) + (1 << 14)) >> 15;
                            scaled as f64 + f64::from(r.zero_point)
                        };
                        seen.enumerate().map(byte).collect()
                    } else {
                        let v = [0, 1, 2, 3].map(|i| pixel(oy + ky, ox + i, c));
                        let byte = |(k, d): (usize, f32)| {
                            let r = range(k);
                            let by = input_scale[c] as f32 * (1.0 / r.scale);
                            f64::from((d * by).round_ties_even()) + f64::from(r.zero_point)
                        };
                        four(v).into_iter().enumerate().map(byte).collect()
                    };
                    for (k, byte) in bytes.into_iter().enumerate() {
                        for (o, sum) in sums.iter_mut().enumerate() {
                            let row = k * m + o;
                            let place = (row / 16 * rows + ky) * x.c.div_ceil(4) + c / 4;
                            let w = packed[(place * 16 + row % 16) * 4 + c % 4];
                            sum[k] += byte.clamp(0.0, 255.0) * w;
                        }
                    }
                }
            }
            for (o, sums) in sums.iter().enumerate() {
                let of = |k: usize| {
                    let row = k * m + o;
                    let sum = sums[k] - f64::from(range(k).zero_point) * total[row];
                    sum as f32 * (worth(k) * scale[row] as f32)
                };
                let made = if square {
                    let rows = [0, 4, 8, 12].map(|k| two([k, k + 1, k + 2, k + 3].map(of)));
                    let [left, right] = [0, 1].map(|i| two(rows.map(|row| row[i])));
                    vec![[left[0], right[0]], [left[1], right[1]]]
                } else {
                    vec![two([0, 1, 2, 3].map(of))]
                };
                for (j, row) in made.into_iter().enumerate() {
                    for (i, y) in row.into_iter().enumerate() {
                        if oy + j < out.h && ox + i < out.w {
                            out.data[((oy + j) * out.w + ox + i) * n + o] = f64::from(y) + bias[o];
                        }
                    }
                }
            }
        }
    }
    out
}

fn attention(q: &Map, k: &Map, v: &Map, heads: usize, scale: f64) -> Map {
    let d = q.c / heads;
    let mut out = Map::zeros(q.h, q.w, q.c);
    for head in 0..heads {
        let part = |m: &Map, p: usize| m.data[p * m.c + head * d..][..d].to_vec();
        for p in 0..q.h * q.w {
            let query = part(q, p);
            let scores: Vec<f64> = (0..k.h * k.w)
                .map(|j| part(k, j).iter().zip(&query).map(|(a, b)| a * b).sum::<f64>() * scale)
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let exps: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = exps.iter().sum();
            for (j, e) in exps.iter().enumerate() {
                for (i, value) in part(v, j).iter().enumerate() {
                    out.data[p * q.c + head * d + i] += e / total * value;
                }
            }
        }
    }
    out
}

/// A copy of a diffusers fixture, to be spoilt or mended.
pub fn copy(name: &str, to: &Path) {
    let from = fixtures().join("models").join(name);
    for part in ["", "unet", "vqvae", "vae", "scheduler"] {
        let Ok(entries) = std::fs::read_dir(from.join(part)) else {
            continue;
        };
        std::fs::create_dir_all(to.join(part)).unwrap();
        for entry in entries.map(Result::unwrap).filter(|e| e.path().is_file()) {
            std::fs::copy(entry.path(), to.join(part).join(entry.file_name())).unwrap();
        }
    }
}

/// Replaces one key of a JSON file.
pub fn set(path: &Path, key: &str, value: serde_json::Value) {
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    json.as_object_mut().unwrap().insert(key.to_owned(), value);
    std::fs::write(path, json.to_string()).unwrap();
}

/// Tensors of a safetensors file as shape and f32 values; other types are left out.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = file.iter().filter(|(_, t)| t.dtype() == Dtype::F32);
    floats
        .map(|(name, t)| {
            let values =
                t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            (name.to_owned(), (t.shape().to_vec(), values))
        })
        .collect()
}

pub fn write_tensors(path: &Path, tensors: &Tensors) {
    let bytes: Vec<Vec<u8>> =
        tensors.values().map(|(_, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views: Vec<_> = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, (shape, _)), b)| {
            (
                name.clone(),
                safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), b).unwrap(),
            )
        })
        .collect();
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

//! A naive executor of the primitive graph, one operator after the other.
//!
//! It is the oracle that lowering, fusing and every kernel are compared with: plain loops, each value in
//! an f32 vector of its own, no bands, no threads, no vectors. Convolutions and linear layers over maps
//! accumulate in the kernels' order (row, column, channel of the window, each a fused multiply-add; int8
//! layers exactly), and int8 attention is that of [`naive`], so where nothing else is in play the bits
//! agree; norms, activations and float attention are computed in f64 and rounded once. Sessions never use it.

mod ops;
#[cfg(test)]
mod tests;

use crate::naive;
use half::f16;
use latile_runtime::format::LoadedComponent;
use latile_runtime::graph::{Layout, Matrix, Node, Op, ShapeError, ValueId, ValueKind, WeightId};
use latile_runtime::tensor::{DType, Shape};

/// Runs `component` with its map inputs at the given sizes and returns every value of the graph, indexed
/// by [`ValueId::index`]; the caller picks the outputs. Int8 layers read their inputs by the ranges of the
/// first group of timesteps; see [`run_group`].
///
/// `inputs` are f32, NHWC, in the order of the graph's ports. `stored_f16` says which values a target
/// keeps in f16: those are rounded once computed. `|_| false` runs all in f32.
///
/// # Errors
/// [`ShapeError`] where the sizes do not suit the graph.
///
/// # Panics
/// Where an input has another length than its port's shape.
pub fn run(
    component: &LoadedComponent<'_>,
    map_sizes: &[(usize, usize)],
    inputs: &[&[f32]],
    stored_f16: impl Fn(ValueId) -> bool,
) -> Result<Vec<Vec<f32>>, ShapeError> {
    run_group(component, 0, map_sizes, inputs, stored_f16)
}

/// As [`run`], with int8 layers by the ranges of a group of timesteps, the last one where there are fewer.
///
/// # Errors
/// As [`run`].
///
/// # Panics
/// As [`run`].
pub fn run_group(
    component: &LoadedComponent<'_>,
    group: usize,
    map_sizes: &[(usize, usize)],
    inputs: &[&[f32]],
    stored_f16: impl Fn(ValueId) -> bool,
) -> Result<Vec<Vec<f32>>, ShapeError> {
    let graph = &component.spec().graph;
    let shapes = graph.infer(map_sizes)?;
    let mut values: Vec<Vec<f32>> = vec![Vec::new(); graph.values.len()];
    let keep = |id: ValueId, mut v: Vec<f32>| {
        if stored_f16(id) && matches!(graph.kind(id), ValueKind::Map(_)) {
            for x in &mut v {
                *x = f16::from_f32(*x).to_f32();
            }
        }
        v
    };
    assert_eq!(inputs.len(), graph.inputs.len(), "one slice a port");
    for (port, input) in graph.inputs.iter().zip(inputs) {
        let expected = shapes[port.value.index()].elements();
        assert_eq!(Some(input.len()), expected, "{}", port.name);
        values[port.value.index()] = keep(port.value, input.to_vec());
    }
    for node in &graph.nodes {
        let out = compute(component, group, node, &values, &shapes);
        values[node.output.index()] = keep(node.output, out);
    }
    Ok(values)
}

fn compute(
    component: &LoadedComponent<'_>,
    group: usize,
    node: &Node,
    values: &[Vec<f32>],
    shapes: &[Shape],
) -> Vec<f32> {
    let x = |i: usize| values[node.inputs[i].index()].as_slice();
    let shape = |i: usize| shapes[node.inputs[i].index()];
    let plain = |id: WeightId| unpack(component, id);
    let out = shapes[node.output.index()];
    let conv = |(weight, bias, quant): Matrix<'_>, window| {
        let w = plain(weight);
        let filters = component.spec().graph.weight(weight).shape[0] as usize;
        let b = bias.map_or(vec![0.0; filters], plain);
        let Some(quant) = quant else {
            return ops::conv2d(x(0), shape(0), &w, &b, window, out);
        };
        let each = quant.ranges_per_group();
        let last = quant.ranges.len() / each - 1;
        let ranges = &quant.ranges[group.min(last) * each..][..each];
        let input_scale = quant.input_scale.map(plain);
        let layer = ops::Int8 {
            weight: &w,
            weight_scale: &plain(quant.weight_scale),
            input_scale: input_scale.as_deref(),
            ranges,
        };
        if let Some(winograd) = quant.winograd {
            return ops::winograd(x(0), shape(0), &layer, &b, window, (out, winograd));
        }
        ops::conv2d_int8(x(0), shape(0), &layer, &b, window, out)
    };
    let point = ops::Window { kernel: [1, 1], stride: [1, 1], top: 0, left: 0, phases: false };
    let window = match &node.op {
        Op::Conv2d { kernel, stride, pad, .. } => ops::Window {
            kernel: kernel.map(|v| v as usize),
            stride: stride.map(|v| v as usize),
            top: pad.top as usize,
            left: pad.left as usize,
            phases: false,
        },
        Op::UpConv2x { .. } => {
            ops::Window { kernel: [2, 2], top: 1, left: 1, phases: true, ..point }
        }
        _ => point,
    };
    if let Some(matrix) = node.op.matrix() {
        return conv(matrix, window);
    }
    match &node.op {
        Op::Conv2d { .. } | Op::UpConv2x { .. } | Op::Linear { .. } => {
            unreachable!("they have a matrix")
        }
        Op::GroupNorm { groups, eps, weight, bias } => ops::group_norm(
            x(0),
            shape(0).channels(),
            *groups as usize,
            *eps,
            &plain(*weight),
            &plain(*bias),
        ),
        Op::Silu => x(0).iter().map(|&v| ops::silu(v)).collect(),
        Op::Add => x(0).iter().zip(x(1)).map(|(a, b)| a + b).collect(),
        Op::AddChannel => x(0)
            .chunks_exact(out.channels())
            .flat_map(|pixel| pixel.iter().zip(x(1)).map(|(a, b)| a + b))
            .collect(),
        Op::ScaleShift => ops::scale_shift(x(0), x(1)),
        Op::Concat => {
            let parts: Vec<_> =
                (0..node.inputs.len()).map(|i| (x(i), shape(i).channels())).collect();
            ops::concat(&parts, out.pixels())
        }
        Op::Upsample2x => ops::upsample2x(x(0), shape(0)),
        Op::AvgPool2x => ops::avg_pool2x(x(0), shape(0)),
        Op::Attention { heads, scale, int8 } => {
            let attention = if *int8 { naive::attention_int8 } else { ops::attention };
            attention(x(0), x(1), x(2), shape(0).channels(), *heads as usize, *scale)
        }
        Op::Codebook { table } => ops::codebook(x(0), &plain(*table), out.channels()),
        Op::Affine { mul, add } => x(0).iter().map(|&v| v.mul_add(*mul, *add)).collect(),
    }
}

/// A weight in row-major order, as f32.
#[must_use]
pub fn unpack(component: &LoadedComponent<'_>, id: WeightId) -> Vec<f32> {
    let spec = component.spec().graph.weight(id);
    let bytes = component.weight(id);
    let stored: Vec<f32> = match spec.dtype {
        DType::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        DType::F16 => {
            bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        DType::I8 => bytes.iter().map(|&b| f32::from(b.cast_signed())).collect(),
        DType::I32 => bytes
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32)
            .collect(),
    };
    // Input channels that stand together in the innermost dimension.
    let group = match spec.layout {
        Layout::Plain => return stored,
        Layout::Packed16 => 1,
        Layout::Packed16x4 => 4,
    };
    let dim = |i: usize| spec.shape.get(i).map_or(1, |&d| d as usize);
    let (n, c, kh, kw) = (dim(0), dim(1), dim(2), dim(3));
    let groups = c.div_ceil(group);
    let mut plain = Vec::with_capacity(n * c * kh * kw);
    for o in 0..n {
        for i in 0..c {
            for ky in 0..kh {
                for kx in 0..kw {
                    let row = ((o / 16 * kh + ky) * kw + kx) * groups + i / group;
                    plain.push(stored[(row * 16 + o % 16) * group + i % group]);
                }
            }
        }
    }
    plain
}

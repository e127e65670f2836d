//! tract as a second float oracle: what it computes inside an ONNX graph, beside what calibration is shown of the
//! same model from its diffusers folder. The graphs are PyTorch's exports; latile writes none. Names of layers
//! survive the export, so every convolution's and every linear layer's input can be compared, not outputs alone.
#![cfg(feature = "onnx")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::Session;
use latile_runtime::format::{Model, Precision, Role};
use latile_tests::{Tensor, exported, fixture};
use std::collections::BTreeMap;
use std::path::Path;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::Factoid;

/// What a layer read: `[pixels][channels]`.
#[derive(Clone, Debug, Default, PartialEq)]
struct Read {
    channels: usize,
    values: Vec<f32>,
}

impl Read {
    /// Least and largest of each channel: what calibration makes ranges and equalisers of.
    fn extremes(&self) -> Vec<(f32, f32)> {
        let mut found = vec![(f32::INFINITY, f32::NEG_INFINITY); self.channels];
        for pixel in self.values.chunks_exact(self.channels) {
            for (e, &v) in found.iter_mut().zip(pixel) {
                *e = (e.0.min(v), e.1.max(v));
            }
        }
        found
    }
}

/// `/unet/mid_block/resnets.0/conv1/Conv` is our `mid_block.resnets.0.conv1`.
fn our_name(node: &str) -> Option<String> {
    let layer = node.strip_suffix("/Conv").or_else(|| node.strip_suffix("/MatMul"))?;
    let name = layer.trim_start_matches('/').replace('/', ".");
    Some(name.strip_prefix("unet.").map_or(name.clone(), str::to_owned))
}

fn floats(tensor: &TValue) -> Tensor {
    let view = tensor.to_plain_array_view::<f32>().unwrap();
    Tensor { shape: tensor.shape().to_vec(), data: view.iter().copied().collect() }
}

/// tract's run of `file` on `inputs`: the input of each layer by our name, and the outputs.
fn by_tract(file: &Path, inputs: &[&Tensor]) -> (BTreeMap<String, Read>, Vec<Tensor>) {
    let mut model = onnx().model_for_path(file).unwrap();
    let mut feed: TVec<TValue> = tvec!();
    for (i, tensor) in inputs.iter().enumerate() {
        let wanted = model.input_fact(i).unwrap().datum_type.concretize().unwrap();
        let given = tract_onnx::prelude::Tensor::from_shape(&tensor.shape, &tensor.data).unwrap();
        let given = given.cast_to_dt(wanted).unwrap().into_owned();
        let fact = InferenceFact::dt_shape(wanted, given.shape());
        model.set_input_fact(i, fact).unwrap();
        feed.push(given.into_tvalue());
    }
    let results = model.outputs.clone();
    let layers: Vec<(String, OutletId)> =
        model.nodes.iter().filter_map(|n| Some((our_name(&n.name)?, *n.inputs.first()?))).collect();
    let wanted: Vec<OutletId> = layers.iter().map(|l| l.1).chain(results.clone()).collect();
    model.select_output_outlets(&wanted).unwrap();
    let plan = model.into_typed().unwrap().into_runnable().unwrap();
    let found = plan.run(feed).unwrap();
    let (found, outputs) = found.split_at(layers.len());
    let outputs = outputs.iter().map(floats).collect();
    let read = |t: Tensor| match t.shape[..] {
        [1, channels, _, _] => Read { channels, values: t.to_nhwc() },
        [.., channels] => Read { channels, values: t.data },
        [] => Read::default(),
    };
    let layers = layers.into_iter().map(|l| l.0).zip(found.iter().map(|t| read(floats(t))));
    (layers.collect(), outputs)
}

/// latile's run of the folder's `role`, as calibration observes it.
fn observed(
    model: &Model,
    role: Role,
    map: &Tensor,
    timestep: Option<f32>,
) -> (BTreeMap<String, Read>, Vec<f32>) {
    let backend = CpuBackend::new(2, Level::best()).unwrap();
    let mut session = backend.session(model, role, map.shape[2], map.shape[3]).unwrap();
    let mut inputs = vec![map.to_nhwc()];
    if let (Some(time), Some(t)) = (model.component(role).unwrap().timestep, timestep) {
        let mut projected = vec![0.0; time.dim as usize];
        time.project(t, &mut projected);
        inputs.push(projected);
    }
    let mut output = vec![0.0; session.outputs()[0].shape.elements().unwrap()];
    let mut layers: BTreeMap<String, Read> = BTreeMap::new();
    let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    session
        .run_observed(&inputs, &mut [&mut output], &mut |name, channels, row| {
            let read = layers.entry(name.to_owned()).or_default();
            read.channels = channels;
            read.values.extend_from_slice(row);
        })
        .unwrap();
    (layers, output)
}

/// The largest difference over the range of `b`.
fn error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let most = b.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let least = b.iter().fold(f32::INFINITY, |m, &v| m.min(v));
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let worst = worst.fold(0.0f32, |m, d| if m.is_nan() || d <= m { m } else { d });
    worst / (most - least).max(1e-6)
}

/// Numbers from −1.5 to 1.5 (Knuth's MMIX generator).
fn numbers(n: usize) -> Vec<f32> {
    let mut state = 5u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 1.5
    };
    (0..n).map(|_| next()).collect()
}

/// Compares `file` with the folder's `role` at the size that it was traced at; gives how many layers were compared
/// value by value, and how many by their channels' extremes.
fn compare(role: Role, file: &str, channels: usize, timestep: Option<f32>) -> (usize, usize) {
    let folder = exported(&fixture("models/old-bin"), Precision::F32);
    let map = Tensor { shape: vec![1, channels, 8, 12], data: numbers(channels * 8 * 12) };
    let time = timestep.map(|t| Tensor { shape: vec![1], data: vec![t] });
    let inputs: Vec<&Tensor> = std::iter::once(&map).chain(&time).collect();
    let (theirs, outputs) = by_tract(&fixture(&format!("onnx/{file}")), &inputs);
    let (ours, output) = observed(&folder.model, role, &map, timestep);
    let found = error(&output, &outputs[0].to_nhwc());
    assert!(found <= 1e-4, "{file}: the output differs by {found:e} of its range");
    let (mut whole, mut ranges) = (0, 0);
    for (name, ours) in &ours {
        let Some(theirs) = theirs.get(name) else { panic!("{file} has no layer {name}") };
        assert_eq!(ours.channels, theirs.channels, "{name}");
        let worst = if ours.values.len() == theirs.values.len() {
            whole += 1;
            error(&ours.values, &theirs.values)
        } else {
            // What tract reads is enlarged already, which adds no value.
            ranges += 1;
            let flat = |r: &Read| -> Vec<f32> {
                r.extremes().into_iter().flat_map(|(a, b)| [a, b]).collect()
            };
            error(&flat(ours), &flat(theirs))
        };
        assert!(worst <= 1e-4, "{file}, {name}: {worst:e} of the input's range");
    }
    println!("{file}, t = {timestep:?}: {whole} layers by value, {ranges} by range");
    (whole, ranges)
}

#[test]
fn calibration_sees_what_tract_computes() {
    for timestep in [1.0, 501.0, 951.0] {
        let (whole, ranges) = compare(Role::Unet, "unet-opset17.onnx", 6, Some(timestep));
        assert!(whole >= 30 && ranges == 1, "{whole} {ranges}");
    }
    let (whole, ranges) = compare(Role::Decoder, "decoder-opset17.onnx", 3, None);
    assert!(whole >= 18 && ranges == 1, "{whole} {ranges}");
}

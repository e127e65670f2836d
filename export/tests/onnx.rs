//! ONNX exports of diffusers' models give the graph and the weights of the folder they were made from.
#![cfg(feature = "onnx")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::fixtures;
use latile_export::onnx::{OnnxParts, export_onnx};
use latile_export::{ExportOptions, Progress, Summary, export};
use latile_runtime::format::{Model, Role, Task};
use latile_runtime::graph::{Op, WeightId};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn options() -> ExportOptions {
    ExportOptions { overwrite: true, ..ExportOptions::default() }
}

fn onnx(name: &str) -> PathBuf {
    fixtures().join("onnx").join(name)
}

fn imported(parts: &OnnxParts, out: &Path) -> (Model, Summary) {
    let summary = export_onnx(parts, out, &options(), &mut go).unwrap();
    let model = Model::open(out).unwrap();
    model.verify().unwrap();
    (model, summary)
}

fn of(role: Role, path: PathBuf) -> OnnxParts {
    let mut parts = OnnxParts::default();
    match role {
        Role::Unet => parts.unet = Some(path),
        Role::Decoder => parts.decoder = Some(path),
        Role::Encoder => parts.encoder = Some(path),
    }
    parts
}

/// The index beside the fixtures: file, part and the folder it was made from.
fn index() -> Vec<(String, String, String)> {
    let text = std::fs::read(onnx("index.json")).unwrap();
    let list: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let get = |v: &serde_json::Value, key: &str| v[key].as_str().unwrap().to_owned();
    list.iter().map(|v| (get(v, "file"), get(v, "part"), get(v, "model"))).collect()
}

#[test]
fn every_export_gives_the_graph_and_weights_of_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (native_out, out) = (dir.path().join("n.latile"), dir.path().join("o.latile"));
    let mut seen = 0;
    for (file, part, model) in index() {
        let role = match part.as_str() {
            "unet" => Role::Unet,
            "encoder" => Role::Encoder,
            _ => Role::Decoder,
        };
        export(&fixtures().join("models").join(&model), &native_out, &options(), &mut go).unwrap();
        let native = Model::open(&native_out).unwrap();
        let (imported, summary) = imported(&of(role, onnx(&file)), &out);
        let (a, b) = (imported.load(role).unwrap(), native.load(role).unwrap());
        let (ours, theirs) = (a.spec(), b.spec());
        if part == "decoder-not-quantized" {
            // The same but for the codebook in front.
            assert!(
                ours.graph.nodes.iter().all(|n| !matches!(n.op, Op::Codebook { .. })),
                "{file}"
            );
            assert_eq!(ours.graph.nodes.len() + 1, theirs.graph.nodes.len(), "{file}");
            seen += 1;
            continue;
        }
        assert_eq!(ours.graph, theirs.graph, "{file}: {:?}", summary.notes);
        assert_eq!((ours.multiple, ours.timestep), (theirs.multiple, theirs.timestep), "{file}");
        for i in 0..ours.graph.weights.len() as u32 {
            let name = &ours.graph.weights[i as usize].name;
            assert!(a.weight(WeightId(i)) == b.weight(WeightId(i)), "{file}: {name}");
        }
        seen += 1;
    }
    assert!(seen >= 8, "{seen} files");
}

#[test]
fn a_unet_and_a_decoder_together_are_super_resolution() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m.latile");
    let parts = OnnxParts {
        unet: Some(onnx("unet-opset17.onnx")),
        decoder: Some(onnx("decoder-dynamo-dynamic.onnx")),
        scheduler: Some(fixtures().join("models/old-bin/scheduler/scheduler_config.json")),
        ..OnnxParts::default()
    };
    let (model, summary) = imported(&parts, &out);
    let native = dir.path().join("n.latile");
    export(&fixtures().join("models/old-bin"), &native, &options(), &mut go).unwrap();
    let native = Model::open(&native).unwrap();
    let (a, b) = (model.manifest(), native.manifest());
    assert_eq!(a.task, Task::SuperResolution);
    assert_eq!((a.latent, a.scheduler), (b.latent, b.scheduler));
    assert!(summary.notes.is_empty(), "{:?}", summary.notes);
    // Without a scheduler the assumption is said aloud.
    let (_, summary) = imported(&OnnxParts { scheduler: None, ..parts }, &out);
    assert!(summary.notes.iter().any(|n| n.contains("noise schedule")), "{:?}", summary.notes);
}

fn refused(parts: &OnnxParts) -> String {
    let dir = tempfile::tempdir().unwrap();
    let e = export_onnx(parts, &dir.path().join("m.latile"), &options(), &mut go).unwrap_err();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    e.to_string()
}

#[test]
fn files_that_are_not_such_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.onnx");
    for bytes in [&b""[..], b"not a protobuf at all", &[0xff; 100]] {
        std::fs::write(&file, bytes).unwrap();
        let e = refused(&of(Role::Unet, file.clone()));
        assert!(e.contains("bad.onnx") && e.contains("not an ONNX"), "{e}");
    }
    let whole = std::fs::read(onnx("unet-opset17.onnx")).unwrap();
    for cut in [1, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..cut]).unwrap();
        let e = refused(&of(Role::Unet, file.clone()));
        assert!(e.contains("bad.onnx"), "{cut}: {e}");
    }
    // Parts mistaken for one another.
    let e = refused(&of(Role::Decoder, onnx("unet-opset17.onnx")));
    assert!(e.contains("timestep"), "{e}");
    let e = refused(&of(Role::Unet, onnx("decoder-opset17.onnx")));
    assert!(e.contains("timestep"), "{e}");
    assert!(refused(&OnnxParts::default()).contains("no ONNX file"));
}

#[test]
fn changed_bytes_are_errors_or_other_weights_but_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.onnx"), dir.path().join("m.latile"));
    let whole = std::fs::read(onnx("decoder-opset17.onnx")).unwrap();
    let mut state = 1u64;
    for _ in 0..150 {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut bytes = whole.clone();
        let at = (state >> 33) as usize % bytes.len();
        bytes[at] ^= (state >> 20) as u8 | 1;
        std::fs::write(&file, &bytes).unwrap();
        let _ = export_onnx(&of(Role::Decoder, file.clone()), &out, &options(), &mut go);
    }
}

#[test]
fn external_data_must_be_beside_the_model_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("unet-dynamo-dynamic.onnx");
    let data = dir.path().join("unet-dynamo-dynamic.onnx.data");
    std::fs::copy(onnx("unet-dynamo-dynamic.onnx"), &file).unwrap();
    let e = refused(&of(Role::Unet, file.clone()));
    assert!(e.contains("unet-dynamo-dynamic.onnx.data"), "{e}");
    let whole = std::fs::read(onnx("unet-dynamo-dynamic.onnx.data")).unwrap();
    std::fs::write(&data, &whole[..whole.len() / 2]).unwrap();
    let e = refused(&of(Role::Unet, file));
    assert!(e.contains("truncated"), "{e}");
}

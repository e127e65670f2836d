//! The ONNX route: every exported graph among the fixtures, against the numbers that diffusers computed for
//! the folder the graph was exported from.
#![cfg(feature = "onnx")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use latile_cpu::session::CpuBackend;
use latile_export::ExportOptions;
use latile_export::onnx::{OnnxParts, export_onnx};
use latile_runtime::format::{Model, Precision, Role};
use latile_tests::{Tensors, exported, fixture, fixture_json, relative_error, run};
use std::ops::ControlFlow;
use std::path::Path;

fn export(parts: &OnnxParts, output: &Path) -> Model {
    let options =
        ExportOptions { precision: Precision::F32, encoder: true, ..ExportOptions::default() };
    export_onnx(parts, output, &options, &mut |_| ControlFlow::Continue(()))
        .unwrap_or_else(|e| panic!("{parts:?}: {e}"));
    Model::open(output).unwrap()
}

#[test]
fn onnx_graphs_agree_with_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let backend = CpuBackend::from_env(2).unwrap();
    let models = fixture_json("models/index.json");
    let index = fixture_json("onnx/index.json");
    let entries = index.as_array().unwrap();
    assert!(entries.len() >= 12);
    for entry in entries {
        let text = |key: &str| entry[key].as_str().unwrap().to_owned();
        let (file, source, part) = (text("file"), text("model"), text("part"));
        let path = Some(fixture(&format!("onnx/{file}")));
        let model = models.as_array().unwrap().iter().find(|m| m["name"] == *source).unwrap();
        let autoencoder = model["autoencoder_folder"].as_str().unwrap();
        let (role, parts, recorded, output) = match part.as_str() {
            "unet" => (
                Role::Unet,
                OnnxParts { unet: path, ..OnnxParts::default() },
                "unet/io".to_owned(),
                "sample",
            ),
            "encoder" => (
                Role::Encoder,
                OnnxParts { encoder: path, ..OnnxParts::default() },
                format!("{autoencoder}/encoder_io"),
                "latents",
            ),
            "decoder" | "decoder-not-quantized" => (
                Role::Decoder,
                OnnxParts { decoder: path, ..OnnxParts::default() },
                format!("{autoencoder}/decoder_io"),
                if part == "decoder" { "sample" } else { "sample_force_not_quantize" },
            ),
            other => panic!("{other}"),
        };
        let model = export(&parts, &folder.path().join(format!("{file}.latile")));
        let recorded = Tensors::read(&fixture(&format!("models/{source}/{recorded}.safetensors")));
        for (i, case) in recorded.cases().iter().enumerate() {
            let found = run(&backend, &model, role, &case.inputs);
            let (_, found) = found.first_key_value().unwrap();
            let error = relative_error(found, case.outputs[output]);
            println!("{file} case {i}: {error:.1e} of the range");
            assert!(error <= 1e-4, "{file} case {i}: {error:e}");
        }
    }
}

/// Both routes from one model: the same bits.
#[test]
fn onnx_and_folder_give_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let backend = CpuBackend::from_env(2).unwrap();
    let parts = OnnxParts {
        unet: Some(fixture("onnx/unet-opset17.onnx")),
        decoder: Some(fixture("onnx/decoder-opset17.onnx")),
        ..OnnxParts::default()
    };
    let onnx = export(&parts, &folder.path().join("m.latile"));
    let native = exported(&fixture("models/old-bin"), Precision::F32);
    for (role, file) in
        [(Role::Unet, "unet/io.safetensors"), (Role::Decoder, "vqvae/decoder_io.safetensors")]
    {
        let recorded = Tensors::read(&fixture(&format!("models/old-bin/{file}")));
        for case in recorded.cases() {
            let a = run(&backend, &onnx, role, &case.inputs);
            let b = run(&backend, &native.model, role, &case.inputs);
            assert_eq!(a, b, "{role}");
        }
    }
}

//! Whole diffusers folders, exported and run by the interpreter, against what diffusers itself computed.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{error, fixtures, read_maps, run};
use latile_export::{ExportError, ExportOptions, Progress, export};
use latile_runtime::format::{Model, Precision, Role, Task};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const MODELS: [&str; 11] = [
    "sr",
    "sr-odd",
    "attention-all",
    "scale-shift",
    "scale-shift-attention",
    "inpaint",
    "semantic",
    "options",
    "no-attention",
    "no-middle",
    "old-bin",
];

fn autoencoder(folder: &Path) -> PathBuf {
    ["vqvae", "vae"].iter().map(|n| folder.join(n)).find(|p| p.is_dir()).unwrap()
}

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn exported(folder: &Path, precision: Precision, out: &Path) -> Model {
    let options = ExportOptions { precision, overwrite: true, ..ExportOptions::default() };
    export(folder, out, &options, &mut go).unwrap();
    let model = Model::open(out).unwrap();
    model.verify().unwrap();
    model
}

#[test]
fn every_variant_computes_what_diffusers_computes() {
    let dir = tempfile::tempdir().unwrap();
    for name in MODELS {
        let folder = fixtures().join("models").join(name);
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::F16, 2e-3)] {
            let model = exported(&folder, precision, &dir.path().join("m.latile"));
            let check = |what: &str, found: common::Map, expected: &common::Map| {
                let e = error(&found, expected);
                assert!(e <= tolerance, "{name} {what} {precision:?}: {e:e}");
            };
            let timestep = model.component(Role::Unet).unwrap().timestep.unwrap();
            let io = read_maps(&folder.join("unet/io.safetensors"));
            for case in 0..3 {
                let mut projected = vec![0f32; timestep.dim as usize];
                timestep
                    .project(io[&format!("{case}.inputs.timestep")].data[0] as f32, &mut projected);
                let time = common::Map {
                    h: 1,
                    w: 1,
                    c: projected.len(),
                    data: projected.into_iter().map(f64::from).collect(),
                };
                let sample = io[&format!("{case}.inputs.sample")].clone();
                let found = run(&model, Role::Unet, &[("sample", sample), ("time_proj", time)]);
                check("unet", found, &io[&format!("{case}.outputs.sample")]);
            }
            let folder = autoencoder(&folder);
            let io = read_maps(&folder.join("decoder_io.safetensors"));
            for case in 0..3 {
                let latents = io[&format!("{case}.inputs.latents")].clone();
                let found = run(&model, Role::Decoder, &[("latents", latents)]);
                check("decoder", found, &io[&format!("{case}.outputs.sample")]);
            }
            let io = read_maps(&folder.join("encoder_io.safetensors"));
            for case in 0..3 {
                let sample = io[&format!("{case}.inputs.sample")].clone();
                let found = run(&model, Role::Encoder, &[("sample", sample)]);
                let outputs = ["latents", "moments"].map(|n| format!("{case}.outputs.{n}"));
                let expected = outputs.iter().find_map(|n| io.get(n)).unwrap();
                check("encoder", found, expected);
            }
        }
    }
}

#[test]
fn manifests_say_what_folders_say() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m.latile");
    let model = exported(&fixtures().join("models/sr"), Precision::F16, &out);
    let m = model.manifest();
    assert_eq!(m.task, Task::SuperResolution);
    assert_eq!((m.metadata.name.as_str(), m.metadata.source.as_str()), ("sr", "diffusers"));
    assert_eq!(m.metadata.source_hash.len(), 64);
    let latent = m.latent.unwrap();
    // LDMSuperResolutionPipeline never scales, whatever its autoencoder's config says.
    assert_eq!((latent.channels, latent.factor, latent.scale, latent.shift), (3, 4, 1.0, 0.0));
    let model = exported(&fixtures().join("models/scale-shift-attention"), Precision::F32, &out);
    let latent = model.manifest().latent.unwrap();
    assert_eq!((latent.scale, latent.shift), (0.3611, 0.1159));
    assert_eq!(model.manifest().task, Task::Components);
}

#[test]
fn an_existing_output_needs_overwrite_and_a_cancelled_export_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m.latile");
    let folder = fixtures().join("models/sr");
    let options = ExportOptions::default();
    let stop = |p: Progress| {
        if p.stage == "writing" { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let e = export(&folder, &out, &options, &mut { stop }).unwrap_err();
    assert!(matches!(e, ExportError::Cancelled), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    std::fs::write(&out, b"mine").unwrap();
    let e = export(&folder, &out, &options, &mut go).unwrap_err();
    assert!(matches!(e, ExportError::Persist(_)), "{e}");
    assert_eq!(std::fs::read(&out).unwrap(), b"mine");
}

#[test]
fn the_same_folder_gives_the_same_bytes_and_the_encoder_is_optional() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let folder = fixtures().join("models/sr");
    exported(&folder, Precision::F16, &a);
    exported(&folder, Precision::F16, &b);
    let whole = std::fs::read(&a).unwrap();
    assert_eq!(whole, std::fs::read(&b).unwrap());
    let options = ExportOptions { encoder: false, overwrite: true, ..ExportOptions::default() };
    let summary = export(&folder, &b, &options, &mut go).unwrap();
    assert!(summary.notes.is_empty(), "{:?}", summary.notes);
    let model = Model::open(&b).unwrap();
    assert!(model.component(Role::Encoder).is_err());
    assert!(model.component(Role::Decoder).is_ok());
}

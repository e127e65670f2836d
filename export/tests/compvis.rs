//! CompVis checkpoints: the same weights give the same file as their diffusers folder, whatever else they carry.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Tensors, fixtures, read_tensors, write_tensors};
use latile_export::compvis::{Ema, Heads, Hints};
use latile_export::{ExportError, ExportOptions, Progress, Summary, export};
use latile_runtime::format::{Manifest, Metadata, Model, Role, Task};
use std::ops::ControlFlow;
use std::path::Path;

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The fixture has norms in 4 groups and heads of 8, which a checkpoint does not record.
fn options() -> ExportOptions {
    let hints = Hints { heads: Some(Heads::Width(8)), norm_groups: Some(4), ..Hints::default() };
    ExportOptions { overwrite: true, hints, ..ExportOptions::default() }
}

fn exported(checkpoint: &Path, out: &Path, options: &ExportOptions) -> (Model, Summary) {
    let summary = export(checkpoint, out, options, &mut go).unwrap();
    let model = Model::open(out).unwrap();
    model.verify().unwrap();
    (model, summary)
}

/// A manifest without what may differ: where it came from, and how CompVis spaces its timesteps.
fn networks(model: &Model) -> Manifest {
    let mut m = model.manifest().clone();
    m.metadata = Metadata::default();
    m.scheduler = None;
    m
}

fn weights(model: &Model) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for role in [Role::Unet, Role::Decoder, Role::Encoder] {
        let c = model.load(role).unwrap();
        let count = c.spec().graph.weights.len() as u32;
        out.extend((0..count).map(|i| c.weight(latile_runtime::graph::WeightId(i)).to_vec()));
    }
    out
}

fn fixture() -> Tensors {
    read_tensors(&fixtures().join("compvis/sr.safetensors"))
}

#[test]
fn compvis_and_diffusers_layouts_of_the_same_weights_give_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m.latile");
    let (theirs, _) = exported(&fixtures().join("models/sr"), &out, &ExportOptions::default());
    for name in ["compvis/sr.ckpt", "compvis/sr.safetensors"] {
        let (ours, _) = exported(&fixtures().join(name), &dir.path().join("c.latile"), &options());
        assert_eq!(networks(&ours), networks(&theirs), "{name}");
        assert!(weights(&ours) == weights(&theirs), "{name}");
        let (a, b) = (ours.manifest().scheduler.unwrap(), theirs.manifest().scheduler.unwrap());
        assert_eq!(
            (a.betas, a.prediction, a.train_timesteps),
            (b.betas, b.prediction, b.train_timesteps)
        );
        assert_eq!(ours.manifest().task, Task::SuperResolution);
        assert_eq!(ours.manifest().metadata.source, "compvis");
    }
}

/// The fixture with complete averaged weights, each the plain one plus a quarter.
fn with_ema() -> Tensors {
    let mut tensors = fixture();
    let plain: Tensors = tensors
        .iter()
        .filter(|(n, _)| n.starts_with("model.diffusion_model."))
        .map(|(n, t)| (n.clone(), t.clone()))
        .collect();
    for (name, (shape, values)) in plain {
        let name = name.strip_prefix("model.").unwrap().replace('.', "");
        let moved = values.iter().map(|v| v + 0.25).collect();
        tensors.insert(format!("model_ema.{name}"), (shape, moved));
    }
    tensors
}

#[test]
fn averaged_weights_are_used_where_complete_and_never_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.safetensors"), dir.path().join("m.latile"));
    write_tensors(&file, &with_ema());
    let bias = |model: &Model| {
        let c = model.load(Role::Unet).unwrap();
        let specs = &c.spec().graph.weights;
        let at = specs.iter().position(|w| w.name == "conv_out.bias").unwrap();
        let bytes = c.weight(latile_runtime::graph::WeightId(at as u32));
        f32::from_le_bytes(bytes[..4].try_into().unwrap())
    };
    let plain = fixture()["model.diffusion_model.out.2.bias"].1[0];
    for (ema, expected, said) in [
        (Ema::Auto, plain + 0.25, "averaged (EMA) U-Net weights are used"),
        (Ema::Yes, plain + 0.25, "averaged (EMA) U-Net weights are used"),
        (Ema::No, plain, "plain U-Net weights are used"),
    ] {
        let (model, summary) = exported(&file, &out, &ExportOptions { ema, ..options() });
        assert_eq!(bias(&model), expected, "{ema:?}");
        assert!(summary.notes.iter().any(|n| n.contains(said)), "{:?}", summary.notes);
    }
    // One averaged tensor gone: auto falls back and says so, yes refuses.
    let mut tensors = with_ema();
    tensors.remove("model_ema.diffusion_modeltime_embed0bias").unwrap();
    write_tensors(&file, &tensors);
    let (model, summary) = exported(&file, &out, &options());
    assert_eq!(bias(&model), plain);
    assert!(summary.notes.iter().any(|n| n.contains("time_embed.0.bias")), "{:?}", summary.notes);
    let e =
        export(&file, &out, &ExportOptions { ema: Ema::Yes, ..options() }, &mut go).unwrap_err();
    assert!(matches!(e, ExportError::NoEma { .. }), "{e}");
}

#[test]
fn a_config_beside_the_checkpoint_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("model.safetensors"), dir.path().join("m.latile"));
    write_tensors(&file, &fixture());
    std::fs::write(
        dir.path().join("model.yaml"),
        "model:\n  params:\n    parameterization: v\n    num_head_channels: 4\n",
    )
    .unwrap();
    let hints = Hints { norm_groups: Some(4), ..Hints::default() };
    let (model, summary) = exported(&file, &out, &ExportOptions { hints, ..options() });
    assert_eq!(
        model.manifest().scheduler.unwrap().prediction,
        latile_runtime::format::Prediction::V
    );
    assert!(summary.notes[0].contains("model.yaml"), "{:?}", summary.notes);
    let heads = model.component(Role::Unet).unwrap().graph.nodes.iter().find_map(|n| match n.op {
        latile_runtime::graph::Op::Attention { heads, .. } => Some(heads),
        _ => None,
    });
    let channels = fixture()["model.diffusion_model.middle_block.1.proj_out.bias"].0[0];
    assert_eq!(heads, Some(channels as u32 / 4));
}

#[test]
fn autoencoders_alone_become_components() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.safetensors"), dir.path().join("m.latile"));
    let stage: Tensors = fixture()
        .into_iter()
        .filter_map(|(n, t)| Some((n.strip_prefix("first_stage_model.")?.to_owned(), t)))
        .collect();
    write_tensors(&file, &stage);
    let (model, _) = exported(&file, &out, &options());
    assert_eq!(model.manifest().task, Task::Components);
    assert!(model.component(Role::Unet).is_err());
    assert!(model.component(Role::Decoder).is_ok());
}

#[test]
fn checkpoints_that_are_not_understood_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.safetensors"), dir.path().join("m.latile"));
    let tensor = |n: usize| (vec![n], vec![0.0; n]);
    let u = "model.diffusion_model.";
    type Change = Box<dyn Fn(&mut Tensors)>;
    let cases: Vec<(&str, Change)> = vec![
        (
            "cross-attention",
            Box::new(move |t: &mut Tensors| {
                t.insert(
                    format!("{u}middle_block.1.transformer_blocks.0.attn1.to_q.weight"),
                    tensor(4),
                );
            }),
        ),
        (
            "class conditioning",
            Box::new(move |t: &mut Tensors| {
                t.insert(format!("{u}label_emb.weight"), tensor(4));
            }),
        ),
        (
            "no place in the network",
            Box::new(move |t: &mut Tensors| {
                t.insert(format!("{u}input_blocks.99.0.op.weight"), tensor(4));
            }),
        ),
        (
            "attention in some blocks",
            Box::new(move |t: &mut Tensors| {
                let qkv = t
                    .keys()
                    .find(|n| n.contains("input_blocks") && n.ends_with("qkv.weight"))
                    .unwrap()
                    .clone();
                t.remove(&qkv).unwrap();
            }),
        ),
        (
            "quantizer",
            Box::new(move |t: &mut Tensors| {
                let book = t.remove("first_stage_model.quantize.embedding.weight").unwrap();
                t.insert("first_stage_model.quantize.embed.weight".into(), book);
            }),
        ),
        (
            "conv_out.bias is missing",
            Box::new(move |t: &mut Tensors| {
                t.remove("first_stage_model.decoder.conv_out.bias").unwrap();
            }),
        ),
        (
            "time_embed.2.weight has shape",
            Box::new(move |t: &mut Tensors| {
                t.get_mut(&format!("{u}time_embed.2.weight")).unwrap().0.reverse();
                let (shape, values) = t.get_mut(&format!("{u}time_embed.2.weight")).unwrap();
                *shape = vec![values.len()];
            }),
        ),
        (
            "are not a U-Net's",
            Box::new(move |t: &mut Tensors| {
                t.retain(|n, _| !n.contains("output_blocks.5.1.conv."));
            }),
        ),
        (
            "betas",
            Box::new(|t: &mut Tensors| {
                t.remove("betas").unwrap();
            }),
        ),
        (
            "linear nor a scaled linear",
            Box::new(|t: &mut Tensors| {
                t.get_mut("betas").unwrap().1[500] = 0.5;
            }),
        ),
        (
            "scale_factor is NaN",
            Box::new(move |t: &mut Tensors| {
                t.insert("scale_factor".into(), (vec![], vec![f32::NAN]));
            }),
        ),
        (
            "not a latent diffusion model's",
            Box::new(|t: &mut Tensors| t.retain(|n, _| n.contains("betas"))),
        ),
    ];
    for (said, change) in cases {
        let mut tensors = fixture();
        change(&mut tensors);
        write_tensors(&file, &tensors);
        let e = export(&file, &out, &options(), &mut go).unwrap_err().to_string();
        assert!(e.contains(said) && e.contains("m.safetensors"), "{said}: {e}");
        assert!(!out.exists());
    }
    // Heads that do not divide the channels.
    write_tensors(&file, &fixture());
    let hints = Hints { heads: Some(Heads::Width(7)), norm_groups: Some(4), ..Hints::default() };
    let e = export(&file, &out, &ExportOptions { hints, ..options() }, &mut go)
        .unwrap_err()
        .to_string();
    assert!(e.contains("num_head_channels"), "{e}");
}

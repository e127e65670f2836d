//! An int8 model from end to end: the same file from every machine, and the same bits out of it on every
//! instruction set and at any number of threads. What is expected was recorded on x86-64, so that other
//! architectures are held to the same.
#![allow(clippy::unwrap_used)]

use latile_calibration::{Method, RgbPicture, Table, calibrate, read_pictures};
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_export::{ExportOptions, Quantization};
use latile_runtime::format::{Model, Precision, Role, Writer};
use latile_runtime::graph::{Graph, Op, WeightId};
use latile_runtime::pipeline::{Options, Picture, Pixels, upscale_rows};
use latile_tests::{Exported, Tensors, exported, exported_with, fixture, run};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

/// A fixture, and BLAKE3 of its int8 model's file, of what U-Net and decoder make of the fixture's inputs, and of a
/// run of four steps.
type Recorded = (&'static str, [&'static str; 4]);

/// One like the LDM-SR, one like the bundled model.
const RECORDED: [Recorded; 2] = [
    (
        "sr",
        [
            "58d58c885d051366bb9fda267725c8098ab6e64d889dce26d360ec7419de3314",
            "db82f4d28d6787469f9e0944f5185d69dece23f73e2e3861d94e7f5988245d99",
            "33aa661be2597d0ddbc2af5794ee99c7c63229696242c84e565143f52834edd2",
            "342c00c02c38339a42146978a837abf5fa4a62e635c89245e9fd6fcce8be98d6",
        ],
    ),
    (
        "photo",
        [
            "885af9c7d3a1f073f24fab53a5ffd6fe4268be5b4f924edbe8670f351261092b",
            "3b38b6d03da38ebff7e60757a276d6c8ee8ecb48939d10404688b65e6033608e",
            "6e414d77723744c4d3d61294690156143bab638d5aee094db6c8f7f880c8a122",
            "b349d01e9198c8d8bf5accf63db5510fdb559b66170526bc4f8dbf1d0d1acd1e",
        ],
    ),
];

/// U-Net and decoder of `sr`, all attention in int8.
const ATTENTION: [&str; 2] = [
    "709c7a35b4b74e6830c9dcce790be71714ae0f4de38ed0c3269279a867f1f0ef",
    "96519c5a7d9314919238e9b03ee570011598bf124eef7642d956f3abea00101a",
];

/// The float model of `name`, calibrated over a trajectory of two steps.
fn table(name: &str) -> Table {
    let float = exported(&fixture(&format!("models/{name}")), Precision::F32);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.png"), "a picture by arithmetic").unwrap();
    let options = latile_calibration::Options {
        steps: 2,
        count: 1,
        groups: 2,
        size: 16,
        ..latile_calibration::Options::default()
    };
    let mut decode = |_: &Path| {
        let rgb = (0..80 * 64 * 3u32).map(|i| (i * 31 / 7 % 256) as u8).collect();
        Ok(RgbPicture { width: 80, height: 64, rgb })
    };
    let set = read_pictures(&float.model, folder.path(), &options, &mut decode).unwrap();
    let backend = CpuBackend::from_env(2).unwrap();
    let go = &mut |_: &latile_calibration::Progress<'_>| ControlFlow::Continue(());
    calibrate(&float.model, &backend, &set, &options, go).unwrap()
}

fn int8(name: &str) -> Exported {
    let quantization =
        Quantization { table: table(name), method: Method::Mse, keep_f16: Vec::new(), mixed: None };
    let options = ExportOptions {
        precision: Precision::Int8,
        quantization: Some(quantization),
        ..ExportOptions::default()
    };
    exported_with(&fixture(&format!("models/{name}")), &options)
}

fn hash<'a>(maps: impl IntoIterator<Item = &'a [f32]>) -> String {
    let mut hasher = blake3::Hasher::new();
    for v in maps.into_iter().flatten() {
        hasher.update(&v.to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// What `role` makes of all recorded inputs of fixture `name`.
fn outputs(backend: &CpuBackend, model: &Model, name: &str, role: Role) -> String {
    let file = match role {
        Role::Unet => "unet/io.safetensors",
        _ => "vqvae/decoder_io.safetensors",
    };
    let io = Tensors::read(&fixture(&format!("models/{name}/{file}")));
    let made: Vec<_> =
        io.cases().iter().flat_map(|c| run(backend, model, role, &c.inputs)).collect();
    hash(made.iter().map(|(_, t)| &t.data[..]))
}

/// A complete run of four steps.
fn upscaled(backend: &CpuBackend, model: &Model) -> String {
    let pixels: Vec<u8> = (0..20 * 16 * 3u32).map(|i| (i * 29 / 5 % 256) as u8).collect();
    let picture = Picture { width: 20, height: 16, pixels: Pixels::Rgb8(&pixels) };
    let options = Options { steps: Some(4), eta: Some(1.0), ..Options::default() };
    let mut rows: Vec<Vec<f32>> = Vec::new();
    let go = &mut |_: &_| ControlFlow::Continue(());
    let mut keep = |_, row: &[f32]| rows.push(row.to_vec());
    upscale_rows(backend, model, picture, &options, go, &mut keep).unwrap();
    assert_eq!(rows.len(), 64);
    hash(rows.iter().map(Vec::as_slice))
}

/// Calls `with` with every instruction set of this machine and these numbers of threads.
fn on_all(
    threads: impl IntoIterator<Item = usize> + Clone,
    mut with: impl FnMut(&CpuBackend, &str),
) {
    for level in Level::available() {
        for threads in threads.clone() {
            let backend = CpuBackend::new(threads, level).unwrap();
            with(&backend, &format!("{}, {threads} threads", level.isa().name()));
        }
    }
}

#[test]
fn the_same_file_and_the_same_bits_everywhere() {
    let mut wrong = Vec::new();
    for (name, recorded) in RECORDED {
        let exported = int8(name);
        let layers = |role| {
            let graph = &exported.model.component(role).unwrap().graph;
            graph.nodes.iter().filter(|n| n.op.quant().is_some()).count()
        };
        assert!(layers(Role::Unet) > 15 && layers(Role::Decoder) > 10, "{name}");
        let file = blake3::hash(&std::fs::read(&exported.path).unwrap()).to_hex().to_string();
        let mut check = |what: &str, found: &str, recorded: &str| {
            if found != recorded {
                wrong.push(format!("{name}, {what}: {found}"));
            }
        };
        check("file", &file, recorded[0]);
        on_all([1, 3], |backend, on| {
            for (role, recorded) in [(Role::Unet, recorded[1]), (Role::Decoder, recorded[2])] {
                let found = outputs(backend, &exported.model, name, role);
                check(&format!("{role} on {on}"), &found, recorded);
            }
        });
        // Emulated elsewhere, and slow there.
        let most = if cfg!(target_arch = "x86_64") { 8 } else { 2 };
        on_all(1..=most, |backend, on| {
            check(&format!("a run on {on}"), &upscaled(backend, &exported.model), recorded[3]);
        });
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// The fixtures' heads are too narrow to become int8 of themselves: here they are made so.
#[test]
fn attention_over_bytes_gives_the_same_bits_everywhere() {
    let exported = int8("sr");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attention.latile");
    let mut writer = Writer::new(File::create(&path).unwrap()).unwrap();
    let mut marked = 0;
    for spec in &exported.model.manifest().components {
        let mut graph: Graph = spec.graph.clone();
        for node in &mut graph.nodes {
            if let Op::Attention { int8, .. } = &mut node.op {
                *int8 = true;
                marked += 1;
            }
        }
        let weights = graph.weights.len() as u32;
        writer
            .begin(spec.role, spec.multiple, spec.timestep, &spec.timestep_groups, graph)
            .unwrap();
        let loaded = exported.model.load(spec.role).unwrap();
        (0..weights).for_each(|i| writer.weight(loaded.weight(WeightId(i))).unwrap());
    }
    assert!(marked > 3);
    let manifest = exported.model.manifest().clone();
    writer.finish(latile_runtime::format::Manifest { components: Vec::new(), ..manifest }).unwrap();
    let model = Model::open(&path).unwrap();
    on_all([2], |backend, on| {
        let both = [Role::Unet, Role::Decoder].map(|role| outputs(backend, &model, "sr", role));
        assert_eq!(both, ATTENTION, "on {on}");
    });
}

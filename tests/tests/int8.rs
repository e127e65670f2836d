//! An int8 model from end to end: the same file from every machine, and the same bits out of it on every
//! instruction set and at any number of threads. What is expected was recorded on x86-64, so that other
//! architectures are held to the same.
#![allow(clippy::unwrap_used)]

use latile_calibration::{Method, RgbPicture, Table, calibrate, read_pictures};
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_export::{ExportOptions, Quantization, Winograd};
use latile_runtime::format::{Model, Precision, Role, Writer};
use latile_runtime::graph::{Graph, Op, WeightId, Winograd as Algorithm};
use latile_runtime::pipeline::{Options, Picture, Pixels, upscale_rows};
use latile_tests::{Exported, Tensors, cases, exported, exported_with, fixture, run};
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
            "1d0f70400219f0091ffd5913ce82da2bd7ea4d73f464ee373715332526cc03d5",
            "1d903a5079ce14d086743d6d6a0463b0552f46b47251f3221c2f9dcefeb33d7f",
            "c459f3a4f8c0f05212fdafd4a410907df74503c0ef104948e305855a88b23ea8",
            "8282ce97199b1c654b49326aa936e5b0ecba35e3d10fa467408ff9dd2651f812",
        ],
    ),
    (
        "photo",
        [
            "a9882be61a72504b1280f62bdb491c29fc0586a177c4dc18d8d414d11e3bddbf",
            "fce6353ac4a358d48e9178b68a64fa1c5888fba1e7c2c857b33f53c3605ec56a",
            "d41210ad432a731b70009db612223eea98ab4a21d929fb10f097677ca018c2ab",
            "efae5df39fbe4ad147004a8245a67833f07bfbe50debfce566fd7fd1eeec3cb4",
        ],
    ),
];

/// U-Net and decoder of `sr`, all attention in int8.
const ATTENTION: [&str; 2] = [
    "9ed9cb37ca5f64bbb1d0e2288a5dd2d8a6e2a297825c61279fdc4697a3bc0d38",
    "3b765cc895d6dd274e2aefca980eb426fabc23be3cd336ceb2200e110d44c477",
];

/// The file of `sr` with all convolutions by Winograd's F(2, 3) that can be, and what its U-Net and decoder make.
const ROWS: [&str; 3] = [
    "3a0a96e3ea9fa6fbe9951a44b3a2d0ef572f833e49b9976ee01599c90971e1eb",
    "f061b6fbcfb6146c641348e857da62ab77cfc3b6960478c8c560eaaf47a51145",
    "7662c7481bfed62228ee289fd681bb4a5b364819275406530a911037b65590ee",
];
/// The same by F(2 x 2, 3 x 3).
const SQUARES: [&str; 3] = [
    "58e3a7ad954e8dbf2078a49bab247c076983d6ebcb1d2a4722687786436ad489",
    "41a20720baa42c29320fc544d80b4d1b7af27e06a61094b6d6ed2da3a6c9ef83",
    "c6caa942287b71cfbb7c3b747b52e8604832a2e35323cdeec789cd62d5398b4e",
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
    int8_by(name, table(name), Winograd::Off)
}

fn int8_by(name: &str, table: Table, winograd: Winograd) -> Exported {
    let quantization = Quantization {
        table,
        method: Method::Mse,
        keep_f16: Vec::new(),
        mixed: None,
        winograd,
        keep_direct: Vec::new(),
    };
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
        on_all(1..=cases(8, 2), |backend, on| {
            check(&format!("a run on {on}"), &upscaled(backend, &exported.model), recorded[3]);
        });
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn fewer_products_give_the_same_bits_everywhere() {
    let both = table("sr");
    let mut rows = both.clone();
    for g in rows.components.iter_mut().flat_map(|c| &mut c.layers).flat_map(|l| &mut l.groups) {
        g.squares = None;
    }
    are_the_same(&int8_by("sr", rows, Winograd::All), Algorithm::Rows, &ROWS);
    are_the_same(&int8_by("sr", both, Winograd::All), Algorithm::Square, &SQUARES);
}

fn are_the_same(exported: &Exported, by: Algorithm, recorded: &[&str; 3]) {
    let fewer = |role| {
        let nodes = exported.model.component(role).unwrap().graph.nodes.iter();
        nodes.filter(|n| n.op.quant().is_some_and(|q| q.winograd == Some(by))).count()
    };
    assert!(fewer(Role::Unet) > 10 && fewer(Role::Decoder) > 5);
    let file = blake3::hash(&std::fs::read(&exported.path).unwrap()).to_hex().to_string();
    on_all([1, 3], |backend, on| {
        let [unet, decoder] =
            [Role::Unet, Role::Decoder].map(|r| outputs(backend, &exported.model, "sr", r));
        assert_eq!([&file, &unet, &decoder], recorded.each_ref(), "{by:?} on {on}");
    });
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

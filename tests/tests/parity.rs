//! Parity with diffusers: every fixture's networks, exported and run on every instruction set there is,
//! against the numbers that diffusers computed for the same weights and inputs.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_export::ExportOptions;
use latile_export::compvis::{Heads, Hints};
use latile_runtime::format::{Precision, Role};
use latile_tests::{
    Exported, Tensor, Tensors, exported, exported_with, fixture, fixture_json, relative_error, run,
};
use std::collections::BTreeMap;

/// The largest error over the range of what is expected, by precision.
fn tolerance(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 1e-4,
        Precision::F16 => 2e-3,
        Precision::Int8 | Precision::Mixed => unreachable!("int8 has tests of its own"),
    }
}

/// Every instruction set, and one of them with other numbers of threads.
fn backends() -> Vec<CpuBackend> {
    let mut backends: Vec<_> =
        Level::available().into_iter().map(|level| CpuBackend::new(2, level).unwrap()).collect();
    backends.push(CpuBackend::new(1, Level::best()).unwrap());
    backends.push(CpuBackend::new(3, Level::best()).unwrap());
    backends
}

/// Where fixture `name` keeps its autoencoder.
fn autoencoder(name: &str) -> String {
    let index = fixture_json("models/index.json");
    let entry = index.as_array().unwrap().iter().find(|e| e["name"] == name).unwrap();
    entry["autoencoder_folder"].as_str().unwrap().to_owned()
}

/// Runs every component of `exported` on every case recorded for fixture `name`.
fn check(name: &str, exported: &Exported) {
    let precision = exported.model.manifest().precision;
    let folder = autoencoder(name);
    for (role, file) in [
        (Role::Unet, "unet/io.safetensors".to_owned()),
        (Role::Decoder, format!("{folder}/decoder_io.safetensors")),
        (Role::Encoder, format!("{folder}/encoder_io.safetensors")),
    ] {
        let recorded = Tensors::read(&fixture(&format!("models/{name}/{file}")));
        for (i, case) in recorded.cases().iter().enumerate() {
            let mut first: Option<BTreeMap<String, Tensor>> = None;
            for backend in backends() {
                let found = run(&backend, &exported.model, role, &case.inputs);
                match &first {
                    // Kernels are bit-identical, so that only one result needs to be measured.
                    Some(first) => assert_eq!(bits(&found), bits(first), "{role} {i}: {backend:?}"),
                    None => {
                        for (output, tensor) in &found {
                            let error = relative_error(tensor, case.outputs[output.as_str()]);
                            let what = format!("{name} {role} {precision:?} case {i}, {output}");
                            println!("{what}: {error:.1e} of the range");
                            assert!(error <= tolerance(precision), "{what}: {error:e}");
                        }
                        first = Some(found);
                    }
                }
            }
        }
    }
}

fn bits(tensors: &BTreeMap<String, Tensor>) -> Vec<Vec<u32>> {
    let of = |t: &Tensor| t.data.iter().map(|v| v.to_bits()).collect();
    tensors.values().map(of).collect()
}

macro_rules! fixtures {
    ($($test:ident: $name:literal,)*) => {
        const NAMES: &[&str] = &[$($name),*];
        $(
            mod $test {
                use super::*;

                #[test]
                fn f32() {
                    check($name, &exported(&fixture(concat!("models/", $name)), Precision::F32));
                }

                #[test]
                fn f16() {
                    check($name, &exported(&fixture(concat!("models/", $name)), Precision::F16));
                }
            }
        )*
    };
}

fixtures! {
    sr: "sr",
    photo: "photo",
    sr_odd: "sr-odd",
    attention_all: "attention-all",
    scale_shift: "scale-shift",
    scale_shift_attention: "scale-shift-attention",
    inpaint: "inpaint",
    semantic: "semantic",
    options: "options",
    no_attention: "no-attention",
    no_middle: "no-middle",
    old_bin: "old-bin",
}

#[test]
fn no_fixture_is_left_out() {
    let index = fixture_json("models/index.json");
    let all: Vec<&str> =
        index.as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(all, NAMES);
}

/// The CompVis layout of the weights of `models/sr`: the same file, but for what says where it comes from
/// and how it is sampled when the user does not say.
#[test]
fn compvis_and_diffusers_layouts_give_the_same_file() {
    let hints = Hints {
        // The fixture is smaller than what CompVis published, whose numbers a checkpoint does not hold.
        heads: Some(Heads::Width(8)),
        norm_groups: Some(4),
        ..Hints::default()
    };
    for precision in [Precision::F32, Precision::F16] {
        let options = ExportOptions { precision, encoder: true, hints, ..ExportOptions::default() };
        let diffusers = exported(&fixture("models/sr"), precision);
        for file in ["compvis/sr.ckpt", "compvis/sr.safetensors"] {
            let compvis = exported_with(&fixture(file), &options);
            let (a, b) = (diffusers.model.manifest(), compvis.model.manifest());
            assert_eq!(a.components, b.components, "{file}");
            assert_eq!((a.precision, a.task, a.latent), (b.precision, b.task, b.latent));
            let (sa, sb) = (a.scheduler.unwrap(), b.scheduler.unwrap());
            assert_eq!((sa.train_timesteps, sa.prediction), (sb.train_timesteps, sb.prediction));
            assert_eq!(weights(&diffusers), weights(&compvis), "{file}");
        }
    }
}

/// The bytes of all weights as they lie in the file.
fn weights(exported: &Exported) -> Vec<u8> {
    // They begin at the second page (docs/format.md) and end where the last component's last weight does.
    let bytes = std::fs::read(&exported.path).unwrap();
    let places = exported.model.manifest().components.iter().flat_map(|c| &c.places);
    let end = places.map(|p| p.offset + p.extent).max().unwrap() as usize;
    assert!(end > 100_000);
    bytes[4096..4096 + end].to_vec()
}

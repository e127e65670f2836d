//! Whole super-resolution runs against recorded ones: diffusers' and CompVis' samplers, networks included.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use latile_cpu::session::CpuBackend;
use latile_runtime::format::{Precision, Spacing};
use latile_runtime::pipeline::{GivenNoise, NoiseTensor, Options, Picture, Pixels, upscale_rows};
use latile_tests::{Exported, Tensor, Tensors, exported, fixture, fixture_json, relative_error};
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::Path;

/// A copy of fixture `model` whose scheduler is `config`, exported.
fn model_with(model: &str, config: &Value) -> Exported {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join(model);
    copy_folder(&fixture(&format!("models/{model}")), &copy);
    let mut scheduler = config.clone();
    scheduler["_class_name"] = "DDIMScheduler".into();
    scheduler["num_train_timesteps"] = 1000.into();
    let path = copy.join("scheduler/scheduler_config.json");
    assert!(path.exists());
    std::fs::write(path, scheduler.to_string()).unwrap();
    exported(&copy, Precision::F32)
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn spacing(name: &str) -> Spacing {
    match name {
        "compvis" => Spacing::Compvis,
        "leading" => Spacing::Leading,
        "trailing" => Spacing::Trailing,
        "linspace" => Spacing::Linspace,
        other => panic!("{other}"),
    }
}

/// The upscaled picture, `[1, 3, H, W]`, −1 to 1 where the decoder keeps to that.
fn upscale(exported: &Exported, lr: &Tensor, options: &Options) -> (Tensor, Vec<u32>) {
    let backend = CpuBackend::from_env(2).unwrap();
    let [1, 3, h, w] = lr.shape[..] else { panic!("{:?}", lr.shape) };
    let pixels = lr.to_nhwc();
    let picture = Picture { width: w, height: h, pixels: Pixels::Unit(&pixels) };
    let mut out = Vec::new();
    let mut progress = |_: &_| ControlFlow::Continue(());
    let report =
        upscale_rows(&backend, &exported.model, picture, options, &mut progress, &mut |_, row| {
            out.extend_from_slice(row);
        })
        .unwrap();
    let width = w * 4;
    let height = out.len() / 3 / width;
    (Tensor::from_nhwc(&out, [height, width, 3]), report.timesteps)
}

fn noise(tensor: &Tensor) -> NoiseTensor {
    NoiseTensor { shape: tensor.shape.clone(), data: tensor.data.clone() }
}

/// Replays `run`, with the recorded noise and again with its seed alone.
fn replay(run: &Value) {
    let name = run["name"].as_str().unwrap();
    let recorded = Tensors::read(&fixture(&format!("sampling/{name}.safetensors")));
    let model = model_with(run["model"].as_str().unwrap(), &run["scheduler"]);
    let seeded = Options {
        steps: Some(run["steps"].as_u64().unwrap() as u32),
        eta: Some(run["eta"].as_f64().unwrap() as f32),
        spacing: Some(spacing(run["spacing"].as_str().unwrap())),
        seed: run["seed"].as_u64().unwrap(),
        ..Options::default()
    };
    let given = Options {
        noise: Some(GivenNoise {
            initial: noise(recorded.tensor("noise")),
            eta: recorded.get("step_noise").map(noise),
        }),
        seed: u64::MAX,
        ..seeded.clone()
    };
    for options in [&given, &seeded] {
        let (image, timesteps) = upscale(&model, recorded.tensor("lr"), options);
        let expected: Vec<u32> =
            recorded.tensor("timesteps").data.iter().map(|&t| t as u32).collect();
        assert_eq!(timesteps, expected, "{name}");
        let error = relative_error(&image, recorded.tensor("image"));
        println!("{name}: {error:.1e} of the range");
        assert!(error <= 1e-3, "{name}: {error:e}");
    }
}

/// Replays the recorded runs that `choose` picks, of which there are `count`. Tiled ones are not among
/// them: latile decodes tile by tile what the recording decoded whole; the runtime's own tests replay those
/// up to the decoder.
fn replay_all(count: usize, choose: impl Fn(&Value) -> bool) {
    let runs = fixture_json("sampling/runs.json");
    let whole = runs.as_array().unwrap().iter().filter(|r| r["tiled"] == false);
    let chosen: Vec<&Value> = whole.filter(|r| choose(r)).collect();
    assert!(chosen.len() >= count, "{} runs", chosen.len());
    chosen.into_iter().for_each(replay);
}

#[test]
fn four_steps() {
    replay_all(13, |r| r["model"] == "sr" && r["steps"] == 4);
}

#[test]
fn fifteen_steps() {
    replay_all(7, |r| r["model"] == "sr" && r["steps"] == 15);
}

#[test]
fn the_bundled_architecture() {
    replay_all(3, |r| r["model"] == "photo");
}

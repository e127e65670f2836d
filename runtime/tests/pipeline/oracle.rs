//! Whole sampling runs recorded in PyTorch (tests/oracle/make_sampling.py), replayed: the fake U-Net answers
//! with the recorded outputs, so noise, conditioning, schedule and updates are compared without a network.

use crate::fake::{Fake, Shaped, scheduler};
use latile_runtime::format::{BetaSchedule, LatentSpec, Prediction, SchedulerSpec, Spacing};
use latile_runtime::pipeline::{Generator, GivenNoise, NoiseTensor, Options};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

pub(crate) fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub(crate) fn fixture_json(name: &str) -> Value {
    serde_json::from_slice(&fixture(name)).unwrap()
}

pub(crate) fn spacing_of(name: &str) -> Spacing {
    match name {
        "compvis" => Spacing::Compvis,
        "leading" => Spacing::Leading,
        "trailing" => Spacing::Trailing,
        "linspace" => Spacing::Linspace,
        other => panic!("spacing {other}"),
    }
}

/// A diffusers scheduler config, with diffusers' defaults but no clipping unless it says so; `None` for the
/// cosine schedule, which latent diffusion models do not use.
pub(crate) fn scheduler_of(config: &Value) -> Option<SchedulerSpec> {
    let number = |key: &str, default: f64| config.get(key).map_or(default, |v| v.as_f64().unwrap());
    let flag = |key: &str, default: bool| config.get(key).map_or(default, |v| v.as_bool().unwrap());
    let text = |key: &str, default| config.get(key).map_or(default, |v| v.as_str().unwrap());
    let (start, end) = (number("beta_start", 0.0001), number("beta_end", 0.02));
    Some(SchedulerSpec {
        train_timesteps: number("num_train_timesteps", 1000.0) as u32,
        betas: match text("beta_schedule", "scaled_linear") {
            "linear" => BetaSchedule::Linear { start, end },
            "scaled_linear" => BetaSchedule::ScaledLinear { start, end },
            _ => return None,
        },
        prediction: match text("prediction_type", "epsilon") {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::V,
            "sample" => Prediction::Sample,
            other => panic!("prediction {other}"),
        },
        spacing: spacing_of(text("timestep_spacing", "leading")),
        steps_offset: number("steps_offset", 0.0) as u32,
        set_alpha_to_one: flag("set_alpha_to_one", true),
        clip_sample: flag("clip_sample", false).then(|| number("clip_sample_range", 1.0) as f32),
        zero_terminal_snr: flag("rescale_betas_zero_snr", false),
    })
}

pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(&self) -> Vec<f32> {
        let words = self.bytes.chunks_exact(4);
        words.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn i64(&self) -> Vec<i64> {
        let words = self.bytes.chunks_exact(8);
        words.map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// Its `[n, c, h, w]` as n maps in NHWC.
    fn maps(&self) -> Vec<Vec<f32>> {
        let [_, c, h, w] = self.shape[..] else { panic!("{:?}", self.shape) };
        self.f32()
            .chunks_exact(c * h * w)
            .map(|planes| {
                (0..h * w).flat_map(|p| (0..c).map(move |c| planes[c * h * w + p])).collect()
            })
            .collect()
    }
}

pub(crate) fn safetensors(bytes: &[u8]) -> HashMap<String, Tensor> {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let data = &bytes[8 + len..];
    header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, t)| {
            let numbers = |key: &str| -> Vec<usize> {
                let list = t[key].as_array().unwrap().iter();
                list.map(|n| n.as_u64().unwrap() as usize).collect()
            };
            let range = numbers("data_offsets");
            let tensor =
                Tensor { shape: numbers("shape"), bytes: data[range[0]..range[1]].to_vec() };
            (name.clone(), tensor)
        })
        .collect()
}

#[track_caller]
fn close(what: &str, found: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let range = wanted.iter().fold(1f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
        let fine = (a - b).abs() <= tolerance * range;
        assert!(fine, "{what}: element {i} is {a}, recorded {b}");
    }
}

/// Replays one run and compares everything that passes by.
fn replay(run: &Value, given: bool) {
    let name = run["name"].as_str().unwrap();
    let mut tensors = safetensors(&fixture(&format!("sampling/{name}.safetensors")));
    let mut take = |key: &str| tensors.remove(key);
    let (outputs, latents) =
        (take("model_outputs").unwrap().maps(), take("latents").unwrap().maps());
    let image = take("image").unwrap().maps().remove(0);
    let image_u8 = take("image_u8").unwrap().bytes;
    let (noise, step_noise) = (take("noise").unwrap(), take("step_noise"));
    let lr = take("lr").unwrap();
    let [_, channels, height, width] = noise.shape[..] else { panic!("{:?}", noise.shape) };
    let lr = lr.maps().remove(0);
    let picture: Vec<u8> = lr.iter().map(|v| ((v + 1.0) * 127.5).round() as u8).collect();

    let samples = Rc::new(RefCell::new(Vec::new()));
    let decoded = Rc::new(RefCell::new(Vec::new()));
    let (to_samples, to_decoded) = (Rc::clone(&samples), Rc::clone(&decoded));
    let fake = Fake::new(
        move |call| {
            call.out.copy_from_slice(&outputs[call.run]);
            to_samples.borrow_mut().push(call.sample.to_vec());
        },
        move |call| {
            call.out.copy_from_slice(&image);
            to_decoded.borrow_mut().extend_from_slice(call.sample);
        },
    );
    let factor = (image_u8.len() / (height * width * 3)).isqrt();
    let deep = channels as u32;
    let shaped = Shaped {
        scheduler: scheduler_of(&run["scheduler"]),
        latent: LatentSpec { channels: deep, factor: factor as u32, scale: 1.0, shift: 0.0 },
        unet: [deep + 3, deep],
        decoder: [deep, 3],
        doublings: factor.ilog2(),
        ..Shaped::default()
    };
    let initial = noise.maps().remove(0);
    let options = Options {
        steps: Some(run["steps"].as_u64().unwrap() as u32),
        eta: Some(run["eta"].as_f64().unwrap() as f32),
        seed: if given { 999 } else { run["seed"].as_u64().unwrap() },
        spacing: Some(spacing_of(run["spacing"].as_str().unwrap())),
        noise: given.then(|| GivenNoise {
            initial: NoiseTensor { shape: noise.shape.clone(), data: noise.f32() },
            eta: step_noise.as_ref().map(|t| NoiseTensor { shape: t.shape.clone(), data: t.f32() }),
        }),
        ..Options::default()
    };
    let result = fake
        .upscale(&shaped.build(), &picture, [height, width], &options)
        .unwrap_or_else(|e| panic!("{name}: {e}"));

    assert_eq!(result.report.steps, latents.len(), "{name}");
    let told: Vec<i64> = result.report.timesteps.iter().map(|&t| i64::from(t)).collect();
    assert_eq!(told, take("timesteps").unwrap().i64(), "{name}");
    // With given noise only the arithmetic differs; else also the logarithm, sine and cosine.
    let tolerance = if given { 1e-6 } else { 3e-6 };
    for (index, sample) in samples.borrow().iter().enumerate() {
        let pixels = || sample.chunks(channels + 3).map(|p| p.split_at(channels));
        let z: Vec<f32> = pixels().flat_map(|(z, _)| z.to_vec()).collect();
        let condition: Vec<f32> = pixels().flat_map(|(_, lr)| lr.to_vec()).collect();
        assert_eq!(condition, lr, "{name}: the condition at step {index}");
        let wanted = if index == 0 { &initial } else { &latents[index - 1] };
        close(&format!("{name}: latent before step {index}"), &z, wanted, tolerance);
    }
    let last = latents.last().unwrap();
    close(&format!("{name}: last latent"), &decoded.borrow(), last, tolerance);
    assert_eq!(result.rgb, image_u8, "{name}: bytes");
}

#[test]
fn recorded_runs_are_replayed() {
    let runs = fixture_json("sampling/runs.json");
    let mut replayed = 0;
    for run in runs.as_array().unwrap() {
        // Longer runs keep no model outputs, and those of tiles are kept blended.
        if run["steps"].as_u64().unwrap() <= 4 && run["tiled"] == false {
            replay(run, false);
            replay(run, true);
            replayed += 1;
        }
    }
    assert!(replayed >= 10, "only {replayed} runs");
}

/// LDM-SR's ᾱ over the whole schedule, and the others'.
#[test]
fn cumulative_products_are_torchs() {
    let tables = safetensors(&fixture("sampling/schedules.safetensors"));
    let configs = fixture_json("sampling/schedules.json");
    let mut compared = 0;
    for (name, table) in &tables {
        let schedule = name.strip_suffix(".alphas_cumprod").unwrap();
        let spec = if schedule == "compvis" {
            Some(scheduler())
        } else {
            let rows = configs.as_array().unwrap();
            let row = rows.iter().find(|r| r["schedule"] == schedule).unwrap();
            scheduler_of(&row["scheduler"])
        };
        let Some(spec) = spec else { continue };
        let found = latile_runtime::pipeline::schedule::alphas_cumprod(&spec);
        // LDM's own table comes from betas in f64; torch's f32 square roots are not correctly rounded.
        let tolerance = match schedule {
            "compvis" | "zero-snr" => 1e-6,
            _ => 0.0,
        };
        close(name, &found, &table.f32(), tolerance);
        compared += 1;
    }
    assert!(compared >= 6, "only {compared} tables");
}

/// Single draws of many seeds and sizes, and sequences of draws from one generator.
#[test]
fn noise_is_torchs() {
    let tensors = safetensors(&fixture("randn.safetensors"));
    let sequences = &fixture_json("randn.json")["sequences"];
    let draw = |generator: &mut Generator, n: usize| {
        let mut out = vec![f32::NAN; n];
        generator.randn(n, |i, v| out[i] = v);
        out
    };
    let mut compared = 0;
    for (name, tensor) in &tensors {
        let Some((seed, size)) = name.strip_prefix("seed").and_then(|n| n.split_once('.')) else {
            continue;
        };
        let wanted = tensor.f32();
        assert!(size.starts_with("size") || tensor.shape.len() == 4, "{name}");
        let mut generator = Generator::new(seed.parse().unwrap());
        close(name, &draw(&mut generator, wanted.len()), &wanted, 5e-7);
        compared += 1;
    }
    for (index, sizes) in sequences["sizes"].as_array().unwrap().iter().enumerate() {
        let mut generator = Generator::new(sequences["seed"].as_u64().unwrap());
        for (number, size) in sizes.as_array().unwrap().iter().enumerate() {
            let name = format!("sequence{index}.draw{number}");
            let found = draw(&mut generator, size.as_u64().unwrap() as usize);
            close(&name, &found, &tensors[&name].f32(), 5e-7);
            compared += 1;
        }
    }
    assert_eq!(compared, tensors.len(), "every recorded tensor");
}

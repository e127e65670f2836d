//! What each command does when all is well: results, JSON, determinism, memory, interruption.
#![cfg(feature = "export")]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// The fields that both `upscale` and `bench` report.
#[track_caller]
fn measured(report: &Value, seconds: &str) {
    assert!(report["isa"].is_string() && report["precision"].is_string(), "{report}");
    for field in [seconds, "gmac", "gmac_per_s"] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{field} in {report}");
    }
    for field in ["threads", "arena_bytes", "peak_rss_bytes"] {
        assert!(report[field].as_u64().unwrap() > 0, "{field} in {report}");
    }
    let rate = report["gmac"].as_f64().unwrap() / report[seconds].as_f64().unwrap();
    assert!((rate / report["gmac_per_s"].as_f64().unwrap() - 1.0).abs() < 1e-6);
}

#[test]
fn upscale_makes_a_picture_four_times_as_large() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    // Neither side is a multiple of what the model needs.
    picture(dir.path(), "in.png", 13, 10);
    let args = ["upscale", "in.png", "a.png", "--model", "sr.latile", "--steps", "3", "--json"];
    let report = run_in(dir.path(), &args).json();
    measured(&report, "seconds");
    assert_eq!(report["output_size"], serde_json::json!([40, 52]));
    assert_eq!(report["steps"], 3);
    let a = image::open(dir.path().join("a.png")).unwrap();
    assert_eq!((a.width(), a.height()), (52, 40));

    // The same seed gives the same file at any thread count; another seed another picture.
    let with = |out: &str, more: &[&str]| {
        let mut args = vec!["upscale", "in.png", out, "--model", "sr.latile", "--steps=3"];
        args.extend(more);
        let ran = run_in(dir.path(), &args);
        assert!(ran.done().contains("52x40, 3 steps"), "{ran:?}");
        std::fs::read(dir.path().join(out)).unwrap()
    };
    let first = with("b.png", &["--threads", "1"]);
    assert_eq!(first, std::fs::read(dir.path().join("a.png")).unwrap());
    assert_eq!(first, with("c.png", &["--threads", "3", "--seed", "0"]));
    assert_eq!(first, with("m.png", &["--weights", "map"]));
    assert_eq!(first, with("r.png", &["--weights", "read"]));
    assert_ne!(first, with("d.png", &["--seed", "1"]));
    assert_ne!(first, with("e.png", &["--eta", "1"]));
    assert_ne!(first, with("f.png", &["--spacing", "trailing"]));
    let tiled = with("g.png", &["--tile", "8", "--overlap", "4"]);
    assert_ne!(first, tiled);
}

/// The result reduced again is nearer to the input the more consistency there is.
#[test]
fn consistency_gives_the_input_back() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 13, 10);
    let input = image::open(dir.path().join("in.png")).unwrap().to_rgb8();
    let lacking = |strength: &str| {
        let args =
            ["upscale", "in.png", "out.png", "--model", "sr.latile", "--overwrite", "--json"];
        let ran = run(latile(dir.path()).args(args).args(["--consistency", strength]));
        assert_eq!(ran.json()["consistency"].to_string().parse::<f32>(), strength.parse());
        let out = image::open(dir.path().join("out.png")).unwrap().to_rgb8();
        let filter = image::imageops::FilterType::CatmullRom;
        let small = image::imageops::resize(&out, 13, 10, filter);
        small.iter().zip(input.iter()).map(|(&a, &b)| f64::from(a.abs_diff(b))).sum::<f64>()
    };
    let [none, half, full] = ["0.0", "0.5", "1.0"].map(lacking);
    assert!(full < 0.5 * half && half < 0.8 * none, "{none} {half} {full}");
    let args = ["upscale", "in.png", "out.png", "--model", "sr.latile", "--json", "--overwrite"];
    // A model of which nothing else was said leaves its result as it is.
    assert_eq!(run_in(dir.path(), &args).json()["consistency"], 0.0);
}

#[test]
fn every_instruction_set_gives_the_same_picture() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 9, 8);
    let devices = run_in(dir.path(), &["devices", "--json"]).json();
    let line = devices["devices"][0]["details"][0].as_str().unwrap().to_owned();
    let list = line.strip_prefix("instruction sets: ").unwrap();
    let mut pictures = Vec::new();
    for isa in list.split(", ") {
        let out = format!("{isa}.png");
        let mut command = latile(dir.path());
        command.env("LATILE_ISA", isa);
        command.args(["upscale", "in.png", &out, "--model", "sr.latile", "--steps", "2", "--json"]);
        assert_eq!(run(&mut command).json()["isa"], isa);
        pictures.push(std::fs::read(dir.path().join(out)).unwrap());
    }
    assert!(pictures.iter().all(|p| *p == pictures[0]));
    let mut command = latile(dir.path());
    run(command.env("LATILE_ISA", "sse9").arg("devices"))
        .refused(2, &["LATILE_ISA=sse9", "no such instruction set", list]);
}

#[test]
fn opacity_depth_and_profile_go_along() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let deep = image::ImageBuffer::from_fn(8, 8, |x, y| {
        image::Rgba([x as u16 * 8000, y as u16 * 8000, 999, if x < 4 { 0 } else { 65535 }])
    });
    deep.save(dir.path().join("in.png")).unwrap();
    let upscale = |out: &str| {
        run_in(dir.path(), &["upscale", "in.png", out, "--model", "sr.latile", "--steps", "1"])
            .done();
        image::open(dir.path().join(out)).unwrap()
    };
    let png = upscale("out.png");
    assert_eq!(png.color(), image::ColorType::Rgba16);
    let png = png.to_rgba16();
    assert_eq!(png.dimensions(), (32, 32));
    assert_eq!((png.get_pixel(3, 9)[3], png.get_pixel(29, 9)[3]), (0, 65535));
    let webp = upscale("out.webp");
    assert_eq!(webp.color(), image::ColorType::Rgba8);
}

#[test]
fn given_noise_replaces_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 8, 4);
    let zeros = vec![0u8; 3 * 4 * 8 * 4];
    let save = |name: &str, tensor: &str, shape: Vec<usize>| {
        let view = TensorView::new(Dtype::F32, shape, &zeros).unwrap();
        put(dir.path(), name, &safetensors::serialize([(tensor, view)], None).unwrap());
    };
    save("n.safetensors", "noise", vec![1, 3, 4, 8]);
    let upscale = |out: &str, noise: &str, seed: &str| {
        let args = ["upscale", "in.png", out, "--model", "sr.latile", "--steps", "2"];
        run(latile(dir.path()).args(args).args(["--noise", noise, "--seed", seed]))
    };
    upscale("a.png", "n.safetensors", "1").done();
    upscale("b.png", "n.safetensors", "2").done();
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert_eq!(read("a.png"), read("b.png"));
    save("wrong.safetensors", "noise", vec![1, 3, 8, 4]);
    upscale("c.png", "wrong.safetensors", "1").refused(2, &["the noise is refused"]);
    save("named.safetensors", "latents", vec![1, 3, 4, 8]);
    upscale("c.png", "named.safetensors", "1").refused(2, &["holds tensor latents"]);
    upscale("c.png", "in.png", "1").refused(1, &["in.png is not a safetensors file"]);
    upscale("c.png", "none", "1").refused(6, &["cannot read none"]);
}

#[test]
fn options_beyond_reason_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 8, 8);
    let upscale = ["upscale", "in.png", "out.png", "--model", "sr.latile"];
    for (more, word) in [
        (["--steps", "0"], "steps"),
        (["--steps", "1001"], "steps"),
        (["--eta", "-1"], "eta"),
        (["--eta", "NaN"], "eta"),
        (["--consistency", "1.5"], "consistency 1.5 is not between 0"),
        (["--consistency", "-0.1"], "consistency -0.1"),
        (["--consistency", "NaN"], "consistency NaN"),
        (["--threads", "0"], "--threads is 0"),
        (["--tile", "0"], "tile"),
        (["--spacing", "wide"], "compvis, leading"),
        (["--nonsense", "1"], "--nonsense"),
    ] {
        run(latile(dir.path()).args(upscale).args(more)).refused(2, &[word]);
    }
    run_in(dir.path(), &["export", "-o", "m.latile"]).refused(2, &["name a CHECKPOINT"]);
    run_in(dir.path(), &["export", "x", "--unet", "u.onnx", "-o", "m.latile"])
        .refused(2, &["go without one"]);
    #[cfg(not(feature = "onnx"))]
    run_in(dir.path(), &["export", "--unet", "u.onnx", "-o", "m.latile"])
        .refused(2, &["--features onnx"]);
    run_in(dir.path(), &["frobnicate"]).refused(2, &["frobnicate", "latile"]);
    assert_eq!(names(dir.path()), ["in.png", "sr.latile"]);
}

/// The command reads and writes tensors as diffusers has them; the expected ones are diffusers'.
#[test]
fn run_agrees_with_diffusers() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("models/sr");
    let export = ["-o", "sr.latile", "--precision", "f32", "--with-encoder"];
    run(latile(dir.path()).arg("export").arg(&source).args(export)).done();
    for (component, file, inputs, output) in [
        ("unet", "unet/io.safetensors", &["sample", "timestep"][..], "sample"),
        ("decoder", "vqvae/decoder_io.safetensors", &["latents"], "sample"),
        ("encoder", "vqvae/encoder_io.safetensors", &["sample"], "latents"),
    ] {
        let bytes = std::fs::read(source.join(file)).unwrap();
        let io = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = inputs.iter().map(|&n| (n, io.tensor(&format!("0.inputs.{n}")).unwrap()));
        put(dir.path(), "i.safetensors", &safetensors::serialize(tensors, None).unwrap());
        let out = format!("{component}.safetensors");
        let args = ["run", "sr.latile", "--component", component, "--inputs", "i.safetensors"];
        let weights = if component == "decoder" { "--weights=read" } else { "--weights=map" };
        let ran = run(latile(dir.path()).args(args).args(["--outputs", &out, "--json", weights]));
        measured(&ran.json(), "seconds");
        let bytes = std::fs::read(dir.path().join(&out)).unwrap();
        let found = SafeTensors::deserialize(&bytes).unwrap();
        let (found, expected) =
            (found.tensor(output).unwrap(), io.tensor(&format!("0.outputs.{output}")).unwrap());
        assert_eq!(found.shape(), expected.shape());
        let error = relative_error(found.data(), expected.data());
        assert!(error <= 1e-4, "{component}: {error}");
    }
}

/// The largest difference over the range of what is expected.
fn relative_error(found: &[u8], expected: &[u8]) -> f32 {
    let floats = |b: &[u8]| -> Vec<f32> {
        b.as_chunks::<4>().0.iter().map(|&c| f32::from_le_bytes(c)).collect()
    };
    let (found, expected) = (floats(found), floats(expected));
    let most = expected.iter().copied().fold(f32::MIN, f32::max);
    let least = expected.iter().copied().fold(f32::MAX, f32::min);
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    worst.fold(0.0, f32::max) / (most - least)
}

#[test]
fn run_says_what_a_component_takes() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let zeros = vec![0u8; 6 * 8 * 8 * 4];
    let try_with = |tensors: &[(&str, Vec<usize>)]| {
        let views = tensors.iter().map(|(n, s)| {
            let len = s.iter().product::<usize>() * 4;
            (*n, TensorView::new(Dtype::F32, s.clone(), &zeros[..len]).unwrap())
        });
        put(dir.path(), "i.safetensors", &safetensors::serialize(views, None).unwrap());
        let args = ["run", "sr.latile", "--component", "unet", "--inputs", "i.safetensors"];
        run(latile(dir.path()).args(args).args(["--outputs", "o.safetensors"]))
    };
    let sample = || ("sample", vec![1, 6, 8, 8]);
    try_with(&[sample()]).refused(2, &["holds no tensor timestep", "sample, timestep"]);
    try_with(&[("timestep", vec![1])]).refused(2, &["holds no tensor sample"]);
    try_with(&[("sample", vec![1, 3, 8, 8]), ("timestep", vec![1])])
        .refused(2, &["sample has shape [1, 3, 8, 8]", "[1, 6, H, W]"]);
    try_with(&[("sample", vec![1, 6, 6, 8]), ("timestep", vec![1])])
        .refused(2, &["6x8", "multiples of 4"]);
    try_with(&[sample(), ("timestep", vec![2])]).refused(2, &["timestep has shape [2]"]);
    try_with(&[sample(), ("timestep", vec![1]), ("more", vec![1])])
        .refused(2, &["tensor more is none"]);
    try_with(&[sample(), ("timestep", vec![])]).done();
    assert_eq!(names(dir.path()), ["i.safetensors", "o.safetensors", "sr.latile"]);
}

#[test]
fn bench_measures() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    for component in ["unet", "decoder", "encoder"] {
        let args = ["bench", "sr.latile", "--component", component, "--latent", "8x12"];
        let report =
            run(latile(dir.path()).args(args).args(["--runs", "3", "--threads", "2", "--json"]))
                .json();
        measured(&report, "median_s");
        assert_eq!(report["runs"], 3);
        assert_eq!(report["threads"], 2);
        assert_eq!(report["precision"], "f16");
    }
    run_in(dir.path(), &["bench", "sr.latile", "--component", "unet", "--latent", "6x8"])
        .refused(2, &["multiples of 4"]);
}

/// 800 MB of result in an address space of 400 MB.
#[test]
#[cfg(unix)]
fn too_little_memory_is_said() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let args = ["bench", "sr.latile", "--component", "decoder", "--latent", "2048x2048"];
    run(latile_after("ulimit -v 400000", dir.path()).args(args))
        .refused(5, &["could not reserve", "smaller tile"]);
}

#[test]
fn inspect_tells_what_export_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("models/sr");
    let mut export = latile(dir.path());
    export.arg("export").arg(source).args(["-o", "m.latile", "--precision", "f16", "--json"]);
    let report =
        run(export.args(["--name", "tiny\u{1b}[2J", "--license", "MIT", "--steps", "7"])).json();
    assert_eq!(report["bytes"], std::fs::metadata(dir.path().join("m.latile")).unwrap().len());

    let model = run_in(dir.path(), &["inspect", "m.latile", "--json"]).json();
    assert_eq!(model["precision"], "f16");
    assert_eq!(model["task"], "super_resolution");
    assert_eq!(model["metadata"]["license"], "MIT");
    assert_eq!(model["defaults"]["steps"], 7);
    assert_eq!(model["latent"]["factor"], 4);
    assert_eq!(model["components"][0]["role"], "unet");
    assert!(model["components"][0].get("tensors").is_none());
    let full = run_in(dir.path(), &["inspect", "m.latile", "--json", "--tensors"]).json();
    let tensors = full["components"][0]["tensors"].as_array().unwrap();
    let conv = tensors.iter().find(|t| t["name"] == "conv_in.weight").unwrap();
    assert_eq!(conv["shape"], serde_json::json!([8, 6, 3, 3]));

    let ran = run_in(dir.path(), &["inspect", "m.latile", "--tensors"]);
    assert!(ran.done().contains("conv_in.weight [8, 6, 3, 3]"));
    assert!(!ran.stdout.contains('\u{1b}'), "a name must not command the terminal");
}

#[test]
fn compare_judges() {
    let dir = tempfile::tempdir().unwrap();
    picture(dir.path(), "a.png", 40, 30);
    let mut b = image::open(dir.path().join("a.png")).unwrap().to_rgb8();
    for p in b.pixels_mut().step_by(3) {
        p[1] = p[1].saturating_add(20);
    }
    b.save(dir.path().join("b.png")).unwrap();
    let m = run_in(dir.path(), &["compare", "a.png", "b.png", "--json"]).json();
    assert_eq!(m["identical"], false);
    let psnr = m["psnr_rgb_db"].as_f64().unwrap();
    assert!((20.0..40.0).contains(&psnr), "{psnr}");
    assert!(m["ssim_rgb"].as_f64().unwrap() < 1.0);
    let same = run_in(dir.path(), &["compare", "a.png", "a.png", "--json"]).json();
    assert_eq!((&same["identical"], &same["psnr_rgb_db"]), (&Value::Bool(true), &Value::Null));
    assert_eq!(same["ssim_y"], 1.0);
    run_in(dir.path(), &["compare", "a.png", "b.png", "--min-psnr", "20"]).done();
    run_in(dir.path(), &["compare", "a.png", "b.png", "--min-psnr", "NaN"])
        .refused(2, &["--min-psnr is a number of dB"]);
    let gate = run_in(dir.path(), &["compare", "a.png", "b.png", "--min-psnr", "60"]);
    assert_eq!(gate.code, Some(7), "{gate:?}");
    assert!(gate.stderr.contains("below the 60 dB asked for"), "{gate:?}");
    assert!(gate.stdout.contains("PSNR"), "the measures are a result even so");
}

/// A reader that stops early, as `head` does, is no failure.
#[test]
#[cfg(unix)]
fn a_closed_pipe_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let mut child = latile(dir.path())
        .args(["inspect", "sr.latile", "--tensors"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Ctrl-C in the middle of a long run: 130 soon after, and no file beside the inputs.
#[test]
#[cfg(unix)]
fn ctrl_c_stops_and_leaves_nothing() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 48, 48);
    let before = names(dir.path());
    for (signal, code) in [("INT", 130), ("TERM", 130)] {
        let mut child = latile(dir.path())
            .args(["upscale", "in.png", "out.png", "--model", "sr.latile", "--steps", "1000"])
            .stderr(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // The first line of progress says that the run is under way.
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        assert!(first.starts_with("upscale: step ") && first.contains(" left"), "{first}");
        let kill = format!("kill -{signal} {}", child.id());
        let sent = std::time::Instant::now();
        assert!(std::process::Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(sent.elapsed().as_secs() < 10, "{:?}", sent.elapsed());
        let last = lines.last().unwrap().unwrap();
        assert_eq!(last, "latile: interrupted; no output was written");
        assert_eq!(names(dir.path()), before);
    }
}

#[test]
fn help_and_version() {
    let dir = tempfile::tempdir().unwrap();
    let version = run_in(dir.path(), &["--version"]);
    assert_eq!(version.done(), format!("latile {}\n", env!("CARGO_PKG_VERSION")));
    let help = run_in(dir.path(), &["--help"]);
    for word in
        ["upscale", "export", "inspect", "run", "bench", "compare", "devices", "130 interrupted"]
    {
        assert!(help.done().contains(word), "{word}");
    }
    for command in ["upscale", "export", "inspect", "run", "bench", "compare", "devices"] {
        assert!(run_in(dir.path(), &[command, "--help"]).done().contains("Usage:"));
    }
}

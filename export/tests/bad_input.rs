//! Diffusers folders with something wrong: each error names the file, the thing and what to do.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{copy, read_tensors, set, write_tensors};
use latile_export::source::SourceErrorKind;
use latile_export::{ExportError, ExportOptions, export};
use latile_runtime::format::Precision;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;

fn attempt(folder: &Path, precision: Precision) -> ExportError {
    let out = folder.join("m.latile");
    let options = ExportOptions { precision, ..ExportOptions::default() };
    let e = export(folder, &out, &options, &mut |_| ControlFlow::Continue(())).unwrap_err();
    let left: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .filter(|n| n.to_string_lossy().contains("latile"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    e
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn unsupported_config_values_name_file_key_value_and_what_is_supported() {
    let cases: Vec<(&str, &str, Value)> = vec![
        ("unet/config.json", "_class_name", json!("UNet2DConditionModel")),
        ("unet/config.json", "time_embedding_type", json!("fourier")),
        ("unet/config.json", "class_embed_type", json!("timestep")),
        ("unet/config.json", "num_class_embeds", json!(10)),
        ("unet/config.json", "act_fn", json!("gelu")),
        ("unet/config.json", "norm_num_groups", json!(null)),
        ("unet/config.json", "resnet_time_scale_shift", json!("ada_group")),
        ("unet/config.json", "downsample_type", json!("fir")),
        ("unet/config.json", "downsample_padding", json!(2)),
        ("unet/config.json", "down_block_types", json!(["DownBlock2D"])),
        (
            "unet/config.json",
            "down_block_types",
            json!(["SkipDownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ),
        ("unet/config.json", "up_block_types", json!(["KUpBlock2D", "UpBlock2D", "UpBlock2D"])),
        ("unet/config.json", "mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("unet/config.json", "block_out_channels", json!([])),
        ("unet/config.json", "block_out_channels", json!(8)),
        ("unet/config.json", "layers_per_block", json!(-1)),
        ("unet/config.json", "layers_per_block", json!([2, 2, 2])),
        ("unet/config.json", "in_channels", json!(4.5)),
        ("vqvae/config.json", "_class_name", json!("AutoencoderTiny")),
        ("vqvae/config.json", "norm_type", json!("spatial")),
        ("vqvae/config.json", "act_fn", json!("mish")),
        ("vqvae/config.json", "double_z", json!(true)),
        (
            "vqvae/config.json",
            "up_block_types",
            json!(["UpDecoderBlock2D", "X", "UpDecoderBlock2D"]),
        ),
        ("vqvae/config.json", "scaling_factor", json!(0.0)),
        ("scheduler/scheduler_config.json", "_class_name", json!("EulerDiscreteScheduler")),
        ("scheduler/scheduler_config.json", "beta_schedule", json!("squaredcos_cap_v2")),
        ("scheduler/scheduler_config.json", "beta_end", json!(1.5)),
        ("scheduler/scheduler_config.json", "thresholding", json!(true)),
        ("scheduler/scheduler_config.json", "prediction_type", json!("flow")),
        ("scheduler/scheduler_config.json", "timestep_spacing", json!("karras")),
        ("scheduler/scheduler_config.json", "num_train_timesteps", json!(0)),
        ("scheduler/scheduler_config.json", "trained_betas", json!([0.1, 0.9, 0.2])),
        ("model_index.json", "_class_name", json!("StableDiffusionPipeline")),
    ];
    for (file, key, value) in cases {
        let dir = tempfile::tempdir().unwrap();
        copy("sr", dir.path());
        set(&dir.path().join(file), key, value.clone());
        let e = attempt(dir.path(), Precision::F32).to_string();
        for part in [file, key, &value.to_string(), "supported: "] {
            assert!(e.contains(part), "{file} {key}: {part} is not in: {e}");
        }
    }
}

#[test]
fn unknown_keys_are_refused_and_harmless_ones_are_not() {
    let dir = tempfile::tempdir().unwrap();
    copy("sr", dir.path());
    let config = dir.path().join("unet/config.json");
    set(&config, "_name_or_path", json!("somewhere"));
    set(&config, "use_ema_warmup", json!(false));
    set(&config, "secret_sauce", json!({"a": 1}));
    let e = attempt(dir.path(), Precision::F32).to_string();
    assert!(e.contains("secret_sauce (= {\"a\":1})") && e.contains("unet/config.json"), "{e}");
}

#[test]
fn descriptions_that_cannot_be_built_are_refused() {
    for (key, value, said) in [
        ("norm_num_groups", json!(7), "7 groups do not divide"),
        ("attention_head_dim", json!(1000), "heads of 1000"),
        ("layers_per_block", json!(0), "0 layers"),
        ("layers_per_block", json!(4_000_000_000u32), "layers"),
        ("in_channels", json!(0), "0 channels"),
        ("out_channels", json!(4_000_000_000u32), "channels"),
        ("norm_eps", json!(-1.0), "eps"),
        ("mid_block_scale_factor", json!(0), "scale factor"),
        ("freq_shift", json!(1e9), "freq_shift"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy("sr", dir.path());
        set(&dir.path().join("unet/config.json"), key, value);
        let e = attempt(dir.path(), Precision::F32);
        assert!(matches!(e, ExportError::Arch { .. }), "{key}: {e}");
        assert!(
            e.to_string().contains(said) && e.to_string().contains("unet/config.json"),
            "{key}: {e}"
        );
    }
}

#[test]
fn broken_json_and_missing_files_are_named() {
    for file in [
        "model_index.json",
        "unet/config.json",
        "vqvae/config.json",
        "scheduler/scheduler_config.json",
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy("sr", dir.path());
        std::fs::write(dir.path().join(file), "{ \"a\": ").unwrap();
        let e = attempt(dir.path(), Precision::F32).to_string();
        assert!(e.contains(file) && e.contains("JSON"), "{e}");
        std::fs::write(dir.path().join(file), "[1, 2]").unwrap();
        assert!(attempt(dir.path(), Precision::F32).to_string().contains(file));
        // Deep nesting must be an error, not a stack overflow.
        std::fs::write(dir.path().join(file), "[".repeat(1_000_000)).unwrap();
        assert!(attempt(dir.path(), Precision::F32).to_string().contains(file));
        std::fs::remove_file(dir.path().join(file)).unwrap();
        let e = attempt(dir.path(), Precision::F32).to_string();
        assert!(e.contains(file) && e.contains("cannot read"), "{e}");
    }
    let dir = tempfile::tempdir().unwrap();
    copy("sr", dir.path());
    std::fs::remove_file(dir.path().join(UNET)).unwrap();
    let e = attempt(dir.path(), Precision::F32);
    assert!(matches!(e, ExportError::NoWeights { .. }), "{e}");
    let e = attempt_path(Path::new("/no/such/checkpoint"));
    assert!(matches!(e, ExportError::Checkpoint { .. }), "{e}");
}

fn attempt_path(path: &Path) -> ExportError {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m.latile");
    export(path, &out, &ExportOptions::default(), &mut |_| ControlFlow::Continue(())).unwrap_err()
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().unwrap();
    copy("sr", dir.path());
    let file = dir.path().join(UNET);
    let whole = read_tensors(&file);

    let mut tensors = whole.clone();
    tensors.remove("mid_block.attentions.0.to_q.bias").unwrap();
    write_tensors(&file, &tensors);
    let e = attempt(dir.path(), Precision::F32);
    assert!(
        matches!(&e, ExportError::MissingTensor { name, wanted_for, .. }
        if name == "mid_block.attentions.0.to_q.bias" && wanted_for == "the unet"),
        "{e}"
    );

    let mut tensors = whole.clone();
    let (shape, values) = tensors.get_mut("conv_out.weight").unwrap();
    shape[0] += 1;
    values.resize(shape.iter().product(), 0.0);
    write_tensors(&file, &tensors);
    let e = attempt(dir.path(), Precision::F32);
    assert!(
        matches!(&e, ExportError::WrongShape { found, expected, .. } if found[0] == expected[0] + 1),
        "{e}"
    );

    for (value, precision) in [(f32::NAN, Precision::F32), (f32::NEG_INFINITY, Precision::F16)] {
        let mut tensors = whole.clone();
        tensors.get_mut("conv_in.weight").unwrap().1[5] = value;
        write_tensors(&file, &tensors);
        let e = attempt(dir.path(), precision);
        assert!(
            matches!(&e, ExportError::NotFinite { name, index: 5, .. } if name == "conv_in.weight"),
            "{e}"
        );
    }
    let mut tensors = whole.clone();
    tensors.get_mut("conv_in.weight").unwrap().1[5] = 70_000.0;
    write_tensors(&file, &tensors);
    let e = attempt(dir.path(), Precision::F16);
    assert!(
        matches!(&e, ExportError::F16Overflow { name, index: 5, .. } if name == "conv_in.weight"),
        "{e}"
    );
    assert!(e.to_string().contains("--precision f32"), "{e}");
    // f32 holds it, and so does the bias, which stays f32.
    let mut tensors = whole.clone();
    tensors.get_mut("conv_in.bias").unwrap().1[0] = 70_000.0;
    write_tensors(&file, &tensors);
    let out = dir.path().join("ok.latile");
    let options = ExportOptions { precision: Precision::F16, ..ExportOptions::default() };
    export(dir.path(), &out, &options, &mut |_| ControlFlow::Continue(())).unwrap();
}

#[test]
fn truncated_and_foreign_weights_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    copy("sr", dir.path());
    let file = dir.path().join(UNET);
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    let kind = |e| match e {
        ExportError::Source(e) => e.kind,
        e => panic!("{e}"),
    };
    let e = kind(attempt(dir.path(), Precision::F32));
    assert!(matches!(e, SourceErrorKind::Truncated { .. }), "{e}");
    std::fs::write(&file, "not weights at all").unwrap();
    let e = kind(attempt(dir.path(), Precision::F32));
    assert!(matches!(e, SourceErrorKind::NotSafetensors { .. }), "{e}");
}

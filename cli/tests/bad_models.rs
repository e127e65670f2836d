//! Checkpoints and models that must be refused, each with its message and exit code 4.
#![cfg(feature = "export")]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::path::{Path, PathBuf};

const WEIGHTS: &str = "sr/unet/diffusion_pytorch_model.safetensors";

/// A copy of the small super-resolution checkpoint as `dir/sr`.
fn checkpoint(dir: &Path) -> PathBuf {
    copy_folder(&fixture("models/sr"), &dir.join("sr"));
    dir.join(WEIGHTS)
}

#[track_caller]
fn export_refused(dir: &Path, words: &[&str]) {
    run_in(dir, &["export", "sr", "-o", "m.latile"]).refused(4, words);
    assert!(!names(dir).iter().any(|n| n.contains("latile")), "something was left behind");
}

/// Rewrites a safetensors file with `change` applied to each tensor, `None` dropping it.
fn rewrite(path: &Path, change: impl for<'a> Fn(&str, TensorView<'a>) -> Option<TensorView<'a>>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, TensorView<'_>)> = file
        .tensors()
        .into_iter()
        .filter_map(|(name, t)| change(&name, t).map(|t| (name, t)))
        .collect();
    std::fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

#[test]
fn truncated_weights() {
    let dir = tempfile::tempdir().unwrap();
    let weights = checkpoint(dir.path());
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    let name = "unet/diffusion_pytorch_model.safetensors";
    export_refused(dir.path(), &[name, "truncated", "fetch the file again"]);
    for len in [0, 4, 8, 100, whole.len() / 2] {
        std::fs::write(&weights, &whole[..len]).unwrap();
        export_refused(dir.path(), &[name]);
    }
}

#[test]
fn weights_that_are_no_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let weights = checkpoint(dir.path());
    std::fs::write(&weights, "<html>404 Not Found</html>".repeat(30)).unwrap();
    export_refused(
        dir.path(),
        &["unet/diffusion_pytorch_model.safetensors", "not a safetensors file"],
    );
}

#[test]
fn a_missing_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let weights = checkpoint(dir.path());
    rewrite(&weights, |name, t| (name != "conv_in.bias").then_some(t));
    export_refused(dir.path(), &["tensor conv_in.bias is missing", "unet", "[8]", "incomplete"]);
}

#[test]
fn a_wrong_shape() {
    let dir = tempfile::tempdir().unwrap();
    let weights = checkpoint(dir.path());
    rewrite(&weights, |name, t| {
        if name != "conv_in.weight" {
            return Some(t);
        }
        assert_eq!(t.shape(), [8, 6, 3, 3]);
        Some(TensorView::new(t.dtype(), vec![6, 8, 3, 3], t.data()).unwrap())
    });
    export_refused(dir.path(), &["conv_in.weight has shape [6, 8, 3, 3], expected [8, 6, 3, 3]"]);
}

#[test]
fn an_unsupported_config() {
    let dir = tempfile::tempdir().unwrap();
    checkpoint(dir.path());
    let config = dir.path().join("sr/unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json[key] = value;
        std::fs::write(&config, json.to_string()).unwrap();
    };
    with("act_fn", "gelu".into());
    export_refused(dir.path(), &["unet/config.json", "act_fn", "gelu", "supported: "]);
    with("class_embed_type", "timestep".into());
    export_refused(dir.path(), &["unet/config.json", "class_embed_type", "timestep"]);
    with("norm_num_groups", 7.into());
    export_refused(dir.path(), &["unet/config.json", "7"]);
    std::fs::write(&config, "{\"act_fn\": ").unwrap();
    export_refused(dir.path(), &["unet/config.json", "not a JSON object"]);
}

#[test]
fn a_checkpoint_that_is_none() {
    let dir = tempfile::tempdir().unwrap();
    run_in(dir.path(), &["export", "nowhere", "-o", "m.latile"])
        .refused(6, &["nowhere", "No such file"]);
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    run_in(dir.path(), &["export", "empty", "-o", "m.latile"]).refused(4, &["empty"]);
    assert_eq!(names(dir.path()), ["empty"]);
}

/// Every pickle of the hostile corpus: refused (none holds a whole model), and nothing of it executed.
#[test]
fn hostile_pickles() {
    let corpus = fixture("hostile");
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(corpus.join("index.json")).unwrap()).unwrap();
    let files = index.as_array().unwrap();
    assert!(files.len() > 50);
    let dir = tempfile::tempdir().unwrap();
    for entry in files {
        let file = corpus.join(entry["file"].as_str().unwrap());
        let ran = run(latile(dir.path()).arg("export").arg(&file).args(["-o", "m.latile"]));
        let name = file.file_name().unwrap().to_str().unwrap();
        ran.refused(4, &[name]);
        assert_eq!(names(dir.path()), [""; 0], "{name} left something behind");
    }
    let ran = run(latile(dir.path())
        .arg("export")
        .arg(corpus.join("os-system.ckpt"))
        .args(["-o", "m.latile"]));
    ran.refused(4, &["hostile", "os.system", "nothing was executed"]);
}

#[test]
fn a_model_cut_at_any_length() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(sr_model(dir.path())).unwrap();
    picture(dir.path(), "in.png", 8, 8);
    let lengths = [0, 1, 8, 63, 64, 4095, 4096, 4097, whole.len() / 2, whole.len() - 1];
    for len in lengths {
        put(dir.path(), "cut.latile", &whole[..len]);
        for args in [
            &["inspect", "cut.latile"][..],
            &["upscale", "in.png", "out.png", "--model", "cut.latile"],
            &["bench", "cut.latile", "--component", "unet", "--latent", "8x8"],
            &["bench", "cut.latile", "--component", "unet", "--latent=8x8", "--weights=read"],
        ] {
            run_in(dir.path(), args).refused(4, &["cut.latile is refused"]);
        }
    }
    assert_eq!(names(dir.path()), ["cut.latile", "in.png", "sr.latile"]);
}

#[test]
fn a_model_with_a_byte_changed() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(sr_model(dir.path())).unwrap();
    picture(dir.path(), "in.png", 8, 8);
    let manifest = whole.len() - 2000;
    for at in [0, 9, 20, 40, manifest, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        put(dir.path(), "bent.latile", &bytes);
        run_in(dir.path(), &["inspect", "bent.latile"]).refused(4, &["bent.latile is refused"]);
    }
    // Weights are checked when they are used. Until then they are not even looked at.
    let mut bytes = whole;
    bytes[4096 + 700] ^= 1;
    put(dir.path(), "bent.latile", &bytes);
    run_in(dir.path(), &["inspect", "bent.latile"]).done();
    let words = ["model bent.latile is damaged", "unet weight", "copy or export the file again"];
    let upscale = ["upscale", "in.png", "out.png", "--model", "bent.latile"];
    run_in(dir.path(), &upscale).refused(4, &words);
    for weights in ["map", "read"] {
        let bench =
            ["bench", "bent.latile", "--component=unet", "--latent=8x8", "--weights", weights];
        run_in(dir.path(), &bench).refused(4, &words);
    }
    assert_eq!(names(dir.path()), ["bent.latile", "in.png", "sr.latile"]);
}

#[test]
fn a_model_that_is_none_or_lacks_a_component() {
    let dir = tempfile::tempdir().unwrap();
    picture(dir.path(), "in.png", 8, 8);
    run_in(dir.path(), &["upscale", "in.png", "out.png", "--model", "none.latile"])
        .refused(6, &["cannot read model none.latile"]);
    run_in(dir.path(), &["upscale", "in.png", "out.png", "--model", "in.png"])
        .refused(4, &["model in.png is refused", "latile export"]);
    let source = fixture("models/scale-shift");
    run(latile(dir.path()).arg("export").arg(source).args(["-o", "u.latile"])).done();
    run_in(dir.path(), &["upscale", "in.png", "out.png", "--model", "u.latile"])
        .refused(4, &["model u.latile cannot upscale"]);
    run_in(dir.path(), &["bench", "u.latile", "--component", "encoder", "--latent", "8x8"])
        .refused(4, &["has no encoder", "unet, decoder"]);
}

//! `latile calibrate`: tables, pictures that cannot be used, and refusals.
#![cfg(feature = "export")]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use serde_json::Value;
use std::path::Path;

const SMALL: [&str; 6] = ["--size", "8", "--steps", "4", "--count", "3"];

/// A folder of three pictures, one of them too small, with what else lies about.
fn photos(dir: &Path) {
    let folder = dir.join("photos");
    std::fs::create_dir(&folder).unwrap();
    picture(&folder, "a.png", 50, 41);
    picture(&folder, "b.jpg", 33, 64);
    picture(&folder, "small.png", 20, 90);
    picture(&folder, ".hidden.png", 64, 64);
    put(&folder, "c.webp", b"RIFF\x10\0\0\0WEBPbroken in here");
    put(&folder, "README.md", b"photographs");
}

fn calibrate(dir: &Path, more: &[&str]) -> Ran {
    let mut args = vec!["calibrate", "sr.latile", "--pictures", "photos", "-o", "t.json"];
    args.extend(SMALL);
    args.extend(more);
    run_in(dir, &args)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_table_is_made_of_what_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    photos(dir.path());
    let ran = calibrate(dir.path(), &["--json", "--threads", "1"]);
    let report = ran.json();
    assert!(ran.stderr.contains("skipped: c.webp: its WebP data is damaged"), "{ran:?}");
    assert!(
        ran.stderr.contains("skipped: small.png: it is 20x90, smaller than the 32x32"),
        "{ran:?}"
    );
    assert_eq!(report["pictures"], serde_json::json!(["a.png", "b.jpg"]));
    assert_eq!(report["skipped"].as_array().unwrap().len(), 2);
    assert_eq!(report["timesteps"].as_array().unwrap().len(), 4);
    assert_eq!(report["timestep_groups"], serde_json::json!([250, 500, 750, 1000]));
    let table = read(&dir.path().join("t.json"));
    assert_eq!(table["skipped"][0]["name"], "c.webp");
    assert_eq!(table["data"][1]["size"], serde_json::json!([33, 64]));
    let roles: Vec<_> =
        table["components"].as_array().unwrap().iter().map(|c| &c["role"]).collect();
    assert_eq!(roles, ["unet", "decoder", "encoder"]);
    let layers: usize =
        (0..3).map(|i| table["components"][i]["layers"].as_array().unwrap().len()).sum();
    assert_eq!(report["layers"], layers);
    let model = run_in(dir.path(), &["inspect", "sr.latile", "--json"]).json();
    assert!(model.to_string().contains(table["model"]["source_hash"].as_str().unwrap()));

    // The same at any thread count.
    let first = std::fs::read(dir.path().join("t.json")).unwrap();
    let again = calibrate(dir.path(), &["--threads", "3", "--overwrite"]);
    assert!(again.done().contains("2 pictures (2 skipped), 4 timesteps in 4 groups"), "{again:?}");
    assert_eq!(std::fs::read(dir.path().join("t.json")).unwrap(), first);
    calibrate(dir.path(), &["--seed", "1", "--overwrite"]).done();
    assert_ne!(std::fs::read(dir.path().join("t.json")).unwrap(), first);
    calibrate(dir.path(), &["--groups", "2", "--overwrite"]).done();
    let two = read(&dir.path().join("t.json"));
    assert_eq!(two["components"][0]["timestep_groups"], serde_json::json!([500, 1000]));
}

#[test]
fn no_data_no_table() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let folder = dir.path().join("photos");
    std::fs::create_dir(&folder).unwrap();
    calibrate(dir.path(), &[]).refused(3, &["no data, no int8", "photos", "holds no .png"]);
    put(&folder, "x.png", b"not a picture");
    let words = ["no data, no int8", "x.png: its content is not a picture"];
    calibrate(dir.path(), &[]).refused(3, &words);
    std::fs::remove_dir_all(&folder).unwrap();
    calibrate(dir.path(), &[]).refused(6, &["cannot read the calibration folder photos"]);
    put(dir.path(), "photos", b"a file");
    calibrate(dir.path(), &[]).refused(6, &["cannot read the calibration folder photos"]);
    assert_eq!(names(dir.path()), ["photos", "sr.latile"]);
}

#[test]
fn a_model_or_output_that_does_not_do_is_refused_first() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    photos(dir.path());
    put(dir.path(), "taken.json", b"mine");
    let at = |model: &str, out: &str| {
        let args = ["calibrate", model, "--pictures", "photos", "-o", out];
        run(latile(dir.path()).args(args).args(SMALL))
    };
    at("sr.latile", "taken.json").refused(6, &["taken.json exists already", "--overwrite"]);
    at("sr.latile", "none/t.json").refused(6, &["none", "create it first"]);
    at("none.latile", "t.json").refused(6, &["none.latile"]);
    at("taken.json", "t.json").refused(4, &["taken.json"]);
    let parts = fixture("models/attention-all");
    run(latile(dir.path()).arg("export").arg(parts).args(["-o", "parts.latile"])).done();
    at("parts.latile", "t.json").refused(4, &["a set of components", "only super-resolution"]);
    for (args, words) in [
        (["--size", "4"], "8 to 128"),
        (["--size", "4000"], "8 to 128"),
        (["--steps", "0"], "0 steps"),
        (["--steps", "5000"], "at most 1000"),
        (["--eta", "1.5"], "eta 1.5"),
        (["--groups", "0"], "1 to 64"),
        (["--count", "0"], "0 pictures"),
        (["--percentile", "NaN"], "50 to 100"),
        (["--threads", "0"], "--threads is 0"),
    ] {
        let mut all = vec!["calibrate", "sr.latile", "--pictures", "photos", "-o", "t.json"];
        all.extend(args);
        run_in(dir.path(), &all).refused(2, &[words]);
    }
    run_in(dir.path(), &["calibrate", "sr.latile", "-o", "t.json"]).refused(2, &["--pictures"]);
    assert!(!dir.path().join("t.json").exists());
}

#[test]
fn damaged_weights_are_found_before_any_number_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let model = sr_model(dir.path());
    photos(dir.path());
    let mut bytes = std::fs::read(&model).unwrap();
    bytes[5000] ^= 0x40;
    std::fs::write(&model, bytes).unwrap();
    calibrate(dir.path(), &[]).refused(4, &["is damaged", "copy or export the file again"]);
    assert!(!dir.path().join("t.json").exists());
}

//! Damaged and malicious weight files: each is refused, or read without doing what it asks for.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::fixtures;
use latile_export::source::{SourceErrorKind, open};
use std::path::Path;

/// What a reader must do with a file.
fn index() -> Vec<(String, String, String)> {
    let text = std::fs::read(fixtures().join("hostile/index.json")).unwrap();
    let list: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let get = |v: &serde_json::Value, key: &str| v[key].as_str().unwrap().to_owned();
    list.iter().map(|v| (get(v, "file"), get(v, "must"), get(v, "what"))).collect()
}

/// Opens a file and reads all its tensors; the error's text where anything of that fails.
fn read(path: &Path) -> Result<Vec<f32>, String> {
    let source = open(path).map_err(|e| e.to_string())?;
    let mut weight = Vec::new();
    let mut out = Vec::new();
    for name in source.names() {
        source.read_f32(name, &mut out).map_err(|e| e.to_string())?;
        if name == "weight" {
            weight.clone_from(&out);
        }
    }
    Ok(weight)
}

#[test]
fn every_file_is_treated_as_it_must_be() {
    let mut seen = 0;
    for (file, must, what) in index() {
        let result = read(&fixtures().join("hostile").join(&file));
        match (must.as_str(), &result) {
            ("refuse", Ok(_)) => panic!("{file} was read: {what}"),
            ("read", Err(e)) => panic!("{file} was refused: {e}"),
            ("read", Ok(weight)) => assert!(!weight.is_empty(), "{file}"),
            (_, Err(e)) => assert!(e.contains(&file) && e.len() < 800, "{file}: {e}"),
            (_, Ok(_)) => {}
        }
        seen += 1;
    }
    assert!(seen > 50);
    assert!(!Path::new("latile-hostile-payload-ran").exists());
}

#[test]
fn a_hostile_global_is_named() {
    for (file, global) in [
        ("os-system.ckpt", "os.system"),
        ("posix-system.ckpt", "posix.system"),
        ("subprocess.ckpt", "subprocess.Popen"),
        ("eval.ckpt", "builtins.eval"),
        ("stack-global.ckpt", "os.system"),
        ("inst.ckpt", "os.system"),
        ("torch-load.ckpt", "torch.load"),
        ("hub-load.ckpt", "torch.hub.load"),
    ] {
        let e = open(&fixtures().join("hostile").join(file)).err().unwrap();
        match &e.kind {
            SourceErrorKind::HostilePickle { global: found, .. } => {
                assert_eq!(found, global, "{file}")
            }
            other => panic!("{file}: {other}"),
        }
        assert!(e.to_string().contains("nothing was executed"), "{e}");
    }
}
